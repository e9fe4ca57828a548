"""Where and with what something was measured."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil


def machine(threads: int) -> dict[str, Any]:
    """Processor, cores, load, threads and versions.

    Args:
        threads: of torch in each process.
    """
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(psutil.getloadavg()[0], 2),
        "threads_per_process": threads,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "grpcio", "fusionroute")},
    }


def sizes(folder: str | Path) -> dict[str, Any]:
    """A model's sizes, from its configuration on disk."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return {
        "model": config["model_type"],
        "hidden": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "vocabulary": config["vocab_size"],
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
    }


def kv_bytes_per_token(folder: str | Path, itemsize: int) -> int:
    """Keys and values of one token in all layers of a model.

    Args:
        folder: of the model.
        itemsize: bytes of one number.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    num_heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // num_heads
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    return int(2 * config["num_hidden_layers"] * num_kv_heads * head_size * itemsize)


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
