"""Tables, figures and REPORT.md from the files of finished runs. Reads results only: no model, no data set.

    python plots.py experiments/tiny               # experiments/tiny/REPORT.md and figures/*.png, *.pdf

Copy this file alone: it needs numpy and matplotlib. A half-finished set of runs gives a report of what there is, with
the names of what is missing. A run is FOLDER/phase/name_s<seed>/ with config.json, log.jsonl and result.json; a result
in a folder inside it, as in scst/, is a stage of the same run. Tables find their rows by the flags in config.json, so
that a run which two tables need is trained once.
"""
import argparse
import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

SYSTEMS = {  # order in tables; colour (Okabe and Ito's palette), marker and line, told apart in grey too
    "additive": ("additive", "#0072B2", "o", "-"), "cross_attention": ("cross-attention", "#D55E00", "s", "--"),
    "concat": ("concatenation", "#009E73", "^", "-."), "unfreeze": ("partial unfreeze", "#CC79A7", "D", ":"),
    "data_only": ("data-only (deaf)", "#555555", "x", (0, (1, 1)))}
METRICS = {"cider_d": "CIDEr-D", "spice": "SPICE", "spider": "SPIDEr", "spice_lite": "spice_lite",
           "spider_lite": "spider_lite", "meteor": "METEOR", "rouge_l": "ROUGE-L", "bleu_4": "BLEU-4"}
FLAGS = {"fusion": "system", "layers": "layers", "tokens": "tokens", "hidden": "hidden", "gate_l2": "gate L2",
         "contrastive": "contrastive weight", "gate_init": "gates at the start", "limit": "", "dataset": "", "init": "",
         "modality": ""}  # what makes two runs different systems; their schedules may differ and are shown
STAGES = ("scst", "audio", "video", "shuffled")  # folders in a run: SCST, and what of two modalities was given
CONDITIONS = {"nothing_attached": "nothing attached", "gates_closed": "gates closed", "no_clip": "no clip",
              "unrelated_clip": "unrelated clip"}  # of the question-answering probe; more stand under their own names


# ---------------------------------------------------------------- reading

def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_runs(folder):
    """Runs below a folder, finished or not, each stage of a run by itself."""
    runs = []
    for config_file in sorted(folder.glob("*/*/config.json")):
        home, config = config_file.parent, read_json(config_file)
        if not config or config.get("fusion") not in SYSTEMS or home.parent.name == "sanity":
            continue  # phase 0 checks that the parts work: it is in no table
        log, lines = home / "log.jsonl", []
        for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                pass  # the last line of a run that is being written
        for place in [home, *(home / stage for stage in STAGES if (home / stage).is_dir())]:
            files = {k: read_json(place / f"{k}.json") for k in ("result", "retention", "robustness", "run_card")}
            stage = "xe" if place == home else place.name
            runs.append({"path": place.relative_to(folder), "home": place, "phase": home.parent.name, "stage": stage,
                         "config": config, "log": lines if stage == "xe" else [], **files})
    return runs


def first_beam(run):
    """The scores that systems are compared by: those of the first beam, whether or not it was reranked."""
    return {**run["result"], **(run["result"].get("first_beam") or {})}


def finished(runs, *phases):
    return [r for r in runs if r["result"] and r["phase"] in phases]


def selection(runs):
    """SPIDEr where SPICE ran everywhere, else its stand-in under its own name."""
    return "spider" if runs and all(r["result"].get("spider") is not None for r in runs) else "spider_lite"


def label(run):
    return SYSTEMS[run["config"]["fusion"]][0] + {"xe": "", "scst": " + SCST"}.get(run["stage"], f", {run['stage']}")


def base(run):
    """The name of a run without its seed."""
    return re.sub(r"_s\d+$", "", run["path"].parts[1])


def style(run):
    """{"color", "marker"} of a run; a star after SCST."""
    _, colour, marker, _ = SYSTEMS[run["config"]["fusion"]]
    return {"color": colour, "marker": "*" if run["stage"] == "scst" else marker}


def grouped(runs, key=label):
    """{key: runs}, in the order of systems, then of stages, then of the keys themselves."""
    order, groups = list(SYSTEMS), defaultdict(list)
    for run in sorted(runs, key=lambda r: (order.index(r["config"]["fusion"]), r["stage"] == "scst", key(r))):
        groups[key(run)].append(run)
    return groups


def where(runs):
    """The folders that a row comes from: core/additive_s{0,1}."""
    stems = defaultdict(list)
    for run in runs:
        before, seed, after = re.fullmatch(r"(.*?_s(?=\d)|.*)(\d*)(.*)", run["path"].as_posix()).groups()
        stems[before, after].append(seed)
    return "; ".join(f"`{a}{'{' + ','.join(s) + '}' if len(s) > 1 else s[0]}{b}`" for (a, b), s in stems.items())


