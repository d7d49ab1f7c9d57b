"""plots.py from files alone: a whole study, a half-finished one, and none. Runs are made up, so values are known."""
import json
import os
import random
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, python

sys.path.insert(0, str(ROOT))
import plots  # noqa: E402

FLAGS = {"llava": "x", "layers": [3, 6], "tokens": 16, "hidden": 512, "contrastive": 0.1, "gate_l2": 1e-4, "limit_clips": 0,
         "gate_init": 0.05, "dataset": "audiocaps", "init": None, "modality": "audio", "steps": 320, "git": "abc123"}
LEVEL = {"additive": 0.78, "cross_attention": 0.58, "concat": 0.46, "unfreeze": 0.94, "data_only": 0.21}


def write(path, obj):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(obj), encoding="utf-8")


def scores(level, **more):
    return dict(cider_d=1.6 * level, spice=None, spider=None, spice_lite=level / 2, spider_lite=level,
                meteor=level / 3, rouge_l=level / 2, bleu_4=level / 4, mean_words=9.5, **more)


def results(home, level, seed, gates, parameters=250_000, rerank=False, **more):
    """What evaluate.py caption leaves: result.json, run_card.json, predictions.json, and rerank/."""
    result = scores(level, n=320, split="test", train_seconds=90.0 + seed, gates=gates,
                    trainable_parameters=parameters, validation={"val_spider_lite": level + 0.01}, **more)
    if rerank:
        oracle, other = ({k: v for k, v in scores(x).items() if k in ("cider_d", "spice_lite", "spider_lite")}
                         for x in (level + 0.1, level + 0.01))
        reranked = scores(level + 0.03, n=320, oracle=oracle, other_clip=other, reranker={
            "weights": {"logprob": 0.5, "clap": 0.25, "consensus": 1.0}, "encoder": "x"}, diversity={
            "self_bleu": 0.4 + seed / 10, "distinct_1": 0.2, "distinct_2": 0.5 - seed / 20, "candidates": 9.5})
    rng = random.Random(seed)
    items = [{"id": str(i), "scores": {"spider_lite": level + rng.gauss(0, 0.4)},
              "candidates": [{"text": f"a dog {'barks' if rng.random() < i / 40 else 'howls'} {k}"} for k in range(3)]}
             for i in range(40)]
    write(home / "predictions.json", items)
    if rerank:
        write(home / "rerank/result.json", reranked)
        write(home / "rerank/predictions.json", [
            {**i, "scores": {"spider_lite": i["scores"]["spider_lite"] + rng.random() / 10}} for i in items])
    write(home / "run_card.json", {"trainable_parameters": 250_000, "flops_a_clip": 2.5e9, "clips_a_second": 55.0,
                                   "train_hours": 0.025, "seconds_to_90_percent": 42.0, "hardware": "2 CPU cores",
                                   "peak_memory": 1.5e9, "clap": {"scores": "models/judge"},
                                   "stages": {"xe": {"seconds": 60.0}, "scst": {"seconds": 90.0}}})
    write(home / "result.json", result)


