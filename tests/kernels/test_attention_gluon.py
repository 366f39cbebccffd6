"""The Gluon attention kernels in the emulator: every option, every order of asynchronous events, and injected faults."""

import dataclasses
from contextlib import ExitStack
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from attention_cases import CALLS, Case, check_isolation, check_results, draw_case, without_decoding
from gluon_emulator import ORDERS, Mutation, StaleMutation, emulating
from oracle import poisoned_memory
from tilewright.kernels import reference, use_backend
from tilewright.kernels.attention import attention, hopper_backward_ends, op, set_attention_kernel, use_attention_kernel
from tilewright.kernels.attention.configurations import GLUON_KINDS, fused_config, read_configurations
from tilewright.kernels.attention.fused import FUSED_KERNELS
from tilewright.kernels.attention.options import Options
from tilewright.kernels.dispatch import HAS_TRITON

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels/test_attention_gpu.py runs them on the GPU"),
]
ALL_THREE = ["attention_forward_hopper", "attention_backward_q_hopper", "attention_backward_kv_hopper"]
LAUNCHED = {"gluon": ALL_THREE, "fused": [ALL_THREE[0], *(kernel.__name__ for kernel in FUSED_KERNELS)]}


def not_needed(*_):
    raise AssertionError("a result holds a NaN, although the inputs hold none")


# Recomputing results with NaN would hide an injected fault.
FINITE = dict.fromkeys(("store_isolated_output", "store_isolated_dq", "store_isolated_dk_dv"), not_needed)


def run(
    case: Case,
    order: str = "random",
    seed: int = 0,
    mutation: Mutation | None = None,
    replaced=FINITE,
    kernel="gluon",
    at_once=3,
    backward=True,
) -> dict[str, Any]:
    """Return o, lse and the gradients of a case; only Gluon kernels may compute them."""
    with ExitStack() as stack:
        for context in (use_attention_kernel(kernel), without_decoding(), poisoned_memory()):
            stack.enter_context(context)
        # The kernels before and after the fused one are interpreted.
        for name in replaced.keys() & vars(hopper_backward_ends).keys():
            stack.enter_context(mock.patch.object(hopper_backward_ends, name, not_needed))
        launches = stack.enter_context(emulating(order, seed, mutation, replaced, at_once))
        found = case.run(attention) if backward else {"o": attention(case.q, case.k, case.v, **case.options)}
    assert [launch.kernel.__name__ for launch in launches] == LAUNCHED[kernel][: None if backward else 1]
    return found


def in_turn(calls):
    """Give each call one order in turn, and under the mark `long` the two others."""
    return [
        pytest.param(*call, order, marks=() if i % len(ORDERS) == j else pytest.mark.long)
        for i, call in enumerate(calls)
        for j, order in enumerate(ORDERS)
    ]


@pytest.mark.parametrize(("heads", "lengths", "head_dim", "options", "order"), in_turn(CALLS))
def test_every_option_in_every_order(heads, lengths, head_dim, options, order):
    memory = ["tokens first", "packed", "heads first", "packed"]
    # With a softcap and head dim 128 the Gluon dK/dV kernel would spill registers, so the portable one runs.
    dtype = torch.float16 if "window" in options else torch.bfloat16
    case = draw_case(heads, lengths, head_dim, dtype=dtype, memory=memory, **options)
    with use_attention_kernel("gluon"), without_decoding(), emulating(order, replaced=FINITE) as launches:
        found = case.run(attention)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == (ALL_THREE if "softcap" not in options else [*ALL_THREE[:2], "attention_backward_kv"])
    check_results(case, found)


@pytest.mark.parametrize(
    ("heads", "num_tokens", "head_dim", "options", "order"),
    in_turn(
        [
            ((1, 1), 300, 128, {}),
            ((2, 1), 320, 128, {}),
            ((4, 2), 260, 96, {"batch": 2, "dlse": False}),
            ((6, 1), 130, 128, {"sinks": True, "scale": -0.3}),
            ((2, 1), 64, 72, {"dtype": torch.float16}),
            ((1, 1), 1, 128, {}),
        ]
    ),
)
def test_fused_backward_in_every_order(heads, num_tokens, head_dim, options, order):
    memory = ["tokens first", "packed", "heads first", "packed"]
    case = draw_case(heads, (num_tokens, num_tokens), head_dim, **{"dtype": torch.bfloat16, "memory": memory, **options})
    check_results(case, run(case, order, kernel="fused"))


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_fused_backward_with_split_groups(num_parts):
    case = draw_case((8, 2), (140, 140), 128, dtype=torch.bfloat16)
    with mock.patch("tilewright.kernels.attention.parts.parts_of", return_value=num_parts):
        check_results(case, run(case, kernel="fused"))


