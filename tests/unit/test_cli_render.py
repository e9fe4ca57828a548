"""How streams look at a terminal: a pure function of their events."""

from __future__ import annotations

from fusionroute.cli.render import (
    ROUTER_STYLE,
    Palette,
    answer_text,
    legend_text,
    quoted,
    rule_name,
    ruler_text,
    summary_text,
    token_text,
    trace_text,
)
from fusionroute.cli.showcase import Shown, explain
from fusionroute.lab.tasks import examples
from fusionroute.v1.router_pb2 import (
    Candidate,
    CombineRule,
    Drafting,
    Finished,
    FinishReason,
    GenerationEvent,
    Started,
    Token,
    TopCandidates,
)


def event(text: str, expert: str, index: int = 0) -> GenerationEvent:
    return GenerationEvent(token=Token(index=index, id=5, text=text, expert=expert, logprob=-0.5))


EVENTS = [
    GenerationEvent(started=Started(session_id="s", seed=7, combine=CombineRule.COMBINE_RULE_SUM)),
    event("[", "format"),
    event("8", "math"),
    event("; ", "format"),
    event("fe", "strings"),
    event("", "strings"),
    event("bj", ""),
    GenerationEvent(finished=Finished(text="]", reason=FinishReason.FINISH_REASON_EOS)),
]


def test_the_answer_is_the_pieces_put_together_held_back_text_included() -> None:
    assert answer_text(EVENTS, Palette()).plain == "[8; febj]"


def test_a_degraded_token_looks_different_and_says_so() -> None:
    palette = Palette(["math"])
    plain = event("8", "math").token
    degraded = Token(id=5, text="8", expert="math", degraded=True)
    assert str(token_text(degraded, palette).style) != str(token_text(plain, palette).style)
    assert token_text(degraded, palette).plain == "8"
    assert "degraded" in trace_text(degraded, ["math"], palette).plain
    assert "degraded" not in trace_text(plain, ["math"], palette).plain
    finished = Finished(num_generated_tokens=9)
    assert "degraded" not in summary_text(Started(), finished).plain
    finished.statistics.num_degraded_tokens = 3
    assert "3 tokens degraded" in summary_text(Started(), finished).plain


def test_each_piece_has_the_style_of_its_expert() -> None:
    palette = Palette(["math", "strings", "format"])
    text = answer_text(EVENTS, palette)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["8"] == palette.look("math").style
    assert styles["fe"] == palette.look("strings").style
    assert styles["bj"] == ROUTER_STYLE
    assert len({palette.look(slot).style for slot in ("math", "strings", "format", "")}) == 4


def test_the_ruler_says_without_colour_who_wrote_what() -> None:
    assert ruler_text(EVENTS, Palette(["math", "strings", "format"])).plain == "fmffss++"


def test_the_ruler_is_as_wide_as_the_text_above_it_on_the_screen() -> None:
    wide = [event("\u5b57", "math"), event("a", "code")]
    assert ruler_text(wide, Palette()).plain == "mmc"


def test_marks_differ_even_where_slots_begin_alike() -> None:
    palette = Palette(["math", "maths", "m", "mmm"])
    marks = [palette.look(slot).mark for slot in ("math", "maths", "m", "mmm")]
    assert len(set(marks)) == 4
    assert marks[:3] == ["m", "a", "M"]


def test_a_slot_keeps_its_look_for_good() -> None:
    palette = Palette(["math"])
    first = palette.look("code")
    palette.look("law")
    assert palette.look("code") == first
    assert palette.slots == ["math", "code", "law"]


def test_many_experts_can_be_shown() -> None:
    palette = Palette(f"slot-{n}" for n in range(30))
    assert len(palette.slots) == 30
    assert legend_text(palette).plain.count("slot-") == 30


def test_the_legend_explains_every_mark() -> None:
    assert legend_text(Palette(["math", "code"])).plain == "m math   c code   + router alone"


