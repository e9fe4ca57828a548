"""Router, expert and client with certificates, keys and a Redis that wants a password: the programs as they are."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import SecretStr

from expert_service.bootstrap import running_expert
from expert_service.settings import ExpertSettings
from fusionroute.access import ClientAccess, TlsFiles
from fusionroute.api_keys import ShownKey
from fusionroute.client import RouterClient
from fusionroute.engine import load_model
from fusionroute.errors import AccessDenied, FusionRouteError, Unavailable
from fusionroute.health_probe import status_of
from fusionroute.private_redis import connect, find_redis_server
from fusionroute.v1.registry_pb2 import EXPERT_STATE_READY
from fusionroute.v1.router_pb2 import GenerateRequest, SamplingParameters
from router_service.bootstrap import load_first, running_router
from router_service.settings import RouterSettings
from tests.certificates import Authority
from tests.daemons import Daemon, daemon
from tests.expert_fakes import until
from tests.served_stack import Answer, Family, make_family

SERVICE_KEY = "service-key-0123456789abcdef"
SHOP_KEY = "shop-key-0123456789abcdef0123"
NEXT_KEY = "next-key-0123456789abcdef0123"
PASSWORD = "redis-password-0123456789"
SECRETS = (SERVICE_KEY, SHOP_KEY, NEXT_KEY, PASSWORD)
LEASE_SECONDS = 1.5
BOTH_START_SECONDS = 240


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), slots=("math",))


@dataclass
class Secured:
    """A stack with certificates and keys, and what is needed to call it."""

    authority: Authority
    keys_file: Path
    key_file: Path
    address: str = ""

    @classmethod
    def prepared(cls, folder: Path) -> Secured:
        """Its files."""
        keys_file, key_file = folder / "keys", folder / "key"
        keys_file.write_text(f"services:{SERVICE_KEY}\nshop:{SHOP_KEY}\n")
        key_file.write_text(f"{SERVICE_KEY}\n")
        return cls(Authority(folder / "authority"), keys_file, key_file)

    def settings(self) -> dict[str, Path]:
        """What its daemons are told."""
        files = self.authority.issue("services")
        assert files.certificate is not None and files.key is not None and files.ca is not None
        certificates = {"tls_cert": files.certificate, "tls_key": files.key, "tls_ca": files.ca}
        return certificates | {"api_keys_file": self.keys_file, "api_key_file": self.key_file}

    def access(self, key: str = SHOP_KEY) -> ClientAccess:
        """Of a client with a certificate and this key."""
        return self.authority.client(ShownKey(key))

    async def answer(self, access: ClientAccess) -> Answer:
        """Raises FusionRouteError."""
        request = GenerateRequest(text="w5 w6", sampling=SamplingParameters(max_tokens=4, ignore_eos=True))
        async with (
            RouterClient.open(self.address, access) as client,
            aclosing(client.generate(request, 60)) as events,
        ):
            return await Answer.read(events)

    async def has_expert(self, access: ClientAccess) -> bool:
        """Whether a ready expert is registered."""
        async with RouterClient.open(self.address, access) as client:
            return any(entry.state == EXPERT_STATE_READY for entry in await client.list_experts())

    async def wait_for_expert(self) -> None:
        """Returns once one is registered."""
        async with asyncio.timeout(60):
            while not await self.has_expert(self.access()):
                await asyncio.sleep(0.1)


@asynccontextmanager
async def redis_with_password(folder: Path) -> AsyncIterator[str]:
    """The URL of a Redis that wants PASSWORD."""
    path = folder / "redis.sock"
    options = f'port 0\nunixsocket {path}\nrequirepass {PASSWORD}\nsave ""\ndir {folder}\n'
    process = await asyncio.create_subprocess_exec(
        find_redis_server(), "-", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        assert process.stdin is not None
        process.stdin.write(options.encode())
        process.stdin.close()
        async with asyncio.timeout(20):
            while not path.exists():
                await asyncio.sleep(0.02)
        yield f"unix://:{PASSWORD}@{path}"
    finally:
        process.kill()
        await process.wait()


@asynccontextmanager
async def programs(stack: Secured, folder: Path, family: Family) -> AsyncIterator[list[Daemon]]:
    """A router and an expert as the programs that they are, told by the environment."""
    environment = {f"FUSIONROUTE_{name.upper()}": str(path) for name, path in stack.settings().items()}
    port = str(free_port())
    options = {
        "router_service": ("--checkpoint", str(family.router), "--port", port),
        "expert_service": (
            "--model", str(family.experts["math"]), "--slot", "math", "--router", f"127.0.0.1:{port}",
        ),
    }  # fmt: skip
    async with AsyncExitStack() as exits:
        environment["REDIS_URL"] = await exits.enter_async_context(redis_with_password(folder))
        running = [
            await exits.enter_async_context(daemon(module, folder, *words, **environment))
            for module, words in options.items()
        ]
        await until(lambda: all(each.has_begun for each in running), BOTH_START_SECONDS)
        stack.address, _ = await asyncio.gather(*(each.address() for each in running))
        await stack.wait_for_expert()
        yield running


@asynccontextmanager
async def in_this_process(stack: Secured, family: Family, redis_url: str) -> AsyncIterator[None]:
    """A router and an expert in this process, told by their settings."""
    secured: dict[str, Any] = stack.settings()
    settings = RouterSettings(
        checkpoint=str(family.router), port=0, redis_url=SecretStr(redis_url),
        expert_lease_seconds=LEASE_SECONDS, **secured,
    )  # fmt: skip
    first = await asyncio.to_thread(load_first, settings)
    async with running_router(settings, first) as router:
        stack.address = router.server.address
        model = str(family.experts["math"])
        expert = ExpertSettings(model=model, slot="math", port=0, router=stack.address, **secured)
        async with running_expert(expert, await asyncio.to_thread(load_model, model)):
            await stack.wait_for_expert()
            yield


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.timeout(300)
async def test_who_shows_certificate_and_key_is_answered_and_nobody_else(tmp_path: Path, family: Family) -> None:
    stranger = Authority(tmp_path / "stranger")
    key = ShownKey(SHOP_KEY)
    stack = Secured.prepared(tmp_path)
    async with programs(stack, tmp_path, family) as daemons:
        answer = await stack.answer(stack.access())
        assert len(answer.tokens) == 4 and {token.expert for token in answer.tokens} == {"math"}
        theirs = stranger.issue("client")
        for access in (
            ClientAccess(key=key),
            ClientAccess(TlsFiles(ca=stack.authority.ca), key),
            ClientAccess(TlsFiles(theirs.certificate, theirs.key, stack.authority.ca), key),
            ClientAccess(theirs, key),
        ):
            with pytest.raises(Unavailable):
                await stack.answer(access)
        for access in (stack.authority.client(), stack.access(NEXT_KEY)):
            with pytest.raises(AccessDenied):
                await stack.answer(access)
        probe = await asyncio.to_thread(status_of, stack.address, 5.0, stack.authority.client())
        assert probe == "SERVING"
        argv = [word for each in daemons for word in arguments_of(each)]
        for each in daemons:
            each.process.terminate()
        logs = "".join([await each.output() for each in daemons])
    assert '"ready"' in logs and "--model" in argv
    for secret in SECRETS:
        assert secret not in logs
        assert not any(secret in word for word in argv)
    assert "access_denied" in logs


def arguments_of(daemon: Daemon) -> list[str]:
    """What `ps` shows of a daemon and of what it has started."""
    root = psutil.Process(daemon.process.pid)
    return [word for process in (root, *root.children(recursive=True)) for word in process.cmdline()]


async def test_keys_change_while_the_stack_runs(tmp_path: Path, family: Family, redis_url: str) -> None:
    stack = Secured.prepared(tmp_path)
    async with in_this_process(stack, family, redis_url):
        # Both are accepted, then the services show the new one, then the old ones are taken out.
        stack.keys_file.write_text(f"services:{SERVICE_KEY}\nservices:{NEXT_KEY}\nshop:{SHOP_KEY}\n")
        await until_answered(stack, stack.access(NEXT_KEY))
        stack.key_file.write_text(f"{NEXT_KEY}\n")
        await asyncio.sleep(4 * LEASE_SECONDS)
        stack.keys_file.write_text(f"services:{NEXT_KEY}\n")
        async with asyncio.timeout(60):
            with contextlib.suppress(AccessDenied):
                while await stack.has_expert(stack.access(SERVICE_KEY)):
                    await asyncio.sleep(0.2)
        await asyncio.sleep(2 * LEASE_SECONDS)  # an expert that showed the old key would be gone by now
        assert await stack.has_expert(stack.access(NEXT_KEY))
        assert len((await stack.answer(stack.access(NEXT_KEY))).tokens) == 4
        with pytest.raises(AccessDenied):
            await stack.answer(stack.access(SHOP_KEY))


async def until_answered(stack: Secured, access: ClientAccess) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(FusionRouteError):
                assert await stack.has_expert(access)
                return
            await asyncio.sleep(0.2)


async def test_a_wrong_password_is_told_without_any(tmp_path: Path, family: Family) -> None:
    async with redis_with_password(tmp_path) as url:
        wrong = url.replace(PASSWORD, NEXT_KEY)
        async with daemon("router_service", tmp_path, "--checkpoint", str(family.router), REDIS_URL=wrong) as router:
            output = await router.output()
    assert router.process.returncode == 5
    assert "redis_unreachable" in output and NEXT_KEY not in output


async def test_redis_is_reached_over_tls(tmp_path: Path, redis_url: str) -> None:
    authority = Authority(tmp_path / "authority")
    files = authority.issue("redis")
    async with tls_in_front_of(redis_url.removeprefix("unix://"), files) as port:
        client = connect(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={authority.ca}", timeout_seconds=10)
        assert await client.execute_command("PING") in (True, b"PONG")  # type: ignore[no-untyped-call]
        await client.aclose()


@asynccontextmanager
async def tls_in_front_of(path: str, files: TlsFiles) -> AsyncIterator[int]:
    """The port of a TLS endpoint whose connections go on to a unix socket."""
    assert files.certificate is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_unix_connection(path)
        await asyncio.gather(pump(reader, ours), pump(theirs, writer))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
    async with server:
        yield int(server.sockets[0].getsockname()[1])
