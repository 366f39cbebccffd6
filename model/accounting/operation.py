"""One operation of a training step with its FLOPs and bytes, and the operations that embedding, blocks and head share.

FLOPs count matrix products, as `torch.utils.flop_counter` does: (m, k) x (k, n) costs 2 m k n. Letters: `B` batch, `T`
context, `D` d_model, `Q` width of queries, `E` width of keys and of values, `F` d_ff, `V` vocabulary. Rows are the B T tokens.
"""

from dataclasses import dataclass
from typing import Any

from ...kernels.op import ALL, Cost
from ..config import ModelConfig
from ..policy import ITEMSIZE, Policy, stream_itemsize

# Kernel of each gated feed-forward layer.
GATED = {"swiglu": "swiglu", "geglu_tanh": "geglu", "geglu_erf": "geglu"}


@dataclass(frozen=True)
class Operation:
    """One operation of one layer, forward and backward."""

    name: str
    group: str
    layer: int | None
    """Index of the block; None before and after the blocks."""
    shape: tuple[int, ...]
    """(m, k, n) of a product; (B, H, T, K) of attention; (rows, width) of other operations."""
    parameters: int = 0
    """Weights that this operation uses first; a tied head has none."""
    padding: int = 0
    """Additional weights that pad the vocabulary."""
    forward_flops: int = 0
    backward_flops: int = 0
    recomputed_flops: int = 0
    """FLOPs that the backward pass spends on recomputing tensors that were not saved."""
    runs_again: bool = False
    """Whether the backward pass runs the operation again because its block is checkpointed."""
    padding_flops: int = 0
    """Forward FLOPs on vocabulary padding; the backward pass spends twice as many."""
    forward_bytes: int = 0
    """Least traffic: inputs read once, outputs written once."""
    backward_bytes: int = 0
    saved_bytes: int = 0
    """Bytes saved for the backward pass, without weights; a tensor that two operations save counts at the first."""
    cast_bytes: int = 0
    """Bytes of the weight cast to the activation dtype and of its gradient; the copy is saved unless products are in 8 bits."""
    eight_bits: bool = False
    """Whether its products run in 8 bits."""
    forward_temporary: int = 0
    """Bytes in use during the forward pass that are not saved."""
    backward_temporary: int = 0
    """Bytes in use during the backward pass: gradients of activations, not of weights."""

    @property
    def flops(self) -> int:
        """Forward and backward FLOPs without recomputation."""
        return self.forward_flops + self.backward_flops

    @property
    def weights(self) -> int:
        """Weights including padding."""
        return self.parameters + self.padding


def costs(op: str, itemsize: int, **sizes: Any) -> tuple[Cost, Cost]:
    """Return the costs of a kernel's forward and backward pass; `itemsize` is in bytes."""
    forward, backward, _ = ALL[op].cost(itemsize, **sizes)
    assert forward is not None
    assert backward is not None
    return forward, backward


