import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import assert_accurate, poisoned_memory
from tilewright.kernels import attention, reference, use_backend
from tilewright.kernels.dispatch import HAS_TRITON
from tilewright.kernels.rope import rope, rope_qk, rope_qkv

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported")

# bfloat16 arithmetic is wrong in Triton's interpreter, so it is tested on GPUs only.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
LAYOUTS = ["interleaved", "half"]
BACKENDS = ["triton", "reference"]
# Memory layouts of (B, H, T, K) heads: as attention returns them, as a projection returns them, and as a slice of a packed
# projection of queries, keys and values.
MEMORY = {
    "heads first": lambda b, h, t, k: torch.randn(b, h, t, k),
    "tokens first": lambda b, h, t, k: torch.randn(b, t, h, k).transpose(1, 2),
    "packed": lambda b, h, t, k: torch.randn(b, t, (h + 2) * k)[..., k : (h + 1) * k].unflatten(-1, (h, k)).transpose(1, 2),
    "every other channel": lambda b, h, t, k: torch.randn(b, h, t, 2 * k)[..., ::2],
}


def tables(num_positions, head_dim, device="cpu"):
    angles = 7 * torch.rand(num_positions, head_dim // 2)
    return angles.cos().to(device), angles.sin().to(device)


def gradients(function, xs, cos, sin, dys, **options):
    xs = [x.detach().requires_grad_() for x in xs]
    ys = function(*xs, cos, sin, **options)
    ys = [ys] if isinstance(ys, torch.Tensor) else ys
    dxs = torch.autograd.grad(ys, xs, [dy.to(y.dtype) for y, dy in zip(ys, dys, strict=True)])
    return [*(y.detach() for y in ys), *dxs]


def check(xs, cos, sin, dys, **options):
    function, expected_function = (rope, reference.rope) if len(xs) == 1 else (rope_qk, reference.rope_qk)
    with use_backend("triton"), poisoned_memory():
        actual = gradients(function, xs, cos, sin, dys, **options)
    expected = gradients(expected_function, xs, cos, sin, dys, **options)
    doubles = [[x.double() for x in ts] for ts in (xs, (cos, sin), dys)]
    exact = gradients(expected_function, doubles[0], *doubles[1], doubles[2], **options)
    names = ("x", "dx") if len(xs) == 1 else ("q", "k", "dq", "dk")
    for what, *tensors in zip(names, actual, expected, exact, strict=True):
        assert_accurate(*tensors, what=what)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 64, 80, 256])
def test_forward_and_backward_equal_reference(device, dtype, head_dim, layout):
    torch.manual_seed(head_dim)
    q, dq = torch.randn(2, 2, 5, 7, head_dim, dtype=dtype, device=device)
    k, dk = torch.randn(2, 2, 1, 7, head_dim, dtype=dtype, device=device)
    check([q, k], *tables(9, head_dim, device), [dq, dk], layout=layout, offset=2)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(data=st.data(), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99))
def test_any_shape_memory_and_position(data, layout, seed):
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, num_tokens, head_dim = data.draw(
        st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 40).map(lambda n: 2 * n))
    )
    heads = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=2))
    xs, dys = (
        [MEMORY[data.draw(st.sampled_from(list(MEMORY)))](batch, h, num_tokens, head_dim).to(device) for h in heads]
        for _ in range(2)
    )
    rotary_dim = data.draw(st.integers(1, head_dim // 2).map(lambda n: 2 * n) | st.just(head_dim))
    positions_shape = data.draw(st.sampled_from([None, (num_tokens,), (1, num_tokens), (batch, num_tokens)]))
    if positions_shape is None:
        options = {"offset": data.draw(st.integers(0, 5))}
    else:
        dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
        options = {"positions": torch.randint(-3, 45, positions_shape, dtype=dtype, device=device)}
    check(xs, *tables(45, rotary_dim, device), dys, layout=layout, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_tokens_and_heads_than_a_block(device, layout):
    torch.manual_seed(0)
    q, dq = torch.randn(2, 1, 37, 70, 16, device=device)
    k, dk = torch.randn(2, 1, 17, 70, 16, device=device)
    check([q, k], *tables(70, 16, device), [dq, dk], layout=layout)


def test_queries_and_keys_keep_their_dtypes(device):
    torch.manual_seed(0)
    q, dq = torch.randn(2, 1, 4, 5, 8, device=device)
    k, dk = torch.randn(2, 1, 2, 5, 8, device=device).half()
    check([q, k], *tables(5, 8, device), [dq, dk])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 16), (80, 32), (10, 8)])
