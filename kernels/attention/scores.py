"""From products of queries and keys to scores, probabilities and their gradient, a tile at a time."""

from .. import shared
from ..dispatch import jit, tl
from ..shared import tanh


@jit
def scores_in_bits(scores, scale: tl.constexpr, softcap: tl.constexpr):
    """Return scaled and soft-capped scores in units of log2(e): their exponential is exp2, which the hardware has."""
    if softcap is None:
        scores = scores * (scale * shared.LOG2_E)
    else:
        scores = tanh(scores * (scale / softcap)) * (softcap * shared.LOG2_E)
    return scores


@jit
def sees(start, low, high, BLOCK: tl.constexpr):
    """Return whether each row (M), with its interval [low, high), sees each of the `BLOCK` columns from `start` on."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    return (columns >= low[:, None]) & (columns < high[:, None])


@jit
def probabilities_of(products, lse, scale: tl.constexpr, softcap: tl.constexpr):
    """Return exp(score - lse) and the derivative of the score by `scale` q k^T, from products q k^T; lse is in bits."""
    slope = 1.0
    if softcap is None:
        scores = products * (scale * shared.LOG2_E)
    else:
        capped = tanh(products * (scale / softcap))
        scores = capped * (softcap * shared.LOG2_E)
        slope = 1.0 - capped * capped
    return tl.exp2(scores - lse), slope


@jit
def lse_in_bits(lse):
    """Return lse in bits, +inf (a probability of 0) where a query sees no key."""
    return tl.where(lse == -float("inf"), float("inf"), lse * shared.LOG2_E)


@jit
def load_lse(lse_ptr, queries, end):
    """Return lse in bits, +inf (a probability of 0) where there is no query, or where it sees no key."""
    return lse_in_bits(tl.load(lse_ptr + queries, mask=queries < end, other=float("inf")))


@jit
def ds_of(
    q, k, v, do, lse, delta, start, low, high,
    scale: tl.constexpr, softcap: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the gradient (M, N) of the products of queries with the keys from `start` on, but for the scale."""
    p, slope = probabilities_of(tl.dot(q, k.T, input_precision=PRECISION), lse[:, None], scale, softcap)
    ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - delta[:, None]) * slope
    if MASKED:
        # After the product, because 0 times a dP that is not finite is NaN.
        ds = tl.where(sees(start, low, high, k.shape[0]), ds, 0.0)
    return ds
