"""`tilewright doctor` in processes without some packages, and its report with replaced checks."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tilewright.cli
from tilewright.cli import doctor, doctor_gpu, main, package_metadata
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
    """Return this process's environment variables without TRITON_INTERPRET, so that Triton compiles."""
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
    """Return a function that runs a script with Tilewright installed and without its dependencies."""
    (tmp_path / "tilewright").symlink_to(ROOT)
    metadata = importlib.metadata.distribution("tilewright").read_text("METADATA")
    (tmp_path / "tilewright.dist-info").mkdir()
    (tmp_path / "tilewright.dist-info" / "METADATA").write_text(metadata)

    def run(script):
        # -I and -S exclude site-packages and PYTHONPATH.
        script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from tilewright.cli import main; {script}"
        command = [sys.executable, "-I", "-S", "-c", script]
        return subprocess.run(command, capture_output=True, text=True, env=environment())

    return run


def test_without_packages_one_line_lists_all_of_them(bare):
    shown = bare("main(['doctor'])")
    assert shown.returncode == 1
    assert shown.stderr == ""
    [text] = [text for status, check, text in findings_in(shown.stdout) if check == "packages" and status == "FAIL"]
    names = [*package_metadata.requirements()]
    assert text.startswith(f"missing: {', '.join(names)}: `pip install ")
    assert "`pip download -d wheels " in text
    for requirement in ("'torch>=2.11'", "'numpy>=1.26'"):
        assert text.count(requirement) == 3, "to install, to download, to install what was downloaded"
    assert "torch is missing" in next(text for _, check, text in findings_in(shown.stdout) if check == "gpu")


def test_other_commands_name_the_extra_of_a_missing_package(bare):
    for arguments in ([], ["--help"], ["train", "stories-cpu"]):
        shown = bare(f"sys.exit(main({arguments}))")
        assert (shown.returncode, shown.stdout) == (1, "")
        assert shown.stderr == "tilewright: error: tyro is missing: pip install 'tilewright[train]'\n"
    shown = bare("sys.exit(main(['tokenizer', 'train']))")
    assert shown.stderr == "tilewright: error: tyro is missing: pip install 'tilewright[tokenizer]'\n"


def test_help_needs_no_packages(bare):
    shown = bare("main(['doctor', '--help'])")
    assert shown.returncode == 0
    assert "--time-limit SECONDS" in shown.stdout


def test_a_kernel_compiles_with_only_torch_and_triton(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    command = [sys.executable, "-m", "tilewright", "doctor"]
    variables = environment(PYTHONPATH=os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert shown.returncode == 0, shown.stderr
    assert "Traceback" not in shown.stdout + shown.stderr
    assert "\x1b" not in shown.stdout
    found = findings_in(shown.stdout)
    assert not [text for status, _, text in found if status == "FAIL"]
    assert {check for _, check, _ in found} >= {"system", "packages", "python", "torch", "gpu", "kernel", "compiler", "cache"}
    if doctor_gpu.HAS_TRITON:
        [(status, _, text)] = [finding for finding in found if finding[1] == "kernel"]
        assert (status, text[:8]) == ("ok", "compiled")


def test_the_report_imports_no_optional_packages(tmp_path):
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


# The whole report


@pytest.fixture
def healthy(monkeypatch):
    """Replace each check with one that returns a single `ok` finding; return the findings of the GPU checks."""
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


def test_an_exception_in_a_check_is_a_failure_without_a_traceback(healthy, capsys, monkeypatch):
    def broken():
        raise KeyError("an unexpected\nerror")

    monkeypatch.setattr(doctor, "packages", broken)
    status, out, err = run(capsys)
    assert (status, err) == (1, "")
    assert "FAIL     packages  KeyError: 'an unexpected\\nerror'\n" in out
    assert len(out.splitlines()) == 8, "the other checks still run"


def test_a_gpu_is_found_through_torch_or_the_driver(healthy, capsys, monkeypatch, tmp_path):
    assert "with a GPU: True" in run(capsys)[1]
    healthy[0] = checks.Finding("FAIL", "gpu", "no answer")
    assert "with a GPU: True" in run(capsys)[1]
    healthy[0] = checks.Finding("warning", "gpu", "none")
    assert "with a GPU: False" in run(capsys)[1]
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path)
    assert "with a GPU: True" in run(capsys)[1]


def test_the_time_limit_is_passed_to_the_gpu_checks(healthy, capsys, monkeypatch):
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
