"""Pre-train a small model on stories, fine-tune it on chats, and ask it a question: a whole run from Python.

The folder must be new. The same steps at full size are the commands `tilewright train` and `tilewright train --init`.

    python examples/pretrain_and_finetune.py runs/example
"""

import dataclasses
import json
import sys
from pathlib import Path

from tilewright.model import ModelConfig
from tilewright.tokenizer import END_OF_TEXT, Tokenizer, train_bpe
from tilewright.train import OptimizerConfig, SampleConfig, TrainConfig, load_text_model, train, write_texts
from tilewright.train.data.corpus import write_stories
from tilewright.train.presets import corpus_files, finetuning

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + ('<|endoftext|>' if m.role == 'assistant' else '\n') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
SOUNDS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "frog": "croak"}


def pretrain(folder: Path) -> Path:
    """Train a model from scratch and return the folder of the run."""
    data = corpus_files(folder / "data")
    write_stories(data.train[0], megabytes=0.5, seed=0)
    write_stories(data.valid, megabytes=0.05, seed=1)
    Tokenizer(*train_bpe(data.train[0], 512, [END_OF_TEXT]), [END_OF_TEXT]).save(data.tokenizer)
    config = TrainConfig(
        out=folder / "pretrained",
        model=ModelConfig(vocab_size=512, context_length=64, d_model=64, num_layers=2, num_heads=4, d_ff=192),
        data=data,
        steps=100,
        batch_size=16,
        optimizer=OptimizerConfig(lr=8e-3, final_lr=8e-4, warmup_steps=10),
        eval_every=50,
        eval_sequences=32,
    )
    print(f"pre-training: validation loss {train(config).valid_loss:.2f} nats/token")
    return config.out


def finetune(pretrained: Path, folder: Path) -> Path:
    """Train the model on chats, with the loss on the answers only, and return the folder of the run."""
    chats, template = folder / "data" / "chats.jsonl", folder / "data" / "chat_template.jinja"
    template.write_text(TEMPLATE)
    with chats.open("w") as file:
        for animal, sound in SOUNDS.items():
            question = {"role": "user", "content": f"What does the {animal} say?"}
            answer = {"role": "assistant", "content": f"The {animal} says {sound}."}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    base = finetuning(pretrained)  # the shape and the tokenizer of the pre-trained model
    config = dataclasses.replace(
        base,
        out=folder / "finetuned",
        # So few chats are their own validation data.
        data=dataclasses.replace(base.data, train=(chats,), valid=chats, chat_template=template),
        steps=60,
        batch_size=8,
        micro_batch_size=8,
        optimizer=dataclasses.replace(base.optimizer, lr=4e-3, final_lr=4e-4, warmup_steps=5),
    )
    print(f"fine-tuning: validation loss {train(config).valid_loss:.2f} nats/token")
    return config.out


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example")
    run = finetune(pretrain(out), out)
    text = write_texts(load_text_model(run), SampleConfig(("user: What does the duck say?\nassistant:",), temperature=0.0))[0]
    print(f"{text.prompt}{text.text}")
