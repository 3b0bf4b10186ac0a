"""HTTP for services: JSON in, JSON out, and problem details (RFC 9457) for what goes wrong.

Example::

    from shared.web import Problem, http

    class Shop:
        name = "shop"

        @http("POST", "/orders/<order_id>", schema=OrderSchema)
        def change(self, request, body, order_id):
            if order_id not in self.orders:
                raise Problem(404, "order-not-found", "No such order")
            return 200, {"order_id": order_id}

A method returns a dict, ``(status, dict)``, ``(status, headers, dict)``, ``(204, None)``
or a werkzeug ``Response``. ``body`` is what the schema loaded, and passed only where there
is a schema; what ``query=`` loaded comes before it. What the suite itself raises becomes a
problem too: see :func:`problem_of`.
"""

from shared.web.entrypoint import http
from shared.web.problems import Problem, problem_of
from shared.web.requests import bearer_token
from shared.web.server import WebServer

__all__ = ["Problem", "WebServer", "bearer_token", "http", "problem_of"]
