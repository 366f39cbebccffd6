"""The one list from which every other figure is a sum: each operation of a training step with its FLOPs and bytes.

FLOPs are those of matrix products, as `torch.utils.flop_counter` counts them: (m, k) x (k, n) costs 2 m k n. `B` batch,
`T` context, `D` d_model, `E` width of keys and of values, `F` d_ff, `V` vocabulary; rows are the B T tokens.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...errors import UserError
from ...kernels import costs
from ...kernels.linear_cross_entropy import chunk_shape
from ..config import ModelConfig

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Policy:
    """How a step is computed, as far as its bytes depend on it."""

    attention: Literal["naive", "flash"] = "flash"
    """naive: scores and probabilities (B, H, T, T) written out; flash: never held (Dao 2023)."""
    ops: Literal["eager", "fused"] = "fused"
    """eager: PyTorch's elementwise ops, in float32; fused: this project's kernels."""
    projections: Literal["separate", "joined"] = "joined"
    """Whether queries, keys and values come from three products or from one."""
    loss: Literal["whole", "chunked"] = "chunked"
    """whole: all logits at once; chunked: those of a few rows at a time, and the gradients with them where ops are fused."""
    checkpointing: Literal["none", "block"] = "none"
    """block: keep the inputs of each block, and run it again in the backward pass (Chen et al. 2016)."""
    compute: Dtype = "bfloat16"
    """Dtype of the matrix products; where the weights have another one, each step casts them (autocast)."""
    weights: Dtype = "float32"
    """Dtype of the weights, of their gradients and of the residual stream."""
    master_weights: bool = False
    """Whether the optimizer holds a float32 copy of the weights, for weights in half precision."""
    moments: Dtype = "float32"
    """Dtype of AdamW's two moments."""
    window: int | None = None
    """Keys that a query sees, its own and those before it; None sees all."""
    logit_chunk_bytes: int = 512 * 2**20
    """Bytes of logits that a chunked loss holds at once."""

    def __post_init__(self) -> None:
        for field in ("compute", "weights", "moments"):
            if getattr(self, field) not in ITEMSIZE:
                raise UserError(f"{field} is {getattr(self, field)!r}: choose one of {', '.join(ITEMSIZE)}")
        choices = {"attention": "naive flash", "ops": "eager fused", "projections": "separate joined", "loss": "whole chunked"}
        choices["checkpointing"] = "none block"
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed.split():
                raise UserError(f"{field} is {getattr(self, field)!r}: choose {allowed.replace(' ', ' or ')}")
        if self.window is not None and self.window < 1:
            raise UserError(f"window is {self.window}: it must be at least 1")


HANDOUT = Policy(attention="naive", ops="eager", projections="separate", loss="whole", compute="float32")
"""The CS336 model as its handout has one write it, in float32."""


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
    forward_flops: int = 0
    backward_flops: int = 0
    recomputed_flops: int = 0
    """FLOPs that the backward pass spends on computing again what was not saved."""
    forward_bytes: int = 0
    """Least bytes moved: inputs read once, outputs written once."""
    backward_bytes: int = 0
    saved_bytes: int = 0
    """Bytes kept until its backward pass, without the weights; a tensor that two operations keep counts at the first."""
    cast_bytes: int = 0
    """Bytes, of the saved ones, of autocast's copy of its weight."""
    forward_temporary: int = 0
    """Bytes alive while it runs that nothing keeps."""
    backward_temporary: int = 0
    """Bytes alive while its backward pass runs: gradients of activations, not of weights."""

    @property
    def flops(self) -> int:
        """FLOPs forward and backward, nothing recomputed."""
        return self.forward_flops + self.backward_flops


def attended_pairs(context: int, window: int | None = None, exact_causal: bool = False) -> int:
    """Return the pairs of query and key that one head computes: all T min(T, window), or only those that causality leaves.

    Exactly, query i of T sees min(i, window) keys: T (T + 1) / 2 without a window.
    """
    if exact_causal:
        return costs.attention_pairs(context, context, window=window)
    return context * (context if window is None else min(window, context))


