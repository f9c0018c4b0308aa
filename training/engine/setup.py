"""Puts a run together: data, settings, device, model, optimizer and the plan of its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from training.data import row_schemas
from training.engine import device, inputs, precision
from training.engine.checkpoint import Identity
from training.engine.device import Device
from training.engine.distributed import Processes
from training.engine.inputs import Inputs
from training.engine.optimizer import AdamW
from training.engine.packing import StepPlan
from training.models.interface import LanguageModel
from training.models.load import add_lora, implementation_of, load_model
from training.plan import catalog, config
from training.plan.config import Settings
from training.plan.run_file import Run
from training.report import report

if TYPE_CHECKING:
    from training.engine.fsdp import ShardedAdamW

Emit = Callable[..., None]  # emit("metric", step=1, …)
PREVIEW_TOKENS = 200  # of an example in the log


@dataclass
class Session:
    """Everything a prepared run consists of. Only `settings` may change: the rehearsal can lower the
    micro-batch."""

    run: Run
    settings: Settings  # every automatic value resolved
    data: Inputs
    model: LanguageModel
    implementation: str  # of the model, see models/load.py
    optimizer: AdamW | ShardedAdamW
    plan: StepPlan
    device: Device
    processes: Processes
    identity: Identity
    evaluation_steps: set[int]
    emit: Emit
    stop: Callable[[], bool]

    @property
    def micro_batch(self) -> int:
        """Most tokens of a packed row."""
        return self.settings.micro_batch_tokens or int(self.data.train.lengths.max())

    @property
    def environment(self) -> dict[str, Any]:
        """Everything that determines the exact bits of a result."""
        return self.device.environment() | {"processes": self.processes.size}

    def summary(self) -> dict[str, Any]:
        """The fields of the `plan` event: what will be trained, with which settings and why."""
        return {
            "total_steps": self.plan.steps,
            "examples": len(self.data.train),
            "held_out": len(self.data.held_out),
            "tokens": self.data.train.tokens,
            "trained_tokens": self.data.train.trained_tokens,
            "settings": self.settings.stored(),
            "reasons": self.data.reasons,
            "task": self.data.task,
            "implementation": self.implementation,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trainable": self.optimizer.parameters,
            "lora": self.model.lora,
        }

    def details(self) -> dict[str, Any]:
        """What the model card says about the run."""
        return {
            "job": self.run.job,
            "base": self.run.base,
            "settings": self.settings.stored(),
            "examples": len(self.data.train),
            "tokens": self.data.train.tokens,
        }


def prepare(
    run: Run,
    resolved: Settings | None,
    manifest: dict[str, Any] | None,
    emit: Emit,
    stop: Callable[[], bool],
) -> Session:
    """Reads data and model and resolves automatic settings. `resolved` are the settings of an earlier
    attempt, if any, and `manifest` that of one of its checkpoints.

    Raises Failure with a reason from plan/events.py."""
    processes = Processes.join()
    data = inputs.read(run, resolved)
    settings = data.settings
    _describe(data, run, emit)
    chosen = device.pick(settings)
    plan = StepPlan.of(data.train, settings, processes.size)
    implementation = implementation_of(data.model_config, manifest)
    if precision.is_open(run):
        described = catalog.from_config(data.model_config)
        load = partial(_base_model, data, settings, implementation)
        picked, reason = precision.pick(run, load, described, data, plan, chosen, processes)
        data.reasons |= {"precision": reason} if reason else {}
        settings = replace(settings, precision=picked)
        chosen = device.pick(settings)
    elif settings.precision == "bf16" and chosen.dtype != torch.bfloat16:
        emit("log", level="warning", message="bf16 is far slower than fp32 on this CPU, so fp32 is used.")
    # one stream of random numbers per process, or all would drop the same activations
    device.seed_everything(settings.seed + 1_000_003 * processes.rank)
    model, optimizer = _model_and_optimizer(data, settings, implementation, chosen, processes, emit)
    # What a checkpoint must match to be resumed.
    identity = Identity(
        run.job,
        config.settings_hash(run.settings, run.settings_schema),
        inputs.fingerprint(data.train.hash(), data.held_out.hash()),
        inputs.fingerprint(data.model_config, optimizer.shapes()),
    )
    evaluation_steps = plan.evaluation_steps(settings.eval_every) if len(data.held_out) else set()
    return Session(
        run,
        settings,
        data,
        model,
        implementation,
        optimizer,
        plan,
        chosen,
        processes,
        identity,
        evaluation_steps,
        emit,
        stop,
    )


def _describe(data: Inputs, run: Run, emit: Emit) -> None:
    """Logs notes on the data, and the first examples as the model will see them."""
    for note in data.notes:
        emit("log", level="warning", message=note)
    shown = 0 if run.resume_from else min(report.SAMPLES, len(data.train))
    for i in range(shown):
        text = row_schemas.one_line(data.tokenizer.decode(data.train[i][0][:PREVIEW_TOKENS].tolist()))
        emit("log", level="info", message=f"Example {i + 1} of {len(data.train)}: {text}")


def _model_and_optimizer(
    data: Inputs,
    settings: Settings,
    implementation: str,
    target: Device,
    processes: Processes,
    emit: Emit,
) -> tuple[LanguageModel, AdamW | ShardedAdamW]:
    """The base model on its device: whole in each process, or sharded if it does not fit in one."""
    model = _base_model(data, settings, implementation)
    described = catalog.from_config(data.model_config, id=str(data.base), folder=str(data.base))
    machine = catalog.this_machine()
    if not target.on_gpu:  # the processes of one machine share its memory
        machine = replace(machine, memory=machine.memory // processes.local_size)
    room = catalog.fits(described, machine, settings.adapter, settings.micro_batch_tokens or 2048)
    if processes.size > 1 and (settings.shard or not room.fits):
        from training.engine.fsdp import ShardedAdamW

        emit(
            "log",
            level="info",
            message="The model is sharded over all processes, so there is no rehearsal and no samples are shown during training.",
        )
        assert isinstance(model, nn.Module)
        return model, ShardedAdamW(model, settings, target, processes)
    return model, AdamW(model.to(target.device), settings, target.dtype)


def _base_model(data: Inputs, settings: Settings, implementation: str) -> LanguageModel:
    """The base model in fp32 on the CPU, with dropout and, if the settings say so, adapters."""
    model = load_model(data.base, implementation)
    model.set_dropout(settings.dropout or 0.0)
    if settings.adapter == "lora":
        add_lora(model, settings)
    model.gradient_checkpointing = settings.gradient_checkpointing
    return model


def whole_model(session: Session) -> LanguageModel:
    """The trained model for the export: whole, in fp32, on the CPU. Frozen weights are exactly those of the
    base model.

    Every process must call it; only the first gets the weights of a sharded model."""
    model, optimizer = session.model, session.optimizer
    if isinstance(optimizer, AdamW):
        optimizer.use_masters()
        if session.device.dtype == torch.float32 or session.settings.adapter == "none":
            whole: LanguageModel = model.cpu().float().eval()
            return whole
    # A frozen bf16 weight has lost bits, so the base model is loaded again and the trained weights are put
    # into it.
    weights = optimizer.weight_tensors()
    if not weights:  # only the first process has them
        return model
    model = _base_model(session.data, session.settings, session.implementation)
    for name, p in model.named_parameters():
        p.data = weights.get(name, p.data).cpu()
    rebuilt: LanguageModel = model.float().eval()
    return rebuilt
