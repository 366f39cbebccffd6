"""Requests of OpenAI's API, read from JSON: what is supported becomes values, and all else an error that names it.

Fields of https://platform.openai.com/docs/api-reference, completions and chat completions.
"""

from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError
from ...model import Sampling
from ..conversation import Message
from .errors import ApiError

ROLES = ("system", "user", "assistant")
_MAX_STOPS = 4
# Of what OpenAI calls by other names, or where only one value can be served.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# Say who asks, or how to keep the answer: they change no text.
_HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_COMMON = ("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "seed", "stop", "stream")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_body_bytes: int = 1 << 20
    """Bytes of a request."""
    max_prompts: int = 16
    """Prompts of a request."""
    max_choices: int = 16
    """Texts of a request: prompts times n."""
    default_new_tokens: int = 16
    """New tokens where a completion does not say how many: OpenAI's. A chat goes on to the end of the context."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")


@dataclass(frozen=True)
class GenerationRequest:
    """What a request for text asks for."""

    prompts: list[str | list[int]] = field(default_factory=list)
    """Of a completion: texts, or ids."""
    messages: list[Message] = field(default_factory=list)
    """Of a chat."""
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


def read_completion(body: object, model: str, limits: Limits) -> GenerationRequest:
    """Read the body of a request for completions."""
    fields = _fields(body, (*_COMMON, "prompt", "stream_options"), model)
    prompts = _prompts(fields.get("prompt"))
    if len(prompts) > limits.max_prompts:
        raise ApiError(400, f"prompt has {len(prompts)} texts: at most {limits.max_prompts} are allowed", "prompt")
    max_new_tokens = _integer(fields, "max_tokens", 1)
    request = GenerationRequest(prompts, max_new_tokens=max_new_tokens or limits.default_new_tokens, **_options(fields))
    _check_choices(request.n * len(prompts), limits)
    return request


def read_chat(body: object, model: str, limits: Limits) -> GenerationRequest:
    """Read the body of a request for a chat completion."""
    fields = _fields(body, (*_COMMON, "messages", "max_completion_tokens", "stream_options"), model)
    tokens = [_integer(fields, name, 1) for name in ("max_completion_tokens", "max_tokens")]
    request = GenerationRequest(
        messages=_messages(fields.get("messages")), max_new_tokens=tokens[0] or tokens[1], **_options(fields)
    )
    _check_choices(request.n, limits)
    return request


def _fields(body: object, known: tuple[str, ...], model: str) -> dict[str, Any]:
    """Return the fields that are set; one that cannot be served is refused."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    # null is as good as absent.
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in fields.items():
        if name in known or name in _HARMLESS:
            continue
        if name not in _NEUTRAL:
            raise ApiError(400, f"{name} is not supported: leave it out", name, "unsupported_parameter")
        if not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
            raise ApiError(400, f"{name} is {value!r:.60}: it is not supported, leave it out", name, "unsupported_parameter")
    named = fields.get("model")
    if not isinstance(named, str):
        raise ApiError(400, "model is missing: name one of /v1/models", "model")
    check_model(named, model)
    return fields


def check_model(named: str, model: str) -> None:
    """Refuse a name that is not the served model's."""
    if named != model:
        raise ApiError(404, f"the model {named!r:.100} does not exist: this server has {model!r}", "model", "model_not_found")


def _same(value: object, neutral: object) -> bool:
    # In JSON false is no number.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _options(fields: dict[str, Any]) -> dict[str, Any]:
    stream = _boolean(fields, "stream", "stream")
    options = fields.get("stream_options", {})
    if options and not stream:
        raise ApiError(400, "stream_options is set without stream: set that too", "stream_options")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, f"stream_options is {options!r:.60}: include_usage is allowed in it", "stream_options")
    return {
        "sampling": _sampling(fields),
        "n": _integer(fields, "n", 1) or 1,
        "seed": _integer(fields, "seed", -(2**63), 2**63 - 1),
        "stop": _stop(fields.get("stop", [])),
        "stream": stream,
        "include_usage": _boolean(options, "include_usage", "stream_options"),
    }


def _sampling(fields: dict[str, Any]) -> Sampling:
    temperature, top_p = _number(fields, "temperature", 1.0), _number(fields, "top_p", 1.0)
    if not 0 <= temperature <= 2:
        raise ApiError(400, f"temperature is {temperature}: it must be from 0 to 2", "temperature")
    # 0 means that of the most likely token, which any small share is.
    top_p = None if top_p == 1 else top_p or 1e-9
    try:
        return Sampling(
            temperature,
            _integer(fields, "top_k", 1),
            top_p,
            _number(fields, "min_p", 0.0) or None,
            _number(fields, "repetition_penalty", 1.0),
        )
    except UserError as error:
        raise ApiError(400, str(error), str(error).split(" ", 1)[0]) from None


def _stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(400, f"stop is {value!r:.60}: a string, or up to {_MAX_STOPS} of them, is allowed, none empty", "stop")
    return tuple(stops)


def _prompts(value: object) -> list[str | list[int]]:
    """Return the prompts: a text or its ids, or a list of such."""
    prompts: Any = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
        raise ApiError(400, f"prompt is {value!r:.60}: a string, a list of ids, or a list of such is needed", "prompt")
    return prompts


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(id) is int for id in value)


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages is missing or empty: a list of messages is needed", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: object, name: str) -> Message:
    if not isinstance(message, dict):
        raise ApiError(400, f"{name} is {message!r:.60}: an object with role and content is needed", name)
    # What is null or empty says nothing, such as the tool calls of an answer that is sent back.
    fields = {key: value for key, value in message.items() if value not in (None, [], {})}
    role = fields.get("role")
    # OpenAI's newer name of the system's role.
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise ApiError(400, f"{name}.role is {role!r:.40}: {', '.join(ROLES)} are allowed", f"{name}.role")
    unknown = next((key for key in fields if key not in ("role", "content")), None)
    if unknown is not None:
        raise ApiError(400, f"{name}.{unknown} is not supported: leave it out", f"{name}.{unknown}", "unsupported_parameter")
    return {"role": role, "content": _content(fields.get("content", ""), f"{name}.content")}


def _content(value: object, name: str) -> str:
    """Return a message's text: a string, or the joined parts of a list of texts."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise ApiError(400, f"{name} is {value!r:.60}: a string is needed, or a list of parts of text", name)
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, f"{name} has the part {part!r:.60}: only parts of text are supported", name)
    return "".join(part["text"] for part in parts)


def _check_choices(num_choices: int, limits: Limits) -> None:
    if num_choices > limits.max_choices:
        raise ApiError(400, f"n asks for {num_choices} texts in all: at most {limits.max_choices} are allowed", "n")


def _number(fields: dict[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if type(value) not in (int, float) or not -1e30 < value < 1e30:
        raise ApiError(400, f"{name} is {value!r:.60}: a number is needed", name)
    return float(value)


def _integer(fields: dict[str, Any], name: str, least: int, greatest: int | None = None) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or value < least or (greatest is not None and value > greatest):
        allowed = f"an integer of at least {least}" if greatest is None else f"an integer from {least} to {greatest}"
        raise ApiError(400, f"{name} is {value!r:.60}: {allowed} is needed", name)
    return value


def _boolean(fields: dict[str, Any], name: str, param: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} is {value!r:.60}: true or false is needed", param)
    return value
