"""The command lines of all processes: `python -m llmtuner web` and `python -m llmtuner worker QUEUE`.

bin/up, docker compose, the tests and the documentation all use these two commands.
"""

from __future__ import annotations

import argparse
import os
import resource
import secrets

QUEUES = ("checks", "notifications", "training", "inference")
OPEN_FILES = 16384  # many systems default to 1024, fewer than the connections the web server accepts


def web_arguments() -> list[str]:
    """For uvicorn."""
    return [
        "llmtuner.asgi:application",
        *("--host", os.environ.get("WEB_HOST") or "127.0.0.1"),
        *("--port", os.environ.get("WEB_PORT") or "8420"),
        *("--http", "llmtuner.connections:LimitedProtocol", "--ws", "none"),
        *("--log-level", "warning"),
        "--no-proxy-headers",  # uvicorn would trust X-Forwarded-For from this machine; see TRUSTED_PROXY_COUNT
        *("--timeout-graceful-shutdown", "5"),
        *("--limit-concurrency", "4000"),
    ]


def worker_arguments(queue: str) -> list[str]:
    """Arguments for Celery. Inference and notifications mostly wait for I/O, so they use threads. The other queues run one task
    at a time in the main thread, because the trainer must be a child of that thread."""
    return [
        *("-A", "llmtuner", "worker", "-Q", queue),
        *("-n", f"{queue}-{secrets.token_hex(3)}@%h"),
        *("-l", "warning"),
        *(("-P", "threads", "-c", "16") if queue in {"inference", "notifications"} else ("-P", "solo")),
        # Workers are recorded in DynamoDB, so they do not need Celery's messages to find each other.
        *("--without-gossip", "--without-mingle", "--without-heartbeat"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m llmtuner", description="Run one LLM Tuner process.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("web", help="the web server, at WEB_HOST and WEB_PORT")
    worker = kinds.add_parser("worker", help="a worker for one queue")
    worker.add_argument("queue", choices=QUEUES)
    options = parser.parse_args()
    if options.kind == "web":
        raise_open_files_limit()
        from uvicorn.main import main as uvicorn

        uvicorn.main(args=web_arguments(), prog_name="uvicorn")
    else:
        from celery.bin.celery import celery

        celery.main(args=worker_arguments(options.queue), prog_name="celery")


def raise_open_files_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    target = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < target:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
