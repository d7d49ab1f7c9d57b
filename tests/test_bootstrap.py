"""bootstrap.py: identities, agreement with SciPy, calibration, and each bad input."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import bootstrap  # noqa: E402


def meteor_of(lines):
    """METEOR of n SCORE lines: (..., n, 23) → (...)."""
    return bootstrap.meteor(bootstrap.without_single_chunks(lines).sum(-2))


def meteor_stats(n, rng, shift=0.):
    """n x 2 plausible SCORE lines of two systems equally good up to `shift`, alike on each item: (n, 2, 23)."""
    length = rng.integers(5, 15, (n, 2, 2))
    function = rng.binomial(length, .4)
    ease = np.clip(rng.beta(3, 3, (n, 1)) + [shift, 0], 0, 1)[..., None]
    content, words = rng.binomial((length - function).min(-1, keepdims=True), ease), \
        rng.binomial(function.min(-1, keepdims=True), ease)
    kinds = rng.multinomial(content[..., 0], [.7, .1, .1, .1])  # (n, 2, 4)
    stats = np.zeros((n, 2, 23))
    stats[..., 0:2], stats[..., 2:4] = length, function
    stats[..., 4:20:4] = stats[..., 5:20:4] = kinds
    stats[..., 6:8] = words
    stats[..., 21:23] = content + words
    stats[..., 20] = np.ceil(rng.uniform(.2, .8, (n, 2)) * (content + words)[..., 0])
    return stats


def with_ones(values):
    """Item scores (n, R) as sums to be averaged: (n, R, 2)."""
    return np.stack([values, np.ones_like(values)], -1)


def make_items(n=60, seed=0, shift=0., refs=("a dog barks", "dog")):
    rng = np.random.default_rng(seed)
    stats = meteor_stats(n, rng)[:, 0].tolist()
    bleu = [[10, 9, 10, 9, 8, 7, *sorted(rng.integers(0, 8, 4).tolist(), reverse=True)] for _ in range(n)]
    return [{"id": f"clip{i}", "prediction": "a dog", "references": list(refs),
             "scores": {"cider_d": float(rng.gamma(2, .3)) + shift, "rouge_l": float(rng.uniform()),
                        "spice": None, "spider": None, "spider_lite": float(rng.uniform()) + shift / 2},
             "stats": {"meteor": stats[i], "bleu": bleu[i]}} for i in range(n)]


def write(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(items if isinstance(items, str) else json.dumps(items), encoding="utf-8")
    return str(path)


def run(*args, cwd=None, script=ROOT / "bootstrap.py"):
    return subprocess.run([sys.executable, "-I", str(script), *map(str, args)], cwd=cwd, text=True,
                          capture_output=True, timeout=60)


# ---- scores from statistics (what they are equal to: test_evaluate.py)

def test_statistics_keep_leading_shapes():
    stats = meteor_stats(12, np.random.default_rng(0))
    both = meteor_of(stats.swapaxes(0, 1))
    assert both.tolist() == [meteor_of(stats[:, k]) for k in (0, 1)]
    assert meteor_of(np.zeros((2, 3, 23))).tolist() == [0, 0]
    assert not bootstrap.bleu(np.zeros((2, 10))).any()


# ---- identities

def test_a_system_against_itself():
    items = make_items()
    result = bootstrap.compare(items, items, resamples=999)
    assert list(result["metrics"]) == "spider_lite cider_d meteor rouge_l bleu_1 bleu_2 bleu_3 bleu_4".split()
    for r in result["metrics"].values():
        assert r["difference"] == 0 and r["p"] == r["p_holm"] == r["p_randomisation"] == 1 and r["effect_size"] == 0
        assert np.abs([*r["ci95"], *r["bca95"], r["sd"]]).max() < 1e-12
    several = bootstrap.compare([items, items], [items, items, items], resamples=999)
    assert all(r["p"] == 1 and r["p_randomisation"] is None for r in several["metrics"].values())


def test_antisymmetry():
    a, b = make_items(seed=1, shift=.1), make_items(seed=2)
    ab, ba = (bootstrap.compare(x, y, resamples=999)["metrics"] for x, y in ((a, b), (b, a)))
    for metric in ab:
        x, y = ab[metric], ba[metric]
        assert x["a"] == y["b"] and x["p"] == y["p"] and x["p_randomisation"] == y["p_randomisation"]
        for key in ("difference", "effect_size"):
            assert x[key] == pytest.approx(-y[key], abs=1e-12)
        for key in ("ci95", "bca95"):
            assert x[key] == pytest.approx([-v for v in y[key][::-1]], abs=1e-9)


def test_order_of_items_and_choice_of_metrics_change_nothing():
    a, b = make_items(seed=1, shift=.1), make_items(seed=2)
    whole = bootstrap.compare(a, b, resamples=999)["metrics"]
    part = bootstrap.compare(a[::-1], b, ["meteor", "cider_d"], resamples=999)["metrics"]
    for metric in part:
        assert part[metric]["ci95"] == pytest.approx(whole[metric]["ci95"], abs=1e-12)
        assert part[metric]["p"] == whole[metric]["p"]


def test_a_metric_that_one_run_lacks_is_named():
    a, b = make_items(seed=1), make_items(seed=2)
    for item in a:
        item["scores"].update(spice=.1, spider=.2)
        item.pop("stats")
    result = bootstrap.compare(a, b, resamples=999)
    assert list(result["metrics"]) == ["spider_lite", "cider_d", "rouge_l"]
    assert result["left_out"] == "spider meteor spice bleu_1 bleu_2 bleu_3 bleu_4".split()
    for item in b:
        item["scores"].update(spice=.1, spider=.3)
    assert list(bootstrap.compare(a, b, resamples=999)["metrics"]) == ["spider", "cider_d", "spice", "rouge_l"]


def test_any_number_among_the_scores_is_a_metric():
    """Known ones in their order, others after them; true, null and text are no numbers."""
    a, b = make_items(seed=1), make_items(seed=2)
    for k, item in enumerate(a + b):
        item["scores"].update(brightness=k / 7, fer=float(k % 3 == 0), fense=.5 + k / 200, spider_fl=.1 + k / 300,
                              sbert_sim=.6, long=True, note="x")
    a[0]["scores"]["mine"] = .5
    found = bootstrap.compare(a, b, resamples=200)
    assert list(found["metrics"]) == ["spider_lite", "cider_d", "spider_fl", "fense", "meteor", "rouge_l", "sbert_sim", "fer",
                                      "bleu_1", "bleu_2", "bleu_3", "bleu_4", "brightness"]
    assert found["left_out"] == ["mine"]
    values = [[item["scores"]["brightness"] for item in items] for items in (a, b)]
    assert found["metrics"]["brightness"]["difference"] == pytest.approx(np.mean(values[0]) - np.mean(values[1]))
    assert list(bootstrap.compare(a, b, ["brightness"], 200)["metrics"]) == ["brightness"]
    assert list(bootstrap.aggregate([a, b], ["brightness", "fense"])["metrics"]) == ["brightness", "fense"]


def test_seed_zero_is_a_seed():
    a, b = make_items(seed=1), make_items(seed=2)
    first, again, other = (bootstrap.compare(a, b, ["cider_d"], 999, seed) for seed in (0, 0, 1))
    assert first == again and first["metrics"]["cider_d"]["ci95"] != other["metrics"]["cider_d"]["ci95"]


def test_ties_count_in_spite_of_rounding():
    """Seven equal differences: of the 128 swaps, the two that swap all or none are as extreme."""
    for seed in range(8):
        values = np.random.default_rng(seed).uniform(size=(7, 1)) + [.1, 0]
        r = bootstrap.paired_test({"cider_d": with_ones(values)}, ["cider_d"], 1, 9999)["cider_d"]
        assert abs(r["p_randomisation"] - 2 / 128) < .004 and r["p"] == 1 / 10_000 and r["effect_size"] is None


def test_p_is_never_zero_and_effect_is_cohens_d():
    a, b = make_items(seed=1, shift=5.), make_items(seed=2)
    r = bootstrap.compare(a, b, ["cider_d"], 999)["metrics"]["cider_d"]
    d = np.array([x["scores"]["cider_d"] - y["scores"]["cider_d"] for x, y in zip(a, b)])
    assert r["p"] == r["p_randomisation"] == 1 / 1000
    assert r["effect_size"] == pytest.approx(d.mean() / d.std(ddof=1), abs=1e-9)
    assert r["sd"] == pytest.approx(d.std() / len(d) ** .5, rel=.1)
    constant = bootstrap.compare(make_items(shift=.5), make_items(), ["cider_d"], 999)["metrics"]["cider_d"]
    assert constant["effect_size"] is None and constant["ci95"] == pytest.approx([.5, .5])


def test_holm_by_hand():
    assert bootstrap.holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert bootstrap.holm([.6, .5]).tolist() == [1, 1] and bootstrap.holm([.2]).tolist() == [.2]


def test_seeds_mean_and_stdev():
    runs = [make_items(seed=s) for s in range(3)]
    result = bootstrap.aggregate(runs)
    values = [np.mean([item["scores"]["cider_d"] for item in items]) for items in runs]
    r = result["metrics"]["cider_d"]
    assert r["values"] == pytest.approx(values) and r["mean"] == pytest.approx(np.mean(values))
    assert r["stdev"] == pytest.approx(np.std(values, ddof=1))
    assert bootstrap.aggregate(runs[:1])["metrics"]["meteor"]["stdev"] is None


def test_spread_between_seeds_widens_the_interval():
    """Items all equal: what is left is the drawing of seeds, whose variance must be s²/S on each side."""
    a, b = np.array([.1, .3, .4, .9]), np.array([.2, .5])
    values = np.broadcast_to(np.concatenate([a, b]), (20, 6)).copy()
    r = bootstrap.paired_test({"cider_d": with_ones(values)}, ["cider_d"], 4, 20_000)["cider_d"]
    assert r["difference"] == pytest.approx(a.mean() - b.mean())
    assert r["sd"] == pytest.approx((a.var(ddof=1) / 4 + b.var(ddof=1) / 2) ** .5, rel=.03)
    one = bootstrap.paired_test({"cider_d": with_ones(values[:, [0, 4]])}, ["cider_d"], 1, 999)["cider_d"]
    assert one["sd"] < 1e-9


# ---- calibration

def experiments(draw, metric, n=200, times=1000):
    """`times` simulated pairs of systems on n items through the public test: p-values and intervals."""
    results = [bootstrap.paired_test({metric: draw(n, np.random.default_rng([11, i]))}, [metric], 1, 999, i)[metric]
               for i in range(times)]
    return {key: np.array([r[key] for r in results]) for key in ("p", "p_randomisation", "ci95", "bca95")}


def draw_scores(n, rng, shift=0.):
    """Skewed item scores of two systems that find the same items hard."""
    return with_ones(rng.gamma(2, .2, (n, 1)) + rng.gamma(1, .3, (n, 2)) + [shift, 0])


@pytest.mark.parametrize("metric, draw", [("cider_d", draw_scores), ("meteor", meteor_stats)])
def test_type_one_error_is_five_percent(metric, draw):
    found = experiments(draw, metric)
    for key in ("p", "p_randomisation"):
        assert .035 <= np.mean(found[key] < .05) <= .065, key
        assert .45 <= np.mean(found[key] < .5) <= .55, key
        assert found[key].min() > 0
    for key in ("ci95", "bca95"):
        covered = np.mean((found[key][:, 0] <= 0) & (0 <= found[key][:, 1]))
        assert .93 <= covered <= .97, (key, covered)


def test_intervals_cover_a_difference_that_is_not_zero():
    rng = np.random.default_rng(5)
    truth = meteor_of(meteor_stats(400_000, rng, .2).swapaxes(0, 1)) @ [1, -1]
    assert truth > .03
    found = experiments(lambda n, rng: meteor_stats(n, rng, .2), "meteor", times=600)
    for key in ("ci95", "bca95"):
        covered = np.mean((found[key][:, 0] <= truth) & (truth <= found[key][:, 1]))
        assert .93 <= covered <= .97, (key, covered)


@pytest.mark.parametrize("seeds, spread, low, high", [(2, 0., 0., .05), (5, .1, .03, .1)])
def test_type_one_error_with_seeds(seeds, spread, low, high):
    """Cautious where only items differ; near 5% where training seeds do, given five of them."""
    def draw(n, rng):
        runs = rng.normal(0, spread, (1, 2 * seeds))
        return with_ones(rng.gamma(2, .2, (n, 1)) + runs + rng.normal(0, .2, (n, 2 * seeds)))
    p = [bootstrap.paired_test({"cider_d": draw(60, np.random.default_rng([13, i]))}, ["cider_d"], seeds, 499, i)
         ["cider_d"]["p"] for i in range(600)]
    assert low <= np.mean(np.array(p) < .05) <= high


# ---- agreement with SciPy

def test_agrees_with_scipy():
    from scipy import stats
    resamples, n = 20_000, 120
    for metric, array in (("cider_d", draw_scores(n, np.random.default_rng(1), .06)),
                          ("meteor", meteor_stats(n, np.random.default_rng(2), .03))):
        ours = bootstrap.paired_test({metric: array}, [metric], 1, resamples)[metric]

        def difference(i, j):  # SciPy resamples positions; runs are picked by the sign of the index
            def score(index, run):
                return bootstrap._score(metric, array[index, run].sum(-2))
            return score(i, 0) - score(j, 1)

        def statistic(i, j, axis=-1):  # `paired` draws the same positions for both
            return np.concatenate([difference(*part) for part in zip(np.array_split(i, 20), np.array_split(j, 20))]) \
                if i.ndim > 1 else difference(i, j)

        index = np.arange(n)
        for method, key in (("percentile", "ci95"), ("BCa", "bca95")):
            theirs = stats.bootstrap((index, index), statistic, paired=True, vectorized=True, method=method,
                                     n_resamples=resamples, rng=np.random.default_rng(3))
            # Monte Carlo error of a 2.5% quantile is about 2.7 sd / sqrt(resamples); both sides have one
            tolerance = 4 * 2 ** .5 * 2.7 * ours["sd"] / resamples ** .5
            assert np.abs(np.array(ours[key]) - theirs.confidence_interval).max() < tolerance, (metric, key)
        assert ours["sd"] == pytest.approx(theirs.standard_error, rel=.03)

        # positions 0..n-1 are A's items and n..2n-1 are B's, so that "samples" swaps an item's pair
        both = np.concatenate([array[:, 0], array[:, 1]])

        def swapped(i, j, axis=-1):
            return bootstrap._score(metric, both[i].sum(-2)) - bootstrap._score(metric, both[j].sum(-2))

        theirs = stats.permutation_test((index, index + n), swapped, permutation_type="samples", vectorized=True,
                                        n_resamples=resamples, batch=1000, rng=np.random.default_rng(4))
        p = ours["p_randomisation"]
        assert .001 < p < .5  # a p-value in which a difference could be seen
        assert abs(p - theirs.pvalue) < 4 * (2 * p * (1 - p) / resamples) ** .5 + 2 / resamples, metric
        assert abs(p - ours["p"]) < .03


def test_bca_equals_scipy_on_its_own_resamples():
    from scipy import stats
    x = np.random.default_rng(6).lognormal(0, 1.2, 25)  # skewed: bias and acceleration both matter
    theirs = stats.bootstrap((x,), np.mean, n_resamples=2000, rng=np.random.default_rng(7))
    star, jackknife = theirs.bootstrap_distribution, (x.sum() - x) / (len(x) - 1)
    levels = bootstrap._bca_levels(star, x.mean(), 1e-12, [jackknife])
    assert levels[0] > .03 and levels[1] > .98  # well away from 2.5 and 97.5%
    assert np.quantile(star, levels) == pytest.approx(list(theirs.confidence_interval), rel=1e-9)


# ---- the command line

def test_copied_alone_it_compares_and_aggregates(tmp_path):
    shutil.copy(ROOT / "bootstrap.py", tmp_path / "bootstrap.py")
    a, b = make_items(seed=1, shift=.2), make_items(seed=2)
    write(tmp_path / "a" / "predictions.json", a[5:])
    write(tmp_path / "b.json", {"n": 60, "corpus": {}, "items": b[:57]})
    done = run("compare", "a", "b.json", "--metrics", "cider_d", "meteor", "--resamples", "999", "--json", "out.json",
               cwd=tmp_path, script="bootstrap.py")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "n = 52" in done.stdout and "dropped: 3 of A, 5 of B" in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["n"] == 52 and result["dropped"] == {"a": 3, "b": 5} and result["seed"] == 0
    assert list(result["metrics"]) == ["cider_d", "meteor"]
    assert result["metrics"] == bootstrap.compare(a[5:], b[:57], ["cider_d", "meteor"], 999)["metrics"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b.json", "bootstrap.py", "out.json"]

    write(tmp_path / "c" / "predictions.json", make_items(seed=3)[5:])
    done = run("seeds", "a", "c", "--json", "seeds.json", cwd=tmp_path, script="bootstrap.py")
    assert done.returncode == 0 and "55 items" in done.stdout, done.stderr
    assert json.loads((tmp_path / "seeds.json").read_text())["metrics"]["cider_d"]["stdev"] > 0
    done = run("compare", "a", "c", "vs", "b.json", "--resamples", "999", cwd=tmp_path, script="bootstrap.py")
    assert done.returncode == 0 and "seeds and items" in done.stdout, done.stderr


def test_imports_only_numpy_and_the_standard_library():
    code = "import sys, numpy; before = set(sys.modules); import bootstrap; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    names = {name.split(".")[0] for name in done.stdout.split()} - {"bootstrap", "numpy"}
    assert done.returncode == 0 and names <= set(sys.stdlib_module_names) | {"_distutils_hack"}


def edited(change, **options):
    items = make_items(**options)
    change(items)
    return items


def duplicate(items):
    items.append(items[7])


def change_id(value):
    return edited(lambda x: x[3].update(id=value))


BAD = {
    "list id": (change_id(["a", 1]), [], "item 3 of b.json has no id: give it text or an integer"),
    "null id": (change_id(None), [], "item 3 of b.json has no id: give it text or an integer"),
    "float id": (change_id(1.5), [], "item 3 of b.json has no id: give it text or an integer"),
    "whole float id": (change_id(2.0), [], "item 3 of b.json has no id: give it text or an integer"),
    "bool id": (change_id(True), [], "item 3 of b.json has no id: give it text or an integer"),
    "1 and '1'": (edited(lambda x: [x[0].update(id=1), x[1].update(id="1")]), [], "'1' occurs more than once"),
    "surrogate": (edited(lambda x: [x[0].update(id="\ud83d"), x[1].update(id="\ud83d")]), [],
                  "'\ufffd' occurs more than once"),
    "no file": (None, [], "cannot read"),
    "not JSON": ("[{", [], "not JSON (Expecting"),
    "no items": ("[]", [], "holds no items"),
    "another shape": ('{"corpus": {}}', [], "holds no items"),
    "no id": (edited(lambda x: x[3].pop("id")), [], "item 3 of"),
    "no references": (edited(lambda x: x[3].pop("references")), [], "item 3 of b.json has no references"),
    "no scores": (edited(lambda x: x[3].pop("scores")), [], "has no scores"),
    "duplicate": (edited(duplicate), [], "'clip7' occurs more than once"),
    "no shared id": (edited(lambda x: [i.update(id="z" + i["id"]) for i in x]), [], "no id is in all of"),
    "other references": (edited(lambda x: x[9]["references"].append("cat")), [], "references of id 'clip9' differ"),
    "one item": (make_items()[:1], [], "only 1 item"),
    "NaN": (edited(lambda x: x[4]["scores"].update(cider_d=float("nan"))), [], "id 'clip4'"),
    "infinite": (edited(lambda x: x[4]["stats"]["meteor"].__setitem__(0, 1e999)), [], "23 finite numbers"),
    "text": (edited(lambda x: x[4]["scores"].update(cider_d="high")), [], "not a finite number"),
    "short statistics": (edited(lambda x: x[4]["stats"]["bleu"].pop()), [], "10 finite numbers"),
    "one null": (edited(lambda x: x[4]["scores"].update(cider_d=None)), [], "scores.cider_d is null or absent"),
    "null metric": (make_items(), ["--metrics", "spice"], "spice: scores.spice is null or absent"),
    "no statistics": (edited(lambda x: [i.pop("stats") for i in x]), ["--metrics", "meteor"],
                      "stats.meteor is null or absent"),
    "unknown metric": (make_items(), ["--metrics", "cider"], "cider: scores.cider is null or absent in every item: give "
                       "--metrics of spider_lite, cider_d, meteor, rouge_l, bleu_1"),
    "few resamples": (make_items(), ["--resamples", "9"], "at least 100"),
    "negative seed": (make_items(), ["--seed", "-1"], "negative"),
    "not a number": (make_items(), ["--seed", "x"], "invalid int"),
    "three runs": (make_items(), ["third"], "cannot tell A from B"),
    "no such folder": (make_items(), ["--json", "nowhere/out.json"], "nowhere/out.json cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, tmp_path, monkeypatch, capsys):
    content, flags, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.json", make_items(seed=1))
    if content is not None:
        write(tmp_path / "b.json", content)
    before = sorted(os.listdir(tmp_path))
    output = [] if "--json" in flags else ["--json", "out.json"]
    assert bootstrap.main(["compare", "a.json", "b.json", *flags, *output]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert sorted(os.listdir(tmp_path)) == before


def test_odd_but_readable_files_compare_as_they_are(tmp_path):
    """A byte-order mark, half a surrogate, integers as ids and NaN under a key of somebody else change no number."""
    items = make_items(seed=1)
    plain = write(tmp_path / "plain.json", [{**item, "id": str(i)} for i, item in enumerate(items)])
    odd = [{**item, "id": i, "prediction": "a dog \ud83d", "logit": float("nan")} for i, item in enumerate(items)]
    (tmp_path / "odd.json").write_text(json.dumps({"n": 60, "items": odd}), encoding="utf-8-sig")
    other = write(tmp_path / "other.json", [{**item, "id": i} for i, item in enumerate(make_items(seed=2))])
    results = []
    for name in (plain, tmp_path / "odd.json"):
        done = run("compare", name, other, "--resamples", "200", "--json", tmp_path / "out.json")
        assert done.returncode == 0 and not done.stderr, done.stderr
        results.append(json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)["metrics"])
    assert results[0] == results[1]
    cut = write(tmp_path / "cut.json", make_items(seed=1, refs=("a dog \ud83d",)))
    whole = write(tmp_path / "whole.json", make_items(seed=2, refs=("a dog \ufffd",)))
    assert run("compare", cut, whole, "--resamples", "200").returncode == 0


def test_a_closed_pipe_is_no_error(tmp_path):
    a, b = (write(tmp_path / f"{seed}.json", make_items(seed=seed)) for seed in (1, 2))
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed:
        done = subprocess.run([sys.executable, ROOT / "bootstrap.py", "compare", a, b, "--resamples", "200"],
                              stdout=closed, stderr=subprocess.PIPE)
    assert done.returncode == 0 and not done.stderr


def test_a_full_disk_is_one_line_and_no_docstrings_no_console_no_path_are_needed(tmp_path):
    a, b = (write(tmp_path / f"é{seed}.json", make_items(seed=seed)) for seed in (1, 2))
    command = [sys.executable, ROOT / "bootstrap.py"]
    for arguments in (["compare", a, b, "--resamples", "200"], ["--help"]):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([*command, *arguments], stdout=full, stderr=subprocess.PIPE, text=True,
                                  env={**os.environ, "PYTHONUNBUFFERED": ""})
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    env = {**os.environ, "PYTHONOPTIMIZE": "2", "PYTHONSAFEPATH": "1", "LC_ALL": "C", "PYTHONUTF8": "0",
           "PYTHONCOERCECLOCALE": "0"}
    for arguments in (["compare", a, b, "--resamples", "200"], ["--help"]):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=env)
        assert done.returncode == 0 and done.stdout and not done.stderr, done.stderr


def test_seeds_refuses_other_clips_and_a_process_exits_with_two(tmp_path):
    a = write(tmp_path / "a.json", make_items(seed=1))
    b = write(tmp_path / "b.json", make_items(seed=2)[1:])
    done = run("seeds", a, b)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and "59 of which" in done.stderr and done.stderr.count("\n") == 1
