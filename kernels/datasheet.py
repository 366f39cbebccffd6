"""What GPUs can do, by exact product, from NVIDIA's datasheets: dense peaks by dtype, and memory bandwidth."""

from dataclasses import dataclass


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
    """Return the figures of the one product whose name holds all words of `name`, such as `h200` or `H100 PCIe`.

    The driver's whole name will do too; case does not matter. None for a product that is not in the table, and for a name
    that several share, as `h100` is.
    """
    words = set(name.lower().replace("-", " ").split())
    of_driver = [gpu for driver, gpu in GPUS.items() if words == set(driver.lower().replace("-", " ").split())]
    ours = [gpu for gpu in GPUS.values() if words and words <= set(gpu.name.lower().split())]
    matches = of_driver or ours
    return matches[0] if len(matches) == 1 else None
