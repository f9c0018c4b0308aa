"""Reading the environment: typed, and clear about what is wrong."""

from __future__ import annotations

import pytest

from llmtuner import env


def test_each_number_of_the_job_life_can_be_changed(monkeypatch):
    monkeypatch.setenv("JOBS_LEASE_S", "12.5")
    monkeypatch.setenv("JOBS_MAX_ATTEMPTS", "4")
    assert env.numbers("JOBS", {"lease_s": 30.0, "max_attempts": 10, "chunk_s": 1.0}) == {
        "lease_s": 12.5,
        "max_attempts": 4,
        "chunk_s": 1.0,
    }


@pytest.mark.parametrize(("value", "read"), [("1", True), ("yes", True), ("off", False), ("", True)])
def test_flags(monkeypatch, value: str, read: bool):
    monkeypatch.setenv("FLAG", value)
    assert env.flag("FLAG", default=True) is read


@pytest.mark.parametrize(
    ("name", "value", "reader"),
    [
        ("DEBUG", "maybe", lambda: env.flag("DEBUG")),
        ("WEB_PORT", "http", lambda: env.number("WEB_PORT", 8420)),
        ("BASE_MODEL_ALIASES", "gpt2", lambda: env.pairs("BASE_MODEL_ALIASES")),
    ],
)
def test_a_bad_value_is_named(monkeypatch, name: str, value: str, reader):
    monkeypatch.setenv(name, value)
    with pytest.raises(env.BadEnvironment, match=name):
        reader()


def test_databases():
    assert env.database("sqlite:////var/lib/db.sqlite3")["NAME"] == "/var/lib/db.sqlite3"
    found = env.database("postgres://kim:p%40ss@db:5433/tuner?sslmode=require")
    assert (found["USER"], found["PASSWORD"], found["HOST"], found["PORT"]) == ("kim", "p@ss", "db", "5433")
    assert found["OPTIONS"] == {"sslmode": "require"}
    with pytest.raises(env.BadEnvironment, match="mysql"):
        env.database("mysql://db/tuner")


def test_mail():
    found = env.mail("smtp+tls://kim%40x:secret@mail.example.com")
    assert found["EMAIL_PORT"] == 587
    assert found["EMAIL_USE_TLS"]
    assert found["EMAIL_HOST_USER"] == "kim@x"
    with pytest.raises(env.BadEnvironment, match="EMAIL_URL"):
        env.mail("mail.example.com")
