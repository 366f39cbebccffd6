import dataclasses
import math

import numpy as np
import pytest
import torch

from tilewright.kernels import reference
from tilewright.tokenizer import Tokenizer
from tilewright.train import OptimizerConfig
from tilewright.train.data.datasets import open_data
from tilewright.train.data.sampling import TrainingData
from tilewright.train.diagnosis import diagnose, summary
from tilewright.train.trainer import Trainer, TrainingLoss


@pytest.fixture
def make(config):
    """Return a function that builds a trainer with changed options."""
    made = []

    def make(**changes):
        changed = dataclasses.replace(config, **changes)
        tokenizer = Tokenizer.load(changed.data.tokenizer)
        datasets, valid = open_data(changed.data, tokenizer)
        data = TrainingData(datasets, changed.model.context_length, changed.seed)
        made.append(Trainer(changed, data, valid, tokenizer.end_of_text_id))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()


def copies(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def test_step_equals_adamw_with_clipping(make):
    trainer = make()
    before = copies(trainer)
    metrics = trainer.train_step()
    assert metrics["lr"] == pytest.approx(1e-2 / 3)
    # In the first step, Adam moves each element by the learning rate, independent of the gradient's magnitude.
    for name, p in trainer.model.named_parameters():
        decay = 0.1 * float(metrics["lr"]) * before[name] if p.dim() > 1 else 0
        assert (p - before[name] + decay).abs().max() <= 1.001 * float(metrics["lr"]), name
    assert (trainer.model.ln_final.weight - 1).abs().min() > 0


def test_gradients_are_clipped_to_max_grad_norm(make, monkeypatch):
    trainer = make(optimizer=OptimizerConfig(max_grad_norm=0.01, warmup_steps=1))
    used = []
    parameters = list(trainer.model.parameters())
    monkeypatch.setattr(
        trainer.optimizer, "step", lambda skip: used.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
    )
    metrics = trainer.train_step()
    assert float(metrics["grad_norm"]) > 0.1
    assert used == [pytest.approx(0.01, rel=1e-3)]


def test_validation_loss_is_the_mean_over_tokens(make):
    trainer = make(eval_sequences=10)  # batches of 4, 4 and 2
    data = trainer.valid_data
    starts = np.linspace(0, len(data) - 17, 10).astype(np.int64)
    windows = torch.from_numpy(data.windows(starts, 17))
    logits = trainer.model(windows[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert trainer.validate() == pytest.approx(expected.item(), rel=1e-5)


def test_validation_can_be_interrupted(make):
    trainer = make()
    answers = iter([False, True])
    assert trainer.validate(lambda: next(answers)) is None


def test_steps_read_consecutive_samples(make):
    trainer = make()
    trainer.train_step()
    for step in (1, 2):
        expected = trainer.train_data.batch(range(4 * step, 4 * step + 4))
        assert all(torch.equal(a, b) for a, b in zip(next(trainer.batches), expected, strict=True))
        assert trainer.samples(step) == range(4 * step, 4 * step + 4)


def test_z_loss_is_only_in_the_training_loss(make):
    plain, with_z = make(), make(z_loss=0.1)
    inputs, targets = plain.train_data.batch(range(4))
    hidden = plain.model.hidden_states(inputs)
    args = (hidden.flatten(0, 1), plain.model.head_weight, targets.flatten())
    expected = reference.linear_cross_entropy(*args, z_loss=0.1, reduction="sum")
    assert with_z.loss(inputs, targets).item() == pytest.approx(expected.item(), rel=1e-5)
    assert with_z.loss(inputs, targets) > plain.loss(inputs, targets)
    assert with_z.validate() == plain.validate()


def test_attention_is_masked_between_documents(make):
    trainer = make()
    inputs = torch.randint(0, 256, (2, 16))
    end = Tokenizer.load(trainer.config.data.tokenizer).end_of_text_id
    inputs[:, 5] = end
    targets = torch.full((2, 16), -100)
    targets[:, 6:] = 1  # score only the second document
    apart, together = TrainingLoss(trainer.model, end_of_text=end), TrainingLoss(trainer.model)
    other = inputs.clone()
    other[:, :5] = (other[:, :5] + 1) % 256
    assert apart(inputs, targets).item() == apart(other, targets).item()
    assert together(inputs, targets).item() != together(other, targets).item()
    # The end-of-text token attends to its document.
    targets[:] = -100
    targets[:, 5] = 1
    assert apart(inputs, targets).item() != apart(other, targets).item()


def test_step_with_a_non_finite_loss_is_skipped(make, monkeypatch):
    trainer = make(ema_decay=0.9)
    trainer.train_step()
    before, state = copies(trainer), {key: value.clone() for key, value in trainer.optimizer.tensors().items()}
    loss_sum = trainer._loss_sum
    monkeypatch.setattr(trainer, "_loss_sum", lambda *batch: loss_sum(*batch) * math.nan)
    metrics = trainer.train_step()
    assert math.isnan(float(metrics["loss"]))
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert all(torch.equal(value, state[key]) for key, value in trainer.optimizer.tensors().items())
    assert int(trainer.guard.skipped) == 1
    monkeypatch.undo()
    trainer.train_step()
    assert trainer.step == 3
    assert not any(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if p.dim() > 1)


def test_diagnosis_names_the_layer_and_the_batch(make):
    trainer = make()
    trainer.train_step()
    with torch.no_grad():
        trainer.model.layers[1].ffn.down_proj.weight[0, 0] = math.nan
    trainer.train_step()
    diagnosis = diagnose(trainer)
    assert diagnosis["step"] == 1
    assert math.isnan(diagnosis["loss"])
    assert diagnosis["guard"] == {"taken": 1, "skipped": 1, "in_a_row": 1, "most_in_a_row": 1}
    assert diagnosis["first_not_finite"]["weights"] == "layers.1.ffn.down_proj.weight"
    assert diagnosis["first_not_finite"]["outputs"] == "layers.1.ffn.down_proj"
    assert diagnosis["weight_norms"].keys() == copies(trainer).keys()
    assert [place["file"] for place in diagnosis["batch"]] == [str(trainer.train_data.datasets[0].path)] * 4
    windows = trainer.train_data.datasets[0].windows(np.array([p["first_token"] for p in diagnosis["batch"]]), 17)
    assert torch.equal(torch.from_numpy(windows[:, :-1]), trainer.train_data.batch(trainer.samples(1))[0])
    assert "the batch of step 2 has a loss of nan" in summary(diagnosis)
    assert "the weights of layers.1.ffn.down_proj.weight" in summary(diagnosis)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_checkpointing_does_not_change_gradients(make):
    gradients = []
    for mode in ("none", "block"):
        trainer = make(activation_checkpointing=mode)
        trainer.backward(*trainer.train_data.batch(range(4)))
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
