"""What must be in order before anything is started: one bin/up in the folder, safe permissions, free ports."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import IO

from llmtuner.env import stored_secret


class StartupError(Exception):
    """A problem that the user must fix. The message says how."""


def port_is_open(port: int, host: str = "127.0.0.1") -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def refuse_taken_ports() -> None:
    ports = {"WEB_PORT": "the web server"}
    if "LLMTUNER_OWN_REDIS" in os.environ:
        ports["REDIS_PORT"] = "Redis"
    if "LLMTUNER_OWN_DYNAMODB" in os.environ:
        ports["DYNAMODB_PORT"] = "DynamoDB"
    for variable, name in ports.items():
        port = int(os.environ[variable])
        if port_is_open(port):
            raise StartupError(
                f"Another program is using port {port}, which {name} needs. "
                f"Choose a free port, for example: {variable}={port + 100} bin/up"
            )


# struct flock of 64-bit Linux: type, whence, start, length, pid
FLOCK = "hhqqi0q"


def lock(var: Path) -> IO[str]:
    """Locks the folder for this process while the returned file is open. The kernel releases the lock no matter how the
    process ends, and no child inherits it. Raises StartupError, which names the process that holds the lock."""
    try:
        var.mkdir(parents=True, exist_ok=True)
        file = (var / "bin-up.lock").open("a+")
    except OSError as e:
        raise StartupError(
            f"Cannot write to {var} ({e.strerror}), where LLM Tuner keeps its data. Make the folder writable, or choose "
            f"another one: VAR_DIR=/path/to/folder bin/up"
        ) from e
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        _, _, _, _, pid = struct.unpack(
            FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0))
        )
        file.seek(0)
        # May name an earlier process if the current owner has not written it yet.
        written = file.read().split()
        address = f" at {written[1]}" if written[:1] == [str(pid)] else ""
        raise StartupError(
            f"Another bin/up is already running in {var}: process {pid}{address}. Nothing was changed. Use that one, or "
            f"stop it first by pressing Ctrl-C in its terminal or with: kill {pid}"
        ) from e
    return file


def keep_private(var: Path) -> None:
    """Closes the folder to other accounts, because it contains sessions, prompts and users' data. Earlier versions left it
    open to everyone on the machine."""
    if var.stat().st_mode & 0o077:
        try:
            var.chmod(0o700)
        except OSError as e:
            raise StartupError(
                f"Other accounts on this machine can enter {var}, and its permissions cannot be changed ({e.strerror}). "
                f"Have its owner run chmod 700 on it, or choose another folder: VAR_DIR=/path/to/folder bin/up"
            ) from e


def refuse_unsafe_production() -> None:
    from django.core.exceptions import ImproperlyConfigured

    from llmtuner import checks  # imported late because it reads the environment

    try:
        checks.refuse_unsafe_start()
    except ImproperlyConfigured as error:
        raise StartupError(str(error)) from None


def set_environment(var: Path) -> None:
    """Sets defaults for the embedded stores. Variables that are already set are not changed."""
    env = os.environ
    env.setdefault("DJANGO_SETTINGS_MODULE", "llmtuner.settings")
    env["VAR_DIR"] = str(var)
    env.setdefault("WEB_HOST", "127.0.0.1")
    for name, port in (("WEB_PORT", "8420"), ("DYNAMODB_PORT", "8421"), ("REDIS_PORT", "8422")):
        env.setdefault(name, port)
    if "REDIS_URL" not in env:
        env["LLMTUNER_OWN_REDIS"] = "1"
        env["REDIS_URL"] = f"redis://:{stored_secret(var / 'redis-password')}@127.0.0.1:{env['REDIS_PORT']}/0"
    if "DYNAMODB_ENDPOINT" not in env:
        env["LLMTUNER_OWN_DYNAMODB"] = "1"
        env["DYNAMODB_ENDPOINT"] = f"http://127.0.0.1:{env['DYNAMODB_PORT']}"
        env["DYNAMODB_SECRET"] = stored_secret(var / "dynamodb-secret")
    # `localhost`, because passkeys do not work on 127.0.0.1.
    env.setdefault("PUBLIC_URL", f"http://localhost:{env['WEB_PORT']}")
