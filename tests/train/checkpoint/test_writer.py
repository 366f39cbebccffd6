"""Saving: what is written while training goes on, what stays, and what is left after a failure."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import threading

import pytest
import torch

from tilewright.errors import UserError
from tilewright.train.checkpoint import writer as checkpoint_writer
from tilewright.train.checkpoint.layout import list_checkpoints, newest_valid, verify_checkpoint
from tilewright.train.checkpoint.reader import read_state, read_tensors
from tilewright.train.checkpoint.writer import CheckpointWriter
from tilewright.train.signals import StopRequest


def tensors(step, size=1000):
    return {"model": {"w": torch.full((size,), float(step))}}


def steps(run):
    return [int(folder.name[5:13]) for folder in list_checkpoints(run)]


def save_all(run, losses, keep, keep_step=None):
    """Save steps 1, 2, ... with these validation losses; return the steps that stay."""
    with CheckpointWriter(run, keep, keep_step) as writer:
        for step, loss in enumerate(losses, 1):
            writer.save(step, tensors(step), {}, valid_loss=loss)
    for folder in list_checkpoints(run):
        verify_checkpoint(folder)
    return steps(run)


@pytest.mark.parametrize(
    ("losses", "keep", "stay"),
    [
        ([None] * 5, 2, [4, 5]),
        ([3.0, 1.0, 2.0, 2.5, 2.0], 2, [2, 4, 5]),
        ([3.0, 2.0, 1.0], 1, [3]),
        ([1.0, None, 2.0, None], 1, [1, 4]),
        ([1.0, 1.0, 2.0, 3.0], 1, [2, 4]),  # of equals the newer
        ([float("nan"), float("inf"), 2.0, None, None], 1, [3, 5]),
        ([2.0, 1.0], 9, [1, 2]),
    ],
)
def test_the_newest_and_the_best_stay(tmp_path, losses, keep, stay):
    assert save_all(tmp_path, losses, keep) == stay


def test_a_step_that_is_asked_for_stays(tmp_path):
    assert save_all(tmp_path, [3.0, 2.0, 2.5, None, None], 2, keep_step=1) == [1, 2, 4, 5]


def test_what_another_process_saved_counts(tmp_path):
    save_all(tmp_path, [1.0, 2.0, 3.0], 1)
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.save(4, tensors(4), {}, valid_loss=2.0)
    assert steps(tmp_path) == [1, 4]


def test_a_damaged_checkpoint_does_not_count(tmp_path):
    save_all(tmp_path, [1.0, 2.0, 3.0], 3)
    (tmp_path / "checkpoints/step-00000003/model.safetensors").unlink()
    with CheckpointWriter(tmp_path, 2) as writer:
        writer.save(4, tensors(4), {})
        writer.wait()
        assert steps(tmp_path) == [1, 2, 3, 4]
        assert newest_valid(tmp_path)[0].name == "step-00000004"
        writer.save(5, tensors(5), {})
    assert steps(tmp_path) == [1, 3, 4, 5]


def test_a_step_saved_again_replaces_the_older_once_it_is_whole(tmp_path, monkeypatch):
    save_all(tmp_path, [1.0, 2.0, 3.0], 3)
    monkeypatch.setattr(checkpoint_writer, "remove_unwanted", lambda *_: None)
    with CheckpointWriter(tmp_path, 3) as writer:
        writer.save(2, tensors(22), {})
    assert [folder.name[5:] for folder in list_checkpoints(tmp_path)] == ["00000001", "00000002", "00000002.1", "00000003"]
    monkeypatch.undo()
    with CheckpointWriter(tmp_path, 3) as writer:
        writer.save(2, tensors(222), {})
    folders = list_checkpoints(tmp_path)
    # Later steps are not this course's to remove.
    assert steps(tmp_path) == [1, 2, 3]
    assert read_tensors(folders[1], "model")["w"][0] == 222


def test_the_last_one_is_never_removed_before_the_next_is_whole(tmp_path, monkeypatch):
    save_all(tmp_path, [1.0], 1)
    seen = []
    original = checkpoint_writer.write_manifest

    def watched(*arguments):
        seen.append(newest_valid(tmp_path)[0].name)
        original(*arguments)
        seen.append(newest_valid(tmp_path)[0].name)

    monkeypatch.setattr(checkpoint_writer, "write_manifest", watched)
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.save(2, tensors(2), {})
    assert seen == ["step-00000001"] * 2
    assert steps(tmp_path) == [1, 2]  # 1 is the best


@pytest.fixture
def gate(monkeypatch):
    """Hold the writing thread until the gate is set."""
    event = threading.Event()
    original = checkpoint_writer.write_tensors

    def held(*arguments):
        assert event.wait(60)
        return original(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", held)
    return event


def test_training_goes_on_while_it_is_written(tmp_path, gate):
    values = tensors(1)
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.save(1, values, {})
        values["model"]["w"].fill_(-1)  # the next step
        assert steps(tmp_path) == []
        gate.set()
    assert read_tensors(list_checkpoints(tmp_path)[0], "model")["w"].eq(1).all()


def test_a_second_save_waits_for_the_first(tmp_path, gate):
    with CheckpointWriter(tmp_path, 2) as writer:
        writer.save(1, tensors(1), {})
        threading.Timer(0.1, gate.set).start()
        writer.save(2, tensors(2), {})
        assert steps(tmp_path)[0] == 1
    for step, folder in enumerate(list_checkpoints(tmp_path), 1):
        assert read_tensors(folder, "model")["w"].eq(step).all()


def test_an_interruption_of_the_waiting_leaves_the_save_to_its_end(tmp_path, gate):
    with StopRequest(), CheckpointWriter(tmp_path, 1) as writer:
        signal.raise_signal(signal.SIGINT)
        writer.save(1, tensors(1), {})
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            writer.wait()
        threading.Timer(0.1, gate.set).start()
    assert steps(tmp_path) == [1]


def test_leaving_waits_and_keeps_the_first_error(tmp_path, gate):
    threading.Timer(0.1, gate.set).start()
    with pytest.raises(KeyError, match="of the loop"), CheckpointWriter(tmp_path, 1) as writer:
        writer.save(1, tensors(1), {})
        raise KeyError("of the loop")
    assert steps(tmp_path) == [1]


def test_leftovers_of_killed_saves_are_removed(tmp_path):
    save_all(tmp_path, [None], 1)
    leftover = tmp_path / "checkpoints/.step-00000009.4194305.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    others = [tmp_path / "checkpoints/mine.tmp", tmp_path / "checkpoints/.step-9", tmp_path / ".step-00000009.1.tmp"]
    for other in others:
        other.mkdir()
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.save(2, tensors(2), {})
    assert not leftover.exists()
    assert all(other.exists() for other in others)


def test_an_old_checkpoint_that_is_in_use_does_not_end_the_run(tmp_path, monkeypatch):
    unlink = os.unlink

    def busy(path, *args, **kwargs):
        if path == "model.safetensors":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        unlink(path, *args, **kwargs)

    with CheckpointWriter(tmp_path, 1) as writer:
        writer.save(1, tensors(1), {})
        writer.wait()
        with monkeypatch.context() as patch:
            patch.setattr("os.unlink", busy)
            writer.save(2, tensors(2), {})
            writer.wait()
        assert steps(tmp_path) == [2]
        assert list((tmp_path / "checkpoints").glob(".step-*.tmp"))
        writer.save(3, tensors(3), {})
    assert not list((tmp_path / "checkpoints").glob(".step-*.tmp"))


def test_two_processes_cannot_save_in_one_run(tmp_path):
    with CheckpointWriter(tmp_path, 1):
        child = os.fork()
        if child == 0:
            try:
                CheckpointWriter(tmp_path, 1)
            except UserError as error:
                os._exit(0 if "another process saves checkpoints in" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with CheckpointWriter(tmp_path, 1):
        pass


@contextlib.contextmanager
def full_disk(size):
    """Let no file grow beyond a length, as a full disk would; not even that of the test's own report, once it is over."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 5_000])
