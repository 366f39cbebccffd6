"""The Transformer language model, top to bottom."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .layers import CausalSelfAttention, Embedding, LayerCache, Linear, RMSNorm, SwiGLU


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angle of every position and channel pair, (context_length, K / 2) (Su et al. 2021, eq. 15)."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each behind its norm and added to the residual stream (B, T, D).

    A branch is added by the norm that comes after it, in the same kernel: a block takes the branch of the block before
    and hands its own to the next.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln1 = RMSNorm(config.d_model, config.norm_eps)
        self.attn = CausalSelfAttention(config.d_model, config.num_heads, config.kv_heads, config.qk_norm, config.norm_eps)
        self.ln2 = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(config.d_model, config.d_ff)

    def forward(
        self, branch: Tensor | None, residual: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (branch, residual) after the block; `branch` None begins. cos, sin (T, K / 2) are the positions' angles."""
        x, residual = (self.ln1(residual), residual) if branch is None else self.ln1.add(branch, residual)
        x, residual = self.ln2.add(self.attn(x, cos, sin, cache), residual)
        return self.ffn(x), residual


class KVCache:
    """The keys and values of every layer for up to `max_length` tokens of `batch_size` sequences."""

    def __init__(self, model: "TransformerLM", batch_size: int, max_length: int) -> None:
        config, weight = model.config, model.token_embeddings.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        shape = (batch_size, config.kv_heads, max_length, config.head_dim)
        self.layers = [LayerCache(shape, dtype, weight.device) for _ in range(config.num_layers)]

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.layers[0].length


class TransformerLM(nn.Module):
    """A decoder-only language model: tokens (B, T) -> logits (B, T, V)."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embeddings = Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.num_layers))
        self.ln_final = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size)
        cos, sin = rope_tables(config)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """The weight (V, D) that turns hidden states into logits."""
        return self.token_embeddings.weight if self.lm_head is None else self.lm_head.weight

    def hidden_states(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the normalised hidden states (B, T, D), for losses that never hold all logits.

        With a cache, `tokens` follow those that it holds, and are added to it.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens are longer than the context: allowed are {self.config.context_length}")
        cos, sin = self.rope_cos[start:end], self.rope_sin[start:end]
        branch, residual = None, self.token_embeddings(tokens)
        for i, layer in enumerate(self.layers):
            branch, residual = layer(branch, residual, cos, sin, None if cache is None else cache.layers[i])
        assert branch is not None  # there is at least one layer
        return self.ln_final.add(branch, residual)[0]

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the logits (B, T, V) of the token after each position."""
        return F.linear(self.hidden_states(tokens, cache), self.head_weight)
