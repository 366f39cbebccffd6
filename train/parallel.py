"""A model spread over the processes of a job, whole in each (DDP) or in shards (FSDP2), and its checkpoints."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .checkpoint.writer import CheckpointWriter
from .config import TrainConfig
from .distributed import World


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Compile each block's forward pass by itself, so that gradients travel while the blocks before still compute theirs."""
    for block in blocks:
        # The method, not the module: the hooks that gather shards stay outside, and parameters keep their names.
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


def spread(loss: nn.Module, blocks: nn.ModuleList, world: World, config: TrainConfig, dtype: torch.dtype) -> nn.Module:
    """Return what computes `loss` on this process's rows and leaves in each parameter the mean of all processes' gradients.

    Under fsdp the parameters of `loss` become DTensors, gathered in `dtype` block by block, their gradients reduced in float32.
    """
    if config.parallel == "fsdp":
        return _shard(loss, blocks, world, dtype)
    loss.to(world.device)
    # Each process makes the same ones, and none changes them.
    constant = [name for name, _ in loss.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, constant)
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(loss, device_ids=device_ids, gradient_as_bucket_view=True)


def _shard(loss: nn.Module, blocks: nn.ModuleList, world: World, dtype: torch.dtype) -> nn.Module:
    # Slow to import.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    # Inputs are left alone: the tables of RoPE stay float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Each block moves to the device when it is sharded: the whole model never lies on one GPU.
    for module in (*blocks, loss):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return loss


def open_writer(config: TrainConfig, world: World) -> CheckpointWriter:
    """Return what writes this process's part of the checkpoints: all of it, a shard, or nothing."""
    if world.size > 1 and config.parallel == "fsdp":
        from .checkpoint.sharded import ShardedCheckpointWriter  # slow to import

        return ShardedCheckpointWriter(config.out, config.keep_checkpoints)
    writer = CheckpointWriter if world.is_first else _IdleWriter
    return writer(config.out, config.keep_checkpoints)


class _IdleWriter(CheckpointWriter):
    """Of a process whose tensors another one writes."""

    def _open(self) -> None:
        pass

    def save(self, *args: Any, **kwargs: Any) -> None:
        pass


def exchanging_gradients(module: Any, last: bool) -> AbstractContextManager[None]:
    """Within this, passes through what `spread` gave exchange gradients only if `last`: before that they are added up."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
        module.set_is_last_backward(last)
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else contextlib.nullcontext()


def forget_gathered(module: Any) -> None:
    """Free the weights that passes without a backward pass have gathered: they do not follow the shards."""
    if hasattr(module, "reshard"):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor itself, or what the shards of a DTensor are together."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()
