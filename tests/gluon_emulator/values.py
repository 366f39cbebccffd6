"""Tensors in registers, element types, and pointers to global memory."""

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class DType:
    """An element type: its number of bits and its rounding."""

    def __init__(self, name: str, bits: int, numpy: Any = None) -> None:
        self.name, self.primitive_bitwidth, self.numpy = name, bits, numpy
        self.element_ty = self

    def round(self, data: Any) -> Any:
        """Return `data` rounded to this type; half-precision values are stored as float32."""
        if self.name == "bfloat16":
            return torch.from_numpy(np.array(data, np.float32)).bfloat16().float().numpy()
        if self.name == "float16":
            with np.errstate(over="ignore"):
                return np.asarray(data, np.float16).astype(np.float32)
        return np.asarray(data).astype(self.numpy)

    def __repr__(self) -> str:
        return self.name


DTYPES = {
    "float32": DType("float32", 32, np.float32), "bfloat16": DType("bfloat16", 16), "float16": DType("float16", 16),
    "int32": DType("int32", 32, np.int32), "int64": DType("int64", 64, np.int64), "int1": DType("int1", 1, np.bool_),
}  # fmt: skip
OF_TORCH = {getattr(torch, name): dtype for name, dtype in DTYPES.items() if name != "int1"}


class Value:
    """A tensor or scalar in registers."""

    __array_priority__ = 100

    def __init__(self, data: Any) -> None:
        self.data = np.asarray(data)
        if self.data.dtype == np.float64:
            self.data = self.data.astype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)

    def to(self, dtype: DType) -> "Value":
        return Value(dtype.round(self.data))

    def __getitem__(self, key: Any) -> "Value":
        return Value(self.data[key])

    def __neg__(self) -> "Value":
        return Value(-self.data)

    def __index__(self) -> int:
        return int(self.data)

    def __bool__(self) -> bool:
        return bool(self.data)


def raw(x: Any) -> Any:
    assert not hasattr(x, "compute"), "a result is used whose product was not waited for"
    return x.data if isinstance(x, Value) else np.float32(x) if isinstance(x, float) else x


def _operator(name: str) -> Callable[[Value, Any], Value]:
    def method(self: Value, other: Any) -> Value:
        if "div" in name or "mod" in name:
            # NumPy rounds down, Triton toward zero.
            whole = [x for x in map(np.asarray, (self.data, raw(other))) if x.dtype.kind == "i"]
            assert len(whole) < 2 or all((x >= 0).all() for x in whole), f"{name} of negative integers"
        with np.errstate(all="ignore"):
            return Value(getattr(self.data, name)(raw(other)))

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "rshift", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))
    if _name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(Value, f"__r{_name}__", _operator(f"__r{_name}__"))


class Pointer:
    """A pointer into a tensor's memory, or a tensor of pointers."""

    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = OF_TORCH[memory.dtype]

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + raw(other))

    def __getitem__(self, key: Any) -> "Pointer":
        return Pointer(self.memory, np.asarray(self.offset)[key])


def _places(pointer: Pointer, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # Return the element offset of each lane, and which lanes are active. PyTorch's indexing checks the upper bound.
    offset = torch.as_tensor(np.asarray(pointer.offset), dtype=torch.int64)
    seen = torch.from_numpy(np.broadcast_to(True if mask is None else raw(mask), offset.shape).copy())
    assert (offset[seen] >= 0).all(), "a pointer precedes the memory of its tensor"
    return offset, seen


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
    offset, seen = _places(pointer, mask)
    values = pointer.memory[torch.where(seen, offset, 0)].to(_as_float(pointer))
    return Value(torch.where(seen, values, other).to(values.dtype).numpy())


def _as_float(pointer: Pointer) -> torch.dtype:
    return torch.float32 if pointer.memory.is_floating_point() else pointer.memory.dtype


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    offset, seen = _places(pointer, mask)
    data = torch.from_numpy(np.array(np.broadcast_to(raw(value), offset.shape)))
    pointer.memory[offset[seen]] = data[seen].to(pointer.memory.dtype)


def function(f: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Value:
        with np.errstate(all="ignore"):
            return Value(f(*map(raw, arguments)))

    return call


def reduction(f: Callable[..., Any]) -> Callable[..., Any]:
    def reduce(x: Value, axis: int) -> Value:
        with np.errstate(all="ignore"):
            return Value(f(x.data, axis=axis))

    return reduce
