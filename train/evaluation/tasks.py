"""Multiple-choice tasks: convert items of public data sets to prompts and continuations.

The prompts match lm-eval (the Language Model Evaluation Harness, Gao et al. 2024), so the accuracies are comparable. An item is
an object in the format of the data set on the Hugging Face hub.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError
from ...files import read_text, require_file

Item = Mapping[str, Any]


class Question(NamedTuple):
    """A question. Answer i is continuation i after context i; the continuation includes the space between them."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int

    @property
    def answered(self) -> str:
        """The question with its correct answer, for use as a few-shot example."""
        return self.contexts[self.gold] + self.continuations[self.gold]


def _choose(context: str, choices: list[str], gold: int) -> Question:
    return Question((context,) * len(choices), tuple(f" {choice}" for choice in choices), gold)


def _labelled(context: str, choices: Mapping[str, list[str]], answer: str) -> Question:
    return _choose(context, choices["text"], choices["label"].index(answer))


def _without_wikihow_marks(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag(item: Item) -> Question:
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    endings = [_without_wikihow_marks(ending) for ending in item["endings"]]
    return _choose(_without_wikihow_marks(context), endings, int(item["label"]))


def _arc(item: Item) -> Question:
    return _labelled(f"Question: {item['question']}\nAnswer:", item["choices"], item["answerKey"])


def _piqa(item: Item) -> Question:
    return _choose(f"Question: {item['goal']}\nAnswer:", [item["sol1"], item["sol2"]], int(item["label"]))


def _winogrande(item: Item) -> Question:
    # The contexts contain the answers, and the text after the gap is scored (Trinh and Le 2018, partial evaluation).
    before, gap, after = item["sentence"].partition("_")
    if not gap:
        raise ValueError("its sentence has no _")
    contexts = tuple(before + item[option] for option in ("option1", "option2"))
    return Question(contexts, (f" {after.strip()}",) * 2, int(item["answer"]) - 1)


def _boolq(item: Item) -> Question:
    return _choose(f"{item['passage']}\nQuestion: {item['question']}?\nAnswer:", ["no", "yes"], int(item["label"]))


def _openbookqa(item: Item) -> Question:
    return _labelled(item["question_stem"], item["choices"], item["answerKey"].lstrip())


def _copa(item: Item) -> Question:
    word = {"cause": "because", "effect": "therefore"}[item["question"]]
    choices = [item["choice1"], item["choice2"]]
    # `_choose` adds a second space, as in lm-eval.
    lowered = [f" {choice[0].lower()}{choice[1:]}" for choice in choices]
    return _choose(f"{item['premise'].strip()[:-1]} {word}", lowered, int(item["label"]))


def _sciq(item: Item) -> Question:
    choices = [item[name] for name in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return _choose(f"{item['support'].lstrip()}\nQuestion: {item['question']}\nAnswer:", choices, 3)


def _lettered(question: str, choices: list[str], gold: int) -> Question:
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    return _choose("\n".join([question.strip(), *lines, "Answer:"]), letters, gold)


def _commonsense_qa(item: Item) -> Question:
    choices = item["choices"]
    return _lettered(f"Question: {item['question'].strip()}", choices["text"], choices["label"].index(item["answerKey"]))


def _mmlu(item: Item) -> Question:
    return _lettered(item["question"], item["choices"], int(item["answer"]))


def _social_iqa(item: Item) -> Question:
    choices = [item[name] for name in ("answerA", "answerB", "answerC")]
    return _choose(f"Q: {item['context']} {item['question']}\nA:", choices, int(item["label"]) - 1)


def _swag(item: Item) -> Question:
    return _choose(item["startphrase"], [item[f"ending{i}"] for i in range(4)], int(item["label"]))


TASKS: dict[str, Callable[[Item], Question]] = {
    "hellaswag": _hellaswag,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "boolq": _boolq,
    "openbookqa": _openbookqa,
    "copa": _copa,
    "sciq": _sciq,
    "commonsense_qa": _commonsense_qa,
    "mmlu": _mmlu,
    "social_iqa": _social_iqa,
    "swag": _swag,
}


def read_questions(folder: Path, task: str) -> list[Question]:
    """Return the questions in `folder`/`task`.jsonl; raise a `UserError` for an unknown task or a malformed item."""
    if task not in TASKS:
        raise UserError(f"task is {task!r}: expected one of {', '.join(TASKS)}; use --harness for other tasks")
    path = require_file(folder / f"{task}.jsonl", f"the data of {task},", "one item of its data set per line, as JSON")
    questions = []
    for place, item in read_items(path):
        try:
            question = TASKS[task](item)
            if not 0 <= question.gold < len(question.continuations):
                raise ValueError(f"its answer is {question.gold}, expected 0 to {len(question.continuations) - 1}")
        except KeyError as error:
            raise UserError(f"{place} is not an item of {task}: {error} is missing or is not a known value") from None
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{place} is not an item of {task}: {error}") from None
        questions.append(question)
    return questions


def read_items(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of a JSON lines file, each with its file and line for error messages."""
    items = []
    for number, line in enumerate(read_text(path, "the file of items").split("\n"), 1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not JSON: {error}") from None
        if not isinstance(item, dict):
            raise UserError(f"{place} is a {type(item).__name__}: expected a JSON object")
        items.append((place, item))
    if not items:
        raise UserError(f"{path} contains no items: expected one item per line")
    return items
