"""Tokenizers in Hugging Face's files, read with the `tokenizers` library alone (no torch, no transformers).

Two rules always hold:
- User text is text: `<|endoftext|>` inside a row is encoded as its letters, never as the control token.
- Chat templates are not trusted and run in a sandbox (`training.text.chat_template`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import tokenizers

from training.text import template_capabilities
from training.text.chat_template import BadTemplate, Message, TemplateRefused, TemplateStopped, render
from training.text.tool_form import with_tools

# Plain-text roles and the end token, for models without a template (such as GPT-2). The separator comes
# before a turn, not after it, so that the rendered text of the first turns is always a prefix of the whole.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ m['role'].capitalize() + ':\\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:\\n' }}{% endif %}"
)

SHORTEST_END = 3  # characters; a shorter text could be part of an answer

TOOL_USE = "tool_use"  # the named template for conversations with tools, as in transformers

ADDITIONAL_TEMPLATES = "additional_chat_templates"  # folder of the named templates beside the default one
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of a message's reasoning, the usual one first

_CHAT_TEMPLATE_WITH_TOOLS = with_tools(CHAT_TEMPLATE, system=True)  # as in exported models


class Piece(NamedTuple):
    """A piece of a row: either user text or, if `made`, text from a template. Only in the latter are control tokens
    recognized."""

    text: str
    trained: bool = False
    made: bool = False
    hidden: Mapping[str, str] = MappingProxyType({})  # what `Tokenizer.guard` replaced in it


@dataclass(frozen=True)
class Ends:
    """Where an answer ends. Training, samples, the server and exported models all take it from here."""

    ids: tuple[int, ...]  # tokens at which generation stops; the end token (eos) is the first
    tokens: tuple[str, ...]  # the same, spelled out
    texts: tuple[str, ...] = ()  # plain text after an answer, of chat templates that write no control token
    template: str = ""  # all that the chat template writes after the last answer


Encoded = tokenizers.Encoding | list[int]  # the library's type or a list: both have a length


def ids_of(encoded: Encoded) -> list[int]:
    return encoded if isinstance(encoded, list) else encoded.ids


class TokenizerError(ValueError):
    """The folder has no readable tokenizer, or its chat template cannot render the messages."""


class TemplateRefusal(TokenizerError):
    """The chat template rejects these messages on purpose."""


class TemplateTooSlow(TokenizerError):
    """The chat template was stopped."""


class Render(Protocol):
    def __call__(
        self, template: str, variables: Mapping[str, Any], now: datetime | None = None, *, dated: bool = True
    ) -> str: ...


@dataclass
class Tokenizer:
    """`encode*` adds no tokens of its own; `training.text.encode` decides what goes around the text."""

    backend: tokenizers.Tokenizer
    config: dict[str, Any] = field(default_factory=dict)
    chat_template: str = CHAT_TEMPLATE
    own_template: bool = False  # whether the base model has its own chat template
    folder: Path | None = None
    model_ends: tuple[int, ...] = ()  # end tokens of the base's generation_config.json (or config.json)
    render: Render = render  # a server renders in a child process
    named_templates: Mapping[str, str] = field(default_factory=dict)  # templates beside the default one
    now: datetime | None = None  # the time that chat templates read; None = the clock, as in transformers
    # As the first release rendered, for files whose report it made: no date, and only the last answer is
    # trained if the template rewrites earlier turns.
    early: bool = False

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads tokenizer.json (or GPT-2's older vocab.json + merges.txt) and tokenizer_config.json.
        Raises TokenizerError."""
        folder = Path(folder)
        backend = _backend(folder)
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        specials = _read_json(folder / "special_tokens_map.json")
        model_config = _read_json(folder / "config.json")
        merged = {**specials, **{k: v for k, v in config.items() if v is not None}}
        # Old GPT-2 folders name their special tokens only in the model's config.json.
        for name in ("bos", "eos", "pad"):
            token_id = model_config.get(f"{name}_token_id")
            if f"{name}_token" not in merged and isinstance(token_id, int):
                merged[f"{name}_token"] = backend.id_to_token(token_id)
        templates = _templates(folder, config)
        template = templates.pop("default", "")
        generation = _read_json(folder / "generation_config.json")
        ends = generation.get("eos_token_id", model_config.get("eos_token_id"))
        model_ends = tuple(i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int)
        return cls(
            backend,
            merged,
            template or CHAT_TEMPLATE,
            bool(template),
            folder,
            model_ends,
            named_templates=templates,
        )

    # --- properties ----------------------------------------------------------------------------

    @cached_property
    def eos_id(self) -> int:
        token_id = self._special_id("eos_token")
        if token_id is None:
            raise TokenizerError(
                "this tokenizer has no end token (eos_token), so the model could never learn to stop"
            )
        return token_id

    @cached_property
    def bos_id(self) -> int | None:
        """The token put before plain text, for models whose tokenizer adds one (GPT-2's does not)."""
        if self.config.get("add_bos_token") is False:
            return None
        # What the tokenizer puts around an empty text shows whether it adds a token at the start.
        around = self.backend.encode("", add_special_tokens=True).ids
        bos = self._special_id("bos_token")
        return bos if bos is not None and (around[:1] == [bos] or self.config.get("add_bos_token")) else None

    @cached_property
    def eos_text(self) -> str:
        return self.backend.id_to_token(self.eos_id) or ""

    @cached_property
    def bos_text(self) -> str:
        return "" if self.bos_id is None else self.backend.id_to_token(self.bos_id) or ""

    @cached_property
    def pad_id(self) -> int | None:
        return self._special_id("pad_token")

    @cached_property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts of all special tokens, longest first."""
        special = {t.content for t in self.backend.get_added_tokens_decoder().values() if t.special}
        return tuple(sorted(special, key=len, reverse=True))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, t in self.backend.get_added_tokens_decoder().items() if t.special)

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Matches the spelling of a control token inside user text."""
        return re.compile("|".join(map(re.escape, self.special_tokens))) if self.special_tokens else None

    @cached_property
    def control_pattern(self) -> re.Pattern[str] | None:
        """Matches any added token. Some turns end with one that is not marked as special."""
        added = sorted((t.content for t in self.backend.get_added_tokens_decoder().values()), key=len)
        return re.compile("|".join(map(re.escape, reversed(added)))) if added else None

    @cached_property
    def added_tokens(self) -> tuple[str, ...]:
        return tuple(t.content for t in self.backend.get_added_tokens_decoder().values())

    @cached_property
    def solid_tokens(self) -> tuple[str, ...]:
        """The added tokens that take no white space around them with them: every text splits there."""
        added = self.backend.get_added_tokens_decoder().values()
        return tuple(t.content for t in added if not (t.lstrip or t.rstrip or t.single_word))

    @cached_property
    def ends(self) -> Ends:
        """The end token, those of the base's generation_config, and what the chat template writes after an
        answer or a tool call. A template that writes no control token there leaves the end token to `training.text.encode`."""
        after = template_capabilities.after_answer(self._renderer(self.chat_template))
        control = self.control_pattern.findall(after) if self.control_pattern else []
        if after:  # otherwise it would fail here too
            control += template_capabilities.end_of_calls(
                self._renderer(self.full_template),
                self.control_pattern,
                text_arguments=self.full_template in self._text_arguments,
            )
        written = [self.backend.token_to_id(token) for token in control]
        ids = dict.fromkeys([self.eos_id, *self.model_ends, *(i for i in written if i is not None)])
        text = after.rstrip()
        plain = not control and len(text.strip()) >= SHORTEST_END
        known = {i: token for i in ids if (token := self.backend.id_to_token(i))}
        return Ends(tuple(known), tuple(known.values()), (text,) if plain else (), after)

    @cached_property
    def expresses(self) -> frozenset[str]:
        """What the base's own chat template can express beside role and content: any of name,
        reasoning_content, tools, and tool_calls (with the answers of tools), and system messages."""
        own = template_capabilities.expresses(self._renderer(self.chat_template))
        return own | self._tool_support(self.chat_template).expresses

    def _tool_support(self, template: str) -> template_capabilities.ToolSupport:
        named = template == self.named_templates.get(TOOL_USE)
        return template_capabilities.tool_support(self._renderer(template), with_definitions=named)

    @cached_property
    def template_fault(self) -> str:
        """Why the base's chat template renders no conversation at all, "" if it does (or rejects those tried
        on purpose): a fault of the template, not of the rows."""
        return template_capabilities.fault(self._renderer(self.chat_template))

    @cached_property
    def full_template(self) -> str:
        """The chat template that training, inference and exported models use: the base's own, with our form
        for tools in front if it has none. A base with a template for tools of its own needs another one only
        for calls without definitions."""
        needs = {"tool_calls"} if TOOL_USE in self.named_templates else {"tools", "tool_calls"}
        return self._with_tools(self.chat_template, needs)

    @cached_property
    def full_tool_template(self) -> str:
        """The same for conversations with tool definitions."""
        named = self.named_templates.get(TOOL_USE)
        return self._with_tools(named, {"tools", "tool_calls"}) if named else self.full_template

    def _with_tools(self, template: str, needs: set[str]) -> str:
        if needs <= self._tool_support(template).expresses:
            return template
        return with_tools(template, system="system" in self.expresses)

    @cached_property
    def _text_arguments(self) -> frozenset[str]:
        """The templates that take a call's arguments as text."""
        used = {self.full_template, self.full_tool_template}
        return frozenset(template for template in used if self._tool_support(template).text_arguments)

    def _special_id(self, name: str) -> int | None:
        text = self._token_text(name)
        return self.backend.token_to_id(text) if text else None

    # --- text to ids and back ------------------------------------------------------------------

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, but control tokens in a text are plain letters. A copy, because the switch
        applies to the whole object and encoding may run in several threads."""
        copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        return copy

    def encode(self, text: str) -> list[int]:
        """Ids of user text. Control tokens spelled in it stay letters."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, several times faster."""
        return [ids_of(encoded) for encoded in self.encode_each([Piece(text) for text in texts])]

    def encode_template(self, text: str) -> list[int]:
        """Ids of text made by us or by a chat template. Control tokens spelled in it are control tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_each(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """The tokens of each piece, with one call for all of them."""
        pattern = self.special_pattern
        texts = [piece.text for piece in pieces]
        encoded: list[Encoded] = [*self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        for i, piece in enumerate(pieces):
            if piece.hidden:
                encoded[i] = self.encode_pieces(piece.text, piece.hidden)
            elif not piece.made and pattern is not None and pattern.search(piece.text):
                encoded[i] = self._plain.encode(piece.text, add_special_tokens=False)
        return encoded

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each token. Bytes of a character that spans tokens show as the replacement
        character."""
        return [self.backend.decode([i], skip_special_tokens=False) for i in ids]

    # --- chat ----------------------------------------------------------------------------------

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The text that the template makes of the messages. Raises TokenizerError with the template's
        message."""
        if tools:
            return self._render(self.full_tool_template, messages, add_generation_prompt, tools)
        if any(m.get("role") == "tool" or m.get("tool_calls") for m in messages):
            return self._render(self.full_template, messages, add_generation_prompt, tools)
        if self.chat_template in (CHAT_TEMPLATE, _CHAT_TEMPLATE_WITH_TOOLS) and all(
            type(m.get("role")) is str and type(m.get("content")) is str for m in messages
        ):
            return _render_default_template(messages, self._token_text("eos_token"), add_generation_prompt)
        return self._render(self.chat_template, messages, add_generation_prompt, tools)

    def _render(
        self,
        template: str,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]],
    ) -> str:
        if any(m.get("tool_calls") for m in messages):
            messages = _with_arguments(messages, as_text=template in self._text_arguments)
        try:
            return self._render_as_given(template, messages, add_generation_prompt, tools)
        except TemplateStopped as error:
            raise TemplateTooSlow(str(error)) from error
        except TemplateRefused as error:
            raise TemplateRefusal(str(error)) from error
        except BadTemplate as error:
            raise TokenizerError(str(error)) from error

    def _renderer(self, template: str) -> template_capabilities.RenderMessages:
        return partial(self._render_as_given, template)

    def _render_as_given(
        self,
        template: str,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """`_render` with the arguments of calls as they are. Raises BadTemplate."""
        variables = {
            **self.named_special_tokens,
            "messages": [_template_message(message) for message in messages],
            "tools": [dict(tool) for tool in tools] or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self.render(template, variables, self.now, dated=not self.early)

    @cached_property
    def named_special_tokens(self) -> dict[str, str]:
        """Every special token with a name, as transformers passes them to chat templates."""
        names = [name for name in self.config if name.endswith("_token")]
        tokens = {name: self._token_text(name) for name in names}
        for group in ("extra_special_tokens", "model_specific_special_tokens"):
            if isinstance(more := self.config.get(group), dict):
                tokens |= {name: _text_of(token) for name, token in more.items()}
        return {name: text for name, text in tokens.items() if text}

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Ids of a rendered conversation."""
        guarded, hidden, tools = self.guard(messages, tools)
        return self.encode_pieces(self.render_chat(guarded, add_generation_prompt, tools), hidden)

    def guard(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[list[Message], dict[str, str], list[Mapping[str, Any]]]:
        """Replaces texts that spell a control token by placeholders, so that rendering cannot turn them
        into one.

        Returns the messages, {placeholder: text} and the tools. All other conversations are encoded exactly
        as the template wrote them."""
        hidden: dict[str, str] = {}
        if any("tool_calls" in message for message in messages):
            messages = _with_arguments(messages, as_text=False)  # their texts are looked at one by one
        pattern = self.special_pattern
        if pattern is None:
            return list(messages), hidden, list(tools)

        def hide(value: Any, *, inside: bool = False) -> Any:
            """`inside`: of tool definitions or arguments, which templates write as JSON."""
            if isinstance(value, str):
                if not pattern.search(value):
                    return value
                placeholder = f"\ue000{len(hidden)}\ue001"
                hidden[placeholder] = json.dumps(value, ensure_ascii=False)[1:-1] if inside else value
                return placeholder
            if isinstance(value, Mapping):
                return {hide(key, inside=True): hide(item, inside=True) for key, item in value.items()}
            if isinstance(value, list):
                return [hide(item, inside=True) for item in value]
            return value

        guarded: list[Message] = [
            {key: value if key == "role" else hide(value) for key, value in message.items()}
            for message in messages
        ]
        return guarded, hidden, [hide(tool) for tool in tools]

    def encode_pieces(self, text: str, hidden: Mapping[str, str]) -> list[int]:
        """Encodes rendered text, putting back what `guard` replaced as plain letters."""
        if not hidden:
            return self.encode_template(text)
        ids: list[int] = []
        for piece in re.split("(" + "|".join(map(re.escape, hidden)) + ")", text):
            ids += self.encode(hidden[piece]) if piece in hidden else self.encode_template(piece)
        return ids

    def _token_text(self, name: str) -> str:
        return _text_of(self.config.get(name))


def midnight() -> datetime:
    """The start of today. What is counted or trained reads one time throughout, so that it is the same in
    every row."""
    return datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)


