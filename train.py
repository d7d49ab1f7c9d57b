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
from data import InputError, read_json, write_json

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
from tqdm import tqdm

import fusion as fusions
import scst

TRUNK_IN_MEMORY = 4 << 30  # bytes; larger trunk states go to a memory-mapped file
# torchrun's numbers of this process and of processes: in all, and on this machine
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = 0, 1, 0, 1
if all(os.environ.get(name) for name in TORCHRUN):  # only some of them: left over from another job
    RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (int(os.environ[name]) for name in TORCHRUN[:4])
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
    add("--clap", help="CLAP of the contrastive term and the reranker: folder or hub name; default: the encoder, "
        "where that is a CLAP")
    add("--init", metavar="RUN", help="start from the fusion of a finished run")
    add("--limit-clips", type=int, default=0, help="the first clips of each split only, 0 = all")
    add("--out", required=True, help="the run's folder")
    add("--cache", help="encoder features; default: cache/ next to the run's folder")
    # optimisation
    add("--steps", type=int, default=1000, help="maximum of XE steps; 0 with --init: SCST alone")
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
    add("--keep-qa", metavar="FILE", help="questions for --keep, as evaluate.py retention reads them; one without an "
        "image may be another sense's prompt, and its answer what that sense says")
    add("--keep-every", type=int, default=1, metavar="K", help="steps from one such batch to the next")
    add("--probe", metavar="FILE", help="questions of evaluate.py retention: --keep-qa must not have them")
    # validation and SCST
    add("--eval-every", type=int, default=0, help="steps, 0 = an epoch")
    add("--patience", type=int, default=2, help="validations without improvement that end a stage")
    add("--scst", default="off", choices=["off", "auto"],
        help="self-critical training from the best XE checkpoint, at XE's plateau")
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
    least_1 = "tokens hidden batch_size micro_batch patience scst_steps keep_every"
    for flag, least in [*((flag, 1) for flag in least_1.split()), ("limit_clips", 0), ("steps", 0), ("seed", 0)]:
        if getattr(args, flag) < least:
            p.error(f"--{flag.replace('_', '-')} must be at least {least}")
    if args.seed >= 2 ** 31:
        p.error(f"--seed {args.seed} must be below {2 ** 31}")
    if not args.steps and not args.init:
        p.error("--steps 0 needs --init RUN: there would be nothing to start SCST from")
    if args.scst != "off" and args.scst_samples < 2:
        p.error("--scst-samples must be at least 2: the baseline needs another sample")
    if args.scst_temperature <= 0:
        p.error("--scst-temperature must be above 0")
    if args.contrastive and args.modality != "audio" and not args.clap:
        p.error("--contrastive compares with CLAP's text side: it needs --clap, or --modality audio")
    if args.null_slot and not fusions.SYSTEMS[args.fusion].attends:
        p.error(f"--null-slot: {args.fusion} has no attention that could read nothing")
    if bool(args.keep) != bool(args.keep_qa):
        p.error("--keep and --keep-qa need each other: a weight above 0 and a file of questions")
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
    contrast: ContrastiveHead | None  # None: without a contrastive term
    trunk: nn.Module            # the decoder below split_layer
    head: nn.Module             # the decoder from split_layer up
    split_layer: int            # the first layer with anything trained or fused

    @property
    def placeholders(self):
        """How many a prompt has: concat writes its N tokens over them."""
        return self.fusion.spec.tokens if self.fusion.overwrites_prompt else 0

    def trained(self):
        """All that has trainable weights."""
        parts = {"fusion": self.fusion}
        if self.contrast is not None:
            parts["contrast"] = self.contrast
        return nn.ModuleDict(parts)


