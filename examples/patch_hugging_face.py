"""Patch a Hugging Face model with the kernels, compare it with the original, and undo the patch.

The model is a small Llama with random weights, so that nothing is downloaded. `AutoModelForCausalLM.from_pretrained(...)` works
in its place.

    pip install 'tilewright[hf]'
    python examples/patch_hugging_face.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tilewright


def main() -> None:
    """Compare logits, loss and gradients before and after the patch."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")
    tokens = torch.randint(1000, (2, 48), device=model.device)
    # The first sequence has 10 tokens of padding on its left.
    mask = torch.ones_like(tokens)
    mask[0, :10] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[0, 10] = -100  # predicted by a padding token

    def run() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        output = model(tokens, attention_mask=mask, labels=labels)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask).logits
        return output.loss.detach(), logits[mask == 1], list(gradients)

    original = run()
    applied = tilewright.apply_to(model)  # this instance only
    for part, modules in applied.replaced.items():
        print(f"{part:10} {len(modules)} replaced")
    patched = run()
    applied.revert()
    reverted = run()

    loss_error = (patched[0] - original[0]).abs().item()
    logit_error = (patched[1] - original[1]).abs().max().item()
    gradient_error = max((a - b).abs().max().item() for a, b in zip(patched[2], original[2], strict=True))
    print(f"largest differences: loss {loss_error:.1e}, logits {logit_error:.1e}, gradients {gradient_error:.1e}")
    print(f"after revert the logits are {'equal' if torch.equal(reverted[1], original[1]) else 'different'}")


if __name__ == "__main__":
    main()
