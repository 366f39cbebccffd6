"""Generation: one token at a time from the model's distribution, cut by top-k and top-p, with a KV cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .transformer import KVCache, TransformerLM


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row: logits (B, V) -> (B).

    Temperature 0 takes the most likely token. Top-k keeps the k most likely; top-p keeps the fewest most likely tokens whose
    probabilities reach p (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, order = logits.float().sort(dim=-1, descending=True, stable=True)
    # Relative to the greatest, no temperature is too low.
    logits = (logits - logits[:, :1]) / temperature
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None:
        # A token stays if those before it have not reached p: the first one always does.
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)


def _check(model: TransformerLM, prompts: Sequence[Sequence[int]], max_new_tokens: int | None, options: dict) -> None:
    vocab_size, context_length = model.config.vocab_size, model.config.context_length
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    for prompt in prompts:
        if not prompt:
            raise UserError("a prompt has no tokens: begin with at least one, for example the end-of-text token")
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise UserError(f"prompt token {token} is outside the model's vocabulary of {vocab_size} tokens")
        if len(prompt) + (max_new_tokens or 1) > context_length:
            new = "one new token" if max_new_tokens is None else f"{max_new_tokens} new ones"
            raise UserError(
                f"a prompt of {len(prompt)} tokens and {new} exceed the context of {context_length} tokens: "
                "shorten the prompt or ask for fewer tokens"
            )
    temperature, top_k, top_p = options["temperature"], options["top_k"], options["top_p"]
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}: it must be 0 or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}: it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: it must be above 0 and at most 1")


@torch.inference_mode()
def generate(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
    vocab_size: int | None = None,
    seed: int | None = None,
    use_cache: bool = True,
    dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens (by default to the end of the context); return the new ones.

    Prompts run in one pass, shorter ones padded to the longest; then each row goes on from its own end, a token a step. A row
    ends at `stop_token`, which is not returned. Only ids below `vocab_size` are drawn, where the model has room for more
    than its tokenizer knows. The same seed, prompts and device give the same tokens. Without the cache every step runs the
    whole sequence again: slower, for checking. `dtype` is that of the products, by default the model's compute dtype; the
    weights are cast to it once.
    """
    if not prompts:
        return []
    _check(model, prompts, max_new_tokens, {"temperature": temperature, "top_k": top_k, "top_p": top_p})
    model = model.cast(dtype or model.compute_dtype or model.token_embeddings.weight.dtype)
    device = model.token_embeddings.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    lengths = [len(prompt) for prompt in prompts]
    context_length = model.config.context_length
    ends = [context_length if max_new_tokens is None else n + max_new_tokens for n in lengths]

    tokens = torch.zeros(len(prompts), max(ends), dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    rows, starts, row_ends = (torch.tensor(x, device=device) for x in (range(len(prompts)), lengths, ends))
    cache = KVCache(model, len(prompts), max(ends)) if use_cache else None

    def logits_after(positions: Tensor, step: int) -> Tensor:
        # Of the token after `positions` (B), one a row. Prompts are run together, the shorter ones followed by padding, which
        # no token before it sees.
        if cache is not None and step > 0:
            return model(tokens[rows, positions][:, None], cache)[:, 0]
        hidden = model.hidden_states(tokens[:, : min(max(lengths) + step, max(ends))], cache)[rows, positions]
        if cache is not None and min(lengths) < max(lengths):
            cache.keep(lengths)
        return model.logits(hidden)

    stops = row_ends.clone()
    for step in range(max(end - n for end, n in zip(ends, lengths, strict=True))):
        positions = starts + step
        drawn = sample(
            logits_after(torch.minimum(positions, row_ends) - 1, step)[:, :vocab_size], temperature, top_k, top_p, generator
        )
        # A row that has ended goes on being drawn with the others, and keeps what it has.
        running = positions < stops
        positions = torch.minimum(positions, row_ends - 1)
        tokens[rows, positions] = torch.where(running, drawn, tokens[rows, positions])
        if stop_token is not None:
            stops = torch.where(running & (drawn == stop_token), positions, stops)
            if bool((stops <= positions + 1).all()):
                break
    finished = zip(tokens.tolist(), lengths, stops.tolist(), strict=True)
    return [row[start:stop] for row, start, stop in finished]
