"""Renders chat templates in jinja2's immutable sandbox, because they come with models and are not trusted.

Templates can use everything that transformers offers them (utils/chat_template_utils.py): `{% generation %}`,
`{% break %}` and `{% continue %}`, `tojson` with its arguments, `raise_exception`, `strftime_now`.

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
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

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


Message = Mapping[str, Any]


class BadTemplate(ValueError):
    """The template cannot be read, or it rejects these messages. The message is the template's own."""


class TemplateRefused(BadTemplate):
    """The template rejects these messages on purpose (`raise_exception`), so others may be fine."""


class TemplateStopped(BadTemplate):
    """The template took too much time or memory and was stopped."""


def render(
    template: str, variables: Mapping[str, Any], now: datetime | None = None, *, dated: bool = True
) -> str:
    """The text of a conversation. Raises BadTemplate. `now` is what `strftime_now` reads, by default the
    clock; if not `dated`, templates find no `strftime_now`."""
    date = {"strftime_now": partial(_strftime, now)} if dated else {}
    try:
        text = _compiled(template).render({**variables, **date})
    except BadTemplate:
        raise
    except _Refusal as error:
        raise TemplateRefused(f"the model's chat template rejects these messages: {error}") from error
    except ERRORS as error:
        why = str(error) or type(error).__name__
        raise BadTemplate(f"the model's chat template fails on these messages: {why}") from error
    if len(text) > MAX_CHARS:
        raise BadTemplate(
            f"the model's chat template turns these messages into more than {MAX_CHARS:,} characters"
        )
    return text


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    environment: Environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
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


def _strftime(now: datetime | None, format: str) -> str:
    return (now or datetime.now()).strftime(format)


class _Refusal(TemplateError):
    """Raised by the template itself."""


def _refuse(message: str) -> None:
    raise _Refusal(message)


class _Generation(Extension):
    """`{% generation %}` marks what the model wrote. The text is written as if the tag were not there: what
    is trained on is decided in `training.text.encode`, for templates with and without it."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: variables set inside do not exist outside.
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` for templates, without the attributes of the real one."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates. Names that begin with an underscore could reach into Python."""

    def __init__(*args: Any, **values: Any) -> None:
        self, given = args[0], dict(*args[1:], **values)
        for name in given:
            _Namespace._check(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold the attribute {name!r}")


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

    def render(
        self, template: str, variables: Mapping[str, Any], now: datetime | None = None, *, dated: bool = True
    ) -> str:
        """Raises BadTemplate, or TemplateStopped if the child had to be stopped."""
        request = [template, variables, now and now.isoformat(), dated]
        answer = self._request(json.dumps(request).encode() + b"\n")
        if not answer.endswith(b"\n"):
            self.stop()
            raise TemplateStopped(STOPPED)
        response = json.loads(answer)
        if "error" in response:
            raise (TemplateRefused if response["refused"] else BadTemplate)(response["error"])
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
        template, variables, now, dated = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal is not handled, so it ends the process
        try:
            time = datetime.fromisoformat(now) if now else None
            response: dict[str, Any] = {"text": render(template, variables, time, dated=dated)}
        except BadTemplate as error:
            response = {"error": str(error), "refused": isinstance(error, TemplateRefused)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(json.dumps(response).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
