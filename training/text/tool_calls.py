"""Reads the tool calls in an answer, in the form that the model's chat template writes them in.

`call_form` finds the form by rendering calls with the template and reading them back: the first form that
returns the same calls is the right one. The model's name does not matter. A call that cannot be read stays
text; nothing that a model writes is ever executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from training.text.tokenizer import Tokenizer, TokenizerError

Tools = Sequence[Mapping[str, Any]]


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


class NotACall(ValueError):
    """The text at this place is not a call in this form."""


MAX_MALFORMED = 100  # places where a call seems to begin; then the rest is text, so that this stays fast


# Reads the calls that begin at a position of the text. Returns them with the position after them.
Reader = Callable[[str, int, Tools], tuple[list[Call], int]]


@dataclass(frozen=True)
class CallForm:
    """How a model writes its calls."""

    name: str
    marker: str  # the text with which calls begin
    read: Reader
    markup: tuple[str, ...]  # texts that some tokenizers have as control tokens
    bare: bool = False  # an answer that begins with { may be a call, too

    def begin(self, text: str, at: int = 0, *, first: bool = True) -> int:
        """Where the next call may begin, -1 if nowhere. `first`: the text is the beginning of the answer."""
        space = len(text) - len(text.lstrip())
        if self.bare and first and at <= space and text.startswith("{", space):
            return space
        return text.find(self.marker, at)

    def parse(self, text: str, tools: Tools = ()) -> tuple[str, list[Call]]:
        """The text beside the calls, and the calls. `tools`: their definitions, where the form does not say
        whether a value is text or a number."""
        shown: list[str] = []
        calls: list[Call] = []
        after = at = malformed = 0
        while malformed < MAX_MALFORMED and (begin := self.begin(text, at)) >= 0:
            try:
                parsed, end = self.read(text, begin, tools)
            except (ValueError, RecursionError):
                at, malformed = begin + 1, malformed + 1
                continue
            shown.append(text[after:begin].rstrip())
            calls += parsed
            after = at = end
        if not calls:
            return text, []
        rest = text[after:].strip()
        return "\n".join(part for part in [*shown, rest] if part), calls


@dataclass
class CallStream:
    """Separates the calls from the text of an answer while it is generated. Text comes out at once, but never
    the beginning of a call."""

    form: CallForm
    tools: Tools = ()
    limit: int = 100_000  # characters of calls; a longer answer comes out as text
    held: str = ""
    holding: bool = False  # a call may have begun
    plain: bool = False  # everything is text from here on
    first: bool = True  # nothing has come out yet
    calls: list[Call] = field(default_factory=list)

    def push(self, text: str) -> str:
        """The text that can be shown, now that this much more has been generated."""
        self.held += text
        self.plain = self.plain or (self.holding and len(self.held) > self.limit)
        if self.plain:
            return self._release(len(self.held))
        if self.holding:
            return ""
        begin = self.form.begin(self.held, first=self.first)
        self.holding = begin >= 0
        # White space is held as well: before a call, it is a part of the markup.
        ready = begin if self.holding else len(self.held) - overlap(self.held, self.form.marker)
        return self._release(len(self.held[:ready].rstrip()))

    def finish(self) -> str:
        """The rest of the text, at the end. Then `calls` are known."""
        if self.holding and not self.plain:
            rest, self.calls = self.form.parse(self.held, self.tools)
            if self.calls:
                self.held = rest if self.first or not rest else "\n" + rest
        return self._release(len(self.held))

    def _release(self, count: int) -> str:
        text, self.held = self.held[:count], self.held[count:]
        self.first = self.first and not text
        return text


def call_form(tokenizer: Tokenizer) -> CallForm | None:
    """The form of the model's chat template, None if it is not one that is known here."""
    # Some templates write one call per answer.
    for probe in ([*PROBES], PROBES[:1]):
        try:
            text = _rendered(tokenizer, probe)
        except TokenizerError:
            continue
        for form in FORMS:
            if form.parse(text, PROBE_TOOLS)[1] == probe:
                return form
    return None


PROBES = [
    Call("look_up7f3a", {"what": 'it\'s a "hose" \\n', "count": 3, "where": {"shed": [True, None]}}),
    Call("stop7f3a", {}),
]
PROBE_TOOLS: Tools = [
    {
        "type": "function",
        "function": {
            "name": "look_up7f3a",
            "description": "",
            "parameters": {
                "type": "object",
                "properties": {
                    "what": {"type": "string"},
                    "count": {"type": "integer"},
                    "where": {"type": "object"},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "stop7f3a", "description": "", "parameters": {}}},
]


def _rendered(tokenizer: Tokenizer, calls: Sequence[Call]) -> str:
    """An answer with these calls, without the tokens around it."""
    user = {"role": "user", "content": "What is it?"}
    answer = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "id": f"call{number:05}",  # some templates accept only nine letters and digits
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for number, call in enumerate(calls)
        ],
    }
    before = tokenizer.render_chat([user], True)
    # Where the generation prompt has more than a rendered answer (a <think>), the whole text is searched.
    text = tokenizer.render_chat([user, answer]).removeprefix(before)
    ends = [end for end in (tokenizer.ends.template.strip(), *tokenizer.ends.tokens) if end]
    while ended := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip().removesuffix(ended)
    return text


