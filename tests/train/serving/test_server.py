import json
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from chat_models import TEMPLATE, tiny_model

from tilewright.errors import UserError
from tilewright.model import generate
from tilewright.tokenizer.chat_template import ChatTemplate
from tilewright.train.conversation import encode_conversation
from tilewright.train.serving import server as server_module
from tilewright.train.serving.app import Service
from tilewright.train.serving.protocol import Limits
from tilewright.train.serving.server import ServeConfig, _bind, _read_key, make_server
from tilewright.train.serving.worker import Worker
from tilewright.train.texts import make_engine

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

LIMITS = Limits(max_body_bytes=20_000, max_prompts=3, max_choices=4)
SECONDS = 60


class Running:
    """A server on a free port in a thread, and its client. The model waits while `gate` is cleared."""

    def __init__(self, text_model, template=TEMPLATE, num_slots=4, max_queue=16, **options):
        engine = make_engine(text_model, num_slots)
        self.gate, step = threading.Event(), engine.step
        self.gate.set()
        engine.step = lambda: self.gate.wait(SECONDS) and step()
        self.text_model, self.engine, self.worker = text_model, engine, Worker(engine, max_queue)
        template = None if template is None else ChatTemplate(template)
        self.service = Service("tiny", text_model, template, self.worker, LIMITS, **options)
        config = ServeConfig(port=0, shutdown_seconds=SECONDS)
        self.server, self.socket = make_server(self.service, config), _bind(config)
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", api_key="secret", max_retries=0, timeout=SECONDS
        )

    def stop(self):
        self.gate.set()
        self.server.should_exit = True
        self.thread.join(SECONDS)
        self.client.close()
        self.socket.close()
        assert not self.thread.is_alive()

    def complete(self, prompt="the", **options):
        return self.client.completions.create(model="tiny", prompt=prompt, **options)

    def chat(self, *contents, **options):
        messages = [{"role": "user", "content": content} for content in contents]
        return self.client.chat.completions.create(model="tiny", messages=messages, **options)

    def request(self, method, path, body=b"", headers=()):
        """Return status and JSON of a raw request."""
        import http.client

        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        connection.request(method, path, body, {"Content-Type": "application/json", **dict(headers)})
        response = connection.getresponse()
        answer = response.status, json.loads(response.read())
        connection.close()
        return answer


@contextmanager
def running(*arguments, **options):
    server = Running(*arguments, **options)
    server.thread.start()
    try:
        while not server.server.started:
            assert server.thread.is_alive()
            threading.Event().wait(0.01)
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def text_model():
    return tiny_model()


@pytest.fixture(scope="module")
def server(text_model):
    with running(text_model) as server:
        yield server


def alone(text_model, ids, new, seed=None, **options):
    """Return the text and the tokens of a prompt that is generated alone."""
    tokens = generate(text_model.model, [ids], new, seed=seed, stop_tokens=text_model.end_tokens, **options)[0]
    return text_model.tokenizer.decode(tokens, skip_special_tokens=True), tokens


def wait_until(condition):
    for _ in range(100 * SECONDS):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came about")


