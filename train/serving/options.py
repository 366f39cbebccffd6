"""Options of the server. This module imports no torch."""

from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UserError


@dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    max_body_bytes: int = 1 << 20
    """Maximum size of a request body in bytes."""
    max_prompts: int = 16
    """Maximum number of prompts in a request."""
    max_choices: int = 16
    """Maximum number of texts in a response: prompts times n."""
    default_new_tokens: int = 16
    """New tokens of a completion without max_tokens, as in the OpenAI API. Chats default to the end of the context."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"{name} is {value}: expected at least 1")


@dataclass(frozen=True)
class ServeConfig:
    """Options of the server."""

    host: str = "127.0.0.1"
    """Address to listen on; the default accepts only this machine."""
    port: int = 8000
    """Port to listen on; 0 selects a free port."""
    name: str | None = None
    """Name of the model in requests; by default the name of the folder."""
    template: Path | None = None
    """File with a chat template; by default, the folder's own."""
    num_slots: int = 8
    """Maximum number of texts generated at a time."""
    max_length: int | None = None
    """Maximum tokens of a prompt and its text, the length of each slot's cache; default: the context, at most 4,096."""
    max_queue: int = 64
    """Maximum number of texts that wait for a slot; further requests get status 429."""
    api_key_file: Path | None = None
    """File with the API key that requests must send; by default the key in TILEWRIGHT_API_KEY, if set."""
    shutdown_seconds: int = 30
    """Seconds that running requests may take to finish after SIGTERM or Ctrl-C."""
    limits: Limits = field(default_factory=Limits)
    """Limits of one request."""
    device: str = "auto"
    """cuda, cpu, or auto."""
    tokenizer: Path | None = None
    """File of the tokenizer; default: tokenizer.json in the model's folder."""

    def __post_init__(self) -> None:
        for name, least in (("num_slots", 1), ("max_length", 1), ("max_queue", 0), ("shutdown_seconds", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}: expected at least {least}")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port is {self.port}: expected 0 to 65535")
