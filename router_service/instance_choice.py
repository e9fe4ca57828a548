"""Which instance of a slot a session asks. Pure: instances come in as views of themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum


class Standing(IntEnum):
    """What the registry thinks of an instance; the lower the better."""

    READY = 0
    FINISHING = 1
    """Drains; the turns that it takes part in stay with it to their end."""
    MIGRATING = 2
    """Drains; everybody leaves at the next token if there is somewhere to go."""
    VANISHED = 3
    """No longer listed, but has not said goodbye: the registry may have lost its memory."""
    STANDBY = 4
    """Asked by nobody until it is swapped in."""


@dataclass(frozen=True, slots=True)
class View:
    """An instance, as far as the choice depends on it.

    Attributes:
        name: differs between instances and between their restarts.
        epoch: the slot's epoch under which it serves.
        is_let_in: whether its breaker allows one more call.
        is_suspect: it failed a moment ago.
        load: steps that run or wait there, about.
    """

    name: str
    standing: Standing
    epoch: int
    is_let_in: bool = True
    is_suspect: bool = False
    load: float = 0.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What a session brings along.

    Attributes:
        home: the instance that its running turn asked last.
        former_home: the one that an earlier turn asked last.
        cached_length: tokens that an instance has cached, by name.
        floor: the highest epoch of the slot that the turn has used; it never goes back behind that.
    """

    home: str | None = None
    former_home: str | None = None
    cached_length: Callable[[str], int] = lambda name: 0
    floor: int = 0


NEW_SESSION = Wish()


def can_be_asked(view: View, floor: int) -> bool:
    """Whether an instance may be asked at all by a turn that has used the epoch `floor` of its slot."""
    return view.is_let_in and view.standing is not Standing.STANDBY and view.epoch >= floor


def choose(views: Iterable[View], wish: Wish, draw: Callable[[], float]) -> View | None:
    """The instance to ask; None when nobody can be asked.

    One that has not just failed comes before one that has, ready ones before others, the newest weights before older
    ones, then the one that has most of the session cached, then the least loaded.

    Args:
        draw: from [0, 1), so that sessions which begin together spread over instances of equal load.
    """
    usable = [view for view in views if can_be_asked(view, wish.floor)]
    return min(usable, key=lambda view: _order(view, wish, draw), default=None)


def _order(
    view: View, wish: Wish, draw: Callable[[], float]
) -> tuple[bool, bool, Standing, int, bool, int, float]:
    stays = view.name == wish.home and view.standing is Standing.FINISHING
    return (
        view.is_suspect,
        not stays,
        view.standing,
        -view.epoch,
        view.name != (wish.home or wish.former_home),
        -wish.cached_length(view.name),
        view.load + draw(),
    )
