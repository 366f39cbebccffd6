import json
import math

import numpy as np
import pytest

from evaluation_items import ITEMS
from tilewright.errors import UserError
from tilewright.train.evaluation.multiple_choice import examples_for, score_questions, standard_error
from tilewright.train.evaluation.tasks import TASKS, Question, read_questions


def write_items(folder, task, items):
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def test_all_tasks_have_test_items():
    assert ITEMS.keys() == TASKS.keys()


def test_most_likely_answer_is_chosen(scorer, nats_of):
    questions = [Question(("the cat sat on",) * 3, (" a mat", " one", " that old red tree é"), gold) for gold in (0, 1, 2)] + [
        Question(("", "the old cat"), (" sat",) * 2, 0)
    ]

    def nats(context, continuation):
        request = scorer.continuation(context, continuation)
        tokens, end = list(request.tokens), len(request.tokens)
        return sum(nats_of(tokens[: i + 1]) for i in range(end - request.num_scored, end))

    right = np.zeros((4, 3))
    for i, question in enumerate(questions):
        found = [nats(*pair) for pair in zip(question.contexts, question.continuations, strict=True)]
        sizes = [[1, len(text) - 1, len(text.encode()) - 1] for text in question.continuations]
        right[i] = [np.argmin([n / size[k] for n, size in zip(found, sizes, strict=True)]) == question.gold for k in range(3)]
    row = score_questions(scorer, "made up", questions)
    assert [row[name] for name in ("acc", "acc_norm", "acc_bytes")] == right.mean(axis=0).tolist()
    assert (row["items"], row["cut"]) == (4, 0)
    assert score_questions(scorer, "made up", questions, limit=1)["acc"] == right[0, 0]


def test_examples_precede_a_question_and_exclude_it(scorer, monkeypatch):
    questions = [Question((f"q{i}:",) * 2, (" yes", " no"), i % 2) for i in range(6)]
    prompts = []
    whole = type(scorer).continuation
    monkeypatch.setattr(type(scorer), "continuation", lambda self, *pair: (prompts.append(pair), whole(self, "q", pair[1]))[1])
    score_questions(scorer, "made up", questions, num_fewshot=2, limit=3)
    assert len(prompts) == 6
    for i, (context, _) in enumerate(prompts):
        first, second, asked = context.split("\n\n")
        assert asked == f"q{i // 2}:"
        assert {first, second} < {f"q{k}:{' no' if k % 2 else ' yes'}" for k in range(6) if k != i // 2}


@pytest.mark.parametrize("index", [0, 3, 6])
def test_examples_match_nanochat(index):
    import random

    items = list("abcdefg")
    others = [i for i in range(7) if i != index]
    assert examples_for(index, items, 4) == [items[i] for i in random.Random(1234 + index).sample(others, 4)]
    with pytest.raises(UserError, match="the number of examples is 7: expected 0 to 6"):
        examples_for(index, items, 7)


def test_truncated_prompts_are_counted(scorer):
    questions = [Question(("the cat sat on a mat " * 20, "the"), (" one", " two"), 0)]
    assert score_questions(scorer, "made up", questions)["cut"] == 1


def test_standard_error_uses_the_sample_variance():
    hits = [1, 0, 0, 1, 1]
    assert standard_error(0.6, 5) == pytest.approx(np.std(hits, ddof=1) / math.sqrt(5))
    assert standard_error(1.0, 1) is None


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("piqa", {"label": 2}, "line 2 is not an item of piqa: its answer is 2"),
        ("piqa", {"label": ""}, "line 2 is not an item of piqa"),
        ("arc_easy", {"answerKey": "Z"}, "line 2 is not an item of arc_easy"),
        ("winogrande", {"sentence": "no gap"}, "its sentence has no _"),
        ("copa", {"question": "why"}, "'why' is missing or is not a known value"),
        ("hellaswag", {"endings": None}, "line 2 is not an item of hellaswag"),
    ],
)
def test_malformed_item_is_reported_with_its_line(tmp_path, task, change, message):
    first, second = ITEMS[task][:2]
    with pytest.raises(UserError, match=message):
        read_questions(write_items(tmp_path, task, [first, second | change]), task)


def test_malformed_files_raise(tmp_path):
    with pytest.raises(UserError, match=r"task is 'gsm8k': expected one of hellaswag, .*use --harness"):
        read_questions(tmp_path, "gsm8k")
    with pytest.raises(UserError, match=r"the data of piqa, .*piqa.jsonl does not exist"):
        read_questions(tmp_path, "piqa")
    wrong = ((b"[1]\n", "is a list"), (b"{\n", "is not JSON"), (b"\n", "contains no items"))
    for data, message in (*wrong, (b"[" * 100_000, "line 1 is not JSON"), (b"\xff", "is not in UTF-8")):
        (tmp_path / "piqa.jsonl").write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_questions(tmp_path, "piqa")
