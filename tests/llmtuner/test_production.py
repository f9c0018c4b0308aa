"""A safe production configuration passes without a warning. Each unsafe one is refused with a message."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import services

SAFE = {
    "LLMTUNER_ENV": "production",
    "SECRET_KEY": "kX9v2QmT7pLr4WzB8nYc5HdJ3sFg6VtA1eUiOoP0qRyMxKbNwZ",
    "PUBLIC_URL": "https://tuner.example.com",
    "EMAIL_URL": "smtp+tls://user:password@smtp.example.com:587",
    "TRUSTED_PROXY_COUNT": "1",
    "DATABASE_URL": "postgres://tuner:secret@postgres:5432/llmtuner",
    "REDIS_URL": "redis://:secret@redis:6379/0",
    "DYNAMODB_ENDPOINT": "",
    "AWS_STORAGE_BUCKET_NAME": "bucket",
}
UNSET = None


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process with only these environment variables."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=services.ROOT,
        env=inherited | {"VAR_DIR": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_safe_production_configuration_passes_without_warnings(tmp_path: Path):
    result = run(tmp_path, "manage.py", "check", "--deploy", "--fail-level", "WARNING", **SAFE)
    assert result.returncode == 0, result.stderr
    assert "no issues (0 silenced)" in result.stdout


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"DEBUG": "1"}, "E002"),
        ({"SECRET_KEY": ""}, "E003"),
        ({"SECRET_KEY": "short"}, "E003"),
        ({"SECRET_KEY": "django-insecure-" + "x1y2z3" * 10}, "E003"),
        ({"PUBLIC_URL": "http://tuner.example.com"}, "E004"),
        ({"ALLOWED_HOSTS": "*"}, "E005"),
        ({"ALLOWED_HOSTS": ".example.com"}, "E005"),
        ({"GOOGLE_ENDPOINTS": "AUTHORIZE_URL=http://localhost:9/a"}, "E007"),
        ({"FAILPOINTS": "claim"}, "E008"),
        ({"EMAIL_URL": ""}, "E009"),
        ({"PUBLIC_URL": "https://localhost"}, "E011"),
        ({"GOOGLE_CLIENT_ID": "abc"}, "E013"),
        ({"DATABASE_URL": UNSET}, "E014"),
        ({"DATABASE_URL": "sqlite:////data/db.sqlite3"}, "E014"),
        ({"REDIS_URL": UNSET}, "E015"),
        ({"LLMTUNER_OWN_REDIS": "1"}, "E015"),
        ({"DYNAMODB_ENDPOINT": UNSET}, "E016"),
        ({"LLMTUNER_OWN_DYNAMODB": "1"}, "E016"),
        ({"AWS_STORAGE_BUCKET_NAME": UNSET}, "E017"),
    ],
    ids=str,
)
def test_an_unsafe_production_configuration_is_refused(
    change: dict[str, str | None], error: str, monkeypatch
):
    """In this process, with the settings that result from that environment. One process for each would take a minute."""
    assert f"llmtuner.{error}" in problems_with({**SAFE, **change}, monkeypatch)


def test_a_worker_needs_no_sql(monkeypatch):
    assert not problems_with({**SAFE, "DATABASE_URL": UNSET}, monkeypatch, needs_sql=False)


def problems_with(environment: Mapping[str, str | None], monkeypatch, needs_sql: bool = True) -> set[str]:
    import importlib.util
    from types import SimpleNamespace

    from llmtuner import checks

    for name in (
        "SECRET_KEY",
        "DEBUG",
        "ALLOWED_HOSTS",
        "EMAIL_URL",
        "GOOGLE_CLIENT_SECRET",
        "TRUSTED_PROXY_COUNT",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        if value is UNSET:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location(
        "settings_under_test", services.ROOT / "llmtuner/settings.py"
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(checks, "settings", SimpleNamespace(**vars(module)))
    return {str(message.id) for message in checks.problems(needs_sql)}


def test_a_safe_production_configuration_has_no_problems(monkeypatch):
    assert not problems_with(SAFE, monkeypatch)


def test_web_does_not_start_with_an_unsafe_configuration(tmp_path: Path):
    """Not only `check --deploy` refuses it, the server does too."""
    result = run(tmp_path, "-c", "import llmtuner.asgi", **SAFE | {"SECRET_KEY": "short"})
    assert result.returncode != 0
    assert "SECRET_KEY must be set" in result.stderr


@pytest.mark.parametrize("queue", ["checks", "training", "inference"])
def test_a_worker_does_not_start_with_an_unsafe_configuration(tmp_path: Path, queue: str):
    result = run(tmp_path, "-m", "llmtuner", "worker", queue, **SAFE | {"REDIS_URL": ""})
    assert result.returncode == 1
    assert "REDIS_URL must be set" in result.stderr
    assert "Traceback" not in result.stderr


def test_bin_up_explains_why_production_cannot_use_embedded_stores(tmp_path: Path):
    environment = {name: value for name, value in SAFE.items() if name != "REDIS_URL"}
    result = run(tmp_path, "-m", "llmtuner.local_stack", **environment)
    assert result.returncode == 1
    assert "REDIS_URL must be set" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_generated_secret_key_is_stored_and_reused(tmp_path: Path):
    from llmtuner import env

    first = env.stored_secret(tmp_path / "secret-key")
    assert env.stored_secret(tmp_path / "secret-key") == first
    assert len(first) > 50
    assert (tmp_path / "secret-key").stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["secret-key"]
