"""The whole studio on one machine: `bin/up`.

Starts Redis, the embedded DynamoDB, the web server and the workers under supervisor (which restarts what dies), makes
the tables and the owner's account, fine-tunes the bundled sample once through the same door as everybody, and keeps
serving until Ctrl-C. `--check` does all that and stops again, exit 0 if every part of it worked.

Every process is a child that dies with its parent, so nothing outlives a `kill -9` of the studio. What is configured
elsewhere (DYNAMODB_ENDPOINT, REDIS_URL) isn't started here.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import SupervisorTransport

from llmtuner.env import kept_secret

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".tools"
STOP_WORKERS_S = 45  # a worker checkpoints and gives its job back within 30 s


def worker_argv(queue: str) -> list[str]:
    """`python -m` arguments of one Celery worker. Inference and notifications only wait for others, so threads do; the
    rest run one task at a time in the main thread, since the trainer must be a child of it."""
    pool = ["-P", "threads", "-c", "16"] if queue in {"inference", "notifications"} else ["-P", "solo"]
    name = f"{queue}-{secrets.token_hex(3)}@%h"
    quiet = [
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
    ]  # workers meet in the store, not on the bell
    return ["celery", "-A", "llmtuner", "worker", "-Q", queue, "-n", name, "-l", "warning", *quiet, *pool]


class Trouble(Exception):
    """Something a person must mend; the message says what."""


# ---- what runs -----------------------------------------------------------------------------------------------------


def programs() -> Iterator[tuple[str, int, list[str], int]]:
    """(name, priority, argv, seconds to stop) in the order of starting; supervisor stops in reverse."""
    var = os.environ["VAR_DIR"]
    if "LLMTUNER_OWN_REDIS" in os.environ:
        yield "redis", 1, [str(TOOLS / "redis-server"), f"{var}/redis/redis.conf"], 10
    if "LLMTUNER_OWN_DYNAMODB" in os.environ:
        guard = str(Path(__file__).parent / "dynalite_guard.cjs")
        dynalite = [str(TOOLS / "node"), "--require", guard, str(TOOLS / "node_modules/dynalite/cli.js")]
        dynalite += ["--host", "127.0.0.1"]
        yield (
            "dynamodb",
            1,
            [*dynalite, "--port", os.environ["DYNAMODB_PORT"], "--path", f"{var}/dynamodb"],
            10,
        )
    web = [
        "uvicorn",
        "llmtuner.asgi:application",
        "--host",
        os.environ["WEB_HOST"],
        "--port",
        os.environ["WEB_PORT"],
    ]
    web += [
        "--log-level",
        "warning",
        "--no-proxy-headers",
        "--timeout-graceful-shutdown",
        "5",
        "--limit-concurrency",
        "4000",
    ]
    yield "web", 10, [sys.executable, "-m", *web], 15
    for queue in ("checks", "notifications", "training", "inference"):
        yield queue, 20, [sys.executable, "-m", *worker_argv(queue)], STOP_WORKERS_S


def dying_with_parent() -> list[str]:
    """What stands before a command so that it dies with its parent, also when that is killed. setpriv belongs to
    util-linux, which every Debian has."""
    return ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []


def write_configuration(var: Path) -> Path:
    """supervisord.conf and redis.conf; both are written anew at each start."""
    redis = var / "redis"
    redis.mkdir(parents=True, exist_ok=True)
    (redis / "redis.conf").write_text(
        f'bind 127.0.0.1\nport {os.environ["REDIS_PORT"]}\ndir {redis}\nappendonly yes\nsave ""\n'
        f"requirepass {kept_secret(var / 'redis-password')}\n"
    )
    (redis / "redis.conf").chmod(0o600)
    logs = var / "logs"
    logs.mkdir(exist_ok=True)
    parts = [
        "[supervisord]",
        f"logfile={logs}/supervisord.log",
        f"pidfile={var}/supervisord.pid",
        "nodaemon=true",
        "silent=true",
        "[unix_http_server]",
        f"file={socket_path(var)}",
        "chmod=0700",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
    ]
    for name, priority, argv, stop_s in programs():
        words = (
            word.replace("%", "%%") for word in [*dying_with_parent(), *argv]
        )  # supervisor expands %(name)s
        command = " ".join(f'"{word}"' if " " in word else word for word in words)
        parts += [
            f"[program:{name}]",
            f"command={command}",
            f"directory={ROOT}",
            f"priority={priority}",
            "autostart=false",
            "autorestart=true",
            "startsecs=1",
            "startretries=1000",
            f"stopwaitsecs={stop_s}",
            "killasgroup=true",
            "redirect_stderr=true",
            f"stdout_logfile={logs}/{name}.log",
            "stdout_logfile_maxbytes=10MB",
            "stdout_logfile_backups=2",
        ]
    path = var / "supervisord.conf"
    path.write_text("\n".join(parts) + "\n")
    path.chmod(0o600)
    return path


def socket_path(var: Path) -> Path:
    """Unix socket paths end at 107 bytes, so a deep folder gets one in the temporary folder."""
    path = var / "supervisor.sock"
    if len(str(path).encode()) < 100:
        return path
    return Path("/tmp") / f"llmtuner-{os.getuid()}-{abs(hash(str(var)))}.sock"  # noqa: S108  0700, made by supervisor


# ---- starting and stopping -----------------------------------------------------------------------------------------


class Supervisor:
    """supervisord as a child process, spoken to over its unix socket."""

    def __init__(self, configuration: Path, var: Path) -> None:
        argv = [
            *dying_with_parent(),
            sys.executable,
            "-m",
            "supervisor.supervisord",
            "-c",
            str(configuration),
            "-n",
        ]
        # A session of its own, so that Ctrl-C reaches only us and the stop is in our order.
        self.process = subprocess.Popen(argv, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        self.socket = socket_path(var)
        wait_for("supervisor", self.is_up, 15, var)
        self.names = [name for name, *_ in programs()]

    @property
    def rpc(self) -> Any:
        """A connection of its own for each call: a broken one would stay broken."""
        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport).supervisor

    def is_up(self) -> bool:
        try:
            return bool(self.rpc.getState()["statename"] == "RUNNING")
        except (OSError, xmlrpc.client.Error):
            return False

    def start(self, *names: str) -> None:
        for name in names:
            if name in self.names:
                self.rpc.startProcess(name, False)

    def stop(self) -> None:
        """Workers first, so that they can give their jobs back; then web; then the stores."""
        if self.process.poll() is None:
            order = [["checks", "notifications", "training", "inference"], ["web"], ["dynamodb", "redis"]]
            for group in order:
                for name in group:
                    if name in self.names:
                        self._quietly(self.rpc.stopProcess, name, False)
                self._wait_stopped(group)
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def _wait_stopped(self, group: list[str]) -> None:
        deadline = time.monotonic() + STOP_WORKERS_S + 5
        while time.monotonic() < deadline:
            states = self._quietly(self.rpc.getAllProcessInfo) or []
            if not any(row["name"] in group and row["pid"] for row in states):
                return
            time.sleep(0.1)

    def _quietly(self, call: Any, *args: Any) -> Any:
        try:
            return call(*args)
        except (OSError, xmlrpc.client.Error):
            return None


def wait_for(what: str, is_up: Any, seconds: float, var: Path) -> None:
    deadline = time.monotonic() + seconds
    while not is_up():
        if time.monotonic() > deadline:
            raise Trouble(f"{what} did not come up in {seconds:.0f} s. Its log: {var / 'logs'}/{what}.log")
        time.sleep(0.1)


def port_is_open(port: int, host: str = "127.0.0.1") -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def refuse_taken_ports(var: Path) -> None:
    mine = {"WEB_PORT": "web"}
    if "LLMTUNER_OWN_REDIS" in os.environ:
        mine["REDIS_PORT"] = "Redis"
    if "LLMTUNER_OWN_DYNAMODB" in os.environ:
        mine["DYNAMODB_PORT"] = "DynamoDB"
    for variable, what in mine.items():
        port = int(os.environ[variable])
        if port_is_open(port):
            raise Trouble(
                f"Port {port} is taken, so {what} can't use it. If another studio runs, stop it first; else choose "
                f"a free port: {variable}={port + 100} bin/up"
            )


def set_environment() -> Path:
    """Defaults of the embedded parts. What the person has set is left as it is."""
    env = os.environ
    env.setdefault("DJANGO_SETTINGS_MODULE", "llmtuner.settings")
    var = Path(env.setdefault("VAR_DIR", str(ROOT / "var"))).resolve()
    var.mkdir(parents=True, exist_ok=True)
    env["VAR_DIR"] = str(var)
    env.setdefault("WEB_HOST", "127.0.0.1")
    for name, port in (("WEB_PORT", "8420"), ("DYNAMODB_PORT", "8421"), ("REDIS_PORT", "8422")):
        env.setdefault(name, port)
    if "REDIS_URL" not in env:
        env["LLMTUNER_OWN_REDIS"] = "1"
        env["REDIS_URL"] = f"redis://:{kept_secret(var / 'redis-password')}@127.0.0.1:{env['REDIS_PORT']}/0"
    if "DYNAMODB_ENDPOINT" not in env:
        env["LLMTUNER_OWN_DYNAMODB"] = "1"
        env["DYNAMODB_ENDPOINT"] = f"http://127.0.0.1:{env['DYNAMODB_PORT']}"
    # `localhost`, since passkeys refuse 127.0.0.1.
    env.setdefault("PUBLIC_URL", f"http://localhost:{env['WEB_PORT']}")
    return var


# ---- the owner and the sample --------------------------------------------------------------------------------------


def make_owner(var: Path) -> str | None:
    """The local owner's account on the first start; returns the password to print, None when the account was there."""
    from allauth.account.models import EmailAddress
    from django.contrib.auth import get_user_model

    people = get_user_model().objects
    if people.exists():
        return None
    password = secrets.token_urlsafe(9)
    owner = people.create_superuser(email=OWNER_EMAIL, password=password)
    EmailAddress.objects.create(user=owner, email=OWNER_EMAIL, verified=True, primary=True)
    return password


