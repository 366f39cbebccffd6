"""Checkpoints: a folder of safetensors and JSON for each step, either whole or absent."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from ..files import atomic_folder

FORMAT = "tilewright-checkpoint-1"
FOLDER_NAME = "checkpoints"
_WEIGHTS, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def _folder(run: Path, step: int) -> Path:
    return run / FOLDER_NAME / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Return the run's checkpoints, oldest first."""
    return sorted((run / FOLDER_NAME).glob("step-*"))


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{key}.{names[p]}": value for p, state in optimizer.state.items() for key, value in state.items()}


def save_checkpoint(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> Path:
    """Write the state after `step` steps; then remove all but the newest `keep` checkpoints."""
    folder = _folder(run, step)
    # What a run that was killed in the middle of a save has left.
    for stale in folder.parent.glob(".step-*.tmp"):
        shutil.rmtree(stale)
    with atomic_folder(folder) as temporary:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary / _WEIGHTS)
        save_file({k: v.contiguous() for k, v in _optimizer_tensors(model, optimizer).items()}, temporary / _OPTIMIZER)
        (temporary / _STATE).write_text(json.dumps({"format": FORMAT, "step": step}) + "\n")
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return folder


def _read(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove its folder to go on from the checkpoint before") from error


def load_weights(folder: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into `model`; weights of other names or shapes are a `UserError`."""
    expected = model.state_dict()
    device = next(iter(expected.values())).device
    tensors = _read(folder / _WEIGHTS, device)
    for name in expected.keys() | tensors.keys():
        if name not in tensors or name not in expected:
            where = "the checkpoint" if name not in tensors else "the model"
            raise UserError(f"{folder} does not fit the model, {where} has no {name}: use the configuration it was made with")
        if tensors[name].shape != expected[name].shape:
            raise UserError(
                f"{folder} does not fit the model, {name} has shape {tuple(tensors[name].shape)} in the checkpoint, "
                f"{tuple(expected[name].shape)} in the model: use the configuration it was made with"
            )
    model.load_state_dict(tensors)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load weights and optimizer state; return the number of steps they have seen."""
    try:
        state = json.loads((folder / _STATE).read_text())
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r}")
        step = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a checkpoint ({error}): remove it to go on from the one before") from error
    load_weights(folder, model)
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    for key, value in _read(folder / _OPTIMIZER, device).items():
        kind, name = key.split(".", 1)
        optimizer.state[parameters[name]][kind] = value
    return step
