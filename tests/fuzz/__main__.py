"""The long run: ten thousand malformed requests for each service, and a table of what came back.

python -m tests.fuzz --count 10000 --seed 0
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
from tests.fuzz.fuzzing import Tally, fuzz
from tests.fuzz.health import is_serving
from tests.fuzz.targets import SERVICES, valid_requests
from tests.fuzz.test_malformed_requests import NORMAL
from tests.served_stack import make_family, served


async def _run(arguments: argparse.Namespace) -> bool:
    is_well = True
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        family = make_family(Path(folder), ("math", "strings"))
        for service in arguments.services.split(","):
            async with served(family) as stack:
                before = await stack.answer(NORMAL)
                instance = stack.router.directory.best("math")
                assert instance is not None
                address = instance.entry.address if service == "expert" else stack.router.server.address
                began = time.monotonic()
                async with channel(address) as open_channel:
                    tally = await fuzz(
                        open_channel,
                        SERVICES[service],
                        valid_requests(service, instance.entry.model),
                        arguments.count,
                        arguments.seed,
                    )
                    serves = await is_serving(open_channel)
                same = (await stack.answer(NORMAL)).ids == before.ids
                _show(service, tally, time.monotonic() - began, serves, same)
                is_well = is_well and serves and same and not tally.faults and not tally.num_hanging
    return is_well


def _show(service: str, tally: Tally, seconds: float, serves: bool, same: bool) -> None:
    print(f"\n{service}: {sum(tally.statuses.values())} requests in {seconds:.0f} s\n{tally.table()}")
    print(f"hanging {tally.num_hanging}, serves afterwards: {serves}, the same answer as before: {same}")
    for (method, words), count in tally.faults.most_common():
        print(f"  FAULT {count:5} {method}: {words}\n        {tally.examples[method, words][:80].hex()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="requests for each service")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--services", default=",".join(SERVICES))
    configure_logs("fuzz", log_level="critical")
    sys.exit(0 if asyncio.run(_run(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
