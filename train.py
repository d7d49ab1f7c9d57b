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
import itertools
import json
import math
import os
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import fusion as fusions
import scst

TRUNK_IN_MEMORY = 4 << 30  # bytes; larger trunk states go to a memory-mapped file


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # the system
    p.add_argument("--fusion", default="additive", choices=list(fusions.SYSTEMS),
                   help="how the modality enters the decoder")
    p.add_argument("--layers", type=int, nargs="+", default=[12, 24],
                   help="decoder layers that are fused, counted from 0")
    p.add_argument("--tokens", type=int, default=16, help="modality tokens a clip")
    p.add_argument("--hidden", type=int, default=768, help="inner width of the projector")
    p.add_argument("--gate-init", type=float, default=0.05, help="initial gates of additive")
    p.add_argument("--modality", default="audio", choices=["audio", "video"], help="of the encoder")
    # models and data
    p.add_argument("--dataset", default="audiocaps", choices=["audiocaps", "clotho", "av"],
                   help="layout of --data")
    p.add_argument("--data", required=True, help="folder of the dataset, as released")
    p.add_argument("--llava", default="llava-hf/llava-1.5-7b-hf",
                   help="frozen backbone: folder or hub name")
    p.add_argument("--encoder", default="laion/clap-htsat-unfused",
                   help="frozen encoder: folder or hub name")
    p.add_argument("--init", metavar="RUN", help="start from the fusion of a finished run")
    p.add_argument("--beside", metavar="RUN",
                   help="attach the frozen fusion of a finished run of another modality too")
    p.add_argument("--limit", type=int, default=0, help="train on the first clips only, 0 = all")
    # output
    p.add_argument("--out", required=True, help="the run's folder")
    p.add_argument("--cache", help="encoder features; default: cache/ next to the run's folder")
    # optimisation
    p.add_argument("--steps", type=int, default=1000, help="maximum of XE steps")
    p.add_argument("--batch-size", type=int, default=512, help="clips a step, of all processes")
    p.add_argument("--micro-batch", type=int, default=32, help="clips a pass, of all processes")
    p.add_argument("--lr", type=float, default=2e-4, help="peak rate of the projector")
    p.add_argument("--lr-adapter", type=float, default=1e-4,
                   help="peak rate of adapters, gates and unfrozen blocks")
    p.add_argument("--weight-decay", type=float, default=0.01, help="on matrices")
    p.add_argument("--warmup", type=float, default=0.03, help="fraction of the steps")
    p.add_argument("--clip", type=float, default=1.0, help="maximum gradient norm")
    p.add_argument("--contrastive", type=float, default=0.0,
                   help="weight of the CLAP-contrastive term, 0 = off")
    p.add_argument("--gate-l2", type=float, default=1e-4, help="weight of the squared gates")
    # validation and SCST
    p.add_argument("--eval-every", type=int, default=0, help="steps, 0 = an epoch")
    p.add_argument("--patience", type=int, default=2,
                   help="validations without improvement before training stops")
    p.add_argument("--scst", default="off", choices=["off", "auto", "now"],
                   help="self-critical training from the best XE checkpoint: at XE's plateau, "
                        "or at once")
    p.add_argument("--scst-steps", type=int, default=500, help="maximum of SCST steps")
    p.add_argument("--scst-samples", type=int, default=5, help="K, samples a clip")
    p.add_argument("--scst-temperature", type=float, default=1.0,
                   help="of the policy that is sampled and trained")
    p.add_argument("--scst-lr", type=float, default=1e-5, help="peak rate of SCST")
    # the machine
    p.add_argument("--seed", type=int, default=0, help="of initialisation, data order, samples")
    p.add_argument("--device", default=data.default_device(), help="cpu, cuda or cuda:1")
    args = p.parse_args(argv)

    args.layers = sorted(set(args.layers))
    for flag in "tokens hidden steps batch_size micro_batch patience scst_steps".split():
        if getattr(args, flag) < 1:
            p.error(f"--{flag.replace('_', '-')} must be at least 1")
    if args.scst != "off" and args.scst_samples < 2:
        p.error("--scst-samples must be at least 2: the baseline needs another sample")
    if args.contrastive and args.modality != "audio":
        p.error("--contrastive compares with CLAP's text side: it needs --modality audio")
    if args.beside and args.scst != "off":
        p.error("--beside is for cross-entropy: it needs --scst off")
    args.micro_batch = min(args.micro_batch, args.batch_size)
    if args.batch_size % args.micro_batch:
        p.error(f"--batch-size {args.batch_size} must be a multiple of "
                f"--micro-batch {args.micro_batch}")
    # the same prompt for all systems that learn from the same captions
    video = args.modality == "video" or args.dataset == "av"
    args.prompt = data.VIDEO_PROMPT if video else data.SOUND_PROMPT
    args.cache = args.cache or str(Path(args.out).parent / "cache")
    return args


