"""The environment that genlm-control is installed in: its own, so that its requirements touch nobody else's."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

PACKAGE, VERSION = "genlm-control", "0.4.1"
INSTALL_TIMEOUT_SECONDS = 3600.0
# what both sides compute with, which must not differ when they are compared
SAME_VERSIONS = ("torch", "transformers")
COMPLETE = "COMPLETE"
LAST_LINES = 12


class InstallFailed(RuntimeError):
    """The environment could not be made; the message ends with pip's last words."""


def default_folder() -> Path:
    """Where it lies: in ``$FUSIONROUTE_CACHE_DIR``, else ``~/.cache/fusionroute``."""
    cache = Path(os.environ.get("FUSIONROUTE_CACHE_DIR") or "~/.cache/fusionroute").expanduser()
    return cache / "peers" / f"{PACKAGE}-{VERSION}-python{sys.version_info.major}.{sys.version_info.minor}"


def installed_python(folder: Path) -> Path | None:
    """The environment's interpreter; None where it was not made, or not to its end."""
    return folder / "bin" / "python" if (folder / COMPLETE).exists() else None


def constraints() -> list[str]:
    """This environment's versions of what both sides compute with, as pip's constraints; any build of them fits."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in SAME_VERSIONS]


def install(folder: Path, timeout_seconds: float = INSTALL_TIMEOUT_SECONDS) -> Path:
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
        log = folder.with_suffix(".log")
        wanted = folder.with_suffix(".constraints.txt")
        wanted.write_text("\n".join(constraints()) + "\n")
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--constraint", str(wanted)]
        with log.open("w") as output:
            for command in ([sys.executable, "-m", "venv", str(folder)], [*pip, f"{PACKAGE}=={VERSION}"]):
                _run(command, output.fileno(), log, timeout_seconds)
        (folder / COMPLETE).touch()
        return folder / "bin" / "python"


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
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
