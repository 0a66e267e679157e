"""The tests' own tool: no test rests on a token that rounding may turn (see `tests.margins`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.margins import ATTEMPTS, TIE, CarefulReference, Tie, call_without_ties, numbers

IDS = list(range(20))


def test_a_test_is_called_with_other_data_until_there_is_no_tie() -> None:
    drawn: list[float] = []

    def test(ties: int) -> None:
        drawn.append(numbers(5).random())
        if len(drawn) <= ties:
            raise Tie("here")

    call_without_ties(test, {"ties": 2})
    assert len(set(drawn)) == 3
    call_without_ties(test, {"ties": 0})
    assert drawn[3] == drawn[0], "the next test begins with the first data again"


def test_data_that_always_hold_a_tie_fail() -> None:
    def test() -> None:
        raise Tie("here")

    with pytest.raises(pytest.fail.Exception, match=f"none of {ATTEMPTS} data is without a tie"):
        call_without_ties(test, {})


def test_the_reference_refuses_ties_and_other_tokens(checkpoint: Path) -> None:
    model = CarefulReference.load(checkpoint)
    made = model.generate(IDS, 5).token_ids
    model.check(IDS, made, 5)
    assert not model.differs(IDS, made)
    with pytest.raises(AssertionError):
        model.check(IDS, made[:4], 5)
    other = [*made[:3], (made[3] + 1) % 256, made[4]]
    with pytest.raises(AssertionError, match="of 5 tokens, number 3 is not the reference's"):
        model.check(IDS, other, 5)
    assert model.differs(IDS, other)
    # A token as good as the last one, but for less than rounding.
    head = model._weights["lm_head.weight"]
    head[(made[4] + 1) % 256] = head[made[4]] * (1 - TIE / 1000)
    with pytest.raises(Tie, match="token 4 of 5 is ahead by"):
        model.check(IDS, made, 5)
    with pytest.raises(Tie):
        model.generate(IDS, 5)
