import struct
import sys
import time
import types

import pytest

from tilewright.errors import UserError
from tilewright.train.metrics import MetricLog


def log_steps(run, tracker, resume_step, last_step):
    with MetricLog(run, tracker, {"steps": 9}, resume_step) as log:
        for step in range(resume_step + 1, last_step + 1):
            log.log(step, loss=float(step), mfu=None)
        log.text(last_step, "sample", "Once\n<b>upon")


def test_tensorboard_receives_all_numbers_and_texts(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps(tmp_path, "tensorboard", 0, 4)
    log_steps(tmp_path, "tensorboard", 2, 5)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(step, step) for step in range(1, 6)]
    # TensorBoard shows both copies of a repeated text.
    event = events.Tensors("sample/text_summary")[-1]
    assert (event.step, event.tensor_proto.string_val[0].decode()) == (5, "    Once\n    <b>upon\n")


class FakeWandb(types.ModuleType):
    """Records its calls; `refused` are the options of `init` that fail."""

    class Error(Exception):
        pass

    def __init__(self, refused=()):
        super().__init__("wandb")
        self.__spec__, self.calls, self.refused, self.Html = "here", [], refused, str

    def init(self, *, project, name, dir, config, **options):
        assert config == {"steps": 9}
        self.calls.append(options)
        if options.keys() & set(self.refused):
            raise self.Error("not on this server")
        return types.SimpleNamespace(
            log=lambda row, step: self.calls.append((step, row)), finish=lambda: self.calls.append("finish")
        )


@pytest.fixture
def wandb(monkeypatch):
    def install(**options):
        fake = FakeWandb(**options)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


def test_wandb_resumes_and_rewinds_the_run(tmp_path, wandb):
    fake = wandb()
    log_steps(tmp_path, "wandb", 0, 2)
    log_steps(tmp_path, "wandb", 2, 3)
    log_steps(tmp_path, "wandb", 1, 2)
    id = (tmp_path / "wandb-id.txt").read_text().strip()

    def logged(step):
        return (step, {"loss": float(step)})

    def ends(step):
        return [(step, {"sample": "<pre>Once\n&lt;b&gt;upon</pre>"}), "finish"]

    assert fake.calls == [
        *[{"id": id, "resume": "allow"}, logged(1), logged(2), *ends(2)],
        *[{"id": id, "resume": "allow"}, logged(3), *ends(3)],
        *[{"resume_from": f"{id}?_step=1"}, logged(2), *ends(2)],
    ]


def test_wandb_resumes_if_it_cannot_rewind(tmp_path, wandb, capsys):
    fake = wandb(refused=["resume_from"])
    log_steps(tmp_path, "wandb", 0, 2)
    log_steps(tmp_path, "wandb", 1, 3)
    id = (tmp_path / "wandb-id.txt").read_text().strip()
    assert [call for call in fake.calls if isinstance(call, dict)] == [
        {"id": id, "resume": "allow"}, {"resume_from": f"{id}?_step=1"}, {"id": id, "resume": "allow"}
    ]  # fmt: skip
    assert f"cannot rewind run {id} to step 1 and keeps the later steps: not on this server" in capsys.readouterr().err


def test_wandb_error_raises_and_keeps_the_metrics(tmp_path, wandb):
    log_steps(tmp_path, "none", 0, 3)
    wandb(refused=["id"])
    with pytest.raises(UserError, match=r"cannot start tracker wandb \(not on this server\): set WANDB_MODE=offline"):
        log_steps(tmp_path, "wandb", 1, 3)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def records(data):
    """Yield the records of a W&B file: a header of 7 bytes, then LevelDB's log format."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if (left := -place % 32768) < 7:
            place += left  # no header fits in the rest of a block
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="an extra of its own, large")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_steps(tmp_path, "wandb", 0, 3)
    # W&B names the folder of a run after the time in seconds.
    time.sleep(1.1)
    log_steps(tmp_path, "wandb", 2, 4)
    id = (tmp_path / "wandb-id.txt").read_text().strip()
    runs, losses = [], []
    for file in sorted(tmp_path.glob(f"wandb/offline-run-*/run-{id}.wandb")):
        for record in map(Record.FromString, records(file.read_bytes())):
            if record.HasField("run"):
                runs.append((record.run.run_id, record.run.branch_point.run, record.run.branch_point.value))
            values = {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}
            if "loss" in values:
                losses.append((int(values["_step"]), float(values["loss"])))
    assert dict.fromkeys(runs) == dict.fromkeys([(id, "", 0.0), (id, id, 2.0)])
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.0), (4, 4.0)]


def test_missing_tracker_names_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'tilewright\[wandb\]'"):
        MetricLog(tmp_path, "wandb")
