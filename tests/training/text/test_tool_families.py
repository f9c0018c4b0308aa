"""Every chat template of `trl` that can express tools: its calls are read back, each answer ends with one of
the known ends, and a conversation with our answer can be sent back."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.text.families import FAMILIES, TEMPLATES, Family, write_tokenizer
from tests.training.text.test_template_parity import CONTROL
from tests.training.text.test_tool_calls import ATOMS, NAMES, TEXTS, read_back
from training.data.bad_row import BadRow
from training.data.formats import Row
from training.text.call_forms import Call
from training.text.encode import EncodingOptions, encode_batch
from training.text.tokenizer import Tokenizer
from training.text.tool_calls import PROBE_TOOLS, call_form

TEMPLATE_NAMES = sorted(path.name for path in TEMPLATES.glob("*.jinja"))
TOOLS: list[dict[str, Any]] = [dict(tool) for tool in PROBE_TOOLS]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Those of the templates that have a form of their own for tools, and of the families that trl lacks."""
    assert len(TEMPLATE_NAMES) > 50, "the chat templates are missing: run bin/setup dev"
    families = {name: family for name, family in FAMILIES.items() if family.template == family.text}
    for name in TEMPLATE_NAMES:
        text = (TEMPLATES / name).read_text(encoding="utf-8")
        special = dict.fromkeys(["<bos>", "<eos>", '<|"|>', *CONTROL.findall(text)])
        families[name] = Family(text, "<eos>", "<bos>", tuple(special))
    loaded = {}
    for name, family in families.items():
        tokenizer = Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("family"), family))
        if tokenizer.full_template == tokenizer.chat_template:
            loaded[name] = tokenizer
    return loaded


def test_the_calls_of_every_template_are_read(tokenizers: dict[str, Tokenizer]) -> None:
    assert len(tokenizers) >= 44
    assert [name for name, tokenizer in tokenizers.items() if call_form(tokenizer) is None] == []


