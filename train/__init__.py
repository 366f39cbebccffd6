"""From a corpus to a trained model: text to tokens, tokens to batches, batches to steps, steps to checkpoints."""

from .config import DataConfig, OptimizerConfig, TrainConfig, load_config
from .presets import PRESETS, preset
from .pretrained import TextModel, load_run, load_text_model
from .run import TrainResult, train
from .sample import SampleConfig, write_texts

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
