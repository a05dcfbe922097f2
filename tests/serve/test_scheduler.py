"""Who runs next: the promise holds for whatever arrives, and every tick is what the rules say."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgate_engine.errors import RequestError
from tgate_serve.line import DEAR
from tgate_serve.scheduler import HEAD_START, MOST_OVERTAKING, PRIORITIES, Busy, Job, Room, Scheduler, Tick

GRAPHS = ("full", "reuse_self", "reuse_cross")
ONE_TO_FOUR = ((1, 4),)


def room(rows: int = 4, batches: tuple[tuple[int, int], ...] = ONE_TO_FOUR, added: float = 0.1) -> Room:
    """Where company costs little, whoever fits comes along."""
    return Room(batches=batches, rows=rows, added=added)


def job(graphs: str = "ffss", size: str = "s", **more: float) -> Job:
    """One letter a step."""
    return Job(size=size, graphs=tuple(graphs), **more)  # type: ignore[arg-type]


def taken(scheduler: Scheduler) -> Tick:
    """The next tick, its steps taken."""
    tick = scheduler.tick()
    assert tick is not None
    scheduler.advance(tick.tickets)
    return tick


def ticks(scheduler: Scheduler) -> list[Tick]:
    """All that is left."""
    made = []
    while scheduler.running + scheduler.waiting:
        made.append(taken(scheduler))
    return made


# --- the promise, over random arrivals ----------------------------------------------------------


@dataclass
class Seen:
    """What a test knows of an image: how many were there before it, and when it came, left, by its own count."""

    came: int
    before: int
    after: int = 0  # of the next MOST_OVERTAKING, those with a priority


JOBS = st.builds(
    Job,
    size=st.sampled_from(["a", "b", "c"]),
    graphs=st.lists(st.sampled_from(GRAPHS), min_size=1, max_size=6).map(tuple),
    priority=st.sampled_from([0, 0, 0, 1, *PRIORITIES]),
)
ROOMS = st.builds(
    Room,
    added=st.sampled_from([0.1, 0.7, 1.0, 1.5]),
    rows=st.integers(1, 6),
    batches=st.sampled_from([((1, 1),), ONE_TO_FOUR, ((1, 2), (4, 4)), ((1, 1), (3, 8))]),
)


@settings(max_examples=150, deadline=None)
@given(
    rooms=st.fixed_dictionaries(dict.fromkeys("abc", ROOMS)),
    patience=st.integers(0, 5),
    rounds=st.lists(st.tuples(st.lists(JOBS, max_size=5), st.integers(0, 9)), min_size=1, max_size=40),
)
def test_nobody_waits_longer_than_promised(
    rooms: dict[str, Room], patience: int, rounds: list[tuple[list[Job], int]]
) -> None:
    """Whatever arrives, and whoever is let go; and at every tick each rule of the scheduler holds."""
    scheduler = Scheduler(rooms, queue=1000, patience=patience)
    seen: dict[int, Seen] = {}
    jobs: dict[int, Job] = {}
    positions: dict[int, int] = {}
    flying: set[int] = set()
    passed: Counter[int] = Counter()
    longest = max((len(job.graphs) for arrived, _ in rounds for job in arrived), default=1)

    def arrive(arrived: list[Job]) -> None:
        for ticket, each in zip(scheduler.submit(arrived), arrived, strict=True):
            for earlier, what in seen.items():
                what.after += each.priority > 0 and ticket - earlier <= MOST_OVERTAKING
            seen[ticket] = Seen(came=scheduler.ticks, before=len(seen))
            jobs[ticket], positions[ticket] = each, 0

    def rowed(tick: Tick) -> set[int]:
        """Who had a row before a tick or found one free."""
        had = (flying - set(tick.joined)) & jobs.keys()
        taken = Counter(jobs[ticket].size for ticket in had)
        return had | {ticket for ticket, each in jobs.items() if taken[each.size] < rooms[each.size].rows}

    def one_tick() -> None:
        tick = scheduler.tick()
        assert (tick is None) == (not jobs)
        if tick is None:
            return
        assert len(set(tick.tickets)) == len(tick.tickets)
        assert any(least <= len(tick.tickets) <= most for least, most in rooms[tick.size].batches)
        flying.update(tick.joined)
        assert flying.issuperset(tick.tickets)
        oldest = min(rowed(tick), key=lambda ticket: (ticket - HEAD_START * jobs[ticket].priority, ticket))
        passed[oldest] += oldest not in tick.tickets
        assert passed[oldest] <= patience * len(jobs[oldest].graphs)
        for ticket in tick.tickets:
            assert (jobs[ticket].size, jobs[ticket].graphs[positions[ticket]]) == (tick.size, tick.graph)
            positions[ticket] += 1
        through = scheduler.advance(tick.tickets)
        assert set(through) == {t for t in tick.tickets if positions[t] == len(jobs[t].graphs)}
        for ticket in through:
            del jobs[ticket], seen[ticket]
        for what in seen.values():
            assert scheduler.ticks - what.came < (what.before + what.after + 1) * longest * (patience + 1)
        for name, line in rooms.items():
            assert sum(1 for t in flying & jobs.keys() if jobs[t].size == name) <= line.rows
        assert scheduler.running == len(flying & jobs.keys())
        assert scheduler.steps_left == sum(len(jobs[t].graphs) - positions[t] for t in jobs)

    for arrived, let_go in rounds:
        arrive(arrived)
        if let_go == 9 and jobs:
            gone = min(jobs)
            assert scheduler.cancel(gone)
            assert not scheduler.cancel(gone)
            del jobs[gone], seen[gone]
        one_tick()
    while jobs:
        one_tick()
    assert scheduler.tick() is None
    assert (scheduler.running, scheduler.waiting, scheduler.steps_left) == (0, 0, 0)


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_the_oldest_waits_as_often_as_patience_says(patience: int) -> None:
    """At every tick somebody comes who is worth waiting for: so often for each step of the oldest, and no longer."""
    scheduler = Scheduler({"s": room(rows=64, batches=((1, 64),))}, patience=patience)
    (first,) = scheduler.submit([job("f" + "c" * 9)])
    taken(scheduler)
    waited = 0
    while True:
        scheduler.submit([job("f" + "c" * 9)])
        if first in taken(scheduler).tickets:
            break
        waited += 1
    assert waited == 10 * patience


@pytest.mark.parametrize("rows", [5, 7])
def test_the_oldest_goes_first_whatever_calls_others_could_fill(rows: int) -> None:
    scheduler = Scheduler({"s": room(rows=rows)}, patience=5)
    scheduler.submit([job("xxx"), *[job("f" * 20)] * 6])
    assert [taken(scheduler).graph for _ in range(4)] == ["x", "x", "x", "f"]


# --- who shares a call --------------------------------------------------------------------------


def test_sizes_come_and_go() -> None:
    scheduler = Scheduler({"s": room(rows=1)}, queue=4)
    with pytest.raises(RequestError, match="size 't' is not served; there is s"):
        scheduler.submit([job(size="t")])
    scheduler.open("t", room(rows=2, added=0.3))
    (first,) = scheduler.submit([job(size="s")])
    tickets = scheduler.submit([job(size="t"), job(size="t")])
    assert not scheduler.close("t"), "they are there"
    assert scheduler.added == {"s": 0.1, "t": 0.3}
    made = ticks(scheduler)
    assert {(tick.size, tick.tickets) for tick in made} == {("s", (first,)), ("t", tickets)}
    assert scheduler.close("t")
    assert scheduler.added == {"s": 0.1}
    assert scheduler.close("t"), "it has gone already"
    with pytest.raises(RequestError, match="size 't' is not served; there is s"):
        scheduler.submit([job(size="t")])
    scheduler.submit([job(size="s")])
    assert len(ticks(scheduler)) == 4


def test_images_at_other_steps_share_a_call() -> None:
    """The first is two steps on when the second comes; both are at f."""
    scheduler = Scheduler({"s": room()})
    (first,) = scheduler.submit([job("fffss")])
    taken(scheduler)
    taken(scheduler)
    (second,) = scheduler.submit([job("fs")])
    assert [tick.tickets for tick in ticks(scheduler)] == [(first, second)] * 2 + [(first,)]


def test_company_is_what_a_call_takes_oldest_first() -> None:
    scheduler = Scheduler({"s": room(rows=8, batches=((1, 1), (3, 3)))})
    tickets = scheduler.submit([job("f")] * 5)
    assert [tick.tickets for tick in ticks(scheduler)] == [tickets[:3], tickets[3:4], tickets[4:]]


@pytest.mark.parametrize(
    ("added", "images", "company"),
    [(0.99, 2, 1), (0.99, 3, 2), (0.99, 6, 3), (0.99, 7, 4), (0.75, 2, 2), (0.1, 4, 4), (1.0, 7, 1), (1e300, 7, 1)],
)
def test_company_is_of_the_older_ones_where_it_costs_something(added: float, images: int, company: int) -> None:
    scheduler = Scheduler({"s": room(rows=8, added=added)})
    tickets = scheduler.submit([job(f"f{own}") for own in range(images)])
    assert taken(scheduler).tickets == tickets[:company]


@pytest.mark.parametrize(("added", "company"), [(0.1, 4), (0.99, 4), (1.0, 1), (2.0, 1)])
def test_who_has_the_same_to_do_stays_to_the_end(added: float, company: int) -> None:
    """However young, unless company saves nothing."""
    scheduler = Scheduler({"s": room(rows=8, added=added)})
    tickets = scheduler.submit([job("x"), *[job("ff")] * 8])
    taken(scheduler)
    assert [taken(scheduler).tickets for _ in range(2)] == [tickets[1 : company + 1]] * 2


@pytest.mark.parametrize(("others", "taken_along"), [(1, 1), (3, 3), (4, 0), (5, 1), (8, 0)])
def test_nobody_is_taken_from_a_call_that_is_full_without_it(others: int, taken_along: int) -> None:
    """Of those that have the same to do, whoever is left over when they go in full calls; at a graph or behind."""
    for program in ("f" * 8 + "b", "g" + "f" * 8 + "b"):
        scheduler = Scheduler({"s": room(rows=32)})
        first, *rest = scheduler.submit([job("f" * 9 + "a"), *[job(program)] * others])
        scheduler.submit([job("x")] * 30)  # more than there are rows for: nobody comes along for a step
        company = {ticket for tick in ticks(scheduler) if first in tick.tickets for ticket in tick.tickets}
        assert company == {first, *rest[others - taken_along :]}


def test_those_left_over_come_along_together_or_not_at_all() -> None:
    scheduler = Scheduler({"s": room(rows=8)})
    scheduler.submit([job("f" * 9)] * 2)
    scheduler.submit([job("f" * 8)] * 3)
    (last,) = scheduler.submit([job("f" * 7)])
    scheduler.submit([job("x")] * 30)
    assert taken(scheduler).tickets == (0, 1, last)


@pytest.mark.parametrize(("added", "company"), [(DEAR - 0.01, 3), (DEAR, 1)])
def test_who_is_at_a_graph_comes_along_for_a_step_where_that_is_cheap(added: float, company: int) -> None:
    """Three fill a call without the first."""
    scheduler = Scheduler({"s": room(rows=8, batches=((1, 3),), added=added)})
    scheduler.submit([job("f"), *[job("fx")] * 3])
    assert len(taken(scheduler).tickets) == company


def test_who_shares_most_comes_along_first() -> None:
    scheduler = Scheduler({"s": room(rows=8, batches=((1, 2),))})
    tickets = scheduler.submit([job("fffc"), job("fx"), job("ffy"), job("fffz")])
    assert taken(scheduler).tickets == (tickets[0], tickets[3])


@pytest.mark.parametrize(("steps", "met"), [(6, True), (5, False)])
def test_who_is_behind_catches_up_where_it_is_worth_it(steps: int, met: bool) -> None:
    """One step for five that are shared then; for four it is not."""
    scheduler = Scheduler({"s": room()})
    (first,) = scheduler.submit([job("f" + "c" * (steps - 1))])
    taken(scheduler)
    (second,) = scheduler.submit([job("f" + "c" * (steps - 1))])
    rest = steps - 1
    together = [(second,)] + [(first, second)] * rest
    assert [tick.tickets for tick in ticks(scheduler)] == (together if met else [(first,)] * rest + [(second,)] * steps)


def test_nobody_catches_up_where_the_oldest_has_no_patience() -> None:
    scheduler = Scheduler({"s": room()}, patience=0)
    (first,) = scheduler.submit([job("f" + "c" * 9)])
    taken(scheduler)
    scheduler.submit([job("f" + "c" * 9)])
    assert taken(scheduler).tickets == (first,)


def test_who_catches_up_takes_others_along() -> None:
    """They share no step with the oldest; and who is where the oldest is stays there with it."""
    scheduler = Scheduler({"s": room(rows=8)})
    first, mate = scheduler.submit([job("f" + "c" * 9)] * 2)
    taken(scheduler)
    behind, other = scheduler.submit([job("f" + "c" * 9), job("fx")])
    assert [taken(scheduler).tickets for _ in range(2)] == [(behind, other), (first, mate, behind)]


def test_whoever_fits_stays_along_while_more_wait_than_there_are_rows_for() -> None:
    scheduler = Scheduler({"s": room(rows=3, added=0.99)})
    scheduler.submit([job("fa"), job("fb"), job("fc"), job("x")])
    assert taken(scheduler).tickets == (0, 1, 2)
    assert scheduler.waiting == 1
    scheduler = Scheduler({"s": room(rows=4, added=0.99)})
    scheduler.submit([job("fa"), job("fb"), job("fc"), job("x")])
    assert taken(scheduler).tickets == (0, 1)  # of four that are there, two


def test_everybody_goes_alone_by_age_where_company_saves_nothing() -> None:
    """Full calls or not, and whoever waits; until it is learned that company does save something."""
    scheduler = Scheduler({"s": room(rows=6, added=1.0)}, queue=10)
    tickets = scheduler.submit([job("xff"), job("f"), *[job("f" * 9)] * 6])
    assert [taken(scheduler).tickets for _ in range(4)] == [(tickets[0],)] * 3 + [(tickets[1],)]
    scheduler.added["s"] = 0.5
    assert taken(scheduler).tickets == tickets[2:6]


def test_sizes_share_nothing() -> None:
    scheduler = Scheduler({"s": room(), "t": room()})
    scheduler.submit([job("ff"), job("ff", "t"), job("ff")])
    assert [(tick.size, len(tick.tickets)) for tick in ticks(scheduler)] == [("s", 2)] * 2 + [("t", 1)] * 2


def test_a_full_size_keeps_no_other_waiting() -> None:
    """The row of s is taken; what waits for it comes before t's image, and t's runs when s's could not."""
    scheduler = Scheduler({"s": room(rows=1), "t": room(rows=1)})
    scheduler.submit([job("ff"), job("f", "t", priority=1), job("f", priority=2)])
    assert [(tick.size, tick.joined) for tick in ticks(scheduler)] == [("s", (2,)), ("t", (1,)), ("s", (0,)), ("s", ())]


