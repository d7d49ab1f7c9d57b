"""Costs as ratios: two ways of doing the same, timed in turn in one process, on a made-up model and captions.

    python tests/bench.py                            # every bench at the stand-in's size, minutes
    python tests/bench.py step prefix memory --wide  # 16 layers of width 1024: arithmetic counts, not overhead
    python tests/bench.py tiny ranks scst            # with a finished run and its world: --runs, --world
    python tests/bench.py 7b                         # LLaVA-1.5-7B with random weights, on a GPU
    python tests/bench.py memory7b time7b            # its memory and operations, counted without a GPU, minutes

Weights are random, so only costs are measured. Results that must be equal in both ways are compared, and a
difference ends with exit status 1. No time is ever asserted: `target` is what a ratio should reach, and * marks
those that do not. Shapes: B clips, P prompt positions, T caption positions, K samples a clip.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from unittest import mock

os.environ.setdefault("TQDM_DISABLE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import data  # noqa: E402  first of the repository: it makes torchaudio importable
import bench7b  # noqa: E402
import evaluate  # noqa: E402
import fusion as fusions  # noqa: E402
import scst  # noqa: E402
from random_llava import (  # noqa: E402
    MAX_WORDS, MEAN_WORDS, PROMPT_WORDS, KeepStep, RandomBackbone, ScstStep, Step, branches, make_model)
from timing import Metered, Table, peak, ratio, share_of_matmul  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

MAX_NEW_TOKENS = 16  # random weights do not end captions; trained ones are hardly longer


class World:
    """What the benches of models share: a backbone, batch size, layers {6} and {3,6} of 8 or as deep."""

    def __init__(self, args):
        size = (16, 1024, 2752, 16) if args.wide else (8, 128, 256, 4)
        self.backbone = RandomBackbone(*size, vocabulary=1400, device=data.default_device())
        self.clips = args.clips or (8 if args.wide else 32)
        self.depth = len(self.backbone.decoder.layers)
        low, high = self.depth * 3 // 8, self.depth * 6 // 8
        self.layers = {"{6}": [high], "{3,6}": [low, high]}

    def additive(self, layers):
        return Step(make_model(self.backbone, "additive", layers), self.clips)

    def prefix(self):
        """The usual way: a prefix of audio tokens that passes all layers."""
        return Step(make_model(self.backbone, "concat", [0]), self.clips)


# ---------------------------------------------------------------- training

def bench_step(table, world):
    """Additive on kept trunk states, and the same losses through the whole decoder."""
    for name, layers in world.layers.items():
        ours = world.additive(layers)
        above, depth = world.depth - layers[0], world.depth
        whole = make_model(world.backbone, "additive", layers, split_layer=0)
        ways = (("whole decoder, differentiated", True, depth / above),
                ("whole, autograd stopping at the fusion", False, (depth + above) / (2 * above)))
        for what, differentiated, bound in ways:
            other = Step(whole, world.clips, differentiated=differentiated)
            table.equal(f"loss at {name}", abs(ours.loss().item() - other.loss().item()), 1e-5)
            counted = other.flops() / ours.flops()
            table.compare(f"{name}, {what}", ours, other, 1e3, "ms", target=0.9 * bound if table.args.wide else None,
                          note=f"bound {bound:.2f} by layers, {counted:.2f} by counted products")


def bench_prefix(table, world):
    """Additive on kept trunk states, and the prefix."""
    prefix = world.prefix()
    for (name, layers), target in zip(world.layers.items(), (3.0, 1.5)):
        ours = world.additive(layers)
        table.compare(f"{name}, concat --layers 0", ours, prefix, 1e3, "ms", target=target,
                      note=f"{prefix.flops() / ours.flops():.2f} by counted products")


def bench_memory(table, world):
    """Bytes kept for the backward pass, and on a GPU the peak of the whole step."""
    prefix = world.prefix()
    for name, layers in world.layers.items():
        ours = world.additive(layers)
        target = 0.4 if name == "{6}" else None
        a, b = ours.saved() / 1e6, prefix.saved() / 1e6
        table.row(f"{name}, kept for backward, of the prefix's", a, b, "MB", a / b, target=target, at_most=True)
        if torch.cuda.is_available():
            a, b = peak(ours) / 1e6, peak(prefix) / 1e6
            table.row(f"{name}, peak above the weights, of the prefix's", a, b, "MB", a / b, target=target,
                      at_most=True)
    kept = ours.answers.states.nbytes / world.clips
    table.row("trunk states of a training caption", kept / 1e3, unit="kB", note="in memory or in a mapped file")


def bench_mfu(table, world):
    target = 0.6 if table.args.wide else None
    for name, layers in world.layers.items():
        share_of_matmul(table, f"additive {name}: share of the rate of one product", world.additive(layers),
                        target=target)
    share_of_matmul(table, "prefix: share of the rate of one product", world.prefix(), target=target)


def bench_scst(table, world):
    """An SCST step and an XE step of the same clips, K = 5: of random weights, and as trained runs logged it."""
    for name, layers in world.layers.items():
        xe = world.additive(layers)
        own = ScstStep(xe.model, world.clips)
        reward = Metered(own.reward.score_many, table)
        own.reward.score_many = reward
        sampling = Metered(scst.sample_tree, table)
        with mock.patch.object(scst, "sample_tree", sampling):
            own()
            reward.spent = sampling.spent = 0.0
            a, b = table.in_turn(own, xe, warm=False)
        # samples pass all L layers to be drawn, and the head there and back; a caption the head alone
        L, k = world.depth, layers[0]
        positions = PROMPT_WORDS + 1 + 5 * MAX_WORDS
        bound = positions * (3 * L - 2 * k) / ((PROMPT_WORDS + 2 + MEAN_WORDS) * 2 * (L - k))
        table.row(f"{name}, SCST step over XE step, nothing shared", statistics.median(a) * 1e3,
                  statistics.median(b) * 1e3, "ms", ratio(b, a), note=f"{bound:.1f} by layers and positions")
        total = sum(a)
        for part, meter, target in (("reward", reward, 0.05), ("sampling", sampling, None)):
            table.row(f"{name}, {part} in an SCST step", meter.spent / len(a) * 1e3, total / len(a) * 1e3, "ms",
                      meter.spent / total, target=target, at_most=True)
    if not table.args.runs:
        print(f"{'scst':10s}as trained: not run, it needs --runs, the folder of a finished sweep")
        return
    for path in sorted(table.args.runs.rglob("log.jsonl")):
        a, b = milliseconds_a_clip(path, "scst"), milliseconds_a_clip(path, "xe")
        if a:  # a trained policy: most samples of a clip begin alike, and that is computed once
            a, b = statistics.median(a), statistics.median(b)
            table.row(f"{path.parent.name}, SCST step over XE step, a clip", a, b, "ms", a / b, target=4, at_most=True)


def bench_keep(table, world):
    """A step that also keeps the answers to as many questions, and a step without; text: a question without an image."""
    for name, layers in world.layers.items():
        plain = world.additive(layers)
        for what, positions in (("16 patches", 36), ("576 patches", 596), ("text", 20)):
            keeping = KeepStep(plain.model, world.clips, positions)
            table.compare(f"{name}, {what}: with keep over without", plain, keeping, 1e3, "ms")
            steps = (plain, plain, plain, keeping)
            table.compare(f"{name}, {what}: every fourth step", lambda: [plain() for _ in range(4)],
                          lambda: [step() for step in steps], 1e3, "ms", repeats=3)


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def milliseconds_a_clip(path, stage):
    """Of the steps of a stage in a log.jsonl."""
    return [1e3 / x["clips_per_second"] for x in read_log(path) if x["event"] == "step" and x["stage"] == stage]


def bench_ranks(table, world):
    """Clips a second of train.py in a stand-in world (--world): one process, and two by torchrun, a thread each."""
    folder = table.args.world
    if not folder:
        print(f"{'ranks':10s}not run: it needs --world, a folder of tests/standin.py")
        return
    rates = {}
    flags = ["--data", folder / "data/audiocaps", "--llava", folder / "models/llava", "--encoder",
             folder / "models/clap", "--layers", "3", "6", "--contrastive", "0.1", "--batch-size", "32",
             "--steps", "61", "--eval-every", "61"]
    with tempfile.TemporaryDirectory() as out:
        for job, processes in enumerate((1, 1, 2)):  # the first only fills the cache of features
            command = [sys.executable]
            if processes == 2:
                command += ["-m", "torch.distributed.run", "--nproc-per-node=2"]
            run = Path(out, str(job))
            subprocess.run([*command, ROOT / "train.py", *flags, "--cache", Path(out, "cache"), "--out", run],
                           check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            steps = [x for x in read_log(run / "log.jsonl") if x["event"] == "step"]
            rates[processes] = statistics.median(x["clips_per_second"] for x in steps[1:])
    table.row("clips a second: two gloo ranks, one process", rates[2], rates[1], "1/s", rates[2] / rates[1],
              note="2 with twice the cores")


# ---------------------------------------------------------------- decoding and features

def bench_decode(table, world):
    """Beam-5 captions of a batch, and of one clip at a time; both with the cache of keys and values."""
    model = make_model(world.backbone, "additive", world.layers["{3,6}"])
    model.fusion.set_gates(0.1)
    clips, few = len(world.backbone.features), 8 if table.args.wide else 16

    def decode(clips, batch_size):
        candidates = evaluate.decode(world.backbone, branches(model), [""] * clips, beams=5, batch_size=batch_size)
        return [clip[0]["text"] for clip in candidates]

    together, alone = decode(clips, 64), decode(few, 1)
    table.equal("captions that differ", sum(a != b for a, b in zip(together, alone)), 0)
    repeats = max(1, table.args.repeats // 3)
    a, b = table.in_turn(lambda: decode(clips, 64), lambda: decode(few, 1), repeats=repeats, warm=False)
    a, b = [t / clips for t in a], [t / few for t in b]
    words = statistics.mean(len(caption.split()) for caption in together)
    table.row("beam 5, a clip: 64 clips at once, one at a time", statistics.median(a) * 1e3,
              statistics.median(b) * 1e3, "ms", ratio(a, b), target=6, note=f"{words:.1f} words a caption")


def bench_features(table, world):
    """An epoch of features from the cache, and of decoding and encoding every clip again."""
    import standin
    from scipy.io import wavfile
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        processor = standin.clap_processor(made_captions(200)[0])
        standin.save(folder / "clap", standin.clap_model(processor, 0), processor)
        encoder = data.ClapEncoder(folder / "clap", data.default_device())
        clips = []
        for i in range(table.args.clips or 64):
            wave = draw.standard_normal(4 * encoder.rate).astype(np.float32) / 9
            wavfile.write(folder / f"{i}.wav", encoder.rate, wave)
            clips.append(data.Clip(str(i), folder / f"{i}.wav", ["a sound"]))
        start = table.now()
        features = data.load_features(data.Split("train", clips, []), encoder, folder / "cache")
        filling = table.now() - start
        batches = [range(i, min(i + 32, len(clips))) for i in range(0, len(clips), 32)]

        def cached():
            return [fusions.pad_frames([features[i] for i in batch])[0] for batch in batches]

        def encoded():
            frames = []
            for batch in batches:
                waves = [data.decode_audio(clips[i].path, encoder.rate) for i in batch]
                frames.append(fusions.pad_frames(encoder.encode(waves))[0])
            return frames

        differences = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(cached(), encoded())]
        table.equal("features, cached in half precision, over the largest", max(differences), 1e-3)
        table.compare("an epoch, a clip: cached, encoded again", cached, encoded, 1e3 / len(clips), "ms", target=20,
                      note=f"{1e3 * filling / len(clips):.1f} ms a clip to fill the cache, once")


# ---------------------------------------------------------------- scores and statistics

def made_captions(n):
    """n captions of the stand-in world's scenes, and five references for each."""
    import standin
    rng = np.random.default_rng(0)
    hypotheses, references, earlier = [], [], []
    for _ in range(n):
        scene = standin.draw_scene(rng)
        # a scene with few paraphrases gives some twice, as short captions do
        texts = [standin.caption(scene, rng) for _ in range(6)]
        hypothesis = texts[0]
        if earlier and rng.random() > 0.7:  # one that is wrong
            hypothesis = earlier[rng.integers(len(earlier))]
        hypotheses.append(hypothesis)
        references.append(texts[1:])
        earlier.append(texts[0])
    return hypotheses, references


