"""The CS336 model as the handout defines it, and its ablations: eager ops, explicit attention.

The accounting tests measure this model, and the project's model must match it.
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
    def __init__(self, width: int, config: ModelConfig, centred: bool = False) -> None:
        super().__init__()
        self.offset = int(config.unit_offset_norms)
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.offset))
        self.eps, self.centred = config.norm_eps, centred

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        weight = self.weight + self.offset if self.offset else self.weight
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, rest = x.tensor_split([2 * cos.shape[-1]], dim=-1)
    first, second = rotated.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    return torch.cat((rotated, rest), dim=-1) if rest.numel() else rotated


def capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.ffn
        self.w1, self.w2 = Linear(config.d_model, config.d_ff), Linear(config.d_ff, config.d_model)
        if config.ffn != "silu":
            self.w3 = Linear(config.d_model, config.d_ff)

    def forward(self, x: Tensor) -> Tensor:
        gate = ACTIVATIONS[self.kind](self.w1(x))
        return self.w2(gate if self.kind == "silu" else gate * self.w3(x))


class Mixture(nn.Module):
    """Mixture of experts that runs every expert on every token, with weight 0 for the experts that are not chosen."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Linear(config.d_model, config.num_experts)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        probabilities = torch.softmax(self.router(x), dim=-1)
        least = probabilities.sort(dim=-1, descending=True).values[..., self.config.experts_per_token - 1, None]
        weights = torch.where(probabilities >= least, probabilities, 0.0)
        if self.config.normalise_expert_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (outputs * weights[..., None, :]).sum(dim=-1)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d, bias = config.d_model, config.qkv_bias
        self.config, self.window = config, config.window_of(layer)
        names = {"none": (), "sandwich": ("ln1", "ln1_post", "ln2", "ln2_post")}.get(config.norm, ("ln1", "ln2"))
        for name in names:
            self.add_module(name, Norm(d, config, config.norm_type == "layer_norm"))
        if config.qk_norm:
            self.q_norm, self.k_norm = Norm(config.head_width, config), Norm(config.head_width, config)
        self.q = nn.Linear(d, config.q_width, bias)
        self.k, self.v = nn.Linear(d, config.kv_width, bias), nn.Linear(d, config.kv_width, bias)
        self.o = Linear(config.q_width, d)
        self.feed = FeedForward(config) if config.num_experts is None else Mixture(config)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projections = (self.q(x), self.k(x), self.v(x))
        q, k, v = (p.unflatten(-1, (-1, self.config.head_width)).transpose(1, 2) for p in projections)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rope:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = self.config.num_heads // self.config.kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        tokens = x.shape[1]
        unseen = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
        if self.window is not None:
            unseen |= torch.ones_like(unseen).tril(-self.window)
        scale = self.config.attention_scale or 1 / math.sqrt(self.config.head_width)
        scores = capped(q @ k.mT * scale, self.config.attention_softcap)
        probabilities = torch.softmax(scores.masked_fill(unseen, -math.inf), dim=-1)
        return self.o((probabilities @ v).transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.config.norm == "none":
            x = x + self.attend(x, cos, sin)
            return x + self.feed(x)
        if self.config.norm == "post":
            x = self.ln1(x + self.attend(x, cos, sin))
            return self.ln2(x + self.feed(x))
        branch = self.attend(self.ln1(x), cos, sin)
        x = x + (self.ln1_post(branch) if self.config.norm == "sandwich" else branch)
        branch = self.feed(self.ln2(x))
        return x + (self.ln2_post(branch) if self.config.norm == "sandwich" else branch)


class HandoutLM(nn.Module):
    def __init__(self, config: ModelConfig, checkpointing: Checkpointing = "none") -> None:
        super().__init__()
        self.config = config
        self.checkpointed = num_checkpointed_blocks(checkpointing, config.num_layers)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        normed = config.norm in ("pre", "sandwich")
        self.ln_final = Norm(config.d_model, config, config.norm_type == "layer_norm") if normed else nn.Identity()
        self.head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        tables = rope_tables(config)
        local = rope_tables(config, local=True) if config.local_rope_theta else tables
        for name, table in zip(("cos", "sin", "local_cos", "local_sin"), (*tables, *local), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.config.scale_embeddings:
            x = x * torch.full((), math.sqrt(self.config.d_model), dtype=x.dtype, device=x.device)
        for i, layer in enumerate(self.layers):
            tables = (self.local_cos, self.local_sin) if self.config.is_local(i) else (self.cos, self.sin)
            if i < self.checkpointed:
                x = checkpoint(layer, x, *tables, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, *tables)
        return capped(self.head(self.ln_final(x)), self.config.logit_softcap)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


def handout_weights(model: TransformerLM) -> dict[str, Tensor]:
    """Return the state dict of a `HandoutLM` with the weights of this project's model, without vocabulary padding."""
    config, ours = model.config, model.state_dict()
    weights = {"embedding.weight": ours["token_embeddings.weight"][: config.vocab_size]}
    weights["head.weight"] = model.head_weight.detach()
    if "ln_final.weight" in ours:
        weights["ln_final.weight"] = ours["ln_final.weight"]
    parts = {
        "attn.qkv_proj": (("q", "k", "v"), (config.q_width, config.kv_width, config.kv_width)),
        "ffn.gate_up_proj": (("feed.w1", "feed.w3"), (config.d_ff, config.d_ff)),
    }
    names = {"attn.output_proj": "o", "ffn.down_proj": "feed.w2", "ffn.up_proj": "feed.w1"}
    names |= {"ffn.router": "feed.router", "attn.q_norm": "q_norm", "attn.k_norm": "k_norm"}
    for name, tensor in ours.items():
        if not name.startswith("layers."):
            continue
        path, kind = name.rsplit(".", 1)
        _, layer, part = path.split(".", 2)
        theirs, sizes = parts.get(part) or ((names.get(part, part),), (tensor.shape[-2 if tensor.dim() == 3 else 0],))
        # The handout model stores one matrix per expert.
        matrices = {f"feed.experts.{i}": matrix for i, matrix in enumerate(tensor)} if tensor.dim() == 3 else {"feed": tensor}
        for prefix, matrix in matrices.items():
            for their, piece in zip(theirs, matrix.split(sizes), strict=True):
                weights[f"layers.{layer}.{their.replace('feed', prefix, 1)}.{kind}"] = piece
    return weights
