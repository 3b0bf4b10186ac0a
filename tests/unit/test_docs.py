"""What the documentation says, held against what there is."""

from __future__ import annotations

import inspect
import json
import re
import runpy
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from nameko.extensions import ENTRYPOINT_EXTENSIONS_ATTR

import shared.events
import shared.rpc
from shared.cli import main as queuectl
from shared.contracts import contracts
from shared.database import Database, database_url
from shared.errors import QueueError, SettingsError
from shared.events import EventHandler
from shared.events.dispatcher import make_envelope
from shared.lifecycle import MOVES, DeliveryStatus
from shared.native import sleep
from shared.providers import QueueProvider
from shared.rpc import RpcProxy
from shared.settings import load_settings
from shared.store.dedupe import DEDUPE_SECONDS
from shared.tables import deliveries, metadata
from shared.web.entrypoint import HttpEntrypoint
from tests.support.documents import (
    DOCUMENTS,
    Block,
    anchors,
    blocks,
    name_of,
    prose,
    spans,
    table_rows,
)
from tests.support.processes import ROOT

NAMES = [name_of(path) for path in DOCUMENTS]
BLOCKS = [block for name in NAMES for block in blocks(name)]

OURS = re.compile(r"\b(?:QUEUE|ALERT|AUTH_EVENTS|COMPANY|MAIL|REDIS|RABBITMQ|DB)_[A-Z_]+\b")
NAMEKO_SQLALCHEMYS = {"DB_URIS"}

SETTINGS = list(table_rows("docs/settings.md", "Variable"))


def of(language: str) -> list[Any]:
    found = [block for block in BLOCKS if block.language == language]
    return [pytest.param(block, id=f"{block.document}-{n}") for n, block in enumerate(found)]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def setting_names() -> set[str]:
    return set(re.findall(r'"([A-Z]+(?:_[A-Z]+)+)"', read("shared/settings.py")))


def statements() -> list[str]:
    """The SQL of the documentation, statement by statement."""
    found = "\n".join(block.text for block in BLOCKS if block.language == "sql")
    return [each.strip() for each in found.split(";") if each.strip()]


