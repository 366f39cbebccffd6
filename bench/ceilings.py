"""Speed limits of the hardware: a copy and matrix products measured in the same run, and the datasheet."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..datasheet import GPU
from ..kernels.device import gpu_of
from ..kernels.op import Cost
from .timing import time_variants


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of the GPU: bandwidth of a copy in bytes/s, speed of a product in FLOP/s, by default in bfloat16."""

    copy: float
    matmul: float
    gpu: GPU | None = None
    """Datasheet of the GPU; None if the table lacks it."""
    fp8: float | None = None
    """Speed of a product in fp8; None if it was not measured."""
    dtype: Literal["bf16", "fp8"] = "bf16"
    """Dtype of the products."""

    def of(self, dtype: Literal["bf16", "fp8"]) -> "Ceilings":
        """Return the limits for products in `dtype`; fp8 that was not measured is twice as fast as bfloat16."""
        return self if dtype == self.dtype else replace(self, matmul=self.fp8 or 2 * self.matmul, dtype=dtype)

    def shares(self, cost: Cost, seconds: float) -> dict[str, Any]:
        """Return the shares of the measured and of the datasheet's roofline that `seconds` reaches, with a note above 1.

        A share above 1 of the datasheet is a measuring error. Above the measured ceiling it can be one too, or the ceiling was
        measured too low.
        """
        measured = cost.seconds(self.copy, self.matmul) / seconds
        peak = self.gpu and self.gpu.peak_flops(self.dtype)
        printed = None if self.gpu is None or peak is None else cost.seconds(self.gpu.bandwidth * 1e12, peak) / seconds
        shares: dict[str, Any] = {"share_of_roofline": measured, "share_of_datasheet": printed}
        if measured > 1:
            shares["suspicious"] = "above the ceiling"
        if printed is not None and printed > 1:
            shares["suspicious"] = "above the datasheet: a measuring error"
        return shares


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Return the bandwidth of a copy of `size` bytes on the device, in bytes/s; reads and writes both count."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    times = time_variants({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.nbytes / (times.p50_ms * 1e-3)


def _product(device: torch.device, size: int, call: Any) -> float:
    times = time_variants({"product": call}, device)["product"]
    return 2 * size**3 / (times.p50_ms * 1e-3)


def matmul_speed(device: torch.device, size: int = 8192) -> float:
    """Return the speed of a bfloat16 product of two random (size, size) matrices, in FLOP/s."""
    # With zeros a GPU draws less power and runs faster.
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return _product(device, size, lambda: a @ b)


def fp8_matmul_speed(device: torch.device, size: int = 8192) -> float:
    """Return the speed of an e4m3 product of two random (size, size) matrices with one scale each, in FLOP/s."""

    def draw() -> Tensor:
        return torch.randn(size, size, device=device).to(torch.float8_e4m3fn)

        # The tensor cores need the second operand in column-major order.

    a, b, one = draw(), draw().t(), torch.ones((), device=device)
    product: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return _product(device, size, lambda: product(a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))


class Device:
    """The measured device and its ceilings, which are measured on first use."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.gpu = gpu_of(device)

    @cached_property
    def fp8(self) -> tuple[float | None, str | None]:
        """Speed of an fp8 product, or None and the reason."""
        if torch.cuda.get_device_capability(self.device) < (8, 9):
            return None, "this GPU has no fp8"
        try:
            return fp8_matmul_speed(self.device), None
        except (RuntimeError, ValueError) as error:
            return None, f"{type(error).__name__}: {error}"[:200]

    @cached_property
    def ceilings(self) -> Ceilings:
        """Ceilings of a copy and of products."""
        return Ceilings(copy_bandwidth(self.device), matmul_speed(self.device), self.gpu, self.fp8[0])

    def ceiling_rows(self) -> Iterator[dict[str, Any]]:
        """Yield each measured ceiling with its datasheet value."""
        bandwidth = self.gpu and self.gpu.bandwidth * 1e12
        yield {"case": "ceiling", "variant": "copy of 1 GiB", **_row("gb_per_s", 1e9, self.ceilings.copy, bandwidth)}
        peaks = {dtype: self.gpu and self.gpu.peak_flops(dtype) for dtype in ("bf16", "fp8")}
        matmul = _row("tflop_per_s", 1e12, self.ceilings.matmul, peaks["bf16"])
        yield {"case": "ceiling", "variant": "bfloat16 product 8192^3", **matmul}
        speed, reason = self.fp8
        fp8 = {"case": "ceiling", "variant": "fp8 product 8192^3"}
        yield fp8 | ({"not_measured": reason} if speed is None else _row("tflop_per_s", 1e12, speed, peaks["fp8"]))


def _row(name: str, unit: float, measured: float, datasheet: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {name: measured / unit, f"datasheet_{name}": datasheet and datasheet / unit}
    if datasheet:
        row["share_of_datasheet"] = measured / datasheet
        if measured > datasheet:
            row["suspicious"] = "above the datasheet: a measuring error"
    return row
