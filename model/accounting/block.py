"""Operations of a Transformer block; `operation` defines the letters."""

import dataclasses
from collections.abc import Iterator

from ...kernels.attention.record import attention_pairs
from ..config import ModelConfig
from .experts import mixture
from .operation import GATED, Operation, Step, costs


def attended_pairs(context: int, window: int | None = None, exact_causal: bool = False) -> int:
    """Return the number of query-key pairs that one head computes: T min(T, window), or the causal pairs if `exact_causal`.

    Under an exact causal count, query i of T sees min(i, window) keys: T (T + 1) / 2 pairs without a window.
    """
    if exact_causal:
        return attention_pairs(context, context, window=window)
    return context * (context if window is None else min(window, context))


def reach(config: ModelConfig, layer: int, tokens: int, window: int | None = None) -> int:
    """Return how many of `tokens` keys the last query of a layer sees; `window` overrides the window of the layer."""
    return min(tokens, window or config.window_of(layer) or tokens)


def block(step: Step, layer: int) -> Iterator[Operation]:
    """Yield the operations of one Transformer block: attention, then feed-forward, each with its norms."""
    form = step.config.norm
    for name, branch in (("ln1", _attention_branch), ("ln2", _feed_forward)):
        # The eager model adds a branch at the end of the block; this project adds it in the next norm.
        if form in ("pre", "sandwich"):
            yield from step.norm(layer, name, adds=layer > 0 or name == "ln2")
        yield from branch(step, layer)
        if form == "sandwich":
            yield from step.norm(layer, f"{name}_post", of_branch=True)
        elif form == "post":
            yield from step.norm(layer, name, adds=True)
        elif form == "none":
            yield step.addition(f"add of {'attention' if name == 'ln1' else 'feed-forward'}", layer)


def checkpointed_block(step: Step, layer: int) -> Iterator[Operation]:
    """Yield a checkpointed block: mark the operations that the backward pass runs again.

    Recomputation stops before the last product, unless a later operation saves tensors.
    """
    ops = list(block(step, layer))
    last_product = max(i for i, op in enumerate(ops) if op.forward_flops)
    # A product in 8 bits saves its own quantized operands, so it runs again too.
    end = last_product + step.policy.eight_bits
    end = len(ops) if any(op.saved_bytes for op in ops[last_product + 1 :]) else end
    yield from (dataclasses.replace(op, runs_again=True) for op in ops[:end])
    yield from ops[end:]


def _attention_branch(step: Step, layer: int) -> Iterator[Operation]:
    """Yield attention and the projections around it."""
    a, rows, q, e, config = step.a, step.rows, step.q, step.e, step.config
    yield from _qkv(step, layer)
    if config.rope:
        # All channels are read and written, rotated or not. Only the float32 cos and sin tables are saved, by the model.
        moved = 2 * a * rows * (q + e) + 4 * step.context * (config.rotary_dim or config.head_width)
        # Gradients in and out. The kernel also copies the gradients of the values if it splits the joint projection.
        values = a * rows * e * (2 if step.joined and not config.qk_norm else 1)
        yield Operation("rope", "rope", layer, (rows, q + e), forward_bytes=moved, backward_bytes=moved,
                        backward_temporary=step.stream + 2 * a * rows * (q + e) + values)  # fmt: skip
    yield from _attention(step, layer)
    # Flash attention saves its output; the input of the projection is the same tensor.
    saved = 0 if step.policy.attention == "flash" else a * rows * q
    yield step.product("output_proj", "projections", layer, q, step.d, saved, ends_branch=True)


def _qkv(step: Step, layer: int) -> Iterator[Operation]:
    """Yield the projections to queries, keys and values, and the norms of queries and keys if the model has them."""
    a, rows, d, q, e, config = step.a, step.rows, step.d, step.q, step.e, step.config
    if step.joined:
        parts = (("qkv_proj", q + 2 * e, a * rows * d),)
    else:
        # Under autocast the first norm returns the dtype of the weights, and each product casts that tensor again. Later
        # norms return the dtype of the branch that they add.
        recast = a * rows * d if layer == 0 and a != step.s else 0
        parts = (("q_proj", q, a * rows * d), ("k_proj", e, recast), ("v_proj", e, recast))
    for name, width, saved in parts:
        product = step.product(name, "projections", layer, d, width, saved)
        yield product
        if config.qkv_bias:
            yield step.bias(product)
    if not config.qk_norm:
        return
    for name, width in (("q_norm", q), ("k_norm", e)):
        heads = rows * width // config.head_width
        forward, backward = costs("rms_norm", a, rows=heads, width=config.head_width)
        # Saved: 1 / rms and the projection, together with the values if it is joint. Eager ops also save x / rms in float32,
        # and x in float32 unless it already is.
        packed = a * rows * (q + 2 * e) if name == "q_norm" else 0
        saved = 4 * heads + (packed if step.joined else a * rows * width)
        if not step.fused:
            saved += 4 * rows * width * (1 if a == 4 else 2)
        yield Operation(name, "norms", layer, (heads, config.head_width), config.head_width, forward_bytes=forward.bytes,
                        backward_bytes=backward.bytes, saved_bytes=saved,
                        backward_temporary=step.stream + 2 * a * rows * (q + 2 * e))  # fmt: skip


