"""A new job while it is being written: what was typed, what is automatic, what it would take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from jobs.datasets import reports
from jobs.formatting import count, size
from jobs.forms import NewJobForm, preset_of, rows, settings_from, shown, with_preset
from jobs.lifecycle import estimates
from jobs.lifecycle.transitions import JobRequest
from jobs.registry import base_models, hub_models
from jobs.store import access, blobs
from jobs.store.tables import Dataset, DatasetReport, Job
from training.plan import catalog
from training.plan.auto_settings import PRESETS, resolve
from training.plan.catalog import BaseModel, gib
from training.plan.config import FIELDS, Settings, current_names
from training.plan.warnings import Planned, Warning, warnings
from training.report.report import Summary

WATCHED = 3  # prompts that are answered again and again while it learns
MANY = 5  # bases of a group that are shown at once
CHOICES = 100  # datasets offered; older ones are reached from their own page


@dataclass
class Draft:
    """One form as it stands. `values` are its other fields, `typed` the settings."""

    owner: str
    values: dict[str, str]
    typed: dict[str, str]
    datasets: list[Dataset]
    errors: dict[str, str] = field(default_factory=dict)
    settings: Settings | None = None
    job: Job | None = None  # that is edited

    # ---- where it comes from ----

    @classmethod
    def open(cls, owner: str, query: Mapping[str, str]) -> Draft:
        """A fresh form, or a clone of the job that `?clone=` names. Raises access.NotFound for another's job."""
        if query.get("clone"):
            job = access.get_job_for(owner, query["clone"])
            return cls.of(owner, _as_typed(job) | {"name": f"{job.name}, again"[:120]}, check=False)
        named = {name: query.get(name, "") for name in ("dataset", "validation_dataset", "base")}
        return cls.of(owner, named, check=False)

    @classmethod
    def editing(cls, job: Job, data: Mapping[str, Any] | None = None) -> Draft:
        """The form of a job that waits, as it was asked for or as `data` would change it. Base and suffix stay."""
        typed = _as_typed(job)
        if data is not None:
            typed = {name: str(data[name]) for name in data} | {"base": job.base, "suffix": job.suffix or ""}
        draft = cls.of(job.owner, typed, check=data is not None)
        draft.job = job
        return draft

    @classmethod
    def of(cls, owner: str, data: Mapping[str, Any], *, check: bool = True) -> Draft:
        datasets = [d for d in access.list_datasets(owner, CHOICES) if d.status != "rejected"]
        values = {name: str(data.get(name, "")) for name in NewJobForm.base_fields}
        usable = [d.dataset_id for d in datasets]
        if not check:
            ready = [d.dataset_id for d in datasets if d.status == "ready"]
            values["dataset"] = values["dataset"] or next(iter(ready + usable), "")
            values["base"] = values["base"] or catalog.STARTER
        settings, typed, errors = settings_from(data)
        draft = cls(owner, values, typed, datasets, errors, settings)
        if check:
            form = NewJobForm(dict(values))
            draft.errors |= {name: " ".join(texts) for name, texts in form.errors.items()}
            for name in ("dataset", "validation_dataset"):
                if values[name] and values[name] not in usable:
                    draft.errors[name] = "This dataset is gone or was rejected. Choose another one."
            if values["validation_dataset"] and values["validation_dataset"] == values["dataset"]:
                draft.errors["validation_dataset"] = "Hold out other rows than those it learns from."
        return draft

    def apply_buttons(self, data: Mapping[str, str]) -> None:
        """The buttons that only change the form: a preset, or one setting back to automatic."""
        if data.get("preset") in PRESETS:
            self.typed = with_preset(self.typed, data["preset"])
        if data.get("automatic") in FIELDS:
            self.typed[data["automatic"]] = ""
        if data.get("reset"):
            self.typed = dict.fromkeys(FIELDS, "")
        if data.get("lock") in FIELDS:  # what is automatic now stays, whatever the data and the model become
            self.typed[data["lock"]] = shown(getattr(self._resolved()[0], data["lock"], None))
        self.settings, self.typed, errors = settings_from(self.typed)
        self.errors = {name: text for name, text in self.errors.items() if name not in FIELDS} | errors

    # ---- where it goes ----

    def _resolved(self) -> tuple[Settings | None, dict[str, str], dict[str, str]]:
        facts = self._base_facts()
        base = base_models.from_snapshot(facts) if facts else None
        return self._resolve(self._summary(self._report(facts)), base, estimates.machine())

    def _resolve(
        self, summary: Summary | None, base: BaseModel | None, machine: catalog.Machine
    ) -> tuple[Settings | None, dict[str, str], dict[str, str]]:
        """(settings, the reasons of what is automatic, the reasons of what would be were nothing a person's own)."""
        if summary is None or base is None or self.settings is None:
            return self.settings, {}, {}
        resolved, reasons = resolve(self.settings, summary, base, machine)
        nobodys: dict[str, Any] = {name: None for name, spec in FIELDS.items() if spec.automatic}
        return resolved, reasons, resolve(replace(self.settings, **nobodys), summary, base, machine)[1]

    def add_from_hub(self) -> None:
        """The Hub id that was typed, if any: checked, added, and chosen."""
        name = self.values["hub"].strip()
        if not name:
            return
        try:
            self.values["base"], self.values["hub"] = base_models.add_hub_model(self.owner, name), ""
            self.errors.pop("base", None)
        except hub_models.Refused as refused:
            self.refuse("hub", str(refused))

    def is_valid(self) -> bool:
        return not self.errors

    def refuse(self, name: str, message: str) -> None:
        self.errors[name] = message

    def request(self) -> JobRequest:
        given = {name: value for name, value in self.typed.items() if value}
        settings = self.settings.as_dict() if self.settings else {}
        return JobRequest(
            name=self.values["name"].strip() or self._default_name(),
            base=self.values["base"],
            dataset_id=self.values["dataset"],
            validation_dataset_id=self.values["validation_dataset"] or None,
            settings={name: settings[name] for name in given},
            suffix=self.values["suffix"],
            prompts=tuple(self._prompts()),
            seed=None if self.job is None or self.job.seed is None else int(self.job.seed),
            needs=self.job.needs if self.job else {},
            metadata=self.job.metadata if self.job else {},
        )

    def _prompts(self) -> list[str]:
        return [line.strip() for line in self.values["prompts"].splitlines() if line.strip()][:WATCHED]

    def _default_name(self) -> str:
        stem = (self.dataset.name if self.dataset else "data").rpartition("/")[2].rpartition(".")[0]
        return stem.replace("-", " ").replace("_", " ").strip().capitalize() or "New job"

    # ---- how it looks ----

    @property
    def dataset(self) -> Dataset | None:
        return next((d for d in self.datasets if d.dataset_id == self.values["dataset"]), None)

    def context(self) -> dict[str, Any]:
        facts = self._base_facts()
        base = base_models.from_snapshot(facts) if facts else None
        found = self._report(facts)
        summary = self._summary(found)
        machine = estimates.machine()
        resolved, reasons, suggested = self._resolve(summary, base, machine)
        estimate = None
        if summary and base and resolved and not self.errors:
            estimate = estimates.estimate(base, resolved, summary, machine, self._validation(facts))
        planned = Planned(resolved, base, machine, summary) if resolved and base and summary else None
        basic, advanced = rows(self.typed, self.errors, resolved, reasons, suggested)
        adapter = resolved.adapter if resolved else "none"
        return {
            "job": self.job,
            "values": self.values,
            "errors": self.errors,
            "datasets": self.datasets,
            "dataset": self.dataset,
            "summary": summary,
            "warnings": _warnings(self.dataset, planned),
            "leaks": self._leaks(),
            "difference": [row for row in (*basic, *advanced) if row.own and not row.error],
            "sample": self._sample(found),
            "counting": self._counting(facts, found) if summary else None,
            # Asked by the whole page only: a keystroke costs no more reads.
            "bases": lambda: self._choices(machine, adapter),
            "base": _facts(base, machine) if base else None,
            "machine": machine,
            "basic": basic,
            "advanced": [row for row in advanced if len(row.spec.choices) != 1],
            "advanced_open": any(row.error or row.value for row in advanced),
            "presets": list(PRESETS),
            "preset": preset_of(self.typed),
            "estimate": estimate,
            "other_errors": [
                text for name, text in self.errors.items() if name not in FIELDS and name not in self.values
            ],
            "default_name": self._default_name(),
        }

    def _choices(self, machine: catalog.Machine, adapter: str) -> list[dict[str, Any]]:
        """The bases, in groups: the catalogue, one's own, and what was added from the Hub."""
        groups = [
            ("", catalog.base_models()),
            ("Your tuned models", base_models.list_tuned(self.owner)),
            ("Added from the Hub", base_models.list_hub(self.owner)),
        ]
        chosen = self.values["base"]
        return [
            {
                "title": title,
                "choices": [
                    _choice(one, machine, adapter, chosen)
                    for one in models
                    if self.job is None or one.id == self.job.base
                ],
                "open": len(models) <= MANY or any(one.id == chosen for one in models),
            }
            for title, models in groups
            if models
        ]

    def _leaks(self) -> dict[str, Any] | None:
        """Rows held out that are also learned from, where a file of its own is held out."""
        other = next((d for d in self.datasets if d.dataset_id == self.values["validation_dataset"]), None)
        if self.dataset is None or other is None or other is self.dataset:
            return None
        if {self.dataset.status, other.status} != {"ready"}:
            return None
        return reports.request_leaks(self.dataset, other)

    def _base_facts(self) -> dict[str, Any] | None:
        try:
            return base_models.pin(self.owner, self.values["base"])
        except access.NotFound:
            return None

    def _report(self, facts: dict[str, Any] | None) -> DatasetReport | None:
        """What the dataset is to the chosen base, where its own report doesn't count for that."""
        if self.dataset is None or facts is None or reports.uses_default_tokenizer(facts):
            return None
        return reports.get(self.dataset.dataset_id, facts)

    def _summary(self, found: DatasetReport | None) -> Summary | None:
        told = self.dataset.summary if self.dataset else None
        if found is not None and found.status == "ready":
            told = found.summary
        return Summary.from_dict(told) if isinstance(told, dict) and told.get("examples") else None

    def _validation(self, facts: dict[str, Any] | None) -> Summary | None:
        """The counts of the validation file, where one is chosen."""
        chosen = self.values["validation_dataset"]
        dataset = next((d for d in self.datasets if d.dataset_id == chosen), None) if chosen else None
        told = reports.summary_for(dataset, facts)[0] if dataset and facts else {}
        return Summary.from_dict(told) if told.get("examples") else None

    def _sample(self, found: DatasetReport | None) -> dict[str, Any] | None:
        key = (found.report_key if found else "") or (self.dataset.report_key if self.dataset else "")
        return _first_sample(key) if key else None

    def _counting(self, facts: dict[str, Any] | None, found: DatasetReport | None) -> dict[str, str] | None:
        """What to say where the counts shown are not of the chosen base's tokenizer."""
        if (
            facts is None
            or reports.uses_default_tokenizer(facts)
            or (found is not None and found.status == "ready")
        ):
            return None
        base = base_models.from_snapshot(facts)
        return {
            "base": base.name if base else "",
            "status": found.status if found else "",
            "error": found.error if found else "",
        }

    def count(self) -> None:
        """Has the dataset read with the chosen base's tokenizer."""
        facts = self._base_facts()
        if facts is None:
            self.refuse("base", "Choose the model to start from.")
        elif (
            self.dataset is not None
            and self.dataset.status == "ready"
            and not reports.uses_default_tokenizer(facts)
        ):
            reports.request_report(self.dataset, facts)


