"""The CS336 model as its handout has one write it, the accounting's subject: eager ops, attention written out."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tilewright.model import ModelConfig
from tilewright.model.transformer import rope_tables

Linear = partial(nn.Linear, bias=False)


class Norm(nn.Module):
    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, kv_width = config.d_model, config.head_dim * config.kv_heads
        self.config = config
        self.ln1, self.ln2 = Norm(d), Norm(d)
        self.q, self.k, self.v, self.o = Linear(d, d), Linear(d, kv_width), Linear(d, kv_width), Linear(d, d)
        self.w1, self.w3, self.w2 = Linear(d, config.d_ff), Linear(d, config.d_ff), Linear(config.d_ff, d)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projections = (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for p in projections)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = self.config.num_heads // self.config.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        tokens = x.shape[1]
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        scores = q @ k.mT / math.sqrt(self.config.head_dim)
        probabilities = torch.softmax(scores.masked_fill(later, -math.inf), dim=-1)
        return self.o((probabilities @ v).transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attend(self.ln1(x), cos, sin)
        h = self.ln2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class HandoutLM(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_final = Norm(config.d_model)
        self.head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            if self.checkpointing:
                x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, self.cos, self.sin)
        return self.head(self.ln_final(x))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())
