"""A checkpoint written again: as single files, in shards, or as torch.distributed.checkpoint has it, and back."""

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ...errors import UserError
from ...files import atomic_folder, make_folder, require_absent
from .dcp_metadata import METADATA_FILE, read_metadata
from .formats import STATE_FILE
from .layout import verify_checkpoint
from .reader import read_tensors, tensor_names
from .sharded import shard_name
from .tensor_files import FileRecord, TensorReader, write_tensors
from .writer import write_manifest


def convert_checkpoint(
    source: Path, out: Path, num_shards: int | None = None, to: Literal["tilewright", "dcp"] = "tilewright"
) -> None:
    """Write the checkpoint in the folder `source` again as the folder `out`, of single files or in shards along dimension 0.

    dcp: as torch.distributed.checkpoint saves {"model": {...}, "optimizer": {...}, ...}, with our `state.json` beside it. A
    folder of that form may be `source` too, and becomes single files; its metadata is a pickle, of which only what describes
    tensors is taken. Holds the largest file to be written in memory, to and from dcp all of them. `source` must be valid, and
    `out` not exist.
    """
    from_dcp = (source / METADATA_FILE).exists()
    if num_shards is not None and (num_shards < 1 or from_dcp or to == "dcp"):
        allowed = "left out to and from dcp" if from_dcp or to == "dcp" else "at least 1"
        raise UserError(f"num_shards is {num_shards}: it must be {allowed}")
    if not from_dcp or to == "dcp":
        verify_checkpoint(source)
    elif not (source / STATE_FILE).exists():
        raise UserError(f"{source} has no {STATE_FILE}, which says its step: allowed is what `--to dcp` wrote")
    require_absent(out, "name another folder")
    if to == "dcp":
        _write_dcp(source, out)
        return
    with atomic_folder(out) as temporary:
        files = _from_dcp(source, temporary) if from_dcp else _again(source, temporary, num_shards)
        write_manifest(temporary, files, (source / STATE_FILE).read_bytes())


def _again(source: Path, folder: Path, num_shards: int | None) -> dict[str, FileRecord]:
    files: dict[str, FileRecord] = {}
    for group in tensor_names(source):
        reader = TensorReader(source, group)
        if num_shards is None:
            files[f"{group}.safetensors"] = write_tensors(folder / f"{group}.safetensors", reader.read())
            continue
        make_folder(folder / group)
        for index in range(num_shards):
            tensors, offsets = reader.read_shard(index, num_shards)
            name = shard_name(group, index, num_shards)
            files[name] = write_tensors(folder / name, tensors, offsets)
    return files


def _write_dcp(source: Path, out: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save  # slow to import

    tensors = {name: read_tensors(source, name) for name in tensor_names(source)}
    with atomic_folder(out) as temporary, _alone():
        save(tensors, checkpoint_id=temporary, no_dist=True)
        shutil.copyfile(source / STATE_FILE, temporary / STATE_FILE)


def _from_dcp(source: Path, folder: Path) -> dict[str, FileRecord]:
    from torch.distributed.checkpoint.state_dict_loader import load  # slow to import

    entries, reader = read_metadata(source)
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    with _alone():
        # An invariant type: it takes any state dict.
        load(cast(dict[str, Any], tensors), storage_reader=reader, no_dist=True)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = tensor
    return {f"{group}.safetensors": write_tensors(folder / f"{group}.safetensors", named) for group, named in groups.items()}


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
