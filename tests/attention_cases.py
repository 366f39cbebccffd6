"""Shared helpers of the attention tests: cases, comparison with the oracle, and small tiles for short sequences."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any, get_args
from unittest import mock

import torch
from hypothesis import Phase, settings
from torch import Tensor

from oracle import assert_accurate, poisoned_memory
from tilewright.kernels import reference, use_backend
from tilewright.kernels.attention import attention, configurations, decode, launches
from tilewright.kernels.attention.configurations import GLUON_KINDS, Generation, Kernel, Kind, LaunchConfig, key_of

# No shrinking: it would run interpreted kernels for minutes before it reports a failure.
some = partial(settings, derandomize=True, deadline=None, phases=[Phase.generate])

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Memory layouts of (B, H, T, K) heads: contiguous; as a projection writes them; inside a packed QKV projection; and layouts
# that a TMA descriptor, or any kernel, does not support.
MEMORY: dict[str, Callable[[int, int, int, int], Tensor]] = {
    "heads first": lambda b, h, t, k: torch.randn(b, h, t, k),
    "tokens first": lambda b, h, t, k: torch.randn(b, t, h, k).transpose(1, 2),
    "packed": lambda b, h, t, k: torch.randn(b, t, (h + 2) * k)[..., k : (h + 1) * k].unflatten(-1, (h, k)).transpose(1, 2),
    "one element on": lambda b, h, t, k: torch.randn(b * h * t * k + 1)[1:].view(b, h, t, k),
    "odd token stride": lambda b, h, t, k: torch.randn(b, h, t, k + 3)[..., :k],
    "every other token": lambda b, h, t, k: torch.randn(b, h, 2 * t, k)[:, :, ::2],
    "expanded heads": lambda b, h, t, k: torch.randn(b, 1, t, k).expand(b, h, t, k),
    "every other channel": lambda b, h, t, k: torch.randn(b, t, h, 2 * k)[..., ::2].transpose(1, 2),
    "channels first": lambda b, h, t, k: torch.randn(b, h, k, t).mT,
    "one number": lambda b, h, t, k: torch.randn(1, 1, 1, 1).expand(b, h, t, k),
}


@contextmanager
def tiles(
    block_m: int, block_n: int, *, tma: bool = True, splits: int | None = None, rows_at_once: int | None = None
) -> Iterator[None]:
    """Use tiles of block_m queries and block_n keys in every kernel; optionally fix the decoding splits and `rows_at_once`."""

    of_all = {
        key_of(generation, kernel, kind, block_k): LaunchConfig(
            block_m, block_n, block_k, num_warps=4, num_stages=2, tma=tma and generation in ("sm_90", "sm_100")
        )
        for generation, kernel, kind in product(get_args(Generation), get_args(Kernel), get_args(Kind))
        if kind not in GLUON_KINDS.values()
        for block_k in (16, 32, 64, 128, 256)
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(configurations, "read_configurations", return_value=of_all))
        if splits is not None:
            stack.enter_context(mock.patch.object(decode, "splits_of", return_value=splits))
        if rows_at_once is not None:
            stack.enter_context(mock.patch.object(launches, "rows_at_once", return_value=rows_at_once))
        yield


@contextmanager
def without_decoding() -> Iterator[None]:
    """Run the forward kernel instead of the decoding kernel for few queries."""
    with mock.patch("tilewright.kernels.attention.op.fits_decode", return_value=False):
        yield


# Calls that all kernels support in half precision: (query, key-value heads), (queries, keys), head dim, options.
CALLS: list[tuple[tuple[int, int], tuple[int, int], int, dict[str, Any]]] = [
    ((2, 1), (300, 300), 64, {}),
    ((2, 1), (300, 300), 128, {}),
    ((1, 1), (64, 400), 128, {"causal": False}),
    ((2, 1), (130, 700), 64, {"window": 200, "sinks": True}),
    ((4, 1), (300, 300), 96, {"window": (40, 90), "causal": False, "softcap": 10.0}),
    ((2, 2), (300, 300), 64, {"batch": 2, "cache_lengths": torch.tensor([300, 170])}),
    ((2, 1), (300, 300), 64, {"cu_seqlens": torch.tensor([0, 100, 130, 300])}),
    (
        (2, 1), (300, 260), 64,
        {"cu_seqlens": torch.tensor([0, 100, 130, 300]), "cu_seqlens_k": torch.tensor([0, 50, 200, 260]), "window": 90},
    ),
    ((2, 1), (300, 300), 64, {"batch": 3, "causal": False, "cache_lengths": torch.tensor([300, 170, 0])}),
    ((1, 1), (200, 200), 64, {"scale": -0.3}),
    ((1, 1), (200, 200), 64, {"scale": 0.0, "document_ids": torch.arange(200)[None] // 70}),
    ((1, 1), (200, 150), 64, {}),
    ((1, 1), (1, 1), 128, {}),
]  # fmt: skip


@dataclasses.dataclass
class Case:
    """The inputs of a call, the gradients of its results, and its options."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dlse: Tensor | None = None
    sinks: Tensor | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, function: Callable[..., Any], *, wide: bool = False) -> dict[str, Tensor]:
        """Return o, lse and the gradients by name; computed in float64 if `wide`."""
        inputs = {name: getattr(self, name) for name in ("q", "k", "v", "sinks") if getattr(self, name) is not None}
        inputs = {name: (t.double() if wide else t).detach().requires_grad_() for name, t in inputs.items()}
        o, lse = function(**inputs, **self.options, return_lse=True)
        outputs, gradients = [o], [self.do.to(o.dtype)]
        if self.dlse is not None:
            # An lse of -inf has no useful gradient.
            outputs.append(lse.masked_fill(lse == -torch.inf, 0.0))
            gradients.append(self.dlse.to(lse.dtype))
        found = torch.autograd.grad(outputs, list(inputs.values()), gradients)
        return {"o": o.detach(), "lse": lse.detach()} | {f"d{name}": d for name, d in zip(inputs, found, strict=True)}


