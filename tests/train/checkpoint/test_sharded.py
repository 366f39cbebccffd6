"""Sharded checkpoints: saved by two processes, read by one or two processes and by torch, and converted to single files.

The processes of a job run this file as a program.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from faults import program, run_in_children
from tilewright.errors import UserError
from tilewright.train.checkpoint.convert import convert_checkpoint
from tilewright.train.checkpoint.layout import list_checkpoints, newest_valid, verify_checkpoint
from tilewright.train.checkpoint.reader import load_into, read_state, read_tensors
from tilewright.train.checkpoint.sharded import ShardedCheckpointWriter
from tilewright.train.checkpoint.tensor_files import TensorReader
from tilewright.train.checkpoint.writer import CheckpointWriter
from tilewright.train.metrics import MetricLog


class Small(nn.Module):
    """A model with dimensions of 7, 3 and 1, which two or more processes cannot divide evenly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) * self.scale


def trained(steps, sharded):
    """Return a model and its optimizer after some steps. All processes use the same batches."""
    model = Small()
    if sharded:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def tensors(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {f"{key}.{names[p]}": value for p, state in optimizer.state.items() for key, value in state.items()}
    return {
        "model": model.state_dict(),
        "optimizer": moments,
        "ema": {name: value.bfloat16() for name, value in model.state_dict().items()},
        "rng": {"cpu": torch.get_rng_state(), "empty": torch.zeros(0, 2)},
    }


def whole(named):
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in named.items()}


def emptied(named):
    return {name: torch.zeros_like(value) for name, value in named.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def check_load(folder, saved):
    read = {group: emptied(named) for group, named in saved.items()}
    load_into(folder, read)
    for group in saved:
        assert same(whole(read[group]), whole(saved[group])), group


# Functions that the processes of a job run by name, with the run's folder.


def save(run):
    model, optimizer = trained(2, sharded=True)
    with ShardedCheckpointWriter(run, keep=1, keep_step=3) as writer:
        for step, loss in enumerate((1.0, 2.0, None, None), 1):
            writer.save(step, tensors(model, optimizer), {"rank": dist.get_rank()}, valid_loss=loss)
            # Take the next step before this one is written.
            model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step + 1))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def load(run):
    saved = tensors(*trained(5, sharded=True))
    for folder in sorted((run / "checkpoints").glob("*step-00000004")):
        check_load(folder, saved)
    with pytest.raises(UserError, match=r"cannot load .*: the checkpoint has no more"):
        load_into(newest_valid(run)[0], {"model": {**saved["model"], "more": torch.zeros(1)}})
    # Read with torch's reader.
    read = emptied(saved["model"])
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(run / "checkpoints/step-00000004/model")))
    assert same(whole(read), whole(saved["model"]))


def save_with_torch(run):
    model, _ = trained(1, sharded=True)
    writer = HuggingFaceStorageWriter(str(run / "theirs/model"), save_distributed=True)
    dcp.save(dict(model.state_dict()), storage_writer=writer)
    check_load(run / "theirs", {"model": model.state_dict()})


