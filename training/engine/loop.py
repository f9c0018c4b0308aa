"""The training loop, told top to bottom: prepare, resume, rehearse, train, finish.

`say` takes event lines (events.py), `stop()` tells whether somebody asked for a checkpoint and an end. Who calls it
exports the model it returns: see training/command.py.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.engine import checkpoint, device, inputs
from training.engine.checkpoint import Identity, Restored, Snapshot, Writer
from training.engine.distributed import Team
from training.engine.evaluate import Evaluation, Interrupted, batch_loss, evaluate
from training.engine.inputs import Inputs
from training.engine.optimizer import AdamW
from training.engine.packing import example_at, plan_steps, split
from training.engine.rehearsal import rehearse
from training.engine.schedule import learning_rate
from training.models.batch import Batch, pack
from training.models.generate import GenerateError, GenerateOptions, generate
from training.models.load import load_model
from training.plan import catalog, config
from training.plan.config import Run, Settings
from training.plan.events import Failure
from training.report.report import report

if TYPE_CHECKING:
    from training.engine.fsdp import ShardedAdamW

Say = Callable[..., None]  # say("metric", step=1, …)
SAMPLE_TOKENS = 32
PREVIEW_TOKENS = 200  # of an example in the log


class Stopped(Exception):
    """Ended as asked; the checkpoint is written."""


@dataclass
class State:
    """What a step changes besides weights, optimizer and random numbers. All of it is in every checkpoint."""

    step: int = 0
    cursor: int = 0  # examples taken so far, counted over epochs
    tokens: int = 0
    loss: float | None = None  # of the last step
    seconds: float = 0.0  # spent training, over all attempts
    evaluated: int = -1  # step of the last evaluation
    base_losses: list[float] | None = None  # of each held-out example, before training
    best_losses: list[float] | None = None
    best_loss: float | None = None
    best_step: int = -1
    best_checkpoint: str = ""
    worse: int = 0  # evaluations since the best
    early: bool = False  # stopped early
    metrics: dict[str, Any] | None = None  # of the best evaluation


@dataclass(frozen=True)
class Trained:
    """A model whose training is done, as it is to be exported."""

    model: Any  # whole, fp32, on the CPU
    base: Path  # folder of the base model
    step: int
    metrics: dict[str, Any]
    facts: dict[str, Any]  # for the model card
    base_losses: list[float] | None  # of each held-out example, before training
    best_losses: list[float] | None  # and of the model


def train(run: Run, say: Say, stop: Callable[[], bool] = lambda: False) -> Trained | None:
    """Trains as `run` says; of several processes the first gets the model, the others None.

    Raises Failure with a reason of events.py, or Stopped."""
    try:
        return _train(run, say, stop)
    except Interrupted:
        raise Stopped from None


def _train(run: Run, say: Say, stop: Callable[[], bool]) -> Trained | None:
    # ---- prepare -------------------------------------------------------------------------------------------------
    gc.freeze()  # what is imported lives to the end: the collector need not look at it every few steps
    say("phase", phase="preparing")
    team = Team.join()
    work = Path(run.work_dir)
    checkpoints = work / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint.sweep(checkpoints)
    asked = config.settings_hash(run.settings)
    choices = checkpoint.candidates(Path(run.resume_from), [checkpoints]) if run.resume_from else []
    earlier = checkpoint.settings_of(choices, run.job, asked)
    smaller = run.settings.micro_batch_tokens
    if earlier and smaller and smaller < earlier["micro_batch_tokens"]:  # memory ran out before
        earlier["micro_batch_tokens"] = smaller
    found = inputs.read(run, config.parse(earlier) if earlier else None)
    for note in found.notes:
        say("log", level="warning", message=note)
    settings, examples, held_out = found.settings, found.train, found.held_out
    for i in range(min(report.SAMPLES, len(examples)) if not run.resume_from else 0):
        text = report.one_line(found.tokenizer.decode(examples[i][0][:PREVIEW_TOKENS].tolist()))
        say("log", level="info", message=f"Example {i + 1} of {len(examples)}: {text}")
    place = device.pick(settings)
    if settings.precision == "bf16" and place.dtype != torch.bfloat16:
        say("log", level="warning", message="bf16 is far slower than fp32 on this processor; fp32 is used.")
    device.seed_everything(settings.seed + 1_000_003 * team.rank)
    model, optimizer = _model_and_optimizer(found, settings, place, team, say)
    identity = Identity(
        run.job,
        asked,
        inputs.fingerprint(examples.hash(), held_out.hash()),
        inputs.fingerprint(found.model_config, optimizer.shapes()),
    )
    environment = place.environment() | {"processes": team.size}
    ends = plan_steps(
        examples.lengths, settings.seed, epochs=settings.epochs, max_steps=settings.max_steps,
        batch_size=settings.batch_size, batch_tokens=settings.batch_tokens,
    )  # fmt: skip
    total, trained_tokens = len(ends), examples.trained()
    evaluation_steps = _evaluation_steps(settings, ends, len(examples)) if len(held_out) else set()
    state, saved_step, last_checkpoint = State(), -1, time.monotonic()

    def snapshot(best: bool = False, final: bool = False) -> Snapshot:
        weights = {name: t.to("cpu", copy=True) for name, t in optimizer.weight_tensors().items()}
        moments = {name: t.to("cpu", copy=True) for name, t in optimizer.state_tensors().items()}
        randoms = device.random_state()
        return Snapshot(
            state.step, run.epoch, weights, moments, randoms, asdict(state), identity, environment, settings.as_dict(),
            str(found.base), best, final,
        )  # fmt: skip

    def written(shot: Snapshot, folder: Path, manifest: dict[str, Any], sha256: str) -> None:
        size = (folder / "manifest.json").stat().st_size
        files = [*manifest["files"], {"name": "manifest.json", "bytes": size, "sha256": sha256}]
        say(
            "checkpoint", step=shot.step, path=str(folder), bytes=sum(f["bytes"] for f in files), files=files,
            sha256=sha256, best=shot.best, final=shot.final,
        )  # fmt: skip

    writer = Writer(checkpoints, written)

    # ---- resume --------------------------------------------------------------------------------------------------
    if run.resume_from:
        restored = _restore(choices, identity, optimizer, say)
        optimizer.load(restored.weights, restored.optimizer)
        state, saved_step = State(**restored.state), restored.step
        device.restore_random_state(restored.random, place, team.rank)
        writer.protected = {state.best_checkpoint} - {""}
        different = [name for name, value in environment.items() if restored.environment.get(name) != value]
        if restored.settings["micro_batch_tokens"] != settings.micro_batch_tokens:
            different.append("micro-batch")  # the same sums in another order
        why = f"made with another {', '.join(different)}" if different else ""
        if place.on_gpu and not place.deterministic:
            why = why or "a GPU adds up in any order, unless deterministic is on"
        say(
            "resumed", step=state.step, from_step=checkpoint.step_of(Path(run.resume_from)), exact=not why,
            why=why or "the same machine, program and data",
        )  # fmt: skip
        del restored

    # ---- rehearse ------------------------------------------------------------------------------------------------
    def rows_of(begin: int, end: int, limit: int) -> list[list[int]]:
        """Examples from cursor to cursor, dealt into rows: numbers of examples."""
        which = [example_at(at, settings.seed, len(examples)) for at in range(begin, end)]
        rows = split([int(examples.lengths[i]) for i in which], limit, team.size)
        return [[which[i] for i in row] for row in rows]

    def worst_row(limit: int) -> Batch:
        """The fullest row of the plan (of 500 steps spread over it, where it is long)."""
        some = range(0, total, max(1, total // 500))
        spans = [(int(ends[step - 1]) if step else 0, int(ends[step])) for step in some]
        rows = [row for begin, end in spans for row in rows_of(begin, end, limit)]
        return pack([examples[i] for i in max(rows, key=lambda row: sum(examples.lengths[i] for i in row))])

    say("plan", **_plan(found, settings, total, model, optimizer))
    model.train()
    if run.rehearse and state.step == 0 and isinstance(optimizer, AdamW):
        say("phase", phase="rehearsing")
        settings, estimate = rehearse(
            model, optimizer, worst_row, int(examples.lengths.max()), held_out, settings, place,
            tokens_to_train=_tokens_until(examples.lengths, int(ends[-1])), steps=total,
            evaluations=len(evaluation_steps), snapshot=snapshot, folder=work, team=team,
        )  # fmt: skip
        say("estimate", **asdict(estimate))
    limit = settings.micro_batch_tokens or int(examples.lengths.max())

    # ---- train ---------------------------------------------------------------------------------------------------
    def judge() -> bool:
        """Evaluates this step and shows samples. True if it is the best so far. Changes no random number."""
        say("phase", phase="evaluating")
        result = evaluate(model, held_out, limit, place.device, stop if team.size == 1 else lambda: False)
        say("eval", step=state.step, **result.line())
        best = _note(state, result, settings)
        show_samples()
        say("phase", phase="training")
        return best

    def show_samples() -> None:
        model.eval()
        for prompt in found.prompts if team.leads and not optimizer.sharded else []:
            text = _sample(model, found, prompt, stop)
            say("sample", step=state.step, prompt=prompt.text[-2000:], text=text)
        model.train()

    def save(best: bool, final: bool) -> None:
        """Everybody calls it: each process has random numbers of its own."""
        nonlocal last_checkpoint, saved_step
        last_checkpoint, saved_step = time.monotonic(), state.step
        if best:
            state.best_checkpoint = f"e{run.epoch}-s{state.step}"
        generators = team.gather(device.generator_state(place))
        shot = snapshot(best, final) if team.leads or optimizer.sharded else None
        if shot is not None and team.leads:
            shot.random |= {f"process.{rank}": t.cpu() for rank, t in enumerate(generators) if rank}
            writer.submit(shot)

    peak = settings.learning_rate or 0.0
    count_flops = device.flop_counter(model, lora=settings.method == "lora")
    gemm_rate = evaluation_s = 0.0
    recent: deque[float] = deque(maxlen=50)  # seconds of the last steps
    must_stop = by_time = False
    gc.collect()
    gc.freeze()  # as does what was prepared
    say("phase", phase="training")

    while True:
        # Evaluate; step 0 is the base model.
        best = False
        if state.step in evaluation_steps and state.evaluated < state.step:
            begun = time.perf_counter()
            try:
                best = judge()
                evaluation_s = time.perf_counter() - begun
            except Interrupted:
                must_stop = True  # made up for after resuming
        elif settings.sample_every and state.step and state.step % settings.sample_every == 0:
            show_samples()

        # Checkpoint, when it is time; end, when all is done or somebody asks (several processes agree in their sums).
        must_stop = must_stop or (team.size == 1 and stop())
        ended = state.step == total or state.early
        every = settings.checkpoint_every_steps
        by_steps = every and state.step and state.step % every == 0
        keep = best and settings.keep_best and state.step > 0
        if (must_stop or ended or by_steps or by_time or keep) and saved_step != state.step:
            save(keep, ended)
        if ended:
            break
        if must_stop:
            writer.wait()
            raise Stopped

        # Forward and backward, a row at a time; gradients add up in the optimizer's flat buffer.
        begun = time.perf_counter()
        rows = rows_of(state.cursor, int(ends[state.step]), limit)
        lengths = [int(examples.lengths[i]) for row in rows for i in row]
        trained = int(sum(trained_tokens[i] for row in rows for i in row))
        sums = torch.zeros(4, dtype=torch.float64, device=place.device)  # loss, hits, who stops, who saves
        optimizer.zero_grad()
        for row in rows[team.rank :: team.size]:
            batch = pack([examples[i] for i in row]).to(place.device)
            loss, hits = batch_loss(model, batch, 1.0 / trained)
            loss.backward()
            sums[:2] += torch.stack([loss.detach().double(), hits.double()])
        if (
            optimizer.sharded and team.rank >= len(rows) % team.size > 0
        ):  # lend our weights to those with a row more
            batch_loss(model, pack([examples[rows[0][0]]]).to(place.device), 0.0)[0].backward()
        waited = time.monotonic() - last_checkpoint
        sums[2] += stop()
        sums[3] += team.leads and 0 < settings.checkpoint_every_s <= waited and not writer.busy
        team.add_up(sums)
        optimizer.add_up(team)

        # Update, unless the numbers have gone astray.
        lr = learning_rate(state.step, total, peak, settings.schedule, settings.warmup)
        norm = optimizer.grad_norm()
        loss_value, hit_count, must_stop, by_time = sums.tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm)):
            writer.wait()
            raise Failure("not_finite", _astray(state.step + 1, loss_value, norm, lr))
        optimizer.step(lr, norm)
        place.synchronize()

        # Count and tell.
        state.step += 1
        state.cursor = int(ends[state.step - 1])
        state.tokens += sum(lengths)
        state.loss = loss_value
        seconds = time.perf_counter() - begun
        state.seconds += seconds
        recent.append(seconds)
        ahead = (total - state.step) * statistics.median(recent) + 2 * writer.last_seconds
        ahead += sum(step > state.step for step in evaluation_steps) * evaluation_s
        flops = count_flops(lengths, trained) / team.size
        share = {"gemm_share": flops / seconds / gemm_rate} if gemm_rate else {}
        say(
            "metric", step=state.step, loss=loss_value, loss_hex=loss_value.hex(), lr=lr, grad_norm=norm,
            tokens=state.tokens, tokens_per_s=sum(lengths) / seconds, epoch=state.cursor / len(examples),
            accuracy=hit_count / trained, memory=place.peak_memory(), eta_s=ahead, **share,
        )  # fmt: skip
        gemm_rate = gemm_rate or device.gemm_rate(place)  # after the first step was told: nobody waits for it

    # ---- finish --------------------------------------------------------------------------------------------------
    writer.wait()
    team.least(0)  # nobody reads before it is written
    if (team.leads or optimizer.sharded) and settings.keep_best and state.best_step not in (-1, state.step):
        _return_to_best(state, checkpoints, identity, optimizer, say)
    say("phase", phase="exporting")
    model = _whole(model, found, settings, place, optimizer)
    metrics = state.metrics or {"loss": state.loss}
    facts = {
        "job": run.job, "base": run.base, "settings": settings.as_dict(), "examples": len(examples),
        "tokens": examples.tokens, "steps": state.step, "metrics": metrics,
    }  # fmt: skip
    team.leave()
    if not team.leads:
        return None
    return Trained(model, found.base, state.step, metrics, facts, state.base_losses, state.best_losses)


# ---- the pieces ------------------------------------------------------------------------------------------------------


def _model_and_optimizer(
    found: Inputs, settings: Settings, place: device.Device, team: Team, say: Say
) -> tuple[Any, AdamW | ShardedAdamW]:
    """The base model where it is trained: whole in each process, or spread over all where it does not fit into one."""
    model = _model(found, settings)
    described = catalog.of_config(found.model_config, id=str(found.base), folder=str(found.base))
    machine = catalog.this_machine()
    if not place.on_gpu:  # one memory for all
        machine = replace(machine, memory=machine.memory // team.neighbours)
    room = catalog.fits(described, machine, settings.method, settings.micro_batch_tokens or 2048)
    if team.size > 1 and (settings.shard or not room.fits):
        from training.engine.fsdp import ShardedAdamW

        say("log", level="info", message="The model is spread over all processes; no rehearsal, and no samples on the way.")  # fmt: skip
        return model, ShardedAdamW(model, settings, place, team)
    return model, AdamW(model.to(place.device), settings, place.dtype)


def _model(found: Inputs, settings: Settings) -> Any:
    """The base model, in fp32: adapters or not, dropout."""
    model = load_model(found.base)
    model.set_dropout(settings.dropout or 0.0)
    if settings.method == "lora":
        model.add_lora(settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_targets)
    model.gradient_checkpointing = settings.gradient_checkpointing
    return model


def _whole(model: Any, found: Inputs, settings: Settings, place: device.Device, optimizer: AdamW | ShardedAdamW) -> Any:  # fmt: skip
    """The trained model for the export: whole, in fp32, on the CPU, and what was frozen as the base model has it."""
    if isinstance(optimizer, AdamW):
        optimizer.use_masters()
        if place.dtype == torch.float32 or settings.method == "full":
            return model.cpu().float().eval()
    weights = optimizer.weight_tensors()
    if not weights:  # only the leader has them
        return model
    model = _model(found, settings)
    for name, p in model.named_parameters():
        p.data = weights.get(name, p.data).cpu()
    return model.float().eval()


def _restore(choices: list[Path], identity: Identity, optimizer: AdamW | ShardedAdamW, say: Say) -> Restored:
    """The checkpoint asked for, or the newest older one that verifies."""
    shapes = optimizer.shapes()
    why = ""
    for folder in choices:
        try:
            return checkpoint.read(folder, identity, shapes)
        except checkpoint.Unreadable as error:
            why = why or str(error)
            say("log", level="warning", message=f"The checkpoint {folder.name} cannot be used: {error}.")
    raise Failure(
        "checkpoint_unreadable", f"None of {len(choices)} checkpoints can be used; the one asked for: {why}."
    )


def _evaluation_steps(settings: Settings, ends: np.ndarray, count: int) -> set[int]:
    """Before the first step, every `eval_every` steps or at the end of each epoch, and after the last step."""
    total = len(ends)
    if settings.eval_every:
        return {0, *range(settings.eval_every, total, settings.eval_every), total}
    whole = range(count, int(ends[-1]), count)  # cursors where an epoch ends
    return {0, *(int(np.searchsorted(ends, end)) + 1 for end in whole), total}


def _note(state: State, result: Evaluation, settings: Settings) -> bool:
    """Remember an evaluation; True if it is the best so far. Decides about stopping early."""
    if state.step == 0:
        state.base_losses = result.losses
    state.evaluated = state.step
    if state.step == 0 or (
        state.best_loss is not None and result.loss >= state.best_loss and settings.keep_best
    ):
        state.worse += state.step > 0
        state.early = 0 < settings.early_stopping_patience <= state.worse
        return False
    better = state.best_loss is None or result.loss < state.best_loss
    state.worse = 0 if better else state.worse + 1
    state.early = 0 < settings.early_stopping_patience <= state.worse
    state.best_loss, state.best_step = result.loss, state.step
    state.best_losses, state.metrics = result.losses, result.line()
    return better


def _return_to_best(
    state: State, checkpoints: Path, identity: Identity, optimizer: AdamW | ShardedAdamW, say: Say
) -> None:
    """Weights of the best evaluation, for the export."""
    try:
        restored = checkpoint.read(checkpoints / state.best_checkpoint, identity, optimizer.shapes())
    except checkpoint.Unreadable as error:
        say("log", level="warning", message=f"The best checkpoint ({state.best_checkpoint}) cannot be used ({error}); the last weights are kept.")  # fmt: skip
        return
    optimizer.load_weights(restored.weights)
    say(
        "log",
        level="info",
        message=f"The weights of step {state.best_step} had the lowest held-out loss and are kept.",
    )


def _sample(model: Any, found: Inputs, prompt: inputs.Prompt, stop: Callable[[], bool]) -> str:
    """What the model answers to a pinned prompt, greedily."""
    ids = prompt.ids[-max(1, model.context - SAMPLE_TOKENS) :]
    try:
        written = generate(
            model, found.tokenizer, ids, GenerateOptions(max_tokens=SAMPLE_TOKENS), should_stop=stop
        )
    except GenerateError as error:
        return f"({error})"
    return written[0].text


def _plan(
    found: Inputs, settings: Settings, total: int, model: Any, optimizer: AdamW | ShardedAdamW
) -> dict[str, Any]:
    return {
        "total_steps": total,
        "examples": len(found.train),
        "held_out": len(found.held_out),
        "tokens": found.train.tokens,
        "trained_tokens": found.train.trained_tokens,
        "settings": settings.as_dict(),
        "reasons": found.reasons,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": optimizer.parameters,
    }


def _tokens_until(lengths: np.ndarray, cursor: int) -> int:
    """Tokens of the first `cursor` examples of the endless stream, epochs counted whole and the rest by the mean."""
    epochs, rest = divmod(cursor, len(lengths))
    return int(lengths.sum() * epochs + lengths.mean() * rest)


def _astray(step: int, loss: float, norm: float, lr: float) -> str:
    return f"At step {step} the loss was {loss:g} and the gradient's length {norm:g}, at a learning rate of {lr:g}. The last good checkpoint is kept."
