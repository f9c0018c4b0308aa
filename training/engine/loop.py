"""The training loop, told top to bottom: prepare, resume, rehearse, train, finish.

`emit` takes event lines (plan/events.py), `stop()` tells whether somebody asked for a checkpoint and an end. Whoever
calls `train` exports the model it returns: see training/command.py.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from training.engine import device, saver, setup
from training.engine.evaluate import Interrupted
from training.engine.evaluator import Evaluator
from training.engine.optimizer import AdamW
from training.engine.rehearsal import rehearse
from training.engine.saver import Saver, State
from training.engine.schedule import learning_rate
from training.engine.setup import Emit
from training.models.batch import pack
from training.models.interface import LanguageModel
from training.plan.config import Run
from training.plan.events import Failure

RECENT_STEPS = 50  # whose median time the time left is told by


class Stopped(Exception):
    """Ended as asked; the checkpoint is written."""


@dataclass(frozen=True)
class Trained:
    """A model whose training is done, as it is to be exported."""

    model: LanguageModel  # whole, fp32, on the CPU
    base: Path  # folder of the base model
    step: int
    metrics: dict[str, object]
    facts: dict[str, object]  # for the model card
    base_losses: list[float] | None  # of each held-out example, before training
    best_losses: list[float] | None  # and of the model


def train(run: Run, emit: Emit, stop: Callable[[], bool] = lambda: False) -> Trained | None:
    """Trains as `run` says; of several processes the first gets the model, the others None.

    Raises Failure with a reason of plan/events.py, or Stopped. Shapes: T tokens of a packed row, N of them trained."""
    # ---- prepare -------------------------------------------------------------------------------------------------
    gc.freeze()  # what is imported lives to the end: the collector need not look at it every few steps
    emit("phase", phase="preparing")
    resumable = saver.find_resumable(run)
    session = setup.prepare(run, resumable.settings, emit, stop)
    model, optimizer, plan, data = session.model, session.optimizer, session.plan, session.data
    place, processes, loss_of = session.device, session.processes, session.data.objective.loss
    writer = Saver(session)
    evaluator = Evaluator(session)
    state = State()

    # ---- resume --------------------------------------------------------------------------------------------------
    if run.resume_from:
        state = writer.restore(resumable.folders)

    # ---- rehearse ------------------------------------------------------------------------------------------------
    # The worst row, an evaluation and a checkpoint; it may lower the micro-batch, and changes nothing else.
    emit("plan", **session.summary())
    model.train()
    if run.rehearse and state.step == 0 and isinstance(optimizer, AdamW):
        emit("phase", phase="rehearsing")
        session.settings, estimate = rehearse(session, writer)
        emit("estimate", **asdict(estimate))
    settings = session.settings

    # ---- train ---------------------------------------------------------------------------------------------------
    trained_tokens = data.train.trained()  # (examples,): N of each
    peak_rate = settings.learning_rate or 0.0
    count_flops = device.flop_counter(model, lora=settings.adapter == "lora")
    gemm_rate = 0.0  # FLOP/s of a bare matrix product here
    recent: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds of the last steps
    must_stop = checkpoint_due = False
    gc.collect()
    gc.freeze()  # as does what was prepared
    emit("phase", phase="training")

    while True:
        # Evaluate; step 0 is the base model. An evaluation that is interrupted is made up for after resuming.
        best = False
        if state.step in session.evaluation_steps and state.evaluated < state.step:
            try:
                best = evaluator.evaluate(state)
            except Interrupted:
                must_stop = True
        elif settings.sample_every and state.step and state.step % settings.sample_every == 0:
            evaluator.show_samples(state.step)

        # Checkpoint when it is time; end when all is done or somebody asks. Of several processes none may decide
        # alone: whether to stop or to save was agreed on in the sums of the step before.
        must_stop = must_stop or (processes.size == 1 and stop())
        ended = state.step == plan.steps or state.early
        keep = best and settings.keep_best and state.step > 0
        if must_stop or ended or keep or checkpoint_due or writer.due_by_steps(state.step):
            writer.save(state, best=keep, final=ended)
        if ended:
            break
        if must_stop:
            writer.wait()
            raise Stopped

        # Forward and backward, a row at a time. The loss of a token counts 1 / (trained tokens of the whole step), so
        # rows and processes only add up; gradients collect in the optimizer's flat buffer.
        begun = time.perf_counter()
        rows = plan.rows(state.cursor, plan.end(state.step), session.micro_batch)
        lengths = [int(data.train.lengths[i]) for row in rows for i in row]
        trained = int(sum(trained_tokens[i] for row in rows for i in row))
        sums = torch.zeros(4, dtype=torch.float64, device=place.device)  # loss, hits, who stops, who saves
        optimizer.zero_grad()
        for row in rows[processes.rank :: processes.size]:
            batch = pack([data.train[i] for i in row]).to(
                place.device
            )  # (T,) ids and positions, (N,) targets
            loss, hits = loss_of(model, batch, 1.0 / trained)  # both ()
            loss.backward()
            sums[:2] += torch.stack([loss.detach().double(), hits.double()])
        if optimizer.sharded and processes.rank >= len(rows) % processes.size > 0:
            # FSDP2 gathers weights from everybody: a process without a row of its own takes part with a loss of zero.
            loss_of(model, pack([data.train[rows[0][0]]]).to(place.device), 0.0)[0].backward()
        sums[2] += stop()
        sums[3] += writer.due_by_time()
        processes.add_up(sums)
        optimizer.add_up(processes)

        # Update, unless the loss or the gradient is no longer finite.
        rate = learning_rate(state.step, plan.steps, peak_rate, settings.schedule, settings.warmup)
        norm = optimizer.grad_norm()  # before clipping
        loss_value, hit_count, must_stop, checkpoint_due = sums.tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            writer.wait()
            raise Failure("not_finite", _not_finite(state.step + 1, loss_value, norm, rate))
        optimizer.step(rate, norm)
        place.synchronize()

        # Count and report.
        seconds = time.perf_counter() - begun
        state.advance(plan.end(state.step), sum(lengths), loss_value, seconds)
        recent.append(seconds)
        left = (plan.steps - state.step) * statistics.median(recent) + 2 * writer.last_seconds
        left += sum(step > state.step for step in session.evaluation_steps) * evaluator.last_seconds
        flops = count_flops(lengths, trained) / processes.size
        share = {"gemm_share": flops / seconds / gemm_rate} if gemm_rate else {}
        emit(
            "metric",
            step=state.step,
            loss=loss_value,
            loss_hex=loss_value.hex(),
            lr=rate,
            grad_norm=norm,
            tokens=state.tokens,
            tokens_per_s=sum(lengths) / seconds,
            epoch=state.cursor / len(data.train),
            accuracy=hit_count / trained,
            memory=place.peak_memory(),
            eta_s=left,
            **share,
        )
        gemm_rate = gemm_rate or device.gemm_rate(
            place
        )  # after the first step was reported: nobody waits for it

    # ---- finish --------------------------------------------------------------------------------------------------
    writer.wait()
    processes.least(0)  # nobody reads a checkpoint before it is written
    writer.return_to_best(state)
    emit("phase", phase="exporting")
    whole = setup.whole_model(session)
    processes.leave()
    if not processes.leads:
        return None
    metrics = state.metrics or {"loss": state.loss}
    facts = session.facts() | {"steps": state.step, "metrics": metrics}
    return Trained(whole, data.base, state.step, metrics, facts, state.base_losses, state.best_losses)


def _not_finite(step: int, loss: float, norm: float, rate: float) -> str:
    return (
        f"At step {step} the loss was {loss:g} and the gradient norm {norm:g}, at a learning rate of {rate:g}. "
        "The last good checkpoint is kept."
    )
