"""genlm-control in a process and an environment of its own, asked over pipes."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("genlm_worker.py")
LOAD_TIMEOUT_SECONDS = 600.0
RUN_TIMEOUT_SECONDS = 3600.0
END_TIMEOUT_SECONDS = 10.0
LONGEST_LINE_BYTES = 64 * 2**20
LAST_LINES = 6


class PeerFailed(RuntimeError):
    """The peer's process did not do what it was asked; the message holds its last words."""


@dataclass(slots=True)
class GenlmProduct:
    """The product of two models as genlm-control decodes it.

    Attributes:
        versions: of genlm-control and what it computes with, by name.
        patience_seconds: how long it may take to end by itself.
    """

    process: asyncio.subprocess.Process
    log: Path
    versions: Mapping[str, str]
    patience_seconds: float = END_TIMEOUT_SECONDS

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        python: Path,
        models: Sequence[str],
        prompts: Sequence[Sequence[int]],
        *,
        threads: int,
        log: Path,
        worker: Path = WORKER,
    ) -> AsyncIterator[GenlmProduct]:
        """Its process for as long as the block lasts, both models loaded.

        Args:
            python: the interpreter of its environment.
            models: two folders.
            prompts: what `generate` continues.
            threads: of torch.
            log: where its process writes what it has to say.
            worker: the script that it runs.

        Raises:
            PeerFailed: it cannot be started or cannot load the models.
        """
        with log.open("wb") as words:
            try:
                process = await asyncio.create_subprocess_exec(
                    str(python), "-I", str(worker),
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=words,
                    limit=LONGEST_LINE_BYTES, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                )  # fmt: skip
            except OSError as error:
                raise PeerFailed(f"{python} cannot be started: {error}") from error
        peer = cls(process, log, {})
        try:
            loading = {
                "do": "load",
                "models": [*models],
                "prompts": [*map(list, prompts)],
                "threads": threads,
            }
            peer.versions = (await peer._ask(loading, LOAD_TIMEOUT_SECONDS))["versions"]
            yield peer
        finally:
            await peer._end()

    async def generate(
        self,
        num_sessions: int,
        num_tokens: int,
        *,
        is_tuned: bool = False,
        timeout_seconds: float = RUN_TIMEOUT_SECONDS,
    ) -> list[list[int]]:
        """Greedy new ids for the first `num_sessions` prompts, all at the same time.

        Args:
            is_tuned: with what its settings can do for this work, see `genlm_worker`; else as they come.

        Raises:
            PeerFailed: the process has ended or did not answer in time.
        """
        request = {
            "do": "generate",
            "num_sessions": num_sessions,
            "num_tokens": num_tokens,
            "is_tuned": is_tuned,
        }
        ids: list[list[int]] = (await self._ask(request, timeout_seconds))["ids"]
        return ids

    async def _ask(self, request: Mapping[str, Any], timeout_seconds: float) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            async with asyncio.timeout(timeout_seconds):
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                await self.process.stdin.drain()
                line = await self.process.stdout.readline()
            answer: dict[str, Any] = json.loads(line)
        except TimeoutError:
            raise PeerFailed(f"no answer to {request['do']!r} within {timeout_seconds:.0f} s") from None
        except (OSError, ValueError):
            last = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
            raise PeerFailed(f"its process ended at {request['do']!r}: " + " | ".join(last)) from None
        return answer

    async def _end(self) -> None:
        """Closes its input, at which it ends; kills it where it does not."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            async with asyncio.timeout(self.patience_seconds):
                await self.process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
