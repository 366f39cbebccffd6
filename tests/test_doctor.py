"""What the doctor finds, in a process of its own where packages are gone, and check by check with what it looks at replaced."""

import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import tilewright.cli
from tilewright.cli import doctor, doctor_gpu, entry, main
from tilewright.cli import doctor_checks as checks

ROOT = Path(tilewright.cli.__file__).parents[1]
LINE = re.compile(r"(ok|warning|FAIL) +(\w+) +(\S.*)")
BLOCKED = ("tyro", "dacite", "rich", "numba", "regex", "tqdm", "matplotlib")
BLOCKER = f"""
import sys
from importlib.machinery import PathFinder
class Without:
    find_distributions = PathFinder.find_distributions
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {BLOCKED} else PathFinder.find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def environment(**more):
    """This process's, where Triton compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more


def findings_in(out):
    lines = [LINE.fullmatch(line) for line in out.splitlines()]
    assert all(lines[:-1]), out
    assert re.fullmatch(r"\d+ FAIL, \d+ warning, \d+ ok", out.splitlines()[-1])
    return [line.groups() for line in lines[:-1]]


def run(capsys, *arguments):
    try:
        status = main(["doctor", *arguments])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# Processes in which packages are missing


@pytest.fixture
def bare(tmp_path):
    """A folder that holds Tilewright as it is installed without its dependencies."""
    (tmp_path / "tilewright").symlink_to(ROOT)
    metadata = importlib.metadata.distribution("tilewright").read_text("METADATA")
    (tmp_path / "tilewright.dist-info").mkdir()
    (tmp_path / "tilewright.dist-info" / "METADATA").write_text(metadata)

    def run(script):
        # Without site-packages, and without those that the environment names.
        script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from tilewright.cli import main; {script}"
        command = [sys.executable, "-I", "-S", "-c", script]
        return subprocess.run(command, capture_output=True, text=True, env=environment())

    return run


def test_it_runs_where_no_package_is_there_and_names_all_in_one_line(bare):
    shown = bare("main(['doctor'])")
    assert shown.returncode == 1
    assert shown.stderr == ""
    [text] = [text for status, check, text in findings_in(shown.stdout) if check == "packages" and status == "FAIL"]
    names = [*checks.requirements()]
    assert len(names) >= 10
    assert text.startswith(f"missing: {', '.join(names)}: `pip install ")
    assert "`pip download -d wheels " in text
    for requirement in ("'torch>=2.11'", "'tyro>=0.9.5'", " regex "):
        assert text.count(requirement) == 3, "to install, to download, to install what was downloaded"
    assert "torch is missing" in next(text for _, check, text in findings_in(shown.stdout) if check == "gpu")


def test_other_commands_send_to_the_doctor_where_a_package_is_missing(bare):
    for arguments in ([], ["--help"], ["train", "stories-cpu"]):
        shown = bare(f"sys.exit(main({arguments}))")
        assert (shown.returncode, shown.stdout) == (1, "")
        assert shown.stderr == "tilewright: error: tyro is missing: `tilewright doctor` says how to get what is\n"


def test_it_explains_itself_where_no_package_is_there(bare):
    shown = bare("main(['doctor', '--help'])")
    assert shown.returncode == 0
    assert "--time-limit SECONDS" in shown.stdout


