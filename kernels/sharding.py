"""How ops take DTensors: which of their tensors are sharded alike. Importing this imports no DTensor."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any


def row_shardings(num_dims: int, outputs: Sequence[str], inputs: Sequence[str | None]) -> list[tuple[list[Any], list[Any]]]:
    """Return what `register_sharding` of PyTorch asks for: placements of all outputs and inputs, a pair for each choice.

    Each is one of "rows", sharded along one dimension all alike; "whole", replicated; "sum", of which each process has a part.
    Rows may be sharded along each of their first `num_dims` dimensions, or everything is replicated. None stands for an
    input that is no tensor.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    choices = [{"rows": Shard(dim), "whole": Replicate(), "sum": Partial(), None: None} for dim in range(num_dims)]
    choices.append({"rows": Replicate(), "whole": Replicate(), "sum": Replicate(), None: None})
    return [([choice[kind] for kind in outputs], [choice[kind] for kind in inputs]) for choice in choices]


def sharded_as(op: Any, rule: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the fake of `op`, so that the op takes DTensors as `rule` says: a function of the op's arguments.

    To import DTensor takes a second. PyTorch asks an op's fake for the shape of a DTensor before it looks for a rule, so that
    this is the time to register it.
    """

    def decorate(fake: Callable[..., Any]) -> Callable[..., Any]:
        is_registered = False

        @functools.wraps(fake)
        def known_to_dtensor(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_registered
            if not is_registered and "torch.distributed.tensor" in sys.modules:
                is_registered = True
                _register(op.overload, rule)
            return fake(*args, **kwargs)

        return known_to_dtensor

    return decorate


def _register(op: Any, rule: Callable[..., Any]) -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    register_sharding(op)(rule)
    # Else the choice is remembered without regard to arguments before the first integer: flags, or eps.
    infos = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    infos[op] = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)
