"""The bench: its table and JSON are well formed, and what must be equal is. No time is asserted."""
import contextlib
import io
import json
import math

import bench
import bench7b
import plan
import pytest
import torch
from random_llava import RandomBackbone, Step, make_model

import evaluate
import scst


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out, printed = tmp_path_factory.mktemp("bench") / "bench.json", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(evaluate, "MAX_NEW_TOKENS", evaluate.MAX_NEW_TOKENS)  # which bench.main changes
        bench.main(["step", "memory", "scst", "keep", "cider", "--clips", "2", "--items", "30", "--repeats", "2",
                    "--json", str(out)])
    return printed.getvalue(), json.loads(out.read_text())


def test_rows_are_ratios_of_what_is_printed(done):
    printed, result = done
    assert {r["bench"] for r in result["rows"]} == {"step", "memory", "scst", "keep", "cider"}
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


def test_a_failed_equality_is_exit_status_1(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", evaluate.MAX_NEW_TOKENS)
    monkeypatch.setattr(scst, "cider_d", lambda hypotheses, references: [0.0] * len(hypotheses))
    with pytest.raises(SystemExit, match="1"):
        bench.main(["cider", "--items", "9", "--repeats", "1"])
    assert "not equal: cider: CIDEr-D" in capsys.readouterr().out


def test_an_unknown_bench_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["speed"])
    assert "no bench called 'speed'" in capsys.readouterr().err


@pytest.mark.parametrize("system", ["additive", "unfreeze"])
def test_fake_tensors_take_as_much_as_real_ones(system):
    def counts(allocations):
        backbone = RandomBackbone(8, 64, 128, 4, vocabulary=100, device="cpu")
        step = Step(make_model(backbone, system, [6]), clips=2)
        step()
        return allocations.peak_of(step), step.flops()

    with bench7b.Allocations() as allocations:
        real = counts(allocations)
    with bench7b.fake_tensors() as allocations:
        assert counts(allocations) == real
    assert all(real)


def test_peak_is_what_is_alive_together():
    with bench7b.Allocations() as allocations:
        a = torch.zeros(1000)
        assert allocations.now == 4000

        def add():
            b = a + 1          # 8,000 bytes alive
            c = b + 1          # 12,000
            del b
            return c.double()  # 16,000: a, c and the result

        assert allocations.peak_of(add) == 16000
        assert allocations.now == 4000


def test_every_activity_is_counted(monkeypatch):
    """At 7B's width with three layers."""
    monkeypatch.setattr(bench7b, "SIZE_7B", {**bench7b.SIZE_7B, "layers": 3})
    monkeypatch.setattr(bench7b, "LAYERS", [1, 2])
    with bench7b.fake_tensors() as allocations:
        backbone = bench7b.FakeBackbone()
        weights = allocations.now
        peaks = bench7b.peaks_of(backbone, allocations, "concat", 8)
    assert [*peaks] == ["XE, 16 tokens", "XE, 40 tokens", "SCST, tree of 60", "SCST, tree of 200", "keep", "captions",
                        "retention"]
    assert all(peak > weights > 1e9 for peak in peaks.values())
    assert peaks["XE, 16 tokens"] < peaks["XE, 40 tokens"] < peaks["SCST, tree of 200"]


def test_operations_at_7b_are_those_of_its_matrices():
    """Frozen blocks: a product forward, one backward; the counted numbers are that, and the fusion's few percent."""
    block = 4 * 4096 ** 2 + 3 * 4096 * 11008
    output = 4096 * 32064
    for (system, layer), (xe, tree) in plan.TERAFLOP["training"].items():
        if system == "unfreeze":
            continue
        positions = plan.PROMPT + plan.CAPTION + 16 * (system == "concat")
        expected = 4 * block * (32 - layer) * positions + 4 * output * plan.CAPTION
        assert 1 <= xe * 1e12 / expected < 1.1, (system, layer)
        draws = 5 * plan.CAPTION
        expected = 4 * block * (32 - layer) * (positions - plan.CAPTION + draws) + 4 * output * draws
        assert 1 <= tree * 1e12 / expected < 1.1, (system, layer)
    assert plan.TERAFLOP["trunk"] * 1e12 == pytest.approx(2 * block, rel=0.01)


def test_plan_costs_a_command():
    xe, _ = plan.TERAFLOP["training"]["concat", 12]
    line = "python train.py --fusion concat --layers 12 24 --data d --out o --limit-clips 1000 --batch-size 10 --steps {} " \
           "--eval-every 1000   # core/x"
    ten, twenty = (plan.cost(line.format(steps)) for steps in (10, 20))
    assert twenty - ten == pytest.approx(100 * xe)
    # the backbone alone once; four conditions of all questions and three of a batch for each run
    retention = "python evaluate.py retention a b --qa q --limit-questions 100"
    assert plan.cost(retention) == pytest.approx((100 + 2 * (4 * 100 + 3 * 64)) * plan.TERAFLOP["question"])
    assert plan.cost(retention + " --batch-size 8") == pytest.approx((100 + 2 * (4 * 100 + 3 * 8)) * plan.TERAFLOP["question"])
    caption = "python evaluate.py caption a b --split test --limit-clips {}"
    for limit, clips in ((64, 64), (0, 975), (5000, 975)):
        assert plan.cost(caption.format(limit)) == pytest.approx(2 * clips * plan.TERAFLOP["caption"])
    line = line.format(10).replace("--eval-every 1000", "--eval-every 10")
    few, fewer = (plan.cost(line.replace("--limit-clips 1000", f"--limit-clips {n}")) for n in (64, 32))
    trunk = (plan.PROMPT + plan.CAPTION) * 12 * plan.TERAFLOP["trunk"]
    assert few - fewer == pytest.approx(32 * (trunk + plan.greedy()))  # clips of training, clips of validation
    for line in ("python bootstrap.py compare a vs b --json c", "# phase 1: 3 jobs", "python evaluate.py decide a b --out o",
                 "python evaluate.py check a"):
        assert plan.cost(line) == 0
