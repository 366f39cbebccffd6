"""Log-likelihoods of tokens: what every evaluation asks of a model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError
from ..device import resolve_dtype
from ..pretrained import TextModel

# Requests that are sorted by length at a time, so that those of a batch have about the same.
_SORTED_REQUESTS = 1024
# Logits that are held at a time: 256 MiB in float32.
_LOGITS = 1 << 26


class Request(NamedTuple):
    """Tokens, the last of which are to be scored, each by all that stand before it."""

    tokens: Sequence[int] | np.ndarray
    num_scored: int
    is_cut: bool = False
    """Whether tokens on the left were left out, because the context does not hold them."""


class TokenScores(NamedTuple):
    """What the model says of the tokens that a request asks for."""

    nats: np.ndarray
    """Negative log-likelihood of each, float64 (num_scored)."""
    is_greedy: np.ndarray
    """Whether each is the most likely token of its place, bool (num_scored)."""


class Scorer:
    """A model that scores tokens in batches of requests, padded on the right, where no token before the padding sees it."""

    def __init__(
        self,
        text_model: TextModel,
        dtype: str = "auto",
        batch_tokens: int = 1 << 14,
        context_length: int | None = None,
    ) -> None:
        """Compute in `dtype`, by default bfloat16 where the device has it; a batch holds `batch_tokens` with its padding.

        `context_length` is the most tokens that the model reads at once, by default all that it can.
        """
        most = text_model.model.config.context_length
        if context_length is not None and not 2 <= context_length <= most:
            raise UserError(f"context_length is {context_length}: it must be from 2 to {most}, the model's own")
        if batch_tokens < 1:
            raise UserError(f"batch_tokens is {batch_tokens}: it must be at least 1")
        self.device = text_model.model.token_embeddings.weight.device
        self.dtype = resolve_dtype(dtype, self.device)
        self.model = text_model.model.cast(self.dtype).eval()
        self.tokenizer = text_model.tokenizer
        self.context_length = context_length or most
        self.begin = list(text_model.begin_tokens)
        """What the tokenizer puts before every text."""
        self.end_tokens = text_model.end_tokens
        self.separator = next(iter(self.end_tokens), None)
        """The token that ends a document."""
        # As lm-eval has it: what ends one document stands before the next.
        self.start = self.begin or ([] if self.separator is None else [self.separator])
        """What stands before a text of which the first token is to be scored too; empty where the tokenizer has no such."""
        self._batch_tokens = batch_tokens

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, in which a special token's name is text like any other."""
        return self.tokenizer.encode(text, allowed_special=(), disallowed_special=())

    def request(self, tokens: Sequence[int], num_scored: int) -> Request:
        """Return the request for the last tokens, with as many before them as the context holds."""
        kept = self.context_length + 1
        if num_scored >= kept:
            raise UserError(
                f"{num_scored} tokens are to be scored at once: allowed are {self.context_length}, the length of the context"
            )
        return Request(tokens[-kept:], num_scored, len(tokens) > kept)

    def continuation(self, context: str, continuation: str) -> Request:
        """Return the request for a text that follows another, with tokens as lm-eval has them.

        Spaces at the end of the context go over to the continuation. Its tokens are those that both have together, without as
        many as the context has alone.
        """
        text = context.rstrip()
        if text:
            continuation = context[len(text) :] + continuation
            before, both = self.encode(text), self.encode(text + continuation)
            tokens, num_scored = [*self.begin, *both], len(both) - len(before)
        else:
            if not self.start:
                raise UserError(
                    "a context is empty, and the tokenizer has no token that begins or ends a text: none to score by"
                )
            tokens = self.encode(context + continuation)
            tokens, num_scored = [*self.start, *tokens], len(tokens)
        if num_scored < 1:
            raise UserError(f"{continuation!r:.60} has no token of its own after {text[-60:]!r}: a longer one is needed")
        return self.request(tokens, num_scored)

    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Request, TokenScores]]:
        """Yield each request with its scores, in order; a part of them is read ahead."""
        requests = iter(requests)
        while group := list(islice(requests, _SORTED_REQUESTS)):
            found: dict[int, TokenScores] = {}
            for batch in self.batches(range(len(group)), lambda i, group=group: len(group[i].tokens)):
                found.update(zip(batch, self._score_batch([group[i] for i in batch]), strict=True))
            for i, request in enumerate(group):
                yield request, found[i]

    def batches(self, members: Iterable[int], length_of: Callable[[int], int]) -> Iterator[list[int]]:
        """Yield the members in batches, the longest first, padded to which a batch holds as many tokens as it may."""
        order = sorted(members, key=length_of, reverse=True)
        while order:
            rows = max(1, self._batch_tokens // length_of(order[0]))
            yield order[:rows]
            order = order[rows:]

    @torch.inference_mode()
    def _score_batch(self, batch: Sequence[Request]) -> list[TokenScores]:
        length = max(len(request.tokens) for request in batch)
        tokens = torch.zeros(len(batch), length, dtype=torch.long)
        # Of the token after each position.
        is_scored = torch.zeros(len(batch), length - 1, dtype=torch.bool)
        for i, request in enumerate(batch):
            end = len(request.tokens)
            tokens[i, :end] = torch.as_tensor(np.asarray(request.tokens, np.int64))
            is_scored[i, end - 1 - request.num_scored : end - 1] = True
        tokens, is_scored = tokens.to(self.device), is_scored.to(self.device)
        hidden, targets = self.model.hidden_states(tokens[:, :-1])[is_scored], tokens[:, 1:][is_scored]
        nats, is_greedy = self._of_targets(hidden, targets)
        sizes = np.cumsum([request.num_scored for request in batch])[:-1]
        return [TokenScores(*each) for each in zip(np.split(nats, sizes), np.split(is_greedy, sizes), strict=True)]

    def _of_targets(self, hidden: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return nats and greediness of targets (N), of hidden states (N, D), without all their logits at once."""
        rows = max(1, _LOGITS // self.model.config.vocab_size)
        nats, is_greedy = [], []
        for some_hidden, some_targets in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = self.model.logits(some_hidden).float()
            nats.append(F.cross_entropy(logits, some_targets, reduction="none"))
            is_greedy.append(logits.argmax(dim=-1) == some_targets)
        return torch.cat(nats).double().cpu().numpy(), torch.cat(is_greedy).cpu().numpy()
