"""Real servers, each private: a free port, its data in a temporary folder.

For tests, and for who wants to see the suite on a server that is not there yet.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import amqp
import pymysql
import redis

HOST = "127.0.0.1"

START_SECONDS = 30.0
"""How long a server may take until it answers: a busy machine recovers slowly."""

STOP_SECONDS = 30.0

POLL_SECONDS = 0.02


class ProgramMissingError(Exception):
    """Raised when a server's program is not installed.

    :param package: what Debian calls the package that has it.
    """

    def __init__(self, name: str, package: str) -> None:
        super().__init__(f"{name} was not found: apt install {package}")


class ServerError(Exception):
    """Raised when a server does not do what it was started for."""


def reserve_port() -> socket.socket:
    """Return a socket that has a TCP port of this machine, and does not listen on it.

    While it is open, the port goes to nobody who takes any: neither to another such call
    nor to an outgoing connection. Who names the port may listen on it, with SO_REUSEADDR as
    servers do, and to everybody else it is one that refuses connections.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind((HOST, 0))
    return reserved


# enough for those that one test asks for
_reserved: deque[socket.socket] = deque(maxlen=200)


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on, reserved for this process.

    It is so until the process ends, or has asked for 200 more.
    """
    _reserved.append(reserve_port())
    port: int = _reserved[-1].getsockname()[1]
    return port


def find_program(name: str, package: str) -> str:
    """Return the path of a program.

    :param package: what Debian calls the package that has it.
    :raises ProgramMissingError: when it is not installed.
    """
    # servers are in folders that only root has in its PATH
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        raise ProgramMissingError(name, package)
    return found


def mortal() -> list[str]:
    """Return what before a command makes it end with this process, should that be killed."""
    found = shutil.which("setpriv")
    return [found, "--pdeathsig", "KILL"] if found else []


def _wait_until(condition: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(f"waited {START_SECONDS:g} s in vain for {what()}")
        time.sleep(POLL_SECONDS)


class Server(ABC):
    """A server as a child process, which can be stopped, killed and started again.

    :raises ProgramMissingError: when it is not installed.
    """

    def __init__(self) -> None:
        # in no folder of the caller's: its name may be too long for a socket
        self.folder = Path(tempfile.mkdtemp(prefix="nameko-server-"))
        # for all of its life: it may be restarted when nothing listens
        self._reserved = reserve_port()
        self.port: int = self._reserved.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Return the command that runs it in the foreground."""

    @abstractmethod
    def answers(self) -> bool:
        """Say whether it can be used."""

    @property
    def log(self) -> Path:
        """What it printed."""
        return self.folder / "server.log"

    def _variables(self) -> Mapping[str, str] | None:
        """Return its environment; ``None`` for this process's own."""
        return None

    def start(self) -> None:
        """Start it, and return once it answers.

        :raises ServerError: when it does not.
        """
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*mortal(), *self.command()],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=self._variables(),
                # out of Ctrl-C's reach: it is we who end it
                start_new_session=True,
            )
        _wait_until(self._is_up, lambda: f"the server to answer: {self._last_words()}")

    def stop(self) -> None:
        """Shut it down in order, and return once it is gone."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait(STOP_SECONDS)
            self.process = None

    def kill(self) -> None:
        """SIGKILL: what it has not written yet is lost."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        """Stop it and start it again, on the same port with the same data."""
        self.stop()
        self.start()

    def close(self) -> None:
        """End it, and remove its data."""
        self.kill()
        self._reserved.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _is_up(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            raise ServerError(f"the server ended at once: {self._last_words()}")
        return self.answers()

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


@dataclass(frozen=True, slots=True)
class MariaDBDatabase:
    """A database of a test's own, and a user who may do everything in it and nothing else."""

    port: int
    name: str
    # quotes, and whatever has a meaning in a URL: who composes one has to escape it
    user: str = "queue_user"
    password: str = "p@ss:w/ord?#%'\""

    @property
    def environment(self) -> Mapping[str, str]:
        """The settings that name it."""
        return {
            "DB_HOST": HOST,
            "DB_PORT": str(self.port),
            "DB_USER": self.user,
            "DB_PASSWORD": self.password,
            "DB_NAME": self.name,
        }


