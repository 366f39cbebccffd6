"""Attention and RoPE inside the modules of transformers; importing this module registers attention and its mask by name.

Only a config that names this implementation uses it, so other models do not change.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ...errors import UserError
from ...kernels import attention, rope_qk
from .families import Family, modeling_file
from .masks import make_mask, packed_mask, parts_of_mask

NAME = "tilewright"


def attention_function(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with the interface of transformers: query (B, H, T, K), key, value (B, Hkv, S, K) -> (B, T, H, K).

    `attention_mask` comes from `make_mask`, or is a boolean or additive mask (B, 1, T, S) of the caller. A mask of the caller
    runs through the model's own eager attention.
    """
    if dropout > 0:
        raise UserError(f"attention_dropout is {dropout}: expected 0.0, or apply_to(..., attention=False)")
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        options: dict[str, Any] = {"scaling": scaling} if softcap is None else {"scaling": scaling, "softcap": softcap}
        added = _as_added(attention_mask, query.dtype)
        return modeling_file(module).eager_attention_forward(module, query, key, value, added, **options)
    documents, lengths, is_padding = parts_of_mask(attention_mask, query.shape[0], query.shape[2])
    # A window as long as the keys masks nothing.
    window = None if sliding_window is None or sliding_window >= key.shape[2] else sliding_window
    options = {"scale": scaling, "window": window, "softcap": softcap}
    o = attention(query, key, value, **options, document_ids=documents, cache_lengths=lengths)
    o = o.transpose(1, 2)
    # Return zeros for padding, as flash attention in transformers does, and PyTorch's for a query without keys.
    return o if is_padding is None else o.masked_fill(is_padding[:, :, None, None], 0.0), None


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    # Convert a boolean mask of the caller: False becomes the least score.
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise UserError(f"attention_mask of 4 dimensions is {mask.dtype}: expected torch.bool, or floating point to add")
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


AttentionInterface.register(NAME, attention_function)
AttentionMaskInterface.register(NAME, make_mask)


def attention_forward(
    module: Any,
    family: Family,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run a self-attention layer, (B, T, D) -> (B, T, D), with `rope_qk` and the attention that the config names.

    `position_embeddings` are cos and sin (B or 1, T, K) from the model's rotary module, each angle twice. This supports every
    RoPE type of transformers.
    """
    heads = (*hidden_states.shape[:-1], -1, module.head_dim)
    q, k, v = (project(hidden_states).view(heads) for project in (module.q_proj, module.k_proj, module.v_proj))
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = rope_qk(q, k, *tables_and_positions(*position_embeddings), layout="half")
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, module.layer_idx)
    options: dict[str, Any] = {"dropout": module.attention_dropout if module.training else 0.0, "scaling": module.scaling}
    if family.window != "none":
        options["sliding_window"] = module.sliding_window if family.window == "layer" else module.config.sliding_window
    if family.softcap:
        options["softcap"] = module.attn_logit_softcapping
    o, weights = chosen_attention(module)(module, q, k, v, attention_mask, **options, **kwargs)
    return module.o_proj(o.flatten(-2)), weights


def tables_and_positions(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Convert cos and sin (B or 1, T, R) to tables (positions, R / 2), and the row (B, T) of the tables for each token."""
    batch, num_tokens, rotary_dim = cos.shape
    cos, sin = (table[..., : rotary_dim // 2].flatten(0, 1) for table in (cos, sin))
    if batch == 1:
        return cos, sin, None
    return cos, sin, torch.arange(batch * num_tokens, device=cos.device).view(batch, num_tokens)


def chosen_attention(module: Any) -> Any:
    """Return the attention function that the config of `module` names."""
    name = module.config._attn_implementation
    return modeling_file(module).eager_attention_forward if name in (None, "eager") else AttentionInterface()[name]


def base_forward(
    module: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run the layers without the head, and mask packed sequences from each other.

    transformers does so only without a cache, and makes a cache by default.
    """
    if kwargs.get("output_attentions"):
        raise UserError("output_attentions is True: the kernels store no scores; use apply_to(..., attention=False)")
    if attention_mask is None:
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is not None:
            lengths = kwargs.get("cu_seq_lens_q")
            attention_mask = packed_mask(position_ids, lengths, past_key_values, tokens.shape[0], tokens.shape[1])
    return type(module).forward(
        module,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **kwargs,
    )
