import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tilewright.kernels import costs
from tilewright.kernels.costs import Cost, attention_pairs
from tilewright.kernels.reference import attention_mask


def test_the_roofline_is_the_slower_of_bytes_and_flops():
    assert Cost(100, 10).seconds(bytes_per_second=10, flops_per_second=10) == 10
    assert Cost(10, 100).seconds(10, 10) == 10
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_bytes_by_hand():
    forward, backward = costs.rms_norm(4, 8, 2)
    assert forward.bytes == 2 * 4 * 8 * 2 + 8 * 2 + 4 * 4
    assert backward.bytes == 3 * 4 * 8 * 2 + 2 * 8 * 2 + 4 * 4
    forward, backward = costs.add_rms_norm(4, 8, 2, residual_itemsize=4)
    assert forward.bytes == 2 * 32 * 2 + 2 * 32 * 4 + 8 * 2 + 4 * 4
    assert backward.bytes == 32 * 2 + 2 * 32 * 4 + 32 * 4 + 32 * 2 + 2 * 8 * 2 + 4 * 4
    assert [cost.bytes for cost in costs.swiglu(4, 8, 2)] == [3 * 64, 5 * 64]
    assert costs.rope(4, 2, 8, 2)[0].bytes == 2 * 64 * 2 + 4 * 4 * 8
    assert [cost.bytes for cost in costs.cross_entropy(4, 100, 2)] == [800 + 48, 1600 + 64]
    assert costs.linear_cross_entropy(4, 8, 100, 2).flops == 3 * 2 * 4 * 8 * 100


@given(st.integers(0, 12), st.integers(0, 12), st.booleans(), st.none() | st.integers(1, 14))
def test_pairs_are_those_of_the_references_mask(num_queries, num_keys, causal, window):
    mask = attention_mask(num_queries, num_keys, causal, window)
    assert attention_pairs(num_queries, num_keys, causal, window) == mask.sum().item()


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 30), st.booleans(), st.none() | st.integers(1, 7))
def test_pairs_of_packed_documents_are_those_of_the_references_mask(lengths, num_queries, causal, window):
    num_keys = sum(lengths)
    num_queries = min(num_queries, num_keys)
    document_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    mask = attention_mask(num_queries, num_keys, causal, window, document_ids)
    assert attention_pairs(num_queries, num_keys, causal, window, lengths) == mask.sum().item()


def test_pairs_in_closed_form():
    assert attention_pairs(2**40, 2**40) == 2**40 * (2**40 + 1) // 2
    assert attention_pairs(1, 1000) == 1000
    assert attention_pairs(1, 1000, window=64) == 64
    with pytest.raises(ValueError, match="the documents hold 7 keys: allowed is 8"):
        attention_pairs(8, 8, document_lengths=(3, 4))


def test_attention_by_hand():
    forward, backward = costs.attention(2, 8, 2, 5, 7, head_dim=16, pairs=10, itemsize=2)
    queries, keys, lse = 2 * 8 * 5 * 16 * 2, 2 * 2 * 7 * 16 * 2, 2 * 8 * 5 * 4
    assert forward == Cost(2 * queries + 2 * keys + lse, 4 * 16 * 10 * 8 * 2)
    assert backward == Cost(4 * queries + 4 * keys + lse, 10 * 16 * 10 * 8 * 2)
