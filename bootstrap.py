"""Is system A better than system B? Paired bootstrap tests and intervals for captioning metrics.

    python bootstrap.py compare RUN_A RUN_B                         # every metric that both have
    python bootstrap.py compare a.json b.json --metrics cider_d meteor --json out.json
    python bootstrap.py compare additive_s* vs concat_s*            # several seeds a side: seeds and items resampled
    python bootstrap.py seeds additive_s0 additive_s1 additive_s2   # mean and sample stdev over seeds

RUN is a run's folder, its predictions.json or a scores.json: a list of items (or {"items": [...]}), each
{"id", "references": [...], "scores": {metric: number}, "stats": {"meteor": [23 numbers], "bleu": [10 numbers]}}.
CIDEr-D, SPICE, SPIDEr, ROUGE-L and the lite scores are means over items. METEOR and BLEU are not: their corpus
scores are ratios of sums, so `stats` is summed over each resample and scored again. This needs numpy alone.

In shape comments: n items, R runs (those of A, then those of B), K statistics an item, C columns, M metrics.
"""
import argparse
import json
import os
import sys
from collections import Counter
from statistics import NormalDist

import numpy as np

# In the order of the tables: what SPIDEr replaces when SPICE has run comes after it.
METRICS = ("spider", "spider_lite", "cider_d", "meteor", "spice", "spice_lite", "rouge_l",
           "bleu_1", "bleu_2", "bleu_3", "bleu_4")
WIDTHS = {"meteor": 23, "bleu": 10}  # sufficient statistics an item


class InputError(ValueError):
    """A person's mistake, told in one line: what, where, what to do."""


# ---- scores from sufficient statistics

def meteor_from_stats(lines):
    """METEOR 1.5 (English, ranking task) of n items from the jar's SCORE lines: (..., n, 23) → (...).

    A line holds the lengths of hypothesis and reference, their function words, then for each matcher (exact, stem,
    synonym, paraphrase) the matched content words of both and the matched function words of both, then chunks and
    matched words of both. Of the sums: with content words weighing .75, function words .25 and the matchers
    1, .6, .8, .6, F = PR / (.85 P + .15 R), and the score is F (1 - .6 (chunks / matched words)^.2)
    (Denkowski and Lavie, "Meteor Universal", 2014).
    """
    return _meteor(_forgive_identical(np.asarray(lines, dtype=float)).sum(-2))


def bleu_from_stats(stats):
    """BLEU-1..4 of n items' [length, closest reference length, guess_1..4, correct_1..4]: (..., n, 10) → (..., 4).

    Papineni et al., 2002, with the two small constants by which pycocoevalcap keeps off a division by zero.
    """
    return _bleu(np.asarray(stats, dtype=float).sum(-2))


def _forgive_identical(lines):
    """Take out the one chunk of a hypothesis identical to its reference, as the jar does before it sums."""
    lines = lines.copy()
    lines[(lines[..., 20] == 1) & (lines[..., 21:23] == lines[..., 0:2]).all(-1), 20] = 0
    return lines


def _meteor(sums):  # (..., 23) → (...)
    alpha, beta, gamma, delta = .85, .2, .6, .75
    length, function = sums[..., 0:2], sums[..., 2:4]  # (..., 2): hypothesis, reference
    weights = np.outer([1, .6, .8, .6], [delta, 1 - delta]).ravel()  # matcher, then content or function
    weighted = sums[..., 4:20] @ np.kron(weights[:, None], np.eye(2))  # (..., 16) @ (16, 2)
    precision, recall = np.moveaxis(_ratio(weighted, delta * (length - function) + (1 - delta) * function), -1, 0)
    f_mean = _ratio(precision * recall, alpha * precision + (1 - alpha) * recall)
    fragmentation = _ratio(sums[..., 20], sums[..., 21:23].mean(-1))
    return f_mean * (1 - gamma * fragmentation ** beta)


