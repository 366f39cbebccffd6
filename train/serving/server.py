"""Run the server: load the model, bind the address, and shut down gracefully."""

import os
import socket
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError
from ...files import read_text
from ...tokenizer.chat_template import ChatTemplate
from ..pretrained import load_text_model
from ..texts import make_engine
from .app import Service, is_loopback, make_app
from .options import ServeConfig
from .worker import Worker

if TYPE_CHECKING:
    import uvicorn

KEY_VARIABLE = "TILEWRIGHT_API_KEY"


_DEFAULT_MAX_LENGTH = 4096


def make_service(folder: Path, config: ServeConfig) -> Service:
    """Load the model in a folder for serving."""
    key = _read_key(config.api_key_file)
    template = ChatTemplate.load(folder, config.template)
    text_model = load_text_model(folder, config.device, config.tokenizer)
    max_length = config.max_length or min(text_model.model.config.context_length, _DEFAULT_MAX_LENGTH)
    worker = Worker(make_engine(text_model, config.num_slots, max_length), config.max_queue)
    name, local_only = config.name or folder.resolve().name, is_loopback(config.host) and key is None
    return Service(name, text_model, template, worker, config.limits, key, local_only)


def make_server(service: Service, config: ServeConfig) -> "uvicorn.Server":
    """Return the server. At SIGTERM or SIGINT, its `run` refuses new requests, lets running ones finish, and returns."""
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
    """Serve the model in a folder until a signal arrives."""
    require_packages()
    if not is_loopback(config.host) and _read_key(config.api_key_file) is None:
        warnings.warn(
            f"{config.host} is reachable from other machines without an API key: set one in {KEY_VARIABLE}", stacklevel=2
        )
    service = make_service(folder, config)
    kinds = "completions" if service.template is None else "completions and chat"
    server = make_server(service, config)
    # Bind here, not in uvicorn, to print the actual port and to report an address in use as a UserError.
    with _bind(config) as bound:
        host, port = bound.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        print(f"{service.name}: {kinds} at http://{address}:{port}/v1, stop with Ctrl-C", flush=True)
        # uvicorn raises the signal again after its shutdown.
        with suppress(KeyboardInterrupt):
            server.run(sockets=[bound])
    if service.worker.failed:
        raise UserError("the model failed: see the log above")


def require_packages() -> None:
    """Raise a `UserError` if starlette or uvicorn is not installed."""
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
        raise UserError(f"cannot listen on {config.host} port {config.port}: {error.strerror}") from None
    return bound


def _read_key(path: Path | None) -> str | None:
    """Return the API key from a file or the environment, or None; raise a `UserError` if the key is empty."""
    if path is not None:
        key = read_text(path, "API key file").strip()
        source = str(path)
    elif (key := os.environ.get(KEY_VARIABLE)) is not None:
        key, source = key.strip(), KEY_VARIABLE
    else:
        return None
    if not key:
        raise UserError(f"{source} is empty: expected an API key")
    return key
