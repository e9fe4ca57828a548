"""Keys and values of the sessions: one pair of buffers for each session and layer.

A buffer is laid out [key-value heads, capacity, head size], so that a step writes its tokens in place and attention
reads a plain view. Capacity is what `SessionTable` has reserved; when it grows by doubling, the cached part is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SessionCache:
    """Keys and values of one session in all layers."""

    __slots__ = ("_layers", "capacity_tokens")

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def grow(self, capacity_tokens: int, cached_length: int) -> None:
        """Makes room for more tokens, keeping the first `cached_length`."""
        self.capacity_tokens = capacity_tokens
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = (
                _regrown(keys, capacity_tokens, cached_length),
                _regrown(values, capacity_tokens, cached_length),
            )

    def extend(self, layer: int, past: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes new keys and values [n, heads, size] at position `past`.

        Returns views [heads, past + n, size] of all keys and values so far.
        """
        if layer not in self._layers:
            self._layers[layer] = (self._allocate(keys), self._allocate(values))
        all_keys, all_values = self._layers[layer]
        end = past + keys.shape[0]
        all_keys[:, past:end] = keys.transpose(0, 1)
        all_values[:, past:end] = values.transpose(0, 1)
        return all_keys[:, :end], all_values[:, :end]

    def _allocate(self, like: Tensor) -> Tensor:
        _, heads, size = like.shape
        return torch.empty((heads, self.capacity_tokens, size), dtype=like.dtype, device=like.device)


class KVCache:
    """The caches of all sessions of an engine."""

    def __init__(self) -> None:
        self._sessions: dict[str, SessionCache] = {}

    def room(self, session_id: str, capacity_tokens: int, cached_length: int) -> SessionCache:
        """The session's cache with room for `capacity_tokens`, of which the first `cached_length` are kept."""
        cache = self._sessions.get(session_id)
        if cache is None:
            cache = self._sessions[session_id] = SessionCache(capacity_tokens)
        elif cache.capacity_tokens < capacity_tokens:
            cache.grow(capacity_tokens, cached_length)
        return cache

    def free(self, session_id: str) -> None:
        """Gives a session's memory back."""
        self._sessions.pop(session_id, None)


def _regrown(old: Tensor, capacity_tokens: int, cached_length: int) -> Tensor:
    new = old.new_empty((old.shape[0], capacity_tokens, old.shape[2]))
    new[:, :cached_length] = old[:, :cached_length]
    return new