@dataclass
class Batch:
    """What one pass of one process learns from: B rows, and A positions that predict answer tokens.

    Losses of a step's Batches, of all processes, add up to the loss of the step.
    """
    clip: tuple                             # each row's clip as Fusion.attach takes it:
    # frames (B, S, E), mask (B, S), positions of concat's placeholders (B, N) or None
    states: torch.Tensor | None = None      # (B, T, D): prompt and answer behind the trunk
    rows: torch.Tensor | None = None        # (A,), and positions (A,): hidden[rows, positions]
    positions: torch.Tensor | None = None   # are the final states that predict...
    targets: torch.Tensor | None = None     # ...(A,) tokens, or the words of final states (A, D)
    answer_tokens: int = 0                  # A of the whole step
    clips: tuple = ()                       # each row's training clip, by number
    parts: int = 1                          # Batches of captions in the step
    text: torch.Tensor | None = None        # contrastive: CLAP's caption embeddings, of all processes
    text_clips: torch.Tensor | None = None  # contrastive: the clip of each, by number
    prompt: torch.Tensor | None = None      # SCST: (B, P) token ids that are continued
    seed: int = 0                           # SCST: of its samples
    max_tokens: int = 0                     # SCST: of a sample


def xe_loss(model, batch, args):
    """(loss, {"xe", "contrastive"}) of one Batch of captions: the loss and its terms.

    loss = summed cross-entropy of the caption tokens / such tokens of the whole step
         + args.contrastive * InfoNCE(mean modality token, CLAP's caption embedding)
         + args.gate_l2 * sum of squared gates,
    the last two divided by batch.parts: the losses of a step's Batches add up to the loss of
    the step. batch.states are the outputs of the frozen trunk, the layers below the first
    fusion, computed once for each caption: only the layers above it run.
    """
    backbone = model.backbone
    with backbone.autocast(), model.fusion.attach(backbone.decoder, *batch.clip) as tokens:
        hidden = model.head(inputs_embeds=batch.states, use_cache=False).last_hidden_state
        hidden = hidden[batch.rows, batch.positions]                          # (A, D)
        logprobs = evaluate.token_logprobs(hidden, batch.targets, backbone.llava.lm_head)
    xe = -logprobs.sum() / batch.answer_tokens
    loss = xe + args.gate_l2 * model.fusion.gate_penalty() / batch.parts
    terms = {"xe": xe.detach(), "contrastive": 0.0}
    if args.contrastive:
        audio = model.contrast.linear(tokens.float().mean(1))                 # (B, P)
        if WORLD > 1:
            # every process sees the negatives of all; the gradient flows back to each
            audio = torch.cat(all_gather(audio))
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
    # a seed for each Batch: the samples do not depend on what was drawn before a kill
    torch.manual_seed(batch.seed)
    with torch.no_grad(), backbone.autocast(), model.fusion.attach(backbone.decoder, *batch.clip):
        tree = scst.sample_tree(backbone.decoder, lm_head, batch.prompt, K, layer=model.split_layer,
                                eos=backbone.eos, max_tokens=batch.max_tokens,
                                temperature=temperature, rows=model.fusion.rows)
    samples = tree.samples()
    captions = [scst.words(backbone.text(s)) for s in samples]
    ended = [s[-1] == backbone.eos for s in samples]
    references = [reward.corpus[clip] for clip in batch.clips for _ in range(K)]
    rewards = reward.score_many(captions, references, ended).float().view(B, K)
    rewards = rewards.to(backbone.device, non_blocking=True)
    # the same tokens once more, now with gradient, through the layers above the trunk alone
    with backbone.autocast(), model.fusion.attach(backbone.decoder, *batch.clip):
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
    """(loss, {"keep"}) of one Batch of answers to keep: how far the model is from the backbone along them.

    loss = args.keep * KL(p_before || p_now), summed over the answers' tokens / such tokens of the
    whole step. p_before: of the backbone with nothing attached. p_now: beside unrelated clips.
    """
    backbone, lm_head = model.backbone, model.backbone.llava.lm_head
    with backbone.autocast(), model.fusion.attach(backbone.decoder, *batch.clip):
        hidden = model.head(inputs_embeds=batch.states, use_cache=False).last_hidden_state
        now = lm_head(hidden[batch.rows, batch.positions]).float()            # (A, V)
        before = lm_head(batch.targets).float()
    kl = F.kl_div(now.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="sum")
    kl = kl / batch.answer_tokens
    return args.keep * kl, {"keep": kl.detach()}


# ---------------------------------------------------------------- answers behind the frozen trunk

