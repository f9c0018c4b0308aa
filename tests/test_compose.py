"""docker-compose.yml, .env.example and the settings agree: every setting reaches every container."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from llmtuner import env
from tests.llmtuner.test_environment import ANY_CHARACTERS
from tests.llmtuner.test_production import SAFE, problems_with
from tests.services import ROOT

TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(TEXT)
OURS = {name: service for name, service in COMPOSE["services"].items() if service.get("build")}
EXAMPLE = set(re.findall(r"^#? ?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
FOR_TESTS = {"FAILPOINTS", "GOOGLE_ENDPOINTS"}


def interpolate(text: str, variables: dict[str, str]) -> str:
    """Replaces `${NAME}`, `${NAME:-default}` and `${NAME:?error}` as Compose does, the innermost first."""
    pattern = re.compile(r"\$\{([A-Z0-9_]+)(?:(:?[-?])([^${}]*))?\}")

    def value(match: re.Match[str]) -> str:
        name, operator, default = match[1], match[2] or "-", match[3] or ""
        is_set = bool(variables.get(name)) if operator.startswith(":") else name in variables
        if not is_set and operator.endswith("?"):
            raise KeyError(default)
        return variables[name] if is_set else default

    while pattern.search(text):
        # Values are not interpolated again.
        text = pattern.sub(lambda match: value(match).replace("$", "\0"), text)
    return text.replace("\0", "$")


def environment_of(service: dict[str, Any], dotenv: dict[str, str]) -> dict[str, str]:
    """The environment of one of our containers: the .env file, overridden by the compose file."""
    assert service["env_file"] == [".env"]
    return dotenv | {name: interpolate(str(value), dotenv) for name, value in service["environment"].items()}


def test_the_example_lists_every_setting():
    text = (ROOT / "llmtuner/settings.py").read_text()
    used = set(re.findall(r'env\.(?:text|flag|words|number|pairs|url)\(\s*"([A-Z0-9_]+)"', text))
    used |= set(re.findall(r'env\.url\([^)]*, "([A-Z_]+_PASSWORD)"\)', text))
    assert used - FOR_TESTS - EXAMPLE == set()


def test_compose_uses_no_variable_that_the_example_does_not_list():
    assigned = set().union(*(service["environment"] for service in OURS.values()))
    used = set(re.findall(r"\$\{([A-Z0-9_]+)", TEXT))
    assert (assigned | used) - EXAMPLE == set()


@pytest.mark.parametrize("name", OURS)
def test_compose_starts_a_safe_production(name: str, monkeypatch):
    """With the documented settings, passwords of any characters in .env, and the stores that Compose runs itself."""
    stores = {"DATABASE_URL", "REDIS_URL", "DYNAMODB_ENDPOINT", "AWS_STORAGE_BUCKET_NAME"}
    dotenv = {key: value for key, value in SAFE.items() if key not in stores} | dict.fromkeys(
        ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "MINIO_ROOT_PASSWORD"), ANY_CHARACTERS
    )
    environment = environment_of(OURS[name], dotenv)
    assert not problems_with(environment, monkeypatch)
    assert env.database(env.url("DATABASE_URL", "", "POSTGRES_PASSWORD"))["PASSWORD"] == ANY_CHARACTERS
    assert environment["AWS_SECRET_ACCESS_KEY"] == ANY_CHARACTERS


def test_aws_stores_replace_those_of_compose():
    dotenv = {
        "SECRET_KEY": "a",
        "DATABASE_URL": "postgres://me@rds/llmtuner",
        "DYNAMODB_ENDPOINT": "",
        "AWS_S3_ENDPOINT_URL": "",
        "AWS_SECRET_ACCESS_KEY": "of-aws",
        "MINIO_ROOT_PASSWORD": "unused",
    }
    environment = environment_of(OURS["web"], dotenv)
    assert {name: environment[name] for name in dotenv} == dotenv


SECRETS = ("SECRET_KEY", "POSTGRES_PASSWORD", "REDIS_PASSWORD", "MINIO_ROOT_PASSWORD")


@pytest.mark.parametrize("name", SECRETS)
def test_nothing_starts_without_its_secret(name: str):
    secrets = dict.fromkeys(SECRETS, "a")
    interpolate(TEXT, secrets)
    del secrets[name]
    with pytest.raises(KeyError, match=name):
        interpolate(TEXT, secrets)


def test_one_line_gives_the_gpus_to_the_workers_that_need_them():
    with_gpus, lines = re.subn(r"^  # gpus: all", "  gpus: all", TEXT, flags=re.MULTILINE)
    assert lines == 1
    services = yaml.safe_load(with_gpus)["services"]
    assert {name for name, service in services.items() if "gpus" in service} == {"training", "inference"}


def test_every_store_and_web_has_a_health_check_that_others_wait_for():
    services = COMPOSE["services"]
    healthy = {name for name, service in services.items() if "healthcheck" in service}
    assert {"web", "postgres", "redis", "dynamodb", "minio"} <= healthy
    waited_for = {
        name: dependency["condition"]
        for service in services.values()
        for name, dependency in service.get("depends_on", {}).items()
    }
    assert all(waited_for[name] == "service_healthy" for name in healthy - {"web"})


def test_caches_are_kept_in_a_volume():
    assert all("caches:/var/cache/llmtuner" in service["volumes"] for service in OURS.values())
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert set(re.findall(r"(\w+)=/var/cache/llmtuner/", dockerfile)) == {"MODEL_CACHE_DIR", "HF_HOME"}


def test_no_secret_is_copied_into_the_image():
    assert ".env" in (ROOT / ".dockerignore").read_text().split()
