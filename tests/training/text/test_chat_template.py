"""Chat templates in Hugging Face's whole dialect, rendered as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.training.text.families import Family, write_tokenizer
from tests.training.tiny import gpt2, write_model
from training.export.folder import write_folder
from training.text.chat_template import BadTemplate, Renderer, TemplateRefused, render
from training.text.tokenizer import Tokenizer, TokenizerError

MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Where is “it”?"},
    {"role": "assistant", "content": "There.", "reasoning_content": "I saw it."},
]
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"b": 1, "a": [2, "é<"]}}}
DIALECT = {
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}"
    "{{ x is defined }}{% endfor %}",
    "generation with dashes": "{% for m in messages %}\n  {%- generation -%}  {{ m.role }}\n{%- endgeneration -%}{% endfor %}",
    "break": "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ tools | tojson(sort_keys=true) }}"
    "{{ tools | tojson(separators=(',', ':')) }}{{ tools | tojson(ensure_ascii=true) }}",
    "no tools, no documents": "{{ tools is none }} {{ documents is none }} {{ documents is defined }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ image_token }}{{ pad_token is defined }}",
    "reasoning by its other name": "{{ messages[-1].thinking }}{{ messages[-1].reasoning_content }}",
    "dict and namespace": "{% set n = namespace(a=1) %}{% set n.a = dict(b=2) %}{{ n.a }}{{ dict.fromkeys(['x']) }}",
    "the year": "{{ strftime_now('%Y') if strftime_now is defined }}",
    "blocks": "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}",
}
REFUSED = {
    "underscores in a namespace": "{% set n = namespace(__class__=1) %}",
    "attributes of dict": "{{ dict.__subclasses__() }}",
    "raise_exception": "{{ raise_exception('Only users speak here') }}",
    "an unknown filter": "{{ messages | shuffled }}",
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    renderer = Renderer()
    yield renderer
    renderer.stop()


def both(folder: Path, template: str, **config: Any) -> tuple[Tokenizer, Any]:
    family = Family(template, "<e>", "<b>", ("<b>", "<e>", "<u>", "<i>"), config=tuple(config.items()))
    write_tokenizer(folder, family)
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", DIALECT)
def test_the_whole_dialect_renders_as_in_transformers(name: str, tmp_path: Path, renderer: Renderer) -> None:
    ours, theirs = both(tmp_path, DIALECT[name], unk_token="<u>", image_token="<i>")
    tools = [TOOL] if name == "tojson" else []
    expected = theirs.apply_chat_template(MESSAGES, tools=tools or None, tokenize=False)
    assert ours._render(ours.chat_template, MESSAGES, False, tools) == expected
    ours.render = renderer.render
    assert ours._render(ours.chat_template, MESSAGES, False, tools) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_refuses_is_refused(name: str, tmp_path: Path, renderer: Renderer) -> None:
    ours, theirs = both(tmp_path, REFUSED[name])
    with pytest.raises(Exception):  # noqa: B017, PT011 (jinja2's own errors)
        theirs.apply_chat_template(MESSAGES, tokenize=False)
    kind = TemplateRefused if name == "raise_exception" else BadTemplate
    for function in (render, renderer.render):
        with pytest.raises(BadTemplate) as error:
            function(ours.chat_template, {"messages": MESSAGES})
        assert type(error.value) is kind
    with pytest.raises(TokenizerError):
        ours.render_chat(MESSAGES)


def test_a_fixed_date_is_what_templates_read(renderer: Renderer) -> None:
    template, now = "{{ strftime_now('%d %B %Y %H:%M') }}", datetime(2024, 2, 29, 7, 5)
    assert render(template, {}, now) == renderer.render(template, {}, now) == "29 February 2024 07:05"
    assert render("{{ strftime_now is defined }}", {}, now, dated=False) == "False"


# --- named templates ------------------------------------------------------------------------------

DEFAULT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<e>{% endfor %}"
WITH_TOOLS = (
    "{{ tools | tojson if tools else '' }}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls else '' }}<e>{% endfor %}"
)
CALL = {"type": "function", "id": "call00001", "function": {"name": "look_up", "arguments": {"what": "it"}}}
CALLED: list[dict[str, Any]] = [
    MESSAGES[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "Behind."},
]


@pytest.mark.parametrize("place", ["list", "folder"])
def test_the_template_for_tools_is_used_when_there_are_tools(place: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", context=1024)
    config = json.loads((base / "tokenizer_config.json").read_text())
    named = {"default": DEFAULT, "tool_use": WITH_TOOLS, "rag": "{{ documents }}"}
    if place == "list":
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        (base / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        (base / "chat_template.jinja").write_text(DEFAULT)
        (base / "additional_chat_templates").mkdir()
        for name in ("tool_use", "rag"):
            (base / "additional_chat_templates" / f"{name}.jinja").write_text(named[name])
    ours = Tokenizer.load(base)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(base)
    assert theirs.chat_template == named
    assert ours.render_chat(MESSAGES).startswith("<user>")
    assert ours.render_chat(CALLED, tools=[TOOL]) == theirs.apply_chat_template(
        CALLED, tools=[TOOL], tokenize=False
    )
    write_folder(gpt2(context=1024), tmp_path / "export", base=base)
    exported: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert set(exported.chat_template) == set(named)
    for messages, tools in ((MESSAGES, []), (CALLED, [TOOL]), (CALLED, []), (MESSAGES, [TOOL])):
        for tokenizer in (ours, Tokenizer.load(tmp_path / "export")):
            assert tokenizer.render_chat(messages, tools=tools) == exported.apply_chat_template(
                messages, tools=tools or None, tokenize=False
            )


# --- arguments of calls ---------------------------------------------------------------------------

TURNS = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }} ARGUMENTS{% endfor %}<e>{% endfor %}"
)
WANTS = {
    "an object": "{{ c.function.arguments | tojson }}",
    "text": "{{ '```' + c.function.arguments + '```' }}",
    "text, joined": "{{ '```' ~ c.function.arguments ~ '```' }}",
    "either": "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
    "keys": "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %}",
}


@pytest.mark.parametrize("given", ["object", "text"])
@pytest.mark.parametrize("wants", WANTS)
def test_arguments_are_an_object_or_text_as_the_template_wants(
    wants: str, given: str, tmp_path: Path
) -> None:
    ours, _ = both(tmp_path, TURNS.replace("ARGUMENTS", WANTS[wants]))
    assert ours.full_template == ours.chat_template
    arguments: Any = {"what": 'a "hose" é <e>', "n": 2}
    written = json.dumps(arguments, ensure_ascii=False)
    function = {"name": "look_up", "arguments": written if given == "text" else arguments}
    call = {"type": "function", "function": function}
    ids = ours.encode_chat([MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call]}])
    text = ours.decode(ids, skip_special_tokens=False)
    assert ('what="a \\"hose\\" é <e>"n=2' if wants == "keys" else written) in text
    assert ids.count(ours.eos_id) == 2, "the spelled control token is text"


def test_a_template_that_loses_the_arguments_gets_our_form(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, TURNS.replace(" ARGUMENTS", ""))
    assert '"arguments": {"what": "it"}' in ours.render_chat(CALLED, tools=[TOOL])
