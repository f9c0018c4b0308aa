"""Names and formats that the code declares: tables, settings, tasks, URLs, reasons, hashes. Code may be renamed freely;
what is stored or sent to other programs keeps its name."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.management import get_commands, load_command_class
from django.urls import URLPattern, URLResolver, get_resolver

from tests.golden import product
from tests.golden.compare import compare
from tests.golden.shapes import flat

ROOT = Path(__file__).resolve().parents[2]


def test_dynamodb_tables_keys_and_attributes():
    compare("tables", (line for table in product.TABLES for line in table_lines(table)))


def table_lines(table: Any) -> Iterator[str]:
    name = table.Meta.table_name.removeprefix(settings.DYNAMODB_TABLE_PREFIX)
    for attribute in table.get_attributes().values():
        key = " partition key" * attribute.is_hash_key + " sort key" * attribute.is_range_key
        kind = attribute.attr_type + " (JSON)" * (type(attribute).__name__ == "JSONAttribute")
        yield f"{name}.{attribute.attr_name}: {kind}{key}"


def test_kinds_of_outstanding_work():
    compare("work", [f"partition {product.WORK_PARTITION}", *(f"{kind}#<id>" for kind in product.WORK_KINDS)])


def test_keys_derived_from_ids():
    ids = [f"ftjob-01JD{n:022d}" for n in range(12)]
    bases: list[dict[str, Any]] = [
        {"id": "starter"},
        {"id": "gpt2-large"},
        {"id": "Qwen/Qwen2.5-0.5B", "revision": "0123456789abcdef0123456789abcdef01234567"},
        {"id": "ft:starter:ada:x:01234567", "reads_as": "starter", "root": "starter"},
    ]
    compare(
        "derived",
        [
            f"shards of active jobs: {product.SHARDS}",
            *(f"{id} stands in {product.shard(id)}" for id in ids),
            f"time of {ids[0]}: {product.time_of(ids[0])}",
            f"month of 1790000000: {product.month_of(1_790_000_000)}",
            *(f"tokenizer of {json.dumps(base)}: {product.tokenizer_family(base)}" for base in bases),
            f"pattern of ids of the Hub: {product.HUB_ID.pattern}",
            f"pattern of API keys: {product.API_KEY_PATTERN.pattern}",
            f"digest of API key sk-llmt-a: {product.api_key_digest('sk-llmt-a')}",
            f"scopes of API keys: {' '.join(product.API_KEY_SCOPES)}",
        ],
    )


def test_hash_of_a_submission():
    """An `Idempotency-Key` sent before an upgrade still identifies its job afterwards."""
    request: dict[str, Any] = {"base": "starter", "dataset_id": "file-A", "name": "orders"}
    full = request | {
        "settings": {"epochs": 2},
        "prompts": ("Hi",),
        "seed": 7,
        "metadata": {"a": "b"},
        "suffix": "x",
    }
    compare("submission", [f"{name}: {product.request_hash(**fields)}" for name, fields in (("plain", request), ("full", full))])  # fmt: skip


def test_statuses_phases_reasons_and_exit_codes():
    compare(
        "reasons",
        [
            *(f"status {status}{' (end)' * (status in product.ENDED_STATUSES)}" for status in product.JOB_STATUSES),
            *(f"phase {phase}" for phase in product.PHASES),
            *(f"exit code {code} of {name}" for name, code in product.EXIT_CODES.items()),
            *(
                f"reason {name}: exit {reason.exit}{', never retried' * reason.user_fault}"
                for name, reason in product.JOB_REASONS.items()
            ),
            *(f"reason of the trainer: {name}" for name in product.TRAINER_REASONS),
        ],
    )  # fmt: skip


def test_run_file_and_settings():
    compare("run_file", sorted(run_file_lines()))


def run_file_lines() -> Iterator[str]:
    for name in product.Run.__dataclass_fields__:
        yield f"run file: {name}"
    for name, field in product.FIELDS.items():
        limits = f" from {field.minimum:g} to {field.maximum:g}" if field.minimum is not None else ""
        choices = f" of {', '.join(field.choices)}" if field.choices else ""
        yield f"setting {name}: {field.kind}{choices}{limits}, by default {json.dumps(field.default)}"
    for name in product.UNHASHED:
        yield f"setting left out of the hash: {name}"
    for values in ({}, {"method": "lora", "lora_targets": ["c_attn"]}, {"epochs": 3, "seed": 9}):
        for schema, name in ((1, ""), (2, " of schema 2")):
            settings = product.parse(values, schema)
            yield f"hash of the settings {json.dumps(values)}{name}: {product.settings_hash(settings, schema)}"


def test_command_line_of_the_trainer():
    """Parsed from `--help`."""
    compare("command_line", [line for name in product.TRAINER_COMMANDS for line in command_lines(name)])


def command_lines(name: str) -> Iterator[str]:
    completed = subprocess.run(
        [sys.executable, "-m", "training", name, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )  # fmt: skip
    usage = " ".join(completed.stdout.partition("\n\n")[0].split()).removeprefix("usage: ")
    arguments = usage.partition(f"training {name}")[2]
    yield f"{name}"
    for argument in re.findall(r"\[[^\]]*\]|--\S+ \S+|\([^)]*\)|\S+", arguments):
        yield f"{name} {argument}"


def test_base_models():
    compare("bases", [*(f"{model.id}" for model in product.base_models()), *(f"key {name}" for name in product.BaseModel.__dataclass_fields__)])  # fmt: skip


def test_checkpoint_files():
    compare("checkpoint_files", [f"format {product.CHECKPOINT_FORMAT}", *product.CHECKPOINT_FILES])


def test_longest_line_of_an_event():
    compare("event_line", [f"bytes {product.MAX_LINE_BYTES}"])


# ---- Celery, URLs, commands ----------------------------------------------------------------------------------------


def test_celery_tasks_and_queues():
    app = product.celery_app
    app.loader.import_default_modules()
    ours = {name: task for name, task in app.tasks.items() if not name.startswith("celery.")}
    routes = app.conf.task_routes or {}
    compare(
        "tasks",
        [
            *(f"task {name}({', '.join(inspect.signature(task.run).parameters)})" for name, task in ours.items()),
            *(f"task {name} goes to queue {routes.get(name, app.conf.task_default_queue)}" for name in ours),
            f"serializer {app.conf.task_serializer}",
        ],
    )  # fmt: skip


def test_urls_and_their_names():
    compare(
        "addresses", [*routes(get_resolver().url_patterns), f"{product.STREAM_PATH.pattern}  (before Django)"]
    )


def routes(patterns: list[Any], prefix: str = "", space: str = "") -> Iterator[str]:
    """For third-party applications (allauth, Django's admin), only where they are mounted."""
    for entry in patterns:
        path = f"{prefix or '/'}{entry.pattern}"
        if isinstance(entry, URLResolver):
            inner = f"{space}{entry.namespace}:" if entry.namespace else space
            if path in ("/accounts/", "/_allauth/"):
                yield f"{path}…  {entry.urlconf_module.__name__}"  # type: ignore[union-attr]
            else:
                yield from routes(entry.url_patterns, path, inner)
        elif isinstance(entry, URLPattern) and (
            not path.startswith("/admin/") or path.startswith("/admin/jobs/")
        ):
            yield f"{path}  {space}{entry.name}" if entry.name else path


def test_openapi_document():
    """Everything except descriptive texts."""
    document = json.loads(json.dumps(product.api.get_openapi_schema(), default=str))
    words = frozenset({"description", "summary", "title"})
    compare("openapi", flat(document, without=words))


def test_our_management_commands():
    ours = {name: app for name, app in get_commands().items() if app in {"accounts", "jobs"} or app.startswith("llmtuner")}  # fmt: skip
    compare("management", (line for name, app in ours.items() for line in management_lines(name, app)))


def management_lines(name: str, app: str) -> Iterator[str]:
    yield f"manage.py {name}"
    command = load_command_class(app, name)
    common = {"help", "version", "verbosity", "settings", "pythonpath", "traceback", "no_color", "force_color", "skip_checks"}  # fmt: skip
    for action in command.create_parser("manage.py", name)._actions:
        if action.dest not in common:
            yield f"manage.py {name} {' '.join(action.option_strings) or action.dest}"


# ---- the environment, cookies, signatures ---------------------------------------------------------------------------

READ_SETTINGS = """
import collections.abc, json, os, sys

class Watched(type(os.environ)):
    names = set()
    def __getitem__(self, name):
        frame = sys._getframe(1)
        while frame:
            if frame.f_code.co_filename.endswith("llmtuner/settings.py"):
                self.names.add(name)
            frame = frame.f_back
        return super().__getitem__(name)

os.environ.__class__ = Watched
from django.conf import settings
shown = {name: getattr(settings, name) for name in KEPT}
print(json.dumps([sorted(Watched.names), shown], default=str))
"""
KEPT = [
    "AUTH_USER_MODEL",
    "CSRF_COOKIE_NAME",
    "DYNAMODB_TABLE_PREFIX",
    "HEADLESS_CLIENTS",
    "HEADLESS_JWT_ALGORITHM",
    "HEADLESS_TOKEN_STRATEGY",
    "JOBS",
    "LANGUAGE_COOKIE_NAME",
    "MESSAGE_STORAGE",
    "MFA_TOTP_ISSUER",
    "PASSWORD_HASHERS",
    "SESSION_COOKIE_AGE",
    "SESSION_COOKIE_NAME",
    "SESSION_ENGINE",
    "STATIC_URL",
]


def settings_under(folder: Path, **environment: str) -> tuple[list[str], dict[str, Any]]:
    """(variables that the settings read, values of the settings in `KEPT`) with only this environment."""
    code = READ_SETTINGS.replace("KEPT", repr(KEPT))
    env = {"PATH": os.environ["PATH"], "VAR_DIR": str(folder), "DJANGO_SETTINGS_MODULE": "llmtuner.settings"}
    completed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env | environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    names, values = json.loads(completed.stdout)
    return names, values


def test_environment_variables_and_settings(tmp_path: Path):
    names, values = settings_under(tmp_path)
    _, over_https = settings_under(tmp_path, PUBLIC_URL="https://tuner.example.com")
    compare(
        "environment",
        [
            *(f"variable {name}" for name in names),
            *flat(values),
            *(f"over https: {name} = {over_https[name]}" for name in KEPT if name.endswith("COOKIE_NAME")),
            *(f"file {path.name}" for path in tmp_path.iterdir()),
            *(f"variable for the trainer: {name}" for name in product.TRAINER_ENVIRONMENT),
        ],
    )


def test_every_documented_variable_is_recorded_or_belongs_to_a_library():
    """.env.example lists the variables that users set today; none may be missing."""
    recorded = (Path(__file__).parent / "expected/environment.txt").read_text()
    documented = re.findall(r"^# ([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    elsewhere = {
        "MINIO_ROOT_USER",
        "MINIO_ROOT_PASSWORD",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "WEB_HOST",
        "GOOGLE_CLIENT_SECRET",
    }
    compare("documented_variables", documented)
    assert {name for name in documented if f"variable {name}\n" not in recorded} <= elsewhere


def test_signatures():
    """Existing links stay valid, and receivers of webhooks can still verify signatures."""
    headers = product.webhook_headers(
        "whsec_AAAA", "ftjob-A#succeeded#hook-A", '{"id": "evt"}', 1_790_000_000
    )
    compare(
        "signatures",
        [
            f"salt of signed links: {product.LINK_SALT}",
            *(f"webhook header {name}: {value}" for name, value in headers.items()),
            *(f"webhook event {name}" for name in product.WEBHOOK_EVENT_TYPES),
        ],
    )


def test_an_existing_signed_link_can_be_read(settings: Any):
    """Signed with the recorded salt by Django's signer, and read by the product."""
    from django.core.signing import TimestampSigner

    settings.SECRET_KEY = "made-up-for-this-test-" * 3
    payload = {"key": "datasets/user-A/file-A/data", "filename": "rows.jsonl", "s": 600}
    token = TimestampSigner(salt="jobs.storage.link").sign_object(payload, compress=True)
    assert product.read_link(token) == (payload["key"], payload["filename"])
    assert product.read_link(TimestampSigner(salt="another").sign_object(payload, compress=True)) is None


@pytest.mark.django_db
def test_sql_tables_and_columns():
    """Of our applications, with the names under which permissions, content types and migrations are stored."""
    from django.apps import apps
    from django.contrib.auth.models import Permission
    from django.db.migrations.recorder import MigrationRecorder

    ours = [config for config in apps.get_app_configs() if Path(config.path).is_relative_to(ROOT) and ".venv" not in config.path]  # fmt: skip
    labels = {config.label for config in ours}
    models = [model for config in ours for model in config.get_models()]
    compare(
        "sql",
        [
            *(f"application {label}" for label in labels),
            *(
                f"column {model._meta.db_table}.{field.column}: {field.get_internal_type()}"
                for model in models
                if model._meta.managed
                for field in model._meta.local_fields
            ),
            *(f"content type {model._meta.label_lower}" for model in models),
            *(
                f"right {right.content_type.app_label}.{right.codename}"
                for right in Permission.objects.filter(content_type__app_label__in=labels)
            ),
            *(
                f"migration {app}.{name}"
                for app, name in MigrationRecorder.Migration.objects.values_list("app", "name")
                if app in labels
            ),
        ],
    )
