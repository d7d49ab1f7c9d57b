"""run_all.sh: the whole smoke run, and its scheduling with a stub in place of Python."""
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT

SYSTEMS = ["additive", "cross_attention", "concat", "unfreeze", "data_only"]


@pytest.fixture(scope="session")
def smoke(smoke_started):
    """`SMOKE=1 bash run_all.sh`, every phase, on the world that the other tests use: its experiments folder."""
    output, lock = smoke_started / "output.txt", smoke_started / "experiments/smoke/lock"
    for _ in range(300):
        if lock.exists() and "phase" in output.read_text():
            break
        time.sleep(1)
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # held until run_all.sh ends
    assert output.read_text().splitlines()[-1].endswith("REPORT.md"), output.read_text()[-6000:]
    return smoke_started / "experiments/smoke"


def test_smoke_ends_with_the_table(smoke):
    report = (smoke / "REPORT.md").read_text()
    assert report.startswith("# Report, scale: smoke") and "\n## T1" in report and "\n## T5" in report
    for label in ("additive", "cross-attention", "concatenation", "partial unfreeze", "data-only"):
        assert f"| {label}" in report
    for name in ("curves", "gates", "pareto", "frontier", "intervals"):
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
        assert 0 < card["seconds_to_90_percent"] < result["train_seconds"]
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


def test_comparisons_and_export(smoke):
    for system in SYSTEMS[1:]:
        found = json.loads((smoke / f"statistics/additive_vs_{system}.json").read_text())
        assert found["n"] == 32 and found["resamples"] == 10_000 and "meteor" in found["metrics"]
        assert "95% BCa" in (smoke / f"statistics/additive_vs_{system}/run.log").read_text()
    assert "**headline:** additive vs" in (smoke / "REPORT.md").read_text()
    for system in SYSTEMS:
        for name in ("predictions.json", "run_card.json"):
            there = smoke / f"export/audiocaps/{system}_s0/{name}"
            assert there.read_bytes() == (smoke / f"core/{system}_s0/{name}").read_bytes()


def test_the_archived_checkpoint_is_loaded_from_there(smoke, preloaded, tmp_path):
    """The SCST checkpoint that phase 4 archived, captioned where it lies: as where it was trained."""
    place, old = tmp_path / "smoke_additive_s0", smoke / "core/additive_s0/scst"
    shutil.copytree(smoke.parent / "full_training/finetuned" / place.name, place)
    assert {p.name for p in (place / "scst").iterdir()} == {"fusion.json", "fusion.safetensors", "run_card.json",
                                                            "reranker.json"}
    subprocess.run([preloaded / "bin/python", "evaluate.py", "caption", place / "scst", "--rerank"],
                   cwd=smoke.parent.parent, check=True)
    for name in ("predictions.json", "first_beam/predictions.json"):
        assert json.loads((place / "scst" / name).read_text()) == json.loads((old / name).read_text())
    cards = [json.loads((folder / "run_card.json").read_text()) for folder in (place / "scst", old)]
    xe = json.loads((old.parent / "run_card.json").read_text())
    assert [c["decoding"]["temperature"] for c in (*cards, xe)] == [0.5, 0.5, 1.0]  # what was trained is searched
    assert cards[0]["seconds_to_90_percent"] == cards[1]["seconds_to_90_percent"] > 0
    found = json.loads((smoke / "statistics/additive_scst_vs_xe_s0.json").read_text())
    assert found["n"] == 32 and (smoke / "export/audiocaps/additive_s0_scst/run_card.json").exists()


