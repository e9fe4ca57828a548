"""What the project says about itself is so."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts import stubs

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def files_of_the_project() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): pinned for name, pinned in pairs}


def test_a_changed_a_missing_and_a_surplus_stub_are_stale():
    committed = {"a_pb2.py": b"old", "same_pb2.py": b"=", "surplus_pb2.py": b"x"}
    fresh = {"a_pb2.py": b"new", "same_pb2.py": b"=", "missing_pb2.py": b"y"}
    assert stubs.stale_files(committed, fresh) == ["a_pb2.py", "missing_pb2.py", "surplus_pb2.py"]
    assert stubs.stale_files(fresh, fresh) == []


def test_the_changelog_tells_of_the_version_and_it_is_the_installed_one():
    declared = PYPROJECT["project"]["version"]
    assert f"## [{declared}]" in (ROOT / "CHANGELOG.md").read_text()
    assert version("fusionroute") == declared


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    pinned = pins()
    wanted = [Requirement(text) for text in requires("fusionroute") or ()]
    wanted += [Requirement(text) for text in PYPROJECT["build-system"]["requires"]]
    assert wanted
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{requirement.name} is not in constraints.txt: run `make constraints`"
        assert requirement.specifier.contains(pinned[name]), f"{requirement} does not allow {pinned[name]}"


def test_the_stub_generator_is_pinned_exactly():
    tools = [Requirement(text) for text in PYPROJECT["project"]["optional-dependencies"]["dev"]]
    (grpcio_tools,) = [tool for tool in tools if tool.name == "grpcio-tools"]
    assert str(grpcio_tools.specifier) == f"=={pins()['grpcio-tools']}"


def test_pins_bear_no_local_label_so_that_any_build_of_a_release_fits():
    assert [name for name, pinned in pins().items() if "+" in pinned] == []


def test_every_package_is_shipped_and_checked():
    packages = sorted(path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
    assert sorted(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == packages
    assert sorted(PYPROJECT["tool"]["importlinter"]["root_packages"]) == packages
    assert set(packages) <= set(PYPROJECT["tool"]["mypy"]["files"])
    assert all((ROOT / package / "py.typed").exists() for package in packages)


def test_no_file_names_the_machine_it_was_written_on():
    # Spelled in two parts, so that this file passes.
    machine = re.compile(
        "|".join("/" + place + r"/\w" for place in ("work", "root", "home", "Users", "opt/pypi"))
    )
    for path in files_of_the_project():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found = machine.search(text)
        assert found is None, f"{path} says {found.group()!r}"


def test_nothing_is_left_for_later():
    marks = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "raise NotImplemented" + "Error")))
    for path in files_of_the_project():
        is_fake = "tests" in path.parts  # a fake may refuse what its test does not need
        if path.suffix in {".py", ".lua", ".proto", ".sh"} and "v1" not in path.parts and not is_fake:
            found = marks.search(path.read_text())
            assert found is None, f"{path} says {found.group()!r}"
