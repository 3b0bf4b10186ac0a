"""A call in a greenlet of its own, whatever becomes of who waits for it."""

from __future__ import annotations

from time import monotonic

import eventlet
import pytest

from shared.events.shortcut import Aside


def slow(done: list[str], error: BaseException | None = None) -> str:
    eventlet.sleep(0.05)
    done.append("done")
    if error is not None:
        raise error
    return "result"


@pytest.mark.parametrize("seconds", [None, 0])
def test_its_result_is_returned(seconds: float | None) -> None:
    def call() -> str:
        if seconds is not None:
            eventlet.sleep(seconds)
        return "result"

    aside = Aside(call)
    assert aside.result() == "result"
    assert aside.is_over


@pytest.mark.parametrize("error", [KeyError("its own"), SystemExit("its own")])
def test_its_error_is_raised(error: BaseException) -> None:
    aside = Aside(slow, [], error)
    with pytest.raises(type(error), match="its own"):
        aside.result()
    assert aside.is_over


def test_others_go_on_meanwhile() -> None:
    came: list[str] = []
    eventlet.spawn(came.append, "another")
    assert Aside(slow, came).result() == "result"
    assert came == ["another", "done"]


@pytest.mark.parametrize("error", [None, KeyError("its own")])
def test_who_waits_no_longer_is_left_alone(
    error: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on by itself, and does not wake who waits for something else by then."""
    done: list[str] = []
    aside = Aside(slow, done, error)
    with pytest.raises(eventlet.Timeout), eventlet.Timeout(0.01):
        aside.result()
    assert not aside.is_over

    began = monotonic()
    eventlet.sleep(0.2)

    assert monotonic() - began >= 0.19
    assert aside.is_over
    assert done == ["done"]
    assert ("its own" in caplog.text) is (error is not None)
