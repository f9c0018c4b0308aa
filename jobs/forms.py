"""Validates user input. Forms do not write anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from django import forms

from training.data.bad_row import BadRow
from training.data.columns import guess
from training.data.messages import tools_from_text
from training.plan.auto_settings import PRESETS
from training.plan.config import FIELDS, ConfigError, Field, Settings, current_names, parse

NAME_LENGTH = 120


def whole_number(text: str, maximum: int) -> int | None:
    """The number in plain ASCII digits, or None if there is none or it exceeds `maximum`. Python's int() also accepts
    signs, spaces, and other scripts' digits, and raises an error above 4,300 digits."""
    if len(text) > 20 or not (text.isascii() and text.isdigit()):
        return None
    number = int(text)
    return number if number <= maximum else None


class NewJobForm(forms.Form):
    """All fields of a new job except its settings, which `settings_from` reads from the same POST."""

    name = forms.CharField(max_length=NAME_LENGTH, required=False, strip=True)
    dataset = forms.CharField(max_length=80, error_messages={"required": "Choose a training dataset."})
    validation_dataset = forms.CharField(max_length=80, required=False)
    base = forms.CharField(max_length=300, error_messages={"required": "Choose a base model."})
    hub = forms.CharField(max_length=200, required=False, strip=True)  # the ID of another model from the Hub
    prompts = forms.CharField(max_length=6000, required=False)
    suffix = forms.RegexField(
        r"^[a-z0-9][a-z0-9-]{0,39}$",
        required=False,
        error_messages={"invalid": "Use up to 40 lowercase letters, digits, and hyphens."},
    )


class RenameForm(forms.Form):
    name = forms.CharField(max_length=NAME_LENGTH, strip=True)


class UploadForm(forms.Form):
    """Only requires a file. A worker checks what is in it."""

    file = forms.FileField(allow_empty_file=True, error_messages={"required": "Choose a file to upload."})


