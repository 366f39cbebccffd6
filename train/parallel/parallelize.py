"""Data, tensor and context parallelism of a loss module over the processes of a job."""

import contextlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...model.transformer import TransformerLM
from ..checkpoint.joined import TP_MESH, order_rows_by_process
from ..distributed import World
from .sequences import assign_sequence_parts
from .tensor import divide_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def compile_blocks(blocks: nn.ModuleList) -> None:
    """Compile the forward pass of each block separately, so that gradient reduction overlaps the backward pass."""
    for block in blocks:
        # The method, not the module: the FSDP hooks stay outside the graph, and parameters keep their names.
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)


def place(loss: nn.Module, model: TransformerLM, device: torch.device) -> None:
    """Move `loss`, with its `model`, to the device. Weights on the meta device get uninitialized memory."""
    if _has_weights(model):
        loss.to(device)
        return
    loss.to_empty(device=device)
    model.make_tables(device)


def parallelize(loss: nn.Module, model: TransformerLM, world: World, dtype: torch.dtype) -> nn.Module:
    """Return a module that computes `loss` on this process's rows and averages the gradients over all processes.

    The first process holds the weights on the CPU, all others on the meta device; every process receives the weights of the
    first. If the weights of the first process are on the meta device as well, all weights stay uninitialized. Under fsdp or tp
    the parameters of `loss` become DTensors, which are gathered in `dtype`, one block at a time. Their gradients are reduced in
    float32.
    """
    layout = world.layout
    assign_sequence_parts(model, world)
    # DDP does not support DTensors. With tp and ddp, FSDP2 replicates the weights over a mesh with one shard.
    if layout.sharded or layout.tp > 1:
        return _shard(loss, model, world, dtype)
    place(loss, model, world.device)
    # The buffers are constant and equal in all processes: DDP need not broadcast them.
    constant = [name for name, _ in loss.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, constant)
    device_ids = [world.device] if world.device.type == "cuda" else None
    # DDP broadcasts the weights of the first process.
    return DistributedDataParallel(loss, device_ids=device_ids, gradient_as_bucket_view=True)


def _shard(loss: nn.Module, model: TransformerLM, world: World, dtype: torch.dtype) -> nn.Module:
    # Slow to import.
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    has_weights = world.on_first(lambda: _has_weights(model))
    weights: dict[str, Any] = loss.state_dict() if world.is_first else {}
    # On the meta device, so that only the shards are ever allocated.
    loss.to("meta")
    mesh = _data_mesh(model, world)
    # Inputs are not cast, so that the RoPE tables stay float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, loss):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    place(loss, model, world.device)
    if has_weights:
        if world.layout.tp > 1:
            weights = {**order_rows_by_process(weights, loss, world.layout.tp)}
        # Broadcasts one tensor at a time: at most one whole tensor is in memory.
        set_model_state_dict(loss, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return loss


def _data_mesh(model: TransformerLM, world: World) -> "DeviceMesh":
    """Divide the layers over the tp processes, and return the mesh over which FSDP2 shards weights and reduces gradients."""
    from torch.distributed.device_mesh import init_device_mesh

    layout, device = world.layout, world.device.type
    if layout.tp == 1:
        return init_device_mesh(device, (world.size,))
    replicas, shards = (1, world.num_replicas) if layout.sharded else (world.num_replicas, 1)
    mesh = init_device_mesh(device, (replicas, shards, layout.tp), mesh_dim_names=("replicas", "shards", TP_MESH))
    # Lets DTensor reduce a norm over both dimensions at once.
    mesh["shards", TP_MESH]._flatten()
    divide_layers(model, mesh[TP_MESH])
    return mesh["shards"] if layout.sharded else mesh["replicas", "shards"]


def _has_weights(model: TransformerLM) -> bool:
    return not model.token_embeddings.weight.is_meta


def gradient_sync(module: Any, last: bool) -> AbstractContextManager[None]:
    """Synchronize the gradients of a parallelized module only on the last micro-batch; accumulate them before."""
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(last)
        module.set_is_last_backward(last)
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else contextlib.nullcontext()


def reshard(module: Any) -> None:
    """Free the weights that forward passes without a backward pass have gathered: an update of the shards makes them stale."""
    if hasattr(module, "reshard"):
        module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a DTensor, or any other tensor itself."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()
