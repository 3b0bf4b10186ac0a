"""The recorder, with opentelemetry set up: each span becomes a line of a file."""

import json
import os
from pathlib import Path

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from shared.events import event_handler
from tests.flow.apps.recorder import record

_provider = TracerProvider()
_file = Path(os.environ["SPANS"]).open("a", buffering=1)  # noqa: SIM115 - until the end
_exporter = ConsoleSpanExporter(
    out=_file, formatter=lambda span: json.dumps(json.loads(span.to_json())) + "\n"
)
_provider.add_span_processor(SimpleSpanProcessor(_exporter))
trace.set_tracer_provider(_provider)


class Traced:
    name = "traced"

    @event_handler("source", "step.taken")
    def follow(self, payload):
        record(
            handler="follow", what="ran", span=trace.get_current_span().get_span_context().span_id
        )
