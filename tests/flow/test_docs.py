"""The documentation, done as it says: by a reader with a folder and services of their own."""

import contextlib
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import requests
from nameko.containers import ServiceContainer
from nameko.testing.services import dummy, entrypoint_hook

from shared.contracts import contracts
from shared.database import database_url, make_reader
from shared.events import EventDispatcher
from shared.store import stats
from shared.testing.servers import free_port
from tests.flow.plainly import Vhost
from tests.support.documents import blocks
from tests.support.processes import ROOT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

SECONDS = 30

PORTS = (3001, 3002, 3005, 3006, 3012, 9464)
"""The ports that the documentation names; the reader has others in their place."""

ADMIN = "127.0.0.1:3005"

KEPT = {"ID": ("messageId", "message_id"), "USER_ID": ("user_id",), "TOKEN": ("access_token",)}
"""The variables of the documentation, and where an answer has what the reader sets them to."""

VARIES = re.compile(
    r"\d{4}-\d\d-\d\dT"  # a time
    r"|[0-9a-f]{8}-[0-9a-f-]{27}$"  # an id
    r"|\S+:\d+$"  # a worker
    r"|[\w-]{40,}$"  # a token
    r"|Traceback "
)
"""Texts in answers that are others each time."""

COUNTS = {"pending", "processing", "completed", "failed", "retry", "total", "waiting", "active",
          "dead", "avgProcessingSeconds", "count", "messages"}  # fmt: skip
"""Numbers in answers that hang on what the reader did before."""

CALLABLE = {"services.auth_events", "services.company"}
"""The services of the project that have methods to call."""

OPERATIONS = ("messages", "repair", "limits", "publishing", "health", "message-log", "http")
"""The pages of docs/operations that are played whole, in this order."""

ELSEWHERE = ("make ", ".venv/bin/python -m ")
"""Commands that other tests run."""


