"""Conversion between `config.json` and `ModelConfig`: families, formats, defaults, and rejected fields."""

import dataclasses
import json
import math
import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.kernels import RopeScaling
from tilewright.model import ModelConfig, TransformerLM
from tilewright.model.accounting.report import AccountConfig, account
from tilewright.model.huggingface import FAMILIES, canonical, choose_family, read_config, tensor_views
from tilewright.model.huggingface.config import config_document

CONFIG = ModelConfig(vocab_size=150, context_length=32, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=40)
GEMMA = {
    "norm": "sandwich", "ffn": "geglu_tanh", "unit_offset_norms": True, "scale_embeddings": True, "tie_embeddings": True,
    "logit_softcap": 20.0,
}  # fmt: skip
LOCAL = {"window": 5, "window_pattern": "LG"}
CONFIG_OF = {
    "llama": {},
    "mistral": {"window": 5},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "mixtral": {"num_experts": 3, "window": 5},
    "qwen3_moe": {"num_experts": 3, "qk_norm": True, "normalise_expert_weights": False},
    "gemma2": GEMMA | LOCAL,
    "gemma3_text": GEMMA | LOCAL | {"qk_norm": True, "local_rope_theta": 50.0},
}


def document_of(family, **changes):
    return config_document(dataclasses.replace(CONFIG, **CONFIG_OF[family] | changes), FAMILIES[family])


def read(folder, document):
    """Write a document and read it; "ABSENT" removes a field."""
    (folder / "config.json").write_text(json.dumps({name: value for name, value in document.items() if value != "ABSENT"}))
    return read_config(folder)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "llama"),
        ({"head_dim": 12, "rope_scaling": RopeScaling("linear", 2.0)}, "llama"),
        ({"num_heads": 3, "num_kv_heads": 1, "head_dim": 12}, "mistral"),
        ({"window": 5}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, **LOCAL}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"qk_norm": True, "window": 5, "window_pattern": "GL"}, "qwen3"),
        (GEMMA, "gemma2"),
        (GEMMA | LOCAL | {"attention_softcap": 9.0, "attention_scale": 24**-0.5}, "gemma2"),
        (GEMMA | {"qk_norm": True}, "gemma3_text"),
        (GEMMA | LOCAL | {"qk_norm": True, "local_rope_theta": 100.0, "rope_theta": 1e6}, "gemma3_text"),
        (
            GEMMA | {"qk_norm": True, "window": 5, "window_pattern": "L", "local_rope_theta": 100.0, "tie_embeddings": False},
            "gemma3_text",
        ),
    ],
    ids=str,
)
def test_shapes_choose_a_family_and_round_trip(tmp_path, changes, family):
    config = dataclasses.replace(CONFIG, **changes)
    chosen = choose_family(config)
    assert chosen.model_type == family
    assert read(tmp_path, config_document(config, chosen)) == canonical(config)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm": "post"}, "norm post, where llama has pre"),
        ({"rope": False}, "rope False, where llama has True"),
        ({"ffn": "silu"}, "ffn silu, where llama has swiglu"),
        ({"norm_type": "layer_norm"}, "norm_type layer_norm, where"),
        ({"rotary_dim": 4}, "rotary_dim 4, where"),
        (
            {"qkv_bias": True, "qk_norm": True},
            "qkv_bias True, where qwen3 has False; qk_norm True, where qwen2 has False: none of the families llama, mistral",
        ),
        ({"window": 5, "window_pattern": "LG"}, "window_pattern LG, where mistral has L"),
        (GEMMA | {"attention_scale": 0.3}, "attention_scale 0.3, where gemma2 has 1 / sqrt"),
        (GEMMA | {"qk_norm": True, "attention_softcap": 9.0}, "attention_softcap 9.0, where gemma3_text has None"),
        (GEMMA | {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8}, "num_heads 6, where gemma2 has a divisor of d_model, 32"),
        (
            GEMMA | LOCAL | {"qk_norm": True, "rope_scaling": RopeScaling("linear", 2.0)},
            "rope_scaling in local layers, where gemma3_text has a local_rope_theta",
        ),
    ],
    ids=str,
)
def test_unsupported_shapes_are_rejected(changes, named):
    with pytest.raises(UserError, match=re.escape(named)):
        choose_family(dataclasses.replace(CONFIG, **changes))


def test_an_unsupported_preferred_family_is_ignored():
    assert choose_family(CONFIG, "mistral").model_type == "mistral"
    assert choose_family(dataclasses.replace(CONFIG, qk_norm=True), "mistral").model_type == "qwen3"


