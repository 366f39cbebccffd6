"""What each process of a job does for its checkpoints."""

from typing import Any

import torch

from ...model.transformer import TransformerLM
from ..checkpoint.joined import joined_parts
from ..checkpoint.writer import CheckpointWriter
from ..config import TrainConfig
from ..distributed import World
from ..schedule import decay_start


def open_writer(config: TrainConfig, world: World) -> CheckpointWriter:
    """Return what writes this process's part of the checkpoints: all of it, a shard, or nothing."""
    layout, keep = world.layout, (config.keep_checkpoints, decay_start(config))
    if world.size > 1 and (layout.sharded or layout.tp > 1):
        from ..checkpoint.sharded import ShardedCheckpointWriter  # slow to import

        with torch.device("meta"):
            joined = joined_parts(TransformerLM(config.model))
        return ShardedCheckpointWriter(config.out, *keep, joined)
    writer = CheckpointWriter if world.is_first else _IdleWriter
    return writer(config.out, *keep)


class _IdleWriter(CheckpointWriter):
    """Of a process whose tensors another one writes."""

    def _open(self) -> None:
        pass

    def save(self, *args: Any, **kwargs: Any) -> None:
        pass
