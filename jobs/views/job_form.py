"""The form of a new or edited job: what was entered, which settings are automatic, and the estimate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from jobs.datasets import reports
from jobs.formatting import count, size
from jobs.forms import NewJobForm, Setting, preset_of, rows, settings_from, shown, with_preset
from jobs.lifecycle import estimates
from jobs.lifecycle import warnings as job_warnings
from jobs.lifecycle.submission import holds_preferences, schema_of, settings_of, task_rows
from jobs.lifecycle.transitions import JobRequest
from jobs.registry import base_models, hub_models
from jobs.store import access
from jobs.store.errors import Refused
from jobs.store.lease import LostRace
from jobs.store.quotas import OverQuota
from jobs.store.states import DatasetStatus, ReportStatus
from jobs.store.tables import Dataset, DatasetReport, Job
from jobs.views.dataset_report import display_sample, load_report
from training.data.summary import ONE_ANSWER, PREFERENCES, Summary
from training.plan import catalog, tasks
from training.plan.auto_settings import PRESETS, resolve
from training.plan.catalog import BaseModel, gib
from training.plan.config import (
    FIELDS,
    ConfigError,
    Settings,
    as_of_today,
    check_held_out,
    current_names,
)
from training.plan.metrics import METRICS, METRICS_OF
from training.plan.warnings import Planned

MAX_PROMPTS = 3  # sample prompts, answered at every evaluation
MAX_OPEN_GROUP = 5  # a group with more base models than this starts collapsed
MAX_DATASETS = 100  # offered in the lists; older ones can be used from their own page


@dataclass
class JobForm:
    """The form's current state. `typed` has the settings as entered, and `values` all other fields."""

    owner: str
    values: dict[str, str]
    typed: dict[str, str]
    datasets: list[Dataset]
    errors: dict[str, str] = field(default_factory=dict)
    settings: Settings | None = None
    job: Job | None = None  # the job being edited

    # ---- input ----

    @classmethod
    def open(cls, owner: str, query: Mapping[str, str]) -> JobForm:
        """An empty form, or a copy of the job named by `?clone=`. Raises access.NotFound for another user's job."""
        if query.get("clone"):
            job = access.get_job_for(owner, query["clone"])
            return cls.of(owner, _as_typed(job) | {"name": f"{job.name} (copy)"[:120]}, check=False)
        named = {name: query.get(name, "") for name in ("dataset", "validation_dataset", "base")}
        return cls.of(owner, named, check=False)

    @classmethod
    def editing(cls, job: Job, data: Mapping[str, Any] | None = None) -> JobForm:
        """The form of a waiting job, as submitted or as `data` changes it. The base model and suffix are fixed."""
        typed = _as_typed(job)
        if data is not None:
            typed = {name: str(data[name]) for name in data} | {"base": job.base, "suffix": job.suffix or ""}
        form = cls.of(job.owner, typed, check=data is not None)
        form.job = job
        return form

    @classmethod
    def of(cls, owner: str, data: Mapping[str, Any], *, check: bool = True) -> JobForm:
        datasets = [
            d for d in access.list_datasets(owner, MAX_DATASETS) if d.status != DatasetStatus.REJECTED
        ]
        values = {name: str(data.get(name, "")) for name in NewJobForm.base_fields}
        if not check:
            # Stable: the newest ready one first.
            usable = sorted(datasets, key=lambda d: d.status != DatasetStatus.READY)
            values["dataset"] = values["dataset"] or next((d.dataset_id for d in usable), "")
            values["base"] = values["base"] or catalog.STARTER
        settings, typed, errors = settings_from(data)
        form = cls(owner, values, typed, datasets, errors, settings)
        if check:
            form._check()
        return form

    def _check(self) -> None:
        checked = NewJobForm(dict(self.values))
        self.errors |= {name: " ".join(texts) for name, texts in checked.errors.items()}
        usable = {d.dataset_id for d in self.datasets}
        for name in ("dataset", "validation_dataset"):
            if self.values[name] and self.values[name] not in usable:
                self.refuse(name, "This dataset was deleted or rejected. Choose another one.")
        self._check_settings()
        for dataset in self.datasets:
            for name in ("dataset", "validation_dataset"):
                if dataset.dataset_id == self.values[name] and holds_preferences(dataset):
                    self.refuse(name, f"{PREFERENCES} {ONE_ANSWER}")
        if self.values["validation_dataset"] and self.values["validation_dataset"] == self.values["dataset"]:
            self.refuse("validation_dataset", "Choose a validation dataset other than the training dataset.")

    def _check_settings(self) -> None:
        """What depends on the datasets."""
        if not self.settings:
            return
        try:
            check_held_out(self.settings, bool(self.values["validation_dataset"]))
        except ConfigError as error:
            self.refuse(error.field, error.message)
        if refusal := tasks.refusal(self.settings.task, self._task_rows()):
            self.refuse("task", refusal)

    def apply_buttons(self, data: Mapping[str, str]) -> None:
        """Buttons that only change the form: a preset, resetting settings, or locking an automatic value."""
        if data.get("preset") in PRESETS:
            self.typed = with_preset(self.typed, data["preset"])
        if data.get("automatic") in FIELDS:
            self.typed[data["automatic"]] = ""
        if data.get("reset"):
            self.typed = dict.fromkeys(FIELDS, "")
        if data.get("lock") in FIELDS:  # keep the current automatic value even if the data or model changes
            self.typed[data["lock"]] = shown(getattr(self._resolved()[0], data["lock"], None))
        self.settings, self.typed, errors = settings_from(self.typed)
        self.errors = {name: text for name, text in self.errors.items() if name not in FIELDS} | errors
        self._check_settings()

    # ---- actions ----

    def _resolved(self) -> tuple[Settings | None, dict[str, str], dict[str, str]]:
        base_snapshot = self._base_snapshot()
        base = base_models.from_snapshot(base_snapshot) if base_snapshot else None
        return self._resolve(self._summary(self._report(base_snapshot)), base, estimates.machine())

    def _resolve(
        self, summary: Summary | None, base: BaseModel | None, machine: catalog.Machine
    ) -> tuple[Settings | None, dict[str, str], dict[str, str]]:
        """(settings, reasons for the automatic ones, the reasons that there would be if all settings were automatic)."""
        if summary is None or base is None or self.settings is None:
            return self.settings, {}, {}
        resolved, reasons = resolve(self.settings, summary, base, machine)
        all_automatic: dict[str, Any] = {name: None for name, spec in FIELDS.items() if spec.automatic}
        return resolved, reasons, resolve(replace(self.settings, **all_automatic), summary, base, machine)[1]

    def add_from_hub(self) -> None:
        """Checks, adds, and selects the Hub model whose ID was entered, if any."""
        name = self.values["hub"].strip()
        if not name:
            return
        try:
            self.values["base"], self.values["hub"] = base_models.add_hub_model(self.owner, name), ""
            self.errors.pop("base", None)
        except Refused as refused:
            self.refuse("hub", str(refused))

    def is_valid(self) -> bool:
        return not self.errors

    def refuse(self, name: str, message: str) -> None:
        self.errors[name] = message

    @contextmanager
    def refusal_as_error(self) -> Iterator[None]:
        """If the action inside is refused, its reason becomes an error of the form."""
        try:
            yield
        except Refused as refused:
            self.refuse(refused.field, refused.message)
        except (OverQuota, LostRace) as error:
            self.refuse("", str(error))

    def request(self) -> JobRequest:
        settings = self.settings.as_dict() if self.settings else {}
        return JobRequest(
            name=self.values["name"].strip() or self._default_name(),
            base=self.values["base"],
            dataset_id=self.values["dataset"],
            validation_dataset_id=self.values["validation_dataset"] or None,
            settings={name: settings[name] for name, value in self.typed.items() if value},
            suffix=self.values["suffix"],
            prompts=tuple(self._prompts()),
            needs=self.job.needs if self.job else {},
            metadata=self.job.metadata if self.job else {},
        )

    def _prompts(self) -> list[str]:
        return [line.strip() for line in self.values["prompts"].splitlines() if line.strip()][:MAX_PROMPTS]

    def _default_name(self) -> str:
        stem = (self.dataset.name if self.dataset else "data").rpartition("/")[2].rpartition(".")[0]
        return stem.replace("-", " ").replace("_", " ").strip().capitalize() or "New job"

    # ---- output ----

    @property
    def dataset(self) -> Dataset | None:
        return next((d for d in self.datasets if d.dataset_id == self.values["dataset"]), None)

    def context(self) -> dict[str, Any]:
        base_snapshot = self._base_snapshot()
        base = base_models.from_snapshot(base_snapshot) if base_snapshot else None
        report = self._report(base_snapshot)
        summary = self._summary(report)
        machine = estimates.machine()
        resolved, reasons, suggested = self._resolve(summary, base, machine)
        basic, advanced = rows(self.typed, self.errors, resolved, reasons, suggested)
        estimate = planned = None
        leaks = self._leaks()
        if summary and base and resolved:
            planned = Planned(
                resolved,
                base,
                machine,
                summary,
                self._validation_rows(),
                int((leaks or {}).get("count") or 0),
            )
            if not self.errors:
                validation = self._validation(base_snapshot)
                estimate = estimates.estimate(base, resolved, summary, machine, validation)
        adapter = resolved.adapter if resolved else "none"
        data = {
            "dataset": self.dataset,
            "datasets": self.datasets,
            "summary": summary,
            "sample": self._sample(report),
            "leaks": leaks,
            "counting": self._counting(base_snapshot, report) if summary else None,
        }
        model = {
            # Only the whole page needs the list, so typing costs no more reads.
            "bases": lambda: self._choices(machine, adapter),
            "base": _base_details(base, machine) if base else None,
            "machine": machine,
        }
        plan = {"estimate": estimate, "warnings": job_warnings.for_plan(self.dataset, planned)}
        return data | model | plan | self._settings_context(basic, advanced) | self._fields_context()

    def _fields_context(self) -> dict[str, Any]:
        placed = {*FIELDS, *self.values}
        return {
            "job": self.job,
            "values": self.values,
            "errors": self.errors,
            "other_errors": [text for name, text in self.errors.items() if name not in placed],
            "default_name": self._default_name(),
        }

    def _settings_context(self, basic: list[Setting], advanced: list[Setting]) -> dict[str, Any]:
        task = next(row for row in advanced if row.name == "task")  # beside the base model
        advanced = [row for row in advanced if row is not task]
        return {
            "basic": basic,
            "task": self._with_scoring(task),
            "advanced": [row for row in advanced if len(row.spec.choices) != 1],
            "advanced_open": any(row.error or row.value for row in advanced),
            "difference": [row for row in (task, *basic, *advanced) if row.is_changed and not row.error],
            "presets": list(PRESETS),
            "preset": preset_of(self.typed),
        }

    def _with_scoring(self, task: Setting) -> Setting:
        """The choice of the task, with what is guessed and how answers will be scored."""
        counts = self._task_rows()
        guessed = tasks.describe(None, counts).get(
            "text", "Automatic: guessed from the rows when they are checked"
        )
        name = task.value or tasks.guess(counts)
        # Whether the training answers are JSON is known only when training starts.
        scored = [METRICS[m].in_text for m in METRICS_OF.get(name, ()) if m != "valid_json"]
        how = f" Held-out answers are scored by {' and '.join(scored)}." if scored else ""
        how = " Plain text has no answers to score." if name == "text" else how
        return replace(task, hint=f"{guessed}.{how}")

    def _task_rows(self) -> dict[str, int]:
        return task_rows(self.dataset) if self.dataset else {}

    def _choices(self, machine: catalog.Machine, adapter: str) -> list[dict[str, Any]]:
        """The base models, in groups: the catalog, those imported for all users, the user's own, and those added from the
        Hub."""
        groups = [
            ("", catalog.base_models()),
            ("Imported by the administrator", base_models.list_imported()),
            ("Your fine-tuned models", base_models.list_tuned(self.owner)),
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
                "open": len(models) <= MAX_OPEN_GROUP or any(one.id == chosen for one in models),
            }
            for title, models in groups
            if models
        ]

    def _leaks(self) -> dict[str, Any] | None:
        """Validation rows that are also in the training dataset, if a validation dataset is chosen."""
        other = next((d for d in self.datasets if d.dataset_id == self.values["validation_dataset"]), None)
        if self.dataset is None or other is None or other is self.dataset:
            return None
        if self.dataset.status != DatasetStatus.READY or other.status != DatasetStatus.READY:
            return None
        return reports.request_leaks(self.dataset, other)

    def _validation_rows(self) -> int:
        other = next((d for d in self.datasets if d.dataset_id == self.values["validation_dataset"]), None)
        return job_warnings.rows_of(other)

    def _base_snapshot(self) -> dict[str, Any] | None:
        try:
            return base_models.pin(self.owner, self.values["base"])
        except access.NotFound:
            return None

    def _report(self, base_snapshot: dict[str, Any] | None) -> DatasetReport | None:
        """The dataset's report for the chosen base, if the base doesn't share the starter model's tokenizer."""
        if self.dataset is None or base_snapshot is None or reports.uses_default_tokenizer(base_snapshot):
            return None
        return reports.get(self.dataset.dataset_id, base_snapshot)

    def _summary(self, report: DatasetReport | None) -> Summary | None:
        counts = self.dataset.summary if self.dataset else None
        if report is not None and report.status == ReportStatus.READY:
            counts = report.summary
        return Summary.from_dict(counts) if isinstance(counts, dict) and counts.get("examples") else None

    def _validation(self, base_snapshot: dict[str, Any] | None) -> Summary | None:
        """The counts of the validation dataset, if one is chosen."""
        chosen = self.values["validation_dataset"]
        dataset = next((d for d in self.datasets if d.dataset_id == chosen), None) if chosen else None
        counts = reports.summary_for(dataset, base_snapshot)[0] if dataset and base_snapshot else {}
        return Summary.from_dict(counts) if counts.get("examples") else None

    def _sample(self, report: DatasetReport | None) -> dict[str, Any] | None:
        key = (report.report_key if report else "") or (self.dataset.report_key if self.dataset else "")
        return _first_sample(key) if key else None

    def _counting(
        self, base_snapshot: dict[str, Any] | None, report: DatasetReport | None
    ) -> dict[str, str] | None:
        """The state of the count with the chosen base's tokenizer, if the counts shown are from another tokenizer."""
        if (
            base_snapshot is None
            or reports.uses_default_tokenizer(base_snapshot)
            or (report is not None and report.status == ReportStatus.READY)
        ):
            return None
        base = base_models.from_snapshot(base_snapshot)
        return {
            "base": base.name if base else "",
            "status": report.status if report else "",
            "error": report.error if report else "",
        }

    def count_tokens(self) -> None:
        """Starts counting the dataset's tokens with the chosen base's tokenizer."""
        base_snapshot = self._base_snapshot()
        if base_snapshot is None:
            self.refuse("base", "Choose a base model.")
        elif (
            self.dataset is not None
            and self.dataset.status == DatasetStatus.READY
            and not reports.uses_default_tokenizer(base_snapshot)
        ):
            reports.request_report(self.dataset, base_snapshot)


