import pytest
import torch

from tilewright.model import ModelConfig, TransformerLM
from tilewright.train import OptimizerConfig
from tilewright.train.optimizer import Optimizer

# The configuration and the dtype of the weights of each rule.
RULES = {
    "adamw": (OptimizerConfig(), torch.float32),
    "muon": (OptimizerConfig(name="muon"), torch.float32),
    "schedule_free": (OptimizerConfig(name="schedule_free", schedule="constant"), torch.float32),
    "rounded": (OptimizerConfig(), torch.bfloat16),
    "8bit": (OptimizerConfig(states="8bit"), torch.float32),
}
TAKE, SKIP = torch.tensor(False), torch.tensor(True)


@pytest.fixture
def model(request):
    torch.manual_seed(0)
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("rule") == "8bit":
        pytest.importorskip("torchao")
    shape = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "num_kv_heads": 1}
    # The embedding is large enough for 8-bit moments.
    return TransformerLM(ModelConfig(250, 8, **shape, **getattr(request, "param", {})))


def set_random_gradients(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def adamw(parameters):
    """Return torch's AdamW, with weight decay on matrices only."""
    groups = [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]]
    return [
        torch.optim.AdamW(group, betas=(0.9, 0.95), weight_decay=decay) for group, decay in zip(groups, (0.1, 0), strict=True)
    ]


def test_adamw_equals_torch(model):
    optimizer = Optimizer(model, OptimizerConfig())
    expected = {n: torch.nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    theirs = adamw(expected.values())
    for step, lr in enumerate((0.01, 0.02, 0.005)):
        set_random_gradients(model, step)
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


# Rows of each linear map, by layer.
MATRICES = {"attn.qkv_proj": (16, 8, 8), "attn.output_proj": (16,), "ffn.gate_up_proj": (24, 24), "ffn.down_proj": (16,)}
EXPERTS = {"num_experts": 3}


def matrices_of(tensor, sizes):
    """Return the matrices of a weight or a gradient. Experts have several."""
    tensors = tensor.unbind() if tensor.dim() == 3 else [tensor]
    return [part for tensor in tensors for part in tensor.split(sizes)]


@pytest.mark.parametrize("model", [{}, EXPERTS], ids=["dense", "experts"], indirect=True)
def test_muon_equals_torch_on_each_linear_map(model):
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
        # Batched bfloat16 products round differently.
        torch.testing.assert_close(weights[n].flatten(0, -2), torch.cat(list(parts)).detach(), rtol=0, atol=2e-4)
    momenta = {n for n in optimizer.tensors() if n.startswith("momentum_buffer.")}
    assert momenta == {f"momentum_buffer.{n}" for n in rows}


def cast_parameters(model, dtype):
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("rule", RULES)
def test_skipped_step_changes_nothing(model, rule):
    config, dtype = RULES[rule]
    optimizer = Optimizer(cast_parameters(model, dtype), config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    set_random_gradients(model)
    optimizer.step(TAKE)
    weights = copies(model)
    state = {key: value.clone() for key, value in optimizer.tensors().items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step(SKIP)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(value, state[key]) for key, value in optimizer.tensors().items())
    set_random_gradients(model, 2)
    optimizer.step(TAKE)
    assert all(p.isfinite().all() and not torch.equal(p, weights[n]) for n, p in model.named_parameters())
    clean = cast_parameters(TransformerLM(model.config), dtype)
    clean.load_state_dict(before)
    never_skipped = Optimizer(clean, config)
    for seed in (1, 2):
        set_random_gradients(clean, seed)
        never_skipped.step(TAKE)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), clean.parameters(), strict=True))


@pytest.mark.parametrize("model", [{}, EXPERTS], ids=["dense", "experts"], indirect=True)
@pytest.mark.parametrize("rule", RULES)
def test_restored_state_continues_exactly(model, rule):
    config, dtype = RULES[rule]
    first = Optimizer(cast_parameters(model, dtype), config, seed=3)
    set_random_gradients(model)
    first.step(TAKE)
    twin = cast_parameters(TransformerLM(model.config), dtype)
    twin.load_state_dict(model.state_dict())
    second = Optimizer(twin, config, seed=3)
    second.allocate()
    assert first.tensors().keys() == second.tensors().keys()
    for key, value in second.tensors().items():
        value.copy_(first.tensors()[key])
    for each, optimizer in ((model, first), (twin, second)):
        set_random_gradients(each, 3)
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


def test_schedule_free_equals_the_library(model):
    schedulefree = pytest.importorskip("schedulefree")
    config = OptimizerConfig(name="schedule_free", schedule="constant", lr=0.01, warmup_steps=3)
    optimizer = Optimizer(model, config)
    expected = {n: torch.nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    groups = [
        {"params": [p for p in expected.values() if (p.dim() > 1) == decays], "weight_decay": 0.1 if decays else 0.0}
        for decays in (True, False)
    ]
    theirs = schedulefree.AdamWScheduleFree(groups, lr=0.01, betas=config.betas, warmup_steps=3)
    theirs.train()
    for step in range(6):
        set_random_gradients(model, step)
        for n, parameter in model.named_parameters():
            expected[n].grad = parameter.grad.clone()
        optimizer.set_learning_rate(config.lr * min(1, (step + 1) / config.warmup_steps))
        optimizer.step(TAKE)
        theirs.step()
    for n, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[n].detach(), rtol=1e-5, atol=1e-6)
    theirs.eval()
    with optimizer.mean.in_place_of_the_weights():
        for n, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[n].detach(), rtol=1e-5, atol=1e-5)


def test_8_bit_moments_approximate_float32():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64, bias=False)
    twin = torch.nn.Linear(64, 64, bias=False)
    twin.load_state_dict(layer.state_dict())
    optimizers = [Optimizer(layer, OptimizerConfig(states="8bit")), Optimizer(twin, OptimizerConfig())]
    for step in range(10):
        for each, optimizer in zip((layer, twin), optimizers, strict=True):
            set_random_gradients(each, step)
            optimizer.step(TAKE)
    state = optimizers[0].tensors()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "exp_avg_codes.weight": (torch.uint8, (64, 64)),
        "exp_avg_scales.weight": (torch.float32, (16,)),
        "exp_avg_sq_codes.weight": (torch.uint8, (64, 64)),
        "exp_avg_sq_scales.weight": (torch.float32, (16,)),
        "step.weight": (torch.float32, ()),
    }
    # The weights have moved by up to 10 steps of 1e-3.
    torch.testing.assert_close(layer.weight, twin.weight, rtol=0, atol=5e-4)
