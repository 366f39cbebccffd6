"""Tensor and sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022) as a plan of DTensors for each block.

Attention heads and feed-forward widths are divided over the processes of a group. Hidden states between the layers are divided
by position. Norms, embedding and head are replicated; each process applies them to its own positions.
"""

import warnings
from typing import TYPE_CHECKING

from torch import nn

from ...model.layers import CausalSelfAttention
from ...model.transformer import TransformerLM

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def divide_layers(model: TransformerLM, mesh: "DeviceMesh") -> None:
    """Replace the parameters of a model on the meta device by DTensors with this process's part of each layer."""
    # Slow to import.
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    class Replicated(ParallelStyle):
        """Replicates the parameters of a module. The model reads them with `local`."""

        def _apply(self, module: nn.Module, device_mesh: "DeviceMesh") -> nn.Module:
            for name, parameter in list(module.named_parameters(recurse=False)):
                replicated = distribute_tensor(parameter, device_mesh, [Replicate()], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(replicated))
            return module

    colwise, rowwise = ColwiseParallel(input_layouts=Shard(1)), RowwiseParallel(output_layouts=Shard(1))
    styles: dict[str, ParallelStyle] = dict.fromkeys(("qkv_proj", "gate_up_proj", "up_proj"), colwise)
    styles |= dict.fromkeys(("output_proj", "down_proj"), rowwise)
    plan = {
        name: styles.get(name.split(".")[-1], Replicated()) for name, module in model.named_modules() if _has_parameters(module)
    }
    parallelize_module(model, mesh, plan, src_data_rank=None)
    # A block returns a view, but nothing modifies it in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    for layer in model.layers:
        attn = layer.attn
        assert isinstance(attn, CausalSelfAttention)
        attn.num_heads //= mesh.size()
        attn.num_kv_heads //= mesh.size()


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
