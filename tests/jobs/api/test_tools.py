"""The published `openai` client passes tools to a model and gets its calls, complete and streamed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest

from jobs.api.schemas.generation import ChatCreate
from jobs.inference.generation import GenerateRequest
from tests.jobs.api.conftest import ApiUser, put_model
from tests.jobs.api.test_openai_client import validated
from tests.training.tool_model import AFTER, ANSWERS, CONTROL, MISTRAL, TOOLS, messages_of, write_tool_model

slow = pytest.mark.slow
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
USER: dict[str, Any] = {"role": "user", "content": "Where?"}
CALL: dict[str, Any] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "f", "arguments": '{"a": 1}'},
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tool_model(tmp_path_factory.mktemp("tools"), MISTRAL, CONTROL)


@pytest.fixture
def model(web_with_inference: Any, users: dict[str, ApiUser], tuned: Path) -> str:
    """Alice's model, which has learned to call a tool."""
    return put_model(users["alice"], "tools", tuned)


def send(client: openai.OpenAI, model: str, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(
        **{
            "model": model,
            "messages": messages,
            "tools": TOOLS,
            "temperature": 0,
            "max_tokens": 400,
            **options,
        }
    )


def parsed(calls: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls or ()]


@slow
def test_calls_are_those_that_were_trained(client: openai.OpenAI, model: str) -> None:
    for prompt, (content, calls) in ANSWERS.items():
        [choice] = validated(send(client, model, messages_of(prompt))).choices
        assert parsed(choice.message.tool_calls) == [("look_up", arguments) for arguments in calls]
        assert choice.message.content == (content or (None if calls else ""))
        assert choice.finish_reason == ("tool_calls" if calls else "stop")
        ids = [call.id for call in choice.message.tool_calls or ()]
        assert len(set(ids)) == len(ids)
        assert all(
            re.fullmatch(r"[a-z0-9]{9}", id) for id in ids
        )  # the only ids that Mistral's templates take


@slow
def test_streamed_calls_are_the_same(client: openai.OpenAI, model: str) -> None:
    for prompt, (content, calls) in ANSWERS.items():
        request: Any = {"model": model, "messages": messages_of(prompt), "tools": TOOLS, "temperature": 0}
        with client.chat.completions.stream(**request, max_tokens=400) as stream:
            [choice] = stream.get_final_completion().choices
        assert parsed(choice.message.tool_calls) == [("look_up", arguments) for arguments in calls]
        assert (choice.message.content or "") == content
        assert choice.finish_reason == ("tool_calls" if calls else "stop")


@slow
def test_a_result_can_be_sent_back(client: openai.OpenAI, model: str) -> None:
    message = send(client, model, messages_of("the cat?")).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "on it"}
    history = [*messages_of("the cat?"), message.model_dump(exclude_none=True), result]
    assert send(client, model, history).choices[0].message.content == AFTER
    assert send(client, model, [*history[:1], message, result]).choices[0].message.content == AFTER


@slow
def test_the_older_functions_get_a_function_call(client: openai.OpenAI, model: str) -> None:
    options = {"tools": openai.NOT_GIVEN, "functions": [TOOLS[0]["function"]]}
    [choice] = validated(send(client, model, messages_of("the cat?"), **options)).choices
    assert choice.finish_reason == "function_call"
    assert json.loads(choice.message.function_call.arguments) == ANSWERS["the cat?"][1][0]
    history = [
        *messages_of("the cat?"),
        choice.message.model_dump(exclude_none=True),
        {"role": "function", "name": "look_up", "content": "on it"},
    ]
    assert send(client, model, history, **options).choices[0].message.content == AFTER
    arguments = ""
    for chunk in send(client, model, messages_of("the cat?"), stream=True, **options):
        if chunk.choices[0].delta.function_call:
            arguments += chunk.choices[0].delta.function_call.arguments
    assert json.loads(arguments) == ANSWERS["the cat?"][1][0]


def chat(**fields: Any) -> ChatCreate:
    return ChatCreate.model_validate({"model": "m", "messages": [USER], **fields})


def test_messages_become_those_of_training_rows() -> None:
    body = chat(
        messages=[
            {"role": "developer", "content": "Be short."},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": [{"type": "text", "text": "4"}], "tool_call_id": "call_1"},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}},
            {"role": "function", "name": "f", "content": "5"},
        ]
    )
    plain = [message.plain() for message in body.messages]
    called = {"type": "function", "id": "call_1", "function": {"name": "f", "arguments": {"a": 1}}}
    assert plain[0]["role"] == "system"
    assert plain[2] == {"role": "assistant", "content": "", "tool_calls": [called]}
    assert plain[3] == {"role": "tool", "content": "4", "tool_call_id": "call_1"}
    assert plain[4]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert plain[5] == {"role": "tool", "content": "5", "name": "f"}


def test_definitions_are_passed_on_as_they_were_sent() -> None:
    tool = {
        "function": {"parameters": {"b": {}, "a": {}}, "strict": None, "name": "f", "more": 1},
        "type": "function",
    }
    [passed] = chat(tools=[tool]).definitions()
    assert json.dumps(passed) == json.dumps(tool)
    assert chat(functions=[{"name": "f"}]).definitions() == [TOOL]
    assert chat(tools=[TOOL], tool_choice="auto", parallel_tool_calls=False).definitions() == [TOOL]
    assert chat(tools=[TOOL], tool_choice="none").definitions() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL] * 129},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "description": "x" * 999_990}}] * 2},
        {"messages": [USER, {"role": "assistant"}]},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL | {"id": 3}]}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f"}}]}]},
    ]
    + [
        {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": text}}]}
        for text in ("{", "[]", "3", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": ' + "[" * 99 + "]" * 99 + "}")
    ],
)
def test_what_is_not_a_tool_or_a_call_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"tools|messages|arguments|content|valid|at most"):
        chat(**fields)


def test_workers_of_an_earlier_release_get_no_request_that_they_would_misread() -> None:
    """They know `messages`, `prompt` and `prompts`, and ignore other fields."""
    message = chat(messages=[USER, {"role": "assistant", "tool_calls": [CALL]}]).messages[1].plain()
    for request in (
        GenerateRequest("m", messages=[USER], tools=[TOOL]),
        GenerateRequest("m", messages=[USER, message]),
        GenerateRequest("m", messages=[{"role": "tool", "content": "4"}]),
    ):
        payload = request.payload()
        assert not payload["messages"]
        assert not payload["prompt"]
        assert not payload["prompts"]
        assert payload["conversation"] == {"messages": request.messages, "tools": request.tools}
    without = GenerateRequest("m", messages=[USER]).payload()
    assert without["messages"] == [USER]
    assert not {"tools", "conversation"} & without.keys()