def _facts(base: BaseModel, machine: catalog.Machine) -> dict[str, Any]:
    """What a person should know of the chosen base."""
    fits = {adapter: catalog.fits(base, machine, adapter) for adapter in ("none", "lora")}
    numbers = [
        ("Parameters", count(base.parameters)),
        ("Layers", count(base.layers)),
        ("Width", count(base.width)),
        ("Heads", count(base.heads)),
        ("Context", f"{count(base.context)} tokens"),
        ("Vocabulary", f"{count(base.vocab)} tokens"),
        ("Licence", base.licence),
        ("Languages", base.languages),
        ("Download", size(base.download) if not base.folder else "none: it comes with the studio"),
    ]
    words = {"none": "Full fine-tuning", "lora": "LoRA"}
    memory = [
        {
            "name": words[adapter],
            "needs": gib(fit.needs),
            "word": "fits" if fit.fits else "does not fit",
            "tone": "text-success" if fit.fits else "text-error",
        }
        for adapter, fit in fits.items()
    ]
    return {"model": base, "numbers": numbers, "memory": memory}


def _as_typed(job: Job) -> dict[str, str]:
    """What its person asked for, as the form's fields."""
    asked = {
        name: value
        for name, value in current_names(job.settings or {}).items()
        if name in FIELDS and value != FIELDS[name].default
    }
    return {
        "name": job.name,
        "dataset": job.dataset_id,
        "validation_dataset": job.validation_dataset_id or "",
        "base": job.base,
        "suffix": job.suffix or "",
        "prompts": "\n".join(job.prompts or []),
        **{name: shown(value) for name, value in asked.items()},
    }


