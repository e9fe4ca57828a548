"""A single model behind somebody else's server, as a baseline: one of TGI, or any that speaks OpenAI's API.

async with RemoteModel.open("http://127.0.0.1:3000") as model:
    print((await model.generate("2 + 2 =", RemoteSampling(max_tokens=8))).text)
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fusionroute.errors import OutOfRoom, Reason, Unavailable, invalid
from fusionroute.grpc_runtime import backoff_seconds
from fusionroute.remote_errors import error_of_status, meaning_of

if TYPE_CHECKING:
    from huggingface_hub import AsyncInferenceClient

KEY_VARIABLE = "FUSIONROUTE_REMOTE_API_KEY"
NO_KEY = "EMPTY"
"""What is shown where there is no key: without one the library would show the user's own of Hugging Face."""
PROBE_SECONDS = 10.0
MAX_PROBE_BYTES = 2**20
LARGEST_SEED = 2**63 - 1


class RemoteApi(StrEnum):
    """What a server speaks."""

    TGI = "tgi"
    OPENAI = "openai"


class RemoteEnding(StrEnum):
    """How an answer ended: by itself, or because there was no room for more tokens."""

    ENDED = "ended"
    CUT = "cut"


@dataclass(frozen=True, slots=True)
class RemoteSampling:
    """How an answer is written.

    Attributes:
        temperature: 0 = greedy.
        seed: None = the server's choice.
        json_schema: the answer shall be JSON of this schema; None = text. Only messages can be answered so, and not
            every server can: one that cannot refuses, or ignores it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    json_schema: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class RemoteAnswer:
    """What the server wrote."""

    text: str
    ending: RemoteEnding


@dataclass(frozen=True, slots=True)
class RemoteLimits:
    """What a call may wait for.

    Attributes:
        attempt_seconds: for one answer.
        patience_seconds: from the first attempt to the last, while the server is away or too busy.
    """

    attempt_seconds: float = 300.0
    patience_seconds: float = 120.0


class RemoteModel:
    """One model of one server.

    Attributes:
        url: of the server.
        api: what it speaks.
        name: of the model, as the server calls it.
        revision: of its weights, where the server tells; else empty.
    """

    def __init__(
        self,
        client: AsyncInferenceClient,
        url: str,
        api: RemoteApi,
        name: str,
        revision: str,
        limits: RemoteLimits,
    ) -> None:
        self.url, self.api, self.name, self.revision = url, api, name, revision
        self._client = client
        self._limits = limits

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        url: str,
        *,
        api: RemoteApi | None = None,
        model: str = "",
        api_key_file: Path | None = None,
        limits: RemoteLimits | None = None,
    ) -> AsyncIterator[RemoteModel]:
        """A model for as long as the block lasts.

        Args:
            url: http(s)://HOST:PORT, with a path where the server has one; `/v1` at its end may be left out.
            api: None = whichever the server answers to, TGI first.
            model: the server's name for it; empty = the one that it serves first.
            api_key_file: whose first line is the key; None = $FUSIONROUTE_REMOTE_API_KEY, if it is set.

        Raises:
            InvalidRequest: the URL, the file, or a server that speaks neither.
            AccessDenied: the server wants another key.
            Unavailable: it does not answer.
        """
        from huggingface_hub import AsyncInferenceClient

        url, key = _checked_url(url), _key(api_key_file)
        found = await asyncio.to_thread(_probe, url, api, key)
        limits = limits or RemoteLimits()
        async with AsyncInferenceClient(url, token=key, timeout=limits.attempt_seconds) as client:
            yield cls(client, url, found.api, model or found.name, found.revision, limits)

    @property
    def identity(self) -> str:
        """Whose answers these are: another identity, other answers."""
        return " ".join(part for part in (self.api.value, self.url, self.name, self.revision) if part)

    async def generate(
        self, prompt: str | Sequence[Mapping[str, str]], sampling: RemoteSampling
    ) -> RemoteAnswer:
        """The answer to a text or to messages. To a server that speaks OpenAI's API a text is a user's message.

        Raises:
            InvalidRequest: the server refuses the request; CONTEXT_FULL where the prompt is too long for it.
            AccessDenied: the key is not known there.
            OutOfRoom, Unavailable: the server was too busy or away until patience was at its end.
        """
        if isinstance(prompt, str) and self.api is RemoteApi.TGI:
            text = prompt
            return await self._patiently(lambda: self._continue(text, sampling))
        messages = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(map(dict, prompt))
        )
        return await self._patiently(lambda: self._chat(messages, sampling))

    async def _continue(self, text: str, sampling: RemoteSampling) -> RemoteAnswer:
        is_drawn = sampling.temperature > 0
        answer = await self._client.text_generation(
            text,
            details=True,
            max_new_tokens=sampling.max_tokens,
            do_sample=is_drawn,
            temperature=sampling.temperature if is_drawn else None,
            top_p=sampling.top_p if is_drawn else None,
            seed=_small(sampling.seed),
            stop=list(sampling.stop) or None,
        )
        reason = answer.details.finish_reason if answer.details is not None else "eos_token"
        return RemoteAnswer(answer.generated_text, _ending(reason))

    async def _chat(self, messages: list[dict[str, str]], sampling: RemoteSampling) -> RemoteAnswer:
        answer = await self._client.chat_completion(
            messages,
            model=self.name,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=_small(sampling.seed),
            stop=list(sampling.stop) or None,
            response_format=_response_format(sampling.json_schema, self.api),
        )
        choice = answer.choices[0]
        return RemoteAnswer(choice.message.content or "", _ending(choice.finish_reason))

    async def _patiently(self, ask: Callable[[], Awaitable[RemoteAnswer]]) -> RemoteAnswer:
        give_up_at, attempt = time.monotonic() + self._limits.patience_seconds, 0
        while True:
            try:
                async with asyncio.timeout(self._limits.attempt_seconds + 1.0):
                    return await ask()
            except Exception as error:
                found = meaning_of(error, self.url)
                if found is None:
                    raise
                wait = max(found.retry_after_seconds or 0.0, backoff_seconds(attempt))
                passes = isinstance(found, OutOfRoom | Unavailable)
                if not passes or time.monotonic() + wait > give_up_at:
                    raise found from None
            await asyncio.sleep(wait)
            attempt += 1


# --- what a server is --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    api: RemoteApi
    name: str
    revision: str


def _probe(url: str, api: RemoteApi | None, key: str) -> _Found:
    """What a server speaks and serves. Raises FusionRouteError."""
    if api is not RemoteApi.OPENAI:
        info = _get(f"{url}/info", key)
        if isinstance(info, dict) and "model_id" in info:
            return _Found(RemoteApi.TGI, str(info["model_id"]), str(info.get("model_sha") or ""))
        if api is RemoteApi.TGI:
            raise invalid("url", url, "a server of text-generation-inference, with /info")
    models = _get(f"{url}/v1/models", key)
    listed = models.get("data") if isinstance(models, dict) else None
    if isinstance(listed, list) and listed and isinstance(listed[0], dict) and "id" in listed[0]:
        return _Found(RemoteApi.OPENAI, str(listed[0]["id"]), "")
    raise invalid(
        "url", url, "a server that speaks the API of text-generation-inference or OpenAI's, with /v1/models"
    )


def _get(url: str, key: str) -> Any:
    """The JSON there; None where there is none."""
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"})  # noqa: S310 - checked
    try:
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as answer:  # noqa: S310 - checked
            return json.loads(answer.read(MAX_PROBE_BYTES))
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (404, 405):
                return None
            raise error_of_status(error.code, url, error.reason, error.headers) from None
    except ValueError:
        return None
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise Unavailable(Reason.REMOTE_UNAVAILABLE, f"{url} does not answer: {reason}") from None


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        shown = f"{parts.scheme}://{parts.hostname or ''}"
        raise invalid(
            "url", shown, "http(s)://HOST:PORT, without a name or password in it: keys come from files"
        )
    return url.rstrip("/").removesuffix("/v1")


def _key(file: Path | None) -> str:
    """Raises InvalidRequest naming the file, never what is in it."""
    if file is None:
        return os.environ.get(KEY_VARIABLE, "").strip() or NO_KEY
    try:
        lines = file.expanduser().read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        limit = f"a file that can be read: {type(error).__name__}"
        raise invalid("api_key_file", str(file), limit) from None
    if not lines:
        raise invalid("api_key_file", str(file), "a file whose first line is a key")
    return lines[0]


def _ending(reason: str | None) -> RemoteEnding:
    return RemoteEnding.CUT if reason == "length" else RemoteEnding.ENDED


class _AsItIs(dict[str, Any]):
    """A response format that the library sends on: one whose type it can look up it rewrites into TGI's form."""

    def get(self, key: str, default: Any = None) -> Any:
        """Nothing."""
        return default


def _response_format(schema: Mapping[str, Any] | None, api: RemoteApi) -> Any:
    """That answers are JSON of a schema, in OpenAI's form, or as TGI has it, by the library."""
    if schema is None:
        return None
    told = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": dict(schema)}}
    return told if api is RemoteApi.TGI else _AsItIs(told)


def _small(seed: int | None) -> int | None:
    """A seed that servers with signed integers take too."""
    return None if seed is None else seed & LARGEST_SEED
