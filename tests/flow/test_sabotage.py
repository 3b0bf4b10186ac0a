"""Handlers and surroundings that do what nobody should."""

import json
import os
import shutil
import signal

import amqp
import pytest
from click.testing import CliRunner

from shared.cli import main
from tests.flow.conftest import BACKENDS
from tests.support.processes import NamekoProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow


RECORDER = "tests.flow.apps.recorder"
SABOTEUR = "tests.flow.apps.saboteur"


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("eventlet timeout", "HandlerAbortedError"),
        ("system exit", "HandlerAbortedError"),
        ("greenlet exit", "HandlerAbortedError"),
        ("retry never", "ValueError"),
        ("retry at no time", "ValueError"),
        ("no text", "NoTextError"),
        ("half a character", "ValueError"),
        ("huge text", "ValueError"),
        ("wrong signature", "TypeError"),
    ],
)
def test_a_handler_that_ends_strangely_is_a_failed_attempt(flow, what, error):
    worker = flow.run(SABOTEUR)
    bad = [flow.send("job.given", {"what": what}, max_retries=0) for _ in range(12)]
    good = flow.send("job.given", {"what": "nothing"})

    for message_id in bad:
        message = flow.wait_for_status(message_id, "failed", timeout=10)
        assert message["deliveries"][0]["errorType"] == error
    flow.wait_for_status(good, "completed", timeout=10)
    assert worker.process.poll() is None


def test_what_a_stranger_sent_that_nobody_can_read_is_a_dead_letter(request, flow_on):
    """Given another program that puts messages into the queue of a handler."""
    flow = flow_on(BACKENDS["rabbitmq"](request))
    worker = flow.run(RECORDER)
    bodies = [b"no JSON", b"\xff\x00", b"[" * 100_000 + b"]" * 100_000, b"1" * 6000, b""]
    server = request.getfixturevalue("rabbitmq_server")
    with server.connect(virtual_host=flow.env["RABBITMQ_VHOST"]) as connection:
        for body in bodies:
            connection.channel().basic_publish(
                amqp.Message(body), routing_key="evt-source-single.happened--recorder.timed"
            )
    flow.wait_for_counts(failed=len(bodies))

    message_id = flow.send("single.happened", {"n": 1})
    flow.wait_for_status(message_id, "completed")
    assert worker.process.poll() is None

    def queuectl(*arguments):
        return CliRunner().invoke(main, arguments, env=flow.env, catch_exceptions=False).stdout

    found = json.loads(queuectl("messages", "--status", "failed", "--json"))
    shown = [json.loads(queuectl("show", x["messageId"], "--json")) for x in found["messages"]]
    expected = [body.decode(errors="replace") for body in bodies]
    assert sorted(each["payload"] for each in shown) == sorted(expected)
    assert {each["deliveries"][0]["errorType"] for each in shown} == {"ContractError"}
    assert len(queuectl("export").splitlines()) >= len(bodies)


def test_of_a_long_traceback_the_end_is_kept(flow):
    flow.run(SABOTEUR)
    message_id = flow.send("job.given", {"what": "long chain"}, max_retries=0)

    message = flow.wait_for_status(message_id, "failed")

    assert message["deliveries"][0]["history"][0]["traceback"].endswith("ValueError: level 99\n")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_loses_no_outcome(flow, second):
    worker = flow.run(RECORDER)
    done = [flow.send("thing.happened", {"sleep": 0.2}) for _ in range(5)]
    ids = [flow.send("thing.happened", {"sleep": 60}) for _ in range(5)]
    flow.effects.wait_for(5, handler="first", what="done")

    os.kill(worker.pid, signal.SIGTERM)
    wait_until(lambda: "stopping services" in worker.output(), 5, "the first signal")
    os.kill(worker.pid, second)

    assert worker.process.wait(3) == 0
    assert [flow.message(message_id)["status"] for message_id in done] == ["completed"] * 5
    unburnt = [flow.message(message_id)["deliveries"][0] for message_id in ids]
    assert [(each["status"], each["attempts"]) for each in unburnt] == [("pending", 0)] * 5


def test_a_database_that_was_removed_is_noticed(flow_on):
    flow = flow_on({})
    worker = flow.run(RECORDER)
    first = flow.send("thing.happened", {})
    flow.wait_for_status(first, "completed")

    shutil.rmtree(flow.folder / "var")

    wait_until(lambda: "removed or replaced" in worker.output(), 15, worker.output)
    wait_until(lambda: worker.output().count("queue ready") == 2, 15, worker.output)


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null/x"])
def test_a_data_folder_that_cannot_be_written_ends_the_start(tmp_path, folder):
    process = NamekoProcess(RECORDER, env={"QUEUE_DATA_DIR": folder}, log=tmp_path / "process.log")

    assert process.process.wait(20) == 2
    (line,) = process.output().strip().splitlines()
    assert line.startswith("Error: QUEUE_DATA_DIR: must be a folder that can be written")


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        ("os:path", "os:path must be a QueueProvider"),
        (
            "tests.flow.apps.unfinished:Unfinished",
            "tests.flow.apps.unfinished:Unfinished must have the methods close, settle",
        ),
    ],
)
def test_a_provider_that_is_none_ends_the_start(tmp_path, provider, said):
    env = {"QUEUE_DATA_DIR": str(tmp_path / "var"), "QUEUE_PROVIDER": provider}
    process = NamekoProcess(RECORDER, env=env, log=tmp_path / "process.log")

    assert process.process.wait(20) == 2
    (line,) = process.output().strip().splitlines()
    assert line == f"Error: QUEUE_PROVIDER: {said}"
