"""The system calls that a program in the sandbox may make: those that compute, and no others.

A list of what is allowed, not of what is forbidden: a call that a later kernel brings is refused. Left out on
purpose are all that start a process or thread or program (fork, clone, execve), reach another process (kill,
ptrace, process_vm_*, pidfd_*), a network (socket, connect, io_uring_*), or change a file (openat for writing, mkdir,
unlink, rename, truncate, chmod, memfd_create), and all that change what a process may (setuid, unshare, mount, bpf,
keyctl, prctl, setsid).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

# Numbers on x86_64 and on aarch64; None where an architecture has no such call.
_COMPUTING: dict[str, tuple[int | None, int | None]] = {
    # the most frequent ones first: the filter looks at them in this order
    "futex": (202, 98),
    "read": (0, 63),
    "write": (1, 64),
    "newfstatat": (262, 79),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "close": (3, 57),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "getdents64": (217, 61),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "stat": (4, None),
    "lstat": (6, None),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getcwd": (79, 17),
    "fadvise64": (221, 223),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "select": (23, None),
    "pselect6": (270, 72),
    "poll": (7, None),
    "ppoll": (271, 73),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "membarrier": (324, 283),
    "rseq": (334, 293),
    "set_robust_list": (273, 99),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "getitimer": (36, 102),
    "setitimer": (38, 103),  # of the process itself
    "alarm": (37, None),
    "pause": (34, None),
    "getrandom": (318, 278),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "wait4": (61, 260),
    "exit": (60, 93),
    "exit_group": (231, 94),
}

# Calls of which some are allowed, by one of their arguments: number on x86_64 and aarch64, index of the argument.
_WRITING_FLAGS = 0x1 | 0x2 | 0x40 | 0x200 | 0x400000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_TMPFILE
_WITHOUT_FLAGS = {"openat": (257, 56, 2, _WRITING_FLAGS), "open": (2, None, 1, _WRITING_FLAGS)}
_WITH_VALUES = {
    # duplicating, close-on-exec, reading flags; F_SETOWN and O_ASYNC would send signals to other processes
    "fcntl": (72, 25, 1, (0, 1, 2, 3, 1030)),
    "ioctl": (16, 29, 1, (0x5401, 0x5413)),  # "is it a terminal?", "how wide?"
    "prlimit64": (302, 261, 0, (0,)),  # its own limits, not those of another process
}

# architecture as uname names it -> (which column above, AUDIT_ARCH_... of linux/audit.h)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | 1  # the last: EPERM
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_X32_BIT = 0x40000000  # the second table of calls on x86_64, whose numbers mean others


def is_known(machine: str) -> bool:
    """Whether there is a filter for this architecture, named as by `os.uname`."""
    return machine in _ARCHITECTURES


def filter_program(machine: str) -> bytes:
    """The filter as an array of ``struct sock_filter``.

    Raises:
        KeyError: of an architecture that is not known.
    """
    column, audit_name = _ARCHITECTURES[machine]
    lines = [
        _line(_LOAD, _ARCHITECTURE_AT),
        _line(_EQUAL, audit_name, 1, 0),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER_AT),
        _line(_AT_LEAST, _X32_BIT, 0, 1),
        _line(_RETURN, _KILL),
    ]
    for numbers in _COMPUTING.values():
        if (number := numbers[column]) is not None:
            lines += [_line(_EQUAL, number, 0, 1), _line(_RETURN, _ALLOW)]
    for *both, argument, forbidden_bits in _WITHOUT_FLAGS.values():
        if (number := both[column]) is not None:
            test = [_line(_ANY_BIT, forbidden_bits, 1, 0), _line(_RETURN, _ALLOW), _line(_RETURN, _REFUSE)]
            lines += _of_argument(number, argument, test)
    for x86_number, arm_number, argument, values in _WITH_VALUES.values():
        test = [line for value in values for line in (_line(_EQUAL, value, 0, 1), _line(_RETURN, _ALLOW))]
        lines += _of_argument((x86_number, arm_number)[column], argument, [*test, _line(_RETURN, _REFUSE)])
    return b"".join([*lines, _line(_RETURN, _REFUSE)])


def _of_argument(number: int, argument: int, test: Iterable[bytes]) -> list[bytes]:
    """`test`, which ends in a return, on the low half of an argument of the call `number`."""
    block = [_line(_LOAD, _ARGUMENTS_AT + 8 * argument), *test]
    return [_line(_EQUAL, number, 0, len(block)), *block]


def _line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
