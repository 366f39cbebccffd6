import os
import signal

import pytest

from tilewright.bench import gpu_tests
from tilewright.bench.gpu_tests import is_shown, result_of, run_gpu_tests
from tilewright.bench.jobs import TimeOver


@pytest.mark.parametrize(
    ("line", "result"),
    [
        ("tests/a.py::test_b PASSED [ 1%]", ("tests/a.py::test_b", "passed")),
        ("tests/a.py::test_c[x y] SKIPPED (needs a GPU)", ("tests/a.py::test_c[x y]", "skipped")),
        ("[gw0] [  3%] FAILED tests/a.py::test_d[x y]", ("tests/a.py::test_d[x y]", "failed")),
        ("[gw12] [100%] ERROR tests/a.py::test_e", ("tests/a.py::test_e", "errors")),
        ("tests/a.py::test_b", None),
        ("FAILED tests/a.py::test_d - assert 1 == 2", None),
        ("platform linux", None),
    ],
)
def test_lines_of_pytest_are_read(line, result):
    assert result_of(line) == result
    assert is_shown(line) == (line.startswith(("FAILED", "platform")) if result is None else result[1] in ("failed", "errors"))


BODIES = {
    # The largest file, so its failure comes last.
    "broken": "import os\n\n\n@pytest.mark.gpu\ndef test_that_ends_its_process():\n    os._exit(1)\n",
    "gpu": "@pytest.mark.gpu\ndef test_one():\n    pass\n",
    "slow": "import time\n\n\n@pytest.mark.gpu\ndef test_three():\n    time.sleep(300)\n",
    "missing": "import no_such_package\n",
    "cpu": "def test_two():\n    pass\n",
}


def write(folder, *names):
    folder = folder / "tests"
    folder.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    for name in names:
        (folder / f"test_{name}.py").write_text(f"import pytest\n\n\n{BODIES[name]}")
    return folder


def run(folder, *names):
    return list(run_gpu_tests(write(folder, *names)))


def test_only_gpu_marked_tests_run(tmp_path, capfd):
    (row,) = run(tmp_path, "gpu", "cpu")
    assert (row["variant"], row["passed"], row["failed"], row["failures"]) == ("passed", 1, 0, None)
    assert "1 passed" in row["summary"]
    assert "test_one" not in capfd.readouterr().out


def test_a_test_that_ends_its_process_fails_alone(tmp_path, capfd):
    (row,) = run(tmp_path, "broken", "gpu")
    assert (row["variant"], row["passed"], row["failed"]) == ("FAILED", 1, 1)
    assert row["failures"] == "tests/test_broken.py::test_that_ends_its_process"
    assert "test_that_ends_its_process" in capfd.readouterr().out


@pytest.mark.parametrize("xdist", [True, False])
def test_a_file_that_cannot_be_imported_does_not_stop_the_others(tmp_path, monkeypatch, capfd, xdist):
    if not xdist:
        monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    (row,) = run(tmp_path, "missing", "gpu")
    assert (row["variant"], row["passed"]) == ("FAILED", 1)
    assert "1 error" in row["summary"]
    assert "No module named 'no_such_package'" in capfd.readouterr().out


def test_tests_without_time_are_counted_so_far(tmp_path, monkeypatch):
    tests = write(tmp_path, "gpu", "slow")
    monkeypatch.setattr(gpu_tests, "is_shown", lambda line: lines.append(line))
    lines, found = [], run_gpu_tests(tests)

    def ring(*_):
        # The slow test has begun when the other one has ended.
        if any("PASSED" in line for line in lines):
            raise TimeOver

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
        row = next(found)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (row["variant"], row["summary"]) == ("cut off: no time left", "1 passed, 0 failed until then")
    with pytest.raises(TimeOver):
        next(found)


def test_files_run_from_the_smallest_up_in_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    command = gpu_tests.command([tmp_path / "test_a.py"])
    assert command[command.index("-n") + 1] == "8"
    seen = []
    monkeypatch.setattr(gpu_tests, "command", lambda files: seen.extend(files) or ["true"])
    run(tmp_path, "broken", "gpu", "cpu")
    assert [path.name for path in seen] == ["test_cpu.py", "test_gpu.py", "test_broken.py"]


def test_an_installation_without_tests_says_so(tmp_path):
    assert [row["not_measured"] for row in run_gpu_tests(tmp_path / "none")] == ["installed without tests"]
