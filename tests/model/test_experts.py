import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.kernels import swiglu
from tilewright.model import KVCache, ModelConfig, TransformerLM, generate
from tilewright.model.experts import MixtureOfExperts, balance_loss, sort_by_expert

TINY = ModelConfig(vocab_size=17, context_length=8, d_model=16, num_layers=2, num_heads=4, d_ff=24, num_experts=4)


def mixture(num_experts=4, experts_per_token=2, normalise=True, d_model=8, d_ff=16, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return MixtureOfExperts(d_model, d_ff, num_experts, experts_per_token, swiglu, normalise).to(dtype)


def token_by_token(layer, x):
    """Return a plain loop that runs each token through its experts, and the balance loss as in its paper."""
    outputs, choices, probabilities = [], [], []
    for token in x.flatten(0, -2):
        likely = torch.softmax(layer.router.weight @ token, dim=0)
        chosen = likely.argsort(descending=True)[: layer.experts_per_token]
        total = likely[chosen].sum() if layer.normalise else 1
        output = torch.zeros_like(token)
        for expert in chosen:
            gate, up = (layer.gate_up_proj.weight[expert] @ token).chunk(2)
            output = output + likely[expert] / total * (layer.down_proj.weight[expert] @ (F.silu(gate) * up))
        outputs.append(output)
        choices.append(chosen)
        probabilities.append(likely)
    num_experts = layer.num_experts
    share = torch.cat(choices).bincount(minlength=num_experts).to(x.dtype) / (len(outputs) * layer.experts_per_token)
    return torch.stack(outputs).view_as(x), num_experts * share @ torch.stack(probabilities).mean(dim=0)


def gradients(function, layer, x):
    x = x.detach().requires_grad_()
    y, balance = function(x)
    inputs = (x, *layer.parameters())
    return y.detach(), balance.detach(), *torch.autograd.grad(y.square().sum() + balance, inputs)


@settings(max_examples=20)
@given(
    num_tokens=st.integers(1, 12),
    num_experts=st.integers(1, 6),
    experts_per_token=st.integers(1, 6),
    normalise=st.booleans(),
    d_ff=st.sampled_from([8, 24]),
    seed=st.integers(0, 99),
)
def test_mixture_matches_a_loop_over_tokens(num_tokens, num_experts, experts_per_token, normalise, d_ff, seed):
    layer = mixture(num_experts, min(num_experts, experts_per_token), normalise, d_ff=d_ff, seed=seed)
    x = torch.randn(num_tokens, 8, dtype=torch.float64)
    expected = gradients(lambda x: token_by_token(layer, x), layer, x)
    torch.testing.assert_close(gradients(layer, layer, x), expected, check_dtype=False)


@pytest.mark.parametrize("preferred", [0, 2, 3])
def test_all_tokens_can_choose_one_expert(preferred):
    layer = mixture(experts_per_token=1, normalise=False)
    with torch.no_grad():
        layer.router.weight.copy_(torch.zeros(4, 8).index_fill(0, torch.tensor(preferred), 1.0))
    x = torch.rand(3, 5, 8, dtype=torch.float64)
    actual = gradients(layer, layer, x)
    torch.testing.assert_close(actual, gradients(lambda x: token_by_token(layer, x), layer, x), check_dtype=False)
    for gradient in actual[-2:]:
        used = gradient.flatten(1).abs().amax(dim=1) > 0
        assert used.tolist() == [expert == preferred for expert in range(4)]


def test_gradients_pass_gradcheck():
    layer = mixture(num_experts=3, d_ff=8)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def result(x, *weights):
        return torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(result, (x, *layer.parameters()))


@settings(max_examples=50)
@given(
    choices=st.integers(1, 6).flatmap(
        lambda num_experts: st.tuples(
            st.just(num_experts),
            st.lists(st.permutations(range(num_experts)), min_size=1, max_size=20),
            st.integers(1, num_experts),
        )
    )
)
def test_sort_by_expert_keeps_every_token(choices):
    num_experts, preferences, k = choices
    experts = torch.tensor(preferences)[:, :k]
    order, rows, ends = sort_by_expert(experts, num_experts)
    assert order[rows].tolist() == list(range(experts.numel()))
    assert ends.dtype == torch.int32
    assert ends.diff(prepend=torch.zeros(1)).tolist() == experts.flatten().bincount(minlength=num_experts).tolist()
    by_row = experts.flatten()[order]
    assert by_row.tolist() == sorted(by_row.tolist())
    # The sort is stable: the tokens of an expert keep their order.
    assert all((order[by_row == expert].diff() > 0).all() for expert in range(num_experts))


def test_balance_loss_ranges_from_one_to_the_number_of_experts():
    even = torch.full((6, 3), 1 / 3)
    assert balance_loss(even, torch.tensor([[0], [1], [2]] * 2)).item() == pytest.approx(1.0)
    assert balance_loss(even, torch.tensor([[0, 1], [1, 2], [2, 0]] * 2)).item() == pytest.approx(1.0)
    assert balance_loss(F.one_hot(torch.ones(6, dtype=torch.long), 3).float(), torch.ones(6, 1)).item() == pytest.approx(3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_bitwise_reproducible(dtype, device):
    layer = mixture(dtype=torch.float32).to(device)
    x = torch.randn(2, 40, 8, device=device).to(dtype)
    first, second = (gradients(layer, layer, x) for _ in range(2))
    assert first[0].dtype == dtype
    assert first[3].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_half_precision_is_close():
    layer = mixture(dtype=torch.float32)
    x = torch.randn(64, 8).bfloat16()
    expected = gradients(layer, layer, x.float())
    for actual, exact in zip(gradients(layer, layer, x), expected, strict=True):
        # A token whose experts are almost equally likely can choose another expert.
        assert (actual - exact).norm() < 0.05 * exact.norm()


def make_model(**changes):
    torch.manual_seed(0)
    return TransformerLM(dataclasses.replace(TINY, **changes))


def batch():
    return torch.randint(17, (2, 3, 8), generator=torch.Generator().manual_seed(1))


def test_each_expert_is_initialized_like_a_dense_layer():
    one, several = (mixture(num, 1, False, 200, 304, torch.float32) for num in (1, 3))
    for layer, num_experts in ((one, 1), (several, 3)):
        assert {name: tuple(weight.shape) for name, weight in layer.named_parameters()} == {
            "router.weight": (num_experts, 200),
            "gate_up_proj.weight": (num_experts, 608, 200),
            "down_proj.weight": (num_experts, 200, 304),
        }
        for weight in (*layer.gate_up_proj.weight, *layer.down_proj.weight):
            assert weight.std().item() == pytest.approx(0.9866 * (2 / 504) ** 0.5, rel=0.01)


def test_router_loss_counts_once_per_layer_and_target():
    model, (tokens, targets) = make_model(), batch()
    targets[0, 3:] = -100
    balances = []
    for layer in model.layers:
        layer.ffn.register_forward_hook(lambda *args: balances.append(args[-1][1].detach()))
    plain = model.loss(tokens, targets)
    with_routers = model.loss(tokens, targets, router_loss=0.5)
    assert len(balances) == 4
    torch.testing.assert_close(with_routers - plain, 0.5 * 19 * (balances[2] + balances[3]), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(with_routers - plain, model.layers[0].ffn.router.weight)
    assert gradient.norm() > 0


@pytest.mark.parametrize("normalise", [True, False])
def test_decoding_matches_the_full_sequence(normalise):
    model, (tokens, _) = make_model(normalise_expert_weights=normalise).eval(), batch()
    cache = KVCache(model, 3, 8)
    with torch.no_grad():
        pieces = [model(piece, cache) for piece in tokens.split([3, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-5, atol=1e-5)
    texts = generate(model, tokens[:, :3].tolist(), 5, temperature=0.0)
    assert texts == [generate(model, [prompt], 5, temperature=0.0)[0] for prompt in tokens[:, :3].tolist()]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_compute_the_same(copied):
    model, (tokens, targets) = make_model(), batch()
    assert torch.equal(copied(model).loss(tokens, targets), model.loss(tokens, targets))


def test_compiles_to_one_graph_with_checkpointing():
    model, (tokens, targets) = make_model(num_layers=1), batch()
    model.compute_dtype, model.activation_checkpointing = torch.bfloat16, "block"
    # Capture forward and backward graphs without code generation, which would take a minute each.
    step = torch.compile(TransformerLM.loss, fullgraph=True, dynamic=False, backend="aot_eager")
    losses, gradients = [], []
    for function in (TransformerLM.loss, step):
        losses.append(function(model, tokens, targets, router_loss=0.01))
        gradients.append(torch.autograd.grad(losses[-1], tuple(model.parameters())))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])
