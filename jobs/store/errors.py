"""Whether a store is away for now, or set up wrongly so that waiting will not help: what we say differs."""

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
    aws.ParamValidationError,  # a name that no bucket can have
)
# PostgreSQL gives no code for what it refuses while connecting, and SQLite none at all.
_SQL_WORDS = (
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


def outage(error: BaseException) -> str | None:
    """UNREACHABLE or MISCONFIGURED for what a store is to blame for, None for any other error."""
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
        return any(words in str(error) for words in _SQL_WORDS)
    refusals = (*_AWS_ERRORS, redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError)
    return isinstance(error, refusals)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
