"""Which payloads an event type may have: by source, event type and version."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from marshmallow import EXCLUDE, RAISE, Schema, ValidationError
from marshmallow.fields import Field, String

from shared.errors import ContractError, by_field

DEFAULT_VERSION = 1
"""The version of a dispatch that names none."""

Key = tuple[str, str]


class ContractRegistry:
    """The contracts of all event types.

    An event type without any contract is allowed: its payload is any JSON.
    """

    def __init__(self) -> None:
        self._schemas: dict[Key, dict[int, type[Schema]]] = {}

    def register(
        self, source: str, event_type: str, version: int, schema: type[Schema]
    ) -> type[Schema]:
        """Add the contract of one version.

        :raises ValueError: when that version has another contract already.
        """
        versions = self._schemas.setdefault((source, event_type), {})
        if versions.setdefault(version, schema) is not schema:
            raise ValueError(f"{source} {event_type} version {version} has a contract already")
        return schema

    def versions(self, source: str, event_type: str) -> list[int]:
        """Return the versions that have a contract, ascending; empty without any."""
        return sorted(self._schemas.get((source, event_type), {}))

    def check(
        self, source: str, event_type: str, payload: Any, metadata: Mapping[str, Any]
    ) -> int | None:
        """Check a payload against the contract that its metadata names.

        Unknown fields are refused where a version is named, and let pass where none
        is: a dispatcher that knows no versions knows no contract either.

        :returns: the version, or ``None`` for an event type without a contract.
        :raises ContractError: naming the fields.
        """
        versions = self._schemas.get((source, event_type))
        if versions is None:
            return None
        named = metadata.get("version")
        version = DEFAULT_VERSION if named is None else parse_version(named)
        schema = versions.get(version)
        if schema is None:
            known = ", ".join(map(str, sorted(versions)))
            raise ContractError(
                {"metadata.version": f"{event_type} has no version {version}, only {known}"}
            )
        if not isinstance(payload, Mapping):
            raise ContractError({"payload": f"{event_type} wants an object"})
        judge = _instance(schema, EXCLUDE if named is None else RAISE)
        if not _is_plainly_right(judge, payload):
            errors = judge.validate(payload)
            if errors:
                flat = by_field({"payload": errors}, "payload")
                raise ContractError({field: " ".join(said) for field, said in flat.items()})
        return version


@cache
def _instance(schema: type[Schema], unknown: Literal["exclude", "raise"]) -> Schema:
    # making one costs more than a validation does
    return schema(unknown=unknown)


def _is_plainly_right(schema: Schema, payload: Mapping[str, Any]) -> bool:
    """Say whether a payload is right field by field; of any other marshmallow says what it is.

    Most are, and marshmallow takes three times as long, since it makes an object of it.
    """
    if any(schema._hooks.values()):
        return False
    if schema.unknown == RAISE and not payload.keys() <= _keys_of(schema):
        return False
    try:
        return all(_is_right(field, key, payload) for key, field in _fields_of(schema))
    except ValidationError:
        return False


def _is_right(field: Field[Any], key: str, payload: Mapping[str, Any]) -> bool:
    if key not in payload:
        return not field.required
    value = payload[key]
    if value is None:
        return field.allow_none
    if type(field) is not String:
        field.deserialize(value, key, payload)
        return True
    if not isinstance(value, str):
        return False
    for validator in field.validators:
        validator(value)
    return True


@cache
def _fields_of(schema: Schema) -> list[tuple[str, Field[Any]]]:
    return [(field.data_key or name, field) for name, field in schema.load_fields.items()]


@cache
def _keys_of(schema: Schema) -> frozenset[str]:
    return frozenset(key for key, _ in _fields_of(schema))


def parse_version(named: Any) -> int:
    """Return the whole number that ``1``, ``"1"`` and ``"1.0"`` all mean.

    :raises ContractError: for anything else.
    """
    match = re.fullmatch(r"(\d{1,9})(?:\.0)?", str(named))
    if match is None or isinstance(named, bool):
        raise ContractError({"metadata.version": 'must be a version such as "1" or "1.0"'})
    return int(match[1])
