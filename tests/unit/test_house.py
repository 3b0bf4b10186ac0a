"""What a person meets first: set-up, configuration, the commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.settings import load_settings

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements.lock", "requirements-dev.lock")
ENTRY_POINT_GROUP = "queue_service.tables"


def read(name: str) -> str:
    return (ROOT / name).read_text()


def call(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command at the project's root, in the plainest environment and ``env``."""
    plain = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        command, cwd=ROOT, env={**plain, **env}, text=True, capture_output=True, check=False
    )


def installed(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def shown_config(**env: str) -> dict[str, Any]:
    done = call(installed("nameko"), "show-config", "--config", "config.yml", **env)
    parsed: dict[str, Any] = yaml.safe_load(done.stdout)
    return parsed


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in setting_names():
        monkeypatch.delenv(name, raising=False)


def setting_names() -> set[str]:
    return set(re.findall(r'"([A-Z]+(?:_[A-Z]+)+)"', read("shared/settings.py")))


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):(?!=)", read("Makefile"), re.MULTILINE))


class TestConfig:
    def test_says_what_holds_without_it(self, no_settings: None) -> None:
        assert load_settings(shown_config()) == load_settings({})

    def test_names_every_setting(self) -> None:
        assert len(setting_names()) > 30
        assert {name for name in setting_names() if f"{name}: " not in read("config.yml")} == set()

    def test_takes_the_environment_as_text(self) -> None:
        config = shown_config(DB_PASSWORD="0123", RABBITMQ_PASSWORD='no: ${x}:}"#')
        assert config["DB_PASSWORD"] == "0123"
        assert config["RABBITMQ_PASSWORD"] == 'no: ${x}:}"#'

    def test_says_when_and_who_in_each_line_of_the_log(self) -> None:
        line = shown_config()["LOGGING"]["formatters"]["line"]["format"]
        assert re.findall(r"%\((\w+)\)", line) == ["asctime", "levelname", "name", "message"]


@pytest.mark.parametrize("name", LOCKS)
class TestLock:
    def test_pins_and_hashes_everything(self, name: str) -> None:
        pins = re.split(r"\n(?=\S)", read(name).strip())
        shape = r"[a-z0-9-]+==\S+(?: ; [^\\\n]+)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+"
        assert len(pins) > 20
        assert [pin for pin in pins if not re.fullmatch(shape, pin)] == []

    def test_holds_what_python_before_3_11_3_needs(self, name: str) -> None:
        # Debian 12 has 3.11.2, where redis wants one package more
        assert re.search(r"^async-timeout==\S+ ; python_full_version < '3.11.3'", read(name), re.M)


class TestLocks:
    def test_agree(self) -> None:
        runtime, everything = (set(re.findall(r"^\S+==\S+", read(name), re.M)) for name in LOCKS)
        assert runtime < everything


class TestMake:
    def test_help_lists_every_target(self) -> None:
        listed = re.findall(r"^  make (\w+) +\S", call("make").stdout, re.MULTILINE)
        assert set(listed) == targets() > {"help", "setup", "demo", "run", "test", "check"}

    def test_ci_runs_what_people_run(self) -> None:
        calls = re.findall(r"^make (\w+)$", read(".ci/run"), re.MULTILINE)
        assert calls == ["check", "test"]
        assert os.access(ROOT / ".ci/run", os.X_OK)

    def test_says_which_servers_are_not_installed(self, tmp_path: Path) -> None:
        (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
        (tmp_path / "id").chmod(0o755)
        done = call("/bin/bash", "tests/support/servers.sh", PATH=str(tmp_path))
        assert done.returncode == 0
        named = re.search(r"by Debian's names: (.+?)\. Tests", done.stderr)
        assert named
        assert {"redis-server", "chromium"} <= set(named[1].split())
        assert f"apt install {named[1]}\n" in done.stderr

    def test_refuses_a_python_that_does_not_fit(self, tmp_path: Path) -> None:
        done = call("make", "setup", f"VENV={tmp_path / 'venv'}", "PYTHON=no-such-python")
        assert done.returncode == 2
        assert "Error: no-such-python was not found." in done.stderr


class TestProject:
    def test_installs_queuectl(self) -> None:
        assert "Usage: queuectl" in call(installed("queuectl"), "--help").stdout

    def test_finds_each_services_tables(self) -> None:
        written = tomllib.loads(read("pyproject.toml"))["project"]["entry-points"]
        models = {path.parent.name for path in ROOT.glob("services/*/models.py")}
        assert set(written[ENTRY_POINT_GROUP]) == models
