"""A little of what `soak.py` does at length: damaged files are read right or refused in one line, in bounded time."""
import json
import random
import resource
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests"))
import soak  # noqa: E402


def test_damaged_files(world, tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts, faults = soak.fuzz(500, tmp_path, world)
    assert not faults and sum(cases for cases, _, _ in counts.values()) == 500
    assert all(cases == read + refused for cases, read, refused in counts.values())
    assert all(0 < counts[name][1] < counts[name][0] for name in ("AudioCaps CSV", "predictions.json", "mp4"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # kilobytes


def test_the_fuzz_finds_what_is_wrong(tmp_path, monkeypatch):
    """A reader that takes what it should not, one that raises what is not ours, and one that hangs."""
    def hangs(path):
        while True:
            pass

    for read, word in ((lambda path: ["id"], "read, but wrong"), (lambda path: 1 / 0, "ZeroDivisionError"),
                       (hangs, "hung for 1 s")):
        monkeypatch.setattr(soak, "readers", lambda folder, world, read=read: {"x": (b"content", "x.json", read)})
        faults = soak.fuzz(4, tmp_path, None, seconds=1)[1]
        assert faults and all(word in f for f in faults)


@pytest.mark.parametrize("seed", range(3))
def test_damage_is_a_function_of_its_seed_and_never_large(seed):
    content = bytes(range(256)) * 20
    one, two = (soak.damaged(random.Random(seed), content) for _ in range(2))
    assert one == two != content and len(one) < len(content) + 3 * 6000


def test_runs_are_compared_without_their_clock(tmp_path):
    def result(name, **values):
        run = tmp_path / name / "experiments/smoke/core/a_s0"
        run.mkdir(parents=True)
        (run / "log.jsonl").write_text(json.dumps({"step": 1, **values}) + "\n")
        return soak.results(tmp_path / name)

    one, later, other = result("a", loss=2.5, seconds=3), result("b", loss=2.5, seconds=4), result("c", loss=2.6, seconds=3)
    assert one == later != other and len(one) == 1
