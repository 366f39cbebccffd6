"""Documents, windows and lengths, and the tiles they leave: kernels visit no other tile and mask only partial tiles."""

from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import DEVICE, Case, check, draw_case, some, tiles, without_decoding
from tilewright.kernels import reference, use_backend
from tilewright.kernels.attention import attention, backward, forward
from tilewright.kernels.attention import documents as kernel_documents
from tilewright.kernels.attention.packing import Documents, cu_seqlens_bounds, document_bounds
from tilewright.kernels.dispatch import HAS_TRITON, interpreting

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
]


def documents(lengths, form):
    """Return the option that packs documents of these lengths, as unordered ids or as cumulative lengths."""
    if form == "cu_seqlens":
        return {"cu_seqlens": torch.tensor([0, *lengths], device=DEVICE).cumsum(0)}
    ids = [(7 * i + 3) % 5 for i in range(len(lengths))]
    return {"document_ids": torch.repeat_interleave(torch.tensor(ids), torch.tensor(lengths))[None].to(DEVICE)}


@some(max_examples=4)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=2, max_size=3),
    form=st.sampled_from(["document_ids", "cu_seqlens"]),
    causal=st.booleans(),
    window=st.none() | st.integers(2, 20),
)
def test_packed_documents_equal_separate_calls(lengths, form, causal, window):
    num_tokens = sum(lengths)
    case = draw_case((2, 1), (num_tokens, num_tokens), 16, causal=causal, window=window)
    parts = [t.split(lengths, dim=2) for t in (case.q, case.k, case.v, case.do, case.dlse)]
    with tiles(16, 16), use_backend("triton"):
        separate = [Case(*part, options=case.options).run(attention) for part in zip(*parts, strict=True)]
        case.options = case.options | documents(lengths, form)
        packed = case.run(attention)
    for name, result in packed.items():
        torch.testing.assert_close(result, torch.cat([part[name] for part in separate], dim=2), rtol=1e-4, atol=1e-5)


