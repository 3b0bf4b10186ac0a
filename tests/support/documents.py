"""The documentation as the tests read it: documents, blocks, links, tables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import ROOT

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/operations/*.md")],
    key=lambda path: str(path.relative_to(ROOT)),
)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    :param said: the text between the block before and this one.
    """

    document: str
    language: str
    text: str
    said: str

    @property
    def file(self) -> str | None:
        """The file that a block of Python is, by its first line."""
        match = re.match(r"# (\S+\.py)\n", self.text)
        return match[1] if match else None

    @property
    def commands(self) -> list[str]:
        """The commands of a block of shell, each as one text, however many lines it has."""
        commands: list[str] = []
        open_ = ""
        for line in self.text.splitlines():
            open_ = f"{open_}\n{line}" if open_ else line
            if not open_.endswith("\\") and _is_whole(open_):
                commands.append(open_)
                open_ = ""
        assert not open_, f"{self.document}: a command without an end: {open_}"
        return [command for command in commands if command.strip()]


def _is_whole(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


def name_of(path: Path) -> str:
    """Return a document's name, as it is called from the root."""
    return str(path.relative_to(ROOT))


def blocks(document: str) -> list[Block]:
    """Return the blocks of a document, in their order."""
    found: list[Block] = []
    text, end = (ROOT / document).read_text(), 0
    for match in FENCE.finditer(text):
        found.append(Block(document, match[1], match[2], text[end : match.start()]))
        end = match.end()
    return found


def prose(document: str) -> str:
    """Return a document without its blocks."""
    return FENCE.sub("", (ROOT / document).read_text())


def spans(document: str) -> list[str]:
    """Return what is written as code within the text."""
    return re.findall(r"`([^`\n]+)`", prose(document))


def table_rows(document: str, first_header: str) -> Iterator[list[str]]:
    """Yield the cells of each row, of all tables whose first column is headed so."""
    is_in = False
    for line in prose(document).splitlines():
        if not line.startswith("|"):
            is_in = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == first_header:
            is_in = True
        elif is_in and not set(cells[0]) <= set("-"):
            yield cells


def anchors(document: str) -> set[str]:
    """Return the fragments that the headings of a document can be linked by."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}