def test_a_full_disk_is_named_and_harms_nothing(tmp_path, size):
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.save(1, tensors(1), {})
        writer.wait()
        with full_disk(size):
            writer.save(2, tensors(2, size=100_000), {})
            with pytest.raises(
                UserError, match=rf"step 2 in {tmp_path}/checkpoints failed \(.*File too large.*\): the run goes on from"
            ):
                writer.save(3, tensors(3), {})
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [".lock", "step-00000001"]
        # A failure is told once; then there is room again.
        writer.save(4, tensors(4), {})
    verify_checkpoint(list_checkpoints(tmp_path)[0])
    assert steps(tmp_path) == [4]


def test_a_failure_of_the_last_save_is_raised_on_leaving(tmp_path):
    with full_disk(10), pytest.raises(UserError, match="File too large"), CheckpointWriter(tmp_path, 1) as writer:
        writer.save(1, tensors(1), {})
    with full_disk(10), pytest.raises(KeyError) as caught, CheckpointWriter(tmp_path, 1) as writer:
        writer.save(1, tensors(1), {})
        raise KeyError("of the loop")
    assert "File too large" in caught.value.__notes__[0]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a file system can be mounted by root alone: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_small_disk_fills_up(small_disk):
    with CheckpointWriter(small_disk, 1) as writer:
        writer.save(1, tensors(1), {})
        writer.wait()
        writer.save(2, tensors(2, size=100_000), {})
        with pytest.raises(UserError, match=r"step 2 in .* failed \(.*No space left on device"):
            writer.wait()
        writer.save(3, tensors(3), {})
    assert steps(small_disk) == [3]
    verify_checkpoint(list_checkpoints(small_disk)[0])


