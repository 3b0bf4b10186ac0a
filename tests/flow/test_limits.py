"""Limits of subscriptions, over two processes that consume: how many at once, and how fast."""

import re
import time

import pytest

from shared.events.direct import DirectOperations
from shared.store.limits import Limits
from tests.flow.conftest import SHARED
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

SUBSCRIBER = "tally.count"
LEASE = 2.0
"""Seconds, as the flow sets it."""

HEARD_SECONDS = 3.0
"""How long it may take until a change is heard of, and what was in hand has ended."""


def _thirdparty(_request):
    return {"QUEUE_PROVIDER": "tests.thirdparty.provider:FileProvider"}


PROVIDERS = {**SHARED, "thirdparty": _thirdparty}


WORKERS = 2 * 10
"""How many the two processes have, altogether."""


class Crowd:
    """Two processes that consume one subscription."""

    def __init__(self, flow):
        self.flow = flow
        self.first, self.second = flow.run_twice("tests.flow.apps.tally")
        self.operations = DirectOperations(flow.settings)
        self.sent = 0

    def limit(self, **limits):
        [its] = self.operations.subscriptions("source")
        assert its["subscriber"] == SUBSCRIBER
        self.operations.limit("ada", its["id"], Limits(**limits))

    def limit_and_wait(self, **limits):
        """Set the first limits, and wait until both processes have heard of it."""
        self.limit(**limits)
        self.wait_until_heard(f"unit.sent {SUBSCRIBER}")

    def wait_until_heard(self, names):
        """Wait until this is what both processes heard last."""
        processes = (self.first, self.second)
        wait_until(
            lambda: all(heard_by(each) == names for each in processes),
            HEARD_SECONDS,
            "both to hear of it",
        )

    def send(self, count, sleep=None):
        payload = {} if sleep is None else {"sleep": sleep}
        self.flow.send_many([("unit.sent", {"n": n, **payload}) for n in range(count)])
        self.sent += count

    def ran(self):
        return self.flow.effects.all(what="ran")

    def wait_for(self, count, seconds=60, what="ran"):
        return self.flow.effects.wait_for(count, seconds, what=what)

    def most_at_once(self, since=0.0):
        """Return how many ran at once at most, by when they began and ended."""
        moves = sorted(
            (each["at"], 1 if each["what"] == "ran" else -1) for each in self.flow.effects.all()
        )
        running = most = 0
        for at, move in moves:
            running += move
            most = max(most, running if at >= since else 0)
        return most

    def most_in_a_second(self):
        times = sorted(each["at"] for each in self.ran())
        return max(sum(1 for x in times if start <= x < start + 1) for start in times)

    def span(self):
        times = [each["at"] for each in self.ran()]
        return max(times) - min(times)

    def rest(self):
        """Have no limits and nothing to do, and forget what ran."""
        self.limit()
        self.wait_until_heard("none")
        self.flow.wait_for_counts(completed=self.sent)
        self.flow.effects.path.unlink()

    def close(self):
        self.operations.client.close()
        self.flow.close()


def heard_by(process):
    """Return which limits it heard of last."""
    return ["none", *re.findall("limits heard of: (.*)", process.output())][-1]


@pytest.fixture(scope="module", params=list(PROVIDERS))
def provider(request):
    return request.param


@pytest.fixture(scope="module")
def resting(provider):
    """The crowd that another test left as it found it, if any."""
    made = []
    yield made
    for each in made:
        each.close()


@pytest.fixture
def crowd(provider, resting, request, shared_flow_on):
    made = resting.pop() if resting else Crowd(shared_flow_on(PROVIDERS[provider](request)))
    yield made
    if all(each.process.poll() is None for each in (made.first, made.second)):
        made.rest()
        resting.append(made)
    else:
        made.close()


def test_one_at_once_over_two_processes_until_the_limit_is_removed(crowd):
    crowd.limit_and_wait(concurrency=1)
    began = time.monotonic()
    crowd.send(40, sleep=0.05)
    crowd.wait_for(30, what="done")

    assert crowd.most_at_once() == 1
    # none waits for longer than it has to
    assert time.monotonic() - began < 30 * 0.05 + 5

    crowd.send(100, sleep=0.5)
    removed = time.time()
    crowd.limit()
    crowd.wait_for(140, what="done")

    assert crowd.most_at_once(removed) >= 15
    assert time.time() - removed < HEARD_SECONDS + 10
    assert len({each["pid"] for each in crowd.ran()}) == 2
    assert len(crowd.ran()) == 140


def test_so_many_in_a_second_over_two_processes(crowd):
    crowd.limit_and_wait(rate=20, burst=5)
    crowd.send(100)
    crowd.wait_for(100)

    assert len(crowd.ran()) == 100
    # 25, and 2 that began up to 0.1 s after they were reserved, since the machine was busy
    assert crowd.most_in_a_second() <= 25 + 2
    assert 4.5 <= crowd.span() <= 7


def test_a_limit_is_obeyed_that_changes_while_they_run(crowd):
    crowd.send(600, sleep=0.1)
    crowd.wait_for(20)
    assert crowd.most_at_once() > 10
    crowd.limit_and_wait(concurrency=2)
    # what was in hand before ends; some of it may not even have begun
    crowd.wait_for(len(crowd.ran()) + WORKERS, what="done")
    limited = time.time()
    crowd.wait_for(len(crowd.ran()) + 40)
    assert crowd.most_at_once(limited) <= 2
    crowd.limit(concurrency=6)
    changed = time.time()
    crowd.wait_for(len(crowd.ran()) + 150)
    assert 5 <= crowd.most_at_once(changed) <= 6


def test_another_goes_on_within_a_lease_when_the_holder_is_killed(crowd):
    crowd.limit_and_wait(concurrency=1)
    crowd.send(5, sleep=600)
    [holder] = crowd.wait_for(1)
    by_pid = {each.pid: each for each in (crowd.first, crowd.second)}

    by_pid.pop(holder["pid"]).kill()
    killed = time.time()
    [first, another] = crowd.wait_for(2)

    assert first == holder
    assert another["pid"] == next(iter(by_pid))
    assert another["at"] - killed < LEASE + 1.5
