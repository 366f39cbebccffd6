"""Check results: compare their errors against float64 with PyTorch's errors in the same dtype, separately by magnitude.

The tolerance is twice PyTorch's error plus one rounding. Values are compared in groups of similar magnitude, because one
tolerance for all would miss small values: most gradients of a cross-entropy are a hundred thousand times smaller than the
target's gradient, and would pass as zeros.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# A group spans a factor of 4. Values more than 2^48 below the largest share the last group.
OCTAVES, SIZES = 2, 24
# Smaller groups have no typical error; they merge with the next larger magnitude.
FEWEST = 256
# Values compared at once: enough for a GPU, in a few GB. PyTorch cannot index more than 2^31.
CHUNK = 2**26
# A float32 scalar sums thousands of terms in an arbitrary order. A missing term still exceeds this.
SCALAR_ROUNDINGS = 64
# Errors up to 16 times the tolerance are inexact sums in half precision; larger errors are wrong results.
WRONG = 16


class WrongError(Exception):
    """A variant whose error exceeds rounding."""


@dataclass(frozen=True)
class _Statistics:
    """Statistics of the values by magnitude, largest first: (SIZES,) each, float64 on the CPU."""

    count: Tensor
    squares: Tensor
    largest: Tensor


def _sizes(exact: Tensor, top: int) -> Tensor:
    """Return the magnitude group of each value, 0 for the largest."""
    sizes = ((top - torch.frexp(exact).exponent) // OCTAVES).clamp(0, SIZES - 1)
    return sizes.masked_fill_(exact == 0, SIZES - 1)


def _groups(count: Tensor) -> Iterator[slice]:
    """Yield slices of magnitudes with enough values each, smallest magnitudes first."""
    end, held = SIZES, 0.0
    for size in reversed(range(SIZES)):
        held += count[size].item()
        if held >= FEWEST and count[:size].sum() >= FEWEST:
            yield slice(size, end)
            end, held = size, 0.0
    yield slice(0, end)


class Expected:
    """Expected values of a tensor, with a tolerance for each magnitude."""

    def __init__(self, exact: Tensor, reference: Tensor) -> None:
        """Take `exact` in float64 and `reference`, PyTorch's result in the compared dtype, of the same shape."""
        self.shape = exact.shape
        # Rounding `exact` to float32 is negligible next to half precision.
        self._exact = exact.flatten() if reference.dtype in (torch.float32, torch.float64) else exact.flatten().float()
        self._top = int(torch.frexp(self._exact.abs().max()).exponent)
        # The error of zeros is the value itself.
        self._values = self._errors(self._exact.new_zeros(()).expand_as(exact))
        self._reference = self._errors(reference)
        self._groups = list(_groups(self._values.count))

    def _errors(self, own: Tensor) -> _Statistics:
        """Return error statistics by magnitude, in units of 2^top so that squares of small errors do not underflow."""
        count, squares, largest = torch.zeros(3, SIZES, dtype=torch.float64, device=self._exact.device)
        for exact, part in zip(self._exact.split(CHUNK), own.detach().flatten().split(CHUNK), strict=True):
            sizes = _sizes(exact, self._top)
            errors = (part.to(exact.dtype) - exact).abs() * 2.0**-self._top
            for size in range(SIZES):
                # Indexing reads each value once; a mask per group would read gigabytes for every group.
                of_size = errors[sizes == size]
                if of_size.numel():
                    count[size] += of_size.numel()
                    squares[size] += of_size.square().sum()
                    largest[size] = largest[size].maximum(of_size.amax())
        return _Statistics(count.cpu(), squares.cpu(), largest.cpu())

    def excess(self, own: Tensor) -> tuple[float, float]:
        """Return the largest ratio of error to tolerance over all magnitudes, and the magnitude where it occurs.

        The tolerance is twice PyTorch's error plus one rounding, for both the root mean square and the largest error.
        """
        errors, eps = self._errors(own), torch.finfo(own.dtype).eps
        if own.dim() == 0 and own.dtype == torch.float32:
            eps *= SCALAR_ROUNDINGS
        found = []
        for group in self._groups:
            count, size = self._values.count[group].sum(), self._values.largest[group].amax()
            typical = (self._values.squares[group].sum() / count).sqrt()
            rms, reference_rms = ((each.squares[group].sum() / count).sqrt() for each in (errors, self._reference))
            worst, reference_worst = (each.largest[group].amax() for each in (errors, self._reference))
            # A rounding error is at most half of `eps`. `tiny` avoids 0 / 0.
            tiny = torch.finfo(torch.float64).tiny
            ratio = torch.maximum(
                rms / (2 * reference_rms + eps / 2 * typical + tiny), worst / (2 * reference_worst + eps * size + tiny)
            )
            found.append((ratio.item(), size.item() * 2.0**self._top))
        return max(found, key=lambda one: (math.isnan(one[0]), one))

    def check(self, own: Tensor, what: str) -> str | None:
        """Return a note if the error exceeds the tolerance, else None; raise `WrongError` if it is far larger."""
        if own.shape != self.shape:
            raise WrongError(f"{what} has the shape {tuple(own.shape)}: expected {tuple(self.shape)}")
        ratio, size = self.excess(own)
        if ratio <= 1:
            return None
        note = f"error of {what} is {ratio:.3g} times the tolerance, for values up to {size:.2g}"
        if not ratio <= WRONG:  # NaN too
            raise WrongError(note)
        return note


