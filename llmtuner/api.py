"""Assembles `/v1`, the API that OpenAI's clients can use unchanged. `api_shell` has what all of its responses share."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.views.decorators.http import require_safe
from ninja import NinjaAPI
from ninja.openapi.schema import OpenAPISchema

from jobs.api import bodies, chat, errors, file_versions, files, fine_tuning, models, uploads, webhooks
from llmtuner.api_docs import Docs

DESCRIPTION = """Files, uploads, fine-tuning jobs, models, completions and chat completions, as OpenAI's clients expect them.
Set `base_url` to this address and `api_key` to a key from your account page. Features that OpenAI's API does not have are
under `llmtuner`, both in requests and in responses."""


# Errors that any call may return, in addition to those that it declares itself.
ERRORS = {
    400: "The request is invalid. `param` names the invalid parameter.",
    401: "The credential is missing, invalid, expired or revoked.",
    403: "The key does not have the required scope.",
    404: "There is no such object, or it belongs to someone else.",
    413: "The request body is too large.",
    429: "Too many concurrent requests, or too many per minute. See `Retry-After`.",
    503: "A store is unreachable. See `Retry-After`.",
}


class Api(NinjaAPI):
    document: OpenAPISchema | None = None

    def get_openapi_schema(self, **options: Any) -> OpenAPISchema:
        """The OpenAPI document. It is built only once, because this takes a tenth of a second and it never changes."""
        if self.document is None:
            self.document = self._build_document(**options)
        return self.document

    def _build_document(self, **options: Any) -> OpenAPISchema:
        document = super().get_openapi_schema(**options)
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for methods in document["paths"].values():
            for details in methods.values():
                for status, description in ERRORS.items():
                    details["responses"][status] = {"description": description, "content": content}
        return document

    def on_exception(self, request: HttpRequest, exc: Any) -> Any:
        return errors.handle(request, exc)


api = Api(
    title="LLM Tuner",
    version="1.0.0",
    description=DESCRIPTION,
    urls_namespace="v1",
    docs=Docs(),
    docs_decorator=require_safe,
    parser=bodies.StrictParser(),
    renderer=bodies.Renderer(),
    openapi_extra={"info": {"license": {"name": "Apache-2.0", "identifier": "Apache-2.0"}}},
)
api.add_router("/files", files.router, tags=["Files"])
api.add_router("/files", file_versions.router, tags=["Files"])
api.add_router("/uploads", uploads.router, tags=["Uploads"])
api.add_router("/fine_tuning/jobs", fine_tuning.router, tags=["Fine-tuning"])
api.add_router("/models", models.router, tags=["Models"])
api.add_router("/webhook_endpoints", webhooks.router, tags=["Webhooks"])
api.add_router("", chat.router, tags=["Generation"])
