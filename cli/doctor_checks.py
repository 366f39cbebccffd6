"""Checks of the doctor that need only the standard library: packages, versions, the C compiler, caches, the machine.

Packages are looked up, not imported: the doctor runs where they are missing or broken.
"""

import getpass
import importlib.metadata
import importlib.util
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
from .package_metadata import extras, in_range, numbers, requirements

ROOT = Path(__file__).parents[1]
# The oldest and the newest versions that the test suite runs with.
TESTED: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "python": ((3, 11), (3, 13)),
    "torch": ((2, 11), (2, 13)),
    "triton": ((3, 6), (3, 7)),
}
DISK_BYTES = 1e9


@dataclass(frozen=True)
class Finding:
    """Result of one check, printed as one line."""

    status: Literal["ok", "warning", "FAIL"]
    check: str
    text: str
    """The finding, and what to do about it."""


def one_line(error: BaseException) -> str:
    """Return the type and message of an error, in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def guarded(check: str, function: Callable[[], list[Finding]]) -> list[Finding]:
    """Return the findings of `function`; an exception becomes a finding, so that the other checks still run."""
    try:
        return function()
    except Exception as error:
        return [Finding("FAIL", check, one_line(error))]


def output(*command: str | Path, folder: Path | None = None) -> str | None:
    """Return the output of a command, or None if it fails or takes longer than 20 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def installed(name: str) -> str | None:
    """Return a package's version, or None if its module or its metadata is missing."""
    # The base packages have the names of their modules.
    module = name.replace("-", "_")
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # Nightly builds have another name: pytorch-triton.
        others = importlib.metadata.packages_distributions().get(module)
        return importlib.metadata.version(others[0]) if others else None
    except (ImportError, ValueError):
        return None


def packages() -> list[Finding]:
    """Check the packages of the base installation and of each extra, and their versions."""
    try:
        needed = requirements()
    except importlib.metadata.PackageNotFoundError:
        text = "tilewright is not installed: run `pip install -e .` in its folder, or install its wheel"
        return [Finding("FAIL", "packages", text)]
    versions = {name: installed(name) for name in needed}
    missing, unfit = _missing(versions), _unfit(versions, needed)
    if not missing and not unfit:
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        return [Finding("ok", "packages", text), _extras()]
    said = [f"missing: {', '.join(missing)}"] if missing else []
    said += [f"{name} is {versions[name]}, expected {name}{needed[name]}" for name in unfit]
    wanted = shlex.join(name + needed[name].replace(" ", "") for name in missing + unfit)
    offline = f"`pip download -d wheels {wanted}` on a similar machine, then `pip install --no-index -f wheels {wanted}`"
    text = f"{'; '.join(said)}: `pip install {wanted}`; without a network: {offline}"
    return [Finding("FAIL", "packages", text), _extras()]


def _extras() -> Finding:
    complete, incomplete, is_old = [], [], False
    for extra in extras():
        needed = requirements(extra)
        versions = {name: _version(name) for name in needed}
        missing, unfit = _missing(versions), _unfit(versions, needed)
        is_old |= bool(unfit)
        lacks = [f"{name} is missing" for name in missing]
        lacks += [f"{name} is {versions[name]}, expected {needed[name]}" for name in unfit]
        incomplete += [f"{extra} ({', '.join(lacks[:2])}{', ...' if len(lacks) > 2 else ''})"] if lacks else []
        complete += [] if lacks else [extra]
    text = f"complete: {', '.join(complete) or 'none'}"
    if incomplete:
        text += f"; incomplete: {', '.join(incomplete)}: `pip install 'tilewright[EXTRA]'` completes one"
    return Finding("warning" if is_old else "ok", "extras", text)


def _missing(versions: Mapping[str, str | None]) -> list[str]:
    return [name for name, version in versions.items() if version is None]


def _unfit(versions: Mapping[str, str | None], needed: Mapping[str, str]) -> list[str]:
    return [name for name, version in versions.items() if version is not None and not in_range(version, needed[name])]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _span(name: str) -> str:
    return " to ".join(".".join(map(str, end)) for end in TESTED[name])


