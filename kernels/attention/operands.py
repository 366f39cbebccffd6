"""How tensors are handed to a kernel: their memory, their strides, and the TMA descriptors of their tiles."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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


def aligned(x: Tensor) -> Tensor:
    """Return `x` (B, H, T, K), its head dim contiguous, with every token on 16 bytes where it is in half precision.

    Else tiles would be loaded element by element, so that a copy with a wider stride is the shorter way.
    """
    if x.element_size() > 2:
        return x
    batch, head, token, _ = x.stride()
    if x.data_ptr() % 16 == 0 and ((batch | head | token) % 8 == 0 or all(stride % 8 == 0 for stride in _strides(x))):
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


def as_tiles(tensors: Sequence[Tensor], rows: str, config: "LaunchConfig") -> list[Any]:
    """Return tensors (B, H, T, K) as a kernel takes them: where it uses TMA, descriptors of tiles of block_m or block_n rows.

    `rows` has an "m" or an "n" for each.
    """
    if not config.tma:
        return list(tensors)
    from triton.tools.tensor_descriptor import TensorDescriptor

    def describe(x: Tensor, block_rows: int) -> Any:
        # The stride of a dimension of size 1 is never used, but must be a multiple of 16 bytes all the same.
        strides = [stride if size > 1 else 16 for size, stride in zip(x.shape, x.stride(), strict=True)]
        return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, 1, block_rows, block_k_of(x.shape[-1])])

    sizes = {"m": config.block_m, "n": config.block_n}
    return [describe(x, sizes[axis]) for x, axis in zip(tensors, rows, strict=True)]
