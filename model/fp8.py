"""Training with the products of the blocks in 8 bits: which they are, and what delayed scaling remembers of them.

Recipes are those of torchao: one scale a tensor (`fp8`), or one a row (`fp8_rowwise`); `fp8_delayed` is one scale a tensor by
the steps before. Head, embedding, norms and attention stay as they are, and so does every product without a gradient:
validation and generation compute what any user of the weights computes.
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
"""What both widths of a product, and the tokens of a micro-batch, must be multiples of."""
HISTORY = 16
"""Steps whose largest magnitudes a delayed scale is made for."""
CAPABILITIES: Mapping[Recipe, tuple[int, int]] = {"fp8": (8, 9), "fp8_rowwise": (9, 0), "fp8_delayed": (8, 9)}
"""The least compute capability of a GPU for each recipe."""


class Fp8Products(nn.Module):
    """How a `Linear` layer multiplies in 8 bits; no state dict holds anything of it."""

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
        """What delayed scaling knows; None where scales are current."""
        if self.known is None or self.seen is None or self.seen_gradient is None:
            return None
        return AmaxHistory(self.known, self.seen, self.seen_gradient)


def _check(config: ModelConfig, recipe: Recipe, tokens: int, device: torch.device) -> None:
    if config.num_experts is not None:
        raise UserError(f"precision is {recipe}, and num_experts {config.num_experts}: train mixtures of experts in bfloat16")
    widths = {"model.d_model": config.d_model, "model.d_ff": config.d_ff, "the width of all heads": config.q_width,
              "the width of all key-value heads": config.kv_width, "the tokens of a micro-batch": tokens}  # fmt: skip
    for name, value in widths.items():
        if value % ALIGNMENT:
            raise UserError(f"precision is {recipe}: {name}, {value}, must be a multiple of {ALIGNMENT}")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (least := CAPABILITIES[recipe]):
        gpu = torch.cuda.get_device_name(device)
        raise UserError(f"precision is {recipe}: that needs compute capability {'.'.join(map(str, least))}, which {gpu} lacks")


def use_fp8(model: TransformerLM, recipe: Recipe, tokens: int) -> "DelayedScales | None":
    """Let the blocks of a model multiply in 8 bits while they train on micro-batches of so many `tokens`.

    Returns what delayed scaling has to be told after each step. To be called when the weights are where they will be. A model,
    a size or a GPU for which there are no such products is a `UserError`.
    """
    layers = [module for module in model.layers.modules() if isinstance(module, Linear)]
    device = layers[0].weight.device
    _check(model.config, recipe, tokens, device)
    products = [Fp8Products(recipe, device) for _ in layers]
    for layer, each in zip(layers, products, strict=True):
        layer.fp8 = each
    return DelayedScales(products) if recipe == "fp8_delayed" else None


class DelayedScales:
    """The largest magnitudes of the last steps, of which each layer knows the largest of all."""

    def __init__(self, products: list[Fp8Products]) -> None:
        """Begin without a history: scales of the first step are current."""
        histories = [each.history for each in products if each.history is not None]
        self._known = [history.known for history in histories]
        self._seen = [history.seen for history in histories]
        self._seen_gradient = [history.seen_gradient for history in histories]
        # The newest step is the first.
        self.history = torch.zeros(HISTORY, len(products), 3, device=self._known[0].device)

    def end_step(self, largest: Callable[[Tensor], Tensor]) -> None:
        """Enter what was seen in a step, of which `largest` gives the elementwise maximum over all processes.

        What is not finite is not entered: the step that it comes from is skipped.
        """
        seen = torch.cat([torch.stack(self._seen), torch.stack(self._seen_gradient)], dim=1)
        seen = largest(seen)
        self.history.copy_(torch.cat([torch.where(seen.isfinite(), seen, 0.0)[None], self.history[:-1]]))
        torch._foreach_zero_(self._seen)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_zero_(self._seen_gradient)  # pyright: ignore[reportPrivateImportUsage]
        self._tell()

    def _tell(self) -> None:
        torch._foreach_copy_(self._known, list(self.history.amax(dim=0).unbind()))  # pyright: ignore[reportPrivateImportUsage]

    def tensors(self) -> dict[str, Tensor]:
        """Return what belongs to the state of a run."""
        return {"amax_history": self.history}

    def loaded(self) -> None:
        """Take over what was written into `tensors`."""
        self._tell()
