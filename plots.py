"""Tables, figures and REPORT.md from the files of finished runs. No model and no dataset is read.

    python plots.py experiments/tiny        # writes experiments/tiny/REPORT.md, captions.html, figures/*.png, *.pdf

Copy this file alone: it needs numpy and matplotlib. The report of an unfinished study names what is missing.
A run is FOLDER/phase/name_s<seed>/ with config.json, log.jsonl and result.json: the first beam of the test
split of its own data. Folders in it hold the same for what their names say: scst/, rerank/, with_<run>/,
on_<dataset>/, and what its branches were given. Tables choose runs by phase and by the flags in config.json.
"""
import argparse
import copy
import functools
import json
import os
import re
import sys
from base64 import b64encode
from collections import defaultdict
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import numpy as np

# How systems look, in the order of the tables: name, colour (Okabe and Ito's palette), marker, line.
STYLES = {
    "additive": ("additive", "#0072B2", "o", "-"),
    "cross_attention": ("cross-attention", "#D55E00", "s", "--"),
    "concat": ("concatenation", "#009E73", "^", "-."),
    "unfreeze": ("partial unfreeze", "#CC79A7", "D", ":"),
    "data_only": ("data-only (no audio)", "#555555", "x", (0, (1, 1)))}
EXPECTED = ("additive", "cross_attention", "concat", "unfreeze", "data_only")  # a study without one is not whole
NO_BASELINE = ("additive", "data_only")  # the system itself, and the one that hears nothing
VARIANTS = "v<>pdhX8"  # markers of one system with other flags, such as keep
# Titles of metrics, in the order of the tables. Any other number that the captions in predictions.json have
# among their scores is a metric too, under its own name.
TITLES = {
    "cider_d": "CIDEr-D", "spice": "SPICE", "spider": "SPIDEr", "spider_fl": "SPIDEr-FL",
    "fense": "FENSE", "sbert_sim": "sentence similarity", "fer": "fluency error rate",
    "spice_lite": "spice_lite", "spider_lite": "spider_lite", "meteor": "METEOR", "rouge_l": "ROUGE-L",
    "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3", "bleu_4": "BLEU-4",
    "clap_cosine": "CLAP cosine", "accuracy": "accuracy", "vocabulary": "vocabulary"}
# In tables, but without a panel in the figure of intervals: parts of other metrics, and what these replaced.
MINOR = {"spice", "spice_lite", "spider_lite", "sbert_sim", "fer", "rouge_l", "bleu_1", "bleu_2", "bleu_3", "bleu_4",
         "vocabulary"}
# Flags that say where a run lies; beside the seed, seeds of one system differ in these and in nothing else.
PLACE = {"seed", "out", "cache", "device", "folder", "git", "versions", "name"}
# What runs did that are older than a flag. Where a flag is not here, they did what None, 0 or False means.
OLDER = {"null_slot": False, "keep": 0.0, "keep_every": 1, "metric": "spider_lite"}
# Flags that are set together with another one, so that a table of that one does not tell them apart.
ALONG = {"steps": ["eval_every"], "keep": ["keep_qa", "keep_every", "probe"]}
KEEPING = {"keep", "null_slot", *ALONG["keep"]}  # all that a system with keep may have beside the plain one
SWEPT = {"keep": ["null_slot", "keep"], "gate_l2": ["gate_l2"]}  # the gates' regularisation: flags of a sweep
GIVEN = ("audio", "video", "shuffled", "unrelated")  # folders: what the branches were given
INSIDE = ("scst", "on_*", "with_*", *GIVEN)  # folders in a run that hold results of their own
# What sounds while a question about an image is asked. In conflict the clip's captions name another answer to it.
CONDITIONS = ("unrelated_clip", "silence", "noise", "conflict")
# In these the answers are the backbone's by construction: a few questions show it.
EXACT = ("nothing_attached", "gates_closed", "no_clip")
# columns of tables: title, key in Run.values, digits, scale
COUNT, WORDS = ("n", "n"), ("words", "mean_words", 1)
COSTS = [("trainable", "trainable"), ("minutes", "seconds", 1, 1 / 60)]
EFFICIENCY = [*COSTS, ("minutes to 90%", "seconds_to_90_percent", 1, 1 / 60),
              ("XE s/step", "seconds_a_step_xe", 2), ("SCST s/step", "seconds_a_step_scst", 2),
              ("training GB", "training_memory", 2, 1e-9), ("evaluation GB", "peak_memory", 2, 1e-9),
              ("clips/s", "clips_a_second", 1), ("GFLOP a clip", "flops_a_clip", 2, 1e-9), ("hardware", "hardware")]
# Published results on the released data: CIDEr, SPIDEr, SPIDEr-FL, FENSE; "-" where the source has none.
PUBLISHED = [
    ("frozen Vicuna-7B, linear projector, EAT", "AudioCaps", ".753", ".469", "-", "-", "SLAM-LLM, examples/aac_audiocaps"),
    ("the same with LoRA", "AudioCaps", ".792", ".489", "-", "-", "SLAM-LLM, examples/aac_audiocaps"),
    ("frozen LLaMA-2 7B, CLAP", "AudioCaps", ".704", "-", "-", "-", "AnyMAL"),
    ("frozen LLaMA-2 13B, CLAP", "AudioCaps", ".721", "-", "-", "-", "AnyMAL"),
    ("frozen LLaMA-2 70B, CLAP", "AudioCaps", ".778", "-", "-", "-", "AnyMAL"),
    ("SLAM-AAC", "AudioCaps", ".841", ".518", ".515", ".668", "SLAM-AAC"),
    ("SLAM-AAC", "Clotho", "-", ".332", ".330", ".540", "SLAM-AAC"),
    ("DCASE 2024 baseline", "Clotho", "-", "-", ".294", "-", "DCASE 2024, task 6")]


class InputError(ValueError):
    """A user's mistake in one line: what, where, what to do."""


# ---------------------------------------------------------------- reading

def load(path, kind=dict):
    """The content of a JSON file, None where there is no such file. Raises InputError for a damaged one."""
    return parse(path.read_bytes(), path, kind) if path.is_file() else None


def parse(text, place, kind=dict):
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is damaged ({error}): write it again, or take its run away")
    if not isinstance(content, kind):
        raise InputError(f"{place} is damaged (no {kind.__name__}): write it again, or take its run away")
    return content


class Run:
    """One stage of a run, or what it did with other data, other branches or other input.

    `stage` is xe or scst. `own`: its own data, nothing else attached, all branches given. `values` has what
    tables and figures show of it, by name.
    """

    def __init__(self, study, folder, config, log):
        self.folder, self.path = folder, folder.relative_to(study)
        self.phase, self.name = self.path.parts[:2]
        self.stem = re.sub(r"_s\d+$", "", self.name)
        # what lies in the run's folder says what it is; the run's own name and phase may be any
        inside = list(self.path.parts[2:])
        self.stage = "scst" if "scst" in inside[:1] else "xe"
        self.inside = inside[1:] if self.stage == "scst" else inside
        self.own = not self.inside
        # older runs lack some flags: from here on every run has them
        self.config, self.log = {**OLDER, **config}, log
        self.seed, self.system = self.config.get("seed", 0), self.config["fusion"]
        self.name_it()
        self.read_results()

    def name_it(self):
        """label, line and style; what was attached, what was given and which other data, from the folder."""
        name, colour, marker, self.line = STYLES.get(self.system, (self.system, "#000000", "P", "-"))
        self.style = {"color": colour, "marker": "*" if self.stage == "scst" else marker}
        self.label, self.attached, self.given, self.data = name, "", "all", ""
        if self.config["keep"]:
            self.label += " + keep"
        if self.stage == "scst":
            self.label += " + SCST"
        for part in self.inside:
            if part.startswith("with_"):  # seeds of what is attached are seeds of one system too
                self.attached = re.sub(r"_s\d+(?=_|$)", "", part.removeprefix("with_"))
                self.label += f", with {self.attached}"
            elif part.startswith("on_"):
                self.data = part.removeprefix("on_")
            else:
                self.given = part
                self.label += f", {part}"

    def read_results(self):
        self.result = load(self.folder / "result.json")
        unfinished = "not finished" if self.own else "VQA alone"
        self.state = "finished" if self.result else unfinished
        if self.result and self.result.get("split") != "test":  # every table is of the test split
            self.result, self.state = None, "not of the test split"
        self.card = load(self.folder / "run_card.json") or {}
        self.training = {}
        if self.own:
            home = self.folder.parent if self.stage == "scst" else self.folder
            self.training = load(home / "training.json") or {}
        self.reranked = load(self.folder / "rerank/result.json") if self.result else None
        self.retention = load(self.folder / "retention.json")
        self.robustness = load(self.folder / "robustness.json")
        self.values = {**self.vqa_values(), **self.result_values()}

    def result_values(self):
        """Costs and test scores of the first beam, by which systems are compared."""
        if not self.result:
            return {}
        # a metric of one's own is a mean over items; what result.json has under that name counts more
        values = {metric: float(np.mean(scores)) for metric, scores in self.scores.items()}
        values.update({**self.card, **self.result})
        values["n"] = str(self.result.get("n", "-"))
        values["trainable"] = f"{self.result.get('trainable_parameters', 0):,}"
        for layer, gate in self.result.get("gates", {}).items():
            values[f"gate_{layer}"] = abs(gate)
        # what reranking gains, and the most that it could
        for metric, score in (self.reranked or {}).get("oracle", {}).items():
            if score is not None:
                values[f"oracle_{metric}"] = score
                values[f"gain_{metric}"] = self.reranked[metric] - self.result[metric]
        stages = self.card.get("stages") or {}
        # the seconds of XE do not include the SCST that follows
        values["seconds"] = stages.get(self.stage, {}).get("seconds", self.result.get("train_seconds"))
        # one process trains both stages; a step of each takes its own time
        values["training_memory"] = self.training.get("peak_memory")
        values[f"seconds_a_step_{self.stage}"] = self.training.get("seconds_a_step", {}).get(self.stage)
        return values

    def vqa_values(self):
        """Visual question answering: unrelated_clip.accuracy and the like."""
        retention = self.retention
        if not retention:
            return {}
        values = {"questions": str(retention.get("n", "-"))}
        for condition, numbers in retention["conditions"].items():
            for key, value in numbers.items():
                values[f"{condition}.{key}"] = value
        # conflict can be made of some questions only
        if "conflict.n" in values:
            values["conflict.n"] = str(values["conflict.n"])
        # how much of the backbone's accuracy is left, in percent
        beside, alone = values.get("unrelated_clip.accuracy"), values.get("backbone.accuracy")
        if alone and beside is not None:
            values["relative"] = 100 * beside / alone
        # older files have these conditions among the others, on all questions
        exact = retention.get("exact")
        if exact is None:
            there = [name for name in EXACT if f"{name}.identical" in values]
            exact = {name: values[f"{name}.identical"] for name in there}
        if exact:
            values["exact"] = shown(all(exact.values()))
            values["exact_n"] = str(retention.get("exact_n", values["questions"]))
        return values

    @functools.cached_property
    def scores(self):
        """{metric: numbers of all captions}, of the first beam."""
        scores = defaultdict(list)
        for item in load(self.folder / "predictions.json", list) or []:
            # null: a metric that was not computed; true and false: no numbers
            for metric, score in item["scores"].items():
                if type(score) in (int, float):
                    scores[metric].append(score)
        return dict(scores)

    def row(self, values, style=None):
        """This run with the values of one row of a table, and with the look of one line in a figure."""
        other = copy.copy(self)
        other.values, other.style = values, style or self.style
        return other


