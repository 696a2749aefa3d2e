"""Every stored number of verl, TRL and OpenRLHF is equal to ours, differs for a shown reason, or has no counterpart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance import openrlhf, trl, verl
from tests.conformance.peers import PEERS, Case, Differs, Equal, NotOffered, Verdict, cases

MODULES: dict[str, Any] = {"verl": verl, "trl": trl, "openrlhf": openrlhf}
NUM_CASES = {"verl": 501, "trl": 344, "openrlhf": 240}
COUNTS = {
    "verl": {"Equal": 315, "Differs": 55, "NotOffered": 131},
    "trl": {"Equal": 217, "Differs": 25, "NotOffered": 102},
    "openrlhf": {"Equal": 141, "Differs": 66, "NotOffered": 33},
}
"""Cases by class. A case that changes its class changes this table, on purpose."""

ALL: list[Any] = [pytest.param(peer, case, id=f"{peer}:{case.id}") for peer in PEERS for case in cases(peer)]


def classify(peer: str, case: Case) -> Verdict:
    """The verdict on a case.

    Raises:
        KeyError: If nobody said what its function is.
    """
    handlers, not_offered = MODULES[peer].HANDLERS, MODULES[peer].NOT_OFFERED
    if case.function in not_offered:
        return NotOffered(not_offered[case.function])
    if case.function not in handlers:
        raise KeyError(f"{case.function} is not classified")
    verdict: Verdict = handlers[case.function](case)
    return verdict


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest of theirs or to 1."""
    assert ours.shape == theirs.shape
    assert theirs.numel() > 0
    assert theirs.isfinite().all()
    return float((ours.double() - theirs.double()).abs().max() / theirs.abs().max().clamp(min=1))


def check(verdict: Verdict) -> None:
    """Hold a verdict to what it says."""
    match verdict:
        case Equal(pairs, tolerance):
            assert pairs
            for name, pair in pairs.items():
                assert distance(*pair) <= tolerance, name
        case Differs(reason, pairs, tolerance, explained, equal, shown):
            assert len(reason) > 15
            assert explained or shown
            assert all(shown)
            assert max(distance(*pair) for pair in pairs.values()) > max(10 * tolerance, 1e-8)
            for name, value in explained.items():
                assert distance(value, pairs[name][1]) <= tolerance, name
            for name, pair in equal.items():
                assert distance(*pair) <= max(tolerance, 1e-7), name
        case NotOffered(reason):
            assert len(reason) > 15


@pytest.mark.parametrize(("peer", "case"), ALL)
def test_a_case_is_what_it_is_classified_as(peer: str, case: Case) -> None:
    check(classify(peer, case))


@pytest.mark.parametrize("peer", PEERS)
def test_no_case_is_missing_and_none_changed_its_class_unseen(peer: str) -> None:
    assert len({case.id for case in cases(peer)}) == len(cases(peer)) == NUM_CASES[peer]
    assert Counter(type(classify(peer, case)).__name__ for case in cases(peer)) == COUNTS[peer]


def test_the_readme_shows_the_same_counts() -> None:
    readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    for peer, counts in COUNTS.items():
        row = " | ".join(str(counts[name]) for name in ("Equal", "Differs", "NotOffered"))
        assert f"| {peer} | {row} | {sum(counts.values())} |" in readme


def test_a_function_that_nobody_classified_is_an_error() -> None:
    for peer in PEERS:
        with pytest.raises(KeyError, match="not classified"):
            classify(peer, Case("x", "new_function", {}, {}, {}))


def test_a_verdict_that_is_not_so_is_found_out() -> None:
    one, two = torch.ones(3), torch.full((3,), 2.0)
    for wrong in (
        Equal({"x": (one, two)}, 1e-6),
        Equal({}, 1e-6),
        Differs("a reason that is long enough", {"x": (one, one)}, explained={"x": one}),
        Differs("a reason that is long enough", {"x": (one, two)}, explained={"x": one}),
        Differs("a reason that is long enough", {"x": (one, two)}),
        Differs("a reason that is long enough", {"x": (one, two)}, shown=(False,)),
        NotOffered("no"),
    ):
        with pytest.raises(AssertionError):
            check(wrong)
