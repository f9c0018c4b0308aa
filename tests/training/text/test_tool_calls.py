"""Tool calls in an answer are read in the form in which the model's chat template writes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.tiny import END, backend
from training.models.generate import TextStream
from training.text.call_forms import Call, CallForm
from training.text.tokenizer import CHAT_TEMPLATE, Tokenizer
from training.text.tool_calls import CallStream, call_form

USER = "{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}{{ '<|assistant|>' }}"
RESULT = "{% if m.role == 'tool' %}{{ '<|user|>' + m.content }}{% else %}"


def template(calls: str, end: str = "<|end|>", content: str = "{{ m.content }}") -> str:
    """A template that says tools and results, and writes calls as in `calls`."""
    return (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
        + RESULT
        + USER
        + f"{{% if m.tool_calls %}}{calls}{{% else %}}{content}{{% endif %}}"
        + "{% endif %}{% endif %}"
        + f"{{{{ {end!r} }}}}"
        + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )


EACH = "{% for c in m.tool_calls %}{% set f = c.function %}"
LIST = (
    "{{ '[' }}"
    + EACH
    + "{{ '{\"name\": \"' + f.name + '\", \"arguments\": ' + f.arguments | tojson + '}' }}"
    + "{{ ', ' if not loop.last }}{% endfor %}{{ ']' }}"
)
PYTHON = (
    "{{ '<|tool_call_start|>[' }}"
    + EACH
    + "{{ f.name + '(' }}{% for key, value in f.arguments.items() %}{{ key }}="
    + "{% if value is string %}STRING"
    + "{% elif value is mapping %}{{ value | tojson }}{% else %}{{ value }}{% endif %}"
    + "{{ ', ' if not loop.last }}{% endfor %}{{ ')' }}{{ ', ' if not loop.last }}{% endfor %}"
    + "{{ ']<|tool_call_end|>' }}"
)


@dataclass(frozen=True)
class Case:
    form: str
    template: str
    control: tuple[str, ...] = ()
    several: bool = True  # calls in one answer


CASES = {
    "ours": Case("tagged", CHAT_TEMPLATE),
    "Qwen": Case(
        "tagged",
        template(
            EACH
            + '{{ \'\\n<tool_call>\\n{"name": "\' ~ f.name ~ \'", "arguments": \' ~ (f.arguments | tojson)'
            + " ~ '}\\n</tool_call>' }}{% endfor %}"
        ),
        ("<tool_call>", "</tool_call>"),
    ),
    "reasoning": Case(
        "tagged",
        template(
            "{{ '<think>\\n\\n</think>\\n\\n' }}"
            + EACH
            + "{{ '<tool_call>' ~ ({'name': f.name, 'arguments': f.arguments} | tojson) ~ '</tool_call>' }}"
            + "{% endfor %}"
        ),
    ),
    "Llama 3": Case(
        "bare",
        template(
            "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
            "{% set f = m.tool_calls[0].function %}"
            "{{ '{\"name\": \"' + f.name + '\", \"parameters\": ' + f.arguments | tojson + '}' }}"
        ),
        ("<|python_tag|>",),
        several=False,
    ),
    "Llama 3 with a tag": Case(
        "bare",
        template(
            "{{ '<|python_tag|>' }}"
            + EACH
            + "{{ {'name': f.name, 'parameters': f.arguments} | tojson }}{{ '; ' if not loop.last }}{% endfor %}"
        ),
        ("<|python_tag|>",),
    ),
    "Mistral": Case("mistral", template("{{ '[TOOL_CALLS]' }}" + LIST), ("[TOOL_CALLS]",)),
    "newer Mistral": Case(
        "mistral",
        template(EACH + "{{ '[TOOL_CALLS]' + f.name + '[ARGS]' + f.arguments | tojson }}{% endfor %}"),
        ("[TOOL_CALLS]", "[ARGS]"),
    ),
    "DeepSeek": Case(
        "deepseek",
        template(
            "{{ '<｜tool▁calls▁begin｜>' }}"
            + EACH
            + "{{ '\\n' if not loop.first }}{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + f.name"
            + " + '\\n```json\\n' + f.arguments | tojson + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}"
            + "{{ '<｜tool▁calls▁end｜>' }}"
        ),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
    ),
    "DeepSeek 3.1": Case(
        "deepseek",
        template(
            "{{ '<｜tool▁calls▁begin｜>' }}"
            + EACH
            + "{{ '<｜tool▁call▁begin｜>' + f.name + '<｜tool▁sep｜>' + f.arguments | tojson"
            + " + '<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜tool▁calls▁end｜>' }}"
        ),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁calls▁end｜>"),
    ),
    "Granite 3": Case("listed", template("{{ '<|tool_call|>' }}" + LIST), ("<|tool_call|>",)),
    "Phi-4-mini": Case(
        "listed",
        template("{{ '<|tool_call|>' }}" + LIST + "{{ '<|/tool_call|>' }}"),
        ("<|tool_call|>", "<|/tool_call|>"),
    ),
    "LFM2": Case(
        "pythonic",
        template(PYTHON.replace("STRING", '{{ "\'" + value + "\'" }}')),
        ("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    "LFM2 with escapes": Case(
        "pythonic with escapes",
        template(
            PYTHON.replace(
                "STRING",
                "{{ \"'\" + value.replace('\\\\', '\\\\\\\\').replace(\"'\", \"\\\\'\")"
                ".replace('\\n', '\\\\n') + \"'\" }}",
            )
        ),
        ("<|tool_call_start|>", "<|tool_call_end|>"),
    ),
    "Qwen3-Coder": Case(
        "xml",
        template(
            EACH
            + "{{ '<tool_call>\\n<function=' + f.name + '>\\n' }}{% for key, value in f.arguments.items() %}"
            + "{{ '<parameter=' + key + '>\\n' }}"
            + "{{ value | tojson if value is mapping or (value is sequence and value is not string)"
            + " else value | string }}{{ '\\n</parameter>\\n' }}{% endfor %}"
            + "{{ '</function>\\n</tool_call>' }}{{ '\\n' if not loop.last }}{% endfor %}"
        ),
        ("<tool_call>", "</tool_call>"),
    ),
}
KEYS = ["what", "größe", "where_to", "n"]
TRICKY = [
    'it\'s a "hose"',
    "line\nbreak\n",
    "{braces}",
    "</tool_call>",
    "back\\slash \\n \\u00e9",
    "é 猫 \U0001f9f0",
    "a, b=c",
    "}]",
    "",
    " spaces ",
    "```",
    "True",
    "12",
    "<|end|>x",
]
TEXTS = st.sampled_from(TRICKY) | st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<[｜\ue000\ue001"), max_size=8
)
ATOMS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.sampled_from([0.5, -1e-9, 1e300])
NESTED = st.recursive(
    ATOMS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
VALUES = ATOMS | TEXTS | st.dictionaries(TEXTS, NESTED, max_size=3)
NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_\-]{0,20}", fullmatch=True)


@cache
def tokenizer_of(name: str) -> Tokenizer:
    case = CASES[name]
    encoder = tokenizers.Tokenizer.from_str(backend())
    encoder.add_special_tokens([*case.control, "<|user|>", "<|assistant|>", "<|end|>"])
    return Tokenizer(encoder, {"eos_token": END, "bos_token": END}, case.template)


@cache
def form_of(name: str) -> CallForm:
    form = call_form(tokenizer_of(name))
    assert form, name
    return form


def rendered(tokenizer: Tokenizer, calls: list[Call], tools: list[dict[str, Any]]) -> list[int]:
    """The ids of an answer with these calls, as in training."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Where?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls
            ],
        },
    ]
    before = tokenizer.encode_chat(messages[:1], True, tools)
    ids = tokenizer.encode_chat(messages, False, tools)
    assert ids[: len(before)] == before
    ids = ids[len(before) :]
    while ids[-1] in tokenizer.ends.ids:
        ids.pop()
    return ids


