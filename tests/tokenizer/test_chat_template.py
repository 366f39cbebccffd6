"""Chat templates render the texts of transformers, with the spans of the assistant."""

import json
import pickle

import pytest

from tilewright.errors import UserError
from tilewright.tokenizer.chat_template import ChatTemplate

# Rewritten versions of widespread templates.
CHATML = """\
{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA_3 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
MISTRAL = """\
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
"""
MARKED = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
<|assistant|>
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

{%- else %}
<|{{ message.role }}|>
{{ message.content }}
{{ message | tojson }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|assistant|>
{% endif %}
"""
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA_3, "gemma": GEMMA, "mistral": MISTRAL, "marked": MARKED}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
SYSTEM = {"role": "system", "content": "Be <b>brief</b> & kind."}
TALK = [
    {"role": "user", "content": "  Hi!\n"},
    {"role": "assistant", "content": "Hello, é."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "🙂"},
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_equal_transformers(name):
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    template = ChatTemplate(TEMPLATES[name], VARIABLES)
    for messages in (TALK[:1], TALK[:2], TALK[:3], TALK, [SYSTEM, *TALK]):
        for prompt in (False, True):
            expected, _ = render([messages], chat_template=TEMPLATES[name], add_generation_prompt=prompt, **VARIABLES)
            assert template.render(messages, add_generation_prompt=prompt) == expected[0]


SPANS = {
    "chatml": ["Hello, é.<|im_end|>\n", "🙂<|im_end|>\n"],
    "llama 3": ["Hello, é.<|eot_id|>", "🙂<|eot_id|>"],
    "gemma": ["Hello, é.<end_of_turn>\n", "🙂<end_of_turn>\n"],
    "mistral": [" Hello, é.</s>", " 🙂</s>"],
    "marked": ["Hello, é.</s>", "🙂</s>"],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_spans_cover_the_assistants_text(name):
    template = ChatTemplate(TEMPLATES[name], VARIABLES)
    for messages in (TALK, [SYSTEM, *TALK]):
        ((text, spans),) = template.render_with_spans(messages)
        assert text == template.render(messages)
        assert [text[start:end] for start, end in spans] == SPANS[name]
    assert template.render_with_spans(TALK[:1]) == [(template.render(TALK[:1]), [])]


def test_generation_blocks_equal_transformers():
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    (expected,), (indices,) = render([TALK], chat_template=MARKED, return_assistant_tokens_mask=True, **VARIABLES)
    assert ChatTemplate(MARKED, VARIABLES).render_with_spans(TALK) == [(expected, indices)]


def test_a_turn_that_later_turns_change_becomes_a_separate_text():
    # Some templates drop the thoughts of all turns except the last.
    thinking = (
        "{% for m in messages %}{{ m.role }}:{% if loop.last and m.role == 'assistant' %}<think/>{% endif %}{{ m.content }}\n"
    )
    source = thinking + "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    talk = [{**message, "content": message["content"].strip()} for message in TALK]
    texts = ChatTemplate(source).render_with_spans(talk)
    first, whole = "user:Hi!\nassistant:<think/>Hello, é.\n", "user:Hi!\nassistant:Hello, é.\nuser:Bye\nassistant:<think/>🙂\n"
    assert [text for text, _ in texts] == [first, whole]
    assert [[text[a:b] for a, b in spans] for text, spans in texts] == [["<think/>Hello, é.\n"], ["<think/>🙂\n"]]


def test_a_turn_that_does_not_continue_its_prompt_raises():
    source = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    with pytest.raises(UserError, match=r"^the template of T does not render message 2 as a continuation"):
        ChatTemplate(source, name="the template of T").render_with_spans(TALK)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "has a syntax error in line 1"),
        ("a\n{% generation %}", "has a syntax error in line 2"),
        ("{{ raise_exception('no system role') }}", "rejects this conversation: no system role"),
        ("{{ messages[9].content + 'x' }}", "rejects this conversation"),
        ("{{ 1 / 0 }}", "fails on this conversation: division by zero"),
        ("{{ messages.append(1) }}", "rejects this conversation"),
        ("{{ ''.__class__.__mro__ }}{{ ''.__class__.mro() }}", "rejects this conversation"),
    ],
)
def test_invalid_templates_raise(source, message):
    with pytest.raises(UserError, match=f"^the template of T {message}"):
        ChatTemplate(source, name="the template of T").render(TALK)


def test_templates_can_be_pickled():
    template = ChatTemplate(LLAMA_3, VARIABLES)
    again = pickle.loads(pickle.dumps(template))
    assert again.render(TALK) == template.render(TALK)
    assert again.fingerprint == template.fingerprint != ChatTemplate(LLAMA_3).fingerprint


def test_reserved_characters_in_messages_raise():
    with pytest.raises(UserError, match=r"U\+FDD0"):
        ChatTemplate(MARKED, VARIABLES).render_with_spans([{"role": "user", "content": "\ufdd0"}])


def write_config(folder, **entries):
    (folder / "tokenizer_config.json").write_text(json.dumps(entries))


def test_load_reads_the_template_and_special_tokens_of_a_folder(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    write_config(tmp_path, bos_token="<s>", eos_token={"content": "</s>", "lstrip": False}, pad_token=None)
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}é{{ eos_token }}{{ pad_token is defined }}")
    assert ChatTemplate.load(tmp_path).render(TALK) == "<s>é</s>False"
    (tmp_path / "chat_template.jinja").unlink()
    write_config(tmp_path, bos_token="<s>", chat_template="one {{ bos_token }}")
    assert ChatTemplate.load(tmp_path).render(TALK) == "one <s>"
    write_config(tmp_path, chat_template=[{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}])
    assert ChatTemplate.load(tmp_path).render(TALK) == "b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds a JSON list: expected an object"),
        ("{", "is not JSON"),
        ('{"chat_template": [{"name": "rag", "template": "x"}]}', "has chat templates named rag"),
        ('{"chat_template": 3}', "has chat templates named none"),
    ],
)
def test_invalid_files_raise(tmp_path, content, message):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=f"tokenizer_config.json {message}"):
        ChatTemplate.load(tmp_path)
