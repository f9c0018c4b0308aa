"""The schemas of `/v1`: OpenAI's fields under OpenAI's names, and ours under `llmtuner`."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from ninja import Schema
from pydantic import (
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from jobs.api import parameters

MAX_SEED = 2**31 - 1
T = TypeVar("T")


class Request(Schema):
    """Request bodies: strict about the types of known fields; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class ErrorDetail(Schema):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Schema):
    error: ErrorDetail


class Page(Schema, Generic[T]):
    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Deleted(Schema):
    id: str
    object: str
    deleted: bool = True


# ---- files and uploads -------------------------------------------------------------------------


class File(Schema):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    expires_at: int | None = None
    status_details: str | None = None
    llmtuner: dict[str, Any] = Field(
        default={}, description="The data report: rows, tokens, format, findings."
    )


class ExpiresAfter(Request):
    anchor: Literal["created_at"]
    seconds: Annotated[StrictInt, Field(ge=3600, le=2_592_000)]


class UploadCreate(Request):
    bytes: Annotated[StrictInt, Field(ge=1)]
    filename: Annotated[StrictStr, Field(min_length=1, max_length=255)]
    mime_type: StrictStr = "application/jsonl"
    purpose: StrictStr
    expires_after: ExpiresAfter | None = None


class UploadComplete(Request):
    part_ids: Annotated[list[StrictStr], Field(min_length=1, max_length=10_000)]
    md5: StrictStr | None = None


class Upload(Schema):
    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: File | None = None


class UploadPart(Schema):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


# ---- fine-tuning -------------------------------------------------------------------------------

Auto = Literal["auto"]