def fake_run(folder, name, fusion, seed, level=None, scst=False, rerank=False, done=True, **flags):
    home, level = folder / name, LEVEL[fusion] + seed / 50 if level is None else level
    flags = {**FLAGS, **flags}
    write(home / "config.json", {**flags, "fusion": fusion, "seed": seed})
    gates = {str(l): level * l / 8 - seed / 100 for l in flags["layers"]} if fusion != "concat" else {}
    parameters = 250_000 * (5 if fusion == "unfreeze" else 1) + 4000 * (flags["hidden"] * flags["tokens"] // 512 - 16)
    lines = [{"event": "step", "stage": "xe", "step": s, "xe": 3.0,
              **{f"gate_{l}": g * s / 320 for l, g in gates.items()}} for s in range(0, 320, 40)]
    lines += [{"event": "validation", "stage": "xe", "step": s, "val_n": 80, "seconds": s / 4,
               "val_spider_lite": level * (1 - 2 ** (-s / 80))} for s in (80, 160, 240, 320)]
    if scst:
        lines += [{"event": "step", "stage": "scst", "step": s, "reward": 0.5,
                   **{f"gate_{l}": g * (1 + s / 500) for l, g in gates.items()}} for s in range(50)]
        lines += [{"event": "validation", "stage": "scst", "step": s, "val_n": 80, "seconds": 80 + s,
                   "val_spider_lite": level + s / 1000} for s in (25, 50)]
    (home / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"torn')
    if done:
        write(home / "training.json", {"peak_memory": 2.25e9, "seconds_a_step": {"xe": 1.25, "scst": 4.5}})
        results(home, level, seed, gates, parameters, rerank)
    if scst:
        results(home / "scst", level + 0.05, seed, gates, parameters, rerank)
    return home


def answers(accuracy, before=0.965):
    """What retention.json has of one condition."""
    return {"loss": before - accuracy, "loss_ci95": [before - accuracy - 0.02, before - accuracy + 0.02],
            "accuracy": accuracy, "accuracy_ci95": [accuracy - 0.03, min(1, accuracy + 0.02)], "nll": 0.2,
            "nll_ci95": [0.1, 0.3], "agreement": accuracy, "agreement_ci95": [accuracy - 0.03, 1.0]}


def retention(home, beside, conflict=None, **more):
    conditions = {name: answers(accuracy) for name, accuracy in {"backbone": 0.965, "unrelated_clip": beside, **more}.items()}
    if conflict is not None:
        conditions["conflict"] = {**answers(conflict, 0.9), "n": 60}
    exact = {"no_clip": True, "nothing_attached": True, "gates_closed": True}
    write(home / "retention.json", {"n": 200, "hash": "0123456789abcdef", "conditions": conditions, "exact": exact, "exact_n": 64})


def comparison(path, seeds_a, seeds_b, difference, half):
    row = {"a": 0.7 + difference, "b": 0.7, "difference": difference, "ci95": [difference - half, difference + half],
           "bca95": [difference - half, difference + half], "p": 0.0001 if abs(difference) > half else 0.4,
           "p_holm": 0.4, "p_randomisation": None, "effect_size": 0.3, "sd": half / 2}
    write(path, {"n": 320, "runs": {"a": ["a"] * seeds_a, "b": ["b"] * seeds_b}, "metrics": {
        "spider_lite": row, "meteor": {**row, "difference": difference / 4, "ci95": [
            (difference - half) / 4, (difference + half) / 4]}}})


def study(folder):
    """Every phase, two seeds, as run_all.sh leaves it."""
    for seed in (0, 1):
        for system in LEVEL:
            main = system == "additive"
            home = fake_run(folder, f"core/{system}_s{seed}", system, seed, scst=main, rerank=main)
            retention(home, 0.965 - LEVEL[system] / 15, silence=0.95, noise=0.93)
            if main:
                retention(home / "scst", 0.90)
            if system in ("additive", "cross_attention", "concat"):
                write(home / "robustness.json", {"n": 320, "clean": scores(LEVEL[system]), "noise": {
                    kind: {f"{k}": scores(LEVEL[system] * (0.75 + k / 100) * drop) for k in (20, 10, 5, 0, -5)}
                    for kind, drop in (("white", 1), ("clip", 0.9))}})
            if system in ("additive", "cross_attention"):
                fake_run(folder, f"clotho/{system}_s{seed}", system, seed, dataset="clotho")
                fake_run(folder, f"clotho/{system}_init_s{seed}", system, seed, dataset="clotho", init=str(home))
    # phase 0 is in no table
    write(folder / "sanity/overfit/config.json", {**FLAGS, "fusion": "additive", "seed": 0, "steps": 72})
    fake_run(folder, "ablation/layers_3_s0", "additive", 0, 0.7, layers=[3], steps=160)
    fake_run(folder, "ablation/layers_6_s0", "additive", 0, 0.6, layers=[6], steps=160)
    fake_run(folder, "ablation/tokens_8_hidden_512_s0", "additive", 0, 0.71, tokens=8)
    fake_run(folder, "ablation/tokens_8_hidden_768_s0", "additive", 0, 0.73, tokens=8, hidden=768)
    for system in ("additive", "cross_attention"):
        fake_run(folder, f"ablation/loss_{system}_xe_s0", system, 0, LEVEL[system] - 0.05, contrastive=0.0)
    retention(fake_run(folder, "retention/gate_l2_100_s0", "additive", 0, 0.7, gate_l2=100, steps=160), 0.93)
    retention(fake_run(folder, "ablation/additive_l3-6_n16_h512_c0.1_s0", "additive", 0, 0.75, steps=160), 0.9)
    keep = {"null_slot": True, "keep_every": 1}
    for value in (1, 30):
        retention(fake_run(folder, f"retention/keep_{value}_s0", "additive", 0, 0.76, steps=160, keep=value, **keep),
                  0.94 + value / 2000)
    for seed in (0, 1):
        home = fake_run(folder, f"core/additive_keep_s{seed}", "additive", seed, keep=10, scst=True, **keep)
        retention(home, 0.961, silence=0.96, noise=0.965, conflict=0.85)
        retention(home / "scst", 0.955)
    retention(fake_run(folder, "retention/concat_keep_s0", "concat", 0, keep=10, keep_every=1), 0.95)
    retention(fake_run(folder, "retention/unfreeze_keep_s0", "unfreeze", 0, 0.4, keep=10, **keep), 0.95)
    senses(folder, keep)
    for value in (0, 0.2, 1):
        fake_run(folder, f"appendix/gate_{value}_s0", "additive", 0, 0.7 + value / 100, gate_init=value)
    write(folder / "phase3/decision.json", {"tolerance": 0.5, "decision": "keep", "tries": [
        {"run": f"anywhere/tiny/video/video_try{k + 1}_s0", "gate_l2": 10 ** k * 1e-4, "keep": 1 + 2 * k,
         "clean_identical": True, "within": k > 0,
         "audio": {"before": 78.0, "after": 77.4 + k / 5, "loss": 0.6 - k / 5, "loss_ci95": [-0.3, 1.5]},
         "vl": {"before": 91.0, "after": 90.9, "loss": 0.1, "loss_ci95": [-0.4, 0.7]}} for k in (0, 1)]})
    for k, system in enumerate(("cross_attention", "concat", "unfreeze", "data_only")):
        comparison(folder / f"statistics/additive_vs_{system}.json", 2, 2, LEVEL["additive"] - LEVEL[system], 0.05)
    comparison(folder / "statistics/additive_keep_vs_concat_keep.json", 2, 1, 0.3, 0.05)
    comparison(folder / "statistics/additive_keep_vs_unfreeze_keep.json", 2, 1, 0.4, 0.05)
    comparison(folder / "statistics/additive_keep_vs_additive.json", 2, 2, 0.01, 0.05)
    comparison(folder / "statistics/additive_keep_scst_vs_xe_s0.json", 1, 1, 0.01, 0.03)
    comparison(folder / "statistics/video_both_vs_audio.json", 2, 2, 0.3, 0.05)
    comparison(folder / "statistics/video_both_vs_video.json", 2, 2, 0.2, 0.05)


def senses(folder, keep):
    """A video branch beside the audio branch: seed 0 decides that the second try is good, seed 1 has that one alone."""
    av = {"dataset": "av", "modality": "video", **keep}
    for name, seed in (("video_try1", 0), ("video_try2", 0), ("video_try2", 1)):
        beside = folder / f"core/additive_keep_s{seed}/with_{name}_s{seed}"
        retention(beside, 0.955)
        results(beside / "unrelated", 0.77 - seed / 50, seed, {})
        home = fake_run(folder, f"video/{name}_s{seed}", "additive", seed, keep=10 * int(name[-1]), **av)
        for given, level in (("all", 0.9), ("audio", 0.5), ("video", 0.7), ("shuffled", 0.4)):
            place = home / f"with_additive_keep_s{seed}" / ("" if given == "all" else given)
            results(place, level - seed / 50, seed, {}, hear=given)
    write(folder / "senses.json", {"runs": {"audio": ["a", "b"], "video": ["c"]}, "prompts": [
        {"text": "Describe the sound.", "sense": "audio", "trained": True, "open": {"audio": [0.9, 0.8], "video": [0.1]}},
        {"text": "Is it red?", "sense": "image", "trained": False, "open": {"audio": [0.1, 0.0], "video": [0.2]}}]})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, REPORT.md) of a whole study, made by a copy of plots.py alone in an empty folder."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(ROOT / "plots.py", folder)
    study(folder / "tiny")
    python("plots.py", "tiny", cwd=folder)
    return folder / "tiny", (folder / "tiny/REPORT.md").read_text()


def row(report, title, *cells):
    """The cells of the first row below a heading that begins with these."""
    section = report.split(f"\n## {title}")[1].split("\n## ")[0]
    for line in section.splitlines():
        found = [c.strip() for c in line.strip("|").split("|")]
        if found[:len(cells)] == list(cells):
            return found
    raise AssertionError(f"no row {cells} below {title}:\n{section}")


def test_first_line_is_the_scale_and_nothing_is_missing(whole):
    folder, report = whole
    assert report.startswith("# Report, scale: tiny\n") and "Not finished" not in report
    assert "Missing" not in report, report.split("**Missing**")[1].split("\n")[0]
    for figure in folder.glob("figures/*.png"):
        assert f"](figures/{figure.name})" in report and figure.with_suffix(".pdf").stat().st_size > 5000
    names = {f.stem for f in folder.glob("figures/*.png")}
    assert names == {f[7:] for f in dir(plots) if f.startswith("figure_")}
    assert "mean and range over runs (audio 2, video 1)" in report


def test_every_row_names_its_runs(whole):
    folder, report = whole
    for line in report.split("\n## T1")[1].split("## Where")[0].splitlines():
        if line.startswith("| ") and not line.startswith(("| ---", "| system", "| run", "| A - B", "| keep", "| what")):
            place = line.rstrip(" |").rsplit("|", 1)[1].strip().strip("`")
            places = []
            for part in place.split("`; `"):
                seeds = (re.findall(r"{(.*?)}", part) or [""])[0]
                places += [folder / re.sub(r"{.*?}", seed, part) for seed in seeds.split(",")]
            assert all(p.exists() for p in places) and len(places) in (1, 2), line


def test_systems_are_compared_by_the_first_beam(whole):
    assert row(whole[1], "T1", "additive")[1:6] == ["2", "320", "1.264 ± 0.023", "0.395 ± 0.007", "0.790 ± 0.014"]
    assert row(whole[1], "T1", "additive + SCST")[5] == "0.840 ± 0.014"
    assert row(whole[1], "T1", "additive + SCST")[-1] == "`core/additive_s{0,1}/scst`"
    assert row(whole[1], "T2", "additive", "Clotho alone")[-1] == "`clotho/additive_s{0,1}`"
    assert row(whole[1], "T2", "additive", "AudioCaps checkpoint")[-1] == "`clotho/additive_init_s{0,1}`"
    assert row(whole[1], "T3 Reranker", "additive", "core", "reranked")[7] == "0.820 ± 0.014"
    assert row(whole[1], "T3 Reranker", "additive", "core", "reranked")[11] == "0.030 ± 0.000"
    wrong = row(whole[1], "T3 Reranker", "additive", "core", "reranked with another clip's audio")
    assert wrong[7:9] == ["0.800 ± 0.014", "-"] and wrong[11] == "0.010 ± 0.000"
    assert row(whole[1], "Targets", "reranker's gain in SPIDEr")[1:5] == ["≥ 0.02", "spider_lite", "additive", "0.030 ± 0.000"]
    found = row(whole[1], "Targets", "AudioCaps SPIDEr, XE + SCST")[3:]
    assert found == ["additive + keep + SCST", "0.840 ± 0.014", "320", "`core/additive_keep_s{0,1}/scst`"]
    assert row(whole[1], "Targets", "VQA loss, no clip")[4:6] == ["yes", "64"]
    assert row(whole[1], "Targets", "VQA loss, unrelated clip, with keep and SCST")[4] == "1.00 ± 0.00"
    # the judge's name, and its cosine where a run has one
    assert "CLAP cosine" not in whole[1]


def test_a_run_that_two_tables_need_is_in_both(whole):
    report = whole[1]
    for title, *cells in (("T3 Layers", "additive", "3 6"), ("T3 Tokens", "additive", "16", "512"),
                          ("T3 Losses", "additive", "0.1"), ("Gate regularisation: L2", "additive", "0.0001"),
                          ("Appendix: gates", "additive", "0.05")):
        assert row(report, title, *cells, "320")[-1] == "`core/additive_s{0,1}`"
    for title, *cells in (("T3 Layers", "additive", "3 6"), ("Gate regularisation: L2", "additive", "0.0001")):
        assert row(report, title, *cells, "160")[-1] == "`ablation/additive_l3-6_n16_h512_c0.1_s0`"
    assert row(report, "T3 Layers", "additive", "3", "160")[9] == "0.262"  # its gate, and its shorter schedule
    assert "data-only" not in report.split("## T3 Layers")[1].split("## T3 Reranker")[0]
    section = report.split("## T3 Layers")[1].split("## T3 Tokens")[0]
    assert section.count("\n| additive") == 4  # what differs in tokens too is in another family


def test_retention_has_an_interval_for_one_seed_and_a_deviation_for_two(whole):
    found = row(whole[1], "T5", "additive, gate L2 100, steps 160", "1", "200")
    assert found[3] == "93.0 [90.0, 95.0]" and found[-2] == "yes" and found[8] == "3.5 [1.5, 5.5]"
    assert row(whole[1], "T5", "additive", "2")[3:8] == ["91.3 ± 0.0", "95.0 ± 0.0", "93.0 ± 0.0", "-", "-"]
    keeping = row(whole[1], "T5", "additive + keep", "2")
    assert keeping[3:] == ["96.1 ± 0.0", "96.0 ± 0.0", "96.5 ± 0.0", "85.0 ± 0.0", "60", "0.4 ± 0.0", "0.5 ± 0.0", "0.0 ± 0.0",
                           "5.0 ± 0.0", "99.6 ± 0.0", "96.1 ± 0.0", "0.200 ± 0.000", "yes", "`core/additive_keep_s{0,1}`"]
    assert row(whole[1], "T5", "additive + keep, keep 30, steps 160", "1")[3] == "95.5 [92.5, 97.5]"
    assert row(whole[1], "T5", "additive + keep, keep 1, steps 160", "1")[3] == "94.0 [91.0, 96.0]"
    for step, value in (("320", "10"), ("160", "30")):
        assert row(whole[1], "Gate regularisation: keep", "additive + keep", "yes", value, step)
    assert row(whole[1], "T5", "additive + SCST", "2")[3] == "90.0 ± 0.0"
    # before audio, after XE, after SCST
    assert labels(whole[1], "T5")[:4] == ["backbone (before audio)", "additive + keep", "additive + keep + SCST", "additive"]
    assert row(whole[1], "T5", "backbone (before audio)")[3:6] == ["96.5 [93.5, 98.5]"] * 3
    assert row(whole[1], "T5", "additive + keep + SCST")[12] == "99.0 ± 0.0"


def test_retention_files_of_before_are_read(tmp_path):
    """Three more conditions, each with a flag, in place of `exact`."""
    for system, identical in (("additive", True), ("concat", False)):
        home = fake_run(tmp_path, f"core/{system}_s0", system, 0)
        conditions = {name: answers(0.9) for name in ("backbone", "unrelated_clip", "nothing_attached", "no_clip")}
        for name in ("backbone", "nothing_attached", "no_clip"):
            conditions[name]["identical"] = identical or name != "no_clip"
        write(home / "retention.json", {"n": 200, "hash": "0123456789abcdef", "conditions": conditions})
    report = plots.report(tmp_path)
    assert row(report, "T5", "additive")[-2] == "yes" and row(report, "T5", "concatenation")[-2] == "no"
    assert row(report, "Targets", "VQA loss, no clip")[4:6] == ["yes", "200"] and "| conflict |" not in report


def test_headline_is_against_the_best_baseline_on_validation(whole):
    """unfreeze's validation is best without keep, concat's with keep; their lines come first though others sort before."""
    report = whole[1]
    head = report.split("\n## ")[0]
    assert ("**Headline**: additive keep vs concat keep, the best baseline on validation (concat 0.470, unfreeze 0.410). "
            "Test spider_lite 1.000 and 0.700: +0.300 [+0.250, +0.350], p = 0.0001, n = 320, seeds 2/1.\n") in head
    assert "**Without keep**: additive vs unfreeze, the best baseline on validation (cross_attention 0.600, " in head
    lines = [x for x in report.split("## Comparisons")[1].splitlines() if x.startswith("| ")]
    assert lines[2].startswith("| **headline:** additive keep vs concat keep | spider_lite | 320 | 2/1 |")
    assert lines[4].startswith("| **without keep:** additive vs unfreeze | spider_lite | 320 | 2/2 |")
    assert "| -0.160 | [-0.210, -0.110] |" in lines[4] and lines[4].endswith("`statistics/additive_vs_unfreeze.json` |")
    assert row(report, "Comparisons", "video both vs audio") and row(report, "Comparisons", "additive keep scst vs xe s0")


def test_headline_without_kept_baselines_is_of_the_plain_systems(tmp_path):
    for system in ("additive", "concat"):
        fake_run(tmp_path, f"core/{system}_s0", system, 0)
    fake_run(tmp_path, "core/additive_keep_s0", "additive", 0, keep=10)
    comparison(tmp_path / "statistics/additive_keep_vs_additive.json", 1, 1, 0.01, 0.05)
    report = plots.report(tmp_path)
    assert ("**Headline**: additive vs concat, the best baseline on validation (concat 0.470). Not compared yet (phase 4).\n"
            in report and "Without keep" not in report)
    comparison(tmp_path / "statistics/additive_vs_concat.json", 1, 1, 0.3, 0.05)
    assert labels(plots.report(tmp_path), "Comparisons")[0] == "**headline:** additive vs concat"


class Fake(SimpleNamespace):
    __hash__ = object.__hash__


def test_best_baseline_looks_at_no_test_score():
    def run(fusion, validation, test):
        return Fake(phase="core", stage="xe", own=True, system=fusion, label=fusion, seed=0, name=fusion, config={
            "fusion": fusion, "keep": 0.0}, result={
            "spider": None, "spider_lite": test, "validation": {"val_spider_lite": validation}})
    runs = [run("concat", 0.5, 0.9), run("cross_attention", 0.6, 0.1), run("additive", 0.9, 0.9),
            run("data_only", 0.9, 0.9), run("concat", 0.6, 0.9)]
    found = ("cross_attention", {"concat": 0.55, "cross_attention": 0.6})
    assert plots.best_baseline(runs, "spider_lite", False) == found
    assert plots.best_baseline(runs, "spider_lite", True) == plots.best_baseline([], "spider_lite", False) == (None, {})
    for other in runs:
        other.config["keep"] = 10.0
    assert plots.best_baseline(runs, "spider_lite", True) == found


def test_senses_that_compose(whole):
    """Of the tries the last one counts, with all its seeds."""
    section = whole[1].split("## Senses that compose")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")]
    assert lines[0] == ["what", "given", "seeds", "n", "spider_lite", "CIDEr-D", "VQA accuracy", "runs"]
    captions, home, beside = "audio captions", "core/additive_keep_s{0,1}", "with_video_try2_s{0,1}"
    video = "video/video_try2_s{0,1}/with_additive_keep_s{0,1}"
    assert lines[2:] == [
        [captions, "audio alone", "2", "320", "0.790 ± 0.014", "1.264 ± 0.023", "-", f"`{home}`"],
        [captions, "beside an unrelated video", "2", "320", "0.760 ± 0.014", "1.216 ± 0.023", "-", f"`{home}/{beside}/unrelated`"],
        ["answers", "beside an unrelated clip", "2", "200", "-", "-", "96.1 ± 0.0", f"`{home}`"],
        ["answers", "beside an unrelated clip and video", "2", "200", "-", "-", "95.5 ± 0.0", f"`{home}/{beside}`"],
        ["videos with sound", "both", "2", "320", "0.890 ± 0.014", "1.424 ± 0.023", "-", f"`{video}`"],
        ["videos with sound", "audio alone", "2", "320", "0.490 ± 0.014", "0.784 ± 0.023", "-", f"`{video}/audio`"],
        ["videos with sound", "video alone", "2", "320", "0.690 ± 0.014", "1.104 ± 0.023", "-", f"`{video}/video`"],
        ["videos with sound", "another clip's video", "2", "320", "0.390 ± 0.014", "0.624 ± 0.023", "-", f"`{video}/shuffled`"]]


def test_video_noise_and_cost(whole):
    assert row(whole[1], "Video", "video_try2", "video", "all")[3:5] == ["2", "320"]
    assert row(whole[1], "T5", "additive + keep, with video_try2", "2")[3] == "95.5 ± 0.0"
    assert row(whole[1], "Cost of the second", "1", "0.0001")[4:] == [
        "0.60", "[-0.30, 1.50]", "91.00", "90.90", "0.10", "[-0.40, 0.70]", "yes", "0.5", "no",
        "320", "200", "`video/video_try1_s0`"]
    noise = row(whole[1], "Appendix: noise", "concatenation", "clip")
    assert noise[4:6] == ["0.460 ± 0.000", "0.393 ± 0.000"] and noise[-1] == "`core/concat_s{0,1}`"
    costs = row(whole[1], "Efficiency", "additive")[2:-2]  # XE does not include the SCST that follows
    assert costs == ["250,000", "1.0 ± 0.0", "0.7 ± 0.0", "1.25 ± 0.00", "-", "2.25 ± 0.00", "1.50 ± 0.00", "55.0 ± 0.0",
                     "2.50 ± 0.00"]
    assert row(whole[1], "Efficiency", "additive + SCST")[3:8] == ["1.5 ± 0.0", "0.7 ± 0.0", "-", "4.50 ± 0.00", "2.25 ± 0.00"]
    assert row(whole[1], "T1", "additive + SCST")[11] == "1.5 ± 0.0"


def test_a_judge_is_named_where_it_gave_a_cosine(tmp_path):
    for system, more in (("additive", {"clap_cosine": 0.41}), ("concat", {})):
        home = fake_run(tmp_path, f"core/{system}_s0", system, 0)
        write(home / "result.json", {**json.loads((home / "result.json").read_text()), **more})
        (home / "training.json").unlink()
        card = json.loads((home / "run_card.json").read_text())
        write(home / "run_card.json", {key: value for key, value in card.items() if key != "peak_memory" or more})
    report = plots.report(tmp_path)
    head = report.split("\n## T1")[1].splitlines()[2].split(" | ")
    assert report.split("\n## T1")[1].count("by judge, which took part in nothing else") == 1
    for system, value in (("additive", "0.410"), ("concatenation", "-")):
        assert row(report, "T1", system)[head.index("CLAP cosine")] == value
    # what no run has is no column, what one lacks is a dash
    assert "training GB" not in report and "s/step" not in report
    assert row(report, "Efficiency", "additive")[5] == "1.50" and row(report, "Efficiency", "concatenation")[5] == "-"


def test_runs_with_other_noise_levels_share_a_table(tmp_path):
    for k, ratios in enumerate((("20", "0"), ("10", "0"))):
        home = fake_run(tmp_path, f"core/{['additive', 'concat'][k]}_s0", ["additive", "concat"][k], 0)
        noise = {"white": {ratio: scores(0.4) for ratio in ratios}}
        write(home / "robustness.json", {"n": 320, "clean": scores(0.5, half_width_95=0.1), "noise": noise})
    report = plots.report(tmp_path)
    assert row(report, "Appendix: noise", "additive", "white")[4:8] == ["0.500 [0.400, 0.600]", "0.400", "-", "0.400"]
    assert row(report, "Appendix: noise", "concatenation", "white")[4:8] == ["0.500 [0.400, 0.600]", "-", "0.400", "0.400"]


def test_half_a_study_says_what_is_missing(tmp_path):
    fake_run(tmp_path / "exp", "core/additive_s0", "additive", 0)
    fake_run(tmp_path / "exp", "core/additive_s1", "additive", 1)
    fake_run(tmp_path / "exp", "core/concat_s0", "concat", 0, done=False)
    python(ROOT / "plots.py", "exp", cwd=tmp_path)
    report = (tmp_path / "exp/REPORT.md").read_text()
    assert "**Not finished** (1 of 3 runs): core/concat_s0" in report and "| `core/concat_s0` | 0 |" in report
    missing = report.split("**Missing**")[1].split("\n")[0]
    for what in ("T2 Clotho", "T3 Layers", "T5 VQA", "figure frontier", "Comparisons (phase 4)",
                 "figure snr (phase 5)", "partial unfreeze in core", "cross-attention in core"):
        assert what in missing
    assert "concatenation in core" not in missing and "T1" not in missing
    assert row(report, "T1", "additive")[5] == "0.790 ± 0.014" and "| concatenation" not in report
    assert row(report, "Targets", "AudioCaps SPIDEr, XE + SCST")[3:] == ["-", "missing", "-", "-"]
    assert {f.stem for f in (tmp_path / "exp/figures").glob("*.png")} == {"curves", "gates", "pareto"}


def test_only_started_runs(tmp_path):
    fake_run(tmp_path, "core/additive_s0", "additive", 0, done=False)
    (tmp_path / "core/additive_s0/log.jsonl").unlink()
    python(ROOT / "plots.py", tmp_path)
    assert "T1 AudioCaps" in (tmp_path / "REPORT.md").read_text().split("**Missing**")[1].split("\n")[0]


def test_spider_only_where_spice_ran_everywhere(tmp_path):
    for seed in (0, 1):
        home = fake_run(tmp_path, f"core/additive_s{seed}", "additive", seed, metric="spider")
        found = json.loads((home / "result.json").read_text())
        write(home / "result.json", {**found, "spice": 0.2, "spider": 0.5, "validation": {"val_spider": 0.5}})
    assert plots.selection(plots.read_runs(tmp_path)) == "spider"
    home = fake_run(tmp_path, "core/concat_s0", "concat", 0)
    assert plots.selection(plots.read_runs(tmp_path)) == "spider_lite"


def test_no_runs_is_one_line(tmp_path):
    done = python(ROOT / "plots.py", tmp_path, check=False)
    assert done.returncode == 2 and "no runs there" in done.stderr and "Traceback" not in done.stderr


def test_only_the_test_split_is_in_tables(tmp_path):
    """A validation result, or one that names no split, is left out by name; so is its copy in a folder beside."""
    for k, split in enumerate(("test", "val", None)):
        home = fake_run(tmp_path, f"core/additive_s{k}", "additive", k)
        result = json.loads((home / "result.json").read_text())
        write(home / "result.json", {**result, "split": split})
        write(home / "val/result.json", {**result, "split": "val", "spider_lite": 9.0})
    fake_run(tmp_path, "core/concat_s0", "concat", 0)
    report = plots.report(tmp_path)
    assert row(report, "T1", "additive")[1:6] == ["1", "320", "1.248", "0.390", "0.780"]
    assert row(report, "T1", "additive")[-1] == "`core/additive_s0`" and "9.0" not in report
    assert row(report, "Targets", "AudioCaps SPIDEr, XE")[3:] == ["additive", "0.780", "320", "`core/additive_s0`"]
    assert "**Not of the test split** (2 of 4 runs): core/additive_s1, core/additive_s2\n" in report
    assert "Not finished" not in report
    fake_run(tmp_path, "core/unfreeze_s0", "unfreeze", 0, done=False)
    assert "**Not finished** (1 of 5 runs): core/unfreeze_s0" in plots.report(tmp_path)


def test_a_notebooks_backend_and_a_closed_pipe_are_no_errors(tmp_path):
    fake_run(tmp_path, "core/additive_s0", "additive", 0)
    reading, writing = os.pipe()
    os.close(reading)
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    with open(writing, "wb") as closed:
        done = subprocess.run([sys.executable, ROOT / "plots.py", tmp_path], stdout=closed, stderr=subprocess.PIPE, env=env)
    assert done.returncode == 0 and not done.stderr and (tmp_path / "REPORT.md").exists()
    for kind, start in (("png", b"\x89PNG"), ("pdf", b"%PDF")):
        assert (tmp_path / f"figures/curves.{kind}").read_bytes().startswith(start)


# ---- seeds of one system differ in the seed and in where they lie, and in nothing else

def labels(report, title):
    section = report.split(f"\n## {title}")[1].split("\n## ")[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.startswith("| ")][2:]


def legend(monkeypatch, study, name):
    """The labels in a figure's legend."""
    found = []
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda ax, handles, names, **look: found.extend(names))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    monkeypatch.setattr(os, "replace", lambda *_: None)
    assert plots.draw_figure(getattr(plots, f"figure_{name}"), study)
    return found


