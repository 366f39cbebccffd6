"""Prompts that a model can continue."""

from collections.abc import Sequence

from ..errors import UserError
from .config import ModelConfig


def checked_prompt(
    config: ModelConfig, prompt: Sequence[int], max_new_tokens: int | None, crop: bool = False, limit: int | None = None
) -> list[int]:
    """Return the prompt, if the model can go on for `max_new_tokens` behind it (None: at least one).

    All of it has to fit in the context, or in `limit` tokens where these are fewer. A longer prompt is a `UserError`; with
    `crop` its last tokens that fit are returned.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if not prompt:
        raise UserError("a prompt has no tokens: begin with at least one, for example the end-of-text token")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        token = next(token for token in prompt if not 0 <= token < config.vocab_size)
        raise UserError(f"prompt token {token} is outside the model's vocabulary of {config.vocab_size} tokens")
    length = min(config.context_length, limit or config.context_length)
    room = length - (max_new_tokens or 1)
    if len(prompt) <= room:
        return list(prompt)
    if crop and room >= 1:
        return list(prompt[-room:])
    new = "one new token" if max_new_tokens is None else f"{max_new_tokens} new ones"
    advice = "ask for fewer tokens" if room < 1 else "shorten the prompt, crop it or ask for fewer tokens"
    raise UserError(f"a prompt of {len(prompt)} tokens and {new} exceed the context of {length} tokens: {advice}")