def _ratio(x, y):
    return np.divide(x, y, out=np.zeros(np.shape(x)), where=y > 0)


def _bleu(sums):  # (..., 10) → (..., 4)
    small, tiny = 1e-9, 1e-15
    precision = (sums[..., 6:10] + tiny) / (sums[..., 2:6] + small)
    ratio = (sums[..., :1] + tiny) / (sums[..., 1:2] + small)
    return np.cumprod(precision, -1) ** (1 / np.arange(1, 5)) * np.exp(np.minimum(0, 1 - 1 / ratio))


def _source(metric):
    return "bleu" if metric.startswith("bleu_") else metric


def _score(metric, sums):
    """Corpus score of one metric from its summed statistics: (..., K) → (...)."""
    if metric == "meteor":
        return _meteor(sums)
    if _source(metric) == "bleu":
        return _bleu(sums)[..., int(metric[5:]) - 1]
    return sums[..., 0] / sums[..., 1]  # a sum of item scores over the number of items


# ---- reading and matching

def load(path):
    """Items of a run's folder, a predictions.json or a scores.json. Raises InputError."""
    path = os.path.join(path, "predictions.json") if os.path.isdir(path) else path
    try:
        with open(path, encoding="utf-8") as file:
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
    needed = (("id", (str, int), "give every item the id of its clip"),
              ("references", list, "add them, so that both systems can be seen to have been scored alike"),
              ("scores", dict, f"run python evaluate.py score {path} --out scores.json"))
    for i, item in enumerate(items):
        for key, kind, cure in needed:
            if not isinstance(item, dict) or not isinstance(item.get(key), kind):
                raise InputError(f"item {i} of {path} has no {key}: {cure}")
    return items


def match(runs, names):
    """The items that all runs share, sorted by id, so that the order of a file changes nothing: R lists of n items.

    Raises InputError for duplicates, no shared id, and references that differ.
    """
    tables = []
    for items, name in zip(runs, names):
        (twice, times), = Counter(str(item["id"]) for item in items).most_common(1)
        if times > 1:
            raise InputError(f"id {twice!r} occurs more than once in {name}: keep one prediction a clip")
        tables.append({str(item["id"]): item for item in items})
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    if not shared:
        raise InputError(f"no id is in all of {', '.join(names)}: compare runs of the same test set")
    for table, name in zip(tables[1:], names[1:]):
        for key in shared:
            if sorted(map(str, table[key]["references"])) != sorted(map(str, tables[0][key]["references"])):
                raise InputError(f"the references of id {key!r} differ between {names[0]} and {name}: "
                                 "score both against the same references")
    return [[table[key] for key in shared] for table in tables]


def choose(runs, metrics=None):
    """The metrics asked for, checked by name, or by default every one that all runs have (null in no whole run)."""
    if metrics:
        unknown = [metric for metric in metrics if metric not in METRICS]
        if unknown:
            raise InputError(f"unknown metric {unknown[0]!r} in --metrics: choose from {' '.join(METRICS)}")
        return list(dict.fromkeys(metrics))
    chosen = [metric for metric in METRICS
              if all(any(_raw(item, metric) is not None for item in items) for items in runs)]
    if not chosen:
        raise InputError("no metric has scores in every run: score them all with evaluate.py score")
    return chosen


def _raw(item, metric):
    source = _source(metric)
    if source not in WIDTHS:
        return item["scores"].get(metric)
    return item["stats"].get(source) if isinstance(item.get("stats"), dict) else None


