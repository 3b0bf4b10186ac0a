"""Sends one mail from a process patched as ``nameko run`` patches it; prints what came of it.

``send_mail.py url recipient seconds-allowed``. While it sends, another greenthread must
get its turns: the second line tells how many it had.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import eventlet

    eventlet.monkey_patch()

import sys

from services.notifications import mail
from services.notifications.letters import welcome
from services.notifications.schemas import NewUser

turns = 0


def count_turns() -> None:
    """Take a turn whenever there is one."""
    global turns
    while True:
        turns += 1
        eventlet.sleep(0)


def main(url: str, recipient: str, seconds: str) -> None:
    """Send the mail."""
    mail.SEND_SECONDS = float(seconds)
    mailer = mail.make_mailer(url, "noreply@example.com")
    user = NewUser(email=recipient, first_name="Ada", last_name="Lovelace")
    letter = welcome(user, "0198", mailer.sender)
    eventlet.spawn(count_turns)
    try:
        mailer.send(letter)
        print("sent")
    except (mail.MailRefusedError, mail.MailUnavailableError) as exc:
        print(type(exc).__name__, exc)
    print(turns)


main(*sys.argv[1:])
