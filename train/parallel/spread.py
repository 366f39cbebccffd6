"""A module that gives the processes of a job one loss, and the mean of all their gradients."""

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...model.transformer import TransformerLM
from ..checkpoint.joined import TP_MESH, in_order_of_processes
from ..distributed import World
from .sequences import give_parts
from .tensor import divide_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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


def spread(loss: nn.Module, model: TransformerLM, world: World, dtype: torch.dtype) -> nn.Module:
    """Return what computes `loss` on this process's rows and leaves in each parameter the mean of all processes' gradients.

    All processes get the weights that the first one's `model`, on the CPU, has; the others' is on the meta device. Where the
    first one's is as well, the weights may be anything. Under fsdp or tp the parameters of `loss` become DTensors, gathered in
    `dtype` block by block, their gradients reduced in float32.
    """
    layout = world.layout
    give_parts(model, world)
    # DDP knows no DTensors: with divided layers FSDP2 keeps each process's part whole.
    if layout.sharded or layout.tp > 1:
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
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    has_weights = world.on_first(lambda: _has_weights(model))
    weights: dict[str, Any] = loss.state_dict() if world.is_first else {}
    # So that memory is only ever had for the shards.
    loss.to("meta")
    mesh = _data_mesh(model, world)
    # Inputs are left alone: the tables of RoPE stay float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, loss):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    place(loss, model, world.device)
    if has_weights:
        if world.layout.tp > 1:
            weights = {**in_order_of_processes(weights, loss, world.layout.tp)}
        # One tensor after the other: no more than one is ever whole.
        set_model_state_dict(loss, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return loss


def _data_mesh(model: TransformerLM, world: World) -> "DeviceMesh":
    """Return the processes over which FSDP2 divides and reduces, once the layers are divided over the others."""
    from torch.distributed.device_mesh import init_device_mesh

    layout, device = world.layout, world.device.type
    if layout.tp == 1:
        return init_device_mesh(device, (world.size,))
    replicas, shards = (1, world.num_replicas) if layout.sharded else (world.num_replicas, 1)
    mesh = init_device_mesh(device, (replicas, shards, layout.tp), mesh_dim_names=("replicas", "shards", TP_MESH))
    # So that a norm is reduced over both at once.
    mesh["shards", TP_MESH]._flatten()
    divide_layers(model, mesh[TP_MESH])
    return mesh["shards"] if layout.sharded else mesh["replicas", "shards"]


def _has_weights(model: TransformerLM) -> bool:
    return not model.token_embeddings.weight.is_meta


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
