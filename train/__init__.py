"""From a corpus to a trained model: text to tokens, tokens to batches, batches to steps, steps to checkpoints."""

from .config import DataConfig, OptimizerConfig, TrainConfig, load_config
from .loop import TrainResult, train
from .presets import PRESETS, preset
from .run import SampleConfig, load_run, write_texts

__all__ = [
    "PRESETS",
    "DataConfig",
    "OptimizerConfig",
    "SampleConfig",
    "TrainConfig",
    "TrainResult",
    "load_config",
    "load_run",
    "preset",
    "train",
    "write_texts",
]
