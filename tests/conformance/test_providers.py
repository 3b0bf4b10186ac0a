"""What every provider promises, on each of those that come with the suite."""

from shared.testing.conformance.test_operations import *  # noqa: F403
from shared.testing.conformance.test_publishing import *  # noqa: F403
from shared.testing.conformance.test_settling import *  # noqa: F403
from shared.testing.conformance.test_waiting import *  # noqa: F403
