"""The one list from which every other figure is a sum: each operation of a training step with its FLOPs and bytes.

FLOPs are those of matrix products, as `torch.utils.flop_counter` counts them: (m, k) x (k, n) costs 2 m k n. `B` batch,
`T` context, `D` d_model, `E` width of keys and of values, `F` d_ff, `V` vocabulary; rows are the B T tokens.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from ...kernels.attention.record import attention_pairs
from ...kernels.linear_cross_entropy import chunk_shape
from ...kernels.op import ALL, Cost
from ..checkpointing import num_checkpointed_blocks
from ..config import ModelConfig
from .policy import ITEMSIZE, Policy, stream_itemsize


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
    """Bytes, of the saved ones, of the weight's copy in the dtype of the products."""
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


# The op that each feed-forward layer with a gate applies between its products.
GATED = {"swiglu": "swiglu", "geglu_tanh": "geglu", "geglu_erf": "geglu"}


def _costs(op: str, itemsize: int, **sizes: Any) -> tuple[Cost, Cost]:
    forward, backward, _ = ALL[op].cost(itemsize, **sizes)
    assert forward is not None
    assert backward is not None
    return forward, backward


def attended_pairs(context: int, window: int | None = None, exact_causal: bool = False) -> int:
    """Return the pairs of query and key that one head computes: all T min(T, window), or only those that causality leaves.

    Exactly, query i of T sees min(i, window) keys: T (T + 1) / 2 without a window.
    """
    if exact_causal:
        return attention_pairs(context, context, window=window)
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
        self.held_v = config.padded_vocab_size if policy.vocabulary == "padded" else config.vocab_size
        self.a, self.w, self.s = ITEMSIZE[policy.compute], ITEMSIZE[policy.weights], stream_itemsize(policy)
        self.fused = policy.ops == "fused"
        self.pairs = batch * config.num_heads * attended_pairs(context, policy.window, exact_causal)
        self.stream = self.rows * self.d * self.s  # the residual stream, or its gradient, which lives beside every branch

    def product(
        self, name: str, group: str, layer: int | None, k: int, n: int, saved: int = 0, ends_branch: bool = False
    ) -> Operation:
        """y = x W^T; the backward pass is two products of the same size, dx = dy W and dW = dy^T x."""
        m, a = self.rows, self.a
        forward, moved = 2 * m * k * n, a * (m * k + k * n + m * n)
        # The copy of the weight lives until the backward pass has used it.
        cast = a * k * n if self.a != self.w else 0
        # The gradient of a branch is that of the stream, one tensor unless they differ in dtype.
        beside = layer is not None and not (ends_branch and self.a == self.s)
        temporary = a * m * (k + n) + (self.stream if beside else 0)
        return Operation(name, group, layer, (m, k, n), k * n, forward_flops=forward, backward_flops=2 * forward,
                         forward_bytes=moved, backward_bytes=2 * moved, saved_bytes=saved + cast, cast_bytes=cast,
                         backward_temporary=temporary)  # fmt: skip

    def addition(self, name: str, layer: int | None) -> Operation:
        """The sum of the stream and a branch, whose gradient is that of both."""
        moved = self.stream * 2 + self.rows * self.d * self.a
        return Operation(name, "residual", layer, (self.rows, self.d), forward_bytes=moved)

    def norm(self, layer: int | None, name: str, adds: bool) -> list[Operation]:
        """The norm of the stream; `adds` a branch to it first."""
        rows, d, s = self.rows, self.d, self.s
        addition = self.addition(f"{name} add", layer)
        if self.config.norm_type == "layer_norm":
            forward, backward = _costs("layer_norm", s, rows=rows, width=d, bias=False)
            # Kept: what was normalised, its mean and 1 / standard deviation; eager in float32, the deviations from the mean,
            # those over the standard deviation, and 1 / that.
            kept = self.stream + 8 * rows if self.fused else 8 * rows * d + 4 * rows
            held = self.stream if self.fused else 12 * rows * d
            norm = Operation(name, "norms", layer, (rows, d), d, forward_bytes=forward.bytes, backward_bytes=backward.bytes,
                             saved_bytes=kept, forward_temporary=0 if self.fused else 4 * rows * d,
                             backward_temporary=self.stream + held)  # fmt: skip
            return [addition, norm] if adds else [norm]
        norm, add = (
            _costs("rms_norm", s, rows=rows, width=d),
            _costs("add_rms_norm", self.a, rows=rows, width=d, residual_itemsize=s),
        )
        if self.fused:
            forward, backward = add if adds else norm
            # Kept: what was normalised (the stream itself) and 1 / rms, 4 bytes a row.
            return [Operation(name, "norms", layer, (rows, d), d, forward_bytes=forward.bytes, backward_bytes=backward.bytes,
                              saved_bytes=self.stream + 4 * rows, backward_temporary=2 * self.stream)]  # fmt: skip
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
            again = a * rows * d if layer == 0 and a != self.s else 0
            yield self.product("q_proj", "projections", layer, d, d, saved=a * rows * d)
            yield self.product("k_proj", "projections", layer, d, e, saved=again)
            yield self.product("v_proj", "projections", layer, d, e, saved=again)
        if not self.config.qk_norm:
            return
        for name, width in (("q_norm", d), ("k_norm", e)):
            heads = rows * width // head_dim
            forward, backward = _costs("rms_norm", a, rows=heads, width=head_dim)
            # Kept: 1 / rms, and the projection, if joined with the values in it; eager in float32 x / rms, and x where it
            # is not float32 already.
            packed = a * rows * (d + 2 * e) if name == "q_norm" else 0
            saved = 4 * heads + (packed if self.policy.projections == "joined" else a * rows * width)
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
            # Values that were not copied out of the projection are kept with it, where the norms of q and k keep it.
            kept = qkv - a * rows * e if self.config.qk_norm and self.policy.projections == "joined" else qkv
            pairs = self.pairs // (self.batch * heads)
            forward, backward = _costs(
                "attention", a, batch=self.batch, num_heads=heads, num_kv_heads=self.config.kv_heads, num_queries=self.context,
                num_keys=self.context, head_dim=head_dim, pairs=pairs,
            )  # fmt: skip
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
        """One Transformer block: attention, then feed-forward, each with its norm."""
        for name, branch in (("ln1", self.attention_branch), ("ln2", self.feed_forward)):
            # In the eager model the branch of a block is added at its end, in this project by the norm that follows.
            if self.config.norm == "pre":
                yield from self.norm(layer, name, adds=layer > 0 or name == "ln2")
            yield from branch(layer)
            if self.config.norm == "post":
                yield from self.norm(layer, name, adds=True)
            elif self.config.norm == "none":
                yield self.addition(f"add of {'attention' if name == 'ln1' else 'feed-forward'}", layer)

    def attention_branch(self, layer: int) -> Iterator[Operation]:
        """Attention with the projections around it."""
        a, rows, d, e = self.a, self.rows, self.d, self.e
        yield from self.qkv(layer)
        if self.config.rope:
            heads = self.config.num_heads + self.config.kv_heads
            sizes = {"num_tokens": self.context, "num_heads": heads, "num_kv_heads": 0, "head_dim": self.config.head_dim}
            rope, _ = _costs("rope", a, batch=1, **sizes)
            # Only the model's tables of cos and sin are needed again.
            turned = 2 * a * rows * (d + e) + rope.bytes - 2 * a * self.context * heads * self.config.head_dim
            yield Operation("rope", "rope", layer, (rows, d + e), forward_bytes=turned, backward_bytes=turned,
                            backward_temporary=self.stream + 2 * a * rows * (d + e))  # fmt: skip
        yield from self.attention(layer)
        # Flash attention keeps its output itself; the projection's input is the same tensor.
        saved = 0 if self.policy.attention == "flash" else a * rows * d
        yield self.product("output_proj", "projections", layer, d, d, saved, ends_branch=True)

    def feed_forward(self, layer: int) -> Iterator[Operation]:
        """The feed-forward layer: one or two products, the activation, and a product back."""
        a, rows, d, f = self.a, self.rows, self.d, self.f
        joined, gated = self.policy.projections == "joined", self.config.ffn in GATED
        if joined:
            name, width = ("gate_up_proj", 2 * f) if gated else ("up_proj", f)
            yield self.product(name, "feed-forward", layer, d, width, saved=a * rows * d)
        else:
            yield self.product("w1", "feed-forward", layer, d, f, saved=a * rows * d)
            if gated:
                yield self.product("w3", "feed-forward", layer, d, f)
        if gated:
            op = GATED[self.config.ffn]
            forward, backward = _costs(op, a, rows=rows, width=f)
            wide = a if self.fused else 4
            # Kept: gate and up; eager also the activation of the gate, in float32 all three.
            saved = rows * f * (2 * a if self.fused else 12)
            yield Operation(op, "activation", layer, (rows, f), forward_bytes=forward.bytes,
                            backward_bytes=backward.bytes, saved_bytes=saved,
                            backward_temporary=self.stream + 3 * wide * rows * f)  # fmt: skip
        elif self.config.ffn == "silu":
            # PyTorch's own op: it keeps its input, and reads that and dy to write dx.
            inner = a * rows * f
            yield Operation("silu", "activation", layer, (rows, f), forward_bytes=2 * inner, backward_bytes=3 * inner,
                            saved_bytes=inner, backward_temporary=self.stream + 2 * inner)  # fmt: skip
        else:
            raise ValueError(f"ffn is {self.config.ffn!r}: choose {', '.join(GATED)} or silu")
        yield self.product("down_proj" if joined else "w2", "feed-forward", layer, f, d, a * rows * f, ends_branch=True)

    def checkpointed_block(self, layer: int) -> Iterator[Operation]:
        """A block, run again as far as something in it is kept: not its last product, unless a norm follows."""
        ops = list(self.block(layer))
        last_product = max(i for i, op in enumerate(ops) if op.forward_flops)
        end = len(ops) if self.config.norm == "post" else last_product
        yield from (dataclasses.replace(op, runs_again=True) for op in ops[:end])
        yield from ops[end:]

    def head(self, name: str, saved: int = 0) -> Operation:
        """The product to the logits; `shape` has the padded vocabulary where that is what is computed."""
        rows, d, v = self.rows, self.d, self.v
        added = self.held_v - v
        padding_flops = 2 * rows * d * added
        product = self.product(name, "head", None, d, self.held_v, saved)
        own = {"parameters": 0, "padding": 0} if self.config.tie_embeddings else {"parameters": v * d, "padding": added * d}
        flops = {"forward_flops": product.forward_flops - padding_flops, "padding_flops": padding_flops,
                 "backward_flops": product.backward_flops - 2 * padding_flops}  # fmt: skip
        return dataclasses.replace(product, **own, **flops)

    def loss(self) -> Iterator[Operation]:
        """The head and the cross-entropy of its logits."""
        a, rows, d, v, held_v = self.a, self.rows, self.d, self.v, self.held_v
        if self.policy.loss == "whole":
            yield self.head("head", saved=a * rows * d)
            if held_v != v:
                # The logits of the vocabulary are a view; their gradient is copied into one of all rows.
                copied = a * rows * (v + held_v)
                yield Operation("cut", "head", None, (rows, v), backward_bytes=copied, backward_temporary=copied)
            forward, backward = _costs("cross_entropy", a, rows=rows, vocab_size=v)
            # Fused: the logits, their maximum and log-sum; eager: log-softmax in float32, the (unit) sum of class weights.
            # Both: the targets.
            kept = a * rows * held_v + 8 * rows if self.fused else 4 * rows * v + 4
            # Backward: the loss itself, and the gradient of the logits; eager also that of log-softmax.
            held = a * rows * v if self.fused else 8 * rows * v
            yield Operation("cross_entropy", "loss", None, (rows, v), forward_bytes=forward.bytes,
                            backward_bytes=backward.bytes, saved_bytes=kept + 8 * rows,
                            forward_temporary=0 if self.fused else a * rows * held_v, backward_temporary=held + 4)  # fmt: skip
            return
        product = self.head("linear_cross_entropy")
        moved = ALL["linear_cross_entropy"].cost(a, rows=rows, d_model=d, vocab_size=held_v).both.bytes
        cast = a * held_v * d if self.a != self.w else 0
        if self.fused:
            # The gradients of x, and in float32 of the weight, are computed beside the loss, chunk by chunk, and kept with x;
            # the backward pass scales them.
            kept, again = 2 * a * rows * d + 4 * held_v * d, 0
            chunk_rows, columns = logit_chunk(rows, held_v, a, self.policy)
            temporary = {"forward_temporary": a * chunk_rows * columns + cast, "backward_temporary": a * rows * d}
        else:
            # Each chunk is checkpointed: x, the weight and the targets are kept, the logits computed again.
            kept, again = a * rows * d + cast + 8 * rows, product.forward_flops + product.padding_flops
            chunk_rows, _ = logit_chunk(rows, held_v, 4, self.policy)
            temporary = {"forward_temporary": 8 * chunk_rows * held_v,
                         "backward_temporary": 12 * chunk_rows * held_v + a * rows * d}  # fmt: skip
        yield dataclasses.replace(product, recomputed_flops=again, forward_bytes=moved, backward_bytes=0, saved_bytes=kept,
                                  cast_bytes=0, **temporary)  # fmt: skip

    def all(self) -> Iterator[Operation]:
        """The whole step, in the order of the forward pass."""
        rows, d, v, w = self.rows, self.d, self.v, self.w
        # Rows are looked up in the dtype of the weights, and their gradient is summed in it.
        looked_up = w * rows * d
        cast = looked_up if self.s != w else 0
        # Kept: the tokens, int64. The gradient of the table is as large as the table.
        yield Operation("embedding", "embedding", None, (rows, d), v * d, (self.held_v - v) * d,
                        forward_bytes=looked_up + self.stream + 8 * rows + cast,
                        backward_bytes=self.stream + w * self.held_v * d + 8 * rows + cast, saved_bytes=8 * rows,
                        forward_temporary=cast, backward_temporary=looked_up)  # fmt: skip
        checkpointed = num_checkpointed_blocks(self.policy.checkpointing, self.config.num_layers)
        for layer in range(self.config.num_layers):
            yield from self.checkpointed_block(layer) if layer < checkpointed else self.block(layer)
        if self.config.norm == "pre":
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
