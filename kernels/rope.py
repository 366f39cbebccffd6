"""Rotary position embedding of queries and keys in one launch; the backward pass is the same kernel, turning back.

`rope_qkv` also parts a packed projection: values are copied beside, so that the gradients of all three meet in one tensor
without a concatenation, and nothing keeps the projection alive. A program holds one block of tokens for one block of heads:
the angles are loaded once a token and serve all its heads.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import reference
from .checks import FLOATING, INTEGER, check_choice, check_device, check_dtype, check_int
from .dispatch import jit, tl, use_triton
from .inspect import KernelCase
from .launch import launch
from .reference import RopeLayout
from .shared import count_no_flops, register_fake

# Arguments whose divisibility helps no load: without this, another length or offset could mean another compilation.
SIZES = (
    "positions_batch_stride", "positions_token_stride", "num_q_heads", "num_k_heads", "num_tokens", "num_positions",
    "num_token_blocks", "offset",
)  # fmt: skip


@jit
def _copy(x_rows, y_rows, row_mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    channels = tl.arange(0, BLOCK)[None, None, :]
    mask = row_mask & (channels < WIDTH)
    tl.store(y_rows + channels, tl.load(x_rows + channels, mask=mask), mask=mask)


@jit
def _rotate(
    x_rows,
    y_rows,
    row_mask,
    cos,
    sin,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    if INTERLEAVED:
        # Whole rows are loaded and parted in registers: a load of every other channel could not be a vector.
        channels = tl.arange(0, BLOCK_ROTARY)[None, None, :]
        mask = row_mask & (channels < ROTARY_DIM)
        x = tl.load(x_rows + channels, mask=mask).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (BLOCK_TOKENS, BLOCK_HEADS, BLOCK_ROTARY // 2, 2)))
        y = tl.interleave(first * cos - second * sin, first * sin + second * cos)
        tl.store(y_rows + channels, y.to(y_rows.dtype.element_ty), mask=mask)
    else:
        pairs = tl.arange(0, BLOCK_ROTARY // 2)[None, None, :]
        mask = row_mask & (pairs < ROTARY_DIM // 2)
        first = tl.load(x_rows + pairs, mask=mask).to(tl.float32)
        second = tl.load(x_rows + ROTARY_DIM // 2 + pairs, mask=mask).to(tl.float32)
        element = y_rows.dtype.element_ty
        tl.store(y_rows + pairs, (first * cos - second * sin).to(element), mask=mask)
        tl.store(y_rows + ROTARY_DIM // 2 + pairs, (first * sin + second * cos).to(element), mask=mask)
    if BLOCK_REST > 0:
        _copy(x_rows + ROTARY_DIM, y_rows + ROTARY_DIM, row_mask, HEAD_DIM - ROTARY_DIM, BLOCK_REST)


@jit(do_not_specialize=SIZES)
def rope_forward(
    q_ptr,
    q_out_ptr,
    k_ptr,
    k_out_ptr,
    v_ptr,
    v_out_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    q_batch_stride,
    q_head_stride,
    q_token_stride,
    q_out_batch_stride,
    q_out_head_stride,
    q_out_token_stride,
    k_batch_stride,
    k_head_stride,
    k_token_stride,
    k_out_batch_stride,
    k_out_head_stride,
    k_out_token_stride,
    v_batch_stride,
    v_head_stride,
    v_token_stride,
    v_out_batch_stride,
    v_out_head_stride,
    v_out_token_stride,
    positions_batch_stride,
    positions_token_stride,
    num_q_heads,
    num_k_heads,
    num_tokens,
    num_positions,
    num_token_blocks,
    offset,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HAS_K: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROTARY: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Turn one block of heads of one block of tokens."""
    # Blocks of heads of the same tokens run side by side, so that all but the first find their angles in the L2 cache.
    num_q_blocks = tl.cdiv(num_q_heads, BLOCK_HEADS)
    num_k_blocks = tl.cdiv(num_k_heads, BLOCK_HEADS)
    num_head_blocks = num_q_blocks
    if HAS_K:
        num_head_blocks += num_k_blocks
    if HAS_V:
        num_head_blocks += num_k_blocks
    head_block = tl.program_id(0) % num_head_blocks
    token_block = tl.program_id(0) // num_head_blocks % num_token_blocks
    batch = (tl.program_id(0) // num_head_blocks // num_token_blocks).to(tl.int64)
    tokens = token_block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None, None]
    token_mask = tokens < num_tokens
    tokens = tokens.to(tl.int64)

    pairs = tl.arange(0, BLOCK_ROTARY // 2)[None, None, :]
    if HAS_POSITIONS:
        positions_row = positions_ptr + batch * positions_batch_stride
        positions = tl.load(positions_row + tokens * positions_token_stride, mask=token_mask, other=0).to(tl.int64)
        positions = tl.maximum(positions, 0)
        # A position past the tables must not be read, and to report it from here would need a synchronisation: NaN shows it.
        angle_mask = (positions < num_positions) & (pairs < ROTARY_DIM // 2)
    else:
        positions = tokens + offset
        angle_mask = token_mask & (pairs < ROTARY_DIM // 2)
    angles = positions * TABLE_STRIDE + pairs
    cos = tl.load(cos_ptr + angles, mask=angle_mask, other=float("nan")).to(tl.float32)
    sin = tl.load(sin_ptr + angles, mask=angle_mask, other=float("nan")).to(tl.float32)
    if INVERSE:
        sin = -sin

    block_heads = tl.arange(0, BLOCK_HEADS)[None, :, None]
    if head_block < num_q_blocks:
        heads = (head_block * BLOCK_HEADS + block_heads).to(tl.int64)
        _rotate(
            q_ptr + batch * q_batch_stride + tokens * q_token_stride + heads * q_head_stride,
            q_out_ptr + batch * q_out_batch_stride + tokens * q_out_token_stride + heads * q_out_head_stride,
            token_mask & (heads < num_q_heads),
            cos, sin, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_TOKENS, BLOCK_HEADS, BLOCK_ROTARY, BLOCK_REST,
        )  # fmt: skip
    elif HAS_K:
        if head_block < num_q_blocks + num_k_blocks:
            heads = ((head_block - num_q_blocks) * BLOCK_HEADS + block_heads).to(tl.int64)
            _rotate(
                k_ptr + batch * k_batch_stride + tokens * k_token_stride + heads * k_head_stride,
                k_out_ptr + batch * k_out_batch_stride + tokens * k_out_token_stride + heads * k_out_head_stride,
                token_mask & (heads < num_k_heads),
                cos, sin, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_TOKENS, BLOCK_HEADS, BLOCK_ROTARY, BLOCK_REST,
            )  # fmt: skip
        elif HAS_V:
            heads = ((head_block - num_q_blocks - num_k_blocks) * BLOCK_HEADS + block_heads).to(tl.int64)
            _copy(
                v_ptr + batch * v_batch_stride + tokens * v_token_stride + heads * v_head_stride,
                v_out_ptr + batch * v_out_batch_stride + tokens * v_out_token_stride + heads * v_out_head_stride,
                token_mask & (heads < num_k_heads), HEAD_DIM, BLOCK_CHANNELS,
            )  # fmt: skip


# Bytes of x that a program and a thread read: two 16-byte loads a thread.
PROGRAM_BYTES = 8192
THREAD_BYTES = 32
# The angles of a token are as many bytes as one of its heads in float32, two in half precision: over 16 heads, little.
MAX_BLOCK_HEADS = 16


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def launch_config(num_heads: int, num_tokens: int, head_dim: int, rotary_dim: int, element_size: int) -> dict[str, int]:
    """Return the block sizes and warps that ship for `num_heads` heads of q or k, whichever has more."""
    channels = _power_of_two(head_dim)
    heads = min(_power_of_two(num_heads), MAX_BLOCK_HEADS, PROGRAM_BYTES // element_size // channels)
    tokens = min(PROGRAM_BYTES // element_size // (channels * heads), _power_of_two(num_tokens))
    rest = 0 if rotary_dim == head_dim else _power_of_two(head_dim - rotary_dim)
    blocks = {"BLOCK_TOKENS": tokens, "BLOCK_HEADS": heads, "BLOCK_CHANNELS": channels}
    num_warps = max(tokens * heads * channels * element_size // (32 * THREAD_BYTES), 1)
    return blocks | {"BLOCK_ROTARY": _power_of_two(rotary_dim), "BLOCK_REST": rest, "num_warps": num_warps}


def _launch_kernel(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> None:
    # Fill ys: q, or q and k, turned, or q and k turned and v as it is; each (B, H, T, K) with channels that are neighbours.
    if all(x.numel() == 0 for x in xs):
        return
    xs = [x if x.stride(-1) == 1 else x.contiguous() for x in xs]
    q, k, v = xs[0], xs[min(1, len(xs) - 1)], xs[-1]
    q_out, k_out, v_out = ys[0], ys[min(1, len(ys) - 1)], ys[-1]
    batch, _, num_tokens, head_dim = q.shape
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    rotary_dim, element_size = 2 * cos.shape[1], max(x.element_size() for x in xs)
    config = launch_config(max(q.shape[1], k.shape[1]), num_tokens, head_dim, rotary_dim, element_size)
    num_head_blocks = sum(-(-x.shape[1] // config["BLOCK_HEADS"]) for x in xs)
    num_token_blocks = -(-num_tokens // config["BLOCK_TOKENS"])
    launch(
        rope_forward, batch * num_token_blocks * num_head_blocks,
        q, q_out, k, k_out, v, v_out, cos, sin, q if positions is None else positions,
        *q.stride()[:3], *q_out.stride()[:3], *k.stride()[:3], *k_out.stride()[:3], *v.stride()[:3], *v_out.stride()[:3],
        *((0, 0) if positions is None else positions.stride()),
        q.shape[1], k.shape[1], num_tokens, cos.shape[0], num_token_blocks, offset,
        HEAD_DIM=head_dim, ROTARY_DIM=rotary_dim, TABLE_STRIDE=cos.stride(0), INTERLEAVED=interleaved, INVERSE=inverse,
        HAS_K=len(xs) > 1, HAS_V=len(xs) > 2, HAS_POSITIONS=positions is not None, **config,
    )  # fmt: skip


@torch.library.custom_op("tilewright::rope", mutates_args=())
def _rope(
    xs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    tokens_first: Sequence[bool],
) -> list[Tensor]:
    """Rotate one or two tensors (B, H, T, K); each result is laid out as (B, T, H, K) where `tokens_first` says so."""
    ys = _empty_results(xs, cos, sin, positions, offset, interleaved, inverse, tokens_first)
    _launch_kernel(xs, ys, cos, sin, positions, offset, interleaved, inverse)
    return ys


@register_fake(_rope)
def _empty_results(
    xs: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    tokens_first: Sequence[bool],
) -> list[Tensor]:
    def like(x: Tensor, first: bool) -> Tensor:
        batch, heads, tokens, head_dim = x.shape
        return x.new_empty(batch, tokens, heads, head_dim).transpose(1, 2) if first else x.new_empty(x.shape)

    return [like(x, first) for x, first in zip(xs, tokens_first, strict=True)]


def _save_for_backward(ctx, inputs, output) -> None:
    _, cos, sin, positions, ctx.offset, ctx.interleaved, ctx.inverse, ctx.tokens_first = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, dys: list[Tensor]):
    # A rotation's gradient is the rotation back, which the same op computes; so it can be differentiated again.
    options = (ctx.offset, ctx.interleaved, not ctx.inverse, ctx.tokens_first)
    return torch.ops.tilewright.rope(dys, *ctx.saved_tensors, *options), *(None,) * 7


# No autocast rule: x keeps its dtype, as under PyTorch's multiplications.
_rope.register_autograd(_backward, setup_context=_save_for_backward)


def _part(qkv: Tensor, num_heads: int, num_kv_heads: int) -> list[Tensor]:
    # q, k, v as (B, H or Hkv, T, K) views of a packed (B, T, (H + 2 Hkv) K).
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1)).transpose(1, 2)
    return list(heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1))


@torch.library.custom_op("tilewright::rope_qkv", mutates_args=())
def _rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Part a packed projection; each result is laid out as (B, T, H, K)."""
    xs = _part(qkv, num_heads, num_kv_heads)
    ys = _empty_parts(qkv, cos, sin, positions, offset, interleaved, num_heads, num_kv_heads)
    _launch_kernel(xs, ys, cos, sin, positions, offset, interleaved, inverse=False)
    return ys


@register_fake(_rope_qkv)
def _empty_parts(qkv, cos, sin, positions, offset, interleaved, num_heads, num_kv_heads):
    batch, tokens, width = qkv.shape
    head_dim = width // (num_heads + 2 * num_kv_heads)
    q, k, v = (qkv.new_empty(batch, tokens, heads, head_dim).transpose(1, 2) for heads in (num_heads, *[num_kv_heads] * 2))
    return q, k, v


@torch.library.custom_op("tilewright::rope_qkv_backward", mutates_args=())
def _rope_qkv_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int, interleaved: bool
) -> Tensor:
    dqkv = _empty_packed(dq, dk, dv, cos, sin, positions, offset, interleaved)
    parts = _part(dqkv, dq.shape[1], dk.shape[1])
    _launch_kernel([dq, dk, dv], parts, cos, sin, positions, offset, interleaved, inverse=True)
    return dqkv


@register_fake(_rope_qkv_backward)
def _empty_packed(dq, dk, dv, cos, sin, positions, offset, interleaved):
    batch, heads, tokens, head_dim = dq.shape
    return dq.new_empty(batch, tokens, (heads + 2 * dk.shape[1]) * head_dim)


def _save_qkv(ctx, inputs, output) -> None:
    _, cos, sin, positions, ctx.offset, ctx.interleaved, *_ = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward_qkv(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
    dqkv = torch.ops.tilewright.rope_qkv_backward(dq, dk, dv, *ctx.saved_tensors, ctx.offset, ctx.interleaved)
    return dqkv, *(None,) * 7


_rope_qkv.register_autograd(_backward_qkv, setup_context=_save_qkv)


count_no_flops(torch.ops.tilewright.rope, torch.ops.tilewright.rope_qkv, torch.ops.tilewright.rope_qkv_backward)


LAYOUTS = ("interleaved", "half")
MAX_HEAD_DIM = 256


def _check(xs: dict[str, Tensor], cos: Tensor, sin: Tensor, positions: Tensor | None, layout: RopeLayout, offset: int) -> None:
    check_choice("layout", layout, LAYOUTS)
    check_dtype(FLOATING, **xs, cos=cos, sin=sin)
    check_device(**xs, cos=cos, sin=sin, positions=positions)
    for name, x in xs.items():
        if x.dim() < 2 or x.shape[-1] % 2 or not 0 < x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}: allowed is (..., T, K) with an even head dim K from 2 to {MAX_HEAD_DIM}"
            )
    x = next(iter(xs.values()))
    num_tokens, head_dim = x.shape[-2:]
    if cos.dim() != 2 or cos.shape != sin.shape or not 0 < cos.shape[1] <= head_dim // 2:
        raise ValueError(
            f"cos has shape {tuple(cos.shape)}, sin {tuple(sin.shape)}: allowed is (positions, {head_dim // 2}) for both, "
            f"or fewer columns where not all {head_dim} channels are rotated"
        )
    num_positions = cos.shape[0]
    check_int("offset", offset, 0)
    if positions is None:
        if offset + num_tokens > num_positions:
            raise ValueError(
                f"offset is {offset} with {num_tokens} tokens: allowed is 0 to {num_positions - num_tokens}, "
                f"because cos and sin have {num_positions} positions"
            )
        return
    if offset != 0:
        raise ValueError(f"offset is {offset}: with positions it must be 0, they say where each token stands")
    check_dtype(INTEGER, positions=positions)
    allowed = [(num_tokens,), (1, num_tokens)] + ([(x.shape[0], num_tokens)] if x.dim() > 2 else [])
    if tuple(positions.shape) not in allowed:
        allowed = " or ".join(map(str, dict.fromkeys(allowed)))
        raise ValueError(f"positions has shape {tuple(positions.shape)}: allowed is {allowed}")
    # On a GPU it would need a synchronisation to look at the values; while compiling there are none.
    if positions.is_cpu and positions.numel() and type(positions) is Tensor and not torch.compiler.is_compiling():
        last = int(positions.max())
        if last >= num_positions:
            raise ValueError(
                f"positions holds {last}: allowed is less than {num_positions}, the positions of cos and sin, "
                "and less than 0 for padding"
            )


def _rotated(
    xs: list[Tensor], cos: Tensor, sin: Tensor, positions: Tensor | None, layout: RopeLayout, offset: int
) -> list[Tensor]:
    # The heads of a projection's output are (B, T, H, K) in memory.
    tokens_first = [x.stride(1) < x.stride(2) for x in xs]
    positions = None if positions is None else positions.expand(xs[0].shape[0], xs[0].shape[2])
    return torch.ops.tilewright.rope(xs, cos, sin, positions, offset, layout == "interleaved", False, tokens_first)


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    layout: RopeLayout = "interleaved",
    offset: int = 0,
) -> Tensor:
    """Rotate pairs of channels by the angle of their position (Su et al. 2021, eq. 34).

    x (..., T, K), K even and at most 256; cos, sin (positions, K / 2), as `rope_tables` makes them -> (..., T, K) in the dtype
    of `x`, computed in float32. Pairs are neighbours (2i, 2i + 1) as in RoFormer, or with layout="half" (i, i + K / 2) as in
    Llama checkpoints.

    Partial rotary: tables of R / 2 columns, fewer than K / 2, rotate the first R channels as if they were the whole head; the
    others are copied (GPT-NeoX, Black et al. 2022, section 3.1; Phi, GLM).

    Tokens stand at offset .. offset + T - 1, after `offset` cached ones; or at `positions`, int64 or int32 of shape (T), (1, T)
    or, for x (B, ..., T, K), (B, T). A position below 0 marks padding and counts as 0, so that row and gradient stay finite.
    A position past the tables is a ValueError on a CPU; on a GPU, where to look would need a synchronisation, and in compiled
    code it gives NaN in its row.

    cos and sin get no gradient. x may have any strides, as a slice of a packed projection has; only channels that are no
    neighbours are copied. Where x is (B, T, H, K) in memory, so are the result and the gradient. float64 runs the reference.
    """
    _check({"x": x}, cos, sin, positions, layout, offset)
    if not use_triton(x):
        return reference.rope(x, cos, sin, positions, layout, offset)
    if x.dim() == 4:
        return _rotated([x], cos, sin, positions, layout, offset)[0]
    # One batch, so that the angles of a token serve all rows, unless sequences have their own.
    batch = 1 if positions is None or positions.dim() == 1 else positions.shape[0]
    rows = x.reshape(batch, math.prod(x.shape[:-2]) // max(batch, 1), *x.shape[-2:])
    return _rotated([rows], cos, sin, positions, layout, offset)[0].view(x.shape)


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    layout: RopeLayout = "interleaved",
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """`rope` of queries (B, H, T, K) and keys (B, Hkv, T, K) in one launch, which loads the angles for both."""
    _check({"q": q, "k": k}, cos, sin, positions, layout, offset)
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}: allowed are (B, H, T, K) and (B, Hkv, T, K)")
    if not use_triton(q, k):
        return reference.rope_qk(q, k, cos, sin, positions, layout, offset)
    q, k = _rotated([q, k], cos, sin, positions, layout, offset)
    return q, k


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    positions: Tensor | None = None,
    layout: RopeLayout = "interleaved",
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Part a packed projection (B, T, (H + 2 Hkv) K) into q (B, H, T, K), k and v (B, Hkv, T, K), and `rope` q and k.

    The results are tensors of their own, (B, T, H, K) in memory, and their gradients meet in one packed tensor. K is at most
    256; other arguments are those of `rope`.
    """
    check_int("num_heads", num_heads, 1)
    check_int("num_kv_heads", num_kv_heads, 1)
    all_heads = num_heads + 2 * num_kv_heads
    if qkv.dim() != 3 or qkv.shape[-1] % all_heads:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, with {num_heads} and twice {num_kv_heads} heads: allowed is (B, T, W) "
            f"with W a multiple of {all_heads}"
        )
    _check({"qkv": _part(qkv, num_heads, num_kv_heads)[0]}, cos, sin, positions, layout, offset)
    if not use_triton(qkv):
        return reference.rope_qkv(qkv, cos, sin, num_heads, num_kv_heads, positions, layout, offset)
    positions = None if positions is None else positions.expand(qkv.shape[:2])
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return torch.ops.tilewright.rope_qkv(qkv, cos, sin, positions, offset, layout == "interleaved", num_heads, num_kv_heads)


def compile_cases() -> Iterator[KernelCase]:
    """Yield the kernel as it is launched for GPT-2 small and XL, Llama 3 8B, Gemma's head dim, and one decoded token."""
    for num_q_heads, num_k_heads, num_tokens, head_dim in (
        (12, 12, 1024, 64), (25, 25, 1024, 64), (32, 8, 8192, 128), (8, 4, 8192, 256), (32, 8, 8192, 96), (32, 8, 1, 128)
    ):  # fmt: skip
        for dtype, element_size in (("bf16", 2), ("fp32", 4)):
            config = launch_config(max(num_q_heads, num_k_heads), num_tokens, head_dim, head_dim, element_size)
            num_warps = config.pop("num_warps")
            for layout in LAYOUTS:
                constants = config | {
                    "HEAD_DIM": head_dim,
                    "ROTARY_DIM": head_dim,
                    "TABLE_STRIDE": head_dim // 2,
                    "INTERLEAVED": layout == "interleaved",
                    "INVERSE": False,
                    "HAS_K": True,
                    "HAS_V": num_q_heads == num_k_heads,
                    "HAS_POSITIONS": num_tokens == 1,
                }
                types = {
                    name: f"*{dtype}" if name.endswith("_ptr") else "i64" if name.endswith("_stride") else "i32"
                    for name in rope_forward.arg_names
                    if name not in constants
                } | {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i64"}
                aligned = tuple(name for name in types if name.endswith("_stride") and not name.startswith("positions"))
                name = f"rope {layout} H {num_q_heads}/{num_k_heads} T {num_tokens} K {head_dim} {dtype}"
                yield KernelCase(name, rope_forward, types, constants, num_warps, aligned=aligned)
