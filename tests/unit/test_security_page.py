"""docs/security.md: its commands make files that work, its settings exist, its numbers are those of the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from expert_service import checks
from expert_service.settings import ExpertSettings
from fusionroute import api_keys, grpc_runtime
from fusionroute.access import API_KEY_VARIABLE, ClientAccess, ServerAccess, TlsFiles
from fusionroute.private_redis import address_of, connect
from fusionroute.settings import SHARED_VARIABLES
from router_service import registry_servicer, request_limits, sampling_request, turn_request
from router_service.settings import RouterSettings
from trainer.checkpoint_rpcs import MOST_CHECKPOINTS
from trainer.jobs.job_rpcs import MOST_CONFIG_CHARACTERS, MOST_JOBS
from trainer.settings import TrainerSettings

PAGE = (Path(__file__).resolve().parents[2] / "docs/security.md").read_text()
SERVICES = (ExpertSettings, RouterSettings, TrainerSettings)
VARIABLES = {f"{each.prefix()}{name.upper()}" for each in SERVICES for name in each.model_fields}
EVENTS = {"open_to_the_network", "files_not_taken", "files_read_again", "caller"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the page's commands leave in the environment, run in a folder of its own."""
    if shutil.which("openssl") is None or shutil.which("bash") is None:
        pytest.skip("needs openssl and bash")
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL))
    bare = {name: value for name, value in os.environ.items() if not name.startswith("FUSIONROUTE_")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"{commands}\nenv -0"],
        cwd=tmp_path_factory.mktemp("page"), env=bare, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return dict(entry.split("=", 1) for entry in done.stdout.decode().split("\0") if "=" in entry)


def test_the_keys_it_makes_are_accepted(environment: dict[str, str]) -> None:
    accepted = Path(environment["FUSIONROUTE_API_KEYS_FILE"])
    keys = api_keys.ApiKeys(accepted)
    assert keys.name_of(Path(environment["FUSIONROUTE_API_KEY_FILE"]).read_bytes().strip()) == "services"
    shop = (accepted.parent / "shop.key").read_text().strip()
    assert keys.name_of(shop.encode()) == "shop" and shop not in accepted.read_text()


def test_the_certificates_it_makes_connect_both_ends(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SHARED_VARIABLES:
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    settings = ExpertSettings.load({"model": "m"})
    assert ServerAccess.of(settings).require_client and ClientAccess.from_environment().is_encrypted


async def test_its_stack_is_served_over_tls_with_keys(environment: dict[str, str]) -> None:
    files = TlsFiles(*(Path(environment[f"FUSIONROUTE_TLS_{part}"]) for part in ("CERT", "KEY", "CA")))
    access = ClientAccess.from_environment(environment)
    keys = api_keys.ApiKeys(Path(environment["FUSIONROUTE_API_KEYS_FILE"]))
    async with (
        grpc_runtime.server([], access=ServerAccess(files, keys)) as running,
        grpc_runtime.channel(running.address, access=access) as opened,
    ):
        listing = reflection_pb2_grpc.ServerReflectionStub(opened).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
        )
        assert [answer async for answer in listing]


def test_the_url_of_redis_it_makes_is_one(environment: dict[str, str]) -> None:
    assert address_of(connect(environment["REDIS_URL"])) == "redis://:***@redis:6379/0"
    folder = Path(environment["FUSIONROUTE_API_KEYS_FILE"]).parent
    assert (folder / "redis.conf").read_text().split()[1] in environment["REDIS_URL"]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_every_setting_and_variable_it_names_exists() -> None:
    prose = re.sub(r"```sh\n.*?```", "", PAGE, flags=re.DOTALL)
    known = {name for each in SERVICES for name in each.model_fields} | EVENTS
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", prose))
    assert named <= known, named - known
    variables = set(re.findall(r"FUSIONROUTE_[A-Z_]+[A-Z]", PAGE))
    assert variables <= VARIABLES | set(SHARED_VARIABLES) | {API_KEY_VARIABLE}
    assert set(SHARED_VARIABLES.values()) <= known


def test_its_numbers_are_those_of_the_code() -> None:
    for number in (
        api_keys.MAX_KEYS, api_keys.MIN_KEY_CHARACTERS, api_keys.MAX_KEY_CHARACTERS,
        grpc_runtime.MAX_CONCURRENT_STREAMS, request_limits.CHARACTERS_PER_TOKEN, request_limits.MAX_MESSAGES,
        sampling_request.MAX_STOPS, sampling_request.MAX_STOP_CHARACTERS, sampling_request.MAX_LOGIT_BIASES,
        turn_request.MAX_TOP_CANDIDATES, checks.MAX_DRAFT_TOKENS, checks.MAX_BATCH_TOKENS, checks.MOST_LISTED,
        checks.MAX_SEQUENCES, registry_servicer.MAX_ADDRESS_CHARACTERS, MOST_CHECKPOINTS, MOST_JOBS,
        MOST_CONFIG_CHARACTERS, grpc_runtime.MAX_MESSAGE_BYTES // 2**20, int(grpc_runtime.HANDSHAKE_TIMEOUT_SECONDS),
    ):  # fmt: skip
        assert re.search(rf"(?<![\d,]){number:,}(?![\d,]\d)", PAGE), number
