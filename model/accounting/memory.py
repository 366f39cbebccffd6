"""Memory of a training step as a maximum over its moments, not a sum of everything that is ever held.

Activations grow through the forward pass and go through the backward pass, while gradients come; temporaries last for one
operation; the optimizer steps when only weights, gradients and state are left. What an allocator adds (blocks rounded up to
512 bytes, cached ones, the workspaces of cuBLAS) is not in it.
"""

import re
from collections import Counter
from dataclasses import dataclass

from ...errors import UserError
from ..checkpointing import num_checkpointed_blocks
from ..config import ModelConfig
from .ends import logit_chunk
from .flops import num_parameter_tensors, num_parameters, num_weights
from .operation import Operation
from .operations import operations
from .policy import ITEMSIZE, Policy, moment_bytes, stream_itemsize

GB, GIB = 10**9, 2**30
_MOST_BYTES = 10**18
_UNITS = {"MB": 10**6, "GB": GB, "TB": 10**12, "MiB": 2**20, "GiB": GIB, "TiB": 2**40}


@dataclass(frozen=True)
class Moment:
    """What is held while one operation runs, in bytes."""

    phase: str
    """forward, backward or optimizer."""
    operation: str
    layer: int | None
    state: int
    """Weights, master weights and the optimizer's state."""
    gradients: int
    saved: int
    temporary: int

    @property
    def live(self) -> int:
        """All of it together."""
        return self.state + self.gradients + self.saved + self.temporary


@dataclass(frozen=True)
class Memory:
    """What a training step holds, in bytes."""

    weights: int
    master_weights: int
    gradients: int
    optimizer_state: int
    """Two moments, and a float32 step for every tensor of weights, as `torch.optim.AdamW` keeps it."""
    saved: int
    """What the forward pass leaves for the backward pass, as checkpointing has it."""
    logits: int
    """Logits held at once: all of them, or those of a chunk; float32 where a chunk's ops are eager."""
    timeline: tuple[Moment, ...]

    @property
    def peaks(self) -> dict[str, int]:
        """The most that each phase holds."""
        phases = dict.fromkeys(moment.phase for moment in self.timeline)
        return {phase: max(moment.live for moment in self.timeline if moment.phase == phase) for phase in phases}

    @property
    def peak_moment(self) -> Moment:
        """The moment that holds most."""
        return max(self.timeline, key=lambda moment: moment.live)

    @property
    def peak(self) -> int:
        """The most that is ever held."""
        return self.peak_moment.live


def saved_bytes(ops: tuple[Operation, ...]) -> int:
    """Return what the forward pass leaves for the backward pass without checkpointing."""
    return sum(op.saved_bytes for op in ops)


def _block_inputs(config: ModelConfig, rows: int, policy: Policy, layer: int) -> tuple[int, int]:
    """Return the bytes of a block's inputs, and how many of them its first operation keeps as they are."""
    stream = rows * config.d_model * stream_itemsize(policy)
    if config.norm not in ("pre", "sandwich"):
        # The sum, which the projection keeps itself unless it has to cast or to round it first.
        kept = stream_itemsize(policy) == ITEMSIZE[policy.dtype] and not policy.eight_bits
        return stream, stream if kept else 0
    if policy.ops == "eager":
        # The sum; the eager norm keeps it itself unless it has to make a float32 copy first.
        return stream, stream if stream_itemsize(policy) == 4 else 0
    # The stream and the branch that ln1 is to add; the first block has no branch, and its norm keeps its input.
    return (stream, stream) if layer == 0 else (stream + rows * config.d_model * ITEMSIZE[policy.dtype], 0)


def _logits(ops: tuple[Operation, ...], rows: int, policy: Policy) -> int:
    """Return the bytes of logits that are held at once."""
    _, _, vocabulary = next(op.shape for op in ops if op.group == "head")
    itemsize = ITEMSIZE[policy.dtype]
    if policy.loss == "whole":
        return itemsize * rows * vocabulary
    itemsize = itemsize if policy.ops == "fused" else 4
    chunk_rows, _ = logit_chunk(rows, vocabulary, itemsize, policy)
    return itemsize * chunk_rows * vocabulary