def _text_of(token: Any) -> str:
    """A special token as tokenizer_config.json has it: its text, or an object with its text."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _template_message(message: Message) -> dict[str, Any]:
    """A message as transformers passes it on: without nulls, with the reasoning under each of its names."""
    known = {key: value for key, value in message.items() if key != "weight" and value is not None}
    reasoning = next((known[key] for key in REASONING if key in known), None)
    return known if reasoning is None else {"thinking": reasoning, **known, "reasoning_content": reasoning}


def _with_arguments(messages: Sequence[Message], *, as_text: bool) -> Sequence[Message]:
    """The messages with the arguments of calls as JSON text, or as objects."""
    return [
        {**message, "tool_calls": [_call(call, as_text) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _call(call: Any, as_text: bool) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if as_text and isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        arguments = parsed if isinstance(parsed, dict) else arguments
    else:
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _render_default_template(messages: Sequence[Message], end: str, add_generation_prompt: bool) -> str:
    """The same text as CHAT_TEMPLATE, thirty times faster."""
    turns = [
        f"{m['role'].capitalize()}:\n{m['content']}{end if m['role'] == 'assistant' else chr(10)}"
        for m in messages
    ]
    return "\n".join(turns) + ("\nAssistant:\n" if add_generation_prompt else "")


def _backend(folder: Path) -> tokenizers.Tokenizer:
    try:
        if (folder / "tokenizer.json").is_file():
            return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = tokenizers.ByteLevelBPETokenizer.from_file(
                str(folder / "vocab.json"), str(folder / "merges.txt")
            )
            backend: tokenizers.Tokenizer = tokenizer._tokenizer
            if backend.token_to_id("<|endoftext|>") is not None:
                backend.add_special_tokens(["<|endoftext|>"])
            return backend
    except Exception as error:  # the library raises a bare Exception for any error in the file
        raise TokenizerError(f"the tokenizer in {folder.name} cannot be read: {error}") from error
    raise TokenizerError(f"there is no tokenizer.json (or vocab.json with merges.txt) in {folder.name}")


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name, as transformers finds them: files, otherwise the configuration."""
    paths = {"default": folder / "chat_template.jinja"} | {
        path.stem: path for path in sorted((folder / ADDITIONAL_TEMPLATES).glob("*.jinja"))
    }
    try:
        files = {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"the chat template in {folder.name} cannot be read: {error}") from error
    if files:
        return files
    given = config.get("chat_template")
    if isinstance(given, list):
        given = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
    named = given if isinstance(given, dict) else {"default": given}
    return {str(name): text for name, text in named.items() if isinstance(text, str) and text}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path.name} cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}