def test_an_image_is_given_a_row_with_its_first_step() -> None:
    scheduler = Scheduler({"s": room(rows=2)})
    scheduler.submit([job("ff"), job("g"), job("ff")])
    made = ticks(scheduler)
    assert [tick.joined for tick in made] == [(0, 2), (), (1,)]
    assert [tick.tickets for tick in made] == [(0, 2), (0, 2), (1,)]


@pytest.mark.parametrize(("rows", "runs"), [(1, [(0,)] * 9 + [(1,)] * 10), (2, [(1,)] + [(0, 1)] * 9)])
def test_the_last_row_is_for_the_oldest(rows: int, runs: list[tuple[int, ...]]) -> None:
    """Whoever catches up with it before its first step finds one besides."""
    scheduler = Scheduler({"s": room(rows=rows)})
    scheduler.submit([job("f" * 9), job("g" + "f" * 9)])
    assert [tick.tickets for tick in ticks(scheduler)] == runs


def test_the_last_row_is_anybodys_once_the_oldest_has_its_own() -> None:
    scheduler = Scheduler({"s": room(rows=2)})
    (first,) = scheduler.submit([job("f" + "c" * 9)])
    taken(scheduler)
    second, _ = scheduler.submit([job("f" + "c" * 9), job("f" + "c" * 8)])
    assert [taken(scheduler).tickets for _ in range(2)] == [(second,), (first, second)]


