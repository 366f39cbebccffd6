"""The part of each sequence that a process computes, under sequence and context parallelism."""

from ...model.sequence_parts import SequenceParts
from ...model.transformer import TransformerBlock, TransformerLM
from ..distributed import World


def assign_sequence_parts(model: TransformerLM, world: World) -> None:
    """Set this process's part of each sequence in the model and its attention, if several processes share a sequence."""
    layout = world.layout
    if layout.tp * layout.cp == 1:
        return
    group = ""
    if layout.cp > 1:
        from torch.distributed.device_mesh import init_device_mesh  # slow to import

        sizes = (world.num_readers, layout.cp, layout.tp)
        group = init_device_mesh(world.device.type, sizes, mesh_dim_names=("readers", "cp", "tp"))["cp"].get_group().group_name
    cp_rank, tp_rank = divmod(world.rank % (layout.cp * layout.tp), layout.tp)
    parts = SequenceParts(tp_rank, layout.tp, cp_rank, layout.cp, group)
    model.parts = parts
    for layer in model.layers:
        assert isinstance(layer, TransformerBlock)
        layer.attn.parts = parts
