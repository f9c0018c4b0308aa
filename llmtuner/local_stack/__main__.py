"""Runs everything on one machine, for `bin/up`.

It starts Redis, the embedded DynamoDB, the web server and the workers under supervisor (which restarts processes that die),
creates the tables and the owner's account, fine-tunes the bundled sample once as an ordinary job, and serves until Ctrl-C.
`--check` does the same and then stops, with exit code 0 if everything worked.

Every process is a child that dies with its parent, so nothing survives a `kill -9` of bin/up. Stores that are configured
elsewhere (DYNAMODB_ENDPOINT, REDIS_URL) are not started here. Only one bin/up runs in a folder at a time: see `preflight.lock`.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import time
from pathlib import Path

from llmtuner.local_stack import preflight
from llmtuner.local_stack.preflight import StartupError, port_is_open
from llmtuner.local_stack.stores import start_dynamodb, start_redis, write_redis_configuration
from llmtuner.local_stack.supervisor import ROOT, Supervisor, wait_for, write_configuration

OWNER_EMAIL = "owner@localhost.localdomain"


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
        lock_file = preflight.lock(var)
        preflight.keep_private(var)
        preflight.set_environment(var)
        lock_file.truncate(0)
        lock_file.write(f"{os.getpid()} {os.environ['PUBLIC_URL']}\n")
        lock_file.flush()
        preflight.refuse_unsafe_production()
        preflight.refuse_taken_ports()
        write_redis_configuration(var)
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