class Step:
    """Sizes of one step, and the operations that several parts of the model share."""

    def __init__(self, config: ModelConfig, batch: int, context: int, policy: Policy, exact_causal: bool) -> None:
        self.config, self.batch, self.context, self.policy = config, batch, context, policy
        self.exact_causal = exact_causal
        self.rows, self.d, self.f, self.v = batch * context, config.d_model, config.d_ff, config.vocab_size
        self.q, self.e = config.q_width, config.kv_width
        self.held_v = config.padded_vocab_size if policy.vocabulary == "padded" else config.vocab_size
        self.a, self.w, self.s = ITEMSIZE[policy.dtype], ITEMSIZE[policy.weights], stream_itemsize(policy)
        self.fused, self.joined = policy.ops == "fused", policy.projections == "joined"
        self.stream = self.rows * self.d * self.s  # the residual stream or its gradient, in use during every branch

    def product(
        self, name: str, group: str, layer: int | None, k: int, n: int, saved: int = 0, ends_branch: bool = False
    ) -> Operation:
        """Return y = x W^T; the backward pass is two products of the same size, dx = dy W and dW = dy^T x."""
        m, a = self.rows, self.a
        forward, moved = 2 * m * k * n, a * (m * k + k * n + m * n)
        # The cast weight is in use until the backward pass has read it.
        cast = a * k * n if self.a != self.w else 0
        # The gradient of a branch is the gradient of the stream, unless the dtypes differ or a norm lies between them.
        ends_branch = ends_branch and self.config.norm != "sandwich"
        holds_stream = layer is not None and not (ends_branch and self.a == self.s)
        temporary = a * m * (k + n) + (self.stream if holds_stream else 0)
        if layer is not None and self.policy.eight_bits:
            fp8_forward, fp8_backward = costs("fp8_linear", a, rows=m, d_in=k, d_out=n)
            # Saved: x and W, transposed, and their inverse scales. x and W have a second copy each for the forward product;
            # dy has two copies.
            scales = 8 * k if self.policy.compute == "fp8_rowwise" else 8
            return Operation(name, group, layer, (m, k, n), k * n, forward_flops=forward, backward_flops=2 * forward,
                             forward_bytes=fp8_forward.bytes, backward_bytes=fp8_backward.bytes,
                             saved_bytes=m * k + k * n + scales, cast_bytes=cast, eight_bits=True,
                             forward_temporary=m * k + k * n + cast, backward_temporary=temporary + 2 * m * n)  # fmt: skip
        return Operation(name, group, layer, (m, k, n), k * n, forward_flops=forward, backward_flops=2 * forward,
                         forward_bytes=moved, backward_bytes=2 * moved, saved_bytes=saved + cast, cast_bytes=cast,
                         backward_temporary=temporary)  # fmt: skip

    def bias(self, product: Operation) -> Operation:
        """Return the bias of a product, added as the product writes y. It saves nothing: its gradient sums the rows of dy."""
        m, _, n = product.shape
        cast = self.a * n if self.a != self.w else 0
        return Operation(f"{product.name} bias", product.group, product.layer, (m, n), n, forward_bytes=self.a * n,
                         backward_bytes=self.a * (m * n + n), forward_temporary=cast,
                         backward_temporary=self.stream + self.a * m * n + cast)  # fmt: skip

    def gated_activation(self, layer: int, rows: int) -> Operation:
        """Return the activation of a gated feed-forward layer."""
        name, f = GATED[self.config.ffn], self.f
        forward, backward = costs(name, self.a, rows=rows, width=f)
        wide = self.a if self.fused else 4
        # Saved: gate and up. Eager ops save all three, with the activated gate, in float32.
        saved = rows * f * (2 * self.a if self.fused else 12)
        return Operation(name, "activation", layer, (rows, f), forward_bytes=forward.bytes, backward_bytes=backward.bytes,
                         saved_bytes=saved, backward_temporary=self.stream + 3 * wide * rows * f)  # fmt: skip

    def addition(self, name: str, layer: int | None) -> Operation:
        """Return the sum of the stream and a branch; both get the same gradient."""
        moved = self.stream * 2 + self.rows * self.d * self.a
        return Operation(name, "residual", layer, (self.rows, self.d), forward_bytes=moved)

    def norm(self, layer: int | None, name: str, adds: bool = False, of_branch: bool = False) -> list[Operation]:
        """Return the norm of the stream (after it `adds` a branch) or `of_branch`, the norm of a branch.

        A weight stored as an offset from 1 is shifted in registers, or in a vector that is too small to count.
        """
        rows, d = self.rows, self.d
        itemsize = self.a if of_branch else self.s
        normed = itemsize * rows * d
        addition = self.addition(f"{name} add", layer)
        if self.config.norm_type == "layer_norm":
            forward, backward = costs("layer_norm", itemsize, rows=rows, width=d, bias=False)
            # Saved: the input, its mean and 1 / standard deviation. Eager, in float32: the deviations from the mean, the
            # normalized deviations, and 1 / standard deviation.
            kept = normed + 8 * rows if self.fused else 8 * rows * d + 4 * rows
            held = normed if self.fused else 12 * rows * d
            norm = Operation(name, "norms", layer, (rows, d), d, forward_bytes=forward.bytes, backward_bytes=backward.bytes,
                             saved_bytes=kept, forward_temporary=0 if self.fused else 4 * rows * d,
                             backward_temporary=self.stream + held)  # fmt: skip
            return [addition, norm] if adds else [norm]
        norm, add = (
            costs("rms_norm", itemsize, rows=rows, width=d),
            costs("add_rms_norm", self.a, rows=rows, width=d, residual_itemsize=self.s),
        )
        if self.fused:
            forward, backward = add if adds else norm
            # Saved: the input and 1 / rms, 4 bytes a row. The gradient of a branch is the gradient of the stream if their
            # dtypes are equal.
            branch_grad = normed if of_branch and self.a != self.s else 0
            return [Operation(name, "norms", layer, (rows, d), d, forward_bytes=forward.bytes, backward_bytes=backward.bytes,
                              saved_bytes=normed + 4 * rows,
                              backward_temporary=self.stream + normed + branch_grad)]  # fmt: skip
        # Saved in float32: x, x / rms and 1 / rms. The backward pass holds dy, the gradients of both factors and their sum.
        eager = Operation(name, "norms", layer, (rows, d), d, forward_bytes=norm[0].bytes, backward_bytes=norm[1].bytes,
                          saved_bytes=8 * rows * d + 4 * rows, forward_temporary=4 * rows * d,
                          backward_temporary=self.stream + 12 * rows * d)  # fmt: skip
        return [addition, eager] if adds else [eager]
