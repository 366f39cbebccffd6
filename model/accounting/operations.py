"""The one list from which every other figure is a sum: each operation of a training step with its FLOPs and bytes."""

import dataclasses
from collections.abc import Iterator

from ...errors import UserError
from ..checkpointing import num_checkpointed_blocks
from ..config import ModelConfig
from .block import block, checkpointed_block
from .ends import embedding, loss
from .operation import Operation, Step
from .policy import Policy


def operations(
    config: ModelConfig,
    batch_size: int = 1,
    context_length: int | None = None,
    policy: Policy | None = None,
    exact_causal: bool = False,
) -> tuple[Operation, ...]:
    """Return the operations of a training step on `batch_size` sequences, in the order of the forward pass.

    Attention is counted in full, as if not causal, unless `exact_causal`; within its window where a layer has one. The list
    has every layer's operations.
    """
    policy, context = policy or Policy(), config.context_length if context_length is None else context_length
    if policy.eight_bits and config.num_experts is not None:
        raise UserError(f"compute is {policy.compute}: a model with experts has no products in 8 bits")
    for name, value in (("batch_size", batch_size), ("context_length", context)):
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
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


def pad_vocabulary(config: ModelConfig, multiple: int) -> ModelConfig:
    """Return the shape with its vocabulary rounded up to a multiple, such as 50,304 for GPT-2's 50,257 and 64 or 128."""
    if multiple < 1:
        raise UserError(f"the vocabulary's multiple is {multiple}: it must be at least 1")
    return dataclasses.replace(config, vocab_size=-(-config.vocab_size // multiple) * multiple)
