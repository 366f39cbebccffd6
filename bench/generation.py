"""Generation speed, token by token with the KV cache, compared with the bandwidth limit of the accounting."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ..kernels.device import gpu_of
from ..model import MODELS, TransformerLM, generate
from ..model.accounting import generation
from .ceilings import Ceilings
from .jobs import Job, Row, Rows
from .timing import quantiles

ROUNDS = 5


def _seconds(model: TransformerLM, prompts: list[list[int]], new_tokens: int) -> float:
    # Reading the generated tokens synchronizes with the device.
    start = time.perf_counter()
    generate(model, prompts, new_tokens, temperature=0)
    return time.perf_counter() - start


def bench_generation(
    name: str, batch: int, device: torch.device, ceilings: Ceilings | None = None, new_tokens: int = 64
) -> Rows:
    """Yield the time of a decoding step: `new_tokens` tokens after half a context, minus an eighth as many.

    The difference excludes the pass over the prompt. The bounds are for the step in the middle.
    """
    config = MODELS[name]
    torch.manual_seed(0)
    with device:
        model = TransformerLM(config).eval()
    if device.type == "cuda":
        # Cast the weights only: the RoPE tables stay in float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    generator = torch.Generator().manual_seed(0)
    length = config.context_length // 2
    prompts = torch.randint(config.vocab_size, (batch, length), generator=generator).tolist()
    few = new_tokens // 8
    _seconds(model, prompts, few)
    steps = [(_seconds(model, prompts, new_tokens) - _seconds(model, prompts, few)) / (new_tokens - few) for _ in range(ROUNDS)]
    times = quantiles([1e3 * step for step in steps])
    step_s = times.p50_ms * 1e-3
    gpu, dtype = gpu_of(device), "bfloat16" if device.type == "cuda" else "float32"
    cost = generation(config, length + (few + new_tokens) // 2, batch, dtype, gpu)
    row: Row = {
        "case": f"generation {name} batch {batch}, after {length} tokens",
        "variant": "tilewright",
        **asdict(times),
        "tokens_per_s": batch / step_s,
        "gb_per_step": cost.bytes_per_step / 1e9,
        "gb_per_s": cost.bytes_per_step / step_s / 1e9,
    }
    if cost.tokens_per_second is not None:
        row |= _bounds(
            cost.tokens_per_second, batch / step_s, cost.bytes_per_step, batch * cost.flops_per_token, ceilings, batch
        )
    yield row


def _bounds(
    datasheet: float, tokens_per_s: float, moved: int, flops: int, ceilings: Ceilings | None, batch: int
) -> dict[str, Any]:
    bounds: dict[str, Any] = {"datasheet_tokens_per_s": datasheet, "share_of_datasheet": tokens_per_s / datasheet}
    if ceilings is not None:
        reachable = batch / max(moved / ceilings.copy, flops / ceilings.matmul)
        bounds |= {"ceiling_tokens_per_s": reachable, "share_of_roofline": tokens_per_s / reachable}
    if tokens_per_s > datasheet:
        bounds["suspicious"] = "above the datasheet: a measuring error"
    return bounds


def generation_jobs(device: torch.device, ceilings: Ceilings | None) -> Iterator[Job]:
    """Yield one job per model and batch size."""
    sizes = (("gpt2-small", "gpt2-xl"), (1, 8, 64)) if device.type == "cuda" else (("stories-cpu",), (1, 8))
    for batch in sizes[1]:
        for name in sizes[0]:
            yield Job(f"generation {name} batch {batch}", partial(bench_generation, name, batch, device, ceilings))
