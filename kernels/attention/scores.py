"""Compute scores, probabilities and their gradients from a tile of products of queries and keys."""

from .. import shared
from ..dispatch import jit, tl
from ..shared import tanh


@jit
def scores_in_bits(scores, scale: tl.constexpr, softcap: tl.constexpr):
    """Return scaled and soft-capped scores in bits: multiplied by log2(e), so that the exponential is the hardware's exp2."""
    if softcap is None:
        scores = scores * (scale * shared.LOG2_E)
    else:
        scores = tanh(scores * (scale / softcap)) * (softcap * shared.LOG2_E)
    return scores


@jit
def sees(start, low, high, BLOCK: tl.constexpr):
    """Return (M, BLOCK) booleans: whether each row, with interval [low, high), sees each column from `start` on."""
    columns = start + tl.arange(0, BLOCK)[None, :]
    return (columns >= low[:, None]) & (columns < high[:, None])


@jit
def probabilities_of(products, lse, scale: tl.constexpr, softcap: tl.constexpr):
    """Return exp(score - lse) and the derivative of the score by `scale` q k^T, given products q k^T and lse in bits."""
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
    """Return lse in bits, with +inf (a probability of 0) for queries that see no key."""
    return tl.where(lse == -float("inf"), float("inf"), lse * shared.LOG2_E)


@jit
def load_lse(lse_ptr, queries, end):
    """Return lse in bits, with +inf (a probability of 0) beyond the last query and for queries that see no key."""
    return lse_in_bits(tl.load(lse_ptr + queries, mask=queries < end, other=float("inf")))


@jit
def ds_of(
    q, k, v, do, lse, delta, start, low, high,
    scale: tl.constexpr, softcap: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the unscaled gradient (M, N) of the products of queries and the keys from `start` on."""
    p, slope = probabilities_of(tl.dot(q, k.T, input_precision=PRECISION), lse[:, None], scale, softcap)
    ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - delta[:, None]) * slope
    if MASKED:
        # Mask after the multiplication, because 0 times a non-finite dP is NaN.
        ds = tl.where(sees(start, low, high, k.shape[0]), ds, 0.0)
    return ds