def fail(run):
    saved = tensors(*trained(1, sharded=True))
    rank = dist.get_rank()
    with ShardedCheckpointWriter(run, keep=1) as writer:
        writer.save(1, saved, {})
        writer.wait()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        for full in range(2):
            if rank == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            writer.save(2, saved, {})
            with pytest.raises(UserError, match=rf"step 2 in .*: process {full}: .*File too large.*--resume auto continues"):
                writer.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            dist.barrier()
            assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [".lock", "step-00000001"]
            dist.barrier()
        writer.save(3, saved, {})
    verify_checkpoint(list_checkpoints(run)[0])
    (run / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        ShardedCheckpointWriter(run / "file", keep=1)


def die(run):
    saved = tensors(*trained(1, sharded=True))
    with ShardedCheckpointWriter(run, keep=1) as writer:
        writer.save(1, saved, {})
        writer.wait()
        dist.barrier()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        writer.save(2, saved, {})
        with pytest.raises(RuntimeError):
            writer.wait()
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000001"]
    # An orderly exit would wait for the other process.
    os._exit(0)


def run_job(what, run, world_size=2):
    """Run functions of this file, by name, in the processes of a job. Processes must exit with 0 or kill themselves."""
    environments = [{"WORLD_SIZE": str(world_size), "RANK": str(rank)} for rank in range(world_size)]
    ended = run_in_children(program, [(Path(__file__), environment, what, str(run)) for environment in environments])
    assert all(status in (0, -signal.SIGKILL) for status, _ in ended), "\n".join(printed for _, printed in ended)
    return [status for status, _ in ended]


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    assert run_job("save", run) == [0, 0]
    return run


def test_layout_of_a_sharded_checkpoint(saved_by_two):
    assert [folder.name for folder in list_checkpoints(saved_by_two)] == ["step-00000001", "step-00000003", "step-00000004"]
    folder = list_checkpoints(saved_by_two)[-1]
    verify_checkpoint(folder)
    assert read_state(folder) == {"rank": 0, "step": 4, "valid_loss": None}
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    shards = [f"{g}/shard-0000{i}-of-00002.safetensors" for g in ("ema", "model", "optimizer", "rng") for i in (1, 2)]
    assert files == sorted([*shards, "manifest.json", "state.json"])
    assert sorted(json.loads((folder / "manifest.json").read_text())["files"]) == sorted([*shards, "state.json"])
    with safe_open(folder / shards[3], "pt") as second:
        assert second.get_tensor("first.weight").shape == (3, 5)


def test_one_process_reads_shards_of_two(saved_by_two):
    # Sharded and whole models are trained with the same arithmetic, except for the order of sums.
    folder = list_checkpoints(saved_by_two)[-1]
    expected = tensors(*trained(5, sharded=False))
    for group, named in expected.items():
        read = read_tensors(folder, group)
        assert read.keys() == named.keys()
        for name, value in named.items():
            assert read[name].dtype == value.dtype
            torch.testing.assert_close(read[name], value)


def test_missing_shard_is_detected(saved_by_two, tmp_path):
    folder = tmp_path / "copy"
    convert_checkpoint(list_checkpoints(saved_by_two)[-1], folder, num_shards=2)
    (folder / "model/shard-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model/shard-00002-of-00002.safetensors is missing"):
        verify_checkpoint(folder)
    with pytest.raises(UserError, match=r"cannot load .*: first.\w+ has shape \(4,"):
        load_into(folder, {"model": Small().state_dict()})


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
def test_round_trip_through_single_files_is_bitwise(saved_by_two, tmp_path, num_shards):
    source = list_checkpoints(saved_by_two)[-1]
    convert_checkpoint(source, tmp_path / "single")
    convert_checkpoint(tmp_path / "single", tmp_path / "shards", num_shards)
    convert_checkpoint(tmp_path / "shards", tmp_path / "again")
    for folder in ("single", "shards", "again"):
        verify_checkpoint(tmp_path / folder)
        assert read_state(tmp_path / folder) == read_state(source)
        for group in ("model", "optimizer", "ema", "rng"):
            assert same(read_tensors(tmp_path / folder, group), read_tensors(source, group))
    assert (tmp_path / "single/manifest.json").read_bytes() == (tmp_path / "again/manifest.json").read_bytes()
    assert (tmp_path / "single/model.safetensors").exists()
    assert len(list((tmp_path / "shards/model").iterdir())) == num_shards
    assert TensorReader(tmp_path / "shards", "model").shapes == TensorReader(source, "model").shapes


def test_conversion_errors(saved_by_two, tmp_path):
    source = list_checkpoints(saved_by_two)[-1]
    with pytest.raises(UserError, match="exists already"):
        convert_checkpoint(source, tmp_path)
    with pytest.raises(UserError, match="num_shards is 0: it must be at least 1"):
        convert_checkpoint(source, tmp_path / "new", 0)
    with pytest.raises(UserError, match="is not a checkpoint"):
        convert_checkpoint(tmp_path / "nothing", tmp_path / "new")


def test_round_trip_from_one_process_to_two_is_bitwise(tmp_path):
    """Two processes read single files and save shards; one process reads the shards."""
    saved = tensors(*trained(2, sharded=False))
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, saved, {})
    assert run_job("read_and_save", tmp_path) == [0, 0]
    folder = newest_valid(tmp_path)[0]
    assert folder.name == "step-00000002"
    for group, named in saved.items():
        assert same(read_tensors(folder, group), dict(named))
    read = {group: emptied(named) for group, named in saved.items()}
    load_into(folder, read)
    assert all(same(read[group], dict(saved[group])) for group in saved)


def read_and_save(run):
    blank = tensors(*trained(1, sharded=True))
    load_into(newest_valid(run)[0], blank)
    with ShardedCheckpointWriter(run, keep=1) as writer:
        writer.save(2, blank, {})


def test_shards_are_read_by_any_number_of_processes(saved_by_two):
    folder = list_checkpoints(saved_by_two)[-1]
    convert_checkpoint(folder, folder.parent / "single-step-00000004")
    convert_checkpoint(folder, folder.parent / "three-step-00000004", 3)
    assert run_job("load", saved_by_two) == [0, 0]
    for other in ("single", "three"):
        read = tensors(*trained(1, sharded=False))
        load_into(folder.parent / f"{other}-step-00000004", read)
        assert all(same(read[group], read_tensors(folder, group)) for group in read)


def test_reads_files_of_torch_and_raises_failures_in_all_processes(tmp_path):
    assert run_job("save_with_torch,fail", tmp_path) == [0, 0]


def test_dead_process_fails_the_save_of_the_others(tmp_path):
    assert run_job("die", tmp_path) == [0, -signal.SIGKILL]


def test_metrics_are_synced_before_a_sharded_checkpoint_appears(tmp_path, surviving):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with MetricLog(tmp_path) as log, ShardedCheckpointWriter(tmp_path, keep=9) as writer:
            for step in (1, 2, 3):
                log.log(step, loss=1.0)
                writer.save(step, {"model": {"w": torch.ones(3)}}, {})
                writer.wait()
    finally:
        dist.destroy_process_group()
    assert surviving == {f"step-{step:08d}": list(range(1, step + 1)) for step in (1, 2, 3)}


if __name__ == "__main__":
    names, folder = sys.argv[1].split(","), Path(sys.argv[2])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/{names[0]}.store", rank=rank, world_size=world_size)
    for name in names:
        globals()[name](folder)
    dist.destroy_process_group()
