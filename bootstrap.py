"""Is system A better than system B? Paired bootstrap tests and intervals for captioning metrics.

    python bootstrap.py compare RUN_A RUN_B                         # every metric that both have
    python bootstrap.py compare a.json b.json --metrics cider_d meteor --json out.json
    python bootstrap.py compare additive_s* vs concat_s*            # several seeds each: seeds and items resampled
    python bootstrap.py seeds additive_s0 additive_s1 additive_s2   # mean and standard deviation over seeds

Copy this file alone: it needs numpy. RUN is a run's folder, its predictions.json or a scores.json: a list of
{"id", "references": [...], "scores": {metric: number}, "stats": {"meteor": [23 numbers], "bleu": [10 numbers]}}.
METEOR and BLEU are ratios of sums, so their `stats` are summed over each resample and scored again. Every other
number among the scores, of whatever name, is a metric that is a mean over items.

In shape comments: n items, R runs (those of A, then those of B), K statistics of an item, C columns, M metrics.
"""
import argparse
import json
import os
import re
import sys
from itertools import chain
from statistics import NormalDist

import numpy as np

# in the order of the tables; any others follow
METRICS = ("spider", "spider_lite", "cider_d", "spider_fl", "fense", "meteor", "spice", "spice_lite", "rouge_l",
           "sbert_sim", "fer", "bleu_1", "bleu_2", "bleu_3", "bleu_4")
WIDTHS = {"meteor": 23, "bleu": 10}  # sufficient statistics of an item


class InputError(ValueError):
    """A user's mistake in one line: what, where, what to do."""


# ---- scores from sufficient statistics

def without_single_chunks(lines):
    """METEOR's SCORE lines (..., 23) as the jar sums them: the one chunk of an exact match does not count."""
    lines = np.array(lines, dtype=float)
    exact = (lines[..., 20] == 1) & (lines[..., 21:23] == lines[..., 0:2]).all(-1)
    lines[exact, 20] = 0
    return lines


def meteor(sums):
    """METEOR 1.5 (English, ranking task) of summed SCORE lines: (..., 23) → (...).

    A line has the lengths of hypothesis and reference, their function words, then for each matcher (exact, stem,
    synonym, paraphrase) the matched content words of both and the matched function words of both, then chunks and
    matched words of both. Denkowski and Lavie, "Meteor Universal", 2014: F = PR / (.85 P + .15 R) and
    score = F (1 - .6 (chunks / matched words)^.2), with content words weighted .75 and function words .25.
    """
    length, function = sums[..., 0:2], sums[..., 2:4]  # (..., 2): hypothesis, reference
    weights = np.outer([1, .6, .8, .6], [.75, .25]).ravel()  # matcher, then content or function
    matched = sums[..., 4:20] @ np.kron(weights[:, None], np.eye(2))  # (..., 16) @ (16, 2)
    recalled = _ratio(matched, .75 * (length - function) + .25 * function)
    precision, recall = recalled[..., 0], recalled[..., 1]
    f_mean = _ratio(precision * recall, .85 * precision + (1 - .85) * recall)
    fragmentation = _ratio(sums[..., 20], sums[..., 21:23].mean(-1))
    return f_mean * (1 - .6 * fragmentation ** .2)


def _ratio(x, y):
    return np.divide(x, y, out=np.zeros(np.shape(x)), where=y > 0)


def bleu(sums):
    """BLEU-1..4 of summed [length, closest reference length, guess_1..4, correct_1..4]: (..., 10) → (..., 4).

    Papineni et al., 2002, with pycocoevalcap's two small constants against division by zero.
    """
    small, tiny = 1e-9, 1e-15
    precision = (sums[..., 6:10] + tiny) / (sums[..., 2:6] + small)
    ratio = (sums[..., :1] + tiny) / (sums[..., 1:2] + small)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return np.cumprod(precision, -1) ** (1 / np.arange(1, 5)) * brevity


def _source(metric):
    return "bleu" if metric.startswith("bleu_") else metric


