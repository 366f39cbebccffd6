import importlib.util
import json

import pytest

from evaluation_items import ITEMS
from tilewright.cli import main
from tilewright.errors import UserError
from tilewright.train import train
from tilewright.train.evaluation import EvalConfig, Scorer, evaluate
from tilewright.train.evaluation.tasks import TASKS
from tilewright.train.evaluation.texts import score_texts
from tilewright.train.pretrained import load_text_model


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS[task]))
    return folder


@pytest.fixture
def run(changed):
    return train(changed(steps=4)).run


def test_command_prints_tables_and_writes_json(run, corpus, data, tmp_path, capsys):
    out, valid = tmp_path / "eval.json", corpus / "valid.txt"
    options = ["--text", str(valid), "--tasks", "copa,swag", "winogrande", "--data", str(data), "--device", "cpu"]
    main(["eval", str(run), *options, "--out", str(out)])
    shown, report = capsys.readouterr().out, json.loads(out.read_text())
    assert list(report) == ["model", "device", "dtype", "context_length", "text", "tasks"]
    assert (report["device"], report["dtype"], report["context_length"]) == ("cpu", "float32", 16)
    assert list(report["tasks"]) == ["copa", "swag", "winogrande"]
    assert report["text"] == score_texts(Scorer(load_text_model(run, "cpu")), [valid])
    assert f"{report['text'][str(valid)]['bits_per_byte']:.4f}" in shown
    assert "acc_norm" in shown
    main(["eval", str(run), *options, "--json"])
    assert json.loads(capsys.readouterr().out) == report
    with pytest.raises(UserError, match="exists already"):
        evaluate(run, EvalConfig(text=(valid,), out=out))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to evaluate"),
        ({"tasks": (",",)}, "nothing to evaluate"),
        ({"tasks": ("piqa",)}, "tasks is set without data"),
        ({"core": "x", "limit": 0}, "limit is 0"),
        ({"core": "x", "num_fewshot": -1}, "num_fewshot is -1"),
    ],
)
def test_invalid_evaluation_options_raise(options, message):
    with pytest.raises(UserError, match=message):
        EvalConfig(**options)


def test_missing_data_raises_before_the_model_is_loaded(tmp_path, data, monkeypatch):
    for config, message in (
        (EvalConfig(text=(tmp_path / "no.txt",)), "no.txt does not exist"),
        (EvalConfig(tasks=("piqa",), data=tmp_path), "piqa.jsonl does not exist"),
        (
            EvalConfig(tasks=("piqa",), data=data, num_fewshot=2),
            "num_fewshot is 2: expected less than 2, the number of items of piqa",
        ),
        (EvalConfig(core=tmp_path), "core.yaml does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(tmp_path / "nowhere", config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tilewright\[eval\]'"):
        evaluate(tmp_path / "nowhere", EvalConfig(harness=("piqa",)))
