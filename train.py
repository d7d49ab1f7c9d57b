"""Train one system: cross-entropy (+ contrastive), then SCST by itself once validation has stopped rising.

    python train.py --fusion additive --layers 3 6 --data tiny/data/audiocaps --llava tiny/models/llava \\
        --encoder tiny/models/clap --lr 6e-3 --lr-adapter 3e-3 --batch-size 32 --steps 400 --eval-every 100 --out run
    torchrun --nproc-per-node=4 train.py ...        # the same losses at the same global batch

Started again with the same flags it goes on where it was; a finished run is left alone.
Shapes: B clips, P prompt positions, T caption positions, D decoder width, N modality tokens, K samples a clip.
"""
import evaluate  # first: it makes torchaudio importable
import data
from data import InputError, write_json

import argparse
import json
import math
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
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

TRUNK_IN_MEMORY = 4 << 30  # bytes; larger caches of trunk states are memory-mapped files


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # what
    p.add_argument("--fusion", default="additive", choices=list(fusions.SYSTEMS), help="how sound enters")
    p.add_argument("--layers", type=int, nargs="+", default=[12, 24], help="decoder layers that are fused, from 0")
    p.add_argument("--tokens", type=int, default=16, help="modality tokens a clip")
    p.add_argument("--hidden", type=int, default=768, help="inner width of the projector")
    p.add_argument("--gate-init", type=float, default=0.05, help="additive's gates at the start")
    p.add_argument("--modality", default="audio", choices=["audio", "video"], help="what the encoder reads")
    # from where
    p.add_argument("--dataset", default="audiocaps", choices=["audiocaps", "clotho", "av"], help="layout of --data")
    p.add_argument("--data", required=True, help="folder of the data set, as released")
    p.add_argument("--llava", default="llava-hf/llava-1.5-7b-hf", help="frozen backbone: folder or hub name")
    p.add_argument("--encoder", default="laion/clap-htsat-unfused", help="frozen encoder: folder or hub name")
    p.add_argument("--init", default=None, metavar="RUN", help="start from the fusion of a finished run")
    p.add_argument("--beside", default=None, metavar="RUN",
                   help="a finished run of another modality, whose frozen fusion is attached too")
    p.add_argument("--limit", type=int, default=0, help="train on the first clips only, 0 = all")
    # where to
    p.add_argument("--out", required=True, help="the run's folder")
    p.add_argument("--cache", default=None, help="frozen-encoder features; default: cache/ beside the run's folder")
    # optimisation
    p.add_argument("--steps", type=int, default=1000, help="at most so many XE steps (the cosine's length)")
    p.add_argument("--batch-size", type=int, default=512, help="clips a step, over all processes")
    p.add_argument("--micro-batch", type=int, default=32, help="clips at once, over all processes")
    p.add_argument("--lr", type=float, default=2e-4, help="projector's peak learning rate")
    p.add_argument("--lr-adapter", type=float, default=1e-4, help="adapters', gates' and unfrozen blocks'")
    p.add_argument("--weight-decay", type=float, default=0.01, help="on matrices")
    p.add_argument("--warmup", type=float, default=0.03, help="share of the steps")
    p.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    p.add_argument("--contrastive", type=float, default=0.0, help="weight of the CLAP-contrastive term, 0 = off")
    p.add_argument("--gate-l2", type=float, default=1e-4, help="weight of the gates' squares")
    # validation and SCST
    p.add_argument("--eval-every", type=int, default=0, help="steps between validations, 0 = an epoch")
    p.add_argument("--patience", type=int, default=2, help="validations without a rise before XE stops")
    p.add_argument("--scst", default="off", choices=["off", "auto", "now"],
                   help="self-critical training from the best XE checkpoint: once XE has stopped rising, or at once")
    p.add_argument("--reward", default="cider_d", choices=["cider_d", "spider_lite"],
                   help="what SCST raises: CIDEr-D, or its mean with spice_lite")
    p.add_argument("--scst-steps", type=int, default=500, help="at most so many SCST steps")
    p.add_argument("--scst-samples", type=int, default=5, help="K, samples a clip")
    p.add_argument("--scst-temperature", type=float, default=1.0,
                   help="of the policy that is sampled and trained; below 1 it is nearer to what greedy decoding says")
    p.add_argument("--scst-lr", type=float, default=1e-5, help="SCST's peak learning rate")
    # the machine
    p.add_argument("--seed", type=int, default=0, help="of initialisation, data order and samples")
    p.add_argument("--device", default=evaluate.default_device(), help="cpu, cuda or cuda:1")
    a = p.parse_args(argv)
    a.layers = sorted(set(a.layers))
    for flag in ("tokens", "hidden", "steps", "batch_size", "micro_batch", "patience", "scst_steps"):
        if getattr(a, flag) < 1:
            p.error(f"--{flag.replace('_', '-')} must be at least 1")
    if a.scst != "off" and a.scst_samples < 2:
        p.error("--scst-samples must be at least 2: a leave-one-out baseline needs another sample")
    if a.contrastive and a.modality != "audio":
        p.error("--contrastive compares with CLAP's text side: it needs --modality audio")
    if a.beside and a.scst != "off":
        p.error("--beside is for cross-entropy: it needs --scst off")
    a.micro_batch = min(a.micro_batch, a.batch_size)
    if a.batch_size % a.micro_batch:
        p.error(f"--batch-size {a.batch_size} must be a multiple of --micro-batch {a.micro_batch}")
    # whoever learns from the same captions is asked the same
    a.prompt = evaluate.VIDEO_PROMPT if "video" in a.modality or a.dataset == "av" else evaluate.SOUND_PROMPT
    a.cache = a.cache or str(Path(a.out).parent / "cache")
    return a