def sweep(runs, *varied):
    """[[((flag values, steps), runs)]]: families of runs that differ in the flags named alone, and in schedule."""
    families = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["stage"] == "xe":
            config = run["config"]
            values = tuple(tuple(v) if isinstance(v, list) else v for v in map(config.get, [*varied, "steps"]))
            families[str([config.get(f) for f in FLAGS if f not in varied])][values].append(run)
    return [sorted(family.items()) for family in families.values() if len({values[:-1] for values in family}) > 1]


def reranked(runs):
    return grouped([r for r in finished(runs, "core", "ablation", "clotho") if r["result"].get("first_beam")],
                   lambda r: (label(r), r["phase"]))


def minutes(runs):
    """Wall-clock of training up to the end of a run's own stage, mean over seeds: XE does not pay for SCST."""
    ends = [((r["run_card"] or {}).get("stages") or {}).get("scst" if r["stage"] == "scst" else "xe") for r in runs]
    return mean_sd([(e or r["result"]).get("seconds", r["result"].get("train_seconds")) for e, r in zip(ends, runs)],
                   1, 1 / 60)


def asked(run, condition, key="accuracy"):
    """A number of the question-answering probe, or None."""
    return ((run["retention"] or {}).get("conditions") or {}).get(condition, {}).get(key)


def best_baseline(runs):
    """(system, {system: mean validation score}) among those that hear, additive aside. No test score is looked at."""
    found = [r for r in finished(runs, "core") if r["stage"] == "xe" and r["result"].get("validation")
             and r["config"]["fusion"] not in ("additive", "data_only")]
    key = "val_spider" if all("val_spider" in r["result"]["validation"] for r in found) else "val_spider_lite"
    scores = {system: float(np.mean([r["result"]["validation"][key] for r in group]))
              for system, group in grouped(found, lambda r: r["config"]["fusion"]).items()}
    return max(scores, key=scores.get, default=None), scores


def comparisons(folder, runs):
    """[(name, is it the headline?, what bootstrap.py compare --json wrote)], the headline first."""
    headline = f"additive_vs_{best_baseline(runs)[0]}"
    found = [(f.stem, f.stem == headline, read_json(f)) for f in sorted((folder / "statistics").glob("*.json"))]
    return sorted([x for x in found if x[2] and "metrics" in x[2]], key=lambda x: not x[1])


# ---------------------------------------------------------------- tables: Markdown, or None where nothing is there

def mean_sd(values, digits=3, scale=1.0, interval=None):
    """'0.512 ± 0.004': mean and sample standard deviation over seeds; a single value stands with its interval."""
    values = [v * scale for v in values if v is not None]
    if not values:
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    if len(values) > 1:
        return text + f" ± {np.std(values, ddof=1):.{digits}f}"
    return text + (" [{:.{d}f}, {:.{d}f}]".format(*(scale * x for x in interval), d=digits) if interval else "")


def table(head, rows, texts=1):
    """Markdown; the first `texts` columns and the last are flush left. None without rows."""
    rule = [" --- " if k < texts or k == len(head) - 1 else " ---: " for k in range(len(head))]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "|".join(rule) + "|"]
                     + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) if rows else None


def score_table(head, rows, metrics=METRICS, gates=False):
    """rows: [(cells under head, runs)]; test scores of the first beam, mean and deviation over seeds."""
    shown, lines = [m for m in metrics if any(first_beam(r).get(m) is not None for _, g in rows for r in g)], []
    for cells, group in rows:
        results = [first_beam(r) for r in group]
        layers = sorted({int(l) for r in results for l in r.get("gates") or {}}) if gates else []
        sizes = [f"{l}: {mean_sd([abs(r['gates'][str(l)]) for r in results if str(l) in r['gates']])}" for l in layers]
        lines.append([*cells, len(group), "/".join(sorted({str(r["n"]) for r in results})),
                      *(mean_sd([r.get(m) for r in results]) for m in shown),
                      mean_sd([r["mean_words"] for r in results], 1), *([", ".join(sizes) or "-"] if gates else []),
                      f"{results[0]['trainable_parameters']:,}", minutes(group), where(group)])
    return table([*head, "seeds", "n", *(METRICS[m] for m in shown), "words", *["size of gates by layer"] * gates,
                  "trainable", "minutes", "runs"], lines, len(head))


def table_audiocaps(folder, runs, metric):
    return score_table(["system"], [([name], group) for name, group in grouped(finished(runs, "core")).items()])


def table_clotho(folder, runs, metric):
    def row(run):
        return label(run), "AudioCaps checkpoint" if run["config"].get("init") else "Clotho alone"
    return score_table(["system", "start"], list(grouped(finished(runs, "clotho"), row).items()))


def table_sweep(*varied):
    """A function that makes the tables of the runs which differ in these flags."""
    def make(folder, runs, metric):
        head = ["system", *(FLAGS[f] for f in varied), "steps"]
        return "\n\n".join(score_table(head, [
            ([label(group[0]), *(" ".join(map(str, v)) if isinstance(v, tuple) else v for v in values)], group)
            for values, group in family], (metric, "cider_d", "meteor"), gates=True)
            for family in sweep(finished(runs, "core", "ablation", "retention", "appendix"), *varied)) or None
    return make


