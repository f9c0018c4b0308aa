"""Runs everything on one machine, for `bin/up`.

It starts Redis, the embedded DynamoDB, the web server and the workers under supervisor (which restarts processes that die),
creates the tables and the owner's account, fine-tunes the bundled sample once as an ordinary job, and serves until Ctrl-C.
`--check` does the same and then stops, with exit code 0 if everything worked.

Every process is a child that dies with its parent, so none survives a `kill -9` of bin/up. Stores that run elsewhere
(DYNAMODB_ENDPOINT, REDIS_URL) are not started. Only one bin/up can run in a folder at a time: see `lock`.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import redis
from supervisor.xmlrpc import SupervisorTransport

from llmtuner.env import stored_secret
from llmtuner.processes import QUEUES

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".tools"
STOP_WORKERS_S = 45  # a worker writes a checkpoint and releases its job within 30 s


class StartupError(Exception):
    """A problem that the user must fix. The message says how."""


# ---- processes -----------------------------------------------------------------------------------------------------


def programs() -> Iterator[tuple[str, int, list[str], int]]:
    """(name, priority, argv, seconds to stop) in start order; supervisor stops them in reverse."""
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
    yield "web", 10, [sys.executable, "-m", "llmtuner", "web"], 15
    for queue in QUEUES:
        yield queue, 20, [sys.executable, "-m", "llmtuner", "worker", queue], STOP_WORKERS_S


def die_with_parent_prefix() -> list[str]:
    """A prefix that makes a command die with its parent, even if the parent is killed. setpriv is part of util-linux, which
    every Debian has."""
    return ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []


def write_configuration(var: Path) -> Path:
    """Writes supervisord.conf and redis.conf. Called at every start."""
    write_redis_configuration(var)
    logs = var / "logs"
    logs.mkdir(exist_ok=True)
    lines = [
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
        # supervisor expands %(name)s
        escaped = [argument.replace("%", "%%") for argument in [*die_with_parent_prefix(), *argv]]
        command = " ".join(f'"{argument}"' if " " in argument else argument for argument in escaped)
        lines += [
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
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return path


def write_redis_configuration(var: Path) -> None:
    folder = var / "redis"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "redis.conf").write_text(
        f'bind 127.0.0.1\nport {os.environ["REDIS_PORT"]}\ndir {folder}\nappendonly yes\nsave ""\n'
        f"requirepass {stored_secret(var / 'redis-password')}\n"
    )
    (folder / "redis.conf").chmod(0o600)


def socket_path(var: Path) -> Path:
    """The path of supervisor's socket. Unix socket paths are limited to 107 bytes, so if the path of `var` is too long, the
    socket is in the temporary folder."""
    path = var / "supervisor.sock"
    if len(str(path).encode()) < 100:
        return path
    return Path("/tmp") / f"llmtuner-{os.getuid()}-{abs(hash(str(var)))}.sock"  # noqa: S108  supervisor creates it with mode 0700


# ---- start and stop -----------------------------------------------------------------------------------------


class Supervisor:
    """A supervisord child process, controlled through its Unix socket."""

    def __init__(self, configuration: Path, var: Path) -> None:
        argv = [
            *die_with_parent_prefix(),
            sys.executable,
            "-m",
            "llmtuner.supervisord",
            "-c",
            str(configuration),
            "-n",
        ]
        # In its own session, so that Ctrl-C reaches only this process, which stops the others in order.
        self.process = subprocess.Popen(argv, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        self.socket = socket_path(var)
        self.names = [name for name, *_ in programs()]
        self.pids: dict[str, int] = {}
        try:
            wait_for("supervisord", self.is_up, 15, var)
        except BaseException:
            self.process.kill()
            raise

    @property
    def rpc(self) -> Any:
        """A new connection for each call: a broken one would stay broken."""
        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport).supervisor

    def is_up(self) -> bool:
        try:
            # The socket may belong to another supervisord, whose processes we must neither start nor stop.
            return bool(
                self.rpc.getPID() == self.process.pid and self.rpc.getState()["statename"] == "RUNNING"
            )
        except (OSError, xmlrpc.client.Error):
            return False

    def start(self, *names: str) -> None:
        for name in names:
            if name in self.names:
                self.rpc.startProcess(name, False)
                self.pids[name] = self.rpc.getProcessInfo(name)["pid"]

    def has_exited(self, name: str) -> bool:
        """Whether the process that `start` started has exited, even if supervisor has started another one since."""
        return bool(self.rpc.getProcessInfo(name)["pid"] != self.pids[name])

    def stop_one(self, name: str) -> None:
        self._quietly(self.rpc.stopProcess, name, True)

    def stop(self) -> None:
        """Stops the workers first, so that they can put their jobs back into the queue, then the web server, then the stores."""
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


def wait_for(name: str, is_up: Any, seconds: float, var: Path) -> None:
    deadline = time.monotonic() + seconds
    while not is_up():
        if time.monotonic() > deadline:
            raise StartupError(
                f"{name} did not start within {seconds:.0f} s. Its log: {var / 'logs'}/{name}.log"
            )
        time.sleep(0.1)


def port_is_open(port: int, host: str = "127.0.0.1") -> bool:
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False


def redis_answers() -> bool:
    """Whether our Redis is ready. An open port is not enough: Redis opens it before it has loaded its data, and the port may
    be another Redis server's."""
    try:
        with redis.Redis.from_url(
            os.environ["REDIS_URL"], socket_timeout=1, socket_connect_timeout=1
        ) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def start_redis(supervisor: Supervisor, var: Path) -> None:
    """Starts Redis, with empty data if it cannot read its file.

    Redis repairs a file with a truncated end, but exits if the file is damaged in the middle. None of its data is essential,
    because DynamoDB has everything that is queued. So the damaged file is moved away and Redis starts empty."""

    def started() -> bool:
        supervisor.start("redis")
        wait_for("redis", lambda: redis_answers() or supervisor.has_exited("redis"), 120, var)
        return not supervisor.has_exited("redis")

    if "redis" not in supervisor.names or started():
        return
    supervisor.stop_one("redis")
    folder, aside = var / "redis", var / time.strftime("redis-damaged-%Y%m%d-%H%M%S")
    folder.rename(aside)
    write_redis_configuration(var)
    if not started():  # the data file was not the cause
        supervisor.stop_one("redis")
        shutil.rmtree(folder)
        aside.rename(folder)
        raise StartupError(f"Redis did not start. Its log: {var}/logs/redis.log")
    print(
        f"\n  Redis could not read its data, so it started empty. No work is lost: jobs and datasets are stored elsewhere.\n"
        f"  The damaged data was moved to {aside}",
        flush=True,
    )