def test_partial_rotary_equals_reference(device, dtype, head_dim, rotary_dim, layout):
    torch.manual_seed(head_dim)
    q, dq = torch.randn(2, 2, 5, 7, head_dim, dtype=dtype, device=device)
    k, dk = torch.randn(2, 2, 1, 7, head_dim, dtype=dtype, device=device)
    check([q, k], *tables(9, rotary_dim, device), [dq, dk], layout=layout, offset=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_partial_rotary_rotates_the_first_channels_as_a_head(device, layout, backend):
    torch.manual_seed(0)
    x, (cos, sin) = torch.randn(2, 3, 5, 80, device=device), tables(5, 32, device)
    # Channels that are not rotated are copied bit by bit, also infinities.
    x[..., 40:50] = torch.inf
    with use_backend(backend):
        y, alone = (rope(t, cos, sin, layout=layout) for t in (x, x[..., :32]))
    assert torch.equal(y[..., :32], alone)
    assert torch.equal(y[..., 32:], x[..., 32:])


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 2, 3, 5, 8)])
def test_leading_shapes(device, shape):
    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape, device=device)
    check([x], *tables(5, 8, device), [dy])
    positions = torch.tensor([8, 0, -1, 3, 5], device=device)
    check([x], *tables(9, 8, device), [dy], positions=positions)
    check([x], *tables(9, 8, device), [dy], positions=positions[None])
    if len(shape) > 2:
        check([x], *tables(9, 8, device), [dy], positions=torch.stack([positions.roll(n) for n in range(shape[0])]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 5, 8), (3, 2, 5, 8), (3, 2, 2, 5, 8)])
def test_positions_per_sequence(device, shape, backend):
    torch.manual_seed(0)
    x, (cos, sin) = torch.randn(shape, device=device), tables(9, 8, device)
    positions = torch.randint(0, 9, (3, 5), device=device)
    with use_backend(backend):
        y = rope(x, cos, sin, positions)
        alone = [rope(x[i], cos, sin, positions[i]) for i in range(3)]
    assert torch.equal(y, torch.stack(alone))


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t[:, :1].expand(-1, 4, -1, -1), id="expanded heads"),
        pytest.param(lambda t: t[:, :, ::2], id="every other token"),
        pytest.param(lambda t: t.mT, id="transposed channels"),
        pytest.param(lambda t: t[:1, :1, :1, :1].expand(2, 3, 6, 6), id="one number expanded"),
    ],
)
def test_strided_inputs_and_gradients(device, view):
    torch.manual_seed(0)
    x, dy = (view(torch.randn(2, 4, 6, 6, device=device)) for _ in range(2))
    check([x, x], *tables(6, 6, device), [dy, dy])


def test_strided_tables_and_positions(device):
    torch.manual_seed(0)
    x, dy = torch.randn(2, 2, 3, 5, 8, device=device)
    cos, sin = (table[::2, ::2] for table in tables(20, 16, device))
    check([x], cos, sin, [dy])
    check([x], cos, sin, [dy], positions=torch.randint(0, 10, (5, 4), device=device)[:, ::2].T)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (0, 3, 4), (0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (0, 2, 3, 3, 4)])
