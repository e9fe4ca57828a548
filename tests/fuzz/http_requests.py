"""Malformed HTTP requests, drawn from a seed, as the bytes that go over the socket."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum

KEY = "open-sesame-open-sesame-open-sesame"
PATHS = ("/livez", "/progressz", "/readyz", "/metrics")
UNUSUAL_TARGETS = (
    "/",
    "*",
    "//",
    "/livez/",
    "/metrics//",
    "/livez/../metrics",
    "/%00",
    "/%ff%fe",
    "/liv%65z",
    "/%zz",
    "/livez?" + "q" * 3000,
    "/" + "x" * 9000,
    "http://elsewhere.invalid/livez/",
    "example.invalid:443",
    "livez",
    "/é",
    "/a b",
    "",
)
METHODS = (
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PATCH",
    "get",
    "G(T",
    "X" * 500,
)
VERSIONS = ("HTTP/1.1",) * 6 + ("HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "HTTP/1", "SMTP/1.1", "")
HEADERS = (
    "Host: [",
    "Host: a\r\nHost: b",
    "Host: \u202e",
    "Connection: close",
    "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x",
    "Connection: upgrade\r\nUpgrade: h2c",
    "Expect: 100-continue",
    "Content-Length: -1",
    "Content-Length: 99999999999999999999999",
    "Content-Length: 3\r\nContent-Length: 4",
    "Content-Length: 10",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: 3",
    "Range: bytes=0-1,2-",
    "Accept: */*;q=nan",
    "Cookie: \x01\x02",
    "X-Nul: a\0b",
    " folded: line",
    ": no name",
    "no colon",
    "Bad Name: x",
)
AUTHORIZATIONS = (
    "",
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    "Basic Og==",
    "bearer  \t" + KEY,
    "Bearer é",
    "Bearer " + "k" * 5000,
    KEY,
    f"Bearer {KEY}\r\nAuthorization: Bearer {KEY}",
    "Bearer \udcff",
)
TLS_HELLO = bytes.fromhex("16030100c8010000c40303")
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Kind(Enum):
    """How a request is malformed."""

    TARGET = "HTTP: a strange path"
    METHOD = "HTTP: a strange method or version"
    HEADERS = "HTTP: strange headers"
    OVERSIZE = "HTTP: oversize headers"
    AUTHORIZATION = "HTTP: bad authorization"
    BODY = "HTTP: a body"
    GARBAGE = "HTTP: raw bytes"
    DAMAGED = "HTTP: damaged bytes of a valid request"
    PIPELINED = "HTTP: requests in one piece"
    HALF = "HTTP: half a request, then silence"


@dataclass(frozen=True, slots=True)
class Drawn:
    """One request, or what should have become one."""

    kind: Kind
    data: bytes

    @property
    def is_half(self) -> bool:
        return self.kind is Kind.HALF


def draw(rng: random.Random) -> Drawn:
    """What is sent over one connection."""
    kind = rng.choice(list(Kind))
    return Drawn(kind, _bytes(rng, kind))


def _bytes(rng: random.Random, kind: Kind) -> bytes:
    path = rng.choice(PATHS)
    match kind:
        case Kind.TARGET:
            return _request(rng.choice(UNUSUAL_TARGETS), headers=_some_headers(rng, 1))
        case Kind.METHOD:
            return _request(path, rng.choice(METHODS), rng.choice(VERSIONS))
        case Kind.HEADERS:
            return _request(path, headers=_some_headers(rng, 4))
        case Kind.OVERSIZE:
            name, length, count = rng.choice(((1, 70_000, 1), (70_000, 1, 1), (9, 90, 3000), (1, 15_000, 2)))
            return _request(path, headers=["n" * name + ": " + "v" * length] * count)
        case Kind.AUTHORIZATION:
            return _request(path, headers=[f"Authorization: {rng.choice(AUTHORIZATIONS)}"], key=None)
        case Kind.BODY:
            return _request(path, rng.choice(METHODS[:4]), headers=_some_headers(rng, 2)) + _body(rng)
        case Kind.GARBAGE:
            noise = rng.randbytes(rng.choice([1, 2, 40, 400, 50_000]))
            return rng.choice([noise, TLS_HELLO + noise, HTTP2_PREFACE + noise, b"\r\n" * 500, b"\n"])
        case Kind.DAMAGED:
            return _damaged(rng, _request(path))
        case Kind.PIPELINED:
            return b"".join(_bytes(rng, _one_of_others(rng)) for _ in range(rng.randint(2, 5)))
        case Kind.HALF:
            whole = rng.choice([_request(path), _request(path, "POST", headers=["Content-Length: 9"]) + b"x"])
            return whole[: rng.randrange(len(whole))]


def _one_of_others(rng: random.Random) -> Kind:
    return rng.choice([kind for kind in Kind if kind not in (Kind.PIPELINED, Kind.HALF)])


def _request(
    target: str,
    method: str = "GET",
    version: str = "HTTP/1.1",
    headers: list[str] | None = None,
    key: str | None = KEY,
) -> bytes:
    lines = [f"{method} {target} {version}", "Host: watched", *(headers or [])]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode(errors="surrogateescape")


def _some_headers(rng: random.Random, most: int) -> list[str]:
    return rng.sample(HEADERS, rng.randint(0, most))


def _body(rng: random.Random) -> bytes:
    return rng.choice(
        [
            b"0123456789",
            b"5\r\nhello\r\n0\r\n\r\n",
            b"zzz\r\n",
            b"ffffffffffffffffffff\r\n",
            b"",
            rng.randbytes(100_000),
        ]
    )


def _damaged(rng: random.Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(damaged))
        match rng.randrange(3):
            case 0:
                damaged[place] = rng.randrange(256)
            case 1:
                damaged[place:place] = rng.randbytes(rng.randint(1, 20))
            case _:
                del damaged[place : place + rng.randint(1, 9)]
        damaged = damaged or bytearray(b"\0")
    return bytes(damaged)
