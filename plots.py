"""Tables, figures and REPORT.md from the files of finished runs. No model and no dataset is read.

    python plots.py experiments/tiny        # writes experiments/tiny/REPORT.md and figures/*.png, *.pdf

Copy this file alone: it needs numpy and matplotlib. The report of an unfinished study names what is missing.
A run is FOLDER/phase/name_s<seed>/ with config.json, log.jsonl and result.json. A folder in it with its own
result, such as scst/, is another stage of that run. Tables choose runs by the flags in config.json.
"""
import argparse
import copy
import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

# in the order of the tables: name, colour (Okabe and Ito's palette), marker, line
SYSTEMS = {
    "additive": ("additive", "#0072B2", "o", "-"),
    "cross_attention": ("cross-attention", "#D55E00", "s", "--"),
    "concat": ("concatenation", "#009E73", "^", "-."),
    "unfreeze": ("partial unfreeze", "#CC79A7", "D", ":"),
    "data_only": ("data-only (no audio)", "#555555", "x", (0, (1, 1)))}
METRICS = {
    "cider_d": "CIDEr-D", "spice": "SPICE", "spider": "SPIDEr", "spice_lite": "spice_lite",
    "spider_lite": "spider_lite", "meteor": "METEOR", "rouge_l": "ROUGE-L", "bleu_4": "BLEU-4",
    "accuracy": "accuracy"}
# runs that differ in one of these are different systems
FLAGS = ("fusion", "layers", "tokens", "hidden", "null_slot", "keep", "keep_every", "gate_l2", "contrastive",
         "gate_init", "limit", "dataset", "init", "modality")
STAGES = ("scst", "audio", "video", "shuffled")  # folders in a run: SCST, or what it was given of two modalities
ABSENT = {"null_slot": False, "keep": 0.0, "keep_every": 1}  # values in runs older than these flags
WEIGHTS = {"keep": "keep", "gate_l2": "gate L2"}  # flags of the gates' regularisation
CONDITIONS = ("nothing_attached", "gates_closed", "no_clip", "unrelated_clip")  # of VQA; a file may have more
# columns of tables: title, key in Run.values, digits, scale
COUNT, WORDS = ("n", "n"), ("words", "mean_words", 1)
SCORES = [(name, metric) for metric, name in METRICS.items()]
COSTS = [("trainable", "trainable"), ("minutes", "seconds", 1, 1 / 60)]
EFFICIENCY = [("minutes to 90%", "seconds_to_90_percent", 1, 1 / 60), ("clips/s", "clips_a_second", 1),
              ("GFLOP a clip", "flops_a_clip", 2, 1e-9), ("hardware", "hardware")]


# ---------------------------------------------------------------- reading

class Run:
    """One stage of a run. `values` has what tables and figures show of it, by name."""

    def __init__(self, study, folder, stage, config, log):
        self.folder, self.path = folder, folder.relative_to(study)
        self.phase, self.name = self.path.parts[:2]
        self.stage, self.config, self.log = stage, config, log
        self.system = config["fusion"]
        name, colour, marker, self.line = SYSTEMS.get(self.system, (self.system, "#000000", "P", "-"))
        self.label = name + {"xe": "", "scst": " + SCST"}.get(stage, f", {stage}")
        self.label += " + keep" if config.get("keep") else ""
        self.style = {"color": colour, "marker": "*" if stage == "scst" else marker}
        self.result = read_json(folder / "result.json")
        self.state = "finished" if self.result else "not finished"
        if self.result and self.result.get("split") != "test":  # every table is of the test split
            self.result, self.state = None, "not of the test split"
        self.retention = read_json(folder / "retention.json")
        self.robustness = read_json(folder / "robustness.json")
        self.values = {**self.vqa_values(), **self.result_values()}

    def result_values(self):
        """Costs and test scores. Systems are compared by the first beam, reranked or not."""
        if not self.result:
            return {}
        card = read_json(self.folder / "run_card.json") or {}
        first_beam = self.result.get("first_beam") or {}
        values = {**card, **self.result, **first_beam}
        values["n"] = str(self.result["n"])
        values["trainable"] = f"{self.result['trainable_parameters']:,}"
        for layer, gate in self.result.get("gates", {}).items():
            values[f"gate_{layer}"] = abs(gate)
        for metric, score in self.result.get("oracle", {}).items():
            values[f"oracle_{metric}"] = score
            values[f"gain_{metric}"] = self.result[metric] - first_beam[metric]
        stages = card.get("stages") or {}
        stage = stages.get("scst" if self.stage == "scst" else "xe") or {}
        values["seconds"] = stage.get("seconds", self.result.get("train_seconds"))  # XE does not include SCST
        return values

    def vqa_values(self):
        """Visual question answering: unrelated_clip.accuracy and the like."""
        values = {}
        conditions = (self.retention or {}).get("conditions", {})
        for condition, numbers in conditions.items():
            values.update({f"{condition}.{key}": value for key, value in numbers.items()})
        identical = [values.get(f"{condition}.identical") for condition in CONDITIONS[:3]]
        values["identical"] = "no" if False in identical else "yes"
        return values

    def row(self, values):
        """This run with the values of one row of a table."""
        other = copy.copy(self)
        other.values = values
        return other


