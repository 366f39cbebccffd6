import dataclasses
import math
from unittest import mock

import pytest
import torch

from tilewright.kernels import RopeScaling, linear_cross_entropy, reference, use_backend
from tilewright.kernels.attention import packing
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.model import CausalSelfAttention, KVCache, ModelConfig, RMSNorm, SwiGLU, TransformerLM
from tilewright.model.layers import Embedding, Head, JoinedLinear, Linear
from tilewright.model.transformer import rope_tables

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")

TINY = ModelConfig(vocab_size=17, context_length=8, d_model=16, num_layers=2, num_heads=4, d_ff=24)

# Combines the features of recent families, with a window and a head dim that differ from all other sizes.
MODERN = dataclasses.replace(
    TINY,
    num_layers=3,
    num_kv_heads=2,
    head_dim=6,
    rotary_dim=4,
    qk_norm=True,
    qkv_bias=True,
    norm="sandwich",
    unit_offset_norms=True,
    scale_embeddings=True,
    ffn="geglu_tanh",
    window=3,
    window_pattern="LG",
    local_rope_theta=100.0,
    rope_scaling=RopeScaling("llama3", 4.0, 8),
    attention_scale=0.3,
    attention_softcap=2.0,
    logit_softcap=3.0,
)


@pytest.fixture
def model(request):
    torch.manual_seed(0)
    model = TransformerLM(getattr(request, "param", TINY))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # ones and zeros would hide a missing norm or bias
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def test_state_dict_names(model):
    names = set(model.state_dict())
    layer = {
        f"layers.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.qkv_proj", "attn.output_proj", "ln1", "ln2", "ffn.gate_up_proj", "ffn.down_proj")
    }
    assert names == layer | {"token_embeddings.weight", "ln_final.weight", "lm_head.weight"}


def test_initialization_matches_the_handout():
    torch.manual_seed(0)
    linear, embedding = Linear(300, 500), Embedding(400, 300, 400)
    std = math.sqrt(2 / 800)
    # A normal distribution truncated at 3 sigma keeps 0.9866 of its standard deviation.
    assert linear.weight.std().item() == pytest.approx(0.9866 * std, rel=0.01)
    assert linear.weight.abs().max() <= 3 * std
    assert linear.bias is None
    assert embedding.weight.std().item() == pytest.approx(0.9866, rel=0.01)
    assert embedding.weight.abs().max() <= 3
    assert RMSNorm(5).weight.eq(1).all()


def test_no_token_sees_a_later_one(model):
    tokens = torch.randint(0, 17, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 17
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_position_matters(model):
    logits = model(torch.tensor([[3, 5, 3, 5]]))
    assert not torch.allclose(logits[0, 1], logits[0, 3])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_matches_the_reference(qk_norm):
    torch.manual_seed(0)
    layer = CausalSelfAttention(16, num_heads=4, num_kv_heads=2, qk_norm=qk_norm)
    x = torch.randn(2, 5, 16)
    cos, sin = (table[:5] for table in rope_tables(TINY))
    weights = layer.qkv_proj.weight.split([16, 8, 8])
    q, k, v = ((x @ weight.T).unflatten(-1, (-1, 4)).transpose(1, 2) for weight in weights)
    if qk_norm:
        for parameter in (layer.q_norm.weight, layer.k_norm.weight):
            torch.nn.init.normal_(parameter)
        q, k = reference.rms_norm(q, layer.q_norm.weight), reference.rms_norm(k, layer.k_norm.weight)
    attended = reference.attention(reference.rope(q, cos, sin), reference.rope(k, cos, sin), v)
    torch.testing.assert_close(layer(x, cos, sin), layer.output_proj(attended.transpose(1, 2).reshape(2, 5, 16)))


def test_joined_projection_is_initialized_like_separate_ones():
    torch.manual_seed(0)
    layer = JoinedLinear(300, (600, 20))
    for part in layer.weight.split([600, 20]):
        std = math.sqrt(2 / (300 + part.shape[0]))
        assert part.std().item() == pytest.approx(std, rel=0.03)
        assert part.abs().max() <= 3 * std


def test_swiglu_matches_its_formula():
    torch.manual_seed(0)
    layer, x = SwiGLU(6, 10), torch.randn(3, 6)
    gate, up = (x @ layer.gate_up_proj.weight.T).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x), (gate * torch.sigmoid(gate) * up) @ layer.down_proj.weight.T)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("model", [TINY, dataclasses.replace(TINY, num_kv_heads=2, qk_norm=True), MODERN], indirect=True)
@torch.no_grad()
def test_cached_logits_match_uncached_logits(model, backend, device):
    model, tokens = model.to(device), torch.randint(0, 17, (3, 8), device=device)
    with use_backend(backend):
        cache = KVCache(model, 3, 8)
        pieces = [model(piece, cache) for piece in tokens.split([3, 1, 2, 1, 1], dim=1)]
        assert cache.length == 8
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-5, atol=1e-5)


def tokens_and_targets(size=3, length=8):
    return (torch.randint(0, 17, (size, length)) for _ in range(2))


def loss_and_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_triton), "reference"])
def test_document_bounds_are_computed_once(model, backend):
    tokens, targets = tokens_and_targets(size=2)
    model.activation_checkpointing = "block"
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [4, 4, 4, 4, 4, 4, 7, 7]])
    with use_backend(backend), mock.patch.object(packing, "document_bounds", wraps=packing.document_bounds) as computed:
        model.train().loss(tokens, targets, document_ids=ids).backward()
    assert computed.call_count == 1