class MariaDBServer(Server):
    """``mariadbd``, with settings that are fast and yet survive that it is killed.

    :param options: further arguments.
    """

    def __init__(self, *options: str) -> None:
        self._options = options
        self._program = find_program("mariadbd", "mariadb-server")
        install = find_program("mariadb-install-db", "mariadb-server")
        super().__init__()
        self._numbers = itertools.count(1)
        quietly = ["--skip-test-db", "--skip-name-resolve"]
        without_password = "--auth-root-authentication-method=normal"
        made = subprocess.run(
            [install, "--no-defaults", *self._where(), *quietly, without_password],
            capture_output=True,
            check=False,
        )
        if made.returncode:
            self.close()
            raise ServerError((made.stderr + made.stdout).decode(errors="replace"))

    def command(self) -> Sequence[str]:
        return [
            self._program,
            "--no-defaults",
            *self._where(),
            f"--socket={self.folder / 'socket'}",
            f"--pid-file={self.folder / 'pid'}",
            f"--port={self.port}",
            f"--bind-address={HOST}",
            "--skip-networking=OFF",
            "--skip-name-resolve",
            "--skip-log-bin",
            "--performance-schema=OFF",
            # each commit reaches the kernel, none the disk: only a power failure loses it
            "--innodb-flush-log-at-trx-commit=2",
            "--innodb-flush-method=nosync",
            "--debug-no-sync",
            "--innodb-log-file-size=16M",
            "--innodb-buffer-pool-size=64M",
            "--innodb-fast-shutdown=1",
            *self._options,
        ]

    def answers(self) -> bool:
        try:
            self.execute("SELECT 1")
        except pymysql.MySQLError:
            return False
        return True

    def execute(self, *statements: str) -> list[tuple[Any, ...]]:
        """Execute statements as root; return the rows of the last one."""
        rows: Sequence[Any] = ()
        with closing(self.connect()) as connection, connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
                rows = cursor.fetchall()
        return list(rows)

    def connect(self) -> Any:
        """Return a connection to it, as root."""
        # to load the certificates for TLS takes longer than all the rest
        return pymysql.connect(
            host=HOST, port=self.port, user="root", autocommit=True, ssl_disabled=True
        )

    def create_database(self) -> MariaDBDatabase:
        """Make a database that is empty."""
        made = MariaDBDatabase(self.port, f"test_{next(self._numbers)}")
        user = f"'{made.user}'@'%'"
        password = pymysql.converters.escape_string(made.password)
        self.execute(
            f"CREATE DATABASE {made.name} CHARACTER SET utf8mb4",
            f"CREATE USER IF NOT EXISTS {user} IDENTIFIED BY '{password}'",
            f"GRANT ALL ON {made.name}.* TO {user}",
        )
        return made

    def empty(self, database: MariaDBDatabase) -> None:
        """Delete all rows but those that say which version the tables are at."""
        found = self.execute(f"SHOW TABLES IN {database.name}")
        tables = [name for (name,) in found if not name.endswith("_version")]
        deletions = [f"DELETE FROM {database.name}.{table}" for table in tables]
        # by name, parents may come before their children
        self.execute("SET foreign_key_checks = 0", *deletions)

    def _where(self) -> list[str]:
        # it refuses to run as root unless it is told to
        user = ["--user=root"] if os.geteuid() == 0 else []
        # a server that starts removes temporary tables of whoever shares the folder
        return [*user, f"--datadir={self.folder / 'data'}", f"--tmpdir={self.folder}"]