def for_pycocoevalcap(hypotheses, references):
    return dict(enumerate(references)), {i: [h] for i, h in enumerate(hypotheses)}


def bench_cider(table, world):
    """CIDEr-D of 1,000 captions with five references: scst.py, and pycocoevalcap."""
    from pycocoevalcap.cider.cider import Cider
    hypotheses, references = made_captions(table.args.items)
    gts, res = for_pycocoevalcap(hypotheses, references)
    theirs = Cider().compute_score(gts, res)[1]
    table.equal("CIDEr-D", np.abs(np.array(scst.cider_d(hypotheses, references)) - theirs).max(), 1e-9)
    table.compare(f"{len(hypotheses)} captions, pycocoevalcap", lambda: scst.cider_d(hypotheses, references),
                  lambda: Cider().compute_score(gts, res), 1e3, "ms", target=5)
    reward, clips = scst.CiderD(references, end=True), len(hypotheses) // 5
    five = [h for h in hypotheses[:clips] for _ in range(5)], [r for r in references[:clips] for _ in range(5)]
    gts, res = for_pycocoevalcap(*five)
    table.compare("as a reward: known references, 5 samples a clip", lambda: reward.score_many(*five),
                  lambda: Cider().compute_score(gts, res), 1e3, "ms")


def bench_score(table, world):
    """All metrics of 1,000 captions at once, and scorer by scorer, each after a tokeniser pass of its own."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    hypotheses, references = made_captions(table.args.items)
    items = [{"id": i, "prediction": h, "references": r} for i, (h, r) in enumerate(zip(hypotheses, references))]
    gts = {i: [{"caption": r} for r in rs] for i, rs in enumerate(references)}
    res = {i: [{"caption": h}] for i, h in enumerate(hypotheses)}
    os.environ["PATH"] = f"{Path(evaluate.java()).parent}{os.pathsep}{os.environ['PATH']}"
    results = {}

    def together():  # as in a new process: nothing tokenised yet, no Java running
        evaluate._tokenised.clear()
        evaluate._content.cache_clear()
        evaluate.meteor().meteor_p.kill()
        evaluate.meteor.cache_clear()
        results["ours"] = evaluate.score(items)["corpus"]

    def separately():
        results["theirs"] = {}
        for scorer, names in ((Bleu(4), ["bleu_1", "bleu_2", "bleu_3", "bleu_4"]), (Rouge(), ["rouge_l"]),
                              (Meteor(), ["meteor"]), (Cider(), ["cider_d"])):
            quiet = {"verbose": 0} if isinstance(scorer, Bleu) else {}
            value, _ = scorer.compute_score(PTBTokenizer().tokenize(gts), PTBTokenizer().tokenize(res), **quiet)
            results["theirs"].update(zip(names, value if len(names) > 1 else [value]))

    repeats = max(1, table.args.repeats // 3)
    a, b = table.in_turn(together, separately, repeats=repeats, warm=False)
    for metric, value in results["theirs"].items():
        table.equal(metric, abs(results["ours"][metric] - value), 1e-9)
    table.row(f"{len(items)} captions, scorer by scorer", statistics.median(a), statistics.median(b), "s", ratio(a, b),
              target=1.5, note="ours with spice_lite and spider_lite too")


def bench_bootstrap(table, world):
    """10,000 paired resamples of 1,000 items and 5 metrics: bootstrap.py, and SciPy's default call for each."""
    import bootstrap
    import scipy.stats
    metrics, n, resamples = ["spider", "spider_lite", "cider_d", "spice_lite", "rouge_l"], table.args.items, 10_000
    draw = np.random.default_rng(0)
    base = draw.gamma(2.0, 0.3, (n, len(metrics)))
    sides = [base + 0.1 * k + 0.2 * draw.standard_normal(base.shape) for k in range(2)]
    items = []
    for side in sides:
        items.append([{"id": str(i), "references": ["a"], "scores": dict(zip(metrics, row.tolist()))}
                      for i, row in enumerate(side)])

    def ours():
        return bootstrap.compare(*items, metrics, resamples)["metrics"]

    def theirs():
        return [scipy.stats.bootstrap((a, b), lambda a, b, axis=-1: (a - b).mean(axis=axis), paired=True,
                                      n_resamples=resamples, rng=0) for a, b in zip(sides[0].T, sides[1].T)]

    table.compare(f"{n} items, {len(metrics)} metrics, 10,000 resamples", ours, theirs, 1e3, "ms", target=5,
                  note="SciPy's has no p-values")
    used = []
    for function in (ours, theirs):
        tracemalloc.start()
        function()
        used.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
    table.row("peak memory (tracemalloc)", *used, "MB", used[1] / used[0], note="ours should stay under 200 MB")