def test_completion_equals_direct_generation(server, text_model):
    text, tokens = alone(text_model, text_model.tokenizer.encode("the"), 16, temperature=0)
    answer = server.complete(temperature=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (text, "length" if len(tokens) == 16 else "stop")
    assert answer.usage.to_dict() == {"prompt_tokens": 1, "completion_tokens": len(tokens), "total_tokens": len(tokens) + 1}
    assert server.complete([257], temperature=0).choices == answer.choices
    # Several samples of several prompts, in the order of the prompts.
    answer = server.complete(["the", "a"], max_tokens=6, seed=7, n=2, top_p=0.9)
    prompts = [text_model.tokenizer.encode(prompt) for prompt in ("the", "a")]
    expected = [alone(text_model, ids, 6, seed, top_p=0.9)[0] for ids in prompts for seed in (7, 8)]
    assert [choice.text for choice in answer.choices] == expected


def long_seed(server):
    """Return a seed for which twenty tokens form a text suitable for this test."""
    texts = ((seed, server.complete(max_tokens=20, seed=seed).choices[0]) for seed in range(50))
    return next(seed for seed, choice in texts if len(choice.text) > 12 and choice.finish_reason == "length")


@pytest.mark.parametrize("n", [1, 2])
def test_stream_yields_the_same_text(server, n):
    options = {"max_tokens": 20, "seed": long_seed(server), "n": n}
    whole = server.complete(**options)
    events = list(server.complete(**options, stream=True, stream_options={"include_usage": True}))
    assert events[-1].usage == whole.usage
    assert events[-1].choices == []
    for choice in whole.choices:
        pieces = [event.choices[0] for event in events[:-1] if event.choices[0].index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert [piece.finish_reason for piece in pieces[-2:]] == [None, choice.finish_reason]
        assert len(pieces) > 3 or choice.index == 1


def test_chat_uses_the_template(server, text_model):
    messages = [{"role": "user", "content": "Hello <|im_end|>"}]
    ids = encode_conversation(text_model, server.service.template, messages)
    text, tokens = alone(text_model, ids, 24, temperature=0)
    answer = server.chat("Hello <|im_end|>", temperature=0, max_completion_tokens=24)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(tokens)
    events = list(server.chat("Hello <|im_end|>", temperature=0, max_tokens=24, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == text
    assert events[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    # Without a limit, a chat continues to the end of the context.
    longest = server.chat("x", seed=0)
    assert longest.usage.total_tokens == 256 or longest.choices[0].finish_reason == "stop"
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "<|im_end|>"}]
    assert server.chat(parts, temperature=0, max_tokens=24).choices[0].message.content == text


def test_stop_strings_end_a_text(server):
    seed = long_seed(server)
    text = server.complete(max_tokens=30, seed=seed).choices[0].text
    stop = text[4:6]
    for stream in (False, True):
        answer = server.complete(max_tokens=30, seed=seed, stop=[stop, "never"], stream=stream)
        choices = [event.choices[0] for event in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.find(stop)]
        assert choices[-1].finish_reason == "stop"


def test_concurrent_requests_equal_separate_ones(server, text_model):
    def ask(i):
        options = {"max_tokens": 10 + i, "seed": i, "temperature": i / 5, "stream": False}
        if i % 2:
            return server.chat(f"Message {i}", **options).choices[0].message.content
        return server.complete(f"Text {i}", **options).choices[0].text

    def expected(i):
        messages = [{"role": "user", "content": f"Message {i}"}]
        chat_ids = encode_conversation(text_model, server.service.template, messages)
        ids = chat_ids if i % 2 else text_model.tokenizer.encode(f"Text {i}")
        return alone(text_model, ids, 10 + i, i, temperature=i / 5)[0]

    # All requests are queued before the model continues.
    server.gate.clear()
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(ask, range(8))
        wait_until(lambda: server.worker.num_texts == 8)
        server.gate.set()
        assert list(answers) == [expected(i) for i in range(8)]


def test_models_and_health(server):
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert server.client.models.retrieve("tiny").owned_by == "tilewright"
    with pytest.raises(openai.NotFoundError, match="the model 'a/b' does not exist"):
        server.client.models.retrieve("a/b")
    assert server.request("GET", "/health") == (200, {"status": "ok", "texts": 0})


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "other"}, 404, "the model 'other' does not exist: expected 'tiny'"),
        ({"model": 5}, 400, "model is missing"),
        ({"tools": [{"type": "function"}]}, 400, "tools is .*, which is not supported"),
        ({"logprobs": 3}, 400, "logprobs is 3, which is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty is 0.5"),
        ({"guided_regex": "a"}, 400, "guided_regex is not supported"),
        # A lone surrogate, which JSON can represent but UTF-8 cannot.
        ({"\ud800": "a"}, 400, r"\? is not supported"),
        ({"temperature": 2.5}, 400, "temperature is 2.5: expected 0 to 2"),
        ({"temperature": "hot"}, 400, "temperature is 'hot': expected a number"),
        ({"temperature": 10**400}, 400, "expected a number"),
        ({"top_p": -1}, 400, "top_p is -1.0"),
        ({"top_k": True}, 400, "top_k is True"),
        ({"repetition_penalty": 1e300}, 400, "repetition_penalty is 1e.300"),
        ({"max_tokens": 0}, 400, "max_tokens is 0: expected an integer of at least 1"),
        ({"max_tokens": 256}, 400, "a prompt of 1 tokens and 256 new tokens exceed the context of 256 tokens"),
        ({"n": 5}, 400, "n requests 5 texts in total: expected at most 4"),
        ({"seed": 2**64}, 400, "seed is"),
        ({"stop": ["a"] * 5}, 400, "stop is"),
        ({"stop": [""]}, 400, "stop is"),
        ({"stream": "yes"}, 400, "stream is 'yes'"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options is set without stream"),
        ({"prompt": ["a"] * 4}, 400, "prompt has 4 texts: expected at most 3"),
        ({"prompt": []}, 400, "prompt is"),
        ({"prompt": [1, -5]}, 400, "prompt token -5 is outside the model's vocabulary"),
        ({"prompt": "the " * 300}, 400, "exceed the context of 256"),
    ],
)
def test_unsupported_fields_are_named(server, options, status, message):
    body = {"model": "tiny", "prompt": "the", **options}
    answer = server.request("POST", "/v1/completions", json.dumps(body))
    assert answer[0] == status
    assert re.search(message, answer[1]["error"]["message"])
    assert answer[1]["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is missing or empty"),
        (["hi"], r"messages\[0\] is 'hi'"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role is 'tool': expected one of system, user, assistant"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content is 5"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "expected only text parts"),
        ([{"role": "user", "content": "x", "name": "Ann"}], r"messages\[0\].name is not supported"),
    ],
)
def test_invalid_messages_are_named(server, messages, message):
    with pytest.raises(openai.BadRequestError, match=message):
        server.client.chat.completions.create(model="tiny", messages=messages)


