"""Loss of the language models of transformers with `linear_cross_entropy`, which never holds all logits."""

import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...kernels import linear_cross_entropy


def head_forward(head: Any, x: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
    """Return the logits (..., V) of x (..., D); with targets (...), return their cross-entropy.

    The head computes the loss because FSDP and offloading gather its weight only during its forward pass.
    """
    if targets is None:
        return type(head).forward(head, x)
    return linear_cross_entropy(x, head.weight, targets, bias=head.bias, **options)


def causal_lm_forward(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    skip_logits: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Run the model; with `labels` in training, compute the loss without logits and return `logits` as None.

    `skip_logits` overrides this for one call: True skips the logits in evaluation, False returns them in training.
    """
    inputs = {
        "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
        "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache,
    }  # fmt: skip
    skip_logits = model.training if skip_logits is None else skip_logits
    if labels is None or not skip_logits or not is_fusible(model, logits_to_keep):
        return type(model).forward(model, **inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
    return_dict = kwargs.pop("return_dict", None)
    targets, num_items = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
    ignore_index = kwargs.pop("ignore_index", -100)
    outputs = model.model(**inputs, **kwargs)
    hidden = outputs.last_hidden_state
    if targets is None:
        # A token predicts the next one.
        targets = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    loss = model.lm_head(
        hidden,
        targets=targets.to(hidden.device).reshape(hidden.shape[:-1]),
        ignore_index=ignore_index,
        softcap=getattr(model.config, "final_logit_softcapping", None),
        reduction="mean" if num_items is None else "sum",
    )
    if num_items is not None:
        loss = loss / (num_items.to(loss.device) if isinstance(num_items, Tensor) else num_items)
    result = CausalLMOutputWithPast(
        loss=loss,  # pyright: ignore[reportArgumentType]
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    return result if (model.config.return_dict if return_dict is None else return_dict) else result.to_tuple()


def is_fusible(model: Any, logits_to_keep: int | Tensor) -> bool:
    """Return whether the loss is the cross-entropy of all tokens and the head is `nn.Linear`; warn about another head."""
    if isinstance(logits_to_keep, Tensor) or logits_to_keep != 0 or model.loss_function is not ForCausalLMLoss:
        return False
    head = model.lm_head
    if isinstance(head, nn.Linear) and head.weight.is_floating_point():
        return True
    warnings.warn(f"lm_head is a {type(head).__name__}: computing the loss from the logits", stacklevel=2)
    return False
