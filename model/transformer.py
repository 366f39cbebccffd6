"""The Transformer language model, top to bottom."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import kernels
from ..kernels import Documents, documents, linear_cross_entropy
from .checkpointing import Checkpointing, num_checkpointed_blocks
from .config import ModelConfig
from .layers import CausalSelfAttention, Embedding, Head, LayerCache, Places, make_feed_forward, make_norm


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angle of every position and channel pair, (context_length, K / 2)."""
    return kernels.rope_tables(config.head_dim, config.context_length, config.rope_theta)


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each a branch that is added to the residual stream (B, T, D).

    With pre-norm a branch is added by the norm that comes after it, in the same kernel: a block takes the branch of the
    block before and hands its own to the next. With post-norm, and without norms, it hands on no branch.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        normed = config.norm != "none"
        self.pre_norm = config.norm == "pre"
        self.ln1 = make_norm(config.norm_type, config.d_model, config.norm_eps) if normed else None
        self.attn = CausalSelfAttention(
            config.d_model, config.num_heads, config.kv_heads, config.qk_norm, config.norm_eps, config.rope
        )
        self.ln2 = make_norm(config.norm_type, config.d_model, config.norm_eps) if normed else None
        self.ffn = make_feed_forward(config.ffn, config.d_model, config.d_ff)

    def forward(
        self,
        branch: Tensor | None,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None = None,
        packed: Documents | None = None,
        checkpointed: bool = False,
    ) -> tuple[Tensor | None, Tensor]:
        """Return (branch, residual) after the block; `branch` None begins. cos, sin (T, K / 2) are the positions' angles.

        `checkpointed`: keep only the inputs, and run again in the backward pass.
        """
        inputs = (branch, residual, cos, sin, cache, packed)
        if checkpointed:
            # Inside the module, so that its hooks, such as those that gather a shard, run once.
            return checkpoint(self._run, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self._run(*inputs)

    def _run(
        self,
        branch: Tensor | None,
        residual: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None,
        packed: Documents | None,
    ) -> tuple[Tensor | None, Tensor]:
        if self.ln1 is None or self.ln2 is None:
            x = residual + self.attn(residual, cos, sin, cache, packed)
            return None, x + self.ffn(x)
        if not self.pre_norm:
            x, _ = self.ln1.add(self.attn(residual, cos, sin, cache, packed), residual)
            return None, self.ln2.add(self.ffn(x), x)[0]
        x, residual = (self.ln1(residual), residual) if branch is None else self.ln1.add(branch, residual)
        x, residual = self.ln2.add(self.attn(x, cos, sin, cache, packed), residual)
        return self.ffn(x), residual


class KVCache:
    """The keys and values of every layer for up to `max_length` tokens of `batch_size` sequences, of unequal length too."""

    lengths: Tensor | None = None
    """(B) int64: tokens of each sequence, where they may differ."""

    def __init__(self, model: "TransformerLM", batch_size: int, max_length: int) -> None:
        config, weight = model.config, model.token_embeddings.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.compute_dtype or weight.dtype
        self.max_length = max_length
        shape = (batch_size, config.kv_heads, max_length, config.head_dim)
        self.layers = [LayerCache(shape, dtype, weight.device) for _ in range(config.num_layers)]

    @property
    def length(self) -> int:
        """Tokens seen so far, by the longest sequence."""
        return self.layers[0].length

    def keep(self, lengths: Sequence[int]) -> None:
        """Keep the first lengths[b] tokens of sequence b, of which the others were padding; new ones come after these.

        From then on a sequence that is full overwrites its last token instead of raising an error, so that others can go on.
        """
        if max(lengths) > self.length or min(lengths) < 0:
            raise ValueError(f"lengths are {list(lengths)}: allowed is 0 to {self.length}, the tokens seen so far")
        self.lengths = torch.tensor(lengths, device=self.layers[0].k.device)
        for layer in self.layers:
            layer.length = max(lengths)

    def place(self, num_tokens: int) -> bool:
        """Say to each layer where the next tokens stand; return whether that differs between sequences."""
        if self.lengths is None:
            return False
        positions = self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)
        positions = positions.clamp(max=self.max_length - 1)
        self.lengths = positions[:, -1] + 1
        places = Places(positions, self.lengths.to(torch.int32))
        for layer in self.layers:
            layer.places = places
        return True


