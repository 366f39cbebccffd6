"""Operations before and after the blocks: embedding, head and loss; `operation` defines the letters."""

import dataclasses
from collections.abc import Iterator

from ...kernels.linear_cross_entropy import chunk_shape
from ...kernels.op import ALL
from ..policy import Policy
from .operation import Operation, Step, costs


def logit_chunk(rows: int, vocab_size: int, itemsize: int, policy: Policy) -> tuple[int, int]:
    """Return the rows and columns of the logits that a chunked loss holds at once."""
    if policy.ops == "fused":
        return chunk_shape(rows, vocab_size, itemsize, policy.logit_chunk_bytes)
    return min(rows, max(1, policy.logit_chunk_bytes // (itemsize * vocab_size))), vocab_size


def embedding(step: Step) -> Iterator[Operation]:
    """Yield the embedding lookup, and the scaling if the model has one."""
    rows, d, w, stream = step.rows, step.d, step.w, step.stream
    # The lookup and the sum of its gradient use the dtype of the weights.
    looked_up = w * rows * d
    cast = looked_up if step.s != w else 0
    # Saved: the tokens, int64. The gradient of the table is as large as the table.
    yield Operation("embedding", "embedding", None, (rows, d), step.v * d, (step.held_v - step.v) * d,
                    forward_bytes=looked_up + stream + 8 * rows + cast,
                    backward_bytes=stream + w * step.held_v * d + 8 * rows + cast, saved_bytes=8 * rows,
                    forward_temporary=cast, backward_temporary=looked_up)  # fmt: skip
    if step.config.scale_embeddings:
        # Saved: the scale, one number in the dtype of the stream.
        yield Operation("embedding scale", "embedding", None, (rows, d), forward_bytes=2 * stream, backward_bytes=2 * stream,
                        saved_bytes=step.s, forward_temporary=stream, backward_temporary=2 * stream)  # fmt: skip


def _head(step: Step, name: str, saved: int = 0) -> Operation:
    """Return the product to the logits; `shape` has the padded vocabulary if the product computes it."""
    rows, d, v = step.rows, step.d, step.v
    added = step.held_v - v
    padding_flops = 2 * rows * d * added
    product = step.product(name, "head", None, d, step.held_v, saved)
    own = {"parameters": 0, "padding": 0} if step.config.tie_embeddings else {"parameters": v * d, "padding": added * d}
    flops = {"forward_flops": product.forward_flops - padding_flops, "padding_flops": padding_flops,
             "backward_flops": product.backward_flops - 2 * padding_flops}  # fmt: skip
    return dataclasses.replace(product, **own, **flops)


def loss(step: Step) -> Iterator[Operation]:
    """Yield the head and the cross-entropy of its logits."""
    return _whole_loss(step) if step.policy.loss == "whole" else _chunked_loss(step)


def _whole_loss(step: Step) -> Iterator[Operation]:
    a, rows, v, held_v, fused = step.a, step.rows, step.v, step.held_v, step.fused
    yield _head(step, "head", saved=a * rows * step.d)
    if held_v != v:
        # The unpadded logits are a view; their gradient is copied into a tensor with the padded rows.
        copied = a * rows * (v + held_v)
        yield Operation("cut", "head", None, (rows, v), backward_bytes=copied, backward_temporary=copied)
    logits = a * rows * held_v
    if step.config.logit_softcap is not None:
        capped = a * rows * v
        # Saved: the tanh, from which its derivative follows. The result is a new tensor without the padding.
        yield Operation("logit softcap", "head", None, (rows, v), forward_bytes=2 * capped, backward_bytes=3 * capped,
                        saved_bytes=capped, forward_temporary=logits + capped, backward_temporary=2 * capped)  # fmt: skip
        logits = capped
    forward, backward = costs("cross_entropy", a, rows=rows, vocab_size=v)
    # Saved, fused: the logits, their maximum and log-sum. Saved, eager: log-softmax in float32, the (unit) sum of class
    # weights. Both save the targets.
    kept = logits + 8 * rows if fused else 4 * rows * v + 4
    # Backward: the loss and the gradient of the logits; eager also the gradient of log-softmax.
    held = a * rows * v if fused else 8 * rows * v
    yield Operation("cross_entropy", "loss", None, (rows, v), forward_bytes=forward.bytes, backward_bytes=backward.bytes,
                    saved_bytes=kept + 8 * rows, forward_temporary=0 if fused else logits,
                    backward_temporary=held + 4)  # fmt: skip


def _chunked_loss(step: Step) -> Iterator[Operation]:
    a, rows, d, held_v, policy = step.a, step.rows, step.d, step.held_v, step.policy
    product = _head(step, "linear_cross_entropy")
    moved = ALL["linear_cross_entropy"].cost(a, rows=rows, d_model=d, vocab_size=held_v).both.bytes
    cast = a * held_v * d if a != step.w else 0
    if step.fused:
        # The forward pass computes the gradients of x and (in float32) of the weight chunk by chunk and saves them with x;
        # the backward pass scales them. Logits are capped in registers.
        kept, again = 2 * a * rows * d + 4 * held_v * d, 0
        chunk_rows, columns = logit_chunk(rows, held_v, a, policy)
        temporary = {"forward_temporary": a * chunk_rows * columns + cast, "backward_temporary": a * rows * d}
    else:
        # Each chunk is checkpointed: it saves x, the weight and the targets, and recomputes the logits and their tanh.
        kept, again = a * rows * d + cast + 8 * rows, product.forward_flops + product.padding_flops
        chunk_rows, _ = logit_chunk(rows, held_v, 4, policy)
        tanh = 0 if step.config.logit_softcap is None else 4 * chunk_rows * held_v
        temporary = {"forward_temporary": 8 * chunk_rows * held_v + tanh,
                     "backward_temporary": 12 * chunk_rows * held_v + tanh + a * rows * d}  # fmt: skip
    yield dataclasses.replace(product, recomputed_flops=again, forward_bytes=moved, backward_bytes=0, saved_bytes=kept,
                              cast_bytes=0, **temporary)  # fmt: skip
