"""Validation of prompts."""

from collections.abc import Sequence

from torch import Tensor

from ..errors import UserError
from .config import ModelConfig


def checked_prompt(
    config: ModelConfig,
    prompt: Sequence[int] | Tensor,
    max_new_tokens: int | None,
    crop: bool = False,
    limit: int | None = None,
) -> list[int]:
    """Return the prompt as a list if the model can generate `max_new_tokens` after it (None: at least one).

    `prompt` is a sequence of token ids, or a 1-D integer tensor. Prompt and new tokens must fit in the context, or in `limit`
    tokens if that is less. A longer prompt is a `UserError`; with `crop` the last tokens that fit are returned.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    if isinstance(prompt, Tensor):
        if prompt.ndim != 1 or prompt.is_floating_point():
            raise UserError(f"a prompt has shape {tuple(prompt.shape)} and dtype {prompt.dtype}: expected a 1-D integer tensor")
        prompt = prompt.tolist()
    if not prompt:
        raise UserError("a prompt has no tokens: expected at least one, for example the end-of-text token")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        token = next(token for token in prompt if not 0 <= token < config.vocab_size)
        raise UserError(f"prompt token {token} is outside the model's vocabulary of {config.vocab_size} tokens")
    length = min(config.context_length, limit or config.context_length)
    available = length - (max_new_tokens or 1)
    if len(prompt) <= available:
        return list(prompt)
    if crop and available >= 1:
        return list(prompt[-available:])
    new = "one new token" if max_new_tokens is None else f"{max_new_tokens} new tokens"
    advice = "ask for fewer tokens" if available < 1 else "shorten the prompt, crop it or ask for fewer tokens"
    raise UserError(f"a prompt of {len(prompt)} tokens and {new} exceed the context of {length} tokens: {advice}")
