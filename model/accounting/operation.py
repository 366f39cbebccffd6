"""One operation of a training step with its FLOPs and bytes, and the kinds that embedding, blocks and head share.

FLOPs are those of matrix products, as `torch.utils.flop_counter` counts them: (m, k) x (k, n) costs 2 m k n. `B` batch,
`T` context, `D` d_model, `Q` width of queries, `E` width of keys and of values, `F` d_ff, `V` vocabulary; rows are the B T
tokens.
"""

from dataclasses import dataclass
from typing import Any

from ...kernels.op import ALL, Cost
from ..config import ModelConfig
from .policy import ITEMSIZE, Policy, stream_itemsize

# The op that each feed-forward layer with a gate applies between its products.
GATED = {"swiglu": "swiglu", "geglu_tanh": "geglu", "geglu_erf": "geglu"}


@dataclass(frozen=True)
class Operation:
    """One operation of one layer, forward and backward."""

    name: str
    group: str
    layer: int | None
    """The block that it belongs to; None before and after the blocks."""
    shape: tuple[int, ...]
    """(m, k, n) of a product; (B, H, T, K) of attention; rows and width of others."""
    parameters: int = 0
    """Weights that it is the first to use: a tied head has none."""
    padding: int = 0
    """Weights beside those that pad the vocabulary."""
    forward_flops: int = 0
    backward_flops: int = 0
    recomputed_flops: int = 0
    """FLOPs that the backward pass spends on computing again what was not saved."""
    runs_again: bool = False
    """Whether the backward pass runs it again, because its block is checkpointed."""
    padding_flops: int = 0
    """FLOPs that the forward pass spends on the padding of the vocabulary; the backward pass spends twice as many."""
    forward_bytes: int = 0
    """Least bytes moved: inputs read once, outputs written once."""
    backward_bytes: int = 0
    saved_bytes: int = 0
    """Bytes kept until its backward pass, without the weights; a tensor that two operations keep counts at the first."""
    cast_bytes: int = 0
    """Bytes of the weight's copy in the dtype of activations, saved unless products are in 8 bits, and of its gradient."""
    eight_bits: bool = False
    """Whether its products are in 8 bits."""
    forward_temporary: int = 0
    """Bytes alive while it runs that nothing keeps."""
    backward_temporary: int = 0
    """Bytes alive while its backward pass runs: gradients of activations, not of weights."""

    @property
    def flops(self) -> int:
        """FLOPs forward and backward, nothing recomputed."""
        return self.forward_flops + self.backward_flops

    @property
    def weights(self) -> int:
        """Weights that are held for it, padding included."""
        return self.parameters + self.padding


def costs(op: str, itemsize: int, **sizes: Any) -> tuple[Cost, Cost]:
    """Return the costs of a kernel's forward and backward pass, of an `itemsize` in bytes."""
    forward, backward, _ = ALL[op].cost(itemsize, **sizes)
    assert forward is not None
    assert backward is not None
    return forward, backward


