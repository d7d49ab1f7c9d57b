"""run_all.sh: the whole smoke run, and its scheduling with a stub in place of Python."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

SYSTEMS = ["additive", "cross_attention", "concat", "unfreeze", "data_only"]


@pytest.fixture(scope="session")
def smoke(world, tmp_path_factory):
    """`SMOKE=1 bash run_all.sh`, every phase, on the world that the other tests use: its experiments folder."""
    copy = tmp_path_factory.mktemp("clone with space")  # a path with a space breaks what is not quoted
    for name in ("train.py", "fusion.py", "data.py", "scst.py", "evaluate.py", "bootstrap.py", "plots.py",
                 "run_all.sh", "tests", "requirements.txt"):
        (copy / name).symlink_to(ROOT / name)
    (copy / "smoke").symlink_to(world)
    done = subprocess.run(["bash", "run_all.sh"], cwd=copy, capture_output=True, text=True,
                          env={**os.environ, "SMOKE": "1", "SEEDS": "0", "VENV": str(Path(sys.executable).parent.parent)})
    (copy / "output.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return copy / "experiments/smoke"


def test_smoke_ends_with_the_table(smoke):
    report = (smoke / "REPORT.md").read_text()
    assert report.startswith("# Report, scale: smoke") and "T1" in report and "T5" in report
    for label in ("additive", "cross-attention", "concatenation", "partial unfreeze", "data-only"):
        assert f"| {label}" in report
    for name in ("curves", "gates", "pareto"):
        for kind in ("png", "pdf"):
            assert (smoke / f"figures/{name}.{kind}").stat().st_size > 5000
    assert "T1" in (smoke.parent.parent / "output.txt").read_text()


def test_smoke_runs_are_complete(smoke):
    for system in SYSTEMS:
        run = smoke / f"core/{system}_s0"
        predictions = json.loads((run / "predictions.json").read_text())
        result, card = (json.loads((run / n).read_text()) for n in ("result.json", "run_card.json"))
        assert len(predictions) == result["n"] == card["dataset"]["n"] == 32
        assert {"id", "prediction", "references", "candidates", "scores", "stats"} <= predictions[0].keys()
        assert card["flops_a_clip"] > 0 and card["trainable_parameters"] == result["trainable_parameters"] > 0
        assert (run / "cmd.txt").read_text().startswith("python train.py --fusion")
    assert not list(smoke.rglob("*.tmp*")) and not list(smoke.rglob("state"))


def test_frozen_systems_keep_the_backbone_exactly_and_unfreeze_does_not(smoke):
    for system in SYSTEMS:
        kept = json.loads((smoke / f"core/{system}_s0/retention.json").read_text())["conditions"]
        frozen = system != "unfreeze"
        assert kept["nothing_attached"]["identical"] is frozen and kept["no_clip"]["identical"] is frozen
        assert ("gates_closed" in kept) is (system != "concat")
        if frozen and system != "concat":
            assert kept["gates_closed"]["identical"]
        assert not kept["unrelated_clip"]["identical"]


def test_started_again_nothing_is_redone(smoke):
    before = {p: p.stat().st_mtime_ns for p in smoke.rglob("*/result.json")}
    done = subprocess.run(["bash", "run_all.sh"], cwd=smoke.parent.parent, capture_output=True, text=True,
                          env={**os.environ, "SMOKE": "1", "SEEDS": "0", "VENV": str(Path(sys.executable).parent.parent)})
    assert done.returncode == 0 and len(before) > 5
    assert before == {p: p.stat().st_mtime_ns for p in smoke.rglob("*/result.json")}


def test_a_one_off_command_from_a_dry_run_works(smoke):
    done = subprocess.run(["bash", "run_all.sh"], cwd=smoke.parent.parent, capture_output=True, text=True,
                          env={**os.environ, "SMOKE": "1", "SEEDS": "3", "DRY": "1",
                               "VENV": str(Path(sys.executable).parent.parent)})
    line = next(x for x in done.stdout.splitlines() if "core/data_only_s3" in x and x.startswith("python train.py"))
    line = line.replace("python ", f"{sys.executable} ", 1).split("#")[0]
    subprocess.run(["bash", "-c", line], cwd=smoke.parent.parent, check=True, capture_output=True)
    assert (smoke / "core/data_only_s3/training.json").exists()


# ---------------------------------------------------------------- scheduling, with a stub for Python

STUB = r"""#!/usr/bin/env bash
# stands in for python: fails or sleeps as told, and leaves what the real scripts leave
case "$*" in -c*) exit 0 ;; esac
out=""; for ((i = 1; i <= $#; i++)); do [ "${!i}" = --out ] && { j=$((i + 1)); out=${!j}; }; done
case $1 in
train.py)
    echo "start $(basename "$out") ${CUDA_VISIBLE_DEVICES:-cpu}" >>calls.txt
    [[ "$out" == *"${STUB_FAIL:-none}"* ]] && { echo "the reason it failed"; exit 3; }
    sleep "${STUB_SLEEP:-0.1}" & wait $!
    echo "end $(basename "$out")" >>calls.txt
    mkdir -p "$out"; echo "{}" >"$out/training.json" ;;
evaluate.py)
    for word in "$@"; do [ -d "$word" ] && { echo "{}" >"$word/result.json"; echo "{}" >"$word/retention.json"; }; done ;;
