"""What all parts of `bin/bench` share: the line they print, and programs that are measured in turns."""

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


# The hyperparameters of the training bench; contenders/peers.py has the same.
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


def run_file(folder: Path, work: str, **settings: Any) -> dict[str, Any]:
    """What `python -m training train` takes, for a folder that benchmarks/training.py laid out."""
    return {
        "base": str(folder),
        "train_file": str(folder / "examples.jsonl"),
        "work_dir": work,
        "settings": SETTINGS | settings,
        "rehearse": False,
    }


@dataclass
class Scores:
    """Prints `name ours theirs ratio goal met|missed` for each thing measured; a larger ratio is always better."""

    missed: list[str] = field(default_factory=list)
    count: int = 0

    def add(
        self, name: str, ours: float, theirs: float, goal: float, *, less_is_better: bool = False
    ) -> bool:
        """`theirs` is a peer's figure, or the promise where there is no peer."""
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
        """It could not be measured, which is no better than a goal missed."""
        self.count += 1
        self.missed.append(name)
        self.note(f"{name}: {why}")

    def note(self, text: str) -> None:
        print(f"# {text}", flush=True)

    def end(self) -> int:
        """The last line, and the exit code of the part."""
        print(f"{self.count - len(self.missed)} of {self.count} goals met", flush=True)
        return 1 if self.missed else 0


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


class Contender:
    """A program that waits for its turn: `go` on its standard input lets it do one step, which it answers with a line
    of JSON; `end` makes it tell its peak memory and leave (contenders/turns.py)."""

    def __init__(self, name: str, argv: Sequence[str], environment: dict[str, str]) -> None:
        self.name = name
        self.steps: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT, text=True
        )

    def wait_ready(self) -> None:
        assert self._read() == {"ready": True}

    def step(self) -> dict[str, Any]:
        self._tell("go")
        self.steps.append(self._read())
        return self.steps[-1]

    def end(self) -> int:
        """Peak memory in bytes."""
        self._tell("end")
        peak = int(self._read()["peak"])
        self.process.wait(timeout=60)
        return peak

    def median(self, name: str, skip: int = 1) -> float:
        """Of the steps after the first ones, which warm up."""
        return statistics.median(step[name] for step in self.steps[skip:])

    def rate(self, clock: str, skip: int = 1) -> float:
        """Useful tokens a second, over all measured steps (their lengths differ)."""
        measured = self.steps[skip:]
        return sum(s["tokens"] for s in measured) / sum(s[clock] for s in measured)

    def _tell(self, word: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"{self.name} ended with {self.process.wait()}")


def in_turns(contenders: Iterable[Contender], rounds: int) -> None:
    """One step each, round after round, so that whatever else the machine does falls on all alike."""
    contenders = list(contenders)
    for _ in range(rounds):
        for contender in contenders:
            contender.step()


def request_of(path: str, session: str, *more: str) -> bytes:
    """A browser's question for a page, as bytes; `more` are further header lines."""
    lines = (f"GET {path} HTTP/1.1", "Host: localhost", f"Cookie: session={session}", *more)
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


async def visit(port: int, session: str, paths: Sequence[str], enough: Callable[[], bool]) -> list[float]:
    """Asks for one page after another, each over a connection of its own. The seconds they took, in order of size."""
    taken: list[float] = []
    while not enough():
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_of(paths[len(taken) % len(paths)], session, "Connection: close"))
        answer = await reader.read(-1)
        assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
        taken.append(time.monotonic() - began)
        writer.close()
        await asyncio.sleep(0.2)
    return sorted(taken)


def quantile(values: Sequence[float], share: float) -> float:
    """Of values in order of size."""
    return values[min(len(values) - 1, int(len(values) * share))]