def test_documents_do_not_see_each_other(model):
    tokens, _ = tokens_and_targets(size=2)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [4, 4, 4, 4, 4, 4, 7, 7]])
    logits = model(tokens, document_ids=documents)
    for row, start in ((0, 0), (0, 3), (1, 0), (1, 6)):
        end = start + int((documents[row] == documents[row, start]).sum())
        # Rotation is relative, so a document's logits do not depend on its position.
        torch.testing.assert_close(logits[row, start:end], model(tokens[row : row + 1, start:end])[0])
    with pytest.raises(ValueError, match="document_ids and cache are both given"):
        model(tokens, KVCache(model, 2, 8), documents)


@pytest.mark.parametrize("model", [MODERN], indirect=True)
def test_each_layer_sees_its_window(model):
    # In a model of one layer, a changed token changes the logits of all tokens that see it.
    tokens = torch.randint(0, 17, (1, 8))
    changed = tokens.clone()
    changed[0, 2] = (tokens[0, 2] + 1) % 17
    for layer, last in ((0, 4), (1, 7)):
        one = TransformerLM(dataclasses.replace(MODERN, num_layers=1, window_pattern="LG"[layer]))
        differs = (one(tokens) != one(changed)).any(dim=-1)[0].nonzero().flatten().tolist()
        assert differs == list(range(2, last + 1))


@pytest.mark.parametrize("model", [MODERN], indirect=True)
def test_every_weight_of_a_modern_model_gets_a_gradient(model):
    tokens, targets = tokens_and_targets()
    loss, gradients = loss_and_gradients(model, model.loss(tokens, targets))
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    whole = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, whole)
    assert model(tokens).abs().max() < 3
    model.activation_checkpointing = "block"
    again = loss_and_gradients(model.train(), model.loss(tokens, targets))
    assert torch.equal(loss, again[0])
    assert all(torch.equal(gradients[name], again[1][name]) for name in gradients)
    model.compute_dtype = torch.bfloat16
    torch.testing.assert_close(model.cast(torch.bfloat16)(tokens), model(tokens), rtol=0, atol=0)
    with torch.device("meta"):
        twin = TransformerLM(MODERN)
    twin.to_empty(device="cpu").make_tables()
    twin.load_state_dict(model.state_dict())
    twin.compute_dtype = torch.bfloat16
    assert torch.equal(twin(tokens), model(tokens))


def test_scaled_and_local_rope_tables():
    config = dataclasses.replace(MODERN, context_length=32)
    cos, _ = rope_tables(config)
    local, _ = rope_tables(config, local=True)
    assert cos.shape == local.shape == (32, 2)
    positions = torch.arange(32, dtype=torch.float64)
    torch.testing.assert_close(local[:, 1].double(), torch.cos(positions / 10), rtol=0, atol=1e-6)
    # theta^(-1/2) = 0.01 turns once in 628 positions, less than once in the original 8: the factor applies in full.
    torch.testing.assert_close(cos[:, 1].double(), torch.cos(positions * 0.01 / 4), rtol=0, atol=1e-6)
    assert rope_tables(dataclasses.replace(config, local_rope_theta=None), local=True)[0].equal(cos)


@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_padding_is_invisible(tied):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    model = TransformerLM(config)
    assert (config.padded_vocab_size, TINY.vocab_size) == (128, 17)
    padded = {name: p for name, p in model.named_parameters() if p.shape == (128, 16)}
    assert set(padded) == {"token_embeddings.weight"} | (set() if tied else {"lm_head.weight"})
    assert model.head_weight.shape == (17, 16)
    tokens, targets = tokens_and_targets()
    assert model(tokens).shape == (3, 8, 17)
    losses = (
        model.loss(tokens, targets),
        torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum"),
        linear_cross_entropy(model.hidden_states(tokens), model.head_weight, targets, reduction="sum"),
    )
    for loss in losses:
        torch.testing.assert_close(loss, losses[0])
        model.zero_grad()
        loss.backward()
        for parameter in padded.values():
            assert not parameter[17:].any()
            assert not parameter.grad[17:].any()
            assert parameter.grad[:17].any()


def test_padding_does_not_change_initialization():
    for make in (lambda rows: Embedding(17, 16, rows), lambda rows: Head(16, 17, rows)):
        weights = []
        for rows in (17, 128):
            torch.manual_seed(0)
            weights.append(make(rows).weight.detach())
        assert torch.equal(weights[1][:17], weights[0])
    torch.manual_seed(0)
    assert torch.equal(Linear(16, 17).weight, weights[0])


def test_autocast_works(model):
    tokens, targets = tokens_and_targets()
    exact = model.loss(tokens, targets).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rounded, gradients = loss_and_gradients(model, model.loss(tokens, targets))
        assert model(tokens).dtype == torch.bfloat16
    assert 0 < abs(float(rounded) - float(exact)) < 2e-2 * float(exact)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_tied_embeddings_share_one_weight():
    model = TransformerLM(dataclasses.replace(TINY, tie_embeddings=True))
    assert "lm_head.weight" not in model.state_dict()
    model(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    assert model.head_weight.data_ptr() == model.token_embeddings.weight.data_ptr()


def test_too_many_tokens_are_refused(model):
    with pytest.raises(ValueError, match="the sequence has 9 tokens: expected at most the context length, 8"):
        model(torch.zeros(1, 9, dtype=torch.long))


@needs_triton
@pytest.mark.parametrize("model", [TINY, dataclasses.replace(TINY, num_kv_heads=2, qk_norm=True), MODERN], indirect=True)
def test_kernels_and_reference_agree(model, device):
    model, tokens = model.to(device), torch.randint(0, 17, (2, 8), device=device)
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            logits = model(tokens)
            results.append((logits, *torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
