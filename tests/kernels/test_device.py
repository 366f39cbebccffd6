import pytest
import torch

from tilewright.kernels.device import device_name, gpu_of, l2_bytes, num_sms


def test_gpu_of_finds_the_exact_product(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    gpu = gpu_of("cuda")
    assert gpu is not None
    assert gpu.peak_flops("bf16") == 756e12
    assert gpu.peak_flops("fp32") == 51e12


@pytest.mark.parametrize("name", ["NVIDIA H100", "NVIDIA H200 NVL", "Tesla T4", ""])
def test_unknown_product_gives_none(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert gpu_of("cuda") is None


def test_cpu_has_launch_sizes_but_no_datasheet():
    assert gpu_of("cpu") is None
    assert device_name("cpu") == "CPU"
    assert num_sms(torch.device("cpu")) >= 1
    assert l2_bytes(torch.device("cpu")) >= 1
