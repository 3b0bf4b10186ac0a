"""Where the conformance suite tries the provider."""

from __future__ import annotations

from collections.abc import Mapping

from shared.testing.conformance.lab import ProviderLab


class FileLab(ProviderLab):
    """A file beside the message log; each test has a folder of its own, so nothing is left."""

    def options(self) -> Mapping[str, str]:
        return {"QUEUE_PROVIDER": "tests.thirdparty.provider:FileProvider"}