# --- priorities, deadlines, cancels -------------------------------------------------------------


def test_a_priority_is_a_head_start() -> None:
    """Of 16 places for each: it overtakes those, and not the ones that came before them."""
    scheduler = Scheduler({"s": room(rows=1)}, queue=100)
    scheduler.submit([job("f")] * 20)
    (hurried,) = scheduler.submit([job("f", priority=1)])
    order = [tick.tickets[0] for tick in ticks(scheduler)]
    assert order.index(hurried) == 5  # ticket 20 stands where 4 does, behind it
    assert [ticket for ticket in order if ticket != hurried] == list(range(20))


def test_what_nobody_wants_any_more_is_let_go() -> None:
    scheduler = Scheduler({"s": room(rows=1)})
    tickets = scheduler.submit([job("ff", deadline=5.0), job("ff", deadline=3.0), job("ff")])
    taken(scheduler)
    assert scheduler.expired(3.0) == ()
    assert scheduler.expired(4.0) == (tickets[1],)
    assert scheduler.expired(9.0) == (tickets[0],)
    assert [tick.tickets for tick in ticks(scheduler)] == [(tickets[2],)] * 2
    assert scheduler.expired(99.0) == ()


def test_a_cancelled_image_frees_its_row_and_touches_nobody() -> None:
    scheduler = Scheduler({"s": room(rows=2)})
    first, second, third = scheduler.submit([job("ffff"), job("ffff"), job("ffff")])
    taken(scheduler)
    assert scheduler.ahead(third) == 0
    assert scheduler.cancel(first)
    tick = taken(scheduler)
    assert (tick.tickets, tick.joined) == ((second, third), (third,))
    assert [tick.tickets for tick in ticks(scheduler)] == [(second, third)] * 2 + [(third,)]


