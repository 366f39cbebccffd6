import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.kernels.attention.record import attention_pairs, draw_lengths
from tilewright.kernels.op import ALL, Cost, draw, grid
from tilewright.kernels.reference import attention_mask


def costs(name, itemsize, **sizes):
    return ALL[name].cost(itemsize, **sizes)


def test_roofline_is_the_slower_of_bytes_and_flops():
    assert Cost(100, 10).seconds(bytes_per_second=10, flops_per_second=10) == 10
    assert Cost(10, 100).seconds(10, 10) == 10
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_bytes_by_hand():
    forward, backward, both = costs("rms_norm", 2, rows=4, width=8)
    assert forward.bytes == 2 * 4 * 8 * 2 + 8 * 2 + 4 * 4
    assert backward.bytes == 3 * 4 * 8 * 2 + 2 * 8 * 2 + 4 * 4
    assert both == forward + backward
    forward, backward, _ = costs("add_rms_norm", 2, rows=4, width=8, residual_itemsize=4)
    assert forward.bytes == 2 * 32 * 2 + 2 * 32 * 4 + 8 * 2 + 4 * 4
    assert backward.bytes == 32 * 2 + 2 * 32 * 4 + 32 * 4 + 32 * 2 + 2 * 8 * 2 + 4 * 4
    forward, backward, _ = costs("swiglu", 2, rows=4, width=8)
    assert (forward.bytes, backward.bytes) == (3 * 64, 5 * 64)
    sizes = {"batch": 1, "num_tokens": 4, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    assert costs("rope_qk", 2, **sizes).forward.bytes == 2 * 64 * 2 + 4 * 4 * 8
    assert costs("rope_qkv", 2, **sizes).forward.bytes == 2 * 96 * 2 + 4 * 4 * 8
    forward, backward, _ = costs("cross_entropy", 2, rows=4, vocab_size=100)
    assert (forward.bytes, backward.bytes) == (800 + 48, 1600 + 64)
    forward, backward, both = costs("linear_cross_entropy", 2, rows=4, d_model=8, vocab_size=100)
    assert (forward, backward) == (None, None)
    assert both.flops == 3 * 2 * 4 * 8 * 100


@given(st.integers(0, 12), st.integers(0, 12), st.booleans(), st.none() | st.integers(1, 14))
def test_attention_pairs_equal_the_reference_mask(num_queries, num_keys, causal, window):
    mask = attention_mask(num_queries, num_keys, causal, window)
    assert attention_pairs(num_queries, num_keys, causal, window) == mask.sum().item()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 30), st.booleans(), st.none() | st.integers(1, 7))
def test_attention_pairs_of_documents_equal_the_reference_mask(lengths, num_queries, causal, window):
    num_keys = sum(lengths)
    num_queries = min(num_queries, num_keys)
    document_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    mask = attention_mask(num_queries, num_keys, causal, window, document_ids)
    assert attention_pairs(num_queries, num_keys, causal, window, lengths) == mask.sum().item()


def test_pairs_in_closed_form():
    assert attention_pairs(2**40, 2**40) == 2**40 * (2**40 + 1) // 2
    assert attention_pairs(1, 1000) == 1000
    assert attention_pairs(1, 1000, window=64) == 64
    with pytest.raises(ValueError, match="document_lengths sum to 7: expected 8"):
        attention_pairs(8, 8, document_lengths=(3, 4))


def test_attention_by_hand():
    sizes = {"batch": 2, "num_heads": 8, "num_kv_heads": 2, "num_queries": 5, "num_keys": 7, "head_dim": 16}
    forward, backward, _ = costs("attention", 2, pairs=10, **sizes)
    queries, keys, lse = 2 * 8 * 5 * 16 * 2, 2 * 2 * 7 * 16 * 2, 2 * 8 * 5 * 4
    assert forward == Cost(2 * queries + 2 * keys + lse, 4 * 16 * 10 * 8 * 2)
    assert backward == Cost(4 * queries + 4 * keys + lse, 10 * 16 * 10 * 8 * 2)


def test_document_lengths_are_deterministic():
    lengths = draw_lengths(16_384)
    assert lengths == draw_lengths(16_384) != draw_lengths(16_384, seed=1)
    assert sum(lengths) == 16_384
    assert min(lengths) > 0
    assert len(lengths) > 5


def test_label_lists_the_sizes():
    sizes = {"batch": 1, "num_heads": 16, "num_queries": 8192, "document_lengths": (1, 2), "dtype": torch.bfloat16}
    assert ALL["attention"].label(sizes) == "attention B1 H16 T8192 2 document_lengths bf16"
    assert ALL["rms_norm"].label({"rows": 8, "width": 64}) == "rms_norm rows 8 width 64"
    assert list(grid(rows=(8,), width=(1, 2))) == [{"rows": 8, "width": 1}, {"rows": 8, "width": 2}]


def test_draw_returns_leaves_with_the_requested_layout():
    x = draw(torch.device("cpu"), torch.float16, 2, 5, 3, 8, heads_first=True, scale=0.0)
    assert x.is_leaf
    assert x.requires_grad
    assert (x.shape, x.stride(), x.dtype) == ((2, 3, 5, 8), (120, 8, 24, 1), torch.float16)
    assert x.count_nonzero() == 0
