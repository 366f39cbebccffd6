"""Log losses in bits per byte, which are comparable across tokenizers."""

import math

import torch

from ...tokenizer import AnyTokenizer
from ..bits_per_byte import bits_per_byte, bytes_per_token, finite, token_sizes
from ..trainer import Trainer
from .callback import Callback, Pause


class BitsPerByte(Callback):
    """Adds `bits_per_byte` of the step's text to every row, and `valid_bits_per_byte` to rows with a validation loss.

    The training loss includes z-loss and router loss.
    """

    def __init__(self, trainer: Trainer, tokenizer: AnyTokenizer) -> None:
        super().__init__(trainer)
        sizes = token_sizes(tokenizer)
        self._valid_bytes_per_token = bytes_per_token(trainer.validation.batches(1), sizes)
        self._sizes = sizes.to(trainer.device)

    def in_pause(self, pause: Pause) -> None:
        """Count the bytes of the last step's targets on the device, and add the metrics."""
        row = pause.row
        if pause.num_steps:
            targets = self.trainer.targets
            scored = targets >= 0
            counts = torch.stack([(self._sizes[targets.clamp(min=0)] * scored).sum(), scored.sum()])
            num_bytes, num_tokens = self.trainer.world.sum(counts).tolist()
            loss = math.nan if row["loss"] is None else row["loss"]
            row["bits_per_byte"] = finite(bits_per_byte(loss, num_bytes / max(1, num_tokens)))
        if "valid_loss" in row:
            row["valid_bits_per_byte"] = finite(self.of_validation(row["valid_loss"]))

    def of_validation(self, loss: float) -> float:
        """Convert a validation loss from nats per token to bits per byte."""
        return bits_per_byte(loss, self._valid_bytes_per_token)