class Reader:
    """Somebody who does what a document says, in a folder that looks like the project's."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = []
        self.answer = None
        self.addresses = {f"127.0.0.1:{port}": f"127.0.0.1:{free_port()}" for port in PORTS}
        self.env = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{folder}",
            "PYTHONWARNINGS": "ignore",
            "PYTHONUNBUFFERED": "1",
            "AUTH_EVENTS_ADDRESS": self.addresses["127.0.0.1:3001"],
            "COMPANY_ADDRESS": self.addresses["127.0.0.1:3002"],
            "QUEUE_ADMIN_ADDRESS": self.addresses[ADMIN],
        }
        (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
        (folder / "config.yml").symlink_to(ROOT / "config.yml")

    def play(self, document, start="", stop="no such block"):
        """Do what a document says, from the block that contains ``start`` to before ``stop``."""
        its = blocks(document)
        first = next(n for n, block in enumerate(its) if start in block.text)
        last = next((n for n, block in enumerate(its) if stop in block.text), len(its))
        for block, after in zip(its[first:last], [*its[first + 1 :], None], strict=False):
            if block.file:
                self.write(block.file, block.text)
            for command in block.commands if block.language == "bash" else ():
                self.enter(command, after if command == block.commands[-1] else None)

    def save_files(self, document):
        """Save the files that a document shows, and do nothing else."""
        for block in blocks(document):
            if block.file:
                self.write(block.file, block.text)

    def write(self, file, text):
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.localised(text))

    def localised(self, text):
        for default, own in self.addresses.items():
            text = text.replace(default, own)
        return text

    def enter(self, command, after=None):
        """Enter a command, and see that what it does is what the block after it shows."""
        command = self.localised(command)
        if variable := re.fullmatch(r"([A-Z_]+)=\S+", command):
            assert variable[1] in self.env, f"no answer had a value for {command}"
        elif command.startswith("curl "):
            self.curl(command, after if after and after.language == "json" else None)
        elif not command.startswith(ELSEWHERE) and self.has(command.split()[0]):
            text = self.start(command) if " run " in command else self.run(command)
            if after is not None and after.language == "text":
                assert after.text in text

    def has(self, program):
        """Say whether there is such a program; not each machine has each."""
        is_ours = "=" in program or (self.folder / program).exists()
        return is_ours or shutil.which(program) is not None

    # --- commands

    def run(self, command):
        """Run a command; return what it printed."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, command):
        """Start services; return what they printed until all are ready, or one refused."""
        process = Running(command, self.folder / f"process-{len(self.processes)}.log", self)
        self.processes.append(process)
        services = re.sub(
            r"--(?:config|broker) \S+", "", command.partition("nameko run ")[2]
        ).split()
        expected = {
            r"queue ready": sum(map(self.services_in, services)),
            # until then Ctrl-C would meet a start, which it ends with a traceback
            r"rpc ready|nobody can be called": len(CALLABLE.intersection(services)),
        }

        def is_ready():
            return all(len(re.findall(x, process.text)) == n for x, n in expected.items())

        wait_until(
            lambda: is_ready() or process.has_ended,
            SECONDS,
            lambda: f"{command}: {process.text}",
        )
        return process.text

    def services_in(self, module):
        file = self.folder / f"{module.replace('.', '/')}.py"
        return file.read_text().count("\n    name = ") if file.exists() else 1

    def stop(self):
        for process in self.processes:
            process.stop()

    # --- HTTP

    def curl(self, command, shown=None):
        """Send what curl would, which not each machine has; what only looks, until it is so."""
        method, url, headers, data = self.arguments(command)
        wait_until(lambda: is_open(url), SECONDS, f"{url} to be served")

        def is_as_shown():
            self.answer = requests.request(
                method, f"http://{url}", headers=headers, data=data, timeout=SECONDS
            )
            return self.difference(shown) == ""

        wait_until(
            is_as_shown,
            SECONDS if method == "GET" else 0,
            lambda: f"{command}: {self.answer.text}: {self.difference(shown)}",
        )
        if self.answer.headers.get("Content-Type", "").endswith("json"):
            self.keep(self.answer.json())

    def arguments(self, command):
        printed = self.run("curl() { printf '%s\\0' \"$@\"; }\n" + command)
        given = iter(printed.split("\0")[:-1])
        method, url, headers, data = "GET", None, {}, None
        for each in given:
            if each == "-X":
                method = next(given)
            elif each == "-H":
                name, value = next(given).split(": ", 1)
                headers[name] = value
            elif each == "-d":
                method, data = "POST" if method == "GET" else method, next(given).encode()
            else:
                assert url is None, f"what does curl do with {each}?"
                url = each
        return method, url, headers, data

    def difference(self, shown):
        status = self.answer.status_code
        if shown is None:
            return "" if self.answer.ok else f"status {status}"
        if f"It answers {status}" not in shown.said:
            return f"status {status}"
        return difference(json.loads(shown.text), self.answer.json())

    def keep(self, answer):
        """Note ids and tokens, for the variables in the commands that follow."""
        for key, value in answer.items():
            if isinstance(value, dict):
                self.keep(value)
            for variable, keys in KEPT.items():
                if key in keys:
                    self.env[variable] = value

    def message(self, message_id):
        return requests.get(
            f"http://{self.addresses[ADMIN]}/queue/messages/{message_id}", timeout=SECONDS
        ).json()

    def wait_for_status(self, message_id, status):
        wait_until(
            lambda: self.message(message_id)["status"] == status,
            SECONDS,
            lambda: f"{status}: {self.message(message_id)}",
        )
        return self.message(message_id)


class Running:
    """A command that does not end by itself."""

    def __init__(self, command, log, reader):
        self.command = command
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                ["bash", "-c", f"exec env {command}"],
                cwd=reader.folder,
                env=reader.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def text(self):
        return self.log.read_text(errors="replace")

    @property
    def has_ended(self):
        return self.process.poll() is not None

    def wait_for(self, pattern):
        wait_until(lambda: re.search(pattern, self.text), SECONDS, lambda: self.text)

    def stop(self):
        """Press Ctrl-C; return the exit status."""
        if not self.has_ended:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def read(name):
    return (ROOT / name).read_text()


