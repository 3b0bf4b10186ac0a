"""Consumers that are connected and get nothing."""

import pytest
import requests

from shared.testing.servers import HOST, free_port
from tests.flow.conftest import BACKENDS
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

ILL = "tests.flow.apps.ill"
PROVIDERS = {"redis": f"{ILL}:Redis", "rabbitmq": f"{ILL}:RabbitMQ"}


class Patient:
    """A process with the tally and queue_admin, whose provider falls ill when told to."""

    def __init__(self, flow, provider, looks="1000"):
        self.flow = flow
        self.address = f"{HOST}:{free_port()}"
        env = {"QUEUE_PROVIDER": provider, "QUEUE_ADMIN_ADDRESS": self.address}
        env["HANGING_LOOKS"] = looks
        self.process = flow.run(ILL, ready=2, **env)

    def falls(self, what):
        (self.flow.folder / "order").write_text(what)
        # whatever it waits for just now ends
        self.flow.wait_for_status(self.flow.send("unit.sent", {"n": 0}), "completed", 5)

    def health(self):
        return requests.get(f"http://{self.address}/queue/health", timeout=10)

    def wait_for_health(self, status):
        wait_until(lambda: self.health().status_code == status, 10, lambda: self.health().text)


@pytest.fixture(params=list(PROVIDERS))
def patient(request, flow_on):
    return Patient(flow_on(BACKENDS[request.param](request)), PROVIDERS[request.param])


def test_who_hears_nothing_any_more_is_connected_anew(patient):
    patient.falls("deaf")
    wait_until(lambda: not (patient.flow.folder / "order").exists(), 5, "its illness")

    message_id = patient.flow.send("unit.sent", {"n": 1})

    # by itself it would look after a minute
    patient.flow.wait_for_status(message_id, "completed", 10)
    assert "work waits and does not come, connecting anew" in patient.process.output()


def test_who_gets_nothing_makes_health_red_until_it_does(request, flow_on):
    patient = Patient(flow_on(BACKENDS["redis"](request)), PROVIDERS["redis"])
    (patient.flow.folder / "order").write_text("starve")
    message_id = patient.flow.send("unit.sent", {"n": 1})

    patient.wait_for_health(503)
    assert patient.health().json()["consumers"] == {
        "status": "silent",
        "silent": ["unit.sent tally.count"],
    }

    (patient.flow.folder / "order").unlink()
    patient.flow.wait_for_status(message_id, "completed", 10)
    patient.wait_for_health(200)


def test_who_hangs_in_a_call_is_replaced(request, flow_on):
    patient = Patient(flow_on(BACKENDS["redis"](request)), PROVIDERS["redis"], looks="2")
    (patient.flow.folder / "order").write_text("hang")
    message_id = patient.flow.send("unit.sent", {"n": 1})

    patient.flow.wait_for_status(message_id, "completed", 10)
    assert "the provider does not come back from a call" in patient.process.output()
    patient.wait_for_health(200)
