"""Every kind of error has its own exit code and a message that says what to do."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.services import ROOT
from tests.training.running import Event, Runner, of
from training.command import as_failure
from training.plan.config import ConfigError
from training.plan.events import EXIT, Failure


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path, steps=3, eval_every=0, validation_fraction=0)


def reason(runner: Runner, **changes: Any) -> Failure:
    with pytest.raises((Failure, ConfigError)) as failure:
        runner.train(**changes)
    return as_failure(failure.value)


def write(runner: Runner, *rows: dict[str, Any] | str) -> None:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (runner.folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def test_the_error_names_a_broken_row(runner: Runner) -> None:
    write(runner, {"prompt": "a", "completion": " b"}, '{"prompt": ')
    failure = reason(runner)
    assert failure.reason == "bad_data"
    assert "line 2" in failure.message


def test_a_dataset_that_does_not_match_its_report_is_refused(runner: Runner) -> None:
    failure = reason(runner, expected={"examples": 68})
    assert failure.reason == "bad_data"
    assert "68" in failure.message


def test_a_dataset_without_trained_tokens_is_refused(runner: Runner) -> None:
    answers = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "weight": 0}]
    }
    write(runner, answers, answers)
    assert reason(runner).reason == "no_trained_token"


def test_an_example_longer_than_the_context_is_refused(runner: Runner) -> None:
    write(runner, {"prompt": "a", "completion": " the cat sat" * 60})
    failure = reason(runner, settings={"sequence_length": 1000})
    assert failure.reason == "too_long"
    assert "line 1" in failure.message


def test_a_long_example_is_cut_if_the_settings_allow_it(runner: Runner) -> None:
    write(runner, {"prompt": "a", "completion": " the cat sat" * 60})
    assert of(runner.train(settings={"sequence_length": None}), "done")


def test_a_missing_base_model_is_refused(runner: Runner, tmp_path: Path) -> None:
    assert reason(runner, base=str(tmp_path / "nowhere")).reason == "base_model"


def test_a_base_model_with_damaged_weights_is_refused(runner: Runner) -> None:
    os.truncate(runner.folder / "base" / "model.safetensors", 1000)
    assert reason(runner).reason == "base_model"


def test_a_base_model_whose_weights_do_not_fit_its_configuration_is_refused(runner: Runner) -> None:
    path = runner.folder / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_embd": 64}))
    failure = reason(runner)
    assert failure.reason == "base_model"
    assert "shape" in failure.message


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(runner: Runner) -> None:
    path = runner.folder / "base" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 5000, "content": "<extra>"})
    path.write_text(json.dumps(values))
    assert reason(runner).reason == "tokenizer"


def test_a_missing_tokenizer_is_refused(runner: Runner) -> None:
    (runner.folder / "base" / "tokenizer.json").unlink()
    assert reason(runner).reason == "tokenizer"


def test_lora_targets_that_no_layer_has_are_refused(runner: Runner) -> None:
    assert reason(runner, settings={"adapter": "lora", "lora_targets": ["q_proj"]}).reason == "bad_settings"


@pytest.mark.parametrize("seed", range(3))
def test_a_nan_loss_stops_within_a_step_and_keeps_the_last_checkpoint(runner: Runner, seed: int) -> None:
    emitted: list[Event] = []
    settings: dict[str, Any] = {
        "learning_rate": 10.0,
        "clip_norm": 0,
        "warmup": 0,
        "max_steps": 400,
        "checkpoint_every_steps": 1,
        "seed": seed,
    }
    settings |= {"schedule": "constant", "weight_decay": 1.0, "beta1": 0.0, "beta2": 0.0}
    with pytest.raises(Failure) as failure:
        runner.train(on_event=emitted.append, settings=settings)
    assert failure.value.reason == "not_finite"
    assert "learning rate" in failure.value.advice
    last = of(emitted, "metric")[-1]["step"]
    assert f"step {last + 1}" in failure.value.message
    folder = Path(of(emitted, "checkpoint")[-1]["path"])
    assert folder.name == f"e1-s{last}"
    assert (folder / "manifest.json").exists()


def test_a_run_without_a_readable_checkpoint_fails(runner: Runner) -> None:
    emitted = of(runner.train(settings={"checkpoint_every_steps": 1}), "checkpoint")
    for folder in (runner.folder / "work" / "checkpoints").iterdir():
        (folder / "weights.safetensors").write_bytes(b"")
    failure = reason(runner, resume_from=emitted[-1]["path"])
    assert failure.reason == "checkpoint_unreadable"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), "disk_full"),
        (OSError(27, "File too large"), "disk_full"),
        (PermissionError(13, "Permission denied"), "not_writable"),
        (OSError(30, "Read-only file system"), "not_writable"),
        (MemoryError(), "out_of_memory"),
        (KeyError("x"), "unexpected"),
    ],
)
def test_system_errors_have_their_own_reasons(error: BaseException, expected: str) -> None:
    assert as_failure(error).reason == expected


# ---- as a program ------------------------------------------------------------------------------------------


def start(
    runner: Runner, *wrapper: str, limit: Callable[[], None] | None = None, **changes: Any
) -> subprocess.Popen[str]:
    runner.values["work_dir"] = str(runner.folder / "work")
    config = runner.folder / "config.json"
    config.write_text(json.dumps(runner.values | changes))
    command = [*wrapper, sys.executable, "-m", "training", "train", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
        preexec_fn=limit,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, list[Event]]:
    out, _ = process.communicate(timeout=240)
    return process.returncode, [json.loads(line) for line in out.splitlines()]


def test_user_errors_exit_with_their_code_and_a_failed_event(runner: Runner, tmp_path: Path) -> None:
    code, events = end(start(runner, base=str(tmp_path / "nowhere")))
    assert code == EXIT["base_model"]
    assert events[-1]["t"] == "failed"
    assert events[-1]["reason"] == "base_model"
    assert events[-1]["advice"]


def test_a_full_disk_has_its_own_exit_code(runner: Runner) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # weights are larger

    code, events = end(start(runner, limit=limit))
    assert code == EXIT["disk_full"]
    assert events[-1]["reason"] == "disk_full"


@pytest.mark.skipif(
    shutil.which("setpriv") is None, reason="without util-linux root cannot be made to respect modes"
)
def test_a_read_only_folder_has_its_own_exit_code(runner: Runner) -> None:
    (runner.folder / "work").mkdir(mode=0o555)
    code, events = end(start(runner, "setpriv", "--bounding-set=-dac_override", "--"))
    assert code == EXIT["not_writable"]
    assert events[-1]["reason"] == "not_writable"


def test_a_stop_request_writes_a_checkpoint_and_exits_with_code_75(runner: Runner) -> None:
    process = start(runner, settings=runner.values["settings"] | {"max_steps": 5000})
    _wait_for(runner, "metric")
    process.send_signal(signal.SIGTERM)
    code, events = end(process)
    assert code == 75
    saved = of(events, "checkpoint")[-1]
    assert saved["step"] == of(events, "metric")[-1]["step"]
    assert Path(saved["path"], "manifest.json").exists()


def test_a_prewarmed_trainer_waits_for_a_run_and_ends_with_its_parent(runner: Runner) -> None:
    runner.values["work_dir"] = str(runner.folder / "work")
    config = runner.folder / "config.json"
    config.write_text(
        json.dumps(runner.values | {"settings": runner.values["settings"] | {"max_steps": 100_000}})
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "training", "standby"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    assert json.loads(process.stdout.readline())["t"] == "ready"
    process.stdin.write(json.dumps({"config": str(config)}) + "\n")
    process.stdin.flush()
    while json.loads(process.stdout.readline())["t"] != "metric":
        pass
    process.stdin.close()  # as when the parent process ends
    process.stdout.close()
    assert process.wait(timeout=240) == 75


def _wait_for(runner: Runner, kind: str) -> None:
    spool, deadline = runner.folder / "work" / "events.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline:
        if spool.exists() and f'"t": "{kind}"' in spool.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no {kind} within a minute")
