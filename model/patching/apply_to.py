"""Replace the parts of one model, and restore them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from ...errors import UserError
from .families import Family, find_model, modeling_file


@dataclass
class Applied:
    """Record of the parts that `apply_to` replaced in a model."""

    replaced: dict[str, list[str]]
    """Names of the replaced modules for each part: norms, mlp, rope, attention, loss."""
    forwards: dict[nn.Module, partial[Any]] = field(repr=False)
    """New forward pass of each module."""
    config: Any = field(repr=False)
    """Config of the model; a copy if attention was replaced."""
    attention: str | None = field(repr=False)
    """Attention implementation that the config named before."""

    def revert(self) -> None:
        """Restore every part; the model then computes the same bits as before. A second call does nothing.

        Raises `UserError` if another library, such as accelerate, has wrapped a forward pass since.
        """
        for module, forward in self.forwards.items():
            now = vars(module).get("forward")
            if now is not forward and getattr(now, "__func__", None) is not forward.func:
                raise UserError(
                    f"the forward pass of a {type(module).__name__} was wrapped after apply_to: unwrap it before revert; for "
                    "accelerate call unwrap_model(model, keep_fp32_wrapper=False)"
                )
        for module in self.forwards:
            del module.forward
        if self.replaced.get("attention"):
            self.config._attn_implementation = self.attention
        self.forwards, self.replaced = {}, {}


def apply_to(
    model: nn.Module, *, norms: bool = True, mlp: bool = True, rope: bool = True, attention: bool = True, loss: bool = True
) -> Applied:
    """Replace the parts of a Hugging Face language model with this package's kernels, in this instance only.

    `model` is a Llama, Mistral, Qwen2, Qwen3, Gemma 2 or Gemma 3 (text) causal language model of transformers, or a PEFT model
    around one. Parameters, their names and the classes of modules stay the same. With attention, the model gets a copy of its
    config, so that other models with the same config do not change.

    Raises `UserError` for an unknown model, a model that is already patched, a module with its own forward pass, or an option
    that the kernels do not support.
    """
    causal_lm, family = find_model(model)
    parts = {"norms": norms, "mlp": mlp, "rope": rope, "attention": attention, "loss": loss}
    forwards, replaced = _plan(causal_lm, family, parts)
    for module in forwards:
        _check_is_unchanged(module)
    config, before = causal_lm.config, None
    for module, forward in forwards.items():
        module.forward = forward
    if attention:
        from .attention import NAME

        config = _own_config(causal_lm)
        before, config._attn_implementation = config._attn_implementation, NAME
    return Applied(replaced, forwards, config, before)


def _plan(model: Any, family: Family, parts: dict[str, bool]) -> tuple[dict[nn.Module, partial[Any]], dict[str, list[str]]]:
    # Return the new forward pass of each module, and the names of the replaced modules by part.
    from .attention import attention_forward, base_forward
    from .layers import activation_of, mlp_forward, norm_forward
    from .loss import causal_lm_forward, head_forward

    classes = vars(modeling_file(model))
    norm, mlp, attention = (classes[family.name + part] for part in ("RMSNorm", "MLP", "Attention"))
    base = classes[family.name + family.base]
    forwards: dict[nn.Module, partial[Any]] = {}
    replaced: dict[str, list[str]] = {part: [] for part, wanted in parts.items() if wanted}

    def replace(part: str, name: str, module: nn.Module, function: Callable[..., Any], *options: Any) -> None:
        replaced[part].append(name)
        # Unlike a closure, a partial can be copied and pickled with its module, and torch.compile traces it.
        forwards[module] = partial(function, module, *options)

    for name, module in model.named_modules():
        if isinstance(module, norm) and parts["norms"]:
            replace("norms", name, module, norm_forward, family)
        elif isinstance(module, mlp) and parts["mlp"]:
            replace("mlp", name, module, mlp_forward, activation_of(module))
        elif isinstance(module, attention):
            if parts["rope"]:
                replace("rope", name, module, attention_forward, family)
            if parts["attention"]:
                _check_attention(module)
                replaced["attention"].append(name)
        elif isinstance(module, base) and parts["attention"]:
            forwards[module] = partial(base_forward, module)
    if parts["loss"]:
        replace("loss", "lm_head", model.lm_head, head_forward)
        forwards[model] = partial(causal_lm_forward, model)
        # accelerate unwraps `__func__` of the model's forward method and binds it to the model again.
        vars(forwards[model])["__func__"] = causal_lm_forward
    return forwards, replaced


def _check_attention(module: Any) -> None:
    if module.attention_dropout > 0:
        raise UserError(f"attention_dropout is {module.attention_dropout}: expected 0.0, or apply_to(..., attention=False)")
    if not (module.is_causal and getattr(module.config, "is_causal", True)):
        raise UserError("the model's attention is not causal: use apply_to(..., attention=False)")


def _check_is_unchanged(module: nn.Module) -> None:
    own = vars(module).get("forward")
    if own is None:
        return
    if isinstance(own, partial) and own.func.__module__.startswith(__package__ or ""):
        raise UserError("the model is already patched: call revert first")
    raise UserError(
        f"a {type(module).__name__} has its own forward pass, for example from an accelerate hook: call apply_to before that"
    )


def _own_config(model: Any) -> Any:
    # Models made from one config share the object.
    config, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is config:
            module.config = own
    return own
