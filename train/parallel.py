"""A model spread over the processes of a job, whole in each (DDP) or in shards (FSDP2), and its checkpoints."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..model.transformer import TransformerLM
from .checkpoint.writer import CheckpointWriter
from .config import TrainConfig
from .distributed import World


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Compile each block's forward pass by itself, so that gradients travel while the blocks before still compute theirs."""
    for block in blocks:
        # The method, not the module: the hooks that gather shards stay outside, and parameters keep their names.
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


def place(loss: nn.Module, model: TransformerLM, device: torch.device) -> None:
    """Move `loss`, with its `model`, to the device; weights of the meta device get memory there, with anything in it."""
    if _has_weights(model):
        loss.to(device)
        return
    loss.to_empty(device=device)
    model.make_tables(device)


def spread(loss: nn.Module, model: TransformerLM, world: World, config: TrainConfig, dtype: torch.dtype) -> nn.Module:
    """Return what computes `loss` on this process's rows and leaves in each parameter the mean of all processes' gradients.

    All processes get the weights that the first one's `model`, on the CPU, has; the others' is on the meta device. Where the
    first one's is as well, the weights may be anything. Under fsdp the parameters of `loss` become DTensors, gathered in
    `dtype` block by block, their gradients reduced in float32.
    """
    if config.parallel == "fsdp":
        return _shard(loss, model, world, dtype)
    place(loss, model, world.device)
    # Each process makes the same ones, and none changes them.
    constant = [name for name, _ in loss.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, constant)
    device_ids = [world.device] if world.device.type == "cuda" else None
    # Hands the first process's weights to the others.
    return DistributedDataParallel(loss, device_ids=device_ids, gradient_as_bucket_view=True)


def _shard(loss: nn.Module, model: TransformerLM, world: World, dtype: torch.dtype) -> nn.Module:
    # Slow to import.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    has_weights = world.on_first(lambda: _has_weights(model))
    weights = loss.state_dict() if world.is_first else {}
    # So that memory is only ever had for the shards.
    loss.to("meta")
    mesh = init_device_mesh(world.device.type, (world.size,))
    # Inputs are left alone: the tables of RoPE stay float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, loss):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    place(loss, model, world.device)
    if has_weights:
        # One tensor after the other: no more than one is ever whole.
        set_model_state_dict(loss, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return loss


def _has_weights(model: TransformerLM) -> bool:
    return not model.token_embeddings.weight.is_meta


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