# ---------------------------------------------------------------- losses

def caption_loss(logits, targets):
    """Sum of the caption tokens' cross-entropies; logits (B, T, V), targets (B, T) with -100 where padded."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def info_nce(audio, text, log_temperature, clip):
    """Symmetric InfoNCE of (B, P) audio and text vectors; clip (B,) says which rows are the same clip.

    Radford et al. 2021. Another caption of the same clip is no negative: such pairs leave the denominator.
    """
    logits = F.normalize(audio, dim=-1) @ F.normalize(text, dim=-1).T / log_temperature.exp()
    same = (clip[:, None] == clip[None]) & ~torch.eye(len(clip), dtype=torch.bool, device=clip.device)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(clip), device=clip.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class ContrastiveHead(nn.Module):
    """Mean modality token to CLAP's shared space, and the temperature, 0.07 at the start."""

    def __init__(self, width, embed_dim):
        super().__init__()
        self.linear = nn.Linear(width, embed_dim)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))


# ---------------------------------------------------------------- training captions behind the frozen trunk

class TrunkStates:
    """What the layers below the first fusion make of every training caption, computed once.

    The prompt's states (P, D) are shared; each caption's (T, D) lie packed in memory, or in a memory-mapped file.
    """

    def __init__(self, backbone, trunk, prompt, captions, asked, folder):
        """asked: how many tokens of each caption still belong to its question, and are not learned."""
        D, dtype = backbone.decoder.config.hidden_size, backbone.llava.dtype
        self.ids, self.asked, self.prompt_length, self.device = captions, asked, len(prompt), backbone.device
        self.start = [0]
        for ids in captions:
            self.start.append(self.start[-1] + len(ids))
        shape = (self.start[-1], D)
        if shape[0] * D * dtype.itemsize <= TRUNK_IN_MEMORY:
            self.states = torch.empty(shape, dtype=dtype)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self.states = torch.from_file(str(folder / f"trunk{dist_rank()}.bin"), shared=True,
                                          size=shape[0] * D, dtype=dtype).view(shape)
        order = sorted(range(len(captions)), key=lambda i: len(captions[i]))
        P = self.prompt_length
        with torch.inference_mode(), backbone.autocast():
            for i in tqdm(range(0, len(order), 128), desc="trunk states", unit="batch", leave=False):
                part = order[i:i + 128]
                T = len(captions[part[-1]])
                rows = [prompt + captions[j] + [backbone.pad] * (T - len(captions[j])) for j in part]
                out = trunk(input_ids=torch.tensor(rows, device=backbone.device), use_cache=False).last_hidden_state
                for row, j in zip(out, part):
                    self.states[self.start[j]:self.start[j + 1]] = row[P:P + len(captions[j])]
                self.prompt_states = out[0, :P].to(dtype).clone()  # the same in every row: attention is causal

    def batch(self, which):
        """Captions by number -> (states (B, P + T, D), target ids (B, T) with -100 where padded)."""
        T = max(len(self.ids[j]) for j in which)
        states = self.states.new_zeros(len(which), self.prompt_length + T, self.states.shape[1])
        targets = torch.full((len(which), T), -100)
        for row, j in enumerate(which):
            n = len(self.ids[j])
            states[row, self.prompt_length:self.prompt_length + n] = self.states[self.start[j]:self.start[j + 1]]
            targets[row, self.asked[j]:n] = torch.tensor(self.ids[j][self.asked[j]:])
        states = states.to(self.device, non_blocking=True)
        states[:, :self.prompt_length] = self.prompt_states
        return states, targets.to(self.device, non_blocking=True)


