"""Which stage runs next: what waits is done before, and the longest chain goes first."""

from __future__ import annotations

import heapq

import pytest

from trainer.lab_family.graph import Task, TaskGraph


def family(seed: int) -> list[Task]:
    """The stages of a family with three variants, in CPU seconds."""
    chain = [("base", 42, ()), ("math", 27, ("base",)), ("strings", 27, ("base",)), ("format", 27, ("base",))]
    chain += [("router", 40, ("math", "strings", "format")), ("preferences", 25, ("router",))]
    chain += [(f"variant-{number}", 10, ("preferences",)) for number in range(3)]
    return [
        Task(f"{seed}/{name}", seconds, frozenset(f"{seed}/{other}" for other in after))
        for name, seconds, after in chain
    ]


def wall_seconds(tasks: list[Task], num_workers: int) -> float:
    """How long so many workers take."""
    graph, seconds = TaskGraph(tasks), {task.key: task.seconds for task in tasks}
    now = 0.0
    running: list[tuple[float, str]] = []
    while not graph.is_done:
        while len(running) < num_workers and (key := graph.begin()) is not None:
            heapq.heappush(running, (now + seconds[key], key))
        now, key = heapq.heappop(running)
        graph.finish(key)
    return now


def test_nothing_begins_before_what_it_waits_for() -> None:
    graph = TaskGraph(family(1))
    assert graph.begin() == "1/base"
    assert graph.begin() is None
    graph.finish("1/base")
    begun = {graph.begin() for _ in range(3)}
    assert begun == {"1/math", "1/strings", "1/format"}
    for key in begun:
        assert graph.begin() is None
        graph.finish(str(key))
    assert graph.begin() == "1/router"


def test_three_families_keep_two_workers_busy() -> None:
    tasks = [task for seed in (1, 2, 3) for task in family(seed)]
    work = sum(task.seconds for task in tasks)
    assert wall_seconds(tasks, 2) <= 1.05 * work / 2
    assert wall_seconds(tasks, 1) == work


def test_the_longest_chain_goes_first() -> None:
    graph = TaskGraph([Task("short", 1), Task("a", 2), Task("b", 9, frozenset({"a"})), Task("long", 5)])
    assert [graph.begin() for _ in range(3)] == ["a", "long", "short"]


@pytest.mark.parametrize(
    "tasks",
    [
        [Task("a", 1), Task("a", 1)],
        [Task("a", 1, frozenset({"b"})), Task("b", 1)],
        [Task("a", 1, frozenset({"a"}))],
    ],
)
def test_tasks_twice_or_in_a_circle_are_refused(tasks: list[Task]) -> None:
    with pytest.raises(ValueError, match="task 'a' is there twice, or waits"):
        TaskGraph(tasks)
