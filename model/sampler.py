"""Sample the next token of each row from the model's logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .sampling import Sampling

# Near the smallest normal float32. A temperature or a probability below it selects the most likely token.
_SMALLEST = 1e-37
# Larger than any vocabulary.
_ALL = 2**31


Generators = torch.Generator | Sequence[torch.Generator | None] | None
"""One generator for all rows, or one per row, which makes rows independent of each other."""


class Sampler:
    """Sample one token per row, with separate options for each row.

    A row whose largest logit is not finite gets an arbitrary token. `require_finite` reports this later, to avoid a
    synchronization per token.
    """

    def __init__(self, rows: Sequence[Sampling], device: torch.device) -> None:
        self._finite = torch.ones((), dtype=torch.bool, device=device)

        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        self.penalty = None
        if any(row.repetition_penalty != 1 for row in rows):
            self.penalty = column([row.repetition_penalty for row in rows])
        temperatures = [0.0 if row.temperature < _SMALLEST else row.temperature for row in rows]
        self.all_greedy, self.greedy = not any(temperatures), None
        if 0 in temperatures:
            self.greedy = torch.tensor([t == 0 for t in temperatures], device=device)
        self.temperature = column([t or 1.0 for t in temperatures])
        # A row without an option gets a value that has no effect.
        self.top_k = self.top_p = self.min_p = None
        if any(row.top_k is not None for row in rows):
            self.top_k = column([min(row.top_k or _ALL, _ALL) for row in rows])
        if any(row.top_p is not None for row in rows):
            self.top_p = column([float("inf") if row.top_p is None else max(row.top_p, _SMALLEST) for row in rows])
        if any(row.min_p is not None for row in rows):
            self.min_p = column([row.min_p or 0.0 for row in rows])

    def draw(self, logits: Tensor, generator: Generators = None, seen: Tensor | None = None) -> Tensor:
        """Return a token (B) for each row of logits (B, V).

        `seen` (B, V) marks the tokens that each row contains; only the repetition penalty reads it. With one generator per row,
        a row's token does not depend on the other rows.
        """
        if self.penalty is not None and seen is not None:
            penalized = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
            logits = torch.where(seen[:, : logits.shape[1]], penalized, logits)
        if self.all_greedy:
            drawn = logits.argmax(dim=-1)
            self._check_finite(logits.gather(-1, drawn[:, None]))
            return drawn
        logits, order = logits.float().sort(dim=-1, descending=True, stable=True)
        # NaN sorts as the largest value, and would trigger a device-side assertion in multinomial.
        logits = logits.masked_fill(~self._check_finite(logits[:, :1]), 0.0)
        # Subtract the maximum first, so that a low temperature cannot overflow.
        logits = (logits - logits[:, :1]) / self.temperature
        if self.top_k is not None:
            ranks = torch.arange(logits.shape[1], device=logits.device)
            logits = logits.masked_fill(ranks >= self.top_k, -torch.inf)
        probabilities = torch.softmax(logits, dim=-1)
        if self.top_p is not None:
            # Keep a token if the tokens before it sum to less than p; the first token always stays.
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        if self.min_p is not None:
            probabilities = probabilities.masked_fill(probabilities < self.min_p * probabilities[:, :1], 0.0)
        drawn = _multinomial(probabilities, generator)
        if self.greedy is not None:
            drawn = drawn.masked_fill(self.greedy[:, None], 0)
        return order.gather(-1, drawn).squeeze(-1)

    def _check_finite(self, greatest: Tensor) -> Tensor:
        """Return whether each row's largest logit is finite, (B, 1), and record the result for `require_finite`."""
        finite = greatest.isfinite()
        self._finite = self._finite & finite.all()
        return finite

    def require_finite(self) -> None:
        """Raise a `UserError` if any row so far had non-finite logits. Synchronizes with the device."""
        if not bool(self._finite):
            raise UserError(
                "the model's logits are not finite: its weights are NaN or infinite, or overflow the dtype of the products; "
                "use an earlier checkpoint or float32"
            )


def _multinomial(weights: Tensor, generator: Generators) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(weights, 1, generator=generator)
    rows = zip(weights.split(1), generator, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in rows])


def make_generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    """Return a generator seeded with `seed`; None, for PyTorch's default generator, without a seed."""
    return None if seed is None else torch.Generator(device).manual_seed(seed)
