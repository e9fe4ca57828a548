"""The command `router-service`."""

from __future__ import annotations

from fusionroute.settings import daemon_command
from router_service.settings import RouterSettings


def _run(settings: RouterSettings) -> int:
    from router_service.bootstrap import run

    return run(settings)


main = daemon_command(
    "router-service",
    "Writes answers token by token with the experts of a router checkpoint, and keeps their registry.\n\n"
    "Example: router-service --checkpoint ./models/router --port 50050",
    RouterSettings,
    _run,
)
