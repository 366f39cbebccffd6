"""Parameters and FLOPs, summed over the list of operations."""

from collections.abc import Iterable

from ..config import ModelConfig
from ..policy import Policy
from .experts import inactive_parameters
from .operation import Operation
from .operations import operations

FLOP_GROUPS: tuple[str, ...] = ("projections", "attention", "feed-forward", "head")
PARAMETER_GROUPS: tuple[str, ...] = ("embedding", "attention", "feed-forward", "norms", "head")


def parameters_by_group(config: ModelConfig) -> dict[str, int]:
    """Return the number of parameters of each group of weights."""
    groups: dict[str, int] = dict.fromkeys(PARAMETER_GROUPS, 0)
    for op in operations(config, 1, 1):
        if op.parameters:
            groups["attention" if op.group == "projections" else op.group] += op.parameters
    return groups


def num_parameters(config: ModelConfig) -> int:
    """Return the number of trained parameters, without the rows that pad the vocabulary."""
    return sum(parameters_by_group(config).values())


def num_active_parameters(config: ModelConfig) -> int:
    """Return the number of parameters that a token uses: all except the experts that it is not routed to."""
    return num_parameters(config) - inactive_parameters(config)


def num_weights(config: ModelConfig, policy: Policy) -> int:
    """Return the number of weights in memory: the parameters and the vocabulary padding."""
    return sum(op.weights for op in operations(config, 1, 1, policy))


def num_parameter_tensors(config: ModelConfig, policy: Policy | None = None) -> int:
    """Return the number of trained tensors; AdamW keeps a float32 step for each."""
    return sum(op.parameters > 0 for op in operations(config, 1, 1, policy))


def forward_flops_by_group(
    config: ModelConfig, context_length: int | None = None, window: int | None = None, exact_causal: bool = False
) -> dict[str, int]:
    """Return the forward FLOPs of one sequence by group, with attention counted in full (as if not causal) or exactly.

    `window` overrides the windows of the layers.
    """
    groups: dict[str, int] = dict.fromkeys(FLOP_GROUPS, 0)
    for op in operations(config, 1, context_length, Policy(window=window), exact_causal):
        if op.forward_flops:
            groups[op.group] += op.forward_flops
    return groups


def forward_flops(
    config: ModelConfig, context_length: int | None = None, window: int | None = None, exact_causal: bool = False
) -> int:
    """Return the forward FLOPs of one sequence."""
    return sum(forward_flops_by_group(config, context_length, window, exact_causal).values())


def model_flops(ops: Iterable[Operation]) -> int:
    """Return the model FLOPs of a step: forward and backward without recomputation (MFU's numerator)."""
    return sum(op.flops for op in ops)


def hardware_flops(ops: Iterable[Operation]) -> int:
    """Return the FLOPs of a step with recomputation and padding (HFU's numerator; Korthikanti et al. 2022, section 5).

    In a checkpointed block, the backward pass of flash attention still recomputes the scores once more.
    """
    ops = tuple(ops)
    again = sum(op.forward_flops for op in ops if op.runs_again)
    return model_flops(ops) + sum(op.recomputed_flops + 3 * op.padding_flops for op in ops) + again


def training_flops_per_token(config: ModelConfig, context_length: int | None = None) -> float:
    """Return the training FLOPs per token: forward, and twice as many backward, without recomputation."""
    tokens = config.context_length if context_length is None else context_length
    return model_flops(operations(config, 1, tokens)) / tokens


def model_flops_utilisation(config: ModelConfig, tokens_per_second: float, peak_flops: float | None) -> float | None:
    """Return the MFU (PaLM, appendix B), a share of `peak_flops` (FLOP/s); None without a peak."""
    if peak_flops is None:
        return None
    return training_flops_per_token(config) * tokens_per_second / peak_flops
