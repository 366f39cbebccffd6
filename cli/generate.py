"""Texts from a model: continued, in conversation, or over HTTP."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from .options import Positional, parse


def generate(arguments: Sequence[str]) -> None:
    """Let a trained model go on with texts."""
    import dataclasses
    import json

    from ..train.pretrained import load_text_model
    from ..train.sample import SampleConfig, write_texts

    def command(
        folder: Positional[Path],
        config: Annotated[SampleConfig, tyro.conf.arg(name="")] = SampleConfig(),  # noqa: B008
        json_lines: Annotated[bool, tyro.conf.arg(name="json")] = False,
        device: str = "auto",
    ) -> None:
        """Let a trained model go on with texts.

        Args:
            folder: Folder of a run, or of a model in Hugging Face's manner.
            config: How.
            json_lines: Print a JSON object a line: prompt, text (what follows the prompt), num_tokens, finish_reason.
            device: cuda, cpu, or auto.
        """
        texts = write_texts(load_text_model(folder, device), config)
        if json_lines:
            print("\n".join(json.dumps(dataclasses.asdict(text), ensure_ascii=False) for text in texts))
        else:
            print("\n\n---\n\n".join(text.prompt + text.text for text in texts))

    parse(command, "generate", arguments)


def chat(arguments: Sequence[str]) -> None:
    """Talk with a model in the terminal."""
    from ..train.chat import ChatConfig, run_chat

    def command(
        folder: Positional[Path],
        config: Annotated[ChatConfig, tyro.conf.arg(name="")] = ChatConfig(),  # noqa: B008
    ) -> None:
        """Talk with a model in the terminal: /reset begins anew, Ctrl-C ends an answer, Ctrl-D the chat.

        Args:
            folder: Folder of a model that has a chat template, in Hugging Face's manner, or of a run that began with one.
            config: How.
        """
        run_chat(folder, config)

    parse(command, "chat", arguments)


def serve(arguments: Sequence[str]) -> None:
    """Serve a model over HTTP as OpenAI's API does: completions and chat."""
    from ..train.serving.server import ServeConfig
    from ..train.serving.server import serve as run

    def command(
        folder: Positional[Path],
        config: Annotated[ServeConfig, tyro.conf.arg(name="")] = ServeConfig(),  # noqa: B008
    ) -> None:
        """Serve a model over HTTP as OpenAI's API does: /v1/completions, /v1/chat/completions, /v1/models, /health.

        Args:
            folder: Folder of a run, or of a model in Hugging Face's manner; chat needs a chat template.
            config: How.
        """
        run(folder, config)

    parse(command, "serve", arguments)
