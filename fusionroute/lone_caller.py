"""Whether one session has something to itself, so that nothing is gained by waiting for others to share with."""

from __future__ import annotations

from dataclasses import dataclass

ALONE_STEPS = 8
"""So often in a row has a session come that is thought to be alone."""


@dataclass(slots=True)
class LoneCaller:
    """Which session came last, and how often in a row."""

    session_id: str = ""
    num_in_a_row: int = 0

    def came(self, session_id: str) -> None:
        """A session steps."""
        if session_id != self.session_id:
            self.session_id, self.num_in_a_row = session_id, 0
        self.num_in_a_row += 1

    def is_(self, session_id: str) -> bool:
        """Whether it is this session, and nobody has come between its last steps."""
        return session_id == self.session_id and self.num_in_a_row >= ALONE_STEPS
