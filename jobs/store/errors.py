"""A refused request; and whether a store is temporarily unreachable, or misconfigured so that waiting will not help."""

from __future__ import annotations

from collections.abc import Iterator

import botocore.exceptions as aws
import redis.exceptions
from django.db import InterfaceError, OperationalError, ProgrammingError
from pynamodb.exceptions import PynamoDBException, TableDoesNotExist

from jobs.store import blobs

UNREACHABLE, MISCONFIGURED = "unreachable", "misconfigured"
_AWS_CODES = frozenset(
    {
        "403",
        "AccessDenied",
        "AccessDeniedException",
        "AllAccessDisabled",
        "AuthFailure",
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "ExpiredTokenException",
        "IncompleteSignature",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "InvalidToken",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "NoSuchBucket",
        "PermanentRedirect",
        "RequestTimeTooSkewed",
        "ResourceNotFoundException",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
_AWS_ERRORS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.NoRegionError,
    aws.ParamValidationError,  # an invalid bucket name
)
# PostgreSQL has no code for errors while connecting, and SQLite has none at all.
_SQL_MESSAGES = (
    "authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "does not exist",
    "permission denied",
    "no such table",
    "no such column",
    "unable to open database file",
    "readonly database",
)


class Refused(Exception):
    """A request that cannot be accepted. The message says why, and what to change.

    `field` names what to change, if it is one field, and `code` is what callers of `/v1` can test. A `temporary` refusal
    may be gone when the same request is sent again.
    """

    def __init__(
        self, message: str, *, field: str = "", code: str = "invalid_value", temporary: bool = False
    ) -> None:
        self.message, self.field, self.code, self.temporary = message, field, code, temporary
        super().__init__(message)


def outage(error: BaseException) -> str | None:
    """UNREACHABLE or MISCONFIGURED if a store caused the error, else None."""
    if any(_is_misconfigured(cause) for cause in _causes(error)):
        return MISCONFIGURED
    if isinstance(error, blobs.Missing | blobs.Damaged | ProgrammingError):
        return None
    stores = (
        PynamoDBException,
        OperationalError,
        InterfaceError,
        redis.exceptions.ConnectionError,
        redis.exceptions.TimeoutError,
        blobs.StorageError,
    )
    return UNREACHABLE if isinstance(error, stores) else None


def _is_misconfigured(error: BaseException) -> bool:
    if isinstance(error, aws.ClientError):
        return error.response.get("Error", {}).get("Code") in _AWS_CODES
    if isinstance(error, PynamoDBException):
        return isinstance(error, TableDoesNotExist) or error.cause_response_code in _AWS_CODES
    if isinstance(error, OperationalError | ProgrammingError):
        return any(text in str(error) for text in _SQL_MESSAGES)
    configuration_errors = (
        *_AWS_ERRORS,
        redis.exceptions.AuthenticationError,
        redis.exceptions.NoPermissionError,
    )
    return isinstance(error, configuration_errors)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