class Study:
    """The runs below a folder, and the metric that compares them."""

    def __init__(self, folder):
        self.folder, self.runs = folder, read_runs(folder)
        done = [run for run in self.runs if run.result]
        self.metric = selection(done)
        self.metric_name = METRICS[self.metric]
        groups = grouped([run for run in self.runs if run.phase == "core"])
        self.core = sum(groups.values(), [])
        counts = [f", n = {run.result['n']}" for run in self.finished("core")]
        self.test_name = f"test {self.metric_name}{counts[0] if counts else ''}"  # of an axis

    def finished(self, *phases):
        return [run for run in self.runs if run.result and run.phase in phases]


def read_json(path):
    return json.loads(path.read_bytes()) if path.is_file() else None


def read_runs(folder):
    """Every stage of every run, finished or not. Phase 0 only checks that the parts work."""
    runs = []
    for file in sorted(folder.glob("*/*/config.json")):
        home, config = file.parent, read_json(file)
        if "fusion" not in config or home.parent.name == "sanity":
            continue
        log = home / "log.jsonl"
        lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []  # the last one may have no end yet
        runs.append(Run(folder, home, "xe", config, [json.loads(line) for line in lines]))
        for stage in STAGES:
            if (home / stage).is_dir():
                runs.append(Run(folder, home / stage, stage, config, []))
    return runs


def selection(runs):
    """SPIDEr if SPICE ran everywhere, else its stand-in."""
    everywhere = runs and all(run.result.get("spider") is not None for run in runs)
    return "spider" if everywhere else "spider_lite"


def grouped(runs, key=lambda run: (run.label,)):
    """{key: runs} in the order of systems, then of stages, then of keys."""
    order = [*SYSTEMS, *sorted({run.system for run in runs} - set(SYSTEMS))]
    groups = defaultdict(list)
    for run in sorted(runs, key=lambda run: (order.index(run.system), run.stage == "scst", key(run))):
        groups[key(run)].append(run)
    return groups


def sweep(runs, flags):
    """Families of XE runs that differ in these flags alone (and in steps): [{(label, flag values): runs}]."""
    families = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.stage == "xe":
            values = [shown(flag_of(run, flag)) for flag in (*flags, "steps")]
            family = str([flag_of(run, flag) for flag in FLAGS if flag not in flags])
            families[family][(run.label, *values)].append(run)
    several = []
    for family in families.values():
        if len({values[:-1] for values in family}) > 1:
            several.append(dict(sorted(family.items())))
    return several


def flag_of(run, flag):
    return run.config.get(flag, ABSENT.get(flag))


