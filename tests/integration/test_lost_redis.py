"""A Redis that is killed, flushed, set back or away in mid-turn: the answer is unchanged, and so is what is stored."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from fusionroute.errors import FusionRouteError, Reason
from fusionroute.private_redis import answers, connect, find_redis_server, server_command, url_of
from fusionroute.v1 import router_pb2
from tests.expert_fakes import until
from tests.served_stack import Answer, Family, Stack, make_family, served
from tests.several_routers import GREEDY, PROMPT, SEEDED, Pace, ask

LENGTH = 30


class MortalRedis:
    """A Redis that keeps its data in a folder and can be killed, set back and started again under one address."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "redis.sock"
        self._data = folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._data.mkdir(parents=True)

    @property
    def url(self) -> str:
        return url_of(self._socket)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        command = server_command(find_redis_server(), self._socket, self._data)
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = await asyncio.to_thread(subprocess.Popen, command, **silent)
        await until(lambda: answers(self._socket), 20)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def forget_all(self) -> None:
        """What a server without persistence has after a restart."""
        shutil.rmtree(self._data)
        self._data.mkdir()

    def save_copy(self, name: str) -> None:
        """Notes the data of a killed server."""
        shutil.copytree(self._data, self._data.parent / name)

    def set_back(self, name: str) -> None:
        """An earlier state, as a backup or a replica that lagged behind has it."""
        shutil.rmtree(self._data)
        shutil.copytree(self._data.parent / name, self._data)

    @property
    def _log(self) -> Path:
        """The append-only file; newer servers have a folder of them."""
        logs = [*self._data.glob("appendonlydir/*.incr.aof"), *self._data.glob("appendonly.aof")]
        return logs[0]

    def num_bytes(self) -> int:
        """How much of its file is written."""
        return self._log.stat().st_size

    def cut_off(self, num_bytes: int) -> None:
        """All behind the first so many bytes of the file was never written."""
        with self._log.open("rb+") as file:
            file.truncate(num_bytes)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[MortalRedis]:
    redis = MortalRedis(tmp_path / "redis")
    yield redis
    with contextlib.suppress(ProcessLookupError, AssertionError):
        os.kill(redis.pid, signal.SIGCONT)
    redis.kill()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), ("math",))


@pytest.fixture
async def stack(family: Family, redis: MortalRedis) -> AsyncIterator[Stack]:
    await redis.start()
    async with served(
        family,
        redis_url=redis.url,
        session_lease_seconds=1.0,
        expert_lease_seconds=3.0,
        drafting="off",  # `Pace` counts calls of experts as tokens
        early_asks="off",
    ) as stack:
        yield stack


class Turn:
    """A turn of known tokens that is held in its middle while something happens to Redis."""

    def __init__(self, stack: Stack, sampling: dict[str, Any]) -> None:
        self.stack = stack
        self.request = ask(LENGTH, sampling, session_id="turn", request_id="r1")
        self.pace = Pace()
        self.whole: Answer | None = None
        self._answer: asyncio.Task[Answer] | None = None

    async def begin(self, num_tokens: int) -> None:
        """Writes so many tokens and waits until they are stored."""
        self.whole = await self.stack.answer(
            ask(LENGTH, {"seed": 1} | _sampling(self.request), session_id="whole")
        )
        self.pace.hold(self.stack)
        self.pace.num_left = num_tokens
        self._answer = asyncio.create_task(self.stack.answer(self.request))
        await self.has_stored(num_tokens)

    async def write_on(self, num_tokens: int) -> None:
        """Writes so many further tokens, stored or not."""
        self.pace.num_left = num_tokens
        await until(lambda: self.pace.num_left == 0, 20)

    async def has_stored(self, num_tokens: int) -> None:
        """Returns when the store has so many tokens of the answer."""

        async def is_stored() -> bool:
            with contextlib.suppress(FusionRouteError):
                stored = await self.stack.client.get_session("turn")
                return len(stored.token_ids) == len(PROMPT) + num_tokens
            return False

        async with asyncio.timeout(20):
            while not await is_stored():
                await asyncio.sleep(0.02)

    async def ends_as_if_nothing_had_happened(self) -> None:
        self.pace.num_left = None
        assert self._answer is not None and self.whole is not None
        answer = await asyncio.wait_for(self._answer, 40)
        assert (answer.ids, answer.text) == (self.whole.ids, self.whole.text)
        stored = await self.stack.client.get_session("turn")
        assert list(stored.token_ids) == PROMPT + self.whole.ids
        assert stored.state == router_pb2.SESSION_STATE_FINISHED
        assert stored.answer_text == answer.text
        assert (await self.stack.resume("turn", 5)).ids == self.whole.ids[5:]


def _sampling(request: router_pb2.GenerateRequest) -> dict[str, Any]:
    parameters = request.sampling
    return {"temperature": parameters.temperature, "seed": parameters.seed} if parameters.temperature else {}


@pytest.fixture
def turn(stack: Stack, request: pytest.FixtureRequest) -> Turn:
    return Turn(stack, getattr(request, "param", SEEDED))


async def test_a_redis_that_is_killed_and_comes_back_changes_nothing(turn: Turn, redis: MortalRedis) -> None:
    await turn.begin(8)
    redis.kill()
    await turn.write_on(5)
    await redis.start()
    await turn.has_stored(13)
    await turn.ends_as_if_nothing_had_happened()


