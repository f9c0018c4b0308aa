"""What the schemas of `/v1` share: strict request bodies, errors and pages."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from ninja import Schema
from pydantic import ConfigDict

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
