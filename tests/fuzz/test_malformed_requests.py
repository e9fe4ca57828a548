"""Whatever a caller sends: no crash, no hang, no blame on the service, and the next caller is served as before.

python -m tests.fuzz --count 10000        the long run, with its table
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from fusionroute.grpc_runtime import channel
from fusionroute.v1.router_pb2 import GenerateRequest, SamplingParameters, TokenIds
from tests.fuzz.fuzzing import fuzz
from tests.fuzz.health import is_serving
from tests.fuzz.targets import SERVICES, valid_requests
from tests.served_stack import Family, Stack, make_family, served

SHORT_COUNT = 300
NORMAL = GenerateRequest(
    token_ids=TokenIds(ids=[3, 4, 5]), sampling=SamplingParameters(max_tokens=12, ignore_eos=True)
)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder: Path = tmp_path_factory.mktemp("family")
    return make_family(folder, ("math", "strings"))


@pytest_asyncio.fixture
async def stack(family: Family) -> AsyncIterator[Stack]:
    async with served(family) as running:
        yield running


@pytest.mark.parametrize("service", SERVICES)
async def test_malformed_requests_hurt_nobody_but_their_caller(service: str, stack: Stack) -> None:
    before = await stack.answer(NORMAL)
    instance = stack.router.directory.best("math")
    assert instance is not None
    address = instance.entry.address if service == "expert" else stack.router.server.address
    async with channel(address) as open_channel:
        tally = await fuzz(
            open_channel, SERVICES[service], valid_requests(service, instance.entry.model), SHORT_COUNT
        )
        assert await is_serving(open_channel)
    assert not tally.faults, tally.faults
    assert not tally.num_hanging
    assert len(tally.statuses) > 6
    assert (await stack.answer(NORMAL)).ids == before.ids
