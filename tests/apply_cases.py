"""Tiny random models of transformers, in pairs: unchanged, and with this package's kernels."""

import copy
from typing import Any

import pytest
import torch

import tilewright

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3")
TOKENS = 12


def make_config(family: str, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    options = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None,
    }  # fmt: skip
    options |= {
        "Mistral": {"sliding_window": 5},
        "Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        "Gemma2": {"sliding_window": 5, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
        "Gemma3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    }.get(family, {})
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    return getattr(transformers, name)(**options | more)


def make_model(family: str, **more: Any) -> Any:
    import transformers

    config = make_config(family, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    # PyTorch's attention has no softcap.
    model.set_attn_implementation("eager" if family == "Gemma2" else "sdpa")
    return model.eval()


def make_pair(family: str = "Llama", **more: Any) -> tuple[Any, Any]:
    """Return a model and a copy of it to which the kernels are applied."""
    plain = make_model(family, **more)
    applied = copy.deepcopy(plain)
    tilewright.apply_to(applied)
    return plain, applied


def make_batch(mask: str = "none") -> dict[str, torch.Tensor]:
    """Return two sequences with labels, padded or packed in one of several ways."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (2, TOKENS), generator=generator)
    real = torch.ones_like(ids)
    padded = {"left": slice(0, 4), "right": slice(-4, None), "between": slice(4, 6)}.get(mask)
    if padded is not None:
        real[0, padded] = 0
    labels = ids.masked_fill(real == 0, -100)
    if mask == "left":
        # The prediction of a padding token is undefined: it differs between the attention implementations of transformers.
        labels[0, 4] = -100
    batch = {"input_ids": ids, "labels": labels}
    if padded is not None:
        batch["attention_mask"] = real
    if mask == "packed":
        batch["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    return batch


def assert_equal_training(plain: Any, applied: Any, batch: dict[str, Any], rtol: float = 2e-5) -> None:
    """Compare the loss and every gradient of one training step."""
    losses = []
    for model in (plain, applied):
        model.train()
        model.zero_grad()
        output = model(**batch, use_cache=False)
        output.loss.backward()
        losses.append(output.loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    others = dict(applied.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(others[name].grad, parameter.grad, rtol=0, atol=rtol * scale + 1e-7, msg=name)