def is_open(url):
    host, port = url.partition("/")[0].split(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
        return True
    return False


def difference(shown, found, where="answer"):
    """Say in what an answer is not of the kind that the documentation shows; empty if it is."""
    match shown, found:
        case dict(), dict():
            # these two are shortened
            wanted = found.keys() if where not in ("payload", "metadata") else shown.keys()
            if shown.keys() != wanted:
                return f"{where} has {sorted(found)}, not {sorted(shown)}"
            return "".join(difference(shown[key], found[key], key) for key in shown)
        case [], list():
            return f"{where} is {found}" if found else ""
        case list(), list():
            return "".join(
                f"{where} has nothing like {each}"
                for each in shown
                if all(difference(each, one, where) for one in found)
            )
        case str(), str() if VARIES.match(shown) and VARIES.match(found):
            return ""
        case int() | float(), int() | float() if where in COUNTS:
            return ""
    return "" if shown == found else f"{where} is {found!r}, not {shown!r}"


def names_after(code, folder):
    """Return which names there are after ``code`` was run."""
    file = folder / "code.py"
    file.write_text(code)
    return set(runpy.run_path(str(file)))


@pytest.fixture
def reader(tmp_path):
    made = Reader(tmp_path)
    yield made
    made.stop()


class TestReadme:
    RETRY = "curl -X POST 127.0.0.1:3005/queue/retry"

    def test_a_first_handler_is_broken_and_put_right(self, reader):
        reader.play("README.md", start="# hello.py", stop=self.RETRY)
        hello = reader.processes[0]
        hello.wait_for("packing tea")
        hello.wait_for("packing coffee")
        message_id = reader.env["ID"]
        message = reader.wait_for_status(message_id, "failed")
        assert message["deliveries"][0]["errorType"] == "KeyError"

        self.mend(reader.folder / "hello.py")
        assert hello.stop() == 0
        reader.start(hello.command)
        reader.play("README.md", start=self.RETRY, stop="nameko run services.company")

        message = reader.wait_for_status(message_id, "completed")
        assert [h["outcome"] for h in message["deliveries"][0]["history"]] == ["failed"]
        reader.processes[-1].wait_for("packing a gift")

    def mend(self, file):
        """Do what the text says before it comes to the retry."""
        said = next(b.said for b in blocks("README.md") if self.RETRY in b.text)
        before, after = re.search(r"change `(.+?)` to `(.+?)`", said).groups()
        assert before in file.read_text()
        file.write_text(file.read_text().replace(before, after))

    def test_four_services_by_hand(self, reader):
        reader.play("README.md", start="nameko run services.company")

        # the last question was for the statistics
        assert reader.answer.json()["queueName"] == "user-events"
        reader.wait_for_status(reader.env["ID"], "completed")

    def test_only_the_import_changes(self, tmp_path):
        [line] = [b.text for b in blocks("README.md") if "was: from nameko.events" in b.text]
        names = re.search(r"import (.+?)  #", line)[1]
        old_line = line.partition("# was: ")[2].replace("...", names)
        new, old = (names_after(text, tmp_path) for text in (line, old_line))
        assert new == old > {"EventDispatcher", "event_handler"}


class TestDocuments:
    def test_leave_no_page_of_operations_out(self):
        pages = {path.stem for path in ROOT.glob("docs/operations/*.md")}
        assert pages == {*OPERATIONS, "audit", "running"}

    def test_operations(self, reader):
        reader.play("docs/operations.md")
        for page in OPERATIONS:
            reader.play(f"docs/operations/{page}.md")
        reader.play("docs/operations/audit.md", start="/queue/audit-log")
        reader.play("docs/operations/running.md", start="# backup.py")
        assert len(list(reader.folder.glob("backup/*.db"))) == 4

    def test_page(self, reader):
        reader.play("docs/page.md")
        assert "ECONNREFUSED" in reader.wait_for_status(reader.env["ID"], "failed")["errorMessage"]
        page = requests.get(f"http://{reader.addresses[ADMIN]}/", timeout=SECONDS)
        assert (page.status_code, page.headers["Content-Type"][:9]) == (200, "text/html")

    def test_queuectl(self, reader):
        # on a database that is new, which that of the pages played together is not
        reader.play("docs/operations/running.md", stop="# backup.py")
        reader.play("docs/operations/audit.md", stop="/queue/audit-log")
        assert reader.run(".venv/bin/queuectl db upgrade").count("up to date") == 4

    def test_commands(self, reader):
        reader.play("docs/queuectl.md")
        listed = json.loads(reader.run(".venv/bin/queuectl messages --json"))["messages"]
        assert len(listed) == 2

    def test_monitoring(self, reader):
        reader.play("docs/monitoring.md", stop="promtool")
        assert "nameko_queue_flush_seconds_bucket" in reader.answer.text
        for process in reader.processes:
            assert process.stop() == 0

        # how long spans are kept for company
        reader.env["OTEL_BSP_SCHEDULE_DELAY"] = "200"
        reader.play("docs/monitoring.md", start="# traced.py")
        traced = reader.processes[-1]
        for name in ("dispatch user-events", "handle user-events"):
            traced.wait_for(f'"name": "{name}"')
        [trace_id] = re.findall(r"traceparent: 00-(\w{32})-", read("docs/monitoring.md"))
        traced.wait_for(rf'(?s)("trace_id": "0x{trace_id}".*){{2}}')
        assert traced.stop() == 0

    def test_services(self, reader):
        reader.play("docs/services.md")
        assert reader.answer.json()["user_id"] == reader.env["USER_ID"]

    def test_settings(self, reader):
        its = blocks("docs/settings.md")
        for block, after in itertools.pairwise(its):
            for command in block.commands if block.language == "bash" else ():
                reader.enter(command, after)
                reader.stop()
        assert [process.stop() for process in reader.processes] == [0, 0, 2]

    def test_troubleshooting(self, reader):
        reader.play("docs/operations.md")
        dead = reader.env["ID"]
        reader.play("docs/troubleshooting.md", start="ID=")
        assert reader.wait_for_status(dead, "failed")["deliveries"]

    def test_troubleshooting_of_the_start(self, reader):
        reader.play("docs/troubleshooting.md", stop="ID=")
        assert [process.stop() for process in reader.processes] == [0]

    def test_providers(self, reader):
        reader.play("docs/providers.md")
        theirs, *ours = [
            f"cd {ROOT} && {command.replace('.venv/bin/python', sys.executable)}"
            for block in blocks("docs/providers.md")
            if block.language == "bash"
            for command in block.commands
            if "pytest" in command
        ]
        for command in ours:
            assert "TestSettling" in reader.run(f"{command} -p no:cacheprovider --collect-only -q")
        # all of them take long, and these are many other tests' already
        some = f"{theirs} -p no:cacheprovider -q -k 'TestHealth or TestFencing'"
        assert re.search(r"^[1-9]\d* passed", reader.run(some), re.MULTILINE)


class TestEvents:
    def test_statements(self, flow):
        say_all(flow, "shop", "docs/events.md")

        assert stats_of(flow, "shop")["total"] == 7

    def test_handlers(self, reader, flow):
        reader.save_files("docs/events.md")
        reader.env.update(flow.env)
        reader.start(".venv/bin/nameko run shop greeter payments janitor")
        [running] = reader.processes

        with saying(flow, "auth_events") as say:
            ada = {"user_id": "1", "email": "a@example.com", "first_name": "Ada", "last_name": "L"}
            say(f"self.dispatch('user.registered', {ada})")
            say("self.dispatch('user.logged_in', {'user_id': '1', 'email': 'a@example.com'})")
        with saying(flow, "shop") as say:
            refused = say("self.dispatch('item.sold', {'item': 'counterfeit'})")
            postponed = say("self.dispatch('item.sold', {'item': 'salt'})")

        running.wait_for("hello Ada by message 0")
        running.wait_for("seen a@example.com at attempt 1")
        running.wait_for("completed 1\n")
        failed = flow.wait_for_status(refused, "failed")
        assert failed["deliveries"][0]["errorType"] == "Reject"
        waiting = flow.wait_for_status(postponed, "retry")
        assert waiting["deliveries"][0]["availableAt"] > waiting["createdAt"]
        # the janitor's, ours, and one that the shop's timer sold
        wait_until(lambda: stats_of(flow, "shop")["total"] >= 4, SECONDS, "the timer")

    def test_the_outbox(self, reader):
        reader.save_files("docs/events.md")
        address = f"127.0.0.1:{free_port()}"
        (reader.folder / "own.yml").write_text(f"WEB_SERVER_ADDRESS: {address}\n")
        reader.start(".venv/bin/nameko run --config own.yml orders.service services.queue_admin")

        reader.curl(f"curl -X POST {address}/orders/tea")

        assert reader.answer.json()["order_id"] == 1
        placed = {"order_id": 1, "item": "tea"}
        wait_until(
            lambda: reader.message(reader.env["ID"]).get("payload") == placed,
            SECONDS,
            lambda: str(reader.message(reader.env["ID"])),
        )

    def test_the_inbox(self, reader, flow):
        reader.save_files("docs/events.md")
        reader.env.update(flow.env)
        reader.start(".venv/bin/nameko run stock.service")

        with saying(flow, "shop") as say:
            sold = say("self.dispatch('item.sold', {'item': 'tea'})")

        flow.wait_for_status(sold, "completed")
        engine = make_reader(database_url(flow.settings, "stock"), lambda _: None)
        with engine.connect() as connection:
            query = "SELECT item, count, message_id FROM stock_movements, stock_inbox"
            assert connection.exec_driver_sql(query).all() == [("tea", -1, sold)]
        engine.dispose()

    def test_a_test_of_a_handler(self, reader):
        reader.save_files("docs/events.md")
        tests = "test_greeter.py -q -c /dev/null --rootdir . -p no:cacheprovider"
        done = reader.run(f".venv/bin/python -m pytest {tests} -p no:nameko_sqlalchemy")
        assert "1 passed" in done


class TestRpc:
    def test_a_method_and_a_call_of_it(self, reader):
        reader.save_files("docs/rpc.md")
        [command] = [b for b in blocks("docs/rpc.md") if b.language == "bash"]
        [printed] = [b for b in blocks("docs/rpc.md") if b.language == "text"]
        running = Running(command.text.strip(), reader.folder / "process.log", reader)
        reader.processes.append(running)

        running.wait_for(re.escape(printed.text))

    def test_a_test_of_a_service(self, reader):
        reader.save_files("docs/rpc.md")
        tests = "test_tea.py -q -c /dev/null --rootdir . -p no:cacheprovider"
        done = reader.run(f".venv/bin/python -m pytest {tests} -p no:nameko_sqlalchemy")
        assert "1 passed" in done


class TestMoving:
    BROKER = "amqp://guest:guest@127.0.0.1:5672/"
    QUEUE = "evt-shop-item.sold--stock.take"

    @pytest.fixture
    def commands(self, reader, rabbitmq_server):
        """The commands of the document, by what they are about, and a broker of one's own."""
        self.vhost = Vhost(rabbitmq_server)
        reader.addresses[self.BROKER] = self.vhost.uri
        document = "docs/moving-from-nameko.md"
        its = [c for b in blocks(document) if b.language == "bash" for c in b.commands]
        plain_shop, plain_stock, stock, dry_run, upgrade, downgrade = its
        assert "--dry-run" in dry_run
        reader.save_files(document)
        yield {"shop": plain_shop, "plain": plain_stock, "ours": stock, "dry": dry_run,
               "up": upgrade, "down": downgrade}  # fmt: skip
        reader.stop()

    def start(self, reader, command):
        """Start what may be plain nameko, which does not say when it is ready."""
        log = reader.folder / f"process-{len(reader.processes)}.log"
        reader.processes.append(Running(reader.localised(command), log, reader))
        return reader.processes[-1]

    def test_one_service_over_and_back(self, reader, commands):
        self.start(reader, commands["shop"])
        plain = self.start(reader, commands["plain"])
        plain.wait_for("took tea")
        assert plain.stop() == 0

        self.change_import(reader, "nameko", "shared")
        reader.start(reader.localised(commands["ours"]))
        ours = reader.processes[-1]
        ours.wait_for("took tea\ntook tea")
        assert f"{self.QUEUE}: declared before" in ours.text
        assert "to be upgraded" in reader.run(reader.localised(commands["dry"]))
        said = reader.run(reader.localised(commands["up"]))
        assert self.rows(said) == self.rows(self.shown())
        assert "is upgraded already" in reader.run(reader.localised(commands["up"]))
        self.wait_for_more(ours)
        assert ours.stop() == 0

        assert "downgraded" in reader.run(reader.localised(commands["down"]))
        self.change_import(reader, "shared", "nameko")
        self.start(reader, commands["plain"]).wait_for("took tea\ntook tea")

    def change_import(self, reader, before, after):
        file = reader.folder / "stock.py"
        text = file.read_text()
        assert text.count(f"from {before}.events") == 1
        file.write_text(text.replace(f"from {before}.events", f"from {after}.events"))

    def wait_for_more(self, process):
        count = process.text.count("took tea")
        wait_until(lambda: process.text.count("took tea") > count, SECONDS, lambda: process.text)

    def shown(self):
        document = blocks("docs/moving-from-nameko.md")
        return next(block.text for block in document if block.language == "text")

    def rows(self, said):
        """The rows of a table, but for how many messages waited."""
        return [re.split(r"\s\s+\d*", line.strip()) for line in said.splitlines()]


class TestContracts:
    def test_two_versions_beside_each_other(self, reader, flow, monkeypatch):
        reader.save_files("docs/contracts.md")
        reader.env.update(flow.env)
        reader.start(".venv/bin/nameko run ledger")
        monkeypatch.setattr(contracts, "_schemas", {})
        for file in ("billing_contracts.py", "billing_contracts_2.py"):
            runpy.run_path(str(reader.folder / file))

        say_all(flow, "billing", "docs/contracts.md")

        reader.processes[0].wait_for("booked 1200 EUR\nbooked 1200 EUR\n")


@contextlib.contextmanager
def saying(flow, service):
    """Give a function that executes code on the ``self`` of a service that dispatches."""

    class Speaker:
        name = service
        dispatch = EventDispatcher()

        @dummy
        def say(self, code):
            return eval(code, {"self": self})  # noqa: S307 - code of our own

    container = ServiceContainer(Speaker, dict(flow.env))
    container.start()

    def say(code):
        with entrypoint_hook(container, "say") as call:
            return call(code)

    yield say
    container.stop()


def say_all(flow, service, document):
    """Execute the statements of a document that belong to no file."""
    with saying(flow, service) as say:
        for block in blocks(document):
            if block.language == "python" and not block.file:
                say(compile(block.text, document, "exec"))


def stats_of(flow, queue):
    engine = make_reader(database_url(flow.settings), lambda _: None)
    with engine.connect() as connection:
        found = stats.queue_stats(connection, queue)
    engine.dispose()
    return found or {"total": 0}


class TestTesting:
    """docs/testing.md, whose tests pass but for the one that finds a careless handler."""

    def test_finds_the_careless_handler_where_it_is_said(self, reader):
        reader.save_files("docs/testing.md")
        command = "exec .venv/bin/python -m pytest -q -p no:cacheprovider ."
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=reader.folder,
            env=reader.env,
            capture_output=True,
            text=True,
        )
        # pytest marks the lines of an error
        told = " ".join(re.sub(r"^E\b", "", done.stdout, flags=re.MULTILINE).split())
        [shown] = [block.text for block in blocks("docs/testing.md") if block.language == "text"]
        assert " ".join(shown.split()) in told, done.stdout
        assert "1 failed, 3 passed" in done.stdout
        assert "FAILED test_repeating.py" in done.stdout