def start_dynamodb(supervisor: Supervisor, var: Path) -> None:
    if "dynamodb" not in supervisor.names:
        return
    supervisor.start("dynamodb")
    port = int(os.environ["DYNAMODB_PORT"])
    wait_for("dynamodb", lambda: port_is_open(port) or supervisor.has_exited("dynamodb"), 20, var)
    if supervisor.has_exited("dynamodb"):
        raise StartupError(f"DynamoDB did not start. Its log: {var}/logs/dynamodb.log")


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


# ---- the owner and the sample --------------------------------------------------------------------------------------


def make_owner(var: Path) -> str | None:
    """Creates the local owner's account on the first start. Returns the password to print, or None if there are users."""
    from allauth.account.models import EmailAddress
    from django.contrib.auth import get_user_model

    users = get_user_model().objects
    if users.exists():
        return None
    password = secrets.token_urlsafe(9)
    owner = users.create_superuser(email=OWNER_EMAIL, password=password)
    EmailAddress.objects.create(user=owner, email=OWNER_EMAIL, verified=True, primary=True)
    return password


OWNER_EMAIL = "owner@localhost.localdomain"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/up", description="Run LLM Tuner on this machine.")
    parser.add_argument(
        "--check",
        action="store_true",
        help="start, fine-tune the sample, and stop; exit 0 if everything worked",
    )
    parser.add_argument("--no-sample", action="store_true", help="do not fine-tune the bundled sample")
    options = parser.parse_args()

    started = time.monotonic()
    os.umask(0o077)  # inherited by every process, so that only this account can read their files
    # Started with `bin/up &`, the shell makes us ignore this signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda *_: sys.exit(0))
    var = Path(os.environ.get("VAR_DIR") or ROOT / "var").resolve()
    supervisor = None
    try:
        lock_file = lock(var)
        keep_private(var)
        set_environment(var)
        lock_file.truncate(0)
        lock_file.write(f"{os.getpid()} {os.environ['PUBLIC_URL']}\n")
        lock_file.flush()
        refuse_unsafe_production()
        refuse_taken_ports()
        supervisor = Supervisor(write_configuration(var), var)
        start_redis(supervisor, var)
        start_dynamodb(supervisor, var)

        import django
        from django.core.management import call_command

        django.setup()
        from jobs.store.tables import create_tables

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
                f"\n  bin/up --check: {'everything worked' if worked else 'FAILED'} in {time.monotonic() - started:.0f} s"
            )
            return 0 if worked else 1
        print("\n  Serving. Ctrl-C stops everything.", flush=True)
        supervisor.process.wait()
        raise StartupError(f"supervisor stopped unexpectedly. Its log: {var}/logs/supervisord.log")
    except StartupError as error:
        print(f"bin/up: {error}", file=sys.stderr)
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