class TestDocuments:
    def test_are_all_here(self) -> None:
        wanted = {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"}
        assert wanted < set(NAMES)
        assert "readme" in read("pyproject.toml")

    @pytest.mark.parametrize("name", NAMES)
    def test_link_to_what_is_there(self, name: str) -> None:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
            if target.startswith("https://"):
                continue
            path, _, fragment = target.partition("#")
            file = (ROOT / name).parent / path if path else ROOT / name
            assert file.exists(), target
            if fragment:
                linked = name_of(file.resolve())
                assert fragment in anchors(linked), target

    def test_are_all_linked_from_the_readme_or_the_index_of_operations(self) -> None:
        pages = {name for name in NAMES if name.startswith("docs/operations/")}
        linked = set(re.findall(r"\]\(([\w/.-]+\.md)\)", prose("README.md")))
        assert linked == set(NAMES) - pages - {"README.md"}
        index = table_rows("docs/operations.md", "You want to")
        targets = [row[1].partition("](")[2].rstrip(")") for row in index]
        assert pages == {f"docs/{target}" for target in targets if "/" in target}

    @pytest.mark.parametrize("name", NAMES)
    def test_name_variables_that_are_read(self, name: str) -> None:
        # `DB_` stands for all that begin so
        named = {each for each in OURS.findall(read(name)) if not each.endswith("_")}
        assert named <= setting_names() | NAMEKO_SQLALCHEMYS

    @pytest.mark.parametrize("name", NAMES)
    def test_name_make_targets_that_are_there(self, name: str) -> None:
        targets = set(re.findall(r"^([a-z]+):(?!=)", read("Makefile"), re.MULTILINE))
        code = "\n".join([*spans(name), *(b.text for b in blocks(name) if b.language == "bash")])
        assert set(re.findall(r"^make ([a-z]+)\b", code, re.MULTILINE)) <= targets

    @pytest.mark.parametrize("name", NAMES)
    def test_name_queuectl_commands_that_are_there(self, name: str) -> None:
        for group, command in re.findall(r"\bqueuectl ([a-z]+)\s+([a-z-]+)", read(name)):
            known = queuectl.commands.get(group)
            if isinstance(known, click.Group):
                assert command in known.commands
            elif known is not None:  # what follows is an option, or the next word
                continue
            else:  # it is a word of the sentence
                assert not re.search(rf"`[^`]*queuectl {group}", read(name))

    def test_list_every_command_of_queuectl(self) -> None:
        cells = [row[0] for row in table_rows("docs/queuectl.md", "Command")]
        listed = {name for cell in cells for name in re.findall(r"`queuectl ([a-z]+)", cell)}
        assert listed == set(queuectl.commands)

    @pytest.mark.parametrize("name", NAMES)
    def test_name_files_that_are_there(self, name: str) -> None:
        folders = r"(?:shared|services|tests|benchmarks|docs|ops)/[\w/.*-]*"
        for path in (each for each in spans(name) if re.fullmatch(folders, each)):
            assert list(ROOT.glob(path)), path

    @pytest.mark.parametrize("name", NAMES)
    def test_name_modules_and_attributes_that_are_there(self, name: str) -> None:
        dotted = r"shared(?:\.\w+)+"
        for path in (each for each in spans(name) if re.fullmatch(dotted, each)):
            assert exists(path), path


def exists(dotted: str) -> bool:
    try:
        import_module(dotted)
    except ImportError:
        module, _, attribute = dotted.rpartition(".")
        return hasattr(import_module(module), attribute)
    return True


class TestBlocks:
    def test_say_what_they_are(self) -> None:
        known = {"python", "bash", "json", "sql", "text", "mermaid"}
        assert [block for block in BLOCKS if block.language not in known] == []

    @pytest.mark.parametrize("block", of("python"))
    def test_of_python_compile(self, block: Block) -> None:
        compile(block.text, block.file or block.document, "exec")

    @pytest.mark.parametrize("block", of("json"))
    def test_of_json_are_json(self, block: Block) -> None:
        json.loads(block.text)

    @pytest.mark.parametrize("block", of("bash"))
    def test_of_shell_are_whole_commands(self, block: Block) -> None:
        assert block.commands

    @pytest.mark.parametrize("block", of("bash"))
    def test_of_shell_name_addresses_as_they_are_by_default(self, block: Block) -> None:
        known = {str(address) for address in load_settings({}).addresses.values()}
        # another one, to be used where that is taken
        free = {"127.0.0.1:3006", "127.0.0.1:3012"}
        metrics = {"127.0.0.1:9464"}
        servers = {"127.0.0.1:5672"}
        assert set(re.findall(r"[\d.]+:\d{4}\b", block.text)) <= known | free | servers | metrics

    @pytest.mark.parametrize("block", [p for p in of("python") if p.values[0].file])
    def test_of_files_import_what_is_there(
        self, block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(contracts, "_schemas", {})
        monkeypatch.syspath_prepend(str(tmp_path))
        write_files(block.document, tmp_path)
        imports = [line for line in block.text.splitlines() if re.match("(import|from) ", line)]
        alone = tmp_path / "imports_alone.py"
        alone.write_text("\n".join(imports))
        try:
            runpy.run_path(str(alone))
        finally:
            forget_modules(tmp_path)


def write_files(document: str, folder: Path) -> None:
    for block in blocks(document):
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)


def forget_modules(folder: Path) -> None:
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(folder)):
            del sys.modules[name]


class TestSql:
    def test_runs_on_either_database(self, log_settings: dict[str, str]) -> None:
        database = Database(database_url(load_settings(log_settings)), sleep)
        with database.transaction() as tx:
            for statement in statements():
                if not statement.startswith("-- MySQL") or not database.is_sqlite:
                    tx.connection.exec_driver_sql(statement)
        database.close()
        assert len(statements()) >= 7


class TestLifecycle:
    def test_is_drawn_as_it_is(self) -> None:
        drawn = self.moves()
        states = {status.value for status in DeliveryStatus}
        inside = {(a, b) for a, b in drawn if {a, b} <= states}
        assert inside == {(a.value, b.value) for a, its in MOVES.items() for b in its}
        assert {a for a, b in drawn if b == "[*]"} == {
            a.value for a, its in MOVES.items() if not its
        }
        assert {b for a, b in drawn if a == "[*]"} == {DeliveryStatus.PENDING}

    @staticmethod
    def moves() -> set[tuple[str, str]]:
        [block] = [
            each
            for each in blocks("ARCHITECTURE.md")
            if each.language == "mermaid" and each.text.startswith("stateDiagram-v2\n")
        ]
        lines = block.text.splitlines()[1:]
        found = [re.fullmatch(r" +(\S+) --> (\S+?)(?:: .+)?", line) for line in lines]
        assert all(found), lines
        return {(match[1], match[2]) for match in found if match}


