"""The server as a process: a model's folder, an address, and an end in good order."""

import os
import socket
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError
from ...files import read_text
from ...tokenizer.chat_template import ChatTemplate
from ..pretrained import load_text_model
from ..texts import make_engine
from .app import Service, is_loopback, make_app
from .protocol import Limits
from .worker import Worker

if TYPE_CHECKING:
    import uvicorn

KEY_VARIABLE = "TILEWRIGHT_API_KEY"


@dataclass(frozen=True)
class ServeConfig:
    """How to serve a model."""

    host: str = "127.0.0.1"
    """Address to listen at; by default this machine only."""
    port: int = 8000
    """Port; 0 takes a free one."""
    name: str | None = None
    """Name of the model in requests; by default the folder's."""
    template: Path | None = None
    """Chat template in place of the folder's."""
    num_slots: int = 8
    """Texts written at a time."""
    max_length: int | None = None
    """Most tokens of a prompt and its text together; by default the context, at most 4,096. Each slot has memory for them."""
    max_queue: int = 64
    """Most texts that wait for a slot; requests beyond that get status 429."""
    api_key_file: Path | None = None
    """File with the key that requests must bear; by default that in TILEWRIGHT_API_KEY, if any."""
    shutdown_seconds: int = 30
    """How long texts may go on after SIGTERM or Ctrl-C."""
    limits: Limits = field(default_factory=Limits)
    """What one request may ask for."""
    device: str = "auto"
    """cuda, cpu, or auto."""

    def __post_init__(self) -> None:
        for name, least in (("num_slots", 1), ("max_length", 1), ("max_queue", 0), ("shutdown_seconds", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}: it must be at least {least}")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port is {self.port}: it must be from 0 to 65535")


_DEFAULT_MAX_LENGTH = 4096


def make_service(folder: Path, config: ServeConfig) -> Service:
    """Open a model's folder to be served."""
    key = _read_key(config.api_key_file)
    template = ChatTemplate.load(folder, config.template)
    text_model = load_text_model(folder, config.device)
    max_length = config.max_length or min(text_model.model.config.context_length, _DEFAULT_MAX_LENGTH)
    worker = Worker(make_engine(text_model, config.num_slots, max_length), config.max_queue)
    name, local_only = config.name or folder.resolve().name, is_loopback(config.host) and key is None
    return Service(name, text_model, template, worker, config.limits, key, local_only)


def make_server(service: Service, config: ServeConfig) -> "uvicorn.Server":
    """Return the server, whose `run` ends at SIGTERM or SIGINT: running requests may end first, new ones are refused."""
    require_packages()
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            make_app(service),
            host=config.host,
            port=config.port,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=config.shutdown_seconds,
        )
    )


def serve(folder: Path, config: ServeConfig) -> None:
    """Serve the model in a folder until a signal ends it."""
    require_packages()
    if not is_loopback(config.host) and _read_key(config.api_key_file) is None:
        warnings.warn(f"{config.host} is open to other machines and no API key is set: see {KEY_VARIABLE}", stacklevel=2)
    service = make_service(folder, config)
    kinds = "completions" if service.template is None else "completions and chat"
    server = make_server(service, config)
    # Bound here, so that the port is known, and an address in use is an error of the command.
    with _bind(config) as bound:
        host, port = bound.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        print(f"{service.name}: {kinds} at http://{address}:{port}/v1, Ctrl-C ends", flush=True)
        # uvicorn raises the signal that ended it once more.
        with suppress(KeyboardInterrupt):
            server.run(sockets=[bound])
    if service.worker.failed:
        raise UserError("the model failed: see the lines above")


def require_packages() -> None:
    """Raise a `UserError` where what serves HTTP is not installed."""
    try:
        import starlette
        import uvicorn  # noqa: F401

        _ = starlette
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'tilewright[serve]'") from None


def _bind(config: ServeConfig) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise UserError(f"{config.host} port {config.port} cannot be listened at: {error.strerror}") from None
    return bound


def _read_key(path: Path | None) -> str | None:
    """Return the key of a file, or of the environment; an empty one is a `UserError`."""
    if path is not None:
        key = read_text(path, "API key file").strip()
        source = str(path)
    elif (key := os.environ.get(KEY_VARIABLE)) is not None:
        key, source = key.strip(), KEY_VARIABLE
    else:
        return None
    if not key:
        raise UserError(f"{source} holds no API key: put one in, or leave it out")
    return key
