"""Files and uploads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from ninja import Schema
from pydantic import Field, StrictInt, StrictStr

from jobs.api.schemas.common import Request


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
        default={}, description="The data report: rows, tokens, format and findings."
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
