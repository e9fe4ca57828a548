"""The environment that genlm-control is installed in."""

from __future__ import annotations

from pathlib import Path

from evaluation import environments
from evaluation.environments import COMPLETE, InstallFailed, installed_python

__all__ = [
    "COMPLETE",
    "PACKAGE",
    "VERSION",
    "InstallFailed",
    "constraints",
    "default_folder",
    "install",
    "installed_python",
]

PACKAGE, VERSION = "genlm-control", "0.4.1"
# what both sides compute with, which must not differ when they are compared
SAME_VERSIONS = ("torch", "transformers")


def default_folder() -> Path:
    """Where it lies, in the cache folder."""
    return environments.folder_of("peers", PACKAGE, VERSION)


def constraints() -> list[str]:
    """This environment's versions of what both sides compute with."""
    return environments.same_versions(SAME_VERSIONS)


def install(folder: Path) -> Path:
    """Makes the environment unless it is there, and gives its interpreter. Raises InstallFailed."""
    return environments.install(folder, [f"{PACKAGE}=={VERSION}"], constraints())
