"""The environment that lm-evaluation-harness is installed in; without torch, for servers compute."""

from __future__ import annotations

from pathlib import Path

from evaluation import environments

PACKAGE, VERSION = "lm-eval", "0.4.13"
REQUIREMENTS = (f"{PACKAGE}[api]=={VERSION}", "transformers")


def default_folder() -> Path:
    """Where it lies, in the cache folder."""
    return environments.folder_of("harness", PACKAGE, VERSION)


def install(folder: Path) -> Path:
    """Makes the environment unless it is there, and gives its interpreter. Raises InstallFailed."""
    return environments.install(
        folder, REQUIREMENTS, environments.same_versions(["transformers", "tokenizers"])
    )
