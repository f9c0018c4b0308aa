"""Evaluates a run on its held-out examples, and shows samples of what the model generates."""

from __future__ import annotations

import time

from training.engine.evaluate import Evaluation
from training.engine.inputs import Prompt
from training.engine.saver import State
from training.engine.setup import Session
from training.models.generate import GenerateError, GenerateOptions, generate
from training.plan.config import Settings
from training.plan.tasks import TASKS

LONGEST_PROMPT = 2000  # characters of a prompt in an event


class Evaluator:
    """Evaluations draw no random numbers and change no weights, so evaluating more often does not change
    the training."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.last_seconds = 0.0  # duration of the last evaluation, including samples

    def evaluate(self, state: State) -> bool:
        """Evaluates this step and shows samples. True if it is the best so far. Raises Interrupted."""
        session, begun = self.session, time.perf_counter()
        session.emit("phase", phase="evaluating")
        # With several processes, none may leave the evaluation alone, so it cannot be interrupted.
        stop = session.stop if session.processes.size == 1 else lambda: False
        result = session.data.objective.evaluate(
            session.model, session.data.held_out, session.micro_batch, session.device.device, stop
        )
        session.emit("eval", step=state.step, **result.as_event())
        best = record(state, result, session.settings)
        self.show_samples(state.step)
        session.emit("phase", phase="training")
        self.last_seconds = time.perf_counter() - begun
        return best

    def show_samples(self, step: int) -> None:
        """Emits greedy answers to the pinned prompts."""
        session = self.session
        session.model.eval()
        shown = session.processes.is_main and not session.optimizer.sharded
        for prompt in session.data.prompts if shown else []:
            session.emit("sample", step=step, prompt=prompt.text[-LONGEST_PROMPT:], text=self._sample(prompt))
        session.model.train()

    def _sample(self, prompt: Prompt) -> str:
        model, tokenizer = self.session.model, self.session.data.tokenizer
        most = TASKS[self.session.data.task["name"]].sample_tokens
        ids = prompt.ids[-max(1, model.context - most) :]
        options = GenerateOptions(max_tokens=most, stop=self.session.data.stop)
        try:
            return generate(model, tokenizer, ids, options, should_stop=self.session.stop)[0].text
        except GenerateError as error:
            return f"({error})"


def record(state: State, result: Evaluation, settings: Settings) -> bool:
    """Records an evaluation in `state` and decides on early stopping. True if it is the best so far."""
    state.evaluated = state.step
    if state.step == 0:
        state.base_losses = result.losses
        return False
    better = state.best_loss is None or result.loss < state.best_loss
    state.worse = 0 if better else state.worse + 1
    state.early = 0 < settings.early_stopping_patience <= state.worse
    # without keep_best the final weights are exported, so their figures count
    if better or not settings.keep_best:
        state.best_loss, state.best_step = result.loss, state.step
        state.best_losses, state.metrics = result.losses, result.as_event()
    return better
