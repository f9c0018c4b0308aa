"""The generation server as the inference worker uses it: a process with JSON lines in and out."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny import write_model
from training.models.generate import GenerateOptions, generate
from training.models.load import load_model
from training.text.tokenizer import Tokenizer

PROMPT = "the cat sat on"
START = ["-m", "training", "serve"]


class Server:
    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *START, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.read() == {"t": "ready"}

    def send(self, **line: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        """The next line, without those that only the inference worker needs."""
        assert self.process.stdout
        while (line := json.loads(self.process.stdout.readline()))["t"] in ("alive", "reading"):
            pass
        return line

    def until(self, *ids: str) -> list[dict[str, Any]]:
        """All messages until each of these requests has ended."""
        lines, open_ids = [], set(ids)
        while open_ids:
            lines.append(self.read())
            if lines[-1]["t"] in ("done", "error", "loaded", "unloaded"):
                open_ids.discard(lines[-1]["id"])
        return lines

    def generate_text(self, **line: Any) -> list[dict[str, Any]]:
        self.send(id="r", op="generate", **line)
        return self.until("r")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model"), context=512))


@pytest.fixture(scope="module")
def server(folder: str) -> Iterator[Server]:
    server = Server()
    yield server
    server.process.kill()


def text(lines: list[dict[str, Any]], id: str = "r", index: int = 0) -> str:
    return "".join(
        line["text"] for line in lines if line["t"] == "token" and (line["id"], line["index"]) == (id, index)
    )


def ends(lines: list[dict[str, Any]]) -> list[str]:
    return [line["id"] for line in lines if line["t"] in ("done", "error")]


def test_the_server_generates_the_same_text_as_generate(server, folder):
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(PROMPT)
    [expected] = generate(load_model(folder), tokenizer, ids, GenerateOptions(max_tokens=20))
    lines = server.generate_text(model=folder, prompt=PROMPT, max_tokens=20)
    assert lines[0] == {"id": "r", "t": "start", "prompt_tokens": len(ids)}
    assert text(lines) == expected.text
    assert lines[-1]["choices"] == [{"index": 0, "finish_reason": expected.finish_reason}]
    usage = lines[-1]["usage"]
    assert usage["completion_tokens"] == len(expected.ids)
    assert usage["total_tokens"] == len(ids) + len(expected.ids)


def test_concurrent_requests_get_their_own_texts(server, folder):
    prompts = {"a": "the cat", "b": "the moon and the mat looked at", "c": "sat"}
    alone = {
        id: text(server.generate_text(model=folder, prompt=p, max_tokens=15)) for id, p in prompts.items()
    }
    for id, prompt in prompts.items():
        server.send(id=id, op="generate", model=folder, prompt=prompt, max_tokens=15, who=id)
    lines = server.until(*prompts)
    assert {id: text(lines, id) for id in prompts} == alone


def test_several_sequences_and_logprobs(server, folder):
    lines = server.generate_text(
        model=folder, prompt=PROMPT, max_tokens=4, n=3, temperature=1.0, seed=5, logprobs=2
    )
    assert [c["index"] for c in lines[-1]["choices"]] == [0, 1, 2]
    tokens = [line for line in lines if line["t"] == "token"]
    assert all(line["logprob"] <= 0 and len(line["top"]) == 2 for line in tokens)


def test_a_conversation_is_rendered_with_the_models_template(server, folder):
    tokenizer = Tokenizer.load(folder)
    messages = [{"role": "user", "content": "the cat"}]
    lines = server.generate_text(model=folder, messages=messages, max_tokens=1)
    assert lines[0]["prompt_tokens"] == len(tokenizer.encode_chat(messages, add_generation_prompt=True))


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ({"prompt": "x", "model": "/no/such/folder"}, "model_not_found"),
        ({"prompt": "x", "model": "relative"}, "model_not_found"),
        ({"prompt": None}, "bad_request"),
        ({"prompt": "x", "temperature": 9}, "bad_request"),
        ({"prompt": "x", "n": 100}, "bad_request"),
        ({"prompt": "x", "max_tokens": "many"}, "bad_request"),
        ({"prompt": "x", "stop": ["y"] * 99}, "bad_request"),
        ({"messages": [{"role": "user"}]}, "bad_request"),
        ({"prompt": "the cat " * 600}, "prompt_too_long"),
        ({"prompt": "the cat " * 600, "echo": True, "max_tokens": 0}, "prompt_too_long"),
        ({"prompts": ["the cat", "the cat " * 600]}, "prompt_too_long"),
        ({"prompt": [5, 10**6]}, "bad_request"),
        ({"prompt": [5, -1]}, "bad_request"),
        ({"prompt": []}, "bad_request"),
        ({"prompts": ["x"] * 129}, "bad_request"),
        ({"prompt": "x", "min_p": 2}, "bad_request"),
        ({"prompt": "x", "repetition_penalty": 0}, "bad_request"),
    ],
)
def test_invalid_requests_are_refused_with_a_code(server, folder, line, code):
    lines = server.generate_text(**{"model": folder} | line)
    assert [(x["t"], x.get("code")) for x in lines] == [("error", code)]
    assert lines[0]["message"]


def test_many_prompts_are_generated_as_one_request(server, folder):
    tokenizer = Tokenizer.load(folder)
    prompts = [f"{a} {b}" for a in ("the cat", "the moon", "a mat") for b in ("sat", "looked", "and", "on")]
    alone = [text(server.generate_text(model=folder, prompt=p, max_tokens=9)) for p in prompts]
    lines = server.generate_text(model=folder, prompts=prompts, max_tokens=9, n=2, who="alice")
    assert [line["t"] for line in lines if line["t"] != "token"] == ["start", "done"]
    assert [text(lines, index=2 * i) for i in range(len(prompts))] == alone
    assert [text(lines, index=2 * i + 1) for i in range(len(prompts))] == alone
    tokens = [len(tokenizer.encode(p)) for p in prompts]
    assert lines[-1]["usage"]["prompt_tokens"] == lines[0]["prompt_tokens"] == sum(tokens)
    assert sorted(c["index"] for c in lines[-1]["choices"]) == list(range(2 * len(prompts)))
    ids = server.generate_text(model=folder, prompts=[tokenizer.encode(p) for p in prompts], max_tokens=9)
    assert [text(ids, index=i) for i in range(len(prompts))] == alone
    server.send(op="status")
    status = server.read()
    assert (status["active"], status["waiting"]) == (0, 0)
    assert not any(m["users"] for m in status["models"])


def test_another_users_request_is_admitted_between_many_prompts(server, folder):
    many = ["the cat"] * 40
    server.send(
        id="many", op="generate", model=folder, prompts=many, max_tokens=60, temperature=2, seed=1, who="a"
    )
    server.send(id="one", op="generate", model=folder, prompt="the", max_tokens=2, who="b")
    assert ends(server.until("many", "one")) == ["one", "many"]


def test_a_request_with_many_prompts_is_cancelled_as_a_whole(server, folder):
    server.send(
        id="many", op="generate", model=folder, prompts=["the"] * 99, max_tokens=400, temperature=2, seed=1
    )
    while server.read()["t"] != "token":
        pass
    server.send(id="many", op="cancel")
    server.until("many")
    server.send(op="status")
    status = server.read()
    assert (status["active"], status["waiting"]) == (0, 0)


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_truncated_model_is_called_damaged(server, tmp_path, kept):
    broken = write_model(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    [line] = server.generate_text(model=str(broken), prompt="the")
    assert line["code"] == "model_damaged"
    assert "damaged" in line["message"]
    assert str(tmp_path) not in line["message"]


def test_a_damaged_line_does_not_disturb_the_next(server, folder):
    server.process.stdin.write(b'{"op": "gen\n[1]\n')
    server.process.stdin.flush()
    assert [server.read()["code"] for _ in range(2)] == ["bad_request"] * 2
    assert server.generate_text(model=folder, prompt=PROMPT, max_tokens=2)[-1]["t"] == "done"


def test_a_cancelled_request_ends_at_once(server, folder):
    server.send(id="long", op="generate", model=folder, prompt="the", max_tokens=400, temperature=2, seed=1)
    while server.read()["t"] != "token":
        pass
    server.send(id="long", op="cancel")
    lines = server.until("long")
    assert lines[-1]["choices"][0]["finish_reason"] == "cancelled"
    assert lines[-1]["usage"]["completion_tokens"] < 390


def test_one_users_many_requests_do_not_delay_another_user(server, folder):
    for i in range(24):
        server.send(
            id=f"many-{i}",
            op="generate",
            model=folder,
            prompt="the",
            max_tokens=60,
            temperature=2,
            seed=i,
            who="alice",
        )
    server.send(
        id="one", op="generate", model=folder, prompt="the", max_tokens=60, temperature=2, seed=1, who="bob"
    )
    order = ends(server.until("one", *(f"many-{i}" for i in range(24))))
    assert order.index("one") < 12


def test_the_least_recently_used_model_is_evicted(folder, tmp_path):
    others = [str(write_model(tmp_path / str(i), seed=i)) for i in range(2)]
    server = Server("--max-models", "2")
    for model in (folder, *others):
        server.send(id=model, op="load", model=model)
        assert server.until(model)[-1]["t"] == "loaded"
    server.send(op="status")
    assert [m["model"] for m in server.read()["models"]] == others
    server.send(id="u", op="unload", model=others[0])
    assert server.read()["done"] is True
    server.process.kill()


def test_the_server_ends_with_its_input_even_while_generating(folder):
    server = Server()
    server.send(id="x", op="generate", model=folder, prompt="the", max_tokens=400, temperature=2)
    server.process.stdin.close()
    assert server.process.wait(timeout=120) == 0


def test_the_server_ends_with_its_parent(tmp_path):
    script = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, *{START!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    until = time.monotonic() + 120
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.02)
    else:
        assert not Path(f"/proc/{child}").exists()


# --- chat templates --------------------------------------------------------------------------------

SLOW = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TALK = [{"role": "user", "content": "the cat"}]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (SLOW, "took too much time"),
        ("{{ '%0999999999d' % 5 }}{{ '%0999999999d' % 6 }}", "took too much time|MemoryError"),
        ("{{ 'x' * 10**12 }}", "MemoryError"),
        ("{{ 'x' * (2 * 10**7) }}", "characters"),
        ("{{ raise_exception('only users here') }}", "only users here"),
        ("{% for", "cannot be read"),
    ],
)
def test_a_bad_chat_template_ends_its_own_request_only(tmp_path, server, folder, template, words):
    bad = write_model(tmp_path / "bad", context=64)
    settings = json.loads((bad / "tokenizer_config.json").read_text())
    (bad / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    server.send(id="good", op="generate", model=folder, prompt=PROMPT, max_tokens=100, who="alice")
    server.send(id="bad", op="generate", model=str(bad), messages=TALK, max_tokens=1, who="bob")
    lines = server.until("good", "bad")
    (refusal,) = [line for line in lines if line["t"] == "error"]
    assert (refusal["id"], refusal["code"]) == ("bad", "bad_request")
    assert re.search(words, refusal["message"])
    assert server.generate_text(model=folder, messages=TALK, max_tokens=1)[-1]["t"] == "done"


def test_a_template_that_was_stopped_is_not_retried_at_once(tmp_path, server):
    slow = write_model(tmp_path / "slow", context=64)
    (slow / "chat_template.jinja").write_text(SLOW)
    first, second = (server.generate_text(model=str(slow), messages=TALK, who="bob")[-1] for _ in range(2))
    assert first["code"] == second["code"] == "bad_request"
    assert "wait a minute" not in first["message"]
    assert "wait a minute" in second["message"]
    assert server.generate_text(model=str(slow), prompt=PROMPT, max_tokens=1, who="bob")[-1]["t"] == "done"
