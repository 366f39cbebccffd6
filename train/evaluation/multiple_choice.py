"""Multiple-choice accuracy: choose the answer with the greatest likelihood."""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from ...errors import UserError
from .scoring import Request, Scorer
from .tasks import Question

T = TypeVar("T")

# The same seed as nanochat, so that CORE prompts are identical.
_SEED = 1234


def examples_for(index: int, items: Sequence[T], count: int) -> list[T]:
    """Return `count` random items other than the one at `index`; they depend only on `index`, `count` and the items."""
    if not 0 <= count < len(items):
        raise UserError(f"the number of examples is {count}: expected 0 to {len(items) - 1}, one less than the number of items")
    drawn = random.Random(_SEED + index).sample(range(len(items) - 1), count)
    return [items[i + (i >= index)] for i in drawn]


def score_questions(
    scorer: Scorer, name: str, questions: Sequence[Question], num_fewshot: int = 0, limit: int | None = None
) -> dict[str, Any]:
    """Return the accuracies on the first `limit` questions, with `num_fewshot` examples before each question.

    `acc` chooses the answer with the greatest log-likelihood. `acc_norm` divides the log-likelihood by the answer's length in
    characters, as lm-eval does, and `acc_bytes` by its length in bytes. `acc_stderr` is the standard error of `acc`. `cut` is
    the number of prompts that exceed the context and are truncated on the left.
    """
    asked = questions[:limit]

    def requests() -> Iterator[Request]:
        for i, question in enumerate(asked):
            shown = "".join(f"{example.answered}\n\n" for example in examples_for(i, questions, num_fewshot))
            for context, continuation in zip(question.contexts, question.continuations, strict=True):
                yield scorer.continuation(shown + context, continuation)

    scored = scorer.score(requests())
    right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    cut = 0
    for question in tqdm(asked, desc=name, unit="item", disable=None):
        nats = np.empty(len(question.continuations))
        for i in range(len(nats)):
            request, scores = next(scored)
            nats[i] = scores.nats.sum()
            cut += request.is_cut
        # Without the leading space.
        answers = [continuation[1:] for continuation in question.continuations]
        lengths = {
            "acc": np.ones(len(answers)),
            "acc_norm": np.array([len(answer) for answer in answers]),
            "acc_bytes": np.array([len(answer.encode()) for answer in answers]),
        }
        for metric, length in lengths.items():
            right[metric] += int(np.argmin(nats / length) == question.gold)
    accuracies = {metric: count / len(asked) for metric, count in right.items()}
    return {**accuracies, "acc_stderr": standard_error(accuracies["acc"], len(asked)), "items": len(asked), "cut": cut}


def standard_error(accuracy: float, num_items: int) -> float | None:
    """Return the standard error of an accuracy, from the unbiased sample variance; None for a single item."""
    return math.sqrt(accuracy * (1 - accuracy) / (num_items - 1)) if num_items > 1 else None