def _in_range(range_: str) -> WrapValidator:
    """Reports the whole range if a number is outside it; pydantic names only the bound that was exceeded."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as refused:
            if any(error["type"].endswith("_type") for error in refused.errors()):
                raise
            raise PydanticCustomError("out_of_range", f"Input should be {range_}") from refused

    return WrapValidator(check)


Epochs = Annotated[StrictInt, Field(ge=1, le=50), _in_range("from 1 to 50")]
BatchSize = Annotated[StrictInt, Field(ge=1, le=256), _in_range("from 1 to 256")]
Multiplier = Annotated[StrictFloat | StrictInt, Field(gt=0, le=1000), _in_range("more than 0, up to 1000")]


class Hyperparameters(Request):
    # A misspelled hyperparameter must be an error, not ignored.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    n_epochs: Auto | Epochs | None = None
    batch_size: Auto | BatchSize | None = None
    learning_rate_multiplier: Auto | Multiplier | None = None


class Supervised(Request):
    hyperparameters: Hyperparameters | None = None


class Method(Request):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None


class JobCreate(Request):
    model: Annotated[StrictStr, Field(min_length=1, max_length=300)]
    training_file: Annotated[StrictStr, Field(min_length=1, max_length=100)]
    validation_file: Annotated[StrictStr, Field(max_length=100)] | None = None
    suffix: Annotated[StrictStr, Field(min_length=1, max_length=64)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=MAX_SEED)] | None = None
    metadata: dict[StrictStr, StrictStr] | None = None
    hyperparameters: Hyperparameters | None = Field(
        None, description="Deprecated by OpenAI in favor of `method`."
    )
    method: Method | None = None
    integrations: list[Any] | None = None
    llmtuner: dict[str, Any] | None = Field(
        None,
        description="Our settings by their own names, for example `adapter`, `lora_rank` and `sequence_length`.",
    )

    @field_validator("metadata")
    @classmethod
    def _within_limits(cls, pairs: dict[str, str] | None) -> dict[str, str] | None:
        if pairs is None:
            return None
        if len(pairs) > 16:
            raise ValueError("at most 16 pairs")
        if any(not 1 <= len(key) <= 64 or len(value) > 512 for key, value in pairs.items()):
            raise ValueError("keys must have 1 to 64 characters, and values at most 512")
        return pairs


class JobError(Schema):
    code: str
    message: str
    param: str | None = None


class JobHyperparameters(Schema):
    n_epochs: Auto | int | None = None
    batch_size: Auto | int | None = None
    learning_rate_multiplier: Auto | float | None = None


class JobSupervised(Schema):
    hyperparameters: JobHyperparameters


class JobMethod(Schema):
    type: Literal["supervised"] = "supervised"
    supervised: JobSupervised


WARNINGS: dict[str, Any] = {  # JSON schema
    "type": "array",
    "items": {
        "type": "object",
        "required": ["title", "text"],
        "properties": {"title": {"type": "string"}, "text": {"type": "string"}},
    },
}


# As at OpenAI; the stored status is under `llmtuner`.
ShownStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]


class Job(Schema):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None = None
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    hyperparameters: JobHyperparameters
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: ShownStatus
    trained_tokens: int | None = None
    training_file: str
    validation_file: str | None = None
    estimated_finish: int | None = None
    integrations: list[Any] | None = None
    metadata: dict[str, str] | None = None
    method: JobMethod
    llmtuner: dict[str, Any] = Field(
        default={},
        description="Name, phase, progress, latest metrics, estimate, verdict, `fidelity` (the export check), all "
        "settings. A newly created job also has `warnings`, a list of `title` and `text`: the warnings that the form "
        "shows. They do not stop the job.",
        json_schema_extra={"properties": {"warnings": WARNINGS}},
    )


class JobEvent(Schema):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None = None


class CheckpointMetrics(Schema):
    step: float | None = None
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class Checkpoint(Schema):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


# ---- models and generation ---------------------------------------------------------------------


class Model(Schema):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    llmtuner: dict[str, Any] = Field(
        default={}, description="Details: base, job, metrics, verdict, `fidelity` (the export check)."
    )


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


class Generation(Request):
    """Supported fields only. `jobs.api.parameters` lists the others and how they are treated."""

    model: Annotated[StrictStr, Field(min_length=1, max_length=300)]
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: Annotated[StrictInt, Field(ge=1, le=8)] | None = None
    stop: Stops | None = None
    seed: Seed | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, le=1_000_000)] | None = Field(
        None, description="Sample only from the k most likely tokens; 0 or -1: from all."
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
        """Runs before the union, whose errors would name four branches."""
        if isinstance(prompt, str):
            return prompt
        if not isinstance(prompt, list) or not prompt:
            raise ValueError(
                "must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
            )
        if type(prompt[0]) is int:
            if any(type(token_id) is not int for token_id in prompt):
                raise ValueError("a prompt that starts with a token id must contain only token ids")
            return prompt
        if len(prompt) > MAX_PROMPTS:
            raise ValueError(f"at most {MAX_PROMPTS} prompts per request")
        if not all(isinstance(one, str) for one in prompt) and not all(map(_are_token_ids, prompt)):
            raise ValueError(
                "must be a string, a list of strings, a list of token ids, or a list of lists of token ids"
            )
        return prompt


def _are_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token_id) is int for token_id in prompt)


class TextPart(Request):
    type: Literal["text"]
    text: Text


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]

    def plain(self) -> dict[str, str]:
        """In the format of training rows. OpenAI renamed system to developer; chat templates know only system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatCreate(Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1_000)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_parameters(cls, data: Any) -> Any:
        parameters.check("chat", data)
        return data


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


class ChatMessage(Schema):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Schema):
    index: int
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Schema):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


# ---- webhooks ----------------------------------------------------------------------------------


class WebhookCreate(Request):
    name: Annotated[StrictStr, Field(max_length=200)] = ""
    url: Annotated[StrictStr, Field(min_length=1, max_length=2000)]
    event_types: Annotated[list[StrictStr], Field(min_length=1, max_length=50)]


class WebhookEndpoint(Schema):
    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str | None = None
    llmtuner: dict[str, Any] = Field(
        default={}, description="Whether it is active, and the result of the last delivery."
    )


class WebhookWithSecret(WebhookEndpoint):
    signing_secret: str