class Study:
    """The runs below a folder, and the metric that compares them."""

    def __init__(self, folder):
        self.folder, self.runs = folder, read_runs(folder)
        self.metric = selection(self.runs)
        self.metric_name = TITLES[self.metric]
        core = [run for run in self.runs if run.phase == "core" and run.own]
        self.core = sum(grouped(core).values(), [])
        counts = [f", n = {run.values['n']}" for run in self.finished("core")]
        self.test_name = f"test {self.metric_name}{counts[0] if counts else ''}"  # of an axis
        self.kept = self.kept_systems()

    def finished(self, *phases):
        """Runs with test results on their own data, nothing else attached."""
        return [run for run in self.runs if run.result and run.own and run.phase in phases]

    def kept_systems(self):
        """{run with keep: the plain run of the same seed in core, from which it differs in keep alone}."""
        # by their flags and not by their names, in whatever phase they are trained
        pairs = {}
        for run in self.finished("core", "retention"):
            for plain in self.core:
                same = (run.system, run.stage, run.seed) == (plain.system, plain.stage, plain.seed)
                keeps = run.config["keep"] and not plain.config["keep"]
                if same and keeps and KEEPING.issuperset(differing(run, plain)):
                    pairs[run] = plain
        return pairs


def read_runs(folder):
    """Every stage of every run, finished or not. Phase 0 only checks that the parts work."""
    runs = []
    for file in sorted(folder.glob("*/*/config.json")):
        home, config = file.parent, load(file)
        if "fusion" not in config or home.parent.name == "sanity":
            continue
        for place in (home, *folders_inside(home)):
            try:
                run = Run(folder, place, config, read_log(home / "log.jsonl") if place == home else [])
            except (KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{place}: a file there is not as evaluate.py writes it ({error!r}): write it again")
            # a stage may be missing; whatever else lies in a run counts if it has results
            if run.own or run.result or run.retention:
                runs.append(run)
    return runs


def folders_inside(folder):
    """Folders with results of their own: scst, scst/on_clotho, with_video_s0/shuffled and the like."""
    found = []
    for pattern in INSIDE:
        for path in sorted(folder.glob(pattern)):
            if path.is_dir():
                found += [path, *folders_inside(path)]
    return found


def read_log(path):
    """The lines of a run's log. One that is being written may end in half a line."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def selection(runs):
    """The metric of a study: what all finished runs chose their checkpoints by. Questions have another one."""
    chosen = {run.config["metric"] for run in runs if run.result} - {"accuracy"}
    return "spider" if chosen == {"spider"} else "spider_lite"


def metrics_of(runs):
    """Known metrics in their order, then every other number that captions have, under its own name."""
    found = dict(TITLES)
    for run in runs:
        for metric in run.scores:
            found.setdefault(metric, metric)
    return found


# ---------------------------------------------------------------- which runs are seeds of one system

def differing(run, other):
    """{flag: the value of `run`} where two runs differ in more than their seed and where they lie."""
    flags = {}
    for flag in {**other.config, **run.config}:
        # how SCST is done says nothing about the XE stage before it
        later = flag.startswith("scst") and "scst" not in (run.stage, other.stage)
        if flag in PLACE or later:
            continue
        a, b = or_none(run.config.get(flag)), or_none(other.config.get(flag))
        # equal as they are, or when each run's own seed in a path is left out
        if a != b and without_seed(a, run.seed) != without_seed(b, other.seed):
            flags[flag] = json.loads(without_seed(a, run.seed))
    return flags


def or_none(value):
    """A flag's value; None for all that is the same as leaving the flag away."""
    return None if value == "auto" or not value else value


def without_seed(value, seed):
    """A value as text, with `_s<seed>` left out of paths: core/additive_s0 is seed 0's core/additive."""
    return re.sub(rf"_s{seed}(?!\d)", "", json.dumps(value))


def differences(runs):
    """{run: ["encoder ast", ...]}: in which flags each run differs from most of these runs."""
    # the usual one: most seeds, then core before the sweeps, the longest training, the shortest name
    def rank(run):
        alike = sum(not differing(other, run) for other in runs)
        return alike, run.phase == "core", run.config.get("steps") or 0, -len(run.name)

    usual = max(runs, key=rank)
    flags, texts = {run: differing(run, usual) for run in runs}, {}
    for run in runs:
        texts[run] = []
        for flag, value in flags[run].items():
            text = shown(value)
            # two folders may have one last part: then the whole path is shown
            others = [flags[other].get(flag, usual.config.get(flag)) for other in runs]
            if any(other != value and shown(other) == text for other in others):
                text = str(value)
            name = f"no {title(flag)}" if value is None else title(flag)
            # 1 equals True, but a weight of 1 is to be read
            texts[run].append(name if value is None or value is True else f"{name} {text}")
    return texts


def title(flag):
    return flag.replace("_", " ").replace("l2", "L2")


def shown(value):
    """The value of a flag as a table shows it; of a path its last part."""
    if isinstance(value, list):
        return " ".join(map(shown, value))
    if isinstance(value, str):
        return value.rstrip("/").rpartition("/")[2]
    if value is None or isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, (int, float)) else json.dumps(value)


def grouped(runs, cells=lambda run: (run.label,)):
    """{cells of a row: runs}, in the order of systems, of stages and of names.

    Runs whose cells are the same are seeds of one system. If they are not, what differs is added to the first cell.
    """
    # systems that this file has never heard of come last
    order = [*STYLES, *sorted({run.system for run in runs} - set(STYLES))]
    alike = defaultdict(list)
    for run in sorted(runs, key=lambda run: (order.index(run.system), run.stage == "scst", run.label)):
        alike[cells(run)].append(run)
    groups = defaultdict(list)
    for (first, *rest), group in alike.items():
        told = differences(group)
        for run in sorted(group, key=told.get):  # the usual one has nothing to tell and is the first
            groups[", ".join([first, *told[run]]), *rest].append(run)
    return groups


def sweep(runs, flags):
    """Families of XE runs that differ in these flags, in steps and in what goes along: [{(label, values): runs}]."""
    columns = [*flags, "steps"]
    free = set(columns).union(*[ALONG.get(flag, []) for flag in columns])
    # a run belongs to the first family from which it differs in nothing but what may differ
    families = []
    for run in [run for run in runs if run.stage == "xe"]:
        for family in families:
            if free.issuperset(differing(run, family[0])):
                family.append(run)
                break
        else:  # there is no such family yet
            families.append([run])
    # a family with one value has nothing to compare
    several = []
    for family in families:
        values = {tuple(row_of(run, flags)) for run in family}
        if len(values) > 1:
            family.sort(key=lambda run: [order_of(run.config.get(flag)) for flag in columns])
            several.append(grouped(family, lambda run: (run.label, *row_of(run, columns))))
    return several


def row_of(run, flags):
    return [shown(run.config.get(flag)) for flag in flags]


def order_of(value):
    """Numbers by size, then all else by its text."""
    number = isinstance(value, (int, float))
    return not number, value if number else shown(value)


def best_baseline(runs, metric, keep):
    """(system, {system: mean validation score}) of the baselines with or without keep. No test score is used."""
    rivals = []
    for run in runs:
        trained = run.result and run.own and run.stage == "xe" and run.phase in ("core", "retention")
        if trained and bool(run.config["keep"]) == keep and run.system not in NO_BASELINE:
            rivals.append(run)
    scores = {}
    for (system,), group in grouped(rivals, lambda run: (run.system,)).items():
        values = [run.result.get("validation", {}).get(f"val_{metric}") for run in group]
        if None not in values:
            scores[system] = float(np.mean(values))
    return max(scores, key=scores.get, default=None), scores


def headlines(study):
    """{name of a comparison: (what it is, best baseline, validation scores)}, the headline first."""
    found = {}
    # systems that keep are compared with each other; where no baseline keeps, the plain ones are the headline
    for keep, pattern in ((True, "additive_keep_vs_{}_keep"), (False, "additive_vs_{}")):
        best, means = best_baseline(study.runs, study.metric, keep)
        if best:
            found[pattern.format(best)] = ("without keep" if found else "headline", best, means)
    return found