def test_fields_without_effect_are_accepted(server):
    neutral = {"user": "me", "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "echo": False, "suffix": None}
    assert server.complete(temperature=0, **neutral).choices == server.complete(temperature=0).choices
    developer = {"role": "developer", "content": "Be brief."}
    answers = [
        server.client.chat.completions.create(
            model="tiny", messages=[system, {"role": "user", "content": "x"}], temperature=0, max_tokens=8
        )
        for system in (developer, {**developer, "role": "system"})
    ]
    assert answers[0].choices == answers[1].choices


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (("POST", "/v1/completions", b"x" * 20_001), 413, "too long: expected at most 20,000 bytes"),
        (("POST", "/v1/completions", b"{"), 400, "the body is not JSON"),
        (("POST", "/v1/completions", b"[" * 19_000), 400, "the body is not JSON"),
        (("POST", "/v1/completions", b"[]"), 400, "expected a JSON object as body"),
        (("POST", "/v1/completions", b"{}", {"Content-Type": "text/plain"}), 415, "expected content type application/json"),
        (("POST", "/v1/embeddings", b"{}"), 404, "POST /v1/embeddings does not exist"),
        (("GET", "/v1/completions"), 405, "GET /v1/completions does not allow this method"),
    ],
)
def test_malformed_requests_are_rejected(server, request_, status, message):
    answer = server.request(*request_)
    assert answer[0] == status
    assert message in answer[1]["error"]["message"]


def test_disconnected_client_frees_its_slot():
    with running(tiny_model(context_length=4096), num_slots=1) as server:
        ended = []
        cancel = server.engine.cancel
        server.engine.cancel = lambda generation, *reason: (ended.append(generation), cancel(generation, *reason))
        # An unlikely end token, so that only the disconnect ends the text.
        options = {"max_tokens": 4000, "seed": 0}
        object.__setattr__(server.text_model, "end_tokens", ())
        stream = server.complete(**options, stream=True)
        next(iter(stream))
        stream.close()
        wait_until(lambda: server.worker.num_texts == 0)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            body = json.dumps({"model": "tiny", "prompt": "the", **options})
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            wait_until(lambda: server.engine.num_running == 1)
        wait_until(lambda: server.worker.num_texts == 0)
        assert [generation.finish_reason for generation in ended] == ["cancelled"] * 2
        assert all(len(generation.tokens) < 4000 for generation in ended)
        assert len(server.complete(max_tokens=5).choices) == 1