def test_what_differs_tells_systems_apart_everywhere(tmp_path, monkeypatch):
    """Another encoder, other tokens and a flag that nobody knows, beside two seeds of the plain system."""
    place = {"encoder": "m/clap", "scst_steps": 500}
    for name, seed, more in (("additive_s0", 0, {}), ("additive_s1", 1, {}), ("additive_ast_s0", 0, {"encoder": "m/hub/ast"}),
                             ("additive_tokens8_s0", 0, {"tokens": 8}), ("additive_new_s0", 0, {"wings": 3})):
        home = fake_run(tmp_path, f"core/{name}", "additive", seed, 0.5 + len(name) / 100, **{**place, **more})
        json_of = json.loads((home / "config.json").read_text())
        write(home / "config.json", {**json_of, "out": str(home), "cache": f"c{seed}", "device": f"cuda:{seed}", "git": name,
                                     "folder": name, "name": name, "versions": {"torch": name}})
        retention(home, 0.9)
        noise = {kind: {"0": scores(0.4)} for kind in ("white",)}
        write(home / "robustness.json", {"n": 320, "clean": scores(0.5), "noise": noise})
    names = ["additive", "additive, encoder ast", "additive, tokens 8", "additive, wings 3"]
    report = plots.report(tmp_path)
    for title in ("T1", "T5", "Appendix: noise"):
        assert [label for label in labels(report, title) if "backbone" not in label] == names, title
    assert row(report, "T1", "additive")[1] == "2" and row(report, "T1", "additive")[5] == "0.610 ± 0.000"
    assert row(report, "T3 Tokens", "additive", "8")[-1] == "`core/additive_tokens8_s0`"
    assert row(report, "T3 Tokens", "additive", "16")[-1] == "`core/additive_s{0,1}`"  # and not the other encoder
    study = plots.Study(tmp_path)
    for figure in ("curves", "pareto", "frontier"):
        assert [label for label in legend(monkeypatch, study, figure) if label != "backbone alone"] == names, figure
    assert {label.split(", layer")[0] for label in legend(monkeypatch, study, "gates")} == set(names)
    styles = {str(look) for _, look in plots.looks(study.core).values()}
    assert len(styles) == 4  # each can be told from the others


