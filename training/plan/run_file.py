"""The run file: what one process of the trainer gets, as a JSON object with the settings inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import date as calendar_date
from pathlib import Path
from typing import Any

from training.plan.config import SCHEMA, ConfigError, Settings, check_held_out, parse


@dataclass(frozen=True)
class Run:
    """The run file of `python -m training train CONFIG.json`: where everything is, and the settings."""

    base: str  # folder, or model name on the Hub
    train_file: str
    work_dir: str
    settings: Settings = field(default_factory=Settings)
    settings_schema: int = SCHEMA  # schema version of the settings when the job was submitted
    base_revision: str | None = None
    train_format: dict[str, Any] | None = None  # as the report detected it; None = detect
    validation_file: str | None = None
    validation_format: dict[str, Any] | None = None
    resume_from: str | None = None  # folder of a checkpoint
    prompts: tuple[str, ...] = ()  # pinned prompts for samples
    expected: dict[str, int] | None = None  # {"examples", "tokens"} of the report, checked before training
    date: str | None = None  # YYYY-MM-DD, read by chat templates; None = the day of the run's first attempt
    job: str | None = None
    epoch: int = 1  # fencing token of the lease: part of the names of checkpoint folders
    rehearse: bool = True

    @staticmethod
    def load(path: str | Path) -> Run:
        """Reads CONFIG.json. Raises ConfigError."""
        try:
            values = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError("", f"The run file {path} cannot be read: {error}") from error
        return Run.parse(values)

    @staticmethod
    def parse(values: Any) -> Run:
        """A run from parsed JSON. Raises ConfigError."""
        if not isinstance(values, dict):
            raise ConfigError("", "The run file must hold a JSON object.")
        known = {f.name for f in fields(Run)}
        for name in values:
            if name not in known:
                raise ConfigError(
                    name, f"The run file has no key with this name. Its keys are: {', '.join(sorted(known))}."
                )
        for name in ("base", "train_file", "work_dir"):
            if not isinstance(values.get(name), str) or not values[name]:
                raise ConfigError(name, "The run file must have this key.")
        settings = values.get("settings") or {}
        if not isinstance(settings, Mapping):
            raise ConfigError("settings", "Must be a JSON object.")
        schema = values.get("settings_schema", SCHEMA)
        if schema not in range(1, SCHEMA + 1):
            raise ConfigError("settings_schema", f"Must be a whole number from 1 to {SCHEMA}.")
        checked = parse(settings, schema)
        if not checked.eval_every:  # with it, such jobs were accepted before; they must still run
            check_held_out(checked, bool(values.get("validation_file")))
        given = {name: value for name, value in values.items() if value is not None}
        try:
            calendar_date.fromisoformat(given.get("date", "2000-01-01"))
        except (TypeError, ValueError):
            raise ConfigError("date", "Must be a date like 2026-01-31.") from None
        return Run(
            **given
            | {
                "settings": checked,
                "settings_schema": schema,
                "prompts": tuple(values.get("prompts") or ()),
            }
        )

    def as_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"settings": self.settings.as_dict(), "prompts": list(self.prompts)}