def _score(metric, sums):
    """Corpus score of one metric from its summed statistics: (..., K) → (...)."""
    if metric == "meteor":
        return meteor(sums)
    if metric.startswith("bleu_"):
        return bleu(sums)[..., int(metric[5:]) - 1]
    return sums[..., 0] / sums[..., 1]  # a sum of item scores over the number of items


# ---- reading and matching

def load(path):
    """Items of a run's folder, a predictions.json or a scores.json. Raises InputError."""
    path = os.path.join(path, "predictions.json") if os.path.isdir(path) else path
    try:
        with open(path, encoding="utf-8-sig") as file:
            items = json.load(file)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): give a run's folder, its predictions.json "
                         "or a scores.json")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): write it again with evaluate.py")
    if isinstance(items, dict):
        items = items.get("items")
    if not isinstance(items, list) or not items:
        raise InputError(f"{path} holds no items: a list of {{id, prediction, references, scores}} is needed")
    needed = (("references", list, "add them, to show that both systems were scored alike"),
              ("scores", dict, f"run python evaluate.py score {path} --out scores.json"))
    for i, item in enumerate(items):
        if not isinstance(item, dict) or type(item.get("id")) not in (str, int):
            raise InputError(f"item {i} of {path} has no id: give it text or an integer")
        for key, kind, cure in needed:
            if not isinstance(item.get(key), kind):
                raise InputError(f"item {i} of {path} has no {key}: {cure}")
        item["id"] = _clean(item["id"])
        item["references"] = [_clean(reference) for reference in item["references"]]
    return items


def _clean(text):
    """As text, with U+FFFD for half a surrogate pair: a cut-off emoji leaves one."""
    return re.sub("[\ud800-\udfff]", "\ufffd", str(text))


def match(runs, names):
    """The items that all runs share, sorted by id: R lists of n items.

    Raises InputError for duplicates, no shared id, and references that differ.
    """
    tables = [_by_id(items, name) for items, name in zip(runs, names)]
    shared = sorted(set.intersection(*map(set, tables)))
    if not shared:
        raise InputError(f"no id is in all of {', '.join(names)}: compare runs of the same test set")
    # a comparison is fair only against the same references, in whatever order
    for key in shared:
        wanted = sorted(map(str, tables[0][key]["references"]))
        for table, name in zip(tables, names):
            if sorted(map(str, table[key]["references"])) != wanted:
                raise InputError(f"the references of id {key!r} differ between {names[0]} and {name}: "
                                 "score both against the same references")
    return [list(map(table.get, shared)) for table in tables]


def _by_id(items, name):
    table = {}
    for item in items:
        key = str(item["id"])
        if key in table:
            raise InputError(f"id {key!r} occurs more than once in {name}: keep one prediction for each clip")
        table[key] = item
    return table


def known(runs, which):
    """Metrics that `any` or `all` of these runs have: METRICS in its order, then every other number among the scores."""
    names = list(METRICS)
    for item in chain(*runs):
        # null stands for a metric that was not computed; true and false are no scores
        names += [name for name, score in item["scores"].items() if type(score) in (int, float)]
    found = []
    for metric in dict.fromkeys(names):
        if which(_has(items, metric) for items in runs):
            found.append(metric)
    return found


def choose(runs, metrics=None):
    """These metrics, or by default every metric that each run has for some item."""
    metrics = metrics or known(runs, all)
    if not metrics:
        raise InputError("no metric has scores in every run: score them all with evaluate.py score")
    there = known(runs, any)
    for metric in metrics:
        if metric not in there:
            raise InputError(f"{metric}: scores.{metric} is null or absent in every item: give --metrics of "
                             f"{', '.join(there)}, or score with evaluate.py")
    return list(dict.fromkeys(metrics))


def _has(items, metric):
    return any(_raw(item, metric) is not None for item in items)


def _raw(item, metric):
    source = _source(metric)
    if source not in WIDTHS:
        return item["scores"].get(metric)
    return item["stats"].get(source) if isinstance(item.get("stats"), dict) else None


