"""Every golden vector of this package; the origin of each is in the `source` of its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ballast_testing.golden import check_case, golden_cases

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("case", golden_cases(FOLDER, "graph-ood"))
def test_golden(case):
    check_case(case)


def test_every_function_has_its_vectors():
    assert {path.stem for path in FOLDER.glob("*.json")} == {
        "aia_combine",
        "aia_gin_conv",
        "aia_mask_reg",
        "aia_objectives",
        "asrc_can",
        "asrc_gae",
        "asrc_metrics",
        "asrc_mknn",
        "asrc_rcc",
        "asrc_ssl",
        "cal_attention",
        "cal_conv",
        "cal_loss",
        "cal_mix",
        "good_motif_splits",
        "infoigl_instance",
        "infoigl_prototypes",
        "infoigl_semantic",
        "motif_shapes",
        "syn_b_split",
    }
