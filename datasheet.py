"""Datasheet figures of NVIDIA GPUs by product: dense peaks by dtype, and memory bandwidth. Imports no torch."""

import re
from dataclasses import dataclass
from itertools import permutations


@dataclass(frozen=True)
class GPU:
    """Datasheet figures of one product: dense peaks (no sparsity) in TFLOP/s by dtype, memory bandwidth in TB/s."""

    name: str
    fp32: float
    tf32: float
    bf16: float
    fp8: float | None
    bandwidth: float

    def peak_flops(self, dtype: str) -> float | None:
        """Return the dense peak in FLOP/s for `fp32`, `tf32`, `bf16` (also `fp16`) or `fp8`; None where the GPU has none."""
        tflops = {"fp32": self.fp32, "tf32": self.tf32, "bf16": self.bf16, "fp16": self.bf16, "fp8": self.fp8}
        if dtype not in tflops:
            raise ValueError(f"dtype {dtype!r} is unknown: choose one of {', '.join(tflops)}")
        peak = tflops[dtype]
        return None if peak is None else peak * 1e12


# Keyed by the whole name that the driver reports, because "H100" alone is three products with three peaks.
# Sources: NVIDIA's datasheets, the figures without sparsity. GeForce: with float32 accumulation.
GPUS: dict[str, GPU] = {
    "NVIDIA A100-SXM4-80GB": GPU("A100 SXM 80GB", 19.5, 156, 312, None, 2.04),
    "NVIDIA H100 80GB HBM3": GPU("H100 SXM", 67, 494.7, 989.4, 1979, 3.35),
    "NVIDIA H100 PCIe": GPU("H100 PCIe", 51, 378, 756, 1513, 2.0),
    "NVIDIA H100 NVL": GPU("H100 NVL", 60, 417.5, 835.5, 1671, 3.9),
    "NVIDIA H200": GPU("H200 SXM", 67, 494.7, 989.4, 1979, 4.8),
    "NVIDIA B200": GPU("B200", 80, 1125, 2250, 4500, 8.0),
    "NVIDIA L40S": GPU("L40S", 91.6, 183, 362, 733, 0.864),
    "NVIDIA L4": GPU("L4", 30.3, 60, 121, 242, 0.3),
    "NVIDIA GeForce RTX 4090": GPU("RTX 4090", 82.6, 82.6, 165.2, 330.3, 1.01),
    "NVIDIA GeForce RTX 3090": GPU("RTX 3090", 35.6, 35.6, 71, None, 0.936),
}


def find_gpu(name: str) -> GPU | None:
    """Return the product of a driver's name, or of words of its name in `GPUS`: `h200`, `H100 PCIe`, `rtx4090`, `NVIDIA L4`.

    Ignores case, blanks, hyphens, underscores, and the words NVIDIA and GeForce. None for an unknown product, and for a name
    that several products share, such as `h100`.
    """
    wanted = _squeezed(name)
    of_driver = [gpu for driver, gpu in GPUS.items() if wanted == _squeezed(driver)]
    matches = of_driver or [gpu for gpu in GPUS.values() if wanted in _short_names(gpu.name)]
    return matches[0] if len(matches) == 1 else None


def _squeezed(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())


def _short_names(name: str) -> set[str]:
    words = name.lower().split()
    return {"".join(some) for count in range(1, len(words) + 1) for some in permutations(words, count)}
