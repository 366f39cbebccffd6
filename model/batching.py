"""Continuous batching: sequences of any length share one cache; each joins when there is room and leaves when it has ended.

Orca (Yu et al. 2022, section 3.1) schedules by steps, not by requests: so does this engine.
"""

from collections import deque
from collections.abc import Collection, Sequence
from typing import Literal

import torch

from ..errors import UserError
from .cache import KVCache
from .prompts import checked_prompt
from .sampling import Sampler, Sampling, make_generator
from .transformer import TransformerLM

FinishReason = Literal["stop", "length", "cancelled"]


class Generation:
    """A prompt and what has been generated after it so far."""

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        stop_tokens: Collection[int] = (),
        seed: int | None = None,
    ) -> None:
        self.prompt = list(prompt)
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.stop_tokens, self.seed = frozenset(stop_tokens), seed
        self.tokens: list[int] = []
        """New ones, without that of `stop_tokens` which ended them."""
        self.finish_reason: FinishReason | None = None
        """None while it goes on."""
        self.num_prefilled = 0
        self.generator: torch.Generator | None = None


class BatchEngine:
    """Generates for many prompts at once: tokens equal those of `generate` for each alone, with its own seed.

    `num_slots` sequences run at a time, each of at most `max_length` tokens (by default the context), and others wait in the
    order in which they came. A step draws a token for each sequence that runs, and then reads at most `prefill_tokens` tokens
    of new prompts, so that a long one does not hold up the others. Sequences fill the first slots of the cache without gaps,
    and a step computes those only: when one leaves, the last one moves to its place.

    Not for several threads at once. `vocab_size` and `dtype` are those of `generate`.
    """

    def __init__(
        self,
        model: TransformerLM,
        num_slots: int,
        max_length: int | None = None,
        *,
        vocab_size: int | None = None,
        prefill_tokens: int = 1024,
        dtype: torch.dtype | None = None,
    ) -> None:
        context_length = model.config.context_length
        for name, value in (("num_slots", num_slots), ("max_length", max_length), ("prefill_tokens", prefill_tokens)):
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if max_length is not None and max_length > context_length:
            raise UserError(f"max_length is {max_length}: the model's context has {context_length} tokens")
        self.model = model.cast(dtype or model.compute_dtype or model.token_embeddings.weight.dtype)
        self.device = model.token_embeddings.weight.device
        self.num_slots, self.max_length = num_slots, max_length or context_length
        self.prefill_tokens = prefill_tokens
        self.vocab_size = model.config.vocab_size if vocab_size is None else min(vocab_size, model.config.vocab_size)
        self._cache = KVCache(self.model, num_slots, self.max_length)
        self._seen = torch.zeros(num_slots, self.vocab_size, dtype=torch.bool, device=self.device)
        self._waiting: deque[Generation] = deque()
        self._prefilling: Generation | None = None
        self._running: list[Generation] = []
        """The one at i has slot i."""
        self._sampler: Sampler | None = None

    @property
    def num_waiting(self) -> int:
        """Sequences that have no slot yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that have a slot."""
        return len(self._running) + (self._prefilling is not None)

    def add(self, generation: Generation, crop: bool = False) -> None:
        """Queue a sequence; a prompt that does not fit is a `UserError`, unless `crop` lets its beginning go."""
        generation.prompt = checked_prompt(
            self.model.config, generation.prompt, generation.max_new_tokens, crop, self.max_length
        )
        generation.generator = make_generator(generation.seed, self.device)
        self._waiting.append(generation)

    def cancel(self, generation: Generation, reason: FinishReason = "cancelled") -> None:
        """End a sequence now and free its slot; one that has ended already stays as it is."""
        if generation.finish_reason is not None:
            return
        generation.finish_reason = reason
        if generation in self._waiting:
            self._waiting.remove(generation)
        elif generation is self._prefilling:
            self._prefilling = None
        elif generation in self._running:
            self._leave(self._running.index(generation))

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Go on by a token; return the sequences that have a new one or have ended.

        There are none while a long prompt is being read, or where nothing is to do: `num_running` tells which.
        """
        changed = self._decode() if self._running else []
        return changed + self._prefill()

    def _prefill(self) -> list[Generation]:
        changed, budget = [], self.prefill_tokens
        while budget > 0:
            if self._prefilling is None:
                if not self._waiting or len(self._running) == self.num_slots:
                    break
                self._prefilling = self._waiting.popleft()
            generation = self._prefilling
            # The last slot: as long as one is free, it is.
            slot, start = self.num_slots - 1, generation.num_prefilled
            part = generation.prompt[start : start + budget]
            tokens = torch.tensor([part], device=self.device)
            hidden = self.model.hidden_states(tokens, self._cache.rows(slot, [start]))[:, -1]
            generation.num_prefilled += len(part)
            budget -= len(part)
            if generation.num_prefilled == len(generation.prompt):
                self._prefilling = None
                changed += self._join(generation, slot, self.model.logits(hidden))
        return changed

    def _join(self, generation: Generation, slot: int, logits: torch.Tensor) -> list[Generation]:
        """Let a sequence whose prompt is in a slot run with the others; `logits` (1, V) are of its first token."""
        place = len(self._running)
        if slot != place:
            self._cache.move(slot, place, len(generation.prompt))
        self._seen[place] = False
        self._seen[place, [token for token in generation.prompt if token < self.vocab_size]] = True
        self._running.append(generation)
        self._sampler = None
        return self._draw(place, [generation], Sampler([generation.sampling], self.device), logits)

    def _decode(self) -> list[Generation]:
        running = list(self._running)
        # Every token but the last is in the cache.
        lengths = [len(g.prompt) + len(g.tokens) - 1 for g in running]
        last = torch.tensor([[g.tokens[-1]] for g in running], device=self.device)
        logits = self.model(last, self._cache.rows(0, lengths))[:, 0]
        if self._sampler is None:
            self._sampler = Sampler([g.sampling for g in running], self.device)
        return self._draw(0, running, self._sampler, logits)

    def _draw(self, slot: int, rows: list[Generation], sampler: Sampler, logits: torch.Tensor) -> list[Generation]:
        """Give a token to each of the sequences in the slots from `slot` on; those that end leave."""
        seen = self._seen[slot : slot + len(rows)]
        drawn = sampler.draw(logits[:, : self.vocab_size], [g.generator for g in rows], seen)
        seen.scatter_(1, drawn[:, None], True)
        sampler.require_finite()
        for generation, token in zip(rows, drawn.tolist(), strict=True):
            if token in generation.stop_tokens:
                generation.finish_reason = "stop"
                continue
            generation.tokens.append(token)
            length = len(generation.prompt) + len(generation.tokens)
            if len(generation.tokens) == generation.max_new_tokens or length >= self.max_length:
                generation.finish_reason = "length"
        # From the last on, so that no place changes that is still to be looked at.
        for i in reversed(range(len(rows))):
            if rows[i].finish_reason is not None:
                self._leave(slot + i)
        return rows

    @torch.inference_mode()
    def _leave(self, slot: int) -> None:
        last = len(self._running) - 1
        if slot < last:
            generation = self._running[last]
            self._cache.move(last, slot, len(generation.prompt) + len(generation.tokens))
            self._seen[slot] = self._seen[last]
            self._running[slot] = generation
        self._running.pop()
        self._sampler = None
