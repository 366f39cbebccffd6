"""The checkpoint writer of each process."""

from typing import Any

import torch

from ...model.transformer import TransformerLM
from ..checkpoint.joined import joined_parts
from ..checkpoint.writer import CheckpointWriter
from ..config import TrainConfig
from ..distributed import World
from ..schedule import decay_start


def open_writer(config: TrainConfig, world: World) -> CheckpointWriter:
    """Return the checkpoint writer of this process: it writes whole checkpoints, a shard of each, or nothing."""
    layout, keep = world.layout, (config.keep_checkpoints, decay_start(config))
    if world.size > 1 and (layout.sharded or layout.tp > 1):
        from ..checkpoint.sharded import ShardedCheckpointWriter  # slow to import

        with torch.device("meta"):
            joined = joined_parts(TransformerLM(config.model))
        return ShardedCheckpointWriter(config.out, *keep, joined)
    writer = CheckpointWriter if world.is_first else _IdleWriter
    return writer(config.out, *keep)


class _IdleWriter(CheckpointWriter):
    """Writes nothing: another process writes the same tensors."""

    def _open(self) -> None:
        pass

    def save(self, *args: Any, **kwargs: Any) -> None:
        pass
