"""The commands `generate`, `chat` and `serve`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from .options import Positional, parse


def generate(arguments: Sequence[str]) -> None:
    """Continue prompts with a trained model."""
    from ..train.options import SampleConfig

    def command(
        folder: Positional[Path],
        config: Annotated[SampleConfig, tyro.conf.arg(name="")] = SampleConfig(),  # noqa: B008
        json_lines: Annotated[bool, tyro.conf.arg(name="json")] = False,
        device: str = "auto",
    ) -> None:
        """Continue prompts with a trained model.

        Args:
            folder: Folder of a run, or a Hugging Face model folder.
            config: Options of sampling.
            json_lines: Print one JSON object per line: prompt, text (without the prompt), num_tokens, finish_reason.
            device: cuda, cpu, or auto.
        """
        import dataclasses
        import json

        from ..train.pretrained import load_text_model
        from ..train.sample import write_texts

        texts = write_texts(load_text_model(folder, device, config.tokenizer), config)
        if json_lines:
            print("\n".join(json.dumps(dataclasses.asdict(text), ensure_ascii=False) for text in texts))
        else:
            print("\n\n---\n\n".join(text.prompt + text.text for text in texts))

    parse(command, "generate", arguments)


def chat(arguments: Sequence[str]) -> None:
    """Chat with a model in the terminal."""
    from ..train.options import ChatConfig

    def command(
        folder: Positional[Path],
        config: Annotated[ChatConfig, tyro.conf.arg(name="")] = ChatConfig(),  # noqa: B008
    ) -> None:
        """Chat with a model in the terminal. /reset starts over, Ctrl-C stops an answer, Ctrl-D exits.

        Args:
            folder: A Hugging Face model folder with a chat template, or the folder of a run that was started from one.
            config: Options of the chat.
        """
        from ..train.chat import run_chat

        run_chat(folder, config)

    parse(command, "chat", arguments)


def serve(arguments: Sequence[str]) -> None:
    """Serve a model over HTTP with OpenAI's API for completions and chat."""
    from ..train.serving.options import ServeConfig

    def command(
        folder: Positional[Path],
        config: Annotated[ServeConfig, tyro.conf.arg(name="")] = ServeConfig(),  # noqa: B008
    ) -> None:
        """Serve a model over HTTP with OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models, /health.

        Args:
            folder: Folder of a run, or a Hugging Face model folder; chat needs a chat template.
            config: Options of the server.
        """
        from ..train.serving.server import serve as run

        run(folder, config)

    parse(command, "serve", arguments)
