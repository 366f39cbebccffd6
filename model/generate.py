"""Generation: one token at a time from the model's distribution, with a KV cache."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .cache import KVCache
from .prompts import checked_prompt
from .sampling import Sampler, Sampling, make_generator
from .transformer import TransformerLM


@torch.inference_mode()
def generate(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: Collection[int] = (),
    vocab_size: int | None = None,
    seed: int | Sequence[int] | None = None,
    crop: bool = False,
    use_cache: bool = True,
    dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens (by default to the end of the context); return the new ones.

    Prompts run in one pass, shorter ones padded to the longest; then each row goes on from its own end, a token a step. A row
    ends at the first of `stop_tokens`, which is not returned; what else is drawn how is said by `Sampling`. Only ids below
    `vocab_size` are drawn, where the model has room for more than its tokenizer knows. A prompt that is too long is a
    `UserError`, unless `crop` lets its beginning go.

    The same seed, prompts and device give the same tokens. One seed draws for all rows together; with a seed for each prompt,
    what a row gets does not depend on the others, but for rounding in products of another shape.

    Without the cache every step runs the whole sequence again: slower, for checking. `dtype` is that of the products, by
    default the model's compute dtype; the weights are cast to it once. `batching.BatchEngine` lets rows come and go.
    """
    if not prompts:
        return []
    if isinstance(seed, Sequence) and len(seed) != len(prompts):
        raise UserError(f"{len(seed)} seeds are given for {len(prompts)} prompts: give one, or one for each")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = [checked_prompt(model.config, prompt, max_new_tokens, crop) for prompt in prompts]
    model = model.cast(dtype or model.compute_dtype or model.token_embeddings.weight.dtype)
    device = model.token_embeddings.weight.device
    sampler = Sampler([sampling] * len(prompts), device)
    if isinstance(seed, Sequence):
        generator = [make_generator(row, device) for row in seed]
    else:
        generator = make_generator(seed, device)
    lengths = [len(prompt) for prompt in prompts]
    context_length = model.config.context_length
    ends = [context_length if max_new_tokens is None else n + max_new_tokens for n in lengths]

    tokens = torch.zeros(len(prompts), max(ends), dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    rows, starts, row_ends = (torch.tensor(x, device=device) for x in (range(len(prompts)), lengths, ends))
    cache = KVCache(model, len(prompts), max(ends)) if use_cache else None
    stop_ids = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=device)
    seen = None
    if sampler.penalty is not None:
        seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True

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
        logits = logits_after(torch.minimum(positions, row_ends) - 1, step)[:, :vocab_size]
        drawn = sampler.draw(logits, generator, seen)
        if seen is not None:
            seen[rows, drawn] = True
        # A row that has ended goes on being drawn with the others, and keeps what it has.
        running = positions < stops
        positions = torch.minimum(positions, row_ends - 1)
        tokens[rows, positions] = torch.where(running, drawn, tokens[rows, positions])
        if stop_tokens:
            stops = torch.where(running & torch.isin(drawn, stop_ids), positions, stops)
            if bool((stops <= positions + 1).all()):
                break
        if step == 0:
            # What is wrong with the weights shows here, before a long text is drawn.
            sampler.require_finite()
    sampler.require_finite()
    finished = zip(tokens.tolist(), lengths, stops.tolist(), strict=True)
    return [row[start:stop] for row, start, stop in finished]
