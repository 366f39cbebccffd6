"""The list of operations of a training step, with their FLOPs and bytes; every other figure is a sum over it."""

from collections.abc import Iterator

from ...errors import UserError
from ..checkpointing import num_checkpointed_blocks
from ..config import ModelConfig
from ..policy import Policy
from .block import block, checkpointed_block
from .ends import embedding, loss
from .operation import Operation, Step


def operations(
    config: ModelConfig,
    batch_size: int = 1,
    context_length: int | None = None,
    policy: Policy | None = None,
    exact_causal: bool = False,
) -> tuple[Operation, ...]:
    """Return the operations of a training step on `batch_size` sequences, layer by layer in the order of the forward pass.

    Attention is counted in full, as if not causal, unless `exact_causal`; a layer's window limits it.
    """
    policy, context = policy or Policy(), config.context_length if context_length is None else context_length
    if policy.eight_bits and config.num_experts is not None:
        raise UserError(f"compute is {policy.compute}: expected a 16- or 32-bit dtype for a model with experts")
    for name, value in (("batch_size", batch_size), ("context_length", context)):
        if value < 1:
            raise UserError(f"{name} is {value}: expected at least 1")
    return tuple(_all(Step(config, batch_size, context, policy, exact_causal)))


def _all(step: Step) -> Iterator[Operation]:
    config = step.config
    yield from embedding(step)
    checkpointed = num_checkpointed_blocks(step.policy.checkpointing, config.num_layers)
    for layer in range(config.num_layers):
        yield from checkpointed_block(step, layer) if layer < checkpointed else block(step, layer)
    if config.norm in ("pre", "sandwich"):
        yield from step.norm(None, "ln_final", adds=True)
    yield from loss(step)
