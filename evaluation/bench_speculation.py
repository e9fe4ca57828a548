"""What drafting gains and costs: every drafter, and the automatic choice, against the plain loop, by workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evaluation.bench_decode import equal_share
from evaluation.bench_report import Bars, Cell, Finding, Table
from evaluation.bench_runs import OnRun, Runs, Spread, Way, ratio, take_turns
from evaluation.bench_served import ServedStack, ServedTurn, request_for
from fusionroute.v1.router_pb2 import Drafting, GenerateRequest

PLAIN, AUTO = "plain", "auto"
DRAFTERS = {
    "router": Drafting.DRAFTING_ROUTER,
    "expert": Drafting.DRAFTING_EXPERT,
    "lookup": Drafting.DRAFTING_LOOKUP,
    AUTO: Drafting.DRAFTING_AUTO,
}
NUM_WARMUPS = 2
LEAST_AUTO = 0.97
FIRST_WORD, WORD_BIAS = 2, 100.0

Prompts = Callable[[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Workload:
    """What is written.

    Attributes:
        num_sessions: at a time.
        turns_per_session: one after the other.
        ignore_eos: whether turns go on after the end of their answer.
        num_words: only so many ids are ever written; 0 = all.
        least_auto: what the automatic choice is to gain at least, as a factor.
    """

    name: str
    prompts: Prompts
    num_tokens: int
    temperature: float = 0.0
    num_sessions: int = 1
    turns_per_session: int = 1
    ignore_eos: bool = True
    num_words: int = 0
    least_auto: float = LEAST_AUTO


@dataclass(slots=True)
class Outcome:
    """Of one workload.

    Attributes:
        runs: by way.
        turns: of the measured runs, by way.
    """

    workload: Workload
    runs: dict[str, Runs]
    turns: dict[str, list[list[ServedTurn]]] = field(default_factory=dict)

    def gain(self, way: str) -> Spread:
        """Tokens per second against the plain loop's, round by round."""
        return ratio(self.runs[PLAIN].ms_per_token, self.runs[way].ms_per_token)

    def same_ids(self, way: str) -> Spread:
        """Share of equal ids against the plain loop."""
        ours, plain = ([turn.ids for run in self.turns[each] for turn in run] for each in (way, PLAIN))
        return equal_share(ours, plain)

    def drafts(self, way: str) -> tuple[int, int, int]:
        """Rounds that checked a draft, tokens drafted, tokens accepted."""
        each = [of for run in self.turns[way] for turn in run for of in turn.statistics.drafting]
        return (
            sum(of.num_rounds for of in each),
            sum(of.num_drafted_tokens for of in each),
            sum(of.num_accepted_tokens for of in each),
        )


async def measure_workload(
    plain: ServedStack,
    stack: ServedStack,
    workload: Workload,
    *,
    num_runs: int,
    on_run: OnRun = lambda done, total: None,
) -> Outcome:
    """Measures all ways on the same prompts, in turns.

    Args:
        plain: whose router neither drafts nor asks early.
        stack: the same models behind a router that may do both.
    """
    turns: dict[str, list[list[ServedTurn]]] = {name: [] for name in (PLAIN, *DRAFTERS)}

    def way(name: str, asked: ServedStack, drafting: Drafting.ValueType) -> Way:
        async def run(number: int) -> int:
            of_run: list[ServedTurn] = []
            for requests in _requests(workload, number, drafting):
                of_run += await asked.turns(requests)
            turns[name].append(of_run)
            return sum(len(turn.ids) for turn in of_run)

        return run

    async def prepare(number: int) -> None:
        """Both stacks have seen the round's prompts, so that no way gains by being asked after another one."""
        for requests in _requests(workload, number, Drafting.DRAFTING_OFF):
            for request in requests:
                request.sampling.max_tokens = 1
            await plain.turns(requests)
            await stack.turns(requests)
        await tidy()

    async def tidy() -> None:
        await plain.tidy()
        await stack.tidy()

    ways = {PLAIN: way(PLAIN, plain, Drafting.DRAFTING_OFF)}
    ways |= {name: way(name, stack, drafting) for name, drafting in DRAFTERS.items()}
    runs = await take_turns(
        ways, num_runs=num_runs, pids=[*plain.all_pids, *stack.all_pids], num_warmups=NUM_WARMUPS,
        prepare=prepare, tidy=tidy, on_run=on_run,
    )  # fmt: skip
    return Outcome(workload, runs, {name: of_way[NUM_WARMUPS:] for name, of_way in turns.items()})


def _requests(workload: Workload, number: int, drafting: Drafting.ValueType) -> list[list[GenerateRequest]]:
    """Of a round: turn after turn, of each the requests of all sessions."""
    rounds: list[list[GenerateRequest]] = []
    for turn in range(workload.turns_per_session):
        first = (number * workload.turns_per_session + turn) * workload.num_sessions
        rounds.append([])
        for prompt in range(first, first + workload.num_sessions):
            request = request_for(
                workload.prompts(prompt), workload.num_tokens, drafting=drafting,
                temperature=workload.temperature, seed=1 + prompt, ignore_eos=workload.ignore_eos,
            )  # fmt: skip
            for word in range(workload.num_words):
                request.sampling.logit_bias[FIRST_WORD + word] = WORD_BIAS
            rounds[-1].append(request)
    return rounds


def findings(outcome: Outcome) -> list[Finding]:
    """Of one workload."""
    name = outcome.workload.name
    same = min((outcome.same_ids(way) for way in DRAFTERS), key=lambda each: each.low)
    return [
        Finding(f"{name}: tokens / s, auto / plain", outcome.gain(AUTO), at_least=outcome.workload.least_auto),
        Finding(f"{name}: ids equal to plain, worst drafter", Spread(same.low, same.low, same.high), at_least=1.0),
    ]  # fmt: skip


def table(outcome: Outcome) -> Table:
    """Of one workload."""
    rows: list[list[Cell]] = []
    for way in (PLAIN, *DRAFTERS):
        runs, (rounds, drafted, accepted) = outcome.runs[way], outcome.drafts(way)
        tokens = sum(runs.num_tokens)
        gain = outcome.gain(way)
        rows.append([
            way, Spread.of(runs.tokens_per_second).median, gain.median, gain.low, gain.high,
            Spread.of(runs.cpu_ms_per_token).median,
            accepted / drafted if drafted else None, drafted / tokens, 1 + accepted / rounds if rounds else None,
            outcome.same_ids(way).low,
        ])  # fmt: skip
    columns = ("drafter", "tokens / s", "against plain", "least", "most", "CPU ms / token", "accepted",
               "drafted / token", "tokens / round", "equal ids")  # fmt: skip
    return Table(outcome.workload.name, columns, rows)


def panel(outcome: Outcome) -> Bars:
    """Of one workload."""
    gains = {way: outcome.gain(way) for way in DRAFTERS}
    return Bars(outcome.workload.name, "tokens per second against plain", gains, reference=1.0)
