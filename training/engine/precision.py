"""Chooses fp32 or bf16 for a run. On a CPU with bf16 units both are measured on the run's own model and data.

Whether bf16 units pay off depends on the processor and on the shapes of the model: on one CPU, GPT-2 trained
1.4 times as fast in bf16 and a model of four narrow layers at 0.6 times the speed. The choice becomes a
setting of the run, is stored in its checkpoints, and holds for every later attempt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from training.engine.device import (
    Device,
    gemm_rate,
    out_of_memory,
    random_state,
    restore_random_state,
)
from training.engine.distributed import Processes
from training.engine.inputs import Inputs
from training.engine.packing import StepPlan
from training.models.batch import Batch, pack
from training.models.interface import LanguageModel
from training.plan.catalog import BaseModel, cpu_has_bf16
from training.plan.config import PRECISION_CHOSEN_ONCE
from training.plan.run_file import Run

MIN_SPEEDUP = 1.2  # of bf16 over fp32; less is not worth the rounding
MAX_DIFFERENCE = 0.01  # of the row's loss, relative
MIN_SECONDS = 60.0  # of training in fp32; in a shorter run, measuring takes what bf16 could save
ROW_TOKENS = 256  # enough for the rate of longer rows
PASSES = 2  # the first one also compiles kernels


@dataclass(frozen=True)
class Measured:
    seconds: float  # processor time of a forward and backward pass; unlike elapsed time, other load changes it little
    loss: float


def is_open(run: Run) -> bool:
    """Whether the precision of this run is still to be chosen: automatic, and this is its first attempt."""
    return (
        run.settings.precision == "auto"
        and run.settings_schema >= PRECISION_CHOSEN_ONCE
        and not run.resume_from
    )


def choose(fp32: Measured, bf16: Measured) -> tuple[str, str]:
    """(precision, the reason as the page shows it) from the same row in both formats."""
    speedup = fp32.seconds / bf16.seconds
    difference = abs(bf16.loss - fp32.loss) / fp32.loss
    if not difference <= MAX_DIFFERENCE:
        return "fp32", f"fp32, because bf16 changes the loss by {difference:.1%} here"
    if speedup < MIN_SPEEDUP:
        return "fp32", f"fp32, because bf16 is only {speedup:.2f} times as fast here (measured)"
    return "bf16", f"bf16, because it is {speedup:.2f} times as fast here (measured)"


def pick(
    run: Run,
    load: Callable[[], LanguageModel],
    base: BaseModel,
    data: Inputs,
    plan: StepPlan,
    target: Device,
    processes: Processes,
) -> tuple[str, str]:
    """(precision, reason, "" if nothing was measured) for this run, the same in all its processes. `load`
    returns the base model in fp32; a copy of its own is used and dropped. Random state stays as it was."""
    if target.on_gpu or not run.rehearse or not cpu_has_bf16():
        return ("bf16" if target.dtype == torch.bfloat16 else "fp32"), ""
    if 6 * base.parameters * plan.tokens / gemm_rate(target) < MIN_SECONDS:
        chosen, reason = (
            "fp32",
            f"fp32, because a run of under {MIN_SECONDS:.0f} s is too short to gain from bf16",
        )
    else:
        chosen, reason = _measured(load, data, plan, target)
    if not processes.minimum(int(chosen == "bf16")) and chosen == "bf16":
        return "fp32", "fp32, because bf16 is not faster in every process"
    return chosen, reason


def _measured(
    load: Callable[[], LanguageModel], data: Inputs, plan: StepPlan, target: Device
) -> tuple[str, str]:
    before = random_state()
    row = pack([data.train[i] for i in plan.fullest_row(ROW_TOKENS)])
    try:
        model = load()
        assert isinstance(model, torch.nn.Module)
        model.eval()  # without dropout, so that the losses can be compared
        fp32 = _pass(model, row, data)
        for p in model.parameters():
            p.data = p.data.bfloat16()
        return choose(fp32, _pass(model, row, data))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return "fp32", "fp32, because there is too little memory to try bf16"
    finally:
        restore_random_state(before, target)


def _pass(model: LanguageModel, row: Batch, data: Inputs) -> Measured:
    """The fastest of a few forward and backward passes."""
    seconds, value = [], 0.0
    for _ in range(PASSES):
        begun = time.process_time()
        loss, _ = data.objective.loss(model, row, 1.0 / max(1, len(row.loss_positions)))
        loss.backward()
        seconds.append(time.process_time() - begun)
        value = float(loss.detach())
    return Measured(min(seconds), value)
