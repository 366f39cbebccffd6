"""Time and cost: the roofline of every operation, the least time of a step, and the duration and price of a run."""

from collections.abc import Iterable
from dataclasses import dataclass

from ...datasheet import GPU
from ...errors import UserError
from ..config import ModelConfig
from ..policy import ITEMSIZE, Compute, Policy, moment_bytes
from .flops import model_flops, num_parameters, num_weights
from .operation import Operation
from .operations import operations

PEAK_OF: dict[Compute, str] = {
    "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "fp8": "fp8", "fp8_rowwise": "fp8",
    "fp8_delayed": "fp8",
}  # fmt: skip
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class OperationTime:
    """The operations of one name together: their cost in a step, and the least time on a GPU."""

    name: str
    group: str
    count: int
    flops: int
    """Forward, backward, recomputed and padding FLOPs."""
    bytes: int
    seconds: float
    compute_bound: bool
    """Whether FLOPs, not bytes, bound most of the time."""

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved (Williams et al. 2009)."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Roofline:
    """Lower bound on the time of a training step on a GPU, by operation."""

    operations: tuple[OperationTime, ...]
    model_flops: int
    """FLOPs of the step with attention in full: MFU's numerator."""
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
        """MFU of a step that takes the least time. Above 1 if the skipped causal scores outweigh all other losses."""
        return self.model_flops / (self.seconds * self.peak_flops)

    def shortfall(self) -> dict[str, float]:
        """Return, by name, the share of the step that exceeds the time of its FLOPs at the peak, largest first."""
        lost = {op.name: max(0.0, op.seconds - op.flops / self.peak_flops) / self.seconds for op in self.operations}
        return dict(sorted(lost.items(), key=lambda item: -item[1]))


def adamw_flops(config: ModelConfig) -> int:
    """Return the FLOPs of AdamW's step: 14 per parameter, one per operation of Loshchilov & Hutter 2019, algorithm 2."""
    return 14 * num_parameters(config)


def adamw_bytes(config: ModelConfig, policy: Policy | None = None) -> int:
    """Return AdamW's least traffic: read weight, gradient, moments; write weight, moments. 28 bytes each in float32."""
    policy = policy or Policy()
    weight, count = ITEMSIZE[policy.weights], num_weights(config, policy)
    # With a master copy, the step reads and writes that copy, and does not read the weight.
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
    """Group the operations by name, in the order of the step."""
    groups: dict[str, list[Operation]] = {}
    for op in ops:
        groups.setdefault(op.name, []).append(op)
    return groups


def roofline(
    config: ModelConfig, gpu: GPU, batch_size: int = 1, context_length: int | None = None, policy: Policy | None = None
) -> Roofline | None:
    """Return the least time of a training step on `gpu`, with optimizer and recomputation; None without a peak.

    Each pass of each operation takes the longer of its FLOPs at the datasheet's dense peak and its least bytes at the
    datasheet's bandwidth. If the blocks' products run in 8 bits, all others run at the bfloat16 peak. Flash attention skips
    masked scores; naive attention does not.
    """
    policy = policy or Policy()
    peak = gpu.peak_flops(PEAK_OF[policy.compute])
    if peak is None:
        return None
    bandwidth = gpu.bandwidth * 1e12
    full = operations(config, batch_size, context_length, policy)
    ops = operations(config, batch_size, context_length, policy, exact_causal=policy.attention == "flash")
    # Operations that are not in 8 bits have a lower peak than the one in the MFU's denominator.
    others = gpu.peak_flops(PEAK_OF[policy.dtype]) or peak
    times = [_time(name, group, peak if group[0].eight_bits else others, bandwidth) for name, group in by_name(ops).items()]
    # The update runs in float32 outside the tensor cores.
    fp32 = gpu.peak_flops("fp32") or peak
    flops, moved = adamw_flops(config), adamw_bytes(config, policy)
    compute, memory = flops / fp32, moved / bandwidth
    times.append(OperationTime("adamw", "optimizer", 1, flops, moved, max(compute, memory), compute > memory))
    return Roofline(tuple(times), model_flops(full), peak)


@dataclass(frozen=True)
class Plan:
    """Time and cost of a training run."""

    tokens: int
    flops: float
    """Model FLOPs with attention in full."""
    seconds: float
    tokens_per_second: float
    cost: float | None
    """In the currency of the price; None without a price."""

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
    """Return the time and cost of training on `tokens` at a planned or measured MFU of num_gpus x peak_flops (FLOP/s)."""
    if not 0 < mfu <= 1:
        raise UserError(f"mfu is {mfu}: expected above 0 and at most 1")
    if tokens < 1 or num_gpus < 1:
        raise UserError(f"tokens is {tokens} and num_gpus is {num_gpus}: expected at least 1 of each")
    if price_per_gpu_hour is not None and not price_per_gpu_hour >= 0:
        raise UserError(f"price_per_gpu_hour is {price_per_gpu_hour}: expected 0 or more")
    context = config.context_length if context_length is None else context_length
    flops = model_flops(operations(config, 1, context, Policy(window=window))) * tokens / context
    seconds = flops / (mfu * peak_flops * num_gpus)
    cost = None if price_per_gpu_hour is None else price_per_gpu_hour * num_gpus * seconds / 3600
    return Plan(tokens, flops, seconds, tokens / seconds, cost)
