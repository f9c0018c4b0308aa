"""What people type, checked. Forms validate; they do not write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from django import forms

from training.plan.auto_settings import PRESETS
from training.plan.config import FIELDS, ConfigError, Field, Settings, current_names, parse

NAME_LENGTH = 120


def whole_number(text: str, most: int) -> int | None:
    """The number that is written here in plain digits, or None; also where it is above `most`. Python's own reader takes
    signs, spaces and other scripts' digits, and raises at 4,300 of them."""
    if len(text) > 20 or not (text.isascii() and text.isdigit()):
        return None
    number = int(text)
    return number if number <= most else None


class NewJobForm(forms.Form):
    """Everything of a new job but its settings, which `SettingsForm` reads from the same POST."""

    name = forms.CharField(max_length=NAME_LENGTH, required=False, strip=True)
    dataset = forms.CharField(max_length=80, error_messages={"required": "Choose the dataset to learn from."})
    validation_dataset = forms.CharField(max_length=80, required=False)
    base = forms.CharField(max_length=300, error_messages={"required": "Choose the model to start from."})
    hub = forms.CharField(max_length=200, required=False, strip=True)  # another one of the Hub, by its id
    prompts = forms.CharField(max_length=6000, required=False)
    suffix = forms.RegexField(
        r"^[a-z0-9][a-z0-9-]{0,39}$",
        required=False,
        error_messages={"invalid": "Use up to 40 lower-case letters, digits and hyphens."},
    )


class RenameForm(forms.Form):
    name = forms.CharField(max_length=NAME_LENGTH, strip=True)


class UploadForm(forms.Form):
    """The file itself is checked by a worker, never here."""

    file = forms.FileField(allow_empty_file=True, error_messages={"required": "Choose a file to upload."})


