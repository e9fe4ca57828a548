"""`fusionroute bench`: how fast, measured in one run on this machine."""

from __future__ import annotations

from fusionroute.cli.group import CommandGroup

bench = CommandGroup(
    name="bench",
    commands_at={
        "decode": "fusionroute.cli.bench_speed:decode",
        "throughput": "fusionroute.cli.bench_speed:throughput",
        "experts": "fusionroute.cli.bench_speed:experts",
        "rules": "fusionroute.cli.bench_speed:rules",
        "context": "fusionroute.cli.bench_state:context",
        "memory": "fusionroute.cli.bench_state:memory",
        "prefix": "fusionroute.cli.bench_state:prefix",
        "speculation": "fusionroute.cli.bench_ways:speculation",
        "wire": "fusionroute.cli.bench_ways:wire",
        "http": "fusionroute.cli.bench_http:http",
        "peers": "fusionroute.cli.bench_peers:peers",
        "all": "fusionroute.cli.bench_all:all_suites",
    },
    help="""Measure speed on this machine: ratios of what takes turns in one run.

    \b
    Example:
      fusionroute bench decode --lab demo
      fusionroute bench throughput --shape h512 --output throughput.json --plot throughput.png
    """,
)
