import pytest
import torch

from tilewright.errors import UserError
from tilewright.train.device import prepare_allocator, resolve_device, resolve_dtype


def test_resolve_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(UserError, match=r"device is 'cuda', but torch.cuda finds"):
        resolve_device("cuda")
    for name in ("tpu9000", "meta", "mps"):
        with pytest.raises(UserError, match=f"device is '{name}': expected"):
            resolve_device(name)


def test_allocator_settings_from_the_environment_take_precedence(monkeypatch):
    settings = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    # Queries of a GPU's memory or dtypes initialize CUDA.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    prepare_allocator(torch.device("cpu"))
    assert settings == []
    prepare_allocator(torch.device("cuda", 0))
    assert settings == ["expandable_segments:True"]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    prepare_allocator(torch.device("cuda", 0))
    assert settings == ["expandable_segments:True"]


@pytest.mark.gpu
def test_what_the_allocator_was_told_holds(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    torch.cuda.empty_cache()
    prepare_allocator(torch.device("cuda", 0))
    # Larger than any free block in segments that earlier tests have left allocated.
    blocks = [block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"]]
    free = max((block["size"] for block in blocks if block["state"] == "inactive"), default=0)
    kept = torch.empty((1 << 28) + free, dtype=torch.uint8, device="cuda")
    segments = torch.cuda.memory_snapshot()
    assert any(segment["is_expandable"] and segment["total_size"] >= kept.nbytes for segment in segments)
