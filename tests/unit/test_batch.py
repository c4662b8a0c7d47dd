"""How many inputs of a job may fail."""

import pytest

from actors.errors import BadRequest, TooManyErrors
from deploy.batch import ErrorBudget


@pytest.mark.parametrize(
    ("flag", "done", "failed", "stops"),
    [
        ("0", 1, 1, True),
        ("10", 500, 10, False),
        ("10", 11, 11, True),
        ("5%", 99, 99, False),  # too few to judge
        ("5%", 100, 5, False),
        ("5%", 100, 6, True),
    ],
)
def test_a_budget_stops_a_run_that_exceeds_it(flag: str, done: int, failed: int, stops: bool) -> None:
    budget = ErrorBudget.from_flag(flag)
    if stops:
        with pytest.raises(TooManyErrors, match=f"{failed} of {done}"):
            budget.check(done, failed)
    else:
        budget.check(done, failed)


@pytest.mark.parametrize("flag", ["many", "-1", "101%", "%", ""])
def test_what_is_no_budget_is_refused(flag: str) -> None:
    with pytest.raises(BadRequest, match="N or P%"):
        ErrorBudget.from_flag(flag)
