"""The HTTP port of the router, as its settings want it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fusionroute.access import ServerAccess, is_loopback
from fusionroute.http_server import serving_http
from fusionroute.watch_protocol import patient_for
from router_service.http.service import RouterApi
from router_service.settings import RouterSettings

REQUEST_SECONDS = 60.0
"""How long a caller may take to send a request."""
MOST_CONNECTIONS = 1024


@asynccontextmanager
async def serving_apis(
    settings: RouterSettings, api: RouterApi, access: ServerAccess
) -> AsyncIterator[str | None]:
    """Serves HTTP within the context where settings name a port; gives its URL, or None.

    Raises:
        PortTaken: naming the address.
    """
    if settings.http_port is None:
        yield None
        return
    from router_service.http.application import Admittance, application

    admittance = Admittance(
        access.keys,
        settings.http_max_body_bytes,
        settings.http_origin_names(),
        is_local=is_loopback(settings.http_host),
    )
    encryption = access.ssl_context()
    config: dict[str, Any] = {} if encryption is None else {"ssl_context_factory": lambda *_: encryption}
    async with serving_http(
        application(api, admittance),
        settings.http_host,
        settings.http_port,
        port_field="http_port",
        http=patient_for(REQUEST_SECONDS, MOST_CONNECTIONS),
        **config,
    ) as address:
        yield f"{'http' if encryption is None else 'https'}://{address}"
