"""The Transformer language model: embedding, blocks, head and loss."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import kernels
from ..kernels import CrossEntropyOutput, Documents, documents, linear_cross_entropy
from .cache import KVCache, LayerCache
from .checkpointing import Checkpointing, num_checkpointed_blocks
from .config import ModelConfig
from .experts import MixtureOfExperts
from .layers import (
    GATED_ACTIVATIONS,
    CausalSelfAttention,
    Embedding,
    Head,
    LayerNorm,
    RMSNorm,
    make_feed_forward,
    make_norm,
)
from .sequence_parts import SequenceParts
from .sharded_weights import local

IGNORED_TARGET = -100
"""Target of a position that the loss leaves out."""


def rope_tables(config: ModelConfig, local: bool = False) -> tuple[Tensor, Tensor]:
    """Return the RoPE tables cos and sin, (context_length, R / 2) each, of the global layers or of the local ones."""
    theta, scaling = config.rope_theta, config.rope_scaling
    if local and config.local_rope_theta is not None:
        theta, scaling = config.local_rope_theta, None
    return kernels.rope_tables(config.head_width, config.context_length, theta, scaling, rotary_dim=config.rotary_dim)


def _feed_forward(config: ModelConfig) -> nn.Module:
    if config.num_experts is None:
        return make_feed_forward(config.ffn, config.d_model, config.d_ff)
    return MixtureOfExperts(
        config.d_model,
        config.d_ff,
        config.num_experts,
        config.experts_per_token,
        GATED_ACTIVATIONS[config.ffn],
        config.normalise_expert_weights,
    )


def _norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    return make_norm(config.norm_type, config.d_model, config.norm_eps, config.unit_offset_norms)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward; each is a branch that is added to the residual stream (B, T, D).

    With pre-norm the next norm's kernel also adds the branch to the stream. A block therefore takes the last branch of the
    block before it and returns its own last branch, not yet added. Sandwich norms normalize each branch first. With post-norm
    or without norms the returned branch is None. `output` runs a single block and adds its branch.

    `layer` is the index of the block, which selects a local or a global layer.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        normed, sandwich = config.norm != "none", config.norm == "sandwich"
        self.pre_norm = sandwich or config.norm == "pre"
        self.ln1 = _norm(config) if normed else None
        self.attn = CausalSelfAttention(
            config.d_model,
            config.num_heads,
            config.kv_heads,
            config.qk_norm,
            config.norm_eps,
            config.rope,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            unit_offset_norms=config.unit_offset_norms,
            window=config.window_of(layer),
            scale=config.attention_scale,
            softcap=config.attention_softcap,
        )
        self.ln1_post = _norm(config) if sandwich else None
        self.ln2 = _norm(config) if normed else None
        self.ffn = _feed_forward(config)
        self.ln2_post = _norm(config) if sandwich else None

    def forward(
        self,
        branch: Tensor | None,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None = None,
        packed: Documents | None = None,
        checkpointed: bool = False,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return (branch, residual, balance); balance is the `balance_loss` of the experts, or None without experts.

        The first block takes branch None. cos, sin (T, R / 2) are the RoPE tables of the positions. `checkpointed` saves only
        the inputs and recomputes the block in the backward pass.
        """
        inputs = (branch, residual, cos, sin, cache, packed)
        if checkpointed:
            # Inside the module, so that the hooks of the module, such as FSDP's all-gather, run once.
            return checkpoint(self._run, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self._run(*inputs)

    def output(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the residual stream (B, T, D) after this block alone; see `forward` for cos and sin."""
        branch, residual, _ = self(None, x, cos, sin)
        return residual if branch is None else residual + branch

    def _run(
        self,
        branch: Tensor | None,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None,
        packed: Documents | None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        if self.ln1 is None or self.ln2 is None:
            x = residual + self.attn(residual, cos, sin, cache, packed)
            branch, balance = self._feed_forward(x)
            return None, x + branch, balance
        if not self.pre_norm:
            x, _ = self.ln1.add(self.attn(residual, cos, sin, cache, packed), residual)
            branch, balance = self._feed_forward(x)
            return None, self.ln2.add(branch, x)[0], balance
        x, residual = (self.ln1(residual), residual) if branch is None else self.ln1.add(branch, residual)
        attended = self.attn(x, cos, sin, cache, packed)
        x, residual = self.ln2.add(attended if self.ln1_post is None else self.ln1_post(attended), residual)
        fed, balance = self._feed_forward(x)
        return fed if self.ln2_post is None else self.ln2_post(fed), residual, balance

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.ffn(x) if isinstance(self.ffn, MixtureOfExperts) else (self.ffn(x), None)


class TransformerLM(nn.Module):
    """A decoder-only language model: tokens (B, T) -> logits (B, T, V).

    The embedding and the head hold `config.padded_vocab_size` rows. Logits and losses cover only the V tokens.
    """

    compute_dtype: torch.dtype | None = None
    """Dtype of the residual stream and of the products; weights are cast to it on use. None: the dtype of the weights."""
    activation_checkpointing: Checkpointing = "none"
    """Blocks that save only their inputs in training and recompute the rest in the backward pass: "none", "block" (all blocks),
    or the number of first blocks."""

    parts: SequenceParts | None = None
    """The part of each sequence that this process holds, under context parallelism; tokens and targets are passed whole."""

    rope_cos: Tensor
    rope_sin: Tensor
    # None: local layers use the tables of the global ones.
    local_rope_cos: Tensor | None
    local_rope_sin: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        rows = config.padded_vocab_size
        self.token_embeddings = Embedding(config.vocab_size, config.d_model, rows)
        self.layers = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.num_layers))
        self.ln_final = _norm(config) if config.norm in ("pre", "sandwich") else None
        self.lm_head = None if config.tie_embeddings else Head(config.d_model, config.vocab_size, rows)
        for name in ("rope_cos", "rope_sin", "local_rope_cos", "local_rope_sin"):
            self.register_buffer(name, None, persistent=False)
        self.make_tables()

    def make_tables(self, device: torch.device | None = None) -> None:
        """Compute the RoPE tables on the CPU and move them to the device; state dicts do not hold them."""
        config = self.config
        self.rope_cos, self.rope_sin = (table.to(device=device) for table in rope_tables(config))
        if config.window is not None and config.local_rope_theta is not None:
            self.local_rope_cos, self.local_rope_sin = (table.to(device=device) for table in rope_tables(config, local=True))

    def share_tables(self, other: "TransformerLM") -> None:
        """Use the RoPE tables of another model with the same config."""
        self.rope_cos, self.rope_sin = other.rope_cos, other.rope_sin
        self.local_rope_cos, self.local_rope_sin = other.local_rope_cos, other.local_rope_sin

    @property
    def _padded_head_weight(self) -> Tensor:
        return local(self.token_embeddings.weight if self.lm_head is None else self.lm_head.weight)

    @property
    def head_weight(self) -> Tensor:
        """The output projection (V, D) without padding. Prefer `loss` in training: it needs no copy of the gradient."""
        return self._padded_head_weight[: self.config.vocab_size]

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Return the hidden states (B, T, D) after the final norm, for losses that never hold all logits.

        With a cache, `tokens` follow the cached tokens and are appended to the cache. `document_ids` (B, T), integers, restrict
        attention to runs of equal ids; they cannot be combined with a cache.
        """
        return self._hidden_states(tokens, cache, document_ids)[0]

    def _hidden_states(
        self, tokens: Tensor, cache: KVCache | None = None, document_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        # Also returns the sum of the layers' balance losses, or None without experts.
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if cache is not None and cache.lengths is not None:
            end = min(end, cache.max_length)
        if end > self.config.context_length:
            raise ValueError(
                f"the sequence has {end} tokens: expected at most the context length, {self.config.context_length}"
            )
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids and cache are both given: expected at most one of them")
        if cache is not None and cache.place(tokens.shape[1]):
            start = 0
        # Computed once for all layers and for their recomputation.
        parts = self.parts
        make_documents = documents if parts is None else parts.documents
        packed = None if document_ids is None else make_documents(document_ids)
        tables = local_tables = self.rope_cos[start:end], self.rope_sin[start:end]
        if self.local_rope_cos is not None and self.local_rope_sin is not None:
            local_tables = self.local_rope_cos[start:end], self.local_rope_sin[start:end]
        if parts is not None:
            tables, local_tables = (
                tuple(parts.in_attention(table, dim=0) for table in pair) for pair in (tables, local_tables)
            )
            tokens = parts.between_layers(tokens)
        branch, residual, balances = None, self._embed(tokens), []
        trains = self.training and torch.is_grad_enabled()
        checkpointed = 0 if not trains else num_checkpointed_blocks(self.activation_checkpointing, len(self.layers))
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            cos, sin = local_tables if self.config.is_local(i) else tables
            branch, residual, balance = layer(branch, residual, cos, sin, layer_cache, packed, i < checkpointed)
            balances.append(balance)
        total = None if self.config.num_experts is None else torch.stack(balances).sum()
        if self.ln_final is None:
            return residual, total
        assert branch is not None  # there is at least one layer
        return self.ln_final.add(branch, residual)[0], total

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded = self.token_embeddings(tokens)
        if self.compute_dtype is not None:
            embedded = embedded.to(self.compute_dtype)
        if not self.config.scale_embeddings:
            return embedded
        # Gemma rounds the factor to the dtype of the stream first.
        return embedded * torch.full((), math.sqrt(self.config.d_model), dtype=embedded.dtype, device=embedded.device)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) of the next token at each position."""
        return self.logits(self.hidden_states(tokens, cache, document_ids))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of the next token from hidden states (..., D)."""
        logits = F.linear(hidden, self._padded_head_weight.to(hidden.dtype))[..., : self.config.vocab_size]
        softcap = self.config.logit_softcap
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        document_ids: Tensor | None = None,
        z_loss: float = 0.0,
        router_loss: float = 0.0,
        by_sequence: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the summed cross-entropy of targets (B, T) in nats, without holding all logits (`linear_cross_entropy`).

        Each target that is not ignored adds `router_loss` times the sum of the layers' `balance_loss`. `by_sequence` also
        returns the cross-entropy of each sequence, (B,) float32, without a gradient. With `parts` the sums cover the positions
        of this process.
        """
        hidden, balance = self._hidden_states(tokens, document_ids=document_ids)
        if self.parts is not None:
            targets = self.parts.between_layers(targets)
        loss = linear_cross_entropy(
            hidden,
            self._padded_head_weight,
            targets,
            z_loss=z_loss,
            softcap=self.config.logit_softcap,
            reduction="sum",
            num_classes=self.config.vocab_size,
            return_lse=by_sequence,
        )
        loss, lse = (loss.loss, loss.lse) if isinstance(loss, CrossEntropyOutput) else (loss, None)
        if balance is not None and router_loss:
            loss = loss + router_loss * balance * (targets != IGNORED_TARGET).sum()
        return loss if lse is None else (loss, self._sequence_losses(hidden, targets, lse))

    @torch.no_grad()
    def _sequence_losses(self, hidden: Tensor, targets: Tensor, lse: Tensor) -> Tensor:
        # Only the logits of the targets are computed.
        weights = self._padded_head_weight.to(hidden.dtype)[targets.clamp(min=0)]
        logits = (hidden.float() * weights.float()).sum(dim=-1)
        softcap = self.config.logit_softcap
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return (lse - logits).masked_fill(targets == IGNORED_TARGET, 0.0).sum(dim=1)

    def cast(self, dtype: torch.dtype) -> "TransformerLM":
        """Return a model for inference with its matrices in `dtype`; results equal `compute_dtype` without casts on use.

        Norms and RoPE tables are shared with this model. Returns this model if the matrices have the dtype already.
        """
        if self.token_embeddings.weight.dtype == dtype and self.compute_dtype in (None, dtype):
            return self
        with torch.device("meta"):
            cast = TransformerLM(self.config)
        weights = {name: t.to(dtype) if t.dim() > 1 else t for name, t in self.state_dict().items()}
        cast.load_state_dict(weights, assign=True)
        cast.share_tables(self)
        return cast.requires_grad_(False).train(self.training)
