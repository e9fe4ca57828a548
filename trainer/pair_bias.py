"""What the experts think of preference pairs before anything is trained.

At step 0 the router equals its reference, so the margin of L_CDPO (method section 3) is the bias alone:

    bias = beta * (l_exp chosen - l_exp rejected),   l_exp = sum_p g_{k(p)}[p]

and every pair's gradient is scaled by sigmoid(-bias). Where the experts already tell right from wrong, the bias is
far above zero and such pairs teach next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fusionroute.errors import Reason, TrainingFailed
from trainer.rows import Labels, PairSet

FAR_ABOVE_ZERO = 1.0
WEAK_SIGMOID = 0.1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NARROWEST_BIN = 0.01
_PAIRS_AT_A_TIME = 4096
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class BiasStatistics:
    """The bias of every pair.

    Attributes:
        bias: ``[N]`` float32, the margin at step 0.
        beta: the one it was computed with.
    """

    bias: NDArray[np.float32]
    beta: float

    @cached_property
    def sigmoid_neg_margin(self) -> NDArray[np.float32]:
        """``[N]`` sigmoid(-bias): what scales each pair's gradient at step 0."""
        return np.asarray(0.5 * (1.0 - np.tanh(0.5 * self.bias)), dtype=np.float32)

    @property
    def mean(self) -> float:
        """Mean bias; 0 without pairs."""
        return float(self.bias.mean(dtype=np.float64)) if len(self.bias) else 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the bias; 0 without pairs."""
        return float(self.bias.std(dtype=np.float64)) if len(self.bias) else 0.0

    @property
    def mean_sigmoid(self) -> float:
        """Mean of sigmoid(-bias); 0.5 is plain DPO's."""
        return float(self.sigmoid_neg_margin.mean(dtype=np.float64)) if len(self.bias) else 0.5

    @property
    def loss(self) -> float:
        """L_CDPO at step 0: mean of -log sigmoid(bias)."""
        return float(np.logaddexp(0.0, -self.bias.astype(np.float64)).mean()) if len(self.bias) else 0.0

    @property
    def weak_share(self) -> float:
        """Share of pairs whose gradient is scaled to less than a tenth."""
        return float((self.sigmoid_neg_margin < WEAK_SIGMOID).mean()) if len(self.bias) else 0.0

    @property
    def warning(self) -> str | None:
        """What is wrong with pairs like these; None where nothing is."""
        if self.mean <= FAR_ABOVE_ZERO:
            return None
        return (
            f"mean bias {self.mean:+.2f} is far above 0 (warned of above {FAR_ABOVE_ZERO:g}): the experts tell these "
            f"pairs apart already, so their gradient is next to dead: sigmoid(-margin) is {self.mean_sigmoid:.2f} in "
            f"the mean and below {WEAK_SIGMOID:g} for {self.weak_share:.0%} of them. Take wrong answers of the fused "
            "policy itself as rejected ones (fusionroute train pairs)."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values with both histograms, as `bias.json` and the report have them."""
        quantiles = np.quantile(self.bias, QUANTILES) if len(self.bias) else np.zeros(len(QUANTILES))
        return {
            "num_pairs": len(self.bias),
            "beta": self.beta,
            "mean": self.mean,
            "std": self.std,
            "quantiles": {
                f"{share:g}": float(value) for share, value in zip(QUANTILES, quantiles, strict=True)
            },
            "mean_sigmoid_neg_margin": self.mean_sigmoid,
            "weak_share": self.weak_share,
            "loss": self.loss,
            "bias_histogram": Histogram.of_bias(self.bias, num_bins=32).to_json(),
            "sigmoid_histogram": Histogram.of_shares(self.sigmoid_neg_margin, num_bins=20).to_json(),
            "warning": self.warning,
        }


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between edges; what lies beyond the outer edges counts to the outer bins."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of_bias(cls, values: NDArray[np.float32], num_bins: int) -> Histogram:
        """About so many bins of a round width, one edge at 0, over all but the outermost hundredths."""
        low, high = np.quantile(values, [0.01, 0.99]) if len(values) else (0.0, 0.0)
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        width = _round_width(max((high - low) / num_bins, NARROWEST_BIN))
        first, last = math.floor(low / width), max(math.ceil(high / width), math.floor(low / width) + 1)
        return cls._counted(values, [number * width for number in range(first, last + 1)])

    @classmethod
    def of_shares(cls, values: NDArray[np.float32], num_bins: int) -> Histogram:
        """Equal bins from 0 to 1."""
        return cls._counted(values, [number / num_bins for number in range(num_bins + 1)])

    @classmethod
    def _counted(cls, values: NDArray[np.float32], edges: list[float]) -> Histogram:
        inside = np.clip(values.astype(np.float64), edges[0], edges[-1])
        counts, _ = np.histogram(inside, bins=edges)
        return cls(tuple(edges), tuple(int(count) for count in counts))

    def to_json(self) -> dict[str, list[float]]:
        """Edges and counts as lists."""
        return {"edges": list(self.edges), "counts": list(self.counts)}

    def lines(self, width: int) -> Iterator[str]:
        """One line for each bin, its bar at most so many characters long."""
        most = max(self.counts, default=0) or 1
        step = self.edges[1] - self.edges[0]
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        labels = [f"{edge:z.{digits}f}" for edge in self.edges]
        room = max(map(len, labels))
        for low, high, count in zip(labels, labels[1:], self.counts, strict=False):
            yield f"  {low:>{room}} .. {high:>{room}}  {_bar(count / most * width):<{width}} {count:>7,}"


def pair_bias(
    labels: Labels,
    pairs: PairSet,
    routes: NDArray[np.integer[Any]],
    *,
    beta: float = 0.1,
    bias_scale: float = 1.0,
    bias_reduction: Literal["sum", "mean"] = "sum",
) -> BiasStatistics:
    """The bias of every pair under the given routes.

    Args:
        labels: of the experts about the T targets of `pairs.rows`.
        pairs: N pairs.
        routes: ``[T]`` index of the expert that each target is routed to.
        beta: scales the margin.
        bias_scale: 1 = as in the paper, 0 = plain DPO.
        bias_reduction: l_exp as a sum over the response's targets, or as their mean.

    Raises:
        ValueError: labels or routes are not about the targets of these pairs.
        TrainingFailed: LOSS_NOT_FINITE, naming the first pair whose bias is not a number.
    """
    num_targets = pairs.rows.num_targets
    if len(routes) != num_targets or len(labels.gold_logprobs) != num_targets:
        raise ValueError(
            f"{num_targets} targets, but {len(labels.gold_logprobs)} labels and {len(routes)} routes"
        )
    bias = np.empty(len(pairs), dtype=np.float32)
    for first in range(0, len(pairs), _PAIRS_AT_A_TIME):
        last = min(first + _PAIRS_AT_A_TIME, len(pairs))
        responses = _response_logprobs(labels, pairs, routes, 2 * first, 2 * last, bias_reduction)
        bias[first:last] = beta * bias_scale * (responses[0::2] - responses[1::2])
    broken = np.flatnonzero(~np.isfinite(bias))
    if len(broken):
        what = f"the bias of pair {broken[0]} is {bias[broken[0]]}: an expert gave no finite log-probability"
        raise TrainingFailed(Reason.LOSS_NOT_FINITE, what)
    return BiasStatistics(bias, beta)


def render_histogram(statistics: BiasStatistics, width: int = 40) -> str:
    """Bias and sigmoid(-margin) as text for a terminal, with the warning where there is one."""
    bias = Histogram.of_bias(statistics.bias, num_bins=14)
    shares = Histogram.of_shares(statistics.sigmoid_neg_margin, num_bins=10)
    lines = [
        f"bias of {len(statistics.bias):,} pairs before any training (beta {statistics.beta:g}): "
        f"mean {statistics.mean:+.2f}, std {statistics.std:.2f}",
        *bias.lines(width),
        "",
        f"sigmoid(-margin), which scales each pair's gradient: mean {statistics.mean_sigmoid:.2f}, "
        f"{statistics.weak_share:.0%} below {WEAK_SIGMOID:g}",
        *shares.lines(width),
    ]
    if statistics.warning is not None:
        lines += ["", f"WARNING: {statistics.warning}"]
    return "\n".join(lines)


def _response_logprobs(
    labels: Labels,
    pairs: PairSet,
    routes: NDArray[np.integer[Any]],
    first_row: int,
    last_row: int,
    reduction: Literal["sum", "mean"],
) -> NDArray[np.float64]:
    """l_exp of the rows from `first_row` up to `last_row`."""
    starts = pairs.rows.target_starts[first_row : last_row + 1]
    targets = slice(int(starts[0]), int(starts[-1]))
    chosen = np.asarray(routes[targets], dtype=np.int64)[:, None]
    routed = np.take_along_axis(np.asarray(labels.gold_logprobs[targets]), chosen, axis=1)[:, 0]
    num_targets = np.diff(starts)
    row_of_target = np.repeat(np.arange(len(num_targets)), num_targets)
    sums = np.asarray(np.bincount(row_of_target, routed, minlength=len(num_targets)), dtype=np.float64)
    return sums / np.maximum(num_targets, 1) if reduction == "mean" else sums


def _round_width(wanted: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `wanted`."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= wanted * (1 - 1e-9))


def _bar(eighths_of: float) -> str:
    eighths = math.ceil(eighths_of * 8)
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (_EIGHTHS[rest] if rest else "")