@pytest.mark.parametrize(
    ("heads", "lengths", "head_dim", "options"),
    [
        ((1, 1), (60, 60), 64, {}),
        ((1, 1), (60, 90), 128, {}),
        ((1, 1), (60, 60), 128, {"causal": False}),
        ((1, 1), (60, 60), 128, {"window": 20}),
        ((1, 1), (60, 60), 128, {"cu_seqlens": torch.tensor([0, 20, 60])}),
        ((1, 1), (60, 60), 128, {"cache_lengths": torch.tensor([50])}),
    ],
)
def test_unsupported_calls_fall_back_to_two_backward_kernels(heads, lengths, head_dim, options):
    case = draw_case(heads, lengths, head_dim, dtype=torch.bfloat16, **options)
    with use_attention_kernel("fused"), without_decoding(), emulating() as launches:
        case.run(attention)
    assert [launch.kernel.__name__ for launch in launches] == ALL_THREE


def test_fused_backward_requires_32_bit_offsets():
    def config(num_tokens):
        q, k = (torch.empty(1, heads, num_tokens, 128, dtype=torch.bfloat16, device="meta") for heads in (7, 1))
        with emulating():
            return fused_config((q, k, k, q), Options(True, 1.0, None, None, "ieee", "fused"))

    assert config(2**21 - 128) is not None
    assert config(2**21) is None


def test_configuration_selects_the_fused_backward_by_default():
    case = draw_case((1, 1), (60, 60), 128, dtype=torch.float16)
    key = "sm_90 backward_fused gluon 128"
    for ships in (False, True):
        config = dataclasses.replace(read_configurations()[key], gluon=ships)
        with mock.patch.dict(read_configurations(), {key: config}), without_decoding(), emulating() as launches:
            case.run(attention)
        assert ("attention_backward_hopper" in [launch.kernel.__name__ for launch in launches]) == ships


def test_wide_heads_and_the_rest_of_the_backward_pass():
    case = draw_case((1, 1), (150, 150), 256, dtype=torch.bfloat16)
    with use_attention_kernel("gluon"), emulating() as launches:
        o = attention(case.q, case.k, case.v)
    assert [launch.kernel.__name__ for launch in launches] == ["attention_forward_hopper"]
    exact = reference.attention(case.q.double(), case.k.double(), case.v.double())
    assert (o.double() - exact).abs().max() < 0.02


@pytest.mark.parametrize(("kernel", "head_dim", "options"), [("gluon", 64, {"window": 90}), ("fused", 128, {})])
def test_results_do_not_depend_on_the_order_of_events(kernel, head_dim, options):
    case = draw_case((4, 1), (300, 300), head_dim, dtype=torch.bfloat16, **options)
    first = run(case, "early", kernel=kernel, at_once=1)
    for order, seed, at_once in (("late", 0, 2), ("random", 1, 12)):
        found = run(case, order, seed, kernel=kernel, at_once=at_once)
        assert all(torch.equal(first[name], t) for name, t in found.items())


def test_the_gradient_of_an_lse_without_keys_reaches_no_input():
    # The first 50 queries see no key.
    case = draw_case((2, 1), (200, 150), 64, dtype=torch.bfloat16)

    def gradients():
        inputs = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
        with use_attention_kernel("gluon"), emulating(replaced=FINITE):
            return torch.autograd.grad(attention(*inputs, return_lse=True), inputs, (case.do, case.dlse))

    expected = gradients()
    case.dlse[:, :, :50] = torch.nan
    assert all(map(torch.equal, gradients(), expected))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_backward_pass_uses_the_choice_of_its_forward_pass(compiled):
    case = draw_case((1, 1), (60, 60), 64, dtype=torch.float16)
    function = torch.compile(attention, backend="aot_eager", fullgraph=True) if compiled else attention
    for kernel in ("gluon", "portable"):
        with ExitStack() as stack:
            stack.enter_context(use_backend("triton"))
            launched = [
                stack.enter_context(mock.patch.object(op, name, wraps=getattr(op, name)))
                for name in ("launch_forward", "launch_backward")
            ]
            with use_attention_kernel(kernel):
                o = function(*(t.detach().requires_grad_() for t in (case.q, case.k, case.v)))
            o.sum().backward()
        assert [launch.call_args.args[-1].kernel for launch in launched] == [kernel] * 2


