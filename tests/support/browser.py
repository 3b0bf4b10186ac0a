"""A person at the web page: headless Chromium, driven from a process of its own.

Playwright's loop and eventlet's hub, on which the tests run, do not get on in one process. So
a test holds names of what is in the browser's process (:class:`Far`), and calls go through a
pipe: ``visitor.page.get_by_role("button").click()`` is two of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any
from urllib.parse import urlsplit

from shared.testing.servers import ProgramMissingError, find_program, mortal

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")

SECONDS = 20
"""How long the page may take for what it does: the machine may be busy with something else."""

END_SECONDS = 20


def find_browser() -> str:
    """Return the path of a browser.

    :raises ProgramMissingError: when there is none.
    """
    for name in PROGRAMS[1:]:
        try:
            return find_program(name, "chromium")
        except ProgramMissingError:
            continue
    return find_program(PROGRAMS[0], "chromium")


@contextmanager
def chromium() -> Iterator[Far]:
    """Start a browser, and end it; what is given is a :class:`Desk`."""
    with subprocess.Popen(
        [*mortal(), sys.executable, "-m", "tests.support.browser", find_browser()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def ask(question: Any) -> Any:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("the browser's process ended")
            return json.loads(line)

        try:
            yield Far(ask, 0)
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


class Far:
    """Something in the browser's process. To call a method of it is to call it there."""

    def __init__(self, ask: Callable[[Any], Any], number: int, path: tuple[str, ...] = ()) -> None:
        self._ask = ask
        self._number = number
        self._path = path

    def __getattr__(self, name: str) -> Far:
        if name.startswith("__"):
            raise AttributeError(name)
        return Far(self._ask, self._number, (*self._path, name))

    def __call__(self, *args: Any, **options: Any) -> Any:
        call = [self._named(self), self._named(list(args)), self._named(options)]
        answer = self._ask(call)
        if "wrong" in answer:
            raise AssertionError(answer["wrong"])
        value = answer["value"]
        return Far(self._ask, value["far"]) if isinstance(value, dict) else value

    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, Far):
            return {"far": value._number, "path": value._path}
        if isinstance(value, list):
            return [cls._named(each) for each in value]
        if isinstance(value, dict):
            return {"dict": {name: cls._named(each) for name, each in value.items()}}
        return value


def expect(locator: Far) -> Far:
    """Return Playwright's assertions of a locator, which wait until they hold."""
    assertions: Far = Far(locator._ask, 0).expect(locator)
    return assertions


# --- in the browser's process


class Desk:
    """Where people sit down: each in a profile of their own.

    :param browser: Playwright's.
    """

    def __init__(self, browser: Any) -> None:
        self._browser = browser

    def visitor(self, address: str, **options: Any) -> Visitor:
        return Visitor(self._browser, address, options)

    def expect(self, locator: Any) -> Any:
        """Return Playwright's assertions of a locator, which wait until they hold."""
        from playwright.sync_api import expect

        return expect(locator)


class Visitor:
    """One person with one tab."""

    def __init__(self, browser: Any, address: str, options: Mapping[str, Any]) -> None:
        self.address = address
        self.context = browser.new_context(base_url=f"http://{address}", **options)
        self.context.set_default_timeout(SECONDS * 1000)
        self.page = self.context.new_page()
        self._said: list[str] = []
        self._forgiven: list[str] = []
        self._fetched: list[str] = []
        self._opened: list[str] = []
        self.page.on("console", lambda message: self._said.append(message.text))
        self.page.on("pageerror", lambda error: self._said.append(str(error)))
        self.page.on("dialog", self._dismiss)
        self.context.on("request", lambda request: self._fetched.append(request.url))

    def open(self, view: str = "") -> None:
        self.page.goto(f"/#/{view}")

    def button(self, name: str, within: Any = None) -> Any:
        return (within or self.page).get_by_role("button", name=name, exact=True)

    def link(self, name: str, within: Any = None) -> Any:
        return (within or self.page).get_by_role("link", name=name, exact=True)

    def heading(self, name: str) -> Any:
        return self.page.get_by_role("heading", name=name, exact=True)

    def region(self, name: str) -> Any:
        return self.page.get_by_role("region", name=name, exact=True)

    def row(self, name: str) -> Any:
        return self.page.get_by_role("row", name=name)

    def result(self) -> Any:
        """Return what a reader of screens is told of what was done."""
        return self.page.locator("#said[role=status]")

    def forgive(self, *words: str) -> None:
        """Take what has these words for right: Chromium notes each answer that is a refusal."""
        self._forgiven += words

    def wrong(self) -> list[str]:
        """Return what else the console has, such as breaches of the page's policy."""
        return [text for text in self._said if not any(word in text for word in self._forgiven)]

    def asked(self, end: str) -> int:
        """Return how often was asked for what ends so."""
        # what happened meanwhile comes with the next call
        self.page.title()
        return sum(url.endswith(end) for url in self._fetched)

    def wait_for_request(self, end: str) -> None:
        before = self.asked(end)
        deadline = time.monotonic() + SECONDS
        while self.asked(end) == before:
            assert time.monotonic() < deadline, f"nobody asks for {end}"
            self.page.wait_for_timeout(50)

    def opened(self) -> list[str]:
        """Return what scripts had to say in boxes of the browser's own."""
        return self._opened

    def other_hosts(self) -> list[str]:
        return sorted({urlsplit(url).netloc for url in self._fetched} - {self.address})

    def close(self) -> None:
        self.context.close()

    def _dismiss(self, dialog: Any) -> None:
        self._opened.append(dialog.message)
        dialog.dismiss()


class _Table:
    """What the other process has names for."""

    def __init__(self, first: Any) -> None:
        self._known = [first]

    def answer(self, call: Sequence[Any]) -> dict[str, Any]:
        function, args, options = map(self._resolved, call)
        try:
            value = function(*args, **options)
        except Exception as exc:
            return {"wrong": f"{type(exc).__name__}: {exc}"}
        if value is None or isinstance(value, str | int | float | list):
            return {"value": value}
        self._known.append(value)
        return {"value": {"far": len(self._known) - 1}}

    def _resolved(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._resolved(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "dict" in value:
            return {name: self._resolved(each) for name, each in value["dict"].items()}
        return reduce(getattr, value["path"], self._known[value["far"]])


def main() -> None:
    """Do what is asked for on standard input, until that ends."""
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=SECONDS * 1000)
    with sync_playwright() as driver:
        # root may not have the sandbox, and a container may have little in /dev/shm
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = driver.chromium.launch(executable_path=sys.argv[1], args=arguments)
        table = _Table(Desk(browser))
        for line in sys.stdin:
            print(json.dumps(table.answer(json.loads(line))), flush=True)
        browser.close()


if __name__ == "__main__":
    main()