OWNER_EMAIL = "owner@localhost.localdomain"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/up", description="Run the whole studio on this machine.")
    parser.add_argument(
        "--check", action="store_true", help="start, fine-tune the sample, stop; exit 0 if all worked"
    )
    parser.add_argument("--no-sample", action="store_true", help="don't fine-tune the bundled sample")
    options = parser.parse_args()

    started = time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `bin/up &` would have us ignore it
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda *_: sys.exit(0))
    var = set_environment()
    supervisor = None
    try:
        refuse_taken_ports(var)
        supervisor = Supervisor(write_configuration(var), var)
        supervisor.start("redis", "dynamodb")
        for own, name, port in (("REDIS", "redis", "REDIS_PORT"), ("DYNAMODB", "dynamodb", "DYNAMODB_PORT")):
            if f"LLMTUNER_OWN_{own}" in os.environ:
                wait_for(name, lambda port=port: port_is_open(int(os.environ[port])), 20, var)

        import django
        from django.core.management import call_command

        django.setup()
        from jobs.tables import create_tables

        call_command("migrate", verbosity=0)
        create_tables()
        password = make_owner(var)
        supervisor.start("web", "checks", "notifications", "training", "inference")
        wait_for("web", lambda: port_is_open(int(os.environ["WEB_PORT"])), 120, var)

        url = os.environ["PUBLIC_URL"]
        print(f"\n  LLM Tuner is up at \033[1m{url}\033[0m  ({time.monotonic() - started:.0f} s)")
        if password:
            print(
                f"  Sign in as {OWNER_EMAIL} with the password {password}  (shown once; change it on your account page)"
            )
        else:
            print(f"  Forgot the password? {Path(sys.executable)} manage.py changepassword {OWNER_EMAIL}")
        sys.stdout.flush()

        worked = True
        if not options.no_sample:
            from llmtuner.sample import run_sample

            worked = run_sample(url)
        if options.check:
            print(
                f"\n  bin/up --check: {'all worked' if worked else 'FAILED'} in {time.monotonic() - started:.0f} s"
            )
            return 0 if worked else 1
        print("\n  Serving. Ctrl-C stops everything.", flush=True)
        supervisor.process.wait()
        raise Trouble(f"supervisor stopped; its log is {var}/logs/supervisord.log")
    except Trouble as trouble:
        print(f"bin/up: {trouble}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        if supervisor:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print("  Stopping …", flush=True)
            supervisor.stop()


if __name__ == "__main__":
    sys.exit(main())
