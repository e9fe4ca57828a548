"""The health probe against real servers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fusionroute.health_probe import main, status_of


@contextmanager
def server_that_says(status: int) -> Iterator[str]:
    servicer = health.HealthServicer()
    servicer.set("", status)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait(5)


def test_a_server_that_serves_is_healthy(capsys):
    with server_that_says(health_pb2.HealthCheckResponse.SERVING) as address:
        assert main([address]) == 0
    assert capsys.readouterr().out == "SERVING\n"


def test_a_server_that_drains_is_not(capsys):
    with server_that_says(health_pb2.HealthCheckResponse.NOT_SERVING) as address:
        assert main([address]) == 1
    assert capsys.readouterr().out == "NOT_SERVING\n"


def test_nobody_there_is_unhealthy_within_the_time_allowed():
    with server_that_says(health_pb2.HealthCheckResponse.SERVING) as address:
        pass
    assert status_of(address, timeout_seconds=1.0).startswith("UNREACHABLE: ")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["a:1", "b:2"]])
def test_wrong_arguments_are_told_apart(arguments, capsys):
    assert main(arguments) == 2
    assert "HOST:PORT" in capsys.readouterr().err
