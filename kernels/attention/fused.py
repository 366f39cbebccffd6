"""Launch the fused backward pass of plain causal attention on Hopper, with the kernels that run before and after it."""

import torch
from torch import Tensor

from ..launch import launch
from .configurations import LaunchConfig, rows_at_once
from .hopper_backward import attention_backward_hopper
from .hopper_backward_ends import attention_backward_again, attention_backward_delta, attention_backward_dq
from .operands import as_gluon_tiles, block_k_of, load_strides
from .options import Options
from .parts import parts_for, sum_parts

FUSED_KERNELS = (attention_backward_delta, attention_backward_hopper, attention_backward_again, attention_backward_dq)


def launch_fused(
    config: LaunchConfig,
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    delta: Tensor,
    options: Options,
) -> None:
    """Fill dq, dk, dv and delta as `launch_backward` does. Allocates a workspace of 4 B H T K bytes for the sums of dQ."""
    batch, num_heads, num_tokens, head_dim = q.shape
    num_kv_heads, value_dim = k.shape[1], v.shape[3]
    group_size = num_heads // num_kv_heads
    block_k, q_tiles, k_tiles = block_k_of(head_dim), -(-num_tokens // config.block_m), -(-num_tokens // config.block_n)
    num_rows = batch * num_heads
    strides = [stride for t in (q, k, v, do) for stride in load_strides(t)]
    products = {"scale": options.scale, "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_K": block_k, "num_warps": 4}
    launch(
        attention_backward_delta, num_rows * q_tiles, o, do, lse, lse if dlse is None else dlse, delta,
        *load_strides(o), *load_strides(do), num_heads, num_tokens,
        DLSE=dlse is not None, VALUE_DIM=value_dim, BLOCK_M=config.block_m, BLOCK_V=block_k, num_warps=4,
    )  # fmt: skip
    sums = q.new_empty(num_rows * q_tiles * config.block_m * block_k, dtype=torch.float32)
    counters = q.new_zeros(num_rows * k_tiles, dtype=torch.int32)
    num_parts, parts, part_strides = parts_for(dk, dv, group_size, batch * num_kv_heads * k_tiles)
    kv_rows, part_size = batch * num_kv_heads * num_parts, group_size // num_parts
    # Programs of a row share q and do, and the sums, which take as many bytes: hence the factor 2.
    launch(
        attention_backward_hopper, kv_rows * k_tiles, *as_gluon_tiles((q, k, v, do), [config.block_m, 64, 64, config.block_m]),
        lse, delta, *parts, sums, counters, *parts[0].stride()[-4:-1], *parts[1].stride()[-4:-1],
        kv_rows, num_kv_heads, num_parts, *part_strides, part_size, num_tokens, rows_at_once(q, 2 * part_size, kv_rows),
        scale=options.scale, **config.gluon_blocks(q, v, "n"),
    )  # fmt: skip
    sum_parts((dk, dv), parts)
    launch(
        attention_backward_again, batch * num_kv_heads * k_tiles, q, k, v, do, lse, delta, dk, dv,
        *strides, *dk.stride()[:3], *dv.stride()[:3], num_kv_heads, group_size, num_tokens, BLOCK_N=config.block_n, **products,
    )  # fmt: skip
    launch(
        attention_backward_dq, num_rows * q_tiles, sums, q, k, v, do, lse, delta, dq,
        *strides, *dq.stride()[:3], num_heads, group_size, num_tokens, BLOCK_M=config.block_m, **products,
    )  # fmt: skip