def schemas(calls: list[Call]) -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "function": {
                "name": call.name,
                "description": "",
                "parameters": {
                    "type": "object",
                    "properties": {
                        key: {"type": "string" if isinstance(value, str) else "object"}
                        for key, value in call.arguments.items()
                    },
                },
            },
        }
        for call in calls
    ]


def read_back(tokenizer: Tokenizer, form: CallForm, calls: list[Call]) -> tuple[str, list[Call]]:
    """What is read in an answer with these calls that arrives token by token."""
    tools = schemas(calls)
    stream = TextStream(tokenizer, [], (), form.markup)
    reader = CallStream(form, tools)
    text = raw = ""
    for token_id in rendered(tokenizer, calls, tools):
        raw += (new := stream.push(token_id))
        text += reader.push(new)
    raw += (new := stream.finish())
    text += reader.push(new) + reader.finish()
    assert form.parse(raw, tools) == (text, reader.calls)
    return text, reader.calls


@pytest.mark.parametrize("name", CASES)
def test_the_form_is_found_by_what_the_template_writes(name: str) -> None:
    assert form_of(name).name == CASES[name].form


def test_a_template_with_another_form_has_none() -> None:
    written = EACH + "{{ '@' + f.name + f.arguments | tojson }}{% endfor %}"
    encoder = tokenizers.Tokenizer.from_str(backend())
    assert call_form(Tokenizer(encoder, {"eos_token": END}, template(written))) is None


