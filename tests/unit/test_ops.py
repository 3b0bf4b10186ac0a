"""What lies in ops/, held against the metrics that there are."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from shared.observe.counts import AuditCounts, ServiceCounts
from shared.observe.metrics import log_registry, process_registry
from shared.store.gauges import DrainGauges, LogGauges, ScheduleGauges, SubscriptionGauges
from shared.types import Subscription
from tests.support.documents import table_rows
from tests.support.metrics import NAME, Samples, collected
from tests.support.processes import ROOT
from tests.unit.message_log import event

ALERTS = yaml.safe_load((ROOT / "ops/alerts.yml").read_text())
DASHBOARD = json.loads((ROOT / "ops/dashboard.json").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def samples() -> Samples:
    """Return a sample of each metric."""
    its = Subscription("orders", "shop", "placed", "audit.note", id=1)
    counts = ServiceCounts("audit")
    counts.subscriptions[1] = its
    counts.handler(its).observe(1)
    counts.count_dispatched([event()])
    of_log = LogGauges(
        {("orders", "failed"): 1},
        [SubscriptionGauges(its, {"failed": 1}, 1, 1.0, True, False)],
        {"orders": 1.0},
        [ScheduleGauges("nightly", "orders", "placed", is_failing=True)],
        {"stopped": 1},
    )
    draining = DrainGauges("rabbitmq", 1)
    return {
        **collected(process_registry([counts])),
        **collected(log_registry("redis", True, of_log, AuditCounts(), draining)),
    }


def labels() -> dict[str, set[str]]:
    """Return the labels of each metric, by the names that queries call it by."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, pairs in samples():
        if name.startswith("nameko_queue_"):
            found[name] |= dict(pairs).keys()
    return found


LABELS = labels()


def expressions() -> Iterator[Any]:
    for rule in RULES:
        yield pytest.param(rule["expr"], id=rule["alert"])
    for panel in PANELS:
        for target in panel["targets"]:
            yield pytest.param(target["expr"], id=f"{panel['title']}-{target['refId']}")
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield pytest.param(variable["definition"], id=f"variable-{variable['name']}")


EXPRESSIONS = list(expressions())


class TestExpressions:
    @pytest.mark.parametrize("expression", EXPRESSIONS)
    def test_name_metrics_that_are_exported(self, expression: str) -> None:
        named = set(NAME.findall(expression))
        assert named
        assert named <= LABELS.keys()

    @pytest.mark.parametrize("expression", EXPRESSIONS)
    def test_name_labels_that_their_metrics_have(self, expression: str) -> None:
        for name, selector in re.findall(r"(nameko_queue_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)(?:=~|!=|=)", selector)) <= LABELS[name]
        named = set().union(*(LABELS[name] for name in NAME.findall(expression)))
        for listed in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
            assert set(re.split(r",\s*", listed)) <= named

    def test_are_made_of_every_metric(self) -> None:
        used = {name for p in EXPRESSIONS for name in NAME.findall(p.values[0])}
        families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in used}
        assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in LABELS} == families


class TestAlerts:
    def test_are_complete(self) -> None:
        for rule in RULES:
            assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
            assert rule["labels"]["severity"] in ("critical", "warning")
            assert rule["annotations"].keys() == {"summary", "description"}
            assert re.fullmatch(r"\d+m", rule.get("for", "0m"))
        names = [rule["alert"] for rule in RULES]
        assert len(set(names)) == len(names) > 5

    def test_are_explained(self) -> None:
        listed = [row[0].strip("`") for row in table_rows("docs/monitoring.md", "Alert")]
        assert listed == [rule["alert"] for rule in RULES]

    def test_say_only_what_their_labels_tell(self) -> None:
        for rule in RULES:
            text = " ".join(rule["annotations"].values())
            named = set().union(*(LABELS[name] for name in NAME.findall(rule["expr"])))
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= named


class TestDashboard:
    def test_has_a_place_for_each_panel(self) -> None:
        places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
        for a, b in itertools.combinations(places, 2):
            is_beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
            is_under = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
            assert is_beside or is_under, (a, b)
        assert all(place["x"] + place["w"] <= 24 for place in places)
        ids = [panel["id"] for panel in DASHBOARD["panels"]]
        assert len(set(ids)) == len(ids)

    def test_asks_the_data_source_that_its_reader_chooses(self) -> None:
        names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
        assert names == {"datasource", "queue"}
        for panel in PANELS:
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}

    def test_names_labels_in_its_legends_that_are_left(self) -> None:
        for panel in PANELS:
            for target in panel["targets"]:
                by = re.findall(r"\bby \(([^)]*)\)", target["expr"])
                named = set().union(*(LABELS[name] for name in NAME.findall(target["expr"])))
                left = set(re.split(r",\s*", by[0])) if by else named
                assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= left


class TestPromtool:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("check", "rules", "ops/alerts.yml"),
            ("check", "config", "ops/prometheus.yml"),
            ("test", "rules", "tests/unit/alerts.yml"),
        ],
        ids=" ".join,
    )
    def test_is_content(self, arguments: tuple[str, ...]) -> None:
        promtool = shutil.which("promtool")
        if promtool is None:
            pytest.skip("promtool is not in PATH: apt install prometheus")
        done = subprocess.run([promtool, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


class TestMonitoring:
    def test_tells_of_each_metric_and_its_labels(self) -> None:
        listed = {
            row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1]))
            for row in table_rows("docs/monitoring.md", "Metric")
        }
        there: dict[str, set[str]] = defaultdict(set)
        for name, its in LABELS.items():
            there[re.sub(r"_(bucket|count|sum)$", "", name)] |= its - {"le"}
        assert listed == there
