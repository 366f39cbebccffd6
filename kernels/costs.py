"""What each op must cost at the least: bytes moved and FLOPs, from its shape alone; the roofline of the bench.

Bytes count each input read once and each output written once. FLOPs count what is computed, an exponential or a root as
one; for the ops bound by memory they only show that they are. Rows are all leading dimensions together.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Least bytes moved and FLOPs computed by one call."""

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Return the roofline's time: the longer of moving the bytes and computing the FLOPs (Williams et al. 2009)."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def rms_norm(rows: int, width: int, itemsize: int, weight_itemsize: int | None = None) -> tuple[Cost, Cost]:
    """Return (forward, backward): read x, write y; read x and dy, write dx; weights and float32 statistics besides."""
    elements, weight = rows * width, width * (weight_itemsize or itemsize)
    forward = Cost(2 * elements * itemsize + weight + 4 * rows, 4 * elements)
    backward = Cost(3 * elements * itemsize + 2 * weight + 4 * rows, 11 * elements)
    return forward, backward


def add_rms_norm(rows: int, width: int, itemsize: int, residual_itemsize: int | None = None) -> tuple[Cost, Cost]:
    """Return (forward, backward) of the residual form: one more stream in and out, and one gradient for both inputs."""
    elements, residual = rows * width, rows * width * (residual_itemsize or itemsize)
    forward = Cost(2 * elements * itemsize + 2 * residual + width * itemsize + 4 * rows, 5 * elements)
    # Read dy, the sum and its gradient; write the gradient, twice where x and the residual differ in dtype.
    written = residual if residual_itemsize in (None, itemsize) else residual + elements * itemsize
    backward = Cost(elements * itemsize + 2 * residual + written + 2 * width * itemsize + 4 * rows, 12 * elements)
    return forward, backward


def swiglu(rows: int, width: int, itemsize: int) -> tuple[Cost, Cost]:
    """Return (forward, backward): read gate and up, write one; read gate, up and dy, write two. `width` is F."""
    elements = rows * width
    return Cost(3 * elements * itemsize, 5 * elements), Cost(5 * elements * itemsize, 12 * elements)


def rope(tokens: int, heads: int, head_dim: int, itemsize: int) -> tuple[Cost, Cost]:
    """Return (forward, backward), which are alike: read and write all heads of q and k together, read cos and sin once."""
    elements = tokens * heads * head_dim
    cost = Cost(2 * elements * itemsize + 4 * tokens * head_dim, 3 * elements)
    return cost, cost


def cross_entropy(rows: int, vocab_size: int, itemsize: int) -> tuple[Cost, Cost]:
    """Return (forward, backward): read the logits; read them again and write their gradient. Targets are int64."""
    elements = rows * vocab_size
    return Cost(elements * itemsize + 12 * rows, 4 * elements), Cost(2 * elements * itemsize + 16 * rows, 4 * elements)


def linear_cross_entropy(rows: int, d_model: int, vocab_size: int, itemsize: int) -> Cost:
    """Return forward and backward together: three matrix products; x and weight in, their gradients out, no logits."""
    products = 3 * 2 * rows * d_model * vocab_size
    return Cost(2 * (rows + vocab_size) * d_model * itemsize + 12 * rows, products)


def _sum_of_least(count: int, top: int) -> int:
    """Return min(1, top) + min(2, top) + ... + min(count, top)."""
    reach = max(0, min(count, top))
    return reach * (reach + 1) // 2 + max(0, count - top) * top


def attention_pairs(
    num_queries: int,
    num_keys: int,
    causal: bool = True,
    window: int | None = None,
    document_lengths: Sequence[int] | None = None,
) -> int:
    """Return how many pairs of query and key one head computes, under the mask that `kernels.attention` describes.

    T (T + 1) / 2 for causal self-attention. `document_lengths` are those of packed documents; they sum up to the keys.
    """
    lengths = (num_keys,) if document_lengths is None else document_lengths
    if sum(lengths) != num_keys:
        raise ValueError(f"the documents hold {sum(lengths)} keys: allowed is {num_keys}, as many as there are")
    # A query at position p sees the keys of its document from p - back to p + ahead.
    back = num_keys if window is None else window - 1
    ahead = 0 if causal else num_queries if window is None else window - 1
    pairs, begin = 0, 0
    for length in lengths:
        first = num_keys - num_queries if document_lengths is None else max(begin, num_keys - num_queries)
        queries = max(0, begin + length - first)
        # The keys up to p + ahead, less those before p - back: each a sum over p of a count between 0 and the length.
        for reach, sign in ((ahead, 1), (-back - 1, -1)):
            before = first - begin + reach
            pairs += sign * (_sum_of_least(before + queries, length) - _sum_of_least(before, length))
        begin += length
    return pairs


def attention(
    batch: int, num_heads: int, num_kv_heads: int, num_queries: int, num_keys: int, head_dim: int, pairs: int, itemsize: int
) -> tuple[Cost, Cost]:
    """Return (forward, backward) for `pairs` of query and key that each head computes, see `attention_pairs`.

    Forward: two products; read q, k and v, write o and lse. Backward: five products, the scores again, dV, dP, dQ and dK (Dao
    2023, algorithm 2); read q, k, v, o, do and lse, write dq, dk and dv. That our kernels compute two of the five twice is
    no useful work.
    """
    product = 2 * head_dim * pairs * num_heads * batch
    queries = batch * num_heads * num_queries * head_dim * itemsize
    keys = batch * num_kv_heads * num_keys * head_dim * itemsize
    lse = 4 * batch * num_heads * num_queries
    return Cost(2 * queries + 2 * keys + lse, 2 * product), Cost(4 * queries + 4 * keys + lse, 5 * product)
