"""A little of what `soak.py` does at length: damaged files are read right or refused in one line, in bounded time."""
from pathlib import Path

import pytest
import soak


def peak():
    """Largest memory since it was last forgotten, in MB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_damaged_files(world, tmp_path):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of earlier tests
    before = peak()
    counts, faults = soak.fuzz(500, tmp_path, world)
    assert not faults and sum(cases for cases, _, _ in counts.values()) == 500
    assert all(cases == read + refused for cases, read, refused in counts.values())
    assert all(0 < counts[name][1] < counts[name][0] for name in ("AudioCaps CSV", "predictions.json", "mp4"))
    assert peak() - before < 300


def test_the_fuzz_finds_what_is_wrong(tmp_path, monkeypatch):
    """A reader that takes what it should not, one that raises what is not ours, and one that hangs."""
    def hangs(path):
        while True:
            pass

    for read, word in ((lambda path: ["id"], "read, but wrong"), (lambda path: 1 / 0, "ZeroDivisionError"),
                       (hangs, "hung for 1 s")):
        monkeypatch.setattr(soak, "readers", lambda folder, world, read=read: {"x": (b"content", "x.json", read)})
        faults = soak.fuzz(1, tmp_path, None, seconds=1)[1]
        assert faults and all(word in f for f in faults)