def _base_details(base: BaseModel, machine: catalog.Machine) -> dict[str, Any]:
    """Details of the chosen base model, and whether it fits on the worker."""
    fits = {adapter: catalog.fits(base, machine, adapter) for adapter in ("none", "lora")}
    numbers = [
        ("Parameters", count(base.parameters)),
        ("Layers", count(base.layers)),
        ("Width", count(base.width)),
        ("Heads", count(base.heads)),
        ("Context", f"{count(base.context)} tokens"),
        ("Vocabulary", f"{count(base.vocab)} tokens"),
        ("License", base.licence),
        ("Languages", base.languages),
        ("Download", size(base.download) if not base.folder else "none (built in)"),
    ]
    labels = {"none": "Full fine-tuning", "lora": "LoRA"}
    memory = [
        {
            "name": labels[adapter],
            "needs": gib(fit.needs),
            "label": "fits" if fit.fits else "does not fit",
            "tone": "text-success" if fit.fits else "text-error",
        }
        for adapter, fit in fits.items()
    ]
    # The user can take it off their list if they added it from the Hub.
    return {"model": base, "numbers": numbers, "memory": memory, "removable": hub_models.is_id(base.id)}


def _as_typed(job: Job) -> dict[str, str]:
    """The job as submitted, as form fields. Settings equal to their defaults are left empty."""
    settings = {
        name: value
        for name, value in current_names(as_of_today(settings_of(job), schema_of(job))).items()
        if name in FIELDS and value != FIELDS[name].default
    }
    return {
        "name": job.name,
        "dataset": job.dataset_id,
        "validation_dataset": job.validation_dataset_id or "",
        "base": job.base,
        "suffix": job.suffix or "",
        "prompts": "\n".join(job.prompts or []),
        **{name: shown(value) for name, value in settings.items()},
    }


def _choice(base: BaseModel, machine: catalog.Machine, adapter: str, chosen: str) -> dict[str, Any]:
    """A row of the model list, with whether the worker can train it."""
    fit = catalog.fits(base, machine, adapter)
    label, tone = ("fits", "text-success") if fit.fits else ("does not fit", "text-error")
    if not fit.fits and adapter == "none" and catalog.fits(base, machine, "lora").fits:
        label, tone = "LoRA only", "text-warning"
    return {"model": base, "label": label, "tone": tone, "why": fit.why, "chosen": base.id == chosen}


@lru_cache(maxsize=200)
def _first_sample(report_key: str) -> dict[str, Any] | None:
    """A full report. It is cached because it never changes and the form is rendered at every keystroke."""
    samples = load_report(report_key).get("samples")
    return display_sample(samples[0]) if samples else None
