"""A service that knows nothing of the suite: nameko's own RPC, both ways."""

from nameko.rpc import RpcProxy, rpc


class Plain:
    name = "plain"

    callee = RpcProxy("callee")

    @rpc
    def echo(self, *args, **kwargs):
        return [list(args), kwargs]

    @rpc
    def fail(self):
        raise ValueError("plainly")

    @rpc
    def call_back(self, a):
        return self.callee.add(a)
