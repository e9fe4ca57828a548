"""The files of the playground: nothing from elsewhere, and signs that everybody can tell apart."""

from __future__ import annotations

import re

import pytest

from router_service.http.playground import read_assets

ASSETS = read_assets()
STYLES = ASSETS["page.css"].body.decode() + ASSETS["answers.css"].body.decode()


def test_nothing_in_the_files_is_inline_or_comes_from_elsewhere():
    page = ASSETS["index.html"].body.decode()
    assert re.findall(r"<script(?![^>]* src=)", page) == []
    assert re.findall(r"<style|\sstyle=|\son[a-z]+=|javascript:", page) == []
    for name, asset in ASSETS.items():
        addresses = set(re.findall(r"""(?:https?:)?//[\w.-]+\.\w+[^"'\s]*""", asset.body.decode()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name


def luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (
        each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def scheme(name: str) -> dict[str, str]:
    """The colours of "light" or "dark"."""
    light, _, dark = STYLES.partition("@media (prefers-color-scheme: dark)")
    text = light if name == "light" else dark
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", text))


@pytest.mark.parametrize("name", ["light", "dark"])
def test_colours_can_be_told_from_paper_and_text_can_be_read(name):
    colours = scheme(name)
    experts = [colour for key, colour in colours.items() if key.startswith("color-")]
    assert len(experts) == 9
    assert all(contrast(colour, colours["paper"]) >= 4.5 for colour in experts)
    for ink in ("ink", "soft", "bad"):
        assert contrast(colours[ink], colours["paper"]) >= 4.5
        assert contrast(colours[ink], colours["raised"]) >= 4.5
    assert contrast(colours["accent"], colours["on-accent"]) >= 4.5


def test_every_expert_has_an_underline_of_its_own_so_that_colour_is_not_the_only_sign():
    lines = re.findall(r"--line: ([^;]+);", STYLES)
    assert len(lines) == 9
    assert len(set(lines)) == 9
