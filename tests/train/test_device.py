import pytest
import torch

from tilewright.errors import UserError
from tilewright.train.device import prepare_allocator, resolve_device, resolve_dtype


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(UserError, match="'cuda' is not there"):
        resolve_device("cuda")
    for name in ("tpu9000", "meta", "mps"):
        with pytest.raises(UserError, match=f"'{name}' is unknown"):
            resolve_device(name)


def test_the_allocator_is_set_up_unless_the_environment_does(monkeypatch):
    settings = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    # Asking for the memory or the dtypes of a GPU starts CUDA.
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
    # More than is free in any segment of before, which tensors that others still hold have kept.
    blocks = [block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"]]
    free = max((block["size"] for block in blocks if block["state"] == "inactive"), default=0)
    kept = torch.empty((1 << 28) + free, dtype=torch.uint8, device="cuda")
    segments = torch.cuda.memory_snapshot()
    assert any(segment["is_expandable"] and segment["total_size"] >= kept.nbytes for segment in segments)
