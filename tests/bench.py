"""How near the limit it runs: ratios of two things timed in turn in one process, on made-up models and captions.

    python tests/bench.py                            # every bench at the stand-in's size, minutes
    python tests/bench.py step prefix memory --wide  # 16 layers of width 1024: arithmetic, not overhead, is measured
    python tests/bench.py 7b                         # LLaVA-1.5-7B, random weights; on a machine without GPU, counted
    python tests/bench.py tiny ranks scst            # of experiments/tiny and tiny where run_all.sh left them, or
                                                     # of --runs and --world

Models have random weights, so only costs are measured here; what is equal in both ways is checked, and a check that
fails ends with exit status 1. No time is ever asserted. `reach` is the aim, marked * where it was not reached.
Letters: B clips, P prompt positions, T caption positions, D decoder width, N modality tokens, K samples a clip.
"""
import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("TQDM_DISABLE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import evaluate  # noqa: E402  first of the repository: it makes torchaudio importable
import data  # noqa: E402
import fusion as fusions  # noqa: E402
import scst  # noqa: E402
import train  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

E, N, S = 64, 16, 32             # encoder width, modality tokens, encoder frames a clip
MAX_NEW_TOKENS = 16              # untrained weights do not end where captions do: a trained batch's longest
PROMPT_WORDS, WORDS = 10, range(7, 15)  # a caption's words: 10.5 in the mean, as AudioCaps has


# ---------------------------------------------------------------- the table

class Table:
    """Rows and checks of all benches: printed as they come, written as JSON at the end."""

    def __init__(self, args):
        self.args, self.rows, self.checks, self.name = args, [], [], None
        print(f"{'':10s}{'':54s}{'ours':>10s} {'other':>10s}  {'ratio':>7s} {'lowest to highest':>19s} {'reach':>8s}")

    def row(self, what, ours, other=None, unit="s", ratio=None, reach=None, at_most=False, note=""):
        """ratio: (median, lowest, highest), or one number; reach: at least that ratio, or at most."""
        ratio = ratio if isinstance(ratio, tuple) else (ratio, None, None)
        reached = None if reach is None else bool(ratio[0] <= reach if at_most else ratio[0] >= reach)
        self.rows.append({"bench": self.name, "what": what, "ours": ours, "other": other, "unit": unit,
                          "ratio": ratio[0], "lowest": ratio[1], "highest": ratio[2], "reach": reach,
                          "at_most": at_most, "reached": reached, "note": note})
        shown = ["" if x is None else f"{x:.4g}" for x in (ours, other)]
        print(f"{self.name:10s}{what:54s}{shown[0]:>10s} {shown[1]:>10s} {unit:<3s}"
              + ("" if ratio[0] is None else f"{ratio[0]:6.2f} ")
              + (" " * 20 if ratio[1] is None else f"{f'{ratio[1]:.2f} to {ratio[2]:.2f}':>19s} ")
              + ("" if reach is None else f"{'<=' if at_most else '>='}{reach:5.3g}{' ' if reached else '*'}")
              + (f"  {note}" if note else ""), flush=True)

    def equal(self, what, difference, within):
        self.checks.append({"bench": self.name, "what": what, "difference": float(difference), "within": within,
                            "holds": bool(difference <= within)})
        print(f"{self.name:10s}{'equal' if difference <= within else 'FAIL '}  {what}: {difference:.2g}, within "
              f"{within:g}", flush=True)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = "wall"


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCKS[clock]()


def seconds(thing):
    start = now()
    thing()
    return now() - start


def in_turn(repeats, *things, warm=True):
    """Seconds of each thing in each round, (things, repeats); they change places from round to round."""
    taken = [[] for _ in things]
    for thing in things if warm else ():
        thing()
    for k in range(repeats):
        for i in range(len(things))[::-1 if k % 2 else 1]:
            taken[i].append(seconds(things[i]))
    return taken


def ratio(ours, other):
    """Median over the rounds, lowest and highest of other / ours: what is common to a round drops out."""
    each = sorted(b / a for a, b in zip(ours, other))
    return statistics.median(each), each[0], each[-1]


def compared(table, what, ours, other, scale=1.0, unit="s", **kwargs):
    """Time two things in turn and put them in the table; scale: to the unit, e.g. 1000 for ms."""
    a, b = in_turn(table.args.repeats, ours, other)
    table.row(what, statistics.median(a) * scale, statistics.median(b) * scale, unit, ratio(a, b), **kwargs)


# ---------------------------------------------------------------- a model without files

class Backbone(evaluate.Backbone):
    """evaluate's backbone around a LLaVA of random weights, and a tokeniser of one word a token."""

    def __init__(self, layers, width, inner, heads, vocabulary, device, vision=None):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast
        special = ["<pad>", "<s>", "</s>", "<image>"]
        words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(
            special + [f"w{i}" for i in range(len(special), vocabulary)])}, "<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>",
                                                 eos_token="</s>", additional_special_tokens=["<image>"])
        self.path, self.device, self.eos, self.pad, self.placeholder = "random", torch.device(device), 2, 0, 0
        text = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                           num_attention_heads=heads, num_key_value_heads=heads, initializer_range=0.7 / width ** 0.5)
        vision = vision or dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                image_size=32, patch_size=16)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        was = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(self.device):
                torch.manual_seed(0)
                self.llava = LlavaForConditionalGeneration(LlavaConfig(
                    text_config=text, vision_config={"model_type": "clip_vision_model", **vision},
                    image_token_index=3))
        finally:
            torch.set_default_dtype(was)
        self.llava = self.llava.eval().requires_grad_(False)
        # decided next words, and an end now and then: captions of untrained weights should have lengths too
        self.llava.lm_head.weight.mul_(4.0)
        self.llava.lm_head.weight[self.eos].mul_(3.0)
        self.decoder = self.llava.model.language_model
        draw = np.random.default_rng(0)
        self.captions = [" ".join(f"w{i}" for i in draw.integers(4, vocabulary, draw.choice(WORDS))) for _ in range(64)]
        self.features = [torch.from_numpy(draw.standard_normal((S, E), dtype=np.float32)) for _ in self.captions]

    def chat(self, text, image=False):
        return " ".join(["<s>"] + ["<image>"] * image + [f"w{i}" for i in range(4, 4 + PROMPT_WORDS)])

    def fusion(self, kind, layers):
        torch.manual_seed(0)
        return fusions.build(kind, self.decoder, encoder_width=E, layers=layers, tokens=N,
                             hidden=512).to(self.device)


