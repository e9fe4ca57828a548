"""Which task runs next when several wait for each other: pure decisions, no processes.

    seed 1   base -> math, strings, format -> router -> preferences -> variants ...
    seed 2   base -> ...

Of the tasks that may run, the one comes first on which the longest chain of others waits; so while one family has a
single stage to run, others keep the remaining workers busy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work.

    Attributes:
        key: its name, its own in the graph.
        seconds: about how many CPU seconds it takes; only proportions count.
        after: keys of the tasks that must be done before.
    """

    key: str
    seconds: float
    after: frozenset[str] = frozenset()


class TaskGraph:
    """Tasks that are waiting, running and done.

    Args:
        tasks: in an order in which each comes after those that it waits for; of equally urgent ones the first is first.

    Raises:
        ValueError: two tasks have one key, or a task waits for one that does not come before it.
    """

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = list(tasks)
        self._done: set[str] = set()
        self._begun: set[str] = set()
        known: set[str] = set()
        for task in self._tasks:
            if task.key in known or not task.after <= known:
                raise ValueError(
                    f"task {task.key!r} is there twice, or waits for a task that does not come before it"
                )
            known.add(task.key)
        self._urgency = _longest_chains(self._tasks)

    @property
    def is_done(self) -> bool:
        """Whether nothing is waiting or running."""
        return len(self._done) == len(self._tasks)

    def begin(self) -> str | None:
        """The most urgent task that may run now, from now on running; None if all wait or run."""
        ready = [task.key for task in self._tasks if task.key not in self._begun and task.after <= self._done]
        if not ready:
            return None
        chosen = max(ready, key=lambda key: self._urgency[key])
        self._begun.add(chosen)
        return chosen

    def finish(self, key: str) -> None:
        """A running task is done."""
        assert key in self._begun - self._done, key
        self._done.add(key)


def _longest_chains(tasks: list[Task]) -> dict[str, float]:
    """Seconds from the beginning of each task to the end of the longest chain that it opens."""
    chains: dict[str, float] = {}
    for task in reversed(tasks):
        behind = (chains[other.key] for other in tasks if task.key in other.after)
        chains[task.key] = task.seconds + max(behind, default=0.0)
    return chains
