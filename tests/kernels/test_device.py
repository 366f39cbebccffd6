import pytest
import torch

from tilewright.kernels.device import GPUS, device_name, gpu_of, num_sms


def test_peaks_are_of_the_exact_product(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    gpu = gpu_of("cuda")
    assert gpu is not None
    assert gpu.peak_flops("bf16") == 756e12
    assert gpu.peak_flops("fp32") == 51e12


@pytest.mark.parametrize("name", ["NVIDIA H100", "NVIDIA H200 NVL", "Tesla T4", ""])
def test_an_unknown_product_has_no_peak(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu_of("cuda") is None


def test_a_cpu_has_no_peak():
    assert gpu_of("cpu") is None
    assert device_name("cpu") == "CPU"
    assert num_sms(torch.device("cpu")) >= 1


def test_missing_and_unknown_dtypes():
    assert GPUS["NVIDIA A100-SXM4-80GB"].peak_flops("fp8") is None
    with pytest.raises(ValueError, match="'int8' is unknown"):
        GPUS["NVIDIA H200"].peak_flops("int8")


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_peaks_are_ordered_by_precision(gpu):
    assert gpu.fp32 <= gpu.tf32 < gpu.bf16
    assert gpu.fp8 is None or gpu.fp8 == pytest.approx(2 * gpu.bf16, rel=0.02)
