"""A training run in this process, small enough for a test: 67 examples, a GPT-2 with two layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.resume import lay_out
from training.command import train
from training.engine.loop import Stopped
from training.plan.run_file import Run

Event = dict[str, Any]


class Runner:
    """Trains with the files that `lay_out` wrote, in a separate work folder."""

    def __init__(self, folder: Path, steps: int = 12, **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.values = lay_out(folder, steps, **settings)

    def train(
        self,
        work: str = "work",
        stop_at: int | None = None,
        on_event: Callable[[Event], None] | None = None,
        **changes: Any,
    ) -> list[Event]:
        """Returns all events. Requests a stop after the metric event of step `stop_at`."""
        emitted: list[Event] = []

        def emit(t: str, **values: Any) -> None:
            emitted.append({"t": t, **values})
            if on_event is not None:
                on_event(emitted[-1])

        def stop() -> bool:
            return stop_at is not None and any(e["t"] == "metric" and e["step"] >= stop_at for e in emitted)

        settings = self.values["settings"] | changes.pop("settings", {})
        run = Run.parse(
            self.values | {"work_dir": str(self.folder / work)} | changes | {"settings": settings}
        )
        try:
            train(run, emit, stop)
        except Stopped:
            emitted.append({"t": "stopped"})
        return emitted


def of(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event["t"] == kind]


def losses(events: list[Event]) -> dict[int, str]:
    return {event["step"]: event["loss_hex"] for event in of(events, "metric")}
