"""Everything that the accounting knows of one run, as a dictionary: the JSON of `tilewright account`, and its tables."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError
from ...kernels.datasheet import GPU, GPUS, find_gpu
from ..config import MODELS, ModelConfig
from ..huggingface import read_config
from .conventions import conventions
from .flops import (
    forward_flops_by_group,
    hardware_flops,
    model_flops,
    num_active_parameters,
    num_parameters,
    parameters_by_group,
)
from .generation import generation
from .memory import GB, GIB, handout_memory, largest_batch, parse_memory, training_memory
from .operations import operations, pad_vocabulary
from .policy import HANDOUT, Policy
from .roofline import PEAK_OF, adamw_bytes, adamw_flops, roofline, training_plan

# Hoffmann et al. 2022 (Chinchilla), table 3: about 20 tokens a parameter for the best model of a budget.
TOKENS_PER_PARAMETER = 20

# Beyond these, figures no longer fit in floating point numbers, and no run is planned so.
_MOST, _LEAST_MFU = 10**18, 1e-6


@dataclass(frozen=True)
class AccountConfig:
    """What to account for."""

    context_length: int | None = None
    """Tokens of a sequence; by default the model's own."""
    batch_size: int | Literal["auto"] = 1
    """Sequences that a GPU holds at once; auto is the most that --memory holds."""
    memory: str | None = None
    """Memory of the GPU, with its unit: 80GB is 80e9 bytes, 80GiB 80 x 2^30."""
    gpu: str | None = None
    """GPU, such as h200 or "h100 pcie"."""
    num_gpus: int = 1
    """GPUs that share the tokens of a run."""
    mfu: float = 0.4
    """Model FLOPs utilisation to plan with, where --tokens-per-second is not given."""
    tokens_per_second: float | None = None
    """Measured speed of all GPUs together; its MFU by every convention is printed."""
    tokens: int | None = None
    """Tokens of the whole run; by default 20 a parameter that a token meets (Hoffmann et al. 2022)."""
    price_per_gpu_hour: float | None = None
    """Price of an hour of one GPU, in any currency."""
    vocab_multiple: int = 1
    """Round the vocabulary up to a multiple, such as 64."""
    policy: Policy = dataclasses.field(default_factory=Policy)
    """How a step is computed."""
    json: bool = False
    """Print JSON in place of tables."""
    plot: Path | None = None
    """File of a PNG: FLOPs over sizes and contexts, and memory over a step."""

    def __post_init__(self) -> None:
        for name in ("context_length", "batch_size", "num_gpus", "tokens", "vocab_multiple"):
            value = getattr(self, name)
            if value not in (None, "auto") and not 1 <= value <= _MOST:
                raise UserError(f"{name} is {value}: it must be from 1 to {_MOST:.0e}")
        if not _LEAST_MFU <= self.mfu <= 1:
            raise UserError(f"mfu is {self.mfu}: it must be from {_LEAST_MFU:g} to 1")
        speed, price = self.tokens_per_second, self.price_per_gpu_hour
        if speed is not None and not 1 / _MOST <= speed <= _MOST:
            raise UserError(f"tokens_per_second is {speed}: it must be above 0, at most {_MOST:.0e}")
        if price is not None and not 0 <= price <= _MOST:
            raise UserError(f"price_per_gpu_hour is {price}: it must be from 0 to {_MOST:.0e}")
        for name in ("tokens", "tokens_per_second", "price_per_gpu_hour"):
            if self.gpu is None and getattr(self, name) is not None:
                raise UserError(f"{name} is given without a GPU, whose peak the time needs: name one with --gpu")


def _shares(groups: dict[str, int]) -> dict[str, dict[str, float]]:
    total = sum(groups.values())
    return {name: {"flops": flops, "percent": 100 * flops / total} for name, flops in groups.items()}


def _flops(model: ModelConfig, batch: int, context: int, policy: Policy) -> dict[str, Any]:
    full = operations(model, batch, context, policy)
    causal = operations(model, batch, context, policy, exact_causal=True)
    forward = forward_flops_by_group(model, context, policy.window)
    return {
        "forward_one_sequence": _shares(forward),
        "forward_one_sequence_flops": sum(forward.values()),
        "forward_batch_flops": batch * sum(forward.values()),
        "step_flops": model_flops(full),
        "step_exact_causal_flops": model_flops(causal),
        "step_hardware_flops": hardware_flops(full),
        "per_token_flops": model_flops(full) / (batch * context),
        "adamw_flops": adamw_flops(model),
        "adamw_bytes": adamw_bytes(model, policy),
    }


