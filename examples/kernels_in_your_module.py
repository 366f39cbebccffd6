"""Use the kernels as plain functions inside a module of your own, and check it against the same module in PyTorch ops.

On a GPU the functions run Triton kernels, elsewhere their PyTorch references. The model learns to repeat a sequence:
the first 12 of 48 tokens are random, so that the best possible loss is 11/47 ln(64) = 0.97.

    python examples/kernels_in_your_module.py
"""

import torch
from torch import Tensor, nn

from tilewright.kernels import attention, linear_cross_entropy, rms_norm, rope_qkv, rope_tables, swiglu, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB_SIZE, WIDTH, HEADS, PERIOD = 64, 64, 4, 12


class Block(nn.Module):
    """A pre-norm Transformer block whose parameters are ordinary PyTorch modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.qkv, self.output = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up, self.down = nn.Linear(WIDTH, 6 * WIDTH, bias=False), nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        # One launch splits the projection into (B, H, T, K) heads and rotates q and k.
        q, k, v = rope_qkv(self.qkv(rms_norm(x, self.norm1)), cos, sin, HEADS, HEADS)
        x = x + self.output(attention(q, k, v).transpose(1, 2).flatten(-2))
        # swiglu reads gate and up from one packed tensor.
        return x + self.down(swiglu(self.gate_up(rms_norm(x, self.norm2))))


class Model(nn.Module):
    """Embedding, two blocks, and a loss that never holds the logits of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB_SIZE, WIDTH), nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        self.blocks, self.norm = nn.ModuleList([Block(), Block()]), nn.Parameter(torch.ones(WIDTH))
        self.tables = rope_tables(WIDTH // HEADS, 4 * PERIOD, device=DEVICE)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next tokens, in nats."""
        x, targets = self.embedding(tokens[:, :-1]), tokens[:, 1:]
        for block in self.blocks:
            x = block(x, *(table[: x.shape[1]] for table in self.tables))
        return linear_cross_entropy(rms_norm(x, self.norm), self.head.weight, targets)


def batch() -> Tensor:
    """Return random sequences that repeat with a period, (16, 4 * PERIOD)."""
    return torch.randint(VOCAB_SIZE, (16, PERIOD), device=DEVICE).repeat(1, 4)


def main() -> None:
    """Train, then compare the loss with the PyTorch reference."""
    torch.manual_seed(0)
    model = Model().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(200):
        loss = model(batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}")
    tokens = batch()
    with torch.no_grad(), use_backend("reference"):
        expected = model(tokens).item()
    print(f"loss {model(tokens).item():.3f}, with the PyTorch reference {expected:.3f}")


if __name__ == "__main__":
    main()
