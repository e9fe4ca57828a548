"""What a program in the sandbox may use, and what keeps it in there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Measure(Enum):
    """Something that the kernel may or may not offer."""

    NAMESPACES = "namespaces"
    LANDLOCK = "landlock"
    MOUNTS = "mounts"
    SYSCALLS = "syscalls"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one check may use.

    Attributes:
        wall_seconds: from the start of the first process to the verdict.
        cpu_seconds: of the program, and again of its tests.
        memory_bytes: address space of the program, and again of its tests.
    """

    wall_seconds: float = 20.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Protection:
    """What is in force on this machine, seen by trying.

    Attributes:
        files_hidden: a program can open no file but Python's own library, and none for writing.
        syscalls_filtered: a program has no network, starts no process or thread or other program, signals nobody
            and writes no file.
        namespaces: beside that it has user, process, network, mount and IPC namespaces of its own.
        landlock: version of Landlock in force, 0 for none.
    """

    files_hidden: bool
    syscalls_filtered: bool
    namespaces: bool
    landlock: int

    @property
    def missing(self) -> tuple[str, ...]:
        """What a program could do that it should not be able to; empty where it is safe to run any program."""
        reasons = []
        if not self.files_hidden:
            reasons.append(
                "it could read your files (the kernel offers neither Landlock, since Linux 5.13, nor namespaces)"
            )
        if not self.syscalls_filtered:
            reasons.append(
                "it could reach the network, write files and start processes "
                "(no seccomp filter: none is offered, or none is written for this architecture)"
            )
        return tuple(reasons)

    def __str__(self) -> str:
        parts = [
            f"files: {f'Landlock {self.landlock}' if self.landlock else 'mounts' if self.files_hidden else 'OPEN'}",
            f"system calls: {'filtered' if self.syscalls_filtered else 'OPEN'}",
            f"namespaces: {'own' if self.namespaces else 'shared'}",
        ]
        return ", ".join(parts)
