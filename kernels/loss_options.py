"""Options of the cross-entropies: checks, conversion to op arguments, and reduction of row losses to the result."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import checks

Reduction = Literal["none", "mean", "sum"]


class CrossEntropyOutput(NamedTuple):
    """Result of `cross_entropy` with one of the `return_` options; a field that was not requested is None."""

    loss: Tensor
    lse: Tensor | None
    """(...) float32: log-sum-exp of the (soft-capped) logits. Differentiable except in ignored rows."""
    accuracy: Tensor | None
    """Scalar float32: share of the counted targets that equal the prediction."""
    predictions: Tensor | None = None
    """(...) int64: argmax of the logits, the first among equals; -1 if a logit is NaN."""
    z_loss: Tensor | None = None
    """The z-loss part of `loss`, reduced in the same way. Not differentiable."""


@dataclass(frozen=True)
class LossOptions:
    """Options of one call; see `cross_entropy`."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float | Tensor = 0.0
    softcap: float | None = None
    class_weights: Tensor | None = None
    """(V) floating."""
    return_lse: bool = False
    return_accuracy: bool = False
    return_predictions: bool = False
    return_z_loss: bool = False

    @classmethod
    def from_schema(
        cls,
        class_weights: Tensor | None,
        z_loss_tensor: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        softcap: float | None,
        return_lse: bool = False,
        return_accuracy: bool = False,
        return_predictions: bool = False,
    ) -> "LossOptions":
        """Return the options from op arguments, as made by `loss_arguments` and `output_arguments`."""
        factor = z_loss if z_loss_tensor is None else z_loss_tensor
        flags = (return_lse, return_accuracy, return_predictions)
        return cls(ignore_index, label_smoothing, factor, softcap, class_weights, *flags)

    def loss_arguments(self) -> tuple[Tensor | None, Tensor | None, int, float, float, float | None]:
        """Return the op arguments that loss and gradient depend on."""
        tensor, number = (self.z_loss, 0.0) if isinstance(self.z_loss, Tensor) else (None, self.z_loss)
        return self.class_weights, tensor, self.ignore_index, self.label_smoothing, number, self.softcap

    def output_arguments(self) -> tuple[bool, bool, bool]:
        """Return the op arguments for outputs other than the loss."""
        return self.return_lse, self.return_accuracy, self.return_predictions

    @property
    def has_z_loss(self) -> bool:
        """Whether there is a z-loss; a tensor counts as one, because its value is on the device."""
        return isinstance(self.z_loss, Tensor) or self.z_loss != 0.0

    def without_dynamic_floats(self, like: Tensor) -> "LossOptions":
        """Return the options with the z-loss as a tensor under `torch.compile`.

        A float would be a constant of the graph, so that a schedule would recompile at each new value.
        """
        if not torch.compiler.is_compiling() or isinstance(self.z_loss, Tensor) or self.z_loss == 0.0:
            return self
        factor = torch.ones((), dtype=torch.float32, device=like.device) * self.z_loss
        return LossOptions(
            self.ignore_index, self.label_smoothing, factor, self.softcap, self.class_weights, *self.output_arguments(),
            self.return_z_loss,
        )  # fmt: skip

    def check(self, targets: Tensor, shape: torch.Size, num_classes: int, reduction: str, **first: Tensor) -> None:
        """Raise unless the options are valid; `shape` is the leading shape of `first`, the logits or x by name."""
        if targets.shape != shape:
            raise ValueError(f"targets has shape {tuple(targets.shape)}: expected {tuple(shape)}, the leading dimensions")
        factor, number = (self.z_loss, 0.0) if isinstance(self.z_loss, Tensor) else (None, self.z_loss)
        checks.check_dtype(checks.INTEGER, targets=targets)
        checks.check_dtype(checks.FLOATING, class_weights=self.class_weights, z_loss=factor)
        checks.check_device(**first, targets=targets, class_weights=self.class_weights, z_loss=factor)
        checks.check_int("ignore_index", self.ignore_index, -(2**63), 2**63 - 1)
        if self.softcap is not None:
            checks.check_number("softcap", self.softcap, above=0)
        checks.check_number("label_smoothing", self.label_smoothing, 0, 1)
        checks.check_number("z_loss", number, 0)
        checks.check_choice("reduction", reduction, ("none", "mean", "sum"))
        if factor is not None and factor.dim() > 0:
            raise ValueError(f"z_loss has shape {tuple(factor.shape)}: expected a number, or a tensor of shape ()")
        if self.class_weights is not None and self.class_weights.shape != (num_classes,):
            raise ValueError(
                f"class_weights has shape {tuple(self.class_weights.shape)}: expected ({num_classes},), one for each class"
            )
        for name, x in (("class_weights", self.class_weights), ("z_loss", factor)):
            if x is not None and x.requires_grad:
                raise ValueError(f"{name} requires a gradient: expected a tensor without, because there is none for it")

    def target_weights(self, targets: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the class weight of each target (...), 0 for ignored targets; None without class weights."""
        if self.class_weights is None:
            return None
        weights = self.class_weights.to(dtype)[targets.long().clamp(0, self.class_weights.shape[0] - 1)]
        return weights.masked_fill(targets == self.ignore_index, 0.0)

    def output(
        self, losses: Tensor, targets: Tensor, reduction: Reduction, lse: Tensor | None, predicted: Tensor | None
    ) -> Any:
        """Return the reduced loss, or a `CrossEntropyOutput` if more is requested. Does not synchronize.

        losses (...), or their sum; lse (...) if lse or the z-loss is requested; predicted (...): the predictions, or, for the
        accuracy alone, whether each one is correct.
        """
        counted = targets != self.ignore_index
        weights = self.target_weights(targets, losses.dtype)

        def reduced(x: Tensor) -> Tensor:
            if reduction == "none":
                return x
            if reduction == "sum":
                return x.sum()
            total = (counted if weights is None else weights).sum()
            # If nothing counts, the mean is 0.
            return x.sum() / (total.clamp(min=1) if weights is None else torch.where(total != 0, total, 1.0))

        loss = reduced(losses)
        if not (self.return_lse or self.return_accuracy or self.return_predictions or self.return_z_loss):
            return loss
        accuracy = z_loss = None
        if self.return_accuracy and predicted is not None:
            right = predicted if predicted.dtype == torch.bool else (predicted == targets) & counted
            accuracy = right.sum().float() / counted.sum().clamp(min=1)
        if self.return_z_loss and lse is not None:
            factor = self.z_loss if weights is None else self.z_loss * weights
            z_loss = reduced((factor * lse.detach().square()).masked_fill(~counted, 0.0))
        return CrossEntropyOutput(
            loss, lse if self.return_lse else None, accuracy, predicted if self.return_predictions else None, z_loss
        )
