"""The CS336 model as its handout has one write it, and its ablations: eager ops, attention written out.

The accounting's subject, and what this project's model must equal.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tilewright.model import ModelConfig, TransformerLM
from tilewright.model.checkpointing import Checkpointing, num_checkpointed_blocks
from tilewright.model.transformer import rope_tables

Linear = partial(nn.Linear, bias=False)


ACTIVATIONS = {
    "swiglu": F.silu, "silu": F.silu, "geglu_tanh": partial(F.gelu, approximate="tanh"), "geglu_erf": F.gelu,
}  # fmt: skip


class Norm(nn.Module):
    def __init__(self, d_model: int, centred: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.centred = centred

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-5) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, kv_width = config.d_model, config.head_dim * config.kv_heads
        self.config = config
        if config.norm != "none":
            self.ln1, self.ln2 = (Norm(d, config.norm_type == "layer_norm") for _ in range(2))
        if config.qk_norm:
            self.q_norm, self.k_norm = Norm(config.head_dim), Norm(config.head_dim)
        self.q, self.k, self.v, self.o = Linear(d, d), Linear(d, kv_width), Linear(d, kv_width), Linear(d, d)
        self.w1, self.w2 = Linear(d, config.d_ff), Linear(config.d_ff, d)
        if config.ffn != "silu":
            self.w3 = Linear(d, config.d_ff)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projections = (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for p in projections)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = self.config.num_heads // self.config.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        tokens = x.shape[1]
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        scores = q @ k.mT / math.sqrt(self.config.head_dim)
        probabilities = torch.softmax(scores.masked_fill(later, -math.inf), dim=-1)
        return self.o((probabilities @ v).transpose(1, 2).flatten(-2))

    def feed(self, x: Tensor) -> Tensor:
        gate = ACTIVATIONS[self.config.ffn](self.w1(x))
        return self.w2(gate if self.config.ffn == "silu" else gate * self.w3(x))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.config.norm == "none":
            x = x + self.attend(x, cos, sin)
            return x + self.feed(x)
        if self.config.norm == "post":
            x = self.ln1(x + self.attend(x, cos, sin))
            return self.ln2(x + self.feed(x))
        x = x + self.attend(self.ln1(x), cos, sin)
        return x + self.feed(self.ln2(x))


class HandoutLM(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, checkpointing: Checkpointing = "none") -> None:
        super().__init__()
        self.checkpointed = num_checkpointed_blocks(checkpointing, config.num_layers)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_final = Norm(config.d_model, config.norm_type == "layer_norm") if config.norm == "pre" else nn.Identity()
        self.head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for i, layer in enumerate(self.layers):
            if i < self.checkpointed:
                x = checkpoint(layer, x, self.cos, self.sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, self.cos, self.sin)
        return self.head(self.ln_final(x))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


def handout_weights(model: TransformerLM) -> dict[str, Tensor]:
    """The state dict that gives a `HandoutLM` the weights of this project's model, without what pads its vocabulary."""
    config, ours = model.config, model.state_dict()
    kv_width = config.head_dim * config.kv_heads
    weights = {"embedding.weight": ours["token_embeddings.weight"][: config.vocab_size]}
    weights["head.weight"] = model.head_weight.detach()
    if config.norm == "pre":
        weights["ln_final.weight"] = ours["ln_final.weight"]
    parts = {
        "attn.qkv_proj": (("q", "k", "v"), (config.d_model, kv_width, kv_width)),
        "ffn.gate_up_proj": (("w1", "w3"), (config.d_ff, config.d_ff)),
    }
    names = {"attn.output_proj": "o", "ffn.down_proj": "w2", "ffn.up_proj": "w1"}
    names |= {"attn.q_norm": "q_norm", "attn.k_norm": "k_norm", "ln1": "ln1", "ln2": "ln2"}
    for name, tensor in ours.items():
        if not name.startswith("layers."):
            continue
        _, layer, part = name.removesuffix(".weight").split(".", 2)
        theirs, sizes = parts.get(part) or ((names[part],), (tensor.shape[0],))
        for their, piece in zip(theirs, tensor.split(sizes), strict=True):
            weights[f"layers.{layer}.{their}.weight"] = piece
    return weights