def two(tmp_path, first, second):
    """The labels of two runs, seeds 0 and 1, that differ in these flags."""
    for seed, flags in enumerate((first, second)):
        fake_run(tmp_path, f"core/additive_s{seed}", "additive", seed, **flags)
    return core_labels(tmp_path)


def core_labels(folder):
    return [cells[0] for cells in plots.grouped(plots.Study(folder).finished("core"))]


@pytest.mark.parametrize("first, second", [
    ({"init": "exp/core/additive_s0"}, {"init": "exp/core/additive_s1"}),  # each its own seed
    ({"init": "exp/core/additive_s0"}, {"init": "exp/core/additive_s0"}),  # one for all
    ({}, {"null_slot": False, "keep": 0.0, "keep_every": 1, "keep_qa": None, "dtype": "auto", "metric": "spider_lite"}),
    ({"scst_lr": 0.1, "scst_steps": 3}, {"scst_steps": 500})])  # what follows XE
def test_these_are_seeds_of_one_system(tmp_path, first, second):
    assert two(tmp_path, first, second) == ["additive"]


@pytest.mark.parametrize("first, second, label", [
    ({"init": "a/core/x_s0"}, {"init": "a/core/y_s1"}, "additive, init y"),
    ({"data": "a/audiocaps"}, {"data": "b/audiocaps"}, "additive, data b/audiocaps"),
    ({}, {"init": "a/core/x_s10"}, "additive, init x_s10"),
    ({"new": {"a": 1}}, {"new": {"a": 2}}, 'additive, new {"a": 2}'),
    ({"fast": True}, {}, "additive, no fast"), ({}, {"fast": True}, "additive, fast"),
    ({}, {"keep_every": 2}, "additive, keep every 2")])