# ---------------------------------------------------------------- losses

def caption_loss(logits, targets):
    """Summed cross-entropy of logits (B, T, V) on targets (B, T), -100 where padded."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100,
                           reduction="sum")


def info_nce(audio, text, log_temperature, clip):
    """Symmetric InfoNCE of audio and text vectors, both (B, P). Radford et al. 2021.

    clip (B,): the clip of each row. Another caption of the same clip is no negative: such
    pairs are left out of the denominator.
    """
    similarity = F.normalize(audio, dim=-1) @ F.normalize(text, dim=-1).T
    logits = similarity / log_temperature.exp()                               # (B, B)
    itself = torch.eye(len(clip), dtype=torch.bool, device=clip.device)
    same_clip = (clip[:, None] == clip[None]) & ~itself
    logits = logits.masked_fill(same_clip, float("-inf"))
    target = torch.arange(len(clip), device=clip.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class ContrastiveHead(nn.Module):
    """Mean modality token to CLAP's shared space; the temperature starts at 0.07."""

    def __init__(self, width, embed_dim):
        super().__init__()
        self.linear = nn.Linear(width, embed_dim)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))


# ---------------------------------------------------------------- what a step needs

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
    slots: torch.Tensor | None  # (N,), positions of concat's placeholders

    def attach(self, clips):
        """Fuse these training clips into the decoder; yields {modality: tokens}."""
        slots = None if self.slots is None else self.slots.expand(len(clips), -1)
        return fusions.attach_branches(self.backbone.decoder, self.branches, clips, slots)

    def modules(self):
        return {"fusion": self.fusion, "contrast": self.contrast}


@dataclass
class CaptionBatch:
    """One process's share of a micro-batch of cross-entropy."""
    clips: list                      # training clips, one a row
    states: torch.Tensor             # (B, P + T, D), prompt and caption behind the trunk
    targets: torch.Tensor            # (B, T), -100 where nothing is learned
    tokens: int                      # caption tokens of the whole step
    parts: int                       # micro-batches of a step times processes
    text: torch.Tensor | None        # CLAP's caption embeddings, of all processes
    text_clips: torch.Tensor | None  # the clip of each


@dataclass
class ClipBatch:
    """One process's share of a micro-batch of SCST."""
    clips: list
    references: list  # of each clip, tokenised
    seed: int
    limit: int        # tokens of a sample
    parts: int


def xe_loss(model, batch, args):
    """Loss of one CaptionBatch, and its terms {"xe", "contrastive"}.

    loss = cross-entropy a caption token of the step
         + args.contrastive * InfoNCE(mean modality token, CLAP's caption embedding)
         + args.gate_l2 * sum of squared gates,
    the last two divided by batch.parts: the losses of a step's micro-batches and processes add
    up to the loss of the step. Only the layers above the trunk run.
    """
    backbone, P = model.backbone, len(model.prompt)
    with backbone.autocast(), model.attach(batch.clips) as tokens:
        out = model.head(inputs_embeds=batch.states, use_cache=False)
        hidden = out.last_hidden_state[:, P - 1:-1]                           # (B, T, D)
        logits = backbone.llava.lm_head(hidden)                               # (B, T, V)
        xe = caption_loss(logits, batch.targets) / batch.tokens
    loss = xe + args.gate_l2 * model.fusion.gate_penalty() / batch.parts
    terms = {"xe": xe.detach(), "contrastive": 0.0}
    if args.contrastive:
        mean_token = tokens[args.modality].float().mean(1)                    # (B, D)
        audio = gather_with_gradient(model.contrast.linear(mean_token))
        nce = info_nce(audio, batch.text, model.contrast.log_temperature, batch.text_clips)
        loss = loss + args.contrastive * (nce / batch.parts)
        terms["contrastive"] = nce.detach() / batch.parts
    return loss, terms