class ColumnsForm(forms.Form):
    """Which columns of a file are what. `columns` are the names that may be chosen."""

    SHAPES: ClassVar[
        dict[str, tuple[str, dict[str, str]]]
    ] = {  # what a person reads; what each needs of which field
        "completion": ("Prompt and answer", {"prompt": "question", "completion": "answer"}),
        "instruction": (
            "Instruction and answer",
            {"instruction": "question", "input": "more", "completion": "answer"},
        ),
        "text": ("Plain text", {"text": "whole"}),
        "chat": ("Chat messages", {"messages": "whole"}),
        "sharegpt": ("ShareGPT conversations", {"conversations": "whole"}),
    }
    LABELS: ClassVar[dict[str, str]] = {
        "question": "Prompt",
        "more": "Further input",
        "answer": "Answer",
        "whole": "Text or messages",
    }
    shape = forms.ChoiceField(
        choices=[(name, words) for name, (words, _) in SHAPES.items()],
        error_messages={
            "required": "Kind of rows: choose one.",
            "invalid_choice": "Kind of rows: choose one of the list.",
        },
    )
    question = forms.CharField(required=False, strip=False)
    more = forms.CharField(required=False, strip=False)
    answer = forms.CharField(required=False, strip=False)
    whole = forms.CharField(required=False, strip=False)

    def __init__(self, *args: Any, columns: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.names = list(columns)

    def clean(self) -> dict[str, Any]:
        data = super().clean() or {}
        needs = self.SHAPES.get(data.get("shape", ""), ("", {}))[1]
        chosen: dict[str, str] = {}
        for need, field in needs.items():
            name, label = data.get(field, ""), self.LABELS[field]
            if not name and need == "input":
                continue
            if not name:
                self.add_error(field, f"{label}: choose the column.")
            elif name not in self.names:
                self.add_error(
                    field, f"{label}: the file has no column {name[:60]!r}. Choose one of the list."
                )
            elif name in chosen.values():
                self.add_error(field, f"{label}: {name!r} is chosen twice. Choose another column.")
            else:
                chosen[need] = name
        data["columns"] = chosen
        return data

    @classmethod
    def typed_from(cls, format: Mapping[str, Any], columns: Sequence[str]) -> dict[str, str]:
        """What stands in the form at first: the columns in use, else the first ones as a guess."""
        shape, used = str(format.get("shape") or ""), dict(format.get("columns") or {})
        if shape in cls.SHAPES and used:
            return {"shape": shape} | {
                field: used.get(need, "") for need, field in cls.SHAPES[shape][1].items()
            }
        if len(columns) == 1:
            return {"shape": "text", "whole": columns[0]}
        return {"shape": "completion", "question": columns[0], "answer": columns[1]}


class GenerateForm(forms.Form):
    """What the playground asks of a model."""

    model = forms.CharField(max_length=300)
    prompt = forms.CharField(
        max_length=100_000, strip=False, error_messages={"required": "Write something first."}
    )
    mode = forms.ChoiceField(choices=[("prompt", "Text"), ("chat", "Chat")], required=False)
    temperature = forms.FloatField(min_value=0, max_value=2, required=False)
    top_p = forms.FloatField(min_value=0.01, max_value=1, required=False)
    max_tokens = forms.IntegerField(min_value=1, max_value=2048, required=False)
    compare = forms.BooleanField(required=False)


CHOICE_WORDS = {
    "none": "None: full fine-tuning",
    "lora": "LoRA: small adapters",
    "completion": "The answers only",
    "all": "Prompts and answers",
    "wsd": "Level, then down",
    "auto": "Automatic",
    "fp32": "32 bits (fp32)",
    "bf16": "16 bits (bf16)",
}

# ---- settings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One setting as the page shows it."""

    name: str
    spec: Field
    value: str  # as typed; empty = automatic or the default
    automatic: str  # what it is when left empty
    hint: str
    error: str = ""
    can_lock: bool = False  # automatic, and known by now

    @property
    def meaning(self) -> str:
        """The setting in a line, unless the hint is that line already; and what it may be."""
        words = "" if self.hint == self.spec.help else self.spec.help
        return f"{words} {self.range}.".strip() if self.range else words

    @property
    def is_auto(self) -> bool:
        return self.value == ""

    @property
    def fallback(self) -> str:
        """The value it has when nothing is chosen."""
        return shown(self.spec.default)

    @property
    def own(self) -> bool:
        """A select always sends something; its default is nobody's choice."""
        return self.value not in ("", self.fallback)

    @property
    def label(self) -> str:
        return self.spec.label

    @property
    def options(self) -> list[tuple[str, str, bool]]:
        """(what is sent, what is read, chosen) of a field that is chosen from a list."""
        choices = ("yes", "no") if self.spec.kind == "bool" else self.spec.choices
        chosen = self.value or self.automatic
        return [
            (choice, CHOICE_WORDS.get(choice, choice.capitalize()), choice == chosen) for choice in choices
        ]

    @property
    def is_number(self) -> bool:
        return self.spec.kind in ("int", "float")

    @property
    def range(self) -> str:
        if self.spec.minimum is None or self.spec.maximum is None:
            return ""
        return f"{shown(self.spec.minimum)} to {shown(self.spec.maximum)}"


def settings_from(data: Mapping[str, Any]) -> tuple[Settings | None, dict[str, str], dict[str, str]]:
    """(the settings, what was typed, errors by field) of a form's data. Empty fields are automatic.

    A box that isn't ticked sends nothing, so booleans travel as yes and no."""
    typed = {name: str(data.get(name, "")).strip() for name in FIELDS}
    try:
        if data.get("method"):  # a page of the first release, still open after an upgrade
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
    """Every setting for the page, the basic ones apart. `reasons` are of what is automatic, `suggested` of what would be."""
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
        return f"Yours. Automatic would be {suggested[name]}."
    if typed.get(name, "") not in ("", shown(spec.default)) and not spec.automatic:
        return f"Yours. The default is {CHOICE_WORDS.get(shown(spec.default), shown(spec.default))}."
    return spec.help


def shown(value: Any) -> str:
    """A value as a person would type it."""
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
    """The typed values with a preset's over them, and what other presets would have set back on automatic."""
    of_presets = {name for values in PRESETS.values() for name in values}
    kept = {name: "" if name in of_presets else value for name, value in typed.items()}
    return kept | {name: shown(value) for name, value in PRESETS[preset].items()}


def preset_of(typed: Mapping[str, str]) -> str:
    """The preset whose values these are; empty when they are a person's own."""
    for preset in PRESETS:
        if with_preset(typed, preset) == dict(typed):
            return preset
    return ""
