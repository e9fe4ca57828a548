"""Asks a gRPC server whether it is healthy, for container health checks.

    python -m fusionroute.health_probe 127.0.0.1:50050

Where the server is encrypted, FUSIONROUTE_TLS_CA (and _CERT, _KEY) say whom to trust and what to show.
Exit code 0: it serves. 1: it does not, or does not answer. 2: wrong arguments.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusionroute.access import ClientAccess

TIMEOUT_SECONDS = 3.0


def status_of(
    address: str, timeout_seconds: float = TIMEOUT_SECONDS, access: ClientAccess | None = None
) -> str:
    """The health of the whole server, for example "SERVING"; "UNREACHABLE: ..." when it does not answer.

    Args:
        access: certificates to show; None = those that the environment names. No key is needed.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from fusionroute.access import ClientAccess
    from fusionroute.errors import FusionRouteError

    options = [("grpc.enable_http_proxy", 0)]
    try:
        credentials = (access or ClientAccess.from_environment(with_key=False)).credentials()
    except FusionRouteError as error:
        return f"UNREACHABLE: {error.message}"
    with (
        grpc.insecure_channel(address, options=options)
        if credentials is None
        else grpc.secure_channel(address, credentials, options=options)
    ) as channel:
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)
        except grpc.RpcError as error:
            return f"UNREACHABLE: {error.code().name}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def main(arguments: list[str]) -> int:
    """The exit code."""
    if len(arguments) != 1 or ":" not in arguments[0]:
        print("usage: python -m fusionroute.health_probe HOST:PORT", file=sys.stderr)
        return 2
    status = status_of(arguments[0])
    print(status)
    return 0 if status == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
