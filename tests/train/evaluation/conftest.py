import pytest
import torch

from tilewright.model import ModelConfig, TransformerLM
from tilewright.tokenizer import Tokenizer
from tilewright.train.evaluation import Scorer
from tilewright.train.pretrained import TextModel


@pytest.fixture(scope="session")
def text_model(corpus):
    """A scorer of a small random model whose answers differ, with the tokenizer of the corpus."""
    tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, context_length=24, d_model=32, num_layers=2, num_heads=4, d_ff=64)
    model = TransformerLM(shape)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return TextModel(model.eval(), tokenizer, end_tokens=(tokenizer.end_of_text_id,))


@pytest.fixture(scope="session")
def scorer(text_model):
    return Scorer(text_model, "float32", batch_tokens=100)


@pytest.fixture(scope="session")
def nats_of(text_model):
    """Return the nats of the last token given the others, from a separate forward pass."""

    @torch.no_grad()
    def nats(tokens):
        logits = text_model.model(torch.tensor([tokens[:-1]]))[0, -1].double()
        return float(-torch.log_softmax(logits, 0)[tokens[-1]])

    return nats
