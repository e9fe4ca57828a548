"""Generates fusionroute/v1 from protos/, or with --check says whether it is stale."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = Path("protos/fusionroute/v1")
STUBS = Path("fusionroute/v1")
# `common` has no service; the plugin would write an empty module for it.
WITHOUT_SERVICE = ("common",)


def generate(target: Path) -> None:
    """Writes the stubs under ``target``/fusionroute/v1; raises CalledProcessError when protoc complains."""
    sources = sorted(str(path) for path in (ROOT / PROTOS).glob("*.proto"))
    command = [
        sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}",
        f"--python_out={target}", f"--mypy_out=quiet:{target}",
        f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}",
    ]  # fmt: skip
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    subprocess.run([*command, *sources], check=True, cwd=ROOT, env=environment, timeout=120)
    for name in WITHOUT_SERVICE:
        for path in (target / STUBS).glob(f"{name}_pb2_grpc.py*"):
            path.unlink()


def stubs_in(folder: Path) -> dict[str, bytes]:
    """Name and content of each generated file in ``folder``."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*_pb2*.py*"))}


def stale_files(committed: dict[str, bytes], fresh: dict[str, bytes]) -> list[str]:
    """Names that differ, are missing, or should not be there."""
    return sorted(name for name in committed.keys() | fresh.keys() if committed.get(name) != fresh.get(name))


def main() -> int:
    """Exit code 1 when --check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the stubs are stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        stale = stale_files(stubs_in(ROOT / STUBS), stubs_in(Path(scratch) / STUBS))
        if not check:
            for name in stale:
                fresh = Path(scratch) / STUBS / name
                if fresh.exists():
                    shutil.copy(fresh, ROOT / STUBS / name)
                else:
                    (ROOT / STUBS / name).unlink()
    verb = "stale, run `make protos`:" if check else "written:"
    print(f"{verb} {', '.join(stale)}" if stale else "stubs are fresh")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