def shown(value):
    """The value of a flag as a table shows it; they sort within a table."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return {"True": "yes", "False": "no"}.get(str(value), value)


def best_baseline(runs):
    """(system, {system: mean validation score}) of the other systems with audio. No test score is used."""
    runs = [run for run in runs if run.phase == "core" and run.stage == "xe"
            and run.system not in ("additive", "data_only") and (run.result or {}).get("validation")]
    spider = all("val_spider" in run.result["validation"] for run in runs)
    key = "val_spider" if spider else "val_spider_lite"
    scores = {}
    for (system,), group in grouped(runs, lambda run: (run.system,)).items():
        scores[system] = float(np.mean([run.result["validation"][key] for run in group]))
    return max(scores, key=scores.get, default=None), scores


def comparisons(study):
    """{name: what bootstrap.py compare --json wrote}, the headline first."""
    headline = f"additive_vs_{best_baseline(study.runs)[0]}"
    found = {}
    files = (study.folder / "statistics").glob("*.json")
    for file in sorted(files, key=lambda file: (file.stem != headline, file.stem)):
        content = read_json(file)
        if isinstance(content.get("runs"), dict):  # not what `bootstrap.py seeds --json` writes
            name = file.stem.replace("_", " ")
            seeds = "/".join(str(len(content["runs"][side])) for side in "ab")
            title = f"**headline:** {name}" if file.stem == headline else name
            found[file.stem] = {**content, "seeds": seeds, "name": name, "title": title}
    return found


# ---------------------------------------------------------------- tables: Markdown, or None without rows

def cell(runs, key, digits=3, scale=1.0):
    """'0.512 ± 0.004': mean and sample standard deviation over seeds; a single value has its interval."""
    values = [run.values[key] for run in runs if run.values.get(key) is not None]
    if not values:
        return "-"
    if isinstance(values[0], str):
        return " ".join(values) if len(set(values)) > 1 else values[0]
    text = f"{np.mean(np.multiply(values, scale)):.{digits}f}"
    if len(values) > 1:
        return f"{text} ± {np.std(np.multiply(values, scale), ddof=1):.{digits}f}"
    interval = runs[0].values.get(f"{key}_ci95")
    if interval and len(runs) == 1:
        low, high = (f"{scale * end:.{digits}f}" for end in interval)
        return f"{text} [{low}, {high}]"
    return text


def folders(runs):
    """Where a row comes from, seeds together: `core/additive_s{0,1}`."""
    seeds = defaultdict(list)
    for run in runs:
        parts = re.fullmatch(r"(.*?_s(?=\d)|.*)(\d*)(.*)", run.path.as_posix())
        before, seed, after = parts.groups()
        seeds[before, after].append(seed)
    names = []
    for (before, after), group in seeds.items():
        seed = "{" + ",".join(group) + "}" if len(group) > 1 else group[0]
        names.append(f"`{before}{seed}{after}`")
    return "; ".join(names)


def table(head, rows, texts=1):
    """Markdown; the first `texts` columns and the last are flush left."""
    if not rows:
        return None
    rule = ["---"] * texts + ["---:"] * (len(head) - texts - 1) + ["---"]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, rule, *rows))


def run_table(head, groups, columns):
    """A row for each of {cells under head: runs of all seeds}, without columns that no run has values for."""
    runs = sum(groups.values(), [])
    columns = [c for c in columns if any(run.values.get(c[1]) is not None for run in runs)]
    rows = []
    for cells, group in groups.items():
        numbers = [cell(group, *column[1:]) for column in columns]
        rows.append([*cells, len(group), *numbers, folders(group)])
    return table([*head, "seeds", *(c[0] for c in columns), "runs"], rows, len(head))


def score_row(run):
    """What tells the rows of a table of scores apart."""
    if run.phase == "clotho":
        return run.label, "AudioCaps checkpoint" if run.config.get("init") else "Clotho alone"
    if run.phase == "video":
        return run.name.rpartition("_s")[0], run.config.get("modality", "audio"), run.result.get("hear", "all")
    return (run.label,)


def table_scores(study, phase, head):
    columns = [COUNT, *SCORES, WORDS, *COSTS]
    if phase == "core":
        columns += EFFICIENCY
    return run_table(head, grouped(study.finished(phase), score_row), columns)


def table_sweep(study, flags):
    """One table for each family of runs that differ in these flags alone."""
    head = ["system", *(flag.replace("_", " ") for flag in flags), "steps"]
    scores = [(METRICS[metric], metric) for metric in (study.metric, "cider_d", "meteor")]
    tables = []
    for family in sweep(study.finished("core", "ablation", "retention", "appendix"), flags):
        runs = sum(family.values(), [])
        layers = sorted({layer for run in runs for layer in run.config["layers"]})
        gates = [(f"gate size, layer {layer}", f"gate_{layer}") for layer in layers]
        tables.append(run_table(head, family, [COUNT, *scores, WORDS, *gates, *COSTS]))
    return "\n\n".join(tables) or None


def table_decoding(study):
    """Scores of the ways to choose among the candidates of a reranked run."""
    rows = defaultdict(list)
    runs = [run for run in study.finished("core", "ablation", "clotho") if "first_beam" in run.result]
    for (label, phase), group in grouped(runs, lambda run: (run.label, run.phase)).items():
        for run in group:
            result = run.result
            weights = "/".join(f"{weight:g}" for weight in result["reranker"]["weights"].values())
            ways = {"first beam": result["first_beam"],
                    "reranked": {**result, **result["diversity"], "weights": weights},
                    "reranked with another clip's audio": result["other_clip"], "oracle": result["oracle"]}
            for way, scores in ways.items():
                gain = scores[study.metric] - run.values[study.metric]
                rows[label, phase, way].append(run.row({**scores, "n": str(result["n"]), "gain": gain}))
    return run_table(["system", "phase", "decoding"], rows, [
        COUNT, *SCORES, (f"gain, {study.metric_name}", "gain"), WORDS, ("self-BLEU", "self_bleu"),
        ("distinct-1", "distinct_1"), ("distinct-2", "distinct_2"), ("candidates", "candidates"),
        ("weights of each seed", "weights")])


def retention_row(run):
    if run.phase == "core":
        return (run.label,)
    if run.phase == "video":
        return (f"{run.label}, {run.name.rpartition('_s')[0]}",)
    config = run.config
    weights = ["null slot"] if config.get("null_slot") else []
    weights += [f"{name} {config[key]:g}" for key, name in WEIGHTS.items() if config.get(key)]
    return (f"{run.label.removesuffix(' + keep')}, {', '.join(weights)}, {config['steps']} steps",)


def table_retention(study):
    """VQA accuracy under each condition, the untouched backbone first."""
    phases = ("core", "ablation", "retention", "video")
    runs = [run for run in study.runs if run.phase in phases and "backbone.accuracy" in run.values]
    if not runs:
        return None
    groups = grouped(runs, retention_row)
    first = next(iter(groups.values()))[0]
    alone = {"identical": "yes"}
    for key, value in first.values.items():
        if key.startswith("backbone."):  # the same whatever is attached
            alone[key.replace("backbone", "nothing_attached")] = value
            alone[key.replace("backbone", "unrelated_clip")] = value
    more = {condition for run in runs for condition in run.retention["conditions"]}
    names = [*CONDITIONS, *sorted(more - {"backbone", *CONDITIONS})]
    return run_table(["system"], {("backbone",): [first.row(alone)], **groups}, [
        *((name.replace("_", " "), f"{name}.accuracy", 1, 100) for name in names),
        *((f"loss, {name.replace('_', ' ')}", f"{name}.loss", 1, 100)
          for name in ("unrelated_clip", "silence", "noise")),
        ("agreement, unrelated clip", "unrelated_clip.agreement", 1, 100),
        ("NLL, unrelated clip", "unrelated_clip.nll"), ("first three identical to the backbone", "identical")])


def table_tries(study):
    """Runs of the second modality, until it costs the first two no more than the tolerance."""
    decision = read_json(study.folder / "phase3/decision.json") or {"tries": []}
    rows = []
    for t in decision["tries"]:
        numbers = [f"{t[kind][key]:.2f}" for kind in ("audio", "vl") for key in ("before", "after", "loss")]
        intervals = ["[{:.2f}, {:.2f}]".format(*t[kind]["loss_ci95"]) for kind in ("audio", "vl")]
        numbers.insert(3, intervals[0])
        rows.append([f"{t['keep']:g}", f"{t['gate_l2']:g}", *numbers, intervals[1], "yes" if t["clean_identical"] else "no",
                     f"{decision['tolerance']:g}", "yes" if t["within"] else "no",
                     f"`{'/'.join(Path(t['run']).parts[-2:])}`"])
    return table(["keep", "gate L2", "captions before", "after", "loss", "95%", "VQA before", "after", "loss", "95%",
                  "clean identical", "tolerance", "within", "run"], rows)


def noise_rows(study):
    """({(label, kind of noise): runs}, signal-to-noise ratios): scores by ratio in dB and "clean"."""
    rows, ratios = defaultdict(list), set()
    runs = [run for run in study.runs if study.metric in (run.robustness or {}).get("clean", {})]
    for (label,), group in grouped(runs).items():
        for run in group:
            for kind, noise in run.robustness["noise"].items():
                values = {"n": str(run.robustness["n"])}
                for ratio, scores in {"clean": run.robustness["clean"], **noise}.items():
                    values[ratio] = scores[study.metric]
                    values[f"{ratio}_half_width"] = scores.get("half_width_95", 0)
                rows[label, kind].append(run.row(values))
                ratios.update(noise)
    return rows, ["clean", *sorted(ratios, key=float, reverse=True)]


def table_robustness(study):
    rows, ratios = noise_rows(study)
    columns = [(ratio if ratio == "clean" else f"{ratio} dB", ratio) for ratio in ratios]
    return run_table(["system", "noise"], rows, [COUNT, *columns])


def table_statistics(study):
    rows = []
    for file, comparison in comparisons(study).items():
        for metric, r in comparison["metrics"].items():
            scores = [f"{r['a']:.3f}", f"{r['b']:.3f}", f"{r['difference']:+.3f}"]
            intervals = ["[{:+.3f}, {:+.3f}]".format(*r[key]) for key in ("ci95", "bca95")]
            keys = ("p", "p_holm", "p_randomisation", "effect_size")
            rest = ["-" if r[key] is None else f"{r[key]:.2g}" for key in keys]
            rows.append([comparison["title"], METRICS.get(metric, metric), comparison["n"], comparison["seeds"],
                         *scores, *intervals, *rest, f"`statistics/{file}.json`"])
    return table(["A - B", "metric", "n", "seeds A/B", "A", "B", "difference", "95% percentile", "95% BCa",
                  "p", "p Holm", "p randomisation", "effect size", "file"], rows, 2)


def table_targets(study):
    """What success means at full scale beside the additive system's result here."""
    metric, name, points = study.metric, study.metric_name, "VQA accuracy, percentage points"
    rows = []
    for title, target, measure, place, stage, key in (
            ("AudioCaps SPIDEr, XE", "≥ 0.50", name, "core/additive", "xe", metric),
            ("AudioCaps SPIDEr, XE + SCST", "≥ 0.52", name, "core/additive", "scst", metric),
            ("AudioCaps SPIDEr-max", "≥ 0.53", name, "core/additive", "xe", f"oracle_{metric}"),
            ("AudioCaps METEOR, XE", "≥ 0.24", "METEOR", "core/additive", "xe", "meteor"),
            ("Clotho SPIDEr-FL", "≥ 0.33", f"{name}, no fluency penalty", "clotho/additive", "xe", metric),
            ("reranker's gain in SPIDEr", "≥ 0.02", name, "core/additive", "xe", f"gain_{metric}"),
            ("VQA loss, no clip", "≤ 0.5", points, "core/additive", "xe", "no_clip.loss"),
            ("VQA loss, unrelated clip", "≤ 0.5", points, "core/additive", "xe", "unrelated_clip.loss"),
            ("VQA loss, unrelated clip, with keep", "≤ 0.5", points, "retention/additive_keep", "xe",
             "unrelated_clip.loss")):
        runs = [run for run in study.runs if run.result and run.stage == stage and key in run.values
                and f"{run.phase}/{run.name.rpartition('_s')[0]}" == place]
        reached = cell(runs, key, *((2, 100) if measure == points else ())) if runs else "missing"
        rows.append([title, target, measure, reached, folders(runs) or "-"])
    return table(["target at full scale", "value", "measured here as", "additive", "runs"],
                 rows if any(run.result for run in study.runs) else [])


