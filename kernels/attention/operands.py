"""How tensors are handed to a kernel: their memory, their strides, and the TMA descriptors of their tiles."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .configurations import LaunchConfig


def block_k_of(head_dim: int) -> int:
    """Return the power of two that holds a head, 16 at least: the least that the matrix instructions take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def with_unit_stride(x: Tensor) -> Tensor:
    """Return `x` (B, H, T, K) with the elements of a token beside each other: copied only where they are not."""
    # A tile's 32-bit offsets reach 256 tokens.
    fits = x.stride(-2) * 256 < 2**31
    return x if (x.stride(-1) == 1 or x.shape[-1] == 1) and fits else x.contiguous()


def _strides(x: Tensor) -> list[int]:
    # Those that are used: of a dimension of size 1 none is.
    return [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]


def is_aligned(x: Tensor) -> bool:
    """Whether every token of `x` (B, H, T, K), in half precision, begins on 16 bytes."""
    batch, head, token, _ = x.stride()
    return x.data_ptr() % 16 == 0 and ((batch | head | token) % 8 == 0 or all(stride % 8 == 0 for stride in _strides(x)))


def aligned(x: Tensor) -> Tensor:
    """Return `x` (B, H, T, K), its head dim contiguous, with every token on 16 bytes where it is in half precision.

    Else tiles would be loaded element by element, so that a copy with a wider stride is the shorter way.
    """
    if x.element_size() > 2 or is_aligned(x):
        return x
    *shape, head_dim = x.shape
    return x.new_empty(*shape, -(-head_dim // 16) * 16)[..., :head_dim].copy_(x)


def load_strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of an `aligned` x as kernels take them, in units of 16 bytes where it is in half precision.

    So the compiler sees that each token begins on 16 bytes, for strides such as 72 too that are no multiples of 16.
    """
    batch, head, token, _ = x.stride()
    return (batch // 8, head // 8, token // 8) if x.element_size() == 2 else (batch, head, token)


def fits_tma(x: Tensor) -> bool:
    """Whether a TMA descriptor can describe an `aligned` x (CUDA driver API, cuTensorMapEncodeTiled)."""
    return x.element_size() == 2 and x.numel() > 0 and x.stride(-1) == 1 and all(stride > 0 for stride in _strides(x))


def _descriptor_strides(x: Tensor) -> list[int]:
    # The stride of a dimension of size 1 is never used, but must be a multiple of 16 bytes all the same.
    return [*(stride if size > 1 else 16 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)), 1]


@cache
def tile_layout(rows: int, width: int, dtype: torch.dtype) -> Any:
    """Return how TMA lays out a tile (1, 1, rows, width) in shared memory, as the kernels in Gluon ask for."""
    from .gluon import gl

    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], getattr(gl, str(dtype).removeprefix("torch.")))


def as_gluon_tiles(tensors: Sequence[Tensor], rows: Sequence[int]) -> list[Any]:
    """Return descriptors of tiles of so many rows of tensors (B, H, T, K), for a kernel in Gluon."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def describe(x: Tensor, block_rows: int) -> Any:
        width = block_k_of(x.shape[-1])
        layout = tile_layout(block_rows, width, x.dtype)
        return TensorDescriptor(x, list(x.shape), _descriptor_strides(x), [1, 1, block_rows, width], layout)

    return [describe(x, count) for x, count in zip(tensors, rows, strict=True)]


def as_tiles(tensors: Sequence[Tensor], rows: str, config: "LaunchConfig") -> list[Any]:
    """Return tensors (B, H, T, K) as a kernel takes them: where it uses TMA, descriptors of tiles of block_m or block_n rows.

    `rows` has an "m" or an "n" for each.
    """
    if not config.tma:
        return list(tensors)
    from triton.tools.tensor_descriptor import TensorDescriptor

    def describe(x: Tensor, block_rows: int) -> Any:
        return TensorDescriptor(x, list(x.shape), _descriptor_strides(x), [1, 1, block_rows, block_k_of(x.shape[-1])])

    sizes = {"m": config.block_m, "n": config.block_n}
    return [describe(x, sizes[axis]) for x, axis in zip(tensors, rows, strict=True)]
