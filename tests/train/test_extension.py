"""Extension of runs: more steps, another batch size, other data or another learning rate from a checkpoint on."""

import dataclasses
import json
import shutil
import signal

import pytest

from faults import outcome, rows, run_in_child, train_until_killed
from tilewright.errors import UserError
from tilewright.train import OptimizerConfig, load_config, train
from tilewright.train.checkpoint.layout import checkpoint_step, list_checkpoints
from tilewright.train.config import Change
from tilewright.train.metrics import read_metrics
from tilewright.train.plot import plot_losses
from tilewright.train.trainer import Trainer


@pytest.fixture
def growing(changed):
    """Return a run of a schedule: growing("wsd", steps=8)."""

    def make(schedule, **options):
        optimizer = OptimizerConfig(lr=1e-2, final_lr=1e-3, warmup_steps=3, schedule=schedule, decay_share=0.25)
        return changed(optimizer=optimizer, keep_checkpoints=9, **options)

    return make


def changes(config):
    return [(change.step, change.changes) for change in load_config(config.out / "config.json").history]


def test_run_extended_twice_equals_one_long_run(growing, tmp_path):
    whole = growing("constant", out=tmp_path / "whole")
    train(whole)
    config = growing("constant", steps=4)
    train(config)
    for steps in (8, 12):
        result = train(dataclasses.replace(config, steps=steps), resume="auto")
    assert (result.steps, outcome(config.out)) == (12, outcome(whole.out))
    assert changes(config) == [(4, {"steps": [4, 8]}), (8, {"steps": [8, 12]})]
    # From an earlier checkpoint, the run can be extended differently.
    train(dataclasses.replace(config, steps=6), resume=list_checkpoints(config.out)[1], extend="keep")
    assert changes(config) == [(4, {"steps": [4, 8]}), (4, {"steps": [8, 6]})]
    train(dataclasses.replace(config, steps=12), resume="auto")
    assert rows(config.out)[-1] == rows(whole.out)[-1]
    assert [row["tokens"] for row in read_metrics(config.out)] == [64 * step for step in range(1, 13)]


def test_extension_resumes_from_before_the_decay(growing, tmp_path, capsys):
    whole = growing("wsd", out=tmp_path / "whole", steps=16)
    train(whole)
    config = growing("wsd", steps=12)
    train(config)
    assert rows(config.out)[9:] != rows(whole.out)[9:12]
    train(dataclasses.replace(config, steps=16), resume="auto")
    assert outcome(config.out) == outcome(whole.out)
    printed = capsys.readouterr().err
    assert "renamed step-00000012 to set-aside-step-00000012: the run resumes from step-00000008" in printed
    assert "from step 8 on: steps 12 → 16" in printed
    with pytest.raises(UserError, match=r"step-00000016 is after step 11, where the learning rate decays: use an earlier one"):
        train(dataclasses.replace(config, steps=20), resume=list_checkpoints(config.out)[-1])
    for checkpoint in list_checkpoints(config.out)[:-1]:
        shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match=r"no valid checkpoint up to step 11, .*: restart the schedule .* --extend RATE"):
        train(dataclasses.replace(config, steps=20), resume="auto")


def test_checkpoint_before_the_decay_is_kept(growing, tmp_path):
    whole, config = (
        dataclasses.replace(growing("wsd", out=tmp_path / name, steps=steps), keep_checkpoints=1, eval_every=20)
        for name, steps in (("whole", 16), ("run", 10))
    )
    train(whole)
    train(config)
    # Neither step is a multiple of checkpoint_every.
    assert [checkpoint_step(folder) for folder in list_checkpoints(config.out)] == [6, 10]
    train(dataclasses.replace(config, steps=16), resume="auto")
    assert [checkpoint_step(folder) for folder in list_checkpoints(config.out)] == [11, 16]
    assert outcome(config.out) == outcome(whole.out)


def test_extend_restarts_a_cosine_from_a_rate(growing):
    config = growing("cosine", steps=8)
    train(config)
    before = rows(config.out)
    longer = dataclasses.replace(config, steps=16)
    with pytest.raises(UserError, match=r"has steps 8, not 16: keep 8, or restart the schedule .* --extend RATE"):
        train(longer, resume="auto")
    train(longer, resume="auto", extend=5e-3)
    found = rows(config.out)
    assert found[:8] == before
    assert (found[8]["lr"], found[-1]["lr"]) == (5e-3, 1e-3)
    assert changes(config) == [(8, {"steps": [8, 16], "optimizer.lr": [1e-2, 5e-3]})]
    # Repeating the command extends the run once.
    shutil.rmtree(list_checkpoints(config.out)[-1])
    train(longer, resume="auto", extend=5e-3)
    assert rows(config.out) == found
    assert len(changes(config)) == 1


