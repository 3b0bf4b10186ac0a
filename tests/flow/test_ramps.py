"""Dead letters that are retried in steps, until the cause is seen to be there yet."""

import json
from datetime import datetime
from functools import partial

import pytest
from click.testing import CliRunner

from shared.cli import main
from tests.flow.conftest import BACKENDS
from tests.flow.test_operations import FIRST, Site
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

MANY = 1000
SECONDS = 120
"""For what takes a few seconds on a machine with nothing else to do."""


class RampSite(Site):
    """Where many messages died of the same."""

    def die(self, count):
        """Have so many dead letters; return their messages and the fingerprint."""
        ids = self.flow.send_many(
            [("patient.asked", {"fail": "value", "n": n}) for n in range(count)]
        )
        self.flow.wait_for_counts(SECONDS, failed=count)
        [group] = self.get("/queue/failures")["failures"]
        assert group["count"] == count
        return ids, group["fingerprint"]

    def begin(self, group, **query):
        return self.post(f"/queue/failures/{group}/ramp", 202, params=query)

    def ramp(self, ramp_id):
        return self.get(f"/queue/ramps/{ramp_id}")

    def wait_for_ramp(self, ramp_id, is_so):
        wait_until(
            lambda: is_so(self.ramp(ramp_id)), SECONDS, lambda: str(self.ramp(ramp_id)), every=0.1
        )
        return self.ramp(ramp_id)

    def wait_for_end(self, ramp_id):
        return self.wait_for_ramp(ramp_id, lambda its: its["status"] != "running")

    def ran_once(self, ids):
        """Check that each of these was handled once, and nothing else."""
        ran = sorted(each["id"] for each in self.flow.effects.all(handler="first"))
        assert ran == sorted(ids)


@pytest.fixture(params=list(BACKENDS))
def site(request, tmp_path):
    made = RampSite(tmp_path, dict(BACKENDS[request.param](request)))
    yield made
    made.flow.close()


@pytest.fixture
def plain_site(tmp_path):
    made = RampSite(tmp_path, {})
    yield made
    made.flow.close()


def test_a_thousand_whose_cause_is_there_yet_cost_one_and_all_complete_once_it_is_mended(site):
    ids, group = site.die(MANY)

    begun = site.begin(group, rate=1000)
    assert (begun["status"], begun["total"], begun["startedBy"]) == (
        "running", MANY, "anonymous@127.0.0.1",
    )  # fmt: skip
    ended = site.wait_for_end(begun["id"])

    assert ended["status"] == "stopped"
    assert ended["sentence"] == "Stopped in the step of 1: 1 of 1 failed again."
    counts = {key: ended[key] for key in ("step", "retried", "completed", "failed", "remaining")}
    assert counts == {"step": 1, "retried": 1, "completed": 0, "failed": 1, "remaining": MANY}
    tried = [len(site.delivery(each, FIRST)["history"]) for each in ids[:20]]
    assert sorted(tried) == [1] * 19 + [2]
    assert site.flow.effects.all(handler="first") == []

    site.mend()
    again = site.begin(group, rate=1000)
    ended = site.wait_for_end(again["id"])

    assert (ended["status"], ended["step"]) == ("completed", MANY)
    counts = {key: ended[key] for key in ("retried", "completed", "failed", "remaining")}
    assert counts == {"retried": MANY, "completed": MANY, "failed": 0, "remaining": 0}
    assert ended["sentence"] == f"{MANY} of the {MANY} that were retried have completed."
    site.ran_once(ids)
    assert site.flow.stats()["completed"] == MANY
    assert site.get("/queue/ramps")["ramps"] == [ended, site.ramp(begun["id"])]
    steps = [each["detail"]["step"] for each in site.trail() if each["action"] == "retry"]
    assert steps == [1000, 100, 10, 1, 1]


def test_it_goes_on_where_it_was_when_queue_admin_is_killed_and_two_do_not_double_it(site):
    count, rate = 60, 20
    ids, group = site.die(count)
    site.mend()
    other = partial(site.flow.run, "services.queue_admin", QUEUE_ADMIN_ADDRESS="127.0.0.1:0")
    second = other()
    begun = site.begin(group, rate=rate)
    site.wait_for_ramp(begun["id"], lambda its: its["retried"] > 11)

    second.kill()
    site.flow.processes[0].restart()
    wait_until(lambda: is_answering(site), 30, "queue_admin to be back")
    assert site.ramp(begun["id"])["status"] in ("running", "completed")
    other()

    ended = site.wait_for_end(begun["id"])
    assert (ended["status"], ended["retried"], ended["completed"]) == ("completed", count, count)
    site.ran_once(ids)
    took = datetime.fromisoformat(ended["endedAt"]) - datetime.fromisoformat(ended["startedAt"])
    # the last ones are not waited for
    assert took.total_seconds() >= (count - rate) / rate