@pytest.mark.parametrize("kernel", ["auto", "gluon"])
def test_the_interpreter_runs_the_portable_kernel(kernel):
    case = draw_case((1, 1), (60, 60), 64, dtype=torch.float16)
    key = "sm_90 forward half 64"
    ships = dataclasses.replace(read_configurations()[key], gluon=True)
    with use_backend("triton"), use_attention_kernel(kernel), mock.patch.dict(read_configurations(), {key: ships}):
        o = attention(case.q, case.k, case.v)
    torch.testing.assert_close(o, reference.attention(case.q, case.k, case.v), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("name", "bad"), [("q", torch.inf), ("k", torch.nan), ("v", torch.inf), ("do", torch.nan)])
def test_non_finite_values_reach_only_visible_rows(name, bad):
    with np.errstate(all="ignore"):
        check_isolation(name, bad, lambda case: run(case, replaced={}))


@pytest.mark.parametrize(("name", "bad"), [("q", torch.nan), ("v", torch.nan), ("do", torch.inf)])
def test_non_finite_values_reach_only_visible_rows_in_fused_backward(name, bad):
    # The interpreter runs the other kernels of the fused backward pass, and multiplies bfloat16 wrongly.
    with np.errstate(all="ignore"):
        check_isolation(name, bad, lambda case: run(case, replaced={}, kernel="fused"), 72, False, torch.float16)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (lambda: draw_case((1, 1), (60, 60), 64), ["attention_forward"]),
        (lambda: draw_case((1, 1), (60, 60), 32, dtype=torch.float16), ["attention_forward"]),
        (lambda: draw_case((1, 1), (60, 60), 128, value_dim=64, dtype=torch.float16), ["attention_forward"]),
        (
            lambda: draw_case((2, 2), (60, 60), 64, dtype=torch.float16, memory=["heads first", "expanded heads"] * 2),
            ["attention_forward"],
        ),
        # TMA cannot store an output of 65 channels, whose tokens are not 16-byte aligned.
        (lambda: draw_case((1, 1), (60, 60), 65, dtype=torch.float16), ["attention_forward"]),
        (lambda: draw_case((1, 1), (60, 60), 72, dtype=torch.float16), ["attention_forward_hopper"]),
        (lambda: draw_case((1, 1), (4, 600), 64, dtype=torch.float16), ["attention_decode", "attention_combine"]),
    ],
)
@pytest.mark.parametrize("tma", [True, False])
def test_unsupported_calls_fall_back_to_the_portable_kernel(case, names, tma):
    case = case()
    # With and without TMA in the portable configurations.
    ships = {key: dataclasses.replace(config, tma=tma and config.tma) for key, config in read_configurations().items()}
    changed = {key: config for key, config in ships.items() if not config.gluon and "gluon" not in key}
    with use_attention_kernel("gluon"), mock.patch.dict(read_configurations(), changed), emulating() as launches:
        o = attention(case.q, case.k, case.v)
    assert [launch.kernel.__name__ for launch in launches] == names
    exact = reference.attention(case.q.double(), case.k.double(), case.v.double())
    torch.testing.assert_close(o.double(), exact, rtol=1e-2, atol=1e-2)


def test_the_choice_selects_the_kernel():
    case = draw_case((1, 1), (60, 60), 64, dtype=torch.float16)

    def launched(kernel):
        with use_attention_kernel(kernel), emulating() as launches:
            attention(case.q, case.k, case.v)
        return launches[0].kernel.__name__

    assert launched("gluon") == "attention_forward_hopper"
    assert launched("portable") == "attention_forward"
    ships = read_configurations()["sm_90 forward half 64"].gluon
    assert launched("auto") == ("attention_forward_hopper" if ships else "attention_forward")
    with pytest.raises(ValueError, match="attention kernel is 'fast': expected one of auto, portable, gluon, fused"):
        set_attention_kernel("fast")  # pyright: ignore[reportArgumentType]


def test_gluon_defaults_have_configurations():
    configurations = read_configurations()
    for key, config in configurations.items():
        generation, kernel, kind, block_k = key.split()
        if kind in GLUON_KINDS and config.gluon:
            assert f"{generation} {kernel} {GLUON_KINDS[kind]} {block_k}" in configurations  # pyright: ignore


