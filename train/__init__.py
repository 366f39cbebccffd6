"""From a corpus to a trained model: text to tokens, tokens to batches, batches to steps, steps to checkpoints."""

from .config import DataConfig, OptimizerConfig, TrainConfig, load_config
from .loop import TrainResult, train
from .presets import PRESETS, preset
from .run import load_run
from .samples import SampleConfig, write_texts
from .text_model import TextModel, load_text_model

__all__ = [
    "PRESETS",
    "DataConfig",
    "OptimizerConfig",
    "SampleConfig",
    "TextModel",
    "TrainConfig",
    "TrainResult",
    "load_config",
    "load_run",
    "load_text_model",
    "preset",
    "train",
    "write_texts",
]