class Checker(Protocol):
    """An object that checks a tensor against expected values."""

    def check(self, own: Tensor, what: str) -> str | None:
        """Return a note if the tensor is inexact, else None; raise `WrongError` if it is wrong."""
        ...


def output_gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Draw the gradients of the outputs, the same for all variants; the gradient of a scalar is 1."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)

    def draw(y: Tensor) -> Tensor:
        drawn = torch.randn(y.shape, generator=generator, device=y.device).bfloat16()
        return drawn.to(y.dtype) if y.dim() else torch.ones_like(y)

    return tuple(map(draw, outputs))


def compute(variant: Callable[..., Any], inputs: tuple[Any, ...], backward: bool) -> dict[str, Tensor]:
    """Return the outputs of a variant; with `backward` also the gradients of the inputs that require them."""
    outputs = variant(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"result {i}": y.detach() for i, y in enumerate(outputs)}
    if not backward:
        return results
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    # A compiled variant keeps its buffers after the first backward pass only if that pass retains the graph.
    gradients = torch.autograd.grad(outputs, wanted, output_gradients(outputs), retain_graph=True)
    return results | {f"gradient {i}": dx for i, dx in enumerate(gradients)}


def copies(inputs: tuple[Any, ...], exactly: bool = False, backward: bool = True) -> tuple[Any, ...]:
    """Return copies of `inputs`, `exactly` in float64; without `backward` no copy requires a gradient.

    Each variant gets its own copies, because some variants write into their inputs.
    """

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        made = x.detach().double() if exactly and x.is_floating_point() else x.detach().clone()
        return made.requires_grad_(backward and x.requires_grad)

    return tuple(map(copy, inputs))


def expected_results(
    oracle: Callable[..., Any], torch_form: Callable[..., Any], inputs: tuple[Any, ...]
) -> dict[str, Expected]:
    """Return the expected results and gradients of an op, from `oracle` in float64 and from PyTorch's implementation."""
    exact = compute(oracle, copies(inputs, exactly=True), True)
    return {name: Expected(exact.pop(name), own) for name, own in compute(torch_form, copies(inputs), True).items()}


def check(variant: Callable[..., Any], inputs: tuple[Any, ...], expected: Mapping[str, Checker], backward: bool) -> str | None:
    """Check the results of `variant`, and its gradients with `backward`; return notes, or raise `WrongError`."""
    found = compute(variant, copies(inputs, backward=backward), backward)
    return "; ".join(note for name, own in found.items() if (note := expected[name].check(own, name))) or None
