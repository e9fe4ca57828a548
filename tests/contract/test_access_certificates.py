"""Who may call: certificates over real connections, replaced while both ends run."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fusionroute.access import ClientAccess, ServerAccess, TlsFiles
from fusionroute.access_channel import AccessChannel
from fusionroute.api_keys import ApiKeys, ShownKey
from fusionroute.errors import AccessDenied, FusionRouteError, InvalidRequest, Reason
from fusionroute.grpc_runtime import RunningServer, channel, server
from fusionroute.health_probe import status_of
from fusionroute.v1 import expert_pb2, expert_pb2_grpc
from tests.certificates import Authority
from tests.doorman import NEXT, SHOP, Doorman, ask, ask_over, service_of, stream

# ruff: noqa: N802 - the contract names the methods


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
