"""The layout of a job, from the option `parallel`, and its limits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import UserError
from ..config import TrainConfig

if TYPE_CHECKING:
    from .world import World


@dataclass(frozen=True)
class Layout:
    """The parsed value of `--parallel`, such as "fsdp,tp=2,cp=2"."""

    sharded: bool = False
    """Whether weights are sharded over the processes (fsdp) or replicated (ddp)."""
    tp: int = 1
    """The number of processes over which heads and feed-forward widths are divided (tensor parallelism)."""
    cp: int = 1
    """The number of processes over which each sequence is divided (context parallelism)."""

    @classmethod
    def parse(cls, parallel: str) -> "Layout":
        """Parse the option. Raises a `UserError` if tp or cp occurs twice."""
        first, *rest = parallel.split(",")
        sizes = dict(part.split("=") for part in rest)
        if len(sizes) < len(rest):
            raise UserError(f"parallel is {parallel}: it must name tp and cp once at most")
        return cls(first == "fsdp", **{name: int(size) for name, size in sizes.items()})


ALONE = Layout()


def check_parallel(config: TrainConfig, world: "World") -> None:
    """Raise a `UserError` if the run cannot be divided over the processes of `world`."""
    if config.cuda_graphs and (world.size > 1 or world.device.type != "cuda"):
        raise UserError(
            f"cuda_graphs is set: it needs one process on a GPU, not {world.size} on {world.device.type}; "
            "choose --no-cuda-graphs"
        )
    layout = Layout.parse(config.parallel)
    _check_processes(config, layout, world.size)
    if layout.tp > 1:
        _check_tensor_parallel(config, layout.tp)
    if layout.tp * layout.cp > 1:
        _check_sequence(config, layout)


def _check_processes(config: TrainConfig, layout: Layout, size: int) -> None:
    share = layout.tp * layout.cp
    if size % share:
        raise UserError(
            f"parallel is {config.parallel}: the number of processes must be a multiple of {share}, not {size}; set it with "
            "torchrun --nproc-per-node"
        )
    what = "processes" if share == 1 else f"groups of {share} processes"
    for name in ("batch_size", "batch_start"):
        batch = getattr(config, name)
        if isinstance(batch, int) and batch % (size // share):
            raise UserError(f"{name} is {batch}: it must be a multiple of the number of {what}, {size // share}")


def _check_tensor_parallel(config: TrainConfig, tp: int) -> None:
    model = config.model
    for name, size in (("num_heads", model.num_heads), ("num_kv_heads", model.kv_heads), ("d_ff", model.d_ff)):
        if size % tp:
            raise UserError(f"model.{name} is {size}: with tp={tp} it must be a multiple of {tp}")
    for name, value, supported in (
        ("optimizer.name", config.optimizer.name, "adamw"),
        ("optimizer.states", config.optimizer.states, "float32"),
        ("weights", config.weights, "float32"),
    ):
        if value != supported:
            raise UserError(f"{name} is {value}: with tp={tp} choose {supported}")
    if config.precision.startswith("fp8"):
        raise UserError(f"precision is {config.precision}: with tp={tp} choose bfloat16 or float32")


def _check_sequence(config: TrainConfig, layout: Layout) -> None:
    model, sizes = config.model, f"tp={layout.tp},cp={layout.cp}"
    # Context parallelism gives each process two pieces of a sequence.
    parts = layout.tp * layout.cp * (2 if layout.cp > 1 else 1)
    if model.context_length % parts:
        raise UserError(f"model.context_length is {model.context_length}: with {sizes} it must be a multiple of {parts}")
    if model.num_experts is not None:
        raise UserError(f"model.num_experts is {model.num_experts}: experts need ddp or fsdp alone, not {sizes}")
    if config.sample_every is not None:
        raise UserError(f"sample_every is {config.sample_every}: with {sizes} it must be None (--sample-every None)")