def collect(runs, metrics, names):
    """{source: (n, R, K)}: what must be summed over items, and scored, for each metric. Raises InputError."""
    arrays = {}
    for source, metric in {_source(metric): metric for metric in metrics}.items():
        width = WIDTHS.get(source, 2)
        rows = []
        for items, name in zip(runs, names):
            for item in items:
                row, where = _raw(item, metric), f"id {str(item['id'])!r} of {name}"
                key = f"stats.{source}" if source in WIDTHS else f"scores.{metric}"
                if row is None:
                    raise InputError(f"{metric}: {key} is null or absent for {where}: score that file with "
                                     f"evaluate.py, or name --metrics without {metric}")
                row = row if source in WIDTHS else [row, 1]
                # `abs(...) < 1e300` is false for NaN and infinity too
                if not (isinstance(row, list) and len(row) == width
                        and all(type(value) in (int, float) and abs(value) < 1e300 for value in row)):
                    raise InputError(f"{metric}: {key} is not {width if source in WIDTHS else 'a'} finite "
                                     f"number{'s' * (source in WIDTHS)} for {where}: score that file again")
                rows.append(row)
        arrays[source] = np.array(rows, dtype=float).reshape(len(runs), -1, width).swapaxes(0, 1)
    if "meteor" in arrays:
        arrays["meteor"] = _forgive_identical(arrays["meteor"])
    return arrays


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

    arrays: {source: (n, R, K)}, as `collect` makes them. One resample draws n items with replacement, the same for
    all runs and metrics, sums their statistics, scores them and takes the difference d*. With several runs a side,
    runs (training seeds) are drawn too, each side on its own: s - 1 of s, because s of s would make the variance of
    their mean too small by (s - 1)/s (Rao and Wu, 1988). Items are not drawn within runs, as all runs see the same
    test set. Noise of single items then counts at both levels, which is cautious (Owen, 2007); few seeds are not:
    where the spread between seeds dominates, 24% (2 seeds), 12% (3), 6% (5) of null comparisons gave p < .05.
    One run a side says nothing about other seeds.

    a, b, difference   scores (means over runs) and d = a - b
    sd, ci95           standard deviation and 2.5 and 97.5% quantiles of d*
    bca95              bias-corrected and accelerated interval (Efron, 1987), acceleration from the jackknife over
                       items, and over the runs of a side where there are several
    p                  two-sided, of d* shifted to the null: (1 + #{|d* - d| >= |d|}) / (resamples + 1), never 0
    p_randomisation    two-sided, swapping A and B item by item with probability 1/2 (Noreen, 1989); None with
                       several runs, as it would leave out the spread between seeds
    p_holm             p adjusted for the number of metrics
    effect_size        d over the standard deviation, over items, of the jackknife's pseudo-values n d - (n - 1) d_-i.
                       For a mean of item scores they are the paired differences, and this is Cohen's d_z
    """
    n, runs, _ = next(iter(arrays.values())).shape
    if n < 2:
        raise InputError("only 1 item is shared: there is nothing to resample, score at least 2")
    sizes = runs_a, runs - runs_a
    slices, start = {}, 0
    for source, array in arrays.items():
        slices[source] = slice(start, start := start + runs * array.shape[2])
    flat = np.concatenate([array.reshape(n, -1) for array in arrays.values()], 1)  # (n, C)
    swap = np.concatenate([(array[:, ::-1] - array).reshape(n, -1) for array in arrays.values()], 1) \
        if sizes == (1, 1) else None

    def scores(sums):  # (rows, C) → (rows, M, R)
        return np.stack([_score(m, sums[:, slices[_source(m)]].reshape(len(sums), runs, -1)) for m in metrics], 1)

    total = flat.sum(0, keepdims=True)
    point = scores(total)[0]  # (M, R)
    a, b = point[:, :runs_a].mean(1), point[:, runs_a:].mean(1)
    sides = np.repeat([1 / sizes[0], -1 / sizes[1]], sizes)  # (R,)
    without = scores(total - flat) @ sides  # (n, M): the jackknife

    items, seeds, coins = (np.random.default_rng([seed, stream]) for stream in range(3))
    boot = np.empty((resamples, len(metrics)))
    random = np.zeros_like(boot)
    rows = max(32, 2 ** 16 // n)  # flat memory, and counts that stay near the processor
    np.empty(2 ** 21)  # freed untouched: from then on glibc keeps blocks below 16 MB for reuse, twice as fast
    for start in range(0, resamples, rows):
        part = slice(start, min(start + rows, resamples))
        size = part.stop - part.start
        drawn = np.concatenate([sign * _counts(seeds, s, max(1, s - 1), size) / max(1, s - 1)
                                for s, sign in zip(sizes, (1, -1))], 1)  # (rows, R)
        boot[part] = np.einsum("bmr,br->bm", scores(_counts(items, n, n, size) @ flat), drawn)
        if swap is not None:
            heads = coins.integers(0, 2, (size, n), dtype=bool).astype(float)
            random[part] = scores(total + heads @ swap) @ sides

    results = {}
    for m, metric in enumerate(metrics):
        d, star = a[m] - b[m], boot[:, m]
        tie = 1e-12 * max(1, abs(a[m]), abs(b[m]))  # sums in another order differ in the last bits
        jackknives = [without[:, m]] + [(x.sum() - x) / (len(x) - 1) for x in (point[m, :runs_a], point[m, runs_a:])
                                        if len(x) > 1]
        spread = (n * d - (n - 1) * without[:, m]).std(ddof=1)
        p = [(1 + np.sum(np.abs(null) >= abs(d) - tie)) / (resamples + 1) for null in (star - d, random[:, m])]
        results[metric] = {
            "a": float(a[m]), "b": float(b[m]), "difference": float(d),
            "ci95": np.quantile(star, [.025, .975]).tolist(),
            "bca95": np.quantile(star, _bca_levels(star, d, tie, jackknives)).tolist(),
            "p": float(p[0]), "p_holm": None, "p_randomisation": float(p[1]) if swap is not None else None,
            "effect_size": float(d / spread) if spread > n * tie else 0.0 if abs(d) <= tie else None,
            "sd": float(star.std(ddof=1))}
    for metric, p in zip(metrics, holm([results[metric]["p"] for metric in metrics])):
        results[metric]["p_holm"] = float(p)
    return results


def _counts(rng, n, draws, size):
    """How often each of n things is drawn, in `size` resamples of `draws` each: (size, n)."""
    index = rng.integers(0, n, (size, draws))
    index += n * np.arange(size)[:, None]
    return np.bincount(index.ravel(), minlength=size * n).reshape(size, n).astype(float)


def _bca_levels(star, d, tie, jackknives):
    """The two quantile levels of a 95% BCa interval (Efron, 1987); several samples as in Davison and Hinkley, 1997."""
    normal, cube, square = NormalDist(), 0, 0
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
    names: what errors call the runs, A's before B's. Raises InputError.
    """
    sides = [items if isinstance(items[0], list) else [items] for items in (a_items, b_items)]
    everything = sides[0] + sides[1]
    names = names or [f"{side}{i if len(runs) > 1 else ''}" for side, runs in zip("AB", sides)
                      for i in range(len(runs))]
    matched = match(everything, names)
    chosen = choose(matched, metrics)
    missing = [m for m in METRICS if not metrics and m not in chosen
               and any(_raw(item, m) is not None for items in matched for item in items)]
    if not metrics:  # the stand-ins only where the real ones are missing
        chosen = [m for m in chosen if not (m.endswith("_lite") and m.removesuffix("_lite") in chosen)]
    results = paired_test(collect(matched, chosen, names), chosen, len(sides[0]), resamples, seed)
    dropped = [len({str(item["id"]) for items in runs for item in items}) - len(matched[0]) for runs in sides]
    return {"n": len(matched[0]), "dropped": dict(zip("ab", dropped)), "resamples": resamples, "seed": seed,
            "runs": {"a": names[:len(sides[0])], "b": names[len(sides[0]):]}, "left_out": missing, "metrics": results}


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
    sub = commands.add_parser("compare", help="paired tests and intervals of A - B")
    sub.add_argument("runs", nargs="+", metavar="RUN", help="A B; with several seeds: A0 A1 A2 vs B0 B1 B2")
    sub.add_argument("--resamples", type=int, default=10_000, help="resamples (default 10000)")
    sub.add_argument("--seed", type=int, default=0, help="seed of the resampling (default 0)")
    seeds = commands.add_parser("seeds", help="mean and sample stdev over the seeds of one system")
    seeds.add_argument("runs", nargs="+", metavar="RUN", help="one run a seed")
    for command in (sub, seeds):
        command.add_argument("--metrics", nargs="+", metavar="METRIC",
                             help=f"of {' '.join(METRICS)} (default: all that every run has)")
        command.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    args = parser.parse_args(argv)

    if args.command == "compare":
        runs = args.runs if len(args.runs) != 2 else [args.runs[0], "vs", args.runs[1]]
        middle = runs.index("vs") if runs.count("vs") == 1 else 0
        args.a, args.b = runs[:middle], runs[middle + 1:]
        if not args.a or not args.b:
            raise InputError(f"cannot tell A from B in {' '.join(runs)!r}: give two runs, A B, or several a side "
                             "with the word vs between: A0 A1 vs B0 B1")
        if args.resamples < 100:
            raise InputError(f"--resamples {args.resamples} is too few for a 95% interval: give at least 100")
        if args.seed < 0:
            raise InputError(f"--seed {args.seed} is negative: give 0 or more")
    if args.json and (os.path.isdir(args.json) or not os.access(os.path.dirname(args.json) or ".", os.W_OK)):
        raise InputError(f"--json {args.json} cannot be written: give a file in a folder that exists")
    return args


def table(rows):
    """Lines of columns, the first flush left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])])
                     for row in rows)


def report_comparison(result):
    several = len(result["runs"]["a"]) + len(result["runs"]["b"]) > 2
    for side in "ab":
        print(f"{side.upper()}  {' '.join(result['runs'][side])}")
    print(f"n = {result['n']} items matched by id; dropped: {result['dropped']['a']} of A, {result['dropped']['b']} "
          f"of B; {result['resamples']} resamples of {'seeds and items' if several else 'items'}, "
          f"seed {result['seed']}\n")
    rows = [["metric", "A", "B", "A - B", "95% percentile", "95% BCa", "p", "p Holm", "p swaps", "effect"]]
    for metric, r in result["metrics"].items():
        rows.append([metric, f"{r['a']:.4f}", f"{r['b']:.4f}", f"{r['difference']:+.4f}",
                     *("[{:+.4f}, {:+.4f}]".format(*r[key]) for key in ("ci95", "bca95")),
                     *("-" if r[key] is None else f"{r[key]:.2g}" for key in ("p", "p_holm", "p_randomisation")),
                     "-" if r["effect_size"] is None else f"{r['effect_size']:+.3f}"])
    print(table(rows))
    if result["left_out"]:
        print(f"\nleft out, as only some of the runs have them: {' '.join(result['left_out'])}")


def report_seeds(result):
    print(f"{len(result['runs'])} runs, n = {result['n']} items each\n")
    print(table([["metric", "mean", "stdev"]] +
                [[metric, f"{r['mean']:.4f}", "-" if r["stdev"] is None else f"{r['stdev']:.4f}"]
                 for metric, r in result["metrics"].items()]))


def main(argv=None):
    try:
        args = parse_args(argv)
        if args.command == "compare":
            result = compare([load(path) for path in args.a], [load(path) for path in args.b], args.metrics,
                             args.resamples, args.seed, args.a + args.b)
        else:
            result = aggregate([load(path) for path in args.runs], args.metrics, args.runs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        with open(args.json + ".tmp", "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1, allow_nan=False)
        os.replace(args.json + ".tmp", args.json)
    (report_comparison if args.command == "compare" else report_seeds)(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