async def test_a_redis_that_lost_the_end_of_its_file_gets_it_back(turn: Turn, redis: MortalRedis) -> None:
    await turn.begin(4)
    num_bytes = redis.num_bytes()
    await turn.write_on(4)
    await turn.has_stored(8)
    redis.kill()
    redis.cut_off(num_bytes + 10)  # in the midst of a command
    await redis.start()
    await turn.has_stored(8)  # without a further token: the writer renews its lease and finds out
    await turn.ends_as_if_nothing_had_happened()


@pytest.mark.parametrize("turn", [GREEDY, SEEDED], ids=["greedy", "seeded"], indirect=True)
async def test_a_redis_that_forgot_everything_gets_the_session_back(turn: Turn, redis: MortalRedis) -> None:
    await turn.begin(8)
    redis.kill()
    redis.forget_all()
    await redis.start()
    await turn.has_stored(8)
    await turn.ends_as_if_nothing_had_happened()


async def test_a_flushed_redis_gets_the_session_back(turn: Turn, redis: MortalRedis) -> None:
    await turn.begin(8)
    client: Redis = connect(redis.url)
    for num_tokens in (3, 1):
        await client.flushall()
        await turn.write_on(num_tokens)
    await turn.has_stored(12)
    await client.flushall()
    await turn.ends_as_if_nothing_had_happened()
    await client.aclose()


async def test_a_redis_from_before_the_turn_gets_it_back(turn: Turn, redis: MortalRedis) -> None:
    """An earlier turn of the session is all that the old state knows, under the fence of its writer."""
    stack = turn.stack
    first = await stack.answer(ask(4, session_id="old"))
    redis.kill()
    redis.save_copy("backup")
    await redis.start()
    await turn.begin(8)
    redis.kill()
    redis.set_back("backup")
    await redis.start()
    await turn.has_stored(8)
    await turn.ends_as_if_nothing_had_happened()
    assert list((await stack.client.get_session("old")).token_ids) == PROMPT + first.ids


async def test_a_second_turn_survives_a_redis_from_before_it(stack: Stack, redis: MortalRedis) -> None:
    first = await stack.answer(ask(4, session_id="talk"))
    redis.kill()
    redis.save_copy("backup")
    await redis.start()
    whole = await stack.answer(
        router_pb2.GenerateRequest(
            token_ids={"ids": PROMPT + first.ids + PROMPT}, sampling={"max_tokens": 12, "ignore_eos": True}
        )
    )
    pace = Pace()
    pace.hold(stack)
    pace.num_left = 5
    second = asyncio.create_task(stack.answer(ask(12, session_id="talk")))
    await until(lambda: pace.num_waiting == 1, 10)
    redis.kill()
    redis.set_back("backup")
    await redis.start()
    pace.num_left = None
    assert (await asyncio.wait_for(second, 30)).ids == whole.ids
    stored = await stack.client.get_session("talk")
    assert list(stored.token_ids) == PROMPT + first.ids + PROMPT + whole.ids


async def test_a_redis_that_hangs_for_longer_than_a_lease_changes_nothing(
    turn: Turn, redis: MortalRedis
) -> None:
    await turn.begin(8)
    os.kill(redis.pid, signal.SIGSTOP)
    await turn.write_on(5)
    await asyncio.sleep(1.5)
    os.kill(redis.pid, signal.SIGCONT)
    await turn.ends_as_if_nothing_had_happened()


async def test_a_turn_that_ends_while_redis_is_away_is_stored_when_it_is_back(
    turn: Turn, redis: MortalRedis
) -> None:
    await turn.begin(8)
    redis.kill()
    redis.forget_all()
    turn.pace.num_left = None
    await asyncio.sleep(0.5)
    await redis.start()
    await turn.ends_as_if_nothing_had_happened()


async def test_a_session_that_was_deleted_is_not_put_back(stack: Stack, redis: MortalRedis) -> None:
    pace = Pace()
    pace.hold(stack)
    pace.num_left = 3
    writing = asyncio.create_task(stack.answer(ask(10, session_id="deleted")))
    await until(lambda: pace.num_waiting == 1, 10)
    client: Redis = connect(redis.url)
    await stack.router.keeper.store.delete("deleted")
    with pytest.raises(FusionRouteError) as caught:
        pace.num_left = None
        await asyncio.wait_for(writing, 20)
    assert caught.value.reason is Reason.SESSION_UNKNOWN
    assert await client.exists("fr:{deleted}:meta", "fr:{deleted}:tok", "fr:{deleted}:lease") == 0
    again = await stack.answer(ask(10, session_id="deleted"))  # but it may be begun anew
    assert len(again.ids) == 10
    await client.aclose()


async def test_a_turn_begun_while_redis_is_away_says_when_to_come_back(
    stack: Stack, redis: MortalRedis
) -> None:
    redis.kill()
    with pytest.raises(FusionRouteError) as caught:
        await stack.answer(ask(3))
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert caught.value.retry_after_seconds
    answer = asyncio.create_task(Answer.read(stack.client.unbroken(ask(3))))
    await asyncio.sleep(0.3)
    await redis.start()
    assert len((await asyncio.wait_for(answer, 20)).ids) == 3
