"""Shared helpers of the cross-entropy tests: random logits with an ignored row, and a loss with its gradient."""

import torch

BACKENDS = ["triton", "reference"]
EVERY_OPTION = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}


def loss_and_gradient(function, logits, targets, dloss=None, dlse=None, **options):
    logits = logits.detach().requires_grad_()
    output = function(logits, targets, return_lse=True, return_accuracy=True, **options)
    outputs, gradients = [output.loss], [torch.ones_like(output.loss) if dloss is None else dloss.to(output.loss.dtype)]
    if dlse is not None:
        outputs, gradients = [*outputs, output.lse], [*gradients, dlse.to(output.lse.dtype)]
    (dlogits,) = torch.autograd.grad(outputs, logits, gradients)
    return *(None if x is None else x.detach() for x in output), dlogits


def draw(shape, vocabulary, device, dtype=torch.float32, scale=3.0):
    torch.manual_seed(vocabulary)
    targets = torch.randint(0, vocabulary, shape, device=device)
    if targets.numel() > 2:
        targets.view(-1)[1] = -100
    return (scale * torch.randn(*shape, vocabulary, device=device)).to(dtype), targets
