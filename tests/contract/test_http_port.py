"""The HTTP port: keys, limits, request ids, metrics, encryption, what a page may call, and any body at all."""

from __future__ import annotations

import asyncio
import copy
import random
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio
from starlette.routing import Route

from fusionroute.access import TlsFiles
from router_service.http.application import OPEN_PATHS, all_routes
from router_service.http.openapi import OPERATIONS, document
from tests.certificates import Authority
from tests.http_calls import CHAT_TEMPLATE, Api
from tests.served_stack import Family, Stack, make_family, served

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = "shop-key-0123456789abcdef0123"
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_BODY_BYTES = 20_000


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    family = make_family(tmp_path_factory.mktemp("family"), slots=("math",))
    (family.router / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return family


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(family: Family) -> AsyncIterator[Stack]:
    settings = {"http_max_body_bytes": MAX_BODY_BYTES, "http_origins": "http://page.example"}
    async with served(family, http_port=0, **settings) as stack:
        yield stack


# --- any body ----------------------------------------------------------------------------------------------------

GOOD: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        TEXT,
        {
            "model": "fusionroute", "prompt": ["w5", "w6"], "max_tokens": 2, "n": 1, "best_of": 1, "echo": True,
            "logprobs": 1, "stop": ["w9"], "seed": 1, "logit_bias": {"5": 1}, "temperature": 1, "top_p": 0.5,
            "stream": False, "stream_options": {"include_usage": True}, "presence_penalty": 0.1, "top_k": 3,
            "fusionroute": {"details": True, "num_candidates": 1, "combine": "sum", "min_p": 0.1},
        },
    ),
    (
        CHAT,
        {
            "model": "fusionroute/math", "messages": [{"role": "user", "content": [{"type": "text", "text": "w5"}]}],
            "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 1, "tools": [], "tool_choice": "auto",
            "response_format": {"type": "text"}, "chat_template_kwargs": {"x": 1},
        },
    ),
    ("/tokenize", {"prompt": "w5", "add_special_tokens": True}),
    ("/detokenize", {"tokens": [5, 6]}),
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3, 2**31, 2**64, 2**70, 1e308, -0.5, "", "x", "w5", "\x00\u2028", "9" * 400, [], [[]], [None],
    [5, "w5"], [[5], []], {}, {"a": {}}, {"type": "function"}, {"role": "tool"}, [{"role": "assistant"}], [[[[5]]]],
)  # fmt: skip


