"""Every golden vector of this package; the origin of each is in the `source` of its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast_testing.golden import check_case, golden_cases

FOLDER = Path(__file__).parent


# Some cases fix an iterate that has not converged, or an indefinite system: the warning is right.
@pytest.mark.filterwarnings("ignore::ihvp.ConvergenceWarning")
@pytest.mark.parametrize("case", golden_cases(FOLDER, "ihvp"))
def test_golden(case):
    check_case(case)


def test_every_function_has_its_vectors():
    assert {path.stem for path in FOLDER.glob("*.json")} == {"hvp_logistic", "solvers"}