class Order:
    """The data order as a function of the seed and the step alone: nothing about it needs saving."""

    def __init__(self, references, seed):
        self.references, self.seed, self.epoch = references, seed, None  # references: how many each clip has

    def step(self, step, size):
        """[(clip, reference)] of a step: without replacement in an epoch, one reference a clip."""
        n, out = len(self.references), []
        for position in range(step * size, (step + 1) * size):
            epoch, k = divmod(position, n)
            if epoch != self.epoch:
                self.epoch = epoch
                g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self.clips = torch.randperm(n, generator=g).tolist()
                self.draws = torch.rand(n, generator=g).tolist()
            clip = self.clips[k]
            out.append((clip, int(self.draws[k] * self.references[clip])))
        return out


# ---------------------------------------------------------------- one process among several

def dist_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def dist_world():
    return dist.get_world_size() if dist.is_initialized() else 1


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


# ---------------------------------------------------------------- the run's folder

HERE_ONLY = {"out", "cache", "device"}  # may differ when a run goes on
OF_SCST = {"scst", "scst_steps", "scst_samples", "scst_temperature", "scst_lr", "reward"}  # --scst now may choose


def git_commit():
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True,
                              text=True, cwd=Path(__file__).parent)
        return done.stdout.strip() or None
    except OSError:
        return None


def alone_in(out):
    """A lock on the run's folder, waited for: after a killed sweep its orphans may still be training there."""
    if dist_rank() > 0:
        return None
    (out / "state").mkdir(parents=True, exist_ok=True)
    lock = open(out / "state" / "lock", "w")
    data.lock_or_wait(lock, f"{out}: another process trains there, waiting for it")
    return lock


def check_folder(args):
    """True if the run is finished. Raises InputError, naming the flag, if the folder holds another run."""
    out = Path(args.out)
    if (out / "config.json").exists():
        try:
            old = dict(json.loads((out / "config.json").read_text()))
        except (ValueError, TypeError):
            raise InputError(f"{out / 'config.json'}: not JSON; remove the folder or choose another --out") from None
        for key, value in vars(args).items():
            if key not in HERE_ONLY and old.get(key) != value and not (args.scst == "now" and key in OF_SCST):
                raise InputError(f"{out} holds a run with --{key.replace('_', '-')} {old.get(key)}, not {value}: "
                                 "choose another --out, or remove that folder")
    elif args.scst == "now":
        raise InputError(f"{out}: --scst now goes on from an XE checkpoint, and there is no run")
    if not (out / "training.json").exists():
        return False
    if args.scst == "now" and "scst" not in json.loads((out / "training.json").read_text())["stages"]:
        return False
    if dist_rank() == 0:
        shutil.rmtree(out / "state", ignore_errors=True)
        print(f"{out}: finished already")
    return True


