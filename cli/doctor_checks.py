"""The doctor's checks that need nothing but Python: packages, versions, the C compiler, caches, the machine.

Packages are looked up, not imported: the doctor runs where they are missing or broken.
"""

import getpass
import importlib.metadata
import importlib.util
import operator
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import __version__
from ..caches import machine_code_folders

ROOT = Path(__file__).parents[1]
# What the suite and the bench have run with, the oldest and the newest.
TESTED: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "python": ((3, 11), (3, 13)),
    "torch": ((2, 11), (2, 13)),
    "triton": ((3, 6), (3, 7)),
}
DISK_BYTES = 1e9

_COMPARE = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What one check has found; it is shown as one line."""

    status: Literal["ok", "warning", "FAIL"]
    check: str
    text: str
    """What was found, and what to do about it."""


def one_line(error: BaseException) -> str:
    """Return an error's kind and message, short enough for a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def guarded(check: str, function: Callable[[], list[Finding]]) -> list[Finding]:
    """Return what `function` finds; an error that it raises is a finding, too, as the other checks are still to be made."""
    try:
        return function()
    except Exception as error:
        return [Finding("FAIL", check, one_line(error))]


def output(*command: str | Path, folder: Path | None = None) -> str | None:
    """Return what a command prints; None where it fails, or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def installed(name: str) -> str | None:
    """Return a package's version, or None where it is not installed or what its version belongs to is gone."""
    # All that Tilewright needs are imported by the names that they are installed by.
    module = name.replace("-", "_")
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # Under another name, as nightly builds have pytorch-triton.
        others = importlib.metadata.packages_distributions().get(module)
        return importlib.metadata.version(others[0]) if others else None
    except (ImportError, ValueError):
        return None


def numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, without zeros at the end: (2, 13) of 2.13.0+cpu.

    So 2.11.0a0 counts as 2.11: a vendor's own build of torch calls itself so, and is no less new.
    """
    found = [int(number) for number in re.findall(r"\d+", (re.match(r"[\d.]*", version) or [""])[0])]
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)


def in_range(version: str, specifier: str) -> bool:
    """Whether a version is in a range such as `>=1.26,<3`."""
    for clause in filter(None, re.split(r"[,\s]+", specifier)):
        found = re.fullmatch(r"([<>=!]=|[<>])([\d.]+)", clause)
        if found is None:
            raise ValueError(f"range {specifier!r} of versions is unknown: >=, <=, >, <, == and != are known, and numbers")
        if not _COMPARE[found[1]](numbers(version), numbers(found[2])):
            return False
    return True


def applies(marker: str) -> bool:
    """Whether a requirement with this environment marker is one of this machine; those of extras are not."""
    if "extra" in marker:
        return False
    values = {"platform_system": platform.system(), "sys_platform": sys.platform, "platform_machine": platform.machine()}
    for clause in filter(None, (clause.strip() for clause in marker.split(" and "))):
        found = re.fullmatch(r"(\w+)\s*([!=]=)\s*[\"']([\w-]*)[\"']", clause)
        if found is None or found[1] not in values:
            raise ValueError(f"marker {marker!r} is unknown: {', '.join(values)} are known, ==, != and `and`")
        if not _COMPARE[found[2]](values[found[1]], found[3]):
            return False
    return True


def requirements() -> dict[str, str]:
    """Return the packages that this installation needs on this machine, and the range of each; extras are left out."""
    found: dict[str, str] = {}
    for line in importlib.metadata.requires("tilewright") or ():
        requirement, _, marker = line.partition(";")
        if applies(marker):
            name, specifier = re.fullmatch(r"([\w.-]+)\s*\(?([^()]*)\)?\s*", requirement.strip()).groups()  # pyright: ignore
            found[name] = specifier.strip()
    return found


def packages() -> list[Finding]:
    """Look for every package that Tilewright needs, in a version that will do."""
    try:
        needed = requirements()
    except importlib.metadata.PackageNotFoundError:
        return [Finding("FAIL", "packages", "tilewright is not installed: `pip install -e .` in its folder, or its wheel")]
    versions = {name: installed(name) for name in needed}
    missing = [name for name, version in versions.items() if version is None]
    unfit = [name for name, version in versions.items() if version is not None and not in_range(version, needed[name])]
    if not missing and not unfit:
        return [Finding("ok", "packages", ", ".join(f"{name} {version}" for name, version in versions.items()))]
    said = [f"missing: {', '.join(missing)}"] if missing else []
    said += [f"{name} is {versions[name]}, {name}{needed[name]} is needed" for name in unfit]
    wanted = shlex.join(name + needed[name].replace(" ", "") for name in missing + unfit)
    offline = f"`pip download -d wheels {wanted}` on a like one that has it, then `pip install --no-index -f wheels {wanted}`"
    text = f"{'; '.join(said)}: `pip install {wanted}`; on a machine without a network: {offline}"
    return [Finding("FAIL", "packages", text)]


def _span(name: str) -> str:
    return " to ".join(".".join(map(str, end)) for end in TESTED[name])


def versions() -> list[Finding]:
    """Hold the versions of Python, torch and Triton against those that were tested."""
    found = {"python": platform.python_version(), "torch": installed("torch"), "triton": installed("triton")}
    findings = []
    for name, version in found.items():
        if version is None:
            continue  # told of by `packages`, where it is needed
        oldest, newest = TESTED[name]
        if numbers(version) < oldest:
            findings.append(Finding("FAIL", name, f"{version} is too old: {_span(name)} were tested"))
        elif numbers(version)[: len(newest)] > newest:
            findings.append(Finding("warning", name, f"{version} is untested: {_span(name)} were tested"))
        else:
            findings.append(Finding("ok", name, version))
    triton, numpy = found["triton"], installed("numpy")
    if triton and numpy and numbers(triton)[:2] == (3, 6) and numbers(numpy) >= (2, 4):
        text = f"Triton {triton} does not interpret with NumPy {numpy}, which matters with TRITON_INTERPRET=1 only"
        text += ": `pip install 'numpy<2.4'`"
        findings.append(Finding("warning", "numpy", text))
    return findings


def compiler(has_gpu: bool) -> list[Finding]:
    """Look for what Triton compiles with: a C compiler, Python's headers, ptxas."""
    if platform.system() != "Linux":
        return [Finding("ok", "compiler", "not needed: Triton, which compiles kernels, is there for Linux only")]
    # As Triton does.
    name = os.environ.get("CC")
    path = shutil.which(name) if name is not None else shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    ptxas = _ptxas()
    found, missing = [], []
    if path:
        found.append(f"{path} {(output(path, '-dumpfullversion') or output(path, '-dumpversion') or '')}".strip())
    else:
        missing.append(f"CC is {name!r}, which is no command" if name is not None else "no gcc and no clang: `apt install gcc`")
    if header.is_file():
        found.append(str(header))
    else:
        missing.append(f"no {header}: `apt install python3-dev`")
    if ptxas:
        found.append(f"ptxas {ptxas}")
    elif triton := installed("triton"):
        missing.append(f"no ptxas, which Triton brings: `pip install --force-reinstall --no-deps triton=={triton}`")
    if missing:
        advice = " (all of it: `apt install gcc python3-dev`)" if len(missing) > 1 else ""
        return [Finding("FAIL" if has_gpu else "warning", "compiler", "; ".join(missing) + advice)]
    return [Finding("ok", "compiler", ", ".join(found))]


