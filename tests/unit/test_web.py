"""HTTP over real nameko containers, each on a free port of this process."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from urllib.parse import urlsplit

import eventlet
import pytest
import requests
from eventlet.event import Event
from marshmallow import Schema, fields
from nameko.containers import ServiceContainer
from nameko.testing.utils import get_extension
from sqlalchemy.exc import InterfaceError, OperationalError
from werkzeug.test import EnvironBuilder
from werkzeug.wrappers import Request, Response

import shared.web
from shared.errors import (
    ContractError,
    DispatchError,
    DispatchUncertainError,
    MessageNotFoundError,
    NothingToRetryError,
    PayloadError,
    RpcTimeoutError,
    StoreUnavailableError,
)
from shared.settings import Settings
from shared.types import MAX_JSON_DEPTH
from shared.web import Problem, WebServer, bearer_token, http

JSON = {"Content-Type": "application/json"}
MOST_BYTES = 100_000

Serve = Callable[..., str]


class Part(Schema):
    size = fields.Int(strict=True, required=True)


class Order(Schema):
    item = fields.Raw(required=True)
    count = fields.Int(strict=True)
    part = fields.Nested(Part)
    tags = fields.List(fields.Str())


def only_with_token(request: Request, _settings: Settings) -> None:
    if bearer_token(request) != "secret":
        raise Problem(401, "no-token", "A token is needed")


class Shop:
    """What the tests ask."""

    name = "shop"

    results: ClassVar[dict[str, Any]] = {
        "dict": {"ö": 1},
        "tuple": (202, {"a": [1]}),
        "headers": (200, {"X-Mine": "1"}, {"a": 1}),
        "nothing": (204, None),
        "response": Response("<p>", mimetype="text/html"),
        "nan": {"a": float("nan")},
        "object": {"a": object()},
    }
    errors: ClassVar[dict[str, Exception]] = {}
    started = Event()
    may_end = Event()

    @http("GET", "/results/<name>")
    def result(self, _request: Request, name: str) -> Any:
        return self.results[name]

    @http("GET", "/errors/<name>")
    def error(self, _request: Request, name: str) -> Any:
        raise self.errors[name]

    @http("POST", "/orders/<order_id>", schema=Order)
    def order(self, _request: Request, body: dict[str, Any], order_id: str) -> Any:
        return 201, {"order_id": order_id, "body": body}

    @http("POST", "/guarded", schema=Order, guard=only_with_token)
    def guarded(self, _request: Request, _body: dict[str, Any]) -> Any:
        return {"ok": True}

    @http("POST", "/anything")
    def anything(self, _request: Request) -> Any:
        return {"ok": True}

    @http("GET", "/slow")
    def slow(self, _request: Request) -> Any:
        self.started.send()
        self.may_end.wait()
        return {"ok": True}


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    containers = []

    def start(service: type = Shop, **config: Any) -> str:
        defaults = {
            "WEB_SERVER_ADDRESS": "127.0.0.1:0",
            "QUEUE_MAX_PAYLOAD_BYTES": MOST_BYTES,
        }
        container = ServiceContainer(service, {**defaults, **config})
        container.start()
        containers.append(container)
        start.container = container  # type: ignore[attr-defined]
        return url_of(container)

    yield start
    for container in containers:
        container.stop()


@pytest.fixture(scope="module")
def shop(serve: Serve) -> str:
    return serve()


def url_of(container: ServiceContainer) -> str:
    address = get_extension(container, WebServer).address
    host = f"[{address.address}]" if ":" in address.address else address.address
    return f"http://{host}:{address.port}"


def problem_in(answer: requests.Response) -> dict[str, Any]:
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["type"].startswith("/problems/")
    assert problem["title"]
    assert problem["detail"]
    return problem


def order(url: str, body: Any, headers: Any = JSON) -> requests.Response:
    data = body if isinstance(body, bytes | str) else json.dumps(body)
    data = data.encode() if isinstance(data, str) else data
    return requests.post(f"{url}/orders/1", data=data, headers=headers, timeout=10)


def talk(url: str, *sent: bytes) -> bytes:
    """Send bytes, then read until the server closes the connection."""
    with connect(url) as sock:
        for part in sent:
            sock.sendall(part)
        return read_all(sock)


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


def read_all(sock: socket.socket) -> bytes:
    received = b""
    while part := sock.recv(65_536):
        received += part
    return received


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def errors_logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


class TestResults:
    def test_dict(self, shop: str) -> None:
        answer = requests.get(f"{shop}/results/dict", timeout=10)
        assert (answer.status_code, answer.json()) == (200, {"ö": 1})
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Cache-Control"] == "no-store"

    def test_status_and_dict(self, shop: str) -> None:
        answer = requests.get(f"{shop}/results/tuple", timeout=10)
        assert (answer.status_code, answer.json()) == (202, {"a": [1]})

    def test_status_headers_and_dict(self, shop: str) -> None:
        answer = requests.get(f"{shop}/results/headers", timeout=10)
        assert answer.headers["X-Mine"] == "1"
        assert answer.json() == {"a": 1}

    def test_nothing(self, shop: str) -> None:
        answer = requests.get(f"{shop}/results/nothing", timeout=10)
        assert (answer.status_code, answer.content) == (204, b"")
        assert "Content-Type" not in answer.headers

    def test_response_as_it_is(self, shop: str) -> None:
        answer = requests.get(f"{shop}/results/response", timeout=10)
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert answer.text == "<p>"

    @pytest.mark.parametrize("name", ["nan", "object"])
    def test_no_json(self, shop: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
        answer = requests.get(f"{shop}/results/{name}", timeout=10)
        assert problem_in(answer)["type"] == "/problems/internal-error"
        assert len(errors_logged(caplog)) == 1

    def test_head_has_no_body(self, shop: str) -> None:
        answer = requests.head(f"{shop}/results/dict", timeout=10)
        assert (answer.status_code, answer.content) == (200, b"")


class TestErrors:
    @pytest.fixture
    def fail(self, shop: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., requests.Response]:
        def fail(error: Exception) -> requests.Response:
            monkeypatch.setattr(Shop, "errors", {"now": error})
            return requests.get(f"{shop}/errors/now", timeout=10)

        return fail

    def test_problem(self, fail: Any, caplog: pytest.LogCaptureFixture) -> None:
        answer = fail(
            Problem(
                418,
                "teapot",
                "I am a teapot",
                detail="short and stout",
                errors={"spout": ["is not for coffee"]},
                headers={"X-Tea": "earl grey"},
            )
        )
        assert answer.status_code == 418
        assert answer.headers["X-Tea"] == "earl grey"
        assert problem_in(answer) == {
            "type": "/problems/teapot",
            "title": "I am a teapot",
            "status": 418,
            "detail": "short and stout",
            "errors": {"spout": ["is not for coffee"]},
        }
        assert errors_logged(caplog) == []
        assert "Traceback" not in caplog.text

    def test_401_has_its_challenge(self, fail: Any) -> None:
        answer = fail(Problem(401, "who", "Who are you"))
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert problem_in(answer)["detail"] == "Who are you"

    @pytest.mark.parametrize("error", [PayloadError, ContractError])
    def test_payload_error(self, fail: Any, error: Any) -> None:
        problem = problem_in(fail(error({"payload.email": "Not a mail address."})))
        assert problem["status"] == 422
        assert problem["type"] == "/problems/validation"
        assert problem["errors"] == {"payload.email": ["Not a mail address."]}

    @pytest.mark.parametrize(
        ("error", "status", "type"),
        [
            (MessageNotFoundError("no message 7"), 404, "/problems/message-not-found"),
            (NothingToRetryError("7 has nothing"), 409, "/problems/nothing-to-retry"),
        ],
    )
    def test_of_operations(self, fail: Any, error: Exception, status: int, type: str) -> None:
        problem = problem_in(fail(error))
        assert (problem["status"], problem["type"]) == (status, type)
        assert problem["detail"] == str(error)

    @pytest.mark.parametrize(
        "error",
        [
            DispatchError("no table in host db.internal"),
            StoreUnavailableError("no route to db.internal"),
            RpcTimeoutError("no reply from db.internal"),
            OperationalError("SELECT 1", {}, Exception("db.internal")),
            InterfaceError("SELECT 1", {}, Exception("db.internal")),
        ],
    )
    def test_of_servers_behind(self, fail: Any, error: Exception) -> None:
        answer = fail(error)
        assert problem_in(answer)["type"] == "/problems/unavailable"
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        assert "db.internal" not in answer.text

    def test_uncertain_dispatch_names_the_message(self, fail: Any) -> None:
        answer = fail(DispatchUncertainError(["m-1"], "db.internal went away"))
        problem = problem_in(answer)
        assert (problem["status"], problem["type"]) == (503, "/problems/dispatch-uncertain")
        assert "m-1" in problem["detail"]
        # to try again could make two of it
        assert "Retry-After" not in answer.headers
        assert "db.internal" not in answer.text

    def test_anything_else(self, fail: Any, caplog: pytest.LogCaptureFixture) -> None:
        answer = fail(KeyError("inner detail"))
        assert problem_in(answer)["type"] == "/problems/internal-error"
        assert answer.status_code == 500
        assert "inner" not in answer.text
        (record,) = errors_logged(caplog)
        assert record.exc_info is not None
        assert "inner detail" in caplog.text


class TestRoutes:
    def test_unknown_route(self, shop: str) -> None:
        answer = requests.get(f"{shop}/nowhere", timeout=10)
        assert problem_in(answer)["type"] == "/problems/not-found"
        assert answer.status_code == 404

    def test_slashes_are_not_redirected(self, shop: str) -> None:
        answer = requests.get(f"{shop}/results//dict", allow_redirects=False, timeout=10)
        assert problem_in(answer)["status"] == 404

    def test_wrong_method(self, shop: str) -> None:
        answer = requests.delete(f"{shop}/orders/1", timeout=10)
        assert problem_in(answer)["type"] == "/problems/method-not-allowed"
        assert answer.status_code == 405
        assert answer.headers["Allow"] == "POST"

    @pytest.mark.parametrize("host", [b"a b", b"\xff", b"[", b""])
    def test_odd_host(self, shop: str, host: bytes) -> None:
        request = b"GET /nowhere HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
        assert talk(shop, request).split()[1] in (b"400", b"404")

    def test_odd_path(self, shop: str) -> None:
        answer = requests.get(f"{shop}/%ff%00/%2e%2e", timeout=10)
        assert problem_in(answer)["status"] == 404


class TestBody:
    def test_is_loaded(self, shop: str) -> None:
        answer = order(shop, {"item": "ö", "count": 2})
        assert answer.status_code == 201
        assert answer.json() == {"order_id": "1", "body": {"item": "ö", "count": 2}}

    def test_is_not_asked_for_without_a_schema(self, shop: str) -> None:
        assert requests.post(f"{shop}/anything", data=b"{", timeout=10).json() == {"ok": True}

    @pytest.mark.parametrize(
        "content_type",
        [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"],
    )
    def test_of_another_type(self, shop: str, content_type: str | None) -> None:
        headers = {"Content-Type": content_type} if content_type is not None else {}
        answer = order(shop, {"item": 1}, headers)
        assert problem_in(answer)["type"] == "/problems/unsupported-media-type"
        assert answer.status_code == 415

    def test_type_with_charset(self, shop: str) -> None:
        headers = {"Content-Type": "Application/JSON; charset=utf-8"}
        assert order(shop, {"item": 1}, headers).status_code == 201

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ("", "is not JSON"),
            ("{", "is not JSON"),
            ('{"item": 1} x', "is not JSON"),
            ("{'item': 1}", "is not JSON"),
            ('{"item": "\n"}', "is not JSON"),
            (b'{"item": "\xff"}', "UTF-8"),
            ('{"item": 1}'.encode("utf-16"), "UTF-8"),
            ("[]", "object"),
            ('"item"', "object"),
            ("null", "object"),
            ('{"item": NaN}', "NaN"),
            ('{"item": -Infinity}', "-Infinity"),
            ('{"item": 1e999}', "out of range"),
            ('{"item": ' + "9" * 5000 + "}", "too many digits"),
            (r'{"item": "\u0000"}', "NUL"),
            (r'{"a\u0000": 1}', "NUL"),
            (r'{"item": "\ud83d"}', "surrogate"),
            (r'{"\udc00": 1}', "surrogate"),
            ('{"item": 1, "item": 2}', "names 'item' more than once"),
            ('{"item": {"a": [], "b": 1, "a": []}}', "names 'a' more than once"),
            ('{"item": ' + nested(MAX_JSON_DEPTH + 2) + "}", "deeper than 64"),
            ('{"item": ' + nested(40_000) + "}", "deeper than 64"),
            (nested(40_000), "deeper than 64"),
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_malformed(self, shop: str, body: Any, said: str) -> None:
        answer = order(shop, body)
        problem = problem_in(answer)
        assert (problem["status"], problem["type"]) == (400, "/problems/malformed-json")
        assert said in problem["detail"]

    @pytest.mark.parametrize(
        "body",
        [
            '{"item": ' + nested(MAX_JSON_DEPTH) + "}",
            r'{"item": "\ud83d\ude00"}',
            r'{"item": "\\ud83d"}',
            '{"item": 1e300}',
            '{"item": ' + "9" * 300 + "}",
        ],
        ids=lambda value: repr(value)[:30],
    )
    def test_unusual_but_right(self, shop: str, body: str) -> None:
        answer = order(shop, body)
        assert answer.status_code == 201
        assert answer.json()["body"] == json.loads(body)

    def test_that_breaks_its_schema(self, shop: str) -> None:
        answer = order(
            shop, {"count": "2", "part": {"size": "x"}, "tags": ["a", 1], "more": {"a": 1}}
        )
        problem = problem_in(answer)
        assert (problem["status"], problem["type"]) == (422, "/problems/validation")
        assert problem["errors"] == {
            "item": ["Missing data for required field."],
            "count": ["Not a valid integer."],
            "part.size": ["Not a valid integer."],
            "tags.1": ["Not a valid string."],
            "more": ["Unknown field."],
        }
        assert "part.size: Not a valid integer." in problem["detail"]

    def test_of_the_largest_size(self, shop: str) -> None:
        body = json.dumps({"item": "x" * (MOST_BYTES - 12)})
        assert len(body) == MOST_BYTES
        assert order(shop, body).status_code == 201
        assert order(shop, body + " ").status_code == 413

    def test_too_large_is_answered_before_it_is_sent(self, shop: str) -> None:
        head = b"POST /orders/1 HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        answer = talk(shop, head + b"Content-Length: 1000000000\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"/problems/payload-too-large" in answer
        assert b"Connection: close" in answer

    def test_too_large_and_sent_all_the_same(self, shop: str) -> None:
        head = b"POST /orders/1 HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        # the answer is there before all is sent, and is read after
        answer = talk(shop, head + b"Content-Length: 8000000\r\n\r\n", b" " * 8_000_000)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert order(shop, b" " * 8_000_000).status_code == 413

    def test_chunked(self, shop: str) -> None:
        parts = [b'{"item": ', b'"a"}']
        answer = requests.post(f"{shop}/orders/1", data=iter(parts), headers=JSON, timeout=10)
        assert answer.json()["body"] == {"item": "a"}

    def test_chunked_and_too_large(self, shop: str) -> None:
        parts = [b" " * 50_000] * 100
        answer = requests.post(f"{shop}/orders/1", data=iter(parts), headers=JSON, timeout=10)
        assert problem_in(answer)["status"] == 413

    def test_chunked_without_end(self, shop: str) -> None:
        head = b"POST /orders/1 HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        chunks = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        answer = talk(shop, head + b"Transfer-Encoding: chunked\r\n\r\n", chunks, chunks)
        assert answer.startswith(b"HTTP/1.1 413 ")

    def test_broken_chunks(self, shop: str) -> None:
        head = b"POST /orders/1 HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        answer = talk(shop, head + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")

    def test_that_does_not_come(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shared.web.server, "SOCKET_SECONDS", 0.05)
        head = b"POST /orders/1 HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        answer = talk(serve(), head + b"Content-Length: 10\r\n\r\n{")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"/problems/request-timeout" in answer

    def test_that_breaks_off(self, shop: str) -> None:
        head = b"POST /orders/1 HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        with connect(shop) as sock:
            sock.sendall(head + b"Content-Length: 10\r\n\r\n{")
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock).startswith(b"HTTP/1.1 400 ")


class TestGuard:
    def test_lets_pass(self, shop: str) -> None:
        headers = {"Authorization": "Bearer secret"}
        answer = requests.post(f"{shop}/guarded", json={"item": 1}, headers=headers, timeout=10)
        assert answer.json() == {"ok": True}

    def test_refuses_before_it_reads(self, shop: str) -> None:
        answer = requests.post(f"{shop}/guarded", data=b"{", timeout=10)
        assert problem_in(answer)["type"] == "/problems/no-token"

    @pytest.mark.parametrize(
        ("header", "token"),
        [
            ("Bearer abc", "abc"),
            ("bearer  a.b-c_d~e+f/g== ", "a.b-c_d~e+f/g=="),
            ("Bearer", None),
            ("Bearer ", None),
            ("Bearer a b", None),
            ("Bearer ä", None),
            ("Basic abc", None),
            ("Bearerabc", None),
            ("", None),
        ],
    )
    def test_bearer_token(self, header: str, token: str | None) -> None:
        environ = EnvironBuilder(headers={"Authorization": header}).get_environ()
        assert bearer_token(Request(environ)) == token


class TestConnections:
    def test_stay_open_after_an_unread_body(self, shop: str) -> None:
        with requests.Session() as session:
            for _ in range(3):
                assert session.post(f"{shop}/nowhere", data=b"x" * 1000, timeout=10).status_code
            (adapter,) = {session.get_adapter(shop)}
            (pool,) = adapter.poolmanager.pools._container.values()
            assert pool.num_connections == 1

    @pytest.mark.parametrize(
        "sent",
        [
            b"\x00\x01\x02\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /orders/1 HTTP/1.1\r\nContent-Length: x\r\n\r\n",
            b"POST /orders/1 HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        ],
    )
    def test_that_talk_nonsense_do_no_harm(self, shop: str, sent: bytes) -> None:
        try:
            answer = talk(shop, sent, b"GET /results/dict HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert b" 200 " not in answer.split(b"\r\n")[0]
        except ConnectionError:
            pass
        assert requests.get(f"{shop}/results/dict", timeout=10).ok

    def test_that_break_do_no_harm(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any) -> None:
            raise OSError("the network is down")

        url = serve()
        monkeypatch.setattr(shared.web.server._Protocol, "handle_one_request", broken)
        assert talk(url, b"GET /results/dict HTTP/1.1\r\n\r\n") == b""
        monkeypatch.undo()
        assert requests.get(f"{url}/results/dict", timeout=10).ok


class TestStop:
    @pytest.fixture
    def slow(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Lets ``/slow`` run until the test, be it by failing, ends."""
        monkeypatch.setattr(Shop, "started", Event())
        monkeypatch.setattr(Shop, "may_end", Event())
        yield
        if not Shop.may_end.ready():
            Shop.may_end.send()

    def test_finishes_what_runs_and_begins_nothing(self, serve: Serve, slow: None) -> None:
        url = serve()
        container = serve.container  # type: ignore[attr-defined]
        # Given a request that runs, and a connection that is open
        running = eventlet.spawn(requests.get, f"{url}/slow", timeout=10)
        Shop.started.wait()
        with requests.Session() as session:
            session.get(f"{url}/results/dict", timeout=10)
            # When the service is stopped
            stopping = eventlet.spawn(container.stop)
            eventlet.sleep(0)
            # Then nothing begins
            answer = session.get(f"{url}/results/dict", timeout=10)
            assert problem_in(answer)["status"] == 503
            with pytest.raises(requests.ConnectionError):
                requests.get(f"{url}/results/dict", timeout=10)
            # and what runs is finished, and answered
            Shop.may_end.send()
            assert running.wait().json() == {"ok": True}
            stopping.wait()

    def test_leaves_no_thread(self, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
        url = serve()
        with requests.Session() as session:
            session.get(f"{url}/results/dict", timeout=10)
            serve.container.stop()  # type: ignore[attr-defined]
        assert "managed thread" not in caplog.text


class Auth:
    name = "auth_events"

    @http("GET", "/")
    def who(self, _request: Request) -> Any:
        return {"name": self.name}


class Company(Auth):
    name = "company"


class TestAddress:
    def test_is_each_services_own(self, serve: Serve) -> None:
        addresses = {"AUTH_EVENTS_ADDRESS": "127.0.0.1:0", "COMPANY_ADDRESS": "127.0.0.2:0"}
        auth, company = serve(Auth, **addresses), serve(Company, **addresses)
        assert company.startswith("http://127.0.0.2:")
        assert requests.get(auth, timeout=10).json() == {"name": "auth_events"}
        assert requests.get(company, timeout=10).json() == {"name": "company"}

    @pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
    def test_of_ipv6(self, serve: Serve) -> None:
        company = serve(Company, COMPANY_ADDRESS="[::1]:0")
        assert requests.get(company, timeout=10).json() == {"name": "company"}

    def test_that_cannot_be_had_ends_the_start(self, capsys: pytest.CaptureFixture[str]) -> None:
        container = ServiceContainer(Shop, {"WEB_SERVER_ADDRESS": "192.0.2.1:8000"})
        with pytest.raises(SystemExit) as exit_:
            get_extension(container, WebServer).start()
        assert exit_.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("Error: shop cannot listen on 192.0.2.1:8000: ")
        assert said.count("\n") == 1