@given(
    num_layers=st.integers(1, 7),
    pattern=st.text("LG", min_size=1, max_size=7),
    window=st.integers(1, 9),
    head_dim=st.none() | st.sampled_from([8, 12]),
    scale=st.none() | st.sampled_from([8**-0.5, 12**-0.5, 0.25]),
    local_theta=st.none() | st.sampled_from([1e4, 1e5]),
)
def test_canonical_shapes_are_equivalent(num_layers, pattern, window, head_dim, scale, local_theta):
    config = dataclasses.replace(
        CONFIG, num_layers=num_layers, window_pattern=pattern[:num_layers], window=window, head_dim=head_dim,
        attention_scale=scale, local_rope_theta=local_theta,
    )  # fmt: skip
    found = canonical(config)
    assert canonical(found) == found

    def meaning(c):
        layers = [(c.window_of(i), (c.local_rope_theta or c.rope_theta) if c.is_local(i) else None) for i in range(num_layers)]
        return layers, c.head_width, c.kv_heads, c.attention_scale or c.head_width**-0.5

    assert meaning(found) == meaning(config)
    # Equivalent spellings give the same canonical shape.
    longer = (pattern[:num_layers] * num_layers)[:num_layers]
    assert canonical(dataclasses.replace(config, window_pattern=longer)) == found


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"model_type": "gpt2"}, 'model_type "gpt2", with learned positions, LayerNorm'),
        ("llama", {"model_type": "qwen2_moe"}, 'model_type "qwen2_moe", with shared experts, which'),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers [0]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("llama", {"model_type": "mamba"}, 'model_type "mamba": expected llama, mistral, qwen2, qwen3, mixtral, qwen3_moe'),
        ("llama", {"model_type": "ABSENT"}, "model_type null"),
        ("llama", {"model_type": ["llama"]}, 'model_type ["llama"]'),
        ("llama", {"attention_bias": True}, "attention_bias true"),
        ("llama", {"mlp_bias": True}, "mlp_bias true"),
        ("llama", {"hidden_act": "gelu"}, 'hidden_act "gelu", which is not supported: expected "silu"'),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, 'rope_type "dynamic", which is not supported'),
        ("llama", {"rope_scaling": {"type": "longrope"}}, 'rope_type "longrope"'),
        ("llama", {"rope_parameters": {"rope_type": ["yarn"]}}, 'rope_type ["yarn"]'),
        ("llama", {"rope_scaling": "linear"}, 'rope_scaling "linear": expected null or an object'),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor null: expected a finite number"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 0.5}}, "an invalid llama3 scaling of RoPE: factor"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": "1"}}, "invalid llama3 scaling"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast 3 for RoPE, which"),
        ("llama", {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}}, "mrope_section [1, 2] for RoPE"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"head_dim": "8"}, 'head_dim "8": expected a whole number'),
        ("llama", {"head_dim": 7}, "the head dim is 7: RoPE needs an even width"),
        ("llama", {"num_attention_heads": 10, "head_dim": None}, "d_model 32 over num_heads 10 gives a head dim of 3.2"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3: expected a divisor of num_attention_heads, 4"),
        ("llama", {"quantization_config": {"bits": 4}}, 'quantization_config {"bits": 4}, which is not supported'),
        ("llama", {"hidden_size": "32"}, 'hidden_size "32": expected a whole number'),
        ("llama", {"hidden_size": True}, "hidden_size true"),
        ("llama", {"rope_theta": -1.0}, "rope_theta -1.0"),
        ("llama", {"intermediate_size": 2.5}, "intermediate_size 2.5"),
        ("llama", {"vocab_size": "ABSENT"}, "vocab_size null"),
        ("llama", {"rms_norm_eps": "small"}, 'rms_norm_eps "small": expected a finite number'),
        ("llama", {"rms_norm_eps": 0}, "rms_norm_eps 0: expected a finite number above 0"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings 1: expected true or false"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers 0: expected a whole number, at least 1"),
        ("mistral", {"sliding_window": 0}, "sliding_window 0: expected a whole number, at least 1"),
        ("mistral", {"sliding_window": "wide"}, 'sliding_window "wide"'),
        ("qwen2", {"use_sliding_window": "yes"}, 'use_sliding_window "yes": expected true or false'),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": None, "max_window_layers": -1},
         "max_window_layers -1: expected a whole number, at least 0"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"]},
         'layer_types ["full_attention"]: expected a list of sliding_attention or full_attention for each of 2 layers'),
        ("qwen3", {"attention_bias": True}, "attention_bias true"),
        ("gemma2", {"hidden_activation": "gelu"}, 'hidden_activation "gelu", which is not supported: expected "gelu_py'),
        ("mistral", {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]},
         'layer_types ["full_attention", "sliding_attention"]: expected one kind for all layers with model_type mistral'),
        ("gemma2", {"layer_types": ["chunked_attention", "full_attention"]}, 'layer_types ["chunked_attention", "full_'),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0: expected a finite number above 0"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention true"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0, which is not supported: expected null"),
        ("gemma3_text", {"rope_local_base_freq": 0}, "rope_local_base_freq 0"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": 10}, "sliding_attention": {"rope_type": "yarn"}}},
         'rope_type "yarn", which is not supported: expected "default"'),
        ("gemma3_text", {"model_type": "gemma3", "text_config": None}, "num_hidden_layers null"),
        ("gemma3_text", {"model_type": "gemma3", "text_config": {"model_type": "gemma2"}}, 'model_type "gemma2"'),
    ],
    ids=str,
)  # fmt: skip
def test_unsupported_fields_are_rejected(tmp_path, family, fields, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(tmp_path, document_of(family) | fields)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


SCALINGS = [
    RopeScaling(),
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, original_max_position_embeddings=16),
    RopeScaling("llama3", 32.0, original_max_position_embeddings=16, low_freq_factor=2.0, high_freq_factor=3.0),
    RopeScaling("yarn", 4.0, original_max_position_embeddings=8),
    RopeScaling("yarn", 4.0, original_max_position_embeddings=8, beta_fast=16.0, truncate=False, attention_factor=1.5),
    RopeScaling("yarn", 4.0, original_max_position_embeddings=8, mscale=0.7, mscale_all_dim=0.5),
]


