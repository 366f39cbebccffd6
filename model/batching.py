"""Continuous batching: sequences of any length share one cache. A sequence joins when a slot is free and leaves when it ends.

Scheduling is per step, not per request, as in Orca (Yu et al. 2022, section 3.1).
"""

from collections import deque
from collections.abc import Collection, Sequence
from typing import Literal

import torch

from ..errors import UserError
from .cache import KVCache
from .prompts import checked_prompt
from .sampler import Sampler, make_generator
from .sampling import Sampling
from .transformer import TransformerLM

FinishReason = Literal["stop", "length", "cancelled"]


class Generation:
    """A prompt and the tokens generated so far."""

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
        """Generated tokens, without the stop token."""
        self.finish_reason: FinishReason | None = None
        """None while the sequence is queued or running."""
        self.num_prefilled = 0
        self.generator: torch.Generator | None = None


class BatchEngine:
    """Generate for many prompts concurrently, with the same tokens as a separate `generate` call per prompt and seed.

    Up to `num_slots` sequences run at a time, each of at most `max_length` tokens (by default the context length). Other
    sequences wait in a FIFO queue. A step samples one token for each running sequence and then prefills at most
    `prefill_tokens` tokens of new prompts, so that a long prompt does not block the others. Running sequences occupy the first
    slots of the cache without gaps, and a step computes only those. When a sequence leaves, the last one moves to its slot.

    Not thread-safe. `vocab_size` and `dtype` are the same as in `generate`.
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
                raise UserError(f"{name} is {value}: expected at least 1")
        if max_length is not None and max_length > context_length:
            raise UserError(f"max_length is {max_length}: expected at most the context length, {context_length}")
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
        """The sequence at index i has slot i."""
        self._sampler: Sampler | None = None

    @property
    def num_waiting(self) -> int:
        """Number of sequences without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Number of sequences with a slot, including one whose prompt is being prefilled."""
        return len(self._running) + (self._prefilling is not None)

    def add(self, generation: Generation, crop: bool = False) -> None:
        """Queue a sequence. A prompt that does not fit is a `UserError`, unless `crop` drops its first tokens."""
        generation.prompt = checked_prompt(
            self.model.config, generation.prompt, generation.max_new_tokens, crop, self.max_length
        )
        generation.generator = make_generator(generation.seed, self.device)
        self._waiting.append(generation)

    def cancel(self, generation: Generation, reason: FinishReason = "cancelled") -> None:
        """End a sequence now and free its slot. Does nothing if the sequence has ended already."""
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
        """Run one step; return the sequences that have a new token or have ended.

        The list is empty while a long prompt is prefilled, and if there is nothing to do (`num_running` is 0).
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
            # Prefill in the last slot, which is free whenever any slot is.
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
        """Move a prefilled sequence to the running ones and sample its first token from `logits` (1, V)."""
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
        # The cache holds every token but the last.
        lengths = [len(g.prompt) + len(g.tokens) - 1 for g in running]
        last = torch.tensor([[g.tokens[-1]] for g in running], device=self.device)
        logits = self.model(last, self._cache.rows(0, lengths))[:, 0]
        if self._sampler is None:
            self._sampler = Sampler([g.sampling for g in running], self.device)
        return self._draw(0, running, self._sampler, logits)

    def _draw(self, slot: int, rows: list[Generation], sampler: Sampler, logits: torch.Tensor) -> list[Generation]:
        """Sample a token for each of the sequences in the slots from `slot` on, and remove the sequences that end."""
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
        # In reverse, because a removal moves the last sequence to the free slot.
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
