"""The command line as a rehearsal runs it: `python -m null_gpu.small_bench ARGUMENTS`, values unchecked and some sizes small.

A GPU that computes nothing gives zeros, which no check of values accepts: only shapes and dtypes are checked. The bench's
workers are processes of their own, which get the same changes.
"""

import sys
from collections.abc import Mapping, Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from tilewright.bench import attention, attention_cases, attention_peers, check, kernels, ops, training, tune, worker
from tilewright.bench.attention_cases import AttentionCase
from tilewright.cli import main
from tilewright.train.trainer import Trainer


class _Shape:
    """In place of `check.Right`: a result must have this shape and dtype."""

    def __init__(self, exact: Tensor, reference: Tensor) -> None:
        self.shape, self.dtype = exact.shape, reference.dtype
        assert reference.shape == exact.shape

    def check(self, own: Tensor, what: str) -> None:
        if own.shape != self.shape or own.dtype != self.dtype:
            raise check.WrongError(f"{what} is {own.dtype} {tuple(own.shape)} instead of {self.dtype} {tuple(self.shape)}")


def _check_attention(own: Sequence[Tensor], right: Mapping[str, Tensor], names: Sequence[str]) -> None:
    for tensor, name in zip(own, names, strict=True):
        if tensor.shape != right[name].shape:
            raise attention_peers.Unsupported(f"wrong: {name} has the shape {tuple(tensor.shape)}")


def _no_error(own: Tensor, right: Tensor) -> float:
    assert own.shape == right.shape
    return 0.0


def _exact(case: AttentionCase, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> dict[str, Tensor]:
    # The reference loops over pieces of long sequences: minutes of a host for values that nobody looks at.
    results = {"o": q} | ({"dq": q, "dk": k, "dv": v} if "backward" in case.costs else {})
    return {name: like.new_zeros(like.shape) for name, like in results.items()}


def _installed_peers() -> tuple[dict[str, attention_peers.Peer], dict[str, str]]:
    """Return the peers without cuDNN."""
    peers, missing = attention_peers.installed_peers()
    del peers["SDPA cuDNN"]
    return peers, missing


def _shares(trainer: Trainer, step_s: float) -> dict[str, float]:
    """Return shares that no profiler measured: there is no CUPTI."""
    return {"matmul": 0.5, "attention": 0.25, "idle": 0.25}


def _attention_cases() -> list[AttentionCase]:
    """Return one shape of each kind, at full size: memory costs nothing here."""
    first_of_kind = {}
    for case in attention_cases.attention_cases():
        kind = (case.head_dim, case.window is None, case.document_lengths is None, case.num_queries == 1, case.num_kv_heads)
        first_of_kind.setdefault(kind, case)
    return [*first_of_kind.values()]


def _op_cases() -> list[ops.OpCase]:
    """Return one shape of each op, at full size."""
    first_of_op: dict[str, ops.OpCase] = {}
    for case in ops.op_cases():
        first_of_op.setdefault(case.op, case)
    return [*first_of_op.values()]


def change() -> None:
    """Leave out the checks of values, and what takes a host minutes, in this process and in its workers."""
    # Where cuDNN makes no plan, as here, PyTorch dereferences a null pointer at the second call.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for owner, name, instead in (
        (check, "Right", _Shape),
        (attention, "_check", _check_attention),
        (attention, "exact", _exact),
        (attention, "attention_cases", _attention_cases),
        (attention, "installed_peers", _installed_peers),
        (kernels, "op_cases", _op_cases),
        (training, "_profile", _shares),
        (tune, "exact", _exact),
        (tune, "error_of", _no_error),
        (tune, "write_configurations", lambda _: None),  # the ones that ship stay
        (worker, "PROGRAM", f"from {__spec__.name} import change; change(); {worker.PROGRAM}"),
    ):
        patch.object(owner, name, instead).start()


if __name__ == "__main__":
    change()
    sys.exit(main())
