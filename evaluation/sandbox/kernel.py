"""What the Linux kernel offers a process to give up rights for good; everything here is for the process itself."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Sequence

from evaluation.sandbox.syscalls import filter_program, is_known

_libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_NEWNS, _NEWUTS, _NEWIPC = 0x00020000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_FILE_RIGHTS_BY_ABI = (13, 14, 15, 15, 16)  # how many rights over files each version of Landlock knows
_NET_RIGHTS, _SCOPES = 0b11, 0b11  # bind and connect TCP; abstract sockets and signals to the outside


class NotOffered(OSError):
    """The kernel does not offer it, or not to this process."""


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise NotOffered(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, value: int, more: object = 0) -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(value), more, 0, 0), f"prctl({option})")


def die_with(parent: int) -> None:
    """Be killed when the parent dies; exits at once if it is dead already. `parent` is 0 for one outside our view."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def become_unreadable() -> None:
    """Processes of the same user may no longer look into this one's memory, nor find it under /proc."""
    _prctl(_PR_SET_DUMPABLE, 0)


def drop_capabilities() -> None:
    """Give up what root may do, for good."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _checked(_libc.syscall(_SYS_CAPSET[os.uname().machine], header, nothing), "capset")


def limit(*, cpu_seconds: int, memory_bytes: int) -> None:
    """Limits of this process: time on a CPU, memory; no file may grow, no memory be dumped."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))  # beside the filter; root is exempt
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))


def enter_namespaces() -> None:
    """Users, processes (from the next child on), network, mounts, messages and host name of one's own.

    Raises:
        NotOffered: not here, for example in a container; nothing has changed then.
    """
    user, group = os.geteuid(), os.getegid()
    flags = _NEWUSER | _NEWPID | _NEWNET | _NEWNS | _NEWIPC | _NEWUTS
    _checked(_libc.unshare(flags), "unshare")
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        _write(f"/proc/self/{name}", line)


def _write(path: str, line: str) -> None:
    """Write a line, if this process may: without a map its user has no name in there, which nothing here needs."""
    try:
        file = os.open(path, os.O_WRONLY)
        os.write(file, line.encode())
        os.close(file)
    except OSError:
        return


def hide_files(readable: Sequence[str]) -> None:
    """A root folder in which there is nothing but `readable`; needs `enter_namespaces`.

    Raises:
        NotOffered: not to this process.
    """
    sources = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in readable]
    root = b"/tmp"
    _mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE)
    _mount(b"none", root, b"tmpfs", 0)
    for path, source in sources:
        target = os.fsdecode(root) + path
        if os.path.isdir(f"/proc/self/fd/{source}"):  # noqa: PTH112 - as above
            os.makedirs(target, exist_ok=True)  # noqa: PTH103 - as above
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120 - as above
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        _mount(f"/proc/self/fd/{source}".encode(), target.encode(), None, _MS_BIND | _MS_REC)
        os.close(source)
    os.chroot(root)
    os.chdir("/")


def _mount(source: bytes, target: bytes, kind: bytes | None, flags: int) -> None:
    _checked(_libc.mount(source, target, kind, ctypes.c_ulong(flags), None), f"mount {target.decode()}")


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _BeneathPath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def landlock(readable: Sequence[str]) -> int:
    """Allow reading below `readable`, and nothing else with any file; no TCP; no signals to the outside.

    Returns:
        The version of Landlock, which says what of this the kernel knows: network from 4, signals from 6 on.

    Raises:
        NotOffered: a kernel without Landlock, or one that does not let this process use it.
    """
    version = _checked(_libc.syscall(_SYS_LANDLOCK_CREATE, None, 0, 1), "Landlock")
    num_rights = _FILE_RIGHTS_BY_ABI[min(version, len(_FILE_RIGHTS_BY_ABI)) - 1]
    rules = _Ruleset(
        (1 << num_rights) - 1, _NET_RIGHTS if version >= 4 else 0, _SCOPES if version >= 6 else 0
    )
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _checked(_libc.syscall(_SYS_LANDLOCK_CREATE, ctypes.byref(rules), size, 0), "Landlock")
    for path in readable:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rights = _READ_FILE | _READ_FOLDER if os.path.isdir(path) else _READ_FILE  # noqa: PTH112 - as above
        rule = _BeneathPath(rights, folder)
        _checked(_libc.syscall(_SYS_LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0), f"Landlock of {path}")
        os.close(folder)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _checked(_libc.syscall(_SYS_LANDLOCK_RESTRICT, ruleset, 0), "Landlock")
    os.close(ruleset)
    return version


class _Program(ctypes.Structure):
    _fields_ = (("num_lines", ctypes.c_ushort), ("lines", ctypes.c_char_p))


def filter_syscalls() -> None:
    """Nothing but the calls of `syscalls` from now on.

    Raises:
        NotOffered: an architecture without a list, or a kernel without filters.
    """
    machine = os.uname().machine
    if not is_known(machine):
        raise NotOffered(0, f"no list of system calls for {machine}")
    lines = filter_program(machine)
    program = _Program(len(lines) // 8, lines)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, 2, ctypes.byref(program))
