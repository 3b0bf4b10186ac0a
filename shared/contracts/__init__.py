"""Contracts of events: one file a family, each a marshmallow schema with a version.

A service with events of its own registers their contracts when it is imported::

    from shared.contracts import contract

    @contract("billing", "invoice.paid", version=1)
    class InvoicePaid(Schema):
        invoice_id = fields.Str(required=True)
"""

from collections.abc import Callable

from marshmallow import Schema

from shared.contracts.registry import DEFAULT_VERSION, ContractRegistry, parse_version

__all__ = ["DEFAULT_VERSION", "ContractRegistry", "contract", "contracts", "parse_version"]

contracts = ContractRegistry()
"""The registry that dispatchers and handlers consult."""


def contract(source: str, event_type: str, version: int) -> Callable[[type[Schema]], type[Schema]]:
    """Decorate a schema as the contract of one version of an event type."""

    def register(schema: type[Schema]) -> type[Schema]:
        return contracts.register(source, event_type, version, schema)

    return register


from shared.contracts import alert, user  # noqa: E402, F401 - they register themselves
