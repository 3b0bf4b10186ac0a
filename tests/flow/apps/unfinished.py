"""A provider that lacks two methods."""

from abc import abstractmethod

from shared.providers.embedded import EmbeddedProvider


class Unfinished(EmbeddedProvider):
    @abstractmethod
    def close(self): ...

    @abstractmethod
    def settle(self, settlements, tx=None): ...
