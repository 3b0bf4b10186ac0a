"""Which payloads are allowed: versions beside each other, and what is said of a wrong one."""

from __future__ import annotations

from typing import Any

import pytest
from marshmallow import Schema, ValidationError, fields, validates_schema

from shared.contracts import ContractRegistry, contracts, parse_version
from shared.errors import ContractError

REGISTERED = {
    "user_id": "123",
    "email": "user@example.com",
    "first_name": "John",
    "last_name": "Doe",
}
"""The payload of the example of ``POST /queue/publish`` in the system this one succeeds."""


class LineV1(Schema):
    sku = fields.Str(required=True)


class PlacedV1(Schema):
    total = fields.Int(required=True, strict=True)
    lines = fields.List(fields.Nested(LineV1))


class PlacedV2(Schema):
    total = fields.Str(required=True)
    currency = fields.Str(required=True)

    @validates_schema
    def known(self, data: dict[str, Any], **_: Any) -> None:
        if data["currency"] == "DEM":
            raise ValidationError("No longer in use.")


@pytest.fixture
def registry() -> ContractRegistry:
    made = ContractRegistry()
    made.register("shop", "placed", 1, PlacedV1)
    made.register("shop", "placed", 2, PlacedV2)
    return made


def check(registry: ContractRegistry, payload: Any, **metadata: Any) -> int | None:
    return registry.check("shop", "placed", payload, metadata)


def errors_of(registry: ContractRegistry, payload: Any, **metadata: Any) -> dict[str, Any]:
    with pytest.raises(ContractError) as raised:
        check(registry, payload, **metadata)
    return raised.value.errors


class TestRegistry:
    def test_keeps_versions_beside_each_other(self, registry: ContractRegistry) -> None:
        assert registry.versions("shop", "placed") == [1, 2]
        assert check(registry, {"total": 5}, version="1") == 1
        assert check(registry, {"total": "5", "currency": "EUR"}, version="2") == 2
        assert errors_of(registry, {"total": 5}, version="2").keys() == {
            "payload.total",
            "payload.currency",
        }

    def test_lets_an_event_without_contract_pass(self, registry: ContractRegistry) -> None:
        assert registry.check("shop", "shipped", ["anything"], {"version": "x"}) is None
        assert registry.check("other", "placed", None, {}) is None
        assert registry.versions("shop", "shipped") == []

    def test_takes_no_second_contract_for_a_version(self, registry: ContractRegistry) -> None:
        assert registry.register("shop", "placed", 1, PlacedV1) is PlacedV1
        with pytest.raises(ValueError, match="shop placed version 1 has a contract already"):
            registry.register("shop", "placed", 1, PlacedV2)


class TestVersion:
    @pytest.mark.parametrize("named", ["1", "1.0", 1, 1.0])
    def test_one_has_many_names(self, registry: ContractRegistry, named: Any) -> None:
        assert parse_version(named) == 1
        assert check(registry, {"total": 5}, version=named) == 1

    def test_is_one_unless_it_is_named(self, registry: ContractRegistry) -> None:
        assert check(registry, {"total": 5}) == 1
        assert check(registry, {"total": 5}, version=None) == 1

    @pytest.mark.parametrize(
        "named", ["", "one", "1.5", "v1", "-1", True, [1], {}, "1" * 10, "1.0.0"]
    )
    def test_is_a_whole_number(self, registry: ContractRegistry, named: Any) -> None:
        assert errors_of(registry, {"total": 5}, version=named) == {
            "metadata.version": 'must be a version such as "1" or "1.0"'
        }

    def test_has_to_be_known(self, registry: ContractRegistry) -> None:
        assert errors_of(registry, {"total": 5}, version="3") == {
            "metadata.version": "placed has no version 3, only 1, 2"
        }


class TestUnknownFields:
    def test_are_refused_where_a_version_is_named(self, registry: ContractRegistry) -> None:
        errors = errors_of(registry, {"total": 5, "extra": 1}, version="1")
        assert list(errors) == ["payload.extra"]

    def test_pass_where_none_is(self, registry: ContractRegistry) -> None:
        assert check(registry, {"total": 5, "extra": 1}) == 1


