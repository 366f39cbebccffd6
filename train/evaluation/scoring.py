"""Compute log-likelihoods of tokens in batches."""

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

# Number of requests that are sorted by length together, so that a batch needs little padding.
_SORTED_REQUESTS = 1024
# Maximum number of logits in memory: 256 MiB in float32.
_LOGITS = 1 << 26


class Request(NamedTuple):
    """Tokens, of which the last `num_scored` are to be scored, each given all tokens before it."""

    tokens: Sequence[int] | np.ndarray
    num_scored: int
    is_cut: bool = False
    """Whether tokens on the left were dropped to fit the context."""


class TokenScores(NamedTuple):
    """The scores of a request."""

    nats: np.ndarray
    """Negative log-likelihood of each scored token, float64 (num_scored)."""
    is_greedy: np.ndarray
    """Whether each scored token is the most likely one at its position, bool (num_scored)."""


class Scorer:
    """Scores requests in batches. Batches are padded on the right, which causal attention ignores."""

    def __init__(
        self,
        text_model: TextModel,
        dtype: str = "auto",
        batch_tokens: int = 1 << 14,
        context_length: int | None = None,
    ) -> None:
        """Initialize the scorer.

        Args:
            text_model: The model and its tokenizer.
            dtype: Compute dtype; auto is bfloat16 if the GPU supports it, else float32.
            batch_tokens: Maximum tokens of a batch, including padding.
            context_length: Maximum tokens of a forward pass, by default the model's context length.
        """
        most = text_model.model.config.context_length
        if context_length is not None and not 2 <= context_length <= most:
            raise UserError(f"context_length is {context_length}: expected 2 to {most}, the model's context length")
        if batch_tokens < 1:
            raise UserError(f"batch_tokens is {batch_tokens}: expected at least 1")
        self.device = text_model.model.token_embeddings.weight.device
        self.dtype = resolve_dtype(dtype, self.device)
        self.model = text_model.model.cast(self.dtype).eval()
        self.tokenizer = text_model.tokenizer
        self.context_length = context_length or most
        self.begin = list(text_model.begin_tokens)
        """Ids that the tokenizer puts before every text."""
        self.end_tokens = text_model.end_tokens
        self.separator = next(iter(self.end_tokens), None)
        """Id of the token that ends a document."""
        # As in lm-eval, a text without a begin token starts with the token that ends a document.
        self.start = self.begin or ([] if self.separator is None else [self.separator])
        """Ids to put before a text whose first token is scored; empty if the tokenizer has neither begin nor end token."""
        self._batch_tokens = batch_tokens

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; names of special tokens are encoded as plain text."""
        return self.tokenizer.encode(text, allowed_special=(), disallowed_special=())

    def request(self, tokens: Sequence[int], num_scored: int) -> Request:
        """Return the request to score the last tokens, with as much preceding context as fits."""
        kept = self.context_length + 1
        if num_scored >= kept:
            raise UserError(
                f"cannot score {num_scored} tokens at once: expected at most {self.context_length}, the context length"
            )
        return Request(tokens[-kept:], num_scored, len(tokens) > kept)

    def continuation(self, context: str, continuation: str) -> Request:
        """Return the request to score a continuation of a context, tokenized as in lm-eval.

        Spaces at the end of the context move to the continuation. Context and continuation are encoded together; the context
        accounts for as many tokens as it has when encoded alone.
        """
        text = context.rstrip()
        if text:
            continuation = context[len(text) :] + continuation
            before, both = self.encode(text), self.encode(text + continuation)
            tokens, num_scored = [*self.begin, *both], len(both) - len(before)
        else:
            if not self.start:
                raise UserError("a context is empty, and the tokenizer has no begin or end token to start from")
            tokens = self.encode(context + continuation)
            tokens, num_scored = [*self.start, *tokens], len(tokens)
        if num_scored < 1:
            raise UserError(f"{continuation!r:.60} adds no token after {text[-60:]!r}: expected a longer continuation")
        return self.request(tokens, num_scored)

    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Request, TokenScores]]:
        """Yield each request with its scores, in order. Up to 1,024 requests are read ahead."""
        requests = iter(requests)
        while group := list(islice(requests, _SORTED_REQUESTS)):
            found: dict[int, TokenScores] = {}
            for batch in self.batches(range(len(group)), lambda i, group=group: len(group[i].tokens)):
                found.update(zip(batch, self._score_batch([group[i] for i in batch]), strict=True))
            for i, request in enumerate(group):
                yield request, found[i]

    def batches(self, members: Iterable[int], length_of: Callable[[int], int]) -> Iterator[list[int]]:
        """Yield the members in batches, longest first, each with at most `batch_tokens` tokens including padding."""
        order = sorted(members, key=length_of, reverse=True)
        while order:
            rows = max(1, self._batch_tokens // length_of(order[0]))
            yield order[:rows]
            order = order[rows:]

    @torch.inference_mode()
    def _score_batch(self, batch: Sequence[Request]) -> list[TokenScores]:
        length = max(len(request.tokens) for request in batch)
        tokens = torch.zeros(len(batch), length, dtype=torch.long)
        # is_scored[:, t] refers to the token at t + 1.
        is_scored = torch.zeros(len(batch), length - 1, dtype=torch.bool)
        for i, request in enumerate(batch):
            end = len(request.tokens)
            tokens[i, :end] = torch.as_tensor(np.asarray(request.tokens, np.int64))
            is_scored[i, end - 1 - request.num_scored : end - 1] = True
        tokens, is_scored = tokens.to(self.device), is_scored.to(self.device)
        hidden, targets = self.model.hidden_states(tokens[:, :-1])[is_scored], tokens[:, 1:][is_scored]
        nats, is_greedy = self._score_targets(hidden, targets)
        sizes = np.cumsum([request.num_scored for request in batch])[:-1]
        return [TokenScores(*each) for each in zip(np.split(nats, sizes), np.split(is_greedy, sizes), strict=True)]

    def _score_targets(self, hidden: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return `nats` and `is_greedy` of targets (N), given hidden states (N, D); compute the logits in chunks."""
        rows = max(1, _LOGITS // self.model.config.vocab_size)
        nats, is_greedy = [], []
        for some_hidden, some_targets in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = self.model.logits(some_hidden).float()
            nats.append(F.cross_entropy(logits, some_targets, reduction="none"))
            is_greedy.append(logits.argmax(dim=-1) == some_targets)
        return torch.cat(nats).double().cpu().numpy(), torch.cat(is_greedy).cpu().numpy()