esac
exit 0
"""


@pytest.fixture
def stubbed(tmp_path):
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(STUB)
    (tmp_path / "bin/python").chmod(0o755)

    def start(**env):
        return subprocess.Popen(["bash", "run_all.sh"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env={**os.environ, "VENV": str(tmp_path), "SEEDS": "0 1", "EXP": "exp",
                                                **env},
                                # what a shell started in the background ignores, no trap can get back
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    start.folder = tmp_path
    return start


def calls(folder):
    return (folder / "calls.txt").read_text().splitlines() if (folder / "calls.txt").exists() else []


def test_all_jobs_run_once(stubbed):
    process = stubbed(JOBS="3")
    assert process.wait(60) == 0
    started = [c.split()[1] for c in calls(stubbed.folder) if c.startswith("start")]
    assert sorted(started) == sorted(["overfit"] + [f"{s}_s{k}" for s in SYSTEMS for k in (0, 1)])


def test_a_failed_job_is_named_and_only_it_runs_again(stubbed):
    process = stubbed(STUB_FAIL="concat_s1")
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert out.strip().splitlines()[-1].endswith("jobs failed: core/concat_s1") and "the reason it failed" in out
    ended = [c for c in calls(stubbed.folder) if c.startswith("end")]
    assert len(ended) == 10  # overfit and the nine others
    (stubbed.folder / "calls.txt").unlink()
    assert stubbed().wait(60) == 0
    assert [c for c in calls(stubbed.folder) if c.startswith("start")] == ["start concat_s1 cpu"]


def test_a_failed_sanity_phase_stops_everything(stubbed):
    process = stubbed(STUB_FAIL="overfit")
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert [c for c in calls(stubbed.folder) if c.startswith("start")] == ["start overfit cpu"]


def test_gpus_are_a_free_list(stubbed):
    process = stubbed(GPUS="0 0 1", STUB_SLEEP="0.5")
    assert process.wait(60) == 0
    busy, most = [], []
    for call in calls(stubbed.folder):
        what, name, *gpu = call.split()
        if what == "start":
            busy.append((name, gpu[0]))
        else:
            busy = [b for b in busy if b[0] != name]
        most.append([sum(g == k for _, g in busy) for k in ("0", "1")])
    assert max(m[0] for m in most) == 2 and max(m[1] for m in most) == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stopping_ends_every_descendant(stubbed, how):
    process = stubbed(STUB_SLEEP="987")
    deadline = time.time() + 30
    while not calls(stubbed.folder) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(how)
    assert process.wait(20) == 130
    left = subprocess.run(["pgrep", "-f", "sleep 987"], capture_output=True, text=True).stdout
    assert left == ""


def test_a_second_script_is_refused_and_a_stale_lock_is_not(stubbed):
    first = stubbed(STUB_SLEEP="5")
    deadline = time.time() + 30
    while not calls(stubbed.folder) and time.time() < deadline:
        time.sleep(0.1)
    second = stubbed()
    assert "another run_all.sh is at work" in second.communicate(timeout=20)[0] and second.returncode == 2
    first.kill()
    first.wait()
    subprocess.run(["pkill", "-KILL", "-f", str(stubbed.folder)])
    third = stubbed()
    assert third.wait(60) == 0


def test_launch_goes_before_every_job(stubbed):
    (stubbed.folder / "launch.sh").write_text('#!/usr/bin/env bash\necho launched >>launches.txt\nexec "$@"\n')
    assert stubbed(LAUNCH="bash launch.sh").wait(60) == 0
    assert len((stubbed.folder / "launches.txt").read_text().splitlines()) >= 11


@pytest.mark.parametrize("env, message", [
    (dict(PHASES="0 7"), "there is no phase 7"), (dict(SCALE="huge"), "tiny or full"),
    (dict(VENV="/nowhere"), "lacks packages")])
def test_mistakes_are_one_line(stubbed, env, message):
    process = stubbed(**env)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and message in out
