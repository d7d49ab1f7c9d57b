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

FLAGS = {"llava": "x", "layers": [3, 6], "tokens": 16, "hidden": 512, "contrastive": 0.1, "gate_l2": 1e-4, "limit": 0,
         "gate_init": 0.05, "dataset": "audiocaps", "init": None, "modality": "audio", "steps": 320, "git": "abc123"}
LEVEL = {"additive": 0.78, "cross_attention": 0.58, "concat": 0.46, "unfreeze": 0.94, "data_only": 0.21}


def write(path, obj):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(obj))


def scores(level, **more):
    return dict(cider_d=1.6 * level, spice=None, spider=None, spice_lite=level / 2, spider_lite=level,
                meteor=level / 3, rouge_l=level / 2, bleu_4=level / 4, mean_words=9.5, **more)


def results(home, level, seed, gates, parameters=250_000, rerank=False, **more):
    """What evaluate.py caption leaves: result.json, run_card.json, predictions.json, reranked or not."""
    result = scores(level + (0.03 if rerank else 0), n=320, split="test", train_seconds=90.0 + seed, gates=gates,
                    trainable_parameters=parameters, validation={"val_spider_lite": level + 0.01}, **more)
    if rerank:
        oracle, other = ({k: v for k, v in scores(x).items() if k in ("cider_d", "spice_lite", "spider_lite")}
                         for x in (level + 0.1, level + 0.01))
        result.update(first_beam=scores(level), oracle=oracle, other_clip=other, reranker={
            "weights": {"logprob": 0.5, "clap": 0.25, "consensus": 1.0}, "encoder": "x"}, diversity={
            "self_bleu": 0.4 + seed / 10, "distinct_1": 0.2, "distinct_2": 0.5 - seed / 20, "candidates": 9.5})
    rng = random.Random(seed)
    items = [{"id": str(i), "scores": {"spider_lite": level + rng.gauss(0, 0.4)},
              "candidates": [{"text": f"a dog {'barks' if rng.random() < i / 40 else 'howls'} {k}"} for k in range(3)]}
             for i in range(40)]
    write(home / "predictions.json", items)
    if rerank:
        write(home / "first_beam/predictions.json", [
            {**i, "scores": {"spider_lite": i["scores"]["spider_lite"] - rng.random() / 10}} for i in items])
    write(home / "run_card.json", {"trainable_parameters": 250_000, "flops_a_clip": 2.5e9, "clips_a_second": 55.0,
                                   "train_hours": 0.025, "seconds_to_90_percent": 42.0, "hardware": "2 CPU cores",
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
        results(home, level, seed, gates, parameters, rerank)
    if scst:
        results(home / "scst", level + 0.05, seed, gates, parameters, rerank)
    return home


def retention(home, beside, **more):
    conditions = {"backbone": 0.965, "nothing_attached": 0.965, "gates_closed": 0.965, "no_clip": 0.965,
                  "unrelated_clip": beside, **more}
    write(home / "retention.json", {"n": 200, "hash": "0123456789abcdef", "conditions": {
        name: {"loss": 0.965 - a, "accuracy": a, "accuracy_ci95": [a - 0.03, min(1, a + 0.02)], "nll": 0.2, "nll_ci95": [0.1, 0.3],
               "agreement": a, "agreement_ci95": [a - 0.03, 1.0], "identical": name in (
                   "backbone", "nothing_attached", "gates_closed", "no_clip")} for name, a in conditions.items()}})


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
        home = fake_run(folder, f"video/video_s{seed}", "additive", seed, dataset="av", modality="video")
        results(home / "shuffled", 0.2, seed, {}, hear="shuffled")
    # phase 0 is in no table
    write(folder / "sanity/overfit/config.json", {**FLAGS, "fusion": "additive", "seed": 0, "steps": 72})
    fake_run(folder, "ablation/layers_3_s0", "additive", 0, 0.7, layers=[3], steps=160)
    fake_run(folder, "ablation/layers_6_s0", "additive", 0, 0.6, layers=[6], steps=160)
    fake_run(folder, "ablation/tokens_8_hidden_512_s0", "additive", 0, 0.71, tokens=8)
    fake_run(folder, "ablation/tokens_8_hidden_768_s0", "additive", 0, 0.73, tokens=8, hidden=768)
    for system in ("additive", "cross_attention"):
        fake_run(folder, f"ablation/loss_{system}_xe_s0", system, 0, LEVEL[system] - 0.05, contrastive=0.0)
    for value, level, kept in ((0, 0.8, 0.89), (1e-2, 0.7, 0.93), (1, 0.4, 0.955)):
        retention(fake_run(folder, f"retention/gate_l2_{value}_s0", "additive", 0, level, gate_l2=value,
                           steps=160), kept)
    retention(fake_run(folder, "ablation/additive_l3-6_n16_h512_c0.1_s0", "additive", 0, 0.75, steps=160), 0.9)
    keep = {"null_slot": True, "keep_every": 1}
    for value in (0.3, 3):
        retention(fake_run(folder, f"retention/keep_{value}_s0", "additive", 0, 0.76, steps=160, keep=value, **keep),
                  0.94 + value / 200)
    for seed in (0, 1):
        retention(fake_run(folder, f"retention/additive_keep_s{seed}", "additive", seed, keep=1, **keep), 0.961,
                  silence=0.96, noise=0.965)
    retention(fake_run(folder, "retention/concat_keep_s0", "concat", 0, keep=1, keep_every=1), 0.95)
    for value in (0, 0.2, 1):
        fake_run(folder, f"appendix/gate_{value}_s0", "additive", 0, 0.7 + value / 100, gate_init=value)
    write(folder / "phase3/decision.json", {"tolerance": 0.5, "decision": "keep", "tries": [
        {"run": f"anywhere/tiny/video/video_s{k}", "gate_l2": 10 ** k * 1e-4, "keep": 1 + 2 * k,
         "clean_identical": True, "within": k > 0,
         "audio": {"before": 78.0, "after": 77.4 + k / 5, "loss": 0.6 - k / 5, "loss_ci95": [-0.3, 1.5]},
         "vl": {"before": 91.0, "after": 90.9, "loss": 0.1, "loss_ci95": [-0.4, 0.7]}} for k in (0, 1)]})
    for k, system in enumerate(("cross_attention", "concat", "unfreeze", "data_only")):
        comparison(folder / f"statistics/additive_vs_{system}.json", 2, 2, LEVEL["additive"] - LEVEL[system], 0.05)
    for seed in (0, 1):
        comparison(folder / f"statistics/additive_scst_vs_xe_s{seed}.json", 1, 1, 0.01, 0.03)
        comparison(folder / f"statistics/additive_reranked_vs_first_beam_s{seed}.json", 1, 1, 0.03, 0.01)


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


def test_every_row_names_its_runs(whole):
    folder, report = whole
    for line in report.split("## T1")[1].split("## Where")[0].splitlines():
        if line.startswith("| ") and not line.startswith(("| ---", "| system", "| run", "| A - B", "| keep")):
            place = line.rstrip(" |").rsplit("|", 1)[1].strip().strip("`")
            before, seeds, after = re.fullmatch(r"([^{]*)(?:{(.*)})?(.*)", place).groups()
            places = [folder / f"{before}{seed}{after}" for seed in (seeds or "").split(",")]
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
    assert row(whole[1], "Targets", "reranker's gain in SPIDEr")[1:4] == ["≥ 0.02", "spider_lite", "0.030 ± 0.000"]
    assert row(whole[1], "Targets", "AudioCaps SPIDEr, XE + SCST")[3] == "0.840 ± 0.014"


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
    found = row(whole[1], "T5", "additive, gate L2 0.01, 160 steps", "1")
    assert found[5] == "93.0 [90.0, 95.0]" and found[-2] == "yes"
    assert row(whole[1], "T5", "additive", "2")[5:8] == ["91.3 ± 0.0", "93.0 ± 0.0", "95.0 ± 0.0"]
    keeping = row(whole[1], "T5", "additive, null slot, keep 1, gate L2 0.0001, 320 steps", "2")
    assert keeping[5] == "96.1 ± 0.0" and "0.4 ± 0.0" in keeping and "0.5 ± 0.0" in keeping
    for step, value in (("320", "1"), ("160", "0.3")):
        assert row(whole[1], "Gate regularisation: keep", "additive + keep", "yes", value, step)
    assert row(whole[1], "T5", "backbone")[2] == "96.5 [93.5, 98.5]"
    assert row(whole[1], "T5", "additive + SCST", "2")[5] == "90.0 ± 0.0"


def test_headline_is_against_the_best_baseline_on_validation(whole):
    """unfreeze's validation is best; its line comes first though others sort before it."""
    report = whole[1]
    assert "Best baseline, chosen on validation: unfreeze (mean validation spider_lite" in report
    lines = [x for x in report.split("## Comparisons")[1].splitlines() if x.startswith("| ")]
    assert lines[2].startswith("| **headline:** additive vs unfreeze | spider_lite | 320 | 2/2 |")
    assert "| -0.160 | [-0.210, -0.110] |" in lines[2] and lines[2].endswith("`statistics/additive_vs_unfreeze.json` |")


def test_best_baseline_looks_at_no_test_score():
    def run(fusion, validation, test):
        return SimpleNamespace(phase="core", stage="xe", system=fusion, result={
            "spider": None, "spider_lite": test, "validation": {"val_spider_lite": validation}})
    runs = [run("concat", 0.5, 0.9), run("cross_attention", 0.6, 0.1), run("additive", 0.9, 0.9),
            run("data_only", 0.9, 0.9), run("concat", 0.6, 0.9)]
    assert plots.best_baseline(runs) == ("cross_attention", {"concat": 0.55, "cross_attention": 0.6})
    assert plots.best_baseline([]) == (None, {})


def test_video_noise_and_cost(whole):
    assert row(whole[1], "Video", "video", "video", "shuffled")[6] == "0.100 ± 0.000"
    assert row(whole[1], "Cost of the second", "1", "0.0001")[4:] == [
        "0.60", "[-0.30, 1.50]", "91.00", "90.90", "0.10", "[-0.40, 0.70]", "yes", "0.5", "no",
                                                             "`video/video_s0`"]
    noise = row(whole[1], "Appendix: noise", "concatenation", "clip")
    assert noise[4:6] == ["0.460 ± 0.000", "0.393 ± 0.000"] and noise[-1] == "`core/concat_s{0,1}`"
    costs = row(whole[1], "T1", "additive")[10:15]  # XE does not include the SCST that follows
    assert costs == ["250,000", "1.0 ± 0.0", "0.7 ± 0.0", "55.0 ± 0.0", "2.50 ± 0.00"]
    assert row(whole[1], "T1", "additive + SCST")[11] == "1.5 ± 0.0"


def test_runs_with_other_noise_levels_share_a_table(tmp_path):
    for k, ratios in enumerate((("20", "0"), ("10", "0"))):
        home = fake_run(tmp_path, f"core/{['additive', 'concat'][k]}_s0", ["additive", "concat"][k], 0)
        noise = {"white": {ratio: scores(0.4) for ratio in ratios}}
        write(home / "robustness.json", {"n": 320, "clean": scores(0.5), "noise": noise})
    report = plots.report(tmp_path)
    assert row(report, "Appendix: noise", "additive", "white")[4:8] == ["0.500", "0.400", "-", "0.400"]
    assert row(report, "Appendix: noise", "concatenation", "white")[4:8] == ["0.500", "-", "0.400", "0.400"]


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
    assert row(report, "Targets", "AudioCaps SPIDEr, XE + SCST")[3:] == ["missing", "-"]
    assert {f.stem for f in (tmp_path / "exp/figures").glob("*.png")} == {"curves", "gates", "pareto"}


def test_only_started_runs(tmp_path):
    fake_run(tmp_path, "core/additive_s0", "additive", 0, done=False)
    (tmp_path / "core/additive_s0/log.jsonl").unlink()
    python(ROOT / "plots.py", tmp_path)
    assert "T1 AudioCaps" in (tmp_path / "REPORT.md").read_text().split("**Missing**")[1].split("\n")[0]


def test_spider_only_where_spice_ran_everywhere(tmp_path):
    for seed in (0, 1):
        home = fake_run(tmp_path, f"core/additive_s{seed}", "additive", seed)
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
    assert row(report, "Targets", "AudioCaps SPIDEr, XE")[3:] == ["0.780", "`core/additive_s0`"]
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