# ---------------------------------------------------------------- figures
# Each draws on an empty figure, and draws no axes where there is no data. Its docstring is the caption.

def draw_log(ax, run, event, key, name, **look):
    """A key of a run's log against the training step. SCST is hollow and follows the last step of XE."""
    last = max((line["step"] for line in run.log if line.get("stage") == "xe"), default=0)
    for stage, start, label, fill in (("xe", 0, name, None), ("scst", last, f"{name}, SCST", "white")):
        lines = [line for line in run.log if line.get("event") == event and line["stage"] == stage]
        points = [(start + line["step"], line[key]) for line in lines if key in line]
        if points:
            ax.plot(*zip(*points), mfc=fill, lw=1.2, ms=4, label=label, **look)


def draw_scores(ax, study, runs, key, scale=1):
    """Test score of each run against another of its values, with 95% intervals."""
    for run in runs:
        if study.metric in run.values and key in run.values:
            x, widths = scale * run.values[key], None
            if f"{key}_ci95" in run.values:
                low, high = run.values[f"{key}_ci95"]
                widths = [[x - scale * low], [scale * high - x]]
            fill = "white" if run.config.get("keep") else run.style["color"]
            ax.errorbar(x, run.values[study.metric], half_width(run, study.metric), widths, ls="", ms=7,
                        mfc=fill, elinewidth=0.7, label=run.label, **run.style)
    ax.set_ylabel(study.test_name)


