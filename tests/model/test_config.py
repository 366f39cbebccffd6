import dataclasses
import math

import pytest

from tilewright.errors import UserError
from tilewright.kernels import RopeScaling
from tilewright.model import MODELS, ModelConfig

TINY = ModelConfig(vocab_size=17, context_length=8, d_model=16, num_layers=2, num_heads=4, d_ff=24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0: expected at least 1"),
        ({"num_heads": 3}, "head dim of 5.33333"),
        ({"num_heads": 16}, "head dim is 1: RoPE needs an even width"),
        ({"head_dim": 0}, "head_dim is 0: expected at least 1"),
        ({"head_dim": 5}, "head dim is 5: RoPE needs an even width"),
        ({"rotary_dim": 6}, "rotary_dim is 6: expected an even number from 2 to 4"),
        ({"window": 0}, "window is 0: expected at least 1"),
        ({"window": 4, "window_pattern": "SL"}, "window_pattern is 'SL': expected letters L and G"),
        ({"window": 4, "window_pattern": "LLG"}, "window_pattern is 'LLG': .* at most one per layer"),
        ({"window": 4, "window_pattern": ""}, "window_pattern is ''"),
        ({"window_pattern": "LG"}, "window_pattern is LG without a window: set window too"),
        ({"local_rope_theta": 10.0}, "local_rope_theta is 10.0 without a window"),
        ({"attention_softcap": 0.0}, "attention_softcap is 0.0: expected a finite number above 0"),
        ({"logit_softcap": math.inf}, "logit_softcap is inf"),
        ({"attention_scale": -1.0}, "attention_scale is -1.0"),
        ({"rope_theta": None}, "rope_theta is None: it must be a number"),
        (
            {"rope_theta": 1.0, "rope_scaling": RopeScaling("yarn", 2.0, 4)},
            "rope_theta is 1.0: .* with rope_scaling.kind yarn",
        ),
        ({"d_model": 48.0}, "d_model is 48.0: it must be an integer"),
        ({"num_heads": True}, "num_heads is True: it must be an integer"),
        ({"norm_eps": float("nan")}, "norm_eps is nan: it must be a number"),
        ({"head_dim": 8.0}, "head_dim is 8.0: it must be an integer or None"),
        ({"rope": 1}, "rope is 1: it must be true or false"),
        ({"unit_offset_norms": True, "norm_type": "layer_norm"}, "unit_offset_norms is set with norm_type layer_norm"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3: expected a divisor of num_heads, 4"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"d_ff": -1}, "d_ff is -1"),
        ({"norm": "Pre"}, "norm is 'Pre': it must be one of pre, sandwich, post, none"),
        ({"ffn": "gelu"}, "ffn is 'gelu': it must be one of swiglu, geglu_tanh, geglu_erf, silu"),
        ({"num_experts": 0}, "num_experts is 0: expected at least 1"),
        ({"num_experts": 4, "experts_per_token": 5}, "experts_per_token is 5: expected from 1 to num_experts, 4"),
        (
            {"num_experts": 4, "experts_per_token": 1},
            "normalise_expert_weights is True: expected false with experts_per_token",
        ),
        ({"num_experts": 4, "ffn": "silu"}, "ffn is silu: expected swiglu, geglu_tanh or geglu_erf with experts"),
        ({"num_experts": 4, "d_ff": 20}, "d_ff is 20: expected a multiple of 8 with experts"),
        ({"experts_per_token": 4}, "experts_per_token is 4 without experts: set num_experts too"),
        ({"normalise_expert_weights": False}, "normalise_expert_weights is False without experts"),
        ({"norm_type": "batch_norm"}, "norm_type is 'batch_norm': it must be one of rms_norm, layer_norm"),
    ],
)
def test_invalid_shapes_are_rejected(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)


def test_key_value_heads_default_to_the_query_heads():
    assert TINY.kv_heads == 4
    assert dataclasses.replace(TINY, num_kv_heads=2).kv_heads == 2


def test_head_dim_is_independent_of_d_model():
    config = dataclasses.replace(TINY, head_dim=6, num_kv_heads=2)
    assert (TINY.head_width, TINY.q_width, config.head_width, config.q_width, config.kv_width) == (4, 16, 6, 24, 12)
    assert dataclasses.replace(TINY, d_model=18, head_dim=6).q_width == 24


def test_window_pattern_repeats_over_the_layers():
    config = dataclasses.replace(TINY, num_layers=7, window=3, window_pattern="LLG")
    assert [config.window_of(layer) for layer in range(7)] == [3, 3, None, 3, 3, None, 3]
    assert [TINY.window_of(layer) for layer in range(2)] == [None, None]
    assert dataclasses.replace(TINY, window=3).is_local(1)


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 128), (128, 128), (129, 256), (50_257, 50_304)])
def test_the_vocabulary_is_padded_to_whole_tiles(vocab_size, padded):
    assert dataclasses.replace(TINY, vocab_size=vocab_size).padded_vocab_size == padded


def test_tinystories_preset_matches_the_handout():
    config = MODELS["tinystories-17m"]
    assert (config.vocab_size, config.context_length, config.d_model, config.d_ff) == (10_000, 256, 512, 1344)
    assert (config.num_layers, config.num_heads, config.rope_theta) == (4, 16, 10_000)
