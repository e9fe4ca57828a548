"""What every launcher can do. Its methods block; who has an event loop calls them in a thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

NUM_LOG_LINES = 25


class LaunchFailed(Exception):
    """An expert cannot be started, or has ended; the message says why, for people.

    Attributes:
        log_tail: the last lines it wrote.
    """

    def __init__(self, message: str, log_tail: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log_tail = list(log_tail)


@dataclass(frozen=True, slots=True)
class Launch:
    """An expert to start, on standby.

    Attributes:
        slot: of the router's checkpoint.
        model: a folder or hub id, as the started expert sees it.
        router: host:port, or several with commas between them, where nothing that runs tells a better one.
        device: where the model runs; empty = where that of the slot's other expert does.
    """

    slot: str
    model: str
    router: str
    device: str = ""


@dataclass(frozen=True, slots=True)
class Launched:
    """An expert that was started, by the name under which its launcher finds it again."""

    name: str


class Launcher(Protocol):
    """Starts experts and stops them, whoever started them as long as it was in the same way."""

    def start(self, launch: Launch) -> Launched:
        """Starts an expert; returns before it serves. Raises LaunchFailed."""

    def address_of(self, launched: Launched) -> str:
        """host:port as the expert registers it; empty until that is known."""

    def check(self, launched: Launched) -> None:
        """Returns while the expert runs; raises LaunchFailed, with its last words, once it has ended."""

    def log_tail(self, launched: Launched) -> list[str]:
        """The last lines that the expert has written."""

    def keep(self, launched: Launched) -> None:
        """The expert has taken its place: whatever watches over the others shall watch over it too."""

    def reach(self, address: str) -> str:
        """host:port at which this process reaches an expert that is registered at `address`."""

    def find(self, address: str) -> Launched | None:
        """The expert that is registered at `address`; None if it is not one of this launcher's."""

    def stop(self, launched: Launched, deadline_seconds: float) -> None:
        """Asks an expert to end, and ends it after the deadline. One that has ended is no error."""