def test_full_queue_rejects_requests(text_model):
    with running(text_model, num_slots=1, max_queue=1) as server:
        server.gate.clear()
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(server.complete, max_tokens=3, temperature=0) for _ in range(2)]
            wait_until(lambda: server.worker.num_texts == 2)
            with pytest.raises(openai.RateLimitError, match="2 texts are running or queued: try again later"):
                server.complete()
            server.gate.set()
            first, second = (future.result(SECONDS).choices for future in waiting)
            assert first == second
        assert len(server.complete(max_tokens=3).choices) == 1


def test_shutdown_waits_for_running_texts(text_model):
    with running(text_model) as server:
        expected = server.complete(max_tokens=20, seed=1).choices[0].text
        stream = server.complete(max_tokens=20, seed=1, stream=True)
        pieces = [next(iter(stream)).choices[0].text]
        server.gate.clear()
        server.server.should_exit = True
        wait_until(lambda: not _accepts(server.port))
        server.gate.set()
        assert "".join([*pieces, *(event.choices[0].text for event in stream)]) == expected


def _accepts(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_model_failure_is_reported(text_model):
    with running(text_model) as server:
        server.engine.step = lambda: torch.empty(2) + torch.empty(3)
        with pytest.raises(openai.InternalServerError, match="the model failed on this request"):
            server.complete()
        with pytest.raises(openai.InternalServerError, match="has failed"):
            server.complete()
        assert server.request("GET", "/health") == (503, {"status": "failed", "texts": 0})


def test_api_key_is_required_if_set(text_model):
    with running(text_model, api_key="secret", template=None) as server:
        assert len(server.complete(max_tokens=2).choices) == 1
        for key in ("wrong", "ключ", ""):
            headers = {"Authorization": f"Bearer {key}".encode()}
            status, answer = server.request("GET", "/v1/models", headers=headers)
            assert (status, answer["error"]["type"]) == (401, "authentication_error")
        assert server.request("GET", "/health")[0] == 200
        with pytest.raises(openai.NotFoundError, match="no chat template: use /v1/completions"):
            server.chat("hi")


def test_requests_from_other_sites_are_rejected(text_model):
    with running(text_model, local_only=True) as server:
        for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1"):
            assert server.request("GET", "/v1/models", headers={"Host": host})[0] == 200
        for host in ("attacker.example", "127.0.0.1.attacker.example:8000", "localhost.attacker.example"):
            status, answer = server.request("GET", "/v1/models", headers={"Host": host})
            assert (status, answer["error"]["type"]) == (403, "invalid_request_error")


@pytest.mark.parametrize(
    ("host", "key", "local_only"), [("127.0.0.1", "", True), ("127.0.0.1", "x", False), ("0.0.0.0", "", False)]
)
def test_local_server_without_key_requires_a_loopback_host(text_model, tmp_path, monkeypatch, host, key, local_only):
    monkeypatch.setattr(server_module, "load_text_model", lambda *_: text_model)
    monkeypatch.setenv("TILEWRIGHT_API_KEY", "k") if key else monkeypatch.delenv("TILEWRIGHT_API_KEY", raising=False)
    assert server_module.make_service(tmp_path, ServeConfig(host)).local_only is local_only


def test_api_key_from_a_file_or_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "key"
    path.write_text("from file\n")
    assert _read_key(None) is None
    monkeypatch.setenv("TILEWRIGHT_API_KEY", "from environment")
    assert (_read_key(None), _read_key(path)) == ("from environment", "from file")
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty: expected an API key"):
        _read_key(path)


def test_invalid_settings_raise():
    for options, message in (({"num_slots": 0}, "num_slots is 0"), ({"port": 70_000}, "port is 70000")):
        with pytest.raises(UserError, match=message):
            ServeConfig(**options)
    with pytest.raises(UserError, match="max_body_bytes is 0: expected at least 1"):
        Limits(max_body_bytes=0)
    with _bind(ServeConfig(port=0)) as taken:
        taken.listen()
        with pytest.raises(UserError, match=r"cannot listen on 127.0.0.1 port .*: Address already in use"):
            _bind(ServeConfig(port=taken.getsockname()[1]))
