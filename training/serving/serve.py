"""The server: requests as JSON lines on standard input, tokens as JSON lines on standard output.

    python -m training serve [--max-models 3] [--max-bytes 4000000000] [--max-sequences 16]

    in   {"id", "op": "generate", "model": "/abs/folder", "prompt" | "prompts" | "messages" | "conversation": …,
          "who": …, "max_tokens", …}
         {"id", "op": "cancel"} · {"id", "op": "load" | "unload", "model"} · {"op": "status"}
    out  {"t": "ready"} · {"t": "alive"} every 5 s while there is work · {"id", "t": "reading"} before a prompt is read
         {"id", "t": "start", "prompt_tokens"} · {"id", "t": "token", "index", "text", …}
         {"id", "t": "done", "choices", "usage"} · {"id", "t": "error", "code", "message"} · {"t": "status", …}

One thread reads, one loads models, and the main one generates. Each pass advances all sequences of a model
together; waiting requests join between two passes (continuous batching). Users (`who`) take turns, so one
user's hundred requests do not delay another user's single one. A request with many `prompts` (texts or lists
of token ids) starts them one by one; choice i of prompt k has the index k * n + i. Chat templates are
rendered in a child process. The server ends when its input ends, and so with the process that started it.

"conversation" is {"messages", "tools"}, for conversations with tools. A server that does not know it refuses the
request, because it has no prompt, instead of answering as if there were no tools. Calls in an answer are not part
of its text. Its choice in "done" has them: {"index", "finish_reason": "tool_calls", "tool_calls": [{"name",
"arguments"}]}, the arguments as JSON text.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from training.models.generate import (
    GenerateError,
    GenerateOptions,
    TextSequence,
    Token,
    advance,
    check_length,
    open_sequences,
    prompt_ids,
)
from training.serving.warm_models import Loaded, ModelCache
from training.text.chat_template import STOPPED, Renderer
from training.text.tokenizer import TemplateTooSlow, TokenizerError

# a request (JSON may triple the 4 MB that /v1 takes); a longer line is refused and skipped
MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_WAITING = 256  # waiting requests; more are refused as busy
MAX_N, MAX_LOGPROBS, MAX_STOPS, MAX_STOP_CHARS = 8, 20, 16, 200
MAX_TOKENS = 1_000_000
MAX_PROMPTS = 128
ALIVE_S = 5.0
CHAT_BLOCK_S = (
    60  # after a template had to be stopped, the user's chats with that model are refused this long
)


@dataclass
class Request:
    id: str
    who: str
    model: str
    prompts: list[Any]  # texts, lists of token ids, or one conversation
    options: GenerateOptions
    ids: list[list[int]] = field(default_factory=list)  # token ids of all prompts, once encoded
    opened: int = 0  # prompts whose sequences were started
    sequences: list[TextSequence] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return self.opened == len(self.prompts) and all(s.finish_reason for s in self.sequences)


class Server:
    def __init__(self, models: ModelCache, max_sequences: int) -> None:
        self.models, self.max_sequences = models, max_sequences
        self.share = max(1, max_sequences // 2)  # a single user never has more than half of the sequences
        self.waiting: OrderedDict[str, deque[Request]] = OrderedDict()  # by user, next in turn first
        self.active: dict[str, Request] = {}
        self.loads: dict[str, str] = {}  # ids of `load` requests by folder
        self.renderer = Renderer()
        self.chat_blocked_until: dict[tuple[str, str], float] = {}  # (user, model) -> until when

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.active or self.loads)

    # --- requests coming in ---------------------------------------------------------------------

    def handle_line(self, line: bytes) -> None:
        """Handles one line of input."""
        try:
            message = json.loads(line)
            if not isinstance(message, dict):
                raise ValueError("not an object")
        except ValueError:
            return write_line(
                {"t": "error", "code": "bad_request", "message": "a request is one JSON object per line"}
            )
        try:
            self._dispatch(message)
        except GenerateError as error:
            write_error(str(message.get("id", "")), error)

    def _dispatch(self, message: Mapping[str, Any]) -> None:
        op, request_id, model = message.get("op"), str(message.get("id", "")), str(message.get("model", ""))
        if op == "generate":
            self._queue(parse(message))
        elif op == "cancel":
            self._cancel(request_id)
        elif op == "load":
            self.loads[model] = request_id
        elif op == "unload":
            write_line({"id": request_id, "t": "unloaded", "model": model, "done": self.models.unload(model)})
        elif op == "status":
            write_line({"t": "status", **self.status()})
        else:
            raise GenerateError("bad_request", f"unknown op {op!r}")

    def status(self) -> dict[str, Any]:
        return {
            "active": len(self.active),
            "sequences": self._running(),
            "waiting": sum(map(len, self.waiting.values())),
            "models": [
                {"model": f, "bytes": m.bytes, "users": m.users} for f, m in self.models.loaded.items()
            ],
        }

    def _queue(self, request: Request) -> None:
        if request.id in self.active or any(
            r.id == request.id for line in self.waiting.values() for r in line
        ):
            raise GenerateError("bad_request", "this id is in use")
        if sum(map(len, self.waiting.values())) >= MAX_WAITING:
            raise GenerateError("busy", "too many requests are waiting. Try again in a moment")
        self.waiting.setdefault(request.who, deque()).append(request)

    def _cancel(self, request_id: str) -> None:
        if request := self.active.get(request_id):
            for sequence in request.sequences:
                sequence.finish_reason = sequence.finish_reason or "cancelled"
            return self._close(request)
        for line in list(self.waiting.values()):
            for request in [r for r in line if r.id == request_id]:
                self._no_longer_waiting(request)
                write_done(request)
        return None

    def _no_longer_waiting(self, request: Request) -> None:
        line = self.waiting.get(request.who)
        if line and request in line:
            line.remove(request)
            if not line:
                del self.waiting[request.who]

    # --- work -----------------------------------------------------------------------------------

    def work(self) -> bool:
        """Admits requests and generates one token for each sequence. False if there was nothing to do."""
        for folder, request_id in list(self.loads.items()):
            self._finish_load(folder, request_id)
        self._admit()
        for folder in {request.model for request in self.active.values()}:
            self._advance(folder)
        return bool(self.active)

    def _finish_load(self, folder: str, request_id: str) -> None:
        try:
            model = self.models.get(folder)
        except GenerateError as error:
            del self.loads[folder]
            return write_error(request_id, error)
        if model is not None:
            del self.loads[folder]
            write_line({"id": request_id, "t": "loaded", "model": folder, "bytes": model.bytes})
        return None

    def _admit(self) -> None:
        """Admits from each user in turn the oldest request that fits; users who were served go to the end
        of the line."""
        for who in list(self.waiting):
            line = self.waiting[who]
            request = line[0]
            if self._running(who) + request.options.n > self.share:
                continue
            if self._running() + request.options.n > self.max_sequences:
                return  # no overtaking: capacity frees up until a large request fits
            try:
                model = self.models.get(request.model)
                if model is None:
                    continue  # still loading; others do not wait for it
                self._start(request, model)
            except GenerateError as error:
                self._close(request, error)
            except RuntimeError as error:  # includes torch's own errors, such as out of memory
                self._close(request, GenerateError("failed", f"reading the prompt failed: {error}"))
            if request.opened == len(request.prompts):
                self._no_longer_waiting(request)
            if who in self.waiting:
                self.waiting.move_to_end(who)

    def _running(self, who: str | None = None) -> int:
        requests = [r for r in self.active.values() if who is None or r.who == who]
        return sum(s.finish_reason is None for r in requests for s in r.sequences)

    def _start(self, request: Request, model: Loaded) -> None:
        """Starts the next prompt of a request. All prompts are encoded before the first, so a request is
        refused as a whole."""
        # sent first, so that it is known whose prompt was being read if the server dies
        write_line({"id": request.id, "t": "reading"})
        if request.id not in self.active:
            request.ids = [self._read(prompt, request, model) for prompt in request.prompts]
            for ids in request.ids:
                check_length(len(ids), model.decoder.context, request.options)
            model.users += 1
            self.active[request.id] = request
            write_line({"id": request.id, "t": "start", "prompt_tokens": sum(map(len, request.ids))})
        first = request.opened * request.options.n
        options = request.options
        if is_conversation(request.prompts[request.opened]):
            options = replace(options, stop=(*options.stop, *model.tokenizer.ends.texts))
        sequences = open_sequences(
            model.decoder,
            model.tokenizer,
            request.ids[request.opened],
            options,
            first,
            model.call_form if options.tools else None,
        )
        request.opened += 1
        request.sequences += sequences
        for sequence in sequences:
            for token in sequence.prompt_tokens:
                write_token(request, token)
            sequence.prompt_tokens = []
        if request.is_done:
            self._close(request)

    def _read(self, prompt: Any, request: Request, model: Loaded) -> list[int]:
        """A prompt's token ids. All users wait while a template has to be stopped, so it is not tried
        again right away."""
        key, now = (request.who, request.model), time.monotonic()
        if is_conversation(prompt) and now < self.chat_blocked_until.get(key, 0):
            raise GenerateError(
                "bad_request", f"{STOPPED}. Send a prompt instead of messages, or wait a minute"
            )
        model.tokenizer.render = self.renderer.render
        try:
            return prompt_ids(prompt, model.tokenizer, request.options.tools)
        except TokenizerError as refusal:
            if isinstance(refusal, TemplateTooSlow):
                self.chat_blocked_until = {
                    other: until for other, until in self.chat_blocked_until.items() if now < until
                }
                self.chat_blocked_until[key] = now + CHAT_BLOCK_S
            raise GenerateError("bad_request", str(refusal)) from refusal

    def _advance(self, folder: str) -> None:
        requests = [r for r in self.active.values() if r.model == folder]
        owner = {id(s): r for r in requests for s in r.sequences}
        live = [s for r in requests for s in r.sequences if s.finish_reason is None]
        try:
            advance(
                self.models.loaded[folder].decoder, live, lambda s, token: write_token(owner[id(s)], token)
            )
        # includes torch's own errors, such as out of memory: these requests fail, but the server continues
        except RuntimeError as error:
            for request in requests:
                self._close(request, GenerateError("failed", f"generation failed: {error}"))
        for request in requests:
            if request.id in self.active and request.is_done:
                self._close(request)

    def _close(self, request: Request, error: GenerateError | None = None) -> None:
        self._no_longer_waiting(request)
        if self.active.pop(request.id, None):
            self.models.loaded[request.model].users -= 1
        if error is not None:
            write_error(request.id, error)
        else:
            write_done(request)


# --- the protocol ----------------------------------------------------------------------------------


def parse(message: Mapping[str, Any]) -> Request:
    """A request from its message. Raises GenerateError, which names the invalid field."""
    if not message.get("id"):
        raise GenerateError("bad_request", "a request needs an id")
    prompts = _prompts(message)
    conversation = message.get("conversation")
    tools = () if conversation is None else _tools(conversation)
    stop = message.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(s, str) for s in stop):
        raise GenerateError("bad_request", f"stop must be a string or a list of up to {MAX_STOPS} strings")
    if any(len(s) > MAX_STOP_CHARS for s in stop):
        raise GenerateError("bad_request", f"a stop string can have at most {MAX_STOP_CHARS} characters")
    options = GenerateOptions(
        max_tokens=int(_number(message, "max_tokens", 0, MAX_TOKENS)),
        temperature=_number(message, "temperature", 0, 2),
        top_p=_number(message, "top_p", 0, 1),
        top_k=int(_number(message, "top_k", 0, 1_000_000)),
        min_p=_number(message, "min_p", 0, 1),
        repetition_penalty=_number(message, "repetition_penalty", 0.01, 2),
        stop=tuple(stop),
        seed=None if message.get("seed") is None else int(_number(message, "seed", -(2**63), 2**63)),
        n=int(_number(message, "n", 1, MAX_N)),
        logprobs=None
        if message.get("logprobs") is None
        else int(_number(message, "logprobs", 0, MAX_LOGPROBS)),
        echo=bool(message.get("echo")),
        tools=tools,
    )
    who, model = str(message.get("who", "")), str(message.get("model", ""))
    return Request(str(message["id"]), who, model, prompts, options)


def _prompts(message: Mapping[str, Any]) -> list[Any]:
    """A conversation, one prompt or many. Token ids are validated once the model is loaded."""
    conversation = message.get("conversation")
    messages = conversation.get("messages") if isinstance(conversation, dict) else message.get("messages")
    if messages is not None:
        prompts = [messages]
        good = is_conversation(messages)
    else:
        prompts = message["prompts"] if message.get("prompts") is not None else [message.get("prompt")]
        good = isinstance(prompts, list) and all(map(is_prompt, prompts)) and 0 < len(prompts) <= MAX_PROMPTS
    if not good:
        raise GenerateError(
            "bad_request",
            "send a prompt (text or token ids), "
            f"prompts (up to {MAX_PROMPTS} of them) or messages (a list of objects)",
        )
    return prompts


def _tools(conversation: Any) -> tuple[dict[str, Any], ...]:
    tools = conversation.get("tools") or [] if isinstance(conversation, dict) else None
    if not is_conversation(tools):
        raise GenerateError("bad_request", "tools must be a list of objects")
    return tuple(tools or ())


def is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)


def is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and all(type(token_id) is int for token_id in prompt)
    return isinstance(prompt, str)


DEFAULTS = {f.name: f.default for f in fields(GenerateOptions)}


def _number(message: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = message.get(name)
    value = DEFAULTS[name] if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise GenerateError("bad_request", f"{name} must be a number from {low} to {high}")
    return value


def write_token(request: Request, token: Token) -> None:
    line: dict[str, Any] = {"id": request.id, "t": "token", "index": token.index, "text": token.text}
    if request.options.logprobs is not None:
        line |= {"token": token.token, "logprob": token.logprob, "top": token.top}
    elif not token.text:
        return  # nothing to show yet
    else:
        line["token"] = token.token
    write_line(line)


def write_done(request: Request) -> None:
    written = sum(len(s.ids) for s in request.sequences)
    read = sum(map(len, request.ids))
    write_line(
        {
            "id": request.id,
            "t": "done",
            "choices": [_choice(s) for s in request.sequences]
            or [{"index": i, "finish_reason": "cancelled"} for i in range(request.options.n)],
            "usage": {
                "prompt_tokens": read,
                "completion_tokens": written,
                "total_tokens": read + written,
            },
        }
    )


def _choice(sequence: TextSequence) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": sequence.index, "finish_reason": sequence.finish_reason}
    if sequence.calls:
        choice["tool_calls"] = [
            {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
            for call in sequence.calls
        ]
    return choice


def write_error(request_id: str, error: GenerateError) -> None:
    write_line({"id": request_id, "t": "error", "code": error.code, "message": str(error)})


def write_line(line: Mapping[str, Any]) -> None:
    """Writes one message as one line, with a single write."""
    os.write(_out, json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


_out = 1  # moved by run(): output of libraries must not get between the lines


# --- the program -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-models", type=int, default=3, help="models kept in memory")
    parser.add_argument(
        "--max-bytes", type=int, default=4_000_000_000, help="bytes of weights kept in memory"
    )
    parser.add_argument("--max-sequences", type=int, default=16, help="sequences generated at once")


def main(args: argparse.Namespace) -> int:
    status = 1
    try:
        status = run(args)
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # a model may still be loading in its thread; nothing needs cleaning up


def run(args: argparse.Namespace) -> int:
    global _out
    _out = os.dup(1)
    os.dup2(2, 1)
    inbox: queue.Queue[bytes | None] = queue.Queue(maxsize=1024)  # when full, the sender waits
    threading.Thread(target=_read, args=(inbox,), daemon=True).start()
    server = Server(ModelCache(args.max_models, args.max_bytes), args.max_sequences)
    server.renderer.start()
    write_line({"t": "ready"})
    last_alive = time.monotonic()
    try:
        while True:
            if time.monotonic() - last_alive > ALIVE_S:
                last_alive = time.monotonic()
                write_line({"t": "alive"})
            for line in _lines(inbox, wait=None if server.idle else 0.0):
                if line is None:
                    return 0
                server.handle_line(line)
            if not server.work() and not server.idle:
                for line in _lines(inbox, wait=0.02):  # a model is being loaded: check again soon
                    if line is None:
                        return 0
                    server.handle_line(line)
    except BrokenPipeError:
        return 0  # nobody reads the output anymore


def _read(inbox: queue.Queue[bytes | None]) -> None:
    while line := sys.stdin.buffer.readline(MAX_LINE_BYTES):
        if not line.endswith(b"\n"):
            while (rest := sys.stdin.buffer.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            line = b"too long"  # not JSON, so the answer is bad_request
        inbox.put(line)
    inbox.put(None)


def _lines(inbox: queue.Queue[bytes | None], wait: float | None) -> Iterator[bytes | None]:
    """All lines available now; waits up to `wait` seconds for the first (None: forever)."""
    try:
        yield inbox.get(timeout=wait) if wait != 0.0 else inbox.get_nowait()
        while True:
            yield inbox.get_nowait()
    except queue.Empty:
        return
