"""What every provider promises, asserted on real servers.

The tests know a provider by a :class:`~shared.testing.conformance.lab.ProviderLab` alone.
Somebody with a provider of their own writes one, and runs them with::

    pytest -p shared.testing.conformance.plugin --lab package.module:Lab \\
        --pyargs shared.testing.conformance
"""