def scst_loss(model, batch, reward, args):
    """Self-critical loss of one ClipBatch, and its terms {"reward", "distinct"}.

    K samples a clip are drawn as a tree, rewarded, and passed once through the layers above the
    trunk; a sample's baseline is the mean reward of the clip's others. reward: scst.CiderD.
    "distinct": fraction of the sampled tokens that the samples do not share.
    """
    backbone, K, B = model.backbone, args.scst_samples, len(batch.clips)
    lm_head, temperature = backbone.llava.lm_head, args.scst_temperature
    prompt = torch.tensor([model.prompt] * B, device=backbone.device)
    torch.manual_seed(batch.seed)
    with torch.no_grad(), backbone.autocast(), model.attach(batch.clips):
        tree = scst.sample_tree(
            backbone.decoder, lm_head, prompt, K, layer=model.split_layer, eos=backbone.eos,
            limit=batch.limit, temperature=temperature, fusion=model.fusion)
    samples = tree.samples()
    captions = [scst.words(backbone.text(s)) for s in samples]
    ended = [s[-1] == backbone.eos for s in samples]
    references = [r for r in batch.references for _ in range(K)]
    rewards = reward.score_many(captions, references, ended).float()
    rewards = rewards.view(B, K).to(backbone.device)
    with backbone.autocast(), model.attach(batch.clips):
        out = model.head(inputs_embeds=tree.states, position_ids=tree.position_ids,
                         attention_mask=tree.attention_mask, use_cache=False)
        logprobs = tree.logprobs(out.last_hidden_state, lm_head, temperature)
    loss = scst.scst_loss(logprobs.view(B, K, -1), tree.mask.view(B, K, -1),
                          scst.leave_one_out(rewards))
    loss = loss + args.gate_l2 * model.fusion.gate_penalty()
    distinct = len(tree.token) / int(tree.mask.sum())
    terms = {"reward": rewards.mean() / batch.parts, "distinct": distinct / batch.parts}
    return loss / batch.parts, terms


# ---------------------------------------------------------------- training captions

class TrunkStates:
    """The training captions' states behind the frozen trunk, computed once.

    The prompt's states (P, D) are shared; the captions' (T, D) lie packed in memory, or in a
    memory-mapped file in `folder`. captions: token ids; unlearned[i]: how many of captions[i]
    are a question and not learned.
    """

    def __init__(self, backbone, trunk, prompt, captions, unlearned, folder):
        self.ids, self.unlearned, self.device = captions, unlearned, backbone.device
        self.start = [0, *itertools.accumulate(map(len, captions))]
        D, dtype = backbone.decoder.config.hidden_size, backbone.llava.dtype
        total, P = self.start[-1], len(prompt)
        if total * D * dtype.itemsize <= TRUNK_IN_MEMORY:
            self.states = torch.empty(total, D, dtype=dtype)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            path = str(folder / f"trunk{dist_rank()}.bin")
            flat = torch.from_file(path, shared=True, size=total * D, dtype=dtype)
            self.states = flat.view(total, D)
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        batches = [order[i:i + 128] for i in range(0, len(order), 128)]
        with torch.inference_mode(), backbone.autocast():
            for batch in tqdm(batches, desc="trunk states", unit="batch", leave=False):
                T = max(len(captions[i]) for i in batch)
                rows = [prompt + captions[i] + [backbone.pad] * (T - len(captions[i]))
                        for i in batch]
                rows = torch.tensor(rows, device=backbone.device)
                hidden = trunk(input_ids=rows, use_cache=False).last_hidden_state
                for h, i in zip(hidden, batch):
                    self.states[self.start[i]:self.start[i + 1]] = h[P:P + len(captions[i])]
                # the same in every row: attention is causal
                self.prompt_states = hidden[0, :P].to(dtype).clone()

    def batch(self, captions):
        """Captions by number -> states (B, P + T, D), targets (B, T), -100 where padded."""
        P, T = len(self.prompt_states), max(len(self.ids[i]) for i in captions)
        states = self.states.new_zeros(len(captions), P + T, self.states.shape[1])
        targets = torch.full((len(captions), T), -100)
        for row, i in enumerate(captions):
            ids, skip = self.ids[i], self.unlearned[i]
            states[row, P:P + len(ids)] = self.states[self.start[i]:self.start[i + 1]]
            targets[row, skip:len(ids)] = torch.tensor(ids[skip:])
        states = states.to(self.device, non_blocking=True)
        states[:, :P] = self.prompt_states
        return states, targets.to(self.device, non_blocking=True)

    def learned(self, caption):
        """How many tokens of a caption are learned."""
        return len(self.ids[caption]) - self.unlearned[caption]


