"""Chat templates: the Jinja program that renders messages as text, in the format of Hugging Face's transformers.

Templates are untrusted input. They run in Jinja's sandbox, which blocks access to Python and changes to the arguments.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import read_text, require_file
from .formats.tokenizer_data import read_object

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
"""`role` (system, user, assistant, ...), `content`, and any other field that a template reads."""
Span = tuple[int, int]
"""Start and end of a part of a text, in characters."""

TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
ASSISTANT = "assistant"
# Markers around {% generation %} blocks during the search for spans. They are noncharacters (Unicode 16, section 23.7), which
# text for interchange does not contain.
_BEGIN, _END = "\ufdd0", "\ufdd1"


class ChatTemplate:
    """A template and the variables it reads besides the messages, such as `bos_token`."""

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None, name: str = "the chat template") -> None:
        """Compile `source`; a syntax error raises a `UserError` that starts with `name`."""
        self.source, self.name = source, name
        self.variables = dict(variables or {})
        with self._named_errors():
            self._plain = _compile(source, lambda body: body)
            # The template with markers, if it may have {% generation %} blocks.
            self._marked = _compile(source, _add_markers) if "generation" in source else None

    @classmethod
    def load(cls, folder: Path | str, file: Path | None = None) -> "ChatTemplate | None":
        """Return the template of a folder, from `chat_template.jinja` or `tokenizer_config.json`, or None.

        Of several named templates, the one named "default" is used. `file` is a template file that overrides the folder's. A
        template that cannot be read raises a `UserError`.
        """
        folder = Path(folder)
        config = read_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
        path = folder / TEMPLATE_FILE if file is None else require_file(file, "chat template")
        if path.is_file():
            source = read_text(path, "chat template")
        else:
            path = folder / CONFIG_FILE
            source = _default_template(config.get("chat_template"), path)
        if source is None:
            return None
        return cls(source, _special_tokens(config), f"the chat template of {path}")

    @property
    def fingerprint(self) -> str:
        """The sha256, in hex, of everything that determines the text of a conversation."""
        return hashlib.sha256(json.dumps([self.source, self.variables], sort_keys=True).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # Compiled templates cannot be pickled: worker processes compile the source again.
        return type(self), (self.source, self.variables, self.name)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, with the start of the assistant's next turn if requested.

        A conversation that the template rejects, with `raise_exception` or by failing, raises a `UserError`.
        """
        return self._render(self._plain, messages, add_generation_prompt)

    def render_with_spans(self, messages: Sequence[Message]) -> list[tuple[str, list[Span]]]:
        """Return the texts to train on, each with the spans that the assistant wrote.

        Usually the result is one text, the whole conversation. The {% generation %} blocks of the template are its spans.
        Without such blocks, turn i spans from the end of `render(messages[:i], add_generation_prompt=True)` to the end of
        `render(messages[:i + 1])`; this includes the end-of-turn token.

        Some templates render an earlier turn differently in the whole conversation. Qwen 3's, for example, omits its
        thoughts. Such a turn becomes a separate text that ends with it, because the model generates the turn in that form. A
        turn that does not continue its prompt raises a `UserError`.
        """
        if self._marked is not None:
            text, spans = self._marked_spans(messages)
            if spans:
                return [(text, spans)]
        whole, spans, others = self.render(messages), [], []
        for i, message in enumerate(messages):
            if message.get("role") != ASSISTANT:
                continue
            asked, answered = self.render(messages[:i], add_generation_prompt=True), self.render(messages[: i + 1])
            if not answered.startswith(asked):
                raise UserError(
                    f"{self.name} does not render message {i + 1} as a continuation of its prompt: mark the assistant's text "
                    "with {% generation %} and {% endgeneration %}"
                )
            span = len(asked), len(answered)
            if whole.startswith(answered):
                spans.append(span)
            else:
                others.append((answered, [span]))
        return [*others, (whole, spans)]

    def _marked_spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        if (found := json.dumps(list(messages), ensure_ascii=False, default=str)) and (_BEGIN in found or _END in found):
            raise UserError("a message contains the character U+FDD0 or U+FDD1, which is reserved for marking spans: remove it")
        assert self._marked is not None
        pieces, spans, length, start = [], [], 0, 0
        for part in self._render(self._marked, messages, False).split(_BEGIN):
            inside, end, outside = part.partition(_END)
            pieces += [inside, outside]
            if end:
                spans.append((start, start + len(inside)))
            length += len(inside) + len(outside)
            start = length
        return "".join(pieces), spans

    def _render(self, template: "Template", messages: Sequence[Message], add_generation_prompt: bool) -> str:
        with self._named_errors():
            return template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            yield
        except TemplateSyntaxError as error:
            raise UserError(f"{self.name} has a syntax error in line {error.lineno}: {error.message}") from error
        except TemplateError as error:
            raise UserError(f"{self.name} rejects this conversation: {error}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            # A template is a program and can raise any of these.
            raise UserError(f"{self.name} fails on this conversation: {error}") from error


def _add_markers(body: str) -> str:
    return f"{_BEGIN}{body}{_END}"


def _compile(source: str, generation: Callable[[str], str]) -> "Template":
    """Compile a template; `generation` transforms the text of its {% generation %} blocks."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block {% generation %} ... {% endgeneration %}."""

        tags = {"generation"}  # noqa: RUF012 (as the base class has it)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

        def _written(self, caller: Callable[[], str]) -> str:
            return generation(caller())

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # As in transformers: blocks leave no blank lines, and JSON is not escaped for HTML.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _default_template(value: Any, path: Path) -> str | None:
    """Return the template of a `chat_template` entry: a string, or a list of {"name", "template"}."""
    if value is None or isinstance(value, str):
        return value
    named = {}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        named = {item.get("name"): item.get("template") for item in value}
    source = named.get("default")
    if not isinstance(source, str):
        names = ", ".join(map(str, named)) or "none"
        raise UserError(f"{path} has chat templates named {names}: expected a string or a template named default")
    return source


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens, such as `bos_token`; each is a string or an object with a `content`."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
