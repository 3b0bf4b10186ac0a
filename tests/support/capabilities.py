"""The table in docs/providers.md of what each provider can do, drawn from their flags.

``python -m tests.support.capabilities`` brings it up to date; ``make docs`` does that.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from tempfile import TemporaryDirectory

import shared.providers
from shared.providers import Capabilities, QueueProvider
from shared.settings import load_settings
from tests.support.processes import ROOT

DOCUMENT = ROOT / "docs/providers.md"

START, END = "<!-- drawn by make docs -->\n", "<!-- end -->\n"


def providers() -> Iterator[tuple[str, type[QueueProvider]]]:
    """Go through the providers that come with the suite, by the names of their modules."""
    for module in pkgutil.iter_modules(shared.providers.__path__, "shared.providers."):
        found = vars(import_module(module.name)).values()
        for each in found:
            is_provider = isinstance(each, type) and issubclass(each, QueueProvider)
            if is_provider and not inspect.isabstract(each) and each is not QueueProvider:
                yield module.name.rpartition(".")[2], each


def meanings() -> dict[str, str]:
    """Return what is written in the code below each flag."""
    [tree] = ast.parse(inspect.getsource(Capabilities)).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for flag, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(flag, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(flag.target, ast.Name)
            found[flag.target.id] = " ".join(ast.literal_eval(text.value).split())
    return found


def table() -> str:
    """Return the table as Markdown."""
    with TemporaryDirectory() as folder:
        settings = load_settings({"QUEUE_DATA_DIR": folder})
        # an instance, since some can more or less by their settings
        names = {name: each(settings).capabilities for name, each in sorted(providers())}
    said = meanings()
    rows = [["Flag", *[f"`{name}`" for name in names], "Means"], ["---"] * (len(names) + 2)]
    for flag in fields(Capabilities):
        has = [getattr(each, flag.name) for each in names.values()]
        answers = ["yes" if each else "no" for each in has]
        rows.append([f"`{flag.name}`", *answers, said[flag.name]])
    return "".join(f"| {' | '.join(row)} |\n".replace(" --- ", "---") for row in rows)


def written(text: str) -> str:
    """Return what is between the marks."""
    return text.partition(START)[2].partition(END)[0]


def main() -> None:
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(text.replace(START + written(text), START + table()))


if __name__ == "__main__":
    main()
