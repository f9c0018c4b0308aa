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


Content = Annotated[
    dict[str, Any],
    Field(description="All fields of the row, like one line of a JSONL file; cells of a table are text."),
]


class RowEdit(Request):
    row: Annotated[StrictInt, Field(ge=1)]
    content: Content


class VersionCreate(Request):
    """Rows are numbered from 1 in the order of the file. Blank lines and a table's header do not count."""

    edit: Annotated[list[RowEdit], Field(max_length=10_000, description="Rows to replace.")] = []  # noqa: RUF012  pydantic copies it
    exclude: Annotated[
        list[Annotated[StrictInt, Field(ge=1)]],
        Field(max_length=10_000, description="Numbers of rows to leave out."),
    ] = []  # noqa: RUF012  pydantic copies it
    add: Annotated[list[Content], Field(max_length=10_000, description="Rows to put at the end.")] = []  # noqa: RUF012  pydantic copies it


class FileSplit(Request):
    percent: Annotated[
        float,
        Field(
            gt=0,
            le=90,
            description="Share of the rows in the second file. Rows with the same prompt stay together.",
        ),
    ] = 10
    seed: Annotated[StrictInt, Field(ge=0, le=2**31)] = 0
    lines: Annotated[
        StrictStr | None,
        Field(
            max_length=1000,
            description="Instead: the lines whose rows are in the second file, as in `1-100, 205`.",
        ),
    ] = None


class FileMerge(Request):
    file_id: Annotated[StrictStr, Field(max_length=100)]
    filename: Annotated[StrictStr | None, Field(min_length=1, max_length=190)] = None


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