def collect(runs, metrics, names):
    """{source: (n, R, K)}: what each metric sums over items before it is scored. Raises InputError."""
    arrays = {}
    for metric in metrics:
        columns = []
        for items, name in zip(runs, names):
            columns.append([_row(item, metric, name) for item in items])
        # the four BLEUs share their statistics
        arrays[_source(metric)] = np.array(columns, dtype=float).swapaxes(0, 1)
    if "meteor" in arrays:
        arrays["meteor"] = without_single_chunks(arrays["meteor"])
    return arrays


def _row(item, metric, name):
    """What one item adds to the sums: its statistics, or its score and 1."""
    source, row = _source(metric), _raw(item, metric)
    key, width, kind = f"scores.{metric}", 2, "a finite number"
    if source in WIDTHS:
        key, width = f"stats.{source}", WIDTHS[source]
        kind = f"{width} finite numbers"
    place = f"for id {str(item['id'])!r} of {name}"
    if row is None:
        raise InputError(f"{metric}: {key} is null or absent {place}: score that file with evaluate.py, "
                         f"or name --metrics without {metric}")
    row = row if source in WIDTHS else [row, 1]
    finite = isinstance(row, list) and all(type(x) in (int, float) and abs(x) < 1e300 for x in row)
    if not finite or len(row) != width:  # a comparison with NaN is false
        raise InputError(f"{metric}: {key} is not {kind} {place}: score that file again")
    return row


# ---- statistics

