"""Fine-tuning jobs, their events and checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ninja import Schema
from pydantic import (
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError

from jobs.api.schemas.common import Request

MAX_SEED = 2**31 - 1
Auto = Literal["auto"]


def _in_range(range_: str) -> WrapValidator:
    """Reports the whole range if a number is outside of it. Pydantic names only the bound that was exceeded."""

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
        description="LLM Tuner's own settings by name, for example `adapter`, `lora_rank` and `sequence_length`.",
    )

    @field_validator("metadata")
    @classmethod
    def _within_limits(cls, pairs: dict[str, str] | None) -> dict[str, str] | None:
        if pairs is None:
            return None
        if len(pairs) > 16:
            raise ValueError("there can be at most 16 pairs")
        if any(not 1 <= len(key) <= 64 or len(value) > 512 for key, value in pairs.items()):
            raise ValueError("a key must have 1 to 64 characters, and a value at most 512")
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
        description="Name, phase, progress, latest metrics, estimate, verdict, `fidelity` (the export check) and all "
        "settings. `task` is the task by which answers are scored (`name`, `automatic`, `text`). A job that succeeded has `scores`: "
        "the metrics of held-out answers, from 0 to 1, of the base model (`base`) and the tuned one (`tuned`). It has `kept_step`, the step of the model's weights, whose held-out figures are its "
        "metrics, and `stopped_early`. A newly created job also has `warnings`: the warnings that the form would show, each with a `title` "
        "and a `text`. They do not stop the job.",
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
