"""Variants of the model that `ModelConfig` offers: each is compared to a plain model, saved, cached, compiled."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from handout import HandoutLM, handout_weights
from model_shapes import GEMMA
from tilewright.errors import UserError
from tilewright.kernels import use_backend
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.model import KVCache, ModelConfig, TransformerLM

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")
# Triton's interpreter uses NumPy, which warns about log(0) in rows that are not read.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

TINY = ModelConfig(vocab_size=17, context_length=8, d_model=16, num_layers=2, num_heads=4, d_ff=24)

ABLATIONS = {
    "course": {},
    "post-norm": {"norm": "post"},
    "no norm": {"norm": "none"},
    "no rope": {"rope": False},
    "silu": {"ffn": "silu"},
    "geglu by tanh": {"ffn": "geglu_tanh"},
    "geglu by erf": {"ffn": "geglu_erf"},
    "layer norm": {"norm_type": "layer_norm"},
    "layer norm after": {"norm_type": "layer_norm", "norm": "post"},
    "tied": {"tie_embeddings": True},
    "qk-norm": {"qk_norm": True},
    "qk-norm without rope": {"qk_norm": True, "rope": False, "num_kv_heads": 2},
    "experts": {"num_experts": 4, "num_kv_heads": 2, "norm": "sandwich"},
    "head dim and biases": {"head_dim": 6, "qkv_bias": True, "rotary_dim": 4},
    "gemma": GEMMA | {"window": 3},
    "all at once": {"norm": "post", "rope": False, "ffn": "silu", "tie_embeddings": True, "num_kv_heads": 2},
}
ablations = pytest.mark.parametrize("change", ABLATIONS.values(), ids=list(ABLATIONS))


def ablated(change):
    torch.manual_seed(0)
    model = TransformerLM(dataclasses.replace(TINY, **change))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # ones and zeros would hide a missing norm or bias
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def tokens_and_targets(size=3, length=8):
    return (torch.randint(0, 17, (size, length)) for _ in range(2))


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@ablations
def test_each_variant_matches_the_handout_model(change, backend, device):
    model = ablated(change).to(device)
    plain = HandoutLM(model.config).to(device)
    plain.load_state_dict(handout_weights(model))
    # The interpreter needs its time for every sequence.
    tokens, targets = (t.to(device) for t in tokens_and_targets(1 if backend == "triton" else 3))
    with use_backend(backend):
        torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-4, atol=1e-5)
        loss, gradients = loss_and_gradients(model, model.loss(tokens, targets) / targets.numel())
    expected, _ = loss_and_gradients(plain, plain.loss(tokens, targets))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    # Load the gradients as weights, so that they are split in the same way.
    ours = TransformerLM(model.config).to(device)
    ours.load_state_dict({name: gradients[name] for name in ours.state_dict()})
    parted = handout_weights(ours)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parted[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@ablations
def test_each_variant_round_trips_through_safetensors(change, tmp_path):
    model = ablated(change)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = TransformerLM(model.config)
    tokens, _ = tokens_and_targets()
    assert not torch.equal(again(tokens), model(tokens))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(again(tokens), model(tokens))


@ablations
@torch.no_grad()
def test_each_variant_decodes_with_a_cache(change):
    model = ablated(change)
    tokens, _ = tokens_and_targets()
    cache = KVCache(model, 3, 8)
    pieces = [model(piece, cache) for piece in tokens.split([3, 1, 4], dim=1)]
    # Several queries with a non-empty cache run the naive attention.
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("checkpointing", "order"), [("block", [0, 1, 1, 0]), (1, [0, 1, 0]), (0, [0, 1])])
@ablations
def test_checkpointed_blocks_give_equal_gradients(change, checkpointing, order):
    model = ablated(change)
    batch = tuple(tokens_and_targets())
    loss, gradients = loss_and_gradients(model, model.loss(*batch))
    calls = []
    for i, layer in enumerate(model.layers):
        layer.attn.register_forward_hook(lambda *_, i=i: calls.append(i))
    model.activation_checkpointing = checkpointing
    again, checkpointed = loss_and_gradients(model, model.loss(*batch))
    assert calls == order
    assert torch.equal(loss, again)
    assert all(torch.equal(gradients[name], checkpointed[name]) for name in gradients)
    with torch.no_grad():
        assert torch.equal(model.loss(*batch), loss)
    model.eval()
    assert model(batch[0]).requires_grad
    assert calls == [*order, 0, 1, 0, 1]


@pytest.mark.parametrize("number", [3, True])
def test_invalid_numbers_of_checkpointed_blocks_are_rejected(number):
    model = ablated({})
    model.activation_checkpointing = number
    with pytest.raises(UserError, match=f"checkpointing is {number}: expected none, block, or a number of blocks up to 2"):
        model.loss(*tokens_and_targets())


# Together, these use every option of `ABLATIONS`.
COMPILED = [
    "no norm",
    "silu",
    "geglu by erf",
    "layer norm after",
    "qk-norm without rope",
    "experts",
    "head dim and biases",
    "gemma",
]


@pytest.mark.slow
@pytest.mark.parametrize("change", [ABLATIONS[name] for name in COMPILED], ids=COMPILED)
def test_each_option_compiles_to_one_graph(change, device):
    assert_compiles_to_one_graph(change, "none", torch.bfloat16, "reference", device)


def test_partial_checkpointing_compiles_to_one_graph(device):
    assert_compiles_to_one_graph({}, 1, torch.bfloat16, "reference", device)


# The kernel tests compile each op by itself; these two variants contain all ops.
@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("change", [ABLATIONS["course"], ABLATIONS["all at once"]], ids=["course", "all at once"])
def test_kernels_compile_with_checkpointing(change, device):
    assert_compiles_to_one_graph(change, "block", None, "triton", device)


def assert_compiles_to_one_graph(change, checkpointing, dtype, backend, device):
    model = ablated(change).to(device)
    model.activation_checkpointing, model.compute_dtype = checkpointing, dtype
    tokens, targets = (t.to(device) for t in tokens_and_targets(1 if backend == "triton" else 2, 4))
    documents = (tokens == 3).cumsum(dim=1)
    # Capture forward and backward graphs without code generation, which would take a minute each.
    step = torch.compile(TransformerLM.loss, fullgraph=True, dynamic=False, backend="aot_eager")
    with use_backend(backend):
        compiled = loss_and_gradients(model, step(model, tokens, targets, documents, z_loss=1e-4))
        eager = loss_and_gradients(model, model.loss(tokens, targets, documents, z_loss=1e-4))
    torch.testing.assert_close(compiled, eager)


@pytest.mark.long
@pytest.mark.slow
def test_generated_code_matches_eager():
    model = ablated({})
    tokens, targets = tokens_and_targets()
    step = torch.compile(TransformerLM.loss, fullgraph=True, dynamic=False)
    compiled = loss_and_gradients(model, step(model, tokens, targets, z_loss=1e-4))
    eager = loss_and_gradients(model, model.loss(tokens, targets, z_loss=1e-4))
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@ablations
def test_casting_on_use_matches_weights_of_that_dtype(change):
    model = ablated(change)
    tokens, targets = tokens_and_targets()
    model.compute_dtype = torch.bfloat16
    loss, gradients = loss_and_gradients(model, model.loss(tokens, targets))
    cast = ablated(change)
    for parameter in cast.parameters():
        if parameter.dim() > 1:  # norms compute in float32 from float32 weights
            parameter.data = parameter.data.to(torch.bfloat16)
    assert model(tokens).dtype == cast(tokens).dtype == torch.bfloat16
    assert torch.equal(model(tokens), cast(tokens))
    expected, theirs = loss_and_gradients(cast, cast.loss(tokens, targets))
    assert torch.equal(loss, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        # Here the gradient of the embedding's rows is summed in float32, there in bfloat16; a tied weight adds two gradients.
        torch.testing.assert_close(gradient, theirs[name].float(), rtol=2e-2, atol=2e-2)
