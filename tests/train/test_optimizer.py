import pytest
import torch

from tilewright.model import ModelConfig, TransformerLM
from tilewright.train import OptimizerConfig
from tilewright.train.optimizer import Optimizer

TAKE, SKIP = torch.tensor(False), torch.tensor(True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TransformerLM(ModelConfig(vocab_size=50, context_length=8, d_model=16, num_layers=2, num_heads=2, d_ff=24))


def give_gradients(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_is_torchs_own(model, name):
    config = OptimizerConfig(name=name, weight_decay=0.1)
    optimizer = Optimizer(model, config)
    expected = {n: torch.nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    inner = {n for n in expected if name == "muon" and n.startswith("layers.") and expected[n].dim() == 2}
    outer = [p for n, p in expected.items() if n not in inner]
    parts = [
        torch.optim.AdamW([p for p in outer if p.dim() > 1], betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW([p for p in outer if p.dim() == 1], betas=(0.9, 0.95), weight_decay=0.0),
    ]
    if inner:
        parts.append(torch.optim.Muon([expected[n] for n in inner], weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    for step, lr in enumerate((0.01, 0.02, 0.005)):
        give_gradients(model, step)
        for n, parameter in model.named_parameters():
            expected[n].grad = parameter.grad.clone()
        optimizer.set_learning_rate(lr)
        optimizer.step(TAKE)
        for part in parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
    assert (len(inner) > 0) == (name == "muon")
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[n].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_skipped_step_changes_nothing(model, name):
    optimizer = Optimizer(model, OptimizerConfig(name=name))
    give_gradients(model)
    optimizer.step(TAKE)
    weights = copies(model)
    state = {key: value.clone() for key, value in optimizer.tensors().items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step(SKIP)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(value, state[key]) for key, value in optimizer.tensors().items())
    give_gradients(model, 2)
    optimizer.step(TAKE)
    assert all(p.isfinite().all() and not torch.equal(p, weights[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_its_state_goes_on(model, name):
    config = OptimizerConfig(name=name)
    first = Optimizer(model, config)
    give_gradients(model)
    first.step(TAKE)
    twin = TransformerLM(model.config)
    twin.load_state_dict(model.state_dict())
    second = Optimizer(twin, config)
    second.allocate()
    assert first.tensors().keys() == second.tensors().keys()
    for key, value in second.tensors().items():
        value.copy_(first.tensors()[key])
    for each, optimizer in ((model, first), (twin, second)):
        give_gradients(each, 3)
        optimizer.set_learning_rate(0.01)
        optimizer.step(TAKE)
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in each.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_norms_are_not_decayed(model):
    optimizer = Optimizer(model, OptimizerConfig(weight_decay=0.5, lr=0.1))
    with torch.no_grad():
        model.ln_final.weight.fill_(2.0)
    weights = copies(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(TAKE)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name] * (0.95 if parameter.dim() > 1 else 1.0))
