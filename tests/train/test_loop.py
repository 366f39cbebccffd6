import dataclasses
import io
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from faults import command, run_in_child
from tilewright.errors import UserError
from tilewright.kernels import use_backend
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.model import ModelConfig
from tilewright.tokenizer import Tokenizer
from tilewright.train import OptimizerConfig, load_run, opening, train
from tilewright.train.callbacks.log import ProgressBar
from tilewright.train.callbacks.profiler import Profiler
from tilewright.train.checkpoint.layout import list_checkpoints
from tilewright.train.config import load_config
from tilewright.train.metrics import read_metrics
from tilewright.train.trainer import Trainer

# The other metrics are timings.
EXACT = ("step", "loss", "grad_norm", "lr", "valid_loss")


def rows(run):
    return [{name: row[name] for name in EXACT if name in row} for row in read_metrics(run)]


def weights(run):
    return load_file(list_checkpoints(run)[-1] / "model.safetensors")


def test_run_writes_its_files(config):
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
    names = [folder.name for folder in list_checkpoints(config.out)]
    assert names[-2:] == ["step-00000008", "step-00000012"]
    model, _ = load_run(config.out, "cpu")
    assert all(torch.equal(tensor, weights(config.out)[name]) for name, tensor in model.state_dict().items())
    logged = read_metrics(config.out)
    assert [row["step"] for row in logged] == list(range(1, 13))
    assert [row["step"] for row in logged if "valid_loss" in row] == [4, 8, 12]
    assert result.steps == 12
    assert result.valid_loss == logged[-1]["valid_loss"]
    assert result.mfu is None
    assert result.tokens_per_second > 0
    # Checkpoints contain the vocabulary padded from 300 to 384 tokens.
    padding = 2 * 84 * 16
    assert result.num_parameters == sum(tensor.numel() for tensor in weights(config.out).values()) - padding
    assert result.first_step_seconds > 0
    assert (result.skipped_steps, result.stopped_by) == (0, None)


def test_loss_decreases(changed):
    result = train(changed(steps=60, batch_size=16))
    logged = read_metrics(result.run)
    assert logged[0]["loss"] == pytest.approx(5.7, abs=0.8)  # about ln 300: nothing is known yet
    assert result.valid_loss < 3.6


@pytest.mark.parametrize("accumulate", [False, True])
def test_resumed_run_is_bit_identical(changed, accumulate, tmp_path):
    micro = 2 if accumulate else None
    whole = changed(out=tmp_path / "whole", micro_batch_size=micro)
    train(whole)
    broken = changed(out=tmp_path / "broken", micro_batch_size=micro)
    train(broken)
    for folder in list_checkpoints(broken.out)[1:]:
        shutil.rmtree(folder)  # as if it had been killed before step 12
    train(broken, resume="auto")
    assert rows(broken.out) == rows(whole.out)
    for name, tensor in weights(whole.out).items():
        assert torch.equal(tensor, weights(broken.out)[name]), name
    assert rows(whole.out)[-1]["step"] == 12


def test_resuming_a_finished_run_changes_nothing(config):
    first = train(config)
    before = rows(config.out), weights(config.out)
    again = train(config, resume="auto")
    assert again.valid_loss == first.valid_loss
    assert rows(config.out) == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in weights(config.out).items())


@pytest.mark.slow
def test_compiled_run_has_the_same_losses(changed, tmp_path):
    eager, compiled = (train(changed(out=tmp_path / str(c), steps=4, compile=c)) for c in (False, True))
    assert compiled.valid_loss == pytest.approx(eager.valid_loss, rel=1e-4)
    assert weights(compiled.run).keys() == weights(eager.run).keys()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
def test_run_with_kernels_has_the_same_losses(changed, tmp_path, device):
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            options = {"steps": 4, "batch_size": 2, "eval_sequences": 2, "device": device.type, "precision": "float32"}
            results.append(train(changed(out=tmp_path / backend, compile=False, **options)))
    assert results[0].valid_loss == pytest.approx(results[1].valid_loss, rel=1e-4)


def test_bfloat16_compute_keeps_float32_weights(changed):
    result = train(changed(precision="bfloat16"))
    assert result.valid_loss < 5.2
    assert all(tensor.dtype == torch.float32 for tensor in weights(result.run).values())


def test_update_to_non_finite_weights_is_not_saved(changed, monkeypatch):
    config = changed(keep_checkpoints=1)
    step = Trainer.train_step

    def destroying(self):
        metrics = step(self)
        if self.step == 8:
            with torch.no_grad():
                self.model.ln_final.weight.fill_(float("nan"))
        return metrics

    monkeypatch.setattr(Trainer, "train_step", destroying)
    with pytest.raises(UserError, match=r"valid_loss is nan: start a new run with --optimizer.lr below 0.01"):
        train(config)
    assert [folder.name for folder in list_checkpoints(config.out)] == ["step-00000004"]


