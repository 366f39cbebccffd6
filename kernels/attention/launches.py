"""Launch the forward and backward kernels, in portable Triton or in Gluon."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..launch import launch
from .backward import attention_backward_kv, attention_backward_q
from .configurations import Kernel, LaunchConfig, fused_config, launch_config, rows_at_once
from .forward import attention_forward
from .fused import launch_fused
from .hopper_backward_kv import attention_backward_kv_hopper
from .hopper_backward_q import attention_backward_q_hopper
from .hopper_forward import attention_forward_hopper
from .operands import aligned, as_gluon_tiles, as_tiles, load_strides
from .options import Options
from .parts import parts_for, sum_parts

# The portable kernel, the Gluon kernel, and the axis of the tile that a program owns: queries (m) or keys (n).
KERNELS: Mapping[Kernel, tuple[Any, Any, str]] = {
    "forward": (attention_forward, attention_forward_hopper, "m"),
    "backward_q": (attention_backward_q, attention_backward_q_hopper, "m"),
    "backward_kv": (attention_backward_kv, attention_backward_kv_hopper, "n"),
}


def _launch(
    kernel: Kernel,
    num_programs: int,
    config: LaunchConfig,
    tensors: Sequence[Tensor],
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
) -> None:
    """Launch the portable or the Gluon kernel for `config`.

    Its first arguments are tiles of `tensors`: q, k, v and, optionally, one shaped like q.
    """
    portable, in_gluon, kept = KERNELS[kernel]
    axes = "mnnm"[: len(tensors)]
    q, v = tensors[0], tensors[2]
    if config.gluon:
        looped = config.block_n if kept == "m" else config.block_m
        tiles = as_gluon_tiles(tensors, [64 if axis == kept else looped for axis in axes])
        launch(in_gluon, num_programs, *tiles, *arguments, **constants, **config.gluon_blocks(q, v, kept))
    else:
        tiles = as_tiles(tensors, axes, config)
        launch(portable, num_programs, *tiles, *arguments, **constants, TMA=config.tma, **config.blocks(q, v))


def launch_forward(q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, sinks: Tensor | None, options: Options) -> None:
    """Fill o (B, H, T, V), whose head dim is contiguous, and lse (B, H, T), float32 and contiguous."""
    batch, num_heads, num_queries, _ = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    q, k, v = (aligned(t) for t in (q, k, v))
    config = launch_config("forward", (q, k, v), options, o)
    num_rows = batch * num_heads
    inputs = (q, k, v)
    rows = (num_rows, num_heads, num_heads // num_kv_heads, num_queries, num_keys, *options.window_of(num_queries, num_keys))
    strides = (*load_strides(q), *load_strides(k), *load_strides(v), *o.stride()[:3], options.document_stride)
    arguments = (
        *inputs, o, lse, q if sinks is None else sinks, *options.mask_tensors(q), *strides, *rows,
        rows_at_once(k, num_kv_heads / num_heads, num_rows),
    )  # fmt: skip
    constants = {**options.constants(), "SINKS": sinks is not None}
    num_programs = num_rows * -(-num_queries // config.block_m)
    _launch("forward", num_programs, config, (*inputs, o) if config.gluon else inputs, arguments, constants)


def launch_backward(
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
    """Fill dq, dk and dv, shaped like q, k and v, and delta (B, H, T) float32 = rowsum(o do) - dlse.

    lse, dlse and delta are contiguous. The other tensors have a contiguous head dim.
    """
    batch, num_heads, num_queries, _ = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    group_size = num_heads // num_kv_heads
    q, k, v, do, o = map(aligned, (q, k, v, do, o))
    inputs = (q, k, v, do)
    config = fused_config(inputs, options)
    if config is not None:
        launch_fused(config, do, dlse, q, k, v, o, lse, dq, dk, dv, delta, options)
        return
    sizes = (num_queries, num_keys, *options.window_of(num_queries, num_keys))
    strides = [stride for t in inputs for stride in load_strides(t)]
    config = launch_config("backward_q", inputs, options)
    num_rows = batch * num_heads
    arguments = (
        *inputs, o, lse, lse if dlse is None else dlse, delta, dq, *options.mask_tensors(q),
        *strides, *load_strides(o), *dq.stride()[:3], options.document_stride,
        num_rows, num_heads, group_size, *sizes, rows_at_once(k, 1 / group_size, num_rows),
    )  # fmt: skip
    constants = {**options.constants(), "DLSE": dlse is not None}
    _launch("backward_q", num_rows * -(-num_queries // config.block_m), config, inputs, arguments, constants)

    options = options.of_keys()
    config = launch_config("backward_kv", inputs, options)
    num_tiles = -(-num_keys // config.block_n)
    num_parts, parts, part_strides = parts_for(dk, dv, group_size, batch * num_kv_heads * num_tiles)
    num_rows, part_size = batch * num_kv_heads * num_parts, group_size // num_parts
    arguments = (
        *inputs, lse, delta, *parts, *options.mask_tensors(q),
        *strides, *parts[0].stride()[-4:-1], *parts[1].stride()[-4:-1], options.document_stride,
        num_rows, num_kv_heads, num_parts, *part_strides, part_size, *sizes, rows_at_once(q, part_size, num_rows),
    )  # fmt: skip
    constants = {**options.constants(), "GROUPED": part_size > 1}
    _launch("backward_kv", num_rows * num_tiles, config, inputs, arguments, constants)
    sum_parts((dk, dv), parts)
