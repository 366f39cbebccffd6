"""Times of attention, forward and backward and decoding, beside its peers; checked first against the reference in float32."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from .attention_cases import TOLERANCE, AttentionCase, attention_cases, error_of, exact
from .attention_peers import Attention, Peer, Unsupported, installed_peers
from .ceilings import Ceilings
from .jobs import Job, Rows
from .kernels import timed_rows

# A call that takes so long at the ceiling is steady, and repeating it takes the time of other shapes.
LONG_SECONDS = 2e-2


def _check(own: tuple[Tensor, ...], right: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    """Raise where an output or a gradient is further from the exact one than rounding explains."""
    for tensor, name in zip(own, names, strict=True):
        error = error_of(tensor.detach(), right[name])
        if not error <= TOLERANCE:  # NaN too
            raise Unsupported(f"wrong: {name} of a token is off by {error:.1%}, allowed is {TOLERANCE:.1%}")


def prepare(
    attention: Attention, direction: str, inputs: tuple[Tensor, ...], do: Tensor, right: Mapping[str, Tensor]
) -> Callable[[], object]:
    """Return what is to be timed, called once; its results are right."""
    if direction == "forward":
        _check((attention(*inputs),), right, ("o",))
        return lambda: attention(*inputs)
    # The same memory for every peer: none writes into its inputs.
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    if direction == "backward":
        o = attention(*leaves)
        # A compiled peer keeps its buffers only where its first backward pass retains them.
        _check(torch.autograd.grad(o, leaves, do, retain_graph=True), right, ("dq", "dk", "dv"))
        return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)

    def both() -> object:
        return torch.autograd.grad(attention(*leaves), leaves, do)

    both()
    return both


def bench_attention_case(case: AttentionCase, peers: Mapping[str, Peer], device: torch.device, ceilings: Ceilings) -> Rows:
    """Yield the times of one shape in each direction; a peer that fails or errs is named, with the reason, instead of timed."""
    q, k, v, do = case.make(device)
    right = exact(case, q, k, v, do)
    ready: dict[str, Attention] = {}
    failed: dict[str, str] = {}
    ready_s: dict[str, float] = {}
    for direction, cost in case.costs.items():
        name = f"{case.name} {direction}"
        calls: dict[str, Callable[[], object]] = {}
        for peer in [each for each in peers if each not in failed]:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                start = time.perf_counter()
                try:
                    if peer not in ready:
                        ready[peer] = peers[peer](case, device)
                    calls[peer] = prepare(ready[peer], direction, (q, k, v), do, right)
                    ready_s[peer] = time.perf_counter() - start
                except Unsupported as reason:
                    failed[peer] = str(reason)
                except Exception as error:  # a peer's failure, or a lack of memory, is a result and not the end of the bench
                    # SDPA warns of what a backend lacks before it gives up.
                    reasons = [f"{type(error).__name__}: {error}", *(str(warning.message) for warning in said)]
                    failed[peer] = "; ".join(reason.split(" (Triggered")[0] for reason in reasons)[:300]
            if peer in failed:
                yield {"case": name, "variant": peer, "not_measured": failed[peer]}
        rounds = 2 if cost.flops / ceilings.matmul > LONG_SECONDS else 3
        # Shapes that compare along the length of the sequence.
        series = {"op": f"attention K{case.head_dim} {direction}", "size": case.num_queries} if case.is_plain else {}
        for row in timed_rows(name, calls, cost, device, ceilings, memory=True, rounds=rounds):
            if "not_measured" in row:
                yield row
                continue
            seconds = row["p50_ms"] * 1e-3
            shares = {"share_of_matmul": cost.flops / ceilings.matmul / seconds}
            yield row | shares | {"ready_s": ready_s[row["variant"]], **series}


def attention_jobs(device: torch.device, ceilings: Ceilings) -> Iterator[Job]:
    """Yield the naming of peers that are missing, and the measuring of every shape."""
    peers, missing = installed_peers()
    rows = [{"case": "attention", "variant": peer, "not_measured": reason} for peer, reason in missing.items()]
    yield Job("attention", lambda: iter(rows))
    for case in attention_cases():
        yield Job(case.name, partial(bench_attention_case, case, peers, device, ceilings))