class RedisServer(Server):
    """``redis-server``, which writes what it does to a file and has it again when restarted.

    :param options: further options, such as ``--maxmemory=8mb``.
    :param password: asked for where it is not empty. It holds whatever has a meaning in a URL.
    """

    def __init__(self, *options: str, password: str = "", is_durable: bool = True) -> None:
        self._program = find_program("redis-server", "redis-server")
        super().__init__()
        self._options = options
        self.password = password
        self._is_durable = is_durable

    def command(self) -> Sequence[str]:
        # each write reaches the kernel, none the disk: only a power failure loses it
        durable = ["--appendonly", "yes", "--appendfsync", "no"]
        password = ["--requirepass", self.password] if self.password else []
        return [
            self._program,
            *("--port", str(self.port)),
            *("--bind", HOST),
            *("--dir", str(self.folder)),
            *("--save", ""),
            *("--repl-diskless-sync-delay", "0"),
            *(durable if self._is_durable else []),
            *password,
            *self._options,
        ]

    def answers(self) -> bool:
        with self.client() as client, contextlib.suppress(redis.RedisError):
            return bool(client.ping())
        return False

    def client(self, db: int = 0) -> Any:
        """Return a client of it."""
        return redis.Redis(
            HOST, self.port, db, self.password or None, decode_responses=True, socket_timeout=5
        )

    def empty(self) -> None:
        """Delete everything."""
        with self.client() as client:
            client.flushall()

    @property
    def environment(self) -> Mapping[str, str]:
        """The settings that name it."""
        return {
            "REDIS_HOST": HOST,
            "REDIS_PORT": str(self.port),
            "REDIS_PASSWORD": self.password,
        }


class RedisCluster:
    """Three primaries, each with a third of the slots."""

    SLOTS_OF = (range(5461), range(5461, 10922), range(10922, 16384))

    def __init__(self) -> None:
        # to the port, the nodes add 10,000 for the talk among themselves
        self.nodes = [
            RedisServer("--cluster-enabled", "yes", "--cluster-port", str(free_port()))
            for _ in range(3)
        ]

    def start(self) -> None:
        """Start the nodes; return once each knows that all slots are served."""
        for node in self.nodes:
            node.start()
        _wait_until(self._is_whole, lambda: "the cluster to be whole")

    def make(self) -> None:
        """Start the nodes for the first time, and make a cluster of them."""
        for number, node in enumerate(self.nodes):
            node.start()
            slots = self.SLOTS_OF[number]
            with node.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", slots[0], slots[-1])
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            with self.nodes[0].client() as client:
                bus = node._options[-1]
                client.execute_command("CLUSTER", "MEET", HOST, node.port, bus)
        _wait_until(self._is_whole, lambda: "the cluster to be made")

    def stop(self) -> None:
        """Shut all nodes down."""
        for node in self.nodes:
            node.stop()

    def close(self) -> None:
        """End them, and remove their data."""
        for node in self.nodes:
            node.close()

    @property
    def environment(self) -> Mapping[str, str]:
        """The settings that name it."""
        hosts = ",".join(f"{HOST}:{node.port}" for node in self.nodes)
        return {"REDIS_URL": f"redis+cluster://{hosts}"}

    def empty(self) -> None:
        """Delete everything."""
        for node in self.nodes:
            node.empty()

    def _is_whole(self) -> bool:
        return all(map(_knows_all, self.nodes))


def _knows_all(node: RedisServer) -> bool:
    with node.client() as client:
        info = client.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and info["cluster_known_nodes"] == "3"


