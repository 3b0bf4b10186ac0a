"""What ``event_handler`` refuses where it is written."""

import re

import pytest

from shared.events import event_handler


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 0}, "batch_size: must be 1 to 1000"),
        ({"batch_size": 1001}, "batch_size: must be 1 to 1000"),
        ({"batch_timeout": -1}, "batch_timeout: must be 0 or more seconds"),
        ({"max_retries": -1}, "max_retries: must be 0 to 100"),
        ({"max_retries": 101}, "max_retries: must be 0 to 100"),
        ({"timeout": 0}, "timeout: must be more than 0 seconds"),
        ({"inbx": "db"}, "unexpected keyword argument 'inbx'"),
    ],
    ids=str,
)
def test_an_option_that_is_wrong_is_named(options, said):
    with pytest.raises((TypeError, ValueError), match=re.escape(said)):
        event_handler("shop", "placed", **options)(lambda self, payload: None)


def test_options_of_nameko_are_as_with_nameko():
    @event_handler("shop", "placed", expected_exceptions=KeyError, sensitive_arguments="card")
    def handle(self, payload):
        pass

    [entrypoint] = handle.nameko_entrypoints
    assert entrypoint.expected_exceptions is KeyError
    assert entrypoint.sensitive_arguments == "card"