def test_these_are_two_systems(tmp_path, first, second, label):
    assert two(tmp_path, first, second) == ["additive", label]


def test_three_folders_with_one_last_name_stay_apart(tmp_path):
    for seed, folder in enumerate(("a", "a", "b", "c")):
        fake_run(tmp_path, f"core/additive_s{seed}", "additive", seed, data=f"{folder}/audiocaps")
    assert core_labels(tmp_path) == ["additive", "additive, data b/audiocaps", "additive, data c/audiocaps"]


def test_targets_are_of_one_system(tmp_path):
    """Two runs of one name, of which one has fewer tokens, are not averaged there either."""
    for seed, tokens in ((0, 16), (1, 16), (2, 8)):
        fake_run(tmp_path, f"core/additive_s{seed}", "additive", seed, 0.5 + seed / 100, tokens=tokens)
    table = plots.table_targets(plots.Study(tmp_path))
    assert row(f"\n## Targets\n{table}", "Targets", "AudioCaps SPIDEr, XE")[3:] == [
        "additive", "0.505 ± 0.007", "320", "`core/additive_s{0,1}`"]


def test_the_stage_after_scst_has_its_flags(tmp_path):
    for seed in (0, 1):
        fake_run(tmp_path, f"core/additive_s{seed}", "additive", seed, scst_steps=50 + seed)
        results(tmp_path / f"core/additive_s{seed}/scst", 0.8, seed, {})
    assert core_labels(tmp_path) == ["additive", "additive + SCST", "additive + SCST, scst steps 51"]


