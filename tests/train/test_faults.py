"""Clear errors and exact resume after damaged checkpoints, full or read-only disks, and changed data or settings."""

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shutil
import signal

import pytest
import torch

from faults import (
    FULL,
    command,
    command_in_a_folder_that_gets_read_only,
    command_on_a_full_disk,
    command_without_privileges,
    outcome,
    rows,
    run_in_child,
)
from tilewright.cli import main
from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer
from tilewright.train import OptimizerConfig, opening, train
from tilewright.train.checkpoint import writer as checkpoint_writer
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.checkpoint.writer import CheckpointWriter
from tilewright.train.data.datasets import open_data
from tilewright.train.export import export_run
from tilewright.train.guard import Guard
from tilewright.train.pretrained import load_text_model


@pytest.fixture
def own_data(config, corpus, tmp_path):
    """The run with a private copy of its data, encoded, which a test may damage."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.txt", "valid.txt", "tokenizer.json"):
        shutil.copyfile(corpus / name, folder / name)
    data = dataclasses.replace(
        config.data, train=(folder / "train.txt",), valid=folder / "valid.txt", tokenizer=folder / "tokenizer.json"
    )
    open_data(data, Tokenizer.load(data.tokenizer))
    return dataclasses.replace(config, data=data)


def whole(config):
    config = dataclasses.replace(config, out=config.out.with_name("whole"))
    train(config)
    return outcome(config.out)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "guard.safetensors", "state.json", "manifest.json")
DAMAGES = {
    "truncated": (truncate, r"was truncated or changed|is damaged|cannot read"),
    "flipped": (lambda path: flip_a_byte(path) if path.stat().st_size > 100 else path.write_bytes(b"?" * path.stat().st_size),
                r"is damaged|cannot read|not the manifest|of format|was truncated"),
    "missing": (lambda path: path.unlink(), r"is missing|has no manifest.json"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished():
    return {}


@pytest.fixture
def run(config, finished, tmp_path_factory):
    """A copy of a finished run with three checkpoints, and its outcome."""
    if not finished:
        made = dataclasses.replace(config, out=tmp_path_factory.mktemp("finished") / "run", keep_checkpoints=3)
        train(made)
        finished.update(folder=made.out, outcome=outcome(made.out))
    shutil.copytree(finished["folder"], config.out)
    return dataclasses.replace(config, keep_checkpoints=3), finished["outcome"]


# The tests of checkpoint layout detect every damage of every file.
@pytest.mark.parametrize(("file", "damage"), [*zip(FILES, itertools.cycle(DAMAGES)), ("manifest.json", "flipped")])
def test_resume_skips_damaged_checkpoints(run, file, damage, capsys):
    config, expected = run
    harm, reason = DAMAGES[damage]
    first, middle, last = list_checkpoints(config.out)[-3:]
    for folder in (middle, last):
        harm(folder / file)
    with pytest.raises(UserError, match=reason) as error:
        train(config, resume=last)
    assert str(last / file) in str(error.value) or str(last) in str(error.value)
    assert list_checkpoints(config.out)[-3:] == [first, middle, last]
    train(config, resume="auto")
    printed = capsys.readouterr().err
    for folder in (middle, last):
        assert re.search(rf"skipped {folder.name}: .*{folder}", printed)
        assert f"renamed {folder.name} to set-aside-{folder.name}: the run resumes from {first.name}" in printed
    assert outcome(config.out) == expected


def test_resume_without_a_valid_checkpoint_changes_nothing(run):
    config, _ = run
    for folder in list_checkpoints(config.out):
        truncate(folder / "model.safetensors")
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"has no valid checkpoint among 3, so the run cannot be resumed"):
        train(config, resume="auto")
    assert before == {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}


def test_resume_without_config_json_does_not_start_over(run):
    config, _ = run
    (config.out / "config.json").unlink()
    with pytest.raises(UserError, match=r"contains tokenizer.json, which a run would overwrite"):
        train(config, resume="auto")
    assert len(list_checkpoints(config.out)) == 3


def test_error_names_a_damaged_config_json(run):
    config, _ = run
    truncate(config.out / "config.json")
    (config.out / "config.json").write_text((config.out / "config.json").read_text()[:-5])
    with pytest.raises(UserError, match=r"config.json is not a run's configuration"):
        train(config, resume="auto")


def test_resume_repairs_a_partial_line_of_metrics(run):
    config, expected = run
    path = config.out / "metrics.jsonl"
    for folder in list_checkpoints(config.out)[-1:]:
        shutil.rmtree(folder)
    path.write_text(path.read_text()[:-20])
    train(config, resume="auto")
    assert outcome(config.out) == expected


@pytest.mark.parametrize("when", FULL)
def test_full_disk_raises_an_error_and_the_run_resumes_exactly(config, run, when):
    _, expected = run
    config = dataclasses.replace(config, out=config.out.with_name("full"))
    status, printed = run_in_child(command_on_a_full_disk, config, when, "--resume", "auto")
    assert status in (1, 2), printed
    assert "Traceback" not in printed
    message = printed.splitlines()[-1]
    assert message.startswith("tilewright: error:")
    assert "File too large" in message
    assert str(config.out) in message
    status, printed = run_in_child(command, config, "--resume", "auto")
    assert status == 0, printed
    assert outcome(config.out) == expected


@pytest.fixture
def read_only():
    """Return a function that makes a folder and its subfolders read-only until the end of the test."""
    locked = []

    def lock(folder):
        locked.extend([folder, *(path for path in folder.rglob("*") if path.is_dir())])
        for path in locked:
            path.chmod(0o555)

    def unlock():
        for path in locked:
            path.chmod(0o755)
        locked.clear()

    lock.undo = unlock
    yield lock
    unlock()


def test_read_only_folder_raises_an_error_and_the_run_resumes_exactly(run, read_only):
    config, expected = run
    shutil.rmtree(list_checkpoints(config.out)[-1])
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    read_only(config.out)
    status, printed = run_in_child(command_without_privileges, config, "--resume", "auto")
    assert status in (1, 2), printed
    message = printed.splitlines()[-1]
    assert message.startswith("tilewright: error:")
    assert "Permission denied" in message
    assert str(config.out) in message
    assert before == {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    read_only.undo()
    status, printed = run_in_child(command, config, "--resume", "auto")
    assert status == 0, printed
    assert outcome(config.out) == expected


def test_run_ends_at_the_first_checkpoint_after_its_folder_becomes_read_only(config, run):
    _, expected = run
    config = dataclasses.replace(config, out=config.out.with_name("locked"))
    status, printed = run_in_child(command_in_a_folder_that_gets_read_only, config)
    assert status in (1, 2), printed
    message = printed.splitlines()[-1]
    assert f"cannot save the checkpoint of step 8 in {config.out / 'checkpoints'}: " in message
    assert "Permission denied" in message
    (config.out / "checkpoints").chmod(0o755)
    assert [folder.name for folder in list_checkpoints(config.out)] == ["step-00000000", "step-00000004"]
    train(config, resume="auto")
    assert outcome(config.out) == expected


def test_error_for_a_new_run_in_a_read_only_folder(changed, tmp_path, read_only):
    (tmp_path / "locked").mkdir()
    read_only(tmp_path / "locked")
    status, printed = run_in_child(command_without_privileges, changed(out=tmp_path / "locked" / "run"))
    assert status in (1, 2), printed
    assert f"Permission denied: '{tmp_path / 'locked' / 'run'}'" in printed.splitlines()[-1]


def test_error_for_read_only_data_names_a_remedy(own_data, read_only):
    text = own_data.data.train[0]
    text.with_suffix(".tokens").unlink()
    read_only(text.parent)
    status, printed = run_in_child(command_without_privileges, own_data)
    assert status == 2, printed
    message = printed.splitlines()[-1]
    assert f"cannot write to {text.parent}: Permission denied; encode {text} with `tilewright tokenizer encode" in message
    read_only.undo()
    elsewhere = own_data.out.with_name("train.tokens")
    assert main(["tokenizer", "encode", str(text), "--out", str(elsewhere)]) == 0
    train(dataclasses.replace(own_data, data=dataclasses.replace(own_data.data, train=(elsewhere,))))


@pytest.mark.parametrize("keep", [1, 2])
def test_error_for_a_full_disk_lists_deletable_folders(tmp_path, monkeypatch, keep):
    (tmp_path / "checkpoints" / "set-aside-step-00000007").mkdir(parents=True)
    with pytest.raises(UserError) as error, CheckpointWriter(tmp_path, keep) as writer:
        for step in (1, 2):
            writer.save(step, {"model": {"a": torch.ones(2)}}, {})
            writer.wait()
        monkeypatch.setattr(checkpoint_writer, "write_tensors", fails_with(errno.ENOSPC))
        writer.save(3, {"model": {"a": torch.ones(2)}}, {})
    old = "" if keep == 1 else ", step-00000001"
    assert str(error.value).endswith(
        f"No space left on device; --resume auto continues from step-00000002; you can delete set-aside-step-00000007{old}"
    ), error.value
    assert len(list_checkpoints(tmp_path)) == keep


def fails_with(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_copied_run_resumes_in_its_new_folder(run, changed):
    config, expected = run
    moved = dataclasses.replace(config, out=config.out.with_name("copy"))
    shutil.copytree(config.out, moved.out)
    shutil.rmtree(config.out)
    with pytest.raises(UserError, match=rf"the run in {moved.out} has seed 0, not 1"):
        train(dataclasses.replace(moved, seed=1), resume="auto")
    shutil.rmtree(list_checkpoints(moved.out)[-1])
    train(moved, resume="auto")
    assert outcome(moved.out) == expected
    assert load_text_model(moved.out, "cpu").num_ids == 300
    gone = moved.out.with_name("gone.json")
    lost = dataclasses.replace(moved, data=dataclasses.replace(moved.data, tokenizer=gone))
    with pytest.raises(UserError, match=rf"{gone} does not exist: .* --data.tokenizer {moved.out}/tokenizer.json"):
        train(lost, resume="auto")
    lost = dataclasses.replace(moved, data=dataclasses.replace(moved.data, train=(gone.with_suffix(".txt"),)))
    with pytest.raises(UserError, match=rf"{gone.with_suffix('.txt')} does not exist: .* --data.train"):
        train(lost, resume="auto")
    train(changed(out=moved.out.with_name("tuned"), init=moved.out))


def at_step(monkeypatch, step, action):
    """Call `action` when the run reaches `step`."""
    judge = Guard.judge

    def wrapped(self, *arguments):
        if self.taken == step:
            action()
        return judge(self, *arguments)

    monkeypatch.setattr(Guard, "judge", wrapped)


def restorable(path):
    """Return a function that restores the contents and times of a file."""
    content, stat = path.read_bytes(), path.stat()

    def restore():
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return restore


TOKENS = {"training": "train.tokens", "validation": "valid.tokens"}
HARM = {
    "removed": (lambda path: path.unlink(), r"cannot read token file {path}: No such file or directory"),
    "truncated": (truncate, r"{path} has \d+ bytes: expected \d+ by its header; encode its text again"),
    "changed": (flip_a_byte, "{path} has changed: the hash of its ids differs from its header"),
}


@pytest.mark.parametrize(("harm", "file"), [*zip(HARM, itertools.cycle(TOKENS)), ("changed", "validation")])
def test_data_damaged_during_a_run_raises_an_error_and_the_run_resumes_exactly(own_data, monkeypatch, file, harm):
    expected = whole(own_data)
    path = own_data.data.valid.with_name(TOKENS[file])
    restore = restorable(path)
    do, message = HARM[harm]
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: do(path))
        with pytest.raises(UserError, match=message.replace("{path}", str(path))):
            train(own_data)
    # Up to three batches may have been read ahead.
    assert [row["step"] for row in rows(own_data.out)] == [*range(1, 10)][: len(rows(own_data.out))]
    assert int(list_checkpoints(own_data.out)[-1].name.removeprefix("step-")) in (4, 8)
    restore()
    train(own_data, resume="auto")
    assert outcome(own_data.out) == expected


def stopped_after(config, monkeypatch, step):
    with monkeypatch.context() as patch:
        at_step(patch, step - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = train(config)
    assert result.steps == step
    assert result.stopped_by == "SIGTERM"
    assert math.isnan(result.valid_loss)


@pytest.mark.parametrize("file", TOKENS)
def test_resume_rejects_changed_data(own_data, monkeypatch, file):
    expected = whole(own_data)
    stopped_after(own_data, monkeypatch, 5)
    path = own_data.data.valid.with_name(TOKENS[file])
    restore = restorable(path)
    flip_a_byte(path)
    with pytest.raises(UserError, match=rf"{path} has changed: the hash of its ids differs from its header"):
        train(own_data, resume="auto")
    restore()
    train(own_data, resume="auto")
    assert outcome(own_data.out) == expected


def flip_ids(path):
    content = bytearray(path.read_bytes())
    content[4096::2] = bytes(byte ^ 1 for byte in content[4096::2])
    path.write_bytes(content)


def test_new_run_rejects_damaged_training_ids_while_it_runs(own_data):
    path = own_data.data.train[0].with_suffix(".tokens")
    flip_ids(path)
    with pytest.raises(UserError, match=rf"{path} has changed: the hash of its ids differs from its header; encode its text"):
        train(own_data)
    assert list_checkpoints(own_data.out)


def test_new_run_rejects_damaged_validation_ids_before_it_begins(own_data):
    path = own_data.data.valid.with_suffix(".tokens")
    flip_ids(path)
    with pytest.raises(UserError, match=rf"{path} has changed: the hash of its ids differs from its header; encode its text"):
        train(own_data)
    assert not own_data.out.exists()


def notes_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["note"]) for line in lines if "note" in line]


@pytest.mark.parametrize("way", ["replaced", "named"])
def test_other_validation_data_need_accept_valid_and_are_noted(own_data, monkeypatch, way):
    stopped_after(own_data, monkeypatch, 5)
    known, other = own_data.data.valid, own_data.data.valid.with_name("other.txt")
    other.write_text(known.read_text()[::-1])
    if way == "replaced":
        other.replace(known)
        known.with_suffix(".tokens").unlink()
        changed = own_data
    else:
        changed = dataclasses.replace(own_data, data=dataclasses.replace(own_data.data, valid=other))
    tokens = changed.data.valid.with_suffix(".tokens")
    with pytest.raises(UserError, match=rf"{tokens} is not the validation data of the run: .*valid.tokens .* --accept-valid"):
        train(changed, resume="auto")
    assert notes_of(own_data.out) == []
    train(changed, resume="auto", accept_valid=True)
    assert notes_of(own_data.out) == [(5, f"validation losses after this step are of {tokens}")]
    # The record now lists the new data.
    train(changed, resume=list_checkpoints(own_data.out)[-2])
    assert notes_of(own_data.out) == [(5, f"validation losses after this step are of {tokens}")]
    assert [row["step"] for row in rows(own_data.out)] == [*range(1, 13)]


def test_record_of_an_earlier_version_accepts_any_validation_data(run, capsys):
    config, expected = run
    path = config.out / "data.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({name: record[name] for name in ("order", "files")}))
    shutil.rmtree(list_checkpoints(config.out)[-1])
    train(config, resume="auto")
    assert "the run has no record of its validation data" in capsys.readouterr().err
    assert outcome(config.out) == expected
    assert json.loads(path.read_text()) == record


def swap(path):
    known = Tokenizer.load(path)
    Tokenizer(known.vocab, known.merges[:-1], list(known.special_tokens)).save(path.with_name("swapped.json"))
    path.with_name("swapped.json").replace(path)


@pytest.mark.parametrize("harm", ["removed", "swapped", "damaged"])
def test_tokenizer_of_a_run_is_checked_and_restored(run, changed, harm, capsys):
    config, expected = run
    path = config.out / "tokenizer.json"
    whole = path.read_bytes()
    {"removed": lambda path: path.unlink(), "swapped": swap, "damaged": lambda path: os.truncate(path, 200)}[harm](path)
    message = {
        "removed": f"copy {config.data.tokenizer} there",
        "swapped": f"{path} is not the tokenizer that the run was trained with",
        "damaged": str(path),
    }[harm]
    for use in (
        lambda: load_text_model(config.out, "cpu"),
        lambda: export_run(config.out, "hf"),
        lambda: train(changed(out=config.out.with_name("tuned"), init=config.out)),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            use()
    shutil.rmtree(list_checkpoints(config.out)[-1])
    train(config, resume="auto")
    assert f"restored {path} from {config.data.tokenizer}" in capsys.readouterr().err
    assert path.read_bytes() == whole
    assert outcome(config.out) == expected


def test_missing_token_file_is_encoded_again(own_data, monkeypatch):
    expected = whole(own_data)
    stopped_after(own_data, monkeypatch, 5)
    own_data.data.train[0].with_suffix(".tokens").unlink()
    train(own_data, resume="auto")
    assert outcome(own_data.out) == expected


def test_resume_rejects_another_text_or_tokenizer(own_data, monkeypatch):
    expected = whole(own_data)
    stopped_after(own_data, monkeypatch, 5)
    text, tokenizer = own_data.data.train[0], own_data.data.tokenizer
    tokens = text.with_suffix(".tokens")
    restores = [restorable(path) for path in (text, tokenizer, tokens)]
    text.write_text(text.read_text() + "the cat sat.\n")
    with pytest.raises(UserError, match=r"train.tokens was encoded from another train.txt"):
        train(own_data, resume="auto")
    tokens.unlink()
    with pytest.raises(UserError, match=r"train.tokens is not the file that the run began with: it has another ids"):
        train(own_data, resume="auto")
    known = Tokenizer.load(tokenizer)
    tokenizer.unlink()
    with pytest.raises(UserError, match=r"tokenizer .*tokenizer.json does not exist"):
        train(own_data, resume="auto")
    Tokenizer(known.vocab, known.merges[:-1], list(known.special_tokens)).save(tokenizer)
    with pytest.raises(UserError, match=r"was encoded with another tokenizer"):
        train(own_data, resume="auto")
    tokenizer.unlink()
    tokens.unlink()
    for restore in restores:
        restore()
    train(own_data, resume="auto")
    assert outcome(own_data.out) == expected


def test_resume_rejects_fixed_settings_and_accepts_free_ones(run):
    config, expected = run
    shutil.rmtree(list_checkpoints(config.out)[-1])
    for changes, message in {
        "seed": ({"seed": 1}, "has seed 0, not 1: keep 0"),
        "steps": ({"steps": 13}, r"has steps 12, not 13: .* --extend RATE \(schedule cosine decays"),
        "batch_size": ({"batch_size": 8}, "has batch_size 4, not 8"),
        "precision": ({"precision": "bfloat16"}, "has precision auto, not bfloat16"),
        "ema_decay": ({"ema_decay": 0.9}, "has ema_decay None, not 0.9"),
        "model": ({"model": dataclasses.replace(config.model, d_ff=32)}, "has model.d_ff 24, not 32"),
        "optimizer": ({"optimizer": OptimizerConfig(lr=2e-2, warmup_steps=3)}, "has optimizer.lr 0.01, not 0.02"),
    }.values():
        with pytest.raises(UserError, match=message):
            train(dataclasses.replace(config, **changes), resume="auto")
    train(dataclasses.replace(config, log_every=3, checkpoint_every=5, max_skipped_steps=3), resume="auto")
    assert outcome(config.out)[1] == expected[1]


@pytest.mark.parametrize("moment", ["beginning", "in a step"])
def test_second_process_is_rejected_and_changes_nothing(config, run, monkeypatch, moment):
    _, expected = run
    config = dataclasses.replace(config, out=config.out.with_name("twice"))
    second = []

    def start_another():
        second.append(run_in_child(command, config, "--resume", "auto"))

    if moment == "beginning":
        begin = opening.begin_run
        monkeypatch.setattr(opening, "begin_run", lambda config: (start_another(), begin(config)))
    else:
        at_step(monkeypatch, 5, start_another)
    train(config)
    ((status, printed),) = second
    assert status == 2
    assert "another process saves checkpoints there" in printed
    assert outcome(config.out) == expected