def test_it_compiles_a_kernel_where_all_but_torch_and_triton_cannot_be_imported(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    command = [sys.executable, "-m", "tilewright", "doctor"]
    variables = environment(PYTHONPATH=str(tmp_path))
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert shown.returncode == 1, shown.stderr
    assert "Traceback" not in shown.stdout + shown.stderr
    assert "\x1b" not in shown.stdout
    found = findings_in(shown.stdout)
    [text] = [text for status, check, text in found if check == "packages" and status == "FAIL"]
    assert {*text.split(": `")[0].removeprefix("missing: ").split(", ")} == {*BLOCKED}
    assert {check for _, check, _ in found} >= {"system", "packages", "python", "torch", "gpu", "kernel", "compiler", "cache"}
    if doctor_gpu.HAS_TRITON:
        [(status, _, text)] = [finding for finding in found if finding[1] == "kernel"]
        assert (status, text[:8]) == ("ok", "compiled")


def test_the_process_that_prints_imports_nothing_that_may_be_missing(tmp_path):
    heavy = ("tyro", "dacite", "rich", "numba", "regex", "tqdm", "matplotlib", "torch", "numpy", "triton", "safetensors")
    script = (
        "import sys, tilewright.cli; from tilewright.cli import doctor_checks as c; "
        "c.system(), c.packages(), c.versions(), c.compiler(True), c.caches(True); "
        f"sys.exit(str({{*{heavy}}} & {{*sys.modules}}) if {{*{heavy}}} & {{*sys.modules}} else 0)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.gpu
def test_it_runs_a_kernel_on_the_gpu():
    command = [sys.executable, "-m", "tilewright", "doctor"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert shown.returncode == 0, shown.stdout + shown.stderr
    found = findings_in(shown.stdout)
    first = next(text for _, check, text in found if check == "gpu")
    assert first.startswith(f"cuda:0, {torch.cuda.get_device_name()}")
    assert all("its result is right" in text for _, check, text in found if check == "kernel")


# Packages and versions


def test_ranges_are_those_of_packaging():
    versions = ["0.9", "0.9.5", "0.9.5.0", "0.10", "1", "1.25.9", "1.26", "1.26.0", "1.26.1", "2.4.6", "2.11.0+cpu", "10.0"]
    for specifier in ("", ">=1.26", ">=0.9.5", "<2", ">1.26", "<=1.26", "==1.26", "!=1.26", ">=1,<2.4", ">=1.26, !=2.4.6"):
        for version in versions:
            assert checks.in_range(version, specifier) == SpecifierSet(specifier).contains(version), (version, specifier)
    # Where it differs: a vendor's own build.
    assert checks.in_range("2.11.0a0+git1234", ">=2.11")
    with pytest.raises(ValueError, match=r"range '~=2\.0' of versions is unknown"):
        checks.in_range("2.0", "~=2.0")


def test_what_is_needed_is_what_pip_would_install(monkeypatch):
    for system, name in (("Linux", "linux"), ("Darwin", "darwin")):
        monkeypatch.setattr(checks.platform, "system", lambda system=system: system)
        monkeypatch.setattr(checks.sys, "platform", name)
        variables = {"platform_system": system, "sys_platform": name, "extra": ""}
        wanted = [Requirement(line) for line in importlib.metadata.requires("tilewright")]
        wanted = [each for each in wanted if each.marker is None or each.marker.evaluate(variables)]
        assert {name: SpecifierSet(range) for name, range in checks.requirements().items()} == {
            each.name: each.specifier for each in wanted
        }
        assert ("triton" in checks.requirements()) == (system == "Linux")


def test_markers_are_read_or_refused():
    assert checks.applies("")
    assert not checks.applies('extra == "dev"')
    assert not checks.applies("sys_platform == 'beos' and platform_system != 'BeOS'")
    with pytest.raises(ValueError, match=r"marker .* is unknown"):
        checks.applies('python_version < "3.12"')


def test_the_packages_of_this_environment_are_found():
    for name in checks.requirements():
        assert checks.installed(name) == importlib.metadata.version(name)
    assert checks.installed("no-such-package") is None
    [finding] = checks.packages()
    assert finding.status == "ok"
    assert f"torch {importlib.metadata.version('torch')}" in finding.text


def test_a_package_may_be_installed_under_another_name(monkeypatch):
    def version(name):
        if name != "pytorch-triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.7.0"

    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: name != "numba")
    monkeypatch.setattr(checks.importlib.metadata, "version", version)
    monkeypatch.setattr(checks.importlib.metadata, "packages_distributions", lambda: {"triton": ["pytorch-triton"]})
    assert [checks.installed(name) for name in ("triton", "regex", "numba")] == ["3.7.0", None, None]


def test_missing_and_old_packages_are_one_line(monkeypatch):
    versions = {"regex": None, "tyro": None, "numpy": "1.21.0", "numba": "0.70"}
    monkeypatch.setattr(checks, "installed", lambda name: versions.get(name, "99.0"))
    [finding] = checks.packages()
    assert finding.status == "FAIL"
    assert finding.text.startswith(
        "missing: regex, tyro; numpy is 1.21.0, numpy>=1.26 is needed: `pip install regex 'tyro>=0.9.5' 'numpy>=1.26'`;"
    )
    assert "\n" not in finding.text


def test_it_says_when_tilewright_itself_is_not_installed(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(checks.importlib.metadata, "requires", requires)
    [finding] = checks.packages()
    assert finding.status == "FAIL"
    assert "pip install -e ." in finding.text
    assert not entry._is_needed("tyro")


def test_what_is_tested_is_what_the_project_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [tuple(map(int, found.split("."))) for found in re.findall(r"Python :: (\d+\.\d+)", str(project["classifiers"]))]
    assert checks.TESTED["python"] == (min(pythons), max(pythons))
    assert project["requires-python"] == ">=3.11"
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name in ("torch", "triton"):
        oldest, newest = checks.TESTED[name]
        [declared] = [line for line in project["dependencies"] if line.startswith(name)]
        assert declared.startswith(f"{name}>={'.'.join(map(str, oldest))}")
        assert oldest <= checks.numbers(pinned[name])[:2] <= newest


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [
        ("python", "3.10.14", "FAIL"),
        ("python", "3.11.0", "ok"),
        ("python", "3.13.9", "ok"),
        ("python", "3.14.0rc1", "warning"),
        ("torch", "2.10.2+cu128", "FAIL"),
        ("torch", "2.11.0a0+git12", "ok"),
        ("torch", "2.13.1", "ok"),
        ("torch", "2.14.0", "warning"),
        ("torch", "3.0", "warning"),
        ("triton", "3.5.1", "FAIL"),
        ("triton", "3.7.1", "ok"),
        ("triton", "4.0.0", "warning"),
    ],
)
def test_versions_outside_the_tested_range(monkeypatch, name, version, status):
    found = {"python": "3.12.1", "torch": "2.12.0", "triton": "3.7.0", "numpy": "2.0", name: version}
    monkeypatch.setattr(checks, "installed", found.get)
    monkeypatch.setattr(checks.platform, "python_version", lambda: found["python"])
    assert [(each.check, each.status) for each in checks.versions()] == [
        (each, status if each == name else "ok") for each in ("python", "torch", "triton")
    ]
    [text] = [each.text for each in checks.versions() if each.check == name]
    word = {"ok": version, "warning": "is untested: ", "FAIL": "is too old: "}[status]
    assert word in text


@pytest.mark.parametrize(
    ("triton", "numpy", "warned"), [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.0", "2.4.0", False)]
)
def test_the_interpreter_of_an_old_triton_does_not_know_new_arrays(monkeypatch, triton, numpy, warned):
    monkeypatch.setattr(checks, "installed", {"triton": triton, "numpy": numpy}.get)
    findings = [each for each in checks.versions() if each.check == "numpy"]
    assert [each.status for each in findings] == ["warning"] * warned
    assert all("TRITON_INTERPRET=1" in each.text and "numpy<2.4" in each.text for each in findings)


# The compiler and the caches


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """A machine on which Triton can compile."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(checks.platform, "system", lambda: "Linux")
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/bin/{name}" if name in ("gcc", "clang") else None)
    monkeypatch.setattr(checks, "output", lambda *command: "12.8.0")
    monkeypatch.setattr(checks.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr(checks, "_ptxas", lambda: "12.8")
    return tmp_path


def test_a_whole_compiler(tools, monkeypatch):
    [finding] = checks.compiler(True)
    assert finding == checks.Finding("ok", "compiler", f"/bin/gcc 12.8.0, {tools}/Python.h, ptxas 12.8")
    monkeypatch.setattr(checks.shutil, "which", lambda name: "/bin/clang" if name == "clang" else None)
    assert checks.compiler(True)[0].text.startswith("/bin/clang 12.8.0")


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ("compiler", "no gcc and no clang: `apt install gcc`"),
        ("CC", "CC is 'ccache gcc', which is no command"),
        ("headers", "Python.h: `apt install python3-dev`"),
        ("ptxas", "no ptxas"),
    ],
)
def test_what_the_compiler_lacks_fails_where_there_is_a_gpu(tools, monkeypatch, broken, text):
    if broken == "compiler":
        monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    elif broken == "CC":
        monkeypatch.setenv("CC", "ccache gcc")
    elif broken == "headers":
        (tools / "Python.h").unlink()
    else:
        monkeypatch.setattr(checks, "_ptxas", lambda: None)
    for has_gpu, status in ((True, "FAIL"), (False, "warning")):
        [finding] = checks.compiler(has_gpu)
        assert finding.status == status
        assert text in finding.text


def test_a_compiler_of_which_all_is_missing_is_one_command(tools, monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    (tools / "Python.h").unlink()
    assert checks.compiler(True)[0].text.endswith("`apt install gcc python3-dev`)")
    monkeypatch.setattr(checks.platform, "system", lambda: "Darwin")
    assert checks.compiler(False)[0].status == "ok"


@pytest.mark.skipif(not doctor_gpu.HAS_TRITON, reason="Triton cannot be imported")
def test_the_assembler_is_the_one_that_triton_takes(monkeypatch):
    import triton.knobs

    assert checks._ptxas() == f"{triton.knobs.nvidia.ptxas.version} ({triton.knobs.nvidia.ptxas.path})"
    # Triton, too, falls back to its own.
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/no/such/ptxas")
    assert checks._ptxas() == f"{triton.knobs.nvidia.ptxas.version} ({triton.knobs.nvidia.ptxas.path})"


@pytest.fixture
def folders(monkeypatch, tmp_path):
    for name in ("TRITON_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name / "deep"))
    return tmp_path


def test_caches_are_found_and_not_made(folders):
    findings = checks.caches(True)
    assert [each.status for each in findings] == ["ok"] * 3
    assert [each.text.split(":")[0] for each in findings] == ["Triton", "Inductor", "Numba"]
    assert f"Triton: {folders}/TRITON_CACHE_DIR/deep, " in findings[0].text
    assert not [*folders.iterdir()]


def test_a_cache_that_cannot_be_written_fails_where_there_is_a_gpu(folders, monkeypatch):
    # No folder: what stops root, too.
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        (folders / name).touch()
    assert [each.status for each in checks.caches(True)] == ["FAIL", "FAIL", "ok"], "Numba takes the next"
    assert str(ROOT / "tokenizer" / "__pycache__") in checks.caches(True)[2].text
    monkeypatch.setattr(checks, "_trouble", lambda folder: f"{folder}: Read-only file system")
    assert [each.status for each in checks.caches(True)] == ["FAIL", "FAIL", "warning"]
    assert [each.status for each in checks.caches(False)] == ["warning"] * 3
    for finding, name in zip(checks.caches(True), ("TRITON", "TORCHINDUCTOR", "NUMBA"), strict=True):
        assert "Read-only file system" in finding.text
        assert f"{name}_CACHE_DIR" in finding.text.split(": ")[-1]


def test_a_full_disk_is_told_of(folders, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda folder: usage(10**12, 10**12 - 10**8, 10**8))
    assert [each.status for each in checks.caches(True)] == ["warning"] * 3
    assert "0.1 GB free: make room" in checks.caches(True)[0].text


def test_the_caches_are_those_of_the_libraries(folders, monkeypatch):
    from numba.core import caching, config
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    from tilewright.tokenizer import scanner

    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(config, "CACHE_DIR", "")  # read when Numba is imported
    found = checks.cache_folders()
    assert found["Inductor"] == [Path(default_cache_dir())]
    function = next(value for value in vars(scanner).values() if hasattr(value, "__wrapped__")).__wrapped__
    assert Path(caching.FunctionCache(function).cache_path) == found["Numba"][0]
    # Numba 0.61 has it under a private name.
    in_tree = getattr(caching, "InTreeCacheLocator", None) or caching._InTreeCacheLocator
    monkeypatch.setattr(in_tree, "from_function", classmethod(lambda *_: None))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders / "user"))
    assert Path(caching.FunctionCache(function).cache_path).parent == checks.cache_folders()["Numba"][1]
    if doctor_gpu.HAS_TRITON:
        import triton.knobs

        assert found["Triton"] == [Path(triton.knobs.cache.dir)]
        monkeypatch.setenv("TRITON_HOME", str(folders))
        assert checks.cache_folders()["Triton"] == [Path(triton.knobs.cache.get_triton_dir("cache"))]


def test_the_machine(monkeypatch):
    [finding] = checks.system()
    assert finding.text.startswith(f"tilewright {tilewright.__version__}, commit ")
    assert re.search(r"\d of \d+ CPUs, [\d.,]+ GB RAM", finding.text)
    monkeypatch.setattr(checks, "output", lambda *command, folder: None)
    assert "commit unknown" in checks.system()[0].text


# The process that looks at GPUs


def child(script):
    begin = 'import json, os, signal, subprocess, sys, time\nprint(json.dumps({"begin": "kernel"}), flush=True)\n'
    return [sys.executable, "-c", begin + script]


SOUND = 'print(\'{"status": "ok", "check": "gpu", "text": "sound"}\', flush=True)\n'


def test_what_the_process_says_is_believed_and_what_it_prints_besides_is_not():
    noise = 'print("a library talks"); print("[1]"); print(\'{"status": 1}\'); print("3")\n'
    assert doctor.run_checks(child(noise + SOUND + 'print(\'{"stat\', end="")'), 60) == [checks.Finding("ok", "gpu", "sound")]


def test_a_process_that_dies_is_told_of():
    segfault = doctor.run_checks(child(SOUND + "os.kill(os.getpid(), signal.SIGSEGV)"), 60)
    assert segfault == [
        checks.Finding("ok", "gpu", "sound"),
        checks.Finding("FAIL", "kernel", "its process was killed by SIGSEGV: it said nothing"),
    ]
    failed = doctor.run_checks(child("raise ImportError('libcudart.so.13: cannot open shared object file')"), 60)
    assert [(each.status, each.check) for each in failed] == [("FAIL", "kernel")]
    assert failed[0].text == "its process ended with status 1: ImportError: libcudart.so.13: cannot open shared object file"
    assert doctor.run_checks([sys.executable, "-c", "import sys; sys.exit(3)"], 60)[0].check == "torch"


class Patient(subprocess.Popen):
    """A process whose time is up once it has written down its children."""

    file: Path

    def wait(self, timeout=None):
        while timeout == 77 and not self.file.exists():
            time.sleep(0.01)
        return super().wait(0 if timeout == 77 else timeout)


def test_a_process_that_hangs_is_killed_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setattr(Patient, "file", tmp_path / "pids", raising=False)
    monkeypatch.setattr(doctor.subprocess, "Popen", Patient)
    hang = f"""
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open({str(tmp_path / "new")!r}, "w") as file:
    file.write(f"{{os.getpid()}} {{other.pid}}")
os.rename({str(tmp_path / "new")!r}, {str(tmp_path / "pids")!r})
time.sleep(600)
"""
    findings = doctor.run_checks(child(SOUND + hang), 77)
    assert findings[0] == checks.Finding("ok", "gpu", "sound"), "what was found before it hung is kept"
    assert (findings[1].status, findings[1].check) == ("FAIL", "kernel")
    assert findings[1].text.startswith("no answer in 77 s: ")
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z":
            time.sleep(0.01)


def test_the_limit_of_time_is_kept():
    findings = doctor.run_checks([sys.executable, "-c", "import time; time.sleep(600)"], 0.2)
    assert [(each.status, each.check) for each in findings] == [("FAIL", "torch")]
    assert findings[0].text.startswith("no answer in 0.2 s")


def test_a_process_that_cannot_be_killed_is_left_behind(monkeypatch):
    killed = []

    class Stuck:
        pid = 12345

        def __init__(self, *_, **__):
            pass

        def wait(self, timeout=None):
            assert timeout is not None
            raise subprocess.TimeoutExpired("stuck", timeout)

    monkeypatch.setattr(doctor.subprocess, "Popen", Stuck)
    monkeypatch.setattr(doctor.os, "killpg", lambda *which: killed.append(which))
    assert doctor.run_checks(["stuck"], 1)[0].status == "FAIL"
    assert killed == [(12345, signal.SIGKILL)]


def test_an_interruption_ends_the_process_too(monkeypatch):
    killed = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if not killed:
                killed.append(self.pid)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(doctor.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        doctor.run_checks([sys.executable, "-c", "import time; time.sleep(600)"], 60)
    with pytest.raises(ProcessLookupError):
        os.kill(killed[0], 0)


# GPUs and the kernel, with torch made to tell of others


@pytest.fixture
def volta(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15_500_000_000, 16_900_000_000))
    monkeypatch.setattr(doctor_gpu, "_driver", lambda: "580.1")


def test_a_gpu_that_is_too_old(volta):
    [finding] = doctor_gpu.gpu(1)
    assert finding.status == "FAIL"
    assert "cuda:1, Tesla V100, driver 580.1, " in finding.text
    assert "capability 7.0, 15.5 of 16.9 GB free, datasheet peak unknown" in finding.text
    assert "attention needs capability 8.0" in finding.text


def test_a_gpu_that_will_do(volta, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    [finding] = doctor_gpu.gpu(0)
    assert finding.status == "ok"
    assert finding.text.endswith("datasheet peak known")


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    [finding] = doctor_gpu.no_gpu()
    assert finding.status == "warning"
    assert "is built without CUDA" in finding.text
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(doctor_gpu, "_driver", lambda: None)
    assert "there is no NVIDIA driver" in doctor_gpu.no_gpu()[0].text

    def init():
        raise RuntimeError("The NVIDIA driver on your system is\ntoo old (found version 11040).")

    monkeypatch.setattr(doctor_gpu, "_driver", lambda: "470.1")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    text = doctor_gpu.no_gpu()[0].text
    assert "driver 470.1, torch for CUDA 12.8: The NVIDIA driver on your system is too old (found version 11040)." in text
    assert "CUDA_VISIBLE_DEVICES is '7'" in text


def test_the_driver_is_asked_in_two_ways(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_gpu, "output", lambda *_: "580.65.06\n580.65.06")
    assert doctor_gpu._driver() == "580.65.06"
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.57.08  Release Build\nGCC 12\n"
    )
    monkeypatch.setattr(doctor_gpu, "output", lambda *_: None)
    monkeypatch.setattr(doctor_gpu, "Path", lambda _: tmp_path / "version")
    assert doctor_gpu._driver() == "575.57.08"
    (tmp_path / "version").unlink()
    assert doctor_gpu._driver() is None


@pytest.mark.skipif(not doctor_gpu.HAS_TRITON, reason="Triton cannot be imported")
def test_the_kernel_runs_and_its_result_is_looked_at(device, monkeypatch):
    [finding] = doctor_gpu.run_kernel(device)
    assert finding.status == "ok"
    assert "its result is right" in finding.text

    class Wrong:
        def __getitem__(self, grid):
            return lambda x, y, size, block: y.copy_(2 * x)

    monkeypatch.setattr(doctor_gpu, "_kernel", Wrong())
    [finding] = doctor_gpu.run_kernel(device)
    assert finding.status == "FAIL"
    assert "its result is wrong" in finding.text


def test_a_kernel_that_does_not_compile_is_a_warning_where_none_would_run(monkeypatch):
    def inspect(case, architecture):
        assert architecture == "sm_90"
        raise RuntimeError("Internal Triton PTX codegen error\n`ptxas` stderr:\nfatal")

    monkeypatch.setattr(doctor_gpu, "inspect", inspect)
    [finding] = doctor_gpu.compile_kernel()
    assert finding.status == "warning"
    assert finding.text.endswith("RuntimeError: Internal Triton PTX codegen error `ptxas` stderr: fatal")


@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("interprets", [True, False])
@pytest.mark.parametrize("num_gpus", [0, 2])
def test_which_checks_are_made(monkeypatch, has_triton, interprets, num_gpus):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(doctor_gpu, "HAS_TRITON", has_triton)
    monkeypatch.setattr(doctor_gpu, "interpreting", lambda: interprets)
    made = [(name, getattr(check, "func", check), getattr(check, "args", ())) for name, check in doctor_gpu.all_checks()]
    gpus = [("gpu", doctor_gpu.gpu, (index,)) for index in range(num_gpus)] or [("gpu", doctor_gpu.no_gpu, ())]
    kernels = [("kernel", doctor_gpu.run_kernel, (torch.device("cuda", index),)) for index in range(num_gpus)]
    kernels = kernels or [("kernel", doctor_gpu.compile_kernel, ())]
    if interprets or not has_triton:
        kernels = [("kernel", doctor_gpu.no_kernel, ())]
        [finding] = doctor_gpu.no_kernel()
        assert finding.status == "warning"
        assert ("TRITON_INTERPRET is set" if interprets else "Triton cannot be imported") in finding.text
    assert made == gpus + kernels


def test_an_error_of_cuda_is_a_line_and_the_next_check_is_made(monkeypatch, capsys):
    def broken():
        raise RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`")

    sound = checks.Finding("ok", "kernel", "sound")
    monkeypatch.setattr(doctor_gpu, "all_checks", lambda: [("gpu", broken), ("kernel", lambda: [sound])])
    doctor_gpu.main()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    text = "RuntimeError: CUDA error: out of memory Compile with `TORCH_USE_CUDA_DSA`"
    assert said[1:] == [
        {"begin": "gpu"},
        {"status": "FAIL", "check": "gpu", "text": text},
        {"begin": "kernel"},
        vars(sound),
    ]


# All of it


@pytest.fixture
def healthy(monkeypatch):
    """A machine on which each check finds one thing, and all is well; returned is what the GPU's checks find."""
    of_gpu = [checks.Finding("ok", "gpu", "cuda:0"), checks.Finding("ok", "kernel", "right")]
    monkeypatch.setattr(doctor, "_DRIVER", Path("/no/such/device"))
    monkeypatch.setattr(doctor, "gpu_checks", lambda time_limit: of_gpu)
    for name in ("system", "packages", "versions"):
        monkeypatch.setattr(doctor, name, lambda name=name: [checks.Finding("ok", name, "well")])
    for name in ("compiler", "caches"):
        monkeypatch.setattr(doctor, name, lambda has_gpu, name=name: [checks.Finding("ok", name, f"with a GPU: {has_gpu}")])
    return of_gpu


def test_the_exit_status_is_0_with_warnings_and_1_with_a_failure(healthy, capsys):
    status, out, err = run(capsys)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "ok       system    well"
    assert out.splitlines()[-1] == "0 FAIL, 0 warning, 7 ok"
    healthy[0] = checks.Finding("warning", "gpu", "none")
    status, out, _ = run(capsys)
    assert status == 0
    assert "warning  gpu       none\n" in out
    healthy[1] = checks.Finding("FAIL", "kernel", "wrong")
    status, out, _ = run(capsys)
    assert status == 1
    assert "FAIL     kernel    wrong\n" in out
    assert out.splitlines()[-1] == "1 FAIL, 1 warning, 5 ok"


def test_a_check_that_breaks_is_a_failure_and_no_traceback(healthy, capsys, monkeypatch):
    def broken():
        raise KeyError("what nobody\nthought of")

    monkeypatch.setattr(doctor, "packages", broken)
    status, out, err = run(capsys)
    assert (status, err) == (1, "")
    assert "FAIL     packages  KeyError: 'what nobody\\nthought of'\n" in out
    assert len(out.splitlines()) == 8, "the others are made nevertheless"


def test_a_gpu_is_there_when_torch_or_the_driver_says_so(healthy, capsys, monkeypatch, tmp_path):
    assert "with a GPU: True" in run(capsys)[1]
    healthy[0] = checks.Finding("FAIL", "gpu", "no answer")
    assert "with a GPU: True" in run(capsys)[1]
    healthy[0] = checks.Finding("warning", "gpu", "none")
    assert "with a GPU: False" in run(capsys)[1]
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path)
    assert "with a GPU: True" in run(capsys)[1]


def test_the_time_limit_is_handed_on(healthy, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(doctor, "gpu_checks", lambda time_limit: seen.append(time_limit) or [])
    run(capsys)
    run(capsys, "--time-limit", "3.5")
    assert seen == [120, 3.5]
    for limit in ("0", "-1", "nan", "inf"):
        status, out, err = run(capsys, "--time-limit", limit)
        assert (status, out) == (2, "")
        assert err.startswith("tilewright: error: time_limit is ")
    assert run(capsys, "--time-limit", "soon")[0] == 2
    assert run(capsys, "--colour")[0] == 2


def test_without_torch_no_process_is_started(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    monkeypatch.setattr(doctor, "run_checks", lambda *_: pytest.fail("torch is missing"))
    [finding] = doctor.gpu_checks(1)
    assert (finding.status, finding.check) == ("warning", "gpu")
