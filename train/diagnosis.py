"""Diagnose consecutive skipped steps: report the batch and the norms of every layer's outputs, weights and gradients."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_text
from .parallel import full_tensor
from .trainer import Trainer

FILE_NAME = "diagnosis.json"


def _norm(tensor: Tensor) -> float:
    return full_tensor(tensor.detach().float().norm()).item()


def _severity(norm: float) -> tuple[bool, float]:
    return not math.isfinite(norm), norm


def _first_not_finite(norms: dict[str, float]) -> str | None:
    return next((name for name, norm in norms.items() if not math.isfinite(norm)), None)


def diagnose(trainer: Trainer) -> dict[str, Any]:
    """Run the last step's batch again, and return its origin, its loss and the norms of each layer.

    Norms are Euclidean. Outputs are in execution order; each norm is that of the worst micro-batch. The gradients are freed
    afterwards.
    """
    step, world = trainer.step - 1, trainer.world
    samples = trainer.samples(step)
    outputs: dict[str, float] = {}

    def remember(name: str):
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            for part in output if isinstance(output, tuple) else (output,):
                if isinstance(part, Tensor):
                    outputs[name] = max(outputs.get(name, 0.0), _norm(part), key=_severity)

        return hook

    hooks = [module.register_forward_hook(remember(name)) for name, module in trainer.model.named_modules() if name]
    try:
        batch = (tensor.to(trainer.device) for tensor in trainer.train_data.batch(world.rows(samples)))
        with torch.compiler.set_stance("force_eager"):
            loss = float(trainer.backward(*batch))
    finally:
        for hook in hooks:
            hook.remove()
    everywhere = world.gather(outputs)
    outputs = {name: max((part[name] for part in everywhere), key=_severity) for name in outputs}
    weights = {name: _norm(p) for name, p in trainer.model.named_parameters()}
    gradients = {name: _norm(p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.optimizer.zero_grad()
    guard = {name: int(getattr(trainer.guard, name)) for name in ("taken", "skipped", "in_a_row", "most_in_a_row")}
    first = {
        "weights": _first_not_finite(weights),
        "outputs": _first_not_finite(outputs),
        "gradients": _first_not_finite(gradients),
    }
    places = [trainer.train_data.place(sample) for sample in samples]
    return {
        "step": step,
        "loss": loss,
        "guard": guard,
        "first_not_finite": first,
        "batch": [{"file": str(path), "first_token": start} for path, start in places],
        "output_norms": outputs,
        "weight_norms": weights,
        "gradient_norms": gradients,
    }


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    # JSON has no NaN and no infinity.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_diagnosis(run: Path, diagnosis: dict[str, Any]) -> Path:
    """Write a diagnosis to the run's folder and return the path; NaN and infinity become the strings "nan" and "inf"."""
    write_text(run / FILE_NAME, json.dumps(_to_json(diagnosis), indent=2) + "\n")
    return run / FILE_NAME


def summary(diagnosis: dict[str, Any]) -> str:
    """Summarize a diagnosis in one sentence."""
    found = [f"the {kind} of {name}" for kind, name in diagnosis["first_not_finite"].items() if name is not None]
    what = f"the first non-finite values are {' and '.join(found)}" if found else "all norms are finite"
    return f"the batch of step {diagnosis['step'] + 1} has a loss of {diagnosis['loss']:.4g}; {what}"
