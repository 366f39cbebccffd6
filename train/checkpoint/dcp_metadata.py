"""A safe reader of the pickled metadata of torch.distributed.checkpoint (DCP), limited to an allowlist of classes."""

import pathlib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import UserError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

METADATA_FILE = ".metadata"

# The classes in the metadata of tensors. The dtypes of torch are allowed too.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "PurePosixPath"),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        is_dtype = module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype)
        if not is_dtype and global_name not in _ALLOWED.get(module_name, ()):
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which no checkpoint of tensors contains")
        # Later versions of Python define the path classes in another module.
        return getattr(pathlib, global_name) if module_name == "pathlib" else super().find_class(module_name, global_name)


def read_metadata(folder: Path) -> "tuple[dict[str, TensorStorageMetadata], FileSystemReader]":
    """Return the metadata of each tensor by key, and a reader for them. An entry that is not a tensor is a `UserError`."""
    # Slow to import.
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

    path = folder / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path} is not the metadata of torch.distributed.checkpoint")
    entries: dict[str, TensorStorageMetadata] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise UserError(f"cannot convert {folder}: {key} is pickled and not a tensor; save tensors only")
        entries[key] = entry
    metadata.storage_meta = metadata.storage_meta or StorageMeta()

    class Reader(FileSystemReader):
        """Returns the metadata read above. Loads tensors with `weights_only`."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return metadata

    return entries, Reader(folder)