@some(max_examples=8)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=4),
    causal=st.booleans(),
    window=st.none() | st.integers(2, 20) | st.tuples(st.integers(-1, 9), st.integers(-1, 9)),
)
def test_documents_with_separate_key_lengths_equal_separate_calls(lengths, causal, window):
    of_queries, of_keys = (list(side) for side in zip(*lengths, strict=True))
    case = draw_case((2, 1), (sum(of_queries), sum(of_keys)), 16, causal=causal, window=window)
    parts = [t.split(of_queries, dim=2) for t in (case.q, case.do, case.dlse)] + [t.split(of_keys, 2) for t in (case.k, case.v)]
    with use_backend("reference"):
        separate = [
            Case(q, k, v, do, dlse, options=case.options).run(attention) for q, do, dlse, k, v in zip(*parts, strict=True)
        ]
    cumulative = [torch.tensor([0, *side[:-1]], device=DEVICE).cumsum(0) for side in (of_queries, of_keys)]
    case.options = case.options | dict(zip(("cu_seqlens", "cu_seqlens_k"), cumulative, strict=True))
    for backend in ("triton", "reference"):
        with tiles(16, 16), use_backend(backend):
            packed = case.run(attention)
        for name, result in packed.items():
            torch.testing.assert_close(result, torch.cat([part[name] for part in separate], dim=2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((90, 50), {}),
        ((50, 90), {"causal": False}),
        ((3, 90), {"window": 9}),
        ((90, 50), {"causal": False, "window": (3, 12)}),
        ((50, 90), {"window": 9}),
        ((3, 90), {"causal": False}),
    ],
    ids=str,
)
def test_separate_key_lengths_with_other_options(lengths, options):
    cu_seqlens = torch.tensor([0, lengths[0] // 3, lengths[0] // 3, lengths[0]], dtype=torch.int32, device=DEVICE)
    cu_seqlens_k = torch.tensor([0, 20, 41, 48], device=DEVICE)
    with tiles(16, 32, splits=2):
        check(draw_case((4, 2), lengths, 16, batch=2, sinks=True, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, **options))


def test_saved_tensors_may_change_their_layout():
    # Offloading returns contiguous copies of the saved tensors.
    cu_seqlens = {"cu_seqlens": torch.tensor([0, 2, 6], device=DEVICE), "cu_seqlens_k": torch.tensor([0, 7, 9], device=DEVICE)}
    case = draw_case((2, 1), (6, 9), 16, batch=2, **cu_seqlens)
    with use_backend("triton"):
        expected = case.run(attention)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t):
            found = case.run(attention)
    for name, result in found.items():
        assert torch.equal(result, expected[name]), name


def test_documents_in_any_layout():
    ids = torch.tensor([[0] * 5 + [1] * 30, [2] * 20 + [1] * 15], device=DEVICE)
    begins, ends = kernel_documents(ids)
    case = draw_case((2, 1), (35, 35), 16, batch=2, document_ids=ids)
    with use_backend("triton"):
        expected = case.run(attention)
        for laid in (lambda t: t.T.contiguous().T, lambda t: t.repeat_interleave(2, dim=1)[:, ::2]):
            for pair in ((laid(begins), laid(ends)), (laid(begins), ends), (begins, laid(ends))):
                case.options = {"document_ids": Documents(*pair)}
                for name, result in case.run(attention).items():
                    assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize(
    ("options", "causal"),
    [({}, True), ({"cu_seqlens": [0, 9, 20]}, False), ({"cu_seqlens": [0, 9, 20], "cu_seqlens_k": [0, 4, 20]}, True)],
)
@pytest.mark.parametrize("window", [2**31, 2**63 - 1, (2**63 - 1, 2**63 - 1), 2**70])
def test_windows_beyond_64_bits_have_no_effect(options, causal, window):
    options = {name: torch.tensor(x, dtype=torch.int32, device=DEVICE) for name, x in options.items()}
    case = draw_case((1, 1), (20, 20), 16, causal=causal, **options)
    for backend in ("triton", "reference"):
        with use_backend(backend):
            o = attention(case.q, case.k, case.v, window=window, **case.options)
            torch.testing.assert_close(o, attention(case.q, case.k, case.v, **case.options))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("options", [{}, {"cu_seqlens": torch.tensor([0, 15, 20])}])
def test_cache_lengths_are_clamped(dtype, options):
    lengths = torch.tensor([23, 2**31 - 1 if dtype == torch.int32 else 2**32 + 2, -3], dtype=dtype, device=DEVICE)
    options = {name: x.to(DEVICE) for name, x in options.items()}
    check(draw_case((2, 1), (5, 20), 16, batch=3, cache_lengths=lengths, **options))


def test_documents_differ_between_sequences():
    ids = torch.tensor([[0] * 5 + [1] * 40 + [0] * 5, [2] * 20 + [1] * 30], device=DEVICE)
    with tiles(16, 16):
        check(draw_case((2, 1), (50, 50), 16, batch=2, document_ids=ids))
        check(draw_case((2, 1), (23, 50), 16, batch=2, document_ids=ids, window=12))


@pytest.mark.parametrize(
    ("cumulative", "dtype"),
    [
        (cumulative, (torch.int32, torch.int64)[i % 2])
        for i, cumulative in enumerate([[0], [0, 0, 0, 10], [0, 10, 10, 50], [0, 20, 35, 35], [4, 9], [0, 30, 60]])
    ],
)
def test_empty_documents_and_tokens_after_the_last_length(dtype, cumulative):
    # Tokens after the last length are one more document; lengths beyond the tokens are clamped.
    cu_seqlens = torch.tensor(cumulative, dtype=dtype, device=DEVICE)
    with tiles(16, 32):
        check(draw_case((1, 1), (50, 50), 16, batch=2, cu_seqlens=cu_seqlens))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected exactly one of document_ids and cu_seqlens"),
        (
            {"document_ids": torch.zeros(1, 4), "cu_seqlens": torch.tensor([0, 4])},
            "expected exactly one of document_ids and cu_seqlens",
        ),
        ({"document_ids": torch.zeros(4)}, r"document_ids has shape \(4,\): expected \(B, S\)"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0]), "batch": 2, "num_keys": 4}, "cu_seqlens has dtype torch.float32"),
        ({"cu_seqlens": torch.tensor([4, 0]), "batch": 2, "num_keys": 4}, r"cu_seqlens is \[4, 0\]"),
        ({"cu_seqlens": torch.tensor([0, 4]), "batch": 2, "num_keys": 2.5}, "num_keys is 2.5: expected an integer"),
        ({"cu_seqlens": torch.tensor([0, 4]), "batch": 2}, "batch is 2, num_keys is None: expected both with cu_seqlens"),
    ],
)
def test_bad_arguments_of_documents_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        kernel_documents(**given)