class TestArchitecture:
    def test_names_an_owner_for_each_column(self) -> None:
        rows = table_rows("ARCHITECTURE.md", "Columns of `queue_deliveries`")
        named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
        assert sorted(named) == sorted(column.name for column in deliveries.columns)

    @pytest.mark.parametrize("name", ["ARCHITECTURE.md", "docs/operations/message-log.md"])
    def test_lists_the_tables_of_the_log(self, name: str) -> None:
        listed = {row[0].strip("`") for row in table_rows(name, "Table")}
        assert listed - {"queue_version"} == set(metadata.tables)

    def test_lists_the_methods_of_a_provider(self) -> None:
        listed = [row[0].strip("`") for row in table_rows("ARCHITECTURE.md", "Method")]
        assert listed == [
            name
            for name, function in vars(QueueProvider).items()
            if getattr(function, "__isabstractmethod__", False)
        ]

    def test_draws_which_way_imports_run(self) -> None:
        drawn = next(
            b.text for b in blocks("ARCHITECTURE.md") if b.text.startswith("flowchart TD\n")
        )
        files = [*ROOT.glob("shared/*.py"), *ROOT.glob("shared/*/__init__.py")]
        parts = {f.parent.name if f.stem == "__init__" else f.stem for f in files} - {"shared"}
        assert {part for part in parts if not re.search(rf"\b{part}\b", drawn)} == set()


class TestSettings:
    def test_are_all_listed_once(self) -> None:
        listed = [row[0].strip("`") for row in SETTINGS]
        assert sorted(listed) == sorted(setting_names())

    @pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row[0])
    def test_have_the_default_that_is_written(self, row: list[str]) -> None:
        name, default = row[0].strip("`"), row[1]
        value = {"MAIL_URL": f"file:{Path('var/mail').absolute()}", "QUEUE_ADMIN_AUTH": "none"}.get(
            name, "" if default == "empty" else default.strip("`")
        )
        assert load_settings({name: value}) == load_settings({})

    @pytest.mark.parametrize("row", [r for r in SETTINGS if r[2]], ids=lambda row: row[0])
    def test_must_be_what_is_written(self, row: list[str]) -> None:
        name, must_be = row[0].strip("`"), row[2]
        wrong = "" if must_be == "not empty" else "no\x00such"
        with pytest.raises(SettingsError) as refused:
            load_settings({name: wrong})
        said = str(refused.value).replace("must not be", "must be not")
        assert said.startswith(f"{name}: must be {must_be}")

    @pytest.mark.parametrize("row", [r for r in SETTINGS if not r[2]], ids=lambda row: row[0])
    def test_may_be_anything_where_nothing_is_written(self, row: list[str]) -> None:
        load_settings({row[0].strip("`"): "no such"})

    def test_of_config_yml_alone_are_named(self) -> None:
        read_there = set(re.findall(r"\$\{([A-Z_]+):", read("config.yml")))
        only_there = read_there - setting_names()
        assert {name for name in only_there if f"`{name}`" not in read("docs/settings.md")} == set()


class TestEvents:
    def test_list_the_options_of_a_dispatch(self) -> None:
        listed = {row[0].strip("`") for row in table_rows("docs/events.md", "Option")}
        known = {p.name for p in keyword_only(make_envelope)} - {"context", "own"}
        assert listed == known | {"session"}

    def test_list_the_arguments_of_a_handler(self) -> None:
        cells = [row[0] for row in table_rows("docs/events.md", "Argument")]
        listed = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
        ours = {p.name for p in keyword_only(EventHandler.__init__)}
        nameko = {"handler_type", "reliable_delivery", "requeue_on_error"}
        deprecated = {"sensitive_variables"}
        assert listed == (ours | nameko) - deprecated

    def test_list_errors_that_are_there(self) -> None:
        for row in table_rows("docs/events.md", "Error"):
            assert issubclass(
                getattr(import_module("shared.errors"), row[0].strip("`")), QueueError
            )

    def test_tell_of_everything_that_the_package_has(self) -> None:
        text = read("docs/events.md")
        assert {name for name in shared.events.__all__ if name not in text} == set()

    def test_name_the_time_that_a_key_is_kept(self) -> None:
        hours = f"{DEDUPE_SECONDS // 3600} hours"
        assert f"for {hours} from the first dispatch" in read("docs/events.md").replace("\n", " ")
        assert f"For {hours} the same key" in read("docs/operations/publishing.md")


