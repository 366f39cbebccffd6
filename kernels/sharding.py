"""DTensor support of ops: which of their tensors share a sharding. Importing this module does not import DTensor."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any


def row_shardings(num_dims: int, outputs: Sequence[str], inputs: Sequence[str | None]) -> list[tuple[list[Any], list[Any]]]:
    """Return the choices for PyTorch's `register_sharding`: pairs of output and input placements.

    Each kind is "rows" (all sharded along the same dimension), "whole" (replicated) or "sum" (each process holds a partial
    sum). Rows may be sharded along each of their first `num_dims` dimensions, or everything is replicated. None marks an
    input that is not a tensor.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    choices = [{"rows": Shard(dim), "whole": Replicate(), "sum": Partial(), None: None} for dim in range(num_dims)]
    choices.append({"rows": Replicate(), "whole": Replicate(), "sum": Replicate(), None: None})
    return [([choice[kind] for kind in outputs], [choice[kind] for kind in inputs]) for choice in choices]


def sharded_as(op: Any, rule: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the fake of `op`, so that the op accepts DTensors. `rule` maps the op's arguments to its sharding choices.

    Importing DTensor takes a second, so the rule is registered on the first call of the fake after that import. This is in
    time, because PyTorch calls the fake for the shape of a DTensor before it looks up the rule.
    """

    def decorate(fake: Callable[..., Any]) -> Callable[..., Any]:
        is_registered = False

        @functools.wraps(fake)
        def fake_with_sharding(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_registered
            if not is_registered and "torch.distributed.tensor" in sys.modules:
                is_registered = True
                _register(op.overload, rule)
            return fake(*args, **kwargs)

        return fake_with_sharding

    return decorate


def _register(op: Any, rule: Callable[..., Any]) -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    register_sharding(op)(rule)
    # Without this, the cache of sharding choices ignores arguments before the first integer, such as flags or eps.
    infos = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    infos[op] = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)