# ---- a metric, other data, other clips

def test_a_metric_of_ones_own_is_in_tables_and_figures(tmp_path, monkeypatch):
    """Only the captions' scores have it: nothing in plots.py names it. FENSE and SPIDEr-FL stand beside CIDEr-D."""
    for k, system in enumerate(("additive", "concat")):
        home = fake_run(tmp_path, f"core/{system}_s0", system, 0)
        items = json.loads((home / "predictions.json").read_text())
        for n, item in enumerate(items):
            item["scores"].update(brightness=(n % 2) / 2 + k / 10, spoken=True, note="x", spice=None)
        write(home / "predictions.json", items)
        result = json.loads((home / "result.json").read_text())
        write(home / "result.json", {**result, "fense": 0.5 + k / 10, "spider_fl": 0.3, "vocabulary": 40})
    monkeypatch.setitem(plots.TITLES, "calm", "calmness")  # a title does not take it out of the figure
    comparison(tmp_path / "statistics/additive_scst_vs_xe_s0.json", 1, 1, 0.1, 0.05)
    file = tmp_path / "statistics/additive_scst_vs_xe_s0.json"
    found = json.loads(file.read_text())
    for metric in ("cider_d", "fense", "brightness", "calm", "bleu_4"):
        found["metrics"][metric] = found["metrics"]["meteor"]
    write(file, found)
    report = plots.report(tmp_path)
    head = [cell.strip() for cell in report.split("\n## T1")[1].splitlines()[2].strip("|").split("|")]
    assert head[2:13] == ["n", "CIDEr-D", "SPIDEr-FL", "FENSE", "spice_lite", "spider_lite", "METEOR", "ROUGE-L", "BLEU-4",
                          "vocabulary", "brightness"]
    assert row(report, "T1", "concatenation")[12] == "0.350" and row(report, "T1", "concatenation")[5] == "0.600"
    assert row(report, "Comparisons", "additive scst vs xe s0", "brightness")
    axes = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: axes.extend(figure.axes))
    monkeypatch.setattr(os, "replace", lambda *_: None)
    plots.draw_figure(plots.figure_intervals, plots.Study(tmp_path))
    assert [ax.get_xlabel().removeprefix("difference in ") for ax in axes[:6]] == [
        "CIDEr-D", "FENSE", "spider_lite", "METEOR", "calmness", "brightness"]


