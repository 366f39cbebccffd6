"""Prepare tensors as kernel arguments: alignment, strides, and TMA descriptors of their tiles."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .configurations import LaunchConfig


def block_k_of(head_dim: int) -> int:
    """Return the next power of two of the head dim, at least 16, the minimum of the matrix instructions."""
    return max(16, 1 << (head_dim - 1).bit_length())


def with_unit_stride(x: Tensor) -> Tensor:
    """Return `x` (B, H, T, K) with a contiguous head dim. Copies only if needed."""
    # 32-bit offsets within a tile must cover 256 tokens.
    fits = x.stride(-2) * 256 < 2**31
    return x if (x.stride(-1) == 1 or x.shape[-1] == 1) and fits else x.contiguous()


def _strides(x: Tensor) -> list[int]:
    # The stride of a dimension of size 1 is never used.
    return [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]


def is_aligned(x: Tensor) -> bool:
    """Whether every token of a half-precision `x` (B, H, T, K) is 16-byte aligned."""
    batch, head, token, _ = x.stride()
    return x.data_ptr() % 16 == 0 and ((batch | head | token) % 8 == 0 or all(stride % 8 == 0 for stride in _strides(x)))


def aligned(x: Tensor) -> Tensor:
    """Return `x` (B, H, T, K), whose head dim is contiguous, with 16-byte aligned tokens if it is in half precision.

    Unaligned tiles load element by element, so a copy with a padded stride is faster.
    """
    if x.element_size() > 2 or is_aligned(x):
        return x
    *shape, head_dim = x.shape
    return x.new_empty(*shape, -(-head_dim // 16) * 16)[..., :head_dim].copy_(x)


def load_strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of an `aligned` x for a kernel, in units of 16 bytes if x is in half precision.

    The units show the compiler that each token is 16-byte aligned, even for strides such as 72 that are not multiples of 16.
    """
    batch, head, token, _ = x.stride()
    return (batch // 8, head // 8, token // 8) if x.element_size() == 2 else (batch, head, token)


def fits_tma(x: Tensor) -> bool:
    """Whether a TMA descriptor can describe an `aligned` x (CUDA driver API, cuTensorMapEncodeTiled)."""
    return x.element_size() == 2 and x.numel() > 0 and x.stride(-1) == 1 and all(stride > 0 for stride in _strides(x))


def _descriptor_strides(x: Tensor) -> list[int]:
    # The stride of a dimension of size 1 is never used, but it must still be a multiple of 16 bytes.
    return [*(stride if size > 1 else 16 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)), 1]


@cache
def tile_layout(rows: int, width: int, dtype: torch.dtype) -> Any:
    """Return the shared-memory layout of a TMA tile (1, 1, rows, width) that the Gluon kernels expect."""
    from .gluon import gl

    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], getattr(gl, str(dtype).removeprefix("torch.")))


def as_gluon_tiles(tensors: Sequence[Tensor], rows: Sequence[int]) -> list[Any]:
    """Return a Gluon TMA descriptor for each tensor (B, H, T, K); `rows` holds the tile height of each."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    def describe(x: Tensor, block_rows: int) -> Any:
        width = block_k_of(x.shape[-1])
        layout = tile_layout(block_rows, width, x.dtype)
        return TensorDescriptor(x, list(x.shape), _descriptor_strides(x), [1, 1, block_rows, width], layout)

    return [describe(x, count) for x, count in zip(tensors, rows, strict=True)]


def as_tiles(tensors: Sequence[Tensor], rows: str, config: "LaunchConfig") -> list[Any]:
    """Return tensors (B, H, T, K) as arguments of a portable kernel: with TMA, descriptors of tiles of block_m or block_n rows.

    `rows` has an "m" or an "n" for each tensor.
    """
    if not config.tma:
        return list(tensors)
    from triton.tools.tensor_descriptor import TensorDescriptor

    def describe(x: Tensor, block_rows: int) -> Any:
        return TensorDescriptor(x, list(x.shape), _descriptor_strides(x), [1, 1, block_rows, block_k_of(x.shape[-1])])

    sizes = {"m": config.block_m, "n": config.block_n}
    return [describe(x, sizes[axis]) for x, axis in zip(tensors, rows, strict=True)]
