"""The CORE metric: the mean of the centered accuracies on 22 tasks (Li et al. 2024, DataComp-LM, https://arxiv.org/abs/2406.11794).

The centered accuracy is 0 for guessing and 1 for perfect answers. Prompts, few-shot examples and the choice of an answer follow
nanochat. Its bundle contains `core.yaml` (the tasks), `eval_meta_data.csv` (the accuracy of guessing in percent) and
`eval_data/` (the items as JSON lines).
"""

import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...errors import UserError
from ...files import require_file
from .multiple_choice import examples_for
from .scoring import Request, Scorer, TokenScores
from .tasks import read_items

# The same seed as nanochat, so that `limit` selects the same items.
_SHUFFLE_SEED = 1337

Item = dict[str, Any]


@dataclass(frozen=True)
class CoreTask:
    """A task of a CORE bundle."""

    label: str
    kind: str
    """multiple_choice: one context, several continuations; schema: several contexts, one continuation; language_modeling:
    correct if greedy decoding yields the continuation."""
    num_fewshot: int
    delimiter: str
    """Text between a context and its continuation."""
    baseline: float
    """Accuracy of guessing, from 0 to 1."""
    items: list[Item]


_FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}

_ANSWERS = {"multiple_choice": "choices", "schema": "context_options"}


def read_bundle(folder: Path, limit: int | None = None) -> list[CoreTask]:
    """Return the tasks of a bundle, each with its first `limit` items in nanochat's order.

    Raise a `UserError` if a file is missing or malformed.
    """
    path = require_file(folder / "core.yaml", "the list of tasks", "give the folder of nanochat's eval_bundle")
    try:
        yaml = import_module("yaml")
    except ImportError:
        raise UserError(f"cannot read {path} without PyYAML: pip install 'tilewright[eval]'") from None
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["icl_tasks"]
        baselines = _read_baselines(folder / "eval_meta_data.csv")
        if not entries:
            raise ValueError("core.yaml lists no task")
        return [_read_task(entry, baselines, folder / "eval_data", limit) for entry in entries]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{folder} is not a CORE bundle: {type(error).__name__}: {error}".splitlines()[0]) from None


def _read_baselines(path: Path) -> dict[str, float]:
    with require_file(path, "the table of baselines").open(encoding="utf-8", newline="") as file:
        return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}


def _read_task(entry: dict[str, Any], baselines: dict[str, float], data: Path, limit: int | None) -> CoreTask:
    label, kind = entry["label"], entry["icl_task_type"]
    if kind not in _FIELDS:
        raise UserError(f"CORE task {label} has type {kind!r}: expected one of {', '.join(_FIELDS)}")
    if label not in baselines:
        raise UserError(f"CORE task {label} has no row in eval_meta_data.csv: add its random baseline")
    if not 0 <= baselines[label] < 1:
        raise UserError(
            f"the random baseline of {label} is {100 * baselines[label]:g}: expected a percentage from 0 to below 100"
        )
    items = []
    for place, item in read_items(require_file(data / entry["dataset_uri"], f"the data of {label},")):
        if missing := [name for name in _FIELDS[kind] if name not in item]:
            raise UserError(f"{place} is not an item of {label}: {missing[0]!r} is missing")
        if kind != "language_modeling":
            answers, gold = item[_ANSWERS[kind]], item["gold"]
            if not isinstance(answers, list) or type(gold) is not int or not 0 <= gold < len(answers):
                raise UserError(
                    f"{place} is not an item of {label}: gold is {gold!r:.20}, expected the index of an answer, counted from 0"
                )
        items.append(item)
    random.Random(_SHUFFLE_SEED).shuffle(items)
    items, num_fewshot = items[:limit], int(entry["num_fewshot"][0])
    if num_fewshot >= len(items):
        raise UserError(
            f"CORE task {label} needs {num_fewshot} examples: expected more than {num_fewshot} items, found {len(items)}"
        )
    return CoreTask(label, kind, num_fewshot, entry.get("continuation_delimiter", " "), baselines[label], items)


def prompts_of(task: CoreTask, index: int) -> list[str]:
    """Return the prompts of an item: one for each answer, or for language_modeling one without and one with the answer."""
    item, examples = task.items[index], examples_for(index, task.items, task.num_fewshot)
    pairs = [_answered(task.kind, example) for example in examples]
    shown = "".join(f"{context}{task.delimiter}{continuation}\n\n" for context, continuation in pairs)
    if task.kind == "multiple_choice":
        return [f"{shown}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{shown}{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]
    before = f"{shown}{item['context'].strip()}{task.delimiter}"
    # Strip the space at the end, which belongs to the next token.
    return [before.strip(), before + item["continuation"]]


def _answered(kind: str, item: Item) -> tuple[str, str]:
    if kind == "multiple_choice":
        return item["query"], item["choices"][item["gold"]]
    if kind == "schema":
        return item["context_options"][item["gold"]], item["continuation"]
    return item["context"].strip(), item["continuation"]


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest common prefix."""
    return next((i for i, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1), min(map(len, sequences)))


def _requests_of(scorer: Scorer, task: CoreTask, index: int) -> list[Request]:
    tokens = [[*scorer.start, *scorer.encode(prompt)] for prompt in prompts_of(task, index)]
    if task.kind == "schema":
        num_scored = [common_length([each[::-1] for each in tokens])] * len(tokens)
    else:
        begin = common_length(tokens)
        num_scored = [len(each) - begin for each in tokens]
    if task.kind == "language_modeling":
        tokens, num_scored = tokens[1:], num_scored[1:]
    # The first token has no context, so it cannot be scored.
    return [scorer.request(each, min(num, len(each) - 1)) for each, num in zip(tokens, num_scored, strict=True)]


def _is_right(task: CoreTask, item: Item, scores: Sequence[TokenScores]) -> bool:
    if task.kind == "language_modeling":
        return bool(scores[0].is_greedy.all())
    # An answer that is a prefix of the others has no token to score. It is never chosen.
    means = [each.nats.mean() if each.nats.size else np.inf for each in scores]
    return int(np.argmin(means)) == item["gold"]


def score_core(scorer: Scorer, tasks: Sequence[CoreTask]) -> dict[str, Any]:
    """Return the CORE metric, and for each task the accuracy, the centered accuracy and the number of truncated prompts."""
    rows = {}
    for task in tqdm(tasks, desc="CORE", unit="task", disable=None):
        rows[task.label] = _score_task(scorer, task)
    return {"core": sum(row["centred"] for row in rows.values()) / len(rows), "tasks": rows}


def _score_task(scorer: Scorer, task: CoreTask) -> dict[str, Any]:
    sizes: list[int] = []

    def requests() -> Iterator[Request]:
        for i in range(len(task.items)):
            found = _requests_of(scorer, task, i)
            sizes.append(len(found))
            yield from found

    scored = scorer.score(requests())
    right = cut = 0
    for i in tqdm(range(len(task.items)), desc=task.label, unit="item", leave=False, disable=None):
        first = next(scored)
        answers = [first, *(next(scored) for _ in range(sizes[i] - 1))]
        right += _is_right(task, task.items[i], [scores for _, scores in answers])
        cut += sum(request.is_cut for request, _ in answers)
    accuracy = right / len(task.items)
    centred = (accuracy - task.baseline) / (1 - task.baseline)
    return {
        "accuracy": accuracy,
        "centred": centred,
        "baseline": task.baseline,
        "num_fewshot": task.num_fewshot,
        "items": len(task.items),
        "cut": cut,
    }
