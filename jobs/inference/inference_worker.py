"""The inference worker: passes requests to one child process, `python -m training serve`, and its output to Redis.

A single thread starts the child, reads its output, and restarts it when it dies or stops responding. This thread lives as
long as the process, because the kernel kills the child when the thread that started it ends. After a restart, a request
whose prompt was being processed fails; one without any output so far is sent once more. Task threads only hand over a
request and wait.
"""

from __future__ import annotations

import contextlib
import json
import logging
import selectors
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis.exceptions
from django.conf import settings

from jobs.inference import checkpoint_models, generation, generation_queue
from jobs.registry import base_models, tuned_models
from jobs.store import access, blobs, child_process, redis_client
from training.plan import catalog
from training.plan.events import EXIT, Failure

log = logging.getLogger(__name__)
MAX_LINE_BYTES = 1 << 20  # a line with many log probabilities is long
EXPORT_S = 300
HOLD_S = 5.0  # time between two renewals of each request that this worker holds
MAX_TRIES = 2
_exporting = threading.Lock()


@dataclass
class Waiting:
    """A request that the child is working on."""

    rid: str
    message: dict[str, Any]
    done: threading.Event = field(default_factory=threading.Event)
    state: str = "sent"  # then `reading` (its prompt is being processed), then `started`
    tries: int = 1
    published: int = 1  # the number of entries in its stream; the queue wrote the first one


