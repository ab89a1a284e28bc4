from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ballast_testing.measure import interleaved, peak_extra_bytes, ratio

SCRIPT = """
import json

import torch
from ballast_testing.measure import emit, in_worker, parser, peak_extra_bytes

args = parser(None).parse_args()
if args.memory_of:
    size = {"small": 1_000_000, "large": 8_000_000}[args.memory_of]
    print(json.dumps({"peak_extra_bytes": peak_extra_bytes(lambda: torch.ones(size).sum())}))
else:
    emit({side: in_worker(side, []) for side in ("small", "large")}, args.output)
"""


def test_sides_take_turns_and_warm_up():
    calls, ticks = [], iter(range(100))
    found = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repetitions=3,
        warmup=1,
        clock=lambda: next(ticks),
    )
    assert calls == ["a", "b"] * 4
    assert found["a"] == {"median_s": 1, "min_s": 1, "q25_s": 1, "q75_s": 1}


def test_a_missing_side_has_no_ratio():
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(None, 2.0) is None
    assert ratio(3.0, 0.0) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_measured_in_a_worker_and_the_command_is_recorded(tmp_path):
    folder = tmp_path / "packages" / "some-package" / "benchmarks"
    folder.mkdir(parents=True)
    script, output = folder / "sums.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    subprocess.run([sys.executable, str(script), "--seed", "3", "--output", str(output)], check=True)
    result = json.loads(output.read_text())
    assert result["command"] == "python packages/some-package/benchmarks/sums.py --seed 3"
    assert result["small"] + 20_000_000 < result["large"]
    assert peak_extra_bytes(lambda: None) is not None
