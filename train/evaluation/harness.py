"""Evaluate models with lm-eval, the Language Model Evaluation Harness (Gao et al. 2024).

Importing this module requires lm-eval; call `report.require_harness` first.
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

# lm-eval's default.
_MAX_NEW_TOKENS = 256
_MAX_NEW_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(LM):
    """Implements lm-eval's model interface."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self._scorer, self._device = scorer, scorer.device

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return, for each (context, continuation), the log-likelihood in nats and whether greedy decoding yields it."""
        scored = self._scorer.score(self._scorer.continuation(*_arguments(request)) for request in requests)
        bar = tqdm(scored, total=len(requests), desc="log-likelihoods", disable=None)
        return [(-float(scores.nats.sum()), bool(scores.is_greedy.all())) for _, scores in bar]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each (text,) in nats, over non-overlapping windows of the context length."""
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
        """Return the continuation of each (context, options), up to the first of the strings in `until`."""
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
                # Truncate long prompts on the left, as lm-eval does.
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
            raise UserError("a prompt is empty, and the tokenizer has no begin or end token to start from")
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
        # Decode after the prompt, because some tokenizers drop a space at the start of a text.
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
    """Return the lm-eval tasks that match `names`, which may be patterns; `folder` may define more tasks in YAML."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"the folder of lm-eval tasks {folder} does not exist")
    manager = _manager(names, folder)
    found = {name: manager.match_tasks([name]) for name in names}
    for name, matches in found.items():
        if not matches:
            raise UserError(f"unknown lm-eval task {name!r}: `lm-eval ls tasks` lists all tasks")
    return [match for matches in found.values() for match in matches], manager


def _manager(names: Sequence[str], folder: Path | None) -> TaskManager:
    if folder is None:
        return TaskManager()
    # Indexing all of lm-eval's own tasks takes seconds.
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return manager if all(map(manager.match_tasks, ([name] for name in names))) else TaskManager(include_path=str(folder))


def run_tasks(
    scorer: Scorer, tasks: tuple[list[str], TaskManager], num_fewshot: int | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Run the tasks that `find_tasks` returned; return their metrics by task and by lm-eval's name of the metric."""
    names, manager = tasks
    result = simple_evaluate(
        HarnessModel(scorer), tasks=list(names), num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
    )
    # None only in processes other than the first.
    assert result is not None
    return {
        task: {
            # "acc,none" is the metric "acc" without a filter.
            name.removesuffix(",none"): value
            for name, value in row.items()
            if isinstance(value, int | float)
        }
        for task, row in result.get("results", {}).items()
    }
