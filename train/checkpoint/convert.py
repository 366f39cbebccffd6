"""Conversion of checkpoints between single files, shards, and the format of torch.distributed.checkpoint (DCP)."""

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
    """Convert the checkpoint folder `source` to the new folder `out`: single files, or `num_shards` shards along dimension 0.

    `to="dcp"` writes what torch.distributed.checkpoint saves for {"model": {...}, "optimizer": {...}, ...}, and copies
    `state.json`. A DCP folder as `source` becomes single files. The metadata of DCP is a pickle; only the classes that
    describe tensors are unpickled. Needs memory for the largest output file, or for all tensors to and from DCP. Raises a
    `UserError` if `source` is not valid or `out` exists.
    """
    from_dcp = (source / METADATA_FILE).exists()
    if num_shards is not None and (num_shards < 1 or from_dcp or to == "dcp"):
        allowed = "left out to and from dcp" if from_dcp or to == "dcp" else "at least 1"
        raise UserError(f"num_shards is {num_shards}: it must be {allowed}")
    if not from_dcp or to == "dcp":
        verify_checkpoint(source)
    elif not (source / STATE_FILE).exists():
        raise UserError(f"{source} has no {STATE_FILE}, which holds the step: expected a folder that `--to dcp` wrote")
    require_absent(out, "name another folder")
    if to == "dcp":
        _write_dcp(source, out)
        return
    with atomic_folder(out) as temporary:
        files = _from_dcp(source, temporary) if from_dcp else _to_tilewright(source, temporary, num_shards)
        write_manifest(temporary, files, (source / STATE_FILE).read_bytes())


def _to_tilewright(source: Path, folder: Path, num_shards: int | None) -> dict[str, FileRecord]:
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
    with atomic_folder(out) as temporary, _without_process_group():
        save(tensors, checkpoint_id=temporary, no_dist=True)
        shutil.copyfile(source / STATE_FILE, temporary / STATE_FILE)


def _from_dcp(source: Path, folder: Path) -> dict[str, FileRecord]:
    from torch.distributed.checkpoint.state_dict_loader import load  # slow to import

    entries, reader = read_metadata(source)
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
    with _without_process_group():
        # The parameter's type is invariant, hence the cast.
        load(cast(dict[str, Any], tensors), storage_reader=reader, no_dist=True)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = tensor
    return {f"{group}.safetensors": write_tensors(folder / f"{group}.safetensors", named) for group, named in groups.items()}


@contextlib.contextmanager
def _without_process_group() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
