import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tilewright.errors import UserError
from tilewright.kernels import use_backend
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.train import OptimizerConfig, load_run, loop, train
from tilewright.train.checkpoint import list_checkpoints
from tilewright.train.config import load_config
from tilewright.train.data import open_dataset
from tilewright.train.loop import Trainer, resolve_device, resolve_dtype
from tilewright.train.metrics import read_metrics

# The rest of a row is time.
EXACT = ("step", "loss", "grad_norm", "lr", "valid_loss")


def rows(run):
    return [{name: row[name] for name in EXACT if name in row} for row in read_metrics(run)]


def weights(run):
    return load_file(list_checkpoints(run)[-1] / "model.safetensors")


def test_a_run_leaves_everything_that_a_person_wants(config):
    result = train(config)
    assert sorted(path.name for path in config.out.iterdir()) == [
        "checkpoints",
        "config.json",
        "data.json",
        "loss.png",
        "metrics.jsonl",
        "tokenizer.json",
    ]
    assert load_config(config.out / "config.json") == config
    assert [folder.name for folder in list_checkpoints(config.out)] == ["step-00000008", "step-00000012"]
    model, _ = load_run(config.out, "cpu")
    assert all(torch.equal(tensor, weights(config.out)[name]) for name, tensor in model.state_dict().items())
    logged = read_metrics(config.out)
    assert [row["step"] for row in logged] == list(range(1, 13))
    assert [row["step"] for row in logged if "valid_loss" in row] == [4, 8, 12]
    assert result.steps == 12
    assert result.valid_loss == logged[-1]["valid_loss"]
    assert result.mfu is None
    assert result.tokens_per_second > 0
    assert result.num_parameters == sum(tensor.numel() for tensor in weights(config.out).values())


def test_the_loss_falls(changed):
    result = train(changed(steps=60, batch_size=16))
    logged = read_metrics(result.run)
    assert logged[0]["loss"] == pytest.approx(5.7, abs=0.8)  # about ln 300: nothing is known yet
    assert result.valid_loss < 3.6


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_resumed_run_is_bit_equal(changed, accumulate, tmp_path):
    micro = 2 if accumulate else None
    whole = changed(out=tmp_path / "whole", micro_batch_size=micro)
    train(whole)
    broken = changed(out=tmp_path / "broken", micro_batch_size=micro)
    train(broken)
    for folder in list_checkpoints(broken.out)[1:]:
        shutil.rmtree(folder)  # as if it had been killed before step 12
    train(broken, resume=True)
    assert rows(broken.out) == rows(whole.out)
    for name, tensor in weights(whole.out).items():
        assert torch.equal(tensor, weights(broken.out)[name]), name
    assert rows(whole.out)[-1]["step"] == 12


def test_a_run_killed_between_checkpoints_resumes_bit_equal(changed, tmp_path, monkeypatch):
    whole, broken = changed(out=tmp_path / "whole"), changed(out=tmp_path / "broken")
    train(whole)
    step = Trainer.train_step

    def killed(self):
        if self.step == 10:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    monkeypatch.undo()
    assert read_metrics(broken.out)[-1]["step"] == 10
    train(broken, resume=True)
    assert rows(broken.out) == rows(whole.out)
    assert all(torch.equal(tensor, weights(broken.out)[name]) for name, tensor in weights(whole.out).items())


def test_resuming_a_finished_run_changes_nothing(config):
    first = train(config)
    before = rows(config.out), weights(config.out)
    again = train(config, resume=True)
    assert again.valid_loss == first.valid_loss
    assert rows(config.out) == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in weights(config.out).items())


def test_accumulation_changes_only_rounding(changed, tmp_path):
    results = [
        train(changed(out=tmp_path / f"micro-{micro}", batch_size=8, micro_batch_size=micro)).valid_loss for micro in (8, 4, 1)
    ]
    assert results == pytest.approx([results[0]] * 3, rel=1e-5)


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(changed, tmp_path):
    eager, compiled = (train(changed(out=tmp_path / str(c), steps=4, compile=c)) for c in (False, True))
    assert compiled.valid_loss == pytest.approx(eager.valid_loss, rel=1e-4)
    assert weights(compiled.run).keys() == weights(eager.run).keys()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
def test_a_run_on_the_kernels_learns_the_same(changed, tmp_path, device):
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            results.append(train(changed(out=tmp_path / backend, steps=6, device=device.type, dtype="float32", compile=False)))
    assert results[0].valid_loss == pytest.approx(results[1].valid_loss, rel=1e-4)


def test_bfloat16_trains_float32_weights(changed):
    result = train(changed(dtype="bfloat16"))
    assert result.valid_loss < 5.2
    assert all(tensor.dtype == torch.float32 for tensor in weights(result.run).values())


def test_one_step_is_adamw_with_clipping(config):
    data = open_dataset(config.data.train, loop.Tokenizer.load(config.data.tokenizer))
    trainer = Trainer(config, data, data)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    metrics = trainer.train_step()
    assert metrics["lr"] == pytest.approx(1e-2 / 3)
    # In its first step Adam moves each element by the learning rate, whatever the size of its gradient.
    for name, p in trainer.model.named_parameters():
        decay = 0.1 * float(metrics["lr"]) * before[name] if p.dim() > 1 else 0
        assert (p - before[name] + decay).abs().max() <= 1.001 * float(metrics["lr"]), name
    assert (trainer.model.ln_final.weight - 1).abs().min() > 0


