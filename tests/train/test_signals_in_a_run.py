"""Send signals in each phase of a run: it saves, exits with status 0, and the resumed run equals an uninterrupted one."""

import dataclasses
import shutil
import signal

import pytest

from faults import PHASES, command, command_while_it_compiles, command_with_signals, outcome, rows, run_in_child
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.checkpoint.reader import read_state
from tilewright.train.signals import STOP_SIGNALS


@pytest.fixture(scope="module")
def uninterrupted():
    return {}


@pytest.fixture
def expected(config, changed, uninterrupted, tmp_path):
    """The outcome of an uninterrupted run."""
    if not uninterrupted:
        status, printed = run_in_child(command, changed(out=tmp_path / "whole"))
        assert status == 0, printed
        uninterrupted["outcome"] = outcome(tmp_path / "whole")
    return uninterrupted["outcome"]


def assert_resumes(config, expected):
    status, printed = run_in_child(command, config, "--resume", "auto")
    assert status == 0, printed
    assert "validation loss" in printed
    logged, files = outcome(config.out)
    if read_state(list_checkpoints(config.out)[-1])["unfinished_row"] is not None:
        # `valid_loss` of the last step, which the checkpoint saved at the signal keeps.
        files["state.json"] = expected[1]["state.json"]
    assert (logged, files) == expected


# For each phase: the step after which the signal stops the run, and whether that step was validated.
ENDS = {
    "beginning": (0, True),
    "between steps": (6, True),
    "in a step": (6, True),
    "validating": (4, False),
    "validating last": (12, False),
}


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("phase", PHASES)
def test_signal_stops_a_run_with_a_checkpoint(config, expected, phase, number):
    status, printed = run_in_child(command_with_signals, config, phase, [number])
    assert status == 0, printed
    assert f"stopped by {number.name} after step" in printed
    state = read_state(list_checkpoints(config.out)[-1])
    # Training continues while a checkpoint is saved, so the last step depends on timing.
    step, finished = ENDS.get(phase, (state["step"], True))
    assert state["step"] == step
    # The unfinished row of a step without validation is in the checkpoint.
    assert (state["unfinished_row"] is None) == finished
    assert [row["step"] for row in rows(config.out)] == list(range(1, step + finished))
    assert_resumes(config, expected)


@pytest.mark.parametrize("phase", PHASES)
def test_second_interrupt_stops_a_run_immediately(config, expected, phase):
    status, printed = run_in_child(command_with_signals, config, phase, [signal.SIGINT, signal.SIGINT])
    assert status == 130, printed
    assert "from its newest checkpoint with --resume auto" in printed
    assert "Traceback" not in printed
    # No new checkpoint is saved; a save in progress finishes.
    newest = {"beginning": 0, "validating": 0, "validating last": 8}.get(phase, 4)
    assert read_state(list_checkpoints(config.out)[-1])["step"] == newest
    assert_resumes(config, expected)


def test_unfinished_row_is_written_once_after_a_kill(config, expected):
    for phase, number, status in (("validating", signal.SIGTERM, 0), ("in a step", signal.SIGKILL, -signal.SIGKILL)):
        assert run_in_child(command_with_signals, config, phase, [number])[0] == status
    assert rows(config.out)[-1]["step"] == 5
    assert_resumes(config, expected)


def test_signal_stops_a_finished_run_that_is_resumed(config, expected):
    assert run_in_child(command, config)[0] == 0
    status, printed = run_in_child(command_with_signals, config, "validating", [signal.SIGTERM])
    assert status == 0
    assert "stopped by SIGTERM after step 12" in printed
    assert_resumes(config, expected)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs g++")
def test_signal_during_compilation_stops_a_run(changed, tmp_path):
    # A small model, because compiling each kernel for the CPU takes seconds.
    model = dataclasses.replace(changed().model, num_layers=1, norm="none", rope=False, ffn="silu")
    config = changed(model=model, steps=4, checkpoint_every=1)
    # A terminal sends the signal to the whole process group, so the compilation fails. If only the run gets it, the run
    # finishes the compilation and its first step.
    for step, whole_group in enumerate((True, False)):
        status, printed = run_in_child(command_while_it_compiles, config, signal.SIGTERM, whole_group, tmp_path / "compiler")
        assert status == 0, printed
        assert f"stopped by SIGTERM after step {step}" in printed
        assert read_state(list_checkpoints(config.out)[-1])["step"] == step
        assert [row["step"] for row in rows(config.out)] == list(range(1, step + 1))
    status, printed = run_in_child(command, config, "--resume", "auto", "--compile", "False")
    assert status == 0, printed
    assert [row["step"] for row in rows(config.out)] == [1, 2, 3, 4]
