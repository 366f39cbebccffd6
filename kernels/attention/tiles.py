"""How tiles reach a program: which one is whose, and how a tile is loaded, through pointers or a TMA descriptor."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..dispatch import jit, tl

if TYPE_CHECKING:
    from .configurations import LaunchConfig

# Arguments whose divisibility helps no load: without this, each new length of a growing cache could mean a new compilation.
SIZES = (
    "num_rows", "num_heads", "num_kv_heads", "num_queries", "num_keys", "window", "rows_at_once", "num_splits", "num_parts",
    "document_stride",
)  # fmt: skip


@jit
def program_of(program, num_tiles, num_rows, rows_at_once, LAST_FIRST: tl.constexpr):
    """Return (tile, row) of a program, where `num_rows` rows (batch and head) have `num_tiles` tiles each.

    Programs that run at the same time share the keys and values of `rows_at_once` rows, which fit in the L2 cache together.
    Under a causal mask tiles differ in work: the longest begin first, so that the last to end are short.
    """
    group = program // (rows_at_once * num_tiles)
    first_row = group * rows_at_once
    group_rows = tl.minimum(num_rows - first_row, rows_at_once)
    place = program - first_row * num_tiles
    tile = place // group_rows
    if LAST_FIRST:
        tile = num_tiles - 1 - tile
    return tile, first_row + place % group_rows


@jit
def stride_unit(source):
    """Return in how many elements the strides of a tensor that is loaded are given: see `load_strides`."""
    return 8 if source.dtype.element_ty.primitive_bitwidth == 16 else 1


@jit
def load_base(source, batch, head, batch_stride, head_stride, TMA: tl.constexpr):
    """Return where a head of one sequence begins; a descriptor has no pointer and stays what it is."""
    if not TMA:
        offset = tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride
        source = source + offset * stride_unit(source)
    return source


@jit
def load_tile(
    base, batch, head, start, end, token_stride,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load (ROWS, BLOCK_K) of a head from token `start` on; 0 beyond the head dim and, if MASKED, from token `end` on."""
    if TMA:
        # The hardware fills what lies outside with 0.
        tile = base.load([batch, head, start, 0]).reshape(ROWS, BLOCK_K)
    else:
        rows = tl.arange(0, ROWS)[:, None]
        columns = tl.arange(0, BLOCK_K)[None, :]
        stride = token_stride * stride_unit(base)
        # 64 bits once a tile; within it 32 bits do, and keep the registers.
        address = base + tl.cast(start, tl.int64) * stride + rows * stride + columns
        if HEAD_DIM < BLOCK_K:
            mask = columns < HEAD_DIM
            if MASKED:
                mask = mask & (rows < end - start)
            tile = tl.load(address, mask=mask, other=0.0)
        elif MASKED:
            tile = tl.load(address, mask=rows < end - start, other=0.0)
        else:
            tile = tl.load(address)
    return tile


@jit
def store_base(target, batch, head, batch_stride, head_stride):
    """Return where a head of one sequence begins in a tensor to be written, whose strides are in elements."""
    return target + tl.cast(batch, tl.int64) * batch_stride + tl.cast(head, tl.int64) * head_stride


@jit
def store_tile(
    base, tile, start, end, token_stride,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Store (ROWS, BLOCK_K) from token `start` on, up to the head dim and the token `end`."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_K)
    address = base + tl.cast(start, tl.int64) * token_stride + rows[:, None] * token_stride + columns[None, :]
    mask = (rows < end - start)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(address, tile.to(base.dtype.element_ty), mask=mask)


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
    if x.element_size() > 2 or (x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in _strides(x))):
        return x
    *shape, head_dim = x.shape
    return x.new_empty(*shape, -(-head_dim // 16) * 16)[..., :head_dim].copy_(x)


def load_strides(x: Tensor) -> tuple[int, ...]:
    """Return the strides of an `aligned` x as kernels take them, in units of 16 bytes where it is in half precision.

    So the compiler sees that each token begins on 16 bytes, for strides such as 72 too that are no multiples of 16.
    """
    return tuple(stride // 8 if x.element_size() == 2 else stride for stride in x.stride()[:3])


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
        return TensorDescriptor(x, list(x.shape), [*strides[:-1], 1], [1, 1, block_rows, config.block_k])

    sizes = {"m": config.block_m, "n": config.block_n}
    return [describe(x, sizes[axis]) for x, axis in zip(tensors, rows, strict=True)]
