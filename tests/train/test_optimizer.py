import pytest
import torch

from tilewright.model import ModelConfig, TransformerLM
from tilewright.train import OptimizerConfig
from tilewright.train.optimizer import Optimizer

TAKE, SKIP = torch.tensor(False), torch.tensor(True)


@pytest.fixture
def model(request):
    torch.manual_seed(0)
    shape = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "num_kv_heads": 1}
    return TransformerLM(ModelConfig(50, 8, **shape, **getattr(request, "param", {})))


def give_gradients(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def adamw(parameters):
    """Return torch's own, which decays matrices only."""
    groups = [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]]
    return [
        torch.optim.AdamW(group, betas=(0.9, 0.95), weight_decay=decay) for group, decay in zip(groups, (0.1, 0), strict=True)
    ]


def test_adamw_is_torchs_own(model):
    optimizer = Optimizer(model, OptimizerConfig())
    expected = {n: torch.nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    theirs = adamw(expected.values())
    for step, lr in enumerate((0.01, 0.02, 0.005)):
        give_gradients(model, step)
        for n, parameter in model.named_parameters():
            expected[n].grad = parameter.grad.clone()
        optimizer.set_learning_rate(lr)
        optimizer.step(TAKE)
        for part in theirs:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[n].detach(), rtol=1e-5, atol=1e-6)


# Rows of each linear map's own matrix, by the layer that holds it.
MATRICES = {"attn.qkv_proj": (16, 8, 8), "attn.output_proj": (16,), "ffn.gate_up_proj": (24, 24), "ffn.down_proj": (16,)}
EXPERTS = {"num_experts": 3}


def matrices_of(tensor, sizes):
    """The matrices of a weight, or of its gradient: of experts there are several."""
    tensors = tensor.unbind() if tensor.dim() == 3 else [tensor]
    return [part for tensor in tensors for part in tensor.split(sizes)]


@pytest.mark.parametrize("model", [{}, EXPERTS], ids=["dense", "experts"], indirect=True)
def test_muon_is_torchs_own_on_each_linear_map(model):
    optimizer = Optimizer(model, OptimizerConfig(name="muon"))
    sizes_of = MATRICES if model.config.num_experts is None else MATRICES | {"ffn.router": (3,)}
    rows = {f"layers.{i}.{name}.weight": sizes for i in range(2) for name, sizes in sizes_of.items()}
    weights = dict(model.named_parameters())
    expected = {n: [torch.nn.Parameter(part.clone()) for part in matrices_of(weights[n].detach(), rows[n])] for n in rows}
    rest = {n: torch.nn.Parameter(p.detach().clone()) for n, p in weights.items() if n not in rows}
    matrices = [part for parts in expected.values() for part in parts]
    theirs = [torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), *adamw(rest.values())]
    tokens = torch.randint(50, (3, 2, 4, 9), generator=torch.Generator().manual_seed(0))
    for lr, micro_batches in zip((0.01, 0.02, 0.005), tokens, strict=True):
        for batch in micro_batches:
            model.loss(batch[:, :-1], batch[:, 1:]).backward()
        for n, parameter in rest.items():
            parameter.grad = weights[n].grad.clone()
        for n, parts in expected.items():
            for part, gradient in zip(parts, matrices_of(weights[n].grad, rows[n]), strict=True):
                part.grad = gradient.clone()
        optimizer.set_learning_rate(lr)
        optimizer.step(TAKE)
        optimizer.zero_grad()
        for part in theirs:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
    for n, parameter in rest.items():
        torch.testing.assert_close(weights[n].detach(), parameter.detach(), rtol=1e-5, atol=1e-6)
    for n, parts in expected.items():
        assert torch.equal(weights[n].flatten(0, -2), torch.cat(list(parts))), n
    momenta = {n for n in optimizer.tensors() if n.startswith("momentum_buffer.layers.1.")}
    names = {f"{n}.{i}" if len(parts) > 1 else n for n, parts in expected.items() for i in range(len(parts))}
    assert momenta == {f"momentum_buffer.{n}" for n in names if n.startswith("layers.1.")}


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


@pytest.mark.parametrize("model", [{}, EXPERTS], ids=["dense", "experts"], indirect=True)
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