class ModelServer:
    """The child process and the requests that wait for it."""

    def __init__(self) -> None:
        self.child: child_process.Child | None = None
        self.ready = threading.Event()
        self.waiting: dict[str, Waiting] = {}
        self.held: dict[str, str] = {}  # the requests that this worker took, with their owners
        self.lock = threading.Lock()
        self.stopping = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="model-server", daemon=True).start()
        threading.Thread(target=self._hold, name="model-server-hold", daemon=True).start()

    def stop(self) -> None:
        self.stopping = True
        if self.child:
            self.child.kill()

    # ---- task threads

    def submit(self, rid: str, message: dict[str, Any]) -> Waiting:
        """Raises TimeoutError if the child is not ready within 30 s."""
        if not self.ready.wait(30):
            raise TimeoutError("the inference server did not start")
        waiting = Waiting(rid, {**message, "id": rid})
        with self.lock:
            self.waiting[rid] = waiting
            sent = self.child is not None and self.child.send(waiting.message)
        if not sent:
            self._fail(rid)
        return waiting

    def cancel(self, rid: str) -> None:
        with self.lock:
            if self.child and rid in self.waiting:
                self.child.send({"id": rid, "op": "cancel"})

    # ---- the server's own threads

    def _hold(self) -> None:
        """Renews this worker's holds. It also runs while a model is being fetched, which may take longer than a hold lasts."""
        while not self.stopping:
            for rid, owner in list(self.held.items()):
                with contextlib.suppress(redis.exceptions.RedisError):
                    generation_queue.hold(owner, rid)
            time.sleep(HOLD_S)

    def _run(self) -> None:
        while not self.stopping:
            try:
                self._serve_once()
            except Exception:  # the child dies with this thread, so the thread must continue
                log.exception("model server")
            self.ready.clear()
            for waiting in list(self.waiting.values()):
                if waiting.state == "sent" and waiting.tries < MAX_TRIES:
                    waiting.tries += 1  # the next child gets this request once it is ready
                else:
                    self._fail(waiting.rid)
            time.sleep(0.5)

    def _serve_once(self) -> None:
        models = str(settings.JOBS["max_warm_models"])
        child = child_process.start("serve", "--max-models", models)
        child.out.cap = MAX_LINE_BYTES
        with self.lock:
            self.child = child
        try:
            self._listen(child)
        finally:
            child.kill()  # kill the child before taking the lock, whose holder may be blocked writing to it
            with self.lock:
                self.child = None
        if not self.stopping:
            log.warning(
                "the inference server exited with code %s and will be restarted", child.process.returncode
            )

    def _listen(self, child: child_process.Child) -> None:
        """Reads until the child exits, or until it stops responding while requests wait."""
        with selectors.DefaultSelector() as selector:
            selector.register(child.out.fd, selectors.EVENT_READ, child.out)
            selector.register(child.err.fd, selectors.EVENT_READ, child.err)
            last_line_at = time.monotonic()
            while not child.out.ended:
                if not (self.waiting and self.ready.is_set()):
                    last_line_at = time.monotonic()
                elif time.monotonic() - last_line_at > settings.JOBS["server_silence_s"]:
                    log.error("the inference server stopped responding")
                    break
                for key, _ in selector.select(1):
                    lines = key.data.lines()
                    if key.data is child.out:
                        last_line_at = time.monotonic()
                        self._publish_lines(lines)
                    else:
                        for line in lines:
                            log.warning("server: %s", line[:2000])
                        if child.err.ended:
                            selector.unregister(child.err.fd)

    def _publish_lines(self, lines: list[str]) -> None:
        by_request: dict[str, list[str]] = {}
        ended: list[str] = []
        for line in lines:
            try:
                payload = json.loads(line)
            except ValueError:
                log.warning("server: %s", line[:2000])
                continue
            if payload.get("t") == "ready":
                self._send_again()
                self.ready.set()
            rid = payload.pop("id", None)
            waiting = self.waiting.get(rid)
            if waiting is None:
                continue  # the reader has disconnected
            waiting.state = "reading" if payload["t"] == "reading" else "started"
            if waiting.state == "started":
                by_request.setdefault(rid, []).append(json.dumps(payload))
            if payload.get("code") == "model_damaged":
                verify_again(Path(waiting.message["model"]))
            if payload["t"] in ("done", "error"):
                ended.append(rid)
        for rid, request_lines in by_request.items():
            self._publish(self.waiting[rid], request_lines)
        for rid in ended:
            self._end(rid)

    def _send_again(self) -> None:
        with self.lock:
            for waiting in self.waiting.values():
                if self.child:
                    self.child.send(waiting.message)

    def _fail(self, rid: str) -> None:
        waiting = self.waiting.get(rid)
        error = {"code": "server_died", "message": "The model server stopped. Try again."}
        if waiting and waiting.state == "reading":
            error = {
                "code": "prompt_failed",
                "message": "The model server stopped while it was processing this prompt. Shorten the prompt, or try again.",
            }
        if waiting:
            self._publish(waiting, [json.dumps(ERROR | error)])
        self._end(rid)

    @staticmethod
    def _publish(waiting: Waiting, lines: list[str]) -> None:
        publish(waiting.rid, lines, waiting.published)
        waiting.published += len(lines)  # counted even if they were lost, so that the reader sees the gap

    def _end(self, rid: str) -> None:
        with self.lock:
            waiting = self.waiting.pop(rid, None)
        if waiting:
            waiting.done.set()


ERROR = {"t": "error"}
DAMAGED = (
    "The model's weights are damaged and cannot be loaded. Restore them, or train or add the model again."
)
SERVER = ModelServer()


class DamagedModel(Exception):
    """The stored model cannot be read."""


def publish(rid: str, lines: list[str], after: int = 1) -> None:
    """Appends to the request's stream, whose entries are numbered without gaps. `after` is the number of existing entries.
    Best effort: without Redis, the reader cannot be reached anyway and the request expires."""
    try:
        pipe = redis_client.client().pipeline(transaction=False)
        for number, line in enumerate(lines, after + 1):
            pipe.xadd(f"tokens:{rid}", {"line": line}, id=f"{number}-0")
        pipe.expire(f"tokens:{rid}", generation_queue.STREAM_S)
        pipe.execute()
    except redis.exceptions.RedisError as error:
        log.warning("tokens of a request were lost: %s", error)


