"""What attention must give where nobody can hold its scores: the reference in float32, a few queries at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.op import Arguments
from .check import WrongError, output_gradients

# Scores that the reference holds at once, of all heads of one sequence.
SCORES = 2**26
# Of a token of one head. Rounding probabilities and their gradients to bfloat16, as every fused form does, costs up to 1.5%; a
# wrong mask or a lost tile costs a token or more. PyTorch's reference, which rounds only results, says too little: 0.2%.
TOLERANCE = 2**-5


def exact(arguments: Arguments, do: Tensor) -> dict[str, Tensor]:
    """Return o and, where q is trained, dq, dk and dv, in memory linear in T; causal, queries being the last of the keys."""
    q, k, v = arguments.positional
    trained = q.requires_grad
    names = ("result 0", "gradient 0", "gradient 1", "gradient 2") if trained else ("result 0",)
    results = {name: torch.zeros(like.shape, device=q.device) for name, like in zip(names, (q, q, k, v), strict=False)}
    num_queries, num_keys = q.shape[2], k.shape[2]
    rows = max(1, SCORES // (q.shape[1] * num_keys))
    for sequence in range(q.shape[0]):
        for start in range(0, num_queries, rows):
            # The keys that causality leaves a few queries: to the reference, its queries are the last of them.
            end = min(start + rows, num_queries)
            own = slice(sequence, sequence + 1), slice(None), slice(start, end)
            seen = *own[:2], slice(0, num_keys - num_queries + end)
            inputs = [piece.detach().float().requires_grad_(trained) for piece in (q[own], k[seen], v[seen])]
            o = reference.attention(*inputs, **arguments.options)  # pyright: ignore[reportArgumentType]
            results["result 0"][own] = o.detach()
            if trained:
                gradients = torch.autograd.grad(o, inputs, do[own].float())
                for name, place, gradient in zip(names[1:], (own, seen, seen), gradients, strict=True):
                    results[name][place] += gradient
    return results


def error_of(own: Tensor, right: Tensor) -> float:
    """Return the error of the worst token of any head of `own` (B, H, T, K), as a share of its size, or of the usual size.

    The share keeps late tokens, which average over many keys and are small, from hiding behind the first.
    """
    errors, sizes = ((t.square().sum(dim=-1)) for t in (own.float() - right, right))
    return (errors / sizes.maximum(sizes.mean())).max().sqrt().item()


class RightTokens:
    """What a tensor (B, H, T, K) must be, token by token."""

    def __init__(self, exact: Tensor) -> None:
        self.exact = exact

    def check(self, own: Tensor, what: str) -> None:
        """Raise where a token is further from the exact one than rounding explains."""
        error = error_of(own.detach(), self.exact)
        if not error <= TOLERANCE:  # NaN too
            raise WrongError(f"{what} of a token is off by {error:.1%}, allowed is {TOLERANCE:.1%}")


def attention_right(arguments: Arguments) -> Mapping[str, RightTokens]:
    """Return what the result and the gradients of a call must be."""
    (do,) = output_gradients((arguments.positional[0].detach(),))
    return {name: RightTokens(right) for name, right in exact(arguments, do).items()}