class Step:
    """A training step of a system through the blocks from `first` on: forward, backward, clipping, AdamW.

    The lines between batch and loss are those of train.py's xe_step. `differentiated`: the input asks for a gradient
    too, so that autograd goes down to it through all blocks, trained or not, as it does below a prefix.
    """

    def __init__(self, backbone, fusion, first, clips, differentiated=False, captions=None):
        self.backbone, self.fusion, self.clips, self.differentiated = backbone, fusion, clips, differentiated
        with fusion.attach(backbone.decoder):
            trunk, self.head = fusions.split(backbone.decoder, first)
        prompt, slots = backbone.prompt("", N if isinstance(fusion, fusions.Concat) else 0)
        captions = [backbone.caption_ids("", c) for c in captions or backbone.captions[:clips]]
        self.P, self.slots, self.more = len(prompt), None, {}
        if slots is not None:
            self.slots = torch.tensor([slots] * clips, device=backbone.device)
        if backbone.device.type == "meta":  # counted, not computed: nothing to keep
            shape = clips, len(prompt) + max(map(len, captions[:clips]))
            # without a mask of its own Llama looks at the positions' values, and there are none
            self.more = {"attention_mask": torch.ones(1, 1, shape[1], shape[1], device="meta", dtype=torch.bool)}
            self.kept = SimpleNamespace(batch=lambda which: (
                torch.empty(*shape, backbone.decoder.config.hidden_size, device="meta"),
                torch.empty(clips, shape[1] - self.P, device="meta", dtype=torch.long)))
        else:
            self.kept = train.TrunkStates(backbone, trunk, prompt, captions, [0] * len(captions), Path("."))
        self.parameters = [p for p in fusion.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=backbone.device.type == "cuda" or None)

    def loss(self):
        backbone, which = self.backbone, range(self.clips)
        states, targets = self.kept.batch(which)
        states.requires_grad_(self.differentiated)
        frames, mask = (x.to(backbone.device) for x in data.pad_frames([backbone.features[i] for i in which]))
        with backbone.autocast(), self.fusion.attach(backbone.decoder, frames, mask, self.slots):
            hidden = self.head(inputs_embeds=states, use_cache=False, **self.more).last_hidden_state[:, self.P - 1:-1]
            return train.caption_loss(backbone.llava.lm_head(hidden), targets) / (targets != -100).sum()

    def __call__(self):
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def flops(self):
        with FlopCounterMode(display=False) as counter:
            self.loss().backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()

    def saved(self):
        """Bytes that the forward pass keeps for the backward pass: every storage once, without the parameters."""
        weights = {p.untyped_storage()._cdata for p in (*self.backbone.llava.parameters(), *self.fusion.parameters())}
        kept = {}

        def pack(x):
            if x.untyped_storage()._cdata not in weights:
                kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = self.loss()  # alive until all are counted: a freed storage's address would be used again
        del loss
        return sum(kept.values())


