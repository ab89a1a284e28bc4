"""Every golden vector of the methods in this package; the origin of each is in the `source` of its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast_testing.golden import check_case, golden_cases

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("case", golden_cases(FOLDER, "recsys-losses"))
def test_golden(case):
    check_case(case)


def test_every_method_has_its_vectors():
    files = {path.stem for path in FOLDER.glob("*.json")}
    assert files == {
        "adap_tau",
        "adap_tau_lambertw",
        "adap_tau_tau0",
        "adap_tau_unit_loss",
        "adap_tau_user_inv_tau",
        "adnce",
        "bpr",
        "bsl",
        "bsl_bilateral",
        "cpr",
        "cpr_batch_sizes",
        "cpr_filter",
        "cpr_scores",
        "dsl",
        "gcm",
        "if_dfm",
        "mcrl",
        "metrics_full_ranking",
        "metrics_hits",
        "raremed",
        "sgl",
        "ssm",
        "ssm_corrections",
        "ssm_sampled",
    }
