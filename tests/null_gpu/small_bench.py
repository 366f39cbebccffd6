"""The command line with smaller benchmarks and without checks of values: `python -m null_gpu.small_bench ARGUMENTS`.

The null GPU returns zeros, which would fail every check of values, so only shapes and dtypes are checked. The worker processes
of the bench get the same patches.
"""

import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from tilewright.bench import attention_oracle, check, kernels, op_peers, ops, real_run, training, tune, worker
from tilewright.cli import main
from tilewright.kernels.op import Arguments
from tilewright.model.sampler import Sampler
from tilewright.train.trainer import Trainer

RUN = ("--steps", "8", "--optimizer.warmup-steps", "2", "--log-every", "4", "--eval-every", "4", "--eval-sequences", "8")
"""A real run's options, after its own: a few steps."""


class _Shape:
    """Replacement for `check.Expected` that checks only the shape and the dtype."""

    def __init__(self, exact: Tensor, reference: Tensor) -> None:
        self.shape, self.dtype = exact.shape, reference.dtype
        assert reference.shape == exact.shape

    def check(self, own: Tensor, what: str) -> None:
        if own.shape != self.shape or own.dtype != self.dtype:
            raise check.WrongError(f"{what} is {own.dtype} {tuple(own.shape)} instead of {self.dtype} {tuple(self.shape)}")


def _no_error(own: Tensor, right: Tensor) -> float:
    assert own.shape == right.shape
    return 0.0


def _exact(arguments: Arguments, do: Tensor) -> dict[str, Tensor]:
    q, k, v = arguments.positional
    # The reference would take minutes on long sequences, for values that are not checked.
    names = ("result 0", "gradient 0", "gradient 1", "gradient 2") if q.requires_grad else ("result 0",)
    return {name: like.new_zeros(like.shape) for name, like in zip(names, (q, q, k, v), strict=False)}


def _shares(trainer: Trainer, step_s: float) -> dict[str, float]:
    """Return made-up shares, because the null GPU has no CUPTI for the profiler."""
    return {"matmul": 0.5, "attention": 0.25, "idle": 0.25}


def _cases(group: str) -> Iterator[ops.Case]:
    """Yield one shape of each kind, at full size."""
    kinds = set()
    for case in ops.cases(group):
        sizes = case.sizes
        special = [name in sizes for name in ("window", "document_lengths")]
        kind = (
            case.op.name,
            *special,
            *(sizes.get(name) for name in ("head_dim", "num_kv_heads")),
            sizes.get("num_queries") == 1,
        )
        if kind not in kinds:
            kinds.add(kind)
            yield case


def change() -> None:
    """Remove the checks of values and the slow host work, in this process and in its workers."""
    # If cuDNN makes no plan, as here, PyTorch dereferences a null pointer at the second call.
    torch.backends.cuda.enable_cudnn_sdp(False)
    attention = {name: peer for name, peer in op_peers.PEERS["attention"].items() if name != "SDPA cuDNN"}
    peers = {**op_peers.PEERS, "attention": attention}
    for owner, name, instead in (
        (check, "Expected", _Shape),
        (attention_oracle, "exact", _exact),
        (attention_oracle, "error_of", _no_error),
        (ops, "PEERS", peers),
        (kernels, "cases", _cases),
        (training, "_profile", _shares),
        (Sampler, "require_finite", lambda self: None),  # no value is finite here
        (real_run, "MEGABYTES", 2.0),
        (real_run, "VALID_MEGABYTES", 0.2),
        (real_run, "OPTIONS", (*real_run.OPTIONS, *RUN)),
        (tune, "exact", _exact),
        (tune, "error_of", _no_error),
        (tune, "write_configurations", lambda _: None),  # keep the shipped configurations
        (worker, "PROGRAM", f"from {__spec__.name} import change; change(); {worker.PROGRAM}"),
    ):
        patch.object(owner, name, instead).start()


if __name__ == "__main__":
    change()
    sys.exit(main())
