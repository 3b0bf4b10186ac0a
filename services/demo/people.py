"""Those who sign up, and what is to become of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIGN_UPS = Path(__file__).with_name("signups.jsonl")

REFUSED = "joost@omalley.example.com"
"""The address that the mail server refuses."""

POSTPONED = "kavitha@banyan.example.org"
"""The address whose first mail the mail server is not ready for."""


@dataclass(slots=True)
class Person:
    """Somebody who signs up.

    :param form: the body of ``POST /auth/register``.
    :param address: as it is in ``signups.jsonl``, by which :data:`REFUSED` is known.
    :param role: what they must become: the first person of a company its admin.
    :param company: what company must know them to be of.
    :param logins: how often they log in, and of that ``logouts`` times out again.
    """

    form: dict[str, Any]
    address: str
    role: str
    company: dict[str, str | None] | None
    logins: int
    logouts: int
    user_id: str = ""
    message_id: str = ""

    @property
    def name(self) -> str:
        """First and last name."""
        return f"{self.form['first_name']} {self.form['last_name']}"

    @property
    def email(self) -> str:
        """The address in the form in which it is kept."""
        return str(self.form["email"]).lower()

    @property
    def mail_address(self) -> str:
        """The address as mail servers see it: its domain in ASCII."""
        user, _, domain = self.email.rpartition("@")
        return f"{user}@{domain.encode('idna').decode()}"

    @property
    def open_sessions(self) -> int:
        """How many sessions they must have in the end."""
        return self.logins - self.logouts


def read_people(tag: str = "") -> list[Person]:
    """Read the sign-ups.

    :param tag: goes into all addresses and companies, so that a database in which they
        signed up before takes them for others.
    """
    rows = [json.loads(line) for line in SIGN_UPS.read_text(encoding="utf-8").splitlines()]
    return list(_people(rows, tag))


def _people(rows: list[dict[str, Any]], tag: str) -> Iterator[Person]:
    companies: dict[str, dict[str, str | None]] = {}
    for number, row in enumerate(rows):
        form = _tagged(row, tag) if tag else row
        identity = _identity(form)
        is_first = identity is not None and identity not in companies
        if identity is not None and is_first:
            companies[identity] = {
                "name": form["company_name"],
                "domain": form.get("company_domain"),
            }
        yield Person(
            form=form,
            address=row["email"],
            role="admin" if is_first else "user",
            company=companies.get(identity or ""),
            # every third logs in, every other one of them twice; every third of them out again
            logins=(number % 3 == 0) + (number % 6 == 0),
            logouts=int(number % 9 == 0),
        )


def _identity(form: dict[str, Any]) -> str | None:
    name: str | None = form.get("company_name")
    return form.get("company_domain") or (name and name.casefold())


def _tagged(row: dict[str, Any], tag: str) -> dict[str, Any]:
    user, _, domain = row["email"].rpartition("@")
    form = {**row, "email": f"{user}+{tag}@{domain}"}
    if "company_domain" in row:
        form["company_domain"] = f"{tag}.{row['company_domain']}"
    elif "company_name" in row:
        form["company_name"] = f"{row['company_name']} {tag}"
    return form
