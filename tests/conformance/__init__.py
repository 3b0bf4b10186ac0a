"""The suite of ``shared.testing.conformance``, on the providers that come with it."""
