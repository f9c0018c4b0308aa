"""Our prompts have the token ids of transformers' `apply_chat_template`, and training continues exactly the
prompts that inference feeds, for the chat templates of ten model families."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.training.text.families import FAMILIES, SMOLLM2, TEMPLATES, Family, write_tokenizer
from training.data.bad_row import BadRow
from training.data.formats import Row
from training.text.encode import EncodingOptions, Example, encode_batch
from training.text.tokenizer import Tokenizer, TokenizerError
from training.text.tool_form import with_tools

Messages = Sequence[Mapping[str, Any]]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Finds a thing — “anything”.",
            "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
        },
    }
]
CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": "look_up", "arguments": {"what": 'a "hose" é'}},
}
SYSTEM = {"role": "system", "content": "Be short."}
QUESTION = {"role": "user", "content": "Where is it?"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "look_up", "tool_call_id": "call00001", "content": "Behind the wall."}
ANSWER = {"role": "assistant", "content": "It is behind the wall."}
MORE = [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Still there, 3 m away."}]
THOUGHT = {**ANSWER, "reasoning_content": "The wall is near.\nSo it is there."}
CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "one turn": ([QUESTION, ANSWER], []),
    "two turns": ([QUESTION, ANSWER, *MORE], []),
    "system": ([SYSTEM, QUESTION, ANSWER, *MORE], []),
    "definitions": ([QUESTION, ANSWER, *MORE], TOOLS),
    "a call": ([QUESTION, CALLING, RESULT, ANSWER], TOOLS),
    "a call with system": ([SYSTEM, QUESTION, CALLING, RESULT, ANSWER, *MORE], TOOLS),
    "a call without definitions": ([QUESTION, CALLING, RESULT, ANSWER], []),
    "reasoning": ([QUESTION, THOUGHT, MORE[0], {**MORE[1], "reasoning_content": "It did not move."}], []),
    "reasoning and a call": (
        [QUESTION, {**CALLING, "reasoning_content": "I look."}, RESULT, THOUGHT, *MORE],
        TOOLS,
    ),
    "empty lines": (
        [{"role": "user", "content": "\n\nHi \n"}, {"role": "assistant", "content": "\n\n Hi\n "}, *MORE],
        [],
    ),
}
REJECTED = "rejected"


def prompt_of(tokenizer: Tokenizer, messages: Messages, tools: Messages, prompted: bool) -> list[int] | str:
    try:
        return tokenizer.encode_chat(messages, prompted, tools)
    except TokenizerError:
        return REJECTED


def their_prompt(theirs: Any, template: str, messages: Messages, tools: Messages, prompted: bool) -> Any:
    """transformers' token ids, with the template that ours uses for tools where the base has no form for them."""
    try:
        return theirs.apply_chat_template(
            messages,
            tools=tools or None,
            chat_template=template,
            add_generation_prompt=prompted,
            return_dict=False,
        )
    except Exception:  # of jinja2, or whatever the template's own error is
        return REJECTED


def theirs_for(ours: Tokenizer, template: str, messages: Messages, tools: Messages) -> str:
    """The base's template, or that with our form for tools in front where the base has none."""
    uses_tools = tools or any(m.get("tool_calls") or m["role"] == "tool" for m in messages)
    if not uses_tools or {"tools", "tool_calls"} <= ours.expresses:
        return template
    return with_tools(template, system="system" in ours.expresses)


def compare(ours: Tokenizer, theirs: Any, messages: Messages, tools: Messages) -> None:
    """Every prompt of the conversation, and all of it."""
    for end in range(1, len(messages) + 1):
        for prompted in (True, False):
            part = messages[:end]
            template = theirs_for(ours, theirs.chat_template, part, tools)
            mine = prompt_of(ours, part, tools, prompted)
            other = their_prompt(theirs, template, part, tools, prompted)
            assert mine == other, f"{end} messages, generation prompt {prompted}"


def stretches(example: Example) -> Iterator[tuple[int, int]]:
    """(begin, end) of each stretch of trained tokens."""
    mask = [*example.mask, 0]
    begins = [i for i, trained in enumerate(mask) if trained and not mask[i - 1]]
    return ((begin, mask.index(0, begin)) for begin in begins)


