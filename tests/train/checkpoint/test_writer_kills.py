"""Processes that save are killed at random times; the newest checkpoint must always be valid.

Run as a program, this file imports torch once and forks the processes that it kills, so that a kill costs milliseconds. It has
no threads when it forks.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tilewright.train.checkpoint.layout import newest_valid
from tilewright.train.checkpoint.reader import read_state, read_tensors
from tilewright.train.checkpoint.writer import CheckpointWriter

KILLS = 40
KEEP = 2


def tensors(step):
    weights = torch.randn(40_000, generator=torch.Generator().manual_seed(step))
    return {"model": {"w": weights, "half": weights[:9].bfloat16()}, "rng": {"cpu": weights[:100].view(torch.uint8)}}


def valid_loss(step):
    return None if step % 3 else random.Random(step).random()


def save(run, times, report=None):
    """Save the next `times` steps. Write to the file `report` when the first is complete and the second has begun."""
    found, _ = newest_valid(run)
    first = 0 if found is None else read_state(found)["step"] + 1
    with CheckpointWriter(run, KEEP) as writer:
        for step in range(first, first + times):
            writer.save(step, tensors(step), {"twice": 2 * step}, valid_loss(step))
            if step == first + 1 and report is not None:
                os.write(report, b"1")


def check(run, last):
    """Return the step of the newest valid checkpoint. Check that it holds what was saved, at step `last` or later."""
    found, skipped = newest_valid(run)
    # A kill may leave temporary folders, but never a damaged checkpoint.
    assert skipped == []
    state = read_state(found)
    step = state["step"]
    assert step >= last
    assert found.name == f"step-{step:08d}"
    assert state == {"twice": 2 * step, "step": step, "valid_loss": valid_loss(step)}
    for name, expected in tensors(step).items():
        read = read_tensors(found, name)
        assert read.keys() == expected.keys()
        assert all(read[key].dtype == value.dtype and torch.equal(read[key], value) for key, value in expected.items())
    return step


def main(run, seed):
    torch.set_num_threads(1)
    rng = random.Random(seed)
    start = time.perf_counter()
    save(run, 5)
    seconds = (time.perf_counter() - start) / 5
    last, half_saved = check(run, 4), 0
    read_end, write_end = os.pipe()
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            save(run, 1_000_000, write_end)
        assert os.read(read_end, 1) == b"1"
        time.sleep(rng.uniform(0, 2 * seconds))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        last = check(run, last + 1)
        half_saved += any((run / "checkpoints").glob(".step-*.tmp"))
    save(run, 1)
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    print(json.dumps({"half_saved": half_saved, "left": left}))


def test_killed_saves_leave_valid_checkpoints(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, tmp_path / "run", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["half_saved"] >= KILLS // 10
    # The last save has removed all temporary folders.
    assert sum(name.startswith("step-") for name in seen["left"]) <= KEEP + 1
    assert [name for name in seen["left"] if not name.startswith("step-")] == [".lock"]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
