"""What a run tells of its steps: rows of metrics, lines on the console, and a bar that shows how far it is."""

import math
import sys
from typing import Any, Literal

from tqdm import tqdm

from ..metrics import MetricLog
from ..trainer import Trainer
from .callback import Callback, Pause


class Log(Callback):
    """Writes the row of every pause to the run's metrics, and shows it."""

    def __init__(self, trainer: Trainer, metrics: MetricLog | None) -> None:
        """Write to `metrics`, or nowhere in a process that is not the first."""
        super().__init__(trainer)
        self.every, self._metrics = self.config.log_every, metrics
        self._rows: list[dict[str, Any]] = []
        self._bar = tqdm(
            total=self.config.steps,
            initial=trainer.step,
            desc=f"train {self.config.out.name}",
            unit="step",
            disable=None if trainer.world.is_first else True,
        )

    def after_step(self) -> None:
        """Move the bar."""
        self._bar.update()

    def in_pause(self, pause: Pause) -> None:
        """Write and show the row, where it is finished."""
        if not pause.finished:
            return
        step, row = self.trainer.step, pause.row
        self._rows.append({name: row.get(name) for name in ("loss", "bits_per_byte")})
        if self._metrics is None:
            return
        self._metrics.log(step, **row)
        self._bar.set_postfix(loss=_number(row["loss"], ".3f"), tokens_per_s=f"{row['tokens_per_second']:,.0f}")
        if "valid_loss" in row or not sys.stderr.isatty():
            tqdm.write(_line(step, self.config.steps, row), file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def mean_of_last(self, name: Literal["loss", "bits_per_byte"]) -> float:
        """Return the mean of the last tenth of the rows that have a number there; NaN where none has."""
        values = [row[name] for row in self._rows if row[name] is not None]
        tail = values[-max(1, len(values) // 10) :]
        return sum(tail) / len(tail) if tail else math.nan


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _loss(nats: float | None, bits: float | None) -> str:
    return _number(nats, ".4f") + ("" if bits is None else f" ({bits:.4f} bits/byte)")


def _line(step: int, steps: int, row: dict[str, Any]) -> str:
    parts = [f"step {step:>{len(str(steps))}}/{steps}", f"loss {_loss(row['loss'], row.get('bits_per_byte'))}"]
    if "valid_loss" in row:
        parts.append(f"valid {_loss(row['valid_loss'], row['valid_bits_per_byte'])}")
    for name in (name for name in row if name.startswith("valid_loss/")):
        parts.append(f"{name.removeprefix('valid_loss/')} {_number(row[name], '.4f')}")
    parts += [f"grad norm {_number(row['grad_norm'], '.3f')}", f"lr {row['lr']:.2e}"]
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.1%}  HFU {row['hfu']:.1%}")
    if "peak_memory_bytes" in row:
        parts.append(f"peak {row['peak_memory_bytes'] / 1e9:.1f} GB")
    if row["data_wait"] >= 0.005:
        parts.append(f"waited for data {row['data_wait']:.1%}")
    if row["skipped_steps"]:
        parts.append(f"skipped {row['skipped_steps']}")
    return "  ".join(parts)
