"""The long tests: what a study that runs for days must survive. Minutes each; `pytest` does not run them.

    python tests/soak.py kill --times 10       # SIGKILL to run_all.sh and all its children, at random moments
    python tests/soak.py jobs                  # JOBS=2 against JOBS=1: the same files, and how much faster

Both use the smoke scale, SMOKE=1, in a temporary copy; --phases says which phases.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train.py", "fusion.py", "data.py", "scst.py", "evaluate.py", "bootstrap.py", "plots.py", "run_all.sh", "tests",
           "requirements.txt")
TIMES = {"seconds", "clips_per_second", "val_seconds", "reward_seconds", "clips_a_second", "train_hours", "hardware",
         "seconds_to_90_percent", "train_seconds", "cache", "out", "init", "beside", "git"}  # differ from run to run


def copy(folder, world):
    """A copy of the repository that shares one stand-in world."""
    folder.mkdir()
    for name in SCRIPTS:
        (folder / name).symlink_to(ROOT / name)
    (folder / "smoke").symlink_to(world)
    return folder


def start(folder, **env):
    return subprocess.Popen(["bash", "run_all.sh"], cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL,
                            env={**os.environ, "SMOKE": "1", "VENV": str(Path(sys.executable).parent.parent), **env})


def timeless(value):
    """JSON without what a clock, a path or another machine put there."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def results(folder):
    """{path: content} of everything that a finished study leaves and that must not depend on how it went."""
    experiments, found = folder / "experiments", {}
    for path in sorted(experiments.rglob("*")):
        if path.is_file() and "cache" not in path.parts:
            name = str(path.relative_to(experiments))
            if path.suffix == ".json":
                found[name] = timeless(json.loads(path.read_text()))
            elif path.suffix == ".jsonl":
                found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
            elif path.suffix == ".safetensors":
                found[name] = path.read_bytes()
    return found


def descendants(pid):
    """Process ids below a process: jobs lead groups of their own, so that a signal to one group would miss them."""
    found, listing = [pid], subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    for parent in found:
        found += [child for child, its in pairs if its == parent]
    return found


def check(name, whole, again):
    differ = sorted(k for k in whole.keys() | again.keys() if whole.get(k) != again.get(k))
    left = [k for k in again if ".tmp" in k or "/state/" in k]
    print(f"{name}: {len(whole)} files, {len(differ)} differ, {len(left)} left over", *differ[:8], *left[:8], sep="\n  ")
    return not differ and not left


def kill(args, place, world):
    """An uninterrupted study against one that is killed again and again."""
    whole, killed, rng = copy(place / "whole", world), copy(place / "killed", world), random.Random(args.seed)
    began = time.time()
    assert start(whole, PHASES=args.phases, SEEDS="0").wait() == 0
    length = time.time() - began
    print(f"uninterrupted: {length:.0f} s")
    finished, twice, kills = {}, [], 0
    while kills < args.times:
        process = start(killed, PHASES=args.phases, SEEDS="0")
        time.sleep(rng.uniform(3, max(8, 1.5 * length / args.times)))
        if process.poll() is not None:
            break
        for pid in descendants(process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()
        kills += 1
        marks = {p: p.stat().st_mtime_ns for p in killed.glob("experiments/smoke/*/*/training.json")}
        twice += [str(p) for p, t in finished.items() if marks.get(p) != t]
        finished = marks
        print(f"kill {kills}: {len(marks)} runs trained", flush=True)
    assert start(killed, PHASES=args.phases, SEEDS="0").wait() == 0
    print(f"{kills} kills; trained twice: {twice or 'none'}")
    return check("kill", results(whole), results(killed)) and not twice


def jobs(args, place, world):
    """Two jobs side by side against one after the other, a thread each."""
    seconds, found = {}, {}
    for n in ("1", "2"):
        folder, began = copy(place / f"jobs{n}", world), time.time()
        assert start(folder, PHASES=args.phases, SEEDS="0", JOBS=n, THREADS="1").wait() == 0
        seconds[n], found[n] = time.time() - began, results(folder)
    print(f"JOBS=2 is {seconds['1'] / seconds['2']:.2f} times as fast as JOBS=1 ({seconds['2']:.0f} s, {seconds['1']:.0f} s)")
    return check("jobs", found["1"], found["2"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=["kill", "jobs"])
    parser.add_argument("--times", type=int, default=10, help="kills")
    parser.add_argument("--phases", default="0 1 2", help="of run_all.sh")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--world", type=Path, help="a finished smoke world; without it one is built")
    args = parser.parse_args()
    place, ok = Path(tempfile.mkdtemp(prefix="soak_")), True
    world = args.world.resolve() if args.world else place / "smoke"
    if not args.world:
        subprocess.run([sys.executable, ROOT / "tests/standin.py", "--smoke", "--out", world], check=True)
    try:
        for what in args.what:
            ok &= {"kill": kill, "jobs": jobs}[what](args, place, world)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
