"""Rotary position embedding of queries and keys in one launch; the backward pass is the same kernel, turning back.

`rope_qkv` also parts a packed projection: values are copied beside, so that the gradients of all three meet in one tensor
without a concatenation, and nothing keeps the projection alive. A program holds one block of tokens for one block of heads:
the angles are loaded once a token and serve all its heads.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from . import reference
from .dispatch import jit, tl, use_triton
from .launch import launch
from .op import Arguments, Cost, Costs, Op, draw, grid, record
from .reference import RopeLayout
from .registration import count_no_flops, custom_op


@jit
def _rotate(
    x_rows,
    y_rows,
    row_mask,
    cos,
    sin,
    HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    if INTERLEAVED:
        # Whole rows are loaded and parted in registers: a load of every other channel could not be a vector.
        channels = tl.arange(0, BLOCK_CHANNELS)[None, None, :]
        mask = row_mask & (channels < HEAD_DIM)
        x = tl.load(x_rows + channels, mask=mask).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (BLOCK_TOKENS, BLOCK_HEADS, BLOCK_CHANNELS // 2, 2)))
        y = tl.interleave(first * cos - second * sin, first * sin + second * cos)
        tl.store(y_rows + channels, y.to(y_rows.dtype.element_ty), mask=mask)
    else:
        pairs = tl.arange(0, BLOCK_CHANNELS // 2)[None, None, :]
        mask = row_mask & (pairs < HEAD_DIM // 2)
        first = tl.load(x_rows + pairs, mask=mask).to(tl.float32)
        second = tl.load(x_rows + HEAD_DIM // 2 + pairs, mask=mask).to(tl.float32)
        element = y_rows.dtype.element_ty
        tl.store(y_rows + pairs, (first * cos - second * sin).to(element), mask=mask)
        tl.store(y_rows + HEAD_DIM // 2 + pairs, (first * sin + second * cos).to(element), mask=mask)


@jit
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
    HEAD_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    HAS_K: tl.constexpr,
    HAS_V: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
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

    if HAS_POSITIONS:
        positions_row = positions_ptr + batch * positions_batch_stride
        positions = tl.load(positions_row + tokens * positions_token_stride, mask=token_mask, other=0).to(tl.int64)
    else:
        positions = tokens
    pairs = tl.arange(0, BLOCK_CHANNELS // 2)[None, None, :]
    # A position outside the tables must not be read, and to report it from here would need a synchronisation: NaN shows it.
    angle_mask = (positions >= 0) & (positions < num_positions) & (pairs < HEAD_DIM // 2)
    angles = positions * (HEAD_DIM // 2) + pairs
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
            cos, sin, HEAD_DIM, INTERLEAVED, BLOCK_TOKENS, BLOCK_HEADS, BLOCK_CHANNELS,
        )  # fmt: skip
    elif HAS_K:
        if head_block < num_q_blocks + num_k_blocks:
            heads = ((head_block - num_q_blocks) * BLOCK_HEADS + block_heads).to(tl.int64)
            _rotate(
                k_ptr + batch * k_batch_stride + tokens * k_token_stride + heads * k_head_stride,
                k_out_ptr + batch * k_out_batch_stride + tokens * k_out_token_stride + heads * k_out_head_stride,
                token_mask & (heads < num_k_heads),
                cos, sin, HEAD_DIM, INTERLEAVED, BLOCK_TOKENS, BLOCK_HEADS, BLOCK_CHANNELS,
            )  # fmt: skip
        elif HAS_V:
            heads = ((head_block - num_q_blocks - num_k_blocks) * BLOCK_HEADS + block_heads).to(tl.int64)
            channels = tl.arange(0, BLOCK_CHANNELS)[None, None, :]
            mask = token_mask & (heads < num_k_heads) & (channels < HEAD_DIM)
            v_rows = v_ptr + batch * v_batch_stride + tokens * v_token_stride + heads * v_head_stride
            v_out_rows = v_out_ptr + batch * v_out_batch_stride + tokens * v_out_token_stride + heads * v_out_head_stride
            tl.store(v_out_rows + channels, tl.load(v_rows + channels, mask=mask), mask=mask)


# Bytes of x that a program and a thread read: two 16-byte loads a thread.
PROGRAM_BYTES = 8192
THREAD_BYTES = 32
# The angles of a token are as many bytes as one of its heads in float32, two in half precision: over 16 heads, little.
MAX_BLOCK_HEADS = 16


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def launch_config(num_heads: int, num_tokens: int, head_dim: int, element_size: int) -> dict[str, int]:
    """Return the block sizes and warps that ship for `num_heads` heads of q or k, whichever has more."""
    channels = _power_of_two(head_dim)
    heads = min(_power_of_two(num_heads), MAX_BLOCK_HEADS, PROGRAM_BYTES // element_size // channels)
    tokens = min(PROGRAM_BYTES // element_size // (channels * heads), _power_of_two(num_tokens))
    num_warps = max(tokens * heads * channels * element_size // (32 * THREAD_BYTES), 1)
    return {"BLOCK_TOKENS": tokens, "BLOCK_HEADS": heads, "BLOCK_CHANNELS": channels, "num_warps": num_warps}


def _is_tokens_first(x: Tensor) -> bool:
    # The heads of a projection's output, (B, T, H, K) in memory.
    return x.stride(1) < x.stride(2)


def _launch_kernel(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
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
    element_size = max(x.element_size() for x in xs)
    config = launch_config(max(q.shape[1], k.shape[1]), num_tokens, head_dim, element_size)
    num_head_blocks = sum(-(-x.shape[1] // config["BLOCK_HEADS"]) for x in xs)
    num_token_blocks = -(-num_tokens // config["BLOCK_TOKENS"])
    launch(
        rope_forward, batch * num_token_blocks * num_head_blocks,
        q, q_out, k, k_out, v, v_out, cos.contiguous(), sin.contiguous(), q if positions is None else positions,
        *q.stride()[:3], *q_out.stride()[:3], *k.stride()[:3], *k_out.stride()[:3], *v.stride()[:3], *v_out.stride()[:3],
        *((0, 0) if positions is None else positions.stride()),
        q.shape[1], k.shape[1], num_tokens, cos.shape[0], num_token_blocks,
        HEAD_DIM=head_dim, INTERLEAVED=interleaved, INVERSE=inverse, HAS_K=len(xs) > 1, HAS_V=len(xs) > 2,
        HAS_POSITIONS=positions is not None, **config,
    )  # fmt: skip


@custom_op("rope")
def _rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    q_tokens_first: bool,
    k_tokens_first: bool,
) -> tuple[Tensor, Tensor]:
    """Rotate one or two tensors (B, H, T, K); each result is laid out as (B, T, H, K) where `tokens_first` says so."""
    ys = _empty_results(q, k, cos, sin, positions, interleaved, inverse, q_tokens_first, k_tokens_first)
    xs = [q] if k is None else [q, k]
    _launch_kernel(xs, ys[: len(xs)], cos, sin, positions, interleaved, inverse)
    return ys


@_rope.register_fake
def _empty_results(q, k, cos, sin, positions, interleaved, inverse, q_tokens_first, k_tokens_first) -> tuple[Tensor, Tensor]:
    def like(x: Tensor, first: bool) -> Tensor:
        batch, heads, tokens, head_dim = x.shape
        return x.new_empty(batch, tokens, heads, head_dim).transpose(1, 2) if first else x.new_empty(x.shape)

    return like(q, q_tokens_first), q.new_empty(0) if k is None else like(k, k_tokens_first)


def _save_for_backward(ctx, inputs, output) -> None:
    _, k, cos, sin, positions, *ctx.options = inputs
    ctx.has_k = k is not None
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, dq: Tensor, dk: Tensor):
    # A rotation's gradient is the rotation back, which the same op computes; so it can be differentiated again.
    interleaved, inverse, *tokens_first = ctx.options
    dq, dk = _rope(dq, dk if ctx.has_k else None, *ctx.saved_tensors, interleaved, not inverse, *tokens_first)
    return dq, dk if ctx.has_k else None, *(None,) * 7


# No autocast rule: x keeps its dtype, as under PyTorch's multiplications.
_rope.register_autograd(_backward, setup_context=_save_for_backward)


def _part(qkv: Tensor, num_heads: int, num_kv_heads: int) -> list[Tensor]:
    # q, k, v as (B, H or Hkv, T, K) views of a packed (B, T, (H + 2 Hkv) K).
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1)).transpose(1, 2)
    return list(heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1))


@custom_op("rope_qkv")
def _rope_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Part a packed projection; each result is laid out as (B, T, H, K)."""
    xs = _part(qkv, num_heads, num_kv_heads)
    ys = _empty_parts(qkv, cos, sin, positions, interleaved, num_heads, num_kv_heads)
    _launch_kernel(xs, ys, cos, sin, positions, interleaved, inverse=False)
    return ys


