"""Noise of candidates as a hash of (seed, position, token id): the same for whoever draws it, wherever, whenever."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def gumbel_noise(seed: int, position: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise of each candidate, a hash of (seed, position, id)."""
    return gumbel(noise_bits(seed, position, ids))


def noise_bits(seed: int, position: int | NDArray[np.uint64], ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """52 bits for each candidate [n]; the higher, the more noise. Of several positions [T, 1] those of each, [T, n]."""
    with np.errstate(over="ignore"):
        place = np.asarray(position, dtype=np.uint64) + np.uint64(1)
        key = _mix(np.uint64(seed & (2**64 - 1)) + _mix(place * _GOLDEN))
        return _mix(key + np.asarray(ids, dtype=np.uint64) * _GOLDEN) >> np.uint64(12)


def gumbel(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Standard Gumbel noise [n] of bits [n]; increases with them."""
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-52
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def _mix(values: np.uint64 | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64."""
    mixed = np.array(values, dtype=np.uint64)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