@given(family=st.sampled_from(sorted(CONFIG_OF)), data=st.data())
def test_every_shape_round_trips(family, data):
    heads = data.draw(st.sampled_from([1, 2, 4, 8]))
    layers = data.draw(st.integers(1, 6))
    changes = {
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": data.draw(st.none() | st.sampled_from([n for n in (1, 2, 4, 8) if heads % n == 0])),
        "head_dim": data.draw(st.none() | st.integers(1, 40).map(lambda n: 2 * n)),
        "vocab_size": data.draw(st.integers(1, 300)),
        "context_length": data.draw(st.integers(1, 300)),
        "rope_theta": data.draw(st.floats(2, 1e7)),
        "norm_eps": data.draw(st.floats(1e-12, 1)),
        "tie_embeddings": data.draw(st.booleans()),
        "rope_scaling": data.draw(st.sampled_from(SCALINGS)),
    }
    choices = {
        "window": st.integers(1, 50),
        "window_pattern": st.text("LG", min_size=1, max_size=layers),
        "attention_scale": st.none() | st.integers(1, 300).map(lambda n: n**-0.5),
        "attention_softcap": st.none() | st.floats(0.1, 100),
        "logit_softcap": st.none() | st.floats(0.1, 100),
        "local_rope_theta": st.floats(2, 1e7),
        "num_experts": st.integers(3, 9),
        "experts_per_token": st.integers(2, 3),
        "normalise_expert_weights": st.booleans(),
    }
    changes |= {name: data.draw(choices[name]) for name in sorted(FAMILIES[family].optional)}
    config = dataclasses.replace(CONFIG, **CONFIG_OF[family] | changes)
    assert FAMILIES[family].lacks(config) == {}
    with tempfile.TemporaryDirectory() as folder:
        assert read(Path(folder), config_document(config, FAMILIES[family])) == canonical(config)


@pytest.mark.parametrize("family", CONFIG_OF)
def test_both_spellings_of_rope_are_read(tmp_path, family):
    document = document_of(family, rope_theta=77.0, rope_scaling=RopeScaling("linear", 4.0))
    before = read(tmp_path, document)
    assert (before.rope_theta, before.rope_scaling) == (77.0, RopeScaling("linear", 4.0))
    parameters = {"rope_type": "linear", "rope_theta": 77.0, "factor": 4.0}
    if family == "gemma3_text":
        parameters = {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}
    absent = dict.fromkeys(("rope_theta", "rope_scaling", "rope_local_base_freq"), "ABSENT")
    assert read(tmp_path, document | absent | {"rope_parameters": parameters}) == before


@pytest.mark.parametrize("scaling", SCALINGS[1:], ids=str)
def test_transformers_reads_our_rope_scalings(tmp_path, scaling):
    document = document_of("llama", rope_scaling=scaling)
    read(tmp_path, document)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {name: theirs[name] for name in document["rope_scaling"]} == document["rope_scaling"]