def table_decoding(folder, runs, metric):
    """First beam (the reranker off), reranked (on), and the best candidate there was; what the candidates are like."""
    groups, rows = reranked(runs), []
    shown = [m for m in METRICS if any(r["result"].get(m) is not None for group in groups.values() for r in group)]
    for (name, phase), group in groups.items():
        whole = [r["result"] for r in group]
        for title, results in (("first beam", [r["first_beam"] for r in whole]), ("reranked", whole),
                               ("by another clip's sound", [r["other_clip"] for r in whole if "other_clip" in r]),
                               ("oracle", [r["oracle"] for r in whole])):
            made = [r["diversity"] for r in whole] if results is whole else []
            weights = ["/".join(f"{r['reranker']['weights'][k]:g}" for k in ("logprob", "clap", "consensus"))
                       for r in whole] if results is whole else []
            rows.append([name, phase, title, len(group), whole[0]["n"],
                         *(mean_sd([r.get(m) for r in results]) for m in shown),
                         mean_sd([r[metric] - w["first_beam"][metric] for r, w in zip(results, whole)]),
                         mean_sd([r.get("mean_words") for r in results], 1), *(mean_sd([d[k] for d in made]) for k in (
                             "self_bleu", "distinct_1", "distinct_2", "candidates")), " ".join(weights), where(group)])
    return table(["system", "phase", "decoding", "seeds", "n", *(METRICS[m] for m in shown), f"gain, {METRICS[metric]}",
                  "words", "self-BLEU", "distinct-1", "distinct-2", "candidates", "weights, a triple a seed", "runs"],
                 rows, 3)


def table_retention(folder, runs, metric):
    def row(run):
        penalty = f", gate L2 {run['config'].get('gate_l2'):g}, {run['config'].get('steps')} steps"
        return label(run) + {"ablation": penalty, "retention": penalty, "video": f", {base(run)}"}.get(run["phase"], "")
    kept = [r for r in runs if asked(r, "backbone") is not None and r["phase"] in ("core", "ablation", "retention", "video")]
    groups = grouped(kept, row)
    found = {c for group in groups.values() for r in group for c in r["retention"]["conditions"]} - {"backbone"}
    names, rows = [*CONDITIONS, *sorted(found - CONDITIONS.keys())], []

    def cells(group, conditions):
        keys = [(c, "accuracy", 1, 100) for c in conditions] + [
            (conditions[3], "agreement", 1, 100), (conditions[3], "nll", 3, 1)]
        for condition, key, digits, scale in keys:
            values = [asked(r, condition, key) for r in group]
            yield mean_sd(values, digits, scale, asked(group[0], condition, f"{key}_ci95") if len(group) == 1 else None)
    for name, group in groups.items():
        if not rows:  # the backbone's own answers are the same whatever is attached later
            first, *_, agreement, nll = cells(group[:1], ["backbone"] * 4)
            rows.append(["backbone", "", first, *[""] * (len(names) - 1), agreement, nll, "yes", where(group[:1])])
        same = all(asked(r, c, "identical") in (True, None) for r in group for c in names[:3])
        rows.append([name, len(group), *cells(group, names), "yes" if same else "no", where(group)])
    return table(["system", "seeds", *(CONDITIONS.get(n, n.replace("_", " ")) for n in names),
                  "agreement beside a clip", "NLL beside a clip", "nothing, closed gates, no clip: identical", "runs"],
                 rows)


def table_video(folder, runs, metric):
    """A row for each name in video/ and each thing that it was given to hear and see."""
    def row(run):
        return base(run), run["config"].get("modality", "audio"), run["result"].get("hear", "all")
    groups = list(grouped(finished(runs, "video"), row).items())
    asks = any(r["result"].get("accuracy") is not None for _, group in groups for r in group)
    return score_table(["run", "trained", "given", *["accuracy"] * asks], [
        ([*cells, *[mean_sd([r["result"].get("accuracy") for r in group])] * asks], group) for cells, group in groups])


def table_tries(folder, runs, metric):
    """The tries at a second modality that costs the first two no more than the tolerance."""
    found, rows = read_json(folder / "phase3/decision.json") or {"tries": []}, []
    for t in found["tries"]:
        numbers = [t[kind][x] for kind in ("audio", "vl") for x in ("before", "after", "loss")]
        rows.append([f"{t['gate_l2']:g}", *(f"{x:.2f}" for x in numbers), "yes" if t["clean_identical"] else "no",
                     f"{found['tolerance']:g}", "yes" if t["within"] else "no",
                     f"`{'/'.join(Path(t['run']).parts[-2:])}`"])
    return table(["gate L2", "captions before", "after", "lost", "answers before", "after", "lost", "clean identical",
                  "tolerance", "within", "run"], rows)


