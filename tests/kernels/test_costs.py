from tilewright.kernels import costs
from tilewright.kernels.costs import Cost


def test_the_roofline_is_the_slower_of_bytes_and_flops():
    assert Cost(100, 10).seconds(bytes_per_second=10, flops_per_second=10) == 10
    assert Cost(10, 100).seconds(10, 10) == 10
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_bytes_by_hand():
    forward, backward = costs.rms_norm(4, 8, 2)
    assert forward.bytes == 2 * 4 * 8 * 2 + 8 * 2 + 4 * 4
    assert backward.bytes == 3 * 4 * 8 * 2 + 2 * 8 * 2 + 4 * 4
    forward, backward = costs.add_rms_norm(4, 8, 2, residual_itemsize=4)
    assert forward.bytes == 2 * 32 * 2 + 2 * 32 * 4 + 8 * 2 + 4 * 4
    assert backward.bytes == 32 * 2 + 2 * 32 * 4 + 32 * 4 + 32 * 2 + 2 * 8 * 2 + 4 * 4
    assert [cost.bytes for cost in costs.swiglu(4, 8, 2)] == [3 * 64, 5 * 64]
    assert costs.rope(4, 2, 8, 2)[0].bytes == 2 * 64 * 2 + 4 * 4 * 8
    assert [cost.bytes for cost in costs.cross_entropy(4, 100, 2)] == [800 + 48, 1600 + 64]
    assert costs.linear_cross_entropy(4, 8, 100, 2).flops == 3 * 2 * 4 * 8 * 100