def test_overview_has_plain_and_kept_systems_side_by_side(whole):
    """A row for each system of core; the sweeps of 160 steps and other phases' runs are in none."""
    assert labels(whole[1], "Overview") == [
        "additive", "additive, reranked", "additive + SCST", "additive + SCST, reranked", "cross-attention", "concatenation",
        "partial unfreeze", "data-only (no audio)"]
    found = row(whole[1], "Overview", "additive")
    assert found[1:3] == ["2", "1.264 ± 0.023"] and found[4] == "2" and found[6] == "96.1 ± 0.0"
    assert found[-1] == "`core/additive_s{0,1}`; `core/additive_keep_s{0,1}`"
    assert row(whole[1], "Overview", "data-only (no audio)")[4:7] == ["-", "-", "-"]
    found = row(whole[1], "Overview", "concatenation")
    assert found[4] == "1" and found[-1] == "`core/concat_s{0,1}`; `retention/concat_keep_s0`"


def test_a_sweep_as_long_as_core_adds_no_seeds_to_the_overview(tmp_path):
    for name, keep in (("core/additive_s0", 0), ("core/additive_keep_s0", 10), ("retention/keep_1_s0", 1)):
        fake_run(tmp_path, name, "additive", 0, keep=keep, null_slot=bool(keep))
    found = row(plots.report(tmp_path), "Overview", "additive")
    assert found[4] == "1" and found[-1] == "`core/additive_s0`; `core/additive_keep_s0`"


