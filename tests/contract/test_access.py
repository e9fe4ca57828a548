"""Who may call: certificates and keys over real connections, replaced while both ends run."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fusionroute.access import ClientAccess, ServerAccess, TlsFiles
from fusionroute.access_channel import AccessChannel
from fusionroute.access_check import shown_key
from fusionroute.api_keys import ApiKeys, ShownKey
from fusionroute.errors import AccessDenied, FusionRouteError, InvalidRequest, Reason
from fusionroute.grpc_runtime import RunningServer, Service, channel, error_from_rpc, server
from fusionroute.health_probe import status_of
from fusionroute.v1 import expert_pb2, expert_pb2_grpc
from tests.certificates import Authority

# ruff: noqa: N802 - the contract names the methods
NAME = "fusionroute.v1.ExpertService"
SHOP = "kT0m5Qb8-shop-shop-shop-shop"
NEXT = "Ma3nV9yy-next-next-next-next"


class Doorman(expert_pb2_grpc.ExpertServiceServicer):
    """Says who has been let in."""

    def __init__(self) -> None:
        self.callers: list[object] = []

    async def GetInfo(self, request: Any, context: Any) -> expert_pb2.GetInfoResponse:
        self.callers.append(structlog.contextvars.get_contextvars().get("caller"))
        return expert_pb2.GetInfoResponse(slot="math")

    async def _not_asked(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    Step = StepBatch = CloseSession = ListSessions = Reload = _not_asked

    async def StepStream(
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[expert_pb2.StepStreamResponse]:
        async for request in request_iterator:
            self.callers.append(structlog.contextvars.get_contextvars().get("caller"))
            results = [expert_pb2.StreamedResult(id=step.id) for step in request.steps]
            yield expert_pb2.StepStreamResponse(results=results)

    async def Score(self, request: Any, context: Any) -> AsyncIterator[expert_pb2.ScoreResponse]:
        for position in range(3):
            self.callers.append(structlog.contextvars.get_contextvars().get("caller"))
            yield expert_pb2.ScoreResponse(from_position=position)


def service_of(doorman: Doorman) -> Service:
    return Service(NAME, lambda s: expert_pb2_grpc.add_ExpertServiceServicer_to_server(doorman, s))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"shop:{SHOP}\n")
    return path


def key(value: str) -> ClientAccess:
    return ClientAccess(key=ShownKey(value))


async def ask(address: str, access: ClientAccess | None = None) -> str:
    """The slot that GetInfo tells. Raises FusionRouteError."""
    async with channel(address, access=access) as opened:
        return await ask_over(opened)


async def ask_over(opened: grpc.aio.Channel) -> str:
    try:
        return (
            await expert_pb2_grpc.ExpertServiceStub(opened).GetInfo(expert_pb2.GetInfoRequest(), timeout=10)
        ).slot
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from None


async def stream(address: str, access: ClientAccess | None = None) -> list[int]:
    """The positions that Score tells. Raises FusionRouteError."""
    async with channel(address, access=access) as opened:
        call = expert_pb2_grpc.ExpertServiceStub(opened).Score(expert_pb2.ScoreRequest(), timeout=10)
        try:
            return [response.from_position async for response in call]
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None


async def both_streams(address: str, access: ClientAccess | None = None) -> list[int]:
    """The ids that StepStream answers. Raises FusionRouteError."""
    async with channel(address, access=access) as opened:
        call = expert_pb2_grpc.ExpertServiceStub(opened).StepStream(timeout=10)
        try:
            await call.write(expert_pb2.StepStreamRequest(steps=[expert_pb2.StreamedStep(id=7)]))
            await call.done_writing()
            return [result.id async for response in call for result in response.results]
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None


# --- keys ---------------------------------------------------------------------------------------------------------


async def test_calls_and_streams_need_a_known_key(keys_file: Path) -> None:
    doorman = Doorman()
    async with server([service_of(doorman)], access=ServerAccess(keys=ApiKeys(keys_file))) as running:
        assert await ask(running.address, key(SHOP)) == "math"
        assert await stream(running.address, key(SHOP)) == [0, 1, 2]
        assert await both_streams(running.address, key(SHOP)) == [7]
        assert doorman.callers == ["shop"] * 5
        for access in (None, key(NEXT)):
            for call in (ask, stream, both_streams):
                with pytest.raises(AccessDenied) as caught:
                    await call(running.address, access)
                assert caught.value.reason is Reason.UNAUTHENTICATED
                assert NEXT not in caught.value.message
        assert len(doorman.callers) == 5


async def test_liveness_needs_no_key_but_reflection_does(keys_file: Path) -> None:
    async with server([], access=ServerAccess(keys=ApiKeys(keys_file))) as running:
        async with channel(running.address) as opened:
            health = health_pb2_grpc.HealthStub(opened)
            assert (await health.Check(health_pb2.HealthCheckRequest(), timeout=10)).status == 1
            listing = reflection_pb2_grpc.ServerReflectionStub(opened).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10
            )
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [answer async for answer in listing]
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert await asyncio.to_thread(status_of, running.address) == "SERVING"


async def test_keys_are_replaced_without_a_restart_of_either_end(tmp_path: Path, keys_file: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text(f"{SHOP}\n")
    client = ClientAccess(key=ShownKey(mine))
    async with (
        server([service_of(Doorman())], access=ServerAccess(keys=ApiKeys(keys_file))) as running,
        channel(running.address, access=client) as opened,
    ):
        assert await ask_over(opened) == "math"
        keys_file.write_text(f"shop:{SHOP}\nshop:{NEXT}\n")  # both, for as long as the clients need
        await until_it_is(running, key(NEXT), accepted=True)
        mine.write_text(f"{NEXT}\n")
        async with asyncio.timeout(20):
            while client.metadata() != key(NEXT).metadata():
                assert await ask_over(opened) == "math"
                await asyncio.sleep(0.1)
        keys_file.write_text(f"shop:{NEXT}\n")
        while await accepts(running, key(SHOP)):
            assert await ask_over(opened) == "math"
            await asyncio.sleep(0.1)
        assert await ask_over(opened) == "math"


async def until_it_is(running: RunningServer, access: ClientAccess, *, accepted: bool) -> None:
    async with asyncio.timeout(20):
        while await accepts(running, access) != accepted:
            await asyncio.sleep(0.1)


async def accepts(running: RunningServer, access: ClientAccess) -> bool:
    try:
        return await ask(running.address, access) == "math"
    except AccessDenied:
        return False


async def test_a_refusal_is_logged_once_a_second_without_the_key(keys_file: Path) -> None:
    async with server([], access=ServerAccess(keys=ApiKeys(keys_file))) as running:
        with structlog.testing.capture_logs() as logs:
            for _ in range(5):
                with pytest.raises(AccessDenied):
                    await ask(running.address, key(NEXT))
    refusals = [entry for entry in logs if entry["event"] == "access_denied"]
    assert 1 <= len(refusals) < 5
    assert NEXT not in str(logs) and SHOP not in str(logs)


@pytest.mark.parametrize(
    ("metadata", "shown"),
    [
        ([("authorization", "Bearer abc")], b"abc"),
        ([("x", "y"), ("authorization", "bearer  abc ")], b"abc"),
        ([], None),
        (None, None),
        ([("authorization", "abc")], None),
        ([("authorization", "Bearer ")], None),
        ([("authorization", "Basic abc")], None),
        ([("authorization", "Bearer " + "x" * 513)], None),
        ([("authorization", "Bearer abc"), ("authorization", "Bearer abd")], None),
    ],
)
def test_the_key_is_read_from_one_bearer_header(metadata: Any, shown: bytes | None) -> None:
    assert shown_key(metadata) == shown


def test_a_check_costs_microseconds(keys_file: Path) -> None:
    keys_file.write_text("".join(f"k{n}:{SHOP}{n}\n" for n in range(16)))
    keys = ApiKeys(keys_file)
    best = min(timed(lambda: keys.name_of(b"wrong" * 8)) for _ in range(2000))
    assert best < 0.001, "a thousandth of a second would already be a thousand times too slow"


def timed(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# --- certificates ---------------------------------------------------------------------------------------------------


async def test_with_certificates_on_both_ends_calls_are_answered(
    authority: Authority, keys_file: Path
) -> None:
    access = authority.server(ApiKeys(keys_file))
    async with server([service_of(Doorman())], access=access) as running:
        client = authority.client(ShownKey(SHOP))
        assert await ask(running.address, client) == "math"
        assert await stream(running.address, client) == [0, 1, 2]
        with pytest.raises(AccessDenied):  # a certificate is no key
            await ask(running.address, authority.client())


async def test_strangers_are_refused(authority: Authority, tmp_path: Path) -> None:
    doorman, other = Doorman(), Authority(tmp_path / "other")
    theirs = other.issue("theirs")
    strangers = {
        "plain": None,
        "no certificate": ClientAccess(TlsFiles(ca=authority.ca)),
        "certificate of another authority": ClientAccess(
            TlsFiles(theirs.certificate, theirs.key, authority.ca)
        ),
        "trusts another authority": ClientAccess(other.issue("client")),
    }
    async with server([service_of(doorman)], access=authority.server()) as running:
        for who, access in strangers.items():
            with pytest.raises(FusionRouteError) as caught:
                await ask(running.address, access)
            assert caught.value.reason is not Reason.INTERNAL, who
    assert doorman.callers == []


async def test_a_server_that_is_not_the_one_called_is_refused(authority: Authority) -> None:
    elsewhere = ServerAccess(authority.issue("elsewhere", "elsewhere.example"))
    async with server([service_of(Doorman())], access=elsewhere) as running:
        with pytest.raises(FusionRouteError):
            await ask(running.address, authority.client())


async def test_clients_without_certificate_may_be_let_in(authority: Authority) -> None:
    access = ServerAccess(authority.issue("server"), require_client=False)
    async with server([service_of(Doorman())], access=access) as running:
        assert await ask(running.address, ClientAccess(TlsFiles(ca=authority.ca))) == "math"
        with pytest.raises(FusionRouteError):
            await ask(running.address)


async def test_certificates_are_replaced_without_a_restart_of_either_end(
    authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other")
    new, stranger = other.issue("new"), ClientAccess(TlsFiles(ca=other.ca))
    # Both authorities are trusted while the certificates change from one to the other.
    authority.ca.write_bytes(authority.ca.read_bytes() + other.ca.read_bytes())
    client, theirs = authority.client(), ServerAccess(authority.issue("server"), require_client=False)
    async with (
        server([service_of(Doorman())], access=theirs) as running,
        channel(running.address, access=client) as opened,
    ):
        assert await ask_over(opened) == "math"
        generation = client.generation()
        assert not await is_answered(running, stranger)
        assert new.certificate is not None and new.key is not None
        for name in ("server", "client"):
            shutil.copy(new.certificate, authority.folder / f"{name}.pem")
            shutil.copy(new.key, authority.folder / f"{name}.key")
        async with asyncio.timeout(20):
            while client.generation() == generation:
                assert await ask_over(opened) == "math"
                await asyncio.sleep(0.1)
            while not await is_answered(running, stranger):
                await asyncio.sleep(0.1)
        assert await ask_over(opened) == "math"


class Renewed(ClientAccess):
    """Of a client whose certificates are said to have changed."""

    renewals = 0

    def generation(self) -> int:
        return self.renewals


class Patient(Doorman):
    """Ends its streams when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.may_end = asyncio.Event()

    async def Score(self, request: Any, context: Any) -> AsyncIterator[expert_pb2.ScoreResponse]:
        yield expert_pb2.ScoreResponse(from_position=0)
        await self.may_end.wait()
        yield expert_pb2.ScoreResponse(from_position=1)


