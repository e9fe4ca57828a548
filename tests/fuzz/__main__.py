"""The long run: ten thousand malformed requests for each service and the watch port, and a table of what came back.

python -m tests.fuzz --count 10000 --seed 0 --services trainer,http
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from fusionroute.grpc_runtime import channel
from fusionroute.telemetry import configure_logs
from tests.fake_job import config_of
from tests.fuzz.configurations import fuzz_configurations
from tests.fuzz.fuzzing import Tally, fuzz
from tests.fuzz.health import is_serving
from tests.fuzz.http_fuzzing import fuzz_http, is_live, normal_answers, watched_daemon
from tests.fuzz.targets import SERVICES, valid_requests
from tests.fuzz.test_malformed_requests import NORMAL
from tests.fuzz.trainer_target import SERVICE as TRAINER
from tests.fuzz.trainer_target import served_trainer
from tests.served_stack import make_family, served


async def _run(arguments: argparse.Namespace) -> bool:
    verdicts = []
    for service in arguments.services.split(","):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            match service:
                case "trainer":
                    verdict = await _run_trainer(arguments, Path(folder))
                case "http":
                    verdict = await _run_http(arguments)
                case _:
                    verdict = await _run_serving(service, arguments, Path(folder))
            verdicts.append(verdict)
    return all(verdicts)


async def _run_serving(service: str, arguments: argparse.Namespace, folder: Path) -> bool:
    async with served(make_family(folder, ("math", "strings"))) as stack:
        before = await stack.answer(NORMAL)
        instance = stack.router.directory.best("math")
        assert instance is not None
        address = instance.entry.address if service == "expert" else stack.router.server.address
        began = time.monotonic()
        async with channel(address) as open_channel:
            valid = valid_requests(service, instance.entry.model)
            tally = await fuzz(open_channel, SERVICES[service], valid, arguments.count, arguments.seed)
            serves = await is_serving(open_channel)
        same = (await stack.answer(NORMAL)).ids == before.ids
        return _show(service, tally, time.monotonic() - began, serves, same)


async def _run_trainer(arguments: argparse.Namespace, folder: Path) -> bool:
    async with served_trainer(folder / "published") as trainer:
        before, began = await trainer.answer(), time.monotonic()
        async with channel(trainer.address) as open_channel:
            valid = trainer.valid_requests()
            tally = await fuzz(open_channel, TRAINER, valid, arguments.count, arguments.seed)
            await fuzz_configurations(open_channel, config_of(), arguments.count // 4, arguments.seed, tally)
            serves = await is_serving(open_channel)
        same = await trainer.answer() == before
        return _show("trainer", tally, time.monotonic() - began, serves, same)


async def _run_http(arguments: argparse.Namespace) -> bool:
    async with watched_daemon() as address:
        before, began = await normal_answers(address), time.monotonic()
        tally = await fuzz_http(address, arguments.count, arguments.seed)
        lives = await is_live(address)
        same = await normal_answers(address) == before
        return _show("http", tally, time.monotonic() - began, lives, same)


def _show(service: str, tally: Tally, seconds: float, serves: bool, same: bool) -> bool:
    print(f"\n{service}: {sum(tally.statuses.values())} requests in {seconds:.0f} s\n{tally.table()}")
    print(f"hanging {tally.num_hanging}, serves afterwards: {serves}, the same answer as before: {same}")
    for (method, words), count in tally.faults.most_common():
        print(f"  FAULT {count:5} {method}: {words}\n        {tally.examples[method, words][:80].hex()}")
    return serves and same and not tally.faults and not tally.num_hanging


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="requests for each of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--services", default=",".join([*SERVICES, "trainer", "http"]))
    configure_logs("fuzz", log_level="critical")
    sys.exit(0 if asyncio.run(_run(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
