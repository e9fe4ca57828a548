"""Certificates, keys and secrets in settings: where they come from, what stops the start, what is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import structlog
from click.testing import CliRunner
from pydantic import SecretStr

from expert_service.settings import ExpertSettings
from fusionroute.access import ClientAccess, child_environment, warn_if_open
from fusionroute.settings import SHARED_VARIABLES, DaemonSettings, SettingsError, daemon_command
from router_service.settings import RouterSettings
from tests.certificates import Authority
from trainer.jobs.child import JobProcess
from trainer.jobs.folder import JobFolder
from trainer.settings import TrainerSettings

KEY = "kT0m5Qb8-shop-shop-shop-shop"
PASSWORD = "geheim-geheim"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SHARED_VARIABLES, "FUSIONROUTE_CONFIG", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("service", [ExpertSettings, RouterSettings, TrainerSettings])
def test_every_daemon_reads_the_shared_variables_and_its_own_come_first(
    service: type[DaemonSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    required = {"model": "m"} if service is ExpertSettings else {"checkpoint": "c"} if service is RouterSettings else {}
    for variable in SHARED_VARIABLES:
        monkeypatch.setenv(variable, "false" if "REQUIRE" in variable else f"/shared/{variable}")
    monkeypatch.setenv(f"{service.prefix()}API_KEY_FILE", "/own")
    settings = service.load(required)
    assert settings.tls_cert == Path("/shared/FUSIONROUTE_TLS_CERT") and not settings.tls_require_client
    assert settings.api_keys_file == Path("/shared/FUSIONROUTE_API_KEYS_FILE")
    assert settings.api_key_file == Path("/own")
    if service is not ExpertSettings:
        monkeypatch.setenv("REDIS_URL", "redis://r")
        assert service.load(required).redis_url == SecretStr("redis://r")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--tls-cert", "{one}.pem"], "tls_key = None is not allowed: tls_cert = "),
        (["--tls-key", "{one}.key"], "tls_cert = None is not allowed: tls_key = "),
        (["--tls-ca", "{ca}"], "tls_cert = None is not allowed: tls_ca = "),
        (["--tls-cert", "{one}.pem", "--tls-key", "{two}.key"], "is not the unencrypted PEM key"),
        (["--tls-cert", "/nowhere", "--tls-key", "{two}.key"], "tls_cert = '/nowhere' cannot be read"),
        (["--api-keys-file", "/nowhere"], "api_keys_file = '/nowhere' cannot be read"),
        (["--api-keys-file", "{empty}"], "has no key in it"),
        (["--api-key-file", "{broken}"], "api_key_file: line 1 of"),
    ],
)
def test_what_does_not_fit_stops_the_start_and_is_named(tmp_path: Path, options: list[str], named: str) -> None:
    authority = Authority(tmp_path)
    for name in ("one", "two"):
        authority.issue(name)
    (tmp_path / "empty").write_text("# nobody\n")
    (tmp_path / "broken").write_text(f"{KEY} {KEY}\n")
    places = {name: str(tmp_path / name) for name in ("one", "two", "empty", "broken")} | {"ca": str(authority.ca)}
    command = daemon_command("door", "Watches.", ExpertSettings, lambda settings: pytest.fail("started"))
    result = CliRunner().invoke(command, ["--model", "m", *(option.format(**places) for option in options)])
    assert result.exit_code == 2
    assert result.output.startswith("door: ") and named in result.output
    assert KEY not in result.output


@pytest.mark.parametrize(
    ("host", "secured", "without"),
    [
        ("127.0.0.1", False, None),
        ("localhost", False, None),
        ("::1", False, None),
        ("0.0.0.0", False, 2),
        ("10.0.0.7", False, 2),
        ("10.0.0.7", True, None),
    ],
)
def test_a_daemon_that_anybody_may_call_says_so(host: str, secured: bool, without: int | None) -> None:
    paths = {name: Path("x") for name in ("tls_cert", "tls_key", "api_keys_file")} if secured else {}
    with structlog.testing.capture_logs() as logs:
        warn_if_open(ExpertSettings(model="m", host=host, **paths))  # type: ignore[arg-type]
    assert [len(entry["without"]) for entry in logs] == ([] if without is None else [without])


def test_no_error_about_settings_tells_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", f"redis://:{PASSWORD}@h")
    for options in (
        {"job_heartbeat_seconds": "60"},  # a rule about several fields: pydantic shows all of them
        {"port": "x"},
        {"no_such": "1"},
    ):
        with pytest.raises(SettingsError) as caught:
            TrainerSettings.load(options)
        assert PASSWORD not in str(caught.value)
    assert "job_heartbeat_seconds = 60 is too long" in message_of({"job_heartbeat_seconds": "60"})
    assert PASSWORD not in repr(TrainerSettings.load({}))


def test_a_secret_of_the_wrong_kind_is_not_shown() -> None:
    with pytest.raises(SettingsError, match=r"redis_url = \*\*\* \(from --redis-url\)") as caught:
        TrainerSettings.load({"redis_url": {"password": PASSWORD}})
    assert PASSWORD not in str(caught.value)


def message_of(options: dict[str, str]) -> str:
    with pytest.raises(SettingsError) as caught:
        TrainerSettings.load(options)
    return str(caught.value)


async def test_a_jobs_process_shows_what_its_trainer_shows(tmp_path: Path) -> None:
    authority, keys_file = Authority(tmp_path / "authority"), tmp_path / "keys"
    keys_file.write_text(f"{KEY}\n")
    files = authority.issue("trainer")
    given: dict[str, Any] = {
        "tls_cert": files.certificate,
        "tls_key": files.key,
        "tls_ca": files.ca,
        "api_key_file": keys_file,
        "api_keys_file": tmp_path / "accepted",
    }
    settings = TrainerSettings(**given)
    folder = JobFolder(tmp_path / "job")
    folder.path.mkdir()
    program = (sys.executable, "-c", "import os; print(*sorted(f'{k}={v}' for k, v in os.environ.items()), sep='\\n')")
    process = await JobProcess.start(program, folder, child_environment(settings))
    assert await process.wait() == 0
    told = dict(line.split("=", 1) for line in folder.log.read_text().splitlines() if line.startswith("FUSIONROUTE_"))
    access = ClientAccess.from_environment(told)
    assert access.is_encrypted and access.metadata() == (("authorization", f"Bearer {KEY}"),)
    assert KEY not in folder.log.read_text() and "FUSIONROUTE_API_KEYS_FILE" not in told
