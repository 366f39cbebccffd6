"""Sampling options: temperature, top-k, top-p, min-p, repetition penalty. This module does not import torch."""

from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Options for sampling a token from logits. The defaults sample from the model's distribution."""

    temperature: float = 1.0
    """Divides the logits. 0 selects the most likely token; values above 1 flatten the distribution."""
    top_k: int | None = None
    """Keep the k most likely tokens."""
    top_p: float | None = None
    """Keep the smallest set of most likely tokens whose probabilities sum to p (nucleus sampling, Holtzman et al. 2020)."""
    min_p: float | None = None
    """Keep the tokens with at least this fraction of the largest probability (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Penalty on tokens that the row already contains, including the prompt: divides positive logits and multiplies negative
    logits (Keskar et al. 2019, section 4.1; same as in transformers)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: expected 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: expected above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}: expected from 0 to 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}: expected from 0.01 to 100")


def check_seed(seed: int | None) -> None:
    """Raise a `UserError` if the seed does not fit in 64 bits."""
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise UserError(f"seed is {seed}: expected from {-(2**63)} to {2**63 - 1}")
