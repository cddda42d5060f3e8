"""Rates in contexts, on answers that are known, and what is told of them."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from safesteer_lite.config import ContextName
from safesteer_lite.evaluation import contexts
from safesteer_lite.evaluation.contexts import ASKED_KINDS, PLAIN, Compared
from safesteer_lite.evaluation.scorecard import Rate, Scorecard
from safesteer_lite.export import card
from safesteer_lite.prompts.contexts import BEGUN, CONTEXTS, Question, questions
from safesteer_lite.prompts.sets import prompt_set
from safesteer_lite.shell.lines import scorecard_table
from tests.evaluation.cards import card as counted

REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Of course: it is easy."
LATE = " the first step. However, I cannot help with this."


def asked(names: list[ContextName], count: int = 6) -> list[Question]:
    return questions({kind: prompt_set(kind, "test", count) for kind in ASKED_KINDS}, names)


def pair(harmful: tuple[int, int], benign: tuple[int, int], n: int = 20) -> Compared:
    """Refusals before and after; benign ones are all of harmless prompts."""
    before, after = (
        Scorecard(Rate.of(h, n), Rate.of(0, n), Rate.of(b, n)) for h, b in zip(harmful, benign, strict=True)
    )
    return Compared(before, after)


def test_every_kind_is_asked_in_every_context_and_counted_there() -> None:
    found = asked(list(CONTEXTS))
    assert len(found) == len(CONTEXTS) * len(ASKED_KINDS) * 6
    # Refuses what is harmful, and whatever is asked under a system prompt.
    answers = [REFUSAL if one.kind == "harmful" or one.context == "system" else ANSWER for one in found]
    cards = contexts.cards(found, answers)
    assert list(cards) == list(CONTEXTS)
    for name, scorecard in cards.items():
        refused = [scorecard.of(kind).refused for kind in ASKED_KINDS]
        assert refused == ([6, 6, 6] if name == "system" else [6, 0, 0])
        assert [scorecard.of(kind).n for kind in ASKED_KINDS] == [6, 6, 6]


def test_an_answer_that_had_begun_is_read_to_its_end_and_others_by_their_opening() -> None:
    found = asked(list(CONTEXTS), 2)
    cards = contexts.cards(found, [LATE] * len(found))
    for name, scorecard in cards.items():
        assert scorecard.harmful.refused == (2 if name in BEGUN else 0)


def test_the_worst_contexts_are_named_with_their_counts() -> None:
    told = contexts.worst(
        {"system": pair((5, 15), (1, 9)), "turns": pair((6, 16), (0, 2)), "steps": pair((1, 2), (0, 0))},
    )
    assert told == (
        "In 3 contexts, over-refusal rose most under a system prompt (9 of 40 borderline and harmless prompts refused, 1 of 40 "
        "before), and harmful prompts are refused least where the answer was begun with steps (2 of 20, 1 of 20 before)."
    )
    doubtful = contexts.worst({"turns": pair((6, 16), (0, 1))})
    assert "1 of 40 borderline and harmless prompts refused, 0 of 40 before; chance could explain it)" in doubtful
    none = contexts.worst({"role": pair((6, 16), (2, 2)), "agreed": pair((1, 9), (3, 0))})
    assert none.startswith(
        "In 2 contexts, over-refusal rose in none (2 of 40 borderline and harmless prompts refused in a role"
    )
    assert contexts.worst({}) == ""
    assert contexts.worst({"role": pair((6, 16), (2, 2))}).startswith("In 1 context, over-refusal")


def tables() -> tuple[dict[str, Any], dict[str, Any]]:
    scorecard = {
        "before": counted(71, 23, 9, n=100, tax_n=100, critical=0, twin=2).to_record(),
        "after": {**counted(100, 100, 100, n=100, tax_n=100, critical=20, twin=20).to_record(), "kl_to_base": 0.0125},
    }
    return scorecard, contexts.to_record({name: pair((20, 20), (20, 20)) for name in CONTEXTS})


def printed(scorecard: dict[str, Any], in_contexts: dict[str, Any] | None, *, alone: bool = False) -> str:
    """The table as a terminal of 80 columns shows it."""
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(scorecard_table(scorecard, in_contexts, alone=alone))
    return captured.get()


def test_one_table_of_80_columns_has_every_rate_before_and_after() -> None:
    scorecard, in_contexts = tables()
    lines = printed(scorecard, in_contexts).splitlines()
    assert max(map(len, lines)) <= 80
    # Nothing was broken or cut: each name has its line, with what was refused before and after.
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert [row[0] for row in cells] == [*ASKED_KINDS, "twin", "critical", "KL, nats a token", *CONTEXTS.values()]
    assert cells[0] == ["harmful", "100", "71 (71 %, 61 to 79)", "100 (100 %, 96 to 100)"]
    assert cells[6:] == [[title, "20", "20 / 0 / 20", "20 / 0 / 20"] for title in CONTEXTS.values()]
    assert "harmful / borderline / harmless prompts refused, of n each" in " ".join(" ".join(lines).split())


def test_a_model_alone_has_one_column_and_no_kl() -> None:
    scorecard, in_contexts = tables()
    text = printed(scorecard, in_contexts, alone=True)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [row[0] for row in cells] == [*ASKED_KINDS, "twin", "critical", *CONTEXTS.values()]
    assert cells[0] == ["harmful", "100", "100 (100 %, 96 to 100)"] and cells[5][1:] == ["20", "20 / 0 / 20"]
    assert "KL" not in text and "before" not in text


def test_kinds_of_which_fewer_were_asked_are_told() -> None:
    scorecard, in_contexts = tables()
    in_contexts["role"]["after"]["borderline"]["n"] = 10
    assert "│ role play        │ 10-20 │" in printed(scorecard, in_contexts)


def test_a_run_without_contexts_has_the_table_of_old() -> None:
    scorecard, _ = tables()
    for side in scorecard.values():
        del side["critical"], side["twin"]
    text = printed(scorecard, None)
    assert PLAIN not in text and "critical" not in text and "twin" not in text and "harmless" in text


def test_the_model_card_has_the_same_rows_in_one_table() -> None:
    scorecard, in_contexts = tables()
    facts = card.Facts(
        *("title", "base", "mit", "", "", {}, 150, 1.0, "original"),
        scorecard=scorecard,
        contexts=in_contexts,
        context_tokens=48,
    )
    row = {"artifact": "merged", "file": ".", "size": 1, "safety_lost": "", **scorecard["after"]}
    text = card.card(facts, {"artifacts": [row]}, {})
    assert (
        "| | size | harmful refused | borderline refused | harmless refused | twin refused | critical refused |" in text
    )
    assert "| asked | prompts | before | after |" in text
    assert "| asked plainly | critical | 0 of 20 (0 to 16 %) | 20 of 20 (84 to 100 %) |" in text
    for title in CONTEXTS.values():
        assert text.count(f"| {title} | ") == 3
    assert "at most 48 tokens" in text
    without = card.card(card.Facts("title", "base", "mit", "", "", {}, 150, 1.0, "original"), {"artifacts": [row]}, {})
    assert "| asked |" not in without
