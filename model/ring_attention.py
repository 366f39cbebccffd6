"""Causal attention over a sequence split between processes, which pass keys and values around a ring (Liu et al. 2023).

Process r holds two pieces of the sequence, the r-th from the beginning and the r-th from the end. In each step it attends to
the keys of one process with `kernels.attention`; all processes compute the same number of (query, key) pairs. The partial
results are merged by their log-sum-exp. The backward pass saves only a process's own keys and values. It sends them around the
ring again, followed by their gradients.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore[reportPrivateImportUsage]
from torch.utils.flop_counter import register_flop_formula

from ..kernels import attention
from ..kernels.attention.partial import partial_gradients
from ..kernels.registration import custom_op


class _Ring:
    """Point-to-point communication in a process group: each process sends to the next and receives from the previous."""

    def __init__(self, name: str) -> None:
        self._group = group = _resolve_process_group(name)  # pyright: ignore[reportArgumentType]
        self.rank, self.size = group.rank(), group.size()
        self._next, self._previous = (dist.get_global_rank(group, (self.rank + i) % self.size) for i in (1, -1))

    def send(self, tensor: Tensor) -> "_Arrival":
        received = torch.empty_like(tensor)
        ends = ((dist.isend, tensor, self._next), (dist.irecv, received, self._previous))
        return _Arrival(tensor, received, dist.batch_isend_irecv([dist.P2POp(*end, group=self._group) for end in ends]))

    def step(self, number: int, length: int) -> tuple[slice, slice, bool]:
        """Return (queries, keys, causal) of a step: slices of the local queries and the present keys, and whether to mask."""
        source, half = (self.rank - number) % self.size, length // 2
        if source == self.rank:
            return slice(None), slice(None), True
        # An earlier source: its first piece precedes both of ours, its second follows them. A later source: both of its pieces
        # lie between ours.
        return (slice(None), slice(half), False) if source < self.rank else (slice(half, None), slice(None), False)


class _Arrival:
    """A pending transfer; keeps the sent tensor alive until it completes."""

    def __init__(self, sent: Tensor, received: Tensor, works: list[dist.Work]) -> None:
        self._sent, self._received, self._works = sent, received, works

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received


@custom_op("ring_attention")
def _ring_attention(q: Tensor, k: Tensor, v: Tensor, group: str, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    ring, kv = _Ring(group), torch.stack([k, v])
    o, lse = q.new_zeros(q.shape, dtype=torch.float32), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    for number in range(ring.size):
        arrival = ring.send(kv) if number < ring.size - 1 else None
        rows, keys, causal = ring.step(number, q.shape[2])
        k, v = kv[:, :, :, keys].unbind()
        own, own_lse = attention(q[:, :, rows], k, v, causal=causal, scale=scale, softcap=softcap, return_lse=True)
        total = torch.logaddexp(lse[:, :, rows], own_lse.float())
        o[:, :, rows] = o[:, :, rows] * _weight(lse[:, :, rows], total) + own * _weight(own_lse, total)
        lse[:, :, rows] = total
        if arrival is not None:
            kv = arrival.wait()
    return o.to(q.dtype), lse


def _weight(lse: Tensor, total: Tensor) -> Tensor:
    return torch.exp(lse - total)[..., None]


@_ring_attention.register_fake
def _empty_outputs(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@custom_op("ring_attention_backward")
def _ring_attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    group: str,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    ring, kv = _Ring(group), torch.stack([k, v])
    dq = q.new_zeros(q.shape, dtype=torch.float32)
    dkv = kv.new_zeros(kv.shape, dtype=torch.float32)
    gradients: _Arrival | None = None
    for number in range(ring.size):
        arrival = ring.send(kv) if number < ring.size - 1 else None
        rows, keys, causal = ring.step(number, q.shape[2])
        of_rows = [x[:, :, rows] for x in (do, q, o, lse)]
        k, v = kv[:, :, :, keys].unbind()
        own_dq, *own_dkv = partial_gradients(of_rows[0], of_rows[1], k, v, of_rows[2], of_rows[3], causal, scale, softcap)
        dq[:, :, rows] += own_dq
        dkv = dkv if gradients is None else gradients.wait()
        dkv[:, :, :, keys] += torch.stack(own_dkv)
        # After the last step the gradients arrive at the owner of the keys.
        gradients = ring.send(dkv)
        if arrival is not None:
            kv = arrival.wait()
    assert gradients is not None
    dk, dv = gradients.wait().to(k.dtype).unbind()
    return dq.to(q.dtype), dk.clone(), dv.clone()


@_ring_attention_backward.register_fake
def _empty_gradients(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, do: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    return *_ring_attention_backward(do, q, k, v, o, lse, *ctx.options), None, None, None


_ring_attention.register_autograd(_backward, setup_context=_save)


# As in attention: all pairs of this process's queries with all keys, regardless of the mask.
@register_flop_formula(torch.ops.tilewright.ring_attention)
def _flops(q_shape: Any, k_shape: Any, v_shape: Any, group: str, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * q_shape[:3].numel() * k_shape[2] * _Ring(group).size * (q_shape[3] + v_shape[3])


@register_flop_formula(torch.ops.tilewright.ring_attention_backward)
def _backward_flops(
    do_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, o_shape: Any, lse_shape: Any, group: str, *args: Any, **kwargs: Any
) -> int:
    return 2 * q_shape[:3].numel() * k_shape[2] * _Ring(group).size * (3 * q_shape[3] + 2 * v_shape[3])


def ring_attention(q: Tensor, k: Tensor, v: Tensor, group: str, scale: float | None, softcap: float | None) -> Tensor:
    """Return the output (B, H, T, K) for this process's queries (B, H, T, K), keys and values (B, Hkv, T, K).

    T, the process's share of the sequence, is even. `group` is the name of the process group. The other arguments are the same
    as in `kernels.attention`.
    """
    return _ring_attention(q, k, v, group, float(q.shape[3] ** -0.5 if scale is None else scale), softcap)[0]
