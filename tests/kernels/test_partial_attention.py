"""The summed gradients of attention over parts of the keys equal the gradients over all keys."""

import pytest
import torch

from tilewright import kernels
from tilewright.kernels.attention.partial import partial_gradients


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients_of_key_subsets_sum_to_the_full_gradients(backend, softcap):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 16, 16, requires_grad=True)
    k, v = (torch.randn(2, 2, 48, 16, requires_grad=True) for _ in range(2))
    do = torch.randn(2, 4, 16, 16)
    with kernels.use_backend(backend):
        # The queries have the last 16 positions: they see all earlier keys, and their own keys causally.
        o, lse = kernels.attention(q, k, v, softcap=softcap, return_lse=True)
        expected = torch.autograd.grad(o, (q, k, v), do)
        plain = [x.detach() for x in (do, q, o, lse)]
        parts = []
        for keys, causal in ((slice(0, 20), False), (slice(20, 32), False), (slice(32, 48), True)):
            own = (x.detach()[:, :, keys] for x in (k, v))
            parts.append(partial_gradients(plain[0], plain[1], *own, plain[2], plain[3], causal, 0.25, softcap))
    dq, dk, dv = zip(*parts, strict=True)
    ours = sum(dq), torch.cat(dk, 2), torch.cat(dv, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
