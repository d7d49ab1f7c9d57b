"""Tables, figures and REPORT.md from the files of finished runs. Reads results only: no model, no data set.

    python plots.py experiments/tiny               # experiments/tiny/REPORT.md and figures/*.png, *.pdf

Copy this file alone: it needs numpy and matplotlib. A half-finished set of runs gives a report of what there is.
"""
import argparse
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

SYSTEMS = {  # order in tables; colour (Okabe and Ito's palette) and marker, told apart in grey too
    "additive": ("additive", "#0072B2", "o", "-"), "cross_attention": ("cross-attention", "#D55E00", "s", "--"),
    "concat": ("concatenation", "#009E73", "^", "-."), "unfreeze": ("partial unfreeze", "#CC79A7", "D", ":"),
    "data_only": ("data-only (deaf)", "#555555", "x", (0, (1, 1)))}
TARGETS = {"spider": 0.50, "meteor": 0.24}  # at full scale, AudioCaps, XE


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_runs(folder):
    """Finished and unfinished runs below a folder: [{"path", "config", "result", "retention", "log"}]."""
    runs = []
    for config_file in sorted(folder.glob("*/*/config.json")):
        home = config_file.parent
        config = read_json(config_file)
        if not config or config.get("fusion") not in SYSTEMS:
            continue
        log = home / "log.jsonl"
        lines = []
        for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                pass  # the last line of a run that is being written
        runs.append({"path": home.relative_to(folder), "phase": home.parent.name, "config": config, "log": lines,
                     "result": read_json(home / "result.json"), "retention": read_json(home / "retention.json")})
    return runs


def by_system(runs):
    groups = defaultdict(list)
    for run in runs:
        groups[run["config"]["fusion"]].append(run)
    return {k: groups[k] for k in SYSTEMS if k in groups}


def mean_sd(values, digits=3, scale=1.0):
    """'0.512 ± 0.004': mean and sample standard deviation over seeds; a single value stands alone."""
    values = [v * scale for v in values if v is not None]
    if not values:
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "|".join([" --- "] + [" ---: "] * (len(head) - 1)) + "|"]
                     + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def selection(results):
    """SPIDEr where SPICE ran everywhere, else its stand-in under its own name."""
    return "spider" if results and all(r.get("spider") is not None for r in results) else "spider_lite"


# ---------------------------------------------------------------- tables

METRICS = {"cider_d": "CIDEr-D", "spice": "SPICE", "spider": "SPIDEr", "spice_lite": "spice_lite",
           "spider_lite": "spider_lite", "meteor": "METEOR", "rouge_l": "ROUGE-L", "bleu_4": "BLEU-4"}


def table_core(runs):
    """T1: AudioCaps test, one row a system, mean and deviation over seeds."""
    rows, results = [], [r["result"] for r in runs]
    shown = [m for m in METRICS if any(r.get(m) is not None for r in results)]
    for system, group in by_system(runs).items():
        results = [r["result"] for r in group]
        rows.append([SYSTEMS[system][0], len(group), "/".join(sorted({str(r["n"]) for r in results})),
                     *(mean_sd([r.get(m) for r in results]) for m in shown),
                     mean_sd([r["mean_words"] for r in results], 1), f"{results[0]['trainable_parameters']:,}",
                     mean_sd([r["train_seconds"] / 60 for r in results], 1)])
    return table(["system", "seeds", "n", *(METRICS[m] for m in shown), "words", "trainable", "minutes"], rows)


def table_retention(runs):
    """T5: question answering, accuracy and agreement with the backbone, in hundredths."""
    names = {"nothing_attached": "nothing attached", "gates_closed": "gates closed", "no_clip": "no clip",
             "unrelated_clip": "unrelated clip"}
    rows, first = [], runs[0]["retention"]["conditions"]["backbone"]
    rows.append(["backbone", "", mean_sd([first["accuracy"]], 1, 100), *[""] * 3, "100.0", "yes"])
    for system, group in by_system(runs).items():
        found = [r["retention"]["conditions"] for r in group]
        rows.append([SYSTEMS[system][0], len(group),
                     *(mean_sd([c[k]["accuracy"] for c in found if k in c], 1, 100) for k in names),
                     mean_sd([c["unrelated_clip"]["agreement"] for c in found], 1, 100),
                     "yes" if all(c["nothing_attached"]["identical"] for c in found) else "no"])
    return table(["system", "seeds", *names.values(), "agreement beside a clip", "identical when nothing is attached"],
                 rows)


# ---------------------------------------------------------------- figures

def start_figure(width=7.2, height=3.6):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.25, "pdf.fonttype": 42, "figure.constrained_layout.use": True})
    return plt.subplots(figsize=(width, height))


def legend_beside(ax):
    """Outside the axes, where it hides no line."""
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)


def save_figure(figure, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "pdf"):
        tmp = folder / f".{name}.tmp"
        figure.savefig(tmp, format=kind, dpi=160)
        os.replace(tmp, folder / f"{name}.{kind}")
    import matplotlib.pyplot as plt
    plt.close(figure)