@some(max_examples=60)
@given(lengths=st.lists(st.integers(0, 5), max_size=6), rest=st.integers(0, 3))
def test_bounds_of_documents(lengths, rest):
    expected = [(0, 0)] * 0
    for begin, end in pairwise(torch.tensor([0, *lengths, rest]).cumsum(0).tolist()):
        expected += [(begin, end)] * (end - begin)
    num_positions = len(expected)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([*lengths, rest]))[None]
    for begins, ends in (cu_seqlens_bounds(cu_seqlens, 1, num_positions), document_bounds(ids)):
        assert begins.dtype == ends.dtype == torch.int32
        assert list(zip(begins[0].tolist(), ends[0].tolist(), strict=True)) == expected


@pytest.mark.parametrize("lengths", [(40, 40), (3, 60), (50, 40)])
@pytest.mark.parametrize("causal", [True, False])
def test_cache_lengths(lengths, causal):
    cache_lengths = torch.tensor([lengths[1], 37, 16, 0], device=DEVICE)
    with tiles(16, 16, splits=2):
        check(draw_case((2, 1), lengths, 16, batch=4, causal=causal, cache_lengths=cache_lengths))


def test_cache_lengths_with_documents_and_a_window():
    ids = torch.tensor([[0] * 20 + [1] * 20, [0] * 10 + [1] * 30], device=DEVICE)
    with tiles(16, 16):
        options = {"document_ids": ids, "window": 12, "cache_lengths": torch.tensor([33, 25], dtype=torch.int32, device=DEVICE)}
        check(draw_case((2, 1), (20, 40), 16, batch=2, **options))