def training_memory(
    config: ModelConfig,
    batch_size: int = 1,
    context_length: int | None = None,
    policy: Policy | None = None,
    accumulate: bool = False,
) -> Memory:
    """Return what a training step on `batch_size` sequences holds; `accumulate` adds to gradients of earlier micro-batches.

    Gradients are freed after each step (`zero_grad(set_to_none=True)`), and AdamW is fused: it needs no temporaries.
    """
    policy = policy or Policy()
    context = config.context_length if context_length is None else context_length
    ops = operations(config, batch_size, context, policy)
    count, weight_size = num_weights(config, policy), ITEMSIZE[policy.weights]
    weights, master = weight_size * count, 4 * count if policy.master_weights else 0
    optimizer_state = 2 * moment_bytes(policy, count) + 4 * num_parameter_tensors(config, policy)
    state = weights + master + optimizer_state
    all_gradients = weight_size * count
    checkpointed = num_checkpointed_blocks(policy.checkpointing, config.num_layers)
    # Of the checkpointed blocks only.
    inputs: dict[int | None, tuple[int, int]] = {
        layer: _block_inputs(config, batch_size * context, policy, layer) for layer in range(checkpointed)
    }
    first_of_layer = {op.layer: op for op in reversed(ops)}
    block_saved: Counter[int | None] = Counter()

    timeline, saved, gradients = [], 0, all_gradients if accumulate else 0
    layer = None
    for op in ops:
        transient = 0
        block_saved[op.layer] += op.saved_bytes
        if op.layer in inputs:
            if op.layer != layer:
                saved += inputs[op.layer][0]
            transient = op.saved_bytes
        else:
            saved += op.saved_bytes
        layer = op.layer
        timeline.append(Moment("forward", op.name, op.layer, state, gradients, saved, transient + op.forward_temporary))
    saved_in_all = saved

    table = weight_size * next(op.weights for op in ops if op.name == "embedding")
    layer = None
    for op in reversed(ops):
        if op.layer in inputs and op.layer != layer:
            # The block runs again; what its first norm keeps is held already.
            saved += block_saved[op.layer] - inputs[op.layer][1]
        layer = op.layer
        temporary, new_gradients = op.backward_temporary, weight_size * op.weights
        if config.tie_embeddings and op.group == "head" and op.forward_flops:
            new_gradients = table
        elif config.tie_embeddings and op.name == "embedding":
            # A second gradient of the table, and the sum with the head's, which is a new tensor.
            temporary, new_gradients = temporary + 2 * table, 0
        if op.cast_bytes:
            # The gradient of the weight's copy comes first, and is cast when what the product kept, and dy (m, n), are gone.
            timeline.append(Moment("backward", op.name, op.layer, state, gradients, saved, temporary + op.cast_bytes))
            m, _, n = op.shape
            temporary += op.cast_bytes - op.saved_bytes - ITEMSIZE[policy.dtype] * m * n
        if not accumulate:
            gradients += new_gradients
        else:
            temporary += new_gradients
        timeline.append(Moment("backward", op.name, op.layer, state, gradients, saved, temporary))
        saved -= op.saved_bytes
        if op.layer in inputs and op is first_of_layer[op.layer]:
            whole, kept = inputs[op.layer]
            saved -= whole - kept
    timeline.append(Moment("optimizer", "adamw", None, state, all_gradients, 0, 0))
    logits = _logits(ops, batch_size * context, policy)
    return Memory(weights, master, all_gradients, optimizer_state, saved_in_all, logits, tuple(timeline))


def handout_memory(config: ModelConfig, batch_size: int = 1, context_length: int | None = None) -> int:
    """Return the CS336 handout's sum (assignment 1, adamwAccounting), which is not what is really held.

    16 P bytes of float32 parameters, gradients and state, and 4 B [L ((8 D + 2 F) T + 2 H T^2) + T D + 2 T V] of activations:
    the list of the handout, whose 16 T D is this with F = 4 D.
    """
    t = config.context_length if context_length is None else context_length
    d, f, v = config.d_model, config.d_ff, config.vocab_size
    block = (8 * d + 2 * f) * t + 2 * config.num_heads * t**2
    return 16 * num_parameters(config) + 4 * batch_size * (config.num_layers * block + t * d + 2 * t * v)


def largest_batch(
    config: ModelConfig, memory_bytes: float, context_length: int | None = None, policy: Policy | None = None
) -> int:
    """Return the most sequences whose step fits in `memory_bytes`; 0 where not even one does."""

    def fits(batch_size: int) -> bool:
        return training_memory(config, batch_size, context_length, policy).peak <= memory_bytes

    if not fits(1):
        return 0
    fitting = 1
    while fits(2 * fitting):
        fitting *= 2
    too_large = 2 * fitting
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if fits(middle) else (fitting, middle)
    return fitting


def parse_memory(text: str) -> int:
    """Return the bytes that such as `80GB` (80e9) or `80GiB` (80 x 2^30) means; the unit is not optional."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if match is None or match[2] not in _UNITS:
        raise UserError(f"memory {text!r} is not a size: give a number and one of {', '.join(_UNITS)}, such as 80GB or 80GiB")
    size = float(match[1]) * _UNITS[match[2]]
    if not 1 <= round(min(size, 2 * _MOST_BYTES)) <= _MOST_BYTES:
        raise UserError(f"memory {text!r} is no memory of a GPU: give from 1 byte to {_MOST_BYTES / GB:,.0f} GB")
    return round(size)


def both_units(num_bytes: float) -> str:
    """Return a size in GB and in GiB."""
    return f"{num_bytes / GB:,.3f} GB ({num_bytes / GIB:,.3f} GiB)"
