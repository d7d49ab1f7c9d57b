"""The bench: its table and JSON are well formed, and what must be equal is. No time is asserted."""
import json
import math

import pytest
from conftest import ROOT, python


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    printed = python(ROOT / "tests/bench.py", "step", "memory", "scst", "cider", "--clips", "2", "--items", "30",
                     "--repeats", "2", "--json", out).stdout
    return printed, json.loads(out.read_text())


def test_rows_are_ratios_of_what_is_printed(done):
    printed, result = done
    assert {r["bench"] for r in result["rows"]} == {"step", "memory", "scst", "cider"}
    assert result["machine"] in printed
    for row in result["rows"]:
        assert math.isfinite(row["ours"]) and row["ours"] > 0 and row["what"] in printed
        if row["min"] is not None:
            assert 0 < row["min"] <= row["ratio"] <= row["max"]
        if row["target"] is not None:
            reached = row["ratio"] <= row["target"] if row["at_most"] else row["ratio"] >= row["target"]
            assert row["reached"] is reached


def test_both_ways_give_the_same(done):
    checks = done[1]["checks"]
    assert {c["bench"] for c in checks} == {"step", "cider"} and len(checks) == 5
    assert all(c["holds"] and c["difference"] <= c["within"] for c in checks)


def test_fewer_activations_are_kept_than_a_prefix_keeps(done):
    """Counted, not timed: it is the same on every machine, and fails when the trunk enters the graph."""
    kept = [r for r in done[1]["rows"] if r["bench"] == "memory" and r["target"]]
    assert len(kept) == 1 and kept[0]["ratio"] <= 0.4


def test_a_failed_equality_is_exit_status_1(tmp_path):
    code = ("import sys; sys.path.insert(0, 'tests'); import bench; "
            "bench.scst.cider_d = lambda h, r: [0.0] * len(h); bench.main(['cider', '--items', '9', '--repeats', '1'])")
    failed = python("-c", code, check=False)
    assert failed.returncode == 1 and "not equal: cider: CIDEr-D" in failed.stdout


def test_an_unknown_bench_is_named():
    wrong = python(ROOT / "tests/bench.py", "speed", check=False)
    assert wrong.returncode == 2 and "no bench called 'speed'" in wrong.stderr