def draw_case(
    heads: tuple[int, int],
    lengths: tuple[int, int],
    head_dim: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    memory: Sequence[str] = ("heads first",) * 4,
    dlse: bool = True,
    sinks: bool = False,
    value_dim: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Return a random case. `heads` is (query, key-value), `lengths` is (queries, keys), `memory` names q, k, v and do."""
    torch.manual_seed(seed)
    of_queries, of_keys = ((batch, heads[i], lengths[i]) for i in range(2))
    widths = (head_dim, head_dim, value_dim or head_dim, value_dim or head_dim)
    rows = (of_queries, of_keys, of_keys, of_queries)
    q, k, v, do = (_as(MEMORY[name](*shape, width), dtype) for name, shape, width in zip(memory, rows, widths, strict=True))
    row_gradients, scores = torch.randn(of_queries), torch.randn(heads[0])
    options = {name: option.to(DEVICE) if isinstance(option, Tensor) else option for name, option in options.items()}
    return Case(q, k, v, do, row_gradients.to(DEVICE) if dlse else None, scores.to(DEVICE) if sinks else None, options)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Like `to`, but preserves the strides and the storage offset.
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(DEVICE, dtype)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def rounding_of_terms(case: Case) -> dict[str, float]:
    """Bound the error of the gradients from rounding P and delta: they are sums of P do or P (dP - delta), which may cancel.

    The kernels recompute P from lse, so the relative error of P is the absolute error of lse. In half precision the kernels
    round P, and compute delta from the rounded o, as every FlashAttention does. The reference stores P and has the exact delta.
    """
    groups = case.q.shape[1] // case.k.shape[1]
    q, do = case.q.double(), case.do.double()
    k, v = (t.double().repeat_interleave(groups, dim=1) for t in (case.k, case.v))
    sinks = None if case.sinks is None else case.sinks.double()
    # With unit vectors as values, the output is the matrix of probabilities.
    units = torch.eye(k.shape[2], dtype=torch.float64, device=k.device).expand(*k.shape[:3], -1)
    p, lse = reference.attention(q, k, units, sinks=sinks, **case.options, return_lse=True)
    size_of_lse = lse.abs().masked_fill(lse == -torch.inf, 0.0)
    error = torch.finfo(case.q.dtype).eps + torch.finfo(torch.float32).eps * size_of_lse
    dp = (do @ v.mT).abs()
    delta = (p * dp).sum(dim=-1) + (0.0 if case.dlse is None else case.dlse.abs())
    scale = case.options.get("scale")
    dp_errors = p * (dp + delta[..., None]) * error[..., None] * abs(q.shape[-1] ** -0.5 if scale is None else scale)
    by_query_head = {"dk": dp_errors.mT @ q.abs(), "dv": (p * error[..., None]).mT @ do.abs()}
    errors = {name: t.unflatten(1, (-1, groups)).sum(dim=2) for name, t in by_query_head.items()}
    errors["dq"] = dp_errors @ k.abs()
    if sinks is not None:
        errors["dsinks"] = (torch.exp(sinks[:, None] - lse) * delta * error).sum(dim=(0, 2))
    return {name: t.max().item() for name, t in errors.items() if t.numel() > 0}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], exact: dict[str, Tensor], slack: dict[str, float]) -> None:
    """Check the results of a case with the oracle's tolerance."""
    blind = exact["lse"] == -torch.inf
    assert torch.equal(actual["lse"] == -torch.inf, blind)
    assert not actual["o"][blind].any()
    assert not actual["dq"][blind].any()
    for name, result in actual.items():
        others = expected[name], exact[name]
        if name == "lse":
            result, *others = (t.masked_fill(blind, 0.0) for t in (result, *others))
        assert_accurate(result, *others, what=name, slack=slack.get(name, 0.0))


def check(case: Case) -> dict[str, Tensor]:
    """Compare the kernels with the reference; return the kernels' results."""
    with use_backend("triton"), poisoned_memory():
        actual = case.run(attention)
    check_results(case, actual)
    return actual


def check_results(case: Case, actual: dict[str, Tensor]) -> None:
    """Compare kernel results of a case with the reference."""
    compare(actual, case.run(reference.attention), case.run(reference.attention, wide=True), rounding_of_terms(case))


def check_isolation(
    name: str,
    bad: float,
    run: Callable[[Case], dict[str, Tensor]],
    head_dim: int = 64,
    documents: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Put one non-finite value into an input and check that it reaches exactly the rows that see it."""
    num_tokens, place, first = (200, 140, 90) if documents else (140, 100, 0)
    options = {"cu_seqlens": torch.tensor([0, first, num_tokens])} if documents else {}
    case = draw_case((2, 1), (num_tokens, num_tokens), head_dim, dlse=False, dtype=dtype, **options)
    expected = run(case)
    getattr(case, name)[:, :, place, 3] = bad
    found = run(case)
    tokens = torch.arange(num_tokens, device=DEVICE)
    seeing = tokens == place if name in ("q", "do") else tokens >= place
    seen = (tokens >= first) & (tokens <= place if name in ("q", "do") else True)
    reached = {"o": seeing, "lse": seeing, "dq": seeing, "dk": seen, "dv": seen}
    for result, rows in reached.items():
        torch.testing.assert_close(found[result][:, :, ~rows], expected[result][:, :, ~rows], rtol=2e-2, atol=2e-2)
    marked = [found["dq"][:, :, [place]]] + ([found["o"][:, :, seeing]] if bad != bad and name != "do" else [])
    for rows in marked:
        torch.testing.assert_close(rows.isnan().any(dim=-1), torch.ones(rows.shape[:-1], dtype=torch.bool, device=DEVICE))