# of each metric in a comparison
COMPARED = {"a", "b", "difference", "ci95", "bca95", "p", "p_holm", "p_randomisation", "effect_size"}


def comparisons(study):
    """{name: what bootstrap.py compare --json wrote}, the headline first."""
    first = headlines(study)
    files = {file.stem: file for file in sorted((study.folder / "statistics").glob("*.json"))}
    found = {}
    for stem in dict.fromkeys([*first, *files]):
        content = load(files[stem]) if stem in files else {}
        if isinstance(content.get("runs"), dict):  # not what `bootstrap.py seeds --json` writes
            if not all(COMPARED <= numbers.keys() for numbers in content["metrics"].values()):
                raise InputError(f"{files[stem]}: lacks some of {', '.join(sorted(COMPARED))}: compare the runs again")
            name = stem.replace("_", " ")
            seeds = "/".join(str(len(content["runs"][side])) for side in "ab")
            mark = f"**{first[stem][0]}:** {name}" if stem in first else name
            found[stem] = {**content, "seeds": seeds, "name": name, "title": mark}
    return found


def headline_sentences(study):
    """What the study is about, for the top of the report: each headline with its difference."""
    found, sentences = comparisons(study), []
    for stem, (mark, best, means) in headlines(study).items():
        rivals = ", ".join(f"{system} {mean:.3f}" for system, mean in means.items())
        text = f"**{mark.capitalize()}**: {stem.replace('_', ' ')}, the best baseline on validation ({rivals}). "
        r = found.get(stem, {}).get("metrics", {}).get(study.metric)
        if r:
            low, high = r["ci95"]
            text += (f"Test {study.metric_name} {r['a']:.3f} and {r['b']:.3f}: {r['difference']:+.3f} [{low:+.3f}, "
                     f"{high:+.3f}], p = {r['p']:.2g}, n = {found[stem]['n']}, seeds {found[stem]['seeds']}.")
        else:
            text += "Not compared yet (phase 4)."
        sentences.append(text)
    return sentences


def other_clips(runs):
    """A sentence where runs that stand in one table have other clips; else nothing."""
    datasets = defaultdict(lambda: defaultdict(list))
    for run in runs:
        # the hash in the run card tells clips apart where their number is the same
        dataset = run.card.get("dataset") if isinstance(run.card.get("dataset"), dict) else {}
        name = run.data or run.result.get("dataset") or run.config.get("dataset")
        clips = f"n = {run.values['n']}" + (f" ({dataset['hash'][:12]})" if dataset.get("hash") else "")
        datasets[name][clips].append(run)
    sentences = []
    for name, sets in datasets.items():
        if len(sets) > 1:
            parts = [f"{clips} in {folders(group)}" for clips, group in sets.items()]
            sentences.append(f" **Other clips:** not all runs have the same clips of {name}: {', '.join(parts)}.")
    return "".join(sentences)


def judge(runs):
    """A sentence about the CLAP that gave captions a cosine, where one did."""
    names = set()
    for run in runs:
        path = (run.card.get("clap") or {}).get("scores")
        if path and run.values.get("clap_cosine") is not None:
            names.add(shown(path))
    if not names:
        return ""
    return f" CLAP cosine: of sound and caption, by {', '.join(sorted(names))}, which took part in nothing else."


# ---------------------------------------------------------------- tables: Markdown, or None without rows

def cell(runs, key, digits=3, scale=1.0):
    """'0.512 ± 0.004': mean and sample standard deviation over seeds; a single value has its interval."""
    values = [run.values[key] for run in runs if run.values.get(key) is not None]
    if not values:
        return "-"
    # text, such as n: once where all seeds agree
    if isinstance(values[0], str):
        return " ".join(values) if len(set(values)) > 1 else values[0]
    values = np.multiply(values, scale)
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        return f"{text} ± {values.std(ddof=1):.{digits}f}"
    interval = runs[0].values.get(f"{key}_ci95")
    if interval and len(runs) == 1:
        low, high = np.multiply(interval, scale)
        return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"
    return text


def folders(runs):
    """Where a row comes from, seeds together: `core/additive_s{0,1}`."""
    seeds = defaultdict(list)
    for run in runs:
        # what is attached has the seed in its name too
        path = re.sub(rf"_s{run.seed}(?=/|$)", "_s{}", run.path.as_posix())
        seeds[path].append(str(run.seed))
    names = []
    for path, group in seeds.items():
        seed = "{" + ",".join(group) + "}" if len(group) > 1 else group[0]
        names.append(f"`{path.replace('{}', seed)}`")
    return "; ".join(names)