def holm(pvalues):
    """Holm's step-down adjustment: the k-th smallest of m p-values times m - k + 1, made monotone, at most 1."""
    p = np.asarray(pvalues, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def paired_test(arrays, metrics, runs_a=1, resamples=10_000, seed=0):
    """Compare the mean of the first `runs_a` runs with the mean of the others: {metric: {...}}.

    arrays: {source: (n, R, K)} from `collect`. A resample draws n items with replacement, the same for all runs and
    metrics, sums their statistics, scores them and takes the difference d*. Of s > 1 runs (seeds) of a side, s - 1 are
    drawn too: s would make the variance of their mean too small by (s - 1)/s (Rao and Wu, 1988). Few seeds remain
    optimistic: where seeds vary most, 24% (2 seeds), 12% (3), 6% (5) of null comparisons gave p < .05.

    a, b, difference   scores (means over runs) and d = a - b
    sd, ci95           standard deviation and 2.5 and 97.5% quantiles of d*
    bca95              bias-corrected and accelerated interval (Efron, 1987), acceleration from the jackknife
    p, p_holm          two-sided, of d* shifted to the null: (1 + #{|d* - d| >= |d|}) / (resamples + 1); Holm's
    p_randomisation    two-sided, A and B swapped for each item with probability 1/2 (Noreen, 1989); one run a side
    effect_size        d over the standard deviation of the jackknife's pseudo-values n d - (n - 1) d_-i, one for each
                       item; for a mean of item scores this is Cohen's d_z
    """
    n, runs, _ = next(iter(arrays.values())).shape
    if n < 2:
        raise InputError("only 1 item is shared: there is nothing to resample, score at least 2")
    # the scores themselves, without each item in turn, of resamples, and with sides swapped
    point, without, boot, swapped = _resample(arrays, metrics, runs_a, resamples, seed)
    a, b = point[:, :runs_a].mean(1), point[:, runs_a:].mean(1)  # (M,)
    results = {}
    for m, metric in enumerate(metrics):
        d, star = a[m] - b[m], boot[:, m]
        # sums in another order differ in the last bits: what is closer than this counts as equal
        tie = 1e-12 * max(1, abs(a[m]), abs(b[m]))
        # the acceleration of BCa: from leaving out each item, and with several seeds each seed
        jackknives = [without[:, m]]
        for side in (point[m, :runs_a], point[m, runs_a:]):
            if len(side) > 1:
                jackknives.append((side.sum() - side) / (len(side) - 1))
        # None where all differences are the same: their deviation is rounding error
        deviation = (n * d - (n - 1) * without[:, m]).std(ddof=1)
        effect = 0.0 if abs(d) <= tie else None
        if deviation > n * tie:
            effect = float(d / deviation)
        p = []
        for null in (star - d, swapped[:, m]):
            extreme = np.sum(np.abs(null) >= abs(d) - tie)
            p.append(float((1 + extreme) / (resamples + 1)))  # never 0: the data are one of the resamples
        results[metric] = {
            "a": float(a[m]), "b": float(b[m]), "difference": float(d),
            "ci95": np.quantile(star, [.025, .975]).tolist(),
            "bca95": np.quantile(star, _bca_levels(star, d, tie, jackknives)).tolist(),
            "p": p[0], "p_holm": None, "p_randomisation": p[1] if runs == 2 else None,
            "effect_size": effect, "sd": float(star.std(ddof=1))}
    # several metrics are several chances to be lucky
    for metric, p in zip(metrics, holm([results[metric]["p"] for metric in metrics])):
        results[metric]["p_holm"] = float(p)
    return results


def _resample(arrays, metrics, runs_a, resamples, seed):
    """Scores (M, R), jackknife (n, M), differences of resamples and of swaps, each (resamples, M)."""
    n, runs, _ = next(iter(arrays.values())).shape
    # all statistics side by side, and what they gain where A and B change places: (n, C)
    flat, swap = [], []
    for array in arrays.values():
        flat.append(array.reshape(n, -1))
        swap.append((array[:, ::-1] - array).reshape(n, -1))
    flat, swap = np.concatenate(flat, 1), np.concatenate(swap, 1)
    total = flat.sum(0, keepdims=True)
    sizes = runs_a, runs - runs_a
    sides = np.repeat([1 / sizes[0], -1 / sizes[1]], sizes)  # (R,): d = scores @ sides
    # a stream each, so that items are drawn alike whether seeds are drawn or not
    items, seeds, coins = map(np.random.default_rng, ([seed, 0], [seed, 1], [seed, 2]))
    boot = np.empty((resamples, len(metrics)))
    swapped = np.zeros_like(boot)
    # so many resamples at once: limits memory, and keeps the counts near the processor
    rows = max(32, 2 ** 16 // n)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        part = slice(start, start + size)
        # which seeds of each side, as weights of their scores: (rows, R)
        drawn_a, drawn_b = (_counts(seeds, s, max(1, s - 1), size) / max(1, s - 1) for s in sizes)
        drawn = np.concatenate([drawn_a, -drawn_b], 1)
        # which items, as counts: one product sums the statistics of all runs and metrics
        scores = _scores(_counts(items, n, n, size) @ flat, arrays, metrics)
        boot[part] = np.einsum("bmr,br->bm", scores, drawn)
        # heads: an item's A and B change places, for every metric at once
        if runs == 2:
            heads = coins.integers(0, 2, (size, n), dtype=bool).astype(float)
            swapped[part] = _scores(total + heads @ swap, arrays, metrics) @ sides
    without = _scores(total - flat, arrays, metrics) @ sides
    return _scores(total, arrays, metrics)[0], without, boot, swapped


def _scores(sums, arrays, metrics):
    """Scores of sums that lie side by side as in `arrays`: (rows, C) → (rows, M, R)."""
    parts, start = {}, 0
    for source, array in arrays.items():
        shape = array.shape[1:]
        end = start + shape[0] * shape[1]
        parts[source] = sums[:, start:end].reshape(-1, *shape)
        start = end
    return np.stack([_score(metric, parts[_source(metric)]) for metric in metrics], 1)


def _counts(rng, n, draws, size):
    """How often each of n indices is drawn, in `size` resamples of `draws` each: (size, n)."""
    index = rng.integers(0, n, (size, draws))
    index += n * np.arange(size)[:, None]
    return np.bincount(index.ravel(), minlength=size * n).reshape(size, n).astype(float)


def _bca_levels(star, d, tie, jackknives):
    """The two quantile levels of a 95% BCa interval (Efron, 1987); several samples as in Davison and Hinkley, 1997."""
    normal, cube, square = NormalDist(), 0, 0
    # bias: how far d is from the middle of the resamples; half of the ties lie below
    below = (np.mean(star < d - tie) + np.mean(star <= d + tie)) / 2
    z0 = normal.inv_cdf(float(np.clip(below, .5 / len(star), 1 - .5 / len(star))))
    for jackknife in jackknives:
        u = (jackknife.mean() - jackknife) * (len(jackknife) - 1) / len(jackknife)
        cube, square = cube + (u ** 3).sum(), square + (u ** 2).sum()
    acceleration = cube / (6 * square ** 1.5) if square > tie ** 2 else 0
    shifted = [z0 + normal.inv_cdf(level) for level in (.025, .975)]
    return [normal.cdf(z0 + z / max(1 - acceleration * z, 1e-12)) for z in shifted]


def compare(a_items, b_items, metrics=None, resamples=10_000, seed=0, names=None):
    """The paired comparison of two systems: what `compare --json` writes, as a dictionary.

    a_items, b_items: the items of one run each, or a list of several runs' (training seeds) items.
    metrics: by default all that every run has; `left_out` lists those that only some runs have.
    names: of the runs in errors, A's before B's. Raises InputError.
    """
    a_runs = a_items if isinstance(a_items[0], list) else [a_items]
    b_runs = b_items if isinstance(b_items[0], list) else [b_items]
    if names is None:
        names = ["A"] * len(a_runs) + ["B"] * len(b_runs)
    matched = match(a_runs + b_runs, names)
    chosen, left_out = choose(matched, metrics), []
    if not metrics:
        left_out = [metric for metric in known(matched, any) if metric not in chosen]
        # a stand-in is not tested beside what it stands in for
        chosen = [m for m in chosen if not (m.endswith("_lite") and m.removesuffix("_lite") in chosen)]
    results = paired_test(collect(matched, chosen, names), chosen, len(a_runs), resamples, seed)
    dropped = {}
    for side, runs in (("a", a_runs), ("b", b_runs)):
        ids = {str(item["id"]) for item in chain(*runs)}
        dropped[side] = len(ids) - len(matched[0])
    return {"n": len(matched[0]), "dropped": dropped, "resamples": resamples, "seed": seed,
            "runs": {"a": names[:len(a_runs)], "b": names[len(a_runs):]}, "left_out": left_out, "metrics": results}


def aggregate(runs, metrics=None, names=None):
    """Mean and sample standard deviation of each metric over runs (training seeds) on the same items."""
    names = names or [f"run {i}" for i in range(len(runs))]
    matched = match(runs, names)
    n = len(matched[0])
    for items, name in zip(runs, names):
        if len(items) != n:
            raise InputError(f"{name} has {len(items)} items, {n} of which all runs share: "
                             "evaluate every seed on the same clips")
    chosen = choose(matched, metrics)
    sums = {source: array.sum(0) for source, array in collect(matched, chosen, names).items()}  # (R, K)
    results = {}
    for metric in chosen:
        values = _score(metric, sums[_source(metric)])
        results[metric] = {"mean": float(values.mean()), "values": values.tolist(),
                           "stdev": float(values.std(ddof=1)) if len(runs) > 1 else None}
    return {"n": n, "runs": names, "metrics": results}


# ---- command line

class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        raise InputError(f"{message}: see {self.prog} --help")


def parse_args(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser(
        "compare", help="paired tests and intervals of A - B",
        description="p: of the bootstrap; p Holm: adjusted for the metrics that are shown; p random: A and B swapped for "
                    "each item at random, with one run a side; effect: A - B in standard deviations of the items' differences")
    sub.add_argument("runs", nargs="+", metavar="RUN", help="A B; with several seeds: A0 A1 A2 vs B0 B1 B2")
    sub.add_argument("--resamples", type=int, default=10_000, help="resamples (default 10000)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the resampling (default 0)")
    seeds = commands.add_parser("seeds", help="mean and standard deviation over the seeds of one system")
    seeds.add_argument("runs", nargs="+", metavar="RUN", help="one run for each seed")
    for command in (sub, seeds):
        command.add_argument("--metrics", nargs="+", metavar="METRIC",
                             help=f"{' '.join(METRICS)} or another one in the files (default: all that every run has)")
        command.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    args = parser.parse_args(argv)

    if args.command == "compare":
        runs = list(args.runs)
        if len(runs) == 2:
            runs.insert(1, "vs")
        middle = runs.index("vs") if runs.count("vs") == 1 else 0
        args.a, args.b = runs[:middle], runs[middle + 1:]
        if not args.a or not args.b:
            parser.error(f"cannot tell A from B in {' '.join(runs)!r}, give A B or A0 A1 vs B0 B1")
        if args.resamples < 100:
            parser.error(f"--resamples {args.resamples} is too few for a 95% interval, give at least 100")
        if args.seed < 0:
            parser.error(f"--seed {args.seed} is negative")
    folder = os.path.dirname(args.json or "") or "."
    if args.json and (os.path.isdir(args.json) or not os.access(folder, os.W_OK)):
        parser.error(f"--json {args.json} cannot be written, give a file in a folder that exists")
    return args


def print_table(rows):
    """Columns, the first flush left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print(row[0].ljust(widths[0]), *numbers, sep="  ")


def report_comparison(result):
    names, dropped = result["runs"], result["dropped"]
    drawn = "seeds and items" if len(names["a"]) + len(names["b"]) > 2 else "items"
    print("A ", *names["a"])
    print("B ", *names["b"])
    print(f"n = {result['n']} items matched by id; dropped: {dropped['a']} of A, {dropped['b']} of B; "
          f"{result['resamples']} resamples of {drawn}, seed {result['seed']}\n")
    rows = [["metric", "A", "B", "A - B", "95% percentile", "95% BCa", "p", "p Holm", "p random", "effect"]]
    for metric, r in result["metrics"].items():
        scores = [f"{r['a']:.4f}", f"{r['b']:.4f}", f"{r['difference']:+.4f}"]
        intervals = ["[{:+.4f}, {:+.4f}]".format(*r[key]) for key in ("ci95", "bca95")]
        # "-" where several seeds leave no randomisation test
        ps = ["-" if r[key] is None else f"{r[key]:.2g}" for key in ("p", "p_holm", "p_randomisation")]
        effect = "-" if r["effect_size"] is None else f"{r['effect_size']:+.3f}"
        rows.append([metric, *scores, *intervals, *ps, effect])
    print_table(rows)
    if result["left_out"]:
        print("\nleft out, because only some of the runs have them:", *result["left_out"])


def report_seeds(result):
    print(f"{len(result['runs'])} runs, n = {result['n']} items each\n")
    rows = [["metric", "mean", "stdev"]]
    for metric, r in result["metrics"].items():
        stdev = "-" if r["stdev"] is None else f"{r['stdev']:.4f}"
        rows.append([metric, f"{r['mean']:.4f}", stdev])
    print_table(rows)


def main(argv=None):
    """Exit status: 2, and one line, for a person's mistake and for a full disk."""
    try:
        try:
            work(argv)
        finally:
            sys.stdout.flush()  # what argparse printed may not have left yet either
    except BrokenPipeError:  # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if not isinstance(error, InputError):  # what could not be written is not tried again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    return 0


def work(argv):
    args = parse_args(argv)
    if args.command == "compare":
        a, b = list(map(load, args.a)), list(map(load, args.b))
        result = compare(a, b, args.metrics, args.resamples, args.seed, args.a + args.b)
    else:
        result = aggregate(list(map(load, args.runs)), args.metrics, args.runs)
    if args.json:
        # JSON first: it is what a pipeline waits for
        with open(args.json + ".tmp", "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, allow_nan=False)
        os.replace(args.json + ".tmp", args.json)
    (report_comparison if args.command == "compare" else report_seeds)(result)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a console may not have every letter of a path
    sys.exit(main())
