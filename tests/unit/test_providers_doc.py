"""docs/providers.md, held against the providers."""

from __future__ import annotations

from textwrap import indent

import pytest

from shared.settings import BUILT_IN_PROVIDERS
from tests.support import capabilities
from tests.support.documents import Block, blocks
from tests.support.processes import ROOT

EXCERPTS = [block for block in blocks("docs/providers.md") if block.language == "python"]


class TestCapabilities:
    def test_are_those_of_the_providers(self) -> None:
        text = capabilities.DOCUMENT.read_text()
        assert capabilities.written(text) == capabilities.table(), "make docs"

    def test_are_of_all_providers(self) -> None:
        assert set(BUILT_IN_PROVIDERS) <= dict(capabilities.providers()).keys()

    def test_say_what_each_flag_means(self) -> None:
        assert " |  |" not in capabilities.table()


class TestExcerpts:
    @pytest.mark.parametrize("block", EXCERPTS, ids=lambda block: block.text.split("\n")[0])
    def test_are_of_the_provider_as_it_is(self, block: Block) -> None:
        code = "".join(
            (ROOT / "tests/thirdparty" / name).read_text() for name in ("provider.py", "lab.py")
        )
        assert block.text in code or indent(block.text, "    ") in code

    def test_are_there(self) -> None:
        assert len(EXCERPTS) >= 4
