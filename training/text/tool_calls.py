"""Reads the tool calls in an answer, in the form that the model's chat template writes them in.

`call_form` finds the form by rendering calls with the template and reading them back: the first form that
returns the same calls is the right one. The model's name does not matter. A call that cannot be read stays
text; nothing that a model writes is ever executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from training.text.call_forms import FORMS, Call, CallForm, Tools
from training.text.tokenizer import Tokenizer, TokenizerError


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
    first: bool = True  # what is held is the beginning of the answer
    shown: bool = False  # some text has come out
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
        ready -= len(self.form.begun_header(self.held[:ready], first=self.first))
        return self._release(len(self.held[:ready].rstrip()))

    def finish(self) -> str:
        """The rest of the text, at the end. Then `calls` are known."""
        if self.holding and not self.plain:
            rest, self.calls = self.form.parse(self.held, self.tools, first=self.first)
            if self.calls:
                self.held = ""
                return "\n" + rest if self.shown and rest else rest
        return self._release(len(self.held))

    def _release(self, count: int) -> str:
        text, self.held = self.held[:count], self.held[count:]
        shown = self.form.without_headers(text, first=self.first)
        self.first = self.first and not text
        self.shown = self.shown or bool(shown)
        return shown


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
