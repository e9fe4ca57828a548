"""Settings: who overrides whom, and errors that name field, value, origin and limit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner
from pydantic import Field, ValidationError

from expert_service.settings import ExpertSettings
from fusionroute.settings import DaemonSettings, SettingsError, daemon_command


class DoorSettings(DaemonSettings):
    """A daemon that watches a door."""

    table: ClassVar[str] = "trainer"
    other_variables: ClassVar[Mapping[str, str]] = {"BELL_URL": "bell_url"}

    keyhole: str = Field(description="What it looks through.")
    bell_url: str | None = Field(default=None, max_length=9, description="Where it rings.")
    num_locks: int = Field(default=3, ge=1, le=9, description="Locks on it.")
    open_at_night: bool = Field(default=False, description="Whether guests may come late.")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSIONROUTE_CONFIG", raising=False)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_options_override_environment_overrides_file_overrides_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(tmp_path / "c.toml", '[trainer]\nkeyhole = "file"\nnum_locks = 4\nport = 1\n')
    monkeypatch.setenv("FUSIONROUTE_TRAINER_NUM_LOCKS", "5")
    monkeypatch.setenv("FUSIONROUTE_TRAINER_PORT", "2")
    settings = DoorSettings.load({"port": "3", "host": None}, config)
    assert (settings.keyhole, settings.num_locks, settings.port) == ("file", 5, 3)
    assert settings.host == "127.0.0.1"


def test_the_environment_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path / "c.toml", '[trainer]\nkeyhole = "file"\n[expert]\nslot = "math"\n')
    monkeypatch.setenv("FUSIONROUTE_CONFIG", str(config))
    assert DoorSettings.load().keyhole == "file"


def test_a_further_variable_fills_its_field_unless_the_own_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BELL_URL", "shared")
    assert DoorSettings.load({"keyhole": "k"}).bell_url == "shared"
    monkeypatch.setenv("FUSIONROUTE_TRAINER_BELL_URL", "own")
    assert DoorSettings.load({"keyhole": "k"}).bell_url == "own"


def test_a_bad_value_is_blamed_on_the_variable_that_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BELL_URL", "much too long")
    with pytest.raises(SettingsError, match=r"from the environment variable BELL_URL"):
        DoorSettings.load({"keyhole": "k"})
    monkeypatch.setenv("FUSIONROUTE_TRAINER_BELL_URL", "also too long")
    with pytest.raises(SettingsError, match=r"from the environment variable FUSIONROUTE_TRAINER_BELL_URL"):
        DoorSettings.load({"keyhole": "k"})


def test_settings_constructed_by_hand_ignore_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONROUTE_TRAINER_NUM_LOCKS", "5")
    monkeypatch.setenv("NUM_LOCKS", "5")
    assert DoorSettings(keyhole="k").num_locks == 3


def test_settings_cannot_be_changed() -> None:
    settings = DoorSettings(keyhole="k")
    with pytest.raises(ValidationError, match="frozen"):
        settings.num_locks = 4


def test_a_value_out_of_limits_is_named_with_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONROUTE_TRAINER_NUM_LOCKS", "10")
    with pytest.raises(
        SettingsError, match=r"num_locks = '10' .*FUSIONROUTE_TRAINER_NUM_LOCKS.*less than or equal to 9"
    ):
        DoorSettings.load({"keyhole": "k"})


def test_every_bad_field_has_a_line_of_its_own() -> None:
    with pytest.raises(SettingsError) as caught:
        DoorSettings.load({"port": "70000", "num_locks": "many"})
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["port", "keyhole", "num_locks"]
    assert "--port" in lines[0]
    assert "--keyhole, FUSIONROUTE_TRAINER_KEYHOLE" in lines[1]


def test_infinite_seconds_are_refused() -> None:
    with pytest.raises(SettingsError, match="drain_seconds = 'inf'"):
        DoorSettings.load({"keyhole": "k", "drain_seconds": "inf"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[trainer]\nkeyhole = "k"\nnum_loks = 4\n', r"num_loks .*c\.toml.* did you mean num_locks"),
        ("[trainr]\nnum_locks = 4\n", r"trainr in .* is not a table.* did you mean trainer"),
        ("trainer = 3\n", r"must be a table: \[trainer\]"),
        ("[trainer\n", "is not valid TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DoorSettings.load({}, write(tmp_path / "c.toml", text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml' cannot be read: No such file"):
        DoorSettings.load({}, tmp_path / "nowhere.toml")


def test_an_unknown_variable_with_our_prefix_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONROUTE_TRAINER_NUM_LOCK", "4")
    with pytest.raises(SettingsError, match=r"FUSIONROUTE_TRAINER_NUM_LOCK .* did you mean num_locks"):
        DoorSettings.load({"keyhole": "k"})


def test_the_command_line_has_an_option_for_each_field_with_its_default() -> None:
    command = daemon_command("door", "Watches.", DoorSettings, lambda settings: 0)
    text = CliRunner().invoke(command, ["--help"]).output
    for name, field in DoorSettings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description
    assert "FUSIONROUTE_TRAINER_PORT" in text


def test_the_command_exits_with_2_and_names_the_bad_value() -> None:
    command = daemon_command("door", "Watches.", DoorSettings, lambda settings: 0)
    result = CliRunner().invoke(command, ["--keyhole", "k", "--num-locks", "0"])
    assert result.exit_code == 2
    assert "door: num_locks = '0' (from --num-locks) is not allowed" in result.output


def test_an_expert_that_registers_must_name_its_slot() -> None:
    with pytest.raises(SettingsError, match="slot is missing"):
        ExpertSettings.load({"model": "m", "router": "localhost:1"})


def test_an_expert_on_all_addresses_must_say_where_it_is_reached() -> None:
    options = {"model": "m", "slot": "math", "router": "localhost:1", "host": "0.0.0.0"}
    with pytest.raises(SettingsError, match=r"advertise is missing: .* host = '0\.0\.0\.0'"):
        ExpertSettings.load(options)
    assert ExpertSettings.load(options | {"advertise": "math:50061"}).advertise == "math:50061"


@pytest.mark.parametrize(
    ("field", "value"),
    [("slot", "Math"), ("router", "no-port"), ("device", "abacus"), ("dtype", "int8"), ("kv_tokens", "0")],
)
def test_a_bad_expert_setting_is_named(field: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{field} = '{value}'"):
        ExpertSettings.load({"model": "m", field: value})