class Answers:
    """Answers to prompts: captions to learn, or answers along which the backbone is kept.

    Answer i follows prompt i = (text, image or None), as token ids with the end token. What the
    frozen trunk makes of both is computed once, here:
      states    (L_i - P, D) of each, packed in memory, or mapped to a file in `folder`
      shared    (P, D), of the positions with which all prompts begin
      final     (A_i, D) of each, to keep: the backbone's last states that predict the answer
    used: numbers of the answers that have states, in the order of their computation; None: all.
    """

    def __init__(self, model, prompts, answers, *, keep=False, used=None, folder=None):
        backbone = self.backbone = model.backbone
        self.answers = answers
        encoded = {prompt: backbone.encode(*prompt, model.placeholders) for prompt in set(prompts)}
        self.prompts = [encoded[prompt] for prompt in prompts]    # (ids, pixels, slots) of each
        ids = [encoded[prompt][0] for prompt in encoded]
        # states behind an image depend on more than token ids
        pictured = any(image for _, image in encoded)
        self.prompt = [] if pictured else os.path.commonprefix(ids)
        sizes = [len(p[0]) - len(self.prompt) + len(a) for p, a in zip(self.prompts, answers)]
        self.start = [0, *accumulate(sizes)]
        self.final = {}
        used = range(len(answers)) if used is None else used
        rows = 32 if pictured else 128
        batches = [used[i:i + rows] for i in range(0, len(used), rows)]
        width, dtype = backbone.decoder.config.hidden_size, backbone.llava.dtype
        size = self.start[-1] * width
        if size * dtype.itemsize <= TRUNK_IN_MEMORY or folder is None:
            states = torch.empty(size, dtype=dtype)
        else:  # one file a machine: each of its processes computes a share of it
            path = str(folder / f"trunk{RANK // LOCAL_WORLD}.bin")
            states = torch.from_file(path, shared=True, size=size, dtype=dtype)
            batches = batches[LOCAL_RANK::LOCAL_WORLD] or batches[-1:]
        self.states = states.view(-1, width)
        with torch.inference_mode(), backbone.autocast():
            for batch in tqdm(batches, desc="trunk states", unit="batch", leave=False):
                self._compute(model, batch, prompts if keep else None)
        # pixels have done their work
        self.prompts = [(p[0], None, p[2]) for p in self.prompts]
        if WORLD > 1 and folder:
            dist.barrier()  # the other shares are written

    def _compute(self, model, numbers, prompts):
        """States of some answers; where the prompts' texts and images are given, final ones too."""
        P = len(self.prompt)
        states = self._trunk(model, [self.prompts[i] for i in numbers], numbers)
        # the same in every row: attention is causal
        self.shared = states[0, :P].to(self.states.dtype).clone()
        rest = states[:, P:].to(self.states.dtype).cpu()  # one copy a batch
        for row, i in zip(rest, numbers):
            first, end = self.start[i], self.start[i + 1]
            self.states[first:end] = row[:end - first]
        if prompts is None:
            return
        plain = [self.prompts[i] for i in numbers]
        if model.placeholders:  # the backbone's own answers are those without placeholders
            plain = [self.backbone.encode(*prompts[i]) for i in numbers]
            states = self._trunk(model, plain, numbers)
        # split again, with nothing attached: model.head may hold blocks that are trained
        _, head = fusions.split(self.backbone.decoder, model.split_layer)
        final = head(inputs_embeds=states, use_cache=False).last_hidden_state.cpu()
        for row, (ids, *_), i in zip(final, plain, numbers):
            self.final[i] = row[len(ids) - 1:len(ids) - 1 + len(self.answers[i])].clone()

    def _trunk(self, model, prompts, numbers):
        """The trunk's output (B, T, D) for encoded prompts with their answers, padded."""
        backbone, llava = self.backbone, self.backbone.llava.model
        rows = [torch.tensor(p[0] + self.answers[i]) for p, i in zip(prompts, numbers)]
        ids = pad_sequence(rows, batch_first=True, padding_value=backbone.pad).to(backbone.device)
        embeds = llava.get_input_embeddings()(ids)
        pixels = [p[1] for p in prompts if p[1] is not None]
        if pixels:
            pixels = torch.stack(pixels).to(backbone.device, backbone.llava.dtype)
            features = torch.cat(list(llava.get_image_features(pixel_values=pixels).pooler_output))
            pictured = ids == backbone.llava.config.image_token_id
            embeds = embeds.masked_scatter(pictured[..., None], features.to(embeds.dtype))
        return model.trunk(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def positions(self, i):
        """How many positions prompt and answer i have."""
        return len(self.prompt) + self.start[i + 1] - self.start[i]

    def batch(self, numbers, frames, **more):
        """A Batch of some answers; frames: (S_i, E) of the clip beside each."""
        device = self.backbone.device
        states = [self.states[self.start[i]:self.start[i + 1]] for i in numbers]
        states = pad_sequence(states, batch_first=True).to(device, non_blocking=True)
        shared = self.shared.expand(len(numbers), -1, -1)
        rows, positions = [], []
        for row, i in enumerate(numbers):
            # the state before a token predicts it
            first, tokens = len(self.prompts[i][0]) - 1, len(self.answers[i])
            rows += [row] * tokens
            positions += range(first, first + tokens)
        if self.final:
            targets = torch.cat([self.final[i] for i in numbers])
        else:
            targets = torch.tensor([token for i in numbers for token in self.answers[i]])
        rows, positions = torch.tensor(rows), torch.tensor(positions)
        rows, positions, targets = (
            x.to(device, non_blocking=True) for x in (rows, positions, targets))
        return Batch(self.clip(numbers, frames), torch.cat([shared, states], 1), rows, positions,
                     targets, **more)

    def clip(self, numbers, frames):
        """What Fusion.attach takes: padded frames, their mask, positions of placeholders."""
        device = self.backbone.device
        frames, mask = fusions.pad_frames(frames)
        slots = [self.prompts[i][2] for i in numbers]
        slots = None if slots[0] is None else torch.tensor(slots, device=device)
        return frames.to(device, non_blocking=True), mask.to(device, non_blocking=True), slots



# ---------------------------------------------------------------- captions to learn

def data_order(counts, steps, size, seed):
    """The rows of each step, [(clip, reference)]: an epoch takes each clip once, with one reference.

    counts: how many references each clip has. A function of the seed alone: what a step learns
    from is the same after a kill, and with any number of processes.
    """
    order, epoch, row = [], -1, len(counts)
    for _ in range(steps):
        rows = []
        while len(rows) < size:
            if row == len(counts):
                epoch, row = epoch + 1, 0
                generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                clips = torch.randperm(len(counts), generator=generator).tolist()
                draws = torch.rand(len(counts), generator=generator).tolist()
            clip = clips[row]
            rows.append((clip, int(draws[row] * counts[clip])))
            row += 1
        order.append(rows)
    return order


def caption_ids(backbone, clips, prompt):
    """(prompts, captions as token ids, number of each clip's first) of all references of clips."""
    prompts, captions, first = [], [], []
    for clip in clips:
        first.append(len(captions))
        question = clip.question or prompt
        prompts += [(question, None)] * len(clip.references)
        captions += [backbone.caption_ids(question, text) for text in clip.references]
    return prompts, captions, first


def share(rows, micro_batch):
    """[(number of the pass, its rows, this process's rows)] of the rows of a step."""
    size = micro_batch // WORLD
    parts = []
    for k in range(len(rows) // micro_batch):
        micro = rows[k * micro_batch:(k + 1) * micro_batch]
        parts.append((k, micro, micro[RANK * size:(RANK + 1) * size]))
    return parts


def xe_batches(captions, order, frames, embeds, step, args):
    """This process's Batches of a step of cross-entropy.

    order: of each step, rows of (clip, caption), by number. frames: of each clip.
    embeds: CLAP's, of each caption; None without a contrastive term.
    """
    # the longest together: little padding
    rows = sorted(order[step], key=lambda row: captions.positions(row[1]))
    tokens = sum(len(captions.answers[caption]) for _, caption in rows)
    for _, micro, own in share(rows, args.micro_batch):
        clips, numbers = zip(*own)
        batch = captions.batch(numbers, [frames[i] for i in clips], answer_tokens=tokens, clips=clips,
                               parts=len(rows) // len(own))
        if embeds is not None:
            # what a clip is compared with: the captions of all processes
            all_clips, all_captions = zip(*micro)
            device = captions.backbone.device
            batch.text = embeds[list(all_captions)].to(device, non_blocking=True)
            batch.text_clips = torch.tensor(all_clips).to(device, non_blocking=True)
        yield batch


def scst_batches(captions, order, frames, step, args):
    """This process's Batches of a step of SCST: clips, and the prompt that samples continue."""
    # a sample longer than any training caption is lost already
    longest = min(max(map(len, captions.answers)), evaluate.MAX_NEW_TOKENS)
    for k, _, own in share(order[step], args.scst_micro_batch or args.micro_batch):
        clips, numbers = zip(*own)
        prompt = torch.tensor([captions.prompt] * len(own), device=captions.backbone.device)
        seed = ((args.seed * 1_000_003 + step) * 1009 + k) * 97 + RANK
        yield Batch(captions.clip(numbers, [frames[i] for i in clips]), clips=clips, prompt=prompt,
                    parts=len(order[step]) // len(own), seed=seed % 2 ** 63, max_tokens=longest)


# ---------------------------------------------------------------- answers to keep

CLIPS, SILENCE = 0.7, 0.15  # what is attached beside a question: other clips, silence, else noise
KEPT_POSITIONS = 80  # of a question where as many questions as captions fit a pass


def check_kept(args):
    """Raises InputError for questions to keep that are in the probe, or that are the run's own prompt."""
    data.check_apart(args.keep_qa, data.read_qa(args.probe)[0] if args.probe else [])
    questions = data.read_kept(args.keep_qa)
    own = [q.id for q in questions if q.image is None and q.question == args.prompt]
    if own:
        raise InputError(f"{args.keep_qa}: {len(own)} of its questions, such as {own[0]}, are "
                         f"{args.prompt!r}, which this run is to learn; take them out")


def answers_to_keep(model, args):
    """Answers to --keep-qa: the backbone's own, but what another sense says where a question without an image has one."""
    questions = data.read_kept(args.keep_qa)
    own = [q for q in questions if q.image or not q.answer]
    texts = dict(zip(own, evaluate.own_answers(model.backbone, own, args.cache)))
    prompts = [(q.question, q.image) for q in questions]
    answers = [model.backbone.caption_ids(q.question, texts.get(q, q.answer)) for q in questions]
    return Answers(model, prompts, answers, keep=True)


def questions_a_pass(n, positions):
    """How many of n questions of so many positions go through at once: LLaVA-1.5's images alone have 576."""
    return max(1, KEPT_POSITIONS * n // positions)


def distract(clips, silence, noises, generator, n):
    """Frames [(S, E)] that have nothing to do with a question: of n clips, of silence and of noise."""
    frames = []
    for kind in generator.random(n):
        pool = clips if kind < CLIPS else silence if kind < CLIPS + SILENCE else noises
        frames.append(pool[int(generator.integers(len(pool)))])
    return frames


def keep_batches(kept, distractors, step, args):
    """This process's Batches of answers to keep of a step, which has them every args.keep_every steps.

    distractors: (clips, silence, noises), each frames by number.
    """
    if step % args.keep_every:
        return
    n = args.micro_batch
    # a generator for each step: the same questions after a kill
    generator = np.random.default_rng([args.seed, step, 0])
    picks = generator.integers(len(kept.answers), size=n).tolist()
    frames = distract(*distractors, generator, n)
    tokens = sum(len(kept.answers[i]) for i in picks)
    picks, frames = picks[RANK::WORLD], frames[RANK::WORLD]
    size = questions_a_pass(len(picks), max(map(kept.positions, picks)))
    for first in range(0, len(picks), size):
        part = slice(first, first + size)
        yield kept.batch(picks[part], frames[part], answer_tokens=tokens)


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
    seconds_a_step: dict = field(default_factory=dict)  # of each stage, the median since the last start

    def end_stage(self, reason):
        self.stages[self.stage] = {
            "best": self.best, "best_step": self.best_step, "seconds": self.seconds,
            "scores": self.scores, "steps": self.step, "reason": reason}


def write_log(out, progress, event, **values):
    """Append a line to log.jsonl, one flat object."""
    progress.seconds = time.perf_counter() - progress.began
    progress.log_lines += 1
    if RANK == 0:
        with open(out / "log.jsonl", "a", encoding="utf-8") as f:
            entry = {"event": event, "stage": progress.stage, "step": progress.step, **values}
            f.write(json.dumps(entry | {"seconds": progress.seconds}) + "\n")


def git_commit():
    """The commit of these scripts, None where they are no checkout: a copy inside another
    repository has none of its own."""
    folder = Path(__file__).resolve().parent

    def git(command):
        done = subprocess.run(["git", *command.split()], capture_output=True, text=True, cwd=folder)
        return done.stdout.strip()

    try:
        if not os.path.samefile(git("rev-parse --show-toplevel") or os.devnull, folder):
            return None
        return git("describe --always --dirty --abbrev=12") or None
    except OSError:  # git is not installed
        return None


def read_own(path):
    """What a JSON file of the run's folder holds; empty where there is none."""
    hint = "; remove the folder or choose another --out"
    content = read_json(path, hint) if path.exists() else {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object{hint}")
    return content


def is_finished(args):
    """Is the run in --out finished? Raises InputError if it is another run."""
    out = Path(args.out)
    old = read_own(out / "config.json")
    for key, value in vars(args).items():
        may_differ = key in ("out", "cache", "device")
        # a flag that is newer than the run
        off = key not in old and (value in (0, None, "auto") or key == "keep_every")
        if old and not may_differ and not off and old.get(key) != value:
            raise InputError(f"{out} holds a run with --{key.replace('_', '-')} {old.get(key)}, "
                             f"not {value}: choose another --out, or remove that folder")
    finished = "stages" in read_own(out / "training.json")
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
    """(Progress, optimizer) of a run that begins, or continues after a kill."""
    out = Path(args.out)
    path, log = out / "state" / "state.safetensors", out / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.exists() else []
    progress, state = Progress(), {}
    if path.exists():
        progress, state = load_state(path, model)
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


def optimizer_step(model, learn, step, optimizer, rate, args):
    """One step over its Batches: (terms of the loss, gradient norm).

    learn: pairs of a loss and of the function step -> Batches that it learns from. A loss takes
    (model, batch, args=args) and returns (loss, {name: number}); losses and terms add up.
    rate: fraction of the peak learning rates. Raises NotFinite before any weight changes.
    """
    totals, clips = {}, []
    for loss_function, batches in learn:
        for batch in batches(step=step, args=args):
            loss, terms = loss_function(model, batch, args=args)
            loss.backward()
            clips += batch.clips
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value
    parameters = list(model.trained().parameters())
    values = [torch.as_tensor(value, dtype=torch.float32) for value in totals.values()]
    values = torch.stack([v.to(model.backbone.device, non_blocking=True) for v in values])
    if WORLD > 1:
        # sums, not means: each loss has been divided by what the whole step has
        for tensor in [values, *(p.grad for p in parameters if p.grad is not None)]:
            dist.all_reduce(tensor)
    terms = dict(zip(totals, values.tolist()))
    norm = nn.utils.clip_grad_norm_(parameters, args.clip).item()
    if not all(map(math.isfinite, [*terms.values(), norm])):
        raise NotFinite(f"not finite: {terms}, gradient norm {norm}", clips)
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
    own = range(RANK, len(inputs.prompts), WORLD)
    branch = fusions.Branch(model.fusion, inputs.frames[0].take(own))
    candidates = evaluate.decode(
        model.backbone, [branch], [inputs.prompts[i] for i in own], samples=5 if rerank else 0,
        progress="validation" if RANK == 0 else None)
    if WORLD > 1:
        shares = [None] * WORLD
        dist.all_gather_object(shares, candidates)
        candidates = [shares[i % WORLD][i // WORLD] for i in range(len(inputs.prompts))]
    if RANK == 0:
        first = [clip[0] for clip in candidates]
        items = evaluate.make_items(inputs.split.clips, first)
        corpus = evaluate.score(items, select=args.metric)["corpus"]
        values = corpus | {"n": len(items)} | evaluate.caption_statistics(first)
        scores = {f"val_{name}": value for name, value in values.items()}
        if rerank:
            judge = data.judge_of(vars(args), inputs.split, args.device)
            scores |= evaluate.equal_weights_rerank(candidates, inputs.split.clips, judge, args.metric)
        seconds = time.perf_counter() - start
        box = [scores | {"val_seconds": seconds, "example": items[0]["prediction"]}]
    if WORLD > 1:
        dist.broadcast_object_list(box)
    return box[0]


def collapse(scores, xe, metric):
    """Why SCST should stop, or None: captions that grow, shrink, repeat, do not end, or score low.

    xe: validation scores before SCST. metric: "val_" and the run's selection metric.
    """
    if not 0.6 <= scores["val_words"] / max(1e-9, xe["val_words"]) <= 1.6:
        return f"collapse: {scores['val_words']:.1f} words a caption, after XE {xe['val_words']:.1f}"
    if scores["val_repetition"] > xe["val_repetition"] + 0.05:
        return f"collapse: {scores['val_repetition']:.0%} of 4-grams repeat"
    if scores["val_not_ended"] > xe["val_not_ended"] + 0.1:
        return f"collapse: {scores['val_not_ended']:.0%} of captions do not end"
    if scores[metric] < 0.8 * xe[metric]:
        return f"collapse: {metric} {scores[metric]:.3f}, after XE {xe[metric]:.3f}"
    return None


def train_stage(model, learn, clips, val_inputs, optimizer, progress, args):
    """Train one stage, XE or SCST, to its end; the best checkpoint is kept.

    learn: what a step learns from, see optimizer_step. clips: the training clips.
    """
    stage, start, out = progress.stage, progress.step, Path(args.out)
    steps, folder = (args.steps, out) if stage == "xe" else (args.scst_steps, out / "scst")
    eval_every = args.eval_every or max(1, len(clips) // args.batch_size)
    metric = f"val_{args.metric}"
    name = f"{args.out[-24:]} {stage}"
    bar = tqdm(total=steps, initial=start, desc=name, unit="step", disable=RANK > 0)
    durations = []
    while True:
        step = progress.step

        # evaluate
        # not again where a run continues, which was saved after its evaluation
        if step == steps or step > start and step % eval_every == 0:
            # only when captions have settled: samples take several times as long
            rerank = progress.stable and args.modality == "audio" and data.clap_path(vars(args))
            scores = validate(model, val_inputs, args, rerank)
            write_log(out, progress, "validation", **scores)
            reason = None
            if stage == "scst":
                reason = collapse(scores, progress.stages["xe"]["scores"], metric)

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
                if durations:
                    progress.seconds_a_step[stage] = float(np.median(durations))
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
        try:
            terms, norm = optimizer_step(model, learn, step, optimizer, rate, args)
        except NotFinite as e:
            message, numbers = e.args
            ids = " ".join(clips[i].id for i in numbers)
            raise NotFinite(f"{out}: {stage} step {step}: {message}; clips {ids}") from None
        bar.update()
        durations.append(time.perf_counter() - began)

        # log
        if step % 10 == 0 or stage == "scst":
            gates = {f"gate_{layer}": gate for layer, gate in model.fusion.gates().items()}
            write_log(out, progress, "step", **terms, gradient_norm=norm,
                      lr=optimizer.param_groups[0]["lr"], **gates,
                      clips_per_second=args.batch_size / durations[-1])
        progress.step += 1


# ---------------------------------------------------------------- main

def build_model(clap, args):
    """The Model of a run that begins. clap: data.Clap of a contrastive term, or None."""
    encoder = data.load_encoder(args.encoder, args.modality, args.device)
    backbone = data.load_backbone(args.llava, args.device, args.dtype)
    decoder = backbone.decoder
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
    contrast = None
    if args.contrastive:
        contrast = ContrastiveHead(decoder.config.hidden_size, clap.embed_dim).to(backbone.device)
    split_layer = min([*fusion.spec.layers, *map(int, getattr(fusion, "top", ()))])
    # while attached: unfreeze's own blocks belong in the head
    with fusion.attach(decoder):
        trunk, head = fusions.split(decoder, split_layer)
    return Model(backbone, fusion, contrast, trunk, head, split_layer)


def what_to_learn(model, clips, inputs, clap, args):
    """{"xe", "scst": pairs of a loss and the function step -> Batches that it learns from}."""
    (frames,), (encoder,) = inputs.frames, inputs.encoders
    prompts, captions, first = caption_ids(model.backbone, clips, args.prompt)
    steps = max(args.steps, args.scst_steps if args.scst != "off" else 0)
    order = data_order([len(clip.references) for clip in clips], steps, args.batch_size, args.seed)
    order = [[(clip, first[clip] + reference) for clip, reference in rows] for rows in order]
    # a short run comes across some captions only
    used = sorted({caption for rows in order[:args.steps] for _, caption in rows}) or [0]
    lengths = {i: len(captions[i]) for i in used}
    if clips[0].question:  # questions differ in length, too
        lengths = {i: n + len(model.backbone.encode(prompts[i][0])[0]) for i, n in lengths.items()}
    used.sort(key=lengths.get)
    answers = Answers(model, prompts, captions, used=used, folder=Path(args.out) / "state")
    embeds = None
    if args.contrastive:
        embeds = clap.embed_text([text for clip in clips for text in clip.references])
    kept = []
    if args.keep:
        silence, noises = evaluate.silence_and_noise(encoder, [args.seed, 1])
        batches = partial(keep_batches, answers_to_keep(model, args), (frames, silence, noises))
        kept = [(keep_loss, batches)]
    learn = {"xe": [(xe_loss, partial(xe_batches, answers, order, frames, embeds)), *kept]}
    if args.scst != "off":
        corpus = [[scst.words(text) for text in clip.references] for clip in clips]
        loss = partial(scst_loss, reward=scst.CiderD(corpus, end=True))
        learn["scst"] = [(loss, partial(scst_batches, answers, order, frames)), *kept]
    return learn


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
        check_kept(args)
    if is_finished(args):
        return
    clap = None
    if args.contrastive or args.clap:
        clap = data.clap_of(vars(args), args.device, "--contrastive")
    model = build_model(clap, args)  # before the clips: a wrong --layers or --llava should not wait for hours of encoding
    inputs, val_inputs = (data.load_inputs([vars(args)], s, args.device, args.limit_clips) for s in splits)
    clips = inputs.split.clips
    if RANK == 0:
        for s in splits:
            print(f"{s.name}: {len(s.clips)} clips, {len(s.missing)} missing, {len(s.bad)} unreadable")

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
    config = read_own(out / "config.json")
    if not config:
        # chosen once: a SPICE that is installed later changes nothing in this run
        metric = "accuracy" if clips[0].question else evaluate.selection_metric()
        config = {**vars(args), "name": out.name, "folder": os.getcwd(), "metric": metric,
                  "git": git_commit(), "versions": data.versions()}
    args.metric = evaluate.metric_of(config)
    if args.metric == "spider":
        evaluate.need_spice()  # now, not when the first validation is to be scored
    learn = what_to_learn(model, clips, inputs, clap, args)
    progress, optimizer = start_or_resume(model, args)
    if RANK == 0:
        write_json(out / "config.json", config)

    if progress.stage == "xe":
        train_stage(model, learn["xe"], clips, val_inputs, optimizer, progress, args)
        if args.scst == "auto":
            progress, optimizer = begin_scst(model, progress, args)
    if progress.stage == "scst":
        train_stage(model, learn["scst"], clips, val_inputs, optimizer, progress, args)

    # training.json says that the run is finished
    if RANK == 0:
        write_json(out / "training.json", {
            "best": progress.stages["xe"]["scores"], "stages": progress.stages,
            "seconds": time.perf_counter() - progress.began, "seconds_a_step": progress.seconds_a_step,
            "peak_memory": evaluate.peak_memory(model.backbone.device),
            "trainable_parameters": fusions.count_parameters(model.fusion)})
        shutil.rmtree(out / "state", ignore_errors=True)
    if WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        data.guarded(main, fusions.FusionError)
    except NotFinite as e:
        raise SystemExit(f"error: {e}")  # exit status 1: not a person's mistake
