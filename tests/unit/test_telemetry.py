"""Logs: one JSON object a line, bound to the service, tracebacks without the values of variables."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import structlog

from fusionroute.telemetry import configure_logs


def fail(prompt: str) -> None:
    raise ValueError("broken")


def test_events_and_library_warnings_are_json_lines_of_the_service(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("door", log_format="json")
    structlog.get_logger().info("opened", guest="Ann")
    logging.getLogger("a.library").warning("rusty %s", "hinge")
    opened, rusty = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (opened["event"], opened["guest"], opened["service"], opened["level"]) == (
        "opened", "Ann", "door", "info",
    )  # fmt: skip
    assert opened["timestamp"].endswith("Z")
    assert (rusty["event"], rusty["service"], rusty["level"]) == ("rusty hinge", "door", "warning")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_shows_code_but_no_values(capsys: pytest.CaptureFixture[str], log_format: Any) -> None:
    configure_logs("door", log_format=log_format)
    try:
        fail("my secret" + " prompt")
    except ValueError:
        structlog.get_logger().exception("failed")
    text = capsys.readouterr().err
    assert "ValueError: broken" in text
    assert "in fail" in text
    assert "my secret prompt" not in text


def test_events_below_the_level_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("door", log_format="json", log_level="warning")
    structlog.get_logger().info("whisper")
    structlog.get_logger().warning("shout")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["shout"]
