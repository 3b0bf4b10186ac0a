"""The tally, whose process takes a while to hand back what it has; the tally takes longest."""

from shared.events.pump import Pump
from shared.native import sleep
from tests.flow.apps.recorder import record
from tests.flow.apps.tally import Tally

die_by, end = Pump.die_by, Pump._end


def die_by_and_tell(self, deadline):
    die_by(self, deadline)
    record(what="asked to end")


def end_slowly(self):
    is_tally = any(each.subscriber.startswith("tally.") for each in self._mine)
    sleep(0.6 if is_tally else 0.3)
    end(self)


Pump.die_by, Pump._end = die_by_and_tell, end_slowly

__all__ = ["Tally"]