def test_a_disk_that_becomes_read_only(small_disk):
    with CheckpointWriter(small_disk, 1) as writer:
        writer.save(1, tensors(1), {})
        writer.wait()
        # As Linux does to a disk with errors; not possible while a file is open for writing, as the lock is.
        subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", small_disk], check=True)
            writer.save(2, tensors(2), {})
            with pytest.raises(UserError, match=r"step 2 in .* failed \(.*Read-only file system"):
                writer.wait()
            with pytest.raises(UserError, match=r"checkpoints cannot be written to \(Read-only file system\)"):
                CheckpointWriter(small_disk, 1)
        finally:
            subprocess.run(["umount", "--lazy", small_disk], check=True)
    assert steps(small_disk) == [1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    with CheckpointWriter(tmp_path, 1) as writer:
        (tmp_path / "checkpoints").chmod(0o500)
        writer.save(1, tensors(1), {})
        with pytest.raises(UserError, match=r"step 1 in .* failed \(.*Permission denied"):
            writer.wait()
        (tmp_path / "checkpoints").chmod(0o700)


def test_a_deleted_run_is_not_made_again(tmp_path):
    run = tmp_path / "run"
    with CheckpointWriter(run, 1) as writer:
        shutil.rmtree(run)
        writer.save(1, tensors(1), {})
        with pytest.raises(UserError, match=r"step 1 in .*run/checkpoints failed \(.*No such file"):
            writer.wait()
    assert not run.exists()


def test_a_run_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"run/checkpoints cannot be written to \("):
        CheckpointWriter(tmp_path / "run", 1)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path):
    with CheckpointWriter(tmp_path, 1) as writer:
        with pytest.raises(ValueError, match=r"model w is of torch.complex64"):
            writer.save(1, {"model": {"w": torch.zeros(2, dtype=torch.complex64)}}, {})
        with pytest.raises(TypeError, match="not JSON serializable"):
            writer.save(1, tensors(1), {"w": torch.zeros(2)})
    assert steps(tmp_path) == []


def test_memory_of_copies_is_used_again(tmp_path):
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.save(1, tensors(1), {})
        writer.wait()
        before = [buffer.data_ptr() for buffer in writer._snapshots._buffers.values()]
        writer.save(2, tensors(2), {})
        assert before == [buffer.data_ptr() for buffer in writer._snapshots._buffers.values()]
        writer.save(3, tensors(3, size=5), {})
    assert read_tensors(list_checkpoints(tmp_path)[0], "model")["w"].tolist() == [3.0] * 5
    assert read_state(list_checkpoints(tmp_path)[0])["step"] == 3


@pytest.mark.gpu
def test_copies_from_a_gpu_are_of_the_step_they_were_taken_at(tmp_path):
    weight = torch.zeros(50_000_000, device="cuda")
    with CheckpointWriter(tmp_path, 5) as writer:
        for step in range(1, 6):
            weight.add_(1)
            writer.save(step, {"model": {"w": weight, "t": weight.view(5000, -1).T}}, {})
            weight.mul_(1)
            weight.add_(100).sub_(100)
    for step, folder in enumerate(list_checkpoints(tmp_path), 1):
        read = read_tensors(folder, "model")
        assert read["w"].eq(step).all()
        assert read["t"].eq(step).all()