def table(head, rows, texts=1):
    """Markdown; the first `texts` columns and the last are flush left."""
    if not rows:
        return None
    rule = ["---"] * texts + ["---:"] * (len(head) - texts - 1) + ["---"]
    lines = [" | ".join(map(str, row)) for row in (head, rule, *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def run_table(head, groups, columns):
    """A row for each of {cells under head: runs of all seeds}, without columns that no run has values for."""
    runs = sum(groups.values(), [])
    # a column without values would only make the table wider
    filled = []
    for column in columns:
        if any(run.values.get(column[1]) is not None for run in runs):
            filled.append(column)
    rows = []
    for cells, group in groups.items():
        numbers = [cell(group, *column[1:]) for column in filled]
        rows.append([*cells, len(group), *numbers, folders(group)])
    titles = [column[0] for column in filled]
    return table([*head, "seeds", *titles, "runs"], rows, len(head))


def table_overview(study):
    """What each system hears and sees, without keep and with it: a row for each system, SCST and reranking included."""
    # beside each plain run one that keeps: a sweep over weights, as long as core, has several, and core's is the first
    kept = {plain: run for run, plain in reversed(study.kept.items())}
    rows = defaultdict(lambda: ([], []))  # {name: (plain runs, runs with keep)}
    for run in dict.fromkeys([*[run for run in study.core if run.result], *kept.values()]):
        name, keeps = run.label.replace(" + keep", ""), bool(run.config["keep"])
        rows[name][keeps].append(run)
        if run.reranked:
            rows[f"{name}, reranked"][keeps].append(run.row({**run.values, "cider_d": run.reranked["cider_d"]}))
    lines = []
    for name, sides in rows.items():
        line = [name]
        for side in sides:
            line += [len(side) or "-", cell(side, "cider_d"), cell(side, "unrelated_clip.accuracy", 1, 100)]
        lines.append([*line, folders(dict.fromkeys(sum(sides, [])))])
    head = ["system"]
    for side in "plain", "keep":
        head += [f"{side}: seeds", "CIDEr-D", "VQA"]
    return table([*head, "runs"], lines)


def score_columns(runs):
    """A column for each metric that these runs may have: scores are fractions, a vocabulary is a number of words."""
    return [(name, metric, 0 if metric == "vocabulary" else 3) for metric, name in metrics_of(runs).items()]


def table_scores(runs, head):
    """Every metric that these runs have, a row for each system."""
    columns = [COUNT, *score_columns(runs), WORDS, *COSTS]
    return run_table(head, grouped(runs, score_cells), columns)


def score_cells(run):
    """What tells the rows of a table of scores apart, beside the flags."""
    if run.data:
        return run.label, run.phase, run.data
    if run.phase == "clotho":
        return run.label, "AudioCaps checkpoint" if run.config.get("init") else "Clotho alone"
    if run.phase == "video":
        return run.stem, run.config.get("modality", "audio"), run.given
    return (run.label,)


def table_sweep(study, flags):
    """One table for each family of runs that differ in these flags alone."""
    head = ["system", *map(title, flags), "steps"]
    scores = [(TITLES[metric], metric) for metric in (study.metric, "cider_d", "meteor")]
    tables = []
    for family in sweep(study.finished("core", "ablation", "retention", "appendix"), flags):
        # the gates of every layer that any of them has
        layers = set()
        for run in sum(family.values(), []):
            layers.update(run.config["layers"])
        gates = [(f"gate size, layer {layer}", f"gate_{layer}") for layer in sorted(layers)]
        tables.append(run_table(head, family, [COUNT, *scores, WORDS, *gates, *COSTS]))
    return "\n\n".join(tables) or None


def table_decoding(study):
    """Scores of the ways to choose among the candidates of a reranked run."""
    rows = defaultdict(list)
    runs = [run for run in study.finished("core", "ablation", "clotho", "retention") if run.reranked]
    for (label, phase), group in grouped(runs, lambda run: (run.label, run.phase)).items():
        for run in group:
            # each way of choosing is a row, with its own scores in place of the run's
            chosen = run.reranked
            weights = [f"{weight:g}" for weight in chosen["reranker"]["weights"].values()]
            ways = {"first beam": run.values,
                    "reranked": {**chosen, **chosen["diversity"], "weights": "/".join(weights)},
                    "reranked with another clip's audio": chosen["other_clip"], "oracle": chosen["oracle"]}
            for way, scores in ways.items():
                values = {**scores, "n": str(chosen.get("n", run.values["n"]))}
                if scores.get(study.metric) is not None:
                    values["gain"] = scores[study.metric] - run.values[study.metric]
                rows[label, phase, way].append(run.row(values))
    return run_table(["system", "phase", "decoding"], rows, [
        COUNT, *score_columns(runs), (f"gain, {study.metric_name}", "gain"), WORDS, ("self-BLEU", "self_bleu"),
        ("distinct-1", "distinct_1"), ("distinct-2", "distinct_2"), ("candidates", "candidates"),
        ("weights of each seed", "weights")])


def table_retention(study):
    """VQA beside sounds that have nothing to do with the question: the backbone, the main system, all others."""
    runs = []
    for run in study.runs:
        if run.phase in ("core", "ablation", "retention", "video") and "backbone.accuracy" in run.values:
            runs.append(run)
    if not runs:
        return None
    # a video branch differs from the others in more flags than a cell can show
    groups = grouped(runs, lambda run: (run.stem if run.phase == "video" else run.label,))
    # the backbone answers the same whatever sounds; conflict is about other questions
    first = next(iter(groups.values()))[0]
    alone = {"questions": first.values["questions"], "relative": 100.0}
    for key, value in first.values.items():
        if key.startswith("backbone."):
            for condition in ("unrelated_clip", "silence", "noise"):
                alone[key.replace("backbone", condition)] = value
    rows = {("backbone (before audio)",): [first.row(alone)]}
    # the main system comes right after it: after XE, after SCST
    for cells in (("additive + keep",), ("additive + keep + SCST",)):
        if cells in groups:
            rows[cells] = groups[cells]
    columns = [("questions", "questions")]
    for name in CONDITIONS:
        columns.append((name.replace("_", " "), f"{name}.accuracy", 1, 100))
    columns.append(("conflict, questions", "conflict.n"))
    for name in CONDITIONS:
        columns.append((f"loss, {name.replace('_', ' ')}", f"{name}.loss", 1, 100))
    columns += [("relative retention", "relative", 1), ("agreement", "unrelated_clip.agreement", 1, 100),
                ("NLL", "unrelated_clip.nll"), ("exact", "exact")]
    return run_table(["system"], {**rows, **groups}, columns)


def table_tries(study):
    """Runs of the second modality, until it costs the first two no more than the tolerance."""
    decision = load(study.folder / "phase3/decision.json") or {"tries": []}
    rows = []
    for t in decision["tries"]:
        row = [f"{t['keep']:g}", f"{t['gate_l2']:g}"]
        for kind in ("audio", "vl"):
            row += [f"{t[kind][key]:.2f}" for key in ("before", "after", "loss")]
            row.append("[{:.2f}, {:.2f}]".format(*t[kind]["loss_ci95"]))
        run = Path(t["run"])
        # decision.json does not say n; the folders that it was made from do
        beside = [other for other in study.runs if f"with_{run.name}" in other.inside]
        clips = [other for other in beside if other.given == "unrelated"]
        row += [shown(t["clean_identical"]), f"{decision['tolerance']:g}", shown(t["within"])]
        rows.append([*row, cell(clips, "n"), cell(beside, "questions"), f"`{run.parent.name}/{run.name}`"])
    return table(["keep", "gate L2", "captions before", "after", "loss", "95%", "VQA before", "after", "loss", "95%",
                  "clean identical", "tolerance", "within", "n clips", "n questions", "run"], rows)


def table_senses(study):
    """What two senses, trained apart and attached together, cost each other and know together."""
    beside = defaultdict(list)
    for run in study.runs:
        if run.attached and run.stage == "xe":
            beside[run.phase, run.attached].append(run)
    # of several tries the last one counts
    first = [key for key in sorted(beside) if key[0] in ("core", "retention") and key[1].startswith("video")]
    if not first:
        return None
    phase, second = first[-1]
    homes = {run.path.parts: run for run in study.runs}
    rows = defaultdict(list)
    for run in beside[phase, second]:
        # what the audio branch does alone: the run in whose folder this is
        alone = homes[run.path.parts[:2]]
        if run.result and run.given == "unrelated" and alone.result:
            rows["audio captions", "audio alone"].append(alone)
            rows["audio captions", "beside an unrelated video"].append(run)
        elif "unrelated_clip.accuracy" in run.values and "unrelated_clip.accuracy" in alone.values:
            rows["answers", "beside an unrelated clip"].append(alone.row(answer_values(alone)))
            rows["answers", "beside an unrelated clip and video"].append(run.row(answer_values(run)))
    given = {"all": "both", "audio": "audio alone", "video": "video alone", "shuffled": "another clip's video"}
    # the other way round: the folder of the video branch, with the audio branch attached
    for run in beside["video", beside[phase, second][0].stem]:
        if run.result and run.stem == second and run.given in given:
            rows["videos with sound", given[run.given]].append(run)
    order = ("audio captions", "answers", "videos with sound")
    groups = dict(sorted(rows.items(), key=lambda row: order.index(row[0][0])))
    return run_table(["what", "given"], groups, [
        COUNT, (study.metric_name, study.metric), ("CIDEr-D", "cider_d"), ("VQA accuracy", "accuracy", 1, 100)])


def answer_values(run):
    """Accuracy and its interval beside an unrelated clip, with the number of questions as n."""
    values = {"n": run.values["questions"]}
    for key in ("accuracy", "accuracy_ci95"):
        values[key] = run.values.get(f"unrelated_clip.{key}")
    return values


def noise_rows(study):
    """({(label, kind of noise): runs}, signal-to-noise ratios): scores by ratio in dB and "clean"."""
    rows, ratios = defaultdict(list), set()
    runs = [run for run in study.runs if study.metric in (run.robustness or {}).get("clean", {})]
    for run, (label, style) in looks(runs).items():
        for kind, noise in run.robustness["noise"].items():
            values = {"n": str(run.robustness["n"])}
            for ratio, scores in {"clean": run.robustness["clean"], **noise}.items():
                score, half = scores[study.metric], scores.get("half_width_95", 0)
                values[ratio] = score
                # the table has it where there is one seed
                if half:
                    values[f"{ratio}_ci95"] = [score - half, score + half]
            rows[label, kind].append(run.row(values, style))
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
            row = [comparison["title"], TITLES.get(metric, metric), comparison["n"], comparison["seeds"],
                   f"{r['a']:.3f}", f"{r['b']:.3f}", f"{r['difference']:+.3f}"]
            for key in ("ci95", "bca95"):
                row.append("[{:+.3f}, {:+.3f}]".format(*r[key]))
            for key in ("p", "p_holm", "p_randomisation", "effect_size"):
                row.append("-" if r[key] is None else f"{r[key]:.2g}")
            rows.append([*row, f"`statistics/{file}.json`"])
    return table(["A - B", "metric", "n", "seeds A/B", "A", "B", "difference", "95% percentile", "95% BCa",
                  "p", "p Holm", "p randomisation", "effect size", "file"], rows, 2)


def dropped_items(study):
    """A sentence for each comparison of runs that do not have the same clips."""
    sentences = []
    for comparison in comparisons(study).values():
        a, b = (comparison.get("dropped", {}).get(side, 0) for side in "ab")
        if a or b:
            sentences.append(f" **Other clips:** {comparison['name']} compares the n = {comparison['n']} clips that "
                             f"both have and leaves out {a} of A, {b} of B.")
    return "".join(sentences)


def table_targets(study):
    """What this study aims at with the released models, beside the additive system's result here."""
    metric, name, points = study.metric, study.metric_name, "VQA accuracy, percentage points"
    # SPIDEr-FL where the detector of fluency errors has run, else what comes closest
    fluent = any(run.values.get("spider_fl") is not None for run in study.runs)
    fl, fl_name = ("spider_fl", "SPIDEr-FL") if fluent else (metric, f"{name}, no fluency penalty")
    # where a name is not said, the system that keeps counts, and the plain one where there is none
    both, plain, keep = ("additive_keep", "additive"), ("additive",), ("additive_keep",)
    rows, loss = [], "unrelated_clip.loss"
    for aim, target, measure, phase, stems, stage, key in (
            ("AudioCaps SPIDEr, XE", "≥ 0.50", name, "core", both, "xe", metric),
            ("AudioCaps SPIDEr, XE + SCST", "≥ 0.52", name, "core", both, "scst", metric),
            ("AudioCaps SPIDEr-max", "≥ 0.53", name, "core", both, "xe", f"oracle_{metric}"),
            ("AudioCaps METEOR, XE", "≥ 0.24", "METEOR", "core", both, "xe", "meteor"),
            ("Clotho SPIDEr-FL", "≥ 0.33", fl_name, "clotho", both, "xe", fl),
            ("reranker's gain in SPIDEr", "≥ 0.02", name, "core", both, "xe", f"gain_{metric}"),
            ("VQA loss, no clip", "0", "the backbone's own answers", "core", both, "xe", "exact"),
            ("VQA loss, unrelated clip", "≤ 0.5", points, "core", plain, "xe", loss),
            ("VQA loss, unrelated clip, with keep", "≤ 0.5", points, "core", keep, "xe", loss),
            ("VQA loss, unrelated clip, with keep and SCST", "≤ 0.5", points, "core", keep, "scst", loss)):
        runs = target_runs(study, phase, stems, stage, key)
        scale = (2, 100) if measure == points else (3, 1)
        count = {"exact": "exact_n", loss: "questions"}.get(key, "n")
        system = runs[0].label if runs else "-"
        reached = cell(runs, key, *scale) if runs else "missing"
        rows.append([aim, target, measure, system, reached, cell(runs, count), folders(runs) or "-"])
    finished = any(run.result for run in study.runs)
    head = ["aim at full scale", "value", "measured here as", "system", "here", "n", "runs"]
    return table(head, rows if finished else [], 4)


def target_runs(study, phase, stems, stage, key):
    """The seeds of the first of these names that has this value."""
    for stem in stems:
        runs = []
        for run in study.finished(phase, "retention" if phase == "core" else phase):
            if run.stem == stem and run.stage == stage and run.values.get(key) is not None:
                runs.append(run)
        if runs:
            # names are free: of runs of one name only those that are seeds of one system
            return next(iter(grouped(runs).values()))
    return []


# ---------------------------------------------------------------- figures
# Each draws on an empty figure and returns its caption. Where there is no data it draws and returns nothing.

def looks(runs):
    """{run: (label, style)}: variants of a system, such as with keep, have a label and a marker each."""
    found, variants = {}, defaultdict(list)
    for (label,), group in grouped(runs).items():
        for run in group:
            alike = variants[run.system, run.stage]
            if label not in alike:
                alike.append(label)
            k = alike.index(label)
            marker = run.style["marker"]
            if k:
                # from the other end after SCST: additive + keep must not look like additive + keep + SCST
                place = -k if run.stage == "scst" else k - 1
                marker = VARIANTS[place % len(VARIANTS)]
            found[run] = label, {**run.style, "marker": marker}
    return found


def draw_log(ax, run, event, key, name, **look):
    """A key of a run's log against the training step. SCST is hollow and follows the last step of XE."""
    # SCST starts where XE ended, so that its steps are counted on
    last = max((line["step"] for line in run.log if line.get("stage") == "xe"), default=0)
    for stage, start, label, fill in (("xe", 0, name, None), ("scst", last, f"{name}, SCST", "white")):
        steps, values = [], []
        for line in run.log:
            if line.get("event") == event and line["stage"] == stage and key in line:
                steps.append(start + line["step"])
                values.append(line[key])
        if steps:
            ax.plot(steps, values, mfc=fill, lw=1.2, ms=4, label=label, **look)


def draw_scores(ax, study, key, scale=1, apart=1.0):
    """Test score of core's runs and of those with keep against another of their values.

    Hollow: with keep. A dashed line leads to the plain run of the same seed. apart: the factor between systems
    that have about the same value, so that they stand side by side.
    """
    points, runs = {}, [*study.core, *(run for run in study.kept if run.phase != "core")]
    runs = [run for run in runs if study.metric in run.values and key in run.values]
    values, shifts = [], {}
    for run, (label, style) in looks(runs).items():
        x, y, interval = scale * run.values[key], run.values[study.metric], None
        # systems drawn before that would be covered
        if label not in shifts:
            shifts[label] = apart ** sum(abs(x - other) < 0.1 * x for other in values)
            values.append(x)
        x *= shifts[label]
        # an interval has two ends, errorbar wants two lengths
        if f"{key}_ci95" in run.values:
            low, high = run.values[f"{key}_ci95"]
            interval = [[x - scale * low], [scale * high - x]]
        fill = "white" if run.config["keep"] else style["color"]
        ax.errorbar(x, y, half_width(run, study.metric), interval, ls="", ms=6, mfc=fill, elinewidth=0.5,
                    alpha=0.9, label=label, **style)
        points[run] = x, y
    for run, plain in study.kept.items():
        if run in points and plain in points:
            ax.plot(*zip(points[plain], points[run]), color="black", lw=0.7, ls=(0, (5, 2)), zorder=1)
    ax.set_ylabel(study.test_name)


def half_width(run, metric):
    """Half the 95% interval of a mean over test clips; 0 without predictions."""
    scores = run.scores.get(metric, [])
    return 1.96 * float(np.std(scores, ddof=1)) / len(scores) ** 0.5 if len(scores) > 1 else 0.0


def figure_curves(study, figure):
    counts, ax = [], None
    for run, (label, style) in looks(study.core).items():
        counts += [line["val_n"] for line in run.log if "val_n" in line]
        if counts:
            ax = ax or figure.subplots()
            draw_log(ax, run, "validation", f"val_{study.metric}", label, ls=run.line, **style)
    if ax is None:
        return None
    ax.set(xlabel="training step", ylabel=f"validation {study.metric_name}, n = {counts[0]}")
    return ("Validation score against training step, greedy decoding, one line for each seed. Hollow: SCST, which "
            "starts from the best XE checkpoint.")


def figure_gates(study, figure):
    ax = None
    for run, (label, style) in looks(study.core).items():
        for k, layer in enumerate(run.config["layers"]):
            key = f"gate_{layer}"
            if any(key in line for line in run.log):
                ax = ax or figure.subplots()
                line = ("-", "--", ":", "-.")[k % 4]
                draw_log(ax, run, "step", key, f"{label}, layer {layer}", ls=line, markevery=0.2, **style)
    if ax is None:
        return None
    ax.axhline(0, color="black", lw=0.6)
    ax.set(xlabel="training step", ylabel="gate")
    return ("Gates against training step, one line for each seed and layer: α of additive and data-only, tanh α of "
            "cross-attention and partial unfreeze. Hollow: SCST.")


def figure_pareto(study, figure):
    if not study.finished("core"):
        return None
    ax = figure.subplots()
    draw_scores(ax, study, "trainable_parameters", apart=1.03)
    ax.set(xscale="log", xlabel="trainable parameters")
    return ("Test score against trainable parameters, one point for each run with its 95% interval over clips. Systems "
            "with about the same number stand side by side, each 3% to the right. Hollow: with keep; a dashed line leads "
            "to the plain run of the same seed.")


def figure_frontier(study, figure):
    key = "unrelated_clip.loss"
    runs = [run for run in study.finished("core", "ablation", "retention") if key in run.values]
    if not runs:
        return None
    figure.set_size_inches(8.6, 4.6)
    ax = figure.subplots()
    ax.axvline(0, color="black", lw=0.8, ls=":", label="backbone alone")
    draw_scores(ax, study, key, 100)
    draw_sweeps(ax, study, runs, key)
    # most systems lose much, those that keep next to nothing: linear within a point of the backbone, then logarithmic
    ax.set_xscale("symlog", linthresh=1, linscale=1.2)
    ax.invert_xaxis()
    ticks = []
    for loss in (-3, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if min(ax.get_xlim()) <= loss <= max(ax.get_xlim()):
            ticks.append(loss)
    ax.set_xticks(ticks, [f"{loss:g}" for loss in ticks])
    ax.minorticks_off()
    ax.set_xlabel("VQA accuracy lost beside an unrelated clip, percentage points")
    return ("Test score against the VQA accuracy that is lost beside an unrelated clip, one point for each run with 95% "
            "intervals; linear up to one percentage point, then logarithmic. Hollow: with keep; a dashed line leads to the "
            "plain run of the same seed. Solid grey and black lines: shorter runs along a weight of the gates' "
            "regularisation, whose values the numbers are.")


def draw_sweeps(ax, study, runs, key):
    """A line for each family along a weight of the gates' regularisation, with the weights beside its points."""
    # core's runs and those with keep beside them are points, not a sweep
    others = [run for run in runs if run.phase != "core" and run not in study.kept]
    for (flag, flags), colour, below in zip(SWEPT.items(), ("black", "0.5"), (4, -9)):
        for family in sweep(others, flags):
            xs, ys = [], []
            for (*_, weight, _), group in family.items():
                xs.append(np.mean([100 * run.values[key] for run in group]))
                ys.append(np.mean([run.values[study.metric] for run in group]))
                ax.annotate(weight, (xs[-1], ys[-1]), (3, below), textcoords="offset points", fontsize=7, color=colour)
            ax.plot(xs, ys, color=colour, lw=0.9, marker=".", label=f"{group[0].system}, along {title(flag)}", zorder=4)


def figure_intervals(study, figure):
    found = list(comparisons(study).values())
    if not found:
        return None
    there = set().union(*(comparison["metrics"] for comparison in found))
    metrics = []
    # CIDEr-D is what SCST rewards: the measures that know fluency stand beside it, and whatever somebody has added
    for metric in [*TITLES, *sorted(there - set(TITLES))]:
        if metric in there and (metric == study.metric or metric not in MINOR):
            metrics.append(metric)
    figure.set_size_inches(5 + 1.8 * len(metrics), 1.2 + 0.3 * len(found))
    axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for ax, metric in zip(axes, metrics):
        for row, comparison in enumerate(found):
            r = comparison["metrics"].get(metric)
            if r:
                ax.plot(r["ci95"], [-row, -row], color="black", lw=1, marker="|")
                ax.plot(r["difference"], -row, color="black", marker="o", ms=5)
                ax.text(1.02, -row, f"p {r['p']:.2g}", transform=ax.get_yaxis_transform(), va="center", fontsize=7)
        ax.axvline(0, color="black", lw=0.7, ls=":")
        ax.set(xlabel=f"difference in {TITLES.get(metric, metric)}", ylim=(0.4 - len(found), 0.6))
    labels = [f"{c['name']}, n = {c['n']}, seeds {c['seeds']}" for c in found]
    axes[0].set_yticks([-row for row in range(len(found))], labels, fontsize=7)
    return "Differences A - B with 95% percentile intervals and two-sided p, 10,000 resamples."


def figure_snr(study, figure):
    rows, ratios = noise_rows(study)
    if not rows:
        return None
    kinds = list(dict.fromkeys(kind for _, kind in rows))
    figure.set_size_inches(8.6, 3.8)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for (label, kind), group in rows.items():
        ax = axes[kinds.index(kind)]
        ax.set_xlabel(f"dB; noise: {'another clip' if kind == 'clip' else kind}")
        for run in group:
            scores = [run.values.get(ratio, np.nan) for ratio in ratios]
            ax.plot(ratios, scores, ls=run.line, lw=1.2, ms=4, label=label, **run.style)
    axes[0].set_ylabel(study.test_name)
    return "Test score against signal-to-noise ratio, greedy decoding, one line for each seed."


def figure_attention(study, figure):
    senses = load(study.folder / "senses.json")
    if senses is None:
        return None
    figure.set_size_inches(8.6, 1.2 + 0.28 * len(senses["prompts"]))
    ax = figure.subplots()
    look = {"audio": ("#0072B2", "o"), "video": ("#D55E00", "s")}
    for row, prompt in enumerate(senses["prompts"]):
        for sense, shares in prompt["open"].items():
            colour, marker = look[sense]
            shares = np.multiply(100, shares)
            # the range of the seeds, and their mean; the branch that the prompt is meant for is filled
            ax.plot([shares.min(), shares.max()], [-row, -row], color=colour, lw=1)
            own = sense == prompt["sense"]
            ax.plot(shares.mean(), -row, color=colour, marker=marker, mfc=colour if own else "white", ls="",
                    label=f"{sense} branch, {'its own' if own else 'not its'} prompt")
    texts = [f"{prompt['text']}{' (trained)' if prompt['trained'] else ''}" for prompt in senses["prompts"]]
    ax.set_yticks([-row for row in range(len(texts))], texts, fontsize=7)
    ax.set(xlabel="attention that is not on the null slot, %", xlim=(-3, 103))
    counts = ", ".join(f"{sense} {len(runs)}" for sense, runs in senses["runs"].items())
    return (f"How much each branch reads of its sense at each prompt: mean and range over runs ({counts}). Filled: the "
            "prompt asks for this sense.")


# ---------------------------------------------------------------- the page to listen
# captions.html is one file that opens from the disk: its text is data that a script puts on the page as text.

# conditions of the probe that the page shows where a run was asked under them
ANSWERED = ("backbone", *CONDITIONS)

# {policy} allows this style, this script, and pictures and sounds beside the page; no network, no other code
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Captions to listen to</title>
<style>{style}</style>
</head>
<body>
<h1>Captions to listen to</h1>
<nav aria-label="Parts of the page">
<a data-part="captions" href="#">Captions</a>
<a data-part="questions" href="#part=questions">Questions about images</a>
</nav>
<form id="controls">
<label>Contains <input name="text" type="search" placeholder="words, or an id" autocomplete="off"></label>
<label>A <select name="a"></select></label>
<label>B <select name="b"></select></label>
<label>Sort by <select name="sort">
<option value="file">original order</option>
<option value="score" data-part="captions">score of A</option>
<option value="loss">answers lost by A</option>
<option value="difference">A minus B</option>
</select></label>
<label data-part="captions">Score <select name="metric"></select></label>
<label data-part="questions">Lost with <select name="under"></select></label>
<label>Order <select name="order">
<option value="down">highest first</option>
<option value="up">lowest first</option>
</select></label>
</form>
<p id="count" role="status"></p>
<main id="rows"></main>
<div id="end"></div>
<noscript><p>This page needs JavaScript. It loads nothing from a network.</p></noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""

# Colours follow the reader's dark or light mode. Rows out of sight are not laid out (content-visibility), so that a
# thousand clips do not slow the page down.
PAGE_STYLE = """
:root { --text: #1c1e21; --muted: #5c636b; --page: #fff; --card: #f5f6f8; --line: #d5d9de;
  --accent: #00609a; --wrong: #a83200; --right: #006b4a; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6e9; --muted: #a0a7b0; --page: #14171a; --card: #1f2327; --line: #3a4047;
    --accent: #6cbcf0; --wrong: #ff9d72; --right: #5fd0a5; }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0 auto; max-width: 80rem; padding: 1rem; color: var(--text); background: var(--page);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; }
h2 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
a { color: var(--accent); margin-right: 1rem; }
a[aria-current] { color: var(--text); font-weight: 600; text-decoration: none; }
form { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .5rem .75rem; margin: .6rem 0; }
label { font-size: .8rem; color: var(--muted); }
input, select { display: block; width: 100%; min-height: 2.3rem; font: inherit; font-size: 1rem; }
article { display: grid; grid-template-columns: minmax(15rem, 1fr) 2.2fr; gap: .75rem 1.5rem; margin: 1rem 0;
  padding: 1rem; background: var(--card); content-visibility: auto; contain-intrinsic-size: auto 22rem; }
article > * { min-width: 0; }
audio { display: block; width: 100%; height: 2.75rem; margin-bottom: .5rem; }
img { display: block; max-width: 100%; width: 14rem; min-height: 2rem; margin-bottom: .5rem; }
ul { margin: 0; padding-left: 1.1rem; }
li, td, p { overflow-wrap: anywhere; }
p { margin: 0 0 .5rem; }
.note { color: var(--muted); font-style: italic; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
table { width: 100%; table-layout: fixed; border-collapse: collapse; font-size: .95rem; }
th, td { padding: .3rem .5rem; text-align: left; vertical-align: baseline; border-top: 1px solid var(--line); }
th { color: var(--muted); font-weight: normal; }
.number { text-align: right; width: 5.8rem; }
.captions th:first-child { width: 11rem; }
@media (max-width: 66rem) { article { grid-template-columns: 1fr; } }
"""
# On a phone a caption takes a line of its own below the system and its scores.
PAGE_STYLE += """
@media (max-width: 44rem) {
  .captions tr { display: flex; flex-wrap: wrap; border-top: 1px solid var(--line); }
  .captions th, .captions td { border: 0; padding: .2rem 0; flex: 0 0 5.2rem; }
  .captions th:first-child { flex: 1; }
  .captions .caption { order: 1; flex-basis: 100%; }
  .captions thead .caption { display: none; }
  form { grid-template-columns: 1fr 1fr; }
}
"""

# What the page is made of. A text from a file becomes a node's text and is never read as markup. WINDOW is the
# number of rows that are made at a time, as the reader scrolls; `waiting` has those that are not on the page yet.
PAGE_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("controls");
const fields = [...form.elements];
const rows = document.getElementById("rows");
const end = document.getElementById("end");
const clips = new Map(data.clips.map(clip => [clip.id, clip]));
const WINDOW = 30;
let view = {};
let waiting = [];

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function group(name, children, className = "") {
  const made = element(name, "", className);
  made.append(...children);
  return made;
}

function rowHead(text) {
  const head = element("th", text);
  head.scope = "row";
  return head;
}
"""

# A sound or a picture. Where its file is gone, or goes after the page was written, a note says so.
PAGE_SCRIPT += """
function media(name, link, label) {
  const gone = element("p", `${label}: the file is gone or cannot be opened.`, "note");
  if (!link) return gone;
  const made = element(name);
  if (name === "audio") {
    made.controls = true;
    made.preload = "none";
    made.setAttribute("aria-label", label);
  } else {
    made.loading = "lazy";
    made.alt = label;
  }
  made.addEventListener("error", () => made.replaceWith(gone));
  made.src = link;
  return made;
}
"""

# A system's answer under a condition: [text, right], null where it was not asked. lost() is 1 where the backbone
# alone is right and this answer is wrong, -1 the other way round.
PAGE_SCRIPT += """
function answer(question, system, condition) {
  const answers = question.answers[system];
  const place = answers ? answers[data.conditions.findIndex(c => c[0] === condition)] : null;
  return place === null ? null : question.texts[place];
}

function lost(question, system, condition) {
  const before = answer(question, system, "backbone");
  const after = answer(question, system, condition);
  return before && after ? before[1] - after[1] : null;
}
"""

# What rows are sorted by: of clips a score, or the answers that are lost while they play; of questions a lost answer.
# Rows without one (null) come last.
PAGE_SCRIPT += """
function lostBeside(clip, system) {
  const beside = data.questions.filter(question => question.clip === clip.id);
  const losses = beside.map(question => lost(question, system, "unrelated_clip")).filter(loss => loss !== null);
  return losses.length ? losses.reduce((sum, loss) => sum + loss, 0) : null;
}

function value(row, system) {
  if (view.part === "questions") return lost(row, system, view.under);
  if (view.sort === "loss") return lostBeside(row, system);
  const scores = row.scores[system];
  return scores ? scores[view.metricIndex] : null;
}

function sortKey(row) {
  const a = value(row, view.A);
  if (view.sort !== "difference") return a;
  const b = value(row, view.B);
  return a === null || b === null ? null : a - b;
}

function sorted(list) {
  if (view.sort === "file") return list;
  const keyed = list.map(row => [sortKey(row), row]);
  const direction = view.order === "up" ? 1 : -1;
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    return direction * (a - b);
  });
  return keyed.map(([, row]) => row);
}
"""

# What the filter looks through: all words of a row.
PAGE_SCRIPT += """
function haystack(row) {
  const texts = view.part === "questions"
    ? [row.id, row.clip, row.question, row.truth, ...row.texts.map(([text]) => text)]
    : [row.id, row.question, ...row.references, ...row.captions];
  return texts.join("\\n").toLowerCase();
}
"""

# A clip: its sound and references, beside them a line for each system.
PAGE_SCRIPT += """
function clipRow(clip) {
  const left = [element("h2", clip.id), media("audio", clip.link, "Sound")];
  if (clip.question) left.push(element("p", clip.question));
  const gone = view.sort === "loss" ? lostBeside(clip, view.A) : null;
  if (gone !== null) left.push(element("p", `Answers about images lost beside it, less those won: ${gone}`));
  left.push(element("p", "References:", "note"));
  left.push(group("ul", clip.references.map(text => element("li", text))));
  return group("article", [group("div", left), captionTable(clip)]);
}

function captionTable(clip) {
  const head = group("tr", [element("th", "system"), element("th", "caption", "caption")]);
  for (const [, title] of data.metrics) head.append(element("th", title, "number"));
  const body = element("tbody");
  data.systems.forEach((system, k) => {
    const caption = clip.captions[k];
    if (caption === null) return;
    const words = caption ? element("td", caption, "caption") : element("td", "(no words)", "caption note");
    const line = group("tr", [rowHead(system), words]);
    for (const score of clip.scores[k]) line.append(element("td", score === null ? "-" : score.toFixed(3), "number"));
    body.append(line);
  });
  return group("table", [group("thead", [head]), body], "captions");
}
"""

# A question: its picture and the clip that played, beside them the answers of A and B under each condition.
PAGE_SCRIPT += """
function questionRow(question) {
  const left = [media("img", question.image, "Picture")];
  const clip = clips.get(question.clip);
  if (clip) {
    left.push(element("p", `Unrelated clip ${clip.id}`));
    left.push(media("audio", clip.link, "Unrelated clip"));
  }
  const truth = element("p", `Right answer: ${question.truth}`);
  const right = [element("h2", question.question), truth, answerTable(question)];
  return group("article", [group("div", left), group("div", right)]);
}

function answerTable(question) {
  const systems = [view.A, view.B];
  const head = group("tr", [element("th"), ...systems.map(k => element("th", data.systems[k]))]);
  const body = element("tbody");
  for (const [condition, title] of data.conditions) {
    const line = group("tr", [rowHead(title)]);
    for (const k of systems) line.append(answerCell(answer(question, k, condition)));
    body.append(line);
  }
  return group("table", [group("thead", [head]), body], "answers");
}
"""

# An answer has a mark too: colours alone do not tell everybody what is right.
PAGE_SCRIPT += """
function answerCell(given) {
  if (!given) return element("td", "not asked", "note");
  const [text, right] = given;
  return element("td", (right ? "\\u2713 " : "\\u2717 ") + (text || "(no words)"), right ? "right" : "wrong");
}
"""

# The address after # holds the whole view, so that a view can be linked: controls write it, show() reads it. For a
# value that a control does not offer its first one counts. A field that is being typed in is left alone: a reader may
# have typed on since the address was written.
PAGE_SCRIPT += """
function address(values) {
  const hash = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) if (value) hash.set(name, value);
  return "#" + hash;
}