def _memory(model: ModelConfig, batch: int, context: int, policy: Policy, memory_bytes: int | None) -> dict[str, Any]:
    memory = training_memory(model, batch, context, policy)
    saved: dict[str, int] = {}
    for op in operations(model, batch, context, policy):
        saved[op.group] = saved.get(op.group, 0) + op.saved_bytes
    moment = memory.peak_moment
    handout = handout_memory(model, 0), handout_memory(model, 1, context)
    report = {
        "weights_bytes": memory.weights,
        "master_weights_bytes": memory.master_weights,
        "gradients_bytes": memory.gradients,
        "optimizer_state_bytes": memory.optimizer_state,
        "saved_bytes": memory.saved,
        "logits_bytes": memory.logits,
        "saved_by_group_bytes": {group: size for group, size in saved.items() if size},
        "peaks_bytes": memory.peaks,
        "peak_bytes": memory.peak,
        "peak_at": {"phase": moment.phase, "operation": moment.operation, "layer": moment.layer},
        "peak_temporary_bytes": moment.temporary,
        "handout_fixed_bytes": handout[0],
        "handout_bytes_per_sequence": handout[1] - handout[0],
    }
    # The course's model has no experts.
    if model.num_experts is None:
        report["written_out_float32_peak_bytes"] = training_memory(model, batch, context, HANDOUT).peak
    if memory_bytes is not None:
        report["memory_bytes"] = memory_bytes
        report["largest_batch"] = largest_batch(model, memory_bytes, context, policy)
        report["largest_batch_by_handout"] = max(0, (memory_bytes - handout[0]) // (handout[1] - handout[0]))
    return report


def _speed(
    model: ModelConfig, batch: int, context: int, policy: Policy, gpu: GPU, settings: AccountConfig
) -> dict[str, Any] | None:
    peak = gpu.peak_flops(PEAK_OF[policy.compute])
    bound = roofline(model, gpu, batch, context, policy)
    if peak is None or bound is None:
        return None
    tokens, step = batch * context, model_flops(operations(model, batch, context, policy))
    return {
        "peak_of": PEAK_OF[policy.compute],
        "peak_flops_per_s": peak,
        "bandwidth_bytes_per_s": gpu.bandwidth * 1e12,
        "best_step_s": bound.seconds,
        "best_mfu": bound.best_mfu,
        "flops_per_byte": bound.intensity,
        "best_tokens_per_s": tokens / bound.seconds,
        "planned_mfu": settings.mfu,
        "planned_step_s": step / (settings.mfu * peak),
        "planned_tokens_per_s": tokens * settings.mfu * peak / step,
        "operations": [
            dataclasses.asdict(op) | {"flops_per_byte": op.intensity, "lost_share": bound.shortfall()[op.name]}
            for op in bound.operations
        ],
    }


def model_of(name: str, settings: AccountConfig) -> ModelConfig:
    """Return the shape of the preset, or of the folder of Hugging Face's, `name`, its vocabulary padded.

    An unknown name is a `UserError` that lists the presets.
    """
    if name in MODELS:
        return pad_vocabulary(MODELS[name], settings.vocab_multiple)
    if not Path(name).is_dir():
        raise UserError(f"preset {name!r} is unknown: choose one of {', '.join(MODELS)}, or a folder with a config.json")
    return pad_vocabulary(read_config(Path(name)), settings.vocab_multiple)


def account(name: str, settings: AccountConfig) -> dict[str, Any]:
    """Return every figure of the preset `name` under `settings`; units are in the keys: _bytes, _flops, _s."""
    model, policy = model_of(name, settings), settings.policy
    context = model.context_length if settings.context_length is None else settings.context_length
    memory_bytes = None if settings.memory is None else parse_memory(settings.memory)
    if settings.batch_size == "auto":
        if memory_bytes is None:
            raise UserError("batch_size auto needs --memory, such as 80GB (80e9 bytes) or 80GiB")
        batch = largest_batch(model, memory_bytes, context, policy)
        if batch == 0:
            need = training_memory(model, 1, context, policy).peak
            raise UserError(
                f"memory {settings.memory} does not hold one sequence of {context} tokens: "
                f"{need / GB:.2f} GB ({need / GIB:.2f} GiB) are needed"
            )
    else:
        batch = settings.batch_size
    gpu = None if settings.gpu is None else find_gpu(settings.gpu)
    if gpu is not None and policy.eight_bits and gpu.fp8 is None:
        raise UserError(f"policy.compute is {policy.compute}: {gpu.name} has no products in 8 bits")
    speed = None if gpu is None else _speed(model, batch, context, policy, gpu, settings)
    active = num_active_parameters(model)
    tokens = TOKENS_PER_PARAMETER * active if settings.tokens is None else settings.tokens
    plan = None
    if speed is not None:
        mfu = settings.mfu
        if settings.tokens_per_second is not None:
            per_gpu = settings.tokens_per_second / settings.num_gpus
            mfu = per_gpu * model_flops(operations(model, 1, context, policy)) / context / speed["peak_flops_per_s"]
            if mfu > 1:
                given = f"tokens_per_second is {settings.tokens_per_second}"
                raise UserError(f"{given}: that is {mfu:.2f} times what the peak of {settings.num_gpus} GPU allows")
        whole = training_plan(
            model,
            tokens,
            speed["peak_flops_per_s"],
            mfu,
            settings.num_gpus,
            context,
            settings.price_per_gpu_hour,
            policy.window,
        )
        plan = dataclasses.asdict(whole) | {"days": whole.days, "mfu": mfu, "num_gpus": settings.num_gpus}
    # The speed is the measured one, else the planned one.
    per_gpu_speed = None if plan is None else plan["tokens_per_second"] / settings.num_gpus
    peak = None if speed is None else float(speed["peak_flops_per_s"])
    counts = conventions(model, context, per_gpu_speed, peak, policy)
    decode = [
        {"batch_size": size} | dataclasses.asdict(generation(model, context, size, policy.dtype, gpu, policy.window))
        for size in (1, 8, 64)
    ]
    return {
        "model": name,
        "shape": dataclasses.asdict(model),
        "num_local_layers": sum(map(model.is_local, range(model.num_layers))),
        "batch_size": batch,
        "context_length": context,
        "policy": dataclasses.asdict(policy),
        "gpu": None if gpu is None else dataclasses.asdict(gpu),
        "gpu_asked_for": settings.gpu,
        "gpus_known": [known.name for known in GPUS.values()],
        "parameters": parameters_by_group(model),
        "num_parameters": num_parameters(model),
        "num_active_parameters": active,
        "flops": _flops(model, batch, context, policy),
        "memory": _memory(model, batch, context, policy, memory_bytes),
        "speed": speed,
        "plan": plan,
        "conventions": [dataclasses.asdict(convention) for convention in counts],
        "generation": decode,
    }