# The producer waits for keys and values in turn, so freeing too early the one that is freed first cannot be observed.
FORWARD = {
    "values are freed before their product is waited for": (
        "consume",
        "        acc, p = warpgroup_mma_wait(0, (sums, p))\n        mbarrier.arrive(v_free.index(stage_before))",
        "        mbarrier.arrive(v_free.index(stage_before))\n        acc, p = warpgroup_mma_wait(0, (sums, p))",
    ),
    "values are not waited for": ("consume", "        mbarrier.wait(v_ready.index(stage_before), phase_before)\n", ""),
    "the queries are not waited for": ("consume", "    mbarrier.wait(q_ready, 0)\n", ""),
    "one product is not waited for": (
        "consume", "s = warpgroup_mma_wait(1, (scores,))", "s = warpgroup_mma_wait(2, (scores,))",
    ),
    "the sums of a tile are not rescaled": (
        "consume",
        "        acc = acc * gl.convert_layout(rescale, O_ROWS)[:, None]\n        p = gl.convert_layout(next_p",
        "        p = gl.convert_layout(next_p",
    ),
    "the phase of the producer is wrong": (
        "produce", "mbarrier.wait(k_free.index(stage), phase ^ 1)", "mbarrier.wait(k_free.index(stage), phase)",
    ),
    "keys are overwritten as soon as one group is done": (
        "attention_forward_hopper", "mbarrier.init(k_free.index(i), count=GROUPS)", "mbarrier.init(k_free.index(i), count=1)",
    ),
    "the mask is off by one": ("masked_softmax", "keys < high[:, None]", "keys <= high[:, None]"),
    "the program ends before the output is copied": ("consume", "        tma.store_wait(0)\n", ""),
    "a scale of any sign is treated as positive": ("consume", "softcap is None and scale > 1e-30", "softcap is None"),
    "the output is copied before it is visible": ("consume", "        fence_async_shared()\n", ""),
    "a tile is processed twice": ("tile_at", "full_start + (i - masked) * BLOCK", "full_start"),
    "the running maximum is ignored": (
        "softmax", "gl.maximum(row_max, gl.max(s, 1) * factor)", "gl.max(s, 1) * factor + 0.0 * row_max",
    ),
}  # fmt: skip
BACKWARD_Q = {
    "keys are freed before the product for dq": (
        "add_tile",
        "    ds = gl.convert_layout(ds.to(k_tiles.dtype)",
        "    mbarrier.arrive(k_free.index(stage))\n    ds = gl.convert_layout(ds.to(k_tiles.dtype)",
    ),
    "keys are not waited for": ("add_tile", "    mbarrier.wait(k_ready.index(stage), phase)\n", ""),
    "the gradient of the output is not waited for": (
        "produce", "(q_desc.block_type.nbytes + do_desc.block_type.nbytes)", "q_desc.block_type.nbytes",
    ),
    "the mask is off by one": ("add_tile", "keys < high[:, None]", "keys < high[:, None] - 1"),
    "delta is ignored": ("add_tile", "(dp - delta[:, None])", "dp"),
}  # fmt: skip
BACKWARD_KV = {
    "buffers are freed before the product for dk": (
        "add_tile",
        "    ds = gl.convert_layout(ds.to(q.dtype), P_LAYOUT)",
        "    mbarrier.arrive(free.index(stage))\n    ds = gl.convert_layout(ds.to(q.dtype), P_LAYOUT)",
    ),
    "lse is not waited for": (
        "attention_backward_kv_hopper", "mbarrier.init(q_ready.index(i), count=2)", "mbarrier.init(q_ready.index(i), count=1)",
    ),
    "delta is not waited for": (
        "attention_backward_kv_hopper",
        "mbarrier.init(do_ready.index(i), count=2)", "mbarrier.init(do_ready.index(i), count=1)",
    ),
    "keys beyond the length have gradients": ("consume", "        if LENGTHS:\n", "        if False:\n"),
    "the product for dp is not waited for": (
        "add_tile", "dp = warpgroup_mma_wait(1, (dps,))", "dp = warpgroup_mma_wait(2, (dps,))",
    ),
    "the mask is off by one": ("add_tile", "seen = queries >= low[:, None]", "seen = queries > low[:, None]"),
    "the second head uses the queries of the first": (
        "tile_at", "head, place = head_and_place(i, masked, 0, GROUPED)", "head, place = 0, i % masked",
    ),
}  # fmt: skip
FUSED = {
    "dS of another group is not waited for": (
        "add_tile", "    mbarrier.wait(ds_ready.index(slot), turn)\n", "",
    ),
    "dS is read before it is visible": ("add_tile", "    fence_async_shared()\n", ""),
    "buffers are freed before the product for dk": (
        "add_tile",
        "    ds = gl.convert_layout(ds, P_LAYOUT)",
        "    mbarrier.arrive(free.index(stage))\n    ds = gl.convert_layout(ds, P_LAYOUT)",
    ),
    "the mask is off by one": ("add_tile", "queries[None, :] >= keys", "queries[None, :] > keys"),
    "groups do not wait for a turn": ("add_dq", "    mbarrier.wait(dq_free.index(slot), phase)\n", ""),
    "a turn is not waited for": ("begin_turns", "while done != (m - first) // BLOCK_N:", "while False:"),
    "a turn is not waited for in the last, shorter block": (
        "begin_turns",
        "while done != (m - first) // BLOCK_N:",
        "while (m + BLOCK_N <= sizes[4]) & (done != (m - first) // BLOCK_N):",
    ),
    "the last turn of a head does not end": ("end_turns", " | (m + BLOCK_M >= sizes[4])", ""),
    "a turn ends a tile early": ("end_turns", "(m % BLOCK_N + BLOCK_M == BLOCK_N)", "(m % BLOCK_N == 0)"),
    "a turn ends after one group has added": (
        "attention_backward_hopper",
        "mbarrier.init(dq_done.index(i), count=GROUPS)", "mbarrier.init(dq_done.index(i), count=1)",
    ),
    "programs wait for programs that start later": ("place_of", "rows_at_once, True)", "rows_at_once, False)"),
    "the sums of the second head have a wrong offset": ("consume", "            place += passed\n", ""),
}  # fmt: skip
# Options of the case that shows a fault, where the default case does not.
SHOWN_BY: dict[str, dict[str, Any]] = {
    "others": {},
    "a scale of any sign is treated as positive": {"scale": -0.3},
    "keys beyond the length have gradients": {"causal": False, "cache_lengths": torch.tensor([300])},
}
MUTANTS = [
    pytest.param(
        Mutation(function, *fault), kernel, results, name if name in SHOWN_BY else "others",
        id=f"{kernel}, {results[0]}: {name}",
    )
    for kernel, function, results, faults in (
        ("gluon", "attention_forward_hopper", ("o",), FORWARD),
        ("gluon", "attention_backward_q_hopper", ("dq",), BACKWARD_Q),
        ("gluon", "attention_backward_kv_hopper", ("dk",), BACKWARD_KV),
        ("fused", "attention_backward_hopper", ("dq", "dk"), FUSED),
    )
    for name, fault in faults.items()
]  # fmt: skip