def test_a_generation_prompt_that_begins_the_reasoning_hides_no_form() -> None:
    text = CASES["DeepSeek"].template.replace(
        "{{ '<|assistant|>' }}{% endif %}", "{{ '<|assistant|><think>' }}{% endif %}"
    )
    assert text != CASES["DeepSeek"].template
    form = call_form(Tokenizer(tokenizer_of("DeepSeek").backend, {"eos_token": END}, text))
    assert form == form_of("DeepSeek")


@pytest.mark.parametrize("name", CASES)
def test_a_rendered_call_is_read_back(name: str) -> None:
    case = CASES[name]
    calls = st.builds(Call, NAMES, st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(calls, min_size=1, max_size=3 if case.several else 1, unique_by=lambda c: c.name))
    def check(calls: list[Call]) -> None:
        text, parsed = read_back(tokenizer_of(name), form_of(name), calls)
        assert [repr(call) for call in parsed] == [repr(call) for call in calls]
        assert text in ("", "<think>\n\n</think>")

    check()


@pytest.mark.parametrize("name", CASES)
def test_malformed_calls_stay_text(name: str) -> None:
    form = form_of(name)
    whole = tokenizer_of(name).decode(rendered(tokenizer_of(name), [Call("f", {"a": {"b": 1}})], []), False)
    for cut in range(len(form.marker) + whole.index(form.marker) if form.marker in whole else 1, len(whole)):
        text = whole[:cut]
        content, calls = form.parse(text)
        assert (content == text and not calls) or calls == [Call("f", {"a": {"b": 1}})]
    for text in (form.marker * 1000, form.marker + "[" * 5000, form.marker + '{"name": 1, "arguments": []}'):
        assert form.parse(text) == (text, [])


@pytest.mark.parametrize(
    "arguments", ['{"x": NaN}', '{"x": 1e999}', '{"x": "\\ud800"}', "[1]", '"text"', "null", "3"]
)
def test_arguments_that_no_program_could_read_are_no_call(arguments: str) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    assert form_of("ours").parse(text) == (text, [])


def test_text_before_a_call_comes_at_once_and_text_after_it_at_the_end() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    stream = CallStream(form_of("ours"))
    shown = [stream.push(character) for character in f"Let me <b>see</b>.\n\n{call}\nDone."]
    assert "".join(shown) == "Let me <b>see</b>."
    assert shown[:7] == ["L", "e", "t", "", " m", "e", ""]  # white space waits for what follows it
    assert stream.finish() == "\nDone."
    assert stream.calls == [Call("f", {})]


def test_an_answer_of_plain_text_is_unchanged() -> None:
    for name in CASES:
        for text in (
            "  Two spaces. \n",
            "a < b [ c",
            "",
            "<tool",
            '{"a": 1}',
            form_of(name).marker + " is a tag",
        ):
            stream = CallStream(form_of(name))
            assert "".join(map(stream.push, text)) + stream.finish() == text
            assert stream.calls == []


def test_too_long_calls_come_out_as_text() -> None:
    stream = CallStream(form_of("ours"), limit=50)
    text = "<tool_call>" + json.dumps({"name": "f", "arguments": {"x": "y" * 60}}) + "</tool_call>"
    assert "".join(map(stream.push, text)) + stream.finish() == text
    assert not stream.calls