class ColumnsForm(forms.Form):
    """Assigns a role to each column of a file. `columns` are the names that can be chosen."""

    # row format: (label, {role: the form field that chooses its column})
    SHAPES: ClassVar[dict[str, tuple[str, dict[str, str]]]] = {
        "completion": ("Prompt and answer", {"prompt": "question", "completion": "answer"}),
        "instruction": (
            "Instruction and answer",
            {"instruction": "question", "input": "more", "completion": "answer"},
        ),
        "text": ("Plain text", {"text": "whole"}),
        "chat": ("Chat messages", {"messages": "whole"}),
        "sharegpt": ("ShareGPT conversations", {"conversations": "whole"}),
        "segments": ("Segments", {"segments": "whole"}),
        "preference": (
            "Preference pairs",
            {"prompt": "question", "chosen": "answer", "rejected": "worse"},
        ),
    }
    OPTIONAL: ClassVar[frozenset[tuple[str, str]]] = frozenset(
        {("instruction", "input"), ("preference", "prompt")}
    )
    LABELS: ClassVar[dict[str, str]] = {
        "question": "Prompt",
        "more": "Additional input",
        "answer": "Answer",
        "worse": "Rejected answer",
        "whole": "Text or messages",
    }
    shape = forms.ChoiceField(
        choices=[(name, label) for name, (label, _) in SHAPES.items()],
        error_messages={
            "required": "Choose a row format.",
            "invalid_choice": "Choose a row format from the list.",
        },
    )
    question = forms.CharField(required=False, strip=False)
    more = forms.CharField(required=False, strip=False)
    answer = forms.CharField(required=False, strip=False)
    worse = forms.CharField(required=False, strip=False)
    whole = forms.CharField(required=False, strip=False)
    headerless = forms.BooleanField(required=False)  # the first row is data: columns go by their number

    def __init__(self, *args: Any, columns: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.names = list(columns)

    def clean(self) -> dict[str, Any]:
        data = super().clean() or {}
        needs = self.SHAPES.get(data.get("shape", ""), ("", {}))[1]
        chosen: dict[str, str] = {}
        for need, field in needs.items():
            name, label = data.get(field, ""), self.LABELS[field]
            if not name and (data["shape"], need) in self.OPTIONAL:
                continue
            if not name:
                self.add_error(field, f"{label}: choose a column.")
            elif name not in self.names:
                self.add_error(
                    field, f"{label}: the file has no column {name[:60]!r}. Choose one from the list."
                )
            elif name in chosen.values():
                self.add_error(field, f"{label}: {name!r} is already used. Choose another column.")
            else:
                chosen[need] = name
        if data.get("headerless"):
            chosen = {need: f"column {self.names.index(name) + 1}" for need, name in chosen.items()}
        data["columns"] = chosen
        return data

    @classmethod
    def typed_from(
        cls, file_format: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> dict[str, str]:
        """The form's initial values: the columns in use, or a guess by their names and first rows."""
        shape, used = str(file_format.get("shape") or ""), dict(file_format.get("columns") or {})
        headerless = file_format.get("header") is False
        if headerless:
            numbered = {f"column {number}": name for number, name in enumerate(columns, 1)}
            used = {need: numbered.get(name, "") for need, name in used.items()}
        if shape not in cls.SHAPES or not used:
            shape, used = guess(columns, rows)
        typed = {field: used.get(need, "") for need, field in cls.SHAPES[shape][1].items()}
        return {"shape": shape, **typed, **({"headerless": "on"} if headerless else {})}


def _between(what: str, low: str, high: str) -> dict[str, str]:
    """The same message for whatever is wrong with a number."""
    return dict.fromkeys(("invalid", "min_value", "max_value"), f"Enter {what} from {low} to {high}.")


class GenerateForm(forms.Form):
    """A request from the playground."""

    model = forms.CharField(max_length=300)
    prompt = forms.CharField(max_length=100_000, strip=False, error_messages={"required": "Enter a prompt."})
    mode = forms.ChoiceField(choices=[("prompt", "Text"), ("chat", "Chat")], required=False)
    temperature = forms.FloatField(
        min_value=0, max_value=2, required=False, error_messages=_between("a number", "0", "2")
    )
    top_p = forms.FloatField(
        label="Top-p",
        min_value=0.01,
        max_value=1,
        required=False,
        error_messages=_between("a number", "0.01", "1"),
    )
    max_tokens = forms.IntegerField(
        label="Max tokens",
        min_value=1,
        max_value=2048,
        required=False,
        error_messages=_between("a whole number", "1", "2,048"),
    )
    compare = forms.BooleanField(required=False)
    tools = forms.CharField(label="Tools", max_length=100_000, required=False)

    def clean_tools(self) -> list[dict[str, Any]]:
        text = self.cleaned_data["tools"]
        try:
            tools = tools_from_text(text) if text else []
        except BadRow as error:
            raise forms.ValidationError(f"{error.reason}. {error.fix}") from error
        if tools and self.cleaned_data.get("mode") != "chat":
            raise forms.ValidationError("a text prompt cannot have tools. Choose Chat as the input type.")
        return tools

    def error_lines(self) -> list[str]:
        """Every error, with the label of its field."""
        return [f"{self[name].label}: {text}" for name, texts in self.errors.items() for text in texts]


CHOICE_LABELS = {
    "none": "None: full fine-tuning",
    "lora": "LoRA: small adapters",
    "completion": "Answers only",
    "all": "Prompts and answers",
    "wsd": "Constant, then decay (WSD)",
    "auto": "Automatic",
    "fp32": "32 bits (fp32)",
    "bf16": "16 bits (bf16)",
    "text": "Plain text",
}

# ---- settings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A setting as shown on the page."""

    name: str
    spec: Field
    value: str  # as typed; empty = automatic or the default
    automatic: str  # the value used when left empty
    hint: str
    error: str = ""
    can_lock: bool = False  # automatic, and already computed

    @property
    def meaning(self) -> str:
        """The help text, unless the hint already shows it, followed by the allowed range."""
        help_text = "" if self.hint == self.spec.help else self.spec.help
        return f"{help_text} {self.range}.".strip() if self.range else help_text

    @property
    def is_auto(self) -> bool:
        return self.value == ""

    @property
    def fallback(self) -> str:
        """The default value, as text."""
        return shown(self.spec.default)

    @property
    def is_changed(self) -> bool:
        """Whether the user set it. A select always sends a value, so its default doesn't count."""
        return self.value not in ("", self.fallback)

    @property
    def label(self) -> str:
        return self.spec.label

    @property
    def options(self) -> list[tuple[str, str, bool]]:
        """(value, label, selected) of each option of a select."""
        choices = ("yes", "no") if self.spec.kind == "bool" else self.spec.choices
        chosen = self.value or self.automatic
        first = [("", "Automatic", not self.value)] if choices and self.spec.automatic else []
        return first + [
            (choice, CHOICE_LABELS.get(choice, choice.capitalize()), choice == chosen) for choice in choices
        ]

    @property
    def is_number(self) -> bool:
        return self.spec.kind in ("int", "float")

    @property
    def range(self) -> str:
        if self.spec.minimum is None or self.spec.maximum is None:
            return ""
        return f"{_bound(self.spec.minimum)} to {_bound(self.spec.maximum)}"


def _bound(value: float) -> str:
    """An end of a range, with thousands separators: 65,536."""
    return f"{value:,}" if isinstance(value, int) else shown(value)


def settings_from(data: Mapping[str, Any]) -> tuple[Settings | None, dict[str, str], dict[str, str]]:
    """(settings, values as typed, errors by field) from a form's data. Empty fields are automatic.

    An unchecked checkbox sends nothing, so booleans are sent as yes and no."""
    typed = {name: str(data.get(name, "")).strip() for name in FIELDS}
    try:
        if data.get("method"):  # the form of the first release, if its page was still open during an upgrade
            typed["adapter"] = current_names({"method": data["method"]})["adapter"]
        return parse({name: value for name, value in typed.items() if value}), typed, {}
    except ConfigError as error:
        return None, typed, {error.field: error.message}


def rows(
    typed: Mapping[str, str],
    errors: Mapping[str, str],
    resolved: Settings | None,
    reasons: Mapping[str, str],
    suggested: Mapping[str, str],
) -> tuple[list[Setting], list[Setting]]:
    """(basic, advanced) settings. `reasons` explains the automatic values in use, `suggested` all automatic values."""
    basic: list[Setting] = []
    advanced: list[Setting] = []
    for name, spec in FIELDS.items():
        value = getattr(resolved, name, None) if resolved and not typed.get(name) else None
        automatic = shown(spec.default if value is None else value)
        setting = Setting(
            name,
            spec,
            typed.get(name, ""),
            automatic,
            _hint(name, spec, typed, reasons, suggested),
            errors.get(name, ""),
            can_lock=spec.automatic and value is not None,
        )
        (basic if spec.group == "basic" else advanced).append(setting)
    return basic, advanced


def _hint(
    name: str, spec: Field, typed: Mapping[str, str], reasons: Mapping[str, str], suggested: Mapping[str, str]
) -> str:
    reason = reasons.get(name, "")
    if reason and not typed.get(name):
        return f"{reason[0].upper()}{reason[1:]}."
    if typed.get(name) and name in suggested:
        return f"Set by you. Automatic: {suggested[name]}."
    if typed.get(name, "") not in ("", shown(spec.default)) and not spec.automatic:
        return f"Set by you. Default: {CHOICE_LABELS.get(shown(spec.default), shown(spec.default))}."
    return spec.help


def shown(value: Any) -> str:
    """A value as a user would type it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(value)
    if isinstance(value, float):
        if value and not 0.001 <= abs(value) < 1e6:
            mantissa, exponent = f"{value:.3e}".split("e")
            return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return f"{value:g}"
    return str(value)


def with_preset(typed: Mapping[str, str], preset: str) -> dict[str, str]:
    """The typed values with those of the preset. Settings that only other presets set become automatic."""
    of_presets = {name for values in PRESETS.values() for name in values}
    kept = {name: "" if name in of_presets else value for name, value in typed.items()}
    return kept | {name: shown(value) for name, value in PRESETS[preset].items()}


def preset_of(typed: Mapping[str, str]) -> str:
    """The name of the preset with exactly these values; empty if there is none."""
    for preset in PRESETS:
        if with_preset(typed, preset) == dict(typed):
            return preset
    return ""
