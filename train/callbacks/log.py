"""Log the metrics of a run to its file, and show them on the console with a progress bar."""

import math
import sys
from typing import Any, Literal

from tqdm import tqdm
from tqdm.utils import disp_len

from ..metrics import MetricLog
from ..trainer import Trainer
from .callback import Callback, Pause

# Layouts of the progress bar, from wide to narrow. A narrow terminal drops the bar, then the times, then the name.
_LAYOUTS = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
    "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
    "{desc}: {n_fmt}/{total_fmt}{postfix}",
    "{n_fmt}/{total_fmt}{postfix}",
)


class ProgressBar(tqdm):
    """A progress bar with the widest layout that fits the terminal without truncation."""

    def __str__(self) -> str:
        meter: dict[str, Any] = dict(self.format_dict)
        width = meter.pop("ncols")
        for layout in _LAYOUTS:
            meter["bar_format"] = layout
            # Without ncols, the line is not truncated.
            if width is None or disp_len(self.format_meter(**meter)) <= width:
                break
        return self.format_meter(**meter, ncols=width)


class Log(Callback):
    """Writes the row of every pause to the run's metrics and to the console."""

    def __init__(self, trainer: Trainer, metrics: MetricLog | None) -> None:
        """Write to `metrics`, which is None in all processes except the first."""
        super().__init__(trainer)
        self.every, self._metrics = self.config.log_every, metrics
        self._rows: list[dict[str, Any]] = []
        self._bar = ProgressBar(
            total=self.config.steps,
            initial=trainer.step,
            desc=f"train {self.config.out.name}",
            dynamic_ncols=True,
            disable=None if trainer.world.is_first else True,
        )

    def after_step(self) -> None:
        """Advance the bar."""
        self._bar.update()

    def in_pause(self, pause: Pause) -> None:
        """Write and show the row if it is finished."""
        if not pause.finished:
            return
        step, row = self.trainer.step, pause.row
        self._rows.append({name: row.get(name) for name in ("loss", "bits_per_byte")})
        if self._metrics is None:
            return
        self._metrics.log(step, **row)
        self._bar.set_postfix_str(f"loss {_number(row['loss'], '.3f')}, {row['tokens_per_second']:,.0f} tokens/s")
        if "valid_loss" in row or not sys.stderr.isatty():
            tqdm.write(_line(step, self.config.steps, row), file=sys.stderr)

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()

    def mean_of_last(self, name: Literal["loss", "bits_per_byte"]) -> float:
        """Return the mean of `name` over the last tenth of the rows that have it; NaN if none has."""
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
