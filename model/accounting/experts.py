"""Operations of this project's mixture of experts; letters as in `operation`, with `k` of `X` experts per token."""

from collections.abc import Iterator

from ..config import ModelConfig
from .operation import Operation, Step


def experts_used(num_experts: int, experts_per_token: int, tokens: int) -> float:
    """Return the expected number of experts that `tokens` tokens use under uniform routing: X (1 - (1 - k / X)^tokens)."""
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** tokens)


def inactive_parameters(config: ModelConfig) -> int:
    """Return the number of parameters, over all layers, of the experts that a token does not use."""
    if config.num_experts is None:
        return 0
    return config.num_layers * (config.num_experts - config.experts_per_token) * 3 * config.d_model * config.d_ff


def _product(step: Step, name: str, layer: int, k: int, n: int, num_experts: int, copies: int) -> Operation:
    """Return the grouped product of the token copies, sorted by expert; the group ends are int32."""
    a, m = step.a, step.rows * copies
    used = round(experts_used(num_experts, copies, step.rows) * k * n)
    forward, moved, matrices = 2 * m * k * n, a * (m * k + used + m * n), num_experts * k * n
    cast = a * matrices if a != step.w else 0
    return Operation(name, "feed-forward", layer, (m, k, n), matrices, forward_flops=forward, backward_flops=2 * forward,
                     forward_bytes=moved, backward_bytes=2 * moved, saved_bytes=a * m * k + cast, cast_bytes=cast,
                     backward_temporary=step.stream + a * m * (k + n))  # fmt: skip


def mixture(step: Step, layer: int) -> Iterator[Operation]:
    """Yield the router, the copies of each token, the experts' products and activation, and the sum of the results."""
    a, rows, d, f, stream, config = step.a, step.rows, step.d, step.f, step.stream, step.config
    num_experts, k = config.num_experts, config.experts_per_token
    assert num_experts is not None
    copies = rows * k
    yield step.product("router", "feed-forward", layer, d, num_experts, saved=a * rows * d)
    likely = 4 * rows * num_experts
    # Saved: the probabilities in float32, the choices in int64, the normalized weights and their sum, each expert's share of
    # the choices, and the int32 group ends.
    kept = likely + 8 * copies + 8 * num_experts + (4 * (copies + rows) if config.normalise_expert_weights else 0)
    moved = a * rows * num_experts + likely + 12 * copies
    yield Operation("routing", "routing", layer, (rows, num_experts), forward_bytes=moved, backward_bytes=moved,
                    saved_bytes=kept, forward_temporary=likely, backward_temporary=stream + 2 * likely)  # fmt: skip
    # Saved: the row of each copy, int64.
    moved = a * (rows + copies) * d + 8 * copies
    yield Operation("dispatch", "routing", layer, (copies, d), forward_bytes=moved, backward_bytes=moved,
                    saved_bytes=8 * copies, backward_temporary=stream + a * (2 * copies + rows) * d)  # fmt: skip
    yield _product(step, "gate_up_proj", layer, d, 2 * f, num_experts, k)
    yield step.gated_activation(layer, copies)
    yield _product(step, "down_proj", layer, f, d, num_experts, k)
    # Saved: the experts' outputs, their weights in float32, and the copy in each row, int64.
    moved = a * (rows + copies) * d + 12 * copies
    yield Operation("combine", "routing", layer, (copies, d), forward_bytes=moved,
                    backward_bytes=moved + a * copies * d, saved_bytes=a * copies * d + 12 * copies,
                    forward_temporary=(a + 4) * copies * d,
                    backward_temporary=stream + (2 * a + 8) * copies * d)  # fmt: skip
