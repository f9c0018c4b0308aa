"""Environment variables are parsed into their types, and invalid values are reported."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from llmtuner import env
from tests import services


def test_each_job_setting_can_be_changed(monkeypatch):
    monkeypatch.setenv("JOBS_LEASE_S", "12.5")
    monkeypatch.setenv("JOBS_MAX_ATTEMPTS", "4")
    assert env.numbers("JOBS", {"lease_s": 30.0, "max_attempts": 10, "chunk_s": 1.0}) == {
        "lease_s": 12.5,
        "max_attempts": 4,
        "chunk_s": 1.0,
    }


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("yes", True), ("off", False), ("", True)])
def test_flags_are_parsed(monkeypatch, value: str, expected: bool):
    monkeypatch.setenv("FLAG", value)
    assert env.flag("FLAG", default=True) is expected


@pytest.mark.parametrize(
    ("name", "value", "reader"),
    [
        ("DEBUG", "maybe", lambda: env.flag("DEBUG")),
        ("WEB_PORT", "http", lambda: env.number("WEB_PORT", 8420)),
        ("BASE_MODEL_ALIASES", "gpt2", lambda: env.pairs("BASE_MODEL_ALIASES")),
    ],
)
def test_an_invalid_value_is_reported_with_its_variable(monkeypatch, name: str, value: str, reader):
    monkeypatch.setenv(name, value)
    with pytest.raises(env.BadEnvironment, match=name):
        reader()


def test_database_urls_are_parsed():
    assert env.database("sqlite:////var/lib/db.sqlite3")["NAME"] == "/var/lib/db.sqlite3"
    result = env.database("postgres://kim:p%40ss@db:5433/tuner?sslmode=require")
    assert (result["USER"], result["PASSWORD"], result["HOST"], result["PORT"]) == (
        "kim",
        "p@ss",
        "db",
        "5433",
    )
    assert result["OPTIONS"] == {"sslmode": "require", "connect_timeout": "5"}
    with pytest.raises(env.BadEnvironment, match="mysql"):
        env.database("mysql://db/tuner")


ANY_CHARACTERS = "p@ss:/w#rd%"


@pytest.mark.parametrize(
    ("name", "password", "url", "in_url"),
    [
        (
            "DATABASE_URL",
            "POSTGRES_PASSWORD",
            "postgres://tuner@db:5432/tuner?sslmode=require",
            "tuner:{}@db:5432",
        ),
        ("REDIS_URL", "REDIS_PASSWORD", "redis://redis:6379/0", ":{}@redis:6379"),
        ("EMAIL_URL", "EMAIL_PASSWORD", "smtp+tls://kim@mail.example.com:587", "kim:{}@mail.example.com:587"),
    ],
)
def test_a_password_may_contain_any_character(monkeypatch, name: str, password: str, url: str, in_url: str):
    monkeypatch.setenv(name, url)
    monkeypatch.setenv(password, ANY_CHARACTERS)
    result = env.url(name, "", password)
    assert urlsplit(result).netloc == in_url.format("p%40ss%3A%2Fw%23rd%25")
    if name == "DATABASE_URL":
        assert env.database(result)["PASSWORD"] == ANY_CHARACTERS
    if name == "EMAIL_URL":
        assert env.mail(result)["EMAIL_HOST_PASSWORD"] == ANY_CHARACTERS
    monkeypatch.setenv(password, "another")
    monkeypatch.setenv(name, result)
    assert env.url(name, "", password) == result  # the password in the URL takes precedence

    monkeypatch.setenv(name, f"redis://:{ANY_CHARACTERS}@redis:6379/0")
    with pytest.raises(env.BadEnvironment, match=f"{name}.*{password}"):
        env.url(name, "", password)


def test_redis_and_celery_accept_such_a_password(monkeypatch, tmp_path):
    import kombu
    import redis

    monkeypatch.setattr(services, "REDIS_PASSWORD", ANY_CHARACTERS)
    service = services.redis(tmp_path).start()
    try:
        monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{service.port}/0")
        monkeypatch.setenv("REDIS_PASSWORD", ANY_CHARACTERS)
        url = env.url("REDIS_URL", "", "REDIS_PASSWORD")
        with redis.Redis.from_url(url) as client:
            assert client.ping()
        with kombu.Connection(url) as connection:
            connection.ensure_connection(max_retries=1)
            connection.default_channel.client.ping()
    finally:
        service.kill()


def test_email_urls_are_parsed():
    result = env.mail("smtp+tls://kim%40x:secret@mail.example.com")
    assert result["EMAIL_PORT"] == 587
    assert result["EMAIL_USE_TLS"]
    assert result["EMAIL_HOST_USER"] == "kim@x"
    with pytest.raises(env.BadEnvironment, match="EMAIL_URL"):
        env.mail("mail.example.com")