def half_width(run, metric):
    """Half the 95% interval of a mean over test clips; 0 without predictions."""
    first_beam = read_json(run.folder / "first_beam/predictions.json")
    items = first_beam or read_json(run.folder / "predictions.json") or []
    scores = [item["scores"][metric] for item in items if item["scores"].get(metric) is not None]
    return 1.96 * float(np.std(scores, ddof=1)) / len(scores) ** 0.5 if len(scores) > 1 else 0.0


def figure_curves(study, figure):
    """Validation score against training step, greedy decoding, one line for each seed. Hollow: SCST, which starts
    from the best XE checkpoint."""
    key = f"val_{study.metric}"
    runs = [run for run in study.core if any(key in line for line in run.log)]
    if not runs:
        return
    ax = figure.subplots()
    for run in runs:
        draw_log(ax, run, "validation", key, run.label, ls=run.line, **run.style)
    counts = [line["val_n"] for line in runs[0].log if "val_n" in line]
    ax.set(xlabel="training step", ylabel=f"validation {study.metric_name}, n = {counts[0]}")


def figure_gates(study, figure):
    """Gates against training step, one line for each seed and layer: α of additive and data-only, tanh α of
    cross-attention and partial unfreeze. Hollow: SCST."""
    runs = [run for run in study.core if any("gate_" in key for line in run.log for key in line)]
    if not runs:
        return
    ax = figure.subplots()
    for run in runs:
        for k, layer in enumerate(run.config["layers"]):
            line = ("-", "--", ":", "-.")[k % 4]
            name = f"{run.label}, layer {layer}"
            draw_log(ax, run, "step", f"gate_{layer}", name, ls=line, markevery=0.2, **run.style)
    ax.axhline(0, color="black", lw=0.6)
    ax.set(xlabel="training step", ylabel="gate")