def table_robustness(folder, runs, metric):
    groups, rows = grouped([r for r in runs if r["robustness"]]), []
    ratios = sorted({k for g in groups.values() for r in g for n in r["robustness"]["noise"].values() for k in n},
                    key=float, reverse=True)
    for name, group in groups.items():
        for kind in group[0]["robustness"]["noise"]:
            found = [{"clean": r["robustness"]["clean"], **r["robustness"]["noise"].get(kind, {})} for r in group]
            rows.append([name, kind, len(group), group[0]["robustness"]["n"], *(
                mean_sd([f[k][metric] for f in found if k in f]) for k in ("clean", *ratios)), where(group)])
    return table(["system", "noise", "seeds", "n", "clean", *(f"{k} dB" for k in ratios), "runs"], rows, 2)


def table_statistics(folder, runs, metric):
    rows = []
    for name, headline, found in comparisons(folder, runs):
        for m, r in found["metrics"].items():
            rows.append(["**headline:** " * headline + name.replace("_", " "), METRICS.get(m, m), found["n"],
                         "/".join(str(len(found["runs"][side])) for side in "ab"), f"{r['a']:.3f}", f"{r['b']:.3f}",
                         f"{r['difference']:+.3f}", *("[{:+.3f}, {:+.3f}]".format(*r[k]) for k in ("ci95", "bca95")),
                         *("-" if r[k] is None else f"{r[k]:.2g}" for k in (
                             "p", "p_holm", "p_randomisation", "effect_size")), f"`statistics/{name}.json`"])
    return table(["A - B", "metric", "n", "seeds A/B", "A", "B", "difference", "95% percentile", "95% BCa", "p",
                  "p Holm", "p swaps", "effect", "file"], rows, 2)


def table_efficiency(folder, runs, metric):
    rows = []
    for name, group in grouped([r for r in finished(runs, "core") if r["run_card"]]).items():
        cards = [r["run_card"] for r in group]
        rows.append([name, len(group), f"{cards[0]['trainable_parameters']:,}", *(
            mean_sd([c.get(key) for c in cards], digits, scale) for key, digits, scale in (
                ("flops_a_clip", 2, 1e-9), ("clips_a_second", 1, 1), ("seconds_to_90_percent", 1, 1 / 60))),
            minutes(group), cards[0]["hardware"], where(group)])
    return table(["system", "seeds", "trainable", "GFLOP a clip", "clips/s", "minutes to 90%", "minutes of training",
                  "hardware", "runs"], rows)


def table_targets(folder, runs, metric):
    """What success means at full scale beside what was reached here, additive, mean over seeds."""
    def row(title, target, name, phase, stage, get):
        group = [r for r in finished(runs, phase) if r["config"]["fusion"] == "additive" and r["stage"] == stage
                 and not r["config"].get("init")]
        values = [(get(r), r) for r in group if get(r) is not None]
        return [title, target, name, mean_sd([v for v, _ in values]) if values else "missing",
                where([r for _, r in values]) or "-"]

    def lost(condition):
        return lambda r: 100 * (asked(r, "backbone") - asked(r, condition)) if r["retention"] else None

    def gain(run):
        return run["result"][metric] - first_beam(run)[metric] if "first_beam" in run["result"] else None

    def score(run):
        return first_beam(run)[metric]
    name, points = METRICS[metric], "accuracy, hundredths"
    return table(["target at full scale", "value", "measured here as", "reached, additive", "runs"], [
        row("AudioCaps SPIDEr, XE", "≥ 0.50", name, "core", "xe", score),
        row("AudioCaps SPIDEr, XE + SCST", "≥ 0.52", name, "core", "scst", score),
        row("AudioCaps SPIDEr-max", "≥ 0.53", name, "core", "xe",
            lambda r: r["result"].get("oracle", {}).get(metric)),
        row("AudioCaps METEOR, XE", "≥ 0.24", "METEOR", "core", "xe", lambda r: first_beam(r)["meteor"]),
        row("Clotho SPIDEr-FL", "≥ 0.33", f"{name}, no fluency penalty", "clotho", "xe", score),
        row("reranker's gain in SPIDEr", "≥ 0.02", name, "core", "xe", gain),
        row("retention lost, no clip", "≤ 0.5 points", points, "core", "xe", lost("no_clip")),
        row("retention lost, unrelated clip", "none set", points, "core", "xe", lost("unrelated_clip"))]) \
        if any(r["result"] for r in runs) else None


# ---------------------------------------------------------------- figures: None where there is nothing to draw
# The first paragraph of each docstring is the caption; {name}, {n} and the like are filled in by the report.

def start_figure(width=7.2, height=3.6, panels=1):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.25, "pdf.fonttype": 42, "figure.constrained_layout.use": True})
    figure, axes = plt.subplots(1, panels, figsize=(width, height), sharey=True, squeeze=False)
    return figure, *axes[0]


