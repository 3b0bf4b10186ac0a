"""What every provider promises, asserted on real servers.

The tests know a provider by a :class:`~tests.conformance.lab.ProviderLab` alone. Somebody
with a provider of their own writes one, and runs the same tests with::

    pytest tests/conformance --lab package.module:Lab
"""