def versions() -> list[Finding]:
    """Compare the versions of Python, torch and Triton with the tested versions."""
    found = {"python": platform.python_version(), "torch": installed("torch"), "triton": installed("triton")}
    findings = []
    for name, version in found.items():
        if version is None:
            continue  # `packages` reports it
        oldest, newest = TESTED[name]
        if numbers(version) < oldest:
            findings.append(Finding("FAIL", name, f"{version} is too old: tested are {_span(name)}"))
        elif numbers(version)[: len(newest)] > newest:
            findings.append(Finding("warning", name, f"{version} is untested: tested are {_span(name)}"))
        else:
            findings.append(Finding("ok", name, version))
    triton, numpy = found["triton"], installed("numpy")
    if triton and numpy and numbers(triton)[:2] == (3, 6) and numbers(numpy) >= (2, 4):
        text = (
            f"Triton {triton} does not interpret kernels with NumPy {numpy}; for TRITON_INTERPRET=1, `pip install 'numpy<2.4'`"
        )
        findings.append(Finding("warning", "numpy", text))
    return findings


def compiler(has_gpu: bool) -> list[Finding]:
    """Check what Triton needs to compile: a C compiler, Python's headers, ptxas."""
    if platform.system() != "Linux":
        return [Finding("ok", "compiler", "not needed: Triton is available on Linux only")]
    # The same order as in Triton.
    name = os.environ.get("CC")
    path = shutil.which(name) if name is not None else shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    ptxas = _ptxas()
    found, missing = [], []
    if path:
        found.append(f"{path} {(output(path, '-dumpfullversion') or output(path, '-dumpversion') or '')}".strip())
    else:
        missing.append(
            f"CC is {name!r}, which is not a command" if name is not None else "no gcc and no clang: `apt install gcc`"
        )
    if header.is_file():
        found.append(str(header))
    else:
        missing.append(f"no {header}: `apt install python3-dev`")
    if ptxas:
        found.append(f"ptxas {ptxas}")
    elif triton := installed("triton"):
        missing.append(f"no ptxas, which is part of Triton: `pip install --force-reinstall --no-deps triton=={triton}`")
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
    """Return the cache folders of Triton, Inductor and Numba; each uses the first that is writable."""
    inductor = Path(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", _user_name()))
    triton = Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache")
    return {
        "Triton": [Path(os.environ.get("TRITON_CACHE_DIR") or triton)],
        "Inductor": [Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or inductor)],
        # Numba compiles the tokenizer only.
        "Numba": machine_code_folders(),
    }


def _unwritable(folder: Path) -> str | None:
    """Return why a folder is not writable, or None; a missing folder is judged by its parents and not created."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        # os.access would report a read-only disk as writable for root.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


def caches(has_gpu: bool) -> list[Finding]:
    """Check that the compile caches are writable and have free space."""
    variables = {"Triton": "TRITON_CACHE_DIR", "Inductor": "TORCHINDUCTOR_CACHE_DIR", "Numba": "NUMBA_CACHE_DIR"}
    findings = []
    for name, folders in cache_folders().items():
        reasons = {folder: _unwritable(folder) for folder in folders}
        used = next((folder for folder, reason in reasons.items() if reason is None), None)
        if used is None:
            # Without a cache, Numba compiles at every start. Triton and Inductor fail, which matters on a GPU only.
            status = "FAIL" if has_gpu and name != "Numba" else "warning"
            advice = f"set {variables[name]} to a writable folder"
            findings.append(
                Finding(status, "cache", f"{name} cannot write to {'; '.join(map(str, reasons.values()))}: {advice}")
            )
            continue
        there = next(folder for folder in (used, *used.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        text = f"{name}: {used}, {free / 1e9:,.1f} GB free"
        if free < DISK_BYTES:
            findings.append(Finding("warning", "cache", f"{text}: free some space, or set {variables[name]} to another disk"))
        else:
            findings.append(Finding("ok", "cache", text))
    return findings


def system() -> list[Finding]:
    """Describe this copy of Tilewright and the machine."""
    # A copy in site-packages may lie inside the checkout of another project.
    commit = output("git", "describe", "--always", "--dirty", "--abbrev=12", folder=ROOT) if (ROOT / ".git").exists() else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    parts = [f"tilewright {__version__}", f"commit {commit or 'unknown'}", f"in {ROOT}", platform.platform()]
    parts += [f"{usable} of {os.cpu_count()} CPUs", f"{ram:,.1f} GB RAM", sys.executable]
    return [Finding("ok", "system", ", ".join(parts))]