def save_state(path, modules, optimizer, progress):
    """Everything a resumed run needs, in one file: tensors, and numbers as JSON in its header. No pickle."""
    tensors = {f"{name}/{k}": v for name, m in modules.items() for k, v in m.state_dict().items()}
    for i, entry in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer/{i}/{k}": v for k, v in entry.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp, metadata={"progress": json.dumps(progress)})
    os.replace(tmp, path)


@contextmanager
def reading(path):
    """What is wrong with a saved state is said in one line."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as e:
        raise InputError(f"{path}: damaged ({' '.join(str(e).split())[:120]}); remove {path.parent} and "
                         f"{path.parent.parent / 'config.json'} to train from the start") from None


def read_progress(path):
    with reading(path), safe_open(path, "pt") as f:
        return json.loads(f.metadata()["progress"])


def load_state(path, modules, optimizer):
    with reading(path), safe_open(path, "pt", device="cpu") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
        for name, module in modules.items():
            module.load_state_dict({k[len(name) + 1:]: v for k, v in tensors.items() if k.startswith(name + "/")})
    state = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, i, entry = key.split("/")
            state.setdefault(int(i), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Log:
    """log.jsonl: one flat object a line; on resume the lines after the saved state are taken back."""

    def __init__(self, path, keep):
        self.path, self.quiet, self.lines = path, dist_rank() > 0, keep
        if not self.quiet:
            lines = path.read_text().splitlines()[:keep] if path.exists() else []
            data.write_text(path, "".join(f"{line}\n" for line in lines))
            self.lines = len(lines)

    def __call__(self, **entry):
        if not self.quiet:
            with open(self.path, "a") as f:
                f.write(json.dumps(entry) + "\n")
            self.lines += 1


# ---------------------------------------------------------------- the run

def optimizer_for(fusion, contrast, args, rate=None):
    """AdamW: the projector and the rest at their own rates (or all at one), weight decay on matrices alone."""
    groups = {}
    for name, p in [*fusion.named_parameters(), *contrast.named_parameters(prefix="projector.contrast")]:
        lr = rate or (args.lr if name.startswith("projector") else args.lr_adapter)
        matrix = p.ndim >= 2 and not name.endswith(("position", "constant"))
        groups.setdefault((lr, args.weight_decay if matrix else 0.0), []).append(p)
    return torch.optim.AdamW([{"params": ps, "lr": lr, "peak": lr, "weight_decay": wd}
                              for (lr, wd), ps in groups.items()], fused=args.device.startswith("cuda") or None)


def cosine(step, steps, warmup):
    """Share of the peak rate: linear warm-up, then half a cosine to 0."""
    first = max(1, round(warmup * steps))
    return (step + 1) / first if step < first else 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def validate(backbone, fusion, split, frames, args, beside, reranker=None):
    """Greedy captions of the validation split, scored: {"val_...": value}, flat.

    reranker: (clips' CLAP embeddings, encoder); then "val_reranked" and "val_oracle" tell what a choice among the
    greedy caption and five samples is worth by the selection metric, with equal weights: none are fitted here.
    """
    start = time.perf_counter()
    fusion.eval()
    found = evaluate.decode(backbone, fusion, frames, text=evaluate.prompts(split, vars(args)),
                            samples=5 if reranker else 0, beside=beside, progress="validation")
    fusion.train()
    items = evaluate.chosen(found, split.clips, [0] * len(found))
    more = {}
    if reranker:
        evaluate.judge(found, *reranker)
        values = evaluate.candidate_values(found, split.clips)
        picked = [v[evaluate.weigh(k, [1 / 3] * 3).argmax()] for k, v in zip(found, values)]
        more = {"val_reranked": float(sum(picked)) / len(found),
                "val_oracle": float(sum(v.max() for v in values)) / len(found)}
    words = [i["prediction"].split() for i in items]
    grams = [[tuple(w[i:i + 4]) for i in range(len(w) - 3)] for w in words]
    return {**{f"val_{m}": v for m, v in evaluate.score(items, quick=True)["corpus"].items()}, **more,
            "val_n": len(items), "val_words": sum(map(len, words)) / len(words),
            "val_repetition": sum(len(g) - len(set(g)) for g in grams) / max(1, sum(map(len, grams))),
            "val_not_ended": sum(not k[0]["ended"] for k in found) / len(found),
            "val_seconds": time.perf_counter() - start, "example": items[0]["prediction"]}


def main(argv=None):
    args = parse_args(argv)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
        if args.device.startswith("cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
    rank, world = dist_rank(), dist_world()
    if args.micro_batch % world:
        raise InputError(f"--micro-batch {args.micro_batch} must be a multiple of the {world} processes")
    out, metric = Path(args.out), f"val_{evaluate.selection_metric()}"

    # data first: a wrong folder should not wait for a 7B model
    train_split = data.read_split(args.dataset, args.data, "train")
    val_split = data.read_split(args.dataset, args.data, "val")
    if train_split.clips[0].question:
        metric = "val_accuracy"
        if args.scst != "off":
            raise InputError(f"{args.data}: has questions, and self-critical training is for captions: --scst off")
    if check_folder(args):
        return
    encoder = evaluate.load_encoder(args.encoder, args.modality, args.device)
    train_features = data.load_features(train_split, encoder, args.cache, args.modality)
    val_features = data.load_features(val_split, encoder, args.cache, args.modality)
    beside = [(frozen, *(data.load_features(s, evaluate.load_encoder(other["encoder"], other["modality"], args.device),
                                            args.cache, other["modality"]) for s in (train_split, val_split)))
              for other, frozen in evaluate.open_beside(vars(args), args.device)]
    clips = train_split.clips[:args.limit or None]
    if rank == 0:
        for s in (train_split, val_split):
            print(f"{s.name}: {len(s.clips)} clips, {len(s.missing)} missing, {len(s.bad)} unreadable")

    def frames(features, which):
        return [features[features.index[c.id]] for c in which]

    val_frames = frames(val_features, val_split.clips)
    val_beside = [(f, frames(features, val_split.clips)) for f, _, features in beside]

    # the model
    backbone = evaluate.load_backbone(args.llava, args.device)
    decoder, lm_head = backbone.decoder, backbone.llava.lm_head
    torch.manual_seed(args.seed)
    fusion = fusions.build(args.fusion, decoder, encoder_width=encoder.width, layers=args.layers, tokens=args.tokens,
                           hidden=args.hidden, gate_init=args.gate_init, modality=args.modality)
    if args.init:
        start_from = fusions.load(args.init, decoder)
        fusion.load_state_dict(start_from.state_dict())
    fusion = fusion.to(backbone.device)
    contrast = ContrastiveHead(decoder.config.hidden_size, encoder.embed_dim).to(backbone.device)
    modules = {"fusion": fusion, "contrast": contrast}
    parameters = [p for m in modules.values() for p in m.parameters()]
    lowest = min([args.layers[0], *(f.spec.layers[0] for f, *_ in beside), *map(int, getattr(fusion, "top", ()))])
    with evaluate.attached(backbone, [(f, None) for f in (*(f for f, *_ in beside), fusion)], []):
        trunk, head = fusions.split(decoder, lowest)  # unfreeze's own blocks belong in the head
    asked = evaluate.prompts(train_split, vars(args))[:len(clips)]
    prompts, (slots, *_) = zip(*(backbone.prompt(a, args.tokens if args.fusion == "concat" else 0) for a in asked))
    prompt = os.path.commonprefix(prompts)  # where each clip has a question, only the words before it
    slots = None if slots is None else torch.tensor(slots, device=backbone.device)
    P = len(prompt)

    # the folder is touched only now: whatever was wrong with the flags has been said
    lock = alone_in(out)  # noqa: F841  held until this process ends
    if world > 1:
        dist.barrier()
    if check_folder(args):  # by the process that was waited for
        return
    if rank == 0 and not (out / "config.json").exists():
        write_json(out / "config.json", {**vars(args), "name": out.name, "git": git_commit(),
                                         "versions": evaluate.versions()})

    # training captions: their tokens, their trunk states, their CLAP embeddings
    first = [0]
    for c in clips:
        first.append(first[-1] + len(c.references))
    texts = [r for c in clips for r in c.references]
    answers = [(ids[P:], backbone.caption_ids(a, r)) for c, a, ids in zip(clips, asked, prompts) for r in c.references]
    trunk_states = TrunkStates(backbone, trunk, prompt, [question + answer for question, answer in answers],
                               [len(question) for question, _ in answers], out / "state")
    text_embeds = encoder.embed_text(texts) if args.contrastive else None
    order = Order([len(c.references) for c in clips], args.seed)
    eval_every = args.eval_every or max(1, len(clips) // args.batch_size)

    # resume
    state_file = out / "state" / "state.safetensors"
    progress = {"stage": "xe", "step": 0, "best": None, "best_step": 0, "since_best": 0, "seconds": 0.0,
                "log_lines": 0, "validated": -1, "stable": False, "stages": {}}
    if state_file.exists():
        progress = read_progress(state_file)
    elif (out / "training.json").exists():  # XE has finished; --scst now goes on from there
        progress.update(stages=json.loads((out / "training.json").read_text())["stages"], stable=True,
                        log_lines=len((out / "log.jsonl").read_text().splitlines()))
        progress["seconds"] = progress["stages"]["xe"]["seconds"]
    optimizer = optimizer_for(fusion, contrast, args, args.scst_lr if progress["stage"] == "scst" else None)
    if state_file.exists():
        load_state(state_file, modules, optimizer)
        if rank == 0:
            print(f"{out}: goes on at {progress['stage']} step {progress['step']}")

    def end_stage(reason):
        progress["stages"][progress["stage"]] = {
            **{k: progress.get(k) for k in ("best", "best_step", "seconds", "scores")}, "steps": progress["step"],
            "reason": reason}

    def begin_scst():
        """From the best XE checkpoint, with a new optimizer."""
        if world > 1:
            dist.barrier()  # process 0 may still be writing it
        fusion.load_state_dict(fusions.load(out, decoder).state_dict())
        progress.update(stage="scst", step=0, validated=0, best=None, best_step=0, since_best=0, stable=True)
        return optimizer_for(fusion, contrast, args, args.scst_lr)

    if args.scst == "now" and progress["stage"] == "xe":
        if not (out / "fusion.json").exists() or not (progress["stages"] or progress["best"]):
            raise InputError(f"{out}: --scst now goes on from an XE checkpoint, and none has been saved there yet")
        if not progress["stages"]:
            end_stage("--scst now")
        optimizer = begin_scst()
        if rank == 0:
            write_json(out / "config.json", {**json.loads((out / "config.json").read_text()),
                                             **{k: v for k, v in vars(args).items() if k in OF_SCST}})
    log = Log(out / "log.jsonl", progress["log_lines"])
    began = time.perf_counter() - progress["seconds"]

    def where(rows):
        return None if slots is None else slots.expand(rows, -1)

    def listening(which):
        """Attached for these clips: the run's own branch, whose tokens it yields, and whatever is beside it."""
        which = [clips[c] for c in which]
        branches = [(f, features) for f, features, _ in beside] + [(fusion, train_features)]
        return evaluate.attached(backbone, [(f, frames(x, which)) for f, x in branches], range(len(which)),
                                 where(len(which)))

    def xe_step(step):
        """Gradients of one step of cross-entropy (+ contrastive); the terms as tensors, and the clips' numbers."""
        batch = order.step(step, args.batch_size)
        captions = [first[c] + r for c, r in batch]
        total = sum(len(trunk_states.ids[j]) - trunk_states.asked[j] for j in captions)   # tokens in the global batch
        batch = sorted(zip(captions, (c for c, _ in batch)), key=lambda b: len(trunk_states.ids[b[0]]))
        micro, terms = args.micro_batch // world, {"xe": 0.0, "contrastive": 0.0}
        parts = [batch[i:i + args.micro_batch] for i in range(0, args.batch_size, args.micro_batch)]
        for part in parts:
            mine = part[rank * micro:(rank + 1) * micro]
            states, targets = trunk_states.batch([j for j, _ in mine])
            with backbone.autocast(), listening([c for _, c in mine]) as tokens:
                hidden = head(inputs_embeds=states, use_cache=False).last_hidden_state[:, P - 1:-1]
                xe = caption_loss(lm_head(hidden), targets) / total
            loss = xe + args.gate_l2 * fusion.gate_penalty() / len(parts) / world
            if args.contrastive:
                audio = gather_with_gradient(contrast.linear(tokens.float().mean(1)))
                text = text_embeds[[j for j, _ in part]].to(backbone.device)
                same = torch.tensor([c for _, c in part], device=backbone.device)
                nce = info_nce(audio, text, contrast.log_temperature, same) / len(parts) / world
                loss = loss + args.contrastive * nce
                terms["contrastive"] = terms["contrastive"] + nce.detach()
            loss.backward()
            terms["xe"] = terms["xe"] + xe.detach()
        return terms, [c for _, c in batch]

    references = [[scst.words(r) for r in c.references] for c in clips]
    reward = scst.CiderD(references, end=True)
    longest = min(max(len(answer) for _, answer in answers), evaluate.MAX_NEW_TOKENS)  # what goes on has failed already

    def scst_step(step):
        """Gradients of one self-critical step of K samples a clip."""
        batch = order.step(step, args.batch_size)
        terms, K = {"reward": 0.0, "distinct": 0.0}, args.scst_samples
        micro = args.micro_batch // world
        parts = [batch[i:i + args.micro_batch] for i in range(0, args.batch_size, args.micro_batch)]
        for k, part in enumerate(parts):
            mine = [c for c, _ in part[rank * micro:(rank + 1) * micro]]
            torch.manual_seed(((args.seed * 1_000_003 + step) * 1009 + k) * 97 + rank)
            with torch.no_grad(), backbone.autocast(), listening(mine):
                tree = scst.sample_tree(
                    decoder, lm_head, torch.tensor([prompt] * len(mine), device=backbone.device), K,
                    layer=lowest, eos=backbone.eos, limit=longest, temperature=args.scst_temperature,
                    hears=lambda rows: setattr(fusion, "clip_of_row", rows))
            samples = tree.samples()
            texts, ended = [scst.words(backbone.text(s)) for s in samples], [s[-1] == backbone.eos for s in samples]
            targets = [references[c] for c in mine for _ in range(K)]
            r = reward.score_many(texts, targets, ended).float()
            if args.reward == "spider_lite":
                r = (r + torch.tensor([evaluate.spice_lite(t, ref) for t, ref in zip(texts, targets)])) / 2
            r = r.view(len(mine), K).to(backbone.device)
            with backbone.autocast(), listening(mine):
                hidden = head(inputs_embeds=tree.states, position_ids=tree.position_ids,
                              attention_mask=tree.attention_mask, use_cache=False).last_hidden_state
                logprobs = tree.logprobs(hidden, lm_head, args.scst_temperature)
            loss = scst.scst_loss(logprobs.view(len(mine), K, -1), tree.mask.view(len(mine), K, -1),
                                  scst.leave_one_out(r)) / len(parts) / world
            (loss + args.gate_l2 * fusion.gate_penalty() / len(parts) / world).backward()
            terms["reward"] = terms["reward"] + r.mean() / len(parts) / world
            terms["distinct"] += len(tree.token) / int(tree.mask.sum()) / len(parts) / world  # share of the tokens
        return terms, [c for c, _ in batch]

    def validated():
        """Validation scores, from process 0."""
        hears_alone = args.modality == "audio" and not val_beside
        judges = (val_features.embeds, encoder) if progress["stable"] and hears_alone else None
        box = [validate(backbone, fusion, val_split, val_frames, args, val_beside, judges) if rank == 0 else None]
        if world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    bar = tqdm(disable=rank > 0, unit="step", desc=args.out[-24:])
    while True:
        stage, step = progress["stage"], progress["step"]
        last = args.steps if stage == "xe" else args.scst_steps
        folder = out if stage == "xe" else out / "scst"
        bar.total, bar.n = last, step
        bar.set_postfix_str(stage)

        # evaluate
        if step and progress["validated"] != step and (step % eval_every == 0 or step == last):
            scores = validated()
            log(event="validation", stage=stage, step=step, seconds=time.perf_counter() - began, **scores)
            fault = collapse(scores, progress["stages"]["xe"]["scores"]) if stage == "scst" else None

            # save
            if not fault and (progress["best"] is None or scores[metric] > progress["best"]):
                progress.update(best=scores[metric], best_step=step, since_best=0, scores=scores)
                if rank == 0:
                    fusion.save(folder)
            else:
                progress["since_best"] += 1
            progress.update(validated=step, seconds=time.perf_counter() - began, log_lines=log.lines)

            # stop
            reason = fault or ("plateau" if progress["since_best"] >= args.patience else
                               "all steps done" if step == last else None)
            if not progress["stable"] and (reason or progress["since_best"]):
                progress["stable"] = True
                if rank == 0:
                    write_json(out / "stable.json", {"step": step, "best_step": progress["best_step"],
                                                     metric: progress["best"]})
            if reason:
                end_stage(reason)
                if stage == "scst" or args.scst == "off":
                    break
                optimizer = begin_scst()
            if rank == 0:
                save_state(state_file, modules, optimizer, progress)
            if reason:
                continue

        # step
        started = time.perf_counter()
        terms, ids = (xe_step if stage == "xe" else scst_step)(step)
        sum_over_ranks([p.grad for p in parameters if p.grad is not None])
        totals = torch.stack([torch.as_tensor(v, device=backbone.device).float() for v in terms.values()])
        sum_over_ranks([totals])
        terms = dict(zip(terms, totals.tolist()))
        norm = nn.utils.clip_grad_norm_(parameters, args.clip).item()
        if not all(map(math.isfinite, [*terms.values(), norm])):
            raise NotFinite(f"{out}: {stage} step {step}: not finite: "
                            f"{', '.join(f'{k} {v}' for k, v in terms.items())}, gradient norm {norm}; clips "
                            f"{' '.join(clips[c].id for c in ids[:64])}")
        rate = cosine(step, last, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress["step"] = step + 1
        bar.update()

        # log
        if step % 10 == 0 or stage == "scst":
            log(event="step", stage=stage, step=step, **terms, gradient_norm=norm, lr=optimizer.param_groups[0]["lr"],
                **{f"gate_{l}": g for l, g in fusion.gates().items()},
                clips_per_second=args.batch_size / (time.perf_counter() - started),
                seconds=time.perf_counter() - began)

    bar.close()
    if rank == 0:
        write_json(out / "training.json", {
            "best": progress["stages"]["xe"]["scores"], "stages": progress["stages"],
            "seconds": time.perf_counter() - began, "trainable_parameters": fusions.count_parameters(fusion)})
        shutil.rmtree(out / "state", ignore_errors=True)
        print(f"{out}: " + "; ".join(f"{s} {metric} {v['best'] if v['best'] is None else round(v['best'], 4)} at step "
                                     f"{v['best_step']} ({v['reason']})" for s, v in progress["stages"].items()))
    if world > 1:
        dist.destroy_process_group()


class NotFinite(RuntimeError):
    """Training broke down; the last good checkpoint is untouched."""


def collapse(scores, xe):
    """Why SCST should stop, or None: captions that grow or shrink, repeat, do not end, or lose on validation."""
    if not 0.6 <= scores["val_words"] / max(1e-9, xe["val_words"]) <= 1.6:
        return f"collapse: {scores['val_words']:.1f} words a caption, after XE {xe['val_words']:.1f}"
    if scores["val_repetition"] > xe["val_repetition"] + 0.05:
        return f"collapse: {scores['val_repetition']:.0%} of 4-grams repeat"
    if scores["val_not_ended"] > xe["val_not_ended"] + 0.1:
        return f"collapse: {scores['val_not_ended']:.0%} of captions do not end"
    metric = f"val_{evaluate.selection_metric()}"
    if scores[metric] < 0.8 * xe[metric]:
        return f"collapse: {metric} {scores[metric]:.3f}, after XE {xe[metric]:.3f}"
    return None


if __name__ == "__main__":
    try:
        evaluate.guarded(main)
    except NotFinite as e:
        raise SystemExit(f"error: {e}")  # exit status 1: not a person's mistake
