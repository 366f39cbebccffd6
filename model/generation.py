"""Autoregressive generation with a KV cache."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .cache import KVCache
from .prompts import checked_prompt
from .sampler import Sampler, make_generator
from .sampling import Sampling
from .transformer import TransformerLM


@torch.inference_mode()
def generate(
    model: TransformerLM,
    prompts: Sequence[Sequence[int]] | Sequence[Tensor] | Tensor,
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
    """Continue each prompt by up to `max_new_tokens` tokens (by default to the end of the context); return the new tokens.

    `prompts` is a list of token id lists or of 1-D integer tensors, or one tensor (B, T). One pass prefills all prompts, padded
    to the longest. Then each row continues from its own end, one token a step. A row ends at the first of `stop_tokens`, which
    is not returned. `Sampling` documents the other sampling options. Only ids below `vocab_size` are sampled, for models with
    more rows than tokens. A prompt that is too long is a `UserError`, unless `crop` drops its first tokens.

    The same seed, prompts and device give the same tokens. A single seed is shared by all rows. With one seed per prompt, a row
    does not depend on the others, up to rounding in products of different shapes.

    With use_cache=False every step recomputes the entire sequence, which is slow but useful for checks. `dtype` is the dtype of
    the products, by default the model's compute dtype; the weights are cast to it once. For prompts that arrive over time, see
    `batching.BatchEngine`.
    """
    if len(prompts) == 0:
        return []
    if isinstance(seed, Sequence) and len(seed) != len(prompts):
        raise UserError(f"seed has {len(seed)} entries for {len(prompts)} prompts: expected one seed, or one per prompt")
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
        # Logits of the token after `positions` (B), one per row. Padding follows the shorter prompts, so no prompt sees it.
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
        # Finished rows are still sampled with the others, but keep their tokens.
        running = positions < stops
        positions = torch.minimum(positions, row_ends - 1)
        tokens[rows, positions] = torch.where(running, drawn, tokens[rows, positions])
        if stop_tokens:
            stops = torch.where(running & torch.isin(drawn, stop_ids), positions, stops)
            if bool((stops <= positions + 1).all()):
                break
        if step == 0:
            # Fail early on bad weights, before a long generation.
            sampler.require_finite()
    sampler.require_finite()
    finished = zip(tokens.tolist(), lengths, stops.tolist(), strict=True)
    return [row[start:stop] for row, start, stop in finished]
