"""Times of attention, forward and backward and decoding, beside its peers; checked first against the reference in float32."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .attention_cases import TOLERANCE, AttentionCase, attention_cases, error_of, exact
from .attention_peers import Attention, Peer, Unsupported, installed_peers
from .kernels import Ceilings, timed_rows

Row = dict[str, Any]
# A call that takes so long at the ceiling is steady, and repeating it takes the time of other shapes.
LONG_SECONDS = 2e-2


def _check(own: tuple[Tensor, ...], right: Mapping[str, Tensor], names: tuple[str, ...]) -> None:
    """Raise where an output or a gradient is further from the exact one than rounding explains."""
    for tensor, name in zip(own, names, strict=True):
        error = error_of(tensor.detach(), right[name])
        if not error <= TOLERANCE:  # NaN too
            raise Unsupported(f"wrong: {name} of a token is off by {error:.1%}, allowed is {TOLERANCE:.1%}")


def _call(
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


def bench_attention_case(
    case: AttentionCase, peers: Mapping[str, Peer], device: torch.device, ceilings: Ceilings
) -> Iterator[Row]:
    """Yield the times of one shape in each direction; a peer that fails or errs is named, with the reason, instead of timed."""
    q, k, v, do = case.make(device)
    right = exact(case, q, k, v, do)
    ready: dict[str, Attention] = {}
    failed: dict[str, str] = {}
    for direction, cost in case.costs.items():
        name = f"{case.name} {direction}"
        calls: dict[str, Callable[[], object]] = {}
        for peer in [each for each in peers if each not in failed]:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    if peer not in ready:
                        ready[peer] = peers[peer](case, device)
                    calls[peer] = _call(ready[peer], direction, (q, k, v), do, right)
                except Unsupported as reason:
                    failed[peer] = str(reason)
                except Exception as error:  # a peer's failure, or a lack of memory, is a result and not the end of the bench
                    # SDPA warns of what a backend lacks before it gives up.
                    reasons = [f"{type(error).__name__}: {error}", *(str(warning.message) for warning in said)]
                    failed[peer] = "; ".join(reason.split(" (Triggered")[0] for reason in reasons)[:300]
            if peer in failed:
                yield {"case": name, "variant": peer, "not_measured": failed[peer]}
        rounds = 2 if cost.flops / ceilings.matmul > LONG_SECONDS else 3
        for row in timed_rows(name, calls, cost, device, ceilings, memory=True, rounds=rounds):
            seconds = row["p50_ms"] * 1e-3
            yield row | {"share_of_matmul": cost.flops / ceilings.matmul / seconds}


def bench_attention(device: torch.device, ceilings: Ceilings, seconds: float = 150.0) -> Iterator[Row]:
    """Yield the times of every shape; shapes that would begin later than after `seconds` are named instead."""
    start = time.monotonic()
    peers, missing = installed_peers()
    for peer, reason in missing.items():
        yield {"case": "attention", "variant": peer, "not_measured": reason}
    for case in attention_cases():
        if time.monotonic() - start > seconds:
            yield {"case": case.name, "not_measured": f"the stage's {seconds:.0f} s were over"}
            continue
        try:
            yield from bench_attention_case(case, peers, device, ceilings)
        except torch.cuda.OutOfMemoryError:
            yield {"case": case.name, "not_measured": "more memory than there is"}
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
