"""Every golden vector of this package; the origin of each is in the `source` of its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast_testing.golden import check_case, golden_cases

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("case", golden_cases(FOLDER, "pref-opt"))
def test_golden(case):
    check_case(case)


def test_every_method_has_its_vectors():
    assert {path.stem for path in FOLDER.glob("*.json")} == {
        "alignment_potential",
        "alpha_dpo",
        "baselines",
        "beta_dpo",
        "dr_dpo",
        "dynamic_po",
        "gamma_po",
        "napo",
        "repo",
    }
