"""Sampling: which token follows, by the model's logits and the settings of each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError

# float32 has nothing much smaller: a temperature or a share below it means the most likely token.
_SMALLEST = 1e-37
# More tokens than there are.
_ALL = 2**31


@dataclass(frozen=True)
class Sampling:
    """How to draw a token from logits; by default from the model's own distribution."""

    temperature: float = 1.0
    """0 takes the most likely token; above 1 flattens the distribution."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    top_p: float | None = None
    """Keep the fewest most likely tokens whose probabilities reach p (nucleus sampling, Holtzman et al. 2020)."""
    min_p: float | None = None
    """Keep the tokens that have at least this share of the greatest probability (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that the row has, prompt included, and multiplies negative ones (Keskar et al. 2019,
    section 4.1, as transformers has it)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}: it must be from 0 to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}: it must be from 0.01 to 100")


Generators = torch.Generator | Sequence[torch.Generator | None] | None
"""What draws: one for all rows, or one for each, so that no row depends on the others."""


class Sampler:
    """Draws one token a row, each row by its own settings.

    Logits of which the greatest is not finite give any token; `require_finite` tells, whenever the host can wait.
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
        # What a row leaves out takes a value that cuts nothing.
        self.top_k = self.top_p = self.min_p = None
        if any(row.top_k is not None for row in rows):
            self.top_k = column([min(row.top_k or _ALL, _ALL) for row in rows])
        if any(row.top_p is not None for row in rows):
            self.top_p = column([float("inf") if row.top_p is None else max(row.top_p, _SMALLEST) for row in rows])
        if any(row.min_p is not None for row in rows):
            self.min_p = column([row.min_p or 0.0 for row in rows])

    def draw(self, logits: Tensor, generator: Generators = None, seen: Tensor | None = None) -> Tensor:
        """Return a token for each row of logits (B, V): (B). `seen` (B, V) are the tokens that each row has.

        Only the repetition penalty reads `seen`. With a generator for each row, a row's token depends on no other row.
        """
        if self.penalty is not None and seen is not None:
            penalized = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
            logits = torch.where(seen[:, : logits.shape[1]], penalized, logits)
        if self.all_greedy:
            drawn = logits.argmax(dim=-1)
            self._judge(logits.gather(-1, drawn[:, None]))
            return drawn
        logits, order = logits.float().sort(dim=-1, descending=True, stable=True)
        # NaN is sorted as the greatest, and would end a process that draws by it on a GPU.
        logits = logits.masked_fill(~self._judge(logits[:, :1]), 0.0)
        # Relative to the greatest, no temperature is too low.
        logits = (logits - logits[:, :1]) / self.temperature
        if self.top_k is not None:
            ranks = torch.arange(logits.shape[1], device=logits.device)
            logits = logits.masked_fill(ranks >= self.top_k, -torch.inf)
        probabilities = torch.softmax(logits, dim=-1)
        if self.top_p is not None:
            # A token stays if those before it have not reached p: the first one always does.
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        if self.min_p is not None:
            probabilities = probabilities.masked_fill(probabilities < self.min_p * probabilities[:, :1], 0.0)
        drawn = _multinomial(probabilities, generator)
        if self.greedy is not None:
            drawn = drawn.masked_fill(self.greedy[:, None], 0)
        return order.gather(-1, drawn).squeeze(-1)

    def _judge(self, greatest: Tensor) -> Tensor:
        """Return whether each row's greatest logit is finite, (B, 1), and remember it."""
        finite = greatest.isfinite()
        self._finite = self._finite & finite.all()
        return finite

    def require_finite(self) -> None:
        """Raise a `UserError` where a row drawn so far had logits that are not finite; the host waits for the device."""
        if not bool(self._finite):
            raise UserError(
                "the model's logits are not finite: its weights are NaN or infinite, or too large for the products' dtype; "
                "take an earlier checkpoint, or float32"
            )


def _multinomial(weights: Tensor, generator: Generators) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(weights, 1, generator=generator)
    rows = zip(weights.split(1), generator, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in rows])


def check_seed(seed: int | None) -> None:
    """Raise a `UserError` where a seed is no integer of 64 bits."""
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise UserError(f"seed is {seed}: it must be from {-(2**63)} to {2**63 - 1}")


def make_generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    """Return a generator that begins at `seed`; None for that of PyTorch."""
    return None if seed is None else torch.Generator(device).manual_seed(seed)
