"""Asks a gRPC server whether it is healthy, for container health checks.

    python -m fusionroute.health_probe 127.0.0.1:50050

Exit code 0: it serves. 1: it does not, or does not answer. 2: wrong arguments.
"""

from __future__ import annotations

import sys

TIMEOUT_SECONDS = 3.0


def status_of(address: str, timeout_seconds: float = TIMEOUT_SECONDS) -> str:
    """The health of the whole server, for example "SERVING"; "UNREACHABLE: ..." when it does not answer."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(address, options=options) as channel:
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
