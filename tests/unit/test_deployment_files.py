"""Image and compose files keep their promises; what only a docker engine can tell is tested with one."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from fusionroute.settings import SHARED_VARIABLES, ServiceSettings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
GPU: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())
SECURE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.secure.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def settings_classes() -> list[type[ServiceSettings]]:
    from expert_service.settings import ExpertSettings
    from router_service.settings import RouterSettings
    from trainer.settings import TrainerSettings

    return [ExpertSettings, RouterSettings, TrainerSettings]


def test_only_router_and_trainer_and_what_watches_them_are_published_and_only_on_loopback():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"router", "router-2", "trainer", "prometheus", "grafana"}
    assert all(SERVICES[name]["profiles"] == ["watch"] for name in ("prometheus", "grafana"))
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_the_router_reads_what_the_trainer_publishes_and_cannot_change_it():
    router, trainer = SERVICES["router"], SERVICES["trainer"]
    published = trainer["environment"]["FUSIONROUTE_TRAINER_CHECKPOINTS_DIR"]
    assert router["environment"]["FUSIONROUTE_ROUTER_CHECKPOINTS_DIR"] == published
    assert "checkpoints:/checkpoints:ro" in router["volumes"] and published.startswith("/checkpoints/")
    assert "checkpoints:/checkpoints" in trainer["volumes"]
    same = "REDIS_URL"
    assert (
        router["environment"][f"FUSIONROUTE_ROUTER_{same}"]
        == trainer["environment"][f"FUSIONROUTE_TRAINER_{same}"]
    )


def test_what_is_not_published_has_no_way_out():
    assert COMPOSE["networks"]["inside"] == {"internal": True}
    for name, service in SERVICES.items():
        assert service["networks"] == (["inside", "outside"] if "ports" in service else ["inside"]), name


@pytest.mark.parametrize("name", SERVICES)
def test_a_container_has_no_more_rights_than_it_needs(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert 0 < service["pids_limit"] <= 1024
    assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & set(service)


def test_memory_can_be_limited_by_variables():
    limits = {name: service["mem_limit"] for name, service in SERVICES.items() if "mem_limit" in service}
    assert set(limits) >= {name for name in SERVICES if name.startswith("expert-")} | {
        "router",
        "trainer",
        "redis",
    }
    assert all(re.fullmatch(r"\$\{[A-Z]+_MEMORY:-0\}", limit) for limit in limits.values())


def test_the_secure_stack_tells_every_daemon_the_same_and_by_files():
    daemons = {name for name in SERVICES if name.startswith(("expert-", "router"))} | {"trainer"}
    assert set(SECURE["services"]) == daemons | {"redis"}
    for name in daemons:
        service = SECURE["services"][name]
        given = {
            variable: value
            for variable, value in service["environment"].items()
            if variable in SHARED_VARIABLES
        }
        assert set(given) == set(SHARED_VARIABLES) - {"FUSIONROUTE_TLS_REQUIRE_CLIENT"}
        assert {Path(path).name for path in given.values()} == set(service["secrets"])
        assert set(service["secrets"]) <= set(SECURE["secrets"])
    assert all(set(secret) == {"file"} for secret in SECURE["secrets"].values())


def test_redis_has_its_password_from_a_file_and_the_daemons_theirs_from_the_operator():
    redis = SECURE["services"]["redis"]
    assert redis["command"][:2] == ["redis-server", "/run/secrets/redis_conf"]
    for name in ("router", "trainer"):
        variable = f"FUSIONROUTE_{name.upper()}_REDIS_URL"
        assert SERVICES[name]["environment"][variable].startswith("${REDIS_URL:-redis://redis:6379")
        assert SECURE["services"][name]["environment"][variable].startswith("${REDIS_URL:?")


def test_prometheus_scrapes_the_watch_port_of_every_daemon_and_no_daemon_publishes_it():
    scraped = {
        target
        for job in yaml.safe_load((ROOT / "monitoring/prometheus.yml").read_text())["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    }
    daemons = [name for name in SERVICES if name.startswith("expert-") or name in ("router", "trainer")]
    for name in daemons:
        variables = SERVICES[name]["environment"]
        (port,) = (value for variable, value in variables.items() if variable.endswith("_WATCH_PORT"))
        assert f"{name}:{port}" in scraped
        assert not any(port in published for published in SERVICES[name].get("ports", []))
    assert len(scraped) == len(daemons)


def test_what_watches_is_pinned_and_not_root():
    for name in ("prometheus", "grafana"):
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])
        assert SERVICES[name]["user"] not in ("root", "0")


def test_models_are_mounted_read_only_where_they_are_served():
    for name, service in SERVICES.items():
        mounts = [volume for volume in service["volumes"] if volume.split(":")[-1] == "/models"]
        assert bool(mounts) == (name == "models"), f"{name} can write to the models"


def test_every_long_lived_container_has_a_health_check():
    assert {name for name, service in SERVICES.items() if "healthcheck" not in service} == {"models"}


def test_every_setting_in_the_compose_files_exists():
    known = {
        f"{settings.prefix()}{name.upper()}"
        for settings in settings_classes()
        for name in settings.model_fields
    } | set(SHARED_VARIABLES)
    given = {
        variable
        for compose in (COMPOSE, GPU, SECURE)
        for service in compose["services"].values()
        for variable in service.get("environment", {})
        if not variable.startswith("GF_")  # Grafana's own
    }
    assert given
    assert given <= known


def test_every_expert_and_the_router_have_a_gpu_of_their_own():
    names = {name for name in SERVICES if name.startswith("expert-") or name == "router"}
    assert set(GPU["services"]) == names
    devices = []
    for service in GPU["services"].values():
        (reservation,) = service["deploy"]["resources"]["reservations"]["devices"]
        devices += re.findall(r":-(\d+)}", " ".join(reservation["device_ids"]))
    assert sorted(devices) == ["0", "1", "2", "3"]


def test_the_image_holds_every_package_and_runs_as_nobody_special():
    dockerfile = (ROOT / "Dockerfile").read_text()
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = (ROOT / ".dockerignore").read_text()
    for package in pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert f"COPY {package} " in dockerfile
        assert f"!{package}\n" in shipped
    last_stage = dockerfile.rpartition("\nFROM ")[2]
    assert re.search(r"(?m)^USER (?!root)\w+$", last_stage)


def test_ci_is_the_makefile():
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "run: .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()
