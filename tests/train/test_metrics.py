import json

import pytest

from tilewright.train import train
from tilewright.train.metrics import MetricLog, read_metrics
from tilewright.train.plot import plot_losses


def test_rows_are_written_immediately(tmp_path):
    with MetricLog(tmp_path) as log:
        log.log(1, loss=2.5, mfu=None)
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5, "mfu": None}]


def test_rows_are_flushed_before_their_checkpoint(changed, surviving):
    train(changed(log_every=2, checkpoint_every=3))
    logged = {"00000000": 0, "00000003": 3, "00000006": 6, "00000009": 9, "00000012": 12}
    assert surviving.keys() == {f"step-{step}" for step in logged}
    for step, last in logged.items():
        # Rows logged while the checkpoint was written may be flushed too.
        expected = [row["step"] for row in read_metrics(changed().out) if row["step"] <= last]
        assert surviving[f"step-{step}"][: len(expected)] == expected


def test_resumed_log_drops_rows_after_the_checkpoint(tmp_path):
    with MetricLog(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut by a crash
    with MetricLog(tmp_path, resume_step=3) as log:
        log.log(4, loss=40.0)
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


DAMAGED = {
    "cut": b'{"step": 2, "lo',
    "no JSON": b"?",
    "no UTF-8": b'{"step": 2, "loss": \xff}',
    "UTF-16": '{"step": 2}'.encode("utf-16"),
    "zeros": bytes(4096),
    "empty": b"",
    "a number": b"3",
    "no step": b'{"loss": 2.0}',
    "a step that is none": b'{"step": true, "loss": 2.0}',
    "a step below 0": b'{"step": -1, "loss": 2.0}',
    "a step of too many digits": b'{"step": ' + b"9" * 5000 + b"}",
    "a text for a number": b'{"step": 2, "loss": "low"}',
    "deep": b"[" * 100_000,
    "long": b'{"step": 2, "loss": ' + b"1" * 3_000_000,
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_damaged_line_is_moved_and_later_rows_are_kept(tmp_path, line, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n' + line + b'\n{"step": 3, "loss": 3.0}\n{"step": 4}\n')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3, 4]
    plot_losses(tmp_path)
    with MetricLog(tmp_path, resume_step=3) as log:
        log.log(4, loss=4.0)
    assert "moved 1 damaged or duplicate lines to" in capsys.readouterr().err
    assert (tmp_path / "metrics.dropped.jsonl").read_bytes() == line + b"\n"
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 3.0, 4.0]


def test_later_row_of_a_step_wins(tmp_path):
    first, *_ = lines = [b'{"step": 1, "loss": 1.0}\n', b'{"step": 2, "loss": 2.0}\n', b'{"step": 1, "loss": 3.0}\n']
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    MetricLog(tmp_path, resume_step=2).__exit__()
    assert (tmp_path / "metrics.dropped.jsonl").read_bytes() == first


def test_non_finite_number_is_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "lr": -Infinity, "grad_norm": 1e999, "mfu": 0.5}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "lr": None, "grad_norm": None, "mfu": 0.5}]


def test_note_is_written_once_and_survives_a_resume(tmp_path):
    for resumed, notes in {5: [(5, "other data")], 3: [(3, "other data")]}.items():
        with MetricLog(tmp_path, resume_step=resumed) as log:
            log.note(resumed, "other data")
            for step in range(resumed + 1, 9):
                log.log(step, loss=1.0)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [(line["step"], line["note"]) for line in lines if "note" in line] == notes
    assert [row["step"] for row in read_metrics(tmp_path)] == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("num_rows", [0, 1, 30])
def test_plot_shows_losses(tmp_path, num_rows):
    with MetricLog(tmp_path) as log:
        for step in range(1, num_rows + 1):
            log.log(step, loss=1 / step, **({"valid_loss": 2 / step} if step % 10 == 0 else {}))
    assert plot_losses(tmp_path).read_bytes().startswith(b"\x89PNG")