def test_extend_changes_batch_size_and_data(growing, corpus, tmp_path, monkeypatch):
    shutil.copy(corpus / "valid.txt", tmp_path / "more.txt")
    config = growing("constant", steps=4)
    train(config)
    numbers = {}
    samples = Trainer.samples
    monkeypatch.setattr(Trainer, "samples", lambda self, step: numbers.setdefault(step, samples(self, step)))
    wider = dataclasses.replace(config, steps=8, batch_size=8)
    train(wider, resume="auto", extend="keep")
    data = dataclasses.replace(config.data, train=(tmp_path / "more.txt",))
    other = dataclasses.replace(wider, steps=12, data=data)
    train(other, resume="auto", extend="keep")
    assert list(numbers.values()) == [
        *(range(16 + 8 * i, 24 + 8 * i) for i in range(4)),
        *(range(8 * i, 8 * i + 8) for i in range(4)),
    ]
    paths = [[str(path)] for path in (*config.data.train, tmp_path / "more.txt")]
    assert changes(config) == [(4, {"steps": [4, 8], "batch_size": [4, 8]}), (8, {"steps": [8, 12], "data.train": paths})]
    assert read_metrics(config.out)[-1]["tokens"] == 16 * (4 * 4 + 8 * 8)
    expected = outcome(config.out)
    # A checkpoint from before the change of data cannot be resumed with the new data.
    with pytest.raises(UserError, match=r"is from before step 8, where the training data changed: add --extend keep"):
        train(other, resume=list_checkpoints(config.out)[1])
    # An interrupted run resumes with its last options. From before its last extension, it can be extended in the same way.
    shutil.rmtree(list_checkpoints(config.out)[-1])
    train(load_config(config.out / "config.json"), resume="auto")
    assert outcome(config.out) == expected
    train(other, resume=list_checkpoints(config.out)[2], extend="keep")
    assert outcome(config.out) == expected
    with pytest.raises(UserError, match=r"train.tokens is not the file that the run began with"):
        train(dataclasses.replace(other, data=config.data), resume="auto")


def test_invalid_extensions_raise(growing):
    config = growing("constant", steps=8)
    train(config)

    def refused(message, extend, **options):
        with pytest.raises(UserError, match=message):
            train(dataclasses.replace(config, **options), resume="auto", extend=extend)

    faster = dataclasses.replace(config.optimizer, lr=2e-2)
    refused(r"has batch_size 4, not 8: keep 4, or change it from this step on with --extend keep", None, batch_size=8)
    refused(r"has steps 8, not 7: keep 8, or change it from this step on", None, steps=7)
    refused(r"cannot extend a run from .*step-00000008, step 8 of 4", "keep", steps=4)
    refused(r"has seed 0, not 1: keep 0", "keep", seed=1)
    refused(r"has optimizer.lr 0.01, not 0.02: .* with --extend RATE", "keep", optimizer=faster)
    refused(r"optimizer.lr is 0.02, but extend is 0.03: omit optimizer.lr", 3e-2, optimizer=faster)
    refused(r"optimizer.final_lr is 0.001: expected 0 to lr, 0.0001", 1e-4, steps=9)
    refused(r"extend is nan: expected keep, or a learning rate above 0", float("nan"), steps=9)
    assert changes(config) == []


def test_extend_without_resume_raises(config):
    with pytest.raises(UserError, match=r"extend is keep, but no run is resumed: add --resume auto"):
        train(config, resume="auto", extend="keep")


def test_batch_warmup_keeps_the_micro_batch_shape(changed, monkeypatch):
    shapes = set()
    backward = Trainer._backward

    def noting(self, *batch):
        shapes.update(part.shape[0] for part in batch[0].split(self.micro_batch_size))
        return backward(self, *batch)

    monkeypatch.setattr(Trainer, "_backward", noting)
    config = changed(batch_start=1, batch_warmup_steps=6)
    train(config)
    assert shapes == {1}
    assert [row["tokens"] for row in read_metrics(config.out)] == [16 * n for n in (1, 2, 3, 5, 7, 9, 13, 17, 21, 25, 29, 33)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("every", [pytest.param(3, marks=pytest.mark.long), 23])
def test_extension_resumes_after_a_kill_at_any_file_operation(growing, corpus, tmp_path, every):
    shutil.copy(corpus / "valid.txt", tmp_path / "more.txt")
    start = growing("wsd", steps=8, checkpoint_every=2)
    train(start)
    data = dataclasses.replace(start.data, train=(tmp_path / "more.txt",))
    grown = dataclasses.replace(start, steps=10, batch_size=8, data=data)

    def copied(name):
        out = tmp_path / name
        shutil.copytree(start.out, out)
        return dataclasses.replace(grown, out=out)

    whole = copied("expected")
    status, printed = run_in_child(train_until_killed, whole, None, 0.0, "keep")
    assert status == 0, printed
    for kill_at in range(0, int(printed.split()[-1]), every):
        config = copied(f"killed-{kill_at}")
        status, printed = run_in_child(train_until_killed, config, kill_at, 0.0, "keep")
        assert status == -signal.SIGKILL, printed
        status, printed = run_in_child(train_until_killed, config, None, 0.0, "keep")
        assert status == 0, printed
        assert outcome(config.out) == outcome(whole.out), kill_at
        assert changes(config) == changes(whole)


def test_plot_marks_extensions(config):
    config.out.mkdir()
    (config.out / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(1, 9)))
    plain = plot_losses(config.out).read_bytes()
    history = (Change(4, {"steps": [4, 8], "data.train": [["/a/one.txt"], ["/b/two.txt"]]}),)
    assert str(history[0]) == "steps 4 → 8, data.train one.txt → two.txt"
    assert plot_losses(config.out, history).read_bytes() != plain
