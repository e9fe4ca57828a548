"""Short forwards on a GPU as recorded graphs: all but the attention, in pieces of fixed shape.

    [embed, project] -> attend -> [finish layer 0, project for 1] -> attend -> ... -> [finish, final norm] -> head

A GPU runs the fifteen kernels of a layer faster than Python can start them one by one. What lies between two attentions
has no shape but the number of rows, so it is recorded once for a few numbers of rows, in buffers of its own, and
replayed; rows beyond those wanted are padding. Attention stays as it is, since the caches come and go.
On a CPU the same pieces run unrecorded, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import structlog
import torch
from torch import Tensor
from torch.nn.functional import linear

from fusionroute.engine.attention import RaggedBatch, Segment
from fusionroute.engine.decoder import Decoder, Pass
from fusionroute.engine.kv_cache import SessionCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROW_COUNTS = (1, 2, 4, 8, 16, 32)
"""Numbers of rows that are recorded; forwards of more rows keep the GPU busy by themselves."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference from unrecorded hidden states, relative to the largest of them."""
_TIMES = 10

log = structlog.get_logger(__name__)


class GraphedDecoder(Decoder):
    """A decoder that replays recorded pieces where that has been measured to be faster.

    Args:
        model, width: as of `Decoder`.
    """

    def __init__(self, model: PreTrainedModel, width: int) -> None:
        super().__init__(model, width)
        self._steps: dict[int, PaddedStep] = {}

    def choose_layouts(self) -> None:
        """Measures which layouts are fast on this machine and, on a GPU, whether recorded pieces are."""
        super().choose_layouts()
        if self._embeddings.device.type == "cuda":
            self.record()

    def record(self) -> None:
        """Records the pieces, and keeps them if they compute what they should, and faster."""
        try:
            self._steps = {count: PaddedStep(self, count) for count in ROW_COUNTS}
            if self._embeddings.device.type == "cuda":
                pool = torch.cuda.graph_pool_handle()
                for step in self._steps.values():
                    step.capture(pool)
            why = self._why_not()
        except RuntimeError as error:  # of CUDA: out of memory, or something that cannot be recorded
            why = f"{type(error).__name__}: {error}"
        if why is not None:
            self._steps = {}
            log.warning("graphs_not_used", why=why)

    def run(
        self, batch: RaggedBatch, token_ids: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As `Decoder.run`."""
        count = next((count for count in self._steps if count >= len(token_ids)), None)
        if count is None or batch.exact:
            return super().run(batch, token_ids, positions, wanted)
        hidden = self._steps[count](batch, token_ids, positions)
        hidden = hidden.index_select(0, torch.tensor(wanted, dtype=torch.long, device=hidden.device))
        return self._head(hidden), hidden

    def _why_not(self) -> str | None:
        """What speaks against the recorded pieces."""
        steps = self._steps
        for count in steps:
            seconds, hidden = [], []
            for self._steps in ({}, steps):
                taken, states = self._timed(count)
                seconds.append(taken)
                hidden.append(states.float())
            difference = float((hidden[1] - hidden[0]).abs().max() / hidden[0].abs().max().clamp_min(1e-6))
            if difference > TOLERANCE[self._embeddings.dtype]:
                return f"hidden states of {count} rows differ by {difference:.1e}"
            if count == 1 and self._embeddings.device.type == "cuda" and seconds[1] >= seconds[0]:
                return f"a forward of one row takes {seconds[1]:.1e} s with them, {seconds[0]:.1e} without"
        return None

    def _timed(self, count: int) -> tuple[float, Tensor]:
        """Seconds of a forward of so many sessions, and its hidden states."""
        is_gpu = self._embeddings.device.type == "cuda"
        caches = [SessionCache(_TIMES + 1) for _ in range(count)]
        ids = [(7 * index + 3) % self._embeddings.shape[0] for index in range(count)]
        taken, hidden = [], self._embeddings
        for past in range(_TIMES if is_gpu else 2):
            started = time.perf_counter()
            segments = [Segment(cache, past, column, column + 1) for column, cache in enumerate(caches)]
            _, hidden = self.run(RaggedBatch(segments), ids, [past] * count, range(count))
            if is_gpu:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        return min(taken), hidden


class PaddedStep:
    """A forward of so many rows, in buffers of its own.

    Args:
        decoder: whose layers.
        num_rows: the most it takes; fewer are padded.
    """

    def __init__(self, decoder: GraphedDecoder, num_rows: int) -> None:
        self._decoder = decoder
        self._layers = decoder._layers
        device = decoder._embeddings.device
        cos, sin = decoder._rotary.at([0] * num_rows)
        self._token_ids = torch.zeros(num_rows, dtype=torch.long, device=device)
        self._run = Pass(
            RaggedBatch([]),
            cos.clone(),
            sin.clone(),
            decoder._rotary.rotate,
            linear,
            linear,
            decoder._activate,
        )
        queries = self._layers[0].projected(self._begun(), self._run)[0]
        self._attended = torch.zeros_like(queries).reshape(num_rows, -1).contiguous()
        self._x = queries
        self._pieces = [_Piece(self._begin), *(_Piece(self._between(i)) for i in range(1, len(self._layers)))]
        self._end = _Piece(self._finish)

    def __call__(self, batch: RaggedBatch, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Final hidden states [n, H], to be used before the next call."""
        count = len(token_ids)
        cos, sin = self._decoder._rotary.at(positions)
        self._token_ids[:count] = torch.tensor(token_ids, device=self._token_ids.device)
        self._run.cos[:count] = cos
        self._run.sin[:count] = sin
        for layer, piece in zip(self._layers, self._pieces, strict=True):
            self._x, queries, keys, values = piece()
            attended = layer.over_caches(batch, queries[:count], keys[:count], values[:count])
            self._attended[:count] = attended.reshape(count, -1)
        return self._end()[0][:count]

    def capture(self, pool: object) -> None:
        """Records the pieces, in the order in which they are to be replayed."""
        for piece in self._pieces:
            self._x = piece.capture(pool)[0]
        self._end.capture(pool)

    def _begun(self) -> Tensor:
        return self._decoder._first(self._token_ids)

    def _begin(self) -> tuple[Tensor, ...]:
        x = self._begun()
        return x, *self._layers[0].projected(x, self._run)

    def _between(self, index: int) -> Callable[[], tuple[Tensor, ...]]:
        before, layer = self._layers[index - 1], self._layers[index]

        def run() -> tuple[Tensor, ...]:
            x = before.finished(self._x, self._attended, self._run)
            return x, *layer.projected(x, self._run)

        return run

    def _finish(self) -> tuple[Tensor, ...]:
        return (
            self._decoder._final_norm(self._layers[-1].finished(self._x, self._attended, self._run), False),
        )


class _Piece:
    """Operations on buffers of fixed places; recorded, or run anew each time."""

    def __init__(self, function: Callable[[], tuple[Tensor, ...]]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def capture(self, pool: object) -> tuple[Tensor, ...]:
        """Records; returns where the results will be."""
        self._function()  # libraries make themselves ready outside of the recording
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device in the meantime.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            self._outputs = self._function()
        self._graph = graph
        return self._outputs

    def __call__(self) -> tuple[Tensor, ...]:
        if self._graph is None:
            return self._function()
        self._graph.replay()
        return self._outputs
