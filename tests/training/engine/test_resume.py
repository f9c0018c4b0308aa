"""A resumed run is equal bit for bit; without any single part of the checkpoint it would not be."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import resume
from tests.training.running import Event, Runner, losses, of
from training.engine import checkpoint, loop
from training.engine.schedule import learning_rate
from training.export.command import load_trained
from training.models import load
from training.models.causal_lm import CausalLM

STEPS, CUT = 16, 9  # an epoch is a little more than ten steps: the second begins within step 11


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("resume"), STEPS, eval_every=5, checkpoint_every_steps=3)


@pytest.fixture(scope="module")
def whole(runner: Runner) -> list[Event]:
    """The uninterrupted run."""
    return runner.train("whole")


@pytest.fixture(scope="module")
def stopped(runner: Runner) -> Path:
    """The checkpoint of a run that was stopped by request."""
    events = runner.train("cut", stop_at=CUT)
    assert events[-1] == {"t": "stopped"}
    assert of(events, "checkpoint")[-1]["step"] == CUT
    return Path(of(events, "checkpoint")[-1]["path"])


def resumed(runner: Runner, folder: Path, **changes: Any) -> list[Event]:
    return runner.train(f"again-{folder.parent.name}", resume_from=str(folder), epoch=2, **changes)


def copied(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / stopped.name))


def test_a_resumed_run_has_the_same_losses_and_weights_bit_for_bit(
    runner: Runner, whole: list[Event], stopped: Path, tmp_path: Path
) -> None:
    events = resumed(runner, copied(stopped, tmp_path))
    assert of(events, "resumed")[0]["exact"] is True
    assert losses(events) == {step: loss for step, loss in losses(whole).items() if step > CUT}
    assert _weights(events) == _weights(whole)
    assert of(events, "eval")[-1] == of(whole, "eval")[-1]


def test_lora_resumes_bit_for_bit_too(runner: Runner) -> None:
    lora = {"adapter": "lora", "lora_dropout": 0.1, "learning_rate": 1e-2, "max_steps": 8, "eval_every": 0}
    whole = runner.train("lora", settings=lora)
    last = of(runner.train("lora-cut", stop_at=4, settings=lora), "checkpoint")[-1]
    events = runner.train("lora-again", resume_from=last["path"], epoch=2, settings=lora)
    assert losses(events) == {step: loss for step, loss in losses(whole).items() if step > 4}
    assert _weights(events) == _weights(whole)


def test_a_run_that_is_already_finished_only_exports_again(
    runner: Runner, whole: list[Event], tmp_path: Path
) -> None:
    last = Path(of(whole, "checkpoint")[-1]["path"])
    events = resumed(runner, copied(last, tmp_path))
    assert not of(events, "metric")
    assert _weights(events) == _weights(whole)


def without_optimizer(folder: Path) -> None:
    _rewrite(
        folder, "optimizer", lambda t: {k: v if k == "step" else torch.zeros_like(v) for k, v in t.items()}
    )


def without_random_states(folder: Path) -> None:
    torch.manual_seed(999)
    _rewrite(folder, "random", lambda t: t | {"torch": torch.get_rng_state()})


def without_cursor(folder: Path) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"cursor": 0}, indent=1, sort_keys=True))
    _reseal(folder)


def with_everything(folder: Path) -> None:
    _rewrite(folder, "optimizer", dict)


@pytest.mark.parametrize(
    "mutation",
    [with_everything, without_optimizer, without_random_states, without_cursor],
    ids=lambda f: f.__name__,
)
def test_every_part_of_a_checkpoint_matters(
    mutation: Callable[[Path], None], runner: Runner, whole: list[Event], stopped: Path, tmp_path: Path
) -> None:
    folder = copied(stopped, tmp_path)
    mutation(folder)
    after = losses(resumed(runner, folder))
    same = all(losses(whole)[step] == loss for step, loss in after.items())
    assert same == (mutation is with_everything)


def test_the_position_in_the_schedule_matters(
    runner: Runner, whole: list[Event], stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifted = lambda step, *rest: learning_rate(step - CUT, *rest)  # noqa: E731
    monkeypatch.setattr(loop, "learning_rate", shifted)
    after = losses(resumed(runner, copied(stopped, tmp_path)))
    assert any(losses(whole)[step] != loss for step, loss in after.items())


def test_resuming_in_another_environment_is_reported_as_not_exact(
    runner: Runner, stopped: Path, tmp_path: Path
) -> None:
    folder = copied(stopped, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["environment"]["threads"] = 64
    (folder / "manifest.json").write_bytes(checkpoint.seal(manifest))
    resumed_event = of(resumed(runner, folder), "resumed")[0]
    assert resumed_event["exact"] is False
    assert "threads" in resumed_event["why"]


def test_it_keeps_the_settings_the_first_attempt_resolved(
    runner: Runner, stopped: Path, tmp_path: Path
) -> None:
    folder = copied(stopped, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["micro_batch_tokens"] = 48  # as the rehearsal on a smaller machine might have chosen
    (folder / "manifest.json").write_bytes(checkpoint.seal(manifest))
    assert of(resumed(runner, folder), "plan")[0]["settings"]["micro_batch_tokens"] == 48


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "older-release"])
def test_a_run_keeps_the_implementation_it_began_with(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """A Llama begun while only transformers ran it goes on with transformers; a new one does not."""
    base = tmp_path / "llama"
    shutil.copytree(runner.values["base"], base)
    write_llama(base)
    settings = {"max_steps": 6, "eval_every": 0, "dropout": 0.0}
    changes: dict[str, Any] = {"base": str(base), "settings": settings}
    before = {"transformers": load.IMPLEMENTATIONS["transformers"]}
    with monkeypatch.context() as older:
        older.setattr(load, "IMPLEMENTATIONS", before)
        whole = runner.train(f"llama-{recorded}", **changes)
        cut = of(runner.train(f"llama-cut-{recorded}", stop_at=3, **changes), "checkpoint")[-1]
    folder = Path(cut["path"])
    if not recorded:
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest.pop("implementation") == "transformers"
        (folder / "manifest.json").write_bytes(checkpoint.seal(manifest))
    events = runner.train(f"llama-again-{recorded}", resume_from=str(folder), epoch=2, **changes)
    assert of(events, "plan")[0]["implementation"] == "transformers"
    assert of(events, "resumed")[0]["exact"] is True
    assert losses(events) == {step: loss for step, loss in losses(whole).items() if step > 3}
    model, _, _ = load_trained(folder, None)  # an export of that checkpoint, too
    assert isinstance(model, CausalLM)
    fresh = runner.train(f"llama-fresh-{recorded}", **changes)
    assert of(fresh, "plan")[0]["implementation"] == "native"
    for step, loss in losses(fresh).items():
        assert float.fromhex(loss) == pytest.approx(float.fromhex(losses(whole)[step]), rel=1e-4)


def write_llama(base: Path) -> None:
    import transformers

    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(base)


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_bit_for_bit_the_same(tmp_path: Path) -> None:
    """The short form of `bin/bench resume`."""
    run = resume.lay_out(tmp_path, 60, eval_every=20)
    assert resume.start(run, tmp_path / "reference").wait() == 0
    kills = resume.killed_run(run, tmp_path / "killed", 60, random.Random(4))
    assert kills >= 1
    assert resume.losses(tmp_path / "killed") == resume.losses(tmp_path / "reference")
    assert resume.digest(tmp_path / "killed") == resume.digest(tmp_path / "reference")


def _weights(events: list[Event]) -> str:
    files = {file["name"]: file["sha256"] for file in of(events, "done")[0]["files"]}
    return str(files["model.safetensors"])


def _rewrite(
    folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    path = folder / f"{name}.safetensors"
    # copies, since the file is memory-mapped and rewritten below
    tensors = {key: t.clone() for key, t in load_file(path).items()}
    checkpoint.write_tensors(path, change(tensors))
    _reseal(folder)


def _reseal(folder: Path) -> None:
    """Updates the hashes, so that only the resumed run could notice the change."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        path = folder / entry["name"]
        entry |= {"bytes": path.stat().st_size, "sha256": checkpoint.file_sha256(path)}
    (folder / "manifest.json").write_bytes(checkpoint.seal(manifest))
