"""What may be dispatched, and how it is named."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import PayloadError
from shared.types import (
    MAX_JSON_DEPTH,
    Envelope,
    Priority,
    check_json,
    check_name,
    encode_payload,
    new_message_id,
)

LIMIT = 1000

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)


def nested(depth: int, innermost: Any) -> Any:
    """Return ``depth`` containers, one in another, lists and objects in turn."""
    value = innermost
    for level in range(depth):
        value = [value] if level % 2 else {"in": value}
    return value


class TestEncoding:
    def test_is_compact_and_keeps_every_script(self) -> None:
        assert encode_payload({"name": "Zoë 🚲", "n": [1, None]}, LIMIT) == (
            '{"name":"Zoë 🚲","n":[1,null]}'
        )

    @given(json_values)
    def test_loses_nothing(self, payload: Any) -> None:
        assert json.loads(encode_payload(payload, 10**6)) == payload

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    def test_refuses_what_is_no_number_in_json(self, number: float) -> None:
        with pytest.raises(PayloadError, match="payload: is not JSON"):
            encode_payload({"a": [number]}, LIMIT)

    @pytest.mark.parametrize("payload", [b"bytes", {1, 2}, object(), {"a": 1j}, "\ud800"])
    def test_refuses_what_json_has_no_word_for(self, payload: Any) -> None:
        with pytest.raises(PayloadError, match="payload: is not JSON"):
            encode_payload(payload, LIMIT)

    @pytest.mark.parametrize("payload", ["\x00", {"a": "b\x00c"}, {"\x00": 1}, [[["\x00"]]]])
    def test_refuses_nul(self, payload: Any) -> None:
        with pytest.raises(PayloadError, match="payload: contains a NUL character"):
            encode_payload(payload, LIMIT)

    @pytest.mark.parametrize("key", [1, None, True, 1.5, (1, 2)])
    def test_refuses_keys_that_json_would_turn_into_text(self, key: Any) -> None:
        with pytest.raises(PayloadError, match="payload: has a key that is not a string"):
            encode_payload({"a": {key: 1}}, LIMIT)

    @pytest.mark.parametrize("payload", ["x" * 100, "é" * 50, "🚲" * 25])
    def test_counts_the_bytes_that_travel(self, payload: str) -> None:
        assert encode_payload(payload, 102) == f'"{payload}"'
        with pytest.raises(PayloadError, match="payload: has 102 bytes; at most 101 are allowed"):
            encode_payload(payload, 101)

    def test_refuses_what_contains_itself(self) -> None:
        payload: list[Any] = []
        payload.append(payload)
        with pytest.raises(PayloadError, match="nests deeper"):
            encode_payload(payload, LIMIT)

    def test_names_what_is_wrong(self) -> None:
        with pytest.raises(PayloadError) as raised:
            encode_payload("\x00", LIMIT)
        assert raised.value.errors == {"payload": "contains a NUL character"}


class TestDepth:
    @pytest.mark.parametrize("innermost", [0, "", [], {}, [1], {"a": 1}])
    def test_ends_at_the_limit(self, innermost: Any) -> None:
        own = 1 if isinstance(innermost, list | dict) else 0
        check_json(nested(MAX_JSON_DEPTH - own, innermost))
        with pytest.raises(PayloadError, match="payload: nests deeper than 64 levels"):
            check_json(nested(MAX_JSON_DEPTH - own + 1, innermost))

    def test_is_checked_before_it_is_a_recursion(self) -> None:
        with pytest.raises(PayloadError, match="nests deeper"):
            encode_payload(nested(100_000, 1), 10**9)

    def test_names_another_field(self) -> None:
        with pytest.raises(PayloadError, match="metadata: nests deeper"):
            check_json(nested(MAX_JSON_DEPTH + 1, 1), "metadata")

    def test_is_no_matter_of_breadth(self) -> None:
        check_json([[[]] * 1000] * 100)


class TestName:
    @pytest.mark.parametrize(
        "name", ["a", "user-events", "user.registered", "A_1.b-c", "9", "x" * 200]
    )
    def test_may_be(self, name: str) -> None:
        assert check_name(name, "queue") == name

    @pytest.mark.parametrize(
        "name",
        [
            "",
            ".a",
            "-a",
            "_a",
            "a b",
            "a/b",
            "a\n",
            "ä",
            "٣",
            "x" * 201,
            "a\x00",
            None,
            5,
            b"a",
            ["a"],
        ],
    )
    def test_may_not_be(self, name: Any) -> None:
        with pytest.raises(PayloadError, match="queue: must match") as raised:
            check_name(name, "queue")
        assert list(raised.value.errors) == ["queue"]


class TestMessageId:
    def test_is_a_uuid_of_version_7(self) -> None:
        written = new_message_id()
        made = uuid.UUID(written)
        assert str(made) == written
        assert (made.version, made.variant) == (7, uuid.RFC_4122)
        assert re.fullmatch(r"[0-9a-f-]{36}", str(made))

    def test_sorts_by_age(self) -> None:
        # more than one millisecond has room for
        made = [new_message_id() for _ in range(20_000)]
        assert made == sorted(set(made))

    def test_says_when_it_was_made(self) -> None:
        milliseconds = uuid.UUID(new_message_id()).int >> 80
        assert abs(milliseconds / 1000 - time.time()) < 5


class TestEnvelope:
    def test_does_not_change(self) -> None:
        envelope = Envelope("id", "queue", "type", "{}")
        with pytest.raises(FrozenInstanceError):
            envelope.id = "other"  # type: ignore[misc]

    def test_decodes_its_payload_anew(self) -> None:
        envelope = Envelope("id", "queue", "type", '{"list":[]}')
        envelope.payload["list"].append(1)
        assert envelope.payload == {"list": []}

    def test_ranks_urgent_first(self) -> None:
        names = ["urgent", "high", "normal", "low"]
        assert [Priority(name).rank for name in names] == [0, 1, 2, 3]