class Order:
    """The data order, a function of the seed and the step: it needs no saving."""

    def __init__(self, references, seed):
        """references: how many each clip has."""
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


class TrainingCaptions:
    """The training clips' captions, and the micro-batches of each step.

    prompts: token ids, one a clip; encoder: CLAP, for the contrastive term.
    """

    def __init__(self, model, clips, prompts, encoder, args):
        P, ids, unlearned = len(model.prompt), [], []
        for clip, prompt in zip(clips, prompts):
            for reference in clip.references:
                answer = model.backbone.caption_ids(clip.question or args.prompt, reference)
                ids.append(prompt[P:] + answer)
                unlearned.append(len(prompt) - P)
        self.states = TrunkStates(model.backbone, model.trunk, model.prompt, ids, unlearned,
                                  Path(args.out) / "state")
        self.references = [[scst.words(r) for r in c.references] for c in clips]
        self.clips, counts = clips, [len(c.references) for c in clips]
        self.first = [0, *itertools.accumulate(counts)]  # number of a clip's first caption
        self.order, self.embeds = Order(counts, args.seed), None
        if args.contrastive:
            self.embeds = encoder.embed_text([r for clip in clips for r in clip.references])
        # a sample longer than any training caption is lost already
        longest = max(map(self.states.learned, range(len(ids))))
        self.limit = min(longest, evaluate.MAX_NEW_TOKENS)

    def xe_batches(self, step, args):
        """The CaptionBatches of a step for this process."""
        batch = [(self.first[clip] + reference, clip)
                 for clip, reference in self.order.step(step, args.batch_size)]
        tokens = sum(self.states.learned(caption) for caption, _ in batch)
        batch.sort(key=lambda row: len(self.states.ids[row[0]]))  # little padding
        for part, mine, parts in micro_batches(batch, args):
            captions, clips = zip(*mine)
            text = text_clips = None
            if self.embeds is not None:
                all_captions, all_clips = zip(*part)
                text = self.embeds[list(all_captions)].to(self.states.device)
                text_clips = torch.tensor(all_clips, device=self.states.device)
            yield CaptionBatch(clips, *self.states.batch(captions), tokens, parts, text, text_clips)

    def scst_batches(self, step, args):
        """The ClipBatches of a step for this process."""
        batch = [clip for clip, _ in self.order.step(step, args.batch_size)]
        for k, (_, mine, parts) in enumerate(micro_batches(batch, args)):
            seed = ((args.seed * 1_000_003 + step) * 1009 + k) * 97 + dist_rank()
            yield ClipBatch(mine, [self.references[c] for c in mine], seed, self.limit, parts)


def micro_batches(batch, args):
    """For each micro-batch: its rows, this process's rows, and the number of parts."""
    size = args.micro_batch // dist_world()
    parts = args.batch_size // args.micro_batch * dist_world()
    for i in range(0, args.batch_size, args.micro_batch):
        part = batch[i:i + args.micro_batch]
        yield part, part[dist_rank() * size:(dist_rank() + 1) * size], parts


# ---------------------------------------------------------------- several processes

def dist_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def dist_world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist_world() > 1:
        dist.barrier()


def gather_with_gradient(x):
    if dist_world() == 1:
        return x
    from torch.distributed.nn.functional import all_gather
    return torch.cat(all_gather(x))


def sum_over_ranks(tensors):
    if dist_world() > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))


def start_processes(args):
    """Join torchrun's processes, if there are several."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.micro_batch % world:
        raise InputError(f"--micro-batch {args.micro_batch} must be a multiple of "
                         f"the {world} processes")
    if world > 1:
        cuda = args.device.startswith("cuda")
        dist.init_process_group("nccl" if cuda else "gloo")
        if cuda:
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)


# ---------------------------------------------------------------- the run's folder

MAY_DIFFER = {"out", "cache", "device"}  # between a run and its continuation
# --scst now may choose these anew
SCST_FLAGS = {"scst", "scst_steps", "scst_samples", "scst_temperature", "scst_lr"}


@dataclass
class Progress:
    """How far training is; saved with the state, so that a killed run continues."""
    stage: str = "xe"
    step: int = 0
    best: float | None = None
    best_step: int = 0
    since_best: int = 0      # validations
    scores: dict | None = None  # of the best checkpoint
    seconds: float = 0.0
    log_lines: int = 0
    validated: int = -1      # step of the last validation
    stable: bool = False     # XE has stopped rising
    stages: dict = field(default_factory=dict)  # of those that ended

    def end_stage(self, reason):
        self.stages[self.stage] = {
            "best": self.best, "best_step": self.best_step, "seconds": self.seconds,
            "scores": self.scores, "steps": self.step, "reason": reason}


def git_commit():
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"],
                              capture_output=True, text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() or None
    except OSError:
        return None


def lock_folder(out):
    """Lock the run's folder until this process ends; wait for another that trains there."""
    if dist_rank() > 0:
        return None
    (out / "state").mkdir(parents=True, exist_ok=True)
    lock = open(out / "state" / "lock", "w")
    data.lock_or_wait(lock, f"{out}: waiting for another process that trains there")
    return lock