def check_training(ours: Tokenizer, messages: Messages, tools: Messages) -> None:
    """Each answer is trained once, after the prompt that inference feeds, up to a token that ends generation."""
    encoded = encode_batch(
        [Row(1, "chat", messages=tuple(map(dict, messages)), tools=tuple(map(dict, tools)))],
        ours,
        EncodingOptions(None),
    )[0]
    if isinstance(encoded, BadRow):
        assert prompt_of(ours, messages, tools, False) == REJECTED
        return
    trained = []
    for tokens in encoded:
        example = tokens.example()
        trained += [(example.ids[:begin], example.ids[begin:end]) for begin, end in stretches(example)]
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    assert [prompt for prompt, _ in trained] == [ours.encode_chat(messages[:i], True, tools) for i in answers]
    for i, (_, answer) in zip(answers, trained, strict=True):
        assert answer[-1] in ours.ends.ids
        assert not set(answer[:-1]) & set(ours.ends.ids), "generation would stop before this answer ends"
        text = ours.decode(answer, skip_special_tokens=False)
        assert messages[i]["content"].strip() in text
        if reasoning := messages[i].get("reasoning_content"):
            assert (reasoning in text) == ("reasoning_content" in ours.expresses)
        if messages[i].get("tool_calls"):
            assert "look_up" in text


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Our tokenizer and transformers' of each family."""
    pairs = {}
    for name, family in FAMILIES.items():
        folder = write_tokenizer(tmp_path_factory.mktemp("family") / "base", family)
        pairs[name] = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    return pairs


OWN_FORM = {"Qwen3", "Llama 3.1", "Llama 3.2", "SmolLM3", "Mistral", "Granite 4", "LFM2"}


def test_families_with_a_form_for_tools_use_it(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    assert {n for n, (ours, _) in pairs.items() if ours.full_template == ours.chat_template} == OWN_FORM


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_have_the_ids_of_transformers(
    pairs: dict[str, tuple[Tokenizer, Any]], name: str, case: str
) -> None:
    compare(*pairs[name], *CASES[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_continues_the_prompt_of_inference(
    pairs: dict[str, tuple[Tokenizer, Any]], name: str, case: str
) -> None:
    check_training(pairs[name][0], *CASES[case])


# --- the comparison itself ------------------------------------------------------------------------

PLANTED: dict[str, tuple[str, str, str]] = {  # family, what is replaced, by what
    "a missing generation prompt": ("Qwen3", "if add_generation_prompt", "if false"),
    "a double BOS": ("Llama 3.2", "{{- bos_token }}", "{{- bos_token ~ bos_token }}"),
    "a lost newline": ("SmolLM2", "m.content + '<|im_end|>\n'", "m.content + '<|im_end|>'"),
    "tools before system": (
        "Granite 4",
        "{{- '<|start_of_role|>system<|end_of_role|>' + system -}}",
        "{%- if tools -%}{{- tools | tojson -}}{%- endif -%}{{- '<|start_of_role|>system<|end_of_role|>' + system -}}",
    ),
    "reasoning kept in earlier turns": (
        "Qwen3",
        "{%- if loop.index0 > ns.last_query_index %}",
        "{%- if reasoning_content or loop.last %}",
    ),
}


@pytest.mark.parametrize("difference", PLANTED)
def test_a_planted_difference_fails_the_comparison(
    difference: str, pairs: dict[str, tuple[Tokenizer, Any]], tmp_path: Path
) -> None:
    name, old, new = PLANTED[difference]
    text = FAMILIES[name].text
    assert old in text
    changed = Tokenizer.load(write_tokenizer(tmp_path, FAMILIES[name], text.replace(old, new)))

    def differing(ours: Tokenizer, theirs: Any) -> list[str]:
        result = []
        for case, (messages, tools) in CASES.items():
            try:
                compare(ours, theirs, messages, tools)
            except AssertionError:
                result.append(case)
        return result

    assert differing(changed, pairs[name][1])
    assert not differing(*pairs[name])


def test_a_planted_difference_between_training_and_inference_fails(tmp_path: Path) -> None:
    """Only the last answer trained, as before: the first is missing."""
    ours = Tokenizer.load(write_tokenizer(tmp_path, FAMILIES["Qwen3"]))
    check_training(ours, *CASES["reasoning"])
    ours.early = True
    with pytest.raises(AssertionError):
        check_training(ours, *CASES["reasoning"])


# --- every template of the package ----------------------------------------------------------------

CONTROL = re.compile(r"<\|\w+\|>|<｜[\w▁]+｜>|<\w+_of_\w+>|<\|\w+>|<\w+\|>")


def test_every_known_template_gives_the_ids_of_transformers(tmp_path: Path) -> None:
    """One conversation with everything, and one without tools."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*.jinja"))}
    assert len(texts) > 50, "the chat templates are missing: run bin/setup dev"
    tokens = dict.fromkeys(
        ["<bos>", "<eos>", *(token for text in texts.values() for token in CONTROL.findall(text))]
    )
    folder = write_tokenizer(tmp_path, Family(SMOLLM2, "<eos>", "<bos>", tuple(tokens)))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    loaded = Tokenizer.load(folder)
    for name, text in texts.items():
        ours = replace(loaded, chat_template=text)
        for case in ("system", "a call with system", "reasoning and a call"):
            messages, tools = CASES[case]
            part = messages[:-1]
            mine = prompt_of(ours, part, tools, True)
            template = theirs_for(ours, text, part, tools)
            assert mine == their_prompt(theirs, template, part, tools, True), f"{name}, {case}"
