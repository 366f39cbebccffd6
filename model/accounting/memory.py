"""Memory of a training step: the maximum over a timeline, not the sum of all tensors.

Activations accumulate in the forward pass and are freed in the backward pass, while gradients accumulate. Temporaries exist
for one operation. The optimizer steps when only weights, gradients and state are left. Allocator overhead is not counted:
rounding to 512-byte blocks, cached blocks, cuBLAS workspaces.
"""

from collections import Counter
from dataclasses import dataclass

from ..checkpointing import num_checkpointed_blocks
from ..config import ModelConfig
from ..memory_size import GB, GIB
from ..policy import ITEMSIZE, Policy, moment_bytes, stream_itemsize
from .ends import logit_chunk
from .flops import num_parameter_tensors, num_parameters, num_weights
from .operation import Operation
from .operations import operations


@dataclass(frozen=True)
class TimelinePoint:
    """Bytes in use while one operation runs."""

    phase: str
    """Either forward, backward or optimizer."""
    operation: str
    layer: int | None
    state: int
    """Weights, master weights and optimizer state."""
    gradients: int
    saved: int
    temporary: int

    @property
    def live(self) -> int:
        """Total bytes."""
        return self.state + self.gradients + self.saved + self.temporary


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step uses."""

    weights: int
    master_weights: int
    gradients: int
    optimizer_state: int
    """Two moments, and a float32 step per weight tensor, as in `torch.optim.AdamW`."""
    saved: int
    """Activations saved for the backward pass, after checkpointing."""
    logits: int
    """Logits in memory at once: all of them, or one chunk; a chunk of eager ops is float32."""
    timeline: tuple[TimelinePoint, ...]

    @property
    def peaks(self) -> dict[str, int]:
        """Peak bytes of each phase."""
        phases = dict.fromkeys(point.phase for point in self.timeline)
        return {phase: max(point.live for point in self.timeline if point.phase == phase) for phase in phases}

    @property
    def peak_point(self) -> TimelinePoint:
        """The point of the timeline with the most bytes."""
        return max(self.timeline, key=lambda point: point.live)

    @property
    def peak(self) -> int:
        """Peak bytes of the step."""
        return self.peak_point.live


def saved_bytes(ops: tuple[Operation, ...]) -> int:
    """Return the bytes that the forward pass saves for the backward pass without checkpointing."""
    return sum(op.saved_bytes for op in ops)


def _block_inputs(config: ModelConfig, rows: int, policy: Policy, layer: int) -> tuple[int, int]:
    """Return the bytes of a block's inputs, and how many of them its first operation saves unchanged."""
    stream = rows * config.d_model * stream_itemsize(policy)
    if config.norm not in ("pre", "sandwich"):
        # The input is the sum. The projection saves it unless it casts or quantizes it first.
        kept = stream_itemsize(policy) == ITEMSIZE[policy.dtype] and not policy.eight_bits
        return stream, stream if kept else 0
    if policy.ops == "eager":
        # The input is the sum. The eager norm saves it unless it makes a float32 copy first.
        return stream, stream if stream_itemsize(policy) == 4 else 0
    # The inputs are the stream and the branch that ln1 adds. The first block has no branch, and its norm saves its input.
    return (stream, stream) if layer == 0 else (stream + rows * config.d_model * ITEMSIZE[policy.dtype], 0)


def _logits(ops: tuple[Operation, ...], rows: int, policy: Policy) -> int:
    """Return the bytes of logits in memory at once."""
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
    """Return the memory of a training step on `batch_size` sequences; `accumulate` keeps gradients of earlier micro-batches.

    Gradients are freed after each step (`zero_grad(set_to_none=True)`). AdamW is fused and needs no temporaries.
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
    # Checkpointed blocks only.
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
        timeline.append(TimelinePoint("forward", op.name, op.layer, state, gradients, saved, transient + op.forward_temporary))
    saved_in_all = saved

    table = weight_size * next(op.weights for op in ops if op.name == "embedding")
    layer = None
    for op in reversed(ops):
        if op.layer in inputs and op.layer != layer:
            # The block runs again; the tensors that its first norm saves are in memory already.
            saved += block_saved[op.layer] - inputs[op.layer][1]
        layer = op.layer
        temporary, new_gradients = op.backward_temporary, weight_size * op.weights
        if config.tie_embeddings and op.group == "head" and op.forward_flops:
            new_gradients = table
        elif config.tie_embeddings and op.name == "embedding":
            # A second gradient of the table, and its sum with the head's gradient, a new tensor.
            temporary, new_gradients = temporary + 2 * table, 0
        if op.cast_bytes:
            # First comes the gradient of the cast weight. It is cast back once the saved tensors and dy (m, n) are freed.
            timeline.append(TimelinePoint("backward", op.name, op.layer, state, gradients, saved, temporary + op.cast_bytes))
            m, _, n = op.shape
            temporary += op.cast_bytes - op.saved_bytes - ITEMSIZE[policy.dtype] * m * n
        if not accumulate:
            gradients += new_gradients
        else:
            temporary += new_gradients
        timeline.append(TimelinePoint("backward", op.name, op.layer, state, gradients, saved, temporary))
        saved -= op.saved_bytes
        if op.layer in inputs and op is first_of_layer[op.layer]:
            whole, kept = inputs[op.layer]
            saved -= whole - kept
    timeline.append(TimelinePoint("optimizer", "adamw", None, state, all_gradients, 0, 0))
    logits = _logits(ops, batch_size * context, policy)
    return Memory(weights, master, all_gradients, optimizer_state, saved_in_all, logits, tuple(timeline))


def handout_memory(config: ModelConfig, batch_size: int = 1, context_length: int | None = None) -> int:
    """Return the estimate of the CS336 handout (assignment 1, adamwAccounting); it differs from the actual memory use.

    16 P bytes of float32 parameters, gradients and state, plus 4 B [L ((8 D + 2 F) T + 2 H T^2) + T D + 2 T V] bytes of
    activations. The handout lists 16 T D, which is (8 D + 2 F) T with F = 4 D.
    """
    t = config.context_length if context_length is None else context_length
    d, f, v = config.d_model, config.d_ff, config.vocab_size
    block = (8 * d + 2 * f) * t + 2 * config.num_heads * t**2
    return 16 * num_parameters(config) + 4 * batch_size * (config.num_layers * block + t * d + 2 * t * v)


def largest_batch(
    config: ModelConfig, memory_bytes: float, context_length: int | None = None, policy: Policy | None = None
) -> int:
    """Return the largest number of sequences whose step fits in `memory_bytes`, or 0."""

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


def both_units(num_bytes: float) -> str:
    """Return a size in GB and in GiB."""
    return f"{num_bytes / GB:,.3f} GB ({num_bytes / GIB:,.3f} GiB)"