def test_empty_inputs(device, shape):
    x = torch.randn(shape, device=device)
    check([x], *tables(3, 4, device), [x])
    check([x], *tables(3, 4, device), [x], positions=torch.zeros(1, shape[-2], dtype=torch.long, device=device))
    if len(shape) > 2:
        check([x], *tables(3, 4, device), [x], positions=torch.zeros(shape[0], shape[-2], dtype=torch.long, device=device))
    if len(shape) == 4:
        check([x, x], *tables(3, 4, device), [x, x])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
def test_empty_packed_projection(device, shape, backend):
    qkv = torch.randn(shape, device=device, requires_grad=True)
    with use_backend(backend):
        q, k, v = rope_qkv(qkv, *tables(5, 4, device), 2, 1)
        (dqkv,) = torch.autograd.grad([q, k, v], [qkv], [q, k, v])
    assert (q.shape, k.shape, v.shape) == ((shape[0], 2, shape[1], 4), *[(shape[0], 1, shape[1], 4)] * 2)
    assert dqkv.shape == shape


def test_no_query_heads_or_no_key_heads(device):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 4, device=device), torch.randn(2, 0, 5, 4, device=device)
    check([q, k], *tables(5, 4, device), [q, k])
    check([k, q], *tables(5, 4, device), [k, q])


@pytest.mark.parametrize("memory", ["tokens first", "packed"])
def test_results_and_gradients_keep_the_memory_layout(device, memory):
    x = MEMORY[memory](2, 3, 5, 8).to(device)
    with use_backend("triton"):
        y, dx = gradients(rope, [x], *tables(5, 8, device), [torch.randn(2, 3, 5, 8, device=device)])
    for t in (y, dx):
        assert t.transpose(1, 2).is_contiguous()


def test_inputs_are_not_saved_for_backward(device):
    saved = []
    q, k = torch.randn(2, 2, 3, 5, 8, device=device, requires_grad=True)
    cos, sin = tables(5, 8, device)
    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rope_qk(q, k, cos, sin)
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_get_no_gradient(device, backend):
    cos, sin = (table.requires_grad_() for table in tables(5, 8, device))
    x = torch.randn(1, 1, 5, 8, device=device, requires_grad=True)
    with use_backend(backend):
        rope(x, cos, sin).sum().backward()
    assert x.grad is not None
    assert cos.grad is None
    assert sin.grad is None


def test_loss_of_queries_only(device):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 5, 8, device=device, requires_grad=True)
    cos, sin = tables(5, 8, device)
    with use_backend("triton"):
        (dq,) = torch.autograd.grad(rope_qk(q, k.detach(), cos, sin)[0].sum(), q)
    (expected,) = torch.autograd.grad(reference.rope(q, cos, sin).sum(), q)
    torch.testing.assert_close(dq, expected)


