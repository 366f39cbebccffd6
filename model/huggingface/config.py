"""Conversion between `config.json` and `ModelConfig`."""

import json
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..config import ModelConfig
from .document import Document, read_document
from .families import FAMILIES, Family, canonical, unknown_family
from .rope import read_rope, rope_document

CONFIG_FILE = "config.json"
"""Name of the configuration file in a folder: `config.json`."""
_LAYER_TYPES = {"sliding_attention": "L", "full_attention": "G"}
# Multimodal model types, and the family of their language model.
_MULTIMODAL = {"gemma3": "gemma3_text"}


def _read_document(folder: Path) -> Document:
    return read_document(Path(folder) / CONFIG_FILE, "the model's configuration")


def _read_family(folder: Path) -> tuple[Family, Document]:
    # Return the fields of the language model, with the defaults of its family.
    document = _read_document(folder)
    document.only("quantization_config")
    kind = document.values.get("model_type")
    if isinstance(kind, str) and kind in _MULTIMODAL:
        kind = _MULTIMODAL[kind]
        document = document.object("text_config")
        document.only("quantization_config")
        document.only("model_type", kind)
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(f"{document.path} has {unknown_family(kind)}")
    # An explicit null overrides the default: a null softcap means none.
    return family, Document(document.path, {**family.defaults, **document.values})


def is_huggingface_folder(folder: Path) -> bool:
    """Return whether the folder's `config.json` describes a Hugging Face model, not a training run."""
    try:
        return "model_type" in json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError, TypeError):
        return False


def family_of_folder(folder: Path) -> str:
    """Return the name of the family of the model in a folder; raise `UserError` if the family is unknown."""
    return _read_family(folder)[0].model_type


def has_images(folder: Path) -> bool:
    """Return whether the folder holds a multimodal model that contains the language model."""
    return _read_document(folder).values.get("model_type") in _MULTIMODAL


def read_config(folder: Path) -> ModelConfig:
    """Return the shape in the `config.json` of a folder.

    An unknown family or an unsupported value is a `UserError` that names the field.
    """
    family, document = _read_family(folder)
    for name, value in family.fixed.items():
        document.only(name, value)
    heads, layers = document.integer("num_attention_heads"), document.integer("num_hidden_layers")
    kv_heads = document.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise document.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    context_length = document.integer("max_position_embeddings")
    theta, local_theta, scaling = read_rope(document, context_length)
    window, pattern = _windows(family, document, layers)
    fields = {
        "vocab_size": document.integer("vocab_size"),
        "context_length": context_length,
        "d_model": document.integer("hidden_size"),
        "num_layers": layers,
        "num_heads": heads,
        "d_ff": document.integer("intermediate_size"),
        "num_kv_heads": kv_heads,
        "head_dim": document.integer("head_dim", None),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": document.number("rms_norm_eps", 1e-6),
        "tie_embeddings": document.boolean("tie_word_embeddings", False),
        "window": window,
        "window_pattern": pattern,
        "local_rope_theta": local_theta if window is not None and "local_rope_theta" in family.optional else None,
        **_gemma_fields(family, document),
        **_expert_fields(family, document),
        **family.shape,
    }
    try:
        return canonical(ModelConfig(**fields))
    except UserError as error:
        raise UserError(f"{document.path}: {error}") from error


def _gemma_fields(family: Family, document: Document) -> dict[str, Any]:
    if not family.is_gemma:
        return {}
    fields = {
        "attention_scale": document.number("query_pre_attn_scalar") ** -0.5,
        "logit_softcap": document.number("final_logit_softcapping", None),
    }
    if "attention_softcap" in family.optional:
        fields["attention_softcap"] = document.number("attn_logit_softcapping", None)
    return fields


def _expert_fields(family: Family, document: Document) -> dict[str, Any]:
    if not family.is_mixture:
        return {}
    fields = {
        # Mixtral publishes num_local_experts and Qwen 3 num_experts; transformers can write the former for both.
        "num_experts": document.integer("num_local_experts", None) or document.integer("num_experts"),
        "experts_per_token": document.integer("num_experts_per_tok"),
    }
    if "normalise_expert_weights" in family.optional:
        fields["normalise_expert_weights"] = document.boolean("norm_topk_prob", False)
        fields["d_ff"] = document.integer("moe_intermediate_size")
    return fields


def _windows(family: Family, document: Document, num_layers: int) -> tuple[int | None, str]:
    # Return the window of local layers, and a letter for each layer.
    used = family.windows != "none" and (family.windows != "last" or document.boolean("use_sliding_window", False))
    window = document.integer("sliding_window", None) if used else None
    if window is None:
        return None, "L"
    listed = document.values.get("layer_types")
    if listed is not None:
        known = isinstance(listed, list) and len(listed) == num_layers
        if not known or not all(isinstance(each, str) and each in _LAYER_TYPES for each in listed):
            raise document.error("layer_types", f"a list of {' or '.join(_LAYER_TYPES)} for each of {num_layers} layers")
        # transformers loads a Mistral config that lists its layers as a Ministral.
        if family.windows == "all" and len(set(listed)) > 1:
            raise document.error("layer_types", f"one kind for all layers with model_type {family.model_type}")
        return window, "".join(_LAYER_TYPES[each] for each in listed)
    if family.windows == "last":
        first = document.values.get("max_window_layers")
        if type(first) is not int or first < 0:
            raise document.error("max_window_layers", "a whole number, at least 0")
        return window, ("G" * first)[:num_layers] + "L" * (num_layers - first)
    period = {"all": None, "alternating": 2, "pattern": document.integer("sliding_window_pattern", 6)}[family.windows]
    return window, "".join("G" if period and not (i + 1) % period else "L" for i in range(num_layers))


def config_document(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the fields of `config.json` for a model of the family."""
    config = canonical(config)
    document: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.d_ff,
        **family.fixed,
        **rope_document(config),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if family.windows != "none":
        document["sliding_window"] = config.window
    if family.windows == "last":
        document["use_sliding_window"] = config.window is not None
        local_layers = [layer for layer in range(config.num_layers) if config.is_local(layer)]
        document["max_window_layers"] = min(local_layers, default=config.num_layers)
    if "window_pattern" in family.optional:
        kinds = {letter: name for name, letter in _LAYER_TYPES.items()}
        document["layer_types"] = [kinds["L" if config.is_local(layer) else "G"] for layer in range(config.num_layers)]
    if family.is_mixture:
        of_qwen = "normalise_expert_weights" in family.optional
        document["num_experts" if of_qwen else "num_local_experts"] = config.num_experts
        document["num_experts_per_tok"] = config.experts_per_token
        if of_qwen:
            document["norm_topk_prob"] = config.normalise_expert_weights
            document["moe_intermediate_size"] = config.d_ff
    if family.is_gemma:
        # transformers builds the mask of local layers even if there are none.
        document["sliding_window"] = config.window or config.context_length
        scale = config.attention_scale
        document["query_pre_attn_scalar"] = config.head_width if scale is None else round(scale**-2)
        document["final_logit_softcapping"] = config.logit_softcap
    if "attention_softcap" in family.optional:
        document["attn_logit_softcapping"] = config.attention_softcap
    if "local_rope_theta" in family.optional:
        document["rope_local_base_freq"] = config.local_rope_theta or config.rope_theta
    return document


def dumped(document: dict[str, Any]) -> str:
    """Return the fields as JSON text."""
    return json.dumps(document, indent=2) + "\n"
