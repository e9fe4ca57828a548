"""Models behind somebody else's server: asked through both APIs, patiently, and as authors of rejected answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fusionroute.errors import AccessDenied, FusionRouteError, InvalidRequest, OutOfRoom, Reason, Unavailable
from fusionroute.remote_models import (
    KEY_VARIABLE,
    RemoteApi,
    RemoteEnding,
    RemoteLimits,
    RemoteModel,
    RemoteSampling,
)
from tests.served_stack import Family, Stack
from trainer.config import DataTable, PairsJob
from trainer.pairs import collect_pairs
from trainer.remote_table import RemoteTable
from trainer.run_context import RunContext, RunResult

pytestmark = pytest.mark.asyncio(loop_scope="package")
PROMPT = "w5 w9 w20"
QUICK = RemoteLimits(attempt_seconds=5.0, patience_seconds=3.0)


@pytest.fixture
def family(stack: Stack) -> Family:
    return stack.family


@dataclass
class Scripted:
    """A server that answers as it was told.

    Attributes:
        replies: status and body by path, one after the other; the last one for ever.
        keys: what callers have shown.
    """

    replies: dict[str, list[tuple[int, Any]]]
    keys: set[str] = field(default_factory=set)
    paths: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)

    def reply(self, path: str) -> tuple[int, Any]:
        found = self.replies.get(path, [(404, {"error": "nothing here"})])
        return found.pop(0) if len(found) > 1 else found[0]


@contextmanager
def serving(scripted: Scripted) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            scripted.keys.add(self.headers.get("authorization", ""))
            scripted.paths.append(self.path)
            status, body = scripted.reply(self.path)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            scripted.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.do_GET()

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


INFO = {"/info": [(200, {"model_id": "m", "model_sha": "s"})]}
TOLD = {
    "generated_text": "ok",
    "details": {"finish_reason": "length", "generated_tokens": 1, "prefill": [], "tokens": []},
}
CHAT = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "big",
    "system_fingerprint": "",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "well"}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


async def ask(url: str, prompt: Any = PROMPT, max_tokens: int = 4, **options: Any) -> str:
    async with RemoteModel.open(url, limits=QUICK, **options) as model:
        return (await model.generate(prompt, RemoteSampling(max_tokens))).text


async def test_our_own_router_is_recognised_and_answers_as_itself(stack: Stack, http_url: str) -> None:
    async with RemoteModel.open(http_url) as model:
        assert (model.api, model.name) == (RemoteApi.TGI, "fusionroute")
        assert model.revision == (await stack.client.info()).checkpoint
        greedy = await model.generate(PROMPT, RemoteSampling(6))
        drawn = await model.generate(PROMPT, RemoteSampling(6, temperature=1.0, seed=2**64 - 1))
    for answer, options in ((greedy, {}), (drawn, {"temperature": 1.0, "seed": 2**63 - 1})):
        wanted = await stack.client.complete(PROMPT, max_tokens=6, **options)
        assert answer.text == wanted.text
        assert answer.ending is (RemoteEnding.CUT if wanted.finish_reason == "length" else RemoteEnding.ENDED)


async def test_a_server_of_openais_api_is_asked_by_chat_and_by_its_own_name_of_the_model() -> None:
    scripted = Scripted(
        {"/v1/models": [(200, {"data": [{"id": "big"}]})], "/v1/chat/completions": [(200, CHAT)]}
    )
    with serving(scripted) as url:
        async with RemoteModel.open(f"{url}/v1/") as model:
            assert (model.api, model.name, model.url) == (RemoteApi.OPENAI, "big", url)
            answer = await model.generate("hello", RemoteSampling(7, temperature=0.5, seed=3, stop=("x",)))
            await model.generate([{"role": "system", "content": "be short"}], RemoteSampling(1))
    assert (answer.text, answer.ending) == ("well", RemoteEnding.ENDED)
    first, second = scripted.bodies
    assert first["messages"] == [{"role": "user", "content": "hello"}]
    assert first["model"] == "big"
    assert (first["max_tokens"], first["temperature"], first["seed"]) == (7, 0.5, 3)
    assert first["stop"] == ["x"]
    assert second["messages"] == [{"role": "system", "content": "be short"}]


async def test_a_busy_or_absent_server_is_asked_again_until_it_answers() -> None:
    busy = (429, {"error": "Model is overloaded", "error_type": "overloaded"})
    broken = (424, {"error": "Request failed during generation", "error_type": "generation"})
    scripted = Scripted(INFO | {"/": [busy, (503, {}), broken, (200, [TOLD])]})
    with serving(scripted) as url:
        assert await ask(url) == "ok"
    assert scripted.paths == ["/info", "/", "/", "/", "/"]


@pytest.mark.parametrize(
    ("status", "body", "kind", "reason"),
    [
        (422, {"error": "`inputs` must have less than 9 tokens", "error_type": "validation"}, InvalidRequest,
         Reason.CONTEXT_FULL),
        (422, {"error": "`seed` must be small", "error_type": "validation"}, InvalidRequest, Reason.INVALID_FIELD),
        (401, {"error": {"message": "who are you"}}, AccessDenied, Reason.UNAUTHENTICATED),
        (429, {"error": "Model is overloaded", "error_type": "overloaded"}, OutOfRoom, Reason.QUEUE_FULL),
        (500, {"error": "boom"}, Unavailable, Reason.REMOTE_UNAVAILABLE),
    ],
)  # fmt: skip
async def test_errors_name_url_and_status_and_patience_has_an_end(
    status: int, body: Any, kind: type[FusionRouteError], reason: Reason
) -> None:
    with serving(Scripted(INFO | {"/": [(status, body)]})) as url:
        async with RemoteModel.open(url, limits=RemoteLimits(5.0, patience_seconds=0.3)) as model:
            with pytest.raises(kind, match=f"{url} answered {status}: ") as caught:
                await model.generate(PROMPT, RemoteSampling(4))
    assert caught.value.reason is reason


async def test_who_does_not_answer_or_speaks_neither_api_is_named() -> None:
    with serving(Scripted({})) as url:
        with pytest.raises(InvalidRequest, match="speaks the API of"):
            await ask(url)
        with pytest.raises(InvalidRequest, match="with /info"):
            await ask(url, api=RemoteApi.TGI)
    with pytest.raises(Unavailable, match=f"{url}/info does not answer: .*refused"):
        await ask(url)


async def test_keys_come_from_files_or_the_environment_and_are_told_to_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_user")
    scripted = Scripted(INFO | {"/": [(200, [TOLD])]})
    (tmp_path / "key").write_text("from-file\n")
    with serving(scripted) as url:
        for variable, options, shown in (
            ("", {}, "Bearer EMPTY"),
            ("from-variable", {}, "Bearer from-variable"),
            ("from-variable", {"api_key_file": tmp_path / "key"}, "Bearer from-file"),
        ):
            monkeypatch.setenv(KEY_VARIABLE, variable)
            scripted.keys.clear()
            assert await ask(url, **options) == "ok"
            assert scripted.keys == {shown}
    (tmp_path / "key").write_text("\n")
    with pytest.raises(InvalidRequest, match="api_key_file"):
        await ask(url, api_key_file=tmp_path / "key")
    with pytest.raises(InvalidRequest) as caught:
        await ask("http://user:secret@127.0.0.1:1")
    assert "secret" not in str(caught.value)


# --- pairs ---------------------------------------------------------------------------------------------------------


def job(folder: Path, family: Family, url: str, **changes: Any) -> PairsJob:
    path = folder / "prompts.jsonl"
    lines = [{"prompt": f"w{n} w{n + 1} w7", "completion": " w9 w8"} for n in range(2, 8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return PairsJob(
        data=DataTable(files=(path,)),
        output=folder / "pairs.jsonl",
        checkpoint=str(family.router),
        max_new_tokens=6,
        remote=RemoteTable(url=url),
        **changes,
    )


async def collect(config: PairsJob, folder: Path) -> RunResult:
    return await asyncio.to_thread(collect_pairs, config, RunContext(folder / "run"))


async def test_rejected_answers_are_those_of_the_remote_model_and_are_asked_for_once(
    stack: Stack, family: Family, http_url: str, tmp_path: Path
) -> None:
    config = job(tmp_path, family, http_url)
    result = await collect(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert result.metrics["pairs"] == len(rows) == 6
    for row in rows:
        assert row["rejected"] == (await stack.client.complete(row["prompt"], max_tokens=6)).text
    journal = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    assert json.loads(journal[0])["checkpoint"].startswith(f"tgi {http_url} fusionroute")
    num_forwards = stack.router.engine.load().num_forwards
    assert (await collect(config, tmp_path)).metrics == result.metrics
    assert stack.router.engine.load().num_forwards == num_forwards


async def test_a_prompt_that_is_too_long_for_the_remote_model_is_no_pair(
    family: Family, tmp_path: Path
) -> None:
    full = {"error": "`inputs` tokens + `max_new_tokens` must be <= 8", "error_type": "validation"}
    replies = [(422, full), (200, [TOLD])]
    with serving(Scripted(INFO | {"/": replies})) as url:
        result = await collect(job(tmp_path, family, url, concurrency=1), tmp_path)
    assert (result.metrics["unusable"], result.metrics["pairs"], result.metrics["cut"]) == (1, 5, 5)


async def test_without_a_checkpoint_nobody_is_asked(family: Family, tmp_path: Path) -> None:
    config = job(tmp_path, family, "http://127.0.0.1:1").model_copy(update={"checkpoint": ""})
    with pytest.raises(InvalidRequest, match="checkpoint"):
        await collect(config, tmp_path)
