"""The training loop from top to bottom: prepare, resume, rehearse, train, finish.

`emit` writes events (plan/events.py), `stop()` tells whether a checkpoint and an end were requested. The
caller of `train` exports the model it returns: see training/command.py. nanoGPT's train.py is the short
version of this loop, without packing, resuming and reporting.
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

from training.engine import saver, setup
from training.engine.device import flop_counter, gemm_rate
from training.engine.evaluate import Interrupted
from training.engine.evaluator import Evaluator
from training.engine.optimizer import AdamW
from training.engine.rehearsal import rehearse
from training.engine.saver import Saver, State
from training.engine.schedule import learning_rate
from training.engine.scores import Scorer
from training.engine.setup import Emit, Session
from training.models.batch import pack
from training.models.interface import LanguageModel
from training.plan.events import Failure
from training.plan.run_file import Run

DIVERGED = 2.0  # times the first loss
DIVERGED_STEPS = 5  # in a row above it
RECENT_STEPS = 50  # the remaining time is estimated from their median


class Divergence:
    """Notices a loss that stays far above its first value."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._above = 0  # steps in a row

    def check(self, step: int, loss: float, emit: Emit) -> None:
        """Warns once each time the loss has risen."""
        if self._first is None:
            self._first = loss
        self._above = self._above + 1 if loss > DIVERGED * self._first else 0
        if self._above == DIVERGED_STEPS:
            message = (
                f"Training is diverging: the loss is {loss:,.3f} at step {step:,} and was {self._first:,.3f} at first. "
                "Stop the job and lower the learning rate (try a third of it)."
            )
            emit("log", level="warning", message=message)


