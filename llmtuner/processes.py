"""The command line of every process, defined once: `python -m llmtuner web` and `python -m llmtuner worker QUEUE`.

bin/up, docker compose, the tests and the documentation all start the studio's processes by these two.
"""

from __future__ import annotations

import argparse
import os
import resource
import secrets

QUEUES = ("checks", "notifications", "training", "inference")
OPEN_FILES = 16384  # many systems allow 1024 unless asked, fewer than the connections that web accepts


def web_arguments() -> list[str]:
    """For uvicorn."""
    return [
        "llmtuner.asgi:application",
        *("--host", os.environ.get("WEB_HOST") or "127.0.0.1"),
        *("--port", os.environ.get("WEB_PORT") or "8420"),
        *("--http", "llmtuner.connections:BoundedProtocol", "--ws", "none"),
        *("--log-level", "warning"),
        "--no-proxy-headers",  # uvicorn would believe X-Forwarded-For from this machine; see TRUSTED_PROXY_COUNT
        *("--timeout-graceful-shutdown", "5"),
        *("--limit-concurrency", "4000"),
    ]


def worker_arguments(queue: str) -> list[str]:
    """For Celery. Inference and notifications mostly wait for others, so threads do; the rest run one task at a time in
    the main thread, since the trainer must be a child of it."""
    return [
        *("-A", "llmtuner", "worker", "-Q", queue),
        *("-n", f"{queue}-{secrets.token_hex(3)}@%h"),
        *("-l", "warning"),
        *(("-P", "threads", "-c", "16") if queue in {"inference", "notifications"} else ("-P", "solo")),
        # Workers find out about each other in DynamoDB, so they need no messages over Redis for it.
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llmtuner", description="Run one process of the studio.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("web", help="the web server, at WEB_HOST and WEB_PORT")
    worker = kinds.add_parser("worker", help="a worker of one queue")
    worker.add_argument("queue", choices=QUEUES)
    options = parser.parse_args()
    if options.kind == "web":
        allow_open_files()
        from uvicorn.main import main as uvicorn

        uvicorn.main(args=web_arguments(), prog_name="uvicorn")
    else:
        from celery.bin.celery import celery

        celery.main(args=worker_arguments(options.queue), prog_name="celery")


def allow_open_files() -> None:
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