def test_the_place_in_the_queue() -> None:
    scheduler = Scheduler({"s": room(rows=1), "t": room(rows=1)})
    tickets = scheduler.submit([job(), job(), job(size="t"), job(), job(priority=1)])
    taken(scheduler)
    assert (scheduler.running, scheduler.waiting) == (1, 4)
    assert [scheduler.ahead(ticket) for ticket in tickets] == [0, 1, 0, 2, 0]  # the last one has overtaken all of s


# --- what is refused ----------------------------------------------------------------------------


def test_who_is_on_the_way_counts_as_waiting_and_not_as_ones_own() -> None:
    """Two requests of what there is at most: the second one has come too early, not asked for too much."""
    scheduler = Scheduler({"s": room(rows=1)}, queue=1)
    scheduler.check_room("s", 2)
    with pytest.raises(Busy, match="1 places, and 2 more are wanted"):
        scheduler.check_room("s", 2, entering=2)
    with pytest.raises(RequestError, match="may have 2 images here, got 3"):
        scheduler.check_room("s", 3)


def test_those_that_have_a_row_at_the_next_tick_take_no_place_of_other_sizes() -> None:
    scheduler = Scheduler({"s": room(rows=2), "t": room(rows=1)}, queue=1)
    scheduler.submit([job(), job()])
    scheduler.check_room("t", 2)
    scheduler.submit([job(size="t")] * 2)
    with pytest.raises(Busy):
        scheduler.check_room("t", 1)


