"""Parse requests of the OpenAI API. Unsupported fields and values raise an error that names them.

The fields are those of completions and chat completions in https://platform.openai.com/docs/api-reference.
"""

from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError
from ...model import Sampling
from ..conversation import Message
from .errors import ApiError
from .options import Limits

ROLES = ("system", "user", "assistant")
_MAX_STOPS = 4
# Unsupported fields, with the values that have no effect and are accepted.
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
# These fields do not affect the generated text.
_HARMLESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_COMMON = ("model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n", "seed", "stop", "stream")


@dataclass(frozen=True)
class GenerationRequest:
    """A parsed request for completions or chat completions."""

    prompts: list[str | list[int]] = field(default_factory=list)
    """Prompts of a completion request, each a text or token ids."""
    messages: list[Message] = field(default_factory=list)
    """Messages of a chat request."""
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


def read_completion(body: object, model: str, limits: Limits) -> GenerationRequest:
    """Parse the body of a completion request."""
    fields = _fields(body, (*_COMMON, "prompt", "stream_options"), model)
    prompts = _prompts(fields.get("prompt"))
    if len(prompts) > limits.max_prompts:
        raise ApiError(400, f"prompt has {len(prompts)} texts: expected at most {limits.max_prompts}", "prompt")
    max_new_tokens = _integer(fields, "max_tokens", 1)
    request = GenerationRequest(prompts, max_new_tokens=max_new_tokens or limits.default_new_tokens, **_options(fields))
    _check_choices(request.n * len(prompts), limits)
    return request


def read_chat(body: object, model: str, limits: Limits) -> GenerationRequest:
    """Parse the body of a chat completion request."""
    fields = _fields(body, (*_COMMON, "messages", "max_completion_tokens", "stream_options"), model)
    tokens = [_integer(fields, name, 1) for name in ("max_completion_tokens", "max_tokens")]
    request = GenerationRequest(
        messages=_messages(fields.get("messages")), max_new_tokens=tokens[0] or tokens[1], **_options(fields)
    )
    _check_choices(request.n, limits)
    return request


def _fields(body: object, known: tuple[str, ...], model: str) -> dict[str, Any]:
    """Return the fields that are set; raise an `ApiError` for unsupported ones."""
    if not isinstance(body, dict):
        raise ApiError(400, "expected a JSON object as body")
    # null means that the field is not set.
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in fields.items():
        if name in known or name in _HARMLESS:
            continue
        if name not in _NEUTRAL:
            raise ApiError(400, f"{name} is not supported: omit it", name, "unsupported_parameter")
        if not any(_same(value, neutral) for neutral in _NEUTRAL[name]):
            raise ApiError(400, f"{name} is {value!r:.60}, which is not supported: omit it", name, "unsupported_parameter")
    named = fields.get("model")
    if not isinstance(named, str):
        raise ApiError(400, "model is missing: expected a name listed by /v1/models", "model")
    check_model(named, model)
    return fields


def check_model(named: str, model: str) -> None:
    """Raise an `ApiError` if `named` is not the name of the served model."""
    if named != model:
        raise ApiError(404, f"the model {named!r:.100} does not exist: expected {model!r}", "model", "model_not_found")


def _same(value: object, neutral: object) -> bool:
    # In Python False == 0, but in JSON they differ.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _options(fields: dict[str, Any]) -> dict[str, Any]:
    stream = _boolean(fields, "stream", "stream")
    options = fields.get("stream_options", {})
    if options and not stream:
        raise ApiError(400, "stream_options is set without stream: set stream to true", "stream_options")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise ApiError(400, f"stream_options is {options!r:.60}: expected an object with include_usage", "stream_options")
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
        raise ApiError(400, f"temperature is {temperature}: expected 0 to 2", "temperature")
    # 0 selects only the most likely token, as does any tiny probability.
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
        raise ApiError(400, f"stop is {value!r:.60}: expected a non-empty string, or a list of up to {_MAX_STOPS}", "stop")
    return tuple(stops)


def _prompts(value: object) -> list[str | list[int]]:
    """Return the prompts; `value` is a text, a list of ids, or a list of texts and lists of ids."""
    prompts: Any = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or _is_ids(p) for p in prompts):
        raise ApiError(400, f"prompt is {value!r:.60}: expected a string, a list of ids, or a list of these", "prompt")
    return prompts


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(id) is int for id in value)


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages is missing or empty: expected a list of messages", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: object, name: str) -> Message:
    if not isinstance(message, dict):
        raise ApiError(400, f"{name} is {message!r:.60}: expected an object with role and content", name)
    # Ignore null and empty fields, such as the tool_calls of an answer that the client sends back.
    fields = {key: value for key, value in message.items() if value not in (None, [], {})}
    role = fields.get("role")
    # OpenAI's newer name of the system role.
    role = "system" if role == "developer" else role
    if role not in ROLES:
        raise ApiError(400, f"{name}.role is {role!r:.40}: expected one of {', '.join(ROLES)}", f"{name}.role")
    unknown = next((key for key in fields if key not in ("role", "content")), None)
    if unknown is not None:
        raise ApiError(400, f"{name}.{unknown} is not supported: omit it", f"{name}.{unknown}", "unsupported_parameter")
    return {"role": role, "content": _content(fields.get("content", ""), f"{name}.content")}


def _content(value: object, name: str) -> str:
    """Return the text of a message; `value` is a string or a list of text parts, which are concatenated."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise ApiError(400, f"{name} is {value!r:.60}: expected a string or a list of text parts", name)
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(400, f"{name} contains the part {part!r:.60}: expected only text parts", name)
    return "".join(part["text"] for part in parts)


def _check_choices(num_choices: int, limits: Limits) -> None:
    if num_choices > limits.max_choices:
        raise ApiError(400, f"n requests {num_choices} texts in total: expected at most {limits.max_choices}", "n")


def _number(fields: dict[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if type(value) not in (int, float) or not -1e30 < value < 1e30:
        raise ApiError(400, f"{name} is {value!r:.60}: expected a number", name)
    return float(value)


def _integer(fields: dict[str, Any], name: str, least: int, greatest: int | None = None) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or value < least or (greatest is not None and value > greatest):
        allowed = f"an integer of at least {least}" if greatest is None else f"an integer from {least} to {greatest}"
        raise ApiError(400, f"{name} is {value!r:.60}: expected {allowed}", name)
    return value


def _boolean(fields: dict[str, Any], name: str, param: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise ApiError(400, f"{name} is {value!r:.60}: expected true or false", param)
    return value
