import dataclasses

import pytest

from tilewright.errors import UserError
from tilewright.model import MODELS, ModelConfig

TINY = ModelConfig(vocab_size=17, context_length=8, d_model=16, num_layers=2, num_heads=4, d_ff=24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0: it must be at least 1"),
        ({"num_heads": 3}, "head dim of 5.33333"),
        ({"num_heads": 16}, "head dim of 1"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3: it must divide num_heads, 4"),
        ({"num_kv_heads": 0}, "kv_heads is 0"),
        ({"d_ff": -1}, "d_ff is -1"),
        ({"norm": "Pre"}, "norm is 'Pre': choose pre, post or none"),
        ({"ffn": "gelu"}, "ffn is 'gelu': choose swiglu, geglu_tanh, geglu_erf or silu"),
        ({"norm_type": "batch_norm"}, "norm_type is 'batch_norm': choose rms_norm or layer_norm"),
    ],
)
def test_an_impossible_shape_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)


def test_key_value_heads_default_to_the_query_heads():
    assert TINY.kv_heads == 4
    assert dataclasses.replace(TINY, num_kv_heads=2).kv_heads == 2


@pytest.mark.parametrize(("vocab_size", "padded"), [(1, 128), (128, 128), (129, 256), (50_257, 50_304)])
def test_the_vocabulary_is_padded_to_whole_tiles(vocab_size, padded):
    assert dataclasses.replace(TINY, vocab_size=vocab_size).padded_vocab_size == padded


def test_the_course_model_is_the_handouts():
    config = MODELS["tinystories-17m"]
    assert (config.vocab_size, config.context_length, config.d_model, config.d_ff) == (10_000, 256, 512, 1344)
    assert (config.num_layers, config.num_heads, config.rope_theta) == (4, 16, 10_000)
