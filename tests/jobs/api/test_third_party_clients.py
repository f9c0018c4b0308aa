"""Third-party programs written for OpenAI run here with only the address and the key changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.api.conftest import ApiUser, training_rows
from tests.services import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("studio")]
RECIPE = Path(__file__).with_name("cookbook_recipe.py")
_recipe_output: dict[str, str] = {}  # of the script, which runs once for all tests here


def environment(**more: str) -> dict[str, str]:
    """Only what a program finds on any machine, nothing of ours."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**inherited, **more}


def parse_output(text: str) -> dict[str, str]:
    """The values by label of lines such as `Status: succeeded`; of several lines with one label, the last counts."""
    pairs = (line.partition(": ") for line in text.splitlines())
    return {label: value for label, _, value in pairs}


@pytest.fixture
def output(web: Any, users: dict[str, ApiUser], tmp_path: Path) -> dict[str, str]:
    """What the Cookbook script printed, by label."""
    if not _recipe_output:
        completed = subprocess.run(
            [sys.executable, str(RECIPE), str(tmp_path)],
            env=environment(OPENAI_BASE_URL=f"{web.url}/v1", OPENAI_API_KEY=users["alice"].key),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert completed.returncode == 0, completed.stdout + completed.stderr
        _recipe_output.update(parse_output(completed.stdout))
    return _recipe_output


def test_the_cookbook_script_fine_tunes_and_uses_its_model(output: dict[str, str]) -> None:
    assert output["Status"] == "succeeded"
    assert output["Fine-tuned model ID"].startswith("ft:")
    assert ":recipe-ner:" in output["Fine-tuned model ID"]
    assert int(output["Trained Tokens"]) > 0
    assert int(output["Result rows"]) > 10
    assert float(output["Last loss"]) < float(output["First loss"]) / 3
    assert float(output["Validation loss"]) > 0
    ingredients = json.loads(json.loads(output["Answer"]))  # the model has learned to answer with a list
    assert all(isinstance(food, str) for food in ingredients)


@pytest.mark.parametrize("streamed", [True, False])
def test_the_llm_tool_chats_with_a_tuned_model(
    output: dict[str, str], web: Any, users: dict[str, ApiUser], tmp_path: Path, streamed: bool
) -> None:
    """`llm` by Simon Willison, from PyPI, configured only by its own files."""
    model = output["Fine-tuned model ID"]
    described = {
        "model_id": "tuned",
        "model_name": model,
        "api_base": f"{web.url}/v1",
        "api_key_name": "tuner",
        "can_stream": streamed,
    }
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([described]))  # YAML is a superset
    (tmp_path / "keys.json").write_text(json.dumps({"tuner": users["alice"].key}))
    argv = [str(Path(sys.executable).with_name("llm")), "prompt", "-m", "tuned", "-o", "temperature", "0"]
    argv += ["-o", "max_tokens", "12", *([] if streamed else ["--no-stream"])]
    argv += ["-s", "Extract the generic ingredients.", 'Ingredients: ["1 c. sugar", "2 Tbsp. milk"]']
    completed = subprocess.run(
        argv,
        env=environment(LLM_USER_PATH=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.strip()
    logs = json.loads(
        subprocess.run(
            [argv[0], "logs", "list", "--json"],
            env=environment(LLM_USER_PATH=str(tmp_path)),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
    )
    assert logs[0]["response"].strip() == completed.stdout.strip()
    assert logs[0]["output_tokens"] in range(1, 13)


def test_openais_node_client_uploads_trains_chats_and_deletes(
    web: Any, users: dict[str, ApiUser], tmp_path: Path
) -> None:
    """`openai` from npm, as bin/setup installs it."""
    path = tmp_path / "train.jsonl"
    path.write_bytes(training_rows(60))
    completed = subprocess.run(
        [str(ROOT / ".tools/node"), str(Path(__file__).with_name("node_client.cjs")), str(path)],
        env=environment(
            NODE_PATH=str(ROOT / ".tools/node_modules"),
            OPENAI_BASE_URL=f"{web.url}/v1",
            OPENAI_API_KEY=users["alice"].key,
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    printed = parse_output(completed.stdout)
    size = str(path.stat().st_size)
    assert (printed["Uploaded bytes"], printed["File name"]) == (size, "train.jsonl")
    assert (printed["File status"], printed["Same bytes"]) == ("processed", "true")
    assert (printed["Upload status"], printed["Upload bytes"]) == ("completed", size)
    assert printed["Job status"] == "succeeded"
    model = printed["Model"]
    assert ":node:" in model
    messages = [event["message"] for event in json.loads(printed["Events"])]
    assert messages[:2] == ["The job has successfully completed", f"New fine-tuned model created: {model}"]
    assert printed["Newest checkpoint"] == model
    assert printed["Answer"] == printed["Streamed answer"]
    assert (printed["Model deleted"], printed["File deleted"]) == ("true", "true")
    assert printed["Afterwards"] == "NotFoundError"