class Bench:
    """What the benches of models share: a backbone, and systems on it. Layers are 3 and 6 of 8, or as deep."""

    def __init__(self, args):
        self.clips = args.clips or (8 if args.wide else 32)
        self.backbone = Backbone(*((16, 1024, 2752, 16) if args.wide else (8, 128, 256, 4)), 1400,
                                 evaluate.default_device())
        self.depth = len(self.backbone.decoder.layers)
        self.placements = {"{6}": [self.depth * 6 // 8], "{3,6}": [self.depth * 3 // 8, self.depth * 6 // 8]}

    def additive(self, layers):
        return Step(self.backbone, self.backbone.fusion("additive", layers), layers[0], self.clips)

    def prefix(self):
        return Step(self.backbone, self.backbone.fusion("concat", [0]), 0, self.clips)


# ---------------------------------------------------------------- training

def bench_step(table, bench):
    """Additive on kept trunk states, and the same losses through the whole decoder."""
    for name, layers in bench.placements.items():
        ours, L, above = bench.additive(layers), bench.depth, bench.depth - layers[0]
        for differentiated, bound in ((True, L / above), (False, (L + above) / (2 * above))):
            other = Step(bench.backbone, ours.fusion, 0, bench.clips, differentiated)
            table.equal(f"loss at {name}", abs(ours.loss().item() - other.loss().item()), 1e-5)
            what = "whole decoder, differentiated" if differentiated else "whole, autograd stopping at the fusion"
            compared(table, f"{name}, {what}", ours, other, 1e3, "ms", reach=0.9 * bound if table.args.wide else None,
                     note=f"bound {bound:.2f} by layers, {other.flops() / ours.flops():.2f} by counted products")


def bench_prefix(table, bench):
    """Additive on kept trunk states, and the usual prefix of audio tokens through all layers."""
    prefix = bench.prefix()
    for (name, layers), reach in zip(bench.placements.items(), (3.0, 1.5)):
        ours = bench.additive(layers)
        compared(table, f"{name}, concat --layers 0", ours, prefix, 1e3, "ms", reach=reach,
                 note=f"{prefix.flops() / ours.flops():.2f} by counted products")


def bench_memory(table, bench):
    """Bytes kept for the backward pass, and on a GPU the peak of the whole step."""
    prefix = bench.prefix()
    for name, layers in bench.placements.items():
        ours = bench.additive(layers)
        pairs = {"kept for backward": (ours.saved(), prefix.saved())}
        if torch.cuda.is_available():
            pairs["peak above the weights"] = (peak(ours), peak(prefix))
        for what, (a, b) in pairs.items():
            table.row(f"{name}, {what}, of the prefix's", a / 1e6, b / 1e6, "MB", a / b,
                      reach=0.4 if name == "{6}" else None, at_most=True)
    states = ours.kept.states
    table.row("trunk states kept of a training caption", states.nbytes / len(ours.kept.ids) / 1e3, unit="kB",
              note="the price: memory or a mapped file, not of the step")


def peak(thing):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    thing()
    return torch.cuda.max_memory_allocated() - before


def matmul(device, dtype, size):
    """A product of square matrices, and how many operations it is."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2 * size ** 3


def bench_mfu(table, bench):
    """Operations of a step's matrix products a second, over those of one large product here and now."""
    device = bench.backbone.device
    product, operations = matmul(device, bench.backbone.llava.dtype, 8192 if device.type == "cuda" else 1536)
    steps = {f"additive {name}": bench.additive(layers) for name, layers in bench.placements.items()}
    for name, step in {**steps, "prefix": bench.prefix()}.items():
        flops = step.flops()
        a, b = in_turn(table.args.repeats, step, product)
        table.row(f"{name}: share of the rate of one product", flops / statistics.median(a) / 1e9,
                  operations / statistics.median(b) / 1e9, "G/s",
                  ratio([t / flops for t in a], [t / operations for t in b]),
                  reach=0.6 if table.args.wide else None)


class Kept(list):
    """Features as data.load_features gives them, in memory; clips are called by their numbers."""
    index = property(lambda self: {str(i): i for i in range(len(self))})
    embeds = property(lambda self: torch.zeros(len(self), E))


def bench_scst(table, bench):
    """train.py itself, on made-up clips: its XE steps, then its SCST steps at the same batch and with K = 5."""
    spent, live, steps = Counter(), [False], 41 if not table.args.wide else 11
    clips = [data.Clip(str(i), Path(str(i)), [c]) for i, c in enumerate(bench.backbone.captions)]
    encoder = SimpleNamespace(width=E, embed_dim=E, hash="", embed_text=lambda texts: torch.zeros(len(texts), E))

    def metered(name, function):
        def call(*args, **kwargs):
            live[0] = name != "validation" and (live[0] or name == "sampling")  # captions are read there too
            start = now()
            out = function(*args, **kwargs)
            spent[name] += live[0] * (now() - start)
            return out
        return call

    with tempfile.TemporaryDirectory() as out, ExitStack() as stack:
        for module, name, value in (
                (evaluate, "load_backbone", lambda *_: bench.backbone), (evaluate, "load_encoder", lambda *_: encoder),
                (data, "read_split", lambda *where: data.Split("", clips[:64 if where[2] == "train" else 8], [])),
                (data, "load_features", lambda split, *_: Kept(bench.backbone.features[:len(split.clips)])),
                (evaluate, "generate", metered("validation", evaluate.generate)),
                (scst, "sample_tree", metered("sampling", scst.sample_tree)),
                (bench.backbone, "text", metered("reward", bench.backbone.text)),
                (scst, "words", metered("reward", scst.words)),
                (scst.CiderD, "score_many", metered("reward", scst.CiderD.score_many)),
                (time, "perf_counter", now)):  # the clock of train.py's log
            stack.enter_context(mock.patch.object(module, name, value))
        for name, layers in bench.placements.items():
            folder, B = Path(out, name), bench.clips
            spent.clear()
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # its bars and its last line
                train.main(["--data", "", "--layers", *map(str, layers), "--tokens", str(N), "--hidden", "512",
                            "--lr", "1e-6",
                            "--lr-adapter", "1e-6", "--batch-size", str(B), "--micro-batch", str(B), "--scst", "auto",
                            "--steps", str(steps), "--eval-every", "1000", "--scst-steps", str(steps // 3),
                            "--scst-lr", "1e-9", "--out", str(folder), "--device", str(bench.backbone.device)])
            lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
            times = {stage: [B / x["clips_per_second"] for x in lines
                             if x["event"] == "step" and x["stage"] == stage] for stage in ("xe", "scst")}
            xe, own = (statistics.median(times[stage][1:]) for stage in ("xe", "scst"))
            # prompt and samples pass all L layers to be drawn, and the head there and back; a caption the head alone
            L, k, many = bench.depth, layers[0], PROMPT_WORDS + 1 + 5 * max(WORDS)
            bound = many * (3 * L - 2 * k) / ((PROMPT_WORDS + 2 + statistics.mean(WORDS)) * 2 * (L - k))
            table.row(f"{name}, SCST step over XE step, nothing shared", own * 1e3, xe * 1e3, "ms", own / xe,
                      note=f"{bound:.1f} by layers and positions")
            for part, reach in (("reward", 0.05), ("sampling", None)):
                mean = sum(times["scst"]) / len(times["scst"])
                table.row(f"{name}, {part} in an SCST step", spent[part] / len(times["scst"]) * 1e3, mean * 1e3, "ms",
                          spent[part] / len(times["scst"]) / mean, reach=reach, at_most=True)
    if not table.args.runs:
        print(f"{'scst':10s}as trained: not run, it needs --runs, the folder of a finished sweep")
        return
    for path in sorted(table.args.runs.rglob("log.jsonl")):
        lines = [json.loads(x) for x in path.read_text().splitlines()]
        xe, own = ([1e3 / x["clips_per_second"] for x in lines if x["event"] == "step" and x["stage"] == stage]
                   for stage in ("xe", "scst"))
        if own:  # a policy that has learned: most samples of a clip begin alike, and that is computed once
            table.row(f"{path.parent.name}, SCST step over XE step, a clip", statistics.median(own),
                      statistics.median(xe), "ms", statistics.median(own) / statistics.median(xe), reach=4, at_most=True)


# ---------------------------------------------------------------- decoding and features

def bench_scaling(table, bench):
    """A step of additive at {3,6}, and with twice of one thing: 2 where the cost is a line through zero, 1 where the
    thing costs nothing."""
    backbone, clips, depth = bench.backbone, bench.clips, bench.depth
    longer = [f"{a} {b}" for a, b in zip(backbone.captions, backbone.captions[::-1])][:clips]

    def step(layers=bench.placements["{3,6}"], tokens=N, **more):
        torch.manual_seed(0)
        fusion = fusions.build("additive", backbone.decoder, encoder_width=E, layers=layers, tokens=tokens, hidden=512)
        return Step(backbone, fusion.to(backbone.device), layers[0], **{"clips": clips, **more})

    half, words = depth - depth // 4, statistics.mean(WORDS)
    for what, base, twice, note in (
            (f"clips, {clips} and {2 * clips}", step(), step(clips=2 * clips), ""),
            (f"words of a caption, {words:g} and {2 * words:g}", step(), step(captions=longer),
             f"the prompt's {PROMPT_WORDS + 1} positions stay"),
            (f"modality tokens, {N} and {2 * N}", step(), step(tokens=2 * N), "they are keys and values only"),
            (f"blocks above the fusion, {depth - half} and {2 * (depth - half)}", step([half]), step([2 * half - depth]),
             "projector, output layer and AdamW stay")):
        a, b = in_turn(table.args.repeats, base, twice)
        table.row(f"twice: {what}", statistics.median(b) * 1e3, statistics.median(a) * 1e3, "ms", ratio(a, b), note=note)


def bench_ranks(table, bench):
    """Clips a second of train.py on a stand-in world (--world): one process, and two by torchrun, a thread each."""
    if not table.args.world:
        print(f"{'ranks':10s}not run: it needs --world, a folder of tests/standin.py")
        return
    world, rates = table.args.world, {}
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 1, 2):  # the first only fills the cache of features
            out = Path(folder, f"ranks{n}_{len(rates)}")
            start = [sys.executable] + (["-m", "torch.distributed.run", "--nproc-per-node=2"] if n == 2 else [])
            subprocess.run([*start, ROOT / "train.py", "--data", world / "data/audiocaps", "--llava",
                            world / "models/llava", "--encoder", world / "models/clap", "--layers", "3", "6",
                            "--contrastive", "0.1", "--batch-size", "32", "--steps", "61", "--eval-every", "61",
                            "--cache", Path(folder, "cache"), "--out", out],
                           check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
            rates[n] = [x["clips_per_second"] for x in lines if x["event"] == "step"][1:]
    table.row("clips a second: two gloo ranks over one process", *(statistics.median(rates[n]) for n in (2, 1)), "1/s",
              statistics.median(rates[2]) / statistics.median(rates[1]), note="2 is twice the cores' worth")


def bench_decode(table, bench):
    """Beam-5 captions of a batch, and of one clip at a time; both with the cache of keys and values."""
    backbone, fusion = bench.backbone, bench.backbone.fusion("additive", bench.placements["{3,6}"])
    fusion.set_gates(0.1)
    some, few = backbone.features, backbone.features[:8 if table.args.wide else 16]

    def decode(features, batch_size):
        return [k[0]["text"] for k in evaluate.decode(backbone, fusion, features, text="", beams=5,
                                                      batch_size=batch_size)]

    together, alone = decode(some, 64), decode(few, 1)
    table.equal("captions that differ", sum(a != b for a, b in zip(together, alone)), 0)
    a, b = in_turn(max(1, table.args.repeats // 3), lambda: decode(some, 64), lambda: decode(few, 1), warm=False)
    a, b = [t / len(some) for t in a], [t / len(few) for t in b]
    length = statistics.mean(len(c.split()) for c in together)
    table.row("beam 5: 64 clips at once, one at a time; a clip", statistics.median(a) * 1e3, statistics.median(b) * 1e3,
              "ms", ratio(a, b), reach=6, note=f"{length:.1f} words a caption")


def bench_features(table, bench):
    """An epoch of features from the cache, and of decoding and encoding every clip again."""
    import standin
    from scipy.io import wavfile
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        processor = standin.clap_processor(made_captions(200)[0])
        standin.save(folder / "clap", standin.clap_model(processor, 0), processor)
        encoder, clips = data.AudioEncoder(folder / "clap", evaluate.default_device()), []
        for i in range(table.args.clips or 64):
            wave = draw.standard_normal(4 * encoder.rate).astype(np.float32) / 9
            wavfile.write(folder / f"{i}.wav", encoder.rate, wave)
            clips.append(data.Clip(str(i), folder / f"{i}.wav", ["a sound"]))
        start = now()
        features = data.load_features(data.Split("train", clips, []), encoder, folder / "cache")
        first = now() - start
        batches = [range(i, min(i + 32, len(clips))) for i in range(0, len(clips), 32)]

        def cached():
            return [data.pad_frames([features[i] for i in batch]) for batch in batches]

        def encoded():
            return [data.pad_frames(encoder.encode([data.decode_audio(clips[i].path, encoder.rate) for i in batch])[0])
                    for batch in batches]

        table.equal("features, cached in half precision, over the largest", max(
            ((a - b).abs().max() / b.abs().max()).item() for (a, _), (b, _) in zip(cached(), encoded())), 1e-3)
        compared(table, "an epoch: cached, encoded again; a clip", cached, encoded, 1e3 / len(clips), "ms", reach=20,
                 note=f"{1e3 * first / len(clips):.1f} ms a clip to fill the cache, once")


# ---------------------------------------------------------------- scores and statistics

def made_captions(n):
    """n captions of the stand-in world's scenes, and five references for each."""
    import standin
    rng = np.random.default_rng(0)
    hypotheses, references, reused = [], [], []
    for _ in range(n):
        texts = []
        while len(texts) < 6:  # a scene with few paraphrases gives them twice, as short captions do
            spec = standin.draw_scene(rng) if not texts else spec
            texts.append(standin.caption(spec, rng))
        hypotheses.append(texts[0] if rng.random() < 0.7 or not reused else reused[rng.integers(len(reused))])
        references.append(texts[1:])
        reused.append(texts[0])
    return hypotheses, references


def bench_cider(table, bench):
    """CIDEr-D of 1,000 captions with five references: scst.py, and pycocoevalcap."""
    from pycocoevalcap.cider.cider import Cider
    hypotheses, references = made_captions(table.args.items)
    gts, res = dict(enumerate(references)), {i: [h] for i, h in enumerate(hypotheses)}
    theirs = Cider().compute_score(gts, res)[1]
    table.equal("CIDEr-D", np.abs(np.array(scst.cider_d(hypotheses, references)) - theirs).max(), 1e-9)
    compared(table, f"{len(hypotheses)} captions, pycocoevalcap", lambda: scst.cider_d(hypotheses, references),
             lambda: Cider().compute_score(gts, res), 1e3, "ms", reach=5)
    reward, clips = scst.CiderD(references, end=True), len(hypotheses) // 5
    five = [h for h in hypotheses[:clips] for _ in range(5)], [r for r in references[:clips] for _ in range(5)]
    gts, res = dict(enumerate(five[1])), {i: [h] for i, h in enumerate(five[0])}
    compared(table, "as a reward: known references, 5 samples a clip", lambda: reward.score_many(*five),
             lambda: Cider().compute_score(gts, res), 1e3, "ms")


def bench_score(table, bench):
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
    found = {}

    def together():  # as a new process would: nothing tokenised yet, no Java running
        evaluate._tokenised.clear()
        evaluate._content.cache_clear()
        evaluate.meteor().meteor_p.kill()
        evaluate.meteor.cache_clear()
        found["ours"] = evaluate.score(items)["corpus"]

    def separately():
        out = {}
        for scorer, names in ((Bleu(4), ["bleu_1", "bleu_2", "bleu_3", "bleu_4"]), (Rouge(), ["rouge_l"]),
                              (Meteor(), ["meteor"]), (Cider(), ["cider_d"])):
            quiet = {"verbose": 0} if isinstance(scorer, Bleu) else {}
            value, _ = scorer.compute_score(PTBTokenizer().tokenize(gts), PTBTokenizer().tokenize(res), **quiet)
            out.update(zip(names, value if len(names) > 1 else [value]))
        found["theirs"] = out

    a, b = in_turn(max(1, table.args.repeats // 3), together, separately, warm=False)
    for metric in found["theirs"]:
        table.equal(metric, abs(found["ours"][metric] - found["theirs"][metric]), 1e-9)
    table.row(f"{len(items)} captions, scorer by scorer", statistics.median(a), statistics.median(b), "s", ratio(a, b),
              reach=1.5, note="ours with spice_lite and spider_lite besides")


def bench_bootstrap(table, bench):
    """10,000 paired resamples of 1,000 items and 5 metrics: bootstrap.py, and SciPy's default call for each."""
    import bootstrap
    import scipy.stats
    metrics, n, resamples = ["spider", "spider_lite", "cider_d", "spice_lite", "rouge_l"], table.args.items, 10_000
    draw = np.random.default_rng(0)
    base = draw.gamma(2.0, 0.3, (n, len(metrics)))
    sides = [base + 0.1 * k + 0.2 * draw.standard_normal(base.shape) for k in range(2)]
    columns = list(zip(metrics, sides[0].T, sides[1].T))
    items = [[{"id": str(i), "references": ["a"], "scores": dict(zip(metrics, row.tolist()))}
              for i, row in enumerate(side)] for side in sides]

    def ours():
        return bootstrap.compare(*items, metrics, resamples)["metrics"]

    def theirs():
        return {m: scipy.stats.bootstrap((a, b), lambda a, b, axis=-1: (a - b).mean(axis=axis), paired=True,
                                         n_resamples=resamples, rng=0) for m, a, b in columns}

    mine, scipys = ours(), theirs()
    table.equal("differences", max(abs(mine[m]["difference"] - (a - b).mean()) for m, a, b in columns), 1e-12)
    # two independent draws of 10,000: the ends of their intervals differ by .04 sd in the mean
    table.equal("ends of the BCa intervals, in standard deviations", max(
        np.abs(np.subtract(mine[m]["bca95"], scipys[m].confidence_interval)).max() / mine[m]["sd"]
        for m in metrics), 0.2)
    compared(table, f"{n} items, {len(metrics)} metrics, 10,000 resamples", ours, theirs, 1e3, "ms", reach=5,
             note="SciPy's has no p-values")
    used = []
    for thing in (ours, theirs):
        tracemalloc.start()
        thing()
        used.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
    table.row("peak memory above the base (tracemalloc)", *used, "MB", used[1] / used[0],
              note=f"{'under' if used[0] < 200 else 'NOT under'} 200 MB")


# ---------------------------------------------------------------- whole runs

def bench_tiny(table, bench):
    """Start-up of each script, and where the time of a finished sweep (--runs) went, as far as its files say."""
    def starts(*command):
        return lambda: subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)

    scripts = ["bootstrap.py", "plots.py", "train.py", "evaluate.py"]
    base, *taken = in_turn(3, starts("-c", "import numpy"), *(starts(s, "--help") for s in scripts), warm=False)
    cost = dict(zip(scripts, map(statistics.median, taken)))
    for name, times in zip(scripts, taken):
        table.row(f"{name} --help over `import numpy`", statistics.median(times), statistics.median(base), "s",
                  ratio(base, times), note="" if name in scripts[2:] or cost[name] < 1 else "NOT under a second")
    if not table.args.runs:
        return
    models = "import evaluate, transformers as t; t.AutoProcessor, t.ClapModel, t.LlavaForConditionalGeneration"
    cost["train.py"] = cost["evaluate.py"] = statistics.median(in_turn(3, starts("-c", models))[0])  # --help needs less
    java = statistics.median(in_turn(3, lambda: (evaluate._tokenised.clear(), evaluate.tokenise(["a dog barks"])))[0])
    meteor = seconds(lambda: evaluate.meteor().compute_score({0: ["a dog barks"]}, {0: ["a dog"]}))
    jobs = []  # (start, end) of every job whose start is known: its cmd.txt is written then, its log is closed last
    spent = Counter()
    for cmd in sorted(table.args.runs.rglob("cmd.txt")):
        folder, words = cmd.parent, cmd.read_text().split()
        training = folder / "training.json"
        start, end = cmd.stat().st_mtime, (training if training.exists() else folder / "run.log").stat().st_mtime
        jobs.append((start, end))
        script = next((w for w in words if w in scripts), None)
        if script:
            spent["import (measured now, times the processes)"] += cost[script]
        if training.exists():
            lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            validations = [x for x in lines if x["event"] == "validation"]
            loop = json.loads(training.read_text())["seconds"]
            decoding = sum(x["val_seconds"] for x in validations)
            spent["Java (a start measured now, times its starts)"] += java * len(validations)
            spent["validation: decoding and scores"] += decoding - java * len(validations)
            spent["training steps"] += loop - decoding
            spent["loading, features, trunk states"] += end - start - loop - cost["train.py"]
        elif script == "evaluate.py":
            started = (2 * java + meteor) * ("caption" in words)
            spent["Java (a start measured now, times its starts)"] += started
            spent["captioning, retention"] += end - start - cost[script] - started
    if not jobs:
        raise data.InputError(f"--runs {table.args.runs}: no cmd.txt of a finished sweep below it")
    wall = max(end for _, end in jobs) - min(start for start, _ in jobs)
    busy = sum(end - start for start, end in jobs)
    edges = sorted([(t, 1) for t, _ in jobs] + [(t, -1) for _, t in jobs])
    slots = max(np.cumsum([step for _, step in edges]))
    spent["waiting: slots without a job"] = max(0.0, slots * wall - busy)
    for what, value in spent.most_common():
        table.row(what, value, slots * wall, "s", value / (slots * wall))
    both = sum(v for k, v in spent.items() if k.startswith(("import", "Java")))
    table.row("imports and Java together", both, slots * wall, "s", both / (slots * wall), reach=0.3,
              at_most=True, note=f"{len(jobs)} jobs, {slots} side by side, {wall:.0f} s")


def bench_7b(table, bench):
    """LLaVA-1.5-7B from its configuration: every system at batch 1, 8, 32. Without a GPU counted, not timed."""
    scale, cuda = table.args.layers_scale, torch.cuda.is_available()
    device = "cuda" if cuda else "meta" if scale == 1 else "cpu"
    depth = max(8, round(32 * scale))
    backbone = Backbone(depth, 4096, 11008, 32, 32064, device, dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768))
    weights = sum(p.numel() for p in backbone.llava.parameters())
    upper, both = [depth * 3 // 4], [depth * 3 // 8, depth * 3 // 4]
    table.row(f"parameters, {depth} layers", weights / 1e9, unit="G",
              note=backbone.device.type + ("" if device != "meta" else ": no GPU here, so counted and not timed"))
    product = operations = None
    if device != "meta":
        product, operations = matmul(backbone.device, backbone.llava.dtype, 8192 if cuda else 1536)
    for clips in (1, 8, 32) if not table.args.clips else (table.args.clips,):
        prefix = Step(backbone, backbone.fusion("concat", [0]), 0, clips)
        count, kept = prefix.flops(), prefix.saved()
        for kind, layers in (("additive", upper), ("additive", both), ("cross_attention", both), ("concat", both),
                             ("unfreeze", both), ("concat", [0])):
            step = prefix if layers == [0] else Step(backbone, backbone.fusion(kind, layers), layers[0], clips)
            name, flops = f"{kind} {{{','.join(map(str, layers))}}}, batch {clips}", step.flops()
            aim = 3 if (kind, layers) == ("additive", upper) else None
            if device == "meta":
                table.row(f"{name}: operations of a step", flops / 1e12, count / 1e12, "T", count / flops, reach=aim)
                table.row(f"{name}: kept for backward", step.saved() / 1e9, kept / 1e9, "GB", kept / step.saved(),
                          note="in float32; half of it in bfloat16")
                continue
            a, b, c = in_turn(table.args.repeats, step, prefix, product)
            table.row(f"{name}: a step, the prefix's", statistics.median(a) * 1e3, statistics.median(b) * 1e3, "ms",
                      ratio(a, b), reach=aim, note=f"{clips / statistics.median(a):.1f} clips/s")
            table.row(f"{name}: share of the matmul rate", flops / statistics.median(a) / 1e12,
                      operations / statistics.median(c) / 1e12, "T/s",
                      ratio([t / flops for t in a], [t / operations for t in c]), reach=0.5 if clips == 32 else None)
            if cuda:
                table.row(f"{name}: peak memory", (peak(step) + torch.cuda.memory_allocated()) / 1e9, unit="GB",
                          note="reach: under 20" if aim else "")
            fusion, features = step.fusion, backbone.features[:clips]
            taken = seconds(lambda: evaluate.decode(backbone, fusion, features, text="", beams=5, batch_size=clips))
            table.row(f"{name}: decode, beam 5", clips / taken, unit="1/s")
            if fusion.has_gate and clips == 1 and kind != "unfreeze":
                fusion.set_gates(0.0)
                ids = torch.tensor([backbone.prompt("")[0]], device=backbone.device)
                with torch.inference_mode(), backbone.autocast():
                    before = backbone.decoder(ids).last_hidden_state
                    with fusion.attach(backbone.decoder, features[0][None].to(backbone.device)):
                        after = backbone.decoder(ids).last_hidden_state
                table.equal(f"{kind} with gates closed, and the backbone", (after - before).abs().max().item(), 0)
            del step, fusion


OF_MODELS = ("step", "prefix", "memory", "mfu", "scst", "scaling", "decode")  # these differ with --wide
BENCHES = {name.removeprefix("bench_"): f for name, f in globals().copy().items() if name.startswith("bench_")}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("names", nargs="*", metavar="NAME", help=f"which: {' '.join(BENCHES)}; none: all but 7b")
    p.add_argument("--wide", action="store_true", help="16 layers of width 1024 instead of 8 of 128")
    p.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: time of this process alone, for one "
                   "thread beside other work; score and tiny, which wait for others, keep to the wall")
    p.add_argument("--repeats", type=int, default=9, help="rounds; long benches take a third")
    p.add_argument("--clips", type=int, default=0, help="batch size; 0: 32, with --wide 8")
    p.add_argument("--items", type=int, default=1000, help="captions to score, items to resample")
    p.add_argument("--layers-scale", type=float, default=1.0, help="7b: share of its layers")
    world, runs = (path if path.is_dir() else None for path in (ROOT / "tiny", ROOT / "experiments/tiny"))
    p.add_argument("--world", type=Path, default=world, help="ranks: a stand-in world; tiny, where it is there")
    p.add_argument("--runs", type=Path, default=runs,
                   help="tiny, scst: folder of a finished sweep; experiments/tiny, where it is there")
    p.add_argument("--json", default=None, metavar="FILE", help="write the table there as well")
    args = p.parse_args(argv)
    for name in args.names:
        if name not in BENCHES:
            p.error(f"no bench called {name!r}: {' '.join(BENCHES)}")
    args.names = args.names or [n for n in BENCHES if n != "7b" and (n in OF_MODELS or not args.wide)]
    return args


def main(argv=None):
    global clock
    args = parse_args(argv)
    clock, evaluate.MAX_NEW_TOKENS = args.clock, MAX_NEW_TOKENS
    machine = f"{processor()}, {evaluate.hardware(torch.device(evaluate.default_device()))}"
    print(f"{machine}; torch {torch.__version__}; {args.repeats} rounds, {clock} time")
    table = Table(args)
    bench = Bench(args) if set(args.names) & set(OF_MODELS) else None
    for name in args.names:
        table.name, clock = name, "wall" if name in ("score", "tiny") else args.clock  # Java is another process
        BENCHES[name](table, bench)
    if args.json:
        data.write_json(args.json, {"machine": machine, "versions": evaluate.versions(), "wide": args.wide,
                                    "clock": args.clock, "repeats": args.repeats, "rows": table.rows,
                                    "checks": table.checks})
    failed = [f"{c['bench']}: {c['what']}" for c in table.checks if not c["holds"]]
    if failed:
        print(f"not equal: {'; '.join(failed)}")
        sys.exit(1)


def processor():
    try:
        return next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    evaluate.guarded(main)
