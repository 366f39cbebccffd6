"""The ASGI application: routes, authentication and request handling."""

import asyncio
import hmac
import ipaddress
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...errors import UserError
from ...model import Generation
from ...model.prompts import checked_prompt
from ...tokenizer.chat_template import ChatTemplate
from ..conversation import encode_conversation
from ..pretrained import TextModel
from ..texts import TextStream, encode_prompt
from .errors import ApiError
from .options import Limits
from .protocol import GenerationRequest, check_model, read_chat, read_completion
from .replies import Reply
from .worker import Job, Piece, Worker

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

_BODY_SECONDS = 30


@dataclass(frozen=True)
class Service:
    """A model and the access rules of its server."""

    name: str
    """Name of the model in requests and responses."""
    text_model: TextModel
    template: ChatTemplate | None
    """Chat template; without one, only completions are served."""
    worker: Worker
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None
    """API key that requests must send; None accepts all requests."""
    local_only: bool = False
    """Whether the Host header must be a loopback name or address, such as localhost."""


def make_app(service: Service) -> "Starlette":
    """Return the application; it starts the worker on startup and stops it on shutdown."""
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    created = int(time.time())

    async def health(request: "Request") -> "Response":
        failed = service.worker.failed
        texts = service.worker.num_texts
        return JSONResponse({"status": "failed" if failed else "ok", "texts": texts}, 503 if failed else 200)

    described = {"id": service.name, "object": "model", "created": created, "owned_by": "tilewright"}

    async def models(request: "Request") -> "Response":
        return JSONResponse({"object": "list", "data": [described]})

    async def model(request: "Request") -> "Response":
        check_model(request.path_params["name"], service.name)
        return JSONResponse(described)

    async def completions(request: "Request") -> "ASGIApp":
        return await _answer(service, request, chat=False)

    async def chat_completions(request: "Request") -> "ASGIApp":
        if service.template is None:
            raise ApiError(404, "the model has no chat template: use /v1/completions")
        return await _answer(service, request, chat=True)

    def guarded(route: Callable[["Request"], Awaitable["ASGIApp"]]) -> Callable[["Request"], Awaitable["ASGIApp"]]:
        async def endpoint(request: "Request") -> "ASGIApp":
            if service.local_only:
                _check_host(request.url.hostname)
            _check_key(request.headers.get("authorization", ""), service.api_key)
            return await route(request)

        return endpoint

    async def on_api_error(request: "Request", error: Exception) -> "Response":
        assert isinstance(error, ApiError)
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body, error.status, headers)

    async def on_http_error(request: "Request", error: Exception) -> "Response":
        status = getattr(error, "status_code", 500)
        what = {404: "does not exist", 405: "does not allow this method"}.get(status, "failed")
        return JSONResponse(ApiError(status, f"{request.method} {request.url.path} {what}").body, status)

    @asynccontextmanager
    async def lifespan(app: "Starlette") -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.worker.close)

    routes = [
        Route("/health", health),
        Route("/v1/models", guarded(models)),
        Route("/v1/models/{name:path}", guarded(model)),
        Route("/v1/completions", guarded(completions), methods=["POST"]),
        Route("/v1/chat/completions", guarded(chat_completions), methods=["POST"]),
    ]
    handlers = {ApiError: on_api_error, 404: on_http_error, 405: on_http_error, 500: on_http_error}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is localhost or a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_host(host: str | None) -> None:
    # Prevents DNS rebinding: a web page can make its own host name resolve to this machine.
    if host and not is_loopback(host):
        raise ApiError(403, f"the host is {host!r:.100}: without an API key, expected localhost")


def _check_key(authorization: str, key: str | None) -> None:
    scheme, _, given = authorization.partition(" ")
    if key is None or (scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())):
        return
    raise ApiError(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY", code="invalid_api_key")


async def _answer(service: Service, request: "Request", chat: bool) -> "ASGIApp":
    from starlette.responses import JSONResponse, StreamingResponse

    body = await _read_json(request, service.limits.max_body_bytes)
    asked = (read_chat if chat else read_completion)(body, service.name, service.limits)
    # Encoding long texts is slow; do not block the event loop.
    prompts = await asyncio.to_thread(_encode, service, asked)
    job = _make_job(service, asked, prompts)
    service.worker.submit(job)
    reply = Reply(service.name, chat, len(job.generations), sum(map(len, prompts)))
    if asked.stream:
        events = reply.events(_pieces(job), asked.include_usage)
        response = StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

        async def stream(scope: "Scope", receive: "Receive", send: "Send") -> None:
            try:
                await response(scope, receive, send)
            finally:
                # This also runs if the client disconnects before the first event.
                service.worker.cancel(job)

        return stream
    disconnected = asyncio.create_task(_disconnect(request))
    content = asyncio.create_task(reply.content(_pieces(job)))
    try:
        await asyncio.wait([disconnected, content], return_when=asyncio.FIRST_COMPLETED)
        # 499: the client has disconnected and does not read the response.
        return JSONResponse(await content) if content.done() else JSONResponse({}, 499)
    finally:
        disconnected.cancel()
        content.cancel()
        service.worker.cancel(job)


async def _read_json(request: "Request", max_bytes: int) -> object:
    # Browsers send this type to another site only after a CORS preflight, which this server does not grant.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "expected content type application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise ApiError(413, f"the body is too long: expected at most {max_bytes:,} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {_BODY_SECONDS} seconds") from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error!s:.100}") from None


def _encode(service: Service, asked: GenerationRequest) -> list[list[int]]:
    """Return the ids of each prompt; raise an `ApiError` for a prompt that cannot be served."""
    text_model, engine = service.text_model, service.worker.engine
    try:
        if service.template is not None and asked.messages:
            prompts = [encode_conversation(text_model, service.template, asked.messages)]
        else:
            prompts = [
                encode_prompt(text_model, prompt, parse_special=False) if isinstance(prompt, str) else prompt
                for prompt in asked.prompts
            ]
    except UserError as error:
        raise ApiError(400, str(error), "messages" if asked.messages else "prompt") from None
    try:
        return [checked_prompt(engine.model.config, ids, asked.max_new_tokens, limit=engine.max_length) for ids in prompts]
    except UserError as error:
        raise ApiError(400, str(error), "messages" if asked.messages else "prompt", "context_length_exceeded") from None


def _make_job(service: Service, asked: GenerationRequest, prompts: list[list[int]]) -> Job:
    generations, streams = [], []
    for ids in prompts:
        for sample in range(asked.n):
            seed = None if asked.seed is None else asked.seed + sample
            stops = service.text_model.end_tokens
            generations.append(Generation(ids, asked.max_new_tokens, asked.sampling, stops, seed))
            try:
                streams.append(TextStream(service.text_model, ids, asked.stop, skip_special_tokens=True))
            except UserError as error:
                raise ApiError(400, str(error), "prompt") from None
    return Job(generations, streams, asyncio.get_running_loop())


async def _pieces(job: Job) -> AsyncIterator[Piece]:
    """Yield the pieces of a job until all its texts have ended."""
    running = len(job.generations)
    while running:
        piece = await job.pieces.get()
        running -= piece.finish_reason is not None
        yield piece


async def _disconnect(request: "Request") -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
