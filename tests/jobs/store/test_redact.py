"""Output of programs is made safe for a page: secrets hidden, control characters removed, long lines cut."""

from __future__ import annotations

import pytest

from jobs.store.redact import HIDDEN, MAX_CHARS, our_secrets, redact


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnopqrstuvwx",
        "sk-proj-abcdefghijklmnop1234",
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_abcdefghijklmnopqrstuvwxyz0123",
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc",
    ],
)
def test_known_kinds_of_secrets_are_hidden(secret):
    assert redact(f"before {secret} after") == f"before {HIDDEN} after"


@pytest.mark.parametrize(
    "line",
    [
        "password=hunter2hunter2",
        "AWS_SECRET_ACCESS_KEY: abcd1234efgh",
        '"api_key": "abcd1234efgh"',
        "Authorization: Bearer abcd1234efgh",
    ],
)
def test_values_named_as_secrets_are_hidden(line):
    redacted = redact(line)
    assert "hunter2" not in redacted
    assert "abcd1234" not in redacted


def test_credentials_in_a_url_are_hidden():
    assert redact("redis://:s3cret-word@127.0.0.1:6379/0") == f"redis://{HIDDEN}@127.0.0.1:6379/0"


def test_our_own_secrets_are_hidden_everywhere():
    for secret in our_secrets():
        assert secret not in redact(f"x{secret}y")


def test_ordinary_lines_are_unchanged():
    line = "step 12: loss 2.31, max_tokens=128, tokens_per_s: 1200 {'secretary': 1}"
    assert redact(line) == line


def test_terminal_codes_and_control_characters_are_removed():
    assert redact("\x1b[31mred\x1b[0m\x00\x07 text\rover") == "red textover"


def test_newlines_are_kept():
    assert "\n" in redact(
        "x\n\nid: 9999\nevent: done"
    )  # JSON escapes them, so they cannot forge a field of an event stream


@pytest.mark.parametrize("part", ["a-", "eyJ-", "password-", "://a:", "\x1b]", "secret "])
def test_redacting_takes_linear_time(part, monkeypatch):
    """Rows of a dataset can end up in the output, so a slow search could block the trainer's supervisor. The text is 20 times
    the usual limit, so that a search that is not linear exceeds the timeout of the test."""
    monkeypatch.setattr("jobs.store.redact.MAX_CHARS", 20 * MAX_CHARS)
    assert redact(part * (80 * MAX_CHARS))


def test_long_lines_are_cut():
    assert len(redact("a" * 100_000)) < MAX_CHARS + 20
