"""Keys and values of the sessions: for each session and layer a pair of buffers, and parts shared with other sessions.

A buffer is laid out [key-value heads, capacity, head size], so that a step writes its tokens in place and attention
reads a plain view. Capacity is what `SessionTable` has reserved; it grows by small shares, and the cached part is
copied then. All changes between forwards name sessions and parts by id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

GRANULE_TOKENS = 16
"""Heads begin at multiples of so many tokens, so that the alignment of a key depends on its position alone."""

Pair = tuple[Tensor, Tensor]
"""Keys and values [heads, tokens, size]."""


@dataclass(slots=True, eq=False)
class SharedTokens:
    """Keys and values of tokens that several sessions begin with, in all layers; never written again.

    Attributes:
        start: position of the first of them.
    """

    start: int
    layers: dict[int, Pair] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SharedView:
    """The tokens [start, stop) of a shared part, as one session sees it."""

    part: SharedTokens
    stop: int

    def pair(self, layer: int, first: int) -> Pair:
        """Keys and values of the positions [first, stop)."""
        keys, values = self.part.layers[layer]
        begin, count = first - self.part.start, self.stop - first
        return keys.narrow(1, begin, count), values.narrow(1, begin, count)


class SessionCache:
    """Keys and values of one session in all layers.

    Attributes:
        capacity_tokens: room in its own buffers.
        shared: what it shares with others: its first tokens.
        num_shared: positions below this are in `shared`, the others in its own buffers.
    """

    __slots__ = ("_addresses", "_layers", "capacity_tokens", "num_shared", "shared")

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity_tokens = capacity_tokens
        self.shared: tuple[SharedView, ...] = ()
        self.num_shared = 0
        self._layers: dict[int, Pair] = {}
        self._addresses: list[int] | None = None

    def addresses(self, num_layers: int) -> list[int] | None:
        """For code that computes without tensors: tokens for which its own buffers have memory, then where the keys
        and the values of each layer are; None if some layer has none yet."""
        if self._addresses is None:
            pairs = [pair for layer in range(num_layers) if (pair := self._layers.get(layer)) is not None]
            if len(pairs) < num_layers:
                return None
            self._addresses = [
                pairs[0][0].shape[1],
                *(buffer.data_ptr() for pair in pairs for buffer in pair),
            ]
        return self._addresses

    def allocate(self, num_layers: int, like: Tensor, heads: tuple[int, int]) -> None:
        """Gives all layers buffers of so many heads and their size, for code that writes by addresses."""
        num_heads, size = heads
        for layer in range(num_layers):
            if layer not in self._layers:
                shape = (num_heads, _in_granules(self.capacity_tokens), size)
                self._layers[layer] = like.new_empty(shape), like.new_empty(shape)

    def resize(self, capacity_tokens: int, cached_length: int) -> None:
        """Makes room for more or fewer tokens of its own, keeping those below `cached_length`."""
        self.capacity_tokens = capacity_tokens
        kept = max(0, cached_length - self.num_shared)
        self._addresses = None
        for layer, pair in self._layers.items():
            self._layers[layer] = self._moved(pair, 0, kept)

    def extend(self, layer: int, past: int, keys: Tensor, values: Tensor) -> Pair:
        """Writes new keys and values [n, heads, size] at position `past`.

        Returns views [heads, own tokens, size] of all keys and values of its own so far, the new ones included.
        """
        pair = self._layers.get(layer)
        if pair is None:
            pair = self._layers[layer] = (self._allocate(keys), self._allocate(values))
        begin, count = past - self.num_shared, keys.shape[0]
        pair[0].narrow(1, begin, count).copy_(keys.transpose(0, 1))
        pair[1].narrow(1, begin, count).copy_(values.transpose(0, 1))
        return pair[0].narrow(1, 0, begin + count), pair[1].narrow(1, 0, begin + count)

    def append(self, layer: int, past: int, key: Tensor, value: Tensor) -> Pair:
        """As `extend`, for one token: key and value [heads, size]."""
        pair = self._layers.get(layer)
        if pair is None:
            return self.extend(layer, past, key.unsqueeze(0), value.unsqueeze(0))
        place = past - self.num_shared
        pair[0].select(1, place).copy_(key)
        pair[1].select(1, place).copy_(value)
        return pair[0].narrow(1, 0, place + 1), pair[1].narrow(1, 0, place + 1)

    def share(self, views: Sequence[SharedView]) -> None:
        """Begins with these parts; its own buffers go on from there."""
        self.shared = tuple(views)
        self.num_shared = views[-1].stop if views else 0

    def cut(self, length: int) -> None:
        """Keeps no more than `length` tokens of the shared ones."""
        if length < self.num_shared:
            kept = [view for view in self.shared if view.part.start < length]
            self.share([SharedView(view.part, min(view.stop, length)) for view in kept])

    def split(self, stop: int, cached_length: int, capacity_tokens: int) -> SharedView:
        """Gives its own tokens below `stop` away as a part, upon which it builds from then on."""
        part = SharedTokens(self.num_shared)
        given, self.capacity_tokens = stop - self.num_shared, capacity_tokens
        self._addresses = None
        for layer, (keys, values) in self._layers.items():
            part.layers[layer] = keys[:, :given].clone(), values[:, :given].clone()
            self._layers[layer] = self._moved((keys, values), given, cached_length - stop)
        view = SharedView(part, stop)
        self.share([*self.shared, view])
        return view

    def copied(self, num_tokens: int, capacity_tokens: int) -> SessionCache:
        """A cache of the same first tokens, all of them its own."""
        assert num_tokens >= self.num_shared == 0, "only what is in one piece is copied"
        copy = SessionCache(capacity_tokens)
        copy._layers = {layer: copy._moved(pair, 0, num_tokens) for layer, pair in self._layers.items()}
        return copy

    def _moved(self, pair: Pair, first: int, count: int) -> Pair:
        """New buffers that begin with `count` tokens of the old ones."""
        moved = self._like(pair[0]), self._like(pair[1])
        for new, old in zip(moved, pair, strict=True):
            new[:, :count] = old[:, first : first + count]
        return moved

    def _like(self, buffer: Tensor) -> Tensor:
        return buffer.new_empty((buffer.shape[0], _in_granules(self.capacity_tokens), buffer.shape[2]))

    def _allocate(self, new: Tensor) -> Tensor:
        _, heads, size = new.shape
        return new.new_empty((heads, _in_granules(self.capacity_tokens), size))


class KVCache:
    """The caches of all sessions of an engine."""

    def __init__(self) -> None:
        self._sessions: dict[str, SessionCache] = {}
        self._parts: dict[str, SharedTokens] = {}

    def room(self, session_id: str, capacity_tokens: int, cached_length: int) -> SessionCache:
        """The session's cache with room for `capacity_tokens` of its own; its first `cached_length` tokens are kept."""
        cache = self._sessions.get(session_id)
        if cache is None:
            cache = self._sessions[session_id] = SessionCache(capacity_tokens)
        elif cache.capacity_tokens != capacity_tokens:
            cache.resize(capacity_tokens, cached_length)
        if cached_length < cache.num_shared:
            cache.cut(cached_length)
        return cache

    def free(self, session_id: str) -> None:
        """Gives a session's memory back."""
        self._sessions.pop(session_id, None)

    def rename(self, session_id: str, new_id: str) -> None:
        """Hands a session's cache over to another session."""
        self._sessions[new_id] = self._sessions.pop(session_id)

    def split(
        self, session_id: str, part_id: str, stop: int, cached_length: int, capacity_tokens: int
    ) -> None:
        """Makes a session's own tokens below `stop` a part; the session keeps room for `capacity_tokens` beyond it."""
        view = self._sessions[session_id].split(stop, cached_length, capacity_tokens)
        self._parts[part_id] = view.part

    def build_upon(self, session_id: str, capacity_tokens: int, parts: Sequence[tuple[str, int]]) -> None:
        """Begins a session with parts, each up to the position beside it."""
        cache = self._sessions[session_id] = SessionCache(capacity_tokens)
        cache.share([SharedView(self._parts[part_id], stop) for part_id, stop in parts])

    def copy(self, session_id: str, from_id: str, num_tokens: int, capacity_tokens: int) -> None:
        """Begins a session with copies of another one's first tokens."""
        self._sessions[session_id] = self._sessions[from_id].copied(num_tokens, capacity_tokens)

    def free_part(self, part_id: str) -> None:
        """Gives a part's memory back once no session holds it."""
        del self._parts[part_id]


def _in_granules(num_tokens: int) -> int:
    return -(-num_tokens // GRANULE_TOKENS) * GRANULE_TOKENS