def test_run_interrupted_before_its_first_checkpoint_resumes(changed, tmp_path, monkeypatch):
    whole, broken = changed(out=tmp_path / "whole"), changed(out=tmp_path / "broken")
    train(whole)
    monkeypatch.setattr(Trainer, "train_step", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(broken)
    monkeypatch.undo()
    train(broken, resume="auto")
    assert rows(broken.out) == rows(whole.out)


@pytest.mark.parametrize("name", ["tokenizer.json", "metrics.jsonl", "loss.png", "checkpoints"])
def test_foreign_files_are_not_overwritten(config, name):
    config.out.mkdir()
    (config.out / name).write_text("mine")
    with pytest.raises(UserError, match=rf"contains {name}, which a run would overwrite"):
        train(config)
    assert (config.out / name).read_text() == "mine"
    assert len(list(config.out.iterdir())) == 1


def test_out_that_is_a_file_raises(changed, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file: choose a folder with --out"):
        train(changed(out=tmp_path / "file"))


def test_missing_tracker_raises_before_a_folder_is_created(changed, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = changed(tracker="wandb")
    with pytest.raises(UserError, match="tracker wandb is not installed"):
        train(config)
    assert not config.out.exists()


def test_existing_run_is_not_changed(config):
    train(config)
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=r"already contains a run: resume it with --resume auto, or choose another folder with --out"
    ):
        train(config)
    assert before == {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}


def test_resume_rejects_changed_options(config, changed, corpus, tmp_path):
    with pytest.raises(UserError, match=r"config.json does not exist: expected the folder of a run"):
        train(config, resume=config.out / "checkpoints" / "step-00000004")
    train(config)
    with pytest.raises(UserError, match="has seed 0, not 3"):
        train(changed(seed=3), resume="auto")
    other = tmp_path / "other.txt"
    other.write_text((corpus / "valid.txt").read_text())
    with pytest.raises(UserError, match=r"other.tokens is not the file that the run began with: it has another ids"):
        train(changed(data=dataclasses.replace(config.data, train=(other,))), resume="auto")
    with pytest.raises(UserError, match=r"step-00000003 is not a checkpoint of the run in .*: .* contains .*step-00000012"):
        train(config, resume=config.out / "checkpoints" / "step-00000003")
    shutil.rmtree(config.out / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint, so the run cannot be resumed"):
        train(config, resume="auto")


def test_resume_auto_starts_a_run_in_an_empty_folder(config, capsys):
    result = train(config, resume="auto")
    assert result.steps == 12
    assert "contains no run to resume: starting a new one" in capsys.readouterr().err


def test_resume_from_a_named_checkpoint(changed, tmp_path, capsys):
    whole, broken = changed(out=tmp_path / "whole", keep_checkpoints=4), changed(out=tmp_path / "broken", keep_checkpoints=4)
    train(whole)
    train(broken)
    named = broken.out / "checkpoints" / "step-00000004"
    train(broken, resume=named)
    assert "renamed step-00000008 to set-aside-step-00000008" in capsys.readouterr().err
    assert rows(broken.out) == rows(whole.out)
    assert all(torch.equal(tensor, weights(broken.out)[name]) for name, tensor in weights(whole.out).items())


def test_run_killed_during_folder_creation_starts_again(changed, tmp_path, monkeypatch):
    config = changed(out=tmp_path / "broken")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(opening, "begin_run", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
        train(config)
    assert not (config.out / "config.json").exists()
    assert list_checkpoints(config.out)
    whole = changed(out=tmp_path / "whole")
    train(whole)
    train(config, resume="auto")
    assert rows(config.out) == rows(whole.out)


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.9, "z_loss": 1e-3},
        {"optimizer": OptimizerConfig(name="muon", lr=1e-2, warmup_steps=2, schedule="wsd")},
        {"activation_checkpointing": "block", "micro_batch_size": 1},
        {"precision": "fp8_delayed", "model": ModelConfig(300, 16, d_model=32, num_layers=2, num_heads=2, d_ff=32)},
    ],
    ids=["ema", "muon", "checkpointing", "fp8"],
)
def test_every_kind_of_run_resumes_bit_identically(changed, options, tmp_path):
    options = {"keep_checkpoints": 3, **options}
    whole, broken = changed(out=tmp_path / "whole", **options), changed(out=tmp_path / "broken", **options)
    train(whole)
    train(broken)
    for folder in list_checkpoints(broken.out)[-2:]:
        shutil.rmtree(folder)
    train(broken, resume="auto")
    assert rows(broken.out) == rows(whole.out)
    assert all(torch.equal(tensor, weights(broken.out)[name]) for name, tensor in weights(whole.out).items())


def test_validation_and_generation_use_averaged_weights(changed):
    config = changed(ema_decay=0.9)
    result = train(config)
    mean = load_file(list_checkpoints(config.out)[-1] / "ema.safetensors")
    model, _ = load_run(config.out, "cpu")
    assert all(torch.equal(tensor, mean[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(mean["ln_final.weight"], weights(config.out)["ln_final.weight"])
    plain = train(changed(out=config.out.with_name("plain")))
    assert result.valid_loss != plain.valid_loss
    assert [row["loss"] for row in rows(config.out)] == [row["loss"] for row in rows(plain.run)]


def test_document_masks_require_an_end_of_text_token(changed, config, tmp_path):
    apart = train(changed(data=dataclasses.replace(config.data, documents=True)))
    together = train(changed(out=tmp_path / "together"))
    assert apart.valid_loss != together.valid_loss
    tokenizer = Tokenizer.load(config.data.tokenizer)
    Tokenizer(tokenizer.vocab, tokenizer.merges).save(tmp_path / "tokenizer.json")
    data = dataclasses.replace(config.data, documents=True, tokenizer=tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"data.documents is set, but .*tokenizer.json has no <\|endoftext\|>"):
        train(changed(data=data, out=tmp_path / "none"))


def test_best_checkpoint_is_kept(changed, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(Trainer, "validate", lambda self, interrupted: next(losses))
    config = changed(eval_every=2, checkpoint_every=2, keep_checkpoints=1)
    train(config)
    assert [folder.name for folder in list_checkpoints(config.out)] == ["step-00000004", "step-00000012"]


def test_profile_prints_the_time_of_each_group_and_no_library_log(config):
    # In a new process, because Kineto reads its log level once.
    status, printed = run_in_child(command, config, "--profile")
    assert status == 0, printed
    assert sorted(path.name for path in (config.out / "profile").iterdir()) == ["trace.json"]
    assert (config.out / "profile" / "trace.json").stat().st_size > 1000
    expected = re.compile(r"first step after|step |a step takes [\d.]+ ms|  [a-z]+ +[\d.]+ ms/step|.*: validation loss")
    lines = printed.splitlines()
    assert [line for line in lines if not expected.match(line)] == []
    assert any(line.startswith("  matmul ") for line in lines)


def progress_line(width):
    with ProgressBar(total=10_000, initial=10_000, desc="train tinystories-17m", file=io.StringIO(), ncols=width) as bar:
        bar.start_t -= 3723
        bar.set_postfix_str("loss 2.345, 1,234,567 tokens/s", refresh=False)
        return str(bar)


def test_narrow_progress_drops_the_bar_then_the_times_then_the_name():
    assert re.fullmatch(r"train tinystories-17m: 100%\|\S+\| 10000/10000 \[1:02:0\d<\S+, loss 2.345, 1,234,567 tokens/s\]",
                        progress_line(100))  # fmt: skip
    assert re.fullmatch(r"train tinystories-17m: 10000/10000 \[1:02:0\d<\S+, loss 2.345, 1,234,567 tokens/s\]",
                        progress_line(80))  # fmt: skip
    assert progress_line(70) == "train tinystories-17m: 10000/10000, loss 2.345, 1,234,567 tokens/s"
    assert progress_line(60) == "10000/10000, loss 2.345, 1,234,567 tokens/s"


def test_profile_excludes_validations_and_checkpoints(changed, monkeypatch):
    measured = []
    after_step, in_pause = Profiler.after_step, Profiler.in_pause
    monkeypatch.setattr(Profiler, "after_step", lambda self: (after_step(self), measured.append(self._phase)))
    monkeypatch.setattr(Profiler, "in_pause", lambda self, pause: (in_pause(self, pause), measured.append("pause")))
    train(changed(steps=14, log_every=14, eval_every=5, checkpoint_every=5), profile=True)
    # The pauses come at step 5, with two steps timed, and at step 10, with two steps recorded.
    timing, recording = ["timing"], ["recording"]
    warm = ["warming up"] * 2
    assert measured == warm + timing * 3 + ["pause"] + timing * 2 + recording * 3 + ["pause"] + recording * 2 + ["done"] * 2 + [
        "pause"
    ]


@pytest.mark.parametrize("changes", [{"steps": 4}, {"eval_every": 3}])
def test_profile_with_too_few_steps_prints_why(changed, capsys, changes):
    config = changed(**changes)
    train(config, profile=True)
    assert (
        "no profile was written: it needs 3 steps, then twice 3 consecutive steps without a validation"
        in capsys.readouterr().err
    )
    assert not (config.out / "profile").exists()


def test_invalid_data_raises_before_a_folder_is_created(config, changed, tmp_path):
    missing = tmp_path / "none"
    for field, message in {
        "tokenizer": r"tokenizer .*none does not exist: train one with `tilewright tokenizer train`",
        "train": r"text file .*none does not exist: make a corpus with `tilewright corpus`",
    }.items():
        with pytest.raises(UserError, match=message):
            train(changed(data=dataclasses.replace(config.data, **{field: (missing,) if field == "train" else missing})))
    with pytest.raises(UserError, match=r"vocabulary of 300 tokens: the model supports 299"):
        train(changed(model=dataclasses.replace(config.model, vocab_size=299)))
    with pytest.raises(UserError, match=r"at least 10000 \+ 1 are needed"):
        train(changed(model=dataclasses.replace(config.model, context_length=10_000)))
    assert not config.out.exists()


@pytest.mark.gpu
def test_a_gpu_run_learns_as_the_cpu_does(changed, tmp_path):
    eager = train(changed(device="cpu", out=tmp_path / "cpu"))
    result = train(changed(device="cuda"))
    assert result.valid_loss == pytest.approx(eager.valid_loss, rel=0.02)
