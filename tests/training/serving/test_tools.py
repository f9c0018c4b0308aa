"""The server separates tool calls from the text of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.serving.test_serve import Server
from tests.training.serving.test_serve import text as text_of
from tests.training.tool_model import AFTER, ANSWERS, CONTROL, MISTRAL, TOOLS, messages_of, write_tool_model
from training.__main__ import main


@pytest.fixture(scope="module", params=["our form", "control tokens"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    form = (None, ()) if request.param == "our form" else (MISTRAL, CONTROL)
    return write_tool_model(tmp_path_factory.mktemp("tools"), *form)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.kill()
    server.process.wait()


def answer(
    server: Server, model: Path, messages: list[dict[str, Any]], **options: Any
) -> list[dict[str, Any]]:
    conversation = {"messages": messages, "tools": TOOLS}
    return server.generate_text(
        **{"model": str(model), "conversation": conversation, "max_tokens": 400, **options}
    )


def test_calls_are_in_the_last_line_and_not_in_the_text(server: Server, model: Path) -> None:
    for prompt, (content, calls) in ANSWERS.items():
        lines = answer(server, model, messages_of(prompt))
        assert text_of(lines) == content
        [choice] = lines[-1]["choices"]
        assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
        parsed = [(call["name"], json.loads(call["arguments"])) for call in choice.get("tool_calls", [])]
        assert parsed == [("look_up", arguments) for arguments in calls]


def test_text_before_a_call_comes_before_the_call_is_generated(server: Server, model: Path) -> None:
    lines = answer(server, model, messages_of("a moon and a mat?"), max_tokens=12)
    assert text_of(lines).startswith("On it.")
    assert lines[-1]["choices"] == [{"index": 0, "finish_reason": "length"}]
    whole = answer(server, model, messages_of("a moon and a mat?"), n=2)
    assert [len(choice["tool_calls"]) for choice in whole[-1]["choices"]] == [2, 2]


def test_an_answer_to_a_result_is_text(server: Server, model: Path) -> None:
    [arguments] = ANSWERS["the cat?"][1]
    call = {"type": "function", "id": "call_1", "function": {"name": "look_up", "arguments": arguments}}
    messages = [
        *messages_of("the cat?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "on it", "tool_call_id": "call_1"},
    ]
    assert text_of(answer(server, model, messages)) == AFTER


@pytest.mark.parametrize(
    "conversation", ["text", {}, {"messages": "text"}, {"messages": [], "tools": "text"}]
)
def test_a_malformed_conversation_is_refused(server: Server, conversation: Any) -> None:
    [error] = server.generate_text(model="/none", conversation=conversation)
    assert (error["t"], error["code"]) == ("error", "bad_request")


def test_the_command_line_prints_calls(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "messages.json").write_text(json.dumps(messages_of("the cat?")))
    arguments = ["generate", "--model", str(model), "--max-tokens", "400"]
    arguments += ["--tools", str(tmp_path / "tools.json"), "--messages"]
    written = json.dumps(ANSWERS["the cat?"][1][0], ensure_ascii=False)
    assert main([*arguments, str(tmp_path / "messages.json")]) == 0
    assert capsys.readouterr().out.strip() == f"Calls look_up with {written}"
    assert main([*arguments, json.dumps(messages_of("a moon and a mat?")), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    text, calls = ANSWERS["a moon and a mat?"]
    assert (row["text"], [call["arguments"] for call in row["tool_calls"]]) == (text, calls)
    (tmp_path / "tools.json").write_text('[{"name":\n}]')
    assert main([*arguments, str(tmp_path / "messages.json")]) == 2
    assert "line 2, column 1" in capsys.readouterr().err
