"""The OpenAPI document as a page. It is rendered on the server, so it needs neither scripts nor an external network."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from ninja import NinjaAPI
from ninja.openapi.docs import DocsBase

SCOPES = {"ReadKey": "read", "WriteKey": "write", "InferenceKey": "inference", "ReadStreamKey": "read"}


class Docs(DocsBase):
    def render_page(self, request: HttpRequest, api: NinjaAPI, **kwargs: Any) -> HttpResponse:
        document = api.get_openapi_schema()
        schemas = document["components"]["schemas"]
        groups: dict[str, list[dict[str, Any]]] = {}
        for path, methods in document["paths"].items():
            for method, details in methods.items():
                operation = {
                    "method": method.upper(),
                    "path": path,
                    "summary": details["summary"],
                    "description": _with_code(details.get("description", "")),
                    "scopes": ", ".join(
                        SCOPES.get(name, name) for entry in details.get("security", []) for name in entry
                    ),
                    "tables": _tables(details, schemas),
                }
                groups.setdefault(details.get("tags", ["Other"])[0], []).append(operation)
        context = {"groups": groups, "base_url": request.build_absolute_uri("/v1")}
        return render(request, "api/docs.html", context)


def _tables(details: dict[str, Any], schemas: dict[str, Any]) -> list[dict[str, Any]]:
    tables = []
    parameters = [
        _row(entry["name"], entry["schema"], entry.get("required", False)) for entry in details["parameters"]
    ]
    if parameters:
        tables.append({"title": "Parameters", "rows": parameters})
    for kind, content in details.get("requestBody", {}).get("content", {}).items():
        tables.append({"title": f"Body ({kind})", "rows": _fields(content["schema"], schemas)})
    for status, response in details["responses"].items():
        content = response.get("content", {}).get("application/json")
        rows = _fields(content["schema"], schemas) if content and str(status) == "200" else []
        if rows:
            tables.append({"title": "Response", "rows": rows})
    return tables


def _fields(schema: dict[str, Any], schemas: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rsplit("/", 1)[1]]
    required = schema.get("required", [])
    return [_row(name, field, name in required) for name, field in schema.get("properties", {}).items()]


def _row(name: str, schema: dict[str, Any], required: bool) -> dict[str, Any]:
    return {
        "name": name,
        "kind": _kind(schema),
        "description": _with_code(schema.get("description", "")),
        "required": required,
    }


def _with_code(text: str) -> SafeString:
    """The text with everything between backticks as code."""
    parts = enumerate(text.split("`"))
    code = '<code class="font-mono">{}</code>'
    return format_html_join("", "{}", ((format_html(code, part) if n % 2 else part,) for n, part in parts))


def _kind(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[1])
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return " | ".join(map(repr, schema["enum"]))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = (kind for option in schema[key] for kind in _kind(option).split(" | "))
            return " | ".join(dict.fromkeys(kinds))
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    low, high = schema.get("minimum"), schema.get("maximum")
    bounds = (
        f" {low if low is not None else '…'}–{high if high is not None else '…'}"
        if (low, high) != (None, None)
        else ""
    )
    return kind + bounds
