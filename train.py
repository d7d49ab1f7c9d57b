"""Train one system: cross-entropy (+ contrastive), then SCST at the plateau.

    python train.py --fusion additive --layers 3 6 --data tiny/data/audiocaps \\
        --llava tiny/models/llava --encoder tiny/models/clap --lr 6e-3 \\
        --lr-adapter 3e-3 --batch-size 32 --steps 400 --eval-every 100 --out run
    torchrun --nproc-per-node=4 train.py ...   # the same losses, same global batch

Started again with the same flags it continues; a finished run is left alone.
Shapes: B clips, P prompt positions, T caption positions, D decoder width,
N modality tokens, K samples a clip, V words of the vocabulary.
"""
import data  # first: it makes torchaudio importable
import evaluate
from data import InputError, write_json

import argparse
import json
import math
import os
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.nn.functional import all_gather
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import fusion as fusions
import scst

TRUNK_IN_MEMORY = 4 << 30  # bytes; larger trunk states go to a memory-mapped file
LOGITS_IN_MEMORY = 1 << 30  # bytes; more logits than that are made in slices
# torchrun's numbers of this process and of processes: in all, and on this machine
RANK, WORLD = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
LOCAL_RANK, LOCAL_WORLD = (int(os.environ.get(name, n)) for name, n in
                           (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
GROUP_TIMEOUT = timedelta(days=1)  # while one process waits for the run's lock


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    # the system
    add("--fusion", default="additive", choices=list(fusions.SYSTEMS), help="how the modality enters")
    add("--layers", type=int, nargs="+", default=[12, 24], help="fused decoder layers, counted from 0")
    add("--tokens", type=int, default=16, help="modality tokens a clip")
    add("--null-slot", action="store_true", help="attention may choose to read nothing; not for concat")
    add("--hidden", type=int, default=768, help="inner width of the projector")
    add("--gate-init", type=float, default=0.05, help="initial gates of additive")
    add("--modality", default="audio", choices=["audio", "video"], help="of the encoder")
    # models, data and output
    add("--dataset", default="audiocaps", choices=list(data.READERS), help="layout of --data")
    add("--data", required=True, help="folder of the dataset, as released")
    add("--llava", default="llava-hf/llava-1.5-7b-hf", help="frozen backbone: folder or hub name")
    add("--encoder", default="laion/clap-htsat-unfused", help="frozen encoder: folder or hub name")
    add("--init", metavar="RUN", help="start from the fusion of a finished run")
    add("--beside", metavar="RUN", help="also attach the frozen fusion of a run of another modality")
    add("--limit", type=int, default=0, help="train on the first clips only, 0 = all")
    add("--out", required=True, help="the run's folder")
    add("--cache", help="encoder features; default: cache/ next to the run's folder")
    # optimisation
    add("--steps", type=int, default=1000, help="maximum of XE steps")
    add("--batch-size", type=int, default=512, help="clips a step, of all processes")
    add("--micro-batch", type=int, default=32, help="clips a pass, of all processes")
    add("--lr", type=float, default=2e-4, help="peak rate of the projector and the contrastive head")
    add("--lr-adapter", type=float, default=1e-4, help="peak rate of adapters, gates, unfrozen blocks")
    add("--weight-decay", type=float, default=0.01, help="on matrices")
    add("--warmup", type=float, default=0.03, help="fraction of the steps")
    add("--clip", type=float, default=1.0, help="maximum gradient norm")
    add("--contrastive", type=float, default=0.0, help="weight of the CLAP-contrastive term, 0 = off")
    add("--gate-l2", type=float, default=1e-4, help="weight of the squared gates")
    add("--keep", type=float, default=0.0, metavar="W",
        help="weight of the divergence from the backbone's own answers to --keep-qa, 0 = off")
    add("--keep-qa", metavar="FILE", help="questions for --keep, as evaluate.py retention reads them, "
        "also without images")
    add("--keep-every", type=int, default=1, metavar="K", help="steps from one such batch to the next")
    add("--probe", metavar="FILE", help="questions of evaluate.py retention: --keep-qa must not have them")
    # validation and SCST
    add("--eval-every", type=int, default=0, help="steps, 0 = an epoch")
    add("--patience", type=int, default=2, help="validations without improvement that end a stage")
    add("--scst", default="off", choices=["off", "auto", "now"],
        help="self-critical training from the best XE checkpoint: at XE's plateau, or at once")
    add("--scst-steps", type=int, default=500, help="maximum of SCST steps")
    add("--scst-samples", type=int, default=5, help="K, samples a clip")
    add("--scst-micro-batch", type=int, default=0, help="clips a pass of SCST, 0 = --micro-batch")
    add("--scst-temperature", type=float, default=1.0, help="of the policy that is trained")
    add("--scst-lr", type=float, default=1e-5, help="peak rate of SCST")
    # the machine
    add("--seed", type=int, default=0, help="of initialisation, data order, samples")
    data.add_device_flags(p)
    args = p.parse_args(argv)

    args.layers = sorted(set(args.layers))
    for flag in "tokens hidden steps batch_size micro_batch patience scst_steps keep_every".split():
        if getattr(args, flag) < 1:
            p.error(f"--{flag.replace('_', '-')} must be at least 1")
    if args.scst != "off" and args.scst_samples < 2:
        p.error("--scst-samples must be at least 2: the baseline needs another sample")
    if args.scst_temperature <= 0:
        p.error("--scst-temperature must be above 0")
    if args.contrastive and args.modality != "audio":
        p.error("--contrastive compares with CLAP's text side: it needs --modality audio")
    if bool(args.keep) != bool(args.keep_qa):
        p.error("--keep and --keep-qa need each other: a weight above 0 and a file of questions")
    if args.beside and args.scst != "off":
        p.error("--beside is for cross-entropy: it needs --scst off")
    args.micro_batch = min(args.micro_batch, args.batch_size)
    for name, size in (("--micro-batch", args.micro_batch),
                       ("--scst-micro-batch", args.scst_micro_batch or args.micro_batch)):
        if size < 1 or args.batch_size % size:
            p.error(f"--batch-size {args.batch_size} must be a multiple of {name} {size}")
        if size % WORLD:
            p.error(f"{name} {size} must be a multiple of the {WORLD} processes")
    if os.path.isfile(args.out):
        p.error(f"--out {args.out}: is a file; a run needs a folder")
    # the same prompt for all systems that learn from the same captions
    video = args.modality == "video" or args.dataset == "av"
    args.prompt = data.VIDEO_PROMPT if video else data.SOUND_PROMPT
    args.cache = args.cache or str(Path(args.out).parent / "cache")
    return args


# ---------------------------------------------------------------- losses

def caption_loss(hidden, targets, lm_head):
    """Summed cross-entropy of hidden states (B, T, D) on targets (B, T), -100 where padded.

    Where the logits (B, T, V) would take more than LOGITS_IN_MEMORY bytes they are made in
    slices, of learned tokens alone, and made again for backward.
    """
    def loss(hidden, targets):
        logits = lm_head(hidden).float().flatten(0, -2)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")

    size = LOGITS_IN_MEMORY // (4 * lm_head.out_features)
    if targets.numel() <= size:
        return loss(hidden, targets)
    learned = targets != -100
    slices = zip(hidden[learned].split(max(1, size)), targets[learned].split(max(1, size)))
    return sum(checkpoint(loss, *part, use_reentrant=False) for part in slices)


def info_nce(audio, text, log_temperature, clip):
    """Symmetric InfoNCE of audio and text vectors, both (B, E). Radford et al. 2021.

    clip (B,): the clip of each row. Another caption of the same clip is no negative.
    """
    similarity = F.normalize(audio, dim=-1) @ F.normalize(text, dim=-1).T
    logits = similarity / log_temperature.exp()                               # (B, B)
    same_clip = (clip[:, None] == clip[None]).fill_diagonal_(False)
    logits = logits.masked_fill(same_clip, float("-inf"))
    target = torch.arange(len(clip), device=clip.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class ContrastiveHead(nn.Module):
    """Mean modality token to CLAP's shared space; the temperature starts at 0.07."""

    def __init__(self, width, embed_dim):
        super().__init__()
        self.linear = nn.Linear(width, embed_dim)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))


@dataclass
class Model:
    """What a training step needs of the model."""
    backbone: data.Backbone
    fusion: fusions.Fusion      # the one that is trained
    contrast: ContrastiveHead
    branches: list              # all fusions, with the training clips' frames
    trunk: nn.Module            # the decoder below split_layer
    head: nn.Module             # the decoder from split_layer up
    split_layer: int            # the first layer with anything trained or fused
    prompt: list                # token ids that all captions share, P of them
    slots: list | None          # positions of concat's placeholders, N of them

    def attach(self, clips):
        """Fuse these training clips into the decoder; yields {modality: tokens (B, N, D)}."""
        slots = self.slots and torch.tensor([self.slots] * len(clips), device=self.backbone.device)
        return fusions.attach_branches(self.backbone.decoder, self.branches, clips, slots)

    def trained(self):
        """All that has trainable weights."""
        return nn.ModuleDict({"fusion": self.fusion, "contrast": self.contrast})


@dataclass
class Batch:
    """One process's share of a micro-batch: B clips, and for cross-entropy a caption of each."""
    clips: list                             # training clips by number, one a row
    parts: int                              # Batches of a step, of all processes: losses add up
    states: torch.Tensor | None = None      # (B, P + T, D), prompt and caption behind the trunk
    targets: torch.Tensor | None = None     # (B, T), -100 where nothing is learned
    learned_tokens: int = 0                 # of the whole step
    text: torch.Tensor | None = None        # CLAP's caption embeddings, of all processes
    text_clips: torch.Tensor | None = None  # the clip of each
    seed: int = 0                           # of SCST's samples
    limit: int = 0                          # tokens of such a sample


def xe_loss(model, batch, args):
    """(loss, {"xe", "contrastive"}) of one Batch of captions: the loss and its terms.

    loss = summed cross-entropy of the caption tokens / learned tokens of the whole step
         + args.contrastive * InfoNCE(mean modality token, CLAP's caption embedding)
         + args.gate_l2 * sum of squared gates,
    the last two divided by batch.parts: the losses of a step's Batches add up to the loss of
    the step. batch.states are the outputs of the frozen trunk, the layers below the first
    fusion, computed once for each caption: only the layers above it run.
    """
    backbone, P = model.backbone, len(model.prompt)
    with backbone.autocast(), model.attach(batch.clips) as tokens:
        out = model.head(inputs_embeds=batch.states, use_cache=False)
        hidden = out.last_hidden_state[:, P - 1:-1]                           # (B, T, D)
        xe = caption_loss(hidden, batch.targets, backbone.llava.lm_head)
        xe = xe / batch.learned_tokens
    loss = xe + args.gate_l2 * model.fusion.gate_penalty() / batch.parts
    terms = {"xe": xe.detach(), "contrastive": 0.0}
    if args.contrastive:
        mean_token = tokens[args.modality].float().mean(1)                    # (B, D)
        audio = model.contrast.linear(mean_token)
        if WORLD > 1:
            audio = torch.cat(all_gather(audio))  # of all processes, with gradient
        nce = info_nce(audio, batch.text, model.contrast.log_temperature, batch.text_clips)
        loss = loss + args.contrastive * (nce / batch.parts)
        terms["contrastive"] = nce.detach() / batch.parts
    return loss, terms


def scst_loss(model, batch, reward, args):
    """Self-critical loss of one Batch of clips, and its terms {"reward", "distinct"}.

    K samples a clip are drawn as a tree, rewarded, and passed once through the layers above the
    trunk; a sample's baseline is the mean reward of the clip's others. reward: scst.CiderD.
    "distinct": fraction of the sampled tokens that the samples do not share.
    """
    backbone, K, B = model.backbone, args.scst_samples, len(batch.clips)
    lm_head, temperature = backbone.llava.lm_head, args.scst_temperature
    prompt = torch.tensor([model.prompt] * B, device=backbone.device)
    torch.manual_seed(batch.seed)
    with torch.no_grad(), backbone.autocast(), model.attach(batch.clips):
        tree = scst.sample_tree(backbone.decoder, lm_head, prompt, K, layer=model.split_layer,
                                eos=backbone.eos, limit=batch.limit, temperature=temperature,
                                fusion=model.fusion)
    samples = tree.samples()
    captions = [scst.words(backbone.text(s)) for s in samples]
    ended = [s[-1] == backbone.eos for s in samples]
    references = [reward.corpus[clip] for clip in batch.clips for _ in range(K)]
    rewards = reward.score_many(captions, references, ended).float().view(B, K)
    rewards = rewards.to(backbone.device, non_blocking=True)
    with backbone.autocast(), model.attach(batch.clips):
        out = model.head(inputs_embeds=tree.states, position_ids=tree.position_ids,
                         attention_mask=tree.attention_mask, use_cache=False)
        logprobs = tree.logprobs(out.last_hidden_state, lm_head, temperature)
    logprobs = logprobs.view(B, K, -1)
    mask = tree.mask.view(B, K, -1).to(backbone.device, non_blocking=True)
    loss = scst.scst_loss(logprobs, mask, scst.leave_one_out(rewards))
    loss = loss + args.gate_l2 * model.fusion.gate_penalty()
    distinct = len(tree.token) / int(tree.mask.sum())
    terms = {"reward": rewards.mean() / batch.parts, "distinct": distinct / batch.parts}
    return loss / batch.parts, terms


def keep_loss(model, batch, args):
    """(loss, {batch.term}) of a KeptBatch: how far the model is from the answers that it should keep.

    loss = args.keep * KL(p_before || p_now), summed over the answers' tokens / such tokens of the
    whole step. p_before: of the backbone with nothing attached, or of an older run's captions with
    its own clip alone. p_now: with unrelated clips.
    """
    backbone, lm_head = model.backbone, model.backbone.llava.lm_head
    with backbone.autocast(), fusions.attach_branches(
            backbone.decoder, batch.branches, range(len(batch.states)), batch.slots):
        hidden = model.head(inputs_embeds=batch.states, use_cache=False).last_hidden_state
        now = lm_head(hidden[batch.rows, batch.positions]).float()            # (A, V)
        before = lm_head(batch.before).float()
    kl = F.kl_div(now.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum")
    kl = kl / batch.tokens
    return args.keep * kl, {batch.term: kl.detach()}


# ---------------------------------------------------------------- training captions

class TrunkStates:
    """The training captions' states behind the frozen trunk, computed once.

    The prompt's states (P, D) are shared; the captions' (T, D) lie packed in memory, or mapped to
    a file in `folder`, which must exist. captions: token ids; the first unlearned[i] of captions[i]
    are a question and not learned. used: numbers of the captions that have states.
    """

    def __init__(self, backbone, trunk, prompt, captions, unlearned, used, folder):
        self.ids, self.device = captions, backbone.device
        self.targets = [[-100] * n + ids[n:] for ids, n in zip(captions, unlearned)]
        self.learned = [len(ids) - n for ids, n in zip(captions, unlearned)]  # tokens
        self.start = [0, *accumulate(map(len, captions))]
        P, D, dtype = len(prompt), backbone.decoder.config.hidden_size, backbone.llava.dtype
        size = self.start[-1] * D
        order = sorted(used, key=lambda i: len(captions[i]))
        batches = [order[i:i + 128] for i in range(0, len(order), 128)]
        if size * dtype.itemsize <= TRUNK_IN_MEMORY:
            states = torch.empty(size, dtype=dtype)
        else:  # one file a machine: each of its processes computes a share of it
            path = str(folder / f"trunk{RANK // LOCAL_WORLD}.bin")
            states = torch.from_file(path, shared=True, size=size, dtype=dtype)
            batches = batches[LOCAL_RANK::LOCAL_WORLD] or batches[-1:]
        self.states = states.view(-1, D)
        with torch.inference_mode(), backbone.autocast():
            for batch in tqdm(batches, desc="trunk states", unit="batch", leave=False):
                rows = [torch.tensor(prompt + captions[i]) for i in batch]
                rows = pad_sequence(rows, batch_first=True, padding_value=backbone.pad)
                hidden = trunk(input_ids=rows.to(self.device), use_cache=False).last_hidden_state
                # the same in every row: attention is causal
                self.prompt_states = hidden[0, :P].to(dtype).clone()
                hidden = hidden[:, P:].to(dtype).cpu()  # one copy a batch
                for h, i in zip(hidden, batch):
                    self.states[self.start[i]:self.start[i + 1]] = h[:len(captions[i])]
        if WORLD > 1:
            dist.barrier()  # the other shares are written

    def batch(self, captions):
        """Captions by number -> states (B, P + T, D), targets (B, T), -100 where padded."""
        states = [self.states[self.start[i]:self.start[i + 1]] for i in captions]
        states = pad_sequence(states, batch_first=True).to(self.device, non_blocking=True)
        states = torch.cat([self.prompt_states.expand(len(captions), -1, -1), states], 1)
        targets = [torch.tensor(self.targets[i]) for i in captions]
        targets = pad_sequence(targets, batch_first=True, padding_value=-100)
        return states, targets.to(self.device, non_blocking=True)


class Order:
    """The data order, a function of the seed and the step. references: how many each clip has."""

    def __init__(self, references, seed):
        self.references, self.seed, self.epoch = references, seed, None

    def step(self, step, size):
        """[(clip, reference)] of a step: an epoch takes each clip once, with one reference."""
        n, batch = len(self.references), []
        for position in range(step * size, (step + 1) * size):
            epoch, i = divmod(position, n)
            if epoch != self.epoch:
                self.epoch = epoch
                g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self.clips = torch.randperm(n, generator=g).tolist()
                self.draws = torch.rand(n, generator=g).tolist()
            clip = self.clips[i]
            batch.append((clip, int(self.draws[i] * self.references[clip])))
        return batch


class TrainingCaptions(TrunkStates):
    """The training clips' captions, and the batches of each step. prompts: token ids, one a clip."""

    def __init__(self, model, clips, prompts, encoder, args):
        P, ids, unlearned = len(model.prompt), [], []
        for clip, prompt in zip(clips, prompts):
            for reference in clip.references:
                answer = model.backbone.caption_ids(clip.question or args.prompt, reference)
                ids.append(prompt[P:] + answer)
                unlearned.append(len(prompt) - P)
        counts = [len(clip.references) for clip in clips]
        self.clips, self.order = clips, Order(counts, args.seed)
        self.first = [0, *accumulate(counts)]  # number of a clip's first caption
        # a short run comes across some captions only
        used = {caption for step in range(args.steps) for _, caption in self.rows(step, args)}
        folder = Path(args.out) / "state"
        super().__init__(model.backbone, model.trunk, model.prompt, ids, unlearned, sorted(used), folder)
        if args.contrastive:
            self.embeds = encoder.embed_text([r for clip in clips for r in clip.references])
        # a sample longer than any training caption is lost already
        self.limit = min(max(self.learned), evaluate.MAX_NEW_TOKENS)

    def rows(self, step, args):
        """[(clip, caption)] of a step, by number."""
        return [(clip, self.first[clip] + reference)
                for clip, reference in self.order.step(step, args.batch_size)]

    def batches(self, stage, step, args):
        """This process's Batches of a step of "xe" or "scst"."""
        rows = self.rows(step, args)
        tokens = sum(self.learned[caption] for _, caption in rows)
        if stage == "xe":
            rows.sort(key=lambda row: len(self.ids[row[1]]))  # little padding
        micro_batch = args.micro_batch
        if stage == "scst":
            micro_batch = args.scst_micro_batch or micro_batch
        size = micro_batch // WORLD
        parts = args.batch_size // size
        for k in range(args.batch_size // micro_batch):
            micro = rows[k * micro_batch:(k + 1) * micro_batch]
            clips, captions = zip(*micro[RANK * size:(RANK + 1) * size])
            if stage == "scst":
                seed = ((args.seed * 1_000_003 + step) * 1009 + k) * 97 + RANK
                yield Batch(clips, parts, seed=seed, limit=self.limit)
            else:
                batch = Batch(clips, parts, *self.batch(captions), tokens)
                if args.contrastive:
                    all_clips, all_captions = zip(*micro)
                    text, text_clips = self.embeds[list(all_captions)], torch.tensor(all_clips)
                    batch.text = text.to(self.device, non_blocking=True)
                    batch.text_clips = text_clips.to(self.device, non_blocking=True)
                yield batch


# ---------------------------------------------------------------- answers to keep

CLIPS, SILENCE = 0.7, 0.15  # what is attached beside a question: other clips, silence, else noise
KEPT_POSITIONS = 80  # of a question where as many questions as captions fit a pass


@dataclass
class KeptBatch:
    """A pass of the answers to keep in a step: B questions with A answer tokens."""
    branches: list            # the fusions, each with frames of B clips
    states: torch.Tensor      # (B, T, D), question and answer behind the trunk
    slots: torch.Tensor       # (B, N), positions of concat's placeholders; else N is 0
    rows: torch.Tensor        # (A,), and positions (A,): the states that predict answer tokens
    positions: torch.Tensor
    before: torch.Tensor      # (A, D), final states in their place before training
    tokens: int               # answer tokens of the whole step
    term: str                 # its name in the log


def questions_a_pass(n, positions):
    """How many of n questions of so many positions go through at once: LLaVA-1.5's images alone have 576."""
    return max(1, KEPT_POSITIONS * n // positions)


class Distractors:
    """Frames of one modality that have nothing to do with a question."""

    def __init__(self, clips, encoder, seed):
        self.clips = clips
        self.silence, self.noises = evaluate.silence_and_noise(encoder, [seed, 1])

    def draw(self, generator, n):
        """Frames [(S, E)] of n clips, of silence and of noise."""
        frames = []
        for kind in generator.random(n):
            pool = self.clips if kind < CLIPS else self.silence if kind < CLIPS + SILENCE else self.noises
            frames.append(pool[int(generator.integers(len(pool)))])
        return frames


class KeptAnswers:
    """Answers that training should not change, and the batches of each step.

    Their states behind the frozen trunk, and the final states that predict them, are computed
    once. questions: data.Question. answers: texts. older: a Branch with a clip for each question,
    whose answers these are; None: they are the backbone's own, beside unrelated clips.
    """

    def __init__(self, model, questions, answers, distractors, older=None):
        self.model, self.distractors, self.older = model, distractors, older
        self.examples = []  # (states (T, D), slots, final states (A, D))
        for i in tqdm(range(0, len(answers), 32), "answers to keep", unit="batch", leave=False):
            clips = range(len(answers))[i:i + 32]
            self.examples += self._encode(questions[i:i + 32], answers[i:i + 32], clips)

    @torch.inference_mode()
    def _encode(self, questions, answers, clips):
        backbone, N = self.model.backbone, len(self.model.slots or ())
        texts = [backbone.chat(q.question, image=q.image is not None) for q in questions]
        images = [data.open_image(q.image) for q in questions if q.image]
        inputs = backbone.processor(text=texts, images=images or None)
        prompts, pixels = inputs["input_ids"], {}
        if images:
            pixels = torch.as_tensor(np.stack(inputs["pixel_values"]))
            pixels = {"pixel_values": pixels.to(backbone.device, backbone.llava.dtype)}
        answers = [backbone.caption_ids(q.question, a) for q, a in zip(questions, answers)]
        attached = [self.older] if self.older else []
        with fusions.attach_branches(backbone.decoder, attached, clips):
            states, final = self._states(prompts, answers, pixels)
        first = [backbone.prompt(q.question, 1)[1][0] for q in questions]  # where an image is or would be
        slots = [list(range(f, f + N)) for f in first]
        if N:  # the backbone's own answers are those without placeholders
            prompts = [p[:f] + [backbone.placeholder] * N + p[f:] for f, p in zip(first, prompts)]
            states, _ = self._states(prompts, answers, pixels)
        return list(zip(states, slots, final))

    def _states(self, prompts, answers, pixels):
        """States (T, D) behind the trunk, and final ones (A, D) that predict the answer, of each."""
        backbone, inputs = self.model.backbone, []
        rows = [torch.tensor(p + a) for p, a in zip(prompts, answers)]
        ids = pad_sequence(rows, batch_first=True, padding_value=backbone.pad)
        block = backbone.decoder.layers[self.model.split_layer]
        # first of the block's hooks: before an older branch acts there
        record = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]), prepend=True)
        with record, backbone.autocast():
            out = backbone.llava.model(input_ids=ids.to(backbone.device), use_cache=False, **pixels)
        states, final = inputs[0].cpu(), out.last_hidden_state.cpu()
        states = [h[:len(row)].clone() for h, row in zip(states, rows)]
        final = [h[len(p) - 1:len(p) + len(a) - 1].clone() for h, p, a in zip(final, prompts, answers)]
        return states, final

    def batches(self, step, args):
        """This process's KeptBatches of a step, which has them every args.keep_every steps."""
        if step % args.keep_every:
            return
        n = args.micro_batch
        generator = np.random.default_rng([args.seed, step, self.older is not None])
        picks = generator.integers(len(self.examples), size=n).tolist()
        drawn = {m: pool.draw(generator, n) for m, pool in self.distractors.items()}
        if self.older:
            drawn[self.older.fusion.spec.modality] = [self.older.frames[i] for i in picks]
        tokens = sum(len(self.examples[i][2]) for i in picks)
        share = range(RANK, n, WORLD)
        size = questions_a_pass(len(share), max(len(self.examples[picks[i]][0]) for i in share))
        for first in range(0, len(share), size):
            part = share[first:first + size]
            examples = [self.examples[picks[i]] for i in part]
            branches = []
            for branch in self.model.branches:
                frames = drawn[branch.fusion.spec.modality]
                branches.append(fusions.Branch(branch.fusion, [frames[i] for i in part]))
            yield self._batch(examples, branches, tokens)

    def _batch(self, examples, branches, tokens):
        states, slots, final = zip(*examples)
        rows, positions = [], []
        for row, (h, last) in enumerate(zip(states, final)):
            rows += [row] * len(last)
            positions += range(len(h) - len(last) - 1, len(h) - 1)
        tensors = [pad_sequence(states, batch_first=True), torch.tensor(slots), torch.tensor(rows),
                   torch.tensor(positions), torch.cat(final)]
        tensors = [t.to(self.model.backbone.device, non_blocking=True) for t in tensors]
        return KeptBatch(branches, *tensors, tokens, "keep_captions" if self.older else "keep")


def answers_to_keep(model, inputs, beside, args):
    """[KeptAnswers] of --keep: of --keep-qa, and with --beside of the older run's captions."""
    if not args.keep:
        return []
    backbone = model.backbone
    questions = data.read_kept(args.keep_qa)
    distractors = {b.fusion.spec.modality: Distractors(
        b.frames, inputs.encoders[b.fusion.spec.modality], args.seed) for b in model.branches}
    answers = evaluate.own_answers(backbone, questions, args.cache)
    kept = [KeptAnswers(model, questions, answers, distractors)]
    if beside:
        older, prompts, captions = evaluate.own_captions(beside, data.KEPT, args)
        prompts = [data.Question("", None, prompt, "", "") for prompt in prompts]
        kept.append(KeptAnswers(model, prompts, captions, distractors, older))
    return kept


# ---------------------------------------------------------------- the run's folder

@dataclass
class Progress:
    """How far training is; saved with the state, so that a killed run continues."""
    stage: str = "xe"
    step: int = 0
    best: float | None = None
    best_step: int = 0
    since_best: int = 0         # validations
    scores: dict | None = None  # of the best checkpoint
    seconds: float = 0.0        # of training, over all starts
    began: float = field(default_factory=time.perf_counter)  # what the clock shows at 0 seconds
    log_lines: int = 0
    stable: bool = False        # XE has stopped rising
    stages: dict = field(default_factory=dict)  # of those that ended

    def end_stage(self, reason):
        self.stages[self.stage] = {
            "best": self.best, "best_step": self.best_step, "seconds": self.seconds,
            "scores": self.scores, "steps": self.step, "reason": reason}


def write_log(out, progress, event, **values):
    """Append a line to log.jsonl, one flat object."""
    progress.seconds = time.perf_counter() - progress.began
    progress.log_lines += 1
    if RANK == 0:
        with open(out / "log.jsonl", "a") as f:
            entry = {"event": event, "stage": progress.stage, "step": progress.step, **values}
            f.write(json.dumps(entry | {"seconds": progress.seconds}) + "\n")


def git_commit():
    command = "git describe --always --dirty --abbrev=12"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or None


def read_json(path):
    """A JSON object of the run's folder; empty where there is no such file."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError):
        raise InputError(f"{path}: not JSON; remove the folder or choose another --out") from None


def is_finished(args):
    """Is the run in --out finished? Raises InputError if it is another run."""
    out, now = Path(args.out), args.scst == "now"
    old = read_json(out / "config.json")
    if now and not old:
        raise InputError(f"{out}: --scst now continues from an XE checkpoint, and there is no run")
    begins = now and old.get("scst") != "now"  # SCST after a finished XE run
    for key, value in vars(args).items():
        may_differ = key in ("out", "cache", "device") or begins and key.startswith("scst")
        # a flag that is newer than the run
        off = key not in old and (value in (0, None, "auto") or key == "keep_every")
        if old and not may_differ and not off and old.get(key) != value:
            raise InputError(f"{out} holds a run with --{key.replace('_', '-')} {old.get(key)}, "
                             f"not {value}: choose another --out, or remove that folder")
    stages = read_json(out / "training.json").get("stages", {})
    finished = "scst" in stages if now else "xe" in stages
    if finished and RANK == 0:
        shutil.rmtree(out / "state", ignore_errors=True)
        print(f"{out}: finished already")
    return finished


def save_state(model, optimizer, progress, args):
    """All that a resumed run needs, without pickle: tensors, and Progress as JSON in the header."""
    if RANK > 0:
        return
    path = Path(args.out) / "state" / "state.safetensors"
    tensors = {f"model/{name}": t.contiguous() for name, t in model.trained().state_dict().items()}
    for i, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"{i}/{name}": t.contiguous() for name, t in entry.items()}
    tmp = path.with_suffix(".tmp")
    save_file(tensors, tmp, metadata={"progress": json.dumps(asdict(progress))})
    os.replace(tmp, path)


def load_state(path, model):
    """(Progress, the optimizer's state) as saved; the weights are loaded into the model."""
    state = {}
    try:
        with safe_open(path, "pt", device="cpu") as f:
            progress = Progress(**json.loads(f.metadata()["progress"]))
            for key in f.keys():
                owner, name = key.split("/")
                state.setdefault(owner, {})[name] = f.get_tensor(key)
        model.trained().load_state_dict(state.pop("model"))
        return progress, {int(i): entry for i, entry in state.items()}
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:120]
        raise InputError(f"{path}: damaged ({reason}); remove it to train from the start") from None


def start_or_resume(model, args):
    """(Progress, optimizer) of a run that begins, or continues after a kill or XE's end."""
    out = Path(args.out)
    path, log = out / "state" / "state.safetensors", out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    stages = read_json(out / "training.json").get("stages")
    progress, state = Progress(), {}
    if path.exists():
        progress, state = load_state(path, model)
    elif stages:  # XE has finished, and --scst now continues
        progress = Progress(stages=stages, log_lines=len(lines), seconds=stages["xe"]["seconds"])
    progress.began = time.perf_counter() - progress.seconds
    optimizer = make_optimizer(model, args, progress.stage)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    if RANK == 0:
        if path.exists():
            print(f"{out}: continues at {progress.stage} step {progress.step}")
        data.write_text(log, "".join(lines[:progress.log_lines]))  # later steps are done again
    return progress, optimizer


def begin_scst(model, progress, args):
    """(Progress, optimizer) of SCST, which starts from the best XE checkpoint."""
    out = Path(args.out)
    if "xe" not in progress.stages:
        if progress.best is None:
            raise InputError(f"{out}: --scst now needs an XE checkpoint, and none has been saved yet")
        progress.end_stage("--scst now")
    if WORLD > 1:
        dist.barrier()  # process 0 may still be writing it
    model.fusion.load_state_dict(fusions.load(out, model.backbone.decoder).state_dict())
    progress = replace(progress, stage="scst", step=0, best=None, best_step=0, since_best=0, scores=None,
                       stable=True)
    optimizer = make_optimizer(model, args, "scst")
    save_state(model, optimizer, progress, args)
    return progress, optimizer


# ---------------------------------------------------------------- training

class NotFinite(RuntimeError):
    """Training broke down; the last good checkpoint is untouched."""


def make_optimizer(model, args, stage):
    """AdamW. XE: projector and adapters have their own rates; SCST: one rate."""
    groups = {}
    for name, parameter in model.trained().named_parameters():
        lr = args.lr if name.startswith(("fusion.projector", "contrast")) else args.lr_adapter
        lr = args.scst_lr if stage == "scst" else lr
        matrix = parameter.ndim >= 2 and not name.endswith(("position", "constant"))
        decay = args.weight_decay if matrix else 0.0
        groups.setdefault((lr, decay), []).append(parameter)
    groups = [{"params": parameters, "lr": lr, "peak": lr, "weight_decay": decay}
              for (lr, decay), parameters in groups.items()]
    return torch.optim.AdamW(groups, fused=args.device.startswith("cuda") or None)


def cosine(step, steps, warmup):
    """Fraction of the peak rate: linear warm-up, then half a cosine to 0."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def step_batches(captions, kept, loss_function, stage, step, args):
    """(loss function, batch) of all that a step learns from: captions, and answers to keep."""
    for batch in captions.batches(stage, step, args):
        yield loss_function, batch
    for answers in kept:
        for batch in answers.batches(step, args):
            yield keep_loss, batch


def optimizer_step(model, batches, optimizer, rate, args):
    """One step over the micro-batches: (terms of the loss, gradient norm).

    batches: pairs of a function and a Batch; loss_function(model, batch, args=args) -> (loss,
    {name: number}), whose losses and terms add up. rate: fraction of the peak learning rates.
    Raises NotFinite before any weight changes.
    """
    totals = {}
    for loss_function, batch in batches:
        loss, terms = loss_function(model, batch, args=args)
        loss.backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, 0.0) + value
    parameters = list(model.trained().parameters())
    values = [torch.as_tensor(value, dtype=torch.float32) for value in totals.values()]
    values = torch.stack([v.to(model.backbone.device, non_blocking=True) for v in values])
    if WORLD > 1:
        for tensor in [values, *(p.grad for p in parameters if p.grad is not None)]:
            dist.all_reduce(tensor)
    terms = dict(zip(totals, values.tolist()))
    norm = nn.utils.clip_grad_norm_(parameters, args.clip).item()
    if not all(map(math.isfinite, [*terms.values(), norm])):
        raise NotFinite(f"not finite: {terms}, gradient norm {norm}")
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return terms, norm


def validate(model, inputs, args, rerank):
    """Scores {"val_...": value} of greedy captions of the validation split.

    rerank: also "val_reranked" and "val_oracle", the selection metric of a choice, with equal
    weights, among the greedy caption and five samples.
    """
    box, start = [None], time.perf_counter()
    share = range(RANK, len(inputs.prompts), WORLD)
    branches = [fusions.Branch(b.fusion, inputs.frames[b.fusion.spec.modality].take(share))
                for b in model.branches]
    candidates = evaluate.decode(
        model.backbone, branches, [inputs.prompts[i] for i in share], samples=5 if rerank else 0,
        progress="validation" if RANK == 0 else None)
    if WORLD > 1:
        shares = [None] * WORLD
        dist.all_gather_object(shares, candidates)
        candidates = [shares[i % WORLD][i // WORLD] for i in range(len(inputs.prompts))]
    if RANK == 0:
        first = [clip[0] for clip in candidates]
        items = evaluate.make_items(inputs.split.clips, first)
        corpus = evaluate.score(items, quick=True)["corpus"]
        values = corpus | {"n": len(items)} | evaluate.caption_statistics(first)
        scores = {f"val_{name}": value for name, value in values.items()}
        if rerank:
            scores |= evaluate.equal_weights_rerank(candidates, inputs)
        seconds = time.perf_counter() - start
        box = [scores | {"val_seconds": seconds, "example": items[0]["prediction"]}]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def collapse(scores, xe):
    """Why SCST should stop, or None: captions that grow, shrink, repeat, do not end, or score low.

    xe: validation scores before SCST.
    """
    if not 0.6 <= scores["val_words"] / max(1e-9, xe["val_words"]) <= 1.6:
        return f"collapse: {scores['val_words']:.1f} words a caption, after XE {xe['val_words']:.1f}"
    if scores["val_repetition"] > xe["val_repetition"] + 0.05:
        return f"collapse: {scores['val_repetition']:.0%} of 4-grams repeat"
    if scores["val_not_ended"] > xe["val_not_ended"] + 0.1:
        return f"collapse: {scores['val_not_ended']:.0%} of captions do not end"
    metric = evaluate.logged_metric(scores, xe)
    if scores[metric] < 0.8 * xe[metric]:
        return f"collapse: {metric} {scores[metric]:.3f}, after XE {xe[metric]:.3f}"
    return None


def train_stage(model, captions, kept, val_inputs, optimizer, progress, loss_function, args):
    """Train one stage, XE or SCST, to its end; the best checkpoint is kept."""
    stage, start, out = progress.stage, progress.step, Path(args.out)
    steps, folder = (args.steps, out) if stage == "xe" else (args.scst_steps, out / "scst")
    eval_every = args.eval_every or max(1, len(captions.clips) // args.batch_size)
    questions = val_inputs.split.clips[0].question is not None
    metric = "val_accuracy" if questions else f"val_{evaluate.selection_metric()}"
    if progress.scores and not questions:
        metric = evaluate.logged_metric(progress.scores)
    name = f"{args.out[-24:]} {stage}"
    bar = tqdm(total=steps, initial=start, desc=name, unit="step", disable=RANK > 0)
    while True:
        step = progress.step

        # evaluate
        if step > start and (step % eval_every == 0 or step == steps):
            rerank = progress.stable and args.modality == "audio" and not args.beside
            scores = validate(model, val_inputs, args, rerank)
            write_log(out, progress, "validation", **scores)
            reason = collapse(scores, progress.stages["xe"]["scores"]) if stage == "scst" else None

            # save
            progress.since_best += 1
            if not reason and (progress.best is None or scores[metric] > progress.best):
                progress.best, progress.best_step = scores[metric], step
                progress.since_best, progress.scores = 0, scores
                if RANK == 0:
                    model.fusion.save(folder)

            # stop
            if not reason and progress.since_best >= args.patience:
                reason = "plateau"
            elif not reason and step == steps:
                reason = "all steps done"
            if not progress.stable and (reason or progress.since_best):
                progress.stable = True
                if RANK == 0:
                    best = {"step": step, "best_step": progress.best_step, metric: progress.best}
                    write_json(out / "stable.json", best)
            if reason:
                progress.end_stage(reason)
                bar.close()
                if RANK == 0:
                    best = progress.best and round(progress.best, 4)
                    print(f"{out}: {stage} {metric} {best} at step {progress.best_step} ({reason})")
                return
            save_state(model, optimizer, progress, args)

        # step
        began = time.perf_counter()
        rate = cosine(step, steps, args.warmup)
        batches = step_batches(captions, kept, loss_function, stage, step, args)
        try:
            terms, norm = optimizer_step(model, batches, optimizer, rate, args)
        except NotFinite as e:
            rows = captions.order.step(step, args.batch_size)
            ids = " ".join(captions.clips[clip].id for clip, _ in rows)
            raise NotFinite(f"{out}: {stage} step {step}: {e}; clips {ids}") from None
        bar.update()

        # log
        if step % 10 == 0 or stage == "scst":
            gates = {f"gate_{layer}": gate for layer, gate in model.fusion.gates().items()}
            speed = args.batch_size / (time.perf_counter() - began)
            write_log(out, progress, "step", **terms, gradient_norm=norm,
                      lr=optimizer.param_groups[0]["lr"], **gates, clips_per_second=speed)
        progress.step += 1


# ---------------------------------------------------------------- main

def build_model(inputs, clips, beside, args):
    """The Model, and the token ids of each clip's prompt."""
    backbone = data.load_backbone(args.llava, args.device, args.dtype)
    decoder, encoder = backbone.decoder, inputs.encoders[args.modality]
    torch.manual_seed(args.seed)
    fusion = fusions.build(
        args.fusion, decoder, encoder_width=encoder.width, layers=args.layers, tokens=args.tokens,
        hidden=args.hidden, gate_init=args.gate_init, modality=args.modality,
        null_slot=args.null_slot).to(backbone.device)
    if args.init:
        try:
            fusion.load_state_dict(fusions.load(args.init, decoder).state_dict())
        except RuntimeError:
            raise InputError(f"--init {args.init}: its system, layers or sizes are not those of "
                             "these flags") from None
    contrast = ContrastiveHead(decoder.config.hidden_size, encoder.embed_dim).to(backbone.device)

    attached = [fusion] if beside is None else [beside.fusion, fusion]
    changed = [layer for f in attached for layer in f.spec.layers]
    split_layer = min([*changed, *map(int, getattr(fusion, "top", ()))])
    # unfreeze's own blocks belong in the head
    with fusions.attach_branches(decoder, [fusions.Branch(f) for f in attached], []):
        trunk, head = fusions.split(decoder, split_layer)

    placeholders = args.tokens if args.fusion == "concat" else 0
    encoded = [backbone.prompt(text, placeholders) for text in inputs.prompts[:len(clips)]]
    prompts, slots = zip(*encoded)
    shared = os.path.commonprefix(prompts)  # where clips have questions, only what precedes them
    return Model(backbone, fusion, contrast, inputs.branches(attached), trunk, head, split_layer,
                 shared, slots[0]), prompts


def main(argv=None):
    gpus = torch.cuda.device_count()
    if WORLD > 1 and LOCAL_RANK < gpus:
        torch.cuda.set_device(LOCAL_RANK)  # before --device is tried, which would be GPU 0 for all
    args = parse_args(argv)
    out = Path(args.out)
    cuda = args.device.startswith("cuda")
    if WORLD > 1 and cuda:
        if LOCAL_RANK >= gpus:
            raise InputError(f"process {LOCAL_RANK} of torchrun has no GPU, {gpus} are visible: "
                             "start as many processes as there are GPUs")
        args.device = f"cuda:{LOCAL_RANK}"

    # data first: a wrong folder should not wait for a 7B model
    splits = [data.read_split(args.dataset, args.data, name) for name in ("train", "val")]
    if splits[0].clips[0].question and args.scst != "off":
        raise InputError(f"{args.data}: has questions, and SCST is for captions: use --scst off")
    if args.keep:
        data.check_apart(args.keep_qa, data.read_qa(args.probe)[0] if args.probe else [])
    if is_finished(args):
        return
    beside = evaluate.open_beside(vars(args), args.device, args.dtype)
    inputs, val_inputs = [evaluate.load_inputs(vars(args), s, args.device, beside) for s in splits]
    clips = inputs.split.clips[:args.limit or None]
    if RANK == 0:
        for s in splits:
            print(f"{s.name}: {len(s.clips)} clips, {len(s.missing)} missing, {len(s.bad)} unreadable")
    model, prompts = build_model(inputs, clips, beside, args)

    # the folder is touched only now: all flags have been checked
    if RANK == 0:
        (out / "state").mkdir(parents=True, exist_ok=True)
        lock = open(out / "state" / "lock", "w")  # held until this process ends
        data.lock_or_wait(lock, f"{out}: waiting for another process that trains there")
    if WORLD > 1:
        # only now: whoever waited for features waited for a file's lock, which has no time limit
        dist.init_process_group("nccl" if cuda else "gloo", timeout=GROUP_TIMEOUT)
        dist.barrier()
    if is_finished(args):  # by the process that was waited for
        return
    config = {**vars(args), "name": out.name, "folder": os.getcwd(), "git": git_commit(),
              "versions": evaluate.versions()}
    config = read_json(out / "config.json") or config
    captions = TrainingCaptions(model, clips, prompts, inputs.encoders[args.modality], args)
    kept = answers_to_keep(model, inputs, beside, args)
    progress, optimizer = start_or_resume(model, args)
    if args.scst == "now":
        config |= {key: value for key, value in vars(args).items() if key.startswith("scst")}
        if progress.stage == "xe":
            progress, optimizer = begin_scst(model, progress, args)
    if RANK == 0:
        write_json(out / "config.json", config)

    if progress.stage == "xe":
        train_stage(model, captions, kept, val_inputs, optimizer, progress, xe_loss, args)
        if args.scst == "auto":
            progress, optimizer = begin_scst(model, progress, args)
    if progress.stage == "scst":
        corpus = [[scst.words(r) for r in clip.references] for clip in clips]
        loss = partial(scst_loss, reward=scst.CiderD(corpus, end=True))
        train_stage(model, captions, kept, val_inputs, optimizer, progress, loss, args)

    # training.json says that the run is finished
    if RANK == 0:
        write_json(out / "training.json", {
            "best": progress.stages["xe"]["scores"], "stages": progress.stages,
            "seconds": time.perf_counter() - progress.began,
            "trainable_parameters": fusions.count_parameters(model.fusion)})
        shutil.rmtree(out / "state", ignore_errors=True)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        evaluate.guarded(main)
    except NotFinite as e:
        raise SystemExit(f"error: {e}")  # exit status 1: not a person's mistake
