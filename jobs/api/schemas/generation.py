"""Completions and chats: requests, answers and log probabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from ninja import Schema
from pydantic import (
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    field_validator,
    model_validator,
)

from jobs.api import bodies, parameters
from jobs.api.errors import ApiError
from jobs.api.schemas.common import Request


class StreamOptions(Request):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool | None = None


Temperature = Annotated[StrictFloat | StrictInt, Field(ge=0, le=2)]
TopP = Annotated[StrictFloat | StrictInt, Field(ge=0, le=1)]
MaxTokens = Annotated[StrictInt, Field(ge=1, le=1_000_000)]
Stop = Annotated[StrictStr, Field(max_length=500)]
Stops = Stop | Annotated[list[Stop], Field(max_length=16)]
Seed = Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)]
Text = Annotated[StrictStr, Field(max_length=1_000_000)]
TokenId = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
MAX_PROMPTS = 128
MAX_TOOLS = 128
MAX_TOOLS_CHARS = 1_000_000


class Generation(Request):
    """Only the supported fields. `jobs.api.parameters` lists the others and how they are treated."""

    model: Annotated[StrictStr, Field(min_length=1, max_length=300)]
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: Annotated[StrictInt, Field(ge=1, le=8)] | None = None
    stop: Stops | None = None
    seed: Seed | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=1_000_000)] | None = Field(
        None, description="Sample only from the k most likely tokens. 0 or -1 means all tokens."
    )
    min_p: Annotated[StrictFloat | StrictInt, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[StrictFloat | StrictInt, Field(ge=0.01, le=2)] | None = None
    llmtuner: dict[str, Any] | None = Field(None, description="`top_k`, as above.")


TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionCreate(Generation):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[StrictInt, Field(ge=0, le=1_000_000)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    best_of: StrictInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_parameters(cls, data: Any) -> Any:
        parameters.check("completions", data)
        return data

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, prompt: Any) -> Any:
        """Runs before the union is validated, because its errors would name all four branches."""
        if isinstance(prompt, str):
            return prompt
        if not isinstance(prompt, list) or not prompt:
            raise ValueError(
                "must be a string, a list of strings, a list of token IDs, or a list of lists of token IDs"
            )
        if type(prompt[0]) is int:
            if any(type(token_id) is not int for token_id in prompt):
                raise ValueError("a prompt that starts with a token ID must contain only token IDs")
            return prompt
        if len(prompt) > MAX_PROMPTS:
            raise ValueError(f"a request can have at most {MAX_PROMPTS} prompts")
        if not all(isinstance(one, str) for one in prompt) and not all(map(_are_token_ids, prompt)):
            raise ValueError(
                "must be a string, a list of strings, a list of token IDs, or a list of lists of token IDs"
            )
        return prompt


def _are_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token_id) is int for token_id in prompt)


class TextPart(Request):
    type: Literal["text"]
    text: Text


FunctionName = Annotated[StrictStr, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
Id = Annotated[StrictStr, Field(max_length=200)]


class FunctionCall(Request):
    name: FunctionName
    arguments: Text = Field(description="A JSON object, as text.")

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, arguments: str) -> str:
        _object_of(arguments)
        return arguments

    def plain(self) -> dict[str, Any]:
        return {"name": self.name, "arguments": _object_of(self.arguments)}


def _object_of(arguments: str) -> dict[str, Any]:
    try:
        value = bodies.loads(arguments.encode()) if arguments.strip() else {}
    except ApiError as error:
        raise ValueError(f"must be a JSON object, as text. {error.message}") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object, as text")
    return value


class ToolCall(Request):
    id: Id
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionDefinition(Schema):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: StrictBool | None = None


class Tool(Schema):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    type: Literal["function"]
    function: FunctionDefinition


class Message(Request):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None
    function_call: FunctionCall | None = None
    tool_call_id: Id | None = None
    name: Id | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and not self.calls():
            raise ValueError("content is required")
        return self

    def calls(self) -> list[dict[str, Any]]:
        """The calls in the format of training rows."""
        if self.function_call:
            return [{"type": "function", "function": self.function_call.plain()}]
        return [
            {"type": "function", "id": call.id, "function": call.function.plain()}
            for call in self.tool_calls or ()
        ]

    def plain(self) -> dict[str, Any]:
        """The message in the format of training rows. OpenAI renamed system to developer and function to tool; chat templates
        know only system and tool."""
        parts = [self.content or ""] if not isinstance(self.content, list) else [p.text for p in self.content]
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, Any] = {"role": role, "content": "".join(parts)}
        if calls := self.calls():
            message["tool_calls"] = calls
        return message | {
            key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) and role == "tool"
        }


class ChatCreate(Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1_000)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    functions: Annotated[list[FunctionDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    function_call: Literal["auto", "none"] | None = None
    _definitions: list[dict[str, Any]] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _check_parameters(cls, data: Any, validate: Any) -> Any:
        parameters.check("chat", data)
        body = validate(data)
        # As they were sent: templates write them as JSON, with the order of the keys.
        raw: Mapping[str, Any] = getattr(data, "_obj", data)
        body._definitions = list(raw.get("tools") or []) or [
            {"type": "function", "function": function} for function in raw.get("functions") or []
        ]
        if len(json.dumps(body._definitions)) > MAX_TOOLS_CHARS:
            raise ValueError(f"the tools together can have at most {MAX_TOOLS_CHARS:,} characters")
        return body

    def definitions(self) -> list[dict[str, Any]]:
        """The tools that the prompt describes."""
        return [] if "none" in (self.tool_choice, self.function_call) else self._definitions


class Usage(Schema):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(Schema):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None = None


class CompletionChoice(Schema):
    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None
    logprobs: TextLogprobs | None = None


class Completion(Schema):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(Schema):
    token: str
    bytes: list[int] | None = None
    logprob: float


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Schema):
    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(Schema):
    name: str
    arguments: str


class MadeToolCall(Schema):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Schema):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[MadeToolCall] | None = None
    function_call: CalledFunction | None = None


class ChatChoice(Schema):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length", "tool_calls", "function_call"]
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Schema):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