def is_answering(site):
    try:
        return site.get("/queue/ramps")
    except OSError:
        return False


def test_it_stops_in_the_middle_when_the_cause_comes_back(plain_site):
    site = plain_site
    _, group = site.die(60)
    site.mend()
    begun = site.begin(group, rate=10)
    site.wait_for_ramp(begun["id"], lambda its: its["step"] == 100)

    site.mended.unlink()

    ended = site.wait_for_end(begun["id"])
    assert ended["status"] == "stopped"
    assert ended["sentence"].startswith("Stopped in the step of 100: ")
    assert ended["failed"] >= 1
    assert ended["completed"] >= 11
    assert ended["remaining"] == 60 - ended["completed"]


def test_it_is_cancelled_and_refused(plain_site):
    site = plain_site
    _, group = site.die(30)
    site.mend()
    begun = site.begin(group, rate=1)
    problem = site.post(f"/queue/failures/{group}/ramp", 409)
    assert problem["type"] == "/problems/ramp-running"
    site.wait_for_ramp(begun["id"], lambda its: its["completed"] >= 1)

    cancelled = site.post(f"/queue/ramps/{begun['id']}/cancel")

    assert cancelled["status"] == "cancelled"
    assert cancelled["sentence"] == "Cancelled by anonymous@127.0.0.1."
    assert cancelled["remaining"] == 30 - cancelled["retried"] > 0
    problem = site.post(f"/queue/ramps/{begun['id']}/cancel", 409)
    assert problem["type"] == "/problems/nothing-to-change"
    for unknown in ("12345", "9" * 30):
        problem = site.post(f"/queue/ramps/{unknown}/cancel", 404)
        assert problem["type"] == "/problems/ramp-not-found"
        assert site.call("GET", f"/queue/ramps/{unknown}").status_code == 404
    problem = site.post("/queue/failures/nothing/ramp", 409)
    assert problem["type"] == "/problems/nothing-to-retry"
    for rate in ("0", "x", "10001"):
        problem = site.post(f"/queue/failures/{group}/ramp", 422, params={"rate": rate})
        assert list(problem["errors"]) == ["rate"]
    done = [(each["action"], each["target"]) for each in site.trail()]
    assert done[0] == ("cancel", f"ramp {begun['id']}")
    assert done[-1] == ("ramp", f"failure group {group}")
    # what is left can be ramped up anew
    again = site.begin(group, rate=1000)
    assert site.wait_for_end(again["id"])["remaining"] == 0


def test_a_command_begins_it_waits_for_it_and_ends_it(plain_site):
    site = plain_site

    def queuectl(*args, status=0):
        done = CliRunner().invoke(main, ["ramp", *args], env=site.flow.env)
        assert done.exit_code == status, done.output
        return done

    _, group = site.die(20)
    failed = queuectl("start", group, "--wait", status=1)
    assert "stopped: Stopped in the step of 1: 1 of 1 failed again." in failed.stdout
    assert failed.stderr == "Error: ramp 1 stopped\n"
    site.mend()
    slow = json.loads(queuectl("start", group, "--rate", "1", "--json").stdout)
    assert "ramp 2 of the group" in queuectl("start", group, status=1).stderr
    assert json.loads(queuectl("cancel", "2", "--json").stdout)["status"] == "cancelled"
    assert slow["startedBy"] == json.loads(queuectl("show", "1", "--json").stdout)["startedBy"]
    queuectl("cancel", "2", status=1)
    queuectl("show", "99", status=1)
    queuectl("start", group, "--rate", "0", status=2)
    done = json.loads(queuectl("start", group, "--rate", "1000", "--wait", "--json").stdout)
    assert (done["status"], done["remaining"]) == ("completed", 0)
    listed = json.loads(queuectl("list", "--json").stdout)["ramps"]
    assert [each["status"] for each in listed] == ["completed", "cancelled", "stopped"]
    assert "cancelled" in queuectl("list").stdout
