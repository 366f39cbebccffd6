"""Expected attention results at lengths where the scores do not fit: the reference, a few queries at a time.

It computes in float64, except on GPUs whose float64 is many times slower than float32.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.op import Arguments
from .check import WrongError, output_gradients

# GPUs for data centers, with float64 in their tensor cores.
FAST_FLOAT64 = {(8, 0), (9, 0), (10, 0)}
# Scores that the reference materializes at once, over all heads of one sequence.
SCORES = 2**26
# Relative error of one token of one head. Rounding probabilities and their gradients to bfloat16, as every fused kernel does,
# costs up to 1.5%; a wrong mask or a lost tile changes a token by 100% or more. PyTorch's reference rounds only results, so its
# error of 0.2% is no guide.
TOLERANCE = 2**-5


def precision(device: torch.device) -> torch.dtype:
    """Return the dtype of the expected results."""
    slow = device.type == "cuda" and torch.cuda.get_device_capability(device) not in FAST_FLOAT64
    return torch.float32 if slow else torch.float64


def exact(arguments: Arguments, do: Tensor) -> dict[str, Tensor]:
    """Return o and, if q requires a gradient, dq, dk and dv. Memory is linear in T; the mask is causal, queries are last."""
    q, k, v = arguments.positional
    trained, dtype = q.requires_grad, precision(q.device)
    names = ("result 0", "gradient 0", "gradient 1", "gradient 2") if trained else ("result 0",)
    results = {
        name: torch.zeros(like.shape, dtype=dtype, device=q.device) for name, like in zip(names, (q, q, k, v), strict=False)
    }
    num_queries, num_keys = q.shape[2], k.shape[2]
    rows = max(1, SCORES // (q.shape[1] * num_keys))
    for sequence in range(q.shape[0]):
        for start in range(0, num_queries, rows):
            # Pass the keys up to `end` only, because the reference aligns its queries to the last keys.
            end = min(start + rows, num_queries)
            own = slice(sequence, sequence + 1), slice(None), slice(start, end)
            seen = *own[:2], slice(0, num_keys - num_queries + end)
            inputs = [piece.detach().to(dtype).requires_grad_(trained) for piece in (q[own], k[seen], v[seen])]
            o = reference.attention(*inputs, **arguments.options)  # pyright: ignore[reportArgumentType]
            results["result 0"][own] = o.detach()
            if trained:
                gradients = torch.autograd.grad(o, inputs, do[own].to(dtype))
                for name, place, gradient in zip(names[1:], (own, seen, seen), gradients, strict=True):
                    results[name][place] += gradient
    return results


def error_of(own: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of a token in any head of `own` (B, H, T, K).

    The denominator is the norm of the token, but at least the root mean square norm. A per-token error finds wrong late tokens,
    which average over many keys and are small.
    """
    errors, sizes = ((t.square().sum(dim=-1)) for t in (own.to(expected.dtype) - expected, expected))
    return (errors / sizes.maximum(sizes.mean())).max().sqrt().item()


class ExpectedTokens:
    """Expected values of a tensor (B, H, T, K), compared token by token."""

    def __init__(self, exact: Tensor) -> None:
        self.exact = exact

    def check(self, own: Tensor, what: str) -> None:
        """Raise `WrongError` if the error of a token exceeds rounding."""
        error = error_of(own.detach(), self.exact)
        if not error <= TOLERANCE:  # NaN too
            raise WrongError(f"error of a token of {what} is {error:.1%}: expected at most {TOLERANCE:.1%}")


def expected_attention(arguments: Arguments) -> Mapping[str, ExpectedTokens]:
    """Return the expected result and gradients of a call."""
    (do,) = output_gradients((arguments.positional[0].detach(),))
    return {name: ExpectedTokens(expected) for name, expected in exact(arguments, do).items()}