# ---------------------------------------------------------------- whole runs

def starter(*command):
    """A function that runs Python with these arguments."""
    return lambda: subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)


def bench_tiny(table, world):
    """Start-up of each script, and the share of imports and of Java in the time of a finished sweep (--runs)."""
    scripts = ["bootstrap.py", "plots.py", "train.py", "evaluate.py"]
    starts = [starter(script, "--help") for script in scripts]
    base, *taken = table.in_turn(starter("-c", "import numpy"), *starts, repeats=3, warm=False)
    start_up = {}
    for script, times in zip(scripts, taken):
        start_up[script] = statistics.median(times)
        table.row(f"{script} --help over `import numpy`", start_up[script], statistics.median(base), "s",
                  ratio(base, times))
    if not table.args.runs:
        print(f"{'tiny':10s}a sweep's time: not run, it needs --runs, the folder of a finished sweep")
        return
    models = "import data, evaluate, transformers as t; t.AutoProcessor, t.ClapModel, t.LlavaForConditionalGeneration"
    times = table.in_turn(starter("-c", models), repeats=3)[0]  # --help imports less
    start_up["train.py"] = start_up["evaluate.py"] = statistics.median(times)

    java = statistics.median(table.in_turn(tokenise_again, repeats=3)[0])
    meteor = table.seconds(lambda: evaluate.meteor().compute_score({0: ["a dog barks"]}, {0: ["a dog"]}))
    imports = javas = 0.0
    changes = []  # of the number of jobs at work: (time, +1 or -1)
    for path in sorted(table.args.runs.rglob("cmd.txt")):
        # written when a job starts; when it ends, training.json or else its log is written
        training = path.parent / "training.json"
        end = training if training.exists() else path.parent / "run.log"
        changes += [(path.stat().st_mtime, 1), (end.stat().st_mtime, -1)]
        words = path.read_text().split()
        imports += sum(start_up.get(word, 0.0) for word in words)
        if training.exists():
            javas += java * sum(x["event"] == "validation" for x in read_log(path.parent / "log.jsonl"))
        elif "caption" in words:
            javas += 2 * java + meteor
    if not changes:
        raise data.InputError(f"--runs {table.args.runs}: no cmd.txt of a finished sweep below it")
    changes.sort()
    slots = int(max(np.cumsum([change for _, change in changes])))
    total = slots * (changes[-1][0] - changes[0][0])
    for what, value, target in (("imports", imports, None), ("Java", javas, None),
                                ("imports and Java", imports + javas, 0.3)):
        table.row(f"{what}, of the sweep's time", value, total, "s", value / total, target=target, at_most=True,
                  note=f"starts as measured now; {len(changes) // 2} jobs, {slots} at a time")


