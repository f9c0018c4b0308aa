"""Checks that a resume was exact: steps that are run again must have the same loss as before, bit for bit.

For this, the trainer also prints each loss as a hexadecimal float, which is exact and not rounded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from jobs.events import event_log

MAX_SHOWN = 5  # the most differing steps that are listed
MAX_STEPS = 20_000  # steps compared


@dataclass
class ResumeCheck:
    """`logged` holds the losses that earlier attempts logged for the steps after `from_step`."""

    from_step: int
    logged: dict[int, str]
    compared: int = 0
    different: list[int] = field(default_factory=list)
    reported: bool = False

    @property
    def equal(self) -> int:
        return self.compared - len(self.different)

    def compare(self, event: dict[str, Any]) -> bool:
        """Compares a metric event. Returns True once the last logged step has been run again."""
        step, loss = event.get("step"), event.get("loss_hex")
        if self.reported or not isinstance(step, int) or step not in self.logged or loss is None:
            return False
        self.compared += 1
        if self.logged[step] != loss:
            self.different.append(step)
        return step == max(self.logged)

    def report(self) -> dict[str, Any]:
        """The event with the result."""
        self.reported = True
        if self.different:
            message = (
                f"{self.equal} of {self.compared} repeated losses were bit-identical. The first one that differs is at "
                f"step {self.different[0]}. Results on different hardware can differ in the last bits."
            )
        else:
            message = f"Exact resume: {self.equal} of {self.compared} repeated losses were bit-identical."
        return {
            "t": "proof",
            "time": time.time(),
            "level": "warning" if self.different else "info",
            "message": message,
            "from_step": self.from_step,
            "to_step": self.from_step + self.compared,
            "steps": self.compared,
            "equal": self.equal,
            "exact": not self.different,
            "different": self.different[:MAX_SHOWN],
        }


def from_log(job_id: str, last_seq: int, from_step: int) -> ResumeCheck | None:
    """A check against the losses that were logged after `from_step`; None if there are none. If several attempts logged a step,
    the newest one's loss counts."""
    logged: dict[int, str] = {}
    for event in event_log.backwards(job_id, last_seq):
        if event.data.get("t") != "metric":
            continue
        step = event.data["step"]
        if step <= from_step or len(logged) >= MAX_STEPS:
            break
        if "loss_hex" in event.data:
            logged.setdefault(step, event.data["loss_hex"])
    return ResumeCheck(from_step, logged) if logged else None