def serve_next() -> bool:
    """Takes the next request from the queue and serves it. Runs in a thread of the worker's pool. Returns False if no request
    may run now."""
    try:
        taken = generation_queue.take(settings.JOBS["max_generations_per_owner"])
    except redis.exceptions.RedisError as error:
        log.warning("the queue cannot be read: %s", error)
        return False
    if taken is None:
        return False
    began = time.monotonic()
    SERVER.held[taken.rid] = taken.owner
    try:
        serve(taken.owner, taken.rid, json.loads(taken.request))
    finally:
        del SERVER.held[taken.rid]
        with contextlib.suppress(redis.exceptions.RedisError):  # its hold expires
            generation_queue.end(taken.owner, taken.rid, time.monotonic() - began)
    return True


def serve(owner: str, rid: str, request: dict[str, Any]) -> None:
    """Serves one request until its last line."""
    try:
        folder = model_folder(owner, request["model"])
        message = {key: value for key, value in request.items() if value is not None}
        waiting = SERVER.submit(rid, message | {"op": "generate", "model": str(folder), "who": owner})
    except Exception as error:
        publish(rid, [json.dumps(ERROR | _refusal(error, rid))])
        return
    until = time.monotonic() + generation.timeout_s(len(request.get("prompts") or [1]) * request["n"])
    while not waiting.done.wait(0.5):
        if time.monotonic() > until or not is_read(rid):
            SERVER.cancel(rid)
            waiting.done.wait(10)
            SERVER._end(rid)
            return


def _refusal(error: Exception, rid: str) -> dict[str, str]:
    """An error code and the reason why a model cannot be used. Only messages meant for users are included, because other
    errors name paths, buckets and addresses."""
    match error:
        case access.NotFound():
            return {
                "code": "model_not_found",
                "message": "This model does not exist or was deleted. Choose another one.",
            }
        case blobs.Damaged() | DamagedModel():
            log.error("request %s: %s", rid, error)
            return {"code": "model_damaged", "message": DAMAGED}
        case Failure():
            log.warning("request %s: %s", rid, error)
            return {"code": "unavailable", "message": f"The model cannot be loaded. {error}"}
    log.error("request %s", rid, exc_info=error)
    return {"code": "unavailable", "message": "The model cannot be loaded. Try again in a moment."}


def is_read(rid: str) -> bool:
    try:
        return bool(redis_client.client().exists(f"reading:{rid}"))
    except redis.exceptions.RedisError:
        return True  # unknown: continue


def model_folder(owner: str, model_id: str) -> Path:
    """The model's folder on this machine, fetched if necessary. Raises access.NotFound."""
    if catalog.find(model_id):
        return base_models.folder(model_id, None)
    if added := base_models.get_added(owner, model_id):
        return base_models.folder(model_id, added.snapshot)
    if checkpoint_models.SEPARATOR in model_id:
        return checkpoint_models.folder(owner, model_id)
    model = tuned_models.get_for(owner, model_id)
    folder = tuned_models.fetch(model)
    return folder if (folder / "config.json").exists() else exported(folder)


def verify_again(folder: Path) -> None:
    """Handles a damaged local copy of a tuned model: the next request verifies every file against the stored one."""
    if folder.is_relative_to(settings.MODEL_CACHE_DIR):
        (folder / tuned_models.WHOLE).unlink(missing_ok=True)


def exported(checkpoint: Path) -> Path:
    """Exports a checkpoint to a model folder next to it, once on each machine. A checkpoint is a training state, and
    generation needs a model."""
    target = checkpoint.with_name(checkpoint.name + "-model")
    with _exporting:
        if not (target / "config.json").exists():
            child = child_process.start("export", "--checkpoint", str(checkpoint), "--to", str(target))
            output = [line for _, line in child_process.read_lines(child, EXPORT_S)]
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(10)
            child.kill()
            if child.process.returncode == EXIT["checkpoint_unreadable"]:
                raise DamagedModel(" ".join(output)[-300:])
            if child.process.returncode != 0:
                raise RuntimeError(f"the checkpoint could not be exported: {' '.join(output)[-300:]}")
    return target