def is_finished(args):
    """Is the run in --out finished? Raises InputError if it is another run."""
    out = Path(args.out)
    config, training = out / "config.json", out / "training.json"
    if config.exists():
        try:
            old = dict(json.loads(config.read_text()))
        except (ValueError, TypeError):
            raise InputError(f"{config}: not JSON; remove the folder or choose another --out") from None
        for key, value in vars(args).items():
            if key in MAY_DIFFER or args.scst == "now" and key in SCST_FLAGS:
                continue
            if old.get(key) != value:
                raise InputError(
                    f"{out} holds a run with --{key.replace('_', '-')} {old.get(key)}, not {value}: "
                    "choose another --out, or remove that folder")
    elif args.scst == "now":
        raise InputError(f"{out}: --scst now continues from an XE checkpoint, and there is no run")
    if not training.exists():
        return False
    if args.scst == "now" and "scst" not in json.loads(training.read_text())["stages"]:
        return False
    if dist_rank() == 0:
        shutil.rmtree(out / "state", ignore_errors=True)
        print(f"{out}: finished already")
    return True


def save_state(path, model, optimizer, progress):
    """All that a resumed run needs, without pickle: tensors, and numbers as JSON in the header."""
    tensors = {}
    for name, module in model.modules().items():
        tensors |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
    for i, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{key}": value for key, value in entry.items()}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    save_file(tensors, tmp, metadata={"progress": json.dumps(asdict(progress))})
    os.replace(tmp, path)


def load_state(path, model, args):
    """(Progress, optimizer) of a saved state; its weights are loaded into the model."""
    try:
        with safe_open(path, "pt", device="cpu") as f:
            progress = Progress(**json.loads(f.metadata()["progress"]))
            tensors = {key: f.get_tensor(key) for key in f.keys()}
        state = {}
        for key in [key for key in tensors if key.startswith("optimizer/")]:
            _, i, entry = key.split("/")
            state.setdefault(int(i), {})[entry] = tensors.pop(key)
        for name, module in model.modules().items():
            prefix = name + "/"
            module.load_state_dict({key.removeprefix(prefix): value for key, value
                                    in tensors.items() if key.startswith(prefix)})
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as e:
        reason = " ".join(str(e).split())[:120]
        raise InputError(f"{path}: damaged ({reason}); remove {path.parent} and "
                         f"{path.parent.parent / 'config.json'} to train from the start") from None
    optimizer = make_optimizer(model, args, progress.stage)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return progress, optimizer


def start_or_resume(model, args):
    """(Progress, optimizer) of a run that begins, or continues after a kill or XE's end."""
    out = Path(args.out)
    state, training = out / "state" / "state.safetensors", out / "training.json"
    if state.exists():
        progress, optimizer = load_state(state, model, args)
        if dist_rank() == 0:
            print(f"{out}: continues at {progress.stage} step {progress.step}")
        return progress, optimizer
    progress = Progress()
    if training.exists():  # XE has finished, and --scst now continues
        stages = json.loads(training.read_text())["stages"]
        lines = len((out / "log.jsonl").read_text().splitlines())
        progress = Progress(stages=stages, stable=True, log_lines=lines,
                            seconds=stages["xe"]["seconds"])
    return progress, make_optimizer(model, args, "xe")


class Log:
    """log.jsonl, one flat object a line, and the clock of the run.

    On resume the lines after the saved state are dropped.
    """

    def __init__(self, path, progress):
        self.path, self.lines = path, progress.log_lines
        self.began = time.perf_counter() - progress.seconds
        if dist_rank() == 0:
            lines = path.read_text().splitlines() if path.exists() else []
            data.write_text(path, "".join(f"{line}\n" for line in lines[:progress.log_lines]))

    def seconds(self):
        """Seconds of training so far, over all starts."""
        return time.perf_counter() - self.began

    def __call__(self, **entry):
        if dist_rank() == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(entry) + "\n")
            self.lines += 1


