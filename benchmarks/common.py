"""Shared by all benchmarks: the result line, and programs that are measured in turns."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


# The hyperparameters of the training benchmark; contenders/peers.py uses the same ones.
SETTINGS: dict[str, Any] = {
    "max_steps": 1000,
    "batch_size": 8,
    "learning_rate": 1e-5,
    "schedule": "linear",
    "warmup": 0,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
    "dropout": 0.0,
    "sequence_length": 512,
    "validation_fraction": 0,
    "train_on": "all",
    "seed": 0,
    "checkpoint_every_s": 0,
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_targets": ["c_attn"],
}


# the linear layers of a Llama block, for adapters in all of them
LLAMA_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run_file(folder: Path, work: str, **settings: Any) -> dict[str, Any]:
    """The run file of `python -m training train`, for a folder that benchmarks/training.py prepared."""
    return {
        "base": str(folder),
        "train_file": str(folder / "examples.jsonl"),
        "work_dir": work,
        "settings": SETTINGS | settings,
        "rehearse": False,
    }


@dataclass
class Scores:
    """Prints `name ours theirs ratio goal met|missed` for each measurement; a larger ratio is always better."""

    missed: list[str] = field(default_factory=list)
    count: int = 0

    def add(
        self, name: str, ours: float, theirs: float, goal: float, *, less_is_better: bool = False
    ) -> bool:
        """`theirs` is the figure of the program compared with, or the target if there is none."""
        ratio = (theirs / ours if ours else float("inf")) if less_is_better else ours / theirs
        met = ratio >= goal
        self.count += 1
        if not met:
            self.missed.append(name)
        print(
            f"{name:<34} {_short(ours):>10} {_short(theirs):>10} {ratio:>7.2f} {goal:>6.2f} {'met' if met else 'missed'}",
            flush=True,
        )
        return met

    def fail(self, name: str, why: str) -> None:
        """Counts a measurement that failed as a missed goal."""
        self.count += 1
        self.missed.append(name)
        self.note(f"{name}: {why}")

    def note(self, text: str) -> None:
        print(f"# {text}", flush=True)

    def end(self) -> int:
        """Prints the last line. Returns the exit code of the benchmark."""
        print(f"{self.count - len(self.missed)} of {self.count} goals met", flush=True)
        return 1 if self.missed else 0


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


class Contender:
    """A program that takes turns: after `go` on its standard input it does one step and prints a line of JSON; after
    `end` it prints its peak memory and exits (contenders/turns.py)."""

    def __init__(self, name: str, argv: Sequence[str], environment: dict[str, str]) -> None:
        self.name = name
        self.steps: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT, text=True
        )

    def wait_ready(self) -> None:
        assert self._receive() == {"ready": True}

    def step(self) -> dict[str, Any]:
        self._send("go")
        self.steps.append(self._receive())
        return self.steps[-1]

    def end(self) -> int:
        """Peak memory in bytes."""
        self._send("end")
        peak = int(self._receive()["peak"])
        self.process.wait(timeout=60)
        return peak

    def median(self, name: str, skip: int = 1) -> float:
        """Of all steps but the first ones, which warm up."""
        return statistics.median(step[name] for step in self.steps[skip:])

    def rate(self, clock: str, skip: int = 1) -> float:
        """Tokens per second without padding, over all measured steps (their lengths differ)."""
        measured = self.steps[skip:]
        return sum(s["tokens"] for s in measured) / sum(s[clock] for s in measured)

    def _send(self, command: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                message: dict[str, Any] = json.loads(line)
                return message
        raise RuntimeError(f"{self.name} exited with code {self.process.wait()}")


def in_turns(contenders: Iterable[Contender], rounds: int) -> None:
    """One step of each, round after round, so that other load on the machine affects all equally."""
    contenders = list(contenders)
    for _ in range(rounds):
        for contender in contenders:
            contender.step()


def request_of(path: str, session: str, *more: str) -> bytes:
    """A browser's GET request as bytes; `more` are further header lines."""
    lines = (f"GET {path} HTTP/1.1", "Host: localhost", f"Cookie: session={session}", *more)
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


async def visit(port: int, session: str, paths: Sequence[str], done: Callable[[], bool]) -> list[float]:
    """Requests one page after another, each over a new connection. Returns the sorted response times in seconds."""
    durations: list[float] = []
    while not done():
        started = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_of(paths[len(durations) % len(paths)], session, "Connection: close"))
        response = await reader.read(-1)
        assert response.startswith(b"HTTP/1.1 200"), response[:200]
        durations.append(time.monotonic() - started)
        writer.close()
        await asyncio.sleep(0.2)
    return sorted(durations)


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values."""
    return values[min(len(values) - 1, int(len(values) * share))]