def figure_pareto(study, figure):
    """Test score against trainable parameters, one point for each run with its 95% interval over clips."""
    if study.finished("core"):
        ax = figure.subplots()
        draw_scores(ax, study, study.core, "trainable_parameters")
        ax.set(xscale="log", xlabel="trainable parameters")


def figure_frontier(study, figure):
    """Test score against VQA accuracy beside an unrelated clip, one point for each run with 95% intervals. Hollow:
    with keep. Lines: shorter runs along a weight of the gates' regularisation, whose values the numbers are."""
    accuracy = "unrelated_clip.accuracy"
    runs = [run for run in study.finished("core", "ablation", "retention") if accuracy in run.values]
    if not runs:
        return
    ax = figure.subplots()
    draw_scores(ax, study, study.core, accuracy, 100)
    others = [run for run in runs if run.phase != "core"]
    draw_scores(ax, study, [run for run in others if "_keep_s" in run.name], accuracy, 100)
    for (flag, title), grey in zip(WEIGHTS.items(), ("black", "0.55")):
        for family in sweep([run for run in others if "_keep_s" not in run.name], [flag]):
            points, labels = [], {}
            for (name, weight, _), group in family.items():
                x = np.mean([100 * run.values[accuracy] for run in group])
                y = np.mean([run.values[study.metric] for run in group])
                points.append((x, y))
                near = [p for p in labels if abs(p[0] - x) < 1 and abs(p[1] - y) < 0.02]
                labels.setdefault(near[0] if near else (x, y), []).append(f"{weight:g}")
            for point, weights in labels.items():  # one label for points that are close together
                ax.annotate(", ".join(weights), point, (4, 4), textcoords="offset points", fontsize=7, zorder=5)
            label = f"{name.removesuffix(' + keep')}, {title}"
            ax.plot(*zip(*points), color=grey, lw=0.9, marker=".", label=label, zorder=4)
    backbone = 100 * runs[0].values["backbone.accuracy"]
    ax.axvline(backbone, color="black", lw=0.8, ls=":", label="backbone alone")
    ax.set_xlabel("VQA accuracy beside an unrelated clip, %")


def figure_intervals(study, figure):
    """Differences A - B with 95% percentile intervals and two-sided p, 10,000 resamples."""
    found = list(comparisons(study).values())
    if not found:
        return
    figure.set_size_inches(8.6, 1.2 + 0.3 * len(found))
    axes = figure.subplots(1, 2, sharey=True)
    for ax, metric in zip(axes, (study.metric, "meteor")):
        for row, comparison in enumerate(found):
            r = comparison["metrics"].get(metric)
            if r:
                ax.plot(r["ci95"], [-row, -row], color="black", lw=1, marker="|")
                ax.plot(r["difference"], -row, color="black", marker="o", ms=5)
                ax.text(1.02, -row, f"p {r['p']:.2g}", transform=ax.get_yaxis_transform(), va="center", fontsize=7)
        ax.axvline(0, color="black", lw=0.7, ls=":")
        ax.set(xlabel=f"difference in {METRICS[metric]}, 95% interval", ylim=(0.4 - len(found), 0.6))
    labels = [f"{c['name']}, n = {c['n']}, seeds {c['seeds']}" for c in found]
    axes[0].set_yticks([-row for row in range(len(found))], labels, fontsize=7)