# ---------------------------------------------------------------- optimisation

class NotFinite(RuntimeError):
    """Training broke down; the last good checkpoint is untouched."""


def make_optimizer(model, args, stage):
    """AdamW. XE: projector and adapters have their own rates; SCST: one rate."""
    groups = {}
    for name, parameter in [*model.fusion.named_parameters(),
                            *model.contrast.named_parameters(prefix="projector.contrast")]:
        lr = args.lr if name.startswith("projector") else args.lr_adapter
        lr = args.scst_lr if stage == "scst" else lr
        matrix = parameter.ndim >= 2 and not name.endswith(("position", "constant"))
        groups.setdefault((lr, args.weight_decay if matrix else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr": lr, "peak": lr, "weight_decay": decay}
         for (lr, decay), parameters in groups.items()],
        fused=args.device.startswith("cuda") or None)


def cosine(step, steps, warmup):
    """Fraction of the peak rate: linear warm-up, then half a cosine to 0."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def optimizer_step(model, batches, loss_function, optimizer, rate, args):
    """One step over the micro-batches: (terms of the loss, gradient norm).

    loss_function(model, batch, args=args) -> (loss, {name: number}). rate: fraction of each
    group's peak learning rate. Raises NotFinite, before any weight changes, if a term or the
    norm is not finite.
    """
    totals = {}
    for batch in batches:
        loss, terms = loss_function(model, batch, args=args)
        loss.backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, 0.0) + value
    parameters = [p for module in model.modules().values() for p in module.parameters()]
    sum_over_ranks([p.grad for p in parameters if p.grad is not None])
    values = torch.stack([torch.as_tensor(v, device=model.backbone.device).float()
                          for v in totals.values()])
    sum_over_ranks([values])
    terms = dict(zip(totals, values.tolist()))
    norm = nn.utils.clip_grad_norm_(parameters, args.clip).item()
    if not all(map(math.isfinite, [*terms.values(), norm])):
        numbers = ", ".join(f"{name} {value}" for name, value in terms.items())
        raise NotFinite(f"not finite: {numbers}, gradient norm {norm}")
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return terms, norm


# ---------------------------------------------------------------- validation

def validate(model, inputs, args, rerank):
    """Greedy captions of the validation split, scored by process 0: {"val_...": value}, flat.

    rerank: also "val_reranked" and "val_oracle", the selection metric of a choice among the
    greedy caption and five samples, with equal weights: none are fitted here.
    """
    box, start = [None], time.perf_counter()
    if dist_rank() == 0:
        model.fusion.eval()
        branches = inputs.branches([b.fusion for b in model.branches])
        candidates = evaluate.decode(model.backbone, branches, inputs.prompts,
                                     samples=5 if rerank else 0, progress="validation")
        model.fusion.train()
        first = [clip[0] for clip in candidates]
        items = evaluate.make_items(inputs.split.clips, first)
        corpus = evaluate.score(items, quick=True)["corpus"]
        scores = {f"val_{metric}": value for metric, value in corpus.items()}
        if rerank:
            scores |= evaluate.equal_weights_rerank(candidates, inputs)
        scores["val_n"] = len(items)
        for name, value in evaluate.caption_statistics(first).items():
            scores[f"val_{name}"] = value
        box = [{**scores, "val_seconds": time.perf_counter() - start,
                "example": items[0]["prediction"]}]
    if dist_world() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def collapse(scores, xe):
    """Why SCST should stop, or None. xe: validation scores before SCST.

    Captions that grow or shrink, repeat, do not end, or lose on validation.
    """
    if not 0.6 <= scores["val_words"] / max(1e-9, xe["val_words"]) <= 1.6:
        return (f"collapse: {scores['val_words']:.1f} words a caption, "
                f"after XE {xe['val_words']:.1f}")
    if scores["val_repetition"] > xe["val_repetition"] + 0.05:
        return f"collapse: {scores['val_repetition']:.0%} of 4-grams repeat"
    if scores["val_not_ended"] > xe["val_not_ended"] + 0.1:
        return f"collapse: {scores['val_not_ended']:.0%} of captions do not end"
    metric = f"val_{evaluate.selection_metric()}"
    if scores[metric] < 0.8 * xe[metric]:
        return f"collapse: {metric} {scores[metric]:.3f}, after XE {xe[metric]:.3f}"
    return None


# ---------------------------------------------------------------- the loop

def train_stage(model, captions, val_inputs, optimizer, progress, log, loss_function, args):
    """Train one stage, XE or SCST, to its end; the best checkpoint is kept."""
    stage, out = progress.stage, Path(args.out)
    if stage == "xe":
        steps, folder, batches = args.steps, out, captions.xe_batches
    else:
        steps, folder, batches = args.scst_steps, out / "scst", captions.scst_batches
    eval_every = args.eval_every or max(1, len(captions.clips) // args.batch_size)
    metric = selection_metric(val_inputs)
    bar = tqdm(disable=dist_rank() > 0, unit="step", desc=args.out[-24:], total=steps,
               initial=progress.step, postfix=stage)
    while True:
        step = progress.step

        # evaluate
        due = step > 0 and (step % eval_every == 0 or step == steps)
        if due and progress.validated != step:
            rerank = progress.stable and args.modality == "audio" and not args.beside
            scores = validate(model, val_inputs, args, rerank)
            log(event="validation", stage=stage, step=step, seconds=log.seconds(), **scores)
            failure = None
            if stage == "scst":
                failure = collapse(scores, progress.stages["xe"]["scores"])

            # save
            better = progress.best is None or scores[metric] > progress.best
            if better and not failure:
                progress.best, progress.best_step = scores[metric], step
                progress.since_best, progress.scores = 0, scores
                if dist_rank() == 0:
                    model.fusion.save(folder)
            else:
                progress.since_best += 1
            progress.validated, progress.seconds = step, log.seconds()
            progress.log_lines = log.lines

            # stop
            reason = failure
            if not reason and progress.since_best >= args.patience:
                reason = "plateau"
            elif not reason and step == steps:
                reason = "all steps done"
            if not progress.stable and (reason or progress.since_best):
                progress.stable = True
                if dist_rank() == 0:
                    write_json(out / "stable.json", {
                        "step": step, "best_step": progress.best_step, metric: progress.best})
            if reason:
                progress.end_stage(reason)
                bar.close()
                return
            if dist_rank() == 0:
                save_state(out / "state" / "state.safetensors", model, optimizer, progress)

        # step
        started = time.perf_counter()
        rate = cosine(step, steps, args.warmup)
        try:
            terms, norm = optimizer_step(model, batches(step, args), loss_function, optimizer,
                                         rate, args)
        except NotFinite as e:
            rows = captions.order.step(step, args.batch_size)[:64]
            ids = " ".join(captions.clips[clip].id for clip, _ in rows)
            raise NotFinite(f"{out}: {stage} step {step}: {e}; clips {ids}") from None
        progress.step = step + 1
        bar.update()

        # log
        if step % 10 == 0 or stage == "scst":
            gates = {f"gate_{layer}": gate for layer, gate in model.fusion.gates().items()}
            speed = args.batch_size / (time.perf_counter() - started)
            log(event="step", stage=stage, step=step, **terms, gradient_norm=norm,
                lr=optimizer.param_groups[0]["lr"], **gates, clips_per_second=speed,
                seconds=log.seconds())


def selection_metric(inputs):
    """Validation score by which checkpoints are chosen; accuracy for questions."""
    if inputs.split.clips[0].question:
        return "val_accuracy"
    return f"val_{evaluate.selection_metric()}"


def begin_scst(model, progress, args):
    """Go to SCST from the best XE checkpoint, with a new optimizer."""
    out = Path(args.out)
    if not (out / "fusion.json").exists() or not progress.stages:
        raise InputError(f"{out}: --scst now continues from an XE checkpoint, and none has been "
                         "saved there yet")
    barrier()  # process 0 may still be writing it
    model.fusion.load_state_dict(fusions.load(out, model.backbone.decoder).state_dict())
    progress.stage, progress.step, progress.validated = "scst", 0, 0
    progress.best, progress.best_step, progress.since_best = None, 0, 0
    progress.stable = True
    optimizer = make_optimizer(model, args, "scst")
    if dist_rank() == 0:
        save_state(out / "state" / "state.safetensors", model, optimizer, progress)
    return optimizer


# ---------------------------------------------------------------- main

def build_model(inputs, clips, beside, args):
    """The Model, and the token ids of each clip's prompt."""
    backbone = data.load_backbone(args.llava, args.device)
    decoder, encoder = backbone.decoder, inputs.encoders[args.modality]
    torch.manual_seed(args.seed)
    fusion = fusions.build(
        args.fusion, decoder, encoder_width=encoder.width, layers=args.layers, tokens=args.tokens,
        hidden=args.hidden, gate_init=args.gate_init, modality=args.modality)
    if args.init:
        fusion.load_state_dict(fusions.load(args.init, decoder).state_dict())
    fusion = fusion.to(backbone.device)
    contrast = ContrastiveHead(decoder.config.hidden_size, encoder.embed_dim).to(backbone.device)

    attached = [fusion] if beside is None else [beside.fusion, fusion]
    changed = [layer for f in attached for layer in f.spec.layers]
    split_layer = min([*changed, *map(int, getattr(fusion, "top", ()))])
    # unfreeze's own blocks belong in the head
    with fusions.attach_branches(decoder, [fusions.Branch(f) for f in attached], []):
        trunk, head = fusions.split(decoder, split_layer)

    placeholders = args.tokens if args.fusion == "concat" else 0
    encoded = [backbone.prompt(text, placeholders) for text in inputs.prompts[:len(clips)]]
    prompts, positions = zip(*encoded)
    shared = os.path.commonprefix(prompts)  # where clips have questions, only what precedes them
    slots = positions[0]
    if slots is not None:
        slots = torch.tensor(slots, device=backbone.device)
    return Model(backbone, fusion, contrast, inputs.branches(attached), trunk, head, split_layer,
                 shared, slots), prompts


