"""Environments for other people's packages: each its own, so that its requirements touch nobody else's."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

INSTALL_TIMEOUT_SECONDS = 3600.0
COMPLETE = "COMPLETE"
LAST_LINES = 12


class InstallFailed(RuntimeError):
    """The environment could not be made; the message ends with pip's last words."""


def folder_of(kind: str, package: str, version: str) -> Path:
    """Where an environment lies: in ``$FUSIONROUTE_CACHE_DIR``, else ``~/.cache/fusionroute``."""
    cache = Path(os.environ.get("FUSIONROUTE_CACHE_DIR") or "~/.cache/fusionroute").expanduser()
    return cache / kind / f"{package}-{version}-python{sys.version_info.major}.{sys.version_info.minor}"


def installed_python(folder: Path) -> Path | None:
    """The environment's interpreter; None where it was not made, or not to its end."""
    return folder / "bin" / "python" if (folder / COMPLETE).exists() else None


def same_versions(names: Sequence[str]) -> list[str]:
    """Our own versions of packages, as pip's constraints; any build of them fits."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]


def install(
    folder: Path,
    requirements: Sequence[str],
    constraints: Sequence[str] = (),
    timeout_seconds: float = INSTALL_TIMEOUT_SECONDS,
) -> Path:
    """Makes the environment unless it is there, with pip as configured on this machine, and gives its interpreter.

    Raises:
        InstallFailed: pip or venv failed, or took longer than the timeout; pip's log stays beside the folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        found = installed_python(folder)
        if found is not None:
            return found
        shutil.rmtree(folder, ignore_errors=True)
        log, wanted = _beside(folder, ".log"), _beside(folder, ".constraints.txt")
        wanted.write_text("".join(f"{line}\n" for line in constraints))
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--constraint", str(wanted)]
        with log.open("w") as output:
            for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, *requirements]):
                _run(command, output.fileno(), log, timeout_seconds)
        (folder / COMPLETE).touch()
        return folder / "bin" / "python"


def _beside(folder: Path, ending: str) -> Path:
    """A file next to the folder; `with_suffix` would take the end of a version for one."""
    return folder.with_name(folder.name + ending)


def _run(command: list[str], output: int, log: Path, timeout_seconds: float) -> None:
    try:
        done = subprocess.run(command, stdout=output, stderr=output, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        raise InstallFailed(
            f"{' '.join(command)} took longer than {timeout_seconds:.0f} s; see {log}"
        ) from None
    if done.returncode:
        last = "\n".join(log.read_text().splitlines()[-LAST_LINES:])
        raise InstallFailed(f"{' '.join(command)} ended with {done.returncode}; see {log}\n{last}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until nobody else makes the same environment."""
    with _beside(folder, ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
