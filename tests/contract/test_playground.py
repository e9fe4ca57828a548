"""The playground's routes: the page and its files, the live state of the experts, the end of a session."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import pytest
import pytest_asyncio
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from fusionroute.api_keys import ApiKeys
from fusionroute.errors import FusionRouteError, Reason
from fusionroute.http_server import serving_http
from fusionroute.v1.router_pb2 import GenerateRequest
from router_service.http.access import KeysAsked
from router_service.http.application import OPEN_PATHS
from router_service.http.playground import page_routes, read_assets
from tests.served_stack import SLOTS, Stack, make_family, served

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASSETS = read_assets()
KEY = "k" * 30


@dataclass(frozen=True)
class Reply:
    """What came back."""

    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)


async def ask(url: str, method: str = "GET", **headers: str) -> Reply:
    request = urllib.request.Request(  # noqa: S310 - our own loopback address
        url, method=method, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )

    def call() -> Reply:
        try:
            with urllib.request.urlopen(request, timeout=20) as response:  # noqa: S310 - see above
                return Reply(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, error.headers, error.read())

    return await asyncio.to_thread(call)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory) -> AsyncIterator[Stack]:
    family = make_family(tmp_path_factory.mktemp("playground"))
    async with served(family, http_port=0) as stack:
        yield stack


@pytest.fixture
def url(stack: Stack) -> str:
    assert stack.router.http_url is not None
    return stack.router.http_url.rstrip("/") + "/"


async def test_the_page_and_every_file_that_it_names_is_there_in_its_own_type(url):
    wanted, seen = [""], set()
    while wanted:
        path = wanted.pop()
        seen.add(path)
        reply = await ask(url + path)
        assert reply.status == 200, path
        text, kind = reply.body.decode(), reply.headers["content-type"]
        ending = path.rpartition(".")[2]
        assert kind.split(";")[0] == {
            "": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"
        }[ending]  # fmt: skip
        named = re.findall(r'(?:src|href)="(playground/[^"]+)"', text)
        named += [f"playground/{name}" for name in re.findall(r'from "\./([^"]+)"', text)]
        wanted += [name for name in named if name not in seen]
    assert seen == {"", *(f"playground/{name}" for name in ASSETS if name != "index.html")}


async def test_browsers_are_told_to_run_and_load_nothing_but_these_files(url):
    for path in ("", "playground/main.js", "playground/page.css", "playground/icon.svg"):
        headers = (await ask(url + path)).headers
        rules = dict(rule.split(maxsplit=1) for rule in headers["content-security-policy"].split("; "))
        assert rules.pop("default-src") == "'self'"
        assert set(rules.values()) == {"'none'"}
        assert rules.keys() == {"base-uri", "object-src", "form-action", "frame-ancestors"}
        assert headers["x-content-type-options"] == "nosniff"


async def test_a_file_that_the_browser_has_is_not_sent_again(url):
    first = await ask(url + "playground/main.js")
    again = await ask(url + "playground/main.js", if_none_match=first.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    other = await ask(url + "playground/page.css", if_none_match=first.headers["etag"])
    assert other.status == 200


@pytest.mark.parametrize("path", ["playground/", "playground/nothing.js", "playground/..%2fplayground.py"])
async def test_there_are_no_other_files(url, path):
    assert (await ask(url + path)).status == 404


async def test_the_state_names_for_each_slot_who_serves_it_in_the_epoch_that_tokens_name(url, stack):
    state = (await ask(url + "fusionroute/state")).json
    assert [slot["slot"] for slot in state["slots"]] == list(SLOTS)
    assert state["checkpoint"] == stack.router.served.current.offer.checkpoint
    epochs = {slot["slot"]: slot["epoch"] for slot in state["slots"]}
    for slot in state["slots"]:
        assert slot["ready"]
        assert (slot["draining"], slot["standby"], len(slot["instances"])) == (0, 0, 1)
        assert slot["model"] == str(stack.family.experts[slot["slot"]])
        assert slot["load"]["queue_depth"] == 0
    answer = await stack.answer(GenerateRequest(text="w3 w4", sampling={"max_tokens": 12}))
    assert {epochs[token.expert] for token in answer.tokens} == {t.expert_epoch for t in answer.tokens}


async def test_the_state_follows_instances_that_come_drain_and_go(url, stack):
    async def slot() -> dict:
        state = (await ask(url + "fusionroute/state")).json
        return next(slot for slot in state["slots"] if slot["slot"] == "format")

    async def until(**wanted: object) -> dict:
        async with asyncio.timeout(20):
            while {name: (now := await slot())[name] for name in wanted} != wanted:
                await asyncio.sleep(0.05)
        return now

    before = await slot()
    await stack.start_expert("format", "spare", standby=True)
    assert (await until(standby=1, ready=True))["epoch"] == before["epoch"]
    await stack.stop_expert("spare")
    await until(standby=0)
    await stack.stop_expert("format")
    gone = await until(ready=False)
    assert (gone["epoch"], gone["address"], gone["load"]) == (0, "", None)
    assert [each["state"] for each in gone["instances"]] == ["vanished"]
    await stack.start_expert("format")
    await until(ready=True)


async def test_a_session_that_was_forgotten_is_known_no_longer(url, stack):
    async def forget() -> Reply:
        return await ask(url + "fusionroute/sessions/mine", "DELETE")

    request = GenerateRequest(
        session_id="mine", text="w3 w4", sampling={"max_tokens": 12, "ignore_eos": True}
    )
    await stack.answer(request)
    assert (await stack.resume("mine")).finished is not None
    assert (await forget()).json == {"session_id": "mine", "existed": True}
    with pytest.raises(FusionRouteError) as refused:
        await stack.resume("mine")
    assert refused.value.reason is Reason.SESSION_UNKNOWN
    assert (await forget()).json == {"session_id": "mine", "existed": False}
    assert (await ask(url + f"fusionroute/sessions/{'x' * 200}", "DELETE")).status == 400


async def test_the_page_needs_no_key_and_everything_else_does(tmp_path: Path):
    (tmp_path / "keys").write_text(f"{KEY}\n")
    methods = ["GET", "POST", "DELETE"]
    anything = Route("/{path:path}", lambda request: PlainTextResponse("within"), methods=methods)
    app = KeysAsked(Starlette(routes=[*page_routes(), anything]), ApiKeys(tmp_path / "keys"), OPEN_PATHS)
    async with serving_http(app, "127.0.0.1", 0, port_field="http_port") as address:
        url = f"http://{address}/"
        for path in ("", "playground/main.js", "playground/page.css"):
            assert (await ask(url + path)).status == 200
        for method, path in (
            ("GET", "fusionroute/state"),
            ("DELETE", "fusionroute/sessions/mine"),
            ("GET", "v1/models"),
            ("POST", ""),  # TGI's
            ("POST", "playground/main.js"),
        ):
            assert (await ask(url + path, method)).status == 401, (method, path)
            shown = await ask(url + path, method, authorization=f"Bearer {KEY}")
            assert shown.status in (200, 405), (method, path)
