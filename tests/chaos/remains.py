"""What a stack has left behind after its end: processes, sockets."""

from __future__ import annotations

import socket

from tests.chaos.stack import ChaosStack
from tests.chaos.supervisor import members


def remains_of(stack: ChaosStack) -> list[str]:
    """Processes that still run and addresses at which still somebody listens."""
    found = []
    for node in (*stack.nodes, *stack.retired):
        process = node.process
        for pid in process.pids:
            found += [f"process {member.pid} of {process.name}" for member in members(pid)]
        found += [f"{process.name} listens at {address}" for address in process.addresses if _listens(address)]
    return found


def _listens(address: str) -> bool:
    try:
        if address.startswith("/"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(address)
        else:
            host, _, port = address.rpartition(":")
            with socket.create_connection((host, int(port)), timeout=1.0):
                pass
    except OSError:
        return False
    return True
