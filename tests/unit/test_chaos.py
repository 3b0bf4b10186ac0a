"""Faults for handlers: which of them are not safe to repeat, and where they break."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import ForeignKey, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shared.events import EventDispatcher, MessageContext, event_handler
from shared.store import DatabaseSession
from shared.store.inbox import inbox_table
from shared.store.outbox import outbox_table
from shared.testing.chaos import ChaosRunner, Point, Report
from shared.testing.chaos.forks import ChildError, ChildKilledError, in_child, in_children
from shared.testing.chaos.points import Crossing, distinct


class Base(DeclarativeBase):
    """The tables of these services, which have no migrations."""


class Item(Base):
    __tablename__ = "warehouse_items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    count: Mapped[int] = mapped_column(default=10)


class Sale(Base):
    __tablename__ = "warehouse_sales"

    message_id: Mapped[str] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey(Item.id))


outbox_table(Base.metadata, "warehouse")
inbox_table(Base.metadata, "warehouse")


class Shelf:
    """What is no database: a line for each call."""

    def put(self, item: str) -> None:
        with Path("shelf.txt").open("a") as shelf:
            shelf.write(f"{item}\n")


class Warehouse:
    """One handler for each way of being careless, and of being careful."""

    name = "warehouse"

    db = DatabaseSession(Base)
    dispatch = EventDispatcher()
    message = MessageContext()
    shelf = MessageContext()  # the tests inject something else

    @event_handler("shop", "careful")
    def record_once(self, payload: Any) -> None:
        if self.db.get(Sale, self.message.id) is not None:
            return
        item = self._item(payload["item"])
        item.count -= 1
        self.db.add(Sale(message_id=self.message.id, item_id=item.id))
        self.dispatch("recorded", payload, session=self.db)
        self.db.commit()

    @event_handler("shop", "careless")
    def count_down(self, payload: Any) -> None:
        self._item(payload["item"])
        down = text("UPDATE warehouse_items SET count = count - 1 WHERE name = :item")
        self.db.execute(down, payload)
        self.db.commit()

    @event_handler("shop", "in_inbox", inbox="db")
    def count_down_once(self, payload: Any) -> None:
        self.count_down(payload)

    @event_handler("shop", "two_commits")
    def commit_twice(self, payload: Any) -> None:
        if self.db.get(Sale, self.message.id) is None:
            item = self._item(payload["item"])
            self.db.add(Sale(message_id=self.message.id, item_id=item.id))
            self.db.commit()
            item.count -= 1
            self.db.commit()

    @event_handler("shop", "unique", max_retries=1)
    def insert(self, payload: Any) -> None:
        self.db.add(Item(name=payload["item"]))
        self.db.commit()

    @event_handler("shop", "told")
    def tell(self, payload: Any) -> None:
        self.dispatch("told", payload)

    @event_handler("shop", "put")
    def put(self, payload: Any) -> None:
        self.shelf.put(payload["item"])

    @event_handler("shop", "newest")
    def keep_newest(self, payload: Any) -> None:
        self._item(payload["item"]).count = payload["count"]
        self.db.commit()

    def _item(self, name: str) -> Item:
        item = self.db.scalar(select(Item).where(Item.name == name))
        if item is None:
            item = Item(name=name, count=10)
            self.db.add(item)
            self.db.flush()
        return item


def places(report: Report) -> set[tuple[Point, str]]:
    """Return where a service with one handler broke."""
    return {(each.point, each.effect) for each in report.unsafe}


def tea(event_type: str, **more: Any) -> tuple[str, str, dict[str, Any]]:
    return "shop", event_type, {"item": "tea", **more}


class TestCareful:
    def test_handlers_are_safe_at_each_point(self, chaos_runner: ChaosRunner) -> None:
        report = chaos_runner(Warehouse, [tea("careful"), ("shop", "careful", {"item": "milk"})])
        report.assert_safe()
        assert report.safe
        assert report.handlers == ["warehouse.record_once"]
        # nine points of each event, both of them twice, and in another order
        assert report.faults == 2 * 9 + 2
        assert str(report) == "1 handler, 20 faults; safe to repeat"

    def test_an_inbox_makes_a_handler_safe_that_was_not(self, chaos_runner: ChaosRunner) -> None:
        report = chaos_runner(Warehouse, [tea("in_inbox"), tea("in_inbox")])
        report.assert_safe()
        assert report.handlers == ["warehouse.count_down_once"]


class TestCareless:
    @pytest.mark.parametrize(
        ("event_type", "expected"),
        [
            (
                "careless",
                {
                    (Point.AFTER_COMMIT, "db"),
                    (Point.BEFORE_SETTLE, ""),
                    (Point.DELIVERED_TWICE, ""),
                },
            ),
            # what it did the first time is not done, and it thinks that it was
            (
                "two_commits",
                {
                    (Point.AFTER_COMMIT, "db"),
                    (Point.BEFORE_EFFECT, "db"),
                    (Point.AFTER_EFFECT, "db"),
                },
            ),
            # its second attempt fails
            (
                "unique",
                {
                    (Point.AFTER_COMMIT, "db"),
                    (Point.BEFORE_SETTLE, ""),
                    (Point.DELIVERED_TWICE, ""),
                },
            ),
            (
                "told",
                {
                    (Point.AFTER_EFFECT, "dispatch"),
                    (Point.BEFORE_SETTLE, ""),
                    (Point.DELIVERED_TWICE, ""),
                },
            ),
        ],
    )
    def test_handlers_are_named_with_the_point(
        self, chaos_runner: ChaosRunner, event_type: str, expected: set[tuple[Point, str]]
    ) -> None:
        report = chaos_runner(Warehouse, [tea(event_type)])
        assert places(report) == expected
        assert not report.safe

    def test_handlers_are_told_from_careful_ones(self, chaos_runner: ChaosRunner) -> None:
        report = chaos_runner(Warehouse, [tea("careful"), tea("careless")])
        assert {each.handler for each in report.unsafe} == {"warehouse.count_down"}
        with pytest.raises(AssertionError) as caught:
            report.assert_safe()
        finding = (
            "warehouse.count_down: killed after the commit (db), "
            'handling careless {"item": "tea"}\n'
            "  expected  warehouse_items: name='tea', count=8\n"
            "  got       warehouse_items: name='tea', count=7\n\n"
        )
        assert finding in str(caught.value)

    def test_handlers_that_need_an_order_break_by_another(self, chaos_runner: ChaosRunner) -> None:
        report = chaos_runner(Warehouse, [tea("newest", count=1), tea("newest", count=2)])
        assert (Point.OUT_OF_ORDER, "") in places(report)
        [finding] = [each for each in report.unsafe if each.point == Point.OUT_OF_ORDER]
        assert list(finding.expected) == ["warehouse_items: name='tea', count=2"]
        assert list(finding.got) == ["warehouse_items: name='tea', count=1"]


class TestEffects:
    def test_in_files_are_seen(self, chaos_runner: ChaosRunner) -> None:
        report = chaos_runner(Warehouse, [tea("put")], dependencies={"shelf": Shelf()})
        assert places(report) == {
            (Point.AFTER_EFFECT, "shelf.put"),
            (Point.BEFORE_SETTLE, ""),
            (Point.DELIVERED_TWICE, ""),
        }
        assert report.unsafe[0].expected == ["files: name='shelf.txt', content='tea\\n'"]

    def test_in_files_are_counted_where_no_two_runs_write_the_same(
        self, chaos_runner: ChaosRunner
    ) -> None:
        class Receipts:
            def put(self, item: str) -> None:
                with Path("receipts.txt").open("a") as receipts:
                    receipts.write(f"{os.urandom(8).hex()} {item}\n")

        report = chaos_runner(Warehouse, [tea("put")], dependencies={"shelf": Receipts()})
        assert (Point.AFTER_EFFECT, "shelf.put") in places(report)
        assert report.unsafe[0].expected == ["files: name='receipts.txt', lines=1"]
        assert report.unsafe[0].got == ["files: name='receipts.txt', lines=2"]

    def test_elsewhere_are_declared(self, chaos_runner: ChaosRunner, tmp_path: Path) -> None:
        def put() -> list[str]:
            return (Path("..") / f"{Path.cwd().name}.txt").read_text().split()

        class Elsewhere:
            def put(self, item: str) -> None:
                with (Path("..") / f"{Path.cwd().name}.txt").open("a") as shelf:
                    shelf.write(f"{item}\n")

        dependencies = {"shelf": Elsewhere()}
        report = chaos_runner(Warehouse, [tea("put")], dependencies=dependencies, effects=put)
        assert report.unsafe[0].got == ["effects: effect='tea'"]
        assert (Point.AFTER_EFFECT, "shelf.put") in places(report)

    def test_that_differ_by_themselves_are_refused(self, chaos_runner: ChaosRunner) -> None:
        with pytest.raises(ValueError, match="two undisturbed runs differ in effects"):
            chaos_runner(Warehouse, [tea("told")], effects=lambda: os.urandom(4))


class TestEvents:
    def test_that_nobody_handles_are_refused(self, chaos_runner: ChaosRunner) -> None:
        with pytest.raises(ValueError, match="no handler of warehouse takes unheard_of of shop"):
            chaos_runner(Warehouse, [tea("unheard_of")])


class TestPoints:
    def test_that_leave_the_same_are_one(self) -> None:
        writes = [Point.BEFORE_EFFECT, Point.AFTER_EFFECT] * 3
        points = [Point.AFTER_RESERVE, *writes, Point.AFTER_COMMIT, *writes, Point.BEFORE_SETTLE]
        crossings = [Crossing("a.b", "1", point, "db", n) for n, point in enumerate(points)]
        assert [each.number for each in distinct(crossings)] == [0, 1, 6, 7, 8, 13, 14]

    def test_of_other_effects_are_all_kept(self) -> None:
        points = [Point.BEFORE_EFFECT, Point.AFTER_EFFECT] * 2
        crossings = [Crossing("a.b", "1", point, "mail.send", n) for n, point in enumerate(points)]
        assert distinct(crossings) == crossings


class TestProcesses:
    def test_are_processes(self, tmp_path: Path) -> None:
        pids = in_children([(os.getpid, tmp_path)] * 5)
        assert len({*pids, os.getpid()}) == 6

    def test_tell_what_went_wrong(self, tmp_path: Path) -> None:
        with pytest.raises(ChildError, match="ZeroDivisionError"):
            in_child(lambda: 1 / 0, tmp_path)

    def test_that_are_killed_are_told_from_those_that_end(self, tmp_path: Path) -> None:
        with pytest.raises(ChildKilledError):
            in_child(lambda: os.kill(os.getpid(), 9), tmp_path)
