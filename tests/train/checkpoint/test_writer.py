"""The checkpoint writer: asynchronous saves, the retention policy, and failures."""

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
    """Save steps 1, 2, ... with these validation losses and return the steps that are kept."""
    with CheckpointWriter(run, keep, keep_step) as writer:
        for step, loss in enumerate(losses, 1):
            writer.save(step, tensors(step), {}, valid_loss=loss)
    for folder in list_checkpoints(run):
        verify_checkpoint(folder)
    return steps(run)


@pytest.mark.parametrize(
    ("losses", "keep", "kept"),
    [
        ([None] * 5, 2, [4, 5]),
        ([3.0, 1.0, 2.0, 2.5, 2.0], 2, [2, 4, 5]),
        ([3.0, 2.0, 1.0], 1, [3]),
        ([1.0, None, 2.0, None], 1, [1, 4]),
        ([1.0, 1.0, 2.0, 3.0], 1, [2, 4]),  # of equal losses the newest
        ([float("nan"), float("inf"), 2.0, None, None], 1, [3, 5]),
        ([2.0, 1.0], 9, [1, 2]),
    ],
)
def test_keeps_newest_and_best(tmp_path, losses, keep, kept):
    assert save_all(tmp_path, losses, keep) == kept


def test_keeps_keep_step(tmp_path):
    assert save_all(tmp_path, [3.0, 2.0, 2.5, None, None], 2, keep_step=1) == [1, 2, 4, 5]


def test_retention_includes_checkpoints_of_earlier_writers(tmp_path):
    save_all(tmp_path, [1.0, 2.0, 3.0], 1)
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.save(4, tensors(4), {}, valid_loss=2.0)
    assert steps(tmp_path) == [1, 4]


def test_retention_ignores_damaged_checkpoints(tmp_path):
    save_all(tmp_path, [1.0, 2.0, 3.0], 3)
    (tmp_path / "checkpoints/step-00000003/model.safetensors").unlink()
    with CheckpointWriter(tmp_path, 2) as writer:
        writer.save(4, tensors(4), {})
        writer.wait()
        assert steps(tmp_path) == [1, 2, 3, 4]
        assert newest_valid(tmp_path)[0].name == "step-00000004"
        writer.save(5, tensors(5), {})
    assert steps(tmp_path) == [1, 3, 4, 5]


def test_second_save_of_a_step_replaces_the_first_when_complete(tmp_path, monkeypatch):
    save_all(tmp_path, [1.0, 2.0, 3.0], 3)
    monkeypatch.setattr(checkpoint_writer, "remove_unwanted", lambda *_: None)
    with CheckpointWriter(tmp_path, 3) as writer:
        writer.save(2, tensors(22), {})
    assert [folder.name[5:] for folder in list_checkpoints(tmp_path)] == ["00000001", "00000002", "00000002.1", "00000003"]
    monkeypatch.undo()
    with CheckpointWriter(tmp_path, 3) as writer:
        writer.save(2, tensors(222), {})
    folders = list_checkpoints(tmp_path)
    # The writer does not remove later steps.
    assert steps(tmp_path) == [1, 2, 3]
    assert read_tensors(folders[1], "model")["w"][0] == 222


def test_old_checkpoint_is_removed_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
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
    assert steps(tmp_path) == [1, 2]  # 1 has the best loss


