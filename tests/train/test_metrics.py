import sys
import types

import pytest

from tilewright.errors import UserError
from tilewright.train import train
from tilewright.train.metrics import MetricLog, read_metrics
from tilewright.train.plot import plot_losses


def test_rows_are_on_disk_at_once(tmp_path):
    with MetricLog(tmp_path) as log:
        log.log(1, loss=2.5, mfu=None)
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5, "mfu": None}]


def test_rows_outlive_a_power_cut_as_their_checkpoint_does(changed, surviving):
    train(changed(log_every=2, checkpoint_every=3))
    logged = {"00000000": 0, "00000003": 3, "00000006": 6, "00000009": 9, "00000012": 12}
    assert surviving.keys() == {f"step-{step}" for step in logged}
    for step, last in logged.items():
        # Those that were logged while it was written may have come with it.
        expected = [row["step"] for row in read_metrics(changed().out) if row["step"] <= last]
        assert surviving[f"step-{step}"][: len(expected)] == expected


def test_a_resumed_log_forgets_what_will_be_written_again(tmp_path):
    with MetricLog(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut by a crash
    with MetricLog(tmp_path, resume_step=3) as log:
        log.log(4, loss=40.0)
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_tensorboard_receives_every_scalar(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricLog(tmp_path, "tensorboard") as log:
        log.log(1, loss=2.5, mfu=None)
        log.log(2, loss=1.5, valid_loss=3.0)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    assert [event.step for event in events.Scalars("valid_loss")] == [2]


def test_wandb_receives_every_row(tmp_path, monkeypatch):
    calls = []
    session = types.SimpleNamespace(log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append("finish"))
    fake = types.SimpleNamespace(__spec__="here", init=lambda **options: calls.append(options["config"]) or session)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with MetricLog(tmp_path, "wandb", {"steps": 9}) as log:
        log.log(1, loss=2.5)
    assert calls == [{"steps": 9}, (1, {"loss": 2.5}), "finish"]


def test_a_missing_tracker_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'tilewright\[wandb\]'"):
        MetricLog(tmp_path, "wandb")


@pytest.mark.parametrize("num_rows", [0, 1, 30])
def test_losses_are_drawn(tmp_path, num_rows):
    with MetricLog(tmp_path) as log:
        for step in range(1, num_rows + 1):
            log.log(step, loss=1 / step, **({"valid_loss": 2 / step} if step % 10 == 0 else {}))
    assert plot_losses(tmp_path).read_bytes().startswith(b"\x89PNG")