def figure_snr(study, figure):
    """Test score against signal-to-noise ratio, greedy decoding: mean and standard deviation over seeds, or with
    one seed its 95% interval over clips."""
    rows, ratios = noise_rows(study)
    if not rows:
        return
    kinds = list(dict.fromkeys(kind for _, kind in rows))
    figure.set_size_inches(8.6, 3.8)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for (name, kind), group in rows.items():
        scores = np.array([[run.values.get(ratio, np.nan) for ratio in ratios] for run in group])
        bars = [group[0].values.get(f"{ratio}_half_width", 0) for ratio in ratios]
        if len(group) > 1:
            bars = scores.std(0, ddof=1)
        ax = axes[kinds.index(kind)]
        ax.errorbar(ratios, scores.mean(0), bars, ls=group[0].line, lw=1.2, elinewidth=0.7,
                    capsize=2, label=f"{name}, seeds: {len(group)}", **group[0].style)
        ax.set_xlabel(f"dB; noise: {'another clip' if kind == 'clip' else kind}")
    axes[0].set_ylabel(study.test_name)


# ---------------------------------------------------------------- the report

def sections(study):
    """(title, phase that makes it, table or None, note, figures) of the report, in order."""
    name = study.metric_name
    best, means = best_baseline(study.runs)
    means = ", ".join(f"{system} {mean:.3f}" for system, mean in means.items())
    probes = [run.retention for run in study.runs if run.retention]
    probe = f"{probes[0]['n']} questions (hash {probes[0]['hash'][:12]})" if probes else ""
    yield ("Targets", 1, table_targets(study),
           "For the released models and data. Published with a frozen 7B decoder: SLAM-LLM (linear projector alone) "
           "SPIDEr 0.469, with LoRA 0.489; SLAM-AAC (more data, CLAP reranking) 0.518.", [])
    yield ("T1 AudioCaps, test split", 1, table_scores(study, "core", ["system"]),
           "First beam of 5. Mean ± sample standard deviation over seeds. Minutes to 90%: first validation with 90% "
           "of the final score. FLOPs: matrix products in decoding a clip, by torch.utils.flop_counter. Clips/s: with "
           "the samples of those that are reranked.",
           [figure_curves, figure_gates, figure_pareto])
    yield ("T2 Clotho, evaluation split", 1, table_scores(study, "clotho", ["system", "start"]),
           "First beam of 5.", [])
    yield "T3 Layers", 2, table_sweep(study, ["layers"]), "Rows differ only in the flags shown.", []
    yield "T3 Tokens and hidden width", 2, table_sweep(study, ["tokens", "hidden"]), "", []
    yield "T3 Losses", 2, table_sweep(study, ["contrastive"]), "Weight of the contrastive loss; 0: XE alone.", []
    yield ("T3 Reranker off and on, T4 Decoding", 1, table_decoding(study),
           f"Oracle: each clip's best candidate by {name} against the test references. Weights of log-probability, "
           "CLAP and consensus: chosen on validation.", [])
    yield ("T5 VQA retention", 1, table_retention(study),
           f"VQA accuracy in percent on {probe}, and agreement with the backbone's own answers. One seed: 95% "
           "interval over questions.", [figure_frontier])
    yield ("Gate regularisation: keep", 3, table_sweep(study, ["null_slot", "keep"]),
           "Keep: weight of the divergence from the backbone's own answers beside unrelated clips.", [])
    yield "Gate regularisation: L2", 3, table_sweep(study, ["gate_l2"]), "", []
    yield ("Video", 3, table_scores(study, "video", ["run", "trained", "given"]),
           "First beam of 5, test split of the audio-visual dataset.", [])
    yield ("Cost of the second modality", 3, table_tries(study),
           f"In percentage points. Captions: {name} of audio captions without and with an unrelated video. VQA: "
           "beside an unrelated clip, without and with an unrelated video.", [])
    yield ("Comparisons", 4, table_statistics(study),
           f"Best baseline, chosen on validation: {best} (mean validation {name} {means}). Paired bootstrap of items, "
           "and of seeds if there are several. p is two-sided, Holm over the metrics of a comparison.",
           [figure_intervals])
    yield "Appendix: gates at the start", 5, table_sweep(study, ["gate_init"]), "", []
    yield "Appendix: noise", 5, table_robustness(study), f"Test {name}, greedy decoding.", [figure_snr]