@pytest.mark.parametrize("window", [(3, 2), (0, 20), (-1, 4), (5, -1), (-1, -1)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_with_two_sides(window, causal):
    with tiles(16, 16):
        check(draw_case((2, 1), (40, 40), 16, causal=causal, window=window))
        check(draw_case((2, 1), (2, 40), 16, causal=causal, window=window))


def test_windows_by_hand():
    mask = reference.attention_mask(4, 4, causal=False, window=(1, 2))
    assert mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert torch.equal(reference.attention_mask(5, 7, window=3), reference.attention_mask(5, 7, window=(2, 0)))
    assert torch.equal(reference.attention_mask(5, 7, False, 3), reference.attention_mask(5, 7, False, (2, 2)))


@pytest.mark.parametrize("form", ["document_ids", "cu_seqlens"])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_shared_documents(form, backend):
    case = draw_case((2, 1), (40, 40), 16, batch=2)
    if form == "cu_seqlens":
        given = {"cu_seqlens": torch.tensor([0, 13, 30], device=DEVICE)}
        shared = kernel_documents(**given, batch=2, num_keys=40)
    else:
        given = {"document_ids": torch.tensor([[0] * 13 + [5] * 27, [2] * 30 + [1] * 10], device=DEVICE)}
        shared = kernel_documents(**given)
    with use_backend(backend), tiles(16, 16):
        expected = attention(case.q, case.k, case.v, **given)
        assert torch.equal(attention(case.q, case.k, case.v, document_ids=shared), expected)


@contextmanager
def visits():
    """Yield a list per kernel: whether each visited tile was masked; and the number of products, under "products"."""
    from triton.runtime.interpreter import InterpreterBuilder

    found = {"forward": [], "backward_q": [], "backward_kv": [], "products": 0}
    multiply = InterpreterBuilder.create_dot

    def counting(self, *args):
        found["products"] += 1
        return multiply(self, *args)

    def recording(kernel, function):
        def record(*args):
            found[kernel].append(bool(getattr(args[-1], "value", args[-1])))
            return function(*args)

        return record

    functions = [
        (forward, "add_tile", "forward"),
        (backward, "ds_of", "backward_q"),
        (backward, "add_to_dk_dv", "backward_kv"),
    ]
    with mock.patch.object(InterpreterBuilder, "create_dot", counting):
        patches = [
            mock.patch.object(module, name, recording(kernel, getattr(module, name))) for module, name, kernel in functions
        ]
        with patches[0], patches[1], patches[2]:
            yield found


def expected_visits(mask, rows, columns):
    """Return, for each non-empty tile of `mask` (T, S), whether it needs masking: not all of its pairs are visible.

    A tile that extends beyond the last column needs masking. Rows beyond the last are never stored.
    """
    found = []
    for row_tile in mask.split(rows, dim=0):
        for tile in row_tile.split(columns, dim=1):
            if tile.any():
                found.append(not tile.all().item() or tile.shape[1] < columns)
    return sorted(found)


@pytest.mark.skipif(HAS_TRITON and not interpreting(), reason="counts calls of the interpreter")
@some(max_examples=16)
@given(
    data=st.data(),
    num_keys=st.integers(1, 70),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 60),
    blocks=st.sampled_from([(16, 16), (16, 32), (32, 16)]),
    tma=st.booleans(),
)
def test_kernels_visit_no_empty_tile_and_mask_only_partial_tiles(data, num_keys, causal, window, blocks, tma):
    num_queries = data.draw(st.sampled_from([num_keys, num_keys, max(1, num_keys - 20), num_keys + 20]))
    options = {"causal": causal, "window": window}
    if num_queries <= num_keys and data.draw(st.booleans()):
        borders = data.draw(st.lists(st.integers(1, num_keys), max_size=3, unique=True))
        options["document_ids"] = sum((torch.arange(num_keys) >= border).int() for border in [0, *borders])[None]
    mask = reference.attention_mask(num_queries, num_keys, **options).view(num_queries, num_keys)
    block_m, block_n = blocks
    with tiles(*blocks, tma=tma), use_backend("triton"), without_decoding(), visits() as found:
        draw_case((1, 1), (num_queries, num_keys), 16, **options).run(attention)
    by_queries = expected_visits(mask, block_m, block_n)
    by_keys = expected_visits(mask.T, block_n, block_m)
    assert sorted(found["forward"]) == by_queries
    assert sorted(found["backward_q"]) == by_queries
    assert sorted(found["backward_kv"]) == by_keys
    assert found["products"] == 5 * len(by_queries) + 4 * len(by_keys)


@pytest.mark.skipif(HAS_TRITON and not interpreting(), reason="counts calls of the interpreter")
def test_tiles_by_hand():
    def count(num_queries, num_keys, **options):
        with tiles(16, 16), use_backend("triton"), without_decoding(), visits() as found:
            draw_case((2, 1), (num_queries, num_keys), 16, **options).run(attention)
        assert len(found["forward"]) == len(found["backward_q"]) == len(found["backward_kv"])
        return len(found["forward"]) // 2, sum(found["forward"]) // 2

    # n (n + 1) / 2 of n^2 tiles are on or below the diagonal; the n tiles on it are masked.
    assert count(64, 64) == (10, 4)
    assert count(64, 64, causal=False) == (16, 0)
    # A window of one tile crosses two tiles, except in the first row of tiles.
    assert count(64, 64, window=16) == (7, 7)
    # Two documents that share no tile: two triangles.
    assert count(64, 64, cu_seqlens=torch.tensor([0, 32, 64])) == (6, 4)
    # One tile of queries at the end of a cache sees all of it.
    assert count(16, 64) == (4, 1)
