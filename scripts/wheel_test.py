"""Builds the wheel, installs it beside the environment's dependencies, uses it from outside the checkout.

The editable install hides what a wheel lacks: modules that no package lists, data files, console scripts.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fusionroute", "expert_service", "router_service", "trainer", "evaluation")
PROGRAMS = ("fusionroute", "expert-service", "router-service")
DEADLINE_SECONDS = 180

IMPORT_ALL = """
import importlib, pathlib, pkgutil, sys
home = pathlib.Path(sys.prefix).resolve()
seen = 0
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in [name, *(found.name for found in pkgutil.walk_packages(package.__path__, name + "."))]:
        if module.endswith("__main__"):
            continue
        path = pathlib.Path(importlib.import_module(module).__file__).resolve()
        assert home in path.parents, f"{module} comes from {path}, not from the wheel"
        seen += 1
print(f"{seen} modules import from the wheel")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command; its output is shown when it fails."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def expected_files() -> set[str]:
    """What git knows or would know under the packages and `presets`; all of it belongs into the wheel."""
    folders = (*PACKAGES, "presets")
    listing = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *folders, cwd=ROOT)
    present = {line for line in listing.splitlines() if (ROOT / line).is_file()}
    return {f"fusionroute/{line}" if line.startswith("presets/") else line for line in present}


def build_wheel(scratch: Path) -> Path:
    """The wheel, built with what the environment has."""
    command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(scratch / "dist"), str(ROOT)]
    run(sys.executable, *command, cwd=scratch)
    (wheel,) = (scratch / "dist").glob("*.whl")
    return wheel


def check_content(wheel: Path) -> None:
    """Every file of the packages is inside, and nothing else but metadata."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = expected_files()
    missing, surplus = sorted(expected - inside), sorted(inside - expected)
    if missing or surplus:
        sys.exit(f"the wheel lacks {missing} and should not have {surplus}")
    print(f"{wheel.name}: {len(inside)} files")


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """A new environment with the wheel alone; dependencies come from this one. Returns its bin folder."""
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # A plain path line: the .pth files over there, the editable install among them, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet", "--no-deps",
        "--no-index", "--ignore-installed", wheel, cwd=folder)  # fmt: skip
    return folder / "bin"


def main() -> None:
    """Exits with a message when something is wrong."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        wheel = build_wheel(scratch)
        check_content(wheel)
        programs = fresh_environment(scratch / "venv", wheel)
        print(run(programs / "python", "-c", IMPORT_ALL, *PACKAGES, cwd=scratch).strip())
        for program in PROGRAMS:
            text = run(programs / program, "--help", cwd=scratch)
            if "Usage:" not in text:
                sys.exit(f"{program} --help printed {text!r}")
        print(f"--help of {', '.join(PROGRAMS)}: fine")


if __name__ == "__main__":
    main()