class RedisSentinel(Server):
    """A sentinel that watches a primary and a replica of its own."""

    SERVICE = "orders-redis"

    def __init__(self) -> None:
        super().__init__()
        self.primary = RedisServer()
        where = [HOST, str(self.primary.port)]
        self.replica = RedisServer("--replicaof", *where)
        (self.folder / "sentinel.conf").write_text(
            f"port {self.port}\nbind {HOST}\ndir {self.folder}\n"
            f"sentinel monitor {self.SERVICE} {HOST} {self.primary.port} 1\n"
            f"sentinel down-after-milliseconds {self.SERVICE} 500\n"
            f"sentinel failover-timeout {self.SERVICE} 3000\n"
        )

    def command(self) -> Sequence[str]:
        program = find_program("redis-server", "redis-server")
        return [program, str(self.folder / "sentinel.conf"), "--sentinel"]

    def start(self) -> None:
        """Start all three; return once the sentinel knows the replica."""
        self.primary.start()
        self.replica.start()
        super().start()

    def answers(self) -> bool:
        with contextlib.suppress(redis.RedisError), self._client() as client:
            known = client.execute_command("SENTINEL REPLICAS", self.SERVICE)
            return str(self.replica.port) in str(known)
        return False

    def fail_over(self) -> None:
        """Kill the primary, once the replica has what it has; return when that is the new one."""
        _wait_until(self._is_followed, lambda: "the replica to follow")
        self.primary.kill()
        _wait_until(self._is_failed_over, lambda: "the replica to take over")

    def close(self) -> None:
        """End all three."""
        super().close()
        self.primary.close()
        self.replica.close()

    @property
    def environment(self) -> Mapping[str, str]:
        """The settings that name it."""
        return {"REDIS_URL": f"redis+sentinel://{HOST}:{self.port}/{self.SERVICE}/1"}

    def _is_followed(self) -> bool:
        with self.primary.client() as ours, self.replica.client() as its:
            follower = its.info("replication")
            offset = ours.info("replication")["master_repl_offset"]
        is_up = follower["master_link_status"] == "up"
        return is_up and bool(follower["slave_repl_offset"] == offset)

    def _is_failed_over(self) -> bool:
        with self._client() as client:
            where = client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", self.SERVICE)
        return str(self.replica.port) in map(str, where)

    def _client(self) -> Any:
        return redis.Redis(HOST, self.port, decode_responses=True, socket_timeout=5)


CONTROL_SECONDS = 120.0
"""How long ``rabbitmqctl`` may take: it begins a whole Erlang node, and others may be busy."""

VHOSTS_AT_ONCE = 20
"""To ask for one takes about as long as to ask for many."""

_ADD_VHOSTS = """lists:foreach(fun(V) ->
    rabbit_vhost:add(V, <<"tests">>),
    rabbit_auth_backend_internal:set_permissions(
        <<"%s">>, V, <<".*">>, <<".*">>, <<".*">>, <<"tests">>)
end, [%s])"""


