"""Properties of the modules beyond their ops: copies and rejected names."""

import copy
import pickle

import pytest
import torch

from tilewright.kernels import use_backend
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.model import GEGLU, CausalSelfAttention, Embedding, LayerNorm, Linear, RMSNorm, SwiGLU
from tilewright.model.layers import make_feed_forward, make_norm

MODULES = {
    "RMSNorm": lambda: RMSNorm(16),
    "LayerNorm": lambda: LayerNorm(16),
    "SwiGLU": lambda: SwiGLU(16, 24),
    "GEGLU by tanh": lambda: GEGLU(16, 24),
    "GEGLU by erf": lambda: GEGLU(16, 24, "none"),
    "SiLU": lambda: make_feed_forward("silu", 16, 24),
    "CausalSelfAttention": lambda: CausalSelfAttention(16, 2, qk_norm=True),
}


@pytest.mark.parametrize("backend", ["reference", *(["triton"] if HAS_TRITON else [])])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("make", MODULES.values(), ids=list(MODULES))
def test_copies_of_modules_have_their_own_weights(make, duplicate, backend, device):
    torch.manual_seed(0)
    module = make().to(device)
    x = torch.randn(2, 5, 16, device=device)
    tables = [torch.randn(5, 4, device=device) for _ in range(2)] if isinstance(module, CausalSelfAttention) else []
    with use_backend(backend):
        expected = module(x, *tables)
        expected.sum().backward()
        twin = duplicate(module)
        module.zero_grad()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        actual = twin(x, *tables)
        actual.sum().backward()
    assert torch.equal(actual, expected)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in twin.parameters())


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="ffn is 'gelu': expected one of swiglu, geglu_tanh, geglu_erf, silu"):
        make_feed_forward("gelu", 16, 24)  # pyright: ignore
    with pytest.raises(ValueError, match="norm_type is 'batch_norm': expected rms_norm or layer_norm"):
        make_norm("batch_norm", 16, 1e-5)  # pyright: ignore
    with pytest.raises(ValueError, match="num_heads is 5: expected a divisor of d_model, 64, or a head_dim"):
        CausalSelfAttention(64, 5)


@pytest.mark.parametrize("layer", [Linear, Embedding])
def test_layers_are_created_with_a_dtype_on_a_device(layer):
    assert layer(8, 6, device="meta", dtype=torch.float16).weight.dtype == torch.float16
    assert layer(8, 6, device="meta").weight.is_meta
