"""Every accounting figure of one run, as a dictionary: the JSON and the tables of `tilewright account`."""

import dataclasses
from typing import Any

from ...datasheet import GPU, GPUS, find_gpu
from ...errors import UserError
from ..accounting_options import AccountConfig, model_of
from ..config import ModelConfig
from ..memory_size import GB, GIB, parse_memory
from ..policy import HANDOUT, Policy
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
from .memory import handout_memory, largest_batch, training_memory
from .operations import operations
from .roofline import PEAK_OF, adamw_bytes, adamw_flops, roofline, training_plan

# Hoffmann et al. 2022 (Chinchilla), table 3: the best model of a budget trains on about 20 tokens per parameter.
TOKENS_PER_PARAMETER = 20


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
    point = memory.peak_point
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
        "peak_at": {"phase": point.phase, "operation": point.operation, "layer": point.layer},
        "peak_temporary_bytes": point.temporary,
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


def account(name: str, settings: AccountConfig) -> dict[str, Any]:
    """Return every figure of `name`, a preset or a folder; the keys end with the unit: _bytes, _flops, _s."""
    model, policy = model_of(name, settings), settings.policy
    context = model.context_length if settings.context_length is None else settings.context_length
    memory_bytes = None if settings.memory is None else parse_memory(settings.memory)
    if settings.batch_size == "auto":
        assert memory_bytes is not None
        batch = largest_batch(model, memory_bytes, context, policy)
        if batch == 0:
            need = training_memory(model, 1, context, policy).peak
            raise UserError(
                f"memory {settings.memory} is too small for one sequence of {context} tokens, which needs "
                f"{need / GB:.2f} GB ({need / GIB:.2f} GiB)"
            )
    else:
        batch = settings.batch_size
    gpu = None if settings.gpu is None else find_gpu(settings.gpu)
    if gpu is not None and policy.eight_bits and gpu.fp8 is None:
        raise UserError(f"policy.compute is {policy.compute}: {gpu.name} has no 8-bit products")
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
                raise UserError(f"{given}: that is {mfu:.2f} times the peak of {settings.num_gpus} GPU")
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
    # Use the measured speed if given, else the planned one.
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
