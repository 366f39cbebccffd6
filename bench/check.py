"""Whether results are right: their errors against float64 beside PyTorch's in the same dtype, for small and large values apart.

An error may be twice that of PyTorch, plus one rounding. But of the gradient of a cross-entropy nearly all values are a hundred
thousand times smaller than those of the targets: held to one rounding of the largest, they could as well be zero. So values are
compared in groups of one size.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Values within a factor of 4 are of one size. From a factor of 2^48 below the largest on they all are.
OCTAVES, SIZES = 2, 24
# Of fewer values no error is typical: they are judged with the next larger ones.
FEWEST = 256
# How many are compared at once: enough for a GPU, in a few GB. More than 2^31 PyTorch cannot index.
CHUNK = 2**26
# A float32 scalar is a sum of thousands of terms in an order of its own. A term that is lost still shows.
SCALAR_ROUNDINGS = 64
# Four bits more than rounding takes away: what adds up in half precision is less exact, what is further off is wrong.
WRONG = 16


class WrongError(Exception):
    """A variant whose results are further off than rounding explains."""


@dataclass(frozen=True)
class _Spread:
    """What is known of the values of each size, largest first: (SIZES,) each, float64 on the CPU."""

    count: Tensor
    squares: Tensor
    largest: Tensor


def _sizes(exact: Tensor, top: int) -> Tensor:
    """Return the index of the size of each value, 0 for the largest."""
    sizes = ((top - torch.frexp(exact).exponent) // OCTAVES).clamp(0, SIZES - 1)
    return sizes.masked_fill_(exact == 0, SIZES - 1)


def _groups(count: Tensor) -> Iterator[slice]:
    """Yield slices of sizes that have enough values together, from the smallest ones on."""
    end, held = SIZES, 0.0
    for size in reversed(range(SIZES)):
        held += count[size].item()
        if held >= FEWEST and count[:size].sum() >= FEWEST:
            yield slice(size, end)
            end, held = size, 0.0
    yield slice(0, end)


class Right:
    """What a tensor must be: the exact values, and how far off those of each size may be."""

    def __init__(self, exact: Tensor, reference: Tensor) -> None:
        """Both of one shape: `exact` in float64, `reference` as PyTorch computes it in the dtype that is compared."""
        self.shape = exact.shape
        # Its rounding to float32 is nothing beside that of half precision.
        self._exact = exact.flatten() if reference.dtype in (torch.float32, torch.float64) else exact.flatten().float()
        self._top = int(torch.frexp(self._exact.abs().max()).exponent)
        # Zeros are off by the values themselves.
        self._values = self._errors(self._exact.new_zeros(()).expand_as(exact))
        self._reference = self._errors(reference)
        self._groups = list(_groups(self._values.count))

    def _errors(self, own: Tensor) -> _Spread:
        """Sum up how far off the values of each size are, in units of 2^top: in others the squares of small ones would be 0."""
        count, squares, largest = torch.zeros(3, SIZES, dtype=torch.float64, device=self._exact.device)
        for exact, part in zip(self._exact.split(CHUNK), own.detach().flatten().split(CHUNK), strict=True):
            sizes = _sizes(exact, self._top)
            errors = (part.to(exact.dtype) - exact).abs() * 2.0**-self._top
            for size in range(SIZES):
                # Picked, not masked: of gigabytes each is then summed up once, and not once for each size.
                of_size = errors[sizes == size]
                if of_size.numel():
                    count[size] += of_size.numel()
                    squares[size] += of_size.square().sum()
                    largest[size] = largest[size].maximum(of_size.amax())
        return _Spread(count.cpu(), squares.cpu(), largest.cpu())

    def excess(self, own: Tensor) -> tuple[float, float]:
        """Return how many times as far off as it may be the worst size of values is, and how large those values are.

        Off may be twice PyTorch's error and one rounding. Both the root of the mean square and the largest error are compared.
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
            # A rounding is off by half of `eps` at most. Where all is 0, a ratio is not NaN.
            tiny = torch.finfo(torch.float64).tiny
            ratio = torch.maximum(
                rms / (2 * reference_rms + eps / 2 * typical + tiny), worst / (2 * reference_worst + eps * size + tiny)
            )
            found.append((ratio.item(), size.item() * 2.0**self._top))
        return max(found, key=lambda one: (math.isnan(one[0]), one))

    def check(self, own: Tensor, what: str) -> str | None:
        """Return a note on a tensor that is less exact than it may be, None on one that is not; a wrong one is `WrongError`."""
        if own.shape != self.shape:
            raise WrongError(f"{what} has the shape {tuple(own.shape)} instead of {tuple(self.shape)}")
        ratio, size = self.excess(own)
        if ratio <= 1:
            return None
        note = f"{what} is off by {ratio:.3g} times what rounding explains, where values are up to {size:.2g}"
        if not ratio <= WRONG:  # NaN too
            raise WrongError(note)
        return note


class Judge(Protocol):
    """Knows what a tensor must be."""

    def check(self, own: Tensor, what: str) -> str | None:
        """Return a note on a tensor that is less exact than it may be; a wrong one is `WrongError`."""
        ...


def output_gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Draw the gradients of the outputs, the same for all variants; that of a scalar is 1."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)

    def draw(y: Tensor) -> Tensor:
        drawn = torch.randn(y.shape, generator=generator, device=y.device).bfloat16()
        return drawn.to(y.dtype) if y.dim() else torch.ones_like(y)

    return tuple(map(draw, outputs))


def compute(variant: Callable[..., Any], inputs: tuple[Any, ...], backward: bool) -> dict[str, Tensor]:
    """Return the outputs of a variant; with `backward` also the gradients of those inputs that require them."""
    outputs = variant(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"result {i}": y.detach() for i, y in enumerate(outputs)}
    if not backward:
        return results
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    # A compiled variant keeps its buffers from its first backward pass on only where that retains them.
    gradients = torch.autograd.grad(outputs, wanted, output_gradients(outputs), retain_graph=True)
    return results | {f"gradient {i}": dx for i, dx in enumerate(gradients)}


def copies(inputs: tuple[Any, ...], exactly: bool = False, backward: bool = True) -> tuple[Any, ...]:
    """Return copies of `inputs`, `exactly` in float64; without `backward` none wants a gradient.

    Some variants write into their inputs: each is given copies of its own.
    """

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        made = x.detach().double() if exactly and x.is_floating_point() else x.detach().clone()
        return made.requires_grad_(backward and x.requires_grad)

    return tuple(map(copy, inputs))


def what_is_right(oracle: Callable[..., Any], torch_form: Callable[..., Any], inputs: tuple[Any, ...]) -> dict[str, Right]:
    """Return what the results and the gradients of an op must be, by `oracle` in float64 and by PyTorch's own form."""
    exact = compute(oracle, copies(inputs, exactly=True), True)
    return {name: Right(exact.pop(name), own) for name, own in compute(torch_form, copies(inputs), True).items()}


def check(variant: Callable[..., Any], inputs: tuple[Any, ...], right: Mapping[str, Judge], backward: bool) -> str | None:
    """Return what is to be noted on the results of `variant`, or with `backward` also its gradients; wrong ones raise."""
    found = compute(variant, copies(inputs, backward=backward), backward)
    return "; ".join(note for name, own in found.items() if (note := right[name].check(own, name))) or None
