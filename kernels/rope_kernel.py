"""The kernel of `rope`, `rope_qk` and `rope_qkv`, and its launch; the backward pass runs it with inverse angles.

A program handles one block of tokens and one block of heads. It loads the angles of a token once for all heads of the block.
"""

from collections.abc import Sequence

from torch import Tensor

from .dispatch import jit, tl
from .launch import launch

# Arguments whose divisibility does not affect the width of loads. Specialized, a new length or offset could recompile.
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
        # Load full rows and split them in registers, because strided loads of every other channel are not vectorized.
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
    """Rotate one block of heads for one block of tokens."""
    # Head blocks of the same tokens have adjacent programs, so that all but the first hit the L2 cache for their angles.
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
        # Mask a position past the tables. Reporting it would need a synchronization, so it gives NaN.
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
# The angles of a token have the size of one head in float32, of two in half precision: little over 16 heads.
MAX_BLOCK_HEADS = 16


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def rope_launch_config(num_heads: int, num_tokens: int, head_dim: int, rotary_dim: int, element_size: int) -> dict[str, int]:
    """Return the block sizes and warps; `num_heads` is the greater number of heads of q and k."""
    channels = _power_of_two(head_dim)
    heads = min(_power_of_two(num_heads), MAX_BLOCK_HEADS, PROGRAM_BYTES // element_size // channels)
    tokens = min(PROGRAM_BYTES // element_size // (channels * heads), _power_of_two(num_tokens))
    rest = 0 if rotary_dim == head_dim else _power_of_two(head_dim - rotary_dim)
    blocks = {"BLOCK_TOKENS": tokens, "BLOCK_HEADS": heads, "BLOCK_CHANNELS": channels}
    num_warps = max(tokens * heads * channels * element_size // (32 * THREAD_BYTES), 1)
    return blocks | {"BLOCK_ROTARY": _power_of_two(rotary_dim), "BLOCK_REST": rest, "num_warps": num_warps}


def rotate_heads(
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Rotate `xs` into `ys`, all (B, H, T, K): q; q and k; or q, k and v, where v is copied.

    Channels of `ys` must be contiguous.
    """
    if all(x.numel() == 0 for x in xs):
        return
    xs = [x if x.stride(-1) == 1 else x.contiguous() for x in xs]
    q, k, v = xs[0], xs[min(1, len(xs) - 1)], xs[-1]
    q_out, k_out, v_out = ys[0], ys[min(1, len(ys) - 1)], ys[-1]
    batch, _, num_tokens, head_dim = q.shape
    if cos.stride() != sin.stride() or cos.stride(1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    rotary_dim, element_size = 2 * cos.shape[1], max(x.element_size() for x in xs)
    config = rope_launch_config(max(q.shape[1], k.shape[1]), num_tokens, head_dim, rotary_dim, element_size)
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