def test_a_full_queue_refuses_and_says_how_long() -> None:
    """All of a request or none of it; what finds a row needs no place."""
    scheduler = Scheduler({"s": room(rows=2)}, queue=3)
    scheduler.submit([job("f" * 10)] * 4)
    with pytest.raises(Busy, match="3 places, and 1 more are wanted") as busy:
        scheduler.submit([job(), job()])
    assert busy.value.steps == 10
    assert scheduler.waiting + scheduler.running == 4
    scheduler.submit([job()])
    taken(scheduler)
    with pytest.raises(Busy):
        scheduler.submit([job()])
    scheduler.cancel(0)
    scheduler.submit([job()])


@pytest.mark.parametrize(
    ("jobs", "says"),
    [
        ([job(size="x")], "size 'x' is not served; there is s"),
        ([job("")], "at least 1 step .* got 0 steps"),
        ([job(priority=10)], "priority from 0 to 9; .* priority 10"),
        ([job()] * 9, "may have 8 images here, got 9"),
    ],
)
def test_a_request_that_never_fits(jobs: list[Job], says: str) -> None:
    scheduler = Scheduler({"s": room()}, queue=4)
    with pytest.raises(RequestError, match=says):
        scheduler.submit(jobs)
    assert scheduler.waiting == 0


def test_what_is_no_scheduler() -> None:
    for arguments in ({"queue": 0}, {"patience": -1}):
        with pytest.raises(RequestError, match="a queue of at least 1 and a patience of at least 0"):
            Scheduler({"s": room()}, **arguments)
    with pytest.raises(RequestError, match="needs a size"):
        Scheduler({})
    with pytest.raises(RequestError, match="at least 1 row, got 0"):
        room(rows=0)
    with pytest.raises(RequestError, match="takes 2 to 4 images at once, and a server needs to run one image alone"):
        room(batches=((2, 4),))
    for added in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="a share above 0"):
            room(added=added)


# --- what it costs ------------------------------------------------------------------------------


def test_a_tick_with_256_images_costs_little() -> None:
    """0.2 ms at most; the median, since this machine is shared."""
    scheduler = Scheduler({name: room(rows=64, batches=((1, 8),)) for name in "abcd"}, queue=300)
    costs = []
    for turn in range(600):
        while scheduler.running + scheduler.waiting < 300:
            gate = 4 + turn % 7
            scheduler.submit([job("fffss"[: gate % 5 + 1] * gate + "c" * gate, "abcd"[turn % 4], priority=turn % 2)])
            turn += 1
        begin = time.perf_counter()
        taken(scheduler)
        costs.append(time.perf_counter() - begin)
    assert scheduler.running + scheduler.waiting > 256
    assert sorted(costs)[len(costs) // 2] < 0.2e-3
