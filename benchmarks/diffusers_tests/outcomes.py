"""What becomes of a case, and the table of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.diffusers_tests.checks import CRASH, NOT_ASKED, REFUSED, UNKNOWN, WRONG, YES

EXACT = "exact in every check"
EXACT_WITHOUT_LORA = "exact in every check, no LoRA asked"
EXACT_WITHOUT_KL = "exact, path KL nan and said"
REFUSED_CASE = "refused in one sentence"
WRONG_CASE = "wrong without a word"
CRASHED = "crashed"
NOT_BUILT = "could not be built"
TIMED_OUT = "not finished in its time"

OUTCOMES = (
    EXACT,
    EXACT_WITHOUT_LORA,
    EXACT_WITHOUT_KL,
    REFUSED_CASE,
    NOT_BUILT,
    TIMED_OUT,
    CRASHED,
    WRONG_CASE,
)
"""In the order of the table."""

KINDS = {
    "image": "image pipelines",
    "video": "video pipelines",
    "own": "without a test of diffusers",
    "scheduler": "schedulers",
}
"""Of cases, and the headers of their columns."""


def outcome_of(answers: Mapping[str, str]) -> str:
    """What becomes of a pipeline by the answers of its checks."""
    words = {name: answer.partition(":")[0] for name, answer in answers.items()}
    if WRONG in words.values():
        return WRONG_CASE
    if CRASH in words.values():
        return CRASHED
    if words["is taken"] == REFUSED:
        return REFUSED_CASE
    if words.get("path KL") == UNKNOWN:
        return EXACT_WITHOUT_KL
    if words.get("lora") == NOT_ASKED:
        return EXACT_WITHOUT_LORA
    return EXACT


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The counts, and what is behind those that are not exact.

    Args:
        results: a record of each case.
    """
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for result in results:
        counts[result["kind"]]["cases"] += 1
        counts[result["kind"]][result["outcome"]] += 1
    lines = [f"| | {' | '.join(KINDS.values())} |", "|---" * (1 + len(KINDS)) + "|"]
    for row in ("cases", *OUTCOMES):
        numbers = [counts[kind][row] for kind in KINDS]
        if any(numbers):
            lines.append(f"| {row} | {' | '.join(map(str, numbers))} |")

    for outcome in OUTCOMES[1:]:
        found = [result for result in results if result["outcome"] == outcome]
        if found:
            lines += ["", f"{outcome}:"]
            lines += [f"- {result['case']}: {reason_of(result)}" for result in found]
    lines += ["", *options_refused(results)]
    return "\n".join(lines)


def reason_of(result: Mapping[str, Any]) -> str:
    """Why a case is not exact, in one line."""
    if result["problem"]:
        return result["problem"]
    reasons = []
    for name, answer in result["checks"].items():
        word = answer.partition(":")[0]
        is_option = word in (REFUSED, NOT_ASKED) and name not in ("is taken", "lora")
        if answer != YES and not is_option:
            reasons.append(f"{name}: {answer}")
    return "; ".join(reasons)


def options_refused(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Options that are refused in pipelines that are taken, with how often and one sentence."""
    counts: Counter[str] = Counter()
    sentences: dict[str, str] = {}
    for result in results:
        for name, answer in result["checks"].items():
            if name != "is taken" and answer.startswith(REFUSED):
                counts[name] += 1
                sentences.setdefault(name, f"{answer} ({result['case']})")
    if not counts:
        return []
    lines = ["Options refused in pipelines that are taken:"]
    lines += [f"- {name}: {count} cases, as {sentences[name]}" for name, count in counts.items()]
    return lines
