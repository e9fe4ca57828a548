"""A daemon that keeps the daemons' promises (ready file, SIGTERM) or, by its model's name, breaks one.

good        serves until SIGTERM
dies        says why and exits with code 3
stubborn    ignores SIGTERM
parent      starts a child of its own, which ignores SIGTERM, and leaves it behind
mute        never says that it serves
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "checkpoint", "slot", "host", "port", "router", "ready-file", "threads"):
        parser.add_argument(f"--{name}")
    options, _ = parser.parse_known_args()
    behaviour = options.model or options.checkpoint
    if behaviour == "dies":
        print("the weights are not there", flush=True)
        sys.exit(3)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "parent":
        sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
        subprocess.Popen([sys.executable, "-c", sleeper])
    if behaviour != "mute":
        draft = Path(options.ready_file + ".draft")
        draft.write_text(f"127.0.0.1:{50000 + int(options.port or 0)}\n")
        draft.rename(options.ready_file)
    print(f"redis {os.environ.get('REDIS_URL')}")
    print(f"serving {behaviour} for {options.router or 'everybody'} on {options.threads} threads", flush=True)
    time.sleep(60)


if __name__ == "__main__":
    main()
