"""The web page of queue_admin, in a browser: what a person does with it."""

import json
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
import requests

from shared.testing.servers import free_port, mortal
from tests.flow.conftest import Flow
from tests.support.browser import SECONDS, chromium, expect
from tests.support.processes import ROOT
from tests.support.waiting import wait_until

pytestmark = pytest.mark.flow

MAILER = "notifications.send_welcome"
SIGN_UP = {"password": "difference engine", "first_name": "Joe", "last_name": "Doe"}


class MailServer:
    """What takes the mails, or does not, at an address that stays."""

    def __init__(self, folder):
        self.port = free_port()
        self.file = folder / "mails.jsonl"
        self.process = None

    def start(self):
        with socket.create_server(("127.0.0.1", self.port)) as listener:
            command = [sys.executable, str(ROOT / "tests/services/smtp_server.py")]
            command += ["--fd", str(listener.fileno()), "--mails", str(self.file)]
            self.process = subprocess.Popen(
                [*mortal(), *command], pass_fds=[listener.fileno()], cwd=ROOT
            )

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def recipients(self):
        if not self.file.exists():
            return []
        lines = self.file.read_text().splitlines()
        return [address for line in lines for address in json.loads(line)["to"]]


class Site:
    """The four services, one attempt for each delivery, and a mail server that may be away."""

    def __init__(self, folder, **env):
        self.mail = MailServer(folder)
        self.auth, self.admin = (f"127.0.0.1:{free_port()}" for _ in range(2))
        self.flow = Flow(
            folder,
            {
                "QUEUE_MAX_RETRIES": "0",
                "MAIL_URL": f"smtp://127.0.0.1:{self.mail.port}",
                "AUTH_EVENTS_ADDRESS": self.auth,
                "COMPANY_ADDRESS": f"127.0.0.1:{free_port()}",
                "QUEUE_ADMIN_ADDRESS": self.admin,
                **env,
            },
        )
        self.flow.run("services.queue_admin")
        self.flow.run("services.auth_events", "services.company", "services.notifications")

    def register(self, email):
        url = f"http://{self.auth}/auth/register"
        answer = requests.post(url, json={**SIGN_UP, "email": email}, timeout=20)
        assert answer.status_code == 201, answer.text
        return answer.json()["message_id"]

    def status(self, message_id):
        """Return the status of a message; 404 while it is in its service's outbox."""
        url = f"http://{self.admin}/queue/messages/{message_id}"
        return requests.get(url, timeout=20).json()["status"]

    def wait_for(self, message_id, status):
        wait_until(
            lambda: self.status(message_id) == status,
            SECONDS,
            lambda: f"{status}, not {self.status(message_id)}",
            every=0.05,
        )

    def failed(self, email):
        """Sign somebody up, and wait until the mail to them has failed."""
        message_id = self.register(email)
        self.wait_for(message_id, "failed")
        return message_id

    def publish(self, payload, message_type="user.logged_out", queue="elsewhere"):
        body = {"queueName": queue, "messageType": message_type, "payload": payload}
        answer = requests.post(f"http://{self.admin}/queue/publish", json=body, timeout=20)
        assert answer.status_code == 202, answer.text
        return answer.json()["messageId"]

    def subscription(self, subscriber):
        shown = requests.get(f"http://{self.admin}/queue/subscriptions", timeout=20).json()
        return next(each for each in shown["subscriptions"] if each["subscriber"] == subscriber)

    def limit(self, subscriber, limits):
        path = f"/queue/subscriptions/{self.subscription(subscriber)['id']}/limits"
        answer = requests.put(f"http://{self.admin}{path}", json=limits, timeout=20)
        assert answer.status_code == 200, answer.text

    def close(self):
        self.mail.stop()
        self.flow.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def shared_site(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    made = Site(folder)
    yield made
    made.close()
    for log in sorted(folder.glob("process-*.log")):
        print(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}")


@pytest.fixture
def site(shared_site):
    """The site, its mail server away."""
    shared_site.mail.stop()
    return shared_site


@pytest.fixture
def visit(browser, site):
    """A person who came to the page; nothing is fetched elsewhere, and nothing breaks."""
    made = browser.visitor(site.admin)
    made.open()
    yield made
    made.close()
    assert made.other_hosts() == []
    assert made.wrong() == []


class TestAFailedMail:
    def test_is_found_understood_mended_and_retried(self, site, visit):
        message_id = site.failed("found@example.com")
        page = visit.page

        # at a glance
        card = visit.region("Queue user-events")
        expect(card.get_by_role("img", name="Waiting, since the page was opened")).to_be_visible()
        visit.link("Failures").click()
        expect(visit.heading("Failures")).to_be_focused()
        # the group, and its newest message
        group = visit.region(f"MailUnavailableError of {MAILER}")
        expect(group).to_contain_text("services.notifications.mail.SmtpMailer._connection")
        visit.link("user.registered", group).click()
        # why
        expect(page.get_by_text(f"{MAILER}: Dead after 1 attempt")).to_be_visible()
        delivery = visit.region(f"Delivery to {MAILER}")
        delivery.get_by_text("Traceback", exact=True).click()
        expect(delivery).to_contain_text("Traceback (most recent call last)")
        expect(page.get_by_label("Payload", exact=True)).to_contain_text("found@example.com")
        expect(page.get_by_text(message_id)).to_be_visible()

        site.mail.start()
        visit.button("Retry").click()

        expect(visit.result()).to_have_text("1 delivery will run again.")
        # without reloading
        expect(page.get_by_text(f"{MAILER}: Completed at")).to_be_visible()
        expect(visit.button("Retry")).to_have_count(0)
        assert site.status(message_id) == "completed"
        assert "found@example.com" in site.mail.recipients()

    def test_is_sent_with_another_address(self, site, visit):
        site.mail.start()
        message_id = site.failed("refused@example.com")
        page = visit.page
        visit.open(f"messages/{message_id}")
        expect(page.get_by_text("550")).not_to_have_count(0)

        visit.button("Edit the payload").click()
        payload = page.get_by_label("Payload to send")
        payload.fill(payload.input_value().replace("refused@", "mended@") + ",")
        visit.button("Send in its place").click()
        expect(visit.result()).to_contain_text("This is not JSON")
        payload.fill(payload.input_value().rstrip(","))
        visit.button("Send in its place").click()

        expect(visit.result()).to_contain_text("Sent to 1 subscription")
        expect(page.get_by_text(f"{MAILER}: Completed at")).to_be_visible()
        expect(page.get_by_label("Payload", exact=True)).to_contain_text("mended@example.com")
        visit.link(message_id).click()
        expect(page.get_by_text(f"{MAILER}: Discarded")).to_be_visible()
        assert "mended@example.com" in site.mail.recipients()

    def test_of_a_group_are_retried_and_discarded_together(self, site, visit):
        for n in range(3):
            site.failed(f"group-{n}@example.com")
        group = visit.region(f"MailUnavailableError of {MAILER}")
        visit.open("failures")

        visit.button(f"Discard all: MailUnavailableError of {MAILER}", group).click()
        visit.button("Keep it as it is").click()
        expect(visit.button(f"Discard all: MailUnavailableError of {MAILER}")).to_be_focused()
        site.mail.start()
        visit.button(f"Retry all: MailUnavailableError of {MAILER}", group).click()

        expect(visit.result()).to_have_text("3 dead letters of MailUnavailableError retried.")
        expect(group).to_have_count(0)
        wait_until(
            lambda: {f"group-{n}@example.com" for n in range(3)} <= {*site.mail.recipients()},
            SECONDS,
            "the mails",
        )
        # what is gone had the focus
        expect(visit.heading("Failures")).to_be_focused()
        refused = site.failed("refused@others.example.com")
        visit.button(f"Discard all: Reject of {MAILER}").click()
        visit.button("Discard all").click()
        expect(visit.result()).to_contain_text("discarded.")
        site.wait_for(refused, "completed")

    def test_of_a_group_are_ramped_up_once_the_cause_is_gone(self, site, visit):
        count = 12
        for n in range(count):
            site.failed(f"ramp-{n}@example.com")
        name = f"MailUnavailableError of {MAILER}"
        visit.open("failures")
        ramps = visit.page.get_by_role("row")

        visit.button(f"Ramp up: {name}").click()

        stopped = ramps.filter(has_text="Stopped in the step of 1: 1 of 1 failed again.")
        expect(stopped).to_be_visible()
        expect(stopped).to_contain_text(f"0 of {count}")
        expect(visit.button(f"Ramp up: {name}")).to_be_focused()
        site.mail.start()
        visit.button(f"Ramp up: {name}").click()
        expect(ramps.filter(has_text=f"{count} of the {count} that were retried")).to_be_visible()
        expect(visit.region(name)).to_have_count(0)
        assert {f"ramp-{n}@example.com" for n in range(count)} <= {*site.mail.recipients()}

    def test_of_a_ramp_that_runs_can_be_left_as_they_are(self, site, visit):
        for n in range(12):
            site.failed(f"slow-{n}@example.com")
        site.mail.start()
        name = f"MailUnavailableError of {MAILER}"
        [group] = requests.get(f"http://{site.admin}/queue/failures", timeout=20).json()["failures"]
        ramp = f"http://{site.admin}/queue/failures/{group['fingerprint']}/ramp?rate=1"
        begun = requests.post(ramp, timeout=20).json()
        visit.open("failures")

        visit.button(f"Cancel ramp {begun['id']}").click()

        expect(visit.result()).to_contain_text("is cancelled; what it retried goes on.")
        expect(visit.button(f"Ramp up: {name}")).to_be_visible()
        visit.button(f"Discard all: {name}").click()
        visit.button("Discard all").click()
        expect(visit.region(name)).to_have_count(0)


class TestMessages:
    def test_are_found_by_filters(self, site, visit):
        wanted = site.publish({"user_id": "u-17", "say": "needle"}, "shop.asked")
        other = site.publish({"user_id": "u-18", "say": "needle"}, "shop.asked")
        visit.link("Messages").click()
        page = visit.page

        page.get_by_label("Text in the payload").fill("needle")
        visit.button("Search").click()
        expect(page.get_by_role("row")).to_have_count(3)
        page.get_by_text("More filters").click()
        page.get_by_label("Path in the payload").fill("$.user_id")
        visit.button("Search").click()
        expect(page.get_by_text("payloadValue: Must be given, too.")).to_be_visible()
        page.get_by_label("Value there").fill("u-17")
        page.keyboard.press("Enter")

        expect(page.get_by_role("row")).to_have_count(2)
        link = visit.link("shop.asked")
        assert link.get_attribute("href") == f"#/messages/{wanted}"
        link.click()
        expect(page.get_by_text("Nobody was subscribed.")).to_be_visible()
        visit.page.go_back()
        expect(page.get_by_label("Value there")).to_have_value("u-17")
        assert other != wanted
        visit.forgive("422")

    def test_that_fit_are_retried_together(self, site, visit):
        ids = [site.failed(f"fit-{n}@fitting.example.com") for n in range(2)]
        other = site.failed("fit@elsewhere.example.com")
        site.mail.start()
        visit.open("messages?status=failed&text=fitting.example.com")
        expect(visit.page.get_by_role("row")).to_have_count(3)

        visit.button("Retry all dead letters that fit").click()
        visit.button("Retry all").click()

        expect(visit.result()).to_have_text("2 dead letters retried.")
        for message_id in ids:
            site.wait_for(message_id, "completed")
        assert site.status(other) == "failed"

    def test_are_put_off_run_and_cancelled(self, site, visit):
        message_id = site.failed("later@example.com")
        subscription = site.subscription(MAILER)
        visit.open("subscriptions?queue=user-events")
        name = f"Pause {MAILER}, user.registered"
        visit.button(name).click()
        expect(visit.result()).to_have_text(f"{MAILER} is paused.")
        visit.open(f"messages/{message_id}")
        visit.button("Retry").click()
        page = visit.page

        page.get_by_label("Run at (UTC)").fill("2037-01-02T03:04:05")
        visit.button("Reschedule").click()
        expect(visit.result()).to_have_text("1 delivery put off.")
        expect(page.get_by_text(f"{MAILER}: Scheduled until 2037-01-02T03:04:05")).to_be_visible()
        visit.button("Run now").click()
        expect(page.get_by_text(f"{MAILER}: Paused by anonymous@127.0.0.1")).to_be_visible()
        visit.button("Cancel").click()
        visit.button("Cancel what waits").click()

        expect(visit.result()).to_have_text("1 delivery cancelled.")
        site.wait_for(message_id, "completed")
        visit.open("audit-log")
        expect(page.get_by_role("row").nth(1)).to_contain_text("cancel")
        expect(page.get_by_role("row").nth(1)).to_contain_text(message_id)
        visit.open("subscriptions")
        visit.button(f"Resume {MAILER}, user.registered").click()
        wait_until(lambda: site.subscription(MAILER)["pausedAt"] is None, SECONDS, "it to go on")
        assert site.subscription(MAILER)["id"] == subscription["id"]

    def test_show_what_is_hostile_as_text(self, site, visit):
        hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'&amp;\u202e"
        url = "https://evil.invalid/x.png"
        message_id = site.publish({"a": hostile, hostile: f"<img src='{url}'>"}, "shop.asked")
        visit.open(f"messages/{message_id}")

        payload = visit.page.get_by_label("Payload", exact=True)
        expect(payload).to_contain_text("<img src=x onerror=alert(1)><script>alert(2)</script>")
        expect(payload).to_contain_text(f"<img src='{url}'>")
        assert visit.page.locator("main img, main script").count() == 0
        visit.open(f"messages/{hostile.replace('/', '')}")
        expect(visit.page.get_by_text("no message")).to_be_visible()
        assert visit.opened() == []
        visit.forgive("404")

    def test_keep_long_numbers_as_they_were(self, site, visit):
        url = f"http://{site.admin}/queue/publish"
        body = '{"queueName": "q", "messageType": "n", "payload": {"a": 12345678901234567890123, '
        body += '"b": 1.0, "c": [], "d": {}, "e": [1, {"f": "g: [,]"}]}}'
        headers = {"Content-Type": "application/json"}
        answer = requests.post(url, data=body, headers=headers, timeout=20)
        visit.open(f"messages/{answer.json()['messageId']}")

        text = visit.page.get_by_label("Payload", exact=True).text_content()

        assert text == json.dumps(json.loads(body)["payload"], indent=2)


class TestSubscriptions:
    def test_are_paused_and_resumed(self, site, visit):
        site.mail.start()
        visit.link("Subscriptions").click()
        expect(visit.row(MAILER)).to_contain_text("live")
        row = visit.row(MAILER)

        visit.button(f"Pause {MAILER}, user.registered").press("Enter")
        expect(row).to_contain_text("paused by anonymous@127.0.0.1")
        # the same button, which has the focus still
        expect(visit.button(f"Resume {MAILER}, user.registered")).to_be_focused()
        message_id = site.register("held@example.com")
        expect(row.get_by_role("cell").nth(3)).to_have_text("1")
        assert site.subscription(MAILER)["waiting"] == 1
        visit.page.keyboard.press("Enter")

        expect(visit.result()).to_have_text(f"{MAILER} goes on.")
        site.wait_for(message_id, "completed")
        expect(row.get_by_role("cell").nth(3)).to_have_text("0")

    def test_are_limited(self, site, visit):
        visit.link("Subscriptions").click()
        row = visit.row(MAILER)
        row.get_by_text("Limit", exact=True).click()
        row.get_by_label("A second").fill("2.5")
        row.get_by_label("At once").fill("3")
        row.get_by_role("button", name="Set limits").click()

        expect(visit.result()).to_have_text(f"{MAILER} runs at most 2.5 a second, 3 at once.")
        expect(row).to_contain_text("at most 2.5 a second, 3 at once")
        limits = {"rate": 2.5, "burst": 1, "concurrency": 3}
        assert site.subscription(MAILER)["limits"] == limits
        # what somebody else sets is there without reloading
        site.limit(MAILER, {"concurrency": 4})
        expect(row).to_contain_text("at most 4 at once")
        expect(row.get_by_label("At once")).to_have_value("4")
        row.get_by_label("At once").fill("")
        row.get_by_role("button", name="Set limits").click()

        expect(visit.result()).to_have_text(f"{MAILER} is without limits.")
        assert site.subscription(MAILER)["limits"] is None

    def test_of_a_queue_are_paused_together(self, site, visit):
        card = visit.region("Queue user-events")

        visit.button("Pause all of user-events").click()
        visit.button("Pause all").click()
        expect(card).to_contain_text("paused")
        assert site.subscription(MAILER)["pausedBy"] == "anonymous@127.0.0.1"
        visit.button("Resume all of user-events").click()

        expect(visit.result()).to_have_text("user-events goes on.")
        assert site.subscription(MAILER)["pausedAt"] is None

    def test_get_what_they_never_had(self, site, visit):
        for _ in range(2):
            site.publish({}, "day.broke")
        with (
            closing(sqlite3.connect(site.flow.folder / "var" / "queue.db", timeout=20)) as log,
            log,
        ):
            log.execute(
                "INSERT INTO queue_subscriptions (queue_name, source, message_type, subscriber,"
                " handler_type, reliable, created_at) VALUES ('elsewhere', 'elsewhere',"
                " 'day.broke', 'late.riser', 'service_pool', 1, '2026-01-02 03:04:05.000000')"
            )
        visit.link("Subscriptions").click()
        row = visit.row("late.riser")

        row.get_by_label("Replay to late.riser, day.broke").press("Enter")
        row.get_by_label("Stored since (UTC)").fill("2026-01-01T00:00")
        # the view is drawn anew meanwhile, and what was written stays
        visit.wait_for_request("/queue/subscriptions")
        visit.wait_for_request("/queue/subscriptions")
        expect(row.get_by_label("Stored since (UTC)")).to_have_value("2026-01-01T00:00")
        visit.button("Deliver what it never had", row).press("Enter")

        expect(visit.result()).to_have_text("2 messages replayed to late.riser.")
        expect(row.get_by_role("cell").nth(3)).to_have_text("2")
        visit.button("Retire late.riser, day.broke").click()
        visit.button("Retire").click()
        expect(row).to_have_count(0)


def schedule(site, name, **changed):
    body = {**NIGHTLY, **changed}
    url = f"http://{site.admin}/queue/schedules/{name}"
    answer = requests.put(url, json=body, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer.json()


def schedules(site, name):
    """Return the schedule of that name, if there is one."""
    shown = requests.get(f"http://{site.admin}/queue/schedules", timeout=20).json()
    return [each for each in shown["schedules"] if each["name"] == name]


NIGHTLY = {
    "queueName": "elsewhere", "messageType": "night.fell", "payload": {}, "cron": "30 2 * * *",
    "timeZone": "Europe/Berlin",
}  # fmt: skip


FORM = "Make or change a schedule"


class TestSchedules:
    def test_are_paused_resumed_and_run_by_keyboard(self, site, visit):
        visit.link("Schedules").click()
        expect(visit.page.get_by_text("There is none.")).to_be_visible()
        made = schedule(site, "nightly")
        row = visit.row("nightly")
        expect(row).to_contain_text("At 02:30 every day")
        expect(row).to_contain_text(made["nextAt"][:10])
        expect(row).to_contain_text("never")

        visit.button("Pause nightly").press("Enter")
        expect(visit.result()).to_have_text("nightly is paused.")
        expect(row).to_contain_text("paused")
        expect(visit.button("Resume nightly")).to_be_focused()
        visit.page.keyboard.press("Enter")
        expect(visit.result()).to_have_text("nightly goes on.")
        visit.page.keyboard.press("Tab")
        expect(visit.button("Run now: nightly")).to_be_focused()
        visit.page.keyboard.press("Enter")

        expect(visit.result()).to_have_text("nightly was dispatched. The message is under Last.")
        row.get_by_role("link").press("Enter")
        expect(visit.heading("night.fell")).to_be_visible()
        visit.page.get_by_text("Metadata", exact=True).press("Enter")
        expect(visit.page.get_by_text('"occurrence"')).to_be_visible()

    def test_are_made_changed_and_removed(self, site, visit):
        visit.link("Schedules").click()
        visit.page.get_by_text(FORM, exact=True).press("Enter")
        form = visit.page.get_by_role("form", name=FORM)
        fields = {
            "Name": "made-here", "Queue": "elsewhere", "Event type": "hour.struck",
            "Cron expression": "0 */2 * * *", "Time zone": "Mars",
            "Payload": '{"long": 12345678901234567890, "one": 1.0}',
            "Metadata": '{"team": "night", "one": 1.0}',
        }  # fmt: skip
        for label, text in fields.items():
            form.get_by_label(label, exact=True).fill(text)
        form.get_by_label("Priority").select_option("high")
        visit.button("Save", form).press("Enter")
        expect(visit.result()).to_contain_text("timeZone: must be a time zone")
        # what was written is there still
        form.get_by_label("Time zone").fill("Europe/Berlin")
        visit.button("Save", form).press("Enter")

        expect(visit.result()).to_have_text("made-here: At the start of every 2nd hour.")
        row = visit.row("made-here")
        expect(row).to_contain_text("0 */2 * * * Europe/Berlin")
        expect(form.get_by_label("Name")).to_have_value("")
        [made] = schedules(site, "made-here")
        assert (made["queueName"], made["messageType"]) == ("elsewhere", "hour.struck")
        assert (made["priority"], made["timeZone"]) == ("high", "Europe/Berlin")
        assert made["payload"] == {"long": 12345678901234567890, "one": 1.0}
        assert made["metadata"] == {"team": "night", "one": 1.0}

        # one of the same name is not changed unasked
        for label, text in {**fields, "Cron expression": "5 * * * *", "Time zone": "UTC"}.items():
            form.get_by_label(label, exact=True).fill(text)
        form.get_by_label("Payload").fill("{nonsense")
        visit.button("Save", form).click()
        visit.button("Keep it as it is").click()
        assert schedules(site, "made-here") == [made]
        visit.button("Save", form).click()
        visit.button("Change it").click()
        expect(visit.result()).to_contain_text("The payload is not JSON")
        form.get_by_label("Payload").fill("[]")
        visit.button("Save", form).click()
        visit.button("Change it").click()
        expect(row).to_contain_text("At minute 5 of every hour")

        visit.button("Remove made-here").click()
        visit.button("Remove", visit.page.get_by_role("dialog")).click()
        expect(visit.result()).to_have_text("made-here is removed.")
        expect(row).to_have_count(0)
        assert schedules(site, "made-here") == []
        visit.forgive("422")

    def test_are_edited_and_keep_what_is_not_touched(self, site, visit):
        metadata = {"team": "night", "long": 12345678901234567890}
        made = schedule(site, "edited", payload={"one": 1.0}, metadata=metadata, priority="high")
        visit.open("schedules")

        visit.button("Edit edited").press("Enter")

        form = visit.page.get_by_role("form", name=FORM)
        expect(form.get_by_label("Cron expression")).to_be_focused()
        expect(form.get_by_label("Metadata")).to_have_value(
            '{\n  "team": "night",\n  "long": 12345678901234567890\n}'
        )
        form.get_by_label("Cron expression").fill("5 * * * *")
        form.get_by_label("Cron expression").press("Enter")
        visit.button("Change it").click()
        expect(visit.row("edited")).to_contain_text("At minute 5 of every hour")
        [now] = schedules(site, "edited")
        kept = ("queueName", "messageType", "payload", "metadata", "timeZone", "priority")
        assert [now[each] for each in kept] == [made[each] for each in kept]
        # 1 and 1.0 are equal in Python
        assert repr(now["payload"]) == repr(made["payload"])

    def test_show_what_is_text_as_text_and_why_one_failed(self, site, visit):
        markup = "<img src=x onerror=alert(1)>"
        schedule(site, "odd", cron="* * * * * *", metadata={"a": markup})
        with (
            closing(sqlite3.connect(site.flow.folder / "var" / "queue.db", timeout=20)) as log,
            log,
        ):
            log.execute(
                "UPDATE queue_schedules SET enabled = 0, next_at = NULL, error = ?,"
                " error_at = '2026-01-02 03:04:05.000000' WHERE name = 'odd'",
                [markup],
            )
        visit.open("schedules")
        row = visit.row("odd")
        expect(row).to_contain_text(f"failed 2026-01-02 03:04:05: {markup}")
        assert visit.opened() == []


class TestThePage:
    def test_fits_a_phone(self, browser, site):
        message_id = site.failed("phone@example.com")
        visit = browser.visitor(site.admin, viewport={"width": 360, "height": 740})
        for view in (
            "queues", "failures", "messages", "subscriptions", "schedules", "audit-log",
            f"messages/{message_id}",
        ):  # fmt: skip
            visit.open(view)
            expect(visit.page.get_by_text("Loading …")).to_have_count(0)
            width = visit.page.evaluate("document.documentElement.scrollWidth")
            assert width <= 360, view
        visit.close()

    @pytest.mark.parametrize("place", ["nonsense", "queues/nonsense", "nonsense/%", "<b>?a=b"])
    def test_says_that_there_is_no_such_view(self, visit, place):
        visit.open(place)
        expect(visit.heading("No such view")).to_be_visible()
        said = f"This page has no view {place.partition('?')[0]}."
        expect(visit.page.get_by_text(said)).to_be_visible()
        assert visit.page.title() == "No such view – queue_admin"
        expect(visit.page.locator("nav [aria-current]")).to_have_count(0)
        visit.link("Show the queues").click()
        expect(visit.heading("Queues")).to_be_visible()
        visit.open("queues/")
        expect(visit.heading("Queues")).to_be_visible()

    def test_says_that_what_it_shows_is_old(self, site, visit):
        expect(visit.region("Queue user-events")).to_be_visible()

        visit.context.set_offline(True)
        expect(visit.page.get_by_role("alert")).to_contain_text("What is shown is old")
        visit.context.set_offline(False)

        expect(visit.page.get_by_role("alert")).to_have_text("")
        visit.forgive("ERR_INTERNET_DISCONNECTED")

    def test_asks_less_often_while_nobody_sees_it(self, site, visit):
        expect(visit.region("Queue user-events")).to_be_visible()
        visit.page.evaluate(
            "Object.defineProperty(document, 'hidden', {value: true, configurable: true})"
        )
        asked = visit.asked("/queue/stats")
        visit.page.wait_for_timeout(9_000)
        # after 2 s, 4 s and 8 s, rather than every 2 s
        assert visit.asked("/queue/stats") - asked <= 3
        visit.page.evaluate("delete document.hidden")
        visit.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        visit.wait_for_request("/queue/stats")

    def test_is_sent_once_and_runs_nothing_else(self, site):
        url = f"http://{site.admin}"
        page = requests.get(url, timeout=20)
        names = ["style.css", "app.js", "dom.js", "icon.svg"]
        types = ["text/css", "text/javascript", "text/javascript", "image/svg+xml"]

        policy = page.headers["Content-Security-Policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "style-src 'self'"} <= {*policy}
        assert {"form-action 'none'", "base-uri 'none'", "frame-ancestors 'none'"} <= {*policy}
        assert "unsafe" not in page.headers["Content-Security-Policy"]
        for name, kind in zip(names, types, strict=True):
            answer = requests.get(f"{url}/page/{name}", timeout=20)
            assert answer.headers["Content-Type"].split(";")[0] == kind
            assert answer.headers["Cache-Control"] == "no-cache"
            known = {"If-None-Match": answer.headers["ETag"]}
            again = requests.get(f"{url}/page/{name}", headers=known, timeout=20)
            assert (again.status_code, again.content) == (304, b"")
        for name in ("", "..%2fpages.py", "nothing.js", "__pycache__"):
            missing = requests.get(f"{url}/page/{name}", timeout=20)
            assert (missing.status_code, missing.json()["type"]) == (404, "/problems/not-found")


def test_an_alert_is_shown_above_the_queues_until_it_is_over(browser, tmp_path):
    site = Site(tmp_path, QUEUE_ALERT_SECONDS="0.2", QUEUE_ALERT_DEAD_LETTERS="1")
    visit = browser.visitor(site.admin)
    visit.open()
    alerts = visit.page.get_by_role("status", name="Alerts")
    expect(visit.heading("Queues")).to_be_visible()
    expect(alerts).to_have_text("")

    message_id = site.failed("alert@example.com")

    said = f"user-events had up to 1 dead letter ({MAILER}); 1 is the threshold."
    expect(alerts.get_by_role("listitem")).to_contain_text(said)
    [alert] = requests.get(f"http://{site.admin}/queue/alerts", timeout=20).json()["firing"]
    expect(alerts.get_by_role("listitem")).to_contain_text(f"alert {alert['id']} {said}")
    url = f"http://{site.admin}/queue/messages/{message_id}/discard"
    assert requests.post(url, timeout=20).status_code == 200
    expect(alerts).to_have_text("")
    visit.close()
    assert visit.other_hosts() == []
    assert visit.wrong() == []
    site.close()


def test_a_token_is_asked_for_once(browser, tmp_path):
    secret = "s3cret-s3cret-s3cret"
    site = Site(tmp_path, QUEUE_ADMIN_AUTH="token", QUEUE_ADMIN_TOKENS=f"ada:{secret}")
    visit = browser.visitor(site.admin)
    try:
        visit.open("subscriptions")
        token = visit.page.get_by_label("Token")
        expect(token).to_be_focused()
        token.fill("wrong-wrong-wrong")
        token.press("Enter")
        expect(visit.page.get_by_text("This token is not known here.").first).to_be_visible()
        expect(token).to_be_focused()
        token.fill(secret)
        visit.button("Go on").click()

        visit.button(f"Pause {MAILER}, user.registered").click()
        expect(visit.row(MAILER)).to_contain_text("paused by ada")
        visit.page.reload()
        expect(visit.row(MAILER)).to_be_visible()
        assert secret not in str(visit.context.storage_state())
        visit.button("Forget the token").click()
        expect(token).to_be_visible()
        visit.forgive("401")
        assert visit.wrong() == []
        assert visit.other_hosts() == []
    finally:
        visit.close()
        site.close()
