"""Models in Llama's format: a folder of `config.json` and safetensors that `transformers` and most servers read.

Both formats hold the same tensors; ours joins the products of one input and lays RoPE's pairs side by side.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files import atomic_folder, require_absent, require_file
from .config import ModelConfig
from .transformer import TransformerLM

CONFIG_FILE = "config.json"
_WEIGHTS, _INDEX, _GENERATION = "model.safetensors", "model.safetensors.index.json", "generation_config.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What other families have that our blocks lack.
_OTHERS = {
    "gpt2": "learned positions, LayerNorm, biases and GELU",
    "gpt_neox": "LayerNorm, biases, GELU and RoPE on a part of each head",
    "mixtral": "experts",
    "qwen2": "biases on the queries, keys and values",
    "gemma": "GELU, scaled embeddings and norms of 1 + weight",
}


def _llama_views(model: TransformerLM, vocab_size: int) -> dict[str, Tensor]:
    """Return every tensor of the format as a view of our parameters: (..., D), in Llama's order once `_flat`."""
    config, of = model.config, model.get_parameter
    kv_width = config.kv_heads * config.head_dim

    def halves(rows: Tensor) -> Tensor:
        # Row 2i of a head is i of Llama's, row 2i + 1 is i + K / 2 (its `rotate_half`).
        return rows.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2)

    views = {"model.embed_tokens.weight": of("token_embeddings.weight")[:vocab_size]}
    for i in range(config.num_layers):
        ours, llama = f"layers.{i}", f"model.layers.{i}"
        q, k, v = of(f"{ours}.attn.qkv_proj.weight").split([config.d_model, kv_width, kv_width])
        gate, up = of(f"{ours}.ffn.gate_up_proj.weight").chunk(2)
        views |= {
            f"{llama}.input_layernorm.weight": of(f"{ours}.ln1.weight"),
            f"{llama}.self_attn.q_proj.weight": halves(q),
            f"{llama}.self_attn.k_proj.weight": halves(k),
            f"{llama}.self_attn.v_proj.weight": v,
            f"{llama}.self_attn.o_proj.weight": of(f"{ours}.attn.output_proj.weight"),
            f"{llama}.post_attention_layernorm.weight": of(f"{ours}.ln2.weight"),
            f"{llama}.mlp.gate_proj.weight": gate,
            f"{llama}.mlp.up_proj.weight": up,
            f"{llama}.mlp.down_proj.weight": of(f"{ours}.ffn.down_proj.weight"),
        }
    views["model.norm.weight"] = of("ln_final.weight")
    if not config.tie_embeddings:
        views["lm_head.weight"] = of("lm_head.weight")[:vocab_size]
    return views


def _flat(view: Tensor) -> Tensor:
    return view.flatten(0, max(0, view.ndim - 2))


def check_exportable(config: ModelConfig) -> None:
    """Raise a `UserError` that names what Llama's format cannot hold of `config`."""
    for name, allowed in {"norm": "pre", "norm_type": "rms_norm", "rope": True, "ffn": "swiglu", "qk_norm": False}.items():
        value = getattr(config, name)
        if value != allowed:
            raise UserError(f"the model has {name} {value}: Llama's format only holds {name} {allowed}")


