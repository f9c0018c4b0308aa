"""What the trainer emits and writes in real tiny runs: events, checkpoints, model folders, reports, responses of the server."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.golden import trainer
from tests.golden.compare import compare
from tests.golden.shapes import lines, mask, shape

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run with full fine-tuning, one with adapters, one that is stopped and resumed, and two that fail."""
    folder = tmp_path_factory.mktemp("golden")
    run = trainer.lay_out(folder)
    results: dict[str, Any] = {"full": (folder / "full", *trainer.train(run, folder / "full"))}
    adapters = trainer.lay_out(folder, method="lora", validation_fraction=0)
    results["lora"] = (folder / "lora", *trainer.train(adapters, folder / "lora"))
    results["stopped"] = (folder / "part", *trainer.train(run, folder / "part", stop_at=5))
    again = run | {"resume_from": trainer.newest(results["stopped"][2]), "epoch": 2}
    results["resumed"] = (folder / "part", *trainer.train(again, folder / "part"))
    wrong = {"settings": {"max_steps": 2, "batch_size": 0}}
    results["bad settings"] = (folder / "wrong", *trainer.train(run | wrong, folder / "wrong"))
    (folder / "nothing.jsonl").write_bytes(b"")
    empty = run | {"train_file": str(folder / "nothing.jsonl")}
    results["bad data"] = (folder / "empty", *trainer.train(empty, folder / "empty"))
    return results


def test_exit_codes_of_real_runs(runs: dict[str, Any]):
    compare("exit_codes", (f"{name}: {code}" for name, (_, code, _) in runs.items()))


def test_events_and_their_keys(runs: dict[str, Any]):
    events = (event for _, _, run_events in runs.values() for event in run_events)
    compare("events", lines(pair for event in events for pair in shape(event, event["t"])))


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(runs: dict[str, Any]):
    uninterrupted, resumed = trainer.losses(runs["full"][2]), trainer.losses(runs["resumed"][2])
    assert resumed
    assert uninterrupted | resumed == uninterrupted


def test_files_that_a_run_leaves(runs: dict[str, Any]):
    files = (
        f"{name}: {mask(str(path.relative_to(folder)))}"
        for name, (folder, _, _) in runs.items()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("run.json", "stderr.log")
    )
    compare("run_folder", files)


def test_checkpoints(runs: dict[str, Any]):
    compare("checkpoint", (line for name in ("full", "lora") for line in checkpoint_lines(name, runs[name])))


def checkpoint_lines(name: str, run: Any) -> Iterator[str]:
    _, _, events = run
    checkpoint = Path(trainer.newest(events))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    tensors = manifest.pop("tensors")
    yield from (f"{name}: {line}" for line in lines(shape(manifest, "manifest")))
    yield from (f"{name}: manifest.tensors names {file}" for file in tensors)
    state = json.loads((checkpoint / "state.json").read_text())
    yield from (f"{name}: {line}" for line in lines(shape(state, "state")))
    for file in sorted(checkpoint.glob("*.safetensors")):
        yield from (f"{name}: {file.name}: {line}" for line in tensor_lines(file))
    # This decides whether a checkpoint belongs to a run: it must be the same for the same run in every later version.
    yield from (f"{name}: identity {key} = {value}" for key, value in manifest["identity"].items())


def tensor_lines(path: Path) -> Iterator[str]:
    """Names, types and shapes, from the header of the file."""
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    yield from (f"{key}: {value}" for key, value in header.pop("__metadata__", {}).items())
    for tensor, entry in header.items():
        size = "" if path.name == "random.safetensors" else f" {entry['shape']}"
        yield f"{tensor} {entry['dtype']}{size}"


def test_model_folders(runs: dict[str, Any], tmp_path: Path):
    folders = {name: Path(runs[name][2][-1]["path"]) for name in ("full", "lora")}
    for kind in ("merged", "adapter"):
        folders[f"exported {kind}"] = tmp_path / kind
        checkpoint = trainer.newest(runs["lora"][2])
        call("export", "--checkpoint", checkpoint, "--to", str(tmp_path / kind), "--format", kind)
    compare("model_folder", (line for name, folder in folders.items() for line in folder_lines(name, folder)))


def folder_lines(name: str, folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            yield from (f"{name}: {path.name}: {line}" for line in tensor_lines(path))
        elif path.suffix == ".json" and path.name != "tokenizer.json":
            values = json.loads(path.read_text())
            yield from (f"{name}: {line}" for line in lines(shape(values, path.name)))
        else:
            yield f"{name}: {path.name}"


def call(*arguments: str, lines_in: str = "") -> str:
    completed = subprocess.run(
        [sys.executable, "-m", "training", *arguments],
        cwd=trainer.ROOT,
        env=trainer.environment(),
        input=lines_in,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_report_of_a_dataset(tmp_path: Path):
    """`check` prints the report that the web application stores."""
    good = trainer.rows()
    (tmp_path / "rows.jsonl").write_bytes(
        good + good.splitlines(keepends=True)[0] + b'{"prompt": "a"}\nno JSON\n'
    )
    report = call("check", str(tmp_path / "rows.jsonl"), "--tokenizer", str(trainer.BASE))
    row = call("check", str(tmp_path / "rows.jsonl"), "--tokenizer", str(trainer.BASE), "--row", "1")
    pairs = [pair for name, text in (("report", report), ("row", row)) for line in text.splitlines() for pair in shape(json.loads(line), name)]  # fmt: skip
    compare("report", lines(pairs))


def test_responses_of_the_server(runs: dict[str, Any]):
    model = runs["full"][2][-1]["path"]
    requests: list[dict[str, Any]] = [
        {"id": "a", "op": "generate", "model": model, "prompt": "the cat", "max_tokens": 3, "logprobs": 2, "who": "x"},
        {"id": "b", "op": "generate", "model": model, "messages": [{"role": "user", "content": "cat"}], "max_tokens": 2},
        {"id": "c", "op": "generate", "model": "/nowhere", "prompt": "a"},
        {"id": "d", "op": "load", "model": model},
        {"id": "a", "op": "cancel"},
        {"op": "status"},
    ]  # fmt: skip
    compare("served", lines(pair for line in serve(requests) for pair in shape(line, line["t"])))


def serve(requests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Sends one request after the other, each after the last line of the previous response."""
    server = subprocess.Popen(
        [sys.executable, "-m", "training", "serve"],
        cwd=trainer.ROOT,
        env=trainer.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin
    assert server.stdout
    waiting = iter(requests)
    last = ("ready", "done", "error", "loaded", "status", "cancelled")
    for text in server.stdout:
        line = json.loads(text)
        if line["t"] != "alive":
            yield line
        if line["t"] in last:
            request = next(waiting, None)
            while (
                request and request["op"] == "cancel"
            ):  # the request has ended already, so there is no response
                server.stdin.write(json.dumps(request) + "\n")
                request = next(waiting, None)
            if request is None:
                break
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
    server.stdin.close()
    assert server.wait(60) == 0