def tokenise_again():
    evaluate._tokenised.clear()
    evaluate.tokenise(["a dog barks"])


# ---------------------------------------------------------------- command line

OF_MODELS = ("step", "prefix", "memory", "mfu", "scst", "keep", "decode")  # these differ with --wide
ON_REQUEST = ("7b", "memory7b", "time7b")
BENCHES = {name.removeprefix("bench_"): f for name, f in list(globals().items()) if name.startswith("bench_")}
BENCHES |= {"7b": bench7b.timed, "memory7b": bench7b.memory, "time7b": bench7b.operations}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME",
                   help=f"any of {' '.join(BENCHES)}; without a name all but {' '.join(ON_REQUEST)}")
    p.add_argument("--wide", action="store_true", help="16 layers of width 1024 instead of 8 of 128")
    p.add_argument("--repeats", type=int, default=9, help="rounds; long benches take a third")
    p.add_argument("--clips", type=int, default=0,
                   help="batch size; 0: 32, with --wide 8; features 64; 7b 1, 8 and 32; memory7b 8 and 32")
    p.add_argument("--items", type=int, default=1000, help="captions to score, items to resample")
    p.add_argument("--layers", type=int, default=32, help="7b: of the decoder, 8 or more")
    world, runs = ROOT / "tiny", ROOT / "experiments/tiny"
    p.add_argument("--world", type=Path, default=world if world.is_dir() else None,
                   help="ranks: a stand-in world; tiny/ if it exists")
    p.add_argument("--runs", type=Path, default=runs if runs.is_dir() else None,
                   help="tiny, scst: folder of a finished sweep; experiments/tiny if it exists")
    p.add_argument("--json", default=None, metavar="FILE", help="write the table there too")
    args = p.parse_args(argv)
    for name in args.names:
        if name not in BENCHES:
            p.error(f"no bench called {name!r}: {' '.join(BENCHES)}")
    if not args.names:
        args.names = list(OF_MODELS) if args.wide else [n for n in BENCHES if n not in ON_REQUEST]
    return args


def main(argv=None):
    args = parse_args(argv)
    evaluate.MAX_NEW_TOKENS = MAX_NEW_TOKENS
    machine = f"{processor()}, {evaluate.hardware(torch.device(data.default_device()))}"
    print(f"{machine}; torch {torch.__version__}; {args.repeats} rounds")
    table = Table(args)
    world = World(args) if set(args.names) & set(OF_MODELS) else None
    for name in args.names:
        table.bench = name
        BENCHES[name](table, world)
    if args.json:
        data.write_json(args.json, {
            "machine": machine, "versions": data.versions(), "wide": args.wide, "repeats": args.repeats, "rows": table.rows, "checks": table.checks})
    failed = [f"{c['bench']}: {c['what']}" for c in table.checks if not c["holds"]]
    if failed:
        print(f"not equal: {'; '.join(failed)}")
        sys.exit(1)


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    data.guarded(main, fusions.FusionError)