async def test_new_certificates_make_a_new_connection_and_leave_running_calls_theirs() -> None:
    doorman, access, made = Patient(), Renewed(key=ShownKey(SHOP)), []

    async with server([service_of(doorman)]) as running:

        def connect() -> grpc.aio.Channel:
            made.append(channel(running.address))
            return made[-1]

        async with AccessChannel(connect, access) as opened:
            stub = expert_pb2_grpc.ExpertServiceStub(opened)
            stream: Any = stub.Score(expert_pb2.ScoreRequest(), timeout=20)
            assert (await stream.read()).from_position == 0
            access.renewals = 1
            assert (await stub.GetInfo(expert_pb2.GetInfoRequest(), timeout=10)).slot == "math"
            assert len(made) == 2
            doorman.may_end.set()
            assert (await stream.read()).from_position == 1
            assert (await stub.GetInfo(expert_pb2.GetInfoRequest(), timeout=10)).slot == "math"
            assert len(made) == 2
    assert all(each.get_state() is grpc.ChannelConnectivity.SHUTDOWN for each in made)


async def is_answered(running: RunningServer, access: ClientAccess) -> bool:
    try:
        return await ask(running.address, access) == "math"
    except FusionRouteError:
        return False


async def test_the_probe_of_containers_speaks_tls(authority: Authority) -> None:
    async with server([], access=authority.server()) as running:
        access = authority.client()
        assert await asyncio.to_thread(status_of, running.address, 3.0, access) == "SERVING"
        assert (await asyncio.to_thread(status_of, running.address, 3.0)).startswith("UNREACHABLE")