def _attention(step: Step, layer: int) -> list[Operation]:
    """Return softmax(scale q k^T) v. Naive attention repeats the keys and values of grouped heads."""
    a, rows, q, e, stream, batch, config = step.a, step.rows, step.q, step.e, step.stream, step.batch, step.config
    head_dim, heads = config.head_width, config.num_heads
    shape = (batch, heads, step.context, head_dim)
    seen = reach(config, layer, step.context, step.policy.window)
    pairs = attended_pairs(step.context, seen, step.exact_causal)
    matmul = 2 * batch * heads * pairs * head_dim
    qkv = a * rows * (q + 2 * e)
    if step.policy.attention == "flash":
        lse = 4 * batch * heads * step.context
        # Values that are a view of the projection are saved with it when the norms of q and k save it. Scores are capped and
        # masked in registers.
        kept = qkv - a * rows * e if config.qk_norm and step.joined else qkv
        forward, backward = costs(
            "attention", a, batch=batch, num_heads=heads, num_kv_heads=config.kv_heads, num_queries=step.context,
            num_keys=step.context, head_dim=head_dim, pairs=pairs,
        )  # fmt: skip
        # The backward pass has five products; the first recomputes the scores.
        return [Operation("attention", "attention", layer, shape, forward_flops=forward.flops, backward_flops=4 * matmul,
                          recomputed_flops=backward.flops - 4 * matmul, forward_bytes=forward.bytes,
                          backward_bytes=backward.bytes, saved_bytes=kept + a * rows * q + lse,
                          backward_temporary=stream + qkv + a * rows * q)]  # fmt: skip
    # Naive attention materializes all T x T scores, whatever the window.
    square = a * batch * heads * step.context**2
    mask = step.context**2
    expanded = 3 * a * rows * q
    common: dict = {"group": "attention", "layer": layer, "shape": shape}
    scores = Operation("scores", **common, forward_flops=matmul, backward_flops=2 * matmul, saved_bytes=2 * a * rows * q,
                       forward_bytes=2 * a * rows * q + square, backward_bytes=4 * a * rows * q + square,
                       forward_temporary=2 * square, backward_temporary=stream + square + expanded)  # fmt: skip
    # Saved: the tanh, from which its derivative follows.
    softcap = Operation("softcap", **common, forward_bytes=2 * square, backward_bytes=3 * square, saved_bytes=square,
                        forward_temporary=2 * square, backward_temporary=stream + 2 * square)  # fmt: skip
    softmax = Operation("mask and softmax", **common, forward_bytes=3 * square + mask, backward_bytes=3 * square + mask,
                        saved_bytes=mask + square, forward_temporary=2 * square,
                        backward_temporary=stream + 2 * square + a * rows * q)  # fmt: skip
    values = Operation("values", **common, forward_flops=matmul, backward_flops=2 * matmul, saved_bytes=a * rows * q,
                       forward_bytes=2 * a * rows * q + square, backward_bytes=3 * a * rows * q + 2 * square,
                       backward_temporary=stream + square + 2 * a * rows * q)  # fmt: skip
    return [scores, *([] if config.attention_softcap is None else [softcap]), softmax, values]


def _feed_forward(step: Step, layer: int) -> Iterator[Operation]:
    """Yield the feed-forward layer (one or two products, the activation, the down projection) or a mixture of experts."""
    if step.config.num_experts is not None:
        yield from mixture(step, layer)
        return
    a, rows, d, f, kind = step.a, step.rows, step.d, step.f, step.config.ffn
    gated = kind in GATED
    if step.joined:
        name, width = ("gate_up_proj", 2 * f) if gated else ("up_proj", f)
        yield step.product(name, "feed-forward", layer, d, width, saved=a * rows * d)
    else:
        yield step.product("w1", "feed-forward", layer, d, f, saved=a * rows * d)
        if gated:
            yield step.product("w3", "feed-forward", layer, d, f)
    if gated:
        yield step.gated_activation(layer, rows)
    elif kind == "silu":
        # PyTorch's own op: it saves its input; the backward pass reads the input and dy and writes dx.
        inner = a * rows * f
        yield Operation("silu", "activation", layer, (rows, f), forward_bytes=2 * inner, backward_bytes=3 * inner,
                        saved_bytes=inner, backward_temporary=step.stream + 2 * inner)  # fmt: skip
    else:
        raise ValueError(f"ffn is {kind!r}: choose {', '.join(GATED)} or silu")
    yield step.product("down_proj" if step.joined else "w2", "feed-forward", layer, f, d, a * rows * f, ends_branch=True)