def overlap(text: str, marker: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `marker`."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)


# --- JSON ------------------------------------------------------------------------------------------


def _no_constant(name: str) -> Any:
    raise NotACall(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_SPACE = re.compile(r"\s*")


def _json(text: str, at: int) -> tuple[Any, int]:
    return _DECODER.raw_decode(text, _skip(text, at))


def _skip(text: str, at: int, token: str = "") -> int:
    """The position after white space, and after `token` and white space if it is there."""
    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches anywhere
    return _SPACE.match(text, at + len(token)).end() if token and text.startswith(token, at) else at  # type: ignore[union-attr]


def _expect(text: str, at: int, token: str) -> int:
    at = _skip(text, at)
    if not text.startswith(token, at):
        raise NotACall
    return at + len(token)


def _call(value: Any) -> Call:
    """A call from its JSON object."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise NotACall
    return _checked(value.get("name"), value.get("arguments", value.get("parameters")))


def _checked(name: Any, arguments: Any) -> Call:
    if isinstance(arguments, str):  # some models write JSON inside JSON
        arguments = json.loads(arguments, parse_constant=_no_constant) if arguments.strip() else {}
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise NotACall
    # Neither a lone surrogate nor an infinite number can be sent on.
    (name + json.dumps(arguments, ensure_ascii=False, allow_nan=False)).encode()
    return Call(name, arguments)


# --- the forms -------------------------------------------------------------------------------------


def _tagged(text: str, at: int, tools: Tools) -> tuple[list[Call], int]:
    """<tool_call>{"name", "arguments"}</tool_call>: ours, Hermes, Qwen, Granite 4."""
    value, at = _json(text, _expect(text, at, "<tool_call>"))
    return [_call(value)], _close(text, at, "</tool_call>")


def _close(text: str, at: int, token: str) -> int:
    """The position after `token`, which may be missing at the very end, where generation stopped."""
    at = _skip(text, at)
    return at if not token or at == len(text) else _expect(text, at, token)


def _bare(text: str, at: int, tools: Tools) -> tuple[list[Call], int]:
    """{"name", "parameters"}, perhaps after <|python_tag|>, as the whole answer: Llama 3."""
    at = _skip(text, at, "<|python_tag|>")
    calls = []
    while at < len(text):
        value, at = _json(text, at)
        if not isinstance(value, dict) or not {"parameters", "arguments"} & value.keys():
            raise NotACall
        calls.append(_call(value))
        at = _skip(text, at, ";")
    if not calls:
        raise NotACall
    return calls, at


def _listed(begin: str, end: str = "") -> Reader:
    """A marker, then a list of {"name", "arguments"}: Mistral, Granite 3, Phi-4-mini. Or, as in newer Mistral
    models, the marker, the name and the arguments, for each call."""

    def read(text: str, at: int, tools: Tools) -> tuple[list[Call], int]:
        at = _skip(text, _expect(text, at, begin))
        if text.startswith("[", at):
            values, at = _json(text, at)
            if not isinstance(values, list) or not values:
                raise NotACall
            return [_call(value) for value in values], _close(text, at, end)
        if text.startswith("{", at):
            value, at = _json(text, at)
            return [_call(value)], _close(text, at, end)
        match = _NAMED.match(text, at)
        if match is None:
            raise NotACall
        arguments, at = _json(text, match.end())
        return [_checked(match[1], arguments)], at

    return read


_NAMED = re.compile(r"([^\s\[\]{}<>]+)\s*(?:\[CALL_ID\]\w+)?\s*(?:\[ARGS\])?(?=\s*\{)")


def _deepseek(text: str, at: int, tools: Tools) -> tuple[list[Call], int]:
    """<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>name, then the arguments as a block of JSON.
    From DeepSeek V3.1 on, name<｜tool▁sep｜>{…}."""
    at = _skip(text, at, DEEPSEEK[0])
    calls = []
    while match := _DEEPSEEK_CALL.match(text, at):
        arguments, at = _json(text, match.end())
        calls.append(_checked((match[2] or match[1]).strip(), arguments))
        at = _close(text, _skip(text, at, "```"), DEEPSEEK[3])
        at = _skip(text, at)
    if not calls:
        raise NotACall
    return calls, _skip(text, at, DEEPSEEK[4])


DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
_DEEPSEEK_CALL = re.compile(
    r"\s*<｜tool▁call▁begin｜>([^<]*)<｜tool▁sep｜>(?:([^\n{]+)\n```json\n)?(?=\s*\{)",
)


LFM2 = ("<|tool_call_start|>", "<|tool_call_end|>")


def _pythonic(*, escapes: bool) -> Reader:
    """<|tool_call_start|>[name(key='text', other=3)]<|tool_call_end|>: LFM2.

    `escapes`: whether \\' and \\n in a text are escapes, as in Python. LFM2's template writes texts as they
    are, even with quotes inside, so a text ends at the quote that something else follows."""

    def read(text: str, at: int, tools: Tools) -> tuple[list[Call], int]:
        at = _expect(text, _expect(text, at, LFM2[0]), "[")
        calls = []
        while match := _FUNCTION.match(text, at):
            arguments, at = _arguments(text, match.end(), escapes)
            calls.append(_checked(match[1], arguments))
            at = _skip(text, at, ",")
        if not calls:
            raise NotACall
        return calls, _close(text, _expect(text, at, "]"), LFM2[1])

    return read


_FUNCTION = re.compile(r"\s*([\w.\-]+)\s*\(\s*")
_KEY = re.compile(r"\s*([^\s=(),'\"]+)\s*=\s*")
# What may follow a text: the next argument, the next call or the end of the calls.
_AFTER = r"(?=\s*(?:,\s*[^\s=(),'\"]+\s*=|\)\s*(?:\]|,\s*[\w.\-]+\s*\()))"
_QUOTED = {quote: re.compile(f"{quote}(.*?){quote}{_AFTER}", re.DOTALL) for quote in "'\""}
_ESCAPED = {
    quote: re.compile(rf"{quote}((?:[^\\{quote}]|\\.)*){quote}{_AFTER}", re.DOTALL) for quote in "'\""
}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_CONSTANTS = {"True": True, "False": False, "None": None}
_CONSTANT = re.compile(r"True|False|None")


def _arguments(text: str, at: int, escapes: bool) -> tuple[dict[str, Any], int]:
    arguments: dict[str, Any] = {}
    while match := _KEY.match(text, at):
        at = match.end()
        if quoted := (_ESCAPED if escapes else _QUOTED).get(text[at : at + 1]):
            written = quoted.match(text, at)
            if written is None:
                raise NotACall
            value: Any = _ESCAPE.sub(_unescaped, written[1]) if escapes else written[1]
            at = written.end()
        elif constant := _CONSTANT.match(text, at):
            value, at = _CONSTANTS[constant[0]], constant.end()
        else:
            value, at = _json(text, at)
        arguments[match[1]] = value
        at = _skip(text, at, ",")
    return arguments, _expect(text, at, ")")


def _unescaped(match: re.Match[str]) -> str:
    escape = match[1]
    if len(escape) > 1:
        return chr(int(escape[1:], 16))
    return {"n": "\n", "t": "\t", "r": "\r", "\n": ""}.get(escape, escape)


def _xml(text: str, at: int, tools: Tools) -> tuple[list[Call], int]:
    """<tool_call><function=name><parameter=key>value</parameter></function></tool_call>: Qwen3-Coder, Qwen 3.5,
    Nemotron 3. The tool's schema says which values are text."""
    match = _XML.match(text, at)
    if match is None:
        raise NotACall
    arguments: dict[str, Any] = {}
    kinds, at = _string_parameters(tools, match[1]), match.end()
    while parameter := _PARAMETER.match(text, at):
        arguments[parameter[1]] = _value(parameter[2], kinds.get(parameter[1]))
        at = parameter.end()
    return [_checked(match[1], arguments)], _close(text, _expect(text, at, "</function>"), "</tool_call>")


_XML = re.compile(r"<tool_call>\s*<function=([^<>\n]+)>\s*")
_PARAMETER = re.compile(
    r"<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>\s*(?=<parameter=|</function>)", re.DOTALL
)


def _string_parameters(tools: Tools, name: str) -> dict[str, bool]:
    """Which parameters of a function are text, by its schema."""
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and function.get("name") == name:
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            return {
                key: schema.get("type") == "string"
                for key, schema in (properties.items() if isinstance(properties, Mapping) else ())
                if isinstance(schema, Mapping) and "type" in schema
            }
    return {}


def _value(text: str, is_text: bool | None) -> Any:
    if is_text:
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


FORMS = (
    CallForm("tagged", "<tool_call>", _tagged, ("<tool_call>", "</tool_call>")),
    CallForm("xml", "<tool_call>", _xml, ("<tool_call>", "</tool_call>")),
    CallForm("bare", "<|python_tag|>", _bare, ("<|python_tag|>",), bare=True),
    CallForm("mistral", "[TOOL_CALLS]", _listed("[TOOL_CALLS]"), ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")),
    CallForm("deepseek", DEEPSEEK[0], _deepseek, DEEPSEEK),
    CallForm(
        "listed",
        "<|tool_call|>",
        _listed("<|tool_call|>", "<|/tool_call|>"),
        ("<|tool_call|>", "<|/tool_call|>"),
    ),
    CallForm("pythonic", LFM2[0], _pythonic(escapes=False), LFM2),
    CallForm("pythonic with escapes", LFM2[0], _pythonic(escapes=True), LFM2),
)
