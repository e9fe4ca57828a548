"""Whatever is sent to a watch port: no 5xx, no hang, and probes are answered meanwhile and afterwards."""

from __future__ import annotations

import asyncio

import pytest

from tests.fuzz.http_fuzzing import (
    HALVES,
    Complaints,
    exchange,
    fuzz_http,
    is_live,
    normal_answers,
    silent_connections,
    watched_daemon,
)
from tests.fuzz.http_requests import KEY

SHORT_COUNT = 300
FOR_EVER_SECONDS = 600.0


async def test_malformed_http_hurts_nobody_but_its_sender() -> None:
    async with watched_daemon() as address:
        before = await normal_answers(address)
        assert {answer.split()[1] for answer in before} == {b"200"}
        tally = await fuzz_http(address, SHORT_COUNT)
        assert await is_live(address)
        assert await normal_answers(address) == before
    assert not tally.faults, tally.faults
    assert not tally.num_hanging
    assert {"200", "400", "401", "404", "405", "closed"} <= {status for _, status in tally.statuses}


@pytest.mark.parametrize("half", HALVES)
async def test_probes_are_answered_however_many_silent_connections_are_held(half: bytes) -> None:
    async with watched_daemon(FOR_EVER_SECONDS) as address, silent_connections(address, half):
        assert await is_live(address)
        assert {answer.split()[1] for answer in await normal_answers(address)} == {b"200"}


@pytest.mark.parametrize("half", HALVES)
async def test_whoever_sends_half_a_request_is_hung_up_on(half: bytes) -> None:
    async with watched_daemon(0.2) as address, asyncio.timeout(60):
        answer = await exchange(address, half, finishes=False)
    assert not answer.startswith(b"HTTP/1.1 5")


async def test_one_bad_request_is_answered_once_and_is_no_error_of_the_server() -> None:
    complaints = Complaints()
    async with watched_daemon(FOR_EVER_SECONDS) as address, asyncio.timeout(60):
        with complaints.heard():
            for bad in (
                b"NOT HTTP\r\n\r\n",
                b"HEAD /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
                b"POST /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
            ):
                answer = await exchange(address, bad, finishes=False)
                assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
    assert not complaints.found


@pytest.mark.parametrize("host", ["elsewhere.invalid", "["])
async def test_nobody_is_redirected_to_the_host_that_a_caller_names(host: str) -> None:
    async with watched_daemon() as address:
        answer = await exchange(address, f"GET /livez/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert host.encode() not in answer


async def test_liveness_is_answered_while_everything_else_is_busy() -> None:
    may_answer = asyncio.Event()
    request = f"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
    async with watched_daemon(FOR_EVER_SECONDS, may_answer.wait) as address:
        async with silent_connections(address, request):
            assert await is_live(address)
            may_answer.set()
        assert {answer.split()[1] for answer in await normal_answers(address)} == {b"200"}
