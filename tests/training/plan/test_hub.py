"""Base models over HTTP, from `tests.hub_server`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_server import COMMIT, HubServer, running
from tests.training.tiny import write_model
from training.plan import hub
from training.plan.events import Failure


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    plain = write_model(tmp_path_factory.mktemp("plain"))
    (plain / "pytorch_model.bin").write_bytes(b"a pickle")
    (plain / "onnx").mkdir()
    (plain / "onnx" / "model.safetensors").write_bytes(b"another")
    code = write_model(tmp_path_factory.mktemp("code"))
    config = json.loads((code / "config.json").read_text())
    (code / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}})
    )
    (code / "evil.py").write_text("raise SystemExit('run')")
    with running({"gpt2": plain, "someone/with-code": code}) as server:
        yield server


def locate(
    server: HubServer,
    home: Path,
    name: str,
    revision: str | None = None,
    most_bytes: int = -1,
    **environment: str,
):
    """`hub.locate` in a child process, since the library reads HF_ENDPOINT when it is imported.
    `most_bytes`: the size limit of files that it writes."""
    script = (
        f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({most_bytes}, {most_bytes}))\n"
        "import json, sys\nfrom training.plan import hub\nfrom training.plan.events import Failure\n"
        "try:\n    print(json.dumps({'folder': str(hub.locate(*json.loads(sys.argv[1])))}))\n"
        "except Failure as f:\n    print(json.dumps({'reason': f.reason, 'message': f.message}))\n"
        "assert 'torch' not in sys.modules"
    )
    variables = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([name, revision])],
        env=variables | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_is_downloaded_once_and_without_code(server, tmp_path):
    server.fetched.clear()
    folder = Path(locate(server, tmp_path, "gpt2")["folder"])
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (folder / "model.safetensors").read_bytes() == (
        server.repositories["gpt2"] / "model.safetensors"
    ).read_bytes()
    before = list(server.fetched)
    assert locate(server, tmp_path, "gpt2", COMMIT)["folder"] == str(folder)
    assert locate(server, tmp_path, "gpt2", None, HF_HUB_OFFLINE="1")["folder"] == str(folder)
    assert server.fetched == before


def test_a_full_disk_is_not_reported_as_a_bad_model(server, tmp_path):
    assert locate(server, tmp_path, "gpt2", most_bytes=2_000)["reason"] == "disk_full"


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("someone/no-such-model", None, "has no model named"),
        ("gpt2", "no-such-branch", "no revision"),
        ("not a name!", None, "not a valid model name"),
        ("someone/with-code", None, "never run"),
    ],
)
def test_download_errors_are_explained(server, tmp_path, name, revision, message):
    failure = locate(server, tmp_path, name, revision)
    assert failure["reason"] == "base_model"
    assert message in failure["message"]
    assert not list(tmp_path.rglob("*.py"))


def test_an_unreachable_hub_is_explained(server, tmp_path):
    failure = locate(server, tmp_path, "gpt2", None, HF_ENDPOINT="http://127.0.0.1:9")
    assert failure["reason"] == "base_model"
    assert "reached" in failure["message"]


def test_a_local_folder_is_used_in_place(tmp_path):
    folder = write_model(tmp_path / "own")
    assert hub.locate(str(folder)) == folder


def test_a_folder_without_safetensors_is_refused(tmp_path):
    folder = write_model(tmp_path / "own")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Failure, match="no safetensors"):
        hub.locate(folder)


@pytest.mark.parametrize(
    ("file", "wanted"),
    [
        ("additional_chat_templates/tool_use.jinja", True),
        ("chat_template.jinja", True),
        ("model.safetensors", True),
        ("LICENSE.txt", True),
        ("onnx/model.safetensors", False),
        ("original/config.json", False),
        ("additional_chat_templates/run.py", False),
        ("additional_chat_templates/old/tool_use.jinja", False),
        ("adapters/adapter_model.safetensors", False),
        ("LICENSES/a.txt", False),
        ("consolidated.safetensors", False),
    ],
)
def test_chat_templates_are_the_only_files_of_a_subfolder(file: str, wanted: bool) -> None:
    assert hub.is_wanted(file) is wanted