def test_gradients_are_clipped_to_the_norm(config, monkeypatch):
    data = open_dataset(config.data.train, loop.Tokenizer.load(config.data.tokenizer))
    trainer = Trainer(dataclasses.replace(config, optimizer=OptimizerConfig(max_grad_norm=0.01, warmup_steps=1)), data, data)
    used = []
    parameters = list(trainer.model.parameters())
    monkeypatch.setattr(
        trainer.optimizer, "step", lambda: used.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
    )
    metrics = trainer.train_step()
    assert float(metrics["grad_norm"]) > 0.1
    assert used == [pytest.approx(0.01, rel=1e-3)]


def test_validation_is_the_mean_over_its_tokens(changed):
    config = changed(eval_sequences=10)  # batches of 4, 4 and 2
    data = open_dataset(config.data.valid, loop.Tokenizer.load(config.data.tokenizer))
    trainer = Trainer(config, data, data)
    starts = np.linspace(0, len(data) - 17, 10).astype(np.int64)
    windows = torch.from_numpy(data.windows(starts, 17))
    logits = trainer.model(windows[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert trainer.validate() == pytest.approx(expected.item(), rel=1e-5)


def test_an_update_that_destroys_the_weights_is_not_saved(changed, monkeypatch):
    config = changed(keep_checkpoints=1)
    step = Trainer.train_step

    def destroying(self):
        metrics = step(self)
        if self.step == 8:
            with torch.no_grad():
                self.model.ln_final.weight.fill_(float("nan"))
        return metrics

    monkeypatch.setattr(Trainer, "train_step", destroying)
    with pytest.raises(UserError, match=r"valid_loss is nan: start a new run with a lower --optimizer.lr, below 0.01"):
        train(config)
    assert [folder.name for folder in list_checkpoints(config.out)] == ["step-00000004"]


def test_a_run_interrupted_before_its_first_checkpoint_goes_on(changed, tmp_path, monkeypatch):
    whole, broken = changed(out=tmp_path / "whole"), changed(out=tmp_path / "broken")
    train(whole)
    monkeypatch.setattr(Trainer, "train_step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    monkeypatch.undo()
    train(broken, resume=True)
    assert rows(broken.out) == rows(whole.out)


@pytest.mark.parametrize("name", ["tokenizer.json", "metrics.jsonl", "loss.png", "checkpoints"])
def test_nothing_of_anybody_elses_is_overwritten(config, name):
    config.out.mkdir()
    (config.out / name).write_text("mine")
    with pytest.raises(UserError, match=rf"holds a {name} that a run would overwrite"):
        train(config)
    assert (config.out / name).read_text() == "mine"
    assert len(list(config.out.iterdir())) == 1


def test_a_file_is_no_folder_for_a_run(changed, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file: name a folder with --out"):
        train(changed(out=tmp_path / "file"))


def test_a_missing_tracker_is_found_before_a_folder_is_made(changed, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = changed(tracker="wandb")
    with pytest.raises(UserError, match="tracker wandb is not installed"):
        train(config)
    assert not config.out.exists()


def test_a_folder_that_holds_a_run_is_left_alone(config):
    train(config)
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"holds a run already: go on with --resume, or name another folder with --out"):
        train(config)
    assert before == {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}


def test_resuming_refuses_what_is_not_the_same_run(config, changed, corpus, tmp_path):
    with pytest.raises(UserError, match=r"config.json does not exist: is the folder that of a run\?"):
        train(config, resume=True)
    train(config)
    with pytest.raises(UserError, match="has seed 0, not 3"):
        train(changed(seed=3), resume=True)
    other = tmp_path / "other.txt"
    other.write_text((corpus / "valid.txt").read_text())
    with pytest.raises(UserError, match=r"other.tokens is not the data that the run"):
        train(changed(data=dataclasses.replace(config.data, train=other)), resume=True)
    shutil.rmtree(config.out / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint: remove the folder"):
        train(config, resume=True)


def test_wrong_files_are_named_before_a_folder_is_made(config, changed, tmp_path):
    missing = tmp_path / "none"
    for field, message in {
        "tokenizer": r"tokenizer .*none does not exist: make one with `tilewright tokenizer train`",
        "train": r"text file .*none does not exist: make a corpus with `tilewright corpus`",
    }.items():
        with pytest.raises(UserError, match=message):
            train(changed(data=dataclasses.replace(config.data, **{field: missing})))
    with pytest.raises(UserError, match=r"vocabulary of 300 tokens, the model one of 299"):
        train(changed(model=dataclasses.replace(config.model, vocab_size=299)))
    with pytest.raises(UserError, match="fewer than one sequence"):
        train(changed(model=dataclasses.replace(config.model, context_length=10_000)))
    assert not config.out.exists()


def test_a_loss_that_is_not_finite_stops_the_run(changed, monkeypatch):
    config = changed()
    monkeypatch.setattr(
        Trainer, "train_step", lambda self: setattr(self, "step", 5) or {"loss": float("nan"), "grad_norm": 0, "lr": 0}
    )
    with pytest.raises(UserError, match=r"loss is nan: start a new run with a lower --optimizer.lr"):
        train(config)
    assert [folder.name for folder in list_checkpoints(config.out)] == ["step-00000000"]


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    with pytest.raises(UserError, match="'cuda' is not there"):
        resolve_device("cuda")
    for name in ("tpu9000", "meta", "mps"):
        with pytest.raises(UserError, match=f"'{name}' is unknown"):
            resolve_device(name)


@pytest.mark.gpu
def test_a_gpu_run_learns_as_the_cpu_does(changed, tmp_path):
    eager = train(changed(device="cpu", out=tmp_path / "cpu"))
    result = train(changed(device="cuda"))
    assert result.valid_loss == pytest.approx(eager.valid_loss, rel=0.02)
