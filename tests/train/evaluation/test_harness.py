import functools
import json
from pathlib import Path

import numpy as np
import pytest

from evaluation_items import ITEMS
from tilewright.errors import UserError
from tilewright.model import generate
from tilewright.train.evaluation.multiple_choice import score_questions
from tilewright.train.evaluation.tasks import read_questions

pytest.importorskip("lm_eval")

# Paths of the definitions below lm-eval's folder of tasks.
DEFINITIONS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "copa": "super_glue/copa/default.yaml",
    "sciq": "sciq/sciq.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "swag": "swag/swag.yaml",
    "mmlu": "mmlu/default/_default_template_yaml",
}
TEXTS = ["the cat sat on a mat and saw one small red bird in that old tree. " * 3, "a bird é"]


def write_task(folder, name, items, definition):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    data = {"data_files": {"validation": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
    local = {
        "task": f"our_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": data,
        "validation_split": "validation",
    } | dict.fromkeys(("training_split", "test_split", "fewshot_split"))
    # JSON is valid YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(definition | local))


@pytest.fixture(autouse=True)
def without_bootstrap(monkeypatch):
    from tilewright.train.evaluation import harness

    # The default of 100,000 bootstrap samples takes seconds.
    monkeypatch.setattr(harness, "simple_evaluate", functools.partial(harness.simple_evaluate, bootstrap_iters=0))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with lm-eval's tasks on local items and two tasks of our own, and their task manager."""
    import lm_eval.tasks

    from tilewright.train.evaluation.harness import find_tasks

    folder, root = tmp_path_factory.mktemp("tasks"), Path(lm_eval.tasks.__file__).parent
    for name, place in DEFINITIONS.items():
        write_task(folder, name, ITEMS[name], {"include": str(root / place)})
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    metrics = [{"metric": name} for name in ("bits_per_byte", "byte_perplexity")]
    write_task(folder, "texts", [{"text": text} for text in TEXTS], rolling | {"metric_list": metrics})
    writing = {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    write_task(folder, "writing", [{"q": "the cat", "a": "x"}, {"q": "one small red bird " * 9, "a": "y"}], writing)
    return folder, find_tasks


def test_prompts_and_accuracies_match_lm_eval(tasks, scorer, monkeypatch):
    from tilewright.train.evaluation.harness import HarnessModel, run_tasks

    folder, find_tasks = tasks
    asked = {}
    score = HarnessModel.loglikelihood

    def noted(self, requests):
        for request in requests:
            asked.setdefault(request.task_name, {}).setdefault(request.doc_id, {})[request.idx] = request.args
        return score(self, requests)

    monkeypatch.setattr(HarnessModel, "loglikelihood", noted)
    rows = run_tasks(scorer, find_tasks([f"our_{name}" for name in DEFINITIONS], folder))
    for name in DEFINITIONS:
        questions = read_questions(folder, name)
        for i, question in enumerate(questions):
            pairs = list(zip(question.contexts, question.continuations, strict=True))
            assert pairs == [asked[f"our_{name}"][i][choice] for choice in range(len(pairs))], name
        ours, theirs = score_questions(scorer, name, questions), rows[f"our_{name}"]
        for metric in ("acc", "acc_norm", "acc_stderr"):
            assert theirs.get(metric, ours[metric]) == pytest.approx(ours[metric]), (name, metric)


def test_texts_are_scored_in_windows_without_overlap(tasks, scorer, nats_of):
    from tilewright.train.evaluation.harness import run_tasks

    folder, find_tasks = tasks
    row = run_tasks(scorer, find_tasks(["our_texts"], folder))["our_texts"]
    nats, length = 0.0, scorer.context_length
    for text in TEXTS:
        sequence = [*scorer.start, *scorer.encode(text)]
        for i in range(1, len(sequence)):
            # The last window has full length, so it starts earlier.
            end = min(len(sequence), -(-i // length) * length + 1)
            nats += nats_of(sequence[max(0, end - length - 1) : i + 1])
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert row["bits_per_byte"] == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-5)


def test_generation_ends_at_the_first_stop_string(tasks, scorer, text_model, monkeypatch):
    from tilewright.train.evaluation.harness import HarnessModel, run_tasks

    folder, find_tasks = tasks
    made = []
    write = HarnessModel.generate_until
    monkeypatch.setattr(HarnessModel, "generate_until", lambda self, requests: made.extend(write(self, requests)) or made)
    row = run_tasks(scorer, find_tasks(["our_writing"], folder), limit=2)["our_writing"]
    assert row["exact_match"] == 0.0
    prompts = [scorer.encode("the cat"), scorer.encode("one small red bird " * 9)[-20:]]
    expected = generate(text_model.model, prompts, 4, temperature=0.0, stop_tokens=scorer.end_tokens)
    assert made == [scorer.tokenizer.decode(tokens).partition("\n")[0] for tokens in expected]


def test_unknown_tasks_and_folders_raise(tasks, monkeypatch):
    from lm_eval.tasks import TaskManager

    folder, find_tasks = tasks
    # Avoid indexing lm-eval's thousands of files.
    monkeypatch.setattr(
        "tilewright.train.evaluation.harness.TaskManager",
        lambda **options: TaskManager(**options | {"include_defaults": False}),
    )
    with pytest.raises(UserError, match="unknown lm-eval task 'our_nothing'"):
        find_tasks(["our_piqa", "our_nothing"], folder)
    with pytest.raises(UserError, match="does not exist"):
        find_tasks(["our_piqa"], folder / "nowhere")
