"""The examples of clients, run as they are against a served stack."""

from __future__ import annotations

import asyncio
import sys

import pytest

from tests.judges.environment import ROOT
from tests.served_stack import Stack

pytestmark = pytest.mark.asyncio(loop_scope="package")
CLIENTS = ROOT / "examples" / "clients"
PROMPT = "w5 w9 w20"


async def run(name: str, *arguments: str, typed: str = "") -> tuple[str, str]:
    """What an example prints to standard output and to standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(CLIENTS / name),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        async with asyncio.timeout(60):
            out, err = await process.communicate(typed.encode())
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, err.decode()
    return out.decode(), err.decode()


async def test_the_chat_answers_each_line_with_all_that_was_said_before(stack: Stack) -> None:
    first = [{"role": "user", "content": "w5 w9"}]
    one = await stack.client.chat(first, max_tokens=64)
    both = [*first, {"role": "assistant", "content": one.text}, {"role": "user", "content": "w7"}]
    two = await stack.client.chat(both, max_tokens=64)
    out, _ = await run("chat.py", stack.client.address, typed="w5 w9\nw7\n")
    assert out == f"{one.text}\n{two.text}\n"


async def test_typing_on_ends_the_completions_before(stack: Stack) -> None:
    last = await stack.client.complete("w5 w9 w20", max_tokens=24, stop="\n")
    out, err = await run("ide_completion.py", stack.client.address, typed="w5\nw5 w9\nw5 w9 w20\n")
    assert out.rstrip("\n").split("\r")[-1] == f"w5 w9 w20{last.text}"
    assert "completions were ended by the next key" in err
    async with asyncio.timeout(10):
        while stack.router.keeper.num_running:
            await asyncio.sleep(0.01)


async def test_a_cut_answer_goes_on_at_the_next_token(stack: Stack) -> None:
    whole = await stack.client.complete(PROMPT, max_tokens=32)
    out, err = await run("resume.py", stack.client.address, PROMPT)
    before, after = out.rstrip("\n").split("|")
    assert before == "".join(token.text for token in whole.tokens[:3])
    assert before + after == whole.text
    assert err.strip() == whole.finish_reason.value


async def test_hugging_faces_client_prints_the_answer_twice(stack: Stack, http_url: str) -> None:
    whole = await stack.client.complete(PROMPT, max_tokens=32)
    out, _ = await run("tgi_client.py", http_url, PROMPT)
    assert out == f"{whole.text}\n{whole.text}\n"
