"""How the models of each family write tool calls, and how to read them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Tools = Sequence[Mapping[str, Any]]


class Call(NamedTuple):
    name: str
    arguments: dict[str, Any]


class NotACall(ValueError):
    """The text at this place is not a call in this form."""


MAX_MALFORMED = 100  # places where a call seems to begin; then the rest is text, so that this stays fast


# Reads the calls that begin at a position of the text. Returns them with the position after them.
Reader = Callable[[str, int, Tools], tuple[list[Call], int]]


# An answer of gpt-oss or Muse consists of messages. The prompt ends with the beginning of the first header.
_START = "<|start|>assistant"
_HEADER = re.compile(r"<\|start\|>(?:[^<]|<\|(?:channel|constrain)\|>){0,200}<\|message\|>")
_BEGUN_HEADER = re.compile(r"<\|start\|>(?:[^<]|<\|(?:channel|constrain)\|>){0,200}\Z")
HEADERS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>")


@dataclass(frozen=True)
class CallForm:
    """How a model writes its calls."""

    name: str
    marker: str  # the text with which calls begin
    read: Reader
    markup: tuple[str, ...]  # texts that some tokenizers have as control tokens
    bare: bool = False  # an answer that begins with { may be a call, too
    headed: bool = False  # an answer consists of messages with headers, as in `_HEADER`

    def begin(self, text: str, at: int = 0, *, first: bool = True) -> int:
        """Where the next call may begin, -1 if nowhere. `first`: the text is the beginning of the answer."""
        space = len(text) - len(text.lstrip())
        if self.bare and first and at <= space and text.startswith("{", space):
            return space
        return text.find(self.marker, at)

    def parse(self, text: str, tools: Tools = (), *, first: bool = True) -> tuple[str, list[Call]]:
        """The text beside the calls, and the calls. `tools`: their definitions, where the form does not say
        whether a value is text or a number. `first`: the text is the beginning of the answer."""
        shown: list[str] = []
        calls: list[Call] = []
        after = at = malformed = 0
        while malformed < MAX_MALFORMED and (begin := self.begin(text, at)) >= 0:
            try:
                parsed, end = self.read(text, begin, tools)
            except (ValueError, RecursionError):
                at, malformed = begin + 1, malformed + 1
                continue
            part = text[after:begin]
            part = part.removesuffix(self.begun_header(part, first=first))
            shown.append(self.without_headers(part, first=first).rstrip())
            calls += parsed
            after = at = end
            first = False
        rest = self.without_headers(text[after:], first=first)
        if not calls:
            return rest, []
        rest = rest.strip()
        return "\n".join(part for part in [*shown, rest] if part), calls

    def without_headers(self, text: str, *, first: bool) -> str:
        """`first`: the text is the beginning of the answer, whose header begins in the prompt."""
        if not self.headed:
            return text
        return _HEADER.sub("", _START + text if first else text).removeprefix(_START if first else "")

    def begun_header(self, text: str, *, first: bool) -> str:
        """What may be the beginning of a header at the end of the text."""
        if not self.headed:
            return ""
        begun = _BEGUN_HEADER.search(_START + text if first else text)
        return begun[0].removeprefix(_START) if begun else ""


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
_CONSTANT = re.compile("|".join(_CONSTANTS))


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


def _elements(call: str, parameter: str, end: str, close: str = "") -> Reader:
    """The name of a function and one element for each argument: Qwen3-Coder, Qwen 3.5, Nemotron 3; GLM 4.5;
    Muse. The tool's schema says which values are text.

    `call` is a pattern that ends after the name, `parameter` one of a key and its value. `end` follows the
    last parameter, and `close` that."""
    begin = re.compile(call)
    opening = parameter[: parameter.index("(")]  # a value ends where the next parameter begins, or at `end`
    each = re.compile(rf"{parameter}\s*(?={opening}|{end})", re.DOTALL)

    def read(text: str, at: int, tools: Tools) -> tuple[list[Call], int]:
        match = begin.match(text, at)
        if match is None:
            raise NotACall
        arguments: dict[str, Any] = {}
        kinds, at = _string_parameters(tools, match[1]), match.end()
        while element := each.match(text, at):
            arguments[element[1]] = _value(element[2], kinds.get(element[1]))
            at = element.end()
        return [_checked(match[1], arguments)], _close(text, _expect(text, at, end), close)

    return read


_XML = _elements(
    r"<tool_call>\s*<function=([^<>\n]+)>\s*",
    r"<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>",
    "</function>",
    "</tool_call>",
)
_GLM = _elements(
    r"<tool_call>\s*([^<>{}\s]+)\s*(?=<)",
    r"<arg_key>([^<>\n]+)</arg_key>\s*<arg_value>(.*?)</arg_value>",
    "</tool_call>",
)
_ATEM = _elements(
    r'<atem:function_calls>\s*<atem:invoke name="([^"<>\n]+)">\s*',
    r'<atem:parameter name="([^"<>\n]+)">(.*?)</atem:parameter>',
    "</atem:invoke>",
    "</atem:function_calls>",
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


def _harmony(text: str, at: int, tools: Tools) -> tuple[list[Call], int]:
    """to=functions.name<|channel|>commentary json<|message|>{…}, or with the channel in front: gpt-oss."""
    match = _HARMONY.match(text, at)
    if match is None:
        raise NotACall
    arguments, at = _json(text, match.end())
    return [_checked(match[1], arguments)], at


_HARMONY = re.compile(
    r"to=functions\.([\w.\-]+)\s*(?:<\|channel\|>\w+)?\s*(?:<\|constrain\|>)?(?:json)?\s*<\|message\|>"
)


GEMMA = ("<|tool_call>", "<tool_call|>", '<|"|>')


def _gemma(text: str, at: int, tools: Tools) -> tuple[list[Call], int]:
    """<|tool_call>call:name{key:<|"|>text<|"|>,other:[3,true]}<tool_call|>: Gemma 4."""
    match = _GEMMA_CALL.match(text, at)
    if match is None:
        raise NotACall
    arguments, at = _gemma_value(text, match.end())
    return [_checked(match[1], arguments)], _close(text, at, GEMMA[1])


_GEMMA_CALL = re.compile(r"<\|tool_call>\s*call:([\w.\-]+)\s*(?=\{)")
_GEMMA_KEY = re.compile(r'\s*(?:<\|"\|>(.*?)<\|"\|>|([^:,{}\[\]]*?))\s*:', re.DOTALL)
_GEMMA_TEXT = re.compile(r'<\|"\|>(.*?)<\|"\|>', re.DOTALL)


def _gemma_value(text: str, at: int) -> tuple[Any, int]:
    """A value as in JSON, but its texts are between <|"|> without escapes, and keys are bare."""
    at = _skip(text, at)
    if match := _GEMMA_TEXT.match(text, at):
        return match[1], match.end()
    if match := _CONSTANT.match(text, at):
        return _CONSTANTS[match[0]], match.end()
    if text[at : at + 1] not in ("{", "["):
        return _json(text, at)
    is_object, closing = text[at] == "{", "}" if text[at] == "{" else "]"
    values: list[Any] = []
    keys: list[str] = []
    at = _skip(text, at + 1)
    while not text.startswith(closing, at):
        if is_object:
            key = _GEMMA_KEY.match(text, at)
            if key is None:
                raise NotACall
            keys.append(key[2] if key[1] is None else key[1])
            at = key.end()
        value, at = _gemma_value(text, at)
        values.append(value)
        at = _skip(text, at)
        if not text.startswith(closing, at):
            at = _skip(text, _expect(text, at, ","))
    return dict(zip(keys, values, strict=True)) if is_object else values, at + 1


_GLM_MARKUP = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

FORMS = (
    CallForm("tagged", "<tool_call>", _tagged, ("<tool_call>", "</tool_call>")),
    CallForm("xml", "<tool_call>", _XML, ("<tool_call>", "</tool_call>")),
    CallForm("glm", "<tool_call>", _GLM, ("<tool_call>", "</tool_call>", *_GLM_MARKUP)),
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
    CallForm("gemma", GEMMA[0], _gemma, GEMMA),
    CallForm("harmony", "to=functions.", _harmony, HEADERS, headed=True),
    CallForm("atem", "<atem:function_calls>", _ATEM, HEADERS, headed=True),
)