@pytest.fixture
def gate(monkeypatch):
    """Block the writer thread until the event is set."""
    event = threading.Event()
    original = checkpoint_writer.write_tensors

    def held(*arguments):
        assert event.wait(60)
        return original(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_tensors", held)
    return event


def test_save_is_asynchronous(tmp_path, gate):
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


def test_interrupted_wait_does_not_interrupt_the_save(tmp_path, gate):
    with StopRequest(), CheckpointWriter(tmp_path, 1) as writer:
        signal.raise_signal(signal.SIGINT)
        writer.save(1, tensors(1), {})
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            writer.wait()
        threading.Timer(0.1, gate.set).start()
    assert steps(tmp_path) == [1]


def test_exit_waits_for_the_save_and_keeps_the_error(tmp_path, gate):
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


def test_failed_removal_of_an_old_checkpoint_is_not_an_error(tmp_path, monkeypatch):
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


def test_two_processes_cannot_write_to_one_run(tmp_path):
    with CheckpointWriter(tmp_path, 1):
        child = os.fork()
        if child == 0:
            try:
                CheckpointWriter(tmp_path, 1)
            except UserError as error:
                os._exit(0 if "another process saves checkpoints there" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with CheckpointWriter(tmp_path, 1):
        pass


@contextlib.contextmanager
def full_disk(size):
    """Limit the size of files, as a full disk would. Restores the limit at the end, because the test report is a file too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 100, 5_000])
def test_full_disk_raises_an_error_and_keeps_the_old_checkpoint(tmp_path, size):
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.save(1, tensors(1), {})
        writer.wait()
        with full_disk(size):
            writer.save(2, tensors(2, size=100_000), {})
            with pytest.raises(
                UserError, match=rf"step 2 in {tmp_path}/checkpoints: .*File too large.*; --resume auto continues from"
            ):
                writer.save(3, tensors(3), {})
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [".lock", "step-00000001"]
        # A failure is raised once. The next save succeeds.
        writer.save(4, tensors(4), {})
    verify_checkpoint(list_checkpoints(tmp_path)[0])
    assert steps(tmp_path) == [4]


def test_failure_of_the_last_save_is_raised_on_exit(tmp_path):
    with full_disk(10), pytest.raises(UserError, match="File too large"), CheckpointWriter(tmp_path, 1) as writer:
        writer.save(1, tensors(1), {})
    with full_disk(10), pytest.raises(KeyError) as caught, CheckpointWriter(tmp_path, 1) as writer:
        writer.save(1, tensors(1), {})
        raise KeyError("of the loop")
    assert "File too large" in caught.value.__notes__[0]


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"only root can mount a file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_save_fails_on_a_full_file_system(small_disk):
    with CheckpointWriter(small_disk, 1) as writer:
        writer.save(1, tensors(1), {})
        writer.wait()
        writer.save(2, tensors(2, size=100_000), {})
        with pytest.raises(UserError, match=r"step 2 in .*: .*No space left on device"):
            writer.wait()
        writer.save(3, tensors(3), {})
    assert steps(small_disk) == [3]
    verify_checkpoint(list_checkpoints(small_disk)[0])


def test_save_fails_on_a_read_only_file_system(small_disk):
    with CheckpointWriter(small_disk, 1) as writer:
        writer.save(1, tensors(1), {})
        writer.wait()
        # Linux remounts a disk with errors so. A bind mount, because a real remount fails while the lock file is open.
        subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", small_disk], check=True)
            writer.save(2, tensors(2), {})
            with pytest.raises(UserError, match=r"step 2 in .*: .*Read-only file system"):
                writer.wait()
            with pytest.raises(UserError, match=r"cannot write to .*checkpoints: Read-only file system"):
                CheckpointWriter(small_disk, 1)
        finally:
            subprocess.run(["umount", "--lazy", small_disk], check=True)
    assert steps(small_disk) == [1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_error_names_a_folder_without_permission(tmp_path):
    with CheckpointWriter(tmp_path, 1) as writer:
        (tmp_path / "checkpoints").chmod(0o500)
        writer.save(1, tensors(1), {})
        with pytest.raises(UserError, match=r"step 1 in .*: .*Permission denied"):
            writer.wait()
        (tmp_path / "checkpoints").chmod(0o700)


def test_deleted_run_is_not_recreated(tmp_path):
    run = tmp_path / "run"
    with CheckpointWriter(run, 1) as writer:
        shutil.rmtree(run)
        writer.save(1, tensors(1), {})
        with pytest.raises(UserError, match=r"step 1 in .*run/checkpoints: .*No such file"):
            writer.wait()
    assert not run.exists()


def test_error_names_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*run/checkpoints: "):
        CheckpointWriter(tmp_path / "run", 1)


def test_unsupported_values_are_rejected_before_the_write(tmp_path):
    with CheckpointWriter(tmp_path, 1) as writer:
        with pytest.raises(ValueError, match=r"model w has dtype torch.complex64"):
            writer.save(1, {"model": {"w": torch.zeros(2, dtype=torch.complex64)}}, {})
        with pytest.raises(TypeError, match="not JSON serializable"):
            writer.save(1, tensors(1), {"w": torch.zeros(2)})
    assert steps(tmp_path) == []


def test_snapshot_buffers_are_reused(tmp_path):
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
def test_snapshots_of_gpu_tensors_hold_the_values_at_the_save(tmp_path):
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