class TransformerLM(nn.Module):
    """A decoder-only language model: tokens (B, T) -> logits (B, T, V).

    Embedding and head hold `config.padded_vocab_size` rows; logits, and the loss of them, are of the V tokens only.
    """

    compute_dtype: torch.dtype | None = None
    """Dtype of the residual stream and of the matrix products, to which the weights are cast as they are used; None: theirs."""
    activation_checkpointing: Checkpointing = "none"
    """Blocks that in training keep only their inputs, and run again in the backward pass: none, every block, or a number of
    them from the first on."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        rows = config.padded_vocab_size
        self.token_embeddings = Embedding(config.vocab_size, config.d_model, rows)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        pre = config.norm == "pre"
        self.ln_final = make_norm(config.norm_type, config.d_model, config.norm_eps) if pre else None
        self.lm_head = None if config.tie_embeddings else Head(config.d_model, config.vocab_size, rows)
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    @property
    def _padded_head_weight(self) -> Tensor:
        return self.token_embeddings.weight if self.lm_head is None else self.lm_head.weight

    @property
    def head_weight(self) -> Tensor:
        """The weight (V, D) that turns hidden states into logits, without padding. `loss` spares a copy of its gradient."""
        return self._padded_head_weight[: self.config.vocab_size]

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Return the (normalised) hidden states (B, T, D), for losses that never hold all logits.

        With a cache, `tokens` follow those that it holds, and are added to it. `document_ids` (B, T) integers confine
        attention to documents, runs of equal ids; not with a cache.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if cache is not None and cache.lengths is not None:
            end = min(end, cache.max_length)
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens are longer than the context: allowed are {self.config.context_length}")
        if cache is not None and document_ids is not None:
            raise ValueError("document_ids are given beside a cache: allowed is one of the two")
        if cache is not None and cache.place(tokens.shape[1]):
            start = 0
        # Once for all layers, and for those that run again in the backward pass.
        packed = None if document_ids is None else documents(document_ids)
        cos, sin = self.rope_cos[start:end], self.rope_sin[start:end]
        branch, residual = None, self.token_embeddings(tokens)
        if self.compute_dtype is not None:
            residual = residual.to(self.compute_dtype)
        kept_whole = not (self.training and torch.is_grad_enabled())
        checkpointed = 0 if kept_whole else num_checkpointed_blocks(self.activation_checkpointing, len(self.layers))
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            branch, residual = layer(branch, residual, cos, sin, layer_cache, packed, i < checkpointed)
        if self.ln_final is None:
            return residual
        assert branch is not None  # there is at least one layer
        return self.ln_final.add(branch, residual)[0]

    def forward(self, tokens: Tensor, cache: KVCache | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V) of the token after each position."""
        return self.logits(self.hidden_states(tokens, cache, document_ids))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of the token after each position, of its hidden states (..., D)."""
        return F.linear(hidden, self._padded_head_weight.to(hidden.dtype))[..., : self.config.vocab_size]

    def loss(self, tokens: Tensor, targets: Tensor, document_ids: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
        """Return the summed cross-entropy in nats of targets (B, T), all logits never held; see `linear_cross_entropy`."""
        hidden = self.hidden_states(tokens, document_ids=document_ids)
        return linear_cross_entropy(
            hidden, self._padded_head_weight, targets, z_loss=z_loss, reduction="sum", num_classes=self.config.vocab_size
        )

    def cast(self, dtype: torch.dtype) -> "TransformerLM":
        """Return a model for inference with the matrices in `dtype`: it computes what `compute_dtype` does, without casts.

        Norms and tables are shared with this model; where nothing would differ it is this model.
        """
        if self.token_embeddings.weight.dtype == dtype and self.compute_dtype in (None, dtype):
            return self
        with torch.device("meta"):
            cast = TransformerLM(self.config)
        weights = {name: t.to(dtype) if t.dim() > 1 else t for name, t in self.state_dict().items()}
        cast.load_state_dict(weights, assign=True)
        cast.rope_cos, cast.rope_sin = self.rope_cos, self.rope_sin
        return cast.requires_grad_(False).train(self.training)
