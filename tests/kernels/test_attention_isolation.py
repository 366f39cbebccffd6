"""Masked values reach no result and no gradient, not even as NaN or infinity, on every backend."""

import math
from typing import Any

import pytest
import torch

from attention_cases import DEVICE, Case, draw_case, tiles, without_decoding
from tilewright.kernels import reference, use_backend
from tilewright.kernels.attention import attention
from tilewright.kernels.dispatch import HAS_TRITON

pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]
BACKENDS = [pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")), "reference"]
MASKS = {
    "causal": {},
    "window": {"window": (6, 3), "causal": False},
    "documents": {"cu_seqlens": [0, 21, 40]},
    "lengths": {"cache_lengths": [33]},
    "lengths of keys": {"cu_seqlens": [0, 19, 40], "cu_seqlens_k": [0, 12, 40], "causal": False, "window": (6, 3)},
}


def reached(mask, name, place):
    """Return the queries that see a value of `name` at `place`, and the keys whose gradients it reaches through them."""
    queries = mask[:, place] if name in ("k", "v") else torch.arange(mask.shape[0]) == place
    return queries, mask[queries].any(dim=0)


@pytest.mark.parametrize("backend", BACKENDS)
# Each input has each value under some mask, and each mask each value in some input.
@pytest.mark.parametrize(
    ("mask_name", "name", "bad"),
    [
        (mask_name, name, (math.nan, math.inf)[(i + j) % 2])
        for i, mask_name in enumerate(MASKS)
        for j, name in enumerate(("q", "k", "v", "do"))
    ],
)
def test_non_finite_values_reach_only_visible_rows(backend, mask_name, name, bad):
    options: dict[str, Any] = {
        key: torch.tensor(x, device=DEVICE) if isinstance(x, list) else x for key, x in MASKS[mask_name].items()
    }
    case = draw_case((2, 1), (40, 40), 16, dlse=False, **options)
    mask_options = {key: x for key, x in options.items() if key != "cu_seqlens"}
    if mask_name == "documents":
        mask_options["document_ids"] = (torch.arange(40, device=DEVICE) >= 21)[None].int()
    if mask_name == "lengths of keys":
        mask = reference.packed_mask(**options, num_queries=40, num_keys=40).cpu()
    else:
        mask = reference.attention_mask(40, 40, **mask_options, device=DEVICE).expand(1, 1, 40, 40)[0, 0].cpu()
    place = 37 if mask_name == "lengths" and name in ("k", "v") else 25
    with use_backend(backend), tiles(16, 16):
        expected = case.run(attention)
        getattr(case, name)[:, :, place, 3] = bad
        found = case.run(attention)
    queries, keys = reached(mask, name, place)
    for result, rows in (("o", queries), ("lse", queries), ("dq", queries), ("dk", keys), ("dv", keys)):
        torch.testing.assert_close(found[result][:, :, ~rows], expected[result][:, :, ~rows], rtol=1e-4, atol=1e-4)
    if name == "do":
        torch.testing.assert_close(found["o"], expected["o"])
        assert not found["dq"][:, :, queries].isfinite().any()
    elif math.isnan(bad):
        assert found["o"][:, :, queries].isnan().any(dim=-1).all()
        assert found["dq"][:, :, queries].isnan().any(dim=-1).all()
        assert found["dk"][:, :, keys].isnan().any(dim=-1).all()


@pytest.mark.parametrize("options", [{"window": 3}, {"cu_seqlens": [0, 5, 11]}, {"cache_lengths": [6]}], ids=str)
def test_masked_values_reach_no_tangent_in_forward_mode(options):
    options = {key: torch.tensor(x, device=DEVICE) if isinstance(x, list) else x for key, x in options.items()}
    case = draw_case((2, 1), (12, 12), 16)
    v = case.v.clone()
    v[:, :, 0 if "window" in options else -1] = math.nan
    with use_backend("reference"):
        expected = attention(case.q, case.k, v, **options)
        inputs = (case.q, case.k, v)
        o, tangent = torch.func.jvp(lambda *x: attention(*x, **options), inputs, tuple(map(torch.ones_like, inputs)))
    torch.testing.assert_close(o, expected, equal_nan=True)
    assert torch.equal(tangent.isnan().any(dim=-1), expected.isnan().any(dim=-1))
    assert not expected.isnan().all(dim=-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_plain_causal_attention(backend, name):
    # Without the kernels PyTorch's own attention runs, which lets masked NaN through; the reference does not.
    attend = attention if backend == "triton" else reference.attention

    def gradients():
        leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
        o = attend(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, case.do)]

    case = draw_case((2, 1), (127, 127), 16)
    with use_backend(backend):
        expected = gradients()
        getattr(case, name)[:, :, 90] = torch.nan
        found = gradients()
    queries, keys = reached(torch.ones(127, 127).tril().bool(), name, 90)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        rows = queries if i < 2 else keys
        torch.testing.assert_close(a[:, :, ~rows], b[:, :, ~rows], rtol=1e-4, atol=1e-4)
    assert found[1][:, :, queries].isnan().any(dim=-1).all()
    assert found[0][:, :, queries].isnan().any() == (name != "do")
    assert found[2][:, :, keys].isnan().any(dim=-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decoding", [True, False])
def test_unused_cache_entries_reach_no_result(backend, decoding):
    case = draw_case((4, 2), (3, 60), 16, batch=2, cache_lengths=torch.tensor([41, 18], device=DEVICE))
    case.k[0, :, 41:], case.v[0, :, 41:], case.k[1, :, 18:], case.v[1, :, 18:] = torch.nan, torch.inf, torch.inf, torch.nan
    case.v[0, :, 40] = torch.nan
    with use_backend(backend), tiles(64, 16, splits=2), torch.no_grad():
        if decoding:
            o = attention(case.q, case.k, case.v, **case.options)
        else:
            with without_decoding():
                o = attention(case.q, case.k, case.v, **case.options)
        alone = [attention(case.q[i : i + 1], *(t[i : i + 1, :, :n] for t in (case.k, case.v))) for i, n in ((0, 41), (1, 18))]
    assert o[0, :, 2].isnan().any(dim=-1).all()
    torch.testing.assert_close(o, torch.cat(alone), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert o[0, :, :2].isfinite().all()
    assert o[1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(1, 700), (30, 20)])
def test_a_sink_of_minus_infinity_has_no_effect(backend, lengths):
    case = draw_case((2, 1), lengths, 16)
    both = Case(case.q, case.k, case.v, case.do, case.dlse, torch.tensor([-torch.inf, 0.3], device=DEVICE))
    with use_backend(backend), tiles(16, 32, splits=2):
        found = both.run(attention)
        without = case.run(attention)
        with_one = Case(case.q, case.k, case.v, case.do, case.dlse, torch.tensor([0.3, 0.3], device=DEVICE)).run(attention)
    for name in ("o", "lse", "dq"):
        torch.testing.assert_close(found[name][:, :1], without[name][:, :1])
        torch.testing.assert_close(found[name][:, 1:], with_one[name][:, 1:])
    assert found["dsinks"][0] == 0
    assert all(t.isfinite().all() for name, t in found.items() if name != "lse")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dlse", [False, True])
def test_the_gradient_of_an_output_without_keys_reaches_no_sink(backend, dlse):
    # The first 20 queries see no key.
    case = draw_case((2, 1), (40, 20), 16, sinks=True, dlse=dlse)
    with use_backend(backend), tiles(16, 16):
        expected = case.run(attention)
        case.do[0, 0, 3, 5] = math.nan
        found = case.run(attention)
    torch.testing.assert_close(found["dsinks"], expected["dsinks"])
