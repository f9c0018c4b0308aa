"""What a chat template can express, found by rendering invented conversations with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from training.text.chat_template import BadTemplate, Message, TemplateRefused

ANSWER = "The answer is 7f3a."  # rendered to see what a chat template writes after an answer
OPENING = re.compile(r"<(\w+)>\s*(</\1>\s*)?$")  # begins the model's reasoning (<think>), or leaves it empty

_PROBE = "probe7f3a"
_ARGUMENT = "argument7f3a"
_ARGUMENTS = {_ARGUMENT: "value7f3a"}
_SYSTEM = {"role": "system", "content": "Be short."}
_QUESTION = {"role": "user", "content": "What is it?"}
_ANSWER = {"role": "assistant", "content": ANSWER}


class RenderMessages(Protocol):
    """Renders messages with the template in question, the arguments of calls as they are. Raises
    BadTemplate."""

    def __call__(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str: ...


class ToolSupport(NamedTuple):
    """What a chat template can express of tools."""

    expresses: frozenset[str] = (
        frozenset()
    )  # any of tools (definitions), tool_calls (with the answers of tools)
    text_arguments: bool = False  # whether it takes a call's arguments as JSON text, not as an object


def expresses(render: RenderMessages) -> frozenset[str]:
    """What it can express beside role, content and tools: any of name, reasoning_content, and system
    messages."""
    probes: dict[str, list[Message]] = {
        "name": [{**_QUESTION, "name": _PROBE}, _ANSWER],
        "reasoning_content": [_QUESTION, {**_ANSWER, "reasoning_content": _PROBE}],
        "system": [{"role": "system", "content": _PROBE}, _QUESTION, _ANSWER],
    }
    known = {name for name, turns in probes.items() if _PROBE in _rendered(render, turns)}
    return frozenset(known | {"reasoning_content"} if opening(render) else known)


def tool_support(render: RenderMessages, *, with_definitions: bool) -> ToolSupport:
    """`with_definitions`: whether calls are tried together with a tool's definition."""
    tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {}}}
    result = {"role": "tool", "content": "found", "tool_call_id": "call00001"}
    tools = [tool] if with_definitions else []
    known = {"tools"} if _PROBE in _rendered(render, [_QUESTION, _ANSWER], [tool]) else set()
    written = json.dumps(_ARGUMENTS)
    for arguments in (_ARGUMENTS, written):
        function = {"name": _PROBE, "arguments": arguments}
        call = {"type": "function", "id": "call00001", "function": function}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        text = _rendered(render, [_QUESTION, calling, result, _ANSWER], tools)
        # An object that a template joins to text comes out in Python's notation.
        right = str(_ARGUMENTS)[1:-1] not in text if arguments is _ARGUMENTS else written in text
        if right and all(part in text for part in (_PROBE, "found", *_ARGUMENTS)):
            return ToolSupport(frozenset(known | {"tool_calls"}), arguments is not _ARGUMENTS)
    return ToolSupport(frozenset(known))


def fault(render: RenderMessages) -> str:
    """Why it renders no conversation at all, "" if it does (or rejects those tried here on purpose): a fault
    of the template, not of the rows."""
    faults: list[str] = []
    for messages in ([_QUESTION, _ANSWER], [_SYSTEM, _QUESTION, _ANSWER]):
        for prompted in (False, True):
            try:
                render(messages, prompted)
            except TemplateRefused:
                return ""
            except BadTemplate as error:
                faults.append(str(error))
            else:
                return ""
    return faults[0]


def opening(render: RenderMessages) -> str:
    """What the generation prompt writes to open the model's reasoning ("<think>\\n") where the template
    leaves the reasoning out of answers (DeepSeek-R1): "" for other templates."""
    try:
        before = render([_QUESTION])
        prompt = render([_QUESTION], True)
        whole = render([_QUESTION, _ANSWER])
    except BadTemplate:
        return ""
    tag = opening_of(before, prompt, whole)
    return "" if tag is None or tag[2] else tag[0]


def opening_of(before: str, prompt: str, whole: str) -> re.Match[str] | None:
    """Where the generation prompt opens the model's reasoning, and the rendered answer lacks that. `before`:
    the conversation up to the answer, `prompt`: with the generation prompt, `whole`: with the answer."""
    tag = OPENING.search(prompt, len(before))
    if tag is None or whole.startswith(prompt) or not prompt.startswith(before):
        return None
    return tag if whole.startswith(prompt[: tag.start()]) else None


def after_answer(render: RenderMessages) -> str:
    """What it writes after the last answer. "" if it demands other turns."""
    _, answer, after = _rendered(render, [_QUESTION, _ANSWER]).rpartition(ANSWER)
    return after if answer else ""


def end_of_calls(
    render: RenderMessages, control: re.Pattern[str] | None, *, text_arguments: bool
) -> list[str]:
    """The token that ends a turn of calls, if it is none that stands inside one. `control` matches the
    control tokens."""
    arguments: Any = json.dumps(_ARGUMENTS) if text_arguments else _ARGUMENTS
    calls = [
        {"type": "function", "id": f"call0000{i}", "function": {"name": _PROBE, "arguments": arguments}}
        for i in (1, 2)
    ]
    for some in (calls, calls[:1]):  # some templates take only one
        turn = {"role": "assistant", "content": "", "tool_calls": some}
        try:
            text = render([{"role": "user", "content": "Go."}, turn])
        except BadTemplate:
            continue
        values = _ARGUMENTS[_ARGUMENT]
        inside, separator, after = text.rpartition(values)
        tokens = control.findall(after) if separator and control else []
        return tokens[-1:] if tokens and tokens[-1] not in inside.partition(values)[2] else []
    return []


def _rendered(
    render: RenderMessages, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The text of the messages, "" if the template rejects them."""
    try:
        return render(messages, False, tools)
    except BadTemplate:
        return ""
