"""All calls of queue_admin, as /openapi.json describes them, with requests that are made up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from tests.flow.test_operations import BACKENDS, QUEUE, Site, in_seconds

pytestmark = pytest.mark.flow

BUDGET = "20"
"""Seconds in which requests are made up; a machine that is slower makes fewer of them."""

SECONDS = 240
"""After which a run hangs."""

# What JSON Schema cannot say, a request is refused for: the year, a cursor that never was.
UNCHECKED = "positive_data_acceptance"


@pytest.fixture(scope="module", params=list(BACKENDS))
def site(request, tmp_path_factory):
    """A site with something in each state, so that the calls find what they ask for."""
    folder = Path(tmp_path_factory.mktemp(request.param))
    site = Site(folder, dict(BACKENDS[request.param](request)))
    yield site
    site.flow.close()


def known(site):
    """Return what there is, by the parameter that it is asked for with."""
    failed = [site.failed(n=n) for n in range(5)]
    later = [site.publish({}, scheduledAt=in_seconds(3600)) for _ in range(5)]
    done = site.publish({}, message_type="chain.begun")
    site.wait_for(done, "completed")
    group = site.get("/queue/failures")["failures"][0]["fingerprint"]
    ramp = site.post(f"/queue/failures/{group}/ramp", 202)
    subscriptions = site.get("/queue/subscriptions", queue=QUEUE)["subscriptions"]
    schedule = {"queueName": QUEUE, "messageType": "nobody.asked", "payload": {}}
    site.call("PUT", "/queue/schedules/daily", json={**schedule, "cron": "0 3 * * *"})
    return {
        "message_id": [*failed, *later, done],
        "fingerprint": [group],
        "ramp_id": [ramp["id"]],
        "subscription_id": [each["id"] for each in subscriptions],
        "queue": [QUEUE, "patient"],
        "name": ["daily"],
    }


def configure(folder, values):
    """Have half of the parameters name something that is there."""
    lines = []
    for name, its in values.items():
        lines += [f"[dictionaries.{name}]", f"values = {json.dumps(its)}"]
    lines.append("[parameters]")
    for name in values:
        lines.append(f'"path.{name}" = {{ dictionary = "{name}", probability = 0.5 }}')
    file = folder / "schemathesis.toml"
    file.write_text("\n".join(lines))
    return file


def test_no_call_answers_other_than_described(site, tmp_path):
    known_values = known(site)
    spec = requests.get(f"http://{site.address}/openapi.json", timeout=20).json()
    placed = {
        part[1:-1] for path in spec["paths"] for part in path.split("/") if part.startswith("{")
    }
    assert placed == set(known_values), "name for each parameter something that is there"

    run = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"),
            "--config-file", configure(tmp_path, known_values),
            "run", f"http://{site.address}/openapi.json",
            "--exclude-checks", UNCHECKED, "--max-examples", "10", "--seed", "1",
            "--max-time", BUDGET, "--no-color", "--continue-on-failure",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip

    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert site.get("/queue/health")["database"]["status"] == "up"
