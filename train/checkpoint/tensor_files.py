"""Safetensors files of checkpoints: hashed while they are written, and read whole or by region."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import UserError

# The metadata key under which torch.distributed.checkpoint stores the offsets of each shard in the whole tensor.
SHARDING_KEY = "DCP_SHARDING_INFO"
OFFSETS_KEY = "saved_offsets"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPE_OF_NAME = {name: dtype for dtype, name in _DTYPES.items()}
# Small enough to stay in the CPU cache between the hash and the write.
_CHUNK = 1 << 20


class FileRecord(TypedDict):
    """The entry of a file in the manifest."""

    bytes: int
    sha256: str | None
    """None if the checkpoint's format has no hashes."""


class _HashedFile:
    """A new file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            self._hash.update(chunk)
            self._file.write(chunk)

    def __enter__(self) -> "_HashedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def finish(self) -> FileRecord:
        self._file.flush()
        return {"bytes": self._file.tell(), "sha256": self._hash.hexdigest()}


def write_bytes(path: Path, content: bytes) -> FileRecord:
    """Write a new file and return its record."""
    with _HashedFile(path) as file:
        file.write(content)
        return file.finish()


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """Return the safetensors name of the dtype of the tensor `name`. Raises a `ValueError` if there is none."""
    if dtype not in _DTYPES:
        raise ValueError(f"{name} has dtype {dtype}, which safetensors does not support")
    return _DTYPES[dtype]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], offsets: Mapping[str, Sequence[int]] | None = None) -> FileRecord:
    """Write contiguous CPU tensors to a new safetensors file without a second copy in memory, and return its record.

    `offsets` holds the offset of each tensor in the whole tensor, if the tensors are shards.
    """
    # The format has no padding between tensors. Wider elements first keeps every tensor aligned to its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    if offsets is not None:
        header["__metadata__"][SHARDING_KEY] = json.dumps({name: {OFFSETS_KEY: list(offsets[name])} for name in order})
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        dtype = dtype_name(name, tensor.dtype)
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].view(-1).view(torch.uint8).numpy().data)
        return file.finish()


def tensors_length(path: Path) -> int:
    """Return the length in bytes that the header of a safetensors file implies. Raises a `UserError` for an invalid header."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(size))
        return 8 + size + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise _unreadable(path, error) from error


class TensorReader:
    """Reads the tensors of one group of a checkpoint, from one file or from shards.

    `shapes` and `dtypes` describe the whole tensors. A file that cannot be read raises a `UserError`.
    """

    def __init__(self, folder: Path, name: str) -> None:
        single = folder / f"{name}.safetensors"
        paths = [single] if single.exists() else sorted((folder / name).glob("*.safetensors"))
        if not paths:
            raise UserError(f"{folder} has no tensors of the group {name}")
        self._folder = folder
        # The pieces of each tensor: offsets, shape, and the slice of an open file.
        self._pieces: dict[str, list[tuple[list[int], list[int], Any]]] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for path in paths:
            try:
                self._open(path)
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                raise _unreadable(path, error) from error

    def _open(self, path: Path) -> None:
        file = safe_open(path, framework="pt")
        sharding = json.loads((file.metadata() or {}).get(SHARDING_KEY, "{}"))
        for key in file.keys():  # noqa: SIM118 (not a dict)
            piece = file.get_slice(key)
            shape = piece.get_shape()
            at = sharding[key][OFFSETS_KEY] if sharding else [0] * len(shape)
            self._pieces.setdefault(key, []).append((at, shape, piece))
            ends = self.shapes.get(key, [0] * len(shape))
            self.shapes[key] = torch.Size(max(end, i + n) for end, i, n in zip(ends, at, shape, strict=True))
            self.dtypes[key] = _DTYPE_OF_NAME[piece.get_dtype()]

    def join_numbered(self, shapes: Mapping[str, torch.Size]) -> None:
        """Concatenate `KEY.0`, `KEY.1`, ... along the rows for each KEY of `shapes` that the checkpoint lacks.

        Earlier versions saved the momenta of Muon so, one tensor per matrix of a weight.
        """
        for key, shape in shapes.items():
            if key in self.shapes or f"{key}.0" not in self.shapes:
                continue
            matrices = []
            for number in itertools.takewhile(lambda i: f"{key}.{i}" in self.shapes, itertools.count()):  # noqa: B023
                name = f"{key}.{number}"
                matrices.append(torch.empty(self.shapes[name], dtype=self.dtypes[name]))
                self.read_into(name, matrices[-1])
                del self._pieces[name], self.shapes[name]
            whole = torch.cat(matrices)
            if whole.numel() == shape.numel():
                whole = whole.view(shape)
            self._pieces[key] = [([0] * whole.dim(), list(whole.shape), whole)]
            self.shapes[key], self.dtypes[key] = whole.shape, whole.dtype

    def read_into(self, key: str, target: Tensor, offsets: Sequence[int] | None = None) -> None:
        """Copy the region of a tensor at `offsets`, in the shape of `target`, into `target`."""
        at = offsets or [0] * target.dim()
        num_read = 0
        for piece_at, piece_shape, piece in self._pieces[key]:
            low = [max(a, b) for a, b in zip(at, piece_at, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(at, target.shape, piece_at, piece_shape, strict=True)]
            if any(i >= j for i, j in zip(low, high, strict=True)):
                continue
            source = tuple(slice(i - b, j - b) for i, j, b in zip(low, high, piece_at, strict=True))
            place = tuple(slice(i - a, j - a) for i, j, a in zip(low, high, at, strict=True))
            try:
                values = piece[source]
            except (OSError, SafetensorError) as error:
                raise _unreadable(self._folder, error) from error
            target[place].copy_(values)
            num_read += values.numel()
        if num_read != target.numel():
            raise UserError(
                f"cannot read {key} from {self._folder}: it holds {num_read} of {target.numel()} elements; a shard is missing"
            )

    def read(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return all whole tensors in new memory."""
        whole = {key: torch.empty(shape, dtype=self.dtypes[key], device=device) for key, shape in self.shapes.items()}
        for key, tensor in whole.items():
            self.read_into(key, tensor)
        return whole

    def read_shard(self, index: int, count: int) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Return shard `index` of `count` of each tensor, and its offsets. Splits dimension 0 as `torch.chunk` does.

        Scalars and empty tensors are in shard 0.
        """
        tensors, offsets = {}, {}
        for key, shape in self.shapes.items():
            length = shape[0] if shape else 1
            first, last = (min(i * -(-length // count), length) for i in (index, index + 1))
            if first < last or index == 0:
                offsets[key] = [first, *[0] * len(shape)][: len(shape)]
                tensors[key] = torch.empty([last - first, *shape[1:]] if shape else [], dtype=self.dtypes[key])
                self.read_into(key, tensors[key], offsets[key])
        return tensors, offsets


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read {path}: {error}; use another checkpoint")
