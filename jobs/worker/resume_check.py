"""Proof of exact resume: steps that were logged before and are run again must lose the same, to the bit.

The trainer prints each loss also as a hexadecimal float, which is the number itself and no rounding of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from jobs.events import event_log

SHOWN = 5  # differing steps that are named
MOST = 20_000  # steps compared


@dataclass
class Proof:
    """`logged`: what earlier attempts said of the steps after `from_step`."""

    from_step: int
    logged: dict[int, str]
    compared: int = 0
    different: list[int] = field(default_factory=list)
    told: bool = False

    @property
    def equal(self) -> int:
        return self.compared - len(self.different)

    def see(self, event: dict[str, Any]) -> bool:
        """Takes a metric line; True when the last logged step has now been run again."""
        step, loss = event.get("step"), event.get("loss_hex")
        if self.told or step not in self.logged or loss is None:
            return False
        self.compared += 1
        if self.logged[step] != loss:
            self.different.append(step)
        return step == max(self.logged)

    def event(self) -> dict[str, Any]:
        """The event that tells the result."""
        self.told = True
        last = self.from_step + self.compared
        if self.different:
            message = (
                f"{self.equal} of {self.compared} losses that were logged before came out equal to the bit; the first "
                f"that differs is step {self.different[0]}. Other hardware computes other last bits."
            )
        else:
            message = f"Exact resume: {self.equal} of {self.compared} losses logged before came out equal to the bit."
        return {"t": "proof", "time": time.time(), "level": "warning" if self.different else "info"} | {
            "message": message,
            "from_step": self.from_step,
            "to_step": last,
            "steps": self.compared,
            "equal": self.equal,
            "exact": not self.different,
            "different": self.different[:SHOWN],
        }


def gather(job_id: str, last_seq: int, from_step: int) -> Proof | None:
    """What was logged after `from_step`, the newest attempt's word for each step; None if nothing was."""
    logged: dict[int, str] = {}
    for event in event_log.backwards(job_id, last_seq):
        if event.data.get("t") != "metric":
            continue
        step = event.data["step"]
        if step <= from_step or len(logged) >= MOST:
            break
        if "loss_hex" in event.data:
            logged.setdefault(step, event.data["loss_hex"])
    return Proof(from_step, logged) if logged else None