class TestRpc:
    def test_list_errors_that_are_there(self) -> None:
        for row in table_rows("docs/rpc.md", "Error"):
            name, is_ours = row[0].strip("`"), "of `shared.errors`" in row[1]
            error = getattr(import_module("shared.errors" if is_ours else "shared.rpc"), name)
            assert issubclass(error, QueueError) is is_ours

    def test_tell_of_everything_that_the_package_has(self) -> None:
        text = read("docs/rpc.md")
        assert {name for name in shared.rpc.__all__ if f"`{name}`" not in text} <= {"rpc"}

    def test_name_the_timeout_that_there_is_by_default(self) -> None:
        assert f"default is {RpcProxy('any').timeout:g};" in read("docs/rpc.md").replace("\n", " ")


def keyword_only(function: Any) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]


class TestServices:
    SERVICES = ("auth_events", "company", "notifications", "queue_admin")

    def test_have_the_routes_that_are_listed(self) -> None:
        rows = [
            *table_rows("docs/services.md", "Route"),
            *table_rows("docs/operations/http.md", "Route"),
        ]
        listed = sorted(row[0].strip("`") for row in rows)
        served = [
            f"{each.method} {each.url}"
            for each in self.entrypoints()
            if isinstance(each, HttpEntrypoint)
        ]
        assert listed == sorted(served)

    def test_handle_the_events_that_are_listed(self) -> None:
        listed = sorted(row[0].strip("`") for row in table_rows("docs/services.md", "Handles"))
        handlers = (each for each in self.entrypoints() if isinstance(each, EventHandler))
        assert listed == sorted(each.event_type for each in handlers)

    def test_have_the_tables_that_are_listed(self) -> None:
        lines = re.findall(r"^Tables?: (.+?)(?:\n\n|\Z)", read("docs/services.md"), re.M | re.S)
        listed = {name for line in lines for name in re.findall(r"`(\w+_\w+)`", line)}
        there = {
            table
            for name in self.SERVICES[:3]
            for table in import_module(f"services.{name}.models").Base.metadata.tables
        }
        assert listed == there

    def test_answer_with_the_problems_that_are_listed(self) -> None:
        files = [*ROOT.glob("shared/web/*.py"), *ROOT.glob("services/*/*.py")]
        raised = set()
        for file in files:
            text = file.read_text().partition('"""\n\nfrom')[2]
            raised |= set(
                re.findall(r'Problem\(\s*(?:error.code or )?(\d{3}),\s*"([a-z-]+)"', text)
            )
        listed = {
            (row[0], row[1].removeprefix("`/problems/").rstrip("`"))
            for name in ("docs/operations/http.md", "docs/services.md")
            for row in table_rows(name, "Status")
        }
        in_text = {("400", "bad-request"), ("404", "user-not-found")}
        assert listed | in_text == raised
        for _, slug in in_text:
            text = read("docs/operations/http.md") + read("docs/services.md")
            assert f"`/problems/{slug}`" in text

    def entrypoints(self) -> Iterator[Any]:
        for name in self.SERVICES:
            package = import_module(f"services.{name}")
            service = getattr(package, package.__all__[0])
            for _, method in inspect.getmembers(service, inspect.isfunction):
                yield from getattr(method, ENTRYPOINT_EXTENSIONS_ATTR, ())


class TestBenchmarks:
    def test_print_the_lines_that_are_explained(self) -> None:
        explained = [row[0].strip("`") for row in table_rows("docs/benchmarks.md", "Line")]
        code = read("benchmarks/embedded.py")
        printed = re.findall(r"""(?:report\(|\{')["']?([a-z][^"']+)["'](?:,|:44)""", code)
        assert explained == printed


class TestConfiguration:
    def test_in_the_readme_is_that_of_config_yml(self) -> None:
        listed = {row[0].strip("`"): row[1] for row in table_rows("README.md", "Service")}
        assert listed.pop("notifications") == "no HTTP"
        text = re.sub(r"!raw_env_var (\S+)", r'"\1"', read("config.yml"))
        config = yaml.safe_load(re.sub(r"^LOGGING:.*", "", text, flags=re.M | re.S))
        for service, address in listed.items():
            name = f"{service.upper()}_ADDRESS"
            assert config[name] == f"${{{name}:{address}}}"
