import io
import json
import signal

import pytest
from rich.console import Console

from tilewright.errors import UserError
from tilewright.train import SampleConfig, load_run, load_text_model, write_texts
from tilewright.train.demo import DemoConfig, run_demo
from tilewright.train.trainer import Trainer

TINY = {"megabytes": 0.2, "vocab_size": 400, "steps": 3}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    console = Console(file=io.StringIO(), width=120)
    return run_demo(DemoConfig(out=out, **TINY), console), console.file.getvalue()  # pyright: ignore


def test_demo_writes_a_run_and_its_data(demo):
    summary, _ = demo
    run = summary.result.run
    assert {path.name for path in (run / "data").iterdir()} == {
        "train.txt",
        "train.tokens",
        "valid.txt",
        "valid.tokens",
        "tokenizer.json",
    }
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "summary.json").read_text())["result"]["valid_loss"] == summary.result.valid_loss


def test_demo_prints_its_measurements(demo):
    summary, shown = demo
    assert summary.sample.startswith("Once upon a time")
    assert summary.bytes_per_token > 1.5
    for expected in (
        "bytes/token",
        f"{summary.result.num_parameters:,}",
        "tokens/s",
        f"{summary.result.valid_loss:.3f} nats/token",
        "n/a: the peak of",
        "loss.png",
        "Next: tilewright generate",
    ):
        assert expected in shown, expected


def test_demo_is_deterministic(demo, tmp_path):
    again = run_demo(DemoConfig(out=tmp_path / "again", **TINY), Console(file=io.StringIO()))
    assert again.sample == demo[0].sample
    assert again.result.valid_loss == demo[0].result.valid_loss


def test_interrupted_demo_prints_how_to_resume(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), width=120)
    train_step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: (signal.raise_signal(signal.SIGINT), train_step(self))[1])
    with pytest.raises(KeyboardInterrupt):
        run_demo(DemoConfig(out=tmp_path / "run", **TINY), console)
    shown = console.file.getvalue()  # pyright: ignore
    assert f"stopped by SIGINT after step 1; resume with\ntilewright train stories-cpu --out {tmp_path}/run" in shown
    assert not (tmp_path / "run" / "summary.json").exists()


def test_existing_folder_raises(demo):
    with pytest.raises(UserError, match="already contains a run"):
        run_demo(DemoConfig(out=demo[0].result.run, **TINY), Console(file=io.StringIO()))


def test_default_folder_does_not_exist_yet(demo, tmp_path, monkeypatch):
    from tilewright.train.demo import _free_folder

    monkeypatch.chdir(tmp_path)
    assert str(_free_folder()) == "runs/demo"
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert str(_free_folder()) == "runs/demo-2"


def test_run_generates_text(demo):
    text_model = load_text_model(demo[0].result.run, "cpu")
    config = SampleConfig(("One day",), num_samples=2, max_new_tokens=5, seed=1)
    texts = write_texts(text_model, config)
    assert [text.prompt for text in texts] == ["One day"] * 2
    assert texts == write_texts(text_model, config)
    assert write_texts(text_model, SampleConfig(("",), max_new_tokens=3, seed=1))[0].num_tokens == 3
    with pytest.raises(UserError, match="exceed the context of 256"):
        write_texts(text_model, SampleConfig(("One day " * 100,)))


def test_folder_without_a_run_raises(tmp_path):
    with pytest.raises(UserError, match=r"expected the folder of a run"):
        load_run(tmp_path)
