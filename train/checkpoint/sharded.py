"""Checkpoints of a job whose tensors are sharded: each process writes its part, and any number of processes reads them.

Each file `NAME.safetensors` of a checkpoint becomes a folder `NAME` with such a file from every process, in the form that
torch.distributed.checkpoint gives to safetensors: its `HuggingFaceStorageReader` reads them. Manifest, state and which ones
stay are as `writer.py` has them. Reading needs no process group, and takes either form.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ...errors import UserError
from ...files import atomic_folder, make_folder, publish_folder, sync, temporary_name
from ..metrics import sync_metrics
from .layout import STATE_FILE, Tensors, check_fits, free_folder, tensor_names, verify_checkpoint
from .tensor_files import FileRecord, TensorReader, write_tensors
from .writer import CheckpointWriter, Copies, remove_leftovers, remove_unwanted, write_manifest


def load_into(folder: Path, tensors: Tensors) -> None:
    """Fill `tensors` in place, DTensors with their own shards; other names or shapes than were saved are a `UserError`.

    However many processes saved it, and in either form; each process reads what it needs by itself.
    """
    readers = {group: TensorReader(folder, group) for group in tensors}
    for group, named in tensors.items():
        check_fits(readers[group], {name: tensor.shape for name, tensor in named.items()}, folder, f"the {group}")
    for group, named in tensors.items():
        for name, tensor in named.items():
            readers[group].read_into(name, _local(tensor), _offsets(tensor))


def convert_checkpoint(source: Path, out: Path, num_shards: int | None = None) -> None:
    """Write the checkpoint in the folder `source` again as the folder `out`, of single files or in shards along dimension 0.

    Holds the largest file to be written in memory. `source` must be valid, and `out` not exist.
    """
    if num_shards is not None and num_shards < 1:
        raise UserError(f"num_shards is {num_shards}: it must be at least 1")
    verify_checkpoint(source)
    if out.exists():
        raise UserError(f"{out} exists already: name another folder")
    with atomic_folder(out) as temporary:
        files: dict[str, FileRecord] = {}
        for group in tensor_names(source):
            reader = TensorReader(source, group)
            if num_shards is None:
                files[f"{group}.safetensors"] = write_tensors(temporary / f"{group}.safetensors", reader.read())
                continue
            make_folder(temporary / group)
            for index in range(num_shards):
                tensors, offsets = reader.read_shard(index, num_shards)
                name = _shard_name(group, index, num_shards)
                files[name] = write_tensors(temporary / name, tensors, offsets)
        write_manifest(temporary, files, (source / STATE_FILE).read_bytes())


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _offsets(tensor: Tensor) -> Sequence[int] | None:
    if not isinstance(tensor, DTensor):
        return None
    (chunk,) = tensor.__create_chunk_list__()
    return chunk.offsets


def _shard_name(group: str, index: int, count: int) -> str:
    return f"{group}/shard-{index + 1:05d}-of-{count:05d}.safetensors"


class ShardedCheckpointWriter(CheckpointWriter):
    """A `CheckpointWriter` for a job: every process has one, and calls the same methods in the same order.

    Tensors that are no DTensors are taken to be the same in all processes: the first process's are saved, as is its state.
    What fails in one process is raised in all. `run` is a folder that all processes see.
    """

    def _open(self) -> int | None:
        # A group of its own, because the thread's collectives must not mix with those of training.
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        lock, failure = None, None
        if dist.get_rank() == 0:
            try:
                lock = super()._open()
            except UserError as error:
                failure = str(error)
        failures = [failure]
        dist.broadcast_object_list(failures, src=0, group=self._group)
        if failures[0] is not None:
            raise UserError(failures[0])
        return lock

    def _save(self, step: int, tensors: Tensors, state: bytes) -> None:
        local = {group: {name: _local(tensor) for name, tensor in named.items()} for group, named in tensors.items()}
        copies, finish_copies = self._snapshots.take(local)
        flat = {f"{group}/{name}": tensor.detach() for group, named in tensors.items() for name, tensor in named.items()}
        plan = create_default_local_save_plan(flat, dist.get_rank() == 0)
        storage = _ShardWriter(self._run, step, self._keep, list(tensors), state)

        def write() -> None:
            finish_copies()
            try:
                save_shards({}, storage_writer=storage, planner=_Planner(plan, copies), process_group=self._group)
            except CheckpointException as error:
                # Raised when every process has stopped writing.
                if dist.get_rank() == 0:
                    with contextlib.suppress(OSError):
                        remove_leftovers(self._run)
                raise _first_failure(error) from error

        self._start(step, write)


class _Planner(DefaultSavePlanner):
    """Has every shard written once, from the copy that was taken of it."""

    def __init__(self, plan: SavePlan, copies: Copies) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True)
        self.plan = plan
        self._copies = copies

    def create_local_plan(self) -> SavePlan:
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        group, name = write_item.index.fqn.split("/", 1)
        return self._copies[group][name]


class _ShardWriter(StorageWriter):
    """Writes the shards of a process; in the first one also makes the folder, and completes it when all have written.

    torch's own HuggingFaceStorageWriter holds a process's file in memory once more, and what it wrote would have to be read
    again to be hashed.
    """

    # Known to the first process alone.
    _folder: Path
    _temporary: Path

    def __init__(self, run: Path, step: int, keep: int, groups: list[str], state: bytes) -> None:
        self._run, self._step, self._keep = run, step, keep
        self._groups, self._state = groups, state

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        remove_leftovers(self._run)
        self._folder = free_folder(self._run, self._step)
        self._temporary = temporary_name(self._folder)
        for group in self._groups:
            make_folder(self._temporary / group)
        return [
            dataclasses.replace(plan, storage_data=(self._temporary, index, len(plans))) for index, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        temporary, index, count = plan.storage_data
        tensors: dict[str, dict[str, Tensor]] = {group: {} for group in self._groups}
        offsets: dict[str, dict[str, Sequence[int]]] = {group: {} for group in self._groups}
        for item in plan.items:
            assert item.tensor_data is not None
            group, name = item.index.fqn.split("/", 1)
            tensors[group][name] = planner.resolve_data(item)  # pyright: ignore[reportArgumentType]
            offsets[group][name] = item.tensor_data.chunk.offsets
        results = []
        for group in self._groups:
            name = _shard_name(group, index, count)
            record = write_tensors(temporary / name, tensors[group], offsets[group])
            # Only the machine that wrote a file can sync it.
            sync(temporary / name)
            results.append(WriteResult(MetadataIndex(name), record["bytes"], record))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {result.index.fqn: result.storage_data for of_process in results for result in of_process}
        write_manifest(self._temporary, files, self._state)
        # This process is the one that logs them.
        sync_metrics(self._run)
        publish_folder(self._temporary, self._folder)
        remove_unwanted(self._run, self._folder, self._keep)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def _first_failure(error: CheckpointException) -> Exception:
    rank, (failure, _) = min(error.failures.items())
    kind = OSError if isinstance(failure, OSError) else RuntimeError
    return kind(f"process {rank}: {failure if kind is OSError else repr(failure)}")