def places_of(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something could be replaced."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [place for key, each in inner for place in [(*before, key), *places_of(each, (*before, key))]]


def disturbed(body: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A good body with a few odd values in it."""
    changed = copy.deepcopy(body)
    for _ in range(draw.randint(1, 3)):
        *way, last = draw.choice(places_of(changed))
        target: Any = changed
        for key in way:
            target = target[key]
        target[last] = copy.deepcopy(draw.choice(ODD))
    return changed


async def test_no_body_makes_the_router_fail(api: Api) -> None:
    draw = random.Random(11)
    drawn = [(path, disturbed(body, draw)) for _ in range(40) for path, body in GOOD]
    places, statuses = asyncio.Semaphore(8), set()

    async def send(path: str, body: dict[str, Any]) -> None:
        async with places:
            response = await api.post(path, body)
        assert response.status_code in (200, 400, 404, 429), (path, body, response.text)
        statuses.add(response.status_code)
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        elif not body.get("stream"):
            response.json()

    await asyncio.gather(*(send(path, body) for path, body in drawn))
    assert {200, 400} <= statuses


# --- what stands before the APIs ---------------------------------------------------------------------------------


async def test_what_is_too_large_is_refused_whether_it_says_so_or_not(api: Api) -> None:
    large = b'{"model": "fusionroute", "prompt": "' + b"w" * MAX_BODY_BYTES + b'"}'

    async def unannounced() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 4096):
            yield large[start : start + 4096]

    for content in (large, unannounced()):
        response = await api.http.post(TEXT, content=content)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert (await api.http.post(TEXT, content=large[:1000])).status_code == 400


async def test_every_answer_names_its_request(api: Api) -> None:
    assert (await api.http.get("/health", headers={"x-request-id": "abc:1"})).headers[
        "x-request-id"
    ] == "abc:1"
    drawn = {
        (await api.http.get("/nowhere", headers={"x-request-id": "a b"})).headers["x-request-id"]
        for _ in "ab"
    }
    assert len(drawn) == 2 and "a b" not in drawn


async def test_what_is_not_there_says_so_as_json(api: Api) -> None:
    for method, path, status, code in (
        ("GET", "/nowhere", 404, "not_found"),
        ("PUT", TEXT, 405, "method_not_allowed"),
        ("GET", TEXT, 405, "method_not_allowed"),
        ("GET", "/playground/no-such-file", 404, "not_found"),
    ):
        response = await api.http.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert (await api.http.head("/health")).status_code == 200


async def test_a_method_that_is_not_known_is_told_all_that_are(api: Api) -> None:
    for path, methods in (("/", "GET, HEAD, POST"), (TEXT, "POST")):
        response = await api.http.request("PUT", path)
        assert (response.status_code, response.headers.get_list("allow")) == (405, [methods])


async def test_requests_are_counted_by_route_and_status(api: Api) -> None:
    await api.http.get("/v1/models/fusionroute/math")
    await api.http.get("/v1/nowhere/at/all")
    await api.http.get("/playground/no-such-file")
    exposed = (await api.http.get("/metrics")).text
    for route, status in (("/v1/models", 200), (TEXT, 400), ("/playground", 404), ("other", 404)):
        line = f'fusionroute_router_http_seconds_count{{route="{route}",status="{status}"}}'
        assert line in exposed, line
    assert "nowhere" not in exposed
    assert "fusionroute_router_tokens_total" in exposed


async def test_pages_of_named_origins_may_call(api: Api) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for origin, is_allowed in (("http://page.example", True), ("http://other.example", False)):
        response = await api.http.options(TEXT, headers={"origin": origin, **asks})
        assert ("access-control-allow-origin" in response.headers) == is_allowed


async def test_readiness_and_version_are_told(stack: Stack, api: Api) -> None:
    assert (await api.http.get("/ready")).json() == {"ready": True, "reasons": []}
    version = (await api.http.get("/version")).json()
    assert version["checkpoint"] == stack.router.served.current.offer.checkpoint


async def test_every_route_is_described_and_every_description_has_a_route(api: Api) -> None:
    nobody: Any = None
    routes = {
        (route.path.replace(":path", ""), method)
        for route in all_routes(nobody)
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert routes == {operation.key for operation in OPERATIONS}
    assert (await api.http.get("/openapi.json")).json() == document()


# --- keys and certificates ---------------------------------------------------------------------------------------


def pem_of(files: TlsFiles) -> str:
    """The certificate alone."""
    assert files.certificate is not None
    return files.certificate.read_text().partition("-----END")[0]


async def served_certificate(url: str, context: ssl.SSLContext) -> str:
    """Which one a new connection gets."""
    host, _, port = url.removeprefix("https://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return ssl.DER_cert_to_PEM_cert(found).partition("-----END")[0]


async def test_everything_but_the_page_and_health_wants_a_key_over_an_encrypted_line(
    family: Family, tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "authority")
    files = authority.issue("services")
    assert files.certificate is not None and files.ca is not None
    keys = tmp_path / "keys"
    keys.write_text(f"shop:{KEY}\n")
    access = {
        "tls_cert": files.certificate,
        "tls_key": files.key,
        "tls_ca": files.ca,
        "tls_require_client": False,
        "api_keys_file": keys,
    }
    context = ssl.create_default_context(cafile=str(files.ca))
    async with served(family, http_port=0, start=False, **access) as stack:
        assert stack.router.http_url is not None and stack.router.http_url.startswith("https://")
        async with httpx2.AsyncClient(base_url=stack.router.http_url, verify=context) as client:
            for operation in OPERATIONS:
                path = operation.path.replace("{", "").replace("}", "")
                shown = await client.request(operation.method, path)
                assert (shown.status_code != 401) == operation.is_open, operation.key
                assert not operation.is_open or path.startswith(tuple(OPEN_PATHS)), operation.key
            for header, status in (
                ("Bearer wrong-key-0123456789abcdef", 401),
                (f"Basic {KEY}", 401),
                (f"bearer {KEY}", 200),
            ):
                answer = await client.get("/v1/models", headers={"authorization": header})
                assert answer.status_code == status
            before = pem_of(files)
            assert await served_certificate(stack.router.http_url, context) == before
            renewed = authority.issue("services")
            async with asyncio.timeout(20):
                while await served_certificate(stack.router.http_url, context) != pem_of(renewed):
                    await asyncio.sleep(0.1)
            assert pem_of(renewed) != before
            assert (await client.get("/health")).status_code == 200
            refused = await client.post(TEXT, content=b"x" * 100)
            assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
            assert refused.headers["www-authenticate"] == "Bearer"


# --- strangers' pages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://page.example"}, 200),  # named by the settings
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example"}, 403),  # found by somebody's name server
        ({"host": "localhost:1"}, 200),
        ({"host": "localhost:1", "origin": "http://localhost:1"}, 200),
        ({"host": "[::1]:1", "origin": "http://localhost:1"}, 403),
        ({"host": "[::1"}, 403),
    ],
)
async def test_pages_of_strangers_may_not_call_where_no_key_is_asked_for(
    api: Api, headers: dict[str, str], status: int
) -> None:
    answer = await api.http.get("/v1/models", headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "origin_not_allowed"