def write_llama(
    model: TransformerLM,
    folder: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    vocab_size: int | None = None,
    end_of_text_id: int | None = None,
) -> None:
    """Write `model` in Llama's format into the folder, which exists.

    `vocab_size` leaves out the tokens from there on, such as those that a tokenizer does not know. `end_of_text_id` begins
    and ends texts. A model that the format cannot hold is a `UserError`.
    """
    config = model.config
    check_exportable(config)
    size = config.vocab_size if vocab_size is None else vocab_size
    if not 1 <= size <= config.vocab_size:
        raise ValueError(f"vocab_size is {size}: it must be between 1 and the model's, {config.vocab_size}")
    document = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "torch_dtype": dtype,
    }
    tokens = {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id, "pad_token_id": end_of_text_id}
    for name, content in ((CONFIG_FILE, document), (_GENERATION, tokens)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    views = _llama_views(model, size)
    tensors = {name: _flat(view.detach()).to("cpu", getattr(torch, dtype)).contiguous() for name, view in views.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def save_llama(
    model: TransformerLM, folder: Path, dtype: Literal["float32", "bfloat16"] = "float32", end_of_text_id: int | None = None
) -> None:
    """Write `model` as a new folder in Llama's format, whole or not at all; see `write_llama`."""
    check_exportable(model.config)
    with atomic_folder(require_absent(folder, "remove it or name another folder")) as temporary:
        write_llama(model, temporary, dtype=dtype, end_of_text_id=end_of_text_id)


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        document = json.loads(require_file(path, what).read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} holds a {type(document).__name__}: it must be a JSON object")
    return document


def _number(document: dict[str, Any], path: Path, name: str, kind: type, default: float | None = None) -> Any:
    """Return a number above 0: an int, or where `kind` is float, a float."""
    value: Any = document.get(name)
    value = default if value is None else value
    fits = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not fits or not 0 < value < math.inf:
        allowed = "a whole number, at least 1" if kind is int else "a finite number above 0"
        raise UserError(f"{path} has {name} {json.dumps(value)}: it must be {allowed}")
    return kind(value)


def _allow(path: Path, name: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        shown, only = json.dumps(value), json.dumps(allowed[0])
        raise UserError(f"{path} has {name} {shown}, which our blocks lack: only {only} can be read")


def _rope_theta(document: dict[str, Any], path: Path) -> float:
    rope = {"rope_theta": document.get("rope_theta"), "partial_rotary_factor": document.get("partial_rotary_factor")}
    # Of two spellings, transformers 5 has the second.
    for name in ("rope_scaling", "rope_parameters"):
        part = document.get(name) or {}
        if not isinstance(part, dict):
            raise UserError(f"{path} has {name} {json.dumps(part)}: it must be null or an object")
        rope |= part
    _allow(path, "rope_type", rope.get("rope_type", rope.get("type", "default")), "default")
    _allow(path, "partial_rotary_factor", rope["partial_rotary_factor"], 1, None)
    return _number(rope, path, "rope_theta", float, 10_000.0)


def load_llama_config(folder: Path) -> ModelConfig:
    """Return the shape in the `config.json` of a folder in Llama's format.

    What our architecture cannot hold, and other model types, are a `UserError` that names the field.
    """
    path = folder / CONFIG_FILE
    document = _read_json(path, "the model's configuration")
    kind = document.get("model_type")
    if kind != "llama":
        reason = f", with {_OTHERS[kind]}, which our blocks lack" if kind in _OTHERS else ""
        raise UserError(f"{path} has model_type {json.dumps(kind)}{reason}: only llama can be read")

    for name in ("attention_bias", "mlp_bias"):
        _allow(path, name, document.get(name), False, None)
    tied = document.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"{path} has tie_word_embeddings {json.dumps(tied)}: it must be true or false")
    _allow(path, "hidden_act", document.get("hidden_act", "silu"), "silu")
    _allow(path, "quantization_config", document.get("quantization_config"), None)
    names = (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    )
    width, heads, layers, d_ff, vocab_size, context_length = (_number(document, path, name, int) for name in names)
    kv_heads = _number(document, path, "num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise UserError(f"{path} has num_key_value_heads {kv_heads}: it must divide num_attention_heads, {heads}")
    head_dim = document.get("head_dim")
    if width % heads or head_dim not in (None, width // heads) or width // heads % 2:
        raise UserError(
            f"{path} has head_dim {json.dumps(head_dim)}, hidden_size {width} and num_attention_heads {heads}: a head must be "
            "hidden_size / num_attention_heads wide, an even whole number"
        )
    return ModelConfig(
        vocab_size=vocab_size,
        context_length=context_length,
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        d_ff=d_ff,
        num_kv_heads=kv_heads,
        rope_theta=_rope_theta(document, path),
        norm_eps=_number(document, path, "rms_norm_eps", float, 1e-6),
        tie_embeddings=tied,
    )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).exists():
        names = _read_json(folder / _INDEX, "the index of the weights").get("weight_map")
        # Only names, so that an index cannot point out of its folder.
        if not isinstance(names, dict) or not all(isinstance(name, str) and Path(name).name == name for name in names.values()):
            raise UserError(f"{folder / _INDEX} has no weight_map of tensors to files beside it")
        return [require_file(folder / name, "weights", "download it anew") for name in sorted(set(names.values()))]
    pickles = sorted(folder.glob("*.bin"))
    if pickles:
        raise UserError(
            f"{folder} has its weights in {pickles[0].name} only, a pickle that could run any code: write safetensors with "
            "transformers, AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    raise UserError(f"{folder} holds no weights: {_WEIGHTS} or {_INDEX} is needed")


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    yield name, opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({error}): download it anew") from error


@torch.no_grad()
def load_llama(folder: Path) -> TransformerLM:
    """Return the model in a folder in Llama's format, in float32 on the CPU.

    Weights are float32, bfloat16 or float16, in `model.safetensors` or in shards with their index; never pickles. What is
    missing, of another shape or dtype, or unknown is a `UserError` that names it.
    """
    folder = Path(folder)
    model = TransformerLM(load_llama_config(folder))
    views = _llama_views(model, model.config.vocab_size)
    missing = set(views)
    tied_head: Tensor | None = None
    for name, tensor in _tensors(folder):
        # Old files hold the frequencies of RoPE, which follow from the configuration.
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name == "lm_head.weight" and model.config.tie_embeddings:
            tied_head = tensor
            continue
        if name not in views:
            raise UserError(f"{folder} has a tensor {name}, which our blocks lack")
        view = views[name]
        shape = tuple(_flat(view).shape)
        if tuple(tensor.shape) != shape or tensor.dtype not in _DTYPES:
            found = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            raise UserError(f"{folder} has {name} as {found}: it must be float32, bfloat16 or float16 {shape}")
        view.copy_(tensor.reshape(view.shape))
        missing.discard(name)
    if missing:
        raise UserError(f"{folder} lacks the tensor {min(missing)}: download it anew")
    if tied_head is not None and not torch.equal(tied_head.float(), views["model.embed_tokens.weight"]):
        raise UserError(f"{folder} has tie_word_embeddings true and an lm_head.weight of its own: they must be equal")
    return model.eval()