def test_original_context_defaults_to_the_context(tmp_path):
    document = document_of("llama") | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert read(tmp_path, document).rope_scaling == RopeScaling("yarn", 4.0, original_max_position_embeddings=32)
    document["original_max_position_embeddings"] = 16
    assert read(tmp_path, document).rope_scaling.original_max_position_embeddings == 16


@pytest.mark.parametrize("family", CONFIG_OF)
def test_missing_fields_get_the_defaults_of_transformers(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 7, "hidden_size": 256, "intermediate_size": 40}
    if "gemma" not in family:
        sizes |= {"num_attention_heads": 32, "vocab_size": 100, "max_position_embeddings": 64}
    short = read(tmp_path, {"model_type": family, **sizes})
    whole = transformers.AutoConfig.for_model(family, **sizes).to_dict()
    assert short == read(tmp_path, whole)
    assert short == canonical(short)


def scaled(factor):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_theta": 500000.0, "rope_scaling": scaling | {"original_max_position_embeddings": 8192}}


def sizes(hidden, inner, layers, heads, kv_heads, vocab_size, context=131072):
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab_size, "max_position_embeddings": context,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("document", "parameters", "fields"),
    [
        ({"model_type": "llama", **sizes(4096, 14336, 32, 32, 8, 128256), **scaled(8.0)}, 8_030_261_248, {"rope_theta": 5e5}),
        (
            {"model_type": "llama", **sizes(2048, 8192, 16, 32, 8, 128256), **scaled(32.0), "tie_word_embeddings": True},
            1_235_814_400,
            {"rope_scaling": RopeScaling("llama3", 32.0, original_max_position_embeddings=8192)},
        ),
        ({"model_type": "mistral", **sizes(4096, 14336, 32, 32, 8, 32000)}, 7_241_732_096, {"window": 4096}),
        (
            {"model_type": "qwen2", **sizes(896, 4864, 24, 14, 2, 151936), "tie_word_embeddings": True,
             "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21},
            494_032_768,
            {"qkv_bias": True, "window": None},
        ),
        (
            {"model_type": "qwen3", **sizes(1024, 3072, 28, 16, 8, 151936), "tie_word_embeddings": True, "head_dim": 128},
            596_049_920,
            {"qk_norm": True, "head_dim": 128},
        ),
        (
            {"model_type": "gemma2", **sizes(2304, 9216, 26, 8, 4, 256000, 8192)},
            2_614_341_888,
            {"window": 4096, "window_pattern": "LG", "attention_softcap": 50.0, "logit_softcap": 30.0, "head_dim": 256},
        ),
        (
            {"model_type": "gemma3_text", **sizes(1152, 6912, 26, 4, 1, 262144, 32768), "sliding_window": 512},
            999_885_952,
            {"window": 512, "window_pattern": "LLLLLG", "rope_theta": 1e6, "local_rope_theta": 1e4, "attention_scale": None},
        ),
    ],
    ids=["Llama 3.1 8B", "Llama 3.2 1B", "Mistral 7B", "Qwen2.5 0.5B", "Qwen3 0.6B", "Gemma 2 2B", "Gemma 3 1B"],
)  # fmt: skip
def test_parameter_counts_of_published_models(tmp_path, document, parameters, fields):
    config = read(tmp_path, document)
    assert {name: getattr(config, name) for name in fields} == fields
    # The RoPE tables have no weights, so they can be short.
    with torch.device("meta"):
        model = TransformerLM(dataclasses.replace(config, context_length=1))
    views = tensor_views(config, model.get_parameter, config.vocab_size)
    assert sum(math.prod(view.shape) for view in views.values()) == parameters


@pytest.mark.parametrize("text", ["", "{", "[1]", '"llama"'])
def test_broken_configurations_are_rejected(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


def test_account_accepts_a_folder(tmp_path):
    read(tmp_path, document_of("qwen3"))
    report = account(str(tmp_path), AccountConfig())
    # Two tables of 150 x 32; per block q and o of 32 x 32, k and v of 16 x 32, 3 x 40 x 32, two norms of 32 and two of 8; 32.
    assert report["num_parameters"] == 2 * 150 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 40 * 32 + 2 * 32 + 2 * 8) + 32
    assert report["context_length"] == 32
    with pytest.raises(UserError, match=r"preset 'nowhere' is unknown: expected one of .*, or a folder with a config\.json"):
        account("nowhere", AccountConfig())