def main(argv=None):
    args = parse_args(argv)
    start_processes(args)
    out = Path(args.out)

    # data first: a wrong folder should not wait for a 7B model
    splits = [data.read_split(args.dataset, args.data, name) for name in ("train", "val")]
    if splits[0].clips[0].question and args.scst != "off":
        raise InputError(f"{args.data}: has questions, and self-critical training is for "
                         "captions: --scst off")
    if is_finished(args):
        return
    beside = evaluate.open_beside(vars(args), args.device)
    inputs, val_inputs = [evaluate.load_inputs(vars(args), split, args.device, beside)
                          for split in splits]
    clips = inputs.split.clips[:args.limit or None]
    if dist_rank() == 0:
        for split in splits:
            print(f"{split.name}: {len(split.clips)} clips, {len(split.missing)} missing, "
                  f"{len(split.bad)} unreadable")
    model, prompts = build_model(inputs, clips, beside, args)

    # the folder is touched only now: all flags have been checked
    lock = lock_folder(out)  # noqa: F841  held until this process ends
    barrier()
    if is_finished(args):  # by the process that was waited for
        return
    config = {**vars(args), "name": out.name, "git": git_commit(), "versions": evaluate.versions()}
    if (out / "config.json").exists():
        config = json.loads((out / "config.json").read_text())
    captions = TrainingCaptions(model, clips, prompts, inputs.encoders[args.modality], args)
    progress, optimizer = start_or_resume(model, args)
    xe_first = progress.stage == "xe" and args.scst != "now"
    if args.scst == "now" and progress.best is not None and not progress.stages:
        progress.end_stage("--scst now")
    if progress.stage == "xe" and not xe_first:
        optimizer = begin_scst(model, progress, args)
        config |= {flag: vars(args)[flag] for flag in SCST_FLAGS}
    if dist_rank() == 0:
        write_json(out / "config.json", config)

    log = Log(out / "log.jsonl", progress)
    if xe_first:
        train_stage(model, captions, val_inputs, optimizer, progress, log, xe_loss, args)
        if args.scst == "auto":
            optimizer = begin_scst(model, progress, args)
    if progress.stage == "scst":
        loss = partial(scst_loss, reward=scst.CiderD(captions.references, end=True))
        train_stage(model, captions, val_inputs, optimizer, progress, log, loss, args)
    finish(model, progress, log, selection_metric(val_inputs), out)


def finish(model, progress, log, metric, out):
    """Write training.json, which says that the run is finished."""
    if dist_rank() == 0:
        write_json(out / "training.json", {
            "best": progress.stages["xe"]["scores"], "stages": progress.stages,
            "seconds": log.seconds(),
            "trainable_parameters": fusions.count_parameters(model.fusion)})
        shutil.rmtree(out / "state", ignore_errors=True)
        for stage, end in progress.stages.items():
            best = end["best"] if end["best"] is None else round(end["best"], 4)
            print(f"{out}: {stage} {metric} {best} at step {end['best_step']} ({end['reason']})")
    if dist_world() > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        evaluate.guarded(main)
    except NotFinite as e:
        raise SystemExit(f"error: {e}")  # exit status 1: not a person's mistake