function readView() {
  const hash = new URLSearchParams(location.hash.slice(1));
  view = {part: hash.get("part") === "questions" ? "questions" : "captions"};
  for (const field of fields) {
    const options = [...field.options ?? []].map(option => option.value);
    const first = options[field.name === "b" ? 1 : 0] ?? options[0] ?? "";
    const wanted = hash.get(field.name) ?? first;
    view[field.name] = field.options && !options.includes(wanted) ? first : wanted;
    if (field.type !== "search" || field !== document.activeElement) field.value = view[field.name];
  }
  view.A = data.systems.indexOf(view.a);
  view.B = data.systems.indexOf(view.b);
  view.metricIndex = data.metrics.findIndex(metric => metric[0] === view.metric);
}

function show() {
  readView();
  for (const control of form.querySelectorAll("[data-part]")) control.hidden = control.dataset.part !== view.part;
  for (const link of document.querySelectorAll("nav a")) {
    link.href = address({part: link.dataset.part, a: view.a, b: view.b});
    if (link.dataset.part === view.part) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const all = data[view.part === "questions" ? "questions" : "clips"];
  const words = view.text.toLowerCase().split(/\\s+/);
  waiting = sorted(all.filter(row => words.every(word => haystack(row).includes(word))));
  const kind = view.part === "questions" ? "questions" : "clips";
  document.getElementById("count").textContent = `${waiting.length} of ${all.length} ${kind}`;
  rows.replaceChildren();
  scrollTo(0, 0);
  grow();
}
"""

# The next rows are made when the reader comes near the end of the page; watching the end again tells whether it is
# still near.
PAGE_SCRIPT += """
function grow() {
  const make = view.part === "questions" ? questionRow : clipRow;
  rows.append(...waiting.splice(0, WINDOW).map(make));
  watcher.unobserve(end);
  if (waiting.length) watcher.observe(end);
}

const watcher = new IntersectionObserver(seen => {
  if (seen.some(entry => entry.isIntersecting)) grow();
}, {rootMargin: "2000px"});
"""

# The choices of the controls. The view changes once for a word and not for each letter; one sound plays at a time.
PAGE_SCRIPT += """
function fill(name, options) {
  for (const [value, title] of options) {
    const option = element("option", title);
    option.value = value;
    form.elements[name].append(option);
  }
}

fill("a", data.systems.map(system => [system, system]));
fill("b", data.systems.map(system => [system, system]));
fill("metric", data.metrics);
fill("under", data.conditions.filter(([name]) => name !== "backbone"));
document.querySelector("nav a:last-child").hidden = !data.questions.length;

let timer;
form.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(() => {
    const values = Object.fromEntries(fields.map(field => [field.name, field.value]));
    location.replace(address({part: view.part, ...values}));
  }, 120);
});
form.addEventListener("submit", event => event.preventDefault());
addEventListener("hashchange", show);
document.addEventListener("play", event => {
  for (const audio of document.querySelectorAll("audio")) if (audio !== event.target) audio.pause();
}, true);
show();
"""


def page_runs(runs):
    """What the page shows of finished runs: the first seed of each system, with SCST too."""
    chosen = {}
    for run, (label, _) in looks(runs).items():
        # older studies have the system that keeps among the sweeps of phase 3
        if run.result and run.own and (run.phase == "core" or run.stem == "additive_keep"):
            if label not in chosen or run.seed < chosen[label].seed:
                chosen[label] = run
    found = []
    for label, run in chosen.items():
        items = load(run.folder / "predictions.json", list)
        if items:
            found.append({
                "label": label, "folder": run.config.get("folder", "."), "metric": run.config["metric"],
                "items": items, "retention": load(run.folder / "retention_items.json", list)})
    return found


def write_page(folder, runs):
    """Write captions.html; returns whether there was anything to show.

    runs: [{"label", "folder": what paths are relative to, "metric", "items": predictions with a "path",
    "retention": answers with an "image", or None}]."""
    if not runs:
        return False
    folder = Path(os.path.abspath(folder))
    metrics = []
    for metric in dict.fromkeys([runs[0].get("metric"), "cider_d", "fense"]):
        scores = []
        for run in runs:
            scores += [item["scores"].get(metric) for item in run["items"]]
        # FENSE is there where its models are installed
        if any(score is not None for score in scores):
            metrics.append([metric, TITLES.get(metric, metric)])
    labels = [run["label"] for run in runs]
    asked = set()
    for run in runs:
        asked.update(*(run["retention"] or []))
    conditions = [[name, name.replace("_", " ")] for name in ANSWERED if name in asked]
    content = {"systems": labels, "metrics": metrics, "conditions": conditions,
               "clips": page_clips(folder, runs, metrics), "questions": page_questions(folder, runs, conditions)}
    # without "<" no text can end the element that it is in
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    # only code with these hashes runs; file: is for a page from the disk, 'self' for one from a server
    policy = (f"default-src 'none'; style-src {code_hash(PAGE_STYLE)}; script-src {code_hash(PAGE_SCRIPT)}; "
              "img-src file: 'self'; media-src file: 'self'; base-uri 'none'; form-action 'none'")
    page = PAGE.replace("{policy}", policy).replace("{style}", PAGE_STYLE).replace("{script}", PAGE_SCRIPT)
    page = page.replace("{data}", text)  # last: its text may hold the other names
    tmp = folder / "captions.html.tmp"
    tmp.write_bytes(page.encode("utf-8", "replace"))  # a file's name may be no valid text
    os.replace(tmp, folder / "captions.html")
    return True


def code_hash(code):
    """How a Content-Security-Policy names a style or a script inside a page."""
    return f"'sha256-{b64encode(sha256(code.encode()).digest()).decode()}'"


def page_clips(folder, runs, metrics):
    """[clip with every system's caption and scores], in the order of the first run."""
    clips = {}
    for k, run in enumerate(runs):
        for item in run["items"]:
            clip = clips.setdefault(item["id"], {
                "id": item["id"], "link": None, "question": item.get("question"),
                "references": item.get("references", []),
                "captions": [None] * len(runs), "scores": [None] * len(runs)})
            # runs that are older than "path" have none
            clip["link"] = clip["link"] or page_link(folder, run["folder"], item.get("path"))
            clip["captions"][k] = item.get("prediction", "")
            scores = [item["scores"].get(metric) for metric, _ in metrics]
            # NaN is no JSON; three digits are what the page shows
            clip["scores"][k] = [round(x, 3) if x is not None and np.isfinite(x) else None for x in scores]
    return list(clips.values())


def page_questions(folder, runs, conditions):
    """[question of the probe with every system's answers, in the order of `conditions`]."""
    questions = {}
    for k, run in enumerate(runs):
        for item in run["retention"] or []:
            # a run that heard another clip beside a question is not compared with the others
            question = questions.setdefault((item["id"], item.get("clip")), {
                "id": item["id"], "clip": item.get("clip"), "question": item["question"], "truth": item["truth"],
                "image": None, "texts": [], "answers": [None] * len(runs)})
            question["image"] = question["image"] or page_link(folder, run["folder"], item.get("image"))
            places = []
            for condition, _ in conditions:
                place = None
                if condition in item:
                    # most answers are the same: each text is written once, and its place in the list after that
                    text = item[condition]["answer"]
                    answer = [text, int(plain(text) == plain(item["truth"]))]
                    if answer not in question["texts"]:
                        question["texts"].append(answer)
                    place = question["texts"].index(answer)
                places.append(place)
            question["answers"][k] = places
    return list(questions.values())


def plain(answer):
    """An answer as VQA accuracy compares it, the same rule as in evaluate.py: letters and digits in lower case."""
    return " ".join("".join(c if c.isalnum() else " " for c in answer.lower()).split())


def page_link(folder, project, path):
    """URL of a file relative to the page, quoted; None where the file is gone."""
    if not path:
        return None
    # a study that was moved together with its data has them below a folder that both are in
    for base in (project, folder, *folder.parents):
        file = os.path.join(base, path)
        if os.path.isfile(file):
            return quote(os.fsencode(os.path.relpath(file, folder)))
    return None


# ---------------------------------------------------------------- the report

def sections(study):
    """(title, phase that makes it, table or None, note, figures) of the report, in order."""
    name = study.metric_name
    core, clotho = study.finished("core"), study.finished("clotho")
    video, elsewhere, probe = [], [], ""
    for run in study.runs:
        if run.result and run.data:
            elsewhere.append(run)
        elif run.result and run.phase == "video" and not run.attached:
            video.append(run)
        if run.retention and not probe:
            probe = f" (hash {run.retention['hash'][:12]})"
    before = [100 * run.values["backbone.accuracy"] for run in study.core if "backbone.accuracy" in run.values]
    yield ("Overview: hearing and sight", 1, table_overview(study),
           "VQA: accuracy in percent beside an unrelated clip" + (f", {before[0]:.1f} before audio. " if before else ". ")
           + "Keep: trained to leave the backbone's own answers about images as they are, and with a null slot, so that "
           "attention can read nothing (concatenation has no attention). Captions of the test split.", [])
    yield ("Targets", 1, table_targets(study),
           "These are aims of this study for the released models and data, not results of the field.", [])
    published = table(["published", "data", "CIDEr", "SPIDEr", "SPIDEr-FL", "FENSE", "source"], PUBLISHED, 2)
    yield ("Published results", 1, published if core else None,
           "The first five are closest to this study: a language model, frozen or with LoRA, trained on AudioCaps alone. "
           "Published test sets of AudioCaps have n = 975, 957 or 883 clips.", [])
    yield ("T1 AudioCaps, test split", 1, table_scores(core, ["system"]),
           "Scores of the first beam of 5. With several seeds: mean ± sample standard deviation." + judge(core)
           + other_clips(core), [figure_curves, figure_gates, figure_pareto])
    yield ("Efficiency", 1, run_table(["system"], grouped(core), EFFICIENCY),
           "Minutes to 90%: when validation first reached 90% of its final score. GB: the most that was held of the "
           "GPU or, without one, that the process has held of RAM, also for runs that it captioned before. Clips/s: where a "
           "run is reranked, drawing its samples is included. FLOPs: matrix products in decoding a clip, by "
           "torch.utils.flop_counter.", [])
    yield ("T2 Clotho, evaluation split", 1, table_scores(clotho, ["system", "start"]),
           "Scores of the first beam of 5." + other_clips(clotho), [])
    yield "T3 Layers", 2, table_sweep(study, ["layers"]), "Rows differ only in the flags shown.", []
    yield "T3 Tokens and hidden width", 2, table_sweep(study, ["tokens", "hidden"]), "", []
    yield "T3 Losses", 2, table_sweep(study, ["contrastive"]), "Weight of the contrastive loss; 0: XE alone.", []
    yield ("T3 Reranker off and on, T4 Decoding", 1, table_decoding(study),
           f"Oracle: each clip's best candidate by {name} against the test references. Weights of log-probability, "
           "CLAP and consensus: chosen on validation.", [])
    yield ("T5 VQA retention", 1, table_retention(study),
           f"VQA accuracy in percent{probe}. Conflict: the clip's captions name another answer to the question. Loss: in "
           "percentage points. Relative retention (accuracy in percent of the backbone's), agreement with the backbone's "
           "own answers and NLL of the right ones: beside an unrelated clip. Exact: with closed gates, no clip or nothing "
           "attached the answers are the backbone's. Where there is one seed, the 95% interval over questions.",
           [figure_frontier])
    yield ("Gate regularisation: keep", 3, table_sweep(study, ["null_slot", "keep"]),
           "Keep: weight of the divergence from the backbone's own answers beside unrelated clips.", [])
    yield "Gate regularisation: L2", 3, table_sweep(study, ["gate_l2"]), "", []
    yield ("Video", 3, table_scores(video, ["run", "trained", "given"]),
           "Scores of the first beam of 5, test split of the audio-visual dataset. Each run was trained on it, and nothing "
           "is attached beside it." + other_clips(video), [])
    # tests/senses.py makes this figure's file, and no phase
    attention = [figure_attention] if (study.folder / "senses.json").is_file() else []
    yield ("Senses that compose", 3, table_senses(study),
           "An audio and a video branch were trained apart and are attached together. Captions and answers: what the "
           "video branch costs the audio branch. Videos with sound: both branches had the clip, or one of them, or the "
           "video branch had another clip.", attention)
    yield ("Cost of the second modality: all tries", 3, table_tries(study),
           f"In percentage points. Captions: {name} of audio captions without and with an unrelated video. VQA: "
           "beside an unrelated clip, without and with an unrelated video. Within: the loss is at most the tolerance, or its "
           "95% interval includes 0.", [])
    if elsewhere:  # no phase of the study makes these
        yield ("Other data", 1, table_scores(elsewhere, ["system", "phase", "data"]),
               "Runs that captioned the test split of a dataset that they were not trained on." + other_clips(elsewhere), [])
    yield ("Comparisons", 4, table_statistics(study),
           f"The headline is against the baseline with the best mean validation {name}. Paired bootstrap of items, and of "
           "seeds if there are several. p is two-sided, Holm over the metrics of a comparison; 10,000 resamples give no p "
           "below 0.0001."
           + dropped_items(study), [figure_intervals])
    yield "Appendix: gates at the start", 5, table_sweep(study, ["gate_init"]), "", []
    yield "Appendix: noise", 5, table_robustness(study), f"Test {name}, greedy decoding.", [figure_snr]


def draw_figure(draw, study):
    """Save one figure as PNG and PDF; returns its caption, None where there was nothing to draw."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which starts the backend of a notebook
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                                "axes.grid": True, "grid.alpha": 0.25, "pdf.fonttype": 42})
    figure = Figure((7.2, 3.8), layout="constrained")
    caption = draw(study, figure)
    if caption is None:
        return None
    # one legend, beside the last panel
    ax = figure.axes[-1]
    handles, labels = ax.get_legend_handles_labels()
    entries = dict(zip(labels, handles))  # one for each label
    ax.legend(entries.values(), entries, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    name = draw.__name__.removeprefix("figure_")
    (study.folder / "figures").mkdir(exist_ok=True)
    # a reader never meets half a file
    for kind in ("png", "pdf"):
        tmp = study.folder / f"figures/.{name}.tmp"
        figure.savefig(tmp, format=kind, dpi=160)
        os.replace(tmp, study.folder / f"figures/{name}.{kind}")
    return caption


def report_body(study):
    """(Markdown paragraphs, names of what is missing); draws the figures."""
    body, missing = [], []
    for heading, phase, text, note, figures in sections(study):
        drawn = []
        for figure in figures:
            name, caption = figure.__name__.removeprefix("figure_"), draw_figure(figure, study)
            if caption:
                drawn.append(f"![{name}](figures/{name}.png)\n\n*{caption}*")
            else:
                missing.append(f"figure {name} (phase {phase})")
        if text or drawn:
            body += [f"## {heading}", text, note, *drawn]
        if not text:
            missing.append(f"{heading} (phase {phase})")
    present = {run.system for run in study.core}
    missing += [f"{STYLES[system][0]} in core (phase 1)" for system in EXPECTED if system not in present]
    return body, missing


def report_head(study):
    """What the report is about, how much is done and what is not."""
    runs, name = study.runs, study.folder.resolve().name
    # numbers of the stand-in world must not be taken for the released models'
    full = name == "full" or any("llava-1.5-7b" in run.config.get("llava", "") for run in runs)
    head = [f"# Report, scale: {'full' if full else name}"]
    if not full:
        head.append("A stand-in world: the repository makes the data and the models, at `SCALE=small` all but the language "
                    "model and the ears. The numbers compare systems and say nothing about LLaVA-1.5-7B or AudioCaps.")
    results, seconds = 0, 0
    # what is missing is named, so that half a study is not taken for a whole one
    states = defaultdict(list)
    for run in runs:
        states[run.state].append(str(run.path))
        if run.result:
            results += 1
            # stages and other folders of a run share its training
            seconds += run.result.get("train_seconds", 0) if run.own and run.stage == "xe" else 0
    head.append(f"{results} results, {seconds / 3600:.2f} hours of training.")
    head += headline_sentences(study)
    if study.metric == "spider_lite":
        head.append("spider_lite is the mean of CIDEr-D and of spice_lite, an F1 of stemmed content words and neighbouring "
                    "pairs: it chooses checkpoints in place of SPIDEr, which needs SPICE.")
    for state in ("not finished", "not of the test split"):
        if states[state]:
            head.append(f"**{state.capitalize()}** ({len(states[state])} of {len(runs)} runs): {', '.join(states[state])}")
    return head


def report(folder):
    """Write figures/ and REPORT.md; returns the Markdown text."""
    study = Study(folder)
    if not study.runs:
        raise InputError(f"{folder}: no runs there (phase/name/config.json); run_all.sh makes them")
    head = report_head(study)
    if write_page(folder, page_runs([*study.core, *study.finished("retention")])):
        head.append("[captions.html](captions.html): every test clip with its sound and the captions of all systems, "
                    "and the answers to the questions about images.")
    body, missing = report_body(study)
    if missing:
        head.append(f"**Missing**: {'; '.join(missing)}.")
    # every run with its seed and its code, finished or not
    rows = []
    for run in study.runs:
        minutes, commit = cell([run], *COSTS[1][1:]), run.config.get("git") or "-"
        rows.append([f"`{run.path}`", run.seed, commit, minutes, run.values.get("n", "-"), run.state])
    body += ["## Where the numbers come from", table(["run", "seed", "commit", "minutes", "n", "result"], rows)]
    text = "\n\n".join(part for part in head + body if part) + "\n"
    tmp = folder / "REPORT.md.tmp"
    tmp.write_text(text, encoding="utf-8", errors="replace")
    os.replace(tmp, folder / "REPORT.md")
    return text


def parse_args():
    parser = argparse.ArgumentParser(description="Tables, figures and REPORT.md from the files of finished runs.")
    parser.add_argument("folder", type=Path, help="a folder with phases of runs, such as experiments/tiny")
    return parser.parse_args()


def main():
    args = parse_args()
    os.environ.pop("MPLBACKEND", None)  # a notebook sets it to one that may not be importable here
    # on the console headings and tables are enough
    text = report(args.folder).split("\n## Where the numbers come from")[0]
    for line in text.splitlines():
        if line.startswith(("#", "|", "**")):
            print(line)


def run(main):
    """Exit status 2 and one line for a person's mistake and for a full disk; a closed pipe is neither."""
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # what argparse printed may not have left yet either
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        # what could not be written is not tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may not have ± or ≥
    run(main)
