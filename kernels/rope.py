"""Rotary position embedding of queries and keys in one launch; the backward pass runs the same kernel with inverse angles.

`rope_qkv` also splits a packed projection. It copies the values too: the gradients of q, k and v can then share one packed
tensor without a concatenation, and no view keeps the projection alive.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from . import reference
from .checks import FLOATING, INTEGER, check_choice, check_device, check_dtype, check_int, is_readable
from .dispatch import use_triton
from .op import Arguments, Cost, Costs, Op, draw, grid, record
from .reference import RopeLayout
from .registration import count_no_flops, custom_op
from .rope_kernel import rope_forward, rotate_heads
from .rope_tables import rope_tables
from .sharding import sharded_as

# The dimension of each kind of tensor that is sharded when an op is sharded along the batch, heads or tokens.
SHARDED = {
    "heads": {"batch": 0, "heads": 1, "tokens": 2},
    "packed": {"batch": 0, "tokens": 1},
    "positions": {"batch": 0, "tokens": 1},
    "table": {},
}


def _sharding(outputs: Sequence[str], inputs: Sequence[str]) -> Callable[..., Any]:
    # The rule for `sharded_as` of an op with arguments `inputs`, cos, sin, positions and options. Tokens may be sharded if
    # positions are given, heads if they are not packed.
    def choices(*args: Any) -> Any:
        from torch.distributed.tensor import Replicate, Shard

        positions = args[len(inputs) + 2]
        ways = ["none", "batch"] + ["heads"] * ("packed" not in (*outputs, *inputs)) + ["tokens"] * (positions is not None)

        def placed(kinds: Sequence[str], way: str) -> list[Any]:
            return [Shard(SHARDED[kind][way]) if way in SHARDED[kind] else Replicate() for kind in kinds]

        given = [*inputs, "table", "table", *(["positions"] if positions is not None else [])]
        nothing = [None] * (len(args) - len(given))
        return [(placed(outputs, way), placed(given, way) + nothing) for way in ways]

    return choices


def _is_tokens_first(x: Tensor) -> bool:
    # Whether x (B, H, T, K) is (B, T, H, K) in memory, as from a projection.
    return x.stride(1) < x.stride(2)


def _new_like(x: Tensor, tokens_first: bool) -> Tensor:
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty(batch, tokens, heads, head_dim).transpose(1, 2) if tokens_first else x.new_empty(x.shape)


@custom_op("rope")
def _rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    tokens_first: bool,
) -> Tensor:
    """Rotate x (B, H, T, K); with `tokens_first` the result is (B, T, H, K) in memory."""
    y = _new_like(x, tokens_first)
    rotate_heads([x], [y], cos, sin, positions, offset, interleaved, inverse)
    return y


@_rope.register_fake
@sharded_as(_rope, _sharding(outputs=["heads"], inputs=["heads"]))
def _empty_rope(x, cos, sin, positions, offset, interleaved, inverse, tokens_first):
    return _new_like(x, tokens_first)


def _save_rope(ctx, inputs, output) -> None:
    _, cos, sin, positions, *ctx.options = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward_rope(ctx, dy: Tensor):
    # The gradient of a rotation is the inverse rotation, computed by the same op; second derivatives work too.
    offset, interleaved, inverse, tokens_first = ctx.options
    dx = _rope(dy, *ctx.saved_tensors, offset, interleaved, not inverse, tokens_first)
    return dx, *(None,) * 7


# No autocast rule: x keeps its dtype, as in PyTorch's multiplications.
_rope.register_autograd(_backward_rope, setup_context=_save_rope)


@custom_op("rope_qk")
def _rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
    q_tokens_first: bool,
    k_tokens_first: bool,
) -> tuple[Tensor, Tensor]:
    """Rotate q (B, H, T, K) and k (B, Hkv, T, K) like `_rope`."""
    q_out, k_out = _new_like(q, q_tokens_first), _new_like(k, k_tokens_first)
    rotate_heads([q, k], [q_out, k_out], cos, sin, positions, offset, interleaved, inverse)
    return q_out, k_out


@_rope_qk.register_fake
@sharded_as(_rope_qk, _sharding(outputs=["heads"] * 2, inputs=["heads"] * 2))
def _empty_rope_qk(q, k, cos, sin, positions, offset, interleaved, inverse, q_tokens_first, k_tokens_first):
    return _new_like(q, q_tokens_first), _new_like(k, k_tokens_first)


def _save_rope_qk(ctx, inputs, output) -> None:
    _, _, cos, sin, positions, *ctx.options = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward_rope_qk(ctx, dq: Tensor, dk: Tensor):
    offset, interleaved, inverse, *tokens_first = ctx.options
    dq, dk = _rope_qk(dq, dk, *ctx.saved_tensors, offset, interleaved, not inverse, *tokens_first)
    return dq, dk, *(None,) * 8


_rope_qk.register_autograd(_backward_rope_qk, setup_context=_save_rope_qk)


def _split_qkv(qkv: Tensor, num_heads: int, num_kv_heads: int) -> list[Tensor]:
    # q, k, v as (B, H or Hkv, T, K) views of a packed (B, T, (H + 2 Hkv) K).
    batch, tokens, width = qkv.shape
    all_heads = num_heads + 2 * num_kv_heads
    heads = qkv.view(batch, tokens, all_heads, width // all_heads).transpose(1, 2)
    return list(heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1))


@custom_op("rope_qkv")
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
    """Split a packed projection and rotate q and k; each result is (B, T, H, K) in memory."""
    xs = _split_qkv(qkv, num_heads, num_kv_heads)
    ys = _empty_parts(qkv, cos, sin, positions, offset, interleaved, num_heads, num_kv_heads)
    rotate_heads(xs, ys, cos, sin, positions, offset, interleaved, inverse=False)
    return ys


@_rope_qkv.register_fake
@sharded_as(_rope_qkv, _sharding(outputs=["heads"] * 3, inputs=["packed"]))
def _empty_parts(qkv, cos, sin, positions, offset, interleaved, num_heads, num_kv_heads):
    batch, tokens, width = qkv.shape
    head_dim = width // (num_heads + 2 * num_kv_heads)
    q, k, v = (qkv.new_empty(batch, tokens, heads, head_dim).transpose(1, 2) for heads in (num_heads, *[num_kv_heads] * 2))
    return q, k, v


@custom_op("rope_qkv_backward")
def _rope_qkv_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, offset: int, interleaved: bool
) -> Tensor:
    dqkv = _empty_packed(dq, dk, dv, cos, sin, positions, offset, interleaved)
    parts = _split_qkv(dqkv, dq.shape[1], dk.shape[1])
    rotate_heads([dq, dk, dv], parts, cos, sin, positions, offset, interleaved, inverse=True)
    return dqkv


@_rope_qkv_backward.register_fake
@sharded_as(_rope_qkv_backward, _sharding(outputs=["packed"], inputs=["heads"] * 3))
def _empty_packed(dq, dk, dv, cos, sin, positions, offset, interleaved):
    batch, heads, tokens, head_dim = dq.shape
    return dq.new_empty(batch, tokens, (heads + 2 * dk.shape[1]) * head_dim)


def _save_qkv(ctx, inputs, output) -> None:
    _, cos, sin, positions, ctx.offset, ctx.interleaved, *_ = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward_qkv(ctx, dq: Tensor, dk: Tensor, dv: Tensor):
    dqkv = _rope_qkv_backward(dq, dk, dv, *ctx.saved_tensors, ctx.offset, ctx.interleaved)
    return dqkv, *(None,) * 7


_rope_qkv.register_autograd(_backward_qkv, setup_context=_save_qkv)
count_no_flops(_rope, _rope_qk, _rope_qkv, _rope_qkv_backward)


LAYOUTS = ("interleaved", "half")
MAX_HEAD_DIM = 256


def _check(
    xs: dict[str, Tensor],
    shape: Sequence[int],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    layout: RopeLayout,
    offset: int,
) -> None:
    # `shape` is the shape of the heads of the first tensor in `xs`, (..., T, K).
    check_choice("layout", layout, LAYOUTS)
    check_dtype(FLOATING, **xs, cos=cos, sin=sin)
    check_device(**xs, cos=cos, sin=sin, positions=positions)
    if len(shape) < 2 or shape[-1] % 2 or not 0 < shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{next(iter(xs))} has heads of shape {tuple(shape)}: expected (..., T, K), K even and from 2 to {MAX_HEAD_DIM}"
        )
    num_tokens, head_dim, table = shape[-2], shape[-1], cos.shape
    if len(table) != 2 or table != sin.shape or not 0 < table[1] <= head_dim // 2:
        raise ValueError(
            f"cos has shape {tuple(table)}, sin {tuple(sin.shape)}: expected (positions, {head_dim // 2}) for both, "
            f"or fewer columns to rotate fewer than {head_dim} channels"
        )
    num_positions = table[0]
    if num_positions == 0 and num_tokens > 0:
        raise ValueError(f"cos has shape {tuple(table)}: expected one position or more")
    check_int("offset", offset, 0)
    if positions is None:
        if offset + num_tokens > num_positions:
            raise ValueError(
                f"offset is {offset} with {num_tokens} tokens: expected 0 to {num_positions - num_tokens}, "
                f"because cos and sin have {num_positions} positions"
            )
        return
    if offset != 0:
        raise ValueError(f"offset is {offset}: expected 0 with positions, which already place each token")
    check_dtype(INTEGER, positions=positions)
    allowed = [(num_tokens,), (1, num_tokens)] + ([(shape[0], num_tokens)] if len(shape) > 2 else [])
    if tuple(positions.shape) not in allowed:
        allowed = " or ".join(map(str, dict.fromkeys(allowed)))
        raise ValueError(f"positions has shape {tuple(positions.shape)}: expected {allowed}")
    if positions.numel() and is_readable(positions):
        last = int(positions.max())
        if last >= num_positions:
            raise ValueError(
                f"positions contains {last}: expected less than {num_positions}, the positions of cos and sin, "
                "or less than 0 for padding"
            )


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    layout: RopeLayout = "interleaved",
    offset: int = 0,
) -> Tensor:
    """Rotate pairs of channels by the angle of their position (Su et al. 2021, eq. 34).

    x (..., T, K) -> (..., T, K) in the dtype of `x`, computed in float32; K is even and at most 256. cos and sin
    (positions, R / 2) come from `rope_tables`; R is K unless `rotary_dim` is less. The pairs are neighbors (2i, 2i + 1) as in
    RoFormer, or, with layout="half", (i, i + K / 2) as in Llama checkpoints.

    Partial rotary: if R is less than K, the first R channels are rotated as if they were the full head, and the others are
    copied (GPT-NeoX, Black et al. 2022, section 3.1; Phi, GLM).

    Tokens have positions offset .. offset + T - 1, after `offset` cached ones; or `positions`, int64 or int32 of shape (T),
    (1, T) or, for x (B, ..., T, K), (B, T). A position below 0 marks padding and counts as 0, so that its row and gradient are
    finite. A position past the tables raises ValueError on a CPU. On a GPU, where a check would synchronize, and in compiled
    code it gives NaN in its row.

    cos and sin get no gradient. x may have any strides, such as a slice of a packed projection; it is copied only if its
    channels are not contiguous. If x is (B, T, H, K) in memory, so are the result and the gradient. float64 runs the
    reference. DTensors may be sharded along the batch, the heads, or, with positions, the tokens; cos and sin are replicated.
    """
    _check({"x": x}, x.shape, cos, sin, positions, layout, offset)
    if not use_triton(x):
        return reference.rope(x, cos, sin, positions, layout, offset)
    # Use one batch, so that all rows share the angles of a token, unless sequences have their own positions.
    batch = 1 if positions is None or positions.dim() == 1 else positions.shape[0]
    rows = x if x.dim() == 4 else x.reshape(batch, math.prod(x.shape[:-2]) // max(batch, 1), *x.shape[-2:])
    positions = None if positions is None else positions.expand(rows.shape[0], rows.shape[2])
    options = (positions, offset, layout == "interleaved", False, _is_tokens_first(rows))
    y = _rope(rows, cos, sin, *options)
    return y if x.dim() == 4 else y.view(x.shape)


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    layout: RopeLayout = "interleaved",
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Apply `rope` to queries (B, H, T, K) and keys (B, Hkv, T, K) in one launch, which loads the angles once."""
    _check({"q": q, "k": k}, q.shape, cos, sin, positions, layout, offset)
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q has shape {tuple(q.shape)}, k {tuple(k.shape)}: expected (B, H, T, K) and (B, Hkv, T, K)")
    if not use_triton(q, k):
        return reference.rope_qk(q, k, cos, sin, positions, layout, offset)
    positions = None if positions is None else positions.expand(q.shape[0], q.shape[2])
    options = (positions, offset, layout == "interleaved", False, _is_tokens_first(q), _is_tokens_first(k))
    return _rope_qk(q, k, cos, sin, *options)


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
    """Split a packed projection (B, T, (H + 2 Hkv) K) into q (B, H, T, K), k and v (B, Hkv, T, K); apply `rope` to q and k.

    The results are new tensors, (B, T, H, K) in memory. The backward pass writes their gradients to one packed tensor. K is at
    most 256. Other arguments are the same as for `rope`.
    """
    check_int("num_heads", num_heads, 1)
    check_int("num_kv_heads", num_kv_heads, 1)
    shape, all_heads = qkv.shape, num_heads + 2 * num_kv_heads
    if len(shape) != 3 or shape[2] % all_heads:
        raise ValueError(
            f"qkv has shape {tuple(shape)}, num_heads is {num_heads}, num_kv_heads {num_kv_heads}: expected (B, T, W) "
            f"with W a multiple of {all_heads}"
        )
    heads = (shape[0], num_heads, shape[1], shape[2] // all_heads)
    _check({"qkv": qkv}, heads, cos, sin, positions, layout, offset)
    if not use_triton(qkv):
        return reference.rope_qkv(qkv, cos, sin, num_heads, num_kv_heads, positions, layout, offset)
    positions = None if positions is None else positions.expand(qkv.shape[:2])
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    return _rope_qkv(qkv, cos, sin, positions, offset, layout == "interleaved", num_heads, num_kv_heads)


def _costs(itemsize: int, batch: int, num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Costs:
    # Both directions cost the same: read and write all heads of q and k, read cos and sin once.
    elements = batch * num_tokens * (num_heads + num_kv_heads) * head_dim
    cost = Cost(2 * elements * itemsize + 4 * batch * num_tokens * head_dim, 3 * elements)
    return Costs.of(cost, cost)


def _qkv_costs(itemsize: int, batch: int, num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Costs:
    # The values are copied, but not rotated.
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
    rotary_dim: int | None = None,
    placed: bool = False,
) -> Arguments:
    # With `placed`, positions are given for each sequence.
    tables = rope_tables(head_dim, num_tokens, rotary_dim=rotary_dim, device=device)
    options: dict[str, Any] = {"layout": layout}
    if placed:
        options["positions"] = torch.arange(num_tokens, device=device).flip(0).repeat(batch, 1)
    if form == "qkv":
        qkv = draw(device, dtype, batch, num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
        return Arguments((qkv, *tables, num_heads, num_kv_heads), options)
    # As from a projection: (B, T, H, K) in memory, (B, H, T, K) in shape.
    q, k = (draw(device, dtype, batch, num_tokens, h, head_dim, heads_first=True) for h in (num_heads, num_kv_heads))
    return Arguments((q, *tables) if form == "x" else (q, k, *tables), options)


_ALONE = {"batch": 16, "num_tokens": 4096, "num_heads": 32, "num_kv_heads": 0, "head_dim": 128}
_LLAMA = _ALONE | {"num_kv_heads": 8}
_SMALL = {"batch": 2, "num_tokens": 5, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
_OPTIONS = {"layout": "half", "rotary_dim": 12, "placed": True}
_HUGE = {"batch": 1, "num_tokens": 2**19 + 1, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
# GPT-2 small and XL, Llama 3 8B, Gemma's head dim, a head dim that is not a power of two, and one decoded token.
_COMPILED = tuple(
    {"batch": 8, "num_tokens": tokens, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim} | other
    for heads, kv_heads, tokens, head_dim in (
        (12, 12, 1024, 64), (25, 25, 1024, 64), (32, 8, 8192, 128), (8, 4, 8192, 256), (32, 8, 8192, 96), (32, 8, 1, 128),
    )
    for other in grid(layout=("interleaved", "half"), dtype=(torch.bfloat16, torch.float32), placed=(tokens == 1,))
)  # fmt: skip

_QK = Op(
    function=rope_qk,
    reference=reference.rope_qk,
    kernels=(rope_forward,),
    arguments=partial(_arguments, "q k"),
    cost=_costs,
    shapes=(_LLAMA, _LLAMA | {"num_heads": 12, "num_kv_heads": 12, "head_dim": 64}),
    examples=(_SMALL, _SMALL | _OPTIONS),
    compiled=tuple(sizes for sizes in _COMPILED if sizes["dtype"] == torch.bfloat16),
    over="num_heads",
    huge=_HUGE,
)
record(
    replace(
        _QK,
        function=rope,
        reference=reference.rope,
        arguments=partial(_arguments, "x"),
        shapes=(_ALONE,),
        examples=tuple({**sizes, "num_kv_heads": 0} for sizes in _QK.examples),
        compiled=({**_ALONE, "dtype": torch.bfloat16},),
        huge=_HUGE | {"num_kv_heads": 0},
    )
)
record(_QK)
record(
    replace(
        _QK,
        function=rope_qkv,
        reference=reference.rope_qkv,
        arguments=partial(_arguments, "qkv"),
        cost=_qkv_costs,
        compiled=_COMPILED,
    )
)