def legend_beside(ax):
    """Outside the axes, where it hides no line; one entry a label."""
    entries = dict(zip(*ax.get_legend_handles_labels()[::-1]))
    ax.legend(entries.values(), entries, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)


def save_figure(figure, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf"):
        tmp = folder / f".{name}.tmp"
        figure.savefig(tmp, format=kind, dpi=160)
        os.replace(tmp, folder / f"{name}.{kind}")
    import matplotlib.pyplot as plt
    plt.close(figure)


def half_width(run, metric):
    """Half the 95% interval of a mean of item scores, over test clips; 0 without predictions."""
    items = read_json(run["home"] / "first_beam/predictions.json") or read_json(run["home"] / "predictions.json") or []
    scores = [i["scores"][metric] for i in items if i["scores"].get(metric) is not None]
    return 1.96 * float(np.std(scores, ddof=1)) / len(scores) ** 0.5 if len(scores) > 1 else 0.0


def lines_of(run, event, key):
    """[(step, value)] of a key in a log, of XE and of SCST; the steps of SCST are counted from where XE ended."""
    found = {stage: [(x["step"], x[key]) for x in run["log"] if x.get("event") == event and x["stage"] == stage
                     and key in x] for stage in ("xe", "scst")}
    end = max((x["step"] for x in run["log"] if x.get("stage") == "xe"), default=0)
    return found["xe"], [(end + step, value) for step, value in found["scst"]]


def figure_curves(folder, runs, metric):
    """Validation {name} against training step, a line a seed ({val_n} clips, greedy); SCST goes on from the best XE
    checkpoint, at the star."""
    figure, ax = start_figure()
    for run in sum(grouped([r for r in runs if r["phase"] == "core"]).values(), []):
        name, colour, marker, line = SYSTEMS[run["config"]["fusion"]]
        xe, scst = lines_of(run, "validation", f"val_{metric}")
        if xe:
            ax.plot(*zip(*xe), color=colour, marker=marker, ms=4, ls=line, lw=1.2, label=name)
        if xe and scst:
            best = (xe[-1][0], max(y for _, y in xe))
            ax.plot(*zip(best, *scst), color=colour, marker=marker, ms=4, mfc="white", lw=1.2, label=f"{name}, SCST")
            ax.plot(*best, marker="*", ms=10, color="black", ls="", zorder=4, label="SCST starts")
    ax.set(xlabel="training step", ylabel=f"validation {METRICS[metric]}")
    legend_beside(ax)
    return figure if ax.lines else None


def figure_gates(folder, runs, metric):
    """Gates against training step, a line a seed and layer: α of additive and data-only, tanh α of cross-attention
    and unfreeze; hollow markers are of SCST."""
    figure, ax = start_figure(height=3.9)
    for run in sum(grouped([r for r in runs if r["phase"] == "core"]).values(), []):
        keys = sorted({k for x in run["log"] for k in x if k.startswith("gate_")}, key=lambda k: int(k[5:]))
        for key, line in zip(keys, ("-", "--", ":", "-.")):
            for k, points in enumerate(lines_of(run, "step", key)):
                ax.plot(*zip(*points) if points else ((), ()), ls=line, lw=1.2, ms=4, markevery=0.2, **style(run),
                        mfc="white" if k else None, label="" if k else f"{label(run)}, layer {key[5:]}")
    ax.axhline(0, color="black", lw=0.6)
    ax.set(xlabel="training step", ylabel="gate")
    legend_beside(ax)
    return figure if len(ax.lines) > 1 else None


def figure_gates_by_layer(folder, runs, metric):
    """Size of the gates at the end of XE by decoder layer, a line a run; hollow where one layer alone is fused."""
    found = [r for r in finished(runs, "core", "ablation") if r["stage"] == "xe" and r["result"].get("gates")]
    layers = sorted({int(l) for r in found for l in r["result"]["gates"]})
    figure, ax = start_figure()
    groups = grouped(found, lambda r: (label(r), len(r["config"]["layers"]) == 1))
    for k, ((name, alone), group) in enumerate(groups.items()):
        shift = (k - (len(groups) - 1) / 2) * min(0.1, 0.7 / len(groups))  # so that points do not hide each other
        for run in group:
            gates = sorted((int(l), abs(g)) for l, g in run["result"]["gates"].items())
            ax.plot([layers.index(l) + shift for l, _ in gates], [g for _, g in gates], lw=0.6, ms=6, **style(run),
                    mfc="white" if alone else None, label=f"{name}, one layer" if alone else name)
    ax.set(xlabel="decoder layer", ylabel="|gate|", xticks=range(len(layers)), xticklabels=layers)
    ax.set(xlim=(-0.6, max(len(layers), 1) - 0.4), ylim=(0, None))
    legend_beside(ax)
    return figure if found else None


def figure_pareto(folder, runs, metric):
    """Test {name} against trainable parameters, a point a run with its 95% interval over {n} clips; small and hollow:
    ablations."""
    from matplotlib.ticker import EngFormatter, LogLocator
    figure, ax = start_figure()
    means, best = [], -np.inf
    for (name, small), group in grouped(finished(runs, "core", "ablation"),
                                        lambda r: (label(r), r["phase"] == "ablation")).items():
        x, y = [r["result"]["trainable_parameters"] for r in group], [first_beam(r)[metric] for r in group]
        ax.errorbar(x, y, [half_width(r, metric) for r in group], ls="", **style(group[0]), ms=4 if small else 7,
                    elinewidth=0.7, mfc="white" if small else None, label=f"{name}, ablations" if small else name)
        means += [] if small else [(np.mean(x), np.mean(y))]
    frontier = []
    for x, y in sorted(means, key=lambda point: (round(point[0], -3), -point[1])):  # budgets match but for a few
        if y > best:
            best, frontier = y, frontier + [(x, y)]
    ax.plot(*zip(*frontier) if frontier else ((), ()), color="black", lw=0.8, alpha=0.5, label="frontier of the means")
    ax.set(xscale="log", xlabel="trainable parameters", ylabel=f"test {METRICS[metric]}")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.xaxis.set_minor_formatter("")
    legend_beside(ax)
    return figure if means else None


def figure_frontier(folder, runs, metric):
    """Stability frontier: test {name} against accuracy on {questions} questions about pictures beside an unrelated
    clip, a point a run with 95% intervals. Numbers on the line: weight of the gates' L2 penalty, means over seeds."""
    found = [r for r in finished(runs, "core", "ablation", "retention") if asked(r, "unrelated_clip") is not None]
    figure, ax = start_figure(height=4.0)
    for run in sum(grouped([r for r in found if r["phase"] == "core"]).values(), []):
        x, ci = 100 * asked(run, "unrelated_clip"), asked(run, "unrelated_clip", "accuracy_ci95")
        ax.errorbar(x, first_beam(run)[metric], half_width(run, metric), ci and [[x - 100 * ci[0]], [100 * ci[1] - x]],
                    ls="", **style(run), ms=7, elinewidth=0.7, label=label(run))
    for family in sweep([r for r in found if r["phase"] != "core"], "gate_l2"):
        points = [(np.mean([100 * asked(r, "unrelated_clip") for r in group]),
                   np.mean([first_beam(r)[metric] for r in group])) for _, group in family]
        ax.plot(*zip(*points), color="black", lw=0.9, marker=".", label=f"{label(family[0][1][0])}, gate L2", zorder=4)
        named = []  # points that would hide each other share a label
        for point, ((value, _), _) in zip(points, family):
            if named and np.abs(np.subtract(point, named[-1][0]) / (1, 0.04)).max() < 1:
                named[-1][1].append(f"{value:g}")
            else:
                named.append((point, [f"{value:g}"]))
        for point, values in named:
            ax.annotate(", ".join(values), point, xytext=(5, 2), textcoords="offset points", fontsize=7, zorder=5)
    if found:
        ax.axvline(100 * asked(found[0], "backbone"), color="black", lw=0.8, ls=":", label="backbone alone")
    ax.set(xlabel="accuracy beside an unrelated clip, %", ylabel=f"test {METRICS[metric]}")
    legend_beside(ax)
    return figure if found else None


def figure_intervals(folder, runs, metric):
    """Differences A - B in {name} and METEOR with 95% percentile intervals and two-sided p, 10,000 resamples; filled
    where the interval leaves out 0, a diamond for the headline."""
    found = comparisons(folder, runs)
    figure, *axes = start_figure(8.6, 1.2 + 0.3 * len(found), panels=2)
    for ax, m in zip(axes, (metric, "meteor")):
        for row, (_, headline, result) in enumerate(found):
            if m in result["metrics"]:
                r = result["metrics"][m]
                (low, high), d = r["ci95"], r["difference"]
                ax.errorbar(d, -row, xerr=[[max(0, d - low)], [max(0, high - d)]], marker="D" if headline else "o",
                            ms=5, color="black", capsize=3, lw=1, mfc="black" if low > 0 or high < 0 else "white")
                ax.text(1.02, -row, f"p {r['p']:.2g}", transform=ax.get_yaxis_transform(), va="center", fontsize=7)
        ax.axvline(0, color="black", lw=0.7, ls=":")
        ax.set(xlabel=f"difference in {METRICS[m]}, 95% interval", ylim=(-len(found) + 0.4, 0.6))
    axes[0].set_yticks([-k for k in range(len(found))], [
        f"{name.replace('_', ' ')}, n = {result['n']}, seeds {len(result['runs']['a'])}/{len(result['runs']['b'])}"
        for name, _, result in found], fontsize=7)
    return figure if found else None


def figure_snr(folder, runs, metric):
    """Test {name} against signal-to-noise ratio, greedy decoding: mean over seeds, bars their standard deviation, or
    the 95% interval over {n} clips where there is one seed."""
    groups = grouped([r for r in runs if r["robustness"]])
    noises = list(dict.fromkeys(k for g in groups.values() for r in g for k in r["robustness"]["noise"]))
    figure, *axes = start_figure(8.6, panels=max(1, len(noises)))
    for ax, kind in zip(axes, noises):
        ratios = sorted({k for g in groups.values() for r in g for k in r["robustness"]["noise"].get(kind, {})},
                        key=float, reverse=True)
        for k, (name, group) in enumerate(groups.items()):
            found = [{"clean": r["robustness"]["clean"], **r["robustness"]["noise"].get(kind, {})} for r in group]
            rows = [[f[x] for f in found] for x in ("clean", *ratios)]
            ax.errorbar(np.arange(len(rows)) + 0.06 * k, [np.mean([r[metric] for r in row]) for row in rows], [
                np.std([r[metric] for r in row], ddof=1) if len(row) > 1 else row[0].get("half_width_95", 0)
                for row in rows], ls=SYSTEMS[group[0]["config"]["fusion"]][3], ms=5, lw=1.2, elinewidth=0.7, capsize=2,
                **style(group[0]), label=f"{name}, {len(group)} seed{'s' * (len(group) > 1)}")
        ax.set(xlabel=f"dB; noise: {'another clip' if kind == 'clip' else kind}", xticks=range(len(ratios) + 1),
               xticklabels=["clean", *ratios])
    axes[0].set_ylabel(f"test {METRICS[metric]}")
    legend_beside(axes[-1])
    return figure if noises else None


def figure_diversity(folder, runs, metric):
    """What reranking gains in {name} where a clip's candidates differ little and much: clips in five equal groups by
    the share of distinct words and of distinct pairs of words among their candidates; means with 95% intervals."""
    figure, *axes = start_figure(8.6, 3.2, panels=2)
    for (name, _), group in {k: g for k, g in reranked(runs).items() if k[1] == "core"}.items():
        clips = []  # (distinct-1, distinct-2, gain) of each clip of each seed
        for run in group:
            first = {i["id"]: i for i in read_json(run["home"] / "first_beam/predictions.json") or []}
            for item in read_json(run["home"] / "predictions.json") or []:
                words = [c["text"].split() for c in item.get("candidates", [])]
                grams = [g for w in words for g in w], [g for w in words for g in zip(w, w[1:])]
                if all(grams) and item["id"] in first:
                    clips.append([*(len(set(g)) / len(g) for g in grams),
                                  item["scores"][metric] - first[item["id"]]["scores"][metric]])
        for k, ax in enumerate(axes if len(clips) >= 10 else ()):
            fifths = np.array_split(np.array(sorted(clips, key=lambda c: c[k])), 5)
            ax.errorbar([f[:, k].mean() for f in fifths], [f[:, 2].mean() for f in fifths],
                        [1.96 * f[:, 2].std(ddof=1) / len(f) ** 0.5 for f in fifths], capsize=2, lw=1, ms=5,
                        **style(group[0]), label=f"{name}, {len(group)} seed{'s' * (len(group) > 1)}")
            ax.axhline(0, color="black", lw=0.6)
            ax.set(xlabel=f"distinct-{k + 1} of a clip's candidates")
    axes[0].set_ylabel(f"gain in {METRICS[metric]}")
    legend_beside(axes[-1])
    return figure if axes[0].lines else None


# ---------------------------------------------------------------- the report

SECTIONS = [  # title, table, the phase that makes it, note, figures
    ("Targets", table_targets, 1, "Targets are for the released models and data. The closest published control for "
     "concat at layer 0 with a frozen 7B decoder is SLAM-LLM's linear-only AudioCaps model, SPIDEr 0.469; with LoRA "
     "0.489; SLAM-AAC with more data and CLAP reranking 0.518.", []),
    ("T1 AudioCaps, test split", table_audiocaps, 1, "First beam of 5. Mean ± sample standard deviation over seeds; n "
     "is the number of test clips.", [figure_curves, figure_gates, figure_gates_by_layer, figure_pareto]),
    ("T2 Clotho, evaluation split", table_clotho, 1, "First beam of 5.", []),
    ("T3 Layers", table_sweep("layers"), 2, "Rows differ in nothing but the flags shown.", []),
    ("T3 Tokens and hidden width", table_sweep("tokens", "hidden"), 2, "", []),
    ("T3 Losses", table_sweep("contrastive"), 2, "0 is XE alone.", []),
    ("T3 Reranker off and on, T4 Decoding", table_decoding, 1, "The oracle takes each clip's best candidate by {name} "
     "of the test references: a bound, no system. Weights, of log-probability, CLAP and consensus, were chosen on "
     "validation. By another clip's sound: the same weights, but CLAP hears the wrong clip.",
     [figure_diversity]),
    ("T5 What the backbone kept", table_retention, 1, "Accuracy in hundredths on {questions} questions (hash {hash}); "
     "agreement is with the untouched backbone's own answers. A single seed has its 95% interval over questions.",
     [figure_frontier]),
    ("Gate regularisation", table_sweep("gate_l2"), 3, "", []),
    ("Video", table_video, 3, "First beam of 5, the audio-visual set's test split.", []),
    ("What the second modality costs", table_tries, 3, "In hundredths: {name} of sounds beside an unrelated video "
     "against the same without it, and answers about pictures beside an unrelated sound and video against beside the "
     "sound alone. A try beyond the tolerance is followed by one with ten times the gates' L2 penalty.", []),
    ("Comparisons", table_statistics, 4, "{choice} Paired bootstrap of items, and of seeds where there are several; p "
     "is two-sided, Holm over the metrics of a comparison.", [figure_intervals]),
    ("Efficiency", table_efficiency, 1, "FLOPs: products of matrices in decoding a clip, as torch.utils.flop_counter "
     "sees them; a system that is reranked decodes samples as well. Minutes to 90%: wall-clock to the first validation "
     "with 90% of the final {name}.", []),
    ("Appendix: gates at the start", table_sweep("gate_init"), 5, "", []),
    ("Appendix: noise", table_robustness, 5, "Test {name}, greedy decoding.", [figure_snr])]


def report(folder):
    """Write figures/ and REPORT.md; returns the Markdown text."""
    runs = read_runs(folder)
    if not runs:
        raise FileNotFoundError(f"{folder}: no runs there (phase/name/config.json); run_all.sh makes them")
    scale = "full" if any("llava-1.5-7b" in r["config"]["llava"] for r in runs) else folder.resolve().name
    done, kept = [r for r in runs if r["result"]], [r["retention"] for r in runs if r["retention"]]
    metric, (best, scores) = selection(finished(runs, "core") or done), best_baseline(runs)
    facts = {"name": METRICS[metric], "n": next((r["result"]["n"] for r in finished(runs, "core")), "?"),
             "val_n": next((x["val_n"] for r in runs for x in r["log"] if "val_n" in x), "?"),
             "questions": kept[0]["n"] if kept else "?", "hash": kept[0]["hash"][:12] if kept else "?",
             "choice": f"Best baseline, chosen on validation: {best} (mean validation {METRICS[metric]} "
                       f"{', '.join(f'{s} {v:.3f}' for s, v in scores.items())})."}
    body, missing = [], []
    for title, make, phase, note, figures in SECTIONS:
        text, drawn = make(folder, runs, metric), []
        for draw in figures:
            figure, name = draw(folder, runs, metric), draw.__name__.removeprefix("figure_")
            if figure:
                save_figure(figure, folder / "figures", name)
                caption = " ".join(draw.__doc__.split()).format(**facts)
                drawn.append(f"![{name}](figures/{name}.png)\n\n*{caption}*")
            else:
                missing.append(f"figure {name} (phase {phase})")
        if text or drawn:
            body += [f"## {title}", text, note.format(**facts), *drawn]
        if not text:
            missing.append(f"{title} (phase {phase})")
    missing += [f"{SYSTEMS[s][0]} in core (phase 1)" for s in SYSTEMS
                if s not in {r["config"]["fusion"] for r in runs if r["phase"] == "core"}]
    unfinished = [str(r["path"]) for r in runs if not r["result"]]
    hours = sum(r["result"].get("train_seconds", 0) for r in done if r["stage"] == "xe") / 3600
    head = [f"# Report, scale: {scale}", "" if scale == "full" else
            "A stand-in world: models and data made by the repository itself. The numbers compare systems with each "
            "other and say nothing about LLaVA-1.5-7B or AudioCaps.",
            f"{len(done)} results, {hours:.2f} hours of training." + ("" if metric == "spider" else " SPICE has not "
            "run everywhere: SPIDEr is absent, and spider_lite stands in for it under its own name."),
            f"**Not finished** ({len(unfinished)} of {len(runs)} runs): {', '.join(unfinished)}" if unfinished else "",
            f"**Missing**: {'; '.join(missing)}." if missing else ""]
    body += ["## Where the numbers come from", table(["run", "seed", "commit", "minutes", "result"], [
        [f"`{r['path']}`", r["config"]["seed"], r["config"].get("git") or "-", minutes([r]) if r["result"] else "-",
         "finished" if r["result"] else "not finished"] for r in runs])]
    text = "\n\n".join(p for p in head + body if p) + "\n"
    tmp = folder / "REPORT.md.tmp"
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, folder / "REPORT.md")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder of phases of runs, such as experiments/tiny")
    args = parser.parse_args()
    try:
        text = report(args.folder)
    except FileNotFoundError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    shown = text.split("\n## Where the numbers come from")[0].splitlines()
    print("\n".join(line for line in shown if line.startswith(("#", "|", "**"))))


if __name__ == "__main__":
    main()
