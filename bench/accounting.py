"""FLOPs by the accounting and by PyTorch's counter, on meta tensors: valid on any machine."""

from collections.abc import Iterator
from functools import partial

from ..datasheet import find_gpu
from ..model import MODELS
from ..model.accounting import model_flops, num_parameters, operations, roofline, training_memory
from .jobs import Job, Rows
from .trainers import OWN_POLICY, counted_flops

NAMES = ("tinystories-17m", "gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPU = "h200"


def bench_accounting(name: str) -> Rows:
    """Yield a model's parameters and the FLOPs of a training step on one sequence, by formula and as counted.

    The FLOPs of vocabulary padding have their own column, because they are not model FLOPs.
    """
    config = MODELS[name]
    ops = operations(config, 1, policy=OWN_POLICY)
    formula, padding, counted = model_flops(ops), 3 * sum(op.padding_flops for op in ops), counted_flops(config)
    gpu = find_gpu(GPU)
    bound = gpu and roofline(config, gpu, policy=OWN_POLICY)
    yield {
        "case": f"accounting {name} batch 1x{config.context_length}",
        "variant": "formula",
        "parameters": num_parameters(config),
        "formula_flops": formula,
        "padding_flops": padding,
        "counted_flops": counted,
        "same_result": formula + padding == counted,
        "peak_gb": training_memory(config, 1, policy=OWN_POLICY).peak / 1e9,
        f"best_mfu_on_{GPU}": bound and bound.best_mfu,
    }


def accounting_jobs() -> Iterator[Job]:
    """Yield the accounting of each model."""
    for name in NAMES:
        yield Job(f"accounting {name}", partial(bench_accounting, name))
