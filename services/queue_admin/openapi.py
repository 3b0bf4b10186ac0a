"""The description of the calls, made from the schemas that check what they take."""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from jinja2 import Environment, FileSystemLoader
from marshmallow import Schema, fields
from nameko.extensions import ENTRYPOINT_EXTENSIONS_ATTR
from werkzeug.wrappers import Response

from services.queue_admin.answers import Problem
from services.queue_admin.routes import Route

TITLE = "queue_admin"

DESCRIPTION = (
    "Operations of the queue: see what was dispatched and what became of it, say why, repair it. "
    "Errors are problem details (RFC 9457)."
)

MEANINGS = {
    200: "All went well.",
    202: "Done; what follows from it goes on.",
    400: "The body is not a JSON object.",
    401: "A bearer token is needed.",
    404: "There is no such thing.",
    408: "The body did not arrive in time.",
    409: "It is in no state for that.",
    413: "The body is too large.",
    415: "The body must be JSON.",
    422: "Some fields are not valid; errors says which.",
    503: "A server behind this one does not answer.",
}

OF_BODIES = (400, 408, 413, 415, 422)
"""Statuses of calls that take a body."""

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
main { max-width: 60rem; margin: auto; padding: 1rem }
h2 { font-size: 1.1rem; margin-top: 2.5rem; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 }
th, td { border: 1px solid color-mix(in srgb, currentColor 25%, transparent);
  padding: .25rem .5rem; text-align: left; vertical-align: top; overflow-wrap: anywhere }
pre { overflow: auto }
"""


@cache
def specification(service: type) -> dict[str, Any]:
    """Return the description of a service's routes, as OpenAPI 3.1."""
    plugin = MarshmallowPlugin(schema_name_resolver=_name_of)
    spec = APISpec(
        title=TITLE,
        version=version("nameko-event-suite"),
        openapi_version="3.1.0",
        info={"description": DESCRIPTION},
        plugins=[plugin],
    )
    assert plugin.converter is not None  # noqa: S101 - made with the specification
    plugin.converter.add_attribute_function(_refined)  # type: ignore[no-untyped-call]
    spec.components.security_scheme("token", {"type": "http", "scheme": "bearer"})
    for route, method in routes_of(service):
        operation = _operation(route, inspect.getdoc(method) or "")
        spec.path(path=_path(route.url), operations={route.method.lower(): operation})
    described: dict[str, Any] = spec.to_dict()
    return described


def _name_of(schema: Any) -> str:
    kind = schema if isinstance(schema, type) else type(schema)
    return kind.__name__.removesuffix("Schema")


def _refined(
    _converter: Any, field: fields.Field[Any], *, ret: dict[str, Any], **_: Any
) -> dict[str, Any]:
    """Return what apispec lacks: what a raw field may be, and where a pattern begins and ends."""
    if type(field) is fields.Raw:
        return {"type": field.metadata.get("type", _ANY_TYPE)}
    if "pattern" in ret:
        return {"pattern": "^" + ret["pattern"].removesuffix(r"\Z") + "$"}
    return {}


_ANY_TYPE = ["object", "array", "string", "number", "boolean", "null"]


def routes_of(service: type) -> Iterator[tuple[Route, Any]]:
    """Yield the routes of a service, each with its method."""
    found = [
        (entrypoint, method)
        for _, method in inspect.getmembers(service, inspect.isfunction)
        for entrypoint in getattr(method, ENTRYPOINT_EXTENSIONS_ATTR, ())
        if isinstance(entrypoint, Route)
    ]
    yield from sorted(found, key=lambda each: (each[0].url, each[0].method))


def _path(rule: str) -> str:
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)


def _operation(route: Route, summary: str) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": summary.partition("\n")[0],
        "parameters": [*_places(route.url), *_query(route.query)],
        "responses": {str(status): _answer(route, status) for status in statuses_of(route)},
    }
    if route.guard is not None:
        operation["security"] = [{"token": []}, {}]
    if route.schema is not None:
        content = {"application/json": {"schema": route.schema}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _places(rule: str) -> list[dict[str, Any]]:
    return [
        {
            "in": "path",
            "name": name,
            "required": True,
            "schema": {"type": "integer", "minimum": 0} if kind else {"type": "string"},
        }
        for kind, name in re.findall(r"<(?:(int):)?(\w+)>", rule)
    ]


def _query(schema: type[Schema] | None) -> list[dict[str, Any]]:
    return [] if schema is None else [{"in": "query", "schema": schema}]


def statuses_of(route: Route) -> list[int]:
    """Return the statuses that a route may answer with, but for a bug's 500."""
    given = {route.status, 503, *route.refusals}
    if route.guard is not None:
        given.add(401)
    if route.schema is not None:
        given |= set(OF_BODIES)
    if route.query is not None or route.refuses_queries:
        given.add(422)
    return sorted(given)


def _answer(route: Route, status: int) -> dict[str, Any]:
    if status == route.status or (status == 503 and route.guard is None):
        schema, kind = route.answers, "application/json"
    else:
        schema, kind = Problem, "application/problem+json"
    content = {"content": {kind: {"schema": schema}}} if schema else {}
    return {"description": MEANINGS[status], **content}


# --- as a page


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True
)

_POLICY = "default-src 'none'; style-src 'sha256-{}'; base-uri 'none'; frame-ancestors 'none'"
"""Nothing is fetched, from here or from elsewhere, and nothing runs."""


def page_of(spec: Mapping[str, Any]) -> Response:
    """Return the description as a page."""
    calls = [
        _shown(spec, method.upper(), path, operation)
        for path, its in spec["paths"].items()
        for method, operation in its.items()
    ]
    template = _TEMPLATES.get_template("docs.html")
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    response = Response(template.render(spec=spec, calls=calls, style=STYLE), mimetype="text/html")
    response.headers["Content-Security-Policy"] = _POLICY.format(digest)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cache-Control"] = "no-store"
    return response


def _shown(
    spec: Mapping[str, Any], method: str, path: str, operation: Mapping[str, Any]
) -> dict[str, Any]:
    answers = operation["responses"]
    return {
        "id": re.sub(r"\W+", "-", f"{method}{path}").strip("-").lower(),
        "method": method,
        "path": path,
        "summary": operation["summary"],
        "fields": [*_parameters(operation), *_members(spec, operation)],
        "answers": [(status, said["description"]) for status, said in answers.items()],
        "answer": _body(spec, next(iter(answers.values()))),
    }


def _parameters(operation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for each in operation["parameters"]:
        yield {**each, "place": each["in"]}


def _members(spec: Mapping[str, Any], operation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if "requestBody" not in operation:
        return
    schema = _resolved(spec, operation["requestBody"]["content"]["application/json"]["schema"])
    for name, its in schema["properties"].items():
        required = name in schema.get("required", ())
        yield {"name": name, "place": "body", "required": required, "schema": its}


def _body(spec: Mapping[str, Any], answer: Mapping[str, Any]) -> str | None:
    for content in answer.get("content", {}).values():
        return json.dumps(_resolved(spec, content["schema"])["properties"], indent=2)
    return None


def _resolved(spec: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Mapping[str, Any] = spec["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found