@_rope_qkv.register_fake
def _empty_parts(qkv, cos, sin, positions, interleaved, num_heads, num_kv_heads):
    batch, tokens, width = qkv.shape
    head_dim = width // (num_heads + 2 * num_kv_heads)
    q, k, v = (qkv.new_empty(batch, tokens, heads, head_dim).transpose(1, 2) for heads in (num_heads, *[num_kv_heads] * 2))
    return q, k, v


@custom_op("rope_qkv_backward")
def _rope_qkv_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    dqkv = _empty_packed(dq, dk, dv, cos, sin, positions, interleaved)
    _launch_kernel([dq, dk, dv], _part(dqkv, dq.shape[1], dk.shape[1]), cos, sin, positions, interleaved, inverse=True)
    return dqkv


@_rope_qkv_backward.register_fake
def _empty_packed(dq, dk, dv, cos, sin, positions, interleaved):
    batch, heads, tokens, head_dim = dq.shape
    return dq.new_empty(batch, tokens, (heads + 2 * dk.shape[1]) * head_dim)


def _save_qkv(ctx, inputs, output) -> None:
    _, cos, sin, positions, ctx.interleaved, ctx.num_heads, ctx.num_kv_heads = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward_qkv(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
    return _rope_qkv_backward(dq, dk, dv, *ctx.saved_tensors, ctx.interleaved), *(None,) * 6


_rope_qkv.register_autograd(_backward_qkv, setup_context=_save_qkv)


count_no_flops(_rope, _rope_qkv, _rope_qkv_backward)


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
POSITION_DTYPES = (torch.int64, torch.int32)
LAYOUTS = ("interleaved", "half")
MAX_HEAD_DIM = 256


def _check(name: str, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, layout: RopeLayout, offset: int) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown: choose 'interleaved' or 'half'")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} is {x.dtype}: allowed are {', '.join(map(str, DTYPES))}")
    if x.dim() < 2 or x.shape[-1] % 2 or not 0 < x.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}: allowed is (..., T, K) with an even head dim K from 2 to {MAX_HEAD_DIM}"
        )
    for other_name, other in (("cos", cos), ("sin", sin), ("positions", positions)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{other_name} is on {other.device}: allowed is {x.device}, the device of {name}")
    num_tokens, head_dim = x.shape[-2:]
    for table_name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 2 or table.shape[1] != head_dim // 2 or table.shape[0] != cos.shape[0]:
            raise ValueError(
                f"{table_name} has shape {tuple(table.shape)}: allowed is (positions, {head_dim // 2}) for both tables"
            )
    if positions is None:
        if not 0 <= offset <= cos.shape[0] - num_tokens:
            raise ValueError(
                f"offset {offset} with {num_tokens} tokens: allowed is 0 to {cos.shape[0] - num_tokens}, "
                f"because cos and sin have {cos.shape[0]} positions"
            )
        return
    if offset != 0:
        raise ValueError(f"offset is {offset}: with positions it must be 0, they say where each token stands")
    if positions.dtype not in POSITION_DTYPES:
        raise ValueError(f"positions is {positions.dtype}: allowed are {', '.join(map(str, POSITION_DTYPES))}")
    allowed = [(num_tokens,)] + ([(x.shape[0], num_tokens)] if x.dim() == 4 else [])
    if tuple(positions.shape) not in allowed:
        raise ValueError(f"positions has shape {tuple(positions.shape)}: allowed is {' or '.join(map(str, allowed))}")


def _placed(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int) -> tuple[Tensor, Tensor, Tensor | None]:
    # cos, sin and positions as the ops take them, for tokens of x (B, ..., T, K).
    if positions is not None:
        return cos, sin, positions.expand(x.shape[0], x.shape[-2])
    return (cos[offset:], sin[offset:], None) if offset else (cos, sin, None)


def _turn(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, layout: RopeLayout, offset: int
) -> tuple[Tensor, Tensor]:
    tables = _placed(q, cos, sin, positions, offset)
    tokens_first = _is_tokens_first(q), k is not None and _is_tokens_first(k)
    return _rope(q, k, *tables, layout == "interleaved", False, *tokens_first)


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    layout: RopeLayout = "interleaved",
    offset: int = 0,
) -> Tensor:
    """Rotate pairs of channels by the angle of their position (Su et al. 2021, eq. 34).

    x (..., T, K), K even and at most 256; cos, sin (positions, K / 2) -> (..., T, K) in the dtype of `x`, computed in
    float32. Pairs are neighbours (2i, 2i + 1) as in RoFormer, or with layout="half" (i, i + K / 2) as in Llama checkpoints.

    Tokens stand at offset .. offset + T - 1, after `offset` cached ones; or at `positions`, (T) or (B, T) integers for x
    (B, H, T, K). On a GPU these are not compared with the length of the tables, which would need a synchronisation: a
    position outside gives NaN.

    cos and sin get no gradient. x may have any strides, as a slice of a packed projection has; only channels that are no
    neighbours are copied. Where x is (B, T, H, K) in memory, so are the result and the gradient. float64 runs the reference.
    """
    _check("x", x, cos, sin, positions, layout, offset)
    if not use_triton(x) or x.dtype == torch.float64:
        return reference.rope(x, cos, sin, positions, layout, offset)
    flat = x if x.dim() == 4 else x.reshape(1, -1, *x.shape[-2:])
    return _turn(flat, None, cos, sin, positions, layout, offset)[0].view(x.shape)


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
    _check("q", q, cos, sin, positions, layout, offset)
    _check("k", k, cos, sin, positions, layout, offset)
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ValueError(f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}: allowed are (B, H, T, K) and (B, Hkv, T, K)")
    if not use_triton(q) or torch.float64 in (q.dtype, k.dtype):
        return reference.rope_qk(q, k, cos, sin, positions, layout, offset)
    return _turn(q, k, cos, sin, positions, layout, offset)


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
    all_heads = num_heads + 2 * num_kv_heads
    if qkv.dim() != 3 or num_heads < 1 or num_kv_heads < 1 or qkv.shape[-1] % all_heads:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, with {num_heads} and twice {num_kv_heads} heads: allowed is (B, T, W) "
            f"with W a multiple of {all_heads}"
        )
    _check("qkv", _part(qkv, num_heads, num_kv_heads)[0], cos, sin, positions, layout, offset)
    if not use_triton(qkv) or qkv.dtype == torch.float64:
        return reference.rope_qkv(qkv, cos, sin, num_heads, num_kv_heads, positions, layout, offset)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    tables = _placed(qkv[:, :, None].transpose(1, 2), cos, sin, positions, offset)
    return _rope_qkv(qkv, *tables, layout == "interleaved", num_heads, num_kv_heads)


