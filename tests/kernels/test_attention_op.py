"""Attention as a PyTorch op: compilation, FLOP counts, autocast, saved tensors, the fallback, and argument errors."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from attention_cases import DEVICE, draw_case, tiles
from tilewright.kernels import reference, use_backend
from tilewright.kernels.attention import attention
from tilewright.kernels.attention.packing import Documents
from tilewright.kernels.dispatch import HAS_TRITON

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
]
BOUNDS = torch.zeros(1, 5, dtype=torch.int32)


@pytest.mark.slow
@pytest.mark.parametrize(("packing", "dynamic"), [(("document_ids",), False), (("cu_seqlens", "cu_seqlens_k"), True)])
def test_compiled_equals_eager(packing, dynamic):
    ids = torch.tensor([[0] * 4 + [1] * 6], device=DEVICE)
    packed_by = dict(zip(packing, (ids,) if len(packing) == 1 else torch.tensor([[0, 4], [0, 6]], device=DEVICE), strict=True))

    def attend(packed, sinks, packed_by):
        q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (2 * packed).split((64, 32, 32), dim=-1))
        o, lse = attention(q, k, v, window=4, softcap=20.0, sinks=sinks, **packed_by, return_lse=True)
        return o.transpose(1, 2).flatten(-2), lse

    def gradients(function):
        torch.manual_seed(0)
        packed, sinks = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((1, 10, 128), (4,)))
        outputs = function(packed, sinks, packed_by)
        return [*outputs, *torch.autograd.grad(outputs, (packed, sinks), [torch.randn_like(t) for t in outputs])]

    with use_backend("triton"), tiles(16, 16):
        compiled = gradients(torch.compile(attend, fullgraph=True, dynamic=dynamic))
        for a, b in zip(compiled, gradients(attend), strict=True):
            torch.testing.assert_close(a, b)


def test_flops_equal_pytorch_attention():
    # Two products in the forward pass and five in the backward pass, over all pairs of queries and keys.
    case = draw_case((4, 2), (10, 24), 16, batch=2)
    pairs = 2 * 4 * 10 * 24 * 16
    with use_backend("triton"), FlopCounterMode(display=False) as counter:
        o = attention(case.q.requires_grad_(), case.k, case.v)
        assert counter.get_total_flops() == 2 * 2 * pairs
        o.backward(case.do)
    assert counter.get_total_flops() == (2 * 2 + 5 * 2) * pairs


def test_autocast_computes_in_half_precision():
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 2, 20, 16, device=DEVICE))
    with use_backend("triton"), torch.autocast(DEVICE.type, torch.float16):
        o, lse = attention(q, k, v, return_lse=True)
        halves = [t.half() for t in (q, k, v)]
        mixed = attention(halves[0], k, halves[2])
    with use_backend("triton"):
        expected = attention(*halves)
    assert (o.dtype, lse.dtype) == (torch.float16, torch.float32)
    assert torch.equal(o, expected)
    assert torch.equal(mixed, expected)
    (dq,) = torch.autograd.grad(o.sum(), q)
    assert dq.dtype == torch.float32


def test_saved_tensors_are_linear_in_the_length():
    kept = []
    case = draw_case((4, 2), (33, 33), 16, batch=2)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with use_backend("triton"), hooks:
        attention(case.q.requires_grad_(), case.k, case.v)
    inputs = {t.data_ptr() for t in (case.q, case.k, case.v)}
    new = {t.data_ptr(): tuple(t.shape) for t in kept if t.data_ptr() not in inputs}
    assert sorted(new.values()) == [(2, 4, 33), (2, 4, 33, 16)]


def test_the_reference_backend_uses_pytorch_attention_where_supported():
    case = draw_case((4, 2), (6, 6), 16)
    with use_backend("reference"):
        o = attention(case.q, case.k, case.v)
        expected = F.scaled_dot_product_attention(case.q, case.k, case.v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(o, expected)
        for options in ({"window": 3}, {"softcap": 4.0}, {"sinks": torch.randn(4, device=DEVICE)}):
            expected = reference.attention(case.q, case.k, case.v, **options)
            torch.testing.assert_close(attention(case.q, case.k, case.v, **options), expected)
        empty = case.k[:, :, :0]
        assert not attention(case.q, empty, empty).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 5, 16)}, r"q has shape \(2, 5, 16\).*expected \(B, H, T, K\)"),
        ({"v": torch.ones(1, 2, 4, 16)}, r"v \(1, 2, 4, 16\)"),
        ({"q": torch.ones(2, 4, 5, 16)}, r"q has shape \(2, 4, 5, 16\)"),
        ({"q": torch.ones(1, 4, 5, 8)}, r"q has shape \(1, 4, 5, 8\)"),
        ({"q": torch.ones(1, 3, 5, 16)}, r"q has 3 heads, k has 2.*divisor of 3"),
        ({"q": torch.ones(1, 4, 5, 16).half()}, r"q is torch\.float16, k torch\.float32.*the same dtype"),
        ({"scale": float("nan")}, r"scale is nan.*finite"),
        ({"window": 0}, r"window is 0: expected an integer, 1 or more"),
        ({"window": 1.5}, r"window is 1\.5: expected an integer"),
        ({"window": (1, 2, 3)}, r"window is \(1, 2, 3\): expected an integer or a pair"),
        ({"window": (2, 0.5)}, r"side of the window is 0\.5: expected an integer, -1 or more"),
        ({"cache_lengths": torch.tensor([3, 4])}, r"cache_lengths has shape \(2,\): expected \(1,\)"),
        ({"cache_lengths": torch.tensor([3.0])}, r"cache_lengths has dtype torch\.float32"),
        ({"v": torch.ones(1, 2, 5, 0)}, "v has head dim 0: expected 1 or more"),
        ({name: torch.ones(1, 2, 5, 16).long() for name in "qkv"}, r"q has dtype torch\.int64: expected"),
        ({"softcap": 0.0}, r"softcap is 0\.0.*above 0"),
        ({"softcap": float("inf")}, r"softcap is inf"),
        ({"k": torch.ones(1, 2, 5, 16, device="meta")}, r"k is on meta: expected c.*, the device of q"),
        ({"sinks": torch.ones(4, device="meta")}, r"sinks is on meta"),
        ({"sinks": torch.ones(2)}, r"sinks has shape \(2,\).*\(4,\)"),
        ({"document_ids": torch.zeros(1, 5), "cu_seqlens": torch.tensor([0, 5])}, "document_ids and cu_seqlens are both given"),
        ({"document_ids": torch.zeros(1, 4)}, r"document_ids has shape \(1, 4\).*\(1, 5\)"),
        ({"document_ids": torch.zeros(1, 5), "q": torch.ones(1, 4, 6, 16)}, "q has 6 tokens, k has 5: with documents"),
        ({"cu_seqlens_k": torch.tensor([0, 5])}, "cu_seqlens is None: cu_seqlens_k also needs"),
        ({"cu_seqlens": [0, 5]}, "cu_seqlens is a list: expected a tensor"),
        ({"cu_seqlens": torch.tensor([-3, 5])}, r"cu_seqlens is \[-3, 5\]: expected non-decreasing lengths"),
        ({"cu_seqlens": torch.tensor([0]), "cu_seqlens_k": torch.tensor([0, 5])}, r"cu_seqlens has shape \(1,\)"),
        (
            {name: torch.tensor([0]) for name in ("cu_seqlens", "cu_seqlens_k", "cache_lengths")},
            "cache_lengths and cu_seqlens_k are both given",
        ),
        ({"window": (None, 1)}, r"window is \(None, 1\)"),
        ({"scale": "0.1"}, "scale is '0.1': expected a finite number"),
        (
            {"cu_seqlens": torch.tensor([0, 4, 2])},
            r"cu_seqlens is \[0, 4, 2\]: expected non-decreasing lengths, 0 or more",
        ),
        ({"document_ids": (torch.zeros(1, 5), torch.zeros(1, 5))}, "document_ids is a tuple: expected a tensor"),
        ({"document_ids": Documents(BOUNDS, BOUNDS[:, :4])}, r"begins has shape \(1, 5\), ends \(1, 4\)"),
        ({"document_ids": Documents(BOUNDS, BOUNDS.float())}, r"ends has dtype torch\.float32: expected torch\.int32"),
        ({"document_ids": Documents(BOUNDS, BOUNDS.to("meta"))}, "ends is on meta"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, r"cu_seqlens has shape \(1, 2\)"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, r"cu_seqlens has dtype torch\.float32: expected torch\.int64"),
    ],
)
def test_bad_arguments_are_errors(change, message):
    arguments = {"q": torch.ones(1, 4, 5, 16), "k": torch.ones(1, 2, 5, 16), "v": torch.ones(1, 2, 5, 16)}
    for backend in ("triton", "reference"):
        with use_backend(backend), pytest.raises(ValueError, match=message):
            attention(**arguments | change)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_bad_arguments_are_errors_under_autocast(backend):
    x = torch.ones(1, 2, 5, 16, device=DEVICE)
    with use_backend(backend), torch.autocast(DEVICE.type, torch.bfloat16), pytest.raises(ValueError, match="k has dtype"):
        attention(x, x.long(), x)


@pytest.mark.slow
def test_a_changing_scale_compiles():
    case = draw_case((2, 1), (5, 5), 16)
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    with use_backend("triton"):
        for scale in (0.3, 0.4, 0.5):
            torch.testing.assert_close(
                compiled(case.q, case.k, case.v, scale=scale), attention(case.q, case.k, case.v, scale=scale)
            )


def test_head_dims_above_256_need_the_reference():
    q = torch.ones(1, 2, 5, 257, device=DEVICE)
    with use_backend("triton"), pytest.raises(ValueError, match=r"head dim 257.*1 to 256"):
        attention(q, q, q)
    with use_backend("reference"):
        assert attention(q, q, q).shape == q.shape