class Stopped(Exception):
    """Training stopped on request, after its checkpoint was written."""


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to be exported."""

    model: LanguageModel  # whole, fp32, on the CPU
    base: Path  # folder of the base model
    step: int  # the last one
    kept_step: int  # the step of these weights: an earlier one if its held-out loss was lower
    early: bool  # stopped early
    metrics: dict[str, object]  # of these weights
    details: dict[str, object]  # for the model card
    base_losses: list[float] | None  # mean loss of each held-out example in nats per token, before training
    best_losses: list[float] | None  # the same with this model


def train(run: Run, emit: Emit, stop: Callable[[], bool] = lambda: False) -> Trained | None:
    """Trains as `run` specifies. With several processes, the first returns the model and the others None.

    Raises Failure with a reason from plan/events.py, or Stopped. Shapes: T tokens of a packed row, N of
    them trained."""
    # ---- prepare -------------------------------------------------------------------------------------------
    gc.freeze()  # imports live to the end: the garbage collector need not scan them again and again
    emit("phase", phase="preparing")
    # If there is a checkpoint, automatic settings come from it. If they were resolved again, another machine could choose
    # another micro-batch and so sum in another order.
    resumable = saver.find_resumable(run)
    session = setup.prepare(resumable.run, resumable.settings, resumable.manifest, emit, stop)
    model, optimizer, plan, data = session.model, session.optimizer, session.plan, session.data
    device, processes, loss_of = session.device, session.processes, session.data.objective.loss
    writer, evaluator, scorer = Saver(session), Evaluator(session), Scorer(session)
    scorer.score_base()  # now, because in every attempt the weights are still those of the base model
    state = State()

    # ---- resume --------------------------------------------------------------------------------------------
    # Weights, both moments, every random generator and the counters, so that the next step is bit for bit the
    # one that an uninterrupted run would take (on the same machine).
    if run.resume_from:
        state = writer.restore(resumable.folders)

    # ---- rehearse ------------------------------------------------------------------------------------------
    # Tries the longest row, an evaluation and a checkpoint. It may lower the micro-batch, nothing else.
    emit("plan", **session.summary())
    model.train()
    if run.rehearse and state.step == 0 and isinstance(optimizer, AdamW):
        emit("phase", phase="rehearsing")
        session.settings, estimate = rehearse(session, writer, scorer.seconds)
        emit("estimate", **asdict(estimate))
    settings = session.settings

    # ---- train ---------------------------------------------------------------------------------------------
    trained_tokens = data.train.trained()  # (examples,) int64: the trained tokens of each
    count_flops = flop_counter(model, lora=settings.adapter == "lora")
    peak_rate, divergence = settings.learning_rate or 0.0, Divergence()
    product_rate = 0.0  # FLOP/s of a plain matrix product on this device, measured after the first step
    recent: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds per step
    must_stop = checkpoint_due = False
    gc.collect()
    gc.freeze()  # the same for everything prepared until here
    emit("phase", phase="training")
    while True:
        # Evaluate. Step 0 is the base model. An interrupted evaluation is repeated after resuming.
        best = False
        if state.step in session.evaluation_steps and state.evaluated < state.step:
            try:
                best = evaluator.evaluate(state)
            except Interrupted:
                must_stop = True
        elif settings.sample_every and state.step and state.step % settings.sample_every == 0:
            evaluator.show_samples(state.step)

        # Save a checkpoint when one is due; end when training is done or a stop was requested. Several
        # processes agreed on both in the sums of the last step: none may decide alone.
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

        # Forward and backward, one packed row at a time (gradient accumulation). Each token's loss is
        # weighted by 1 / (trained tokens of the whole step), so rows and processes simply add up. Averaging
        # per row would weight tokens of short rows more: https://unsloth.ai/blog/gradient.
        begun = time.perf_counter()
        rows = plan.rows(state.cursor, plan.end(state.step), session.micro_batch)
        lengths = [int(data.train.lengths[i]) for row in rows for i in row]
        trained = int(sum(trained_tokens[i] for row in rows for i in row))
        # (4,): loss, right predictions, requests to stop, checkpoints due
        sums = torch.zeros(4, dtype=torch.float64, device=device.device)
        optimizer.zero_grad()
        # Data parallelism: process r of R computes rows r, r + R, r + 2R, …
        for row in rows[processes.rank :: processes.size]:
            batch = pack([data.train[i] for i in row]).to(device.device)  # ids (T,), targets (N,)
            loss, hits = loss_of(model, batch, 1.0 / trained)  # both ()
            loss.backward()
            sums[:2] += torch.stack([loss.detach().double(), hits.double()])
        if optimizer.sharded and processes.rank >= len(rows) % processes.size > 0:
            # FSDP2 gathers weights from all processes: one without a row left takes part with a loss of zero.
            loss_of(model, pack([data.train[rows[0][0]]]).to(device.device), 0.0)[0].backward()
        sums[2] += stop()
        sums[3] += writer.due_by_time()
        # One all-reduce for the counters and one for all gradients; both do nothing in a single process.
        processes.all_reduce(sums)
        optimizer.all_reduce_grads(processes)

        # Update the weights, unless loss or gradient is not finite: the last checkpoint is still good.
        rate = learning_rate(state.step, plan.steps, peak_rate, settings.schedule, settings.warmup)
        norm = optimizer.grad_norm()  # L2 over all parameters, before clipping
        loss_value, hit_count, must_stop, checkpoint_due = sums.tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            writer.wait()
            raise Failure("not_finite", _not_finite(state.step + 1, loss_value, norm, rate))
        optimizer.step(rate, norm)
        device.synchronize()  # before reading the clock: a GPU works asynchronously

        # Count and report. Time left: steps at the median speed, two checkpoints, evaluations, scores.
        seconds = time.perf_counter() - begun
        state.advance(plan.end(state.step), sum(lengths), loss_value, seconds)
        recent.append(seconds)
        left = (plan.steps - state.step) * statistics.median(recent) + 2 * writer.last_seconds
        left += sum(step > state.step for step in session.evaluation_steps) * evaluator.last_seconds
        flops = count_flops(lengths, trained) / processes.size
        share = {"gemm_share": flops / seconds / product_rate} if product_rate else {}
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
            memory=device.peak_memory(),
            eta_s=left + scorer.seconds,
            **share,
        )
        divergence.check(state.step, loss_value, emit)
        product_rate = product_rate or gemm_rate(device)  # after the first report, so it delays nothing

    return _finish(session, writer, state, scorer)


def _finish(session: Session, writer: Saver, state: State, scorer: Scorer) -> Trained | None:
    """Waits for the last checkpoint, returns to the best weights, scores them, and gathers them in the first
    process. Raises Stopped."""
    processes = session.processes
    writer.wait()
    processes.minimum(0)  # a barrier: no process reads a checkpoint before it is written
    kept = writer.return_to_best(state)
    try:
        scores = scorer.compare()
    except Interrupted:  # both models are scored again after resuming
        raise Stopped from None
    session.emit("phase", phase="exporting")
    whole = setup.whole_model(session)
    processes.close()
    if not processes.is_main:
        return None
    # If the best checkpoint could not be read, the figures recorded are not those of the weights kept.
    evaluated = state.metrics is not None and kept == state.best_step
    metrics: dict[str, object] = dict(state.metrics) if evaluated and state.metrics else {"loss": state.loss}
    metrics |= {"scores": scores} if scores else {}
    details = session.details() | {
        "steps": state.step,
        "kept_step": kept,
        "early": state.early,
        "metrics": metrics,
    }
    return Trained(
        whole,
        session.data.base,
        state.step,
        kept,
        state.early,
        metrics,
        details,
        state.base_losses,
        state.best_losses if evaluated else None,
    )


def _not_finite(step: int, loss: float, norm: float, rate: float) -> str:
    return (
        f"At step {step} the loss was {loss:g} and the gradient norm {norm:g}, at a learning rate of {rate:g}. "
        "The last good checkpoint is kept."
    )
