"""Slots go by class, then by arrival; the queue is bounded; no slot is ever lost."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kserve_vllm.core.errors import ConfigError, EngineGone, QueueTimeout, RateLimited, RequestError, Unavailable
from kserve_vllm.core.types import Priority
from kserve_vllm.policy.priority_queue import PriorityQueue, Slot, class_values
from tests.unit.policy.virtual import clock, run, settle

CRITICAL, HIGH, NORMAL, LOW, BATCH = Priority


def admission(slots: int = 1, queue_size: int = 100, timeout_s: float = math.inf, **more: Any) -> PriorityQueue:
    return PriorityQueue(slots, queue_size, more.get("sizes", {}), timeout_s, more.get("shares", {}), clock)


class Crowd:
    """Requests that ask for slots; remembers in which order they got in."""

    def __init__(self, queue: PriorityQueue) -> None:
        self.queue = queue
        self.entered: list[str] = []
        self.slots: dict[str, Slot] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, priority: Priority) -> asyncio.Task[None]:
        """One more request, which waits or is in when this returns."""

        async def request() -> None:
            self.slots[name] = await self.queue.acquire(priority)
            self.entered.append(name)

        self.tasks[name] = asyncio.create_task(request())
        await settle()
        return self.tasks[name]

    async def leave(self, name: str) -> None:
        self.slots.pop(name).release()
        await settle()

    async def leave_all(self) -> None:
        while self.slots:
            await self.leave(next(iter(self.slots)))


def nothing_is_held(queue: PriorityQueue) -> bool:
    stats = queue.stats()
    return (stats["in_use"], stats["waiting"]) == (0, 0) and all(
        c["in_use"] == c["waiting"] == 0 for c in stats["classes"].values()
    )


def test_higher_classes_go_first_and_within_a_class_who_came_first() -> None:
    async def work() -> list[str]:
        crowd = Crowd(admission())
        await crowd.ask("first", BATCH)
        for name, priority in (
            ("b1", BATCH),
            ("n1", NORMAL),
            ("b2", BATCH),
            ("c1", CRITICAL),
            ("n2", NORMAL),
            ("l1", LOW),
            ("h1", HIGH),
        ):
            await crowd.ask(name, priority)
        await crowd.leave_all()
        assert nothing_is_held(crowd.queue)
        return crowd.entered

    assert run(work()) == ["first", "c1", "h1", "n1", "n2", "l1", "b1", "b2"]


def test_without_slots_everything_passes_and_nothing_is_counted() -> None:
    async def work() -> None:
        queue = admission(slots=0, queue_size=0, timeout_s=0)
        held = [await queue.acquire(BATCH) for _ in range(1000)]
        for slot in held:
            slot.release()
        assert queue.stats()["in_use"] == 0
        assert queue.stats()["slots"] == 0

    run(work())


def test_a_class_holds_no_more_than_its_share_and_others_go_past_it() -> None:
    async def work() -> None:
        crowd = Crowd(admission(slots=4, shares={HIGH: 0.25, BATCH: 0.5}))
        for i in range(4):
            await crowd.ask(f"b{i}", BATCH)
        assert crowd.entered == ["b0", "b1"]
        await crowd.ask("h0", HIGH)
        await crowd.ask("h1", HIGH)
        assert crowd.entered[2:] == ["h0"]
        # h1 is the highest that waits, but its class is at its share.
        await crowd.ask("l0", LOW)
        assert crowd.entered[3:] == ["l0"]
        await crowd.leave("l0")
        assert crowd.entered[4:] == []
        await crowd.leave("b0")
        assert crowd.entered[4:] == ["b2"]
        await crowd.leave("h0")
        assert crowd.entered[5:] == ["h1"]
        await crowd.leave_all()
        assert nothing_is_held(crowd.queue)

    run(work())


def test_a_share_is_never_less_than_one_slot() -> None:
    async def work() -> None:
        crowd = Crowd(admission(slots=2, shares={BATCH: 0.0}))
        await crowd.ask("b0", BATCH)
        await crowd.ask("b1", BATCH)
        assert crowd.entered == ["b0"]
        await crowd.leave_all()
        assert admission(slots=100, shares={BATCH: 0.29}).stats()["classes"]["batch"]["slots"] == 29

    run(work())


def test_a_full_queue_evicts_the_newest_of_the_lowest_class_for_a_higher_one() -> None:
    async def work() -> None:
        crowd = Crowd(admission(queue_size=3))
        await crowd.ask("in", NORMAL)
        low, old, new = [await crowd.ask(*w) for w in (("l", LOW), ("old", BATCH), ("new", BATCH))]
        await crowd.ask("h", HIGH)
        with pytest.raises(RateLimited) as error:
            await new
        assert (error.value.reason, error.value.http_status) == ("evicted", 429)
        assert (error.value.retry_after_s or 0) >= 1
        assert not low.done()
        assert not old.done()
        same = await crowd.ask("b", BATCH)
        with pytest.raises(RateLimited) as error:
            await same
        assert error.value.reason == "queue_full"
        await crowd.ask("n1", NORMAL)
        assert old.done()
        await crowd.ask("n2", NORMAL)
        assert low.done()
        refused = await crowd.ask("n3", NORMAL)
        assert refused.done()
        await crowd.leave_all()
        assert crowd.entered == ["in", "h", "n1", "n2"]
        assert (crowd.queue.evicted, crowd.queue.refused, crowd.queue.granted) == (3, 2, 4)
        for task in (old, low, refused):
            assert isinstance(task.exception(), RateLimited)

    run(work())


def test_a_class_never_waits_in_more_places_than_its_own() -> None:
    async def work() -> None:
        crowd = Crowd(admission(queue_size=10, sizes={HIGH: 1}))
        await crowd.ask("in", NORMAL)
        batch = await crowd.ask("b", BATCH)
        await crowd.ask("h1", HIGH)
        refused = await crowd.ask("h2", HIGH)
        with pytest.raises(RateLimited) as error:
            await refused
        assert error.value.reason == "queue_full"
        assert "high" in error.value.message
        assert not batch.done()
        await crowd.leave_all()

    run(work())


def test_without_a_place_to_wait_a_free_slot_is_still_had() -> None:
    async def work() -> None:
        queue = admission(queue_size=0)
        with await queue.acquire(BATCH), pytest.raises(RateLimited):
            await queue.acquire(CRITICAL)
        with await queue.acquire(BATCH):
            pass
        assert nothing_is_held(queue)

    run(work())


def test_who_waits_too_long_is_told_so_at_its_own_deadline() -> None:
    async def work() -> list[tuple[str, float]]:
        queue = admission(timeout_s=10)
        ends = []

        async def request(name: str, priority: Priority, delay_s: float) -> None:
            await asyncio.sleep(delay_s)
            with pytest.raises(QueueTimeout) as error:
                await queue.acquire(priority)
            ends.append((name, round(clock(), 2)))
            assert (error.value.http_status, error.value.reason) == (503, "queue_timeout")
            assert (error.value.retry_after_s or 0) >= 1

        with await queue.acquire(NORMAL):
            await asyncio.gather(request("b", BATCH, 0), request("c", CRITICAL, 3), request("b2", BATCH, 7))
            assert queue.waiting == 0
        assert nothing_is_held(queue)
        assert queue.timed_out == 3
        with await queue.acquire(NORMAL):
            await asyncio.gather(request("later", LOW, 100))
        return ends

    assert run(work()) == [("b", 10.0), ("c", 13.0), ("b2", 17.0), ("later", 127.0)]


def test_a_timeout_of_nothing_means_not_to_wait() -> None:
    async def work() -> None:
        queue = admission(timeout_s=0)
        with await queue.acquire(NORMAL):
            with pytest.raises(QueueTimeout):
                await queue.acquire(NORMAL)
            assert clock() < 0.1

    run(work())


def test_a_client_that_goes_away_leaves_the_queue() -> None:
    async def work() -> None:
        crowd = Crowd(admission(queue_size=1))
        await crowd.ask("in", NORMAL)
        gone = await crowd.ask("gone", NORMAL)
        gone.cancel()
        await settle()
        assert crowd.queue.waiting == 0
        await crowd.ask("next", NORMAL)
        await crowd.leave_all()
        assert crowd.entered == ["in", "next"]
        assert nothing_is_held(crowd.queue)
        assert crowd.queue.gone == 1

    run(work())


@pytest.mark.parametrize("cancel_first", [False, True])
def test_a_slot_given_to_a_client_that_just_went_away_goes_to_the_next(cancel_first: bool) -> None:
    async def work() -> None:
        crowd = Crowd(admission())
        await crowd.ask("in", NORMAL)
        gone = await crowd.ask("gone", NORMAL)
        await crowd.ask("next", BATCH)
        # Both before the task of `gone` runs again.
        steps: list[Callable[[], object]] = [crowd.slots.pop("in").release, gone.cancel]
        for step in reversed(steps) if cancel_first else steps:
            step()
        await settle()
        assert gone.cancelled()
        assert crowd.entered == ["in", "next"]
        await crowd.leave("next")
        assert nothing_is_held(crowd.queue)
        assert (crowd.queue.granted, crowd.queue.gone) == (2, 1)

    run(work())


def test_a_client_that_goes_away_as_it_is_evicted_counts_once() -> None:
    async def work() -> None:
        crowd = Crowd(admission(queue_size=1))
        await crowd.ask("in", NORMAL)
        low = await crowd.ask("low", LOW)
        high = asyncio.create_task(crowd.queue.acquire(HIGH))
        low.cancel()
        await settle()
        assert low.cancelled()
        await crowd.leave("in")
        high.result().release()
        assert nothing_is_held(crowd.queue)
        assert crowd.queue.evicted + crowd.queue.gone == 1

    run(work())


def test_a_slot_is_given_back_once_however_often_it_is_released() -> None:
    async def work() -> None:
        queue = admission(slots=2)
        first, second = await queue.acquire(LOW), await queue.acquire(LOW)
        first.release()
        first.release()
        assert queue.stats()["in_use"] == 1
        second.release()
        assert nothing_is_held(queue)

    run(work())


def test_a_dead_engine_ends_every_wait_with_its_own_copy_of_the_error() -> None:
    async def work() -> None:
        crowd = Crowd(admission(timeout_s=10))
        await crowd.ask("in", NORMAL)
        waiting = [await crowd.ask(p.name, p) for p in Priority]
        crowd.queue.fail(EngineGone("The engine is dead.", retry_after_s=5, close=True))
        await settle()
        errors = [task.exception() for task in waiting]
        for error in errors:
            assert isinstance(error, EngineGone)
            assert (error.message, error.retry_after_s, error.close) == ("The engine is dead.", 5, True)
        assert len({id(e) for e in errors}) == 5
        await crowd.leave("in")
        assert nothing_is_held(crowd.queue)
        await crowd.ask("after", NORMAL)
        assert crowd.entered == ["in", "after"]

    run(work())


def test_closing_tells_those_who_still_wait() -> None:
    async def work() -> None:
        crowd = Crowd(admission(timeout_s=10))
        await crowd.ask("in", NORMAL)
        task = await crowd.ask("waits", NORMAL)
        crowd.queue.close()
        with pytest.raises(Unavailable) as error:
            await task
        assert error.value.close
        await crowd.leave("in")
        assert nothing_is_held(crowd.queue)

    run(work())


def test_the_numbers_for_operators() -> None:
    async def work() -> None:
        crowd = Crowd(admission(slots=2, queue_size=7, timeout_s=60, sizes={BATCH: 3}, shares={BATCH: 0.5}))
        assert crowd.queue.estimated_wait_s(BATCH) == 0.0
        await crowd.ask("b0", BATCH)
        assert crowd.queue.estimated_wait_s(BATCH) is None
        assert crowd.queue.estimated_wait_s(HIGH) == 0.0
        await asyncio.sleep(4)
        await crowd.leave("b0")
        for name, priority in (("b1", BATCH), ("n0", NORMAL), ("b2", BATCH), ("n1", NORMAL)):
            await crowd.ask(name, priority)
        await asyncio.sleep(2)
        stats = crowd.queue.stats()
        classes = stats.pop("classes")
        assert stats == {
            "slots": 2,
            "in_use": 2,
            "waiting": 2,
            "queue_size": 7,
            "timeout_s": 60,
            "mean_held_s": 4.0,
            "granted": 3,
            "refused": 0,
            "evicted": 0,
            "timed_out": 0,
            "gone": 0,
        }
        assert list(classes) == ["critical", "high", "normal", "low", "batch"]
        # One waits already, and requests hold one of one slot for 4 s.
        assert classes["batch"] == {
            "in_use": 1,
            "slots": 1,
            "waiting": 1,
            "queue_size": 3,
            "oldest_wait_s": 2.0,
            "estimated_wait_s": 8.0,
        }
        assert classes["normal"]["estimated_wait_s"] == 4.0
        assert classes["critical"] == {
            "in_use": 0,
            "slots": 2,
            "waiting": 0,
            "queue_size": 7,
            "oldest_wait_s": 0.0,
            "estimated_wait_s": 2.0,
        }
        await crowd.leave_all()
        assert crowd.slots == {}

    run(work())


def test_a_slot_says_how_long_it_was_waited_for() -> None:
    async def work() -> None:
        crowd = Crowd(admission())
        await crowd.ask("in", NORMAL)
        await crowd.ask("waits", NORMAL)
        await asyncio.sleep(3)
        await crowd.leave("in")
        assert crowd.slots["waits"].waited_s == pytest.approx(3, abs=0.01)

    run(work())


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["batch=0.25", "low=1", "batch=0.5"], {BATCH: 0.5, LOW: 1.0}),
        ([" High=3"], {HIGH: 3.0}),
        (["batch"], None),
        (["bulk=1"], None),
        (["batch=-1"], None),
        (["batch=nan"], None),
        (["batch=inf"], None),
    ],
)
def test_classes_are_read_from_flags(items: list[str], expected: dict[Priority, float] | None) -> None:
    if expected is not None:
        assert class_values(items, "--class-share") == expected
        return
    with pytest.raises(ConfigError, match=r"--class-share.*critical, high, normal, low, batch"):
        class_values(items, "--class-share")


@pytest.mark.parametrize(
    "make",
    [
        lambda: PriorityQueue(-1, 1, {}, 1, {}),
        lambda: PriorityQueue(1, -1, {}, 1, {}),
        lambda: PriorityQueue(1, 1, {}, math.nan, {}),
        lambda: PriorityQueue(1, 1, {BATCH: 1.5}, 1, {}),
        lambda: PriorityQueue(1, 1, {}, 1, {BATCH: 1.1}),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], PriorityQueue]) -> None:
    with pytest.raises(ConfigError):
        make()


# --- Anything may happen in any order: a plain model of the rules says what must come of it. ---


@dataclass
class Model:
    """The rules, the slow and plain way: lists that are searched from one end to the other."""

    slots: int
    size: int
    sizes: dict[Priority, int]
    caps: dict[Priority, int]
    timeout_s: float
    held: dict[int, Priority] = field(default_factory=dict)
    waiting: list[tuple[int, Priority, float]] = field(default_factory=list)
    ended: dict[int, str] = field(default_factory=dict)

    def of(self, priority: Priority) -> int:
        return sum(p is priority for p in self.held.values())

    def run(self) -> None:
        for priority in Priority:
            for waiter in [w for w in self.waiting if w[1] is priority]:
                if len(self.held) < self.slots and self.of(priority) < self.caps[priority]:
                    self.waiting.remove(waiter)
                    self.held[waiter[0]] = priority

    def arrive(self, name: int, priority: Priority, now: float) -> None:
        self.waiting.append((name, priority, now))
        self.run()
        if name in self.held:
            return
        if sum(w[1] is priority for w in self.waiting) > self.sizes[priority]:
            self.waiting.pop()
            self.ended[name] = "queue_full"
        elif len(self.waiting) > self.size:
            lowest = max(w[1] for w in self.waiting)
            victim = [w for w in self.waiting if w[1] is lowest][-1] if lowest > priority else self.waiting[-1]
            self.waiting.remove(victim)
            self.ended[victim[0]] = "queue_full" if victim[0] == name else "evicted"

    def end(self, name: int) -> None:
        """A release, or a client that goes away: with a slot or while it waits."""
        self.held.pop(name, None)
        self.waiting = [w for w in self.waiting if w[0] != name]
        self.run()

    def pass_time(self, now: float) -> None:
        for waiter in list(self.waiting):
            if now - waiter[2] >= self.timeout_s:
                self.waiting.remove(waiter)
                self.ended[waiter[0]] = "queue_timeout"


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from(list(Priority))),
        st.tuples(st.just("ask"), st.sampled_from(list(Priority))),
        st.tuples(st.just("end"), st.integers(0, 1000)),
        st.tuples(st.just("time"), st.integers(1, 4)),
    ),
    max_size=60,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    slots=st.integers(1, 4),
    size=st.integers(0, 6),
    sizes=st.dictionaries(st.sampled_from(list(Priority)), st.integers(0, 4)),
    shares=st.dictionaries(st.sampled_from(list(Priority)), st.floats(0, 1)),
    steps=STEPS,
)
def test_whatever_happens_agrees_with_the_rules(
    slots: int,
    size: int,
    sizes: dict[Priority, int],
    shares: dict[Priority, float],
    steps: list[tuple[str, Any]],
) -> None:
    timeout_s = 5.5

    async def work() -> None:
        queue = PriorityQueue(slots, size, sizes, timeout_s, shares, clock)
        model = Model(
            slots,
            size,
            {p: min(size, sizes.get(p, size)) for p in Priority},
            {p: max(1, int(slots * shares.get(p, 1.0) + 1e-9)) for p in Priority},
            timeout_s,
        )
        held: dict[int, Slot] = {}
        ended: dict[int, str] = {}
        tasks: dict[int, asyncio.Task[None]] = {}

        async def request(name: int, priority: Priority) -> None:
            try:
                slot = await queue.acquire(priority)
            except RequestError as error:
                ended[name] = str(error.reason)
                return
            held[name] = slot

        for name, (step, value) in enumerate(steps):
            if step == "ask":
                tasks[name] = asyncio.create_task(request(name, value))
                model.arrive(name, value, clock())
            elif step == "end" and tasks:
                one = list(tasks)[value % len(tasks)]
                tasks.pop(one).cancel()
                if one in held:
                    held.pop(one).release()
                model.end(one)
            elif step == "time":
                await asyncio.sleep(value)
                model.pass_time(clock())
            await settle()
            stats = queue.stats()
            assert set(held) == set(model.held)
            assert ended == model.ended
            assert stats["waiting"] == len(model.waiting)
            assert stats["in_use"] == len(model.held) <= slots
            for priority in Priority:
                mine = stats["classes"][priority.name.lower()]
                assert mine["in_use"] == model.of(priority) <= model.caps[priority]
                assert mine["waiting"] == sum(w[1] is priority for w in model.waiting)
        for task in tasks.values():
            task.cancel()
        for slot in held.values():
            slot.release()
        await settle()
        for slot in held.values():
            slot.release()
        assert nothing_is_held(queue)

    run(work())


@pytest.mark.parametrize("seed", range(20))
def test_no_slot_is_lost_when_clients_go_away_at_any_moment(seed: int) -> None:
    """As above, but with no rest between the steps: cancelled in the moment of the grant, the eviction, the timeout."""
    chance = random.Random(seed)

    async def work() -> None:
        slots = chance.randint(1, 5)
        queue = PriorityQueue(slots, 10, {BATCH: 4}, 0.5, {BATCH: 0.5, CRITICAL: 0.8}, clock)
        caps = {name: c["slots"] for name, c in queue.stats()["classes"].items()}
        inside: list[Priority] = []
        done = {"served": 0, "refused": 0}

        async def request() -> None:
            priority = chance.choice(list(Priority))
            try:
                with await queue.acquire(priority):
                    inside.append(priority)
                    try:
                        assert len(inside) <= slots
                        assert inside.count(priority) <= caps[priority.name.lower()]
                        for _ in range(chance.randint(0, 3)):
                            await asyncio.sleep(chance.choice([0, 0, 0.1, 0.3]))
                        done["served"] += 1
                    finally:
                        inside.remove(priority)
            except RequestError:
                done["refused"] += 1

        tasks: list[asyncio.Task[None]] = []
        for _ in range(600):
            tasks += [asyncio.create_task(request()) for _ in range(chance.randint(0, 3))]
            for task in chance.sample(tasks, min(len(tasks), chance.randint(0, 2))):
                task.cancel()
            if chance.random() < 0.7:
                await asyncio.sleep(chance.choice([0, 0, 0, 0.1, 0.4]))
            stats = queue.stats()
            assert stats["waiting"] <= 10
            assert stats["classes"]["batch"]["waiting"] <= 4
            assert 0 <= stats["in_use"] <= slots
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [r for r in results if isinstance(r, Exception)]
        assert nothing_is_held(queue)
        assert min(done["served"], done["refused"], queue.evicted, queue.timed_out, queue.gone) > 0
        # And it still works.
        held = [await queue.acquire(HIGH) for _ in range(slots)]
        for slot in held:
            slot.release()

    run(work())


def test_ten_thousand_who_wait_need_one_timer() -> None:
    async def work() -> None:
        queue = admission(queue_size=20_000, timeout_s=1000)

        async def request() -> None:
            (await queue.acquire(BATCH)).release()

        first = await queue.acquire(HIGH)
        tasks = [asyncio.create_task(request()) for _ in range(10_000)]
        await asyncio.sleep(0)
        assert queue.waiting == 10_000
        assert len(asyncio.get_running_loop()._scheduled) == 1  # type: ignore[attr-defined]
        first.release()
        await asyncio.gather(*tasks)
        assert queue.granted == 10_001
        assert nothing_is_held(queue)

    run(work())