class TestErrors:
    def test_name_each_field(self, registry: ContractRegistry) -> None:
        payload = {"total": "many", "lines": [{"sku": "a"}, {}, {"sku": 5}]}
        assert errors_of(registry, payload).keys() == {
            "payload.total",
            "payload.lines.1.sku",
            "payload.lines.2.sku",
        }

    def test_name_the_payload_where_no_field_is_to_blame(self, registry: ContractRegistry) -> None:
        errors = errors_of(registry, {"total": "5", "currency": "DEM"}, version=2)
        assert errors == {"payload": "No longer in use."}

    @pytest.mark.parametrize("payload", [None, [], "text", 5, [{"total": 5}]])
    def test_name_a_payload_that_is_no_object(
        self, registry: ContractRegistry, payload: Any
    ) -> None:
        assert errors_of(registry, payload) == {"payload": "placed wants an object"}

    def test_are_one_line_of_text(self, registry: ContractRegistry) -> None:
        with pytest.raises(ContractError) as raised:
            check(registry, {})
        assert str(raised.value) == "payload.total: Missing data for required field."


class TestUserEvents:
    @pytest.mark.parametrize("metadata", [{}, {"source": "auth-service", "version": "1.0"}])
    def test_registered_is_valid_as_the_example_has_it(self, metadata: dict[str, Any]) -> None:
        assert contracts.check("auth_events", "user.registered", REGISTERED, metadata) == 1

    def test_registered_with_all_that_it_may_have(self) -> None:
        payload = {
            **REGISTERED,
            "role": "admin",
            "company_name": "Müller & Söhne",
            "company_domain": "example.com",
        }
        assert contracts.check("auth_events", "user.registered", payload, {"version": "1"}) == 1

    def test_logged_in_as_the_example_has_it(self) -> None:
        payload = {
            "user_id": "123",
            "email": "user@example.com",
            "ip_address": "192.0.2.1",
            "user_agent": "curl/8",
        }
        for left_out in ({}, {"ip_address": None}, {"user_agent": None}):
            body = {**payload, **left_out}
            assert contracts.check("auth_events", "user.logged_in", body, {"version": "1"}) == 1
        short = {key: payload[key] for key in ("user_id", "email")}
        assert contracts.check("auth_events", "user.logged_in", short, {"version": "1"}) == 1

    def test_logged_out_wants_a_user_alone(self) -> None:
        assert contracts.check("auth_events", "user.logged_out", {"user_id": "1"}, {}) == 1

    @pytest.mark.parametrize("field", REGISTERED)
    def test_registered_wants_each_of_its_fields(self, field: str) -> None:
        payload = {key: value for key, value in REGISTERED.items() if key != field}
        with pytest.raises(ContractError) as raised:
            contracts.check("auth_events", "user.registered", payload, {})
        assert list(raised.value.errors) == [f"payload.{field}"]

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("user_id", ""),
            ("user_id", 123),
            ("user_id", "x" * 101),
            ("email", "nobody"),
            ("email", "a@b@c"),
            ("email", "a@b\n"),
            ("email", "a b@c"),
            ("email", "<a@b.c>"),
            ("email", "a,d@b.c"),
            ("email", "a..d@b.c"),
            ("email", "a@b..c"),
            ("email", "a@-b.c"),
            ("email", "a@[127.0.0.1]"),
            ("email", "a@b\u00adc.d"),
            ("email", "\u202ea@b.c"),
            ("email", "é" * 33 + "@b.c"),
            ("first_name", "a\u2028b"),
            ("email", "a@b\r\nBcc: c@d"),
            ("email", "x" * 250 + "@b.c"),
            ("first_name", ""),
            ("first_name", "x" * 101),
            ("first_name", "a\nb"),
            ("last_name", None),
        ],
    )
    def test_registered_refuses(self, field: str, value: Any) -> None:
        with pytest.raises(ContractError) as raised:
            contracts.check("auth_events", "user.registered", {**REGISTERED, field: value}, {})
        assert list(raised.value.errors) == [f"payload.{field}"]

    @pytest.mark.parametrize("email", ["用户@例子.广告", "o'hara+x@example.co.uk", "a@b"])
    def test_registered_takes_addresses_of_any_script(self, email: str) -> None:
        payload = {**REGISTERED, "email": email, "first_name": "李", "last_name": "Ó Néill"}
        assert contracts.check("auth_events", "user.registered", payload, {}) == 1