def test_a_model_cannot_steer_the_terminal() -> None:
    text = token_text(Token(text="a\x1b[31m\rb\n\tc"), Palette()).plain
    assert text == "a\\x1b[31m\\rb\n\tc"


def test_text_that_looks_like_markup_stays_as_it_is() -> None:
    assert token_text(Token(text="[bold]x[/bold]", expert="math"), Palette()).plain == "[bold]x[/bold]"


def test_a_trace_line_tells_expert_logprob_weights_and_candidates() -> None:
    token = Token(index=3, id=17, text="\n", expert="math", logprob=-0.125, routing_weights=[0.75, 0.25])
    token.top.CopyFrom(TopCandidates(expert=[Candidate(id=1, text="", logprob=-0.01)]))
    line = trace_text(token, ["math", "code"], Palette()).plain
    assert "'\\n'" in line
    assert "m math" in line
    assert "-0.125" in line
    assert "w: math 0.75, code 0.25" in line
    assert "expert ''" in line
    assert "fused" not in line


def test_a_gates_last_weight_is_the_routers_own() -> None:
    token = Token(text="a", routing_weights=[0.1, 0.2, 0.7])
    assert "math 0.10, code 0.20, router 0.70" in trace_text(token, ["math", "code"], Palette()).plain


def test_the_summary_tells_how_to_get_the_same_answer_again() -> None:
    finished = Finished(reason=FinishReason.FINISH_REASON_LENGTH, num_prompt_tokens=4, num_generated_tokens=2)
    finished.statistics.total_seconds = 0.01
    text = summary_text(EVENTS[0].started, finished).plain
    assert "2 tokens after 4, length reached, 5.0 ms per token" in text
    assert "sum, seed 7, session s" in text


def test_the_summary_tells_what_came_of_drafts_and_early_asks() -> None:
    finished = Finished(reason=FinishReason.FINISH_REASON_LENGTH, num_generated_tokens=2)
    finished.statistics.num_early_asks, finished.statistics.num_early_hits = 9, 4
    finished.statistics.drafting.add(
        drafter=Drafting.DRAFTING_LOOKUP, num_rounds=1, num_drafted_tokens=4, num_accepted_tokens=3
    )
    text = summary_text(EVENTS[0].started, finished).plain
    assert "3 of 4 tokens drafted by lookup accepted, 4 of 9 early asks right" in text


def test_rules_are_called_as_the_options_call_them() -> None:
    assert rule_name(CombineRule.COMBINE_RULE_GATED_SUM) == "gated_sum"


def test_control_characters_are_made_visible() -> None:
    assert quoted("a\x1b[31m\t") == "'a\\x1b[31m\\t'"


def veto() -> Shown:
    item = next(item for item in examples() if item.prompt == "pls 4+3=")
    agreed = event("7", "math", 0)
    agreed.token.top.CopyFrom(TopCandidates(expert=[Candidate(id=5, text="7", logprob=0.0)]))
    overruled = event(", ok?", "math", 1)
    overruled.token.top.CopyFrom(
        TopCandidates(
            fused=[Candidate(id=5, text=", ok?", logprob=-0.1)],
            expert=[Candidate(id=1, text="", logprob=-0.01)],
            router=[Candidate(id=5, text=", ok?", logprob=-0.001)],
        )
    )
    finished = GenerationEvent(finished=Finished(reason=FinishReason.FINISH_REASON_EOS))
    return Shown(item, CombineRule.COMBINE_RULE_SUM, (agreed, overruled, finished))


def test_an_overruled_expert_is_found_and_told_in_words() -> None:
    shown = veto()
    assert shown.is_right
    assert [token.index for token in shown.overruled] == [1]
    assert explain(shown)[1] == (
        "token 2: expert math wanted to end the answer (p = 0.99); "
        "the router alone would write ', ok?' (p = 1.00); together they wrote ', ok?' (p = 0.90)"
    )


def test_an_answer_without_its_end_is_not_right() -> None:
    shown = veto()
    shown.events[-1].finished.reason = FinishReason.FINISH_REASON_LENGTH
    assert not shown.is_right