def test_what_does_not_fit_is_named(authority: Authority, tmp_path: Path) -> None:
    good, another = authority.issue("one"), authority.issue("two")
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing\n")
    for files, field in (
        (lambda: TlsFiles(certificate=good.certificate), "tls_key = None"),
        (lambda: TlsFiles(key=good.key), "tls_cert = None"),
        (lambda: TlsFiles(ca=good.ca), "tls_cert = None"),
        (lambda: TlsFiles(good.certificate, another.key), "tls_key = '.*two.key' is not"),
        (lambda: TlsFiles(good.certificate, tmp_path / "gone"), "tls_key = '.*gone' cannot be read: No such"),
        (lambda: TlsFiles(good.certificate, good.key, nothing), "tls_ca = '.*' has no PEM certificate"),
        (lambda: TlsFiles(nothing, nothing), "tls_key = '.*nothing.pem' is not"),
    ):
        with pytest.raises(InvalidRequest, match=field):
            ServerAccess(files())


def test_commands_read_the_environment(authority: Authority, keys_file: Path) -> None:
    files = authority.issue("me")
    access = ClientAccess.from_environment(
        {
            "FUSIONROUTE_API_KEY_FILE": str(keys_file),
            "FUSIONROUTE_TLS_CA": str(files.ca),
            "FUSIONROUTE_TLS_CERT": str(files.certificate),
            "FUSIONROUTE_TLS_KEY": str(files.key),
        }
    )
    assert access.is_encrypted and access.metadata() == (("authorization", f"Bearer {SHOP}"),)
    assert ClientAccess.from_environment({"FUSIONROUTE_API_KEY": NEXT}).metadata()[0][1] == f"Bearer {NEXT}"
    nothing = ClientAccess.from_environment({})
    assert not nothing.is_encrypted and not nothing.shows_key
    with pytest.raises(InvalidRequest, match="FUSIONROUTE_TLS_KEY = None"):
        ClientAccess.from_environment({"FUSIONROUTE_TLS_CERT": str(files.certificate)})
    with pytest.raises(InvalidRequest, match="FUSIONROUTE_API_KEY_FILE = '/nowhere' cannot be read"):
        ClientAccess.from_environment({"FUSIONROUTE_API_KEY_FILE": "/nowhere"})
