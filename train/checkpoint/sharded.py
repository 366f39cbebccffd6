"""Sharded checkpoints: each process writes its shards, and any number of processes can read them.

Instead of a file `NAME.safetensors`, a sharded checkpoint has a folder `NAME` with one or more files per process. Their format
is the safetensors format of torch.distributed.checkpoint, which `HuggingFaceStorageReader` reads. The manifest, the state and
the retention policy are the same as in `writer.py`. Reading needs no process group.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ...errors import UserError
from ...files import make_folder, publish_folder, sync, temporary_name
from ..metrics import sync_metrics
from .joined import NONE, Joined, parts_of_state, row_spans
from .layout import Tensors, free_folder
from .tensor_files import write_tensors
from .writer import CheckpointWriter, Copies, remove_leftovers, remove_unwanted, write_manifest


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_name(group: str, index: int, count: int, piece: int = 0) -> str:
    """Return the name of a process's file. A file holds one piece per tensor; further pieces go to further files."""
    suffix = f"-{piece + 1}" if piece else ""
    return f"{group}/shard-{index + 1:05d}-of-{count:05d}{suffix}.safetensors"


class ShardedCheckpointWriter(CheckpointWriter):
    """A `CheckpointWriter` for several processes. All processes must call the same methods in the same order.

    Tensors other than DTensors must be equal in all processes; the first process saves them, and its state. An error in one
    process is raised in all. `run` is a folder that all processes share. `joined` is the result of `joined_parts`.
    """

    def __init__(self, run: Path, keep: int, keep_step: int | None = None, joined: Joined = NONE) -> None:
        super().__init__(run, keep, keep_step)
        self._joined = joined

    def _open(self) -> int | None:
        # A separate group, because collectives of the writer thread must not interleave with collectives of training.
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
        plan, rows = self._plan(flat)
        storage = _ShardWriter(self._run, step, self._keep, self._keep_step, list(tensors), state)

        def write() -> None:
            finish_copies()
            try:
                save_shards({}, storage_writer=storage, planner=_Planner(plan, copies, rows), process_group=self._group)
            except CheckpointException as error:
                # When this is raised, all processes have stopped writing.
                if dist.get_rank() == 0:
                    with contextlib.suppress(OSError):
                        remove_leftovers(self._run)
                raise _first_failure(error) from error

        self._start(step, write)

    def _plan(self, tensors: dict[str, Tensor]) -> tuple[SavePlan, dict[MetadataIndex, range]]:
        """Return the save plan of this process, and the local rows of each item that is only a part of a local tensor."""
        plan = create_default_local_save_plan(tensors, dist.get_rank() == 0)
        items: list[WriteItem] = []
        rows_of: dict[MetadataIndex, range] = {}
        for item in plan.items:
            name, data = item.index.fqn, item.tensor_data
            tensor, parts = tensors[name], parts_of_state(name.split("/", 1)[1], self._joined)
            if parts is None or data is None or not isinstance(tensor, DTensor):
                items.append(item)
                continue
            for rows, offsets in row_spans(tensor, data.chunk.offsets, data.chunk.sizes[0], parts):
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size([len(rows), *data.chunk.sizes[1:]]))
                index = MetadataIndex(name, chunk.offsets)
                rows_of[index] = rows
                items.append(dataclasses.replace(item, index=index, tensor_data=dataclasses.replace(data, chunk=chunk)))
        return dataclasses.replace(plan, items=items), rows_of


class _Planner(DefaultSavePlanner):
    """Resolves each item of the plan to its snapshot. Replicated items are written once."""

    def __init__(self, plan: SavePlan, copies: Copies, rows: dict[MetadataIndex, range]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True)
        self.plan = plan
        self._copies, self._rows = copies, rows

    def create_local_plan(self) -> SavePlan:
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        group, name = write_item.index.fqn.split("/", 1)
        copy, rows = self._copies[group][name], self._rows.get(write_item.index)
        return copy if rows is None else copy[rows.start : rows.stop]


_Contents = tuple[dict[str, Tensor], dict[str, Sequence[int]]]


class _ShardWriter(StorageWriter):
    """Writes the shards of a process. The first process also creates the folder, and publishes it after all have written.

    torch's HuggingFaceStorageWriter would copy each file in memory, and its output would have to be read again for the hash.
    """

    # Set in the first process only.
    _folder: Path
    _temporary: Path

    def __init__(self, run: Path, step: int, keep: int, keep_step: int | None, groups: list[str], state: bytes) -> None:
        self._run, self._step, self._keep, self._keep_step = run, step, keep, keep_step
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
        # For each group, the tensors and the offsets of each file.
        files: dict[str, list[_Contents]] = {group: [({}, {})] for group in self._groups}
        for item in plan.items:
            assert item.tensor_data is not None
            group, name = item.index.fqn.split("/", 1)
            if all(name in tensors for tensors, _ in files[group]):
                files[group].append(({}, {}))
            tensors, offsets = next(file for file in files[group] if name not in file[0])
            tensors[name] = planner.resolve_data(item)  # pyright: ignore[reportArgumentType]
            offsets[name] = item.tensor_data.chunk.offsets
        results = []
        for group, contents in files.items():
            for piece, (tensors, offsets) in enumerate(contents):
                name = shard_name(group, index, count, piece)
                record = write_tensors(temporary / name, tensors, offsets)
                # Only the machine that wrote a file can fsync it.
                sync(temporary / name)
                results.append(WriteResult(MetadataIndex(name), record["bytes"], record))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {result.index.fqn: result.storage_data for of_process in results for result in of_process}
        write_manifest(self._temporary, files, self._state)
        # The first process writes the metrics.
        sync_metrics(self._run)
        publish_folder(self._temporary, self._folder)
        remove_unwanted(self._run, self._folder, self._keep, self._keep_step)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def _first_failure(error: CheckpointException) -> Exception:
    rank, (failure, _) = min(error.failures.items())
    kind = OSError if isinstance(failure, OSError) else RuntimeError
    return kind(f"process {rank}: {failure if kind is OSError else repr(failure)}")