def test_other_data_is_in_no_table_of_the_runs_own(tmp_path):
    for seed in (0, 1):
        home = fake_run(tmp_path, f"core/additive_s{seed}", "additive", seed)
        results(home / "on_clotho", 0.3, seed, {}, dataset="clotho")
        results(home / "scst/on_clotho", 0.4, seed, {}, dataset="clotho")
        results(home / "scst", 0.9, seed, {})
    report = plots.report(tmp_path)
    assert labels(report, "T1") == ["additive", "additive + SCST"] and labels(report, "Other data") == labels(report, "T1")
    found = row(report, "Other data", "additive + SCST", "core", "clotho")
    assert found[7] == "0.400 ± 0.000" and found[-1] == "`core/additive_s{0,1}/scst/on_clotho`"
    assert "T2 Clotho" in report.split("**Missing**")[1].split("\n")[0]


def test_other_clips_are_told(tmp_path):
    for name, n, sha in (("additive_s0", 320, "a" * 64), ("concat_s0", 300, "a" * 64), ("unfreeze_s0", 320, "b" * 64)):
        home = fake_run(tmp_path, f"core/{name}", name[:-3], 0)
        result, card = (json.loads((home / f"{file}.json").read_text()) for file in ("result", "run_card"))
        write(home / "result.json", {**result, "n": n})
        write(home / "run_card.json", {**card, "dataset": {"name": "audiocaps", "hash": sha}})
    comparison(tmp_path / "statistics/additive_vs_concat.json", 1, 1, 0.1, 0.05)
    file = tmp_path / "statistics/additive_vs_concat.json"
    write(file, {**json.loads(file.read_text()), "n": 300, "dropped": {"a": 20, "b": 0}})
    report = plots.report(tmp_path)
    section = report.split("\n## T1")[1].split("\n## ")[0]
    assert "**Other clips:**" in section and "n = 300 (aaaaaaaaaaaa) in `core/concat_s0`" in section
    assert "n = 320 (bbbbbbbbbbbb) in `core/unfreeze_s0`" in section
    assert "n = 300 clips that both have and leaves out 20 of A, 0 of B" in report.split("\n## Comparisons")[1]


def test_kept_systems_are_joined_with_the_plain_ones(whole):
    study = plots.Study(whole[0])
    pairs = sorted((str(run.path), str(plain.path)) for run, plain in study.kept.items())
    assert pairs == [
        ("core/additive_keep_s0", "core/additive_s0"), ("core/additive_keep_s0/scst", "core/additive_s0/scst"),
        ("core/additive_keep_s1", "core/additive_s1"), ("core/additive_keep_s1/scst", "core/additive_s1/scst"),
        ("retention/concat_keep_s0", "core/concat_s0"), ("retention/unfreeze_keep_s0", "core/unfreeze_s0")]


def test_the_frontier_has_its_line_its_pairs_and_its_sweeps(whole, monkeypatch):
    axes = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: axes.extend(figure.axes))
    monkeypatch.setattr(os, "replace", lambda *_: None)
    assert plots.draw_figure(plots.figure_frontier, plots.Study(whole[0]))
    ax = axes[0]
    assert {text.get_text() for text in ax.texts} == {"0", "1", "30", "0.0001", "100"}
    dashed = [line for line in ax.lines if line.get_linewidth() == 0.7]
    assert len(dashed) == 6
    # from what a plain system loses to what it loses with keep: near the backbone's line there is room
    for line in dashed:
        left, right = ax.transAxes.inverted().transform(ax.transData.transform(line.get_xydata()))[:, 0]
        assert left < right
    near = ax.transAxes.inverted().transform(ax.transData.transform([(1, 0), (0, 0)]))[:, 0]
    assert near[1] - near[0] > 0.2


# ---- what is nobody's bug is one line

DAMAGE = {
    "result.json": '{"n": 3, "split"', "config.json": "", "retention.json": "[]", "predictions.json": "{}",
    "run_card.json": "\x00" * 40, "log.jsonl": '{"event": "step"}\nnot json\n', "robustness.json": "nul",
    "rerank/result.json": "{", "../../statistics/a.json": "[1",
    "../../statistics/b.json": '{"runs": {"a": [0], "b": [1]}, "n": 3, "metrics": {"cider_d": {"a": 0.1, "b": 0.2}}}',
    "../../phase3/decision.json": '{"tries": [{]}',
    "../../senses.json": "[]", "training.json": "{"}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name):
    home = fake_run(tmp_path, "core/additive_s0", "additive", 0)
    (home / name).parent.mkdir(parents=True, exist_ok=True)
    (home / name).write_text(DAMAGE[name], encoding="utf-8")
    with pytest.raises(plots.InputError) as error:
        plots.report(tmp_path)
    assert name.split("/")[-1] in str(error.value) and "\n" not in str(error.value)
    if name == "result.json":
        done = python(ROOT / "plots.py", tmp_path, check=False)
        assert done.returncode == 2 and done.stderr == f"error: {error.value}\n" and "Traceback" not in done.stderr


def test_a_full_disk_no_docstrings_no_console_and_no_path(tmp_path):
    fake_run(tmp_path / "é", "core/additive_s0", "additive", 0)
    fake_run(tmp_path / "begun", "core/additive_s0", "additive", 0, done=False)
    (tmp_path / "begun/core/additive_s0/log.jsonl").unlink()
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, ROOT / "plots.py", tmp_path / "begun"], stdout=full, text=True,
                              stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    env = {**os.environ, "PYTHONOPTIMIZE": "2", "PYTHONSAFEPATH": "1", "LC_ALL": "C", "PYTHONUTF8": "0",
           "PYTHONCOERCECLOCALE": "0"}
    for arguments in (["--help"], [tmp_path / "é"]):
        done = subprocess.run([sys.executable, ROOT / "plots.py", *arguments], capture_output=True, text=True, env=env)
        assert done.returncode == 0 and not done.stderr, done.stderr
    assert "*Validation score against training step" in (tmp_path / "é/REPORT.md").read_text(encoding="utf-8")
