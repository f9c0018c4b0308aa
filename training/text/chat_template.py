"""Renders chat templates in jinja2's immutable sandbox, because they come with models and are not trusted.

The sandbox keeps a template away from files, but does not stop infinite loops or memory exhaustion. In a
trainer or a report only that process fails. A server for many users renders in a child process (`Renderer`)
that the kernel stops.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_S = 1.0  # for one conversation; a normal one takes a millisecond
MEMORY_BYTES = 1 << 30  # address space of the child process
MAX_CHARS = 16_000_000  # of a rendered conversation
STOPPED = "the model's chat template took too much time or memory and was stopped"
ERRORS = (
    TemplateError,
    ArithmeticError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)


class BadTemplate(ValueError):
    """The template cannot be read, or it rejects these messages. The message is the template's own."""


class TemplateStopped(BadTemplate):
    """The template took too much time or memory and was stopped."""


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of a conversation. Raises BadTemplate."""
    try:
        text = _compiled(template).render(variables)
    except BadTemplate:
        raise
    except ERRORS as error:
        why = str(error) or type(error).__name__
        raise BadTemplate(f"the model's chat template rejects these messages: {why}") from error
    if len(text) > MAX_CHARS:
        raise BadTemplate(
            f"the model's chat template turns these messages into more than {MAX_CHARS:,} characters"
        )
    return text


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    environment: Environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _tojson
    try:
        return environment.from_string(template)
    except ERRORS as error:
        raise BadTemplate(f"the chat template cannot be read: {error}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' filter: not escaped for HTML, unlike jinja2's own."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise TemplateError(message)


# --- in a child process ----------------------------------------------------------------------------


class Renderer:
    """`render` in a child process, which is restarted after it had to be stopped. Not thread-safe."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            argv = [sys.executable, "-m", "training.text.chat_template"]
            self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self.process

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Raises BadTemplate, or TemplateStopped if the child had to be stopped."""
        answer = self._request(json.dumps([template, variables]).encode() + b"\n")
        if not answer.endswith(b"\n"):
            self.stop()
            raise TemplateStopped(STOPPED)
        response = json.loads(answer)
        if "error" in response:
            raise BadTemplate(response["error"])
        return str(response["text"])

    def _request(self, line: bytes) -> bytes:
        process = self.start()
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            return b""
        return process.stdout.readline()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin.buffer:
        template, variables = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal is not handled, so it ends the process
        try:
            response = {"text": render(template, variables)}
        except BadTemplate as error:
            response = {"error": str(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(response).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
