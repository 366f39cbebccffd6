"""Seconds, days and money: the roofline of every operation, the speed of light of a model, the time of a whole run."""

from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import UserError
from ...kernels.datasheet import GPU
from ..config import ModelConfig
from .flops import model_flops, num_parameters, num_weights
from .operation import Operation
from .operations import operations
from .policy import ITEMSIZE, Compute, Policy, moment_bytes

PEAK_OF: dict[Compute, str] = {
    "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "fp8": "fp8", "fp8_rowwise": "fp8",
    "fp8_delayed": "fp8",
}  # fmt: skip
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class OperationTime:
    """The operations of one name together: what they cost in a step, and the least time that a GPU needs for them."""

    name: str
    group: str
    count: int
    flops: int
    """Forward, backward, recomputed and spent on padding."""
    bytes: int
    seconds: float
    compute_bound: bool
    """Whether the larger part of the time is that of FLOPs, not of bytes."""

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved (Williams et al. 2009)."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Roofline:
    """The least time of a training step on a GPU, operation by operation: no step of this model can be faster."""

    operations: tuple[OperationTime, ...]
    model_flops: int
    """Of the step, attention in full: MFU's numerator."""
    peak_flops: float
    """FLOP/s."""

    @property
    def seconds(self) -> float:
        """The least time of a step."""
        return sum(op.seconds for op in self.operations)

    @property
    def intensity(self) -> float:
        """FLOPs per byte of the whole step."""
        return sum(op.flops for op in self.operations) / sum(op.bytes for op in self.operations)

    @property
    def best_mfu(self) -> float:
        """The MFU of a step that takes the least time. Above 1 where skipped causal scores outweigh all else."""
        return self.model_flops / (self.seconds * self.peak_flops)

    def shortfall(self) -> dict[str, float]:
        """Return the share of the step that each name takes beyond its FLOPs at the peak: what holds the MFU down."""
        lost = {op.name: max(0.0, op.seconds - op.flops / self.peak_flops) / self.seconds for op in self.operations}
        return dict(sorted(lost.items(), key=lambda item: -item[1]))


def adamw_flops(config: ModelConfig) -> int:
    """Return the FLOPs of AdamW's step: 14 a parameter, each operation of Loshchilov & Hutter 2019, algorithm 2, as one."""
    return 14 * num_parameters(config)


def adamw_bytes(config: ModelConfig, policy: Policy | None = None) -> int:
    """Return the least bytes of AdamW's step: weight, gradient and moments in; weight and moments out. 28 each in float32."""
    policy = policy or Policy()
    weight, count = ITEMSIZE[policy.weights], num_weights(config, policy)
    # A master copy is read and written in place of the weight's reading.
    weights = weight + (8 if policy.master_weights else weight)
    return count * (weights + weight) + 4 * moment_bytes(policy, count)


def _time(name: str, ops: list[Operation], peak: float, bandwidth: float) -> OperationTime:
    seconds = bound = 0.0
    flops = moved = 0
    for op in ops:
        passes = [(op.forward_flops + op.padding_flops, op.forward_bytes)] * (2 if op.runs_again else 1)
        passes.append((op.backward_flops + op.recomputed_flops + 2 * op.padding_flops, op.backward_bytes))
        for work, traffic in passes:
            seconds += max(work / peak, traffic / bandwidth)
            bound += max(0.0, work / peak - traffic / bandwidth) - max(0.0, traffic / bandwidth - work / peak)
            flops, moved = flops + work, moved + traffic
    return OperationTime(name, ops[0].group, len(ops), flops, moved, seconds, bound > 0)


def by_name(ops: Iterable[Operation]) -> dict[str, list[Operation]]:
    """Return the operations grouped by name, in the order of the step."""
    groups: dict[str, list[Operation]] = {}
    for op in ops:
        groups.setdefault(op.name, []).append(op)
    return groups


def roofline(
    config: ModelConfig, gpu: GPU, batch_size: int = 1, context_length: int | None = None, policy: Policy | None = None
) -> Roofline | None:
    """Return the least time of a training step on `gpu`, optimizer and recomputation included; None without a peak.

    Each pass of each operation takes the longer of its FLOPs at the dense peak and its least bytes at the bandwidth of the
    datasheet; where the blocks' products are in 8 bits, all others at that of bfloat16. Flash attention skips what causality
    masks, written-out attention does not.
    """
    policy = policy or Policy()
    peak = gpu.peak_flops(PEAK_OF[policy.compute])
    if peak is None:
        return None
    bandwidth = gpu.bandwidth * 1e12
    full = operations(config, batch_size, context_length, policy)
    ops = operations(config, batch_size, context_length, policy, exact_causal=policy.attention == "flash")
    # What is not in 8 bits has a lower peak than the one that the MFU is a share of.
    others = gpu.peak_flops(PEAK_OF[policy.dtype]) or peak
    times = [_time(name, group, peak if group[0].eight_bits else others, bandwidth) for name, group in by_name(ops).items()]
    # The update runs outside the tensor cores, in float32.
    fp32 = gpu.peak_flops("fp32") or peak
    flops, moved = adamw_flops(config), adamw_bytes(config, policy)
    compute, memory = flops / fp32, moved / bandwidth
    times.append(OperationTime("adamw", "optimizer", 1, flops, moved, max(compute, memory), compute > memory))
    return Roofline(tuple(times), model_flops(full), peak)


@dataclass(frozen=True)
class Plan:
    """What a whole training run takes."""

    tokens: int
    flops: float
    """Model FLOPs, attention in full."""
    seconds: float
    tokens_per_second: float
    cost: float | None
    """In the currency of the price; None without one."""

    @property
    def days(self) -> float:
        """Days of 86,400 s."""
        return self.seconds / SECONDS_PER_DAY


def training_plan(
    config: ModelConfig,
    tokens: int,
    peak_flops: float,
    mfu: float,
    num_gpus: int = 1,
    context_length: int | None = None,
    price_per_gpu_hour: float | None = None,
    window: int | None = None,
) -> Plan:
    """Return the time and cost of training on `tokens` at an MFU, planned or measured, of num_gpus x peak_flops (FLOP/s)."""
    if not 0 < mfu <= 1:
        raise UserError(f"mfu is {mfu}: it must be above 0 and at most 1")
    if tokens < 1 or num_gpus < 1:
        raise UserError(f"tokens is {tokens} and num_gpus {num_gpus}: both must be at least 1")
    if price_per_gpu_hour is not None and not price_per_gpu_hour >= 0:
        raise UserError(f"price_per_gpu_hour is {price_per_gpu_hour}: it must be 0 or more")
    context = config.context_length if context_length is None else context_length
    flops = model_flops(operations(config, 1, context, Policy(window=window))) * tokens / context
    seconds = flops / (mfu * peak_flops * num_gpus)
    cost = None if price_per_gpu_hour is None else price_per_gpu_hour * num_gpus * seconds / 3600
    return Plan(tokens, flops, seconds, tokens / seconds, cost)