def pad_vocabulary(config: ModelConfig, multiple: int) -> ModelConfig:
    """Return the shape with its vocabulary rounded up to a multiple, such as 50,304 for GPT-2's 50,257 and 64 or 128."""
    if multiple < 1:
        raise UserError(f"the vocabulary's multiple is {multiple}: it must be at least 1")
    return dataclasses.replace(config, vocab_size=-(-config.vocab_size // multiple) * multiple)


def logit_chunk(rows: int, vocab_size: int, itemsize: int, policy: Policy) -> tuple[int, int]:
    """Return the rows and columns of logits that a chunked loss holds at once."""
    if policy.ops == "fused":
        return chunk_shape(rows, vocab_size, itemsize, policy.logit_chunk_bytes)
    return min(rows, max(1, policy.logit_chunk_bytes // (itemsize * vocab_size))), vocab_size


class _Lister:
    """Makes the operations of one shape, batch, context and policy."""

    def __init__(self, config: ModelConfig, batch: int, context: int, policy: Policy, exact_causal: bool) -> None:
        self.config, self.batch, self.context, self.policy = config, batch, context, policy
        self.rows, self.d = batch * context, config.d_model
        self.e, self.f, self.v = config.head_dim * config.kv_heads, config.d_ff, config.vocab_size
        self.a, self.w = ITEMSIZE[policy.compute], ITEMSIZE[policy.weights]
        self.fused = policy.ops == "fused"
        self.pairs = batch * config.num_heads * attended_pairs(context, policy.window, exact_causal)
        self.stream = self.rows * self.d * self.w  # the residual stream, or its gradient, which lives beside every branch

    def product(self, name: str, group: str, layer: int | None, k: int, n: int, saved: int = 0, **rest) -> Operation:
        """y = x W^T; the backward pass is two products of the same size, dx = dy W and dW = dy^T x."""
        m, a = self.rows, self.a
        forward, moved = 2 * m * k * n, a * (m * k + k * n + m * n)
        # Autocast's copy of the weight lives until the backward pass has used it.
        cast = a * k * n if self.a != self.w else 0
        temporary = a * m * (k + n) + (self.stream if layer is not None else 0)
        fields = {"parameters": k * n, "saved_bytes": saved + cast, "cast_bytes": cast, "backward_temporary": temporary} | rest
        return Operation(name, group, layer, (m, k, n), forward_flops=forward, backward_flops=2 * forward,
                         forward_bytes=moved, backward_bytes=2 * moved, **fields)  # fmt: skip

    def norm(self, layer: int | None, name: str, adds: bool) -> list[Operation]:
        """RMSNorm of the stream; `adds` a branch to it first."""
        rows, d, w = self.rows, self.d, self.w
        norm, add = costs.rms_norm(rows, d, w), costs.add_rms_norm(rows, d, self.a, w)
        if self.fused:
            forward, backward = add if adds else norm
            # Kept: what was normalised (the stream itself) and 1 / rms, 4 bytes a row.
            return [Operation(name, "norms", layer, (rows, d), d, forward_bytes=forward.bytes, backward_bytes=backward.bytes,
                              saved_bytes=self.stream + 4 * rows, backward_temporary=2 * self.stream)]  # fmt: skip
        moved = self.stream * 2 + rows * d * self.a
        addition = Operation(f"{name} add", "residual", layer, (rows, d), forward_bytes=moved, backward_bytes=0)
        # Kept in float32: x, x / rms and 1 / rms. The backward pass holds dy, the gradients of both factors and their sum.
        eager = Operation(name, "norms", layer, (rows, d), d, forward_bytes=norm[0].bytes, backward_bytes=norm[1].bytes,
                          saved_bytes=8 * rows * d + 4 * rows, forward_temporary=4 * rows * d,
                          backward_temporary=self.stream + 12 * rows * d)  # fmt: skip
        return [addition, eager] if adds else [eager]

    def qkv(self, layer: int) -> Iterator[Operation]:
        """The projections to queries, keys and values, and the norms of the former two where the model has them."""
        a, rows, d, e, head_dim = self.a, self.rows, self.d, self.e, self.config.head_dim
        if self.policy.projections == "joined":
            yield self.product("qkv_proj", "projections", layer, d, d + 2 * e, saved=a * rows * d)
        else:
            # Under autocast the first norm's result has the dtype of the weights, and each product casts it anew; further
            # norms give theirs in the dtype of the branch that they add.
            again = a * rows * d if layer == 0 and a != self.w else 0
            yield self.product("q_proj", "projections", layer, d, d, saved=a * rows * d)
            yield self.product("k_proj", "projections", layer, d, e, saved=again)
            yield self.product("v_proj", "projections", layer, d, e, saved=again)
        if not self.config.qk_norm:
            return
        for name, width in (("q_norm", d), ("k_norm", e)):
            heads = rows * width // head_dim
            forward, backward = costs.rms_norm(heads, head_dim, a)
            # Kept: 1 / rms, and the packed projection, of which the values are a part; eager in float32 x / rms, and x
            # where it is not float32 already.
            saved = 4 * heads + (a * rows * (d + 2 * e) if name == "q_norm" else 0)
            if not self.fused:
                saved += 4 * rows * width * (1 if a == 4 else 2)
            yield Operation(name, "norms", layer, (heads, head_dim), head_dim, forward_bytes=forward.bytes,
                            backward_bytes=backward.bytes, saved_bytes=saved,
                            backward_temporary=self.stream + 2 * a * rows * (d + 2 * e))  # fmt: skip

    def attention(self, layer: int) -> list[Operation]:
        """softmax(q k^T / sqrt(K)) v. Keys and values of grouped heads are repeated where attention is naive."""
        a, rows, d, e, stream = self.a, self.rows, self.d, self.e, self.stream
        head_dim, heads = self.config.head_dim, self.config.num_heads
        shape = (self.batch, heads, self.context, head_dim)
        matmul = 2 * self.pairs * head_dim
        qkv = a * rows * (d + 2 * e)
        if self.policy.attention == "flash":
            lse = 4 * self.batch * heads * self.context
            # Values that were not copied out of the projection are kept with it.
            kept = qkv - a * rows * e if self.config.qk_norm else qkv
            pairs = self.pairs // (self.batch * heads)
            forward, backward = costs.attention(
                self.batch, heads, self.config.kv_heads, self.context, self.context, head_dim, pairs, a
            )
            # Of the five products of the backward pass, the first computes the scores again.
            return [Operation("attention", "attention", layer, shape, forward_flops=forward.flops, backward_flops=4 * matmul,
                              recomputed_flops=backward.flops - 4 * matmul, forward_bytes=forward.bytes,
                              backward_bytes=backward.bytes, saved_bytes=kept + a * rows * d + lse,
                              backward_temporary=stream + qkv + a * rows * d)]  # fmt: skip
        # The written-out form holds all T x T scores, whatever the window.
        square = a * self.batch * heads * self.context**2
        mask = self.context**2
        expanded = 3 * a * rows * d
        common: dict = {"group": "attention", "layer": layer, "shape": shape}
        return [
            Operation("scores", **common, forward_flops=matmul, backward_flops=2 * matmul, saved_bytes=2 * a * rows * d,
                      forward_bytes=2 * a * rows * d + square, backward_bytes=4 * a * rows * d + square,
                      forward_temporary=2 * square, backward_temporary=stream + square + expanded),
            Operation("mask and softmax", **common, forward_bytes=3 * square + mask, backward_bytes=3 * square + mask,
                      saved_bytes=mask + square, forward_temporary=2 * square,
                      backward_temporary=stream + 2 * square + a * rows * d),
            Operation("values", **common, forward_flops=matmul, backward_flops=2 * matmul, saved_bytes=a * rows * d,
                      forward_bytes=2 * a * rows * d + square, backward_bytes=3 * a * rows * d + 2 * square,
                      backward_temporary=stream + square + 2 * a * rows * d),
        ]  # fmt: skip

    def block(self, layer: int) -> Iterator[Operation]:
        """One Transformer block: attention, then feed-forward, each behind its norm."""
        a, rows, d, e, f = self.a, self.rows, self.d, self.e, self.f
        # In the eager model the branch of a block is added at its end, in this project by the norm that follows.
        yield from self.norm(layer, "ln1", adds=layer > 0)
        yield from self.qkv(layer)
        heads = self.config.num_heads + self.config.kv_heads
        rope, _ = costs.rope(self.context, heads, self.config.head_dim, a)
        # Only the model's tables of cos and sin are needed again.
        turned = 2 * a * rows * (d + e) + rope.bytes - 2 * a * self.context * heads * self.config.head_dim
        yield Operation("rope", "rope", layer, (rows, d + e), forward_bytes=turned, backward_bytes=turned,
                        backward_temporary=self.stream + 2 * a * rows * (d + e))  # fmt: skip
        yield from self.attention(layer)
        # Flash attention keeps its output itself; the projection's input is the same tensor.
        yield self.product("output_proj", "projections", layer, d, d,
                           saved=0 if self.policy.attention == "flash" else a * rows * d)  # fmt: skip
        yield from self.norm(layer, "ln2", adds=True)
        yield self.product("w1", "feed-forward", layer, d, f, saved=a * rows * d)
        yield self.product("w3", "feed-forward", layer, d, f)
        forward, backward = costs.swiglu(rows, f, a)
        wide = a if self.fused else 4
        # Kept: gate and up; eager also silu(gate), in float32 all three.
        yield Operation("swiglu", "swiglu", layer, (rows, f), forward_bytes=forward.bytes, backward_bytes=backward.bytes,
                        saved_bytes=rows * f * (2 * a if self.fused else 12),
                        backward_temporary=self.stream + 3 * wide * rows * f)  # fmt: skip
        yield self.product("w2", "feed-forward", layer, f, d, saved=a * rows * f)

    def loss(self) -> Iterator[Operation]:
        """The head and the cross-entropy of its logits."""
        a, rows, d, v = self.a, self.rows, self.d, self.v
        own = {"parameters": 0 if self.config.tie_embeddings else v * d}
        if self.policy.loss == "whole":
            yield self.product("head", "head", None, d, v, saved=a * rows * d, **own)
            forward, backward = costs.cross_entropy(rows, v, a)
            # Fused: the logits, their maximum and log-sum; eager: log-softmax in float32, the (unit) sum of class weights.
            # Both: the targets.
            kept, held = (a * rows * v + 8 * rows, a * rows * v) if self.fused else (4 * rows * v + 4, 8 * rows * v)
            # Backward: the loss itself, and the gradient of the logits; eager also that of log-softmax.
            yield Operation("cross_entropy", "loss", None, (rows, v), forward_bytes=forward.bytes,
                            backward_bytes=backward.bytes, saved_bytes=kept + 8 * rows,
                            forward_temporary=0 if self.fused else a * rows * v, backward_temporary=held + 4)  # fmt: skip
            return
        product = self.product("linear_cross_entropy", "head", None, d, v, **own)
        moved = costs.linear_cross_entropy(rows, d, v, a).bytes
        if self.fused:
            # The gradients of x, and in float32 of the weight, are computed beside the loss, chunk by chunk, and kept with x;
            # the backward pass scales them.
            kept = 2 * a * rows * d + 4 * v * d
            chunk_rows, columns = logit_chunk(rows, v, a, self.policy)
            temporary = {"forward_temporary": a * chunk_rows * columns, "backward_temporary": a * rows * d}
            again = 0
        else:
            # Each chunk is checkpointed: x and the targets are kept, the logits computed again.
            chunk_rows, _ = logit_chunk(rows, v, 4, self.policy)
            kept = a * rows * d + 8 * rows
            temporary = {"forward_temporary": 8 * chunk_rows * v, "backward_temporary": 12 * chunk_rows * v + a * rows * d}
            again = product.forward_flops
        cast = a * v * d if self.a != self.w and not self.fused else 0
        fields = {"recomputed_flops": again, "forward_bytes": moved, "backward_bytes": 0, "saved_bytes": kept + cast,
                  "cast_bytes": 0}  # fmt: skip
        yield dataclasses.replace(product, **fields, **temporary)

    def all(self) -> Iterator[Operation]:
        """The whole step, in the order of the forward pass."""
        rows, d, v = self.rows, self.d, self.v
        # Kept: the tokens, int64. The gradient of the table is as large as the table.
        yield Operation("embedding", "embedding", None, (rows, d), v * d, forward_bytes=2 * self.stream + 8 * rows,
                        backward_bytes=self.stream + self.w * v * d + 8 * rows, saved_bytes=8 * rows,
                        backward_temporary=self.stream)  # fmt: skip
        for layer in range(self.config.num_layers):
            yield from self.block(layer)
        yield from self.norm(None, "ln_final", adds=True)
        yield from self.loss()


def operations(
    config: ModelConfig,
    batch_size: int = 1,
    context_length: int | None = None,
    policy: Policy | None = None,
    exact_causal: bool = False,
) -> tuple[Operation, ...]:
    """Return the operations of a training step on `batch_size` sequences, in the order of the forward pass.

    Attention is counted in full, as if not causal, unless `exact_causal`. The list has every layer's operations.
    """
    context = config.context_length if context_length is None else context_length
    for name, value in (("batch_size", batch_size), ("context_length", context)):
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    return tuple(_Lister(config, batch_size, context, policy or Policy(), exact_causal).all())
