import torch
from torch import nn

from tilewright.train.ema import EMA


def test_ema_follows_the_weights():
    model = nn.Linear(3, 2, bias=False)
    mean = EMA(model, 0.9)
    expected = model.weight.detach().clone().double()
    for step in range(1, 200):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        mean.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(mean.weights["weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_ema_replaces_the_weights_inside_the_context():
    model = nn.Linear(3, 2, bias=False)
    mean = EMA(model, 0.9)
    own = torch.full((2, 3), 5.0)
    with torch.no_grad():
        model.weight.copy_(own)
    storage = model.weight.data_ptr()
    try:
        with mean.in_place_of_the_weights():
            assert torch.equal(model.weight, mean.weights["weight"])
            raise InterruptedError
    except InterruptedError:
        pass
    assert torch.equal(model.weight, own)
    assert model.weight.data_ptr() == storage
    assert not torch.equal(mean.weights["weight"], own)