class RabbitMQServer(Server):
    """``rabbitmq-server``, a node of its own with an ``epmd`` of its own.

    :param options: further lines of its ``rabbitmq.conf``.
    """

    USER = "queue_user"
    # quotes, and whatever has a meaning in a URL: who composes one has to escape it
    PASSWORD = "p@ss:w/ord?#%'\""

    def __init__(self, *options: str) -> None:
        self._program = find_rabbitmq("rabbitmq-server")
        self._epmd_program = find_program("epmd", "erlang-base")
        super().__init__()
        self._epmd_port, self._node_port = free_port(), free_port()
        self._epmd: subprocess.Popen[bytes] | None = None
        self._vhosts: list[str] = []
        self._numbers = itertools.count(1)
        lines = [
            f"listeners.tcp.local = {HOST}:{self.port}",
            f"default_user = {self.USER}",
            "loopback_users = none",
            "disk_free_limit.absolute = 1MB",
            "log.console.level = warning",
            *options,
        ]
        (self.folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        (self.folder / "plugins").write_text("[].\n")
        # the other file has comments that begin with #
        password = self.PASSWORD.replace('"', '\\"')
        rabbit = f'{{default_pass, <<"{password}">>}}, {{channel_tick_interval, 1000}}'
        (self.folder / "advanced.config").write_text(f"[{{rabbit, [{rabbit}]}}].\n")

    def command(self) -> Sequence[str]:
        return [self._program]

    def start(self) -> None:
        if self._epmd is None:
            epmd = [self._epmd_program, "-port", str(self._epmd_port), "-address", HOST]
            self._epmd = subprocess.Popen(
                [*mortal(), *epmd], stdin=subprocess.DEVNULL, start_new_session=True
            )
        super().start()

    def stop(self) -> None:
        """Kill it: what it confirmed it has on disk, and to shut it down takes seconds."""
        self.kill()

    def shut_down(self) -> None:
        """Stop it in order: a quorum queue that is a few minutes old survives nothing else."""
        super().stop()

    def answers(self) -> bool:
        try:
            self.connect().close()
        except (OSError, amqp.AMQPError):
            return False
        return True

    def connect(self, **options: Any) -> Any:
        """Return a connection to it, of py-amqp's own."""
        connection = amqp.Connection(
            f"{HOST}:{self.port}", self.USER, self.PASSWORD, connect_timeout=5, **options
        )
        connection.connect()
        return connection

    def new_vhost(self) -> str:
        """Return the name of a virtual host with nothing in it."""
        if not self._vhosts:
            self._vhosts = [f"v{next(self._numbers)}" for _ in range(VHOSTS_AT_ONCE)]
            names = ", ".join(f'<<"{name}">>' for name in self._vhosts)
            self.evaluate(_ADD_VHOSTS % (self.USER, names))
        return self._vhosts.pop()

    def delete_queues(self, *names: str) -> None:
        """Delete queues, those that are there."""
        with self.connect() as connection, connection.channel() as channel:
            for name in names:
                channel.queue_delete(name)

    def serves(self, *names: str) -> bool:
        """Say whether these queues hand out what they have."""
        try:
            with self.connect() as connection, connection.channel() as channel:
                for name in names:
                    channel.basic_get(name)
        except (OSError, amqp.AMQPError):
            return False
        return True

    def control(self, *command: str) -> str:
        """Run ``rabbitmqctl``, which takes a second or two; return what it printed."""
        program = find_rabbitmq("rabbitmqctl")
        done = subprocess.run(
            [program, "--quiet", *command],
            env=self._variables(),
            capture_output=True,
            text=True,
            check=False,
            timeout=CONTROL_SECONDS,
        )
        if done.returncode:
            raise ServerError(done.stderr + done.stdout)
        return done.stdout

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of Erlang, by way of JSON.

        The server computes it, so this takes milliseconds.
        """
        answer = self.folder / "answer.json"
        done = subprocess.run(
            [
                find_program("erl_call", "erlang-base"),
                *("-address", f"{HOST}:{self._node_port}"),
                *("-R", "-e"),
            ],
            input=f'file:write_file("{answer}", rabbit_json:encode({expression})).\n',
            env=self._variables(),
            capture_output=True,
            text=True,
            check=False,
            timeout=CONTROL_SECONDS,
        )
        if done.stdout.strip() != "{ok, ok}":
            raise ServerError(done.stderr + done.stdout)
        return json.loads(answer.read_bytes())

    def close(self) -> None:
        self.kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
        super().close()

    @property
    def environment(self) -> Mapping[str, str]:
        """The settings that name it."""
        return {
            "RABBITMQ_HOST": HOST,
            "RABBITMQ_PORT": str(self.port),
            "RABBITMQ_USERNAME": self.USER,
            "RABBITMQ_PASSWORD": self.PASSWORD,
        }

    def _variables(self) -> Mapping[str, str]:
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": "tests@localhost",
            "RABBITMQ_DIST_PORT": str(self._node_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            # it does not spin while it waits: other servers share the processors
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none "
            "+sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}",
            # as under systemd: the script becomes the server, whose pid this is
            "NOTIFY_SOCKET": os.devnull,
        }


def find_rabbitmq(name: str) -> str:
    """Return the path of one of RabbitMQ's programs.

    The ones that Debian has in the PATH change the user first.
    """
    own = Path("/usr/lib/rabbitmq/bin") / name
    return str(own) if own.exists() else find_program(name, "rabbitmq-server")
