"""Models."""

from __future__ import annotations

from typing import Any, Literal

from ninja import Schema
from pydantic import Field


class Model(Schema):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    llmtuner: dict[str, Any] = Field(
        default={}, description="Details: base, job, metrics, verdict and `fidelity` (the export check)."
    )