def _choice(base: BaseModel, machine: catalog.Machine, adapter: str, chosen: str) -> dict[str, Any]:
    """A line of the model list: what it is, and whether the worker can train it."""
    fit = catalog.fits(base, machine, adapter)
    word, tone = ("fits", "text-success") if fit.fits else ("does not fit", "text-error")
    if not fit.fits and adapter == "none" and catalog.fits(base, machine, "lora").fits:
        word, tone = "LoRA only", "text-warning"
    return {"model": base, "word": word, "tone": tone, "why": fit.why, "chosen": base.id == chosen}


def _warnings(dataset: Dataset | None, planned: Planned | None) -> list[Warning]:
    found = []
    if dataset and dataset.status in ("receiving", "checking"):
        found.append(
            Warning(
                "This dataset is still being checked",
                "You can start already: the job waits for the check, and stops if the file is rejected.",
            )
        )
    return found + (warnings(planned) if planned else [])


@lru_cache(maxsize=200)
def _first_sample(report_key: str) -> dict[str, Any] | None:
    """A report never changes, and the form asks for it at every key."""
    samples = report_at(report_key).get("samples")
    return shown_sample(samples[0]) if samples else None


def report_at(key: str) -> dict[str, Any]:
    """The whole report of a dataset, from its object."""
    try:
        with blobs.open_file(key) as file:
            full = json.load(file)
    except blobs.Missing:
        return {}
    return full if isinstance(full, dict) else {}


def shown_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Line ends are made visible: they are tokens too."""
    tokens = [
        {**token, "text": str(token.get("text", "")).replace("\n", "⏎\n")}
        for token in sample.get("tokens", [])
    ]
    return {**sample, "tokens": tokens}
