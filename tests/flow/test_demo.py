"""``make demo`` and ``make run``, as processes of their own."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import requests

from services.auth_events.schemas import RegisterSchema
from shared.testing.servers import HOST, free_port
from tests.support.processes import ROOT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

SECONDS = 150
"""Longer than the demo itself waits, for its services and then for what it sent: what it says when
that was in vain tells more."""


class Demo:
    """``python -m services.demo``, and the processes that it starts."""

    def __init__(self, folder, *arguments, **env):
        self.data = folder / "var"
        self.log = folder / "process-demo.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.demo", *arguments],
                cwd=ROOT,
                env={**os.environ, "QUEUE_DATA_DIR": str(self.data), **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self):
        return self.log.read_text()

    def wait(self):
        """Return its exit status, once nothing that it started is left."""
        status = self.process.wait(SECONDS)
        assert self.services() == {}
        assert "Traceback" not in self.text.partition("The end of")[0]
        return status

    def wait_for(self, condition, what):
        """Wait for something that comes while it runs."""

        def is_so():
            assert self.process.poll() is None, self.text
            return condition()

        wait_until(is_so, SECONDS, what)

    def wait_for_mail(self):
        self.wait_for(lambda: any(self.data.rglob("*.eml")), "a mail")

    def services(self):
        """Return the process ids of the services that run, by their names."""
        return {
            name: pid
            for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*"))
            if (name := self._service_of(pid))
        }

    def close(self):
        for pid in (*self.services().values(), self.process.pid):
            if pid != self.process.pid or self.process.poll() is None:
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _service_of(self, pid):
        try:
            env = Path(f"/proc/{pid}/environ").read_bytes()
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            return None  # it is gone, or somebody else's
        is_ours = f"QUEUE_DATA_DIR={self.data}".encode() in env
        started = re.fullmatch(r"services\.(\w+)", arguments[-2] if len(arguments) > 1 else "")
        return started[1] if is_ours and started and "run" in arguments else None


@pytest.fixture
def start(tmp_path):
    started = []

    def start_demo(*arguments, **env):
        started.append(Demo(tmp_path, *arguments, **env))
        return started[-1]

    yield start_demo
    for demo in started:
        demo.close()


@pytest.fixture
def addresses():
    names = ("AUTH_EVENTS_ADDRESS", "COMPANY_ADDRESS", "QUEUE_ADMIN_ADDRESS")
    return {name: f"{HOST}:{free_port()}" for name in names}


class TestDemo:
    def test_shows_what_became_of_each_event(self, start):
        demo = start()

        assert demo.wait() == 0
        claims = re.findall(r"^([✓✗]) (.+?) *$", demo.text, re.MULTILINE)
        assert [mark for mark, _ in claims] == ["✓"] * 5
        assert "✓ 30 mails delivered, exactly one to each" in demo.text
        # 30 sign-ups at two subscribers, 19 logins and logouts at one, but one dead letter
        assert len(re.findall(r" \d+ ms  completed *$", demo.text, re.MULTILINE)) == 78
        assert re.search(r" 1 +\d+ ms  451 4.7.1 not now; again at \d+ ms", demo.text)
        assert re.search(r" 1 +\d+ ms  dead: 550 5.1.1 no such mailbox", demo.text)
        assert "1 retried, now completed" in demo.text
        assert "Everything ended as it had to, in " in demo.text
        assert len(list((demo.data / "demo" / "mails").iterdir())) == 30

    @pytest.mark.parametrize(("provider", "name"), [("redis", "Redis"), ("rabbitmq", "RabbitMQ")])
    def test_shows_the_same_on_private_servers(self, start, provider, name):
        demo = start(QUEUE_PROVIDER=provider)

        assert demo.wait() == 0
        started = dict(
            re.findall(r"^Started a private (\w+) on port (\d+)", demo.text, re.MULTILINE)
        )
        assert list(started) == [name, "MariaDB"]
        assert f"provider {provider}, data in" in demo.text
        claims = re.findall(r"^([✓✗]) (.+?) *$", demo.text, re.MULTILINE)
        assert [mark for mark, _ in claims] == ["✓"] * 5
        assert len(re.findall(r" \d+ ms  completed *$", demo.text, re.MULTILINE)) == 78
        assert re.search(r" 1 +\d+ ms  451 4.7.1 not now; again at \d+ ms", demo.text)
        assert "1 retried, now completed" in demo.text
        for port in started.values():
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, int(port)), timeout=5)

    def test_takes_a_server_that_is_named(self, start, redis_server):
        redis_server.empty()
        demo = start(QUEUE_PROVIDER="redis", **redis_server.environment)

        assert demo.wait() == 0
        assert re.findall(r"^Started a private (\w+)", demo.text, re.MULTILINE) == ["MariaDB"]
        redis_server.empty()

    def test_names_the_package_of_a_server_that_is_not_installed(self, start, tmp_path):
        demo = start(QUEUE_PROVIDER="redis", PATH=str(tmp_path))

        assert demo.wait() == 1
        assert demo.text == "Error: redis-server was not found: apt install redis-server\n"

    def test_says_what_is_not_as_it_has_to_be(self, start):
        demo = start(QUEUE_MAX_RETRIES="0")

        assert demo.wait() == 1
        assert "✗ 30 mails delivered, exactly one to each" in demo.text
        assert "kavitha@banyan.example.org: got 0 mails, not 1" in demo.text
        assert "stats: failed is 1, not 0" in demo.text
        assert "Not everything ended as it had to" in demo.text
        assert f"Mails and logs are in {demo.data}/demo" in demo.text

    def test_shows_the_log_of_a_service_that_cannot_start(self, start):
        demo = start(MAIL_FROM="noreply@-.example")

        assert demo.wait() == 1
        assert "Error: notifications ended with status 2" in demo.text
        assert "  Error: MAIL_FROM: 'noreply@-.example' is not an address" in demo.text

    def test_names_a_wrong_setting(self, start):
        demo = start(QUEUE_PROVIDER="kafka")

        assert demo.wait() == 2
        assert demo.text.startswith("Error: QUEUE_PROVIDER: ")

    def test_notices_that_a_service_was_killed(self, start):
        demo = start()
        demo.wait_for_mail()

        os.kill(demo.services()["company"], signal.SIGKILL)

        assert demo.wait() == 1
        assert "Error: company was ended by signal 9" in demo.text

    def test_stops_everything_on_ctrl_c(self, start):
        demo = start()
        demo.wait_for_mail()
        assert len(demo.services()) == 4

        demo.process.send_signal(signal.SIGINT)

        assert demo.wait() == 1
        assert "Interrupted" in demo.text

    def test_leaves_a_folder_alone_that_is_not_its_own(self, start, tmp_path):
        kept = tmp_path / "var" / "demo" / "thesis.txt"
        kept.parent.mkdir(parents=True)
        kept.touch()

        demo = start()

        assert demo.wait() == 1
        assert "holds what is not the demo's" in demo.text
        assert kept.exists()

    def test_keeps_out_of_a_folder_that_another_demo_uses(self, start, tmp_path):
        folder = tmp_path / "var" / "demo"
        folder.mkdir(parents=True)
        with (folder / "demo.lock").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)

            demo = start()

            assert demo.wait() == 1
        assert f"another demo is using {folder}" in demo.text

    def test_signs_up_thirty_people_with_valid_forms(self):
        lines = (ROOT / "services/demo/signups.jsonl").read_text().splitlines()
        forms = [json.loads(line) for line in lines]

        assert len({RegisterSchema().load(form)["email"] for form in forms}) == 30


class TestRun:
    def test_leaves_the_services_running_until_ctrl_c(self, start, addresses):
        demo = start("run", **addresses)
        demo.wait_for(lambda: "Ctrl-C ends them." in demo.text, "the hints")
        url = f"http://{addresses['AUTH_EVENTS_ADDRESS']}/auth/register"
        command = re.search(rf"curl {url} -H '(.+): (.+)' -d '(.+)'", demo.text)

        header, value, body = command.groups()
        answer = requests.post(url, data=body, headers={header: value}, timeout=10)

        assert answer.status_code == 201
        demo.wait_for_mail()
        assert f"Data is in {demo.data}, mails go to {demo.data}/mail." in demo.text
        for service in ("auth_events", "company", "notifications", "queue_admin"):
            assert f"\n{service:<13} | " in f"\n{demo.text}"
        demo.process.send_signal(signal.SIGINT)
        assert demo.wait() == 0

    @pytest.mark.parametrize("provider", ["redis", "rabbitmq"])
    def test_has_private_servers_for_as_long_as_it_runs(self, start, addresses, provider):
        demo = start("run", QUEUE_PROVIDER=provider, **addresses)
        demo.wait_for(lambda: "Ctrl-C ends them." in demo.text, "the hints")
        ports = re.findall(r"^Started a private \w+ on port (\d+)", demo.text, re.MULTILINE)
        assert f"Data is in MySQL or MariaDB at {HOST}:{ports[1]}" in demo.text
        url = f"http://{addresses['QUEUE_ADMIN_ADDRESS']}/queue/health"

        demo.wait_for(lambda: requests.get(url, timeout=10).status_code == 200, "green health")

        demo.process.send_signal(signal.SIGINT)
        assert demo.wait() == 0
        for port in ports:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((HOST, int(port)), timeout=5)

    def test_ends_when_a_service_does(self, start, addresses):
        demo = start("run", **addresses)
        demo.wait_for(lambda: "Ctrl-C ends them." in demo.text, "the hints")

        os.kill(demo.services()["notifications"], signal.SIGKILL)

        assert demo.wait() == 1
        assert "Error: notifications was ended by signal 9" in demo.text

    def test_names_an_address_that_is_taken(self, start, addresses):
        host, _, port = addresses["COMPANY_ADDRESS"].partition(":")
        with closing(socket.create_server((host, int(port)))):
            demo = start("run", **addresses)
            assert demo.wait() == 1
        assert f"Error: company cannot listen on {host}:{port}: " in demo.text
