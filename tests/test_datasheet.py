import pytest

from tilewright.datasheet import GPUS, find_gpu


def test_missing_and_unknown_dtypes():
    assert GPUS["NVIDIA A100-SXM4-80GB"].peak_flops("fp8") is None
    with pytest.raises(ValueError, match="'int8' is unknown"):
        GPUS["NVIDIA H200"].peak_flops("int8")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_peaks_are_ordered_by_precision(gpu):
    assert gpu.fp32 <= gpu.tf32 < gpu.bf16
    assert gpu.fp8 is None or gpu.fp8 == pytest.approx(2 * gpu.bf16, rel=0.02)


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("h200", "H200 SXM"),
        ("A100", "A100 SXM 80GB"),
        ("h100 pcie", "H100 PCIe"),
        ("RTX-4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX_4090", "RTX 4090"),
        ("geforce 3090", "RTX 3090"),
        ("pcie H100", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("l4", "L4"),
    ],
)
def test_find_gpu_by_short_name(name, product):
    gpu = find_gpu(name)
    assert gpu is not None
    assert gpu.name == product


@pytest.mark.parametrize("name", ["h100", "H300", "NVIDIA H100", "", "NVIDIA"])
def test_ambiguous_or_unknown_name_gives_none(name):
    assert find_gpu(name) is None


# Dense TFLOP/s of fp32, tf32, bf16 and fp8, and TB/s.
DATASHEETS = {
    "A100 SXM 80GB": (19.5, 156, 312, None, 2.04),
    "H100 SXM": (67, 494.7, 989.4, 1979, 3.35),
    "H100 PCIe": (51, 378, 756, 1513, 2.0),
    "H100 NVL": (60, 417.5, 835.5, 1671, 3.9),
    "H200 SXM": (67, 494.7, 989.4, 1979, 4.8),
    "B200": (80, 1125, 2250, 4500, 8),
    "L40S": (91.6, 183, 362, 733, 0.864),
    "L4": (30.3, 60, 121, 242, 0.3),
    "RTX 4090": (82.6, 82.6, 165.2, 330.3, 1.01),
    "RTX 3090": (35.6, 35.6, 71, None, 0.936),
}


@pytest.mark.parametrize(("name", "figures"), DATASHEETS.items(), ids=DATASHEETS)
def test_datasheet_figures(name, figures):
    gpu = find_gpu(name)
    assert gpu is not None
    assert (gpu.fp32, gpu.tf32, gpu.bf16, gpu.fp8, gpu.bandwidth) == figures
    assert len(DATASHEETS) == len(GPUS)
