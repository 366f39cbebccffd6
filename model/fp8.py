"""Training with 8-bit matrix products in the blocks, and the state of delayed scaling.

The recipes follow torchao: one scale per tensor (`fp8`) or one per row (`fp8_rowwise`). `fp8_delayed` uses one scale per tensor
from the previous steps. The head, the embedding, the norms and attention keep their precision. So does every product without a
gradient, so validation and generation match any other use of the weights.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import AmaxHistory
from .config import ModelConfig
from .layers import Linear
from .transformer import TransformerLM

Recipe = Literal["fp8", "fp8_rowwise", "fp8_delayed"]
ALIGNMENT = 16
"""Both widths of a product, and the tokens of a micro-batch, must be multiples of this."""
HISTORY = 16
"""Number of steps whose largest magnitude determines a delayed scale."""
CAPABILITIES: Mapping[Recipe, tuple[int, int]] = {"fp8": (8, 9), "fp8_rowwise": (9, 0), "fp8_delayed": (8, 9)}
"""Minimum compute capability of a GPU for each recipe."""


class Fp8Products(nn.Module):
    """Settings and buffers of the 8-bit products of a `Linear` layer. No state dict contains them."""

    known: Tensor | None
    seen: Tensor | None
    seen_gradient: Tensor | None

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__()
        self.rowwise = recipe == "fp8_rowwise"
        for name, size in (("known", 3), ("seen", 2), ("seen_gradient", 1)):
            buffer = torch.zeros(size, device=device) if recipe == "fp8_delayed" else None
            self.register_buffer(name, buffer, persistent=False)

    @property
    def history(self) -> AmaxHistory | None:
        """The buffers of delayed scaling; None if scales are computed from the current tensors."""
        if self.known is None or self.seen is None or self.seen_gradient is None:
            return None
        return AmaxHistory(self.known, self.seen, self.seen_gradient)


def _check(config: ModelConfig, recipe: Recipe, tokens: int, device: torch.device) -> None:
    if config.num_experts is not None:
        raise UserError(
            f"precision is {recipe} and num_experts is {config.num_experts}: expected bfloat16 for a mixture of experts"
        )
    widths = {"model.d_model": config.d_model, "model.d_ff": config.d_ff, "the width of all heads": config.q_width,
              "the width of all key-value heads": config.kv_width, "the size of a micro-batch in tokens": tokens}  # fmt: skip
    for name, value in widths.items():
        if value % ALIGNMENT:
            raise UserError(f"{name} is {value}: expected a multiple of {ALIGNMENT} with precision {recipe}")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (least := CAPABILITIES[recipe]):
        gpu = torch.cuda.get_device_name(device)
        raise UserError(f"precision is {recipe}: expected a GPU of compute capability {'.'.join(map(str, least))}, not {gpu}")


def use_fp8(model: TransformerLM, recipe: Recipe, tokens: int) -> "DelayedScales | None":
    """Use 8-bit products in the blocks of a model, in training steps with micro-batches of `tokens` tokens.

    Call this after the weights are on their final device. For `fp8_delayed`, returns the scales; call their `end_step` after
    each step. Raises a `UserError` if the model, a size or the GPU does not support the recipe.
    """
    layers = [module for module in model.layers.modules() if isinstance(module, Linear)]
    device = layers[0].weight.device
    _check(model.config, recipe, tokens, device)
    products = [Fp8Products(recipe, device) for _ in layers]
    for layer, each in zip(layers, products, strict=True):
        layer.fp8 = each
    return DelayedScales(products) if recipe == "fp8_delayed" else None


class DelayedScales:
    """The largest magnitudes of the last `HISTORY` steps. Each layer holds their maximum."""

    def __init__(self, products: list[Fp8Products]) -> None:
        """Start with an empty history; the first step computes its scales from the current tensors."""
        histories = [each.history for each in products if each.history is not None]
        self._known = [history.known for history in histories]
        self._seen = [history.seen for history in histories]
        self._seen_gradient = [history.seen_gradient for history in histories]
        # (HISTORY, layers, 3), newest step first.
        self.history = torch.zeros(HISTORY, len(products), 3, device=self._known[0].device)

    def end_step(self, largest: Callable[[Tensor], Tensor]) -> None:
        """Add the magnitudes of a step to the history; `largest` is an elementwise max all-reduce over the processes.

        Non-finite magnitudes count as 0: the trainer skips such a step.
        """
        seen = torch.cat([torch.stack(self._seen), torch.stack(self._seen_gradient)], dim=1)
        seen = largest(seen)
        self.history.copy_(torch.cat([torch.where(seen.isfinite(), seen, 0.0)[None], self.history[:-1]]))
        torch._foreach_zero_(self._seen)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_zero_(self._seen_gradient)  # pyright: ignore[reportPrivateImportUsage]
        self._update_layers()

    def _update_layers(self) -> None:
        torch._foreach_copy_(self._known, list(self.history.amax(dim=0).unbind()))  # pyright: ignore[reportPrivateImportUsage]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that belong in a checkpoint."""
        return {"amax_history": self.history}

    def loaded(self) -> None:
        """Update the layers after a checkpoint was loaded into `tensors`."""
        self._update_layers()