def _costs(itemsize: int, batch: int, num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Costs:
    # Both directions alike: read and write all heads of q and k together, read cos and sin once.
    elements = batch * num_tokens * (num_heads + num_kv_heads) * head_dim
    cost = Cost(2 * elements * itemsize + 4 * batch * num_tokens * head_dim, 3 * elements)
    return Costs.of(cost, cost)


def _qkv_costs(itemsize: int, batch: int, num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Costs:
    # The values are moved along, but not turned.
    cost, _, _ = _costs(itemsize, batch, num_tokens, num_heads, num_kv_heads, head_dim)
    assert cost is not None
    moved = Cost(2 * batch * num_tokens * num_kv_heads * head_dim * itemsize, 0)
    return Costs.of(cost + moved, cost + moved)


def _arguments(
    form: Literal["x", "q k", "qkv"],
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    layout: RopeLayout = "interleaved",
) -> Arguments:
    frequencies = 1e4 ** -torch.arange(0, 1, 2 / head_dim, device=device)
    angles = torch.outer(torch.arange(num_tokens, device=device).float(), frequencies)
    tables, options = (angles.cos(), angles.sin()), {"layout": layout}
    if form == "qkv":
        qkv = draw(device, dtype, batch, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
        return Arguments((qkv, *tables, num_heads, num_kv_heads), options)
    # As a projection leaves them: (B, T, H, K) in memory, (B, H, T, K) in shape.
    q, k = (draw(device, dtype, batch, num_tokens, h, head_dim, heads_first=True) for h in (num_heads, num_kv_heads))
    return Arguments((q, *tables) if form == "x" else (q, k, *tables), options)


_ALONE = {"batch": 16, "num_tokens": 4096, "num_heads": 32, "num_kv_heads": 0, "head_dim": 128}
_LLAMA = _ALONE | {"num_kv_heads": 8}
_SMALL = {"batch": 2, "num_tokens": 5, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
_HUGE = {"batch": 1, "num_tokens": 2**19 + 1, "num_heads": 24, "num_kv_heads": 8, "head_dim": 128}
# GPT-2 small and XL, Llama 3 8B, Gemma's head dim and one that is no power of two, and one decoded token.
_COMPILED = tuple(
    {"batch": 8, "num_tokens": tokens, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim} | other
    for heads, kv_heads, tokens, head_dim in (
        (12, 12, 1024, 64), (25, 25, 1024, 64), (32, 8, 8192, 128), (8, 4, 8192, 256), (32, 8, 8192, 96), (32, 8, 1, 128),
    )
    for other in grid(layout=("interleaved", "half"), dtype=(torch.bfloat16, torch.float32))
)  # fmt: skip

record(
    Op(
        function=rope,
        reference=reference.rope,
        kernels=(rope_forward,),
        arguments=partial(_arguments, "x"),
        cost=_costs,
        shapes=(_ALONE,),
        examples=(_SMALL | {"num_kv_heads": 0},),
        compiled=({**_ALONE, "dtype": torch.bfloat16},),
        over="num_heads",
        huge=_HUGE | {"num_heads": 32, "num_kv_heads": 0},
    )
)
record(
    Op(
        function=rope_qk,
        reference=reference.rope_qk,
        kernels=(rope_forward,),
        arguments=partial(_arguments, "q k"),
        cost=_costs,
        shapes=(_LLAMA, _LLAMA | {"num_heads": 12, "num_kv_heads": 12, "head_dim": 64}),
        examples=(_SMALL,),
        compiled=_COMPILED,
        over="num_heads",
        huge=_HUGE,
    )
)
record(
    Op(
        function=rope_qkv,
        reference=reference.rope_qkv,
        kernels=(rope_forward,),
        arguments=partial(_arguments, "qkv"),
        cost=_qkv_costs,
        shapes=(_LLAMA, _LLAMA | {"num_heads": 12, "num_kv_heads": 12, "head_dim": 64}),
        examples=(_SMALL,),
        compiled=_COMPILED,
        over="num_heads",
        huge=_HUGE,
    )
)