def test_second_derivative(device):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, 8, device=device, requires_grad=True)
    cos, sin = tables(5, 8, device)

    def second(function):
        (dx,) = torch.autograd.grad(function(x, cos, sin).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    with use_backend("triton"):
        torch.testing.assert_close(second(rope), second(reference.rope))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_has_position_0(device, backend):
    torch.manual_seed(0)
    qkv, (cos, sin) = torch.randn(2, 4, 32, device=device), tables(5, 8, device)
    grads = [torch.randn(2, n, 4, 8, device=device) for n in (2, 1, 1)]
    padded, clamped = (torch.tensor([[-1, -1, 0, 1], [n, 2, 3, 4]], device=device) for n in (-(2**31), 0))
    clamped[0, :2] = 0
    with use_backend(backend):
        actual, expected = (packed_gradients(rope_qkv, qkv, cos, sin, 2, 1, grads, positions=p) for p in (padded, clamped))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_keeps_gradients_finite(device, backend):
    # Padded rows enter attention's matrix products, where NaN times 0 would reach real rows.
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 4 * 16, device=device, requires_grad=True)
    mask = torch.arange(9, device=device) >= torch.tensor([[3], [0]], device=device)
    positions = (mask.cumsum(1) - 1).masked_fill(~mask, -1)
    with use_backend(backend):
        o = attention(*rope_qkv(qkv, *tables(9, 16, device), 2, 1, positions), document_ids=mask.long())
        (dqkv,) = torch.autograd.grad((o * mask[:, None, :, None]).sum(), qkv)
    assert dqkv.isfinite().all()
    assert not dqkv[~mask].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_past_the_tables_raise_or_give_nan(device, backend):
    x, (cos, sin) = torch.ones(1, 1, 4, 8, device=device), tables(5, 8, device)
    positions = torch.tensor([4, 5, -1, 2**40], device=device)
    with use_backend(backend):
        if device.type == "cpu":
            with pytest.raises(ValueError, match=r"positions contains 1099511627776: expected less than 5"):
                rope(x, cos, sin, positions)
        else:
            y = rope(x, cos, sin, positions)
            assert y[0, 0, [0, 2]].isfinite().all()
            assert y[0, 0, [1, 3]].isnan().all()
    positions = positions[None]
    for y in (
        torch.ops.tilewright.rope(x, cos, sin, positions, 0, True, False, False),
        reference.rope(x, cos, sin, positions),
    ):
        assert y[0, 0, [0, 2]].isfinite().all()
        assert y[0, 0, [1, 3]].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_passes_gradcheck(layout):
    q, k = (torch.randn(2, h, 3, 4, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    cos, sin = (table.double() for table in tables(5, 2))
    assert torch.autograd.gradcheck(lambda q, k: reference.rope_qk(q, k, cos, sin, layout=layout, offset=2), (q, k))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "diagonal"}, r"'diagonal'.*'interleaved' or 'half'"),
        ({"q": torch.ones(1, 2, 5, 8, dtype=torch.int64)}, r"q has dtype torch\.int64.*torch\.float32"),
        ({"q": torch.ones(1, 2, 5, 7)}, r"q has heads of shape \(1, 2, 5, 7\).*even"),
        ({"q": torch.ones(1, 2, 5, 0)}, r"K even and from 2 to 256"),
        ({"q": torch.ones(1, 2, 5, 258)}, r"K even and from 2 to 256"),
        ({"k": torch.ones(1, 2, 4, 8)}, r"k \(1, 2, 4, 8\)"),
        ({"k": torch.ones(1, 2, 5, 10)}, r"k \(1, 2, 5, 10\)"),
        ({"k": torch.ones(1, 2, 5, 8, device="meta")}, r"k is on meta.*cpu, the device of q"),
        ({"q": torch.ones(2, 5, 8)}, r"q has shape \(2, 5, 8\).*\(B, H, T, K\)"),
        ({"cos": torch.ones(9, 8), "sin": torch.ones(9, 8)}, r"cos has shape \(9, 8\).*\(positions, 4\)"),
        ({"cos": torch.ones(9, 0), "sin": torch.ones(9, 0)}, r"cos has shape \(9, 0\).*\(positions, 4\)"),
        ({"sin": torch.ones(9, 4, device="meta")}, r"sin is on meta.*cpu, the device of q"),
        ({"sin": torch.ones(9, 4, dtype=torch.int32)}, r"sin has dtype torch\.int32"),
        ({"sin": torch.ones(8, 4)}, r"sin \(8, 4\).*for both"),
        ({"offset": 5}, r"offset is 5 with 5 tokens.*0 to 4.*9 positions"),
        ({"offset": -1}, r"offset is -1"),
        ({"offset": 1.5}, r"offset is 1\.5: expected an integer"),
        ({"offset": 1, "positions": torch.arange(5)}, r"offset is 1: expected 0 with positions"),
        ({"positions": torch.arange(4)}, r"positions has shape \(4,\).*\(5,\) or \(1, 5\)"),
        ({"positions": torch.ones(5)}, r"positions has dtype torch\.float32.*torch\.int64"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_raise(change, message, backend):
    arguments = {"q": torch.ones(1, 2, 5, 8), "k": torch.ones(1, 2, 5, 8), "cos": torch.ones(9, 4), "sin": torch.ones(9, 4)}
    with use_backend(backend), pytest.raises(ValueError, match=message):
        rope_qk(**arguments | change)


@pytest.mark.gpu
def test_autocast_keeps_dtypes():
    x = torch.randn(1, 2, 5, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert rope(x, *tables(5, 8, "cuda")).dtype == torch.float32
        assert rope(x.half(), *tables(5, 8, "cuda")).dtype == torch.float16


def packed_gradients(function, qkv, cos, sin, num_heads, num_kv_heads, grads, **options):
    qkv = qkv.detach().requires_grad_()
    parts = function(qkv, cos, sin, num_heads, num_kv_heads, **options)
    (dqkv,) = torch.autograd.grad(parts, [qkv], [g.to(qkv.dtype) for g in grads])
    return [*(part.detach() for part in parts), dqkv]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim"), [(3, 3, 16, 16), (20, 5, 10, 10), (4, 1, 64, 64), (4, 2, 24, 6)]
)
def test_packed_projection_is_split_and_rotated(device, dtype, num_heads, num_kv_heads, head_dim, rotary_dim, layout):
    torch.manual_seed(head_dim)
    heads = num_heads + 2 * num_kv_heads
    # A slice of a wider tensor, and gradients in both memory layouts.
    qkv = torch.randn(2, 9, heads * head_dim + 8, dtype=dtype, device=device)[..., 8:]
    grads = [torch.randn(2, n, 9, head_dim, dtype=dtype, device=device) for n in (num_heads, num_kv_heads)]
    grads.append(torch.randn(2, 9, num_kv_heads, head_dim, dtype=dtype, device=device).transpose(1, 2))
    cos, sin = tables(12, rotary_dim, device)
    sizes = (num_heads, num_kv_heads, grads)
    options = {"layout": layout, "offset": 3}
    with use_backend("triton"), poisoned_memory():
        actual = packed_gradients(rope_qkv, qkv, cos, sin, *sizes, **options)
    expected = packed_gradients(reference.rope_qkv, qkv, cos, sin, *sizes, **options)
    exact = packed_gradients(reference.rope_qkv, qkv.double(), cos.double(), sin.double(), *sizes, **options)
    for what, *tensors in zip(("q", "k", "v", "dqkv"), actual, expected, exact, strict=True):
        assert_accurate(*tensors, what=what)
    assert torch.equal(actual[2], expected[2])
    assert all(part.transpose(1, 2).is_contiguous() for part in actual[:3])


def test_packed_projection_with_positions():
    qkv, (cos, sin) = torch.randn(2, 5, 4 * 8), tables(30, 8)
    for positions in torch.randint(0, 30, (2, 5)), torch.randint(0, 30, (1, 5)):
        with use_backend("triton"):
            parts = rope_qkv(qkv, cos, sin, 2, 1, positions=positions)
        for part, expected in zip(parts, reference.rope_qkv(qkv, cos, sin, 2, 1, positions.expand(2, -1)), strict=True):
            torch.testing.assert_close(part, expected)


@pytest.mark.parametrize(("shape", "heads"), [((2, 5, 33), (2, 1)), ((5, 32), (2, 1)), ((2, 5, 0), (2, 1))])
def test_packed_projection_of_wrong_width_raises(shape, heads):
    with pytest.raises(ValueError, match=r"qkv has (heads of )?shape \("):
        rope_qkv(torch.zeros(shape), *tables(5, 8), *heads)


def test_bad_numbers_of_heads_raise():
    with pytest.raises(ValueError, match=r"num_kv_heads is 0: expected an integer, 1 or more"):
        rope_qkv(torch.zeros(2, 5, 32), *tables(5, 8), 2, 0)
    with pytest.raises(ValueError, match=r"num_heads is 2\.0"):
        rope_qkv(torch.zeros(2, 5, 32), *tables(5, 8), 2.0, 1)  # pyright: ignore
