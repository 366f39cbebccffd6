"""Our models in lm-eval, the Language Model Evaluation Harness (Gao et al. 2024): its tasks, its prompts, its figures.

Importing this needs lm-eval; `require_harness` says how to get it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from ...errors import UserError
from ...model import generate
from .scoring import Request, Scorer
from .texts import SlidingWindow

# lm-eval's own, where a task does not say.
_MAX_NEW_TOKENS = 256
_MAX_NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(LM):
    """A model as lm-eval asks for it."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self._scorer, self._device = scorer, scorer.device

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return of each (context, continuation) the log-likelihood in nats, and whether it is the most likely text."""
        scored = self._scorer.score(self._scorer.continuation(*_arguments(request)) for request in requests)
        bar = tqdm(scored, total=len(requests), desc="log-likelihoods", disable=None)
        return [(-float(scores.nats.sum()), bool(scores.is_greedy.all())) for _, scores in bar]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each (text,) in nats, by windows that are as long as the context and do not overlap."""
        scorer = self._scorer
        totals = [0.0] * len(requests)
        owners: list[int] = []

        def windows() -> Iterator[Request]:
            for i, request in enumerate(requests):
                window = SlidingWindow(scorer.start, scorer.context_length, stride=scorer.context_length)
                for found in (window.add(np.array(scorer.encode(*_arguments(request)), np.int64)), window.finish()):
                    for each in found:
                        owners.append(i)
                        yield each

        for number, (_, scores) in enumerate(tqdm(scorer.score(windows()), desc="log-likelihoods of texts", disable=None)):
            totals[owners[number]] -= float(scores.nats.sum())
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return what follows each (context, options), up to the first of the strings `until`; greedy unless it samples."""
        scorer = self._scorer
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(_arguments(request)[1], sort_keys=True), []).append(i)
        with tqdm(total=len(requests), desc="texts", disable=None) as bar:
            for key, members in groups.items():
                options = json.loads(key)
                new = next((options[name] for name in _MAX_NEW_TOKENS_NAMES if options.get(name)), _MAX_NEW_TOKENS)
                new = min(new, scorer.context_length - 1)
                # The ends of prompts that are too long, as lm-eval has them.
                prompts = {i: self._prompt(_arguments(requests[i])[0])[new - scorer.context_length :] for i in members}
                for batch in scorer.batches(members, lambda i, new=new, prompts=prompts: len(prompts[i]) + new):
                    found = self._generate([prompts[i] for i in batch], new, options)
                    for i, text in zip(batch, found, strict=True):
                        texts[i] = text
                    bar.update(len(batch))
        return texts

    def _prompt(self, context: str) -> list[int]:
        tokens = self._scorer.encode(context)
        prompt = [*(self._scorer.begin if tokens else self._scorer.start), *tokens]
        if not prompt:
            raise UserError("a prompt is empty, and the tokenizer has no token that begins or ends a text: none to go on from")
        return prompt

    def _generate(self, prompts: list[list[int]], max_new_tokens: int, options: dict[str, Any]) -> list[str]:
        scorer = self._scorer
        samples = options.get("do_sample", options.get("temperature", 0.0) > 0)
        found = generate(
            scorer.model,
            prompts,
            max_new_tokens,
            temperature=options.get("temperature", 1.0) if samples else 0.0,
            top_k=options.get("top_k"),
            top_p=options.get("top_p"),
            stop_tokens=scorer.end_tokens,
            vocab_size=min(scorer.tokenizer.vocab_size, scorer.model.config.vocab_size),
            seed=0,
        )
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else until
        return [_before(self._continuation(prompt, new), stops) for prompt, new in zip(prompts, found, strict=True)]

    def _continuation(self, prompt: list[int], tokens: list[int]) -> str:
        # Behind the prompt, because some tokenizers take a blank from what a text begins with.
        decoder = self._scorer.tokenizer.stream_decoder()
        decoder.decode(prompt)
        return decoder.decode(tokens) + decoder.finish()


def _arguments(request: Instance) -> tuple[Any, ...]:
    return request.args


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in filter(None, stops):
        text = text.partition(stop)[0]
    return text


def find_tasks(names: Sequence[str], folder: Path | None = None) -> tuple[list[str], TaskManager]:
    """Return the names that lm-eval knows for `names`, which may be patterns; `folder` may define more tasks, in YAML."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"the folder of lm-eval's tasks {folder} does not exist")
    manager = _manager(names, folder)
    found = {name: manager.match_tasks([name]) for name in names}
    for name, matches in found.items():
        if not matches:
            raise UserError(f"task {name!r} is unknown to lm-eval: `lm-eval ls tasks` lists what it knows")
    return [match for matches in found.values() for match in matches], manager


def _manager(names: Sequence[str], folder: Path | None) -> TaskManager:
    if folder is None:
        return TaskManager()
    # To look through all of lm-eval's own takes seconds.
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return manager if all(map(manager.match_tasks, ([name] for name in names))) else TaskManager(include_path=str(folder))


def run_tasks(
    scorer: Scorer, tasks: tuple[list[str], TaskManager], num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Return the figures of tasks that `find_tasks` has found, by lm-eval's names of them."""
    names, manager = tasks
    result = simple_evaluate(
        HarnessModel(scorer), tasks=list(names), num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
    )
    # None only in the other ones of several processes.
    assert result is not None
    return {
        task: {
            # "acc,none" is the accuracy without a filter.
            name.removesuffix(",none"): value
            for name, value in row.items()
            if isinstance(value, int | float)
        }
        for task, row in result.get("results", {}).items()
    }
