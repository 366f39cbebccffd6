import gc
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from tilewright.errors import UserError
from tilewright.train.data import prefetch
from tilewright.train.data.prefetch import Prefetcher


def tensors(step):
    return torch.full((2, 3), step), torch.full((2,), -step)


def threads():
    return {thread for thread in threading.enumerate() if thread.name == "prefetch"}


@pytest.fixture(autouse=True)
def others():
    """The prefetch threads that exist before the test. The test must not leave others."""
    before = threads()
    yield before
    assert threads() <= before


def wait_until(condition):
    for _ in range(12_000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("timeout")


def test_yields_each_step_once_in_order():
    batches = Prefetcher(tensors, 3, 40, "cpu")
    for step, (first, second) in zip(range(3, 40), batches, strict=True):
        assert torch.equal(first, torch.full((2, 3), step))
        assert torch.equal(second, torch.full((2,), -step))
    with pytest.raises(StopIteration):
        next(batches)


def test_empty_range_yields_nothing():
    assert list(Prefetcher(tensors, 5, 5, "cpu")) == []
    assert list(Prefetcher(tensors, 6, 5, "cpu")) == []


def test_prefetches_two_batches():
    made = []
    batches = Prefetcher(lambda step: (made.append(step), tensors(step))[1], 0, 100, "cpu")
    # Two batches in the queue, and one that waits to enter it.
    wait_until(lambda: len(made) == 3)
    time.sleep(0.05)
    assert len(made) == 3
    next(batches)
    wait_until(lambda: len(made) == 4)
    batches.close()
    assert made == [0, 1, 2, 3]


def test_error_is_raised_at_its_step():
    def make(step):
        if step == 2:
            raise UserError("train.tokens was truncated")
        return tensors(step)

    batches = Prefetcher(make, 0, 10, "cpu")
    assert [int(next(batches)[0][0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match=r"train.tokens was truncated") as caught:
        next(batches)
    assert any(entry.name == "make" for entry in caught.traceback)
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_close_is_prompt_and_repeatable(taken, others):
    batches = Prefetcher(tensors, 0, 1000, "cpu")
    for _ in range(taken):
        next(batches)
    for _ in range(3):
        batches.close()
    assert threads() <= others
    with pytest.raises(StopIteration):
        next(batches)


def test_close_waits_for_the_current_batch():
    begun, end = threading.Event(), threading.Event()

    def make(step):
        begun.set()
        assert end.wait(60)
        return tensors(step)

    batches = Prefetcher(make, 0, 10, "cpu")
    assert begun.wait(60)
    closer = threading.Thread(target=batches.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    end.set()
    closer.join()
    assert not closer.is_alive()


def test_unreferenced_prefetcher_is_closed(others):
    batches = Prefetcher(tensors, 0, 1000, "cpu")
    next(batches)
    del batches
    gc.collect()
    wait_until(lambda: threads() <= others)


def test_waiting_is_measured(monkeypatch):
    now, asked, made = [0.0], threading.Event(), []

    def clock():
        # Read before the other thread continues.
        read = now[0]
        asked.set()
        return read

    def make(step):
        # The consumer waits for the first batch only. The others are ready before it takes them.
        if step == 0:
            assert asked.wait(60)
            now[0] += 5
        made.append(step)
        return tensors(step)

    monkeypatch.setattr(prefetch, "time", SimpleNamespace(perf_counter=clock))
    batches = Prefetcher(make, 0, 3, "cpu")
    next(batches)
    assert batches.waited == 5
    wait_until(lambda: made == [0, 1, 2])
    now[0] += 5
    list(batches)
    assert batches.waited == 5


def test_interpreter_exits_with_an_open_prefetcher(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom tilewright.train.data.prefetch import Prefetcher\n"
        "batches = Prefetcher(lambda step: (torch.zeros(1000, 1000),), 0, 1000, 'cpu')\nnext(batches); raise ValueError"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Fatal" not in done.stderr
    assert "terminate" not in done.stderr


@pytest.mark.gpu
def test_batches_on_the_gpu_are_correct():
    def make(step):
        generator = torch.Generator().manual_seed(step)
        return torch.randint(50_000, (64, 1025), generator=generator), torch.randint(50_000, (64,), generator=generator)

    batches = Prefetcher(make, 0, 50, "cuda")
    for step, batch in enumerate(batches):
        assert all(tensor.is_cuda for tensor in batch)
        # Work that overlaps the copies of later steps.
        busy = torch.randn(2048, 2048, device="cuda")
        for _ in range(5):
            busy = busy @ busy.T / 2048
        for tensor, expected in zip(batch, make(step), strict=True):
            assert torch.equal(tensor.cpu(), expected)


@pytest.mark.gpu
def test_next_does_not_synchronize_with_the_gpu():
    made = [(torch.zeros(8, 8, dtype=torch.int64),)] * 20
    batches = Prefetcher(lambda step: made[step], 0, 20, "cuda")
    next(batches)
    wait_until(lambda: batches._ready.full())
    torch.cuda.synchronize()
    begun, ended = torch.cuda.Event(), torch.cuda.Event()
    begun.record()
    torch.cuda._sleep(2_000_000_000)
    ended.record()
    next(batches)
    # `next` returned while the GPU still ran the earlier kernel.
    assert not ended.query()
    torch.cuda.synchronize()