def test_appendix(smoke):
    report = (smoke / "REPORT.md").read_text()
    table = report.split("## Appendix: gates at the start")[1].split("\n## ")[0]
    for value, place in (("0.0", "appendix/gate_0_s0"), ("0.01", "appendix/gate_0.01_s0"), ("0.05", "core/additive_s0"),
                         ("0.2", "appendix/gate_0.2_s0"), ("1.0", "appendix/gate_1_s0")):
        assert f"| additive | {value} | 6 |" in table and place.rsplit("_s0")[0] in table
    for system in ("additive", "cross_attention", "concat"):
        noise = json.loads((smoke / f"core/{system}_s0/robustness.json").read_text())
        assert noise["n"] == 32 and [*noise["noise"]] == ["white", "clip"]
        assert [*noise["noise"]["clip"]] == ["10", "-5"] and noise["clean"]["cider_d"] >= 0
    assert (smoke / "figures/snr.pdf").stat().st_size > 5000


def test_video_beside_sound(smoke):
    """The two-branch run: what it kept, what it hears with each branch, and that the older run's captions stand."""
    run = smoke / "video/both_try1_s0"
    kept = json.loads((run / "retention.json").read_text())["conditions"]
    assert set(kept) == {"backbone", "gates_closed", "no_clip", "unrelated_clip", "silence", "noise", "unrelated_audio",
                         "unrelated_video", "nothing_attached"}
    for name, found in kept.items():
        assert found["identical"] is (name in ("backbone", "gates_closed", "no_clip", "nothing_attached")), name
        lo, hi = found["nll_ci95"]
        assert lo <= found["nll"] <= hi and set(found) >= {"accuracy_ci95", "agreement_ci95", "accuracy_by_kind"}
    again = json.loads((run / "audio_again.json").read_text())
    assert again["clean_identical"] and again["n"] == 32 and set(again["distracted"]) == set(again["before"])
    heard = {name: json.loads((run / name / "predictions.json").read_text())
             for name in ("", "audio", "video", "shuffled")}
    alone = {name: json.loads((smoke / f"video/{name}_s0/predictions.json").read_text()) for name in ("audio", "video")}
    ids = [[i["id"] for i in items] for items in (*heard.values(), *alone.values())]
    assert all(found == ids[0] for found in ids)
    decision = json.loads((smoke / "phase3/decision.json").read_text())
    assert decision["decision"] == "keep" and len(decision["tries"]) == 1
    done = subprocess.run([sys.executable, "bootstrap.py", "compare", run, run / "audio", "--metrics", "cider_d",
                           "--resamples", "200"], cwd=smoke.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("gate_l2_1", "gate_l2_100", "keep_0.3", "keep_3", "additive_keep", "cross_attention_keep", "concat_keep",
                 "unfreeze_keep"):
        assert (smoke / f"retention/{name}_s0/retention.json").exists()
    config = json.loads((run / "config.json").read_text())
    assert config["beside"].endswith("retention/additive_keep_s0") and config["keep"] == 10 and config["null_slot"]


def test_started_again_nothing_is_redone(smoke, preloaded):
    before = {p: p.stat().st_mtime_ns for p in smoke.rglob("*/result.json") if "export" not in p.parts}  # copies
    done = subprocess.run(["bash", "run_all.sh"], cwd=smoke.parent.parent, capture_output=True, text=True,
                          env={**os.environ, "SMOKE": "1", "SEEDS": "0", "VENV": str(preloaded)})
    assert done.returncode == 0 and len(before) > 5
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_one_off_command_from_a_dry_run_works(smoke, preloaded):
    done = subprocess.run(["bash", "run_all.sh"], cwd=smoke.parent.parent, capture_output=True, text=True,
                          env={**os.environ, "SMOKE": "1", "SEEDS": "3", "DRY": "1",
                               "VENV": str(Path(sys.executable).parent.parent)})
    line = next(x for x in done.stdout.splitlines() if "core/data_only_s3" in x and x.startswith("python train.py"))
    line = line.replace("python ", f"{preloaded}/bin/python ", 1).split("#")[0]
    subprocess.run(["bash", "-c", line], cwd=smoke.parent.parent, check=True, capture_output=True)
    assert (smoke / "core/data_only_s3/training.json").exists()


# ---------------------------------------------------------------- scheduling, with a stub for Python

TWO_GPUS = '#!/bin/sh\necho "GPU 0: NVIDIA H100 (UUID: GPU-1)"\necho "GPU 1: NVIDIA H100 (UUID: GPU-2)"\n'

STUB = r"""#!/usr/bin/env bash
# stands in for python: fails or sleeps as told, and leaves what the real scripts leave
case "$*" in -c*importlib*) exit 0 ;; -c*) exec REAL "$@" ;; esac
out=""; for ((i = 1; i <= $#; i++)); do [ "${!i}" = --out ] && { j=$((i + 1)); out=${!j}; }; done
case $1 in
train.py)
    echo "start ${out#exp/} ${CUDA_VISIBLE_DEVICES:-cpu}" >>calls.txt
    if [[ -n "${STUB_BESIDE:-}" && "$out" == *core/data_only* ]]; then   # until three of those have started
        for ((n = 0; n < 600; n++)); do [ "$(grep -c "start $STUB_BESIDE" calls.txt)" -ge 3 ] && break; sleep 0.1; done
    fi
    [[ "$out" == *"${STUB_FAIL:-none}"* ]] && { echo "the reason it failed"; exit 3; }
    mkdir -p "$out"; [[ "$out" == *core/additive* ]] && { sleep 0.3; echo "{}" >"$out/stable.json"; }
    sleep "${STUB_SLEEP:-0.1}" & wait $!
    echo "end ${out#exp/}" >>calls.txt
    good=0; [[ "$out" == *_l6_* ]] && good=2; [[ "$out" == *_n8_h768_* ]] && good=$((good + 1))
    [[ " $* " =~ " --layers "([0-9 ]+)" --tokens "([0-9]+)" --hidden "([0-9]+) ]] && layers=${BASH_REMATCH[1]// /, }
    echo "{\"layers\": [$layers], \"tokens\": ${BASH_REMATCH[2]}, \"hidden\": ${BASH_REMATCH[3]}}" >"$out/config.json"
    echo "{\"best\": {\"val_spider_lite\": $good}}" >"$out/training.json" ;;
evaluate.py)
    [ "$2" = decide ] && { echo "decide $(grep -o try <<<"$*" | wc -l)" >>calls.txt; exit "${STUB_DECISION:-0}"; }
    for word in "$@"; do
        [ -d "$word" ] && for name in result retention audio_again; do echo "{}" >"$word/$name.json"; done
    done ;;
esac
exit 0
"""


@pytest.fixture
def stubbed(tmp_path):
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    (tmp_path / "bin").mkdir()
    for name, script in ("python", STUB.replace("REAL", sys.executable)), ("nvidia-smi", TWO_GPUS):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)

    def start(**env):
        return subprocess.Popen(["bash", "run_all.sh"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env={**os.environ, "VENV": str(tmp_path), "SEEDS": "0 1", "EXP": "exp",
                                                "PHASES": "0 1", "JOBS": "20",
                                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **env},
                                # what a shell started in the background ignores, no trap can get back
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    start.folder = tmp_path
    return start


def calls(folder):
    return (folder / "calls.txt").read_text().splitlines() if (folder / "calls.txt").exists() else []


def test_all_jobs_run_once(stubbed):
    """Each behind LAUNCH."""
    (stubbed.folder / "launch.sh").write_text('#!/usr/bin/env bash\necho launched >>launches.txt\nexec "$@"\n')
    assert stubbed(JOBS="3", LAUNCH="bash launch.sh").wait(60) == 0
    started = [c.split()[1] for c in calls(stubbed.folder) if c.startswith("start")]
    core = [f"core/{s}_s{k}" for s in SYSTEMS for k in (0, 1)]
    clotho = [f"clotho/{s}_s{k}" for s in ("additive", "additive_init", "cross_attention") for k in (0, 1)]
    assert sorted(started) == sorted(["sanity/overfit", *core, *clotho])
    assert len((stubbed.folder / "launches.txt").read_text().splitlines()) > len(started)  # evaluations too


def test_sweeps_start_beside_phase_1_and_go_on_from_what_won(stubbed):
    """Layers once additive is stable, while others still train; the grid on the best layers, the losses on the best."""
    assert stubbed(PHASES="1 2", STUB_BESIDE="ablation", SEEDS="0").wait(60) == 0
    lines = [c.split() for c in calls(stubbed.folder)]
    order = {(what, name): k for k, (what, name, *_) in enumerate(lines)}
    layers = [f"ablation/additive_l{l}_n16_h512_c0.1_s0" for l in ("3", "6", "3-6")]
    for name in layers:
        assert order["start", name] < order["end", "core/data_only_s0"]
    grid = [f"ablation/additive_l6_n{n}_h{h}_c0.1_s0" for n in (8, 16) for h in (512, 768)]
    losses = [f"ablation/{s}_l6_n8_h768_c{c}_s0" for s, c in (("additive", 0), ("cross_attention", 0.1),
                                                           ("cross_attention", 0))]
    started = [name for what, name, *_ in lines if what == "start" and name.startswith("ablation")]
    assert sorted(started) == sorted({*layers, *grid, *losses})                # none twice
    assert max(order["end", n] for n in layers) < min(order["start", n] for n in {*grid} - {*layers})
    assert max(order["end", n] for n in grid) < min(order["start", n] for n in losses)


def test_a_failed_job_is_named_and_only_it_runs_again(stubbed):
    process = stubbed(STUB_FAIL="core/concat_s1")
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert out.strip().splitlines()[-1].endswith("jobs failed: core/concat_s1") and "the reason it failed" in out
    ended = [c for c in calls(stubbed.folder) if c.startswith("end")]
    assert len(ended) == 10  # overfit and the nine others
    (stubbed.folder / "calls.txt").unlink()
    assert stubbed().wait(60) == 0
    again = [c for c in calls(stubbed.folder) if c.startswith("start") and "clotho/" not in c]  # Clotho had to wait
    assert again == ["start core/concat_s1 cpu"]


def test_a_failed_sanity_phase_stops_everything(stubbed):
    process = stubbed(STUB_FAIL="sanity/overfit")
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert [c for c in calls(stubbed.folder) if c.startswith("start")] == ["start sanity/overfit cpu"]


@pytest.mark.parametrize("decision, tries, status", [("0", 1, 0), ("3", 3, 1), ("2", 1, 1)])
def test_the_loop_of_the_video_branch(stubbed, decision, tries, status):
    """Kept, it ends; beyond the tolerance the penalty is raised twice; a mistake ends it at once."""
    process = stubbed(PHASES="3", STUB_DECISION=decision)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == status, out
    names = [c.split()[1] for c in calls(stubbed.folder) if c.startswith("start")]
    assert [n for n in names if "try" in n] == [f"video/both_try{k}_s0" for k in range(1, tries + 1)]
    assert [c for c in calls(stubbed.folder) if c.startswith("decide")] == [f"decide {k}" for k in range(1, tries + 1)]
    commands = [(stubbed.folder / f"exp/video/both_try{k}_s0/cmd.txt").read_text() for k in range(1, tries + 1)]
    assert [c.split("--gate-l2 ")[1].split()[0] for c in commands] == ["1e-4", "1e-3", "1e-2"][:tries]
    assert [c.rsplit("--keep ")[-1].split()[0] for c in commands] == ["10", "30", "100"][:tries]
    assert ("after 3 tries video still costs more than 0.5 percentage points" in out) is (decision == "3")
    if decision != "2":  # whatever was decided, all else is done
        assert set(names) >= {"video/audio_s0", "video/video_s0", *(f"retention/{v}_s0" for v in ("gate_l2_1", "keep_3", "concat_keep"))}


def test_a_study_without_videos(stubbed):
    process = stubbed(SCALE="full", PHASES="3", SEEDS="0", AV="")
    assert process.wait(60) == 0
    names = [c.split()[1] for c in calls(stubbed.folder) if c.startswith("start")]
    assert "retention/additive_keep_s0" in names and not [n for n in names if "video" in n]


@pytest.mark.parametrize("env, starts", [
    ({}, {"0", "1"}), ({"NPROC": "2"}, {"0,1"}), ({"GPUS": "cpu"}, {""}), ({"GPUS": "1"}, {"1"}),
    ({"GPUS": "0,1 2,3", "NPROC": "2"}, {"0,1", "2,3"}), ({"CUDA_VISIBLE_DEVICES": "5,7"}, {"5", "7"}),
    ({"CUDA_VISIBLE_DEVICES": ""}, None), ({"LAUNCH": "srun --gres=gpu:1"}, None)])
def test_a_dry_run_shows_the_gpus_of_every_job(stubbed, monkeypatch, env, starts):
    """A job a GPU of the machine, unless GPUS, a scheduler or a launcher says otherwise; None: nothing is set."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    out = stubbed(DRY="1", **env).communicate(timeout=60)[0]
    jobs = [line for line in out.splitlines() if "train.py" in line]
    assert len(jobs) == 17
    if starts is None:
        assert all(line.startswith(env.get("LAUNCH", "python")) for line in jobs)
    else:
        assert {line.split()[0].removeprefix("CUDA_VISIBLE_DEVICES=") for line in jobs} == starts
    assert all(("--standalone --nproc-per-node=2" in line) is (env.get("NPROC") == "2") for line in jobs)


@pytest.mark.parametrize("env, slots", [({"GPUS": "0 0 1"}, {"0": 2, "1": 1}), ({}, {"0": 1, "1": 1})])
def test_gpus_are_a_free_list(stubbed, monkeypatch, env, slots):
    """Those that are given, or the machine's."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert stubbed(STUB_SLEEP="0.5", SEEDS="0", **env).wait(60) == 0
    busy, most = {}, Counter()
    for call in calls(stubbed.folder):
        what, name, *gpu = call.split()
        if what == "start":
            busy[name] = gpu[0]
        else:
            del busy[name]
        most |= Counter(busy.values())
    assert most == slots


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stopping_ends_every_descendant(stubbed, how):
    seconds = f"987.{os.getpid()}"
    process = stubbed(STUB_SLEEP=seconds)
    deadline = time.time() + 120
    while not calls(stubbed.folder) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(how)
    assert process.wait(20) == 130
    left = subprocess.run(["pgrep", "-f", f"sleep {seconds}"], capture_output=True, text=True).stdout
    assert left == ""


def test_a_second_script_is_refused_and_a_stale_lock_is_not(stubbed):
    first = stubbed(STUB_SLEEP="5")
    deadline = time.time() + 120
    while not calls(stubbed.folder) and time.time() < deadline:
        time.sleep(0.1)
    second = stubbed()
    assert "another run_all.sh is at work" in second.communicate(timeout=20)[0] and second.returncode == 2
    first.kill()
    first.wait()
    subprocess.run(["pkill", "-KILL", "-f", str(stubbed.folder)])
    third = stubbed()
    assert third.wait(60) == 0


@pytest.mark.parametrize("env, message", [
    (dict(PHASES="0 7"), "there is no phase 7"), (dict(SCALE="huge"), "tiny, small or full"),
    (dict(SCALE="full", SMOKE="1"), "SMOKE=1 is for SCALE=tiny and small"),
    (dict(GPUS="0 1", NPROC="2"), "NPROC=2 needs slots of 2"),
    (dict(VENV="/nowhere"), "lacks packages")])
def test_mistakes_are_one_line(stubbed, env, message):
    process = stubbed(**env)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and message in out