def _ptxas() -> str | None:
    spec = importlib.util.find_spec("triton") if installed("triton") else None
    own = [Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"] if spec and spec.origin else []
    named = [Path(os.environ["TRITON_PTXAS_PATH"])] if "TRITON_PTXAS_PATH" in os.environ else []
    for path in named + own:
        found = re.search(r"release (\d+\.\d+)", output(path, "--version") or "")
        if found:
            return f"{found[1]} ({path})"
    return None


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid_{os.getuid()}"


def cache_folders() -> dict[str, list[Path]]:
    """Return where Triton, Inductor and Numba keep what they compile; the first that can be written to is used."""
    inductor = Path(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", _user_name()))
    triton = Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache")
    return {
        "Triton": [Path(os.environ.get("TRITON_CACHE_DIR") or triton)],
        "Inductor": [Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or inductor)],
        # The tokenizer is all that Numba compiles.
        "Numba": machine_code_folders(),
    }


def _trouble(folder: Path) -> str | None:
    """Return why nothing can be written to a folder, which need not be there yet, and is not made."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        # Not os.access, which promises root what a read-only disk does not keep.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


def caches(has_gpu: bool) -> list[Finding]:
    """See whether what is compiled can be kept, and whether there is room for it."""
    variables = {"Triton": "TRITON_CACHE_DIR", "Inductor": "TORCHINDUCTOR_CACHE_DIR", "Numba": "NUMBA_CACHE_DIR"}
    findings = []
    for name, folders in cache_folders().items():
        troubles = {folder: _trouble(folder) for folder in folders}
        used = next((folder for folder, trouble in troubles.items() if trouble is None), None)
        if used is None:
            # Numba then compiles at every start; Triton and Inductor fail, but a CPU has little use for them.
            status = "FAIL" if has_gpu and name != "Numba" else "warning"
            advice = f"name a folder that can be written to by {variables[name]}"
            findings.append(
                Finding(status, "cache", f"{name} cannot write to {'; '.join(map(str, troubles.values()))}: {advice}")
            )
            continue
        there = next(folder for folder in (used, *used.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        text = f"{name}: {used}, {free / 1e9:,.1f} GB free"
        if free < DISK_BYTES:
            findings.append(Finding("warning", "cache", f"{text}: make room, or name another disk by {variables[name]}"))
        else:
            findings.append(Finding("ok", "cache", text))
    return findings


def system() -> list[Finding]:
    """Tell which Tilewright this is, and what it runs on."""
    # A copy in site-packages may lie inside the checkout of something else.
    commit = output("git", "describe", "--always", "--dirty", "--abbrev=12", folder=ROOT) if (ROOT / ".git").exists() else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    parts = [f"tilewright {__version__}", f"commit {commit or 'unknown'}", f"in {ROOT}", platform.platform()]
    parts += [f"{usable} of {os.cpu_count()} CPUs", f"{ram:,.1f} GB RAM", sys.executable]
    return [Finding("ok", "system", ", ".join(parts))]
