"""`/v1`: the API that OpenAI's clients already speak, put together. What its answers share: see `api_shell`."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.views.decorators.http import require_safe
from ninja import NinjaAPI
from ninja.openapi.schema import OpenAPISchema

from jobs.api import bodies, chat, errors, files, fine_tuning, models, uploads, webhooks
from llmtuner.api_docs import Docs

DESCRIPTION = """Files, uploads, fine-tuning jobs, models, completions and chat completions, as OpenAI's clients expect them.
Set `base_url` to this address and `api_key` to a key from your account's page. What this studio knows beyond that
stands under `llmtuner`, in requests and in answers."""


# What any call may answer, besides what it names itself.
REFUSALS = {
    400: "Something in the request cannot be used; `param` names it.",
    401: "No credential, or one that is not (or no longer) good.",
    403: "The key lacks the scope.",
    404: "There is none of this id, or it is somebody else's.",
    413: "The body is too large.",
    429: "Too many at once, or in this minute. See `Retry-After`.",
    503: "A store cannot be reached. See `Retry-After`.",
}


class Api(NinjaAPI):
    document: OpenAPISchema | None = None

    def get_openapi_schema(self, **options: Any) -> OpenAPISchema:
        """Made once: it takes a tenth of a second and never changes."""
        if self.document is None:
            self.document = self._made_document(**options)
        return self.document

    def _made_document(self, **options: Any) -> OpenAPISchema:
        document = super().get_openapi_schema(**options)
        shape = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for methods in document["paths"].values():
            for details in methods.values():
                for status, words in REFUSALS.items():
                    details["responses"][status] = {"description": words, "content": shape}
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
api.add_router("/uploads", uploads.router, tags=["Uploads"])
api.add_router("/fine_tuning/jobs", fine_tuning.router, tags=["Fine-tuning"])
api.add_router("/models", models.router, tags=["Models"])
api.add_router("/webhook_endpoints", webhooks.router, tags=["Webhooks"])
api.add_router("", chat.router, tags=["Generation"])