# One of each form that only these templates have, and whether an answer can hold several calls.
FORMS = {
    "gemma4.jinja": ("gemma", True),
    "gemma4_v5.jinja": ("gemma", True),
    "glm4moe.jinja": ("glm", True),
    "gptoss.jinja": ("harmony", False),
    "muse_glimmer.jinja": ("atem", True),
}
WORDS = st.sampled_from(["what", "n", "where_to", "B"])  # Gemma's template sorts keys and escapes none
PLAIN_NESTED = st.recursive(
    ATOMS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
VALUES = ATOMS | TEXTS | PLAIN_NESTED.filter(lambda value: isinstance(value, dict | list))


@pytest.mark.parametrize("name", FORMS)
def test_a_rendered_call_is_read_back(name: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, (form_name, several) = tokenizers[name], FORMS[name]
    form = call_form(tokenizer)
    assert form
    assert form.name == form_name
    calls = st.builds(Call, NAMES, st.dictionaries(WORDS, VALUES, max_size=4))

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(calls, min_size=1, max_size=3 if several else 1, unique_by=lambda c: c.name))
    def check(calls: list[Call]) -> None:
        text, parsed = read_back(tokenizer, form, calls)
        assert [json.dumps(call, sort_keys=True) for call in parsed] == [
            json.dumps(call, sort_keys=True) for call in calls
        ]
        assert text.strip() in ("", "<think></think>")

    check()


QUESTION = {"role": "user", "content": "Where is it?"}
ANSWER = {"role": "assistant", "content": "It is here."}
CALLS = [
    {
        "type": "function",
        "id": f"call0000{number}",
        "function": {"name": name, "arguments": {"what": "it"}},
    }
    for number, name in enumerate(("look_up7f3a", "stop7f3a"))
]
CALLING = {"role": "assistant", "content": "", "tool_calls": CALLS[:1]}
RESULT = {"role": "tool", "name": "look_up7f3a", "tool_call_id": "call00000", "content": "Behind the wall."}
TRAINED: dict[str, list[dict[str, Any]]] = {
    "an answer": [QUESTION, ANSWER],
    "reasoning": [QUESTION, {**ANSWER, "reasoning_content": "Hm."}],
    "a call": [QUESTION, CALLING],
    "text and a call": [QUESTION, {**CALLING, "content": "I look."}],
    "reasoning and a call": [QUESTION, {**CALLING, "reasoning_content": "I look."}],
    "two calls": [QUESTION, {**CALLING, "tool_calls": CALLS}],
    "an answer to a result": [QUESTION, CALLING, RESULT, ANSWER],
    "several turns": [QUESTION, CALLING, RESULT, ANSWER, QUESTION, CALLING, RESULT, ANSWER],
}


def last_trained(tokenizer: Tokenizer) -> set[int]:
    """The last token of each answer that is trained. No end may stand inside an answer."""
    last = set()
    for messages in TRAINED.values():
        for tools in (TOOLS, []):
            row = Row(1, "chat", messages=tuple(messages), tools=tuple(tools))
            [examples] = encode_batch([row], tokenizer, EncodingOptions(None))
            if isinstance(examples, BadRow):  # the template rejects it, such as two calls in one answer
                continue
            for example in (tokens.example() for tokens in examples):
                trained = [i for i, mask in enumerate(example.mask) if mask]
                ends = {i for i in trained if i + 1 not in trained}
                last |= {example.ids[i] for i in ends}
                inside = {example.ids[i] for i in trained} - {example.ids[i] for i in ends}
                assert not inside & set(tokenizer.ends.ids)
    return last


def test_ends_are_the_end_token_and_what_ends_trained_answers(tokenizers: dict[str, Tokenizer]) -> None:
    differing = {}
    for name, loaded in tokenizers.items():
        tokenizer = loaded
        if name == "glm4moe.jinja":  # the next turn's mark ends a turn, by GLM's generation_config
            ids = [loaded.backend.token_to_id(token) for token in ("<|user|>", "<|observation|>")]
            tokenizer = replace(loaded, model_ends=tuple(id for id in ids if id is not None))
        expected = {tokenizer.eos_id, *last_trained(tokenizer)}
        if expected != {*tokenizer.ends.ids}:
            differing[name] = (tokenizer.ends.tokens, [tokenizer.backend.id_to_token(i) for i in expected])
    assert not differing


def test_a_call_that_ends_with_another_token_has_an_end_of_its_own(tokenizers: dict[str, Tokenizer]) -> None:
    """Llama 3.1 ends a call with <|eom_id|> where it has built-in tools."""
    given = tokenizers["llama3_1.jinja"]
    assert given.ends.tokens == ("<eos>", "<|eot_id|>")
    assert "if builtin_tools is defined %}" in given.chat_template
    changed = replace(
        given, chat_template=given.chat_template.replace("if builtin_tools is defined %}", "if true %}")
    )
    assert changed.ends.tokens == ("<eos>", "<|eot_id|>", "<|eom_id|>")
    assert {changed.eos_id, *last_trained(changed)} == {*changed.ends.ids}


def test_the_named_template_for_tools_has_ends_of_its_own(tokenizers: dict[str, Tokenizer]) -> None:
    given = tokenizers["llama3_1.jinja"]
    named = given.chat_template.replace("if builtin_tools is defined %}", "if true %}")
    both = replace(given, named_templates={"tool_use": named})
    assert both.ends.tokens == ("<eos>", "<|eot_id|>", "<|eom_id|>")
    assert {both.eos_id, *last_trained(both)} == {*both.ends.ids}


def test_a_conversation_with_our_answer_can_be_sent_back(tokenizers: dict[str, Tokenizer]) -> None:
    """With ids as other programs write them, as ours, and without any."""
    for name, tokenizer in tokenizers.items():
        for id in ("call_0123456789abcdef01234567", "a1b2c3d4e", None):
            call = {**CALLS[0], "id": id} if id else {k: v for k, v in CALLS[0].items() if k != "id"}
            result = {**RESULT, "tool_call_id": id} if id else {**RESULT, "tool_call_id": None}
            history: list[dict[str, Any]] = [QUESTION, {**CALLING, "tool_calls": [call]}, result]
            text = tokenizer.render_chat(history, True, TOOLS)
            before = tokenizer.render_chat(history[:2], False, TOOLS)
            assert RESULT["content"] in text, name
            assert "look_up7f3a" in before, name


def test_ids_that_a_template_rejects_become_those_it_takes(tokenizers: dict[str, Tokenizer]) -> None:
    first, second, third = ({**CALLS[0], "id": id} for id in ("call_0123456789", "a1b2c3d4e", "toolu_1"))
    history: list[dict[str, Any]] = [
        QUESTION,
        {**CALLING, "tool_calls": [first, second]},
        {**RESULT, "tool_call_id": "a1b2c3d4e"},
        {**RESULT, "tool_call_id": "call_0123456789"},
        {**CALLING, "tool_calls": [third]},
        {**RESULT, "tool_call_id": None},
    ]
    text = tokenizers["Mistral"].render_chat(history, True, TOOLS)
    assert re.findall(r'"id": "(\w+)"', text) == ["call00001", "a1b2c3d4e", "call00002"]
    assert re.findall(r'"call_id": "(\w+)"', text) == ["a1b2c3d4e", "call00001", "call00002"]