def figure_curves(runs, metric):
    """Validation metric against step; one thin line a seed, one style a system."""
    figure, ax = start_figure()
    for system, group in by_system(runs).items():
        label, colour, marker, style = SYSTEMS[system]
        for k, run in enumerate(group):
            points = [(x["step"], x[f"val_{metric}"]) for x in run["log"]
                      if x.get("event") == "validation" and x["stage"] == "xe" and f"val_{metric}" in x]
            if points:
                ax.plot(*zip(*points), color=colour, marker=marker, ms=4, ls=style, lw=1.2,
                        label=label if k == 0 else None)
    ax.set(xlabel="XE step", ylabel=f"validation {METRICS[metric]}")
    legend_beside(ax)
    return figure


def figure_gates(runs):
    """Effective gate against step, one line a layer: alpha for additive, tanh(alpha) for cross-attention."""
    figure, ax = start_figure()
    for system, group in by_system(runs).items():
        label, colour, _, _ = SYSTEMS[system]
        for k, run in enumerate(group):
            steps = [x for x in run["log"] if x.get("event") == "step"]
            for key, style in zip(sorted({k for x in steps for k in x if k.startswith("gate_")}), ("-", "--", ":")):
                ax.plot([x["step"] for x in steps if x["stage"] == "xe"],
                        [x[key] for x in steps if x["stage"] == "xe"], color=colour, ls=style, lw=1.2,
                        label=f"{label}, layer {key[5:]}" if k == 0 else None)
    ax.axhline(0, color="black", lw=0.6)
    ax.set(xlabel="XE step", ylabel="gate")
    legend_beside(ax)
    return figure


def figure_pareto(runs, metric):
    """Test metric against trainable parameters; one point a seed, the frontier as a line."""
    figure, ax = start_figure()
    means = []
    for system, group in by_system(runs).items():
        label, colour, marker, _ = SYSTEMS[system]
        x = [r["result"]["trainable_parameters"] for r in group]
        y = [r["result"][metric] for r in group]
        ax.scatter(x, y, color=colour, marker=marker, s=36, label=label, zorder=3)
        means.append((np.mean(x), np.mean(y)))
    best, frontier = -np.inf, []
    for x, y in sorted(means, key=lambda point: (round(point[0], -3), -point[1])):  # budgets match but for a few
        if y > best:
            best, frontier = y, frontier + [(x, y)]
    ax.plot(*zip(*frontier), color="black", lw=0.8, alpha=0.5, label="frontier of the means")
    ax.set(xscale="log", xlabel="trainable parameters", ylabel=f"test {METRICS[metric]}")
    from matplotlib.ticker import EngFormatter, LogLocator
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter())
    ax.xaxis.set_minor_formatter("")
    legend_beside(ax)
    return figure


# ---------------------------------------------------------------- the report

def report(folder):
    """Write figures/ and REPORT.md; returns the Markdown text."""
    runs = read_runs(folder)
    if not runs:
        raise FileNotFoundError(f"{folder}: no runs there (phase/name/config.json); run_all.sh makes them")
    scale = "full" if any("llava-1.5-7b" in r["config"]["llava"] for r in runs) else folder.name
    core = [r for r in runs if r["phase"] == "core"]
    done = [r for r in core if r["result"]]
    kept = [r for r in core if r["retention"]]
    parts = [f"# Report, scale: {scale}", "" if scale == "full" else
             "A stand-in world: models and data made by the repository itself. The numbers compare systems with each "
             "other and say nothing about LLaVA-1.5-7B or AudioCaps."]
    missing = [r for r in runs if not r["result"]]
    if missing:
        parts.append(f"**Not finished** ({len(missing)} of {len(runs)} runs): "
                     + ", ".join(str(r["path"]) for r in missing))
    if done:
        metric = selection([r["result"] for r in done])
        parts += ["## T1 AudioCaps, test split, XE + contrastive", table_core(done),
                  "First beam of 5. Mean ± sample standard deviation over seeds; n is the number of test clips."]
        best = max((r["result"][metric] for r in done if r["config"]["fusion"] == "additive"), default=None)
        if best is not None:
            parts.append(f"Targets at full scale: SPIDEr {TARGETS['spider']:.2f}, METEOR {TARGETS['meteor']:.2f}; "
                         f"reached here, additive's best seed: {METRICS[metric]} {best:.3f}, METEOR "
                         f"{max(r['result']['meteor'] for r in done if r['config']['fusion'] == 'additive'):.3f}.")
        for name, figure, caption in (
                ("curves", figure_curves(core, metric), f"Validation {METRICS[metric]} against step, a line a seed."),
                ("gates", figure_gates(core), "Gates against step: α for additive and data-only, tanh α for "
                                              "cross-attention and unfreeze. A line a seed and layer."),
                ("pareto", figure_pareto(done, metric), f"Test {METRICS[metric]} against trainable parameters, a "
                                                        f"point a seed (n = {done[0]['result']['n']} clips).")):
            save_figure(figure, folder / "figures", name)
            parts.append(f"![{caption}](figures/{name}.png)\n\n*{caption}*")
    if kept:
        parts += ["## T5 What the backbone kept", table_retention(kept),
                  f"Accuracy in hundredths on {kept[0]['retention']['n']} questions (hash "
                  f"{kept[0]['retention']['hash'][:12]}); agreement is with the untouched backbone's own answers."]
    parts += ["## Where the numbers come from", table(["run", "seed", "result"], [
        [f"`{r['path']}`", r["config"]["seed"], "finished" if r["result"] else "not finished"] for r in runs])]
    text = "\n\n".join(p for p in parts if p) + "\n"
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
    print("\n".join(line for line in text.splitlines() if line.startswith(("#", "|", "Targets"))))


if __name__ == "__main__":
    main()
