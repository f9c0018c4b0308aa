"""Tokenizers in Hugging Face's files, read with the `tokenizers` library alone (no torch, no transformers).

Two rules always hold:
- User text is text: `<|endoftext|>` inside a row is encoded as its letters, never as the control token.
- Chat templates are not trusted and run in a sandbox (`training.text.chat_template`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tokenizers

from training.text.chat_template import BadTemplate, TemplateStopped, render
from training.text.tool_form import with_tools

# Plain-text roles and the end token, for models without a template (such as GPT-2). The separator comes
# before a turn, not after it, so that the rendered text of the first turns is always a prefix of the whole.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ m['role'].capitalize() + ':\\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:\\n' }}{% endif %}"
)

ANSWER = "The answer is 7f3a."  # rendered to see what a chat template writes after an answer
SHORTEST_END = 3  # characters; a shorter text could be part of an answer

_PROBE = "probe7f3a"

_CHAT_TEMPLATE_WITH_TOOLS = with_tools(CHAT_TEMPLATE, system=True)  # as in exported models

Message = Mapping[str, Any]


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


class TemplateTooSlow(TokenizerError):
    """The chat template was stopped."""


@dataclass
class Tokenizer:
    """`encode*` adds no tokens of its own; `training.text.encode` decides what goes around the text."""

    backend: tokenizers.Tokenizer
    config: dict[str, Any] = field(default_factory=dict)
    chat_template: str = CHAT_TEMPLATE
    own_template: bool = False  # whether the base model has its own chat template
    folder: Path | None = None
    model_ends: tuple[int, ...] = ()  # end tokens of the base's generation_config.json (or config.json)
    render: Callable[[str, Mapping[str, Any]], str] = render  # a server renders in a child process

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
        template = _template(folder, config)
        generation = _read_json(folder / "generation_config.json")
        ends = generation.get("eos_token_id", model_config.get("eos_token_id"))
        model_ends = tuple(i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int)
        return cls(backend, merged, template or CHAT_TEMPLATE, bool(template), folder, model_ends)

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
    def ends(self) -> Ends:
        """The end token, those of the base's generation_config, and what the chat template writes after an
        answer. A template that writes no control token there leaves the end token to `training.text.encode`."""
        after = self._after_answer()
        control = self.control_pattern.findall(after) if self.control_pattern else []
        written = [self.backend.token_to_id(token) for token in control]
        ids = dict.fromkeys([self.eos_id, *self.model_ends, *(i for i in written if i is not None)])
        text = after.rstrip()
        plain = not control and len(text.strip()) >= SHORTEST_END
        known = {i: token for i in ids if (token := self.backend.id_to_token(i))}
        return Ends(tuple(known), tuple(known.values()), (text,) if plain else (), after)

    def _after_answer(self) -> str:
        try:
            text = self.render_chat(
                [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": ANSWER}]
            )
        except TokenizerError:  # it demands other turns: only the known end tokens count
            return ""
        _, answer, after = text.rpartition(ANSWER)
        return after if answer else ""

    @cached_property
    def expresses(self) -> frozenset[str]:
        """What the base's own chat template can express beside role and content: any of name,
        reasoning_content, tools, and tool_calls (with the answers of tools), and system messages."""
        call = {"type": "function", "id": "call00001", "function": {"name": _PROBE, "arguments": {}}}
        tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": {}}}
        user, answer = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": ANSWER}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": "found", "tool_call_id": "call00001"}
        probes: dict[str, tuple[list[Message], list[Message]]] = {
            "name": ([{**user, "name": _PROBE}, answer], []),
            "reasoning_content": ([user, {**answer, "reasoning_content": _PROBE}], []),
            "system": ([{"role": "system", "content": _PROBE}, user, answer], []),
            "tools": ([user, answer], [tool]),
            "tool_calls": ([user, calling, result, answer], []),
        }
        known = set()
        for name, (messages, tools) in probes.items():
            try:
                text = self._render(self.chat_template, messages, False, tools)
            except TokenizerError:
                continue
            if _PROBE in text and (name != "tool_calls" or "found" in text):
                known.add(name)
        return frozenset(known)

    @cached_property
    def full_template(self) -> str:
        """The chat template that training, inference and exported models use for tools: the base's own, with
        our form for tools in front if it has none."""
        if {"tools", "tool_calls"} <= self.expresses:
            return self.chat_template
        return with_tools(self.chat_template, system="system" in self.expresses)

    def _special_id(self, name: str) -> int | None:
        token = self.config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        return self.backend.token_to_id(token) if isinstance(token, str) else None

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
        uses_tools = bool(tools) or any(m.get("role") == "tool" or m.get("tool_calls") for m in messages)
        if uses_tools:
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
        variables = {
            "messages": [{k: v for k, v in m.items() if k != "weight"} for m in messages],
            "tools": [dict(tool) for tool in tools] or None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._token_text("bos_token"),
            "eos_token": self._token_text("eos_token"),
            "pad_token": self._token_text("pad_token"),
        }
        try:
            return self.render(template, variables)
        except TemplateStopped as error:
            raise TemplateTooSlow(str(error)) from error
        except BadTemplate as error:
            raise TokenizerError(str(error)) from error

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
        token = self.config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        return token if isinstance(token, str) else ""


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


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates: the default one
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path.name} cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}