@cache
def case_and_exact_results(kernel, shown_by):
    # Several tiles of each kind for each ring, and both heads of a group in one dK/dV program.
    num_tokens, head_dim = (800, 64) if kernel == "gluon" else (440, 128)
    case = draw_case((2, 1), (num_tokens, num_tokens), head_dim, dtype=torch.bfloat16, **SHOWN_BY[shown_by])
    return case, case.run(reference.attention, wide=True)


def is_right(results, kernel, shown_by, mutation=None, order="random", seed=0, at_once=3):
    """Return whether `results` of one case match the reference, row by row."""
    case, exact = case_and_exact_results(kernel, shown_by)
    try:
        with np.errstate(all="ignore"):
            found = run(case, order, seed, mutation, kernel=kernel, at_once=at_once, backward=results != ("o",))
    except StaleMutation:
        raise
    except Exception:  # a deadlock, or a failed check, which the interpreter may wrap
        return False
    errors = {name: (found[name].float() - exact[name].float()).norm(dim=-1) for name in results}
    return all((errors[name] <= 0.1 * exact[name].float().norm(dim=-1) + 0.02).all() for name in results)


@pytest.mark.parametrize(("mutation", "kernel", "results", "shown_by"), MUTANTS)
def test_an_injected_fault_is_found(mutation, kernel, results, shown_by):
    orders = (("late", 0, 2), ("late", 1, 3), ("early", 0, 3), ("random", 0, 3), ("random", 1, 3))
    assert not all(is_right(results, kernel, shown_by, mutation, *order) for order in orders)


@pytest.mark.parametrize("shown_by", SHOWN_BY)
def test_no_fault_is_found_without_injection(shown_by):
    assert is_right(("o",), "gluon", shown_by)
    assert is_right(("o", "dq", "dk"), "gluon", shown_by)
    assert shown_by != "others" or is_right(("dq", "dk", "dv"), "fused", shown_by)
