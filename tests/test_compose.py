"""docker-compose.yml, .env.example and the settings agree: what one may set reaches every container."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from llmtuner import env
from tests.llmtuner.test_production import SAFE, problems_with
from tests.services import ROOT

TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(TEXT)
OURS = {name: service for name, service in COMPOSE["services"].items() if service.get("build")}
EXAMPLE = set(re.findall(r"^#? ?([A-Z][A-Z0-9_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
FOR_TESTS = {"FAILPOINTS", "GOOGLE_ENDPOINTS"}
ANY_CHARACTERS = "p@ss:/w#rd%"


def filled_in(text: str, given: dict[str, str]) -> str:
    """`${NAME}` with its defaults and refusals, as Compose fills it in; the inmost first."""
    pattern = re.compile(r"\$\{([A-Z0-9_]+)(?:(:?[-?])([^${}]*))?\}")

    def value(found: re.Match[str]) -> str:
        name, operator, other = found[1], found[2] or "-", found[3] or ""
        is_given = bool(given.get(name)) if operator.startswith(":") else name in given
        if not is_given and operator.endswith("?"):
            raise KeyError(other)
        return given[name] if is_given else other

    while pattern.search(text):
        # What was filled in is not looked at again.
        text = pattern.sub(lambda found: value(found).replace("$", "\0"), text)
    return text.replace("\0", "$")


def environment_of(service: dict[str, Any], dotenv: dict[str, str]) -> dict[str, str]:
    """What a container of ours gets: the file, and over it what the compose file decides."""
    assert service["env_file"] == [".env"]
    return dotenv | {name: filled_in(str(value), dotenv) for name, value in service["environment"].items()}


def test_the_example_lists_every_setting():
    text = (ROOT / "llmtuner/settings.py").read_text()
    read = set(re.findall(r'env\.(?:text|flag|words|number|pairs|url)\(\s*"([A-Z0-9_]+)"', text))
    read |= set(re.findall(r'env\.url\([^)]*, "([A-Z_]+_PASSWORD)"\)', text))
    assert read - FOR_TESTS - EXAMPLE == set()


def test_compose_uses_no_variable_that_the_example_does_not_list():
    decided = set().union(*(service["environment"] for service in OURS.values()))
    asked = set(re.findall(r"\$\{([A-Z0-9_]+)", TEXT))
    assert (decided | asked) - EXAMPLE == set()


@pytest.mark.parametrize("name", OURS)
def test_compose_starts_a_safe_production(name: str, monkeypatch):
    """With the documented settings and passwords of any characters in .env, and the stores that compose itself runs."""
    stores = {"DATABASE_URL", "REDIS_URL", "DYNAMODB_ENDPOINT", "AWS_STORAGE_BUCKET_NAME"}
    dotenv = {key: value for key, value in SAFE.items() if key not in stores} | dict.fromkeys(
        ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "MINIO_ROOT_PASSWORD"), ANY_CHARACTERS
    )
    found = environment_of(OURS[name], dotenv)
    assert not problems_with(found, monkeypatch)
    assert env.database(env.url("DATABASE_URL", "", "POSTGRES_PASSWORD"))["PASSWORD"] == ANY_CHARACTERS
    assert found["AWS_SECRET_ACCESS_KEY"] == ANY_CHARACTERS


def test_aws_stores_replace_those_of_compose():
    given = {
        "SECRET_KEY": "a",
        "DATABASE_URL": "postgres://me@rds/llmtuner",
        "DYNAMODB_ENDPOINT": "",
        "AWS_S3_ENDPOINT_URL": "",
        "AWS_SECRET_ACCESS_KEY": "of-aws",
        "MINIO_ROOT_PASSWORD": "unused",
    }
    found = environment_of(OURS["web"], given)
    assert {name: found[name] for name in given} == given


SECRETS = ("SECRET_KEY", "POSTGRES_PASSWORD", "REDIS_PASSWORD", "MINIO_ROOT_PASSWORD")


@pytest.mark.parametrize("name", SECRETS)
def test_nothing_starts_without_its_secret(name: str):
    secrets = dict.fromkeys(SECRETS, "a")
    filled_in(TEXT, secrets)
    del secrets[name]
    with pytest.raises(KeyError, match=name):
        filled_in(TEXT, secrets)


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
        name: how["condition"]
        for service in services.values()
        for name, how in service.get("depends_on", {}).items()
    }
    assert all(waited_for[name] == "service_healthy" for name in healthy - {"web"})


def test_caches_are_kept_in_a_volume():
    assert all("caches:/var/cache/llmtuner" in service["volumes"] for service in OURS.values())
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert set(re.findall(r"(\w+)=/var/cache/llmtuner/", dockerfile)) == {"MODEL_CACHE_DIR", "HF_HOME"}


def test_no_secret_is_copied_into_the_image():
    assert ".env" in (ROOT / ".dockerignore").read_text().split()
