"""docker-compose.yml and the Dockerfile, as far as can be seen without an engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import yaml

from services.demo.processes import CONFIG, SERVICES
from shared.cli import main as queuectl
from shared.settings import BUILT_IN_PROVIDERS, load_settings
from tests.support.documents import blocks, prose
from tests.support.processes import ROOT

COMPOSE = ROOT / "docker-compose.yml"

PROVIDERS = ("redis", "rabbitmq", "embedded")

ONE_SHOT = {"migrate"}

SERVERS = {"db", "redis", "rabbitmq", "mailpit"}

STOP_SECONDS = 2
"""What a service needs after its grace time, to hand back what still runs then."""

REFERENCE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<text>[^}]*))?\}")


def example() -> dict[str, str]:
    lines = re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    return dict(lines)


def setting_names() -> set[str]:
    return set(re.findall(r'"([A-Z]+(?:_[A-Z]+)+)"', (ROOT / "shared/settings.py").read_text()))


@cache
def compose_command() -> Sequence[str]:
    """Return Docker Compose as it is called here, or nothing where there is none."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, "version"], capture_output=True, check=False)
            if done.returncode == 0:
                return command
    return []


def call_compose(*args: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    # of this test's own, not what somebody has in .env
    where = ["--file", str(COMPOSE), "--env-file", os.devnull]
    return subprocess.run(
        [*compose_command(), *where, *args],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def parsed(env: Mapping[str, str]) -> dict[str, Any]:
    """Read the file as Docker Compose does where there is none: the variables put in."""

    def value(match: re.Match[str]) -> str:
        given = env.get(match["name"])
        assert given or match["kind"] == "-", f"{match['name']} {match['text']}"
        return given or match["text"]

    found: dict[str, Any] = yaml.safe_load(REFERENCE.sub(value, COMPOSE.read_text()))
    return found


def config(provider: str = "redis") -> dict[str, Any]:
    """Return what Docker Compose makes of the file."""
    env = {**example(), "QUEUE_PROVIDER": provider}
    if not compose_command():
        return parsed(env)
    done = call_compose("config", "--format", "json", env=env)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def environment(service: str, provider: str = "redis") -> dict[str, str]:
    found = config(provider)["services"][service].get("environment", {})
    return {name: str(value) for name, value in found.items()}


def seconds(text: str) -> int:
    match = re.fullmatch(r"(\d+)s", text)
    assert match, text
    return int(match[1])


class TestFile:
    @pytest.mark.parametrize("provider", PROVIDERS)
    def test_is_accepted(self, provider: str) -> None:
        assert set(config(provider)["services"]) == {*SERVICES, *SERVERS, *ONE_SHOT}

    def test_chooses_the_provider_in_one_place(self) -> None:
        lines = [line.strip() for line in COMPOSE.read_text().splitlines()]
        [chosen] = [line for line in lines if "QUEUE_PROVIDER:" in line]
        assert chosen == "QUEUE_PROVIDER: ${QUEUE_PROVIDER:-redis}"

    @pytest.mark.parametrize("provider", PROVIDERS)
    def test_gives_all_services_the_same_provider(self, provider: str) -> None:
        given = {environment(x, provider)["QUEUE_PROVIDER"] for x in (*SERVICES, *ONE_SHOT)}
        assert given == {provider}

    @pytest.mark.xfail(
        "redis" not in BUILT_IN_PROVIDERS, reason="the name is not accepted yet", strict=True
    )
    def test_has_a_default_that_is_there(self) -> None:
        assert load_settings(environment("company")).provider == "redis"

    def test_has_no_password(self) -> None:
        secrets = re.findall(
            r"^.*(?:PASS|TOKENS|CLI_AUTH|requirepass).*$", COMPOSE.read_text(), re.M
        )
        given = [line for line in secrets if "RANDOM_ROOT_PASSWORD" not in line]
        assert len(given) >= 7
        required = r"\$\{(?:\w+_PASSWORD|QUEUE_ADMIN_TOKENS):\?[^}]+\}"
        assert [line for line in given if not re.search(required, line)] == []
        assert "guest" not in COMPOSE.read_text()

    @pytest.mark.parametrize(
        "name", ["DB_PASSWORD", "REDIS_PASSWORD", "RABBITMQ_PASSWORD", "QUEUE_ADMIN_TOKENS"]
    )
    def test_asks_for_each_password(self, name: str) -> None:
        lacking = {key: value for key, value in example().items() if key != name}
        if compose_command():
            done = call_compose("config", "--quiet", env=lacking)
            assert done.returncode != 0
            assert name in done.stderr
        else:
            with pytest.raises(AssertionError, match=name):
                parsed(lacking)

    def test_takes_settings_from_outside_and_nothing_else(self) -> None:
        taken = {match["name"] for match in REFERENCE.finditer(COMPOSE.read_text())}
        assert taken <= setting_names()
        assert set(example()) == taken

    def test_publishes_to_this_machine_alone(self) -> None:
        for name, service in parsed(example())["services"].items():
            for port in service.get("ports", []):
                assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port), name

    def test_pins_images(self) -> None:
        images = {each["image"] for each in config()["services"].values()}
        base = re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        assert images - {"nameko-event-suite"}
        for image in (images - {"nameko-event-suite"}) | set(base):
            assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+(?:-[a-z-]+)?", image), image


class TestServices:
    @pytest.mark.parametrize("name", SERVICES)
    def test_run_as_the_demo_and_the_tests_run_them(self, name: str) -> None:
        ran = ["nameko", "run", "--config", CONFIG.name, f"services.{name}"]
        assert config()["services"][name]["command"] == ran

    def test_run_after_the_migration(self) -> None:
        services = config()["services"]
        group, command = services["migrate"]["command"][1:]
        assert command in queuectl.commands[group].commands  # type: ignore[attr-defined]
        for name in SERVICES:
            conditions = {k: v["condition"] for k, v in services[name]["depends_on"].items()}
            assert conditions.pop("migrate") == "service_completed_successfully"
            assert conditions == dict.fromkeys(SERVERS - {"db"}, "service_healthy")
        assert services["migrate"]["depends_on"]["db"]["condition"] == "service_healthy"

    @pytest.mark.parametrize("name", [*SERVICES, *ONE_SHOT])
    @pytest.mark.parametrize("provider", BUILT_IN_PROVIDERS)
    def test_have_settings_that_are_accepted(self, name: str, provider: str) -> None:
        given = environment(name, provider)
        assert set(given) <= setting_names()
        settings = load_settings(given)
        assert settings.database is not None
        assert settings.database.host == "db"
        assert settings.redis_host == "redis"
        assert settings.rabbitmq_host == "rabbitmq"

    @pytest.mark.parametrize("name", ["auth_events", "company", "queue_admin"])
    def test_listen_where_they_are_published(self, name: str) -> None:
        address = load_settings({**environment(name), "QUEUE_PROVIDER": "embedded"}).addresses[name]
        assert address.host == "0.0.0.0"
        assert parsed(example())["services"][name]["ports"] == [
            f"127.0.0.1:{address.port}:{address.port}"
        ]
        [url] = [x for x in config()["services"][name]["healthcheck"]["test"] if "http:" in x]
        assert url.startswith(f"http://127.0.0.1:{address.port}/")

    def test_ask_for_a_token_where_they_are_operated(self) -> None:
        given = {**environment("queue_admin"), "QUEUE_PROVIDER": "embedded"}
        assert load_settings(given).admin_auth == "token"

    @pytest.mark.parametrize("name", SERVICES)
    def test_may_finish_what_they_do(self, name: str) -> None:
        service = config()["services"][name]
        grace = load_settings({"QUEUE_GRACE_SECONDS": environment(name)["QUEUE_GRACE_SECONDS"]})
        assert seconds(service["stop_grace_period"]) == grace.grace + STOP_SECONDS

    @pytest.mark.parametrize("name", sorted({*SERVICES, *SERVERS}))
    def test_have_a_health_check_and_come_back(self, name: str) -> None:
        service = config()["services"][name]
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["restart"] == "unless-stopped"


class TestImage:
    def test_ignores_what_it_is_not_made_of(self) -> None:
        copied = set(
            re.findall(
                r"[\w./-]+",
                " ".join(
                    line.removeprefix("COPY ").rpartition(" ")[0]
                    for line in (ROOT / "Dockerfile").read_text().splitlines()
                    if line.startswith("COPY ")
                ),
            )
        )
        kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
        assert copied == set(kept)
        assert {name for name in copied if not (ROOT / name).exists()} == set()

    def test_installs_as_the_makefile_does(self) -> None:
        makefile = (ROOT / "Makefile").read_text()
        for line in re.findall(r"pip install (.+?)(?: \\| && .*)?$", self.text, re.MULTILINE):
            options = set(re.findall(r"--[a-z-]+\d*", line))
            assert any(
                options == set(re.findall(r"--[a-z-]+\d*", each))
                for each in re.findall(r"\$\(PIP_INSTALL\) (.+)$", makefile, re.MULTILINE)
            ), line

    def test_is_not_run_by_root(self) -> None:
        [uid] = re.findall(r"--uid (\d+)", self.text)
        assert int(uid) > 0
        assert self.text.rstrip().splitlines()[-1] == f"USER {uid}"

    @property
    def text(self) -> str:
        return (ROOT / "Dockerfile").read_text()


class TestDocumentation:
    def test_names_services_that_are_there(self) -> None:
        named = {
            word
            for block in blocks("docs/docker.md")
            for command in block.commands
            if (match := re.match(r"docker compose (?:logs|exec|run|stop|up)\b(.+)", command))
            for word in re.findall(
                r" (\w+)", re.sub(r"(?:queuectl|nameko|redis-cli) .*", "", match[1])
            )
        }
        assert named
        assert named <= set(config()["services"])

    def test_names_what_is_published(self) -> None:
        published = {
            port.rpartition(":")[0]
            for service in parsed(example())["services"].values()
            for port in service.get("ports", [])
        }
        assert published == set(re.findall(r"127\.0\.0\.1:\d+", prose("docs/docker.md")))
