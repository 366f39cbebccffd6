import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilewright import bench as package
from tilewright.cli import main

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_session.sh"
PARTS = ["tests", "kernels", "tune", "training", "memory", "run", "report"]


def session(folder, *parts, command="echo"):
    variables = {**os.environ, "TILEWRIGHT": command}
    return subprocess.run(["bash", SCRIPT, *parts], cwd=folder, env=variables, capture_output=True, text=True)


def test_every_command_of_the_session_is_valid(tmp_path, monkeypatch):
    done = session(tmp_path)
    ended = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert [line.split(":")[0].removeprefix("== ") for line in ended] == PARTS
    assert done.returncode == 0, done.stdout + done.stderr
    configs = []
    for name in ("run_bench", "run_tune", "run_report"):
        monkeypatch.setattr(package, name, configs.append, raising=False)
    commands = [line.split() for line in done.stdout.splitlines() if line.startswith("bench ")]
    assert len(commands) == 9
    for command in commands:
        main(command)
    assert len(configs) == len(commands)
    stages = [stage for config in configs for stage in getattr(config, "stages", ())]
    gpu_stages = {"tests", "kernels", "attention", "training", "generation", "overhead", "memory", "run"}
    assert {*stages} == {*gpu_stages, "inspect"}


def test_the_parts_keep_the_limits_that_the_script_names():
    text = SCRIPT.read_text()
    functions = re.findall(r"^(\w+)\(\) \{(.*?)\}$", text, re.DOTALL | re.MULTILINE)
    limits = {name: sum(map(int, re.findall(r"limited (\d+) ", body))) for name, body in functions if name != "limited"}
    assert "28 at most" in text
    assert sum(limits.values()) / 60 < 28.5
    for pair in ("tests kernels", "tune run", "training memory"):
        assert pair in text
        assert 0 < sum(limits[part] for part in pair.split()) < 600


def test_a_part_that_fails_does_not_end_the_others(tmp_path):
    done = session(tmp_path, "memory", "run", command="false")
    assert done.returncode == 1
    assert "== memory: exit status 1" in done.stdout
    assert "== run: exit status 1" in done.stdout
    assert done.stderr.endswith("failed: memory run\n")
    assert sorted(path.name for path in (tmp_path / "build" / "gpu_session").iterdir()) == ["memory.log", "run.log"]


@pytest.mark.parametrize("part", ["", "trainin"])
def test_an_unknown_part_runs_nothing(tmp_path, part):
    done = session(tmp_path, "memory", part)
    assert done.returncode == 2
    assert f"unknown part {part}: expected {' '.join(PARTS)}" in done.stderr
    assert "==" not in done.stdout


def test_a_tuning_that_fails_fails_its_part(tmp_path):
    command = tmp_path / "command"
    command.write_text('#!/bin/sh\nshift\n[ "$1" != tune ]\n')
    command.chmod(0o755)
    done = session(tmp_path, "tune", command=str(command))
    assert "== tune: exit status 1" in done.stdout
    assert done.returncode == 1


def test_an_interruption_ends_the_session(tmp_path):
    """Ctrl+C reaches the processes of the terminal's foreground group only."""
    program = tmp_path / "program.py"
    program.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    variables = {**os.environ, "TILEWRIGHT": f"{sys.executable} {program}"}
    command = ["bash", SCRIPT, "memory", "run"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as running:
        own = int(running.stdout.readline())
        start = time.monotonic()
        os.killpg(running.pid, signal.SIGINT)
        rest = running.stdout.read()
        assert running.wait(50) != 0
    assert time.monotonic() - start < 30
    assert "KeyboardInterrupt" in rest
    assert "== memory" not in rest
    with pytest.raises(ProcessLookupError):
        os.kill(own, 0)