class Step:
    """The sizes of one step, and the operations that are alike everywhere in it."""

    def __init__(self, config: ModelConfig, batch: int, context: int, policy: Policy, exact_causal: bool) -> None:
        self.config, self.batch, self.context, self.policy = config, batch, context, policy
        self.exact_causal = exact_causal
        self.rows, self.d, self.f, self.v = batch * context, config.d_model, config.d_ff, config.vocab_size
        self.q, self.e = config.q_width, config.kv_width
        self.held_v = config.padded_vocab_size if policy.vocabulary == "padded" else config.vocab_size
        self.a, self.w, self.s = ITEMSIZE[policy.dtype], ITEMSIZE[policy.weights], stream_itemsize(policy)
        self.fused, self.joined = policy.ops == "fused", policy.projections == "joined"
        self.stream = self.rows * self.d * self.s  # the residual stream, or its gradient, which lives beside every branch

    def product(
        self, name: str, group: str, layer: int | None, k: int, n: int, saved: int = 0, ends_branch: bool = False
    ) -> Operation:
        """y = x W^T; the backward pass is two products of the same size, dx = dy W and dW = dy^T x."""
        m, a = self.rows, self.a
        forward, moved = 2 * m * k * n, a * (m * k + k * n + m * n)
        # The copy of the weight lives until the backward pass has used it.
        cast = a * k * n if self.a != self.w else 0
        # The gradient of a branch is that of the stream, one tensor unless they differ in dtype or a norm stands between.
        ends_branch = ends_branch and self.config.norm != "sandwich"
        beside = layer is not None and not (ends_branch and self.a == self.s)
        temporary = a * m * (k + n) + (self.stream if beside else 0)
        if layer is not None and self.policy.eight_bits:
            there, back = costs("fp8_linear", a, rows=m, d_in=k, d_out=n)
            # Kept: x and W, transposed, and what undoes their scales. Each has another copy for the forward product, and dy
            # has two.
            scales = 8 * k if self.policy.compute == "fp8_rowwise" else 8
            return Operation(name, group, layer, (m, k, n), k * n, forward_flops=forward, backward_flops=2 * forward,
                             forward_bytes=there.bytes, backward_bytes=back.bytes,
                             saved_bytes=m * k + k * n + scales, cast_bytes=cast, eight_bits=True,
                             forward_temporary=m * k + k * n + cast, backward_temporary=temporary + 2 * m * n)  # fmt: skip
        return Operation(name, group, layer, (m, k, n), k * n, forward_flops=forward, backward_flops=2 * forward,
                         forward_bytes=moved, backward_bytes=2 * moved, saved_bytes=saved + cast, cast_bytes=cast,
                         backward_temporary=temporary)  # fmt: skip

    def bias(self, product: Operation) -> Operation:
        """The bias of a product, which adds it as it writes y, and keeps nothing for it: the gradient sums the rows of dy."""
        m, _, n = product.shape
        cast = self.a * n if self.a != self.w else 0
        return Operation(f"{product.name} bias", product.group, product.layer, (m, n), n, forward_bytes=self.a * n,
                         backward_bytes=self.a * (m * n + n), forward_temporary=cast,
                         backward_temporary=self.stream + self.a * m * n + cast)  # fmt: skip

    def gated_activation(self, layer: int, rows: int) -> Operation:
        """What is between the products of a feed-forward layer with a gate, of so many rows."""
        name, f = GATED[self.config.ffn], self.f
        forward, backward = costs(name, self.a, rows=rows, width=f)
        wide = self.a if self.fused else 4
        # Kept: gate and up; eager also the activation of the gate, in float32 all three.
        saved = rows * f * (2 * self.a if self.fused else 12)
        return Operation(name, "activation", layer, (rows, f), forward_bytes=forward.bytes, backward_bytes=backward.bytes,
                         saved_bytes=saved, backward_temporary=self.stream + 3 * wide * rows * f)  # fmt: skip

    def addition(self, name: str, layer: int | None) -> Operation:
        """The sum of the stream and a branch, whose gradient is that of both."""
        moved = self.stream * 2 + self.rows * self.d * self.a
        return Operation(name, "residual", layer, (self.rows, self.d), forward_bytes=moved)

    def norm(self, layer: int | None, name: str, adds: bool = False, of_branch: bool = False) -> list[Operation]:
        """The norm of the stream, to which it `adds` a branch first, or `of_branch` that of a branch.

        A weight that is an offset from one is added to it in registers, or in a vector that is not counted.
        """
        rows, d = self.rows, self.d
        itemsize = self.a if of_branch else self.s
        normed = itemsize * rows * d
        addition = self.addition(f"{name} add", layer)
        if self.config.norm_type == "layer_norm":
            forward, backward = costs("layer_norm", itemsize, rows=rows, width=d, bias=False)
            # Kept: what was normalised, its mean and 1 / standard deviation; eager in float32, the deviations from the mean,
            # those over the standard deviation, and 1 / that.
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
            # Kept: what was normalised and 1 / rms, 4 bytes a row. The gradient of a branch is that of the stream where they
            # have one dtype.
            beside = normed if of_branch and self.a != self.s else 0
            return [Operation(name, "norms", layer, (rows, d), d, forward_bytes=forward.bytes, backward_bytes=backward.bytes,
                              saved_bytes=normed + 4 * rows,
                              backward_temporary=self.stream + normed + beside)]  # fmt: skip
        # Kept in float32: x, x / rms and 1 / rms. The backward pass holds dy, the gradients of both factors and their sum.
        eager = Operation(name, "norms", layer, (rows, d), d, forward_bytes=norm[0].bytes, backward_bytes=norm[1].bytes,
                          saved_bytes=8 * rows * d + 4 * rows, forward_temporary=4 * rows * d,
                          backward_temporary=self.stream + 12 * rows * d)  # fmt: skip
        return [addition, eager] if adds else [eager]
