"""A service to be called: its methods do what they are told, and record when they ran."""

import os
import time

import eventlet
from nameko.exceptions import deserialize_to_instance
from nameko.extensions import DependencyProvider

from shared.rpc import RpcProxy, rpc
from tests.flow.apps.recorder import record


@deserialize_to_instance
class TeaError(Exception):
    """Raised when the tea is out; callers that import this get one."""


class Context(DependencyProvider):
    def get_dependency(self, worker_ctx):
        return worker_ctx


class Callee:
    name = "callee"

    context = Context()
    itself = RpcProxy("callee", timeout=20)

    @rpc
    def echo(self, *args, **kwargs):
        return [list(args), kwargs]

    @rpc
    def pid(self, n):
        record(handler="pid", n=n)
        # long enough for another to take the next one, also where it has no processor just now
        eventlet.sleep(0.3)
        return os.getpid()

    @rpc
    def sleep(self, seconds, n=0):
        record(handler="sleep", n=n, what="began")
        eventlet.sleep(seconds)
        record(handler="sleep", n=n, what="done")
        return n

    @rpc
    def burn(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return "burnt"

    @rpc
    def fail(self, *args):
        raise ValueError(*args)

    @rpc(expected_exceptions=KeyError, sensitive_arguments="key")
    def expect(self, key):
        raise KeyError(key)

    @rpc
    def run_out(self):
        raise TeaError("no tea", 3)

    @rpc
    def add(self, a, b=2):
        return a + b

    @rpc
    def unserializable(self):
        return object()

    @rpc
    def large(self, size):
        return "x" * size

    @rpc
    def stack(self):
        return self.context.call_id_stack

    @rpc
    def data(self):
        return self.context.context_data

    @rpc
    def stack_of_callee(self):
        return self.itself.stack()
