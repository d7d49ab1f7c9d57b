"""run_all.sh: the whole smoke run, and its scheduling with a stub in place of Python."""
import fcntl
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, copy_of_repository

import data
import evaluate
import train

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


def retention(folder):
    """(report, items) of a retention probe."""
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("retention", "retention_items")]


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
    for system in [*SYSTEMS, "additive_keep"]:
        run = smoke / f"core/{system}_s0"
        predictions = json.loads((run / "predictions.json").read_text())
        result, card = (json.loads((run / n).read_text()) for n in ("result.json", "run_card.json"))
        assert len(predictions) == result["n"] == card["dataset"]["n"] == 32
        assert {"id", "prediction", "references", "candidates", "scores", "stats"} <= predictions[0].keys()
        assert card["flops_a_clip"] > 0 and card["trainable_parameters"] == result["trainable_parameters"] > 0
        trained = json.loads((run / "training.json").read_text())
        assert trained["seconds_a_step"]["xe"] > 0 and trained["peak_memory"] > 0 < card["peak_memory"]
        assert 0 < card["seconds_to_90_percent"] < result["train_seconds"]
        assert (run / "cmd.txt").read_text().startswith("python train.py --fusion")
    assert not list(smoke.rglob("*.tmp*")) and not list(smoke.rglob("state"))


def test_frozen_systems_keep_the_backbone_exactly_and_unfreeze_does_not(smoke):
    for system in [*SYSTEMS, "additive_keep"]:
        kept, items = retention(smoke / f"core/{system}_s0")
        exact, frozen = kept["exact"], system != "unfreeze"
        assert exact["nothing_attached"] is frozen and exact["no_clip"] is frozen and kept["exact_n"] == 20
        assert ("gates_closed" in exact) is (system != "concat")
        if frozen and system != "concat":
            assert exact["gates_closed"] is True
        assert kept["n"] == len(items) == 20 and not exact.keys() & kept["conditions"].keys()
        assert any(i["unrelated_clip"] != i["backbone"] for i in items)


def test_comparisons_and_export(smoke):
    names = [f"additive_vs_{system}" for system in SYSTEMS[1:]]
    names += [f"additive_keep_vs_{system}_keep" for system in ("concat", "cross_attention", "unfreeze")]
    names += ["additive_keep_vs_additive", "additive_keep_reranked_vs_before_s0",
              "video_both_vs_audio", "video_both_vs_video", "video_both_vs_shuffled"]
    for name in names:
        found = json.loads((smoke / f"statistics/{name}.json").read_text())
        assert found["n"] == (8 if name.startswith("video") else 32)  # test clips of the two data sets
        assert found["resamples"] == 10_000 and "meteor" in found["metrics"]
        assert "95% BCa" in (smoke / f"statistics/{name}/run.log").read_text()
    for system in ("additive", "additive_keep"):  # an SCST that collapsed at once has nothing to be compared
        compared = smoke / f"statistics/{system}_scst_vs_xe_s0.json"
        assert compared.exists() is (smoke / f"core/{system}_s0/scst/result.json").exists()
    report = (smoke / "REPORT.md").read_text()
    assert "**headline:** additive keep vs" in report and "**without keep:** additive vs" in report
    for system in [*SYSTEMS, "additive_keep"]:
        for name in ("predictions.json", "run_card.json"):
            there = smoke / f"export/audiocaps/{system}_s0/{name}"
            assert there.read_bytes() == (smoke / f"core/{system}_s0/{name}").read_bytes()


@pytest.mark.parametrize("system", ["additive", "additive_keep"])
def test_the_archived_checkpoint_is_loaded_from_there(smoke, preloaded, tmp_path, system):
    """The SCST checkpoint that phase 4 archived, captioned where it lies: as where it was trained."""
    place, old = tmp_path / f"smoke_{system}_s0", smoke / f"core/{system}_s0/scst"
    reranked = system == "additive_keep"  # the study's own
    shutil.copytree(smoke.parent / "full_training/finetuned" / place.name, place)
    files = {"fusion.json", "fusion.safetensors", "run_card.json", *["rerank"] * reranked}
    assert {p.name for p in (place / "scst").iterdir()} == files
    assert [p.name for p in place.glob("scst/rerank/*")] == ["reranker.json"] * reranked
    subprocess.run([preloaded / "bin/python", "evaluate.py", "caption", place / "scst", *["--rerank"] * reranked],
                   cwd=smoke.parent.parent, check=True)
    for name in ("predictions.json", *["rerank/predictions.json"] * reranked):
        assert json.loads((place / "scst" / name).read_text()) == json.loads((old / name).read_text())
    cards = [json.loads((folder / "run_card.json").read_text()) for folder in (place / "scst", old)]
    xe = json.loads((old.parent / "run_card.json").read_text())
    assert [c["decoding"]["temperature"] for c in (*cards, xe)] == [0.5, 0.5, 1.0]  # what was trained is searched
    assert cards[0]["seconds_to_90_percent"] == cards[1]["seconds_to_90_percent"] > 0
    found = json.loads((smoke / f"statistics/{system}_scst_vs_xe_s0.json").read_text())
    assert found["n"] == 32 and (smoke / f"export/audiocaps/{system}_s0_scst/run_card.json").exists()


