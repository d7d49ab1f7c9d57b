"""A little of what `soak.py` does at length: spoilt files are read right or refused in one line, in bounded time."""
import random
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests"))
import soak  # noqa: E402


def test_spoilt_tables_checkpoints_and_command_lines(tmp_path):
    counts, faults = soak.fuzz(500, tmp_path)
    assert not faults and sum(c[0] for c in counts.values()) == 500
    assert all(cases > taken > 0 for cases, taken, _ in map(counts.get, ("AudioCaps CSV", "predictions.json")))


def test_spoilt_media(world, tmp_path):
    counts, faults, grown = soak.media(80, tmp_path, world / "data")
    assert not faults and grown < 300
    assert all(taken and refused for _, taken, refused in counts.values())


def test_the_fuzz_finds_what_is_wrong(tmp_path, monkeypatch):
    """A reader that takes what it should not, one that raises what is not ours, and one that hangs."""
    def hangs(path):
        while True:
            pass

    for read, word in ((lambda path: ["id"], "taken, but wrong"), (lambda path: 1 / 0, "ZeroDivisionError"),
                       (hangs, "hung for 1 s")):
        monkeypatch.setattr(soak, "readers", lambda folder, read=read: {"x": (b"content", "x.json", read)})
        faults = soak.fuzz(4, tmp_path, seconds=1)[1]
        assert faults and all(word in f for f in faults)


@pytest.mark.parametrize("seed", range(3))
def test_damage_is_a_function_of_its_seed_and_never_large(seed):
    content = bytes(range(256)) * 20
    one, two = (soak.spoilt(random.Random(seed), content) for _ in range(2))
    assert one == two != content and len(one) < len(content) + 3 * 6000


def test_reports_are_compared_without_their_clock():
    report = "# Report\n\n3 results, {} hours of training.\n\n| run | minutes | CIDEr-D |\n| --- | ---: | ---: |\n| a | {} | {} |\n"
    one, later, other = (soak.timeless_report(report.format(*x)) for x in (("0.1", 3, 2.5), ("0.2", 4, 2.5), ("0.1", 3, 2.6)))
    assert one == later != other and "a | 2.5" in one