def draw_figure(draw, study):
    """Save one figure as PNG and PDF; returns whether there was anything to draw."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which starts the backend of a notebook
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                                "axes.grid": True, "grid.alpha": 0.25, "pdf.fonttype": 42})
    figure = Figure((7.2, 3.8), layout="constrained")
    draw(study, figure)
    if not figure.axes:
        return False
    ax = figure.axes[-1]
    handles, labels = ax.get_legend_handles_labels()
    entries = dict(zip(labels, handles))  # one for each label
    ax.legend(entries.values(), entries, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    name = draw.__name__.removeprefix("figure_")
    (study.folder / "figures").mkdir(exist_ok=True)
    for kind in ("png", "pdf"):
        tmp = study.folder / f"figures/.{name}.tmp"
        figure.savefig(tmp, format=kind, dpi=160)
        os.replace(tmp, study.folder / f"figures/{name}.{kind}")
    return True


def report_body(study):
    """(Markdown paragraphs, names of what is missing); draws the figures."""
    body, missing = [], []
    for title, phase, text, note, figures in sections(study):
        drawn = [figure for figure in figures if draw_figure(figure, study)]
        if text or drawn:
            body += [f"## {title}", text, note]
        if not text:
            missing.append(f"{title} (phase {phase})")
        for figure in figures:
            name = figure.__name__.removeprefix("figure_")
            if figure in drawn:
                body.append(f"![{name}](figures/{name}.png)\n\n*{' '.join(figure.__doc__.split())}*")
            else:
                missing.append(f"figure {name} (phase {phase})")
    present = {run.system for run in study.core}
    missing += [f"{SYSTEMS[system][0]} in core (phase 1)" for system in SYSTEMS if system not in present]
    return body, missing


def report(folder):
    """Write figures/ and REPORT.md; returns the Markdown text."""
    study = Study(folder)
    runs = study.runs
    if not runs:
        raise FileNotFoundError(f"{folder}: no runs there (phase/name/config.json); run_all.sh makes them")
    full = folder.resolve().name == "full" or any("llava-1.5-7b" in run.config["llava"] for run in runs)
    head = [f"# Report, scale: {'full' if full else folder.resolve().name}"]
    if not full:
        head.append("A stand-in world: the repository makes the data and the models, at `SCALE=small` all but the language "
                    "model. The numbers compare systems and say nothing about LLaVA-1.5-7B or AudioCaps.")
    done = [run for run in runs if run.result]
    hours = sum(run.result.get("train_seconds", 0) for run in done if run.stage == "xe") / 3600
    head.append(f"{len(done)} results, {hours:.2f} hours of training.")
    if study.metric == "spider_lite":
        head.append("SPICE has not run everywhere: spider_lite stands in for SPIDEr, under its own name.")
    for state in ("not finished", "not of the test split"):
        paths = [str(run.path) for run in runs if run.state == state]
        if paths:
            head.append(f"**{state.capitalize()}** ({len(paths)} of {len(runs)} runs): {', '.join(paths)}")
    body, missing = report_body(study)
    if missing:
        head.append(f"**Missing**: {'; '.join(missing)}.")
    rows = []
    for run in runs:
        minutes = cell([run], *COSTS[1][1:])
        rows.append([f"`{run.path}`", run.config["seed"], run.config.get("git") or "-", minutes, run.state])
    body += ["## Where the numbers come from", table(["run", "seed", "commit", "minutes", "result"], rows)]
    text = "\n\n".join(part for part in head + body if part) + "\n"
    tmp = folder / "REPORT.md.tmp"
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, folder / "REPORT.md")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder with phases of runs, such as experiments/tiny")
    args = parser.parse_args()
    os.environ.pop("MPLBACKEND", None)  # a notebook sets it to one that may not be importable here
    try:
        text = report(args.folder)
    except FileNotFoundError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    shown = text.split("\n## Where the numbers come from")[0].splitlines()
    try:
        print("\n".join(line for line in shown if line.startswith(("#", "|", "**"))), flush=True)
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