def test_appendix(smoke):
    report = (smoke / "REPORT.md").read_text()
    table = report.split("## Appendix: gates at the start")[1].split("\n## ")[0]
    for value, place in (("0", "appendix/gate_0_s0"), ("0.01", "appendix/gate_0.01_s0"), ("0.05", "core/additive_s0"),
                         ("0.2", "appendix/gate_0.2_s0"), ("1", "appendix/gate_1_s0")):
        assert f"| additive | {value} | 6 |" in table and place.rsplit("_s0")[0] in table
    for system in ("additive", "cross_attention", "concat"):
        noise = json.loads((smoke / f"core/{system}_s0/robustness.json").read_text())
        assert noise["n"] == 32 and [*noise["noise"]] == ["white", "clip"]
        assert [*noise["noise"]["clip"]] == ["10", "-5"] and noise["clean"]["cider_d"] >= 0
    assert (smoke / "figures/snr.pdf").stat().st_size > 5000


def test_video_beside_sound(smoke):
    """Two senses trained apart and attached together: what they keep, and what they hear, together and alone."""
    audio, video = smoke / "core/additive_keep_s0", smoke / "video/video_try1_s0"
    for folder in (audio / f"with_{video.name}", video):  # captions of videos name colours and shapes
        kept, items = retention(folder)
        assert kept["exact"] == {"gates_closed": True, "no_clip": True, "nothing_attached": True}
        assert set(kept["conditions"]) == {"backbone", "unrelated_clip", "silence", "noise", "conflict"}
        for name, found in kept["conditions"].items():
            asked = [i for i in items if name in i]
            assert found["n"] == len(asked) and (0 < len(asked) < 20 if name == "conflict" else len(asked) == 20)
            assert all(i[name] == i["backbone"] for i in asked) is (name == "backbone"), name
            lo, hi = found["nll_ci95"]
            assert lo <= found["nll"] <= hi and set(found) >= {"accuracy_ci95", "agreement_ci95", "accuracy_by_kind"}
    assert "conflict" not in retention(audio)[0]["conditions"]
    unrelated = json.loads((audio / f"with_{video.name}/unrelated/result.json").read_text())
    before = json.loads((audio / "result.json").read_text())
    assert unrelated["n"] == before["n"] == 32 and unrelated["hear"] == "unrelated"
    heard = [video / f"with_{audio.name}" / name for name in ("", "audio", "video", "shuffled")]
    alone = [smoke / f"video/{name}_s0" for name in ("audio", "video")]
    ids = [[i["id"] for i in json.loads((folder / "predictions.json").read_text())] for folder in (*heard, *alone, video)]
    assert all(found == ids[0] for found in ids)
    decision = json.loads((smoke / "phase3/decision.json").read_text())
    assert decision["decision"] == "keep" and len(decision["tries"]) == 1
    done = subprocess.run([sys.executable, "bootstrap.py", "compare", heard[0], heard[1], "--metrics", "cider_d",
                           "--resamples", "200"], cwd=smoke.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("gate_l2_100", "keep_1", "keep_30", "cross_attention_keep", "concat_keep", "unfreeze_keep"):
        assert (smoke / f"retention/{name}_s0/retention.json").exists()
    for run, sense, weight in (audio, "audio", 10), (video, "video", 30):
        config = json.loads((run / "config.json").read_text())
        assert config["keep_qa"].endswith(f"keep_qa/{sense}.jsonl") and config["keep"] == weight and config["null_slot"]


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
case "$*" in
-c*symlink_to*) echo "start keep_qa ${CUDA_VISIBLE_DEVICES:-cpu}" >>calls.txt; echo "end keep_qa" >>calls.txt; mkdir -p "${!#}"; touch "${!#}"/{audio,video}.jsonl; exit 0 ;;
-c*importlib* | -c*"import data"* | -c*"import torch"*) exit 0 ;;
tests/plan.py*) exec cat ;;
-c*) exec REAL "$@" ;;
esac
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
    sleep "${STUB_EVALUATION:-0}" & wait $!
    with=""; [[ "$*" =~ " --with "([^ ]+) ]] && with=with_${BASH_REMATCH[1]##*/}
    for word in "${@:3}"; do
        [ "${word#--}" = "$word" ] || break
        for folder in "$word/$with" "$word/$with/unrelated" "$word/$with/shuffled" "$word/rerank"; do
            mkdir -p "$folder"; for name in result retention robustness; do echo "{}" >"$folder/$name.json"; done
        done
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

    def start(*command, **env):
        command = command or ("bash", "run_all.sh")
        return subprocess.Popen([*command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env={**os.environ, "VENV": str(tmp_path), "SEEDS": "0 1", "EXP": "exp",
                                                "PHASES": "0 1", "JOBS": "20",
                                "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **env},
                                # what a shell started in the background ignores, no trap can get back
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    start.folder = tmp_path
    return start


def started(folder):
    """Names of the jobs that were started, in order."""
    return [line.split()[1] for line in calls(folder) if line.startswith("start")]


def calls(folder):
    return (folder / "calls.txt").read_text().splitlines() if (folder / "calls.txt").exists() else []


def test_all_jobs_run_once(stubbed):
    """Each behind LAUNCH."""
    (stubbed.folder / "launch.sh").write_text('#!/usr/bin/env bash\necho launched >>launches.txt\nexec "$@"\n')
    assert stubbed(JOBS="3", LAUNCH="bash launch.sh").wait(60) == 0
    names = started(stubbed.folder)
    core = [f"core/{s}_s{k}" for s in [*SYSTEMS, "additive_keep"] for k in (0, 1)]
    clotho = [f"clotho/{s}_s{k}" for s in ("cross_attention", "additive_keep", "additive_keep_init") for k in "01"]
    assert sorted(names) == sorted(["sanity/overfit", "keep_qa", *core, *clotho])
    assert len((stubbed.folder / "launches.txt").read_text().splitlines()) > len(names)  # evaluations too
    for k in (0, 1):  # each goes on from the AudioCaps run of its seed
        command = (stubbed.folder / f"exp/clotho/additive_keep_init_s{k}/cmd.txt").read_text()
        assert f"--init exp/core/additive_keep_s{k} " in command and f"--seed {k} " in command


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
    assert len(ended) == 13  # overfit, the questions to keep and the eleven others
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
    """Kept, it ends; beyond the tolerance the weight is raised twice; a mistake ends it at once."""
    process = stubbed(PHASES="3", STUB_DECISION=decision)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == status, out
    names, others = started(stubbed.folder), [f"video/video_try{tries}_s1"] * (decision != "2")
    # the second seed has the weight that the first one decided
    assert [n for n in names if "try" in n] == [*(f"video/video_try{k}_s0" for k in range(1, tries + 1)), *others]
    assert [c for c in calls(stubbed.folder) if c.startswith("decide")] == [f"decide {k}" for k in range(1, tries + 1)]
    commands = [(stubbed.folder / f"exp/{n}/cmd.txt").read_text() for n in names if "try" in n]
    weights = ["30", "60", "120"][:tries]
    assert [c.rsplit("--keep ")[-1].split()[0] for c in commands] == weights + weights[-1:] * len(others)
    assert [c.rsplit("--seed ")[-1].split()[0] for c in commands] == ["0"] * tries + ["1"] * len(others)
    # trained alone: nothing of the audio run but its prompt among the questions
    assert all("additive_keep" not in c and "--keep-qa exp/keep_qa/video.jsonl" in c for c in commands)
    audio = stubbed.folder / "exp/core/additive_keep_s0"
    assert "--keep-qa exp/keep_qa/audio.jsonl" in (audio / "cmd.txt").read_text()
    # the audio run's own answers and captions are there before they are compared
    assert names[0] == "keep_qa" and (audio / "retention.json").exists() and (audio / "result.json").exists()
    for run in (n.split("/")[1] for n in names if "try" in n):  # each beside the audio run of its seed
        beside = audio.with_name(f"additive_keep{run[-3:]}") / f"with_{run}"
        assert (beside / "retention.json").exists() and (beside / "unrelated/result.json").exists()
    assert ("after 3 tries video still costs more than 0.5 percentage points" in out) is (decision == "3")
    if decision != "2":  # whatever was decided, all else is done
        assert set(names) >= {"video/audio_s0", "video/video_s0",
                              *(f"retention/{v}_s0" for v in ("gate_l2_100", "keep_1", "keep_30", "concat_keep"))}


def test_questions_to_keep_for_two_senses(world, tmp_path):
    """The file that phase 3 writes: images' questions, a share of the other sense's prompt, none of the sense's own."""
    copy = copy_of_repository(tmp_path / "copy", world)
    environment = {**os.environ, "SMOKE": "1", "DRY": "1", "PHASES": "3", "EXP": "my exp",
                   "VENV": str(Path(sys.executable).parent.parent)}
    done = subprocess.run(["bash", "run_all.sh"], cwd=copy, capture_output=True, text=True, env=environment)
    line = next(x for x in done.stdout.splitlines() if x.endswith("# keep_qa"))
    line = line.replace("python ", f"{sys.executable} ", 1)
    for _ in range(2):  # again, over what is there
        subprocess.run(["bash", "-c", line], cwd=copy, check=True)
    own = {data.content(q) for q in data.read_kept(world / "data/qa/train.json")}
    said = {clip.references[0] for clip in data.read_split("audiocaps", world / "data/audiocaps", "train").clips}
    for sense, share, prompt in ("audio", 0.3, data.VIDEO_PROMPT), ("video", 0.1, data.SOUND_PROMPT):
        questions = data.read_kept(copy / f"my exp/keep_qa/{sense}.jsonl")
        texts = [q for q in questions if q.image is None]
        assert {q.question for q in texts} == {prompt}
        assert len(texts) == round(share * len(questions)) > 0
        # video knows what audio says; audio is trained before there is anything to know
        assert {q.answer for q in texts} <= (said if sense == "video" else {""})
        assert {data.content(q) for q in questions if q.image} == own  # the same pictures, found from there
    assert not list((copy / "my exp").rglob("*.tmp*"))


def full_scale(folder, **paths):
    """Folders of a released study, empty, as SCALE=full takes them."""
    environment = {"SCALE": "full", "SEEDS": "0", "GPUS": "cpu"}
    for knob in ("AUDIOCAPS", "CLOTHO", "AV", "QA", "KEEP_QA"):
        environment[knob] = knob.lower()
        (folder / knob.lower()).mkdir(exist_ok=True)
    return environment | paths


def test_a_study_without_videos(stubbed):
    process = stubbed(**full_scale(stubbed.folder, PHASES="3", AV=""))
    assert process.wait(60) == 0
    names = started(stubbed.folder)
    assert "core/additive_keep_s0" in names and not [n for n in names if "video" in n]


@pytest.mark.parametrize("memory, size", [("80", 32), ("24", 8)])
def test_a_smoke_run_at_full_scale(stubbed, memory, size):
    """In a folder of its own, one seed: every job takes the first 64 clips, in passes as large as they will be."""
    study = full_scale(stubbed.folder, SMOKE="1", DRY="1", MEMORY=memory, PHASES="0 1 2 3 4 5", SEEDS="", EXP="")
    process = stubbed(**study)
    lines = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    trained, evaluated = ([line.partition(f" {script}.py ")[2] for line in lines if f" {script}.py " in line]
                          for script in ("train", "evaluate"))
    assert len(trained) > 20 and any("--fusion unfreeze" in line for line in trained) is (memory == "80")
    for line in trained:
        args = train.parse_args(shlex.split(line, comments=True))
        assert (args.micro_batch, args.batch_size, args.limit_clips) == (size, 2 * size, 64)
        assert args.seed == 0 and args.out.startswith("experiments/smoke_full/") and args.steps == 6
    commands = [evaluate.parse_args(shlex.split(line, comments=True)) for line in evaluated]
    clips = [args for args in commands if args.command in ("caption", "retention", "robustness")]
    assert {args.command for args in clips} == {"caption", "retention", "robustness"}
    assert {(args.batch_size, args.limit_clips) for args in clips} == {(size, 64)}


def test_a_smoke_run_at_full_scale_ends_with_what_it_cost(stubbed):
    """The report's table of memory and seconds, without what stands before and behind it."""
    (stubbed.folder / "exp").mkdir()
    (stubbed.folder / "exp/REPORT.md").write_text("## T1: captions\n| a |\n## T4: efficiency\n| GB |\n\n## T5\n| b |\n")
    study = full_scale(stubbed.folder, PHASES="4")
    for smoke in "01":
        process = stubbed(**study, SMOKE=smoke)
        lines = process.communicate(timeout=60)[0].splitlines()
        assert process.returncode == 0
        assert [line for line in lines if "|" in line] == ["| GB |"] * (smoke == "1")


@pytest.mark.parametrize("study, seeds", [
    ({}, "012"), ({"SEEDS": " \n"}, "012"), ({"SCALE": "full"}, "012"), ({"SMOKE": "1"}, "0"), ({"SMOKE": "1", "SEEDS": "3 4"}, "34")])
def test_how_many_seeds(stubbed, study, seeds):
    """Of every system and of video; sweeps and what other systems keep have the first alone."""
    process = stubbed(**{"DRY": "1", "SEEDS": "", "PHASES": "1 2 3", **study})
    lines = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0
    found = {}
    for line in lines:
        if " train.py " in line:
            name, _, seed = line.partition("   # ")[2].rpartition("_s")
            assert f" --seed {seed} " in line
            found.setdefault(name, set()).add(seed)
    several = {name for name, some in found.items() if some == {*seeds}}
    assert {f"core/{s}" for s in [*SYSTEMS, "additive_keep"]} | {"clotho/additive_keep_init"} <= several
    assert any("video_try" in name for name in several)
    for name, some in found.items():
        if name.split("/")[0] in ("retention", "ablation") or name in ("video/audio", "video/video"):
            assert some == {seeds[0]}, name


def test_comparisons_of_the_last_try_of_video(stubbed):
    """Two senses against each alone, over all seeds; and the system that keeps against others that do."""
    assert stubbed(PHASES="1 3 4", STUB_DECISION="3").wait(60) == 1  # beyond the tolerance, after three tries
    statistics = stubbed.folder / "exp/statistics"
    assert {p.name for p in statistics.iterdir()} >= {
        "additive_keep_vs_additive", *(f"additive_keep_vs_{s}_keep" for s in ("concat", "cross_attention", "unfreeze")),
        *(f"additive_keep_reranked_vs_before_s{k}" for k in (0, 1))}
    both = [f"exp/video/video_try3_s{k}/with_additive_keep_s{k}" for k in (0, 1)]
    for sense in ("audio", "video", "shuffled"):
        command = (statistics / f"video_both_vs_{sense}/cmd.txt").read_text().split()
        a, b = command.index("compare"), command.index("vs")
        assert command[a + 1:b] == both and command[b + 1:b + 3] == [f"{run}/{sense}" for run in both]


@pytest.mark.parametrize("scale", ["tiny", "full"])
@pytest.mark.parametrize("knob, gone", [
    ("CLOTHO", ["--dataset clotho", "/clotho/"]), ("AV", ["--dataset av", "/video/"]),
    ("KEEP_QA", ["--keep", "keep_qa", "_keep_", "--with", " decide "]),
    ("QA", ["--keep", "keep_qa", "_keep_", "--with", " decide ", " retention ", "--qa", "--probe", " check ", "--gate-l2"])])
def test_what_has_no_data_is_left_out(stubbed, scale, knob, gone):
    """An empty knob leaves out what needs it, says so, and leaves everything else."""
    study = {"DRY": "1", "PHASES": "0 1 2 3 4 5"}
    if scale == "full":
        study = full_scale(stubbed.folder, **study)

    def printed(**env):
        process = stubbed(**study | env)
        lines = process.communicate(timeout=60)[0].splitlines()
        assert process.returncode == 0
        return lines
    whole, left = printed(), printed(**{knob: ""})
    for word in gone:
        assert [line for line in whole if word in line] and not [line for line in left if word in line]
    # evaluations stand in groups, which are others when some of their runs are left out
    def others(lines):
        # the plain system goes to Clotho where nothing is kept
        named = (*gone, "/retention/", *["clotho/additive"] * ("--keep" in gone))
        return [line for line in lines if " train.py " in line and not any(word in line for word in named)]
    assert others(left) == others(whole)
    assert any("clotho/additive_init" in line for line in left) is ("--keep" in gone)
    assert [line for line in left if line.startswith(f"# {knob} is empty: ")]


def test_phase_0_without_questions_still_trains(stubbed):
    assert stubbed(PHASES="0", QA="").wait(60) == 0
    assert started(stubbed.folder) == ["sanity/overfit"]


@pytest.mark.parametrize("knob, phases, fails", [
    ("AUDIOCAPS", "0 1", True), ("CLOTHO", "0 1", True), ("CLOTHO", "2", False), ("AV", "0 1 2 3", True), ("QA", "0", True),
    ("KEEP_QA", "0 3", True), ("KEEP_QA", "0 1", True), ("KEEP_QA", "2", False), ("TIMESFORMER", "0 3", True), ("LLAVA", "2", True)])
def test_paths_of_later_phases_are_looked_at_first(stubbed, knob, phases, fails):
    process = stubbed(**full_scale(stubbed.folder, PHASES=phases, **{knob: "./not there"}))
    out = process.communicate(timeout=60)[0]
    if fails:
        assert process.returncode == 2 and f"error: {knob}=./not there: no such file or folder" in out
        assert len(out.strip().splitlines()) == 1 and not calls(stubbed.folder)
    else:
        assert process.returncode == 0, out
    assert (stubbed.folder / "exp").exists() is not fails


def test_tables_of_later_phases_are_read_first(world, tmp_path):
    copy = copy_of_repository(tmp_path / "copy", world)
    (copy / "empty").mkdir()
    smoke = copy / "smoke/data"
    done = subprocess.run(["bash", "run_all.sh"], cwd=copy, capture_output=True, text=True, env={
        **os.environ, "SCALE": "full", "AUDIOCAPS": str(smoke / "audiocaps"), "CLOTHO": "empty", "AV": "",
        "QA": str(smoke / "qa/test.json"), "KEEP_QA": str(smoke / "qa/train.json"), "EXP": "exp",
        "VENV": str(Path(sys.executable).parent.parent)})
    assert done.returncode == 2 and not (copy / "exp").exists()
    assert done.stderr.startswith("error: CLOTHO: ") and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("env, starts", [
    ({}, {"0", "1"}), ({"NPROC": "2"}, {"0,1"}), ({"GPUS": "cpu"}, {""}), ({"GPUS": "1"}, {"1"}),
    ({"GPUS": "0,1 2,3", "NPROC": "2"}, {"0,1", "2,3"}), ({"CUDA_VISIBLE_DEVICES": "5,7"}, {"5", "7"}),
    ({"CUDA_VISIBLE_DEVICES": ""}, None), ({"LAUNCH": "srun --gres=gpu:1"}, None)])
def test_a_dry_run_shows_the_gpus_of_every_job(stubbed, monkeypatch, env, starts):
    """A job a GPU of the machine, unless GPUS, a scheduler or a launcher says otherwise; None: nothing is set."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    out = stubbed(DRY="1", **env).communicate(timeout=60)[0]
    jobs = [line for line in out.splitlines() if "train.py" in line]
    assert len(jobs) == 19
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


@pytest.mark.parametrize("how, status", [
    (signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGQUIT, 131), (signal.SIGPIPE, 141)])
def test_stopping_ends_every_descendant(stubbed, how, status):
    if signal.getsignal(how) == signal.SIG_IGN and how != signal.SIGPIPE:
        pytest.skip("these tests were started with this signal ignored, and a shell cannot trap what it finds ignored")
    seconds = f"987.{os.getpid()}{how.value:02d}"
    process = stubbed(STUB_SLEEP=seconds)
    deadline = time.time() + 120
    while not calls(stubbed.folder) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(how)
    assert process.wait(20) == status
    left = subprocess.run(["pgrep", "-f", f"sleep {seconds}"], capture_output=True, text=True).stdout
    assert left == ""


def wait_for_the_first_job(folder):
    deadline = time.time() + 120
    while not calls(folder) and time.time() < deadline:
        time.sleep(0.1)


def test_closing_the_terminal_ends_every_descendant(stubbed):
    seconds = f"988.{os.getpid()}"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(stubbed.folder)
        os.execvpe("bash", ["bash", "run_all.sh"], {**os.environ, "VENV": str(stubbed.folder), "EXP": "exp",
                                                    "STUB_SLEEP": seconds, "PHASES": "0"})
    wait_for_the_first_job(stubbed.folder)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert subprocess.run(["pgrep", "-f", f"sleep {seconds}"], capture_output=True, text=True).stdout == ""


def path_without(folder, *names):
    """A PATH that has all of this one's commands but some."""
    (folder / "path").mkdir()
    for place in reversed(os.environ["PATH"].split(":")):
        for file in Path(place).iterdir() if Path(place).is_dir() else []:
            if file.name not in names:
                link = folder / "path" / file.name
                link.unlink(missing_ok=True)
                link.symlink_to(file)
    return str(folder / "path")


@pytest.mark.parametrize("flock", ["command", "none", "busybox"])
def test_a_second_script_is_refused_while_a_job_of_a_killed_one_lives(stubbed, flock):
    """With util-linux's flock, without one as on macOS, and with BusyBox's, which knows -n alone."""
    env = {}
    if flock != "command":
        env["PATH"] = f"{stubbed.folder / 'bin'}:{path_without(stubbed.folder, 'flock')}"
        if flock == "busybox":
            script = stubbed.folder / "bin/flock"
            script.write_text(f'#!/bin/sh\n[ "$*" = "-n 9" ] && exec {shutil.which("flock")} -n 9\nexit 1\n')
            script.chmod(0o755)
    first = stubbed(STUB_SLEEP="6", PHASES="0", **env)
    wait_for_the_first_job(stubbed.folder)
    second = stubbed(**env)
    assert "another run_all.sh is at work" in second.communicate(timeout=20)[0] and second.returncode == 2
    first.kill()
    first.wait()
    second = stubbed(**env)  # its job has not ended
    out = second.communicate(timeout=20)[0]
    assert second.returncode == 2 and "another run_all.sh is at work there, or jobs of one that was killed: process" in out
    assert len(calls(stubbed.folder)) == 1
    # what the message names can be ended, one with another, and then the folder is free
    subprocess.run(["kill", *out.split("process")[1].split()])
    third = stubbed(PHASES="0", **env)
    out = third.communicate(timeout=60)[0]
    assert third.returncode == 0, out
    assert ("no flock command here" in out) is (flock == "none")


def test_a_file_system_without_locks_is_no_second_script(stubbed):
    (stubbed.folder / "bin/flock").write_text('#!/bin/sh\necho "flock: 9: No locks available" >&2\nexit 71\n')
    (stubbed.folder / "bin/flock").chmod(0o755)
    process = stubbed(PHASES="0")
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "exp/lock cannot be locked (flock: 9: No locks available): start no second run_all.sh there" in out


def test_the_export_is_put_in_place_whole(stubbed):
    """All folders of results, under flat names; what somebody captioned in the archive stays."""
    environment = {"PHASES": "1 4", "SEEDS": "0"}
    assert stubbed(**environment).wait(60) == 0
    systems = ["additive", "additive_keep"]
    for system in systems:
        scst = stubbed.folder / f"exp/core/{system}_s0/scst"
        (scst / "rerank").mkdir(parents=True)
        for name in ("fusion.json", "fusion.safetensors", "run_card.json", "rerank/reranker.json"):
            (scst / name).write_text(f"{system} {name}")
    export = stubbed.folder / "exp/export"
    (export / "of an earlier start").touch()
    archives = [stubbed.folder / f"full_training/finetuned/exp_{system}_s0" for system in systems]
    for _ in range(2):
        assert stubbed(**environment).wait(60) == 0
        names = {str(p.parent.relative_to(export)) for p in export.rglob("result.json")}
        assert names >= {*(f"audiocaps/{system}_s0{stage}" for system in systems for stage in ("", "_rerank", "_scst")),
                         "audiocaps/data_only_s0", "clotho/cross_attention_s0", "clotho/additive_keep_init_s0"}
        assert not (export / "of an earlier start").exists() and not [*stubbed.folder.rglob("*.new")]
        for system, archived in zip(systems, archives):
            assert {str(p.relative_to(archived)) for p in archived.rglob("*.json")} >= {
                "config.json", "training.json", "scst/fusion.json", "scst/run_card.json", "scst/rerank/reranker.json"}
            assert (archived / "scst/fusion.safetensors").read_text() == f"{system} fusion.safetensors"
            (archived / "scst/predictions.json").touch()
    assert stubbed(**environment).wait(60) == 0 and all((a / "scst/predictions.json").exists() for a in archives)


# ---------------------------------------------------------------- finished with these inputs

INPUTS = {"LLAVA": "hub/a", "CLAP": "hub/clap", "PHASES": "0 1"}


@pytest.fixture
def finished(stubbed):
    """A finished study: phases 0 and 1 of one seed, at full scale."""
    environment = full_scale(stubbed.folder, **INPUTS)
    process = stubbed(**environment)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 0, out
    return stubbed, environment


@pytest.mark.parametrize("other, job, difference", [
    ({"LLAVA": "hub/b"}, "core/additive_keep_s0", "--llava hub/a, now hub/b"),
    ({"CLAP": "hub/b"}, "core/additive_keep_s0", "--encoder hub/clap, now hub/b"),
    ({"AUDIOCAPS": "other"}, "keep_qa", "--captions audiocaps, now other"),
    ({"CLOTHO": "other"}, "clotho/additive_keep_s0", "--data clotho, now other"),
    ({"QA": "other"}, "core/additive_keep_s0", "--probe qa, now other"),
    ({"QA": "other", "KEEP_QA": ""}, "core_primary/retention_1", "--qa qa, now other"),
    ({"KEEP_QA": "other"}, "keep_qa", "--from keep_qa, now other"),
    ({"MEMORY": "24"}, "core/additive_keep_s0", "--micro-batch 32, now 8"),
    ({"SCALE": "tiny", "EXP": "exp"}, "core/additive_keep_s0", "--steps nothing, now 400")])
def test_a_finished_job_with_other_inputs_is_refused(finished, other, job, difference):
    """Naming the job and the flag, before any job of the second start; printing says it, too."""
    start, environment = finished
    (start.folder / "other").mkdir()
    for dry in "01":
        before = calls(start.folder)
        process = start(**environment | other | {"SEEDS": "0 1", "PHASES": "1", "DRY": dry})
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 2 and calls(start.folder) == before
        last = out.strip().splitlines()[-1]
        assert last.startswith(f"error: exp/{job} was started with ") and difference in last and "EXP=" in last


def test_an_interrupted_job_with_other_inputs_is_refused(finished):
    start, environment = finished
    shutil.rmtree(start.folder / "exp/clotho")
    for name in ("training", "result"):
        (start.folder / f"exp/core/concat_s0/{name}.json").unlink()
    for run in (start.folder / "exp/core").iterdir():
        if run.name != "concat_s0":
            shutil.rmtree(run)
    process = start(**environment | {"LLAVA": "hub/b", "PHASES": "1"})
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert "exp/core/concat_s0 was started with --llava hub/a, now hub/b" in out


def test_what_only_starts_a_job_may_differ(finished):
    """GPUs, threads, jobs at a time, LAUNCH, torchrun, Python; and the folder by another name, or moved."""
    start, environment = finished
    (start.folder / "launch.sh").write_text('shift\nexec "$@"\n')
    (start.folder / "other").mkdir()
    shutil.copytree(start.folder / "bin", start.folder / "other/bin")
    for other in ({"GPUS": "0 1", "JOBS": "2"}, {"THREADS": "3", "JOBS": "1"}, {"LAUNCH": "bash launch.sh --x"},
                  {"VENV": str(start.folder / "other")}, {"NPROC": "2"}, {"AUDIOCAPS": "./audiocaps/"},
                  {"EXP": str(start.folder / "exp")}, {"SEEDS": "0 1"}):
        before = calls(start.folder)
        process = start(**environment | other)
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 0, out
        assert (calls(start.folder) == before) is ("SEEDS" not in other)
    (start.folder / "exp").rename(start.folder / "moved to")
    assert start(**environment | {"EXP": "moved to", "SEEDS": "0 1 2"}).wait(60) == 0


def test_questions_to_keep_of_another_file_are_refused(stubbed):
    environment = full_scale(stubbed.folder, PHASES="3", AV="")
    assert stubbed(**environment).wait(60) == 0
    (stubbed.folder / "other").mkdir()
    process = stubbed(**environment | {"KEEP_QA": "other"})
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "exp/keep_qa was started with --from keep_qa, now other" in out


def test_a_job_that_failed_with_other_questions_is_no_finished_one(stubbed):
    """What a first start asked in vain, in more groups than the second, is forgotten."""
    environment = full_scale(stubbed.folder, PHASES="1", CLOTHO="", KEEP_QA="")
    (stubbed.folder / "other").mkdir()
    assert stubbed(**environment).wait(60) == 0
    for marker in (stubbed.folder / "exp").rglob("retention.json"):
        marker.unlink()
    assert stubbed(**environment | {"QA": "other", "JOBS": "1"}).wait(60) == 0
    assert stubbed(**environment | {"QA": "other"}).wait(60) == 0


# ---------------------------------------------------------------- knobs, and how the script is reached

@pytest.mark.parametrize("value", ["true", "yes", "True", "on", " 1 "])
def test_a_switch_in_other_words(stubbed, value):
    process = stubbed(DRY=value)
    assert "# phase 0: " in process.communicate(timeout=60)[0] and process.returncode == 0
    assert not calls(stubbed.folder) and not (stubbed.folder / "exp").exists()


def test_white_space_and_zeros_in_knobs(stubbed):
    def printed(**env):
        process = stubbed(**{"DRY": "1", "PHASES": "0 1 2 3 4", "JOBS": "2", **env})
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 0, out
        return out
    assert printed() == printed(SEEDS="0\n1\n", PHASES="0\n1\n2\n3\n4", NPROC="1\n")
    assert printed(GPUS="cpu") == printed(SEEDS="\t00  01", PHASES=" 0 1\n2 3 4 ", JOBS="02 ", SMOKE="no", GPUS=" CPU\n",
                                          SCALE="tiny ", NPROC="1\n", DRY="Yes")


@pytest.mark.parametrize("env", [
    *[{"CUDA_VISIBLE_DEVICES": value} for value in ("", " ", "-1", "none", "NoDevFiles", "void", "-1,0")],
    *[{"GPUS": value} for value in ("cpu", "CPU", "none", "NoDevFiles", "-1")]])
def test_words_for_no_gpu(stubbed, monkeypatch, env):
    """On a machine with two GPUs, too: no job is given one, and there is one a core, OMP_NUM_THREADS or not."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    out = stubbed(**{"DRY": "1", "JOBS": "", **env}).communicate(timeout=60)[0]
    jobs = [line for line in out.splitlines() if "train.py" in line]
    assert len(jobs) == 19
    assert {line.split("python ")[0] for line in jobs} == {"CUDA_VISIBLE_DEVICES= " if "GPUS" in env else ""}
    assert len([line for line in out.splitlines() if "# core/retention_" in line]) == len(os.sched_getaffinity(0))


def test_a_stale_torchrun_in_the_environment(stubbed):
    """No job takes itself for one of eight processes."""
    stub = stubbed.folder / "bin/python"
    stub.write_text(stub.read_text().replace("case $1 in\n", 'echo "${RANK-}${WORLD_SIZE-}${PYTHONSAFEPATH-}${PYTHONDONTWRITEBYTECODE-}" >>env.txt\ncase $1 in\n', 1))
    assert stubbed(PHASES="0", RANK="3", WORLD_SIZE="8", PYTHONSAFEPATH="1", PYTHONDONTWRITEBYTECODE="1").wait(60) == 0
    assert set((stubbed.folder / "env.txt").read_text().split("\n")) == {""}


def test_sh_and_old_bash_are_told_what_to_do(stubbed):
    for env, word in (({}, "start it with bash run_all.sh"), ({"BASH_VERSION": "3.2.57(1)-release"}, "bash 4.4 or newer"),
                      ({"BASH_VERSION": "4.3.0"}, "bash 4.4 or newer")):
        if shutil.which("dash") is None:
            pytest.skip("needs dash")
        process = stubbed("dash", "run_all.sh", **env)  # dash believes a BASH_VERSION that it is given
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 2 and word in out and len(out.splitlines()) == 1


def test_bash_called_sh(stubbed):
    (stubbed.folder / "bin/sh_is_bash").mkdir()
    (stubbed.folder / "bin/sh_is_bash/sh").symlink_to(shutil.which("bash"))
    process = stubbed(str(stubbed.folder / "bin/sh_is_bash/sh"), "run_all.sh", DRY="1")
    assert "# phase 1: " in process.communicate(timeout=60)[0] and process.returncode == 0


@pytest.mark.parametrize("way", ["CDPATH", "link", "folder of links"])
def test_the_script_runs_where_it_lies(stubbed, way):
    """Not where CDPATH finds a folder of that name, and not where a link to the script alone lies."""
    folder = stubbed.folder / "here/p"
    shutil.copytree(stubbed.folder, folder, ignore=shutil.ignore_patterns("here"))
    (folder / "train.py").touch()
    shutil.copytree(folder, stubbed.folder / "else/p")
    env, name, home = {}, "p/run_all.sh", folder
    if way == "CDPATH":
        env["CDPATH"] = str(stubbed.folder / "else")
    else:
        (stubbed.folder / "here/links").mkdir()
        name = "links/study"
        (stubbed.folder / "here" / name).symlink_to(folder / "run_all.sh")
        if way == "folder of links":
            (stubbed.folder / "here/links/train.py").symlink_to(folder / "train.py")
            home = stubbed.folder / "here/links"
    assert stubbed("env", "-C", str(stubbed.folder / "here"), "bash", name, PHASES="0", **env).wait(60) == 0
    assert [p.parent for p in stubbed.folder.rglob("exp")] == [home]


@pytest.mark.parametrize("env, message", [
    (dict(PHASES="0 7"), "there is no phase 7"), (dict(SCALE="huge"), "tiny, small or full"),
    (dict(GPUS="0 1", NPROC="2"), "NPROC=2 needs slots of 2"),
    (dict(VENV="/nowhere"), "lacks packages"),
    *[(dict(DRY=value), f"DRY={value}: takes 0 or 1") for value in ("2", "plan", "nope")],
    (dict(SMOKE="tiny"), "SMOKE=tiny: takes 0 or 1"),
    *[(dict(SEEDS=value), "SEEDS") for value in ("-1", "a", "0 0", "1 01", "2147483648", "99999999999999999999", "1.0", "*")],
    *[(dict(PHASES=value), "PHASES") for value in ("1 1", "-1", "one", " ", "0,1")],
    *[(dict({knob: value}), f"{knob}={value}: takes a whole number") for knob in ("JOBS", "THREADS", "NPROC", "MEMORY")
      for value in ("0", "-2", "1.5", "many", "100000")],
    *[(dict(TOLERANCE=value), f"TOLERANCE={value}: takes a number above 0") for value in ("0", "-1", "a", "0,5", "0.0")],
    *[(dict(GPUS=value), "GPUS=") for value in ("all", "0;1", "cuda:0", "0 x", "0,1")],
    (dict(EXP="run_all.sh"), "EXP=run_all.sh: is not a folder")])
def test_mistakes_are_one_line(stubbed, env, message):
    process = stubbed(**env)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and message in out and out.startswith("error: ") and len(out.splitlines()) == 1
    assert not calls(stubbed.folder) and not (stubbed.folder / "exp").exists()
