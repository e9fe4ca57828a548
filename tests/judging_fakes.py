"""A server of OpenAI's API whose model judges by a rule that tests know."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_SHOWN = re.compile(
    r"\[Answer A\]\n(.*?)\n\[End of answer A\].*\[Answer B\]\n(.*?)\n\[End of answer B\]", re.DOTALL
)

Rule = Callable[[str, str], str]
"""From the answers shown as A and as B to the verdict."""


def prefers_the_longer(a: str, b: str) -> str:
    """A judge with a taste."""
    return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def prefers_the_one_shown_first(a: str, b: str) -> str:
    """A judge that does not read."""
    return "A"


def always_ties(a: str, b: str) -> str:
    """A judge without an opinion."""
    return "tie"


def talks_nonsense(a: str, b: str) -> str:
    """A judge that does not say a verdict, though it names both letters."""
    return "A and B are both fine, I would say A"


@dataclass
class FakeJudge:
    """What the server does, and what it was asked.

    Attributes:
        rule: the verdict on what is shown.
        refusals: statuses of the first requests, with a retry-after of no time, before it works.
        nonsense_seeds: seeds at which it talks nonsense instead.
        takes_schemas: whether it answers in JSON when a request has a schema.
        too_long: requests with this text in them are refused as too long.
        before: called at the start of each question.
    """

    rule: Rule = prefers_the_longer
    refusals: list[int] = field(default_factory=list)
    nonsense_seeds: frozenset[int] = frozenset()
    takes_schemas: bool = True
    too_long: str = "\0"
    before: Callable[[], None] = lambda: None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    _now: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body."""
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self.bodies.append(body)
            refusal = self.refusals.pop(0) if self.refusals else 0
        try:
            self.before()
            text = body["messages"][0]["content"]
            if refusal:
                return refusal, {"error": {"message": "not now"}}
            if self.too_long in text:
                return 400, {"error": {"message": "maximum context length exceeded"}}
            if "response_format" in body and not self.takes_schemas:
                return 400, {"error": {"message": "response_format is not supported"}}
            return 200, _completion(self._words(text, body))
        finally:
            with self._lock:
                self._now -= 1

    def _words(self, text: str, body: dict[str, Any]) -> str:
        found = _SHOWN.search(text)
        assert found is not None, text
        if body["seed"] in self.nonsense_seeds:
            return talks_nonsense(*found.groups())
        verdict = self.rule(*found.groups())
        if "response_format" in body:
            return json.dumps({"reasons": "its length", "verdict": verdict})
        return f"It is a matter of length.\n{verdict}"


@contextmanager
def serving(judge: FakeJudge) -> Iterator[str]:
    """Its URL, for as long as the block lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {"object": "list", "data": [{"id": "fake-judge"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._answer(*judge.reply(body))

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            if self.path == "/info":
                status, body = 404, {}
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            if status == 429:
                self.send_header("retry-after", "0.01")
            with suppress(ConnectionError):  # who asked may be gone
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "fake-judge",
        "system_fingerprint": "",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
