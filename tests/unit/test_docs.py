"""The documentation tells what is there."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from docs import generate, picture, picture_states
from fusionroute.engine.digest import digest
from fusionroute.errors import Reason

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PACKAGES = ("fusionroute", "expert_service", "router_service", "trainer", "evaluation")


def shell_lines(page: Path) -> list[str]:
    """The command lines of a page's shell blocks, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def programs() -> dict[str, click.Command]:
    import expert_service.cli
    import fusionroute.cli
    import router_service.cli

    return {
        "fusionroute": fusionroute.cli.main,
        "expert-service": expert_service.cli.main,
        "router-service": router_service.cli.main,
    }


def assert_it_parses(command: click.Command, words: list[str]) -> None:
    """Fails unless click finds the command and every option of it, without running anything."""
    while isinstance(command, click.Group):
        name = words.pop(0)
        child = command.get_command(click.Context(command), name)
        assert child is not None, f"there is no command {name!r} in {command.name!r}"
        command = child
    known = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert given <= known | {"--help"}, f"{command.name} has no {sorted(given - known)}"


def test_every_command_line_of_the_readme_is_understood():
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    tools = programs()
    seen = set()
    for line in shell_lines(ROOT / "README.md"):
        program, *words = shlex.split(line, comments=True)
        seen.add(program)
        if program == "make":
            assert words[0] in targets, line
        elif program in tools:
            assert_it_parses(tools[program], words)
        else:
            assert program == ".", f"nobody checks {line!r}"
    assert {"make", *tools} <= seen


def test_a_wrong_option_in_a_command_line_would_be_noticed():
    with pytest.raises(AssertionError, match="--no-such-option"):
        assert_it_parses(programs()["fusionroute"], ["generate", "--no-such-option", "x"])


def test_every_command_shows_an_example():
    for path, text in generate.command_helps():
        leaf = not re.search(r"(?m)^Commands:$", text)
        assert not leaf or "Example" in text, f"`{path} --help` has no example"


def test_the_architecture_page_names_every_module_and_none_that_is_gone():
    page = (ROOT / "docs/architecture.md").read_text()
    listed = set(re.findall(r"(?m)^\| `([\w.]+)` \|", page))
    there = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if "v1" not in parts and (parts[-1] != "__init__" or path.stat().st_size):
                there.add(".".join(parts).removesuffix(".__init__"))
    assert listed == there, "run `make docs`"
    mentioned = set(re.findall(r"`((?:fusionroute|router_service|expert_service)\.[\w.]+)`", page))
    assert mentioned <= there | {"fusionroute.v1"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_pictures_are_what_their_scripts_draw():
    assert (ROOT / "docs/picture.svg").read_text() == picture.drawing()
    assert (ROOT / "docs/six_states.svg").read_text() == picture_states.drawing()


def test_every_reason_has_a_meaning():
    assert set(generate.MEANING) == set(Reason)


def test_the_protocol_page_names_only_reasons_that_exist():
    page = (ROOT / "docs/protocol.md").read_text()
    named = set(re.findall(r"/ ([A-Z]+(?:_[A-Z]+)+)", page))
    assert named
    assert named <= {reason.name for reason in Reason}


def test_the_digests_on_the_protocol_page_are_right():
    page = (ROOT / "docs/protocol.md").read_text()
    rows = re.findall(r"(?m)^\| ([\d, ]+|none) \| `(0x[0-9a-f]{16})` \|$", page)
    assert len(rows) >= 3
    for tokens, value in rows:
        ids = [] if tokens == "none" else [int(token) for token in tokens.split(",")]
        assert digest(ids) == int(value, 16)


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.toml")), ids=lambda path: path.stem)
def test_a_preset_names_experts_by_slot_and_a_start_for_the_router(path):
    preset = tomllib.loads(path.read_text())
    assert preset["name"] == path.stem
    assert set(preset["experts"]) == {"math", "code", "instruct"}
    hub_ids = [preset["router_init"], *preset["experts"].values()]
    assert all(re.fullmatch(r"[\w-]+/[\w.-]+", hub_id) for hub_id in hub_ids)
    assert preset["router_init"] == preset["experts"]["instruct"]
