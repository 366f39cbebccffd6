"""Samples during training."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tilewright.errors import UserError
from tilewright.train import SampleConfig, load_text_model, train, write_texts
from tilewright.train.metrics import read_metrics
from tilewright.train.sample_log import FILE_NAME, SampleLog

SAMPLES = {"sample_every": 4, "sample_prompts": ("the cat", "on"), "sample_tokens": 5}


def samples(run):
    return [json.loads(line) for line in (run / FILE_NAME).read_text().splitlines()]


def losses(run):
    return [(row["loss"], row["grad_norm"], row.get("valid_loss")) for row in read_metrics(run)]


def test_samples_come_from_the_trained_model_and_do_not_change_the_run(changed, tmp_path, capsys):
    plain = train(changed(out=tmp_path / "plain", ema_decay=0.9, steps=6)).run
    run = train(changed(ema_decay=0.9, steps=6, **SAMPLES)).run
    assert losses(run) == losses(plain)
    assert not (plain / FILE_NAME).exists()
    written = samples(run)
    assert [(row["step"], row["prompt"]) for row in written] == [(4, "the cat"), (4, "on"), (6, "the cat"), (6, "on")]
    config = SampleConfig(SAMPLES["sample_prompts"], max_new_tokens=5, seed=0)
    assert [row["text"] for row in written[2:]] == [text.text for text in write_texts(load_text_model(run, "cpu"), config)]
    assert f"step 6, sample 2: on{written[3]['text']}" in capsys.readouterr().err


def test_resumed_run_writes_each_text_once(changed, tmp_path):
    whole = train(changed(out=tmp_path / "whole", **SAMPLES)).run
    broken = changed(keep_checkpoints=3, **SAMPLES)
    train(broken)
    train(broken, resume=broken.out / "checkpoints" / "step-00000004")
    assert samples(broken.out) == samples(whole)
    assert [row["step"] for row in samples(whole)] == [4, 4, 8, 8, 12, 12]


def test_damaged_lines_are_kept_and_a_truncated_line_is_dropped(tmp_path):
    good, later = (json.dumps({"step": step, "prompt": "a", "text": "b"}) for step in (4, 8))
    (tmp_path / FILE_NAME).write_text(f"{good}\nnothing\n3\n{later}\n{good[:9]}")
    SampleLog(tmp_path, 4).write(5, "a", "c")
    assert (tmp_path / FILE_NAME).read_text() == f'{good}\nnothing\n3\n{{"step": 5, "prompt": "a", "text": "c"}}\n'


def test_texts_are_sent_to_the_tracker(changed):
    run = train(changed(steps=4, tracker="tensorboard", sample_every=4, sample_prompts=("the",))).run
    events = EventAccumulator(str(run)).Reload()
    (tag,) = events.Tags()["tensors"]
    assert tag.startswith("sample/1")
    (event,) = events.Tensors(tag)
    assert event.step == 4
    assert event.tensor_proto.string_val[0].decode().strip().startswith("the")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ((), "there is no prompt"),
        (("the cat " * 20,), r"sample_prompts contains the cat .*exceed the context of 16"),
        (("\ud800",), "is not valid Unicode"),
    ],
    ids=["none", "too long", "half a character"],
)
def test_invalid_prompts_raise_before_a_folder_is_created(changed, prompts, message):
    config = changed(sample_every=4, sample_prompts=prompts)
    with pytest.raises(UserError, match=message):
        train(config)
    assert not config.out.exists()
