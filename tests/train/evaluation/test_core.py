import json
import random

import pytest
import torch

from tilewright.errors import UserError
from tilewright.train.evaluation.core import common_length, prompts_of, read_bundle, score_core

CHOICE = [{"query": f"Who sat {i}?", "choices": ["a cat", "a bird", "one"], "gold": i % 3} for i in range(5)]
SCHEMA = [
    {"context_options": [f"The cat {i} saw", "A red bird saw"], "continuation": "that old tree", "gold": i % 2}
    for i in range(4)
]
LANGUAGE = [{"context": f"the cat {i} sat on ", "continuation": "a mat"} for i in range(3)]
CORE = """
icl_tasks:
- label: choice
  dataset_uri: a/choice.jsonl
  num_fewshot: [2]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
- label: schema
  dataset_uri: schema.jsonl
  num_fewshot: [0]
  icl_task_type: schema
- label: language
  dataset_uri: language.jsonl
  num_fewshot: [1]
  icl_task_type: language_modeling
"""


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "core.yaml").write_text(CORE)
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoice,25\nschema,50.0\nlanguage,0\n")
    (tmp_path / "eval_data" / "a").mkdir(parents=True)
    for name, items in (("a/choice", CHOICE), ("schema", SCHEMA), ("language", LANGUAGE)):
        (tmp_path / "eval_data" / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return tmp_path


def test_bundle_has_nanochats_order(bundle):
    choice, schema, language = read_bundle(bundle)
    assert [task.label for task in (choice, schema, language)] == ["choice", "schema", "language"]
    assert (choice.delimiter, schema.delimiter) == ("\nAnswer: ", " ")
    assert [task.baseline for task in (choice, schema, language)] == [0.25, 0.5, 0.0]
    expected = list(CHOICE)
    random.Random(1337).shuffle(expected)
    assert choice.items == expected
    assert read_bundle(bundle, limit=3)[0].items == expected[:3]


def test_prompts_match_nanochat(bundle):
    choice, schema, language = read_bundle(bundle)
    first, second = (choice.items[i] for i in random.Random(1234 + 1).sample([0, 2, 3, 4], 2))
    shown = "".join(f"{each['query']}\nAnswer: {each['choices'][each['gold']]}\n\n" for each in (first, second))
    query = choice.items[1]["query"]
    assert prompts_of(choice, 1) == [f"{shown}{query}\nAnswer: {answer}" for answer in ("a cat", "a bird", "one")]
    assert prompts_of(schema, 0) == [f"{each} that old tree" for each in schema.items[0]["context_options"]]
    (example,) = (language.items[i] for i in random.Random(1234).sample([1, 2], 1))
    before = f"{example['context'].strip()} a mat\n\n{language.items[0]['context'].strip()}"
    assert prompts_of(language, 0) == [before, f"{before} a mat"]


@pytest.mark.parametrize(
    ("sequences", "length"), [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 3]], 2), ([[1], [2]], 0), ([[5, 6]], 2)]
)
def test_common_prefix_length(sequences, length):
    assert common_length(sequences) == length


def test_core_is_the_mean_of_centered_accuracies(bundle, text_model, nats_of):
    from tilewright.train.evaluation import Scorer

    scorer = Scorer(text_model, "float32", batch_tokens=64)
    tasks = read_bundle(bundle)

    def nats(tokens, first):
        cut = max(0, len(tokens) - 25)
        return [nats_of(tokens[cut : i + 1]) for i in range(first, len(tokens))]

    right = {task.label: 0 for task in tasks}
    for task in tasks:
        for i, item in enumerate(task.items):
            tokens = [[*scorer.start, *scorer.encode(prompt)] for prompt in prompts_of(task, i)]
            if task.kind == "language_modeling":
                before, whole = tokens
                greedy = []
                for end in range(len(before), len(whole)):
                    cut = max(0, len(whole) - 25)
                    greedy.append(int(text_model.model(torch.tensor([whole[cut:end]]))[0, -1].argmax()) == whole[end])
                right[task.label] += all(greedy)
                continue
            if task.kind == "multiple_choice":
                first = next(k for k in range(99) if len({tuple(each[: k + 1]) for each in tokens}) > 1)
                firsts = [first] * len(tokens)
            else:
                same = next(k for k in range(1, 99) if len({tuple(each[-k - 1 :]) for each in tokens}) > 1)
                firsts = [len(each) - same for each in tokens]
            means = []
            for each, first in zip(tokens, firsts, strict=True):
                found = nats(each, first)
                means.append(sum(found) / len(found))
            right[task.label] += means.index(min(means)) == item["gold"]
    report = score_core(scorer, tasks)
    accuracies = {"choice": right["choice"] / 5, "schema": right["schema"] / 4, "language": right["language"] / 3}
    assert {label: row["accuracy"] for label, row in report["tasks"].items()} == accuracies
    centred = [(accuracies["choice"] - 0.25) / 0.75, (accuracies["schema"] - 0.5) / 0.5, accuracies["language"]]
    assert [row["centred"] for row in report["tasks"].values()] == pytest.approx(centred)
    assert report["core"] == pytest.approx(sum(centred) / 3)
    assert report["tasks"]["choice"]["cut"] > 0


def test_malformed_bundles_raise(bundle, monkeypatch):
    def refused(message, limit=None):
        with pytest.raises(UserError, match=message):
            read_bundle(bundle, limit)

    refused("CORE task choice needs 2 examples: expected more than 2 items, found 2", limit=2)
    for gold in (2, -1, "1", True):
        item = json.dumps(SCHEMA[0] | {"gold": gold})
        (bundle / "eval_data" / "schema.jsonl").write_text(item)
        refused("schema.jsonl, line 1 is not an item of schema: gold is .*, expected the index of an answer, counted from 0")
    (bundle / "eval_data" / "schema.jsonl").write_text('{"continuation": "x", "gold": 0}\n')
    refused(r"schema.jsonl, line 1 is not an item of schema: 'context_options' is missing")
    (bundle / "eval_data" / "schema.jsonl").unlink()
    refused("the data of schema, .* does not exist")
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoice,100\n")
    refused("the random baseline of choice is 100: expected a percentage from 0 to below 100")
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nchoice,25\n")
    refused("CORE task schema has no row in eval_meta_data.csv")
    (bundle / "core.yaml").write_text(CORE.replace("multiple_choice", "essay"))
    refused("CORE task choice has type 'essay'")
    (bundle / "core.yaml").write_text("icl_tasks: []")
    refused("core.yaml lists no task")
    (bundle / "core.yaml").write_text("a: [")
    refused("is not a CORE bundle")
    (bundle / "core.yaml").write_text("tasks: []")
    refused("is not a CORE bundle: KeyError: 'icl_tasks'")
    (bundle / "core.yaml").unlink()
    refused("core.yaml does not exist: give the folder of nanochat's eval_bundle")
