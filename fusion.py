"""Gated ways of adding a second modality (audio, video) to a frozen decoder.

    python fusion.py     # demonstration: every system on a tiny Llama, no files, no network

    audio = fusion.build("additive", decoder, encoder_width=768, layers=[12, 24])
    with audio.attach(decoder, frames, mask):      # frames (B, S, E), mask (B, S)
        llava.generate(**inputs)                   # also beams, samples and the KV cache
    audio.save("run"); audio = fusion.load("run", decoder)

Copy this file alone: it needs torch, safetensors and a Hugging Face decoder with `.layers`, which
you freeze by decoder.requires_grad_(False). concat also needs `slots`. Where transformers stops at
a torchaudio that wants CUDA, `pip uninstall torchaudio`.

Shapes: B clips, T text positions, S encoder frames, N modality tokens, D decoder width,
E encoder width, H heads, R adapter rank. "Layer l" is the input of decoder block l, from 0.
"""
import copy
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

UNFREEZE_BLOCKS = 4  # the partial-unfreeze baseline trains the top 4 decoder blocks


class FusionError(ValueError):
    """A fusion does not fit its flags, files, features or backbone. One line, says which."""


@dataclass
class Spec:
    """All that is needed to rebuild a fusion, and its backbone. Saved as fusion.json."""
    system: str         # a name in SYSTEMS; older files call it "kind"
    layers: list        # decoder blocks whose input is changed, ascending
    tokens: int         # N
    hidden: int         # the projector's inner width
    encoder_width: int  # E
    gate_init: float    # of systems that use it; concat has no gate, cross_attention starts at 0
    rank: int           # R, of additive's adapters; the others follow, for equally many parameters
    modality: str       # "audio" or "video": whose encoder's frames it was trained on
    backbone: dict      # class, depth, width and heads of the decoder
    null_slot: bool = False  # attention may choose to read nothing; older files lack it

    width = property(lambda self: self.backbone["width"])  # D
    heads = property(lambda self: self.backbone["heads"])  # H


def describe_backbone(decoder):
    """What a fusion depends on in a decoder: {class, depth, width, heads}."""
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise FusionError(f"{type(decoder).__name__} has no `.layers` ModuleList: pass the "
                          "decoder itself, for LLaVA `llava.model.language_model`")
    return {"class": type(decoder).__name__, "depth": len(decoder.layers),
            "width": decoder.config.hidden_size, "heads": decoder.config.num_attention_heads}


# ---------------------------------------------------------------- parts

class Projector(nn.Module):
    """Encoder frames to N tokens in time order, at the decoder's width.

    frames (B, S, E), mask (B, S), True at a frame -> (B, N, D), unit scale (LayerNorm).
    """

    def __init__(self, spec):
        super().__init__()
        self.tokens = spec.tokens
        self.norm_in = nn.LayerNorm(spec.encoder_width)
        self.mlp = nn.Sequential(nn.Linear(spec.encoder_width, spec.hidden), nn.GELU(),
                                 nn.Linear(spec.hidden, spec.width))
        self.norm_out = nn.LayerNorm(spec.width)
        self.position = nn.Parameter(0.1 * torch.randn(spec.tokens, spec.width))

    def forward(self, frames, mask):
        pooled = masked_adaptive_pool(self.norm_in(frames), mask, self.tokens)  # (B, N, E)
        return self.norm_out(self.mlp(pooled)) + self.position                  # (B, N, D)


def masked_adaptive_pool(frames, mask, tokens):
    """Average pooling over time into N equal shares of each clip's own length.

    frames (B, S, E), mask (B, S) -> (B, N, E). Share n of a clip of L frames covers frames
    floor(nL/N) to ceil((n+1)L/N), as torch's adaptive_avg_pool1d does for clips of one length.
    """
    B, S, E = frames.shape
    length = mask.sum(1, keepdim=True)                                   # (B, 1)
    n = torch.arange(tokens, device=frames.device)
    first = (n * length) // tokens                                       # (B, N)
    last = -((-(n + 1) * length) // tokens)                              # (B, N), exclusive
    s = torch.arange(S, device=frames.device)
    share = (s >= first[..., None]) & (s < last[..., None])              # (B, N, S)
    size = (last - first).clamp(min=1)[..., None]                        # (B, N, 1)
    weight = share.to(frames.dtype) / size.to(frames.dtype)
    return weight @ frames                                               # (B, N, S) @ (B, S, E)


class Residual(nn.Module):
    """Low-rank residual, (B, N, D) -> `parts` tensors (B, N, D); zero at the start."""

    def __init__(self, width, rank, parts):
        super().__init__()
        self.parts = parts
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, parts * width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, tokens):
        deltas = self.up(self.down(tokens)).chunk(self.parts, dim=-1)
        return [tokens + delta for delta in deltas]


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)                  # (B, H, N, D/H)


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)                                  # (B, T, H * d)


# A slot's key is this many times the learned vector. It only sets the unit, as READ_SCALE does: where
# a few activations are far larger than the others, telling two prompts apart takes a long key.
NULL_SCALE = 10.0


def attend(query, key, value, null=None):
    """Softmax attention of queries (B, H, T, d) over keys, values (B, H, N, d) -> (B, T, H * d).

    null (H * d,), times NULL_SCALE: the key of a slot with value zero, by which a position can read
    nothing. It is compared with the whole query, for all heads at once.
    """
    if null is None:
        return merge_heads(F.scaled_dot_product_attention(query, key, value))
    nothing = (merge_heads(query) @ (NULL_SCALE * null))[:, None, :, None]  # (B, 1, T, 1)
    nothing = nothing.expand(-1, query.shape[1], -1, -1)                 # (B, H, T, 1)
    logits = torch.cat([query @ key.transpose(-1, -2), nothing], -1)     # (B, H, T, N + 1)
    weights = (logits / query.shape[-1] ** 0.5).softmax(-1)
    return merge_heads(weights[..., :-1] @ value)


def scale(h):
    """Mean absolute value of each position, (B, T, D) -> (B, T, 1), the unit of the gates.

    Not the root mean square: in Llama's first position a few activations are a thousand times
    the others ("massive activations", Sun et al. 2024) and would set the unit.
    """
    return h.abs().mean(-1, keepdim=True)


# ---------------------------------------------------------------- the systems

class Fusion(nn.Module):
    """What all systems share: a projector, and hooks that last for one `with` block.

    A system defines
      prepare(tokens (B, N, D)) -> {layer: [tensor (B, ...), ...]}, computed once a clip;
      change(layer, h (B, T, D), prepared, slots) -> new hidden states; prepared: the layer's
      list, one row of each tensor for each row of h;
      self.gate, a ParameterDict by layer, empty without gates;
      self.null, likewise, if it attends: empty without null slots.
    Its adapters have about 3 * D * R weights a layer, so that systems are compared at one size.
    """
    attends = True            # with attention, which a null slot lets read nothing
    overwrites_prompt = False  # at N placeholders, which a prompt must then have
    replaces_blocks = False    # of the decoder, while it is attached
    has_gate = property(lambda self: len(self.gate) > 0)

    def __init__(self, spec, decoder):
        super().__init__()
        self.spec = spec
        self.projector = Projector(spec)
        self._clip_of_row = None  # see rows()

    def gates(self):
        """{layer: effective gate}; empty where a system has none."""
        return {int(layer): gate.item() for layer, gate in self.gate.items()}

    def set_gates(self, value):
        """Set every gate's parameter: 0 closes the fusion exactly."""
        with torch.no_grad():
            for gate in self.gate.values():
                gate.fill_(value)

    def gate_penalty(self):
        """Sum of squared gate parameters, for L2 regularisation; 0 without gates."""
        return sum(gate.square() for gate in self.gate.values())

    def tokens(self, frames, mask=None):
        """Modality tokens (B, N, D) of frames (B, S, E); mask (B, S), None: all are real."""
        if frames.dim() != 3 or frames.shape[-1] != self.spec.encoder_width:
            raise FusionError(
                f"features have shape {tuple(frames.shape)}, expected (clips, frames, "
                f"{self.spec.encoder_width}): another encoder than the one trained with?")
        if mask is None:
            mask = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
        return self.projector(frames.to(self.projector.position.dtype), mask)

    @contextmanager
    def attach(self, decoder, frames=None, mask=None, slots=None):
        """Fuse clips into the decoder for the length of the block; yields tokens (B, N, D).

        Afterwards the decoder is what it was, also after an exception. frames (B, S, E) and
        mask (B, S), or None for no clip. slots (B, N), for concat only: positions of the
        prompt's placeholders. When generation expands the batch (beams, samples), each clip
        serves its expanded rows, in order; where clips have different numbers of rows, see
        `rows`. Call `split` inside an attach: unfreeze puts its own blocks in place, and they
        belong in the head.
        """
        check_backbone(self.spec.backbone, describe_backbone(decoder))
        tokens = None if frames is None else self.tokens(frames, mask)
        handles, swapped = [], self.swap_in(decoder)
        try:
            if tokens is not None:
                for layer, prepared in self.prepare(tokens).items():
                    handles.append(self._hook(decoder.layers[layer], layer, prepared, slots))
            yield tokens
        finally:
            for handle in handles:
                handle.remove()
            for index, block in swapped.items():
                decoder.layers[index] = block

    @contextmanager
    def rows(self, clip_of_row):
        """In this block row r of the batch belongs to clip clip_of_row[r], (rows,).

        For a decoding loop inside `attach` that gives clips different numbers of rows.
        """
        self._clip_of_row = clip_of_row
        try:
            yield
        finally:
            self._clip_of_row = None

    def swap_in(self, decoder):
        """Replace decoder blocks by own ones; {index: the decoder's block}."""
        return {}

    def _hook(self, block, layer, prepared, slots):
        """Have `change` act on the hidden states that enter a decoder block."""
        clips = len(prepared[0])

        def expand(x, rows):
            """One row of x, which has one a clip, for each row of the batch."""
            if self._clip_of_row is not None:
                return x[self._clip_of_row]
            return x if rows == clips else x.repeat_interleave(rows // clips, 0)

        def hook(module, args):
            h, given = args[0], self._clip_of_row
            rows = len(h)
            if rows % clips if given is None else rows != len(given):
                raise FusionError(f"{rows} sequences for {clips} clips: no multiple, and no "
                                  "`with fusion.rows(...)` says which clip each belongs to")
            inputs = [expand(x, rows) for x in prepared]
            positions = None if slots is None else expand(slots, rows)
            new = self.change(layer, h, inputs, positions).to(h.dtype)
            return (new, *args[1:])

        return block.register_forward_pre_hook(hook)

    def save(self, folder):
        """Write fusion.safetensors (trainable tensors only) and fusion.json, atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().contiguous() for k, v in self.state_dict().items()}
        new = [folder / "fusion.safetensors.tmp", folder / "fusion.json.tmp"]
        save_file(tensors, new[0], metadata={"sha256": digest(tensors)})
        new[1].write_text(json.dumps(asdict(self.spec), indent=1) + "\n", encoding="utf-8")
        os.chmod(new[0], new[1].stat().st_mode)  # safetensors lets the owner alone read, whatever the umask says
        for path in new:
            os.replace(path, path.with_suffix(""))


# One unit of alpha moves the hidden state by about this many times its mean size. It only
# sets alpha's unit: with 1, Adam's small steps would need thousands of updates to open a gate.
READ_SCALE = 10.0


class Additive(Fusion):
    """h <- h + alpha_l * 10 scale(h) * softmax(rms_norm(h) K^T / sqrt(d)) V, a gated read-out.

    Nothing on the text side is trained: the query is the RMS-normalised hidden state. K and V
    come from the modality tokens through a low-rank residual a layer. alpha_l is one scalar.
    With a null slot, softmax may also choose to read nothing.
    """

    def __init__(self, spec, decoder):
        super().__init__(spec, decoder)
        self.adapter, self.gate = nn.ModuleDict(), nn.ParameterDict()
        self.null = nn.ParameterDict()
        for layer in map(str, spec.layers):
            self.adapter[layer] = Residual(spec.width, spec.rank, parts=2)
            self.gate[layer] = nn.Parameter(torch.tensor(spec.gate_init))
            if spec.null_slot:
                self.null[layer] = nn.Parameter(torch.zeros(spec.width))

    def prepare(self, tokens):
        prepared = {}
        for layer in self.spec.layers:                                   # K, V: (B, H, N, D/H)
            key, value = self.adapter[str(layer)](tokens)
            prepared[layer] = [split_heads(x, self.spec.heads) for x in (key, value)]
        return prepared

    def change(self, layer, h, prepared, slots):
        key, value = prepared
        query = F.rms_norm(h.to(key.dtype), h.shape[-1:])
        query = split_heads(query, self.spec.heads)                      # (B, H, T, D/H)
        read = attend(query, key, value, self.null.get(str(layer)))      # (B, T, D)
        h = h.float()  # bfloat16 would move alpha in steps; the hook rounds once
        return h + self.gate[str(layer)] * READ_SCALE * scale(h) * read.float()


class DataOnly(Additive):
    """Additive without audio: learned constant frames instead of the clip's."""

    def __init__(self, spec, decoder):
        super().__init__(spec, decoder)
        self.constant = nn.Parameter(torch.randn(spec.tokens, spec.encoder_width))

    def tokens(self, frames, mask=None):
        return super().tokens(self.constant.expand(len(frames), -1, -1))


class CrossAttention(Fusion):
    """h <- h + tanh(alpha_l) * O(attention(Q(norm h), K(A), V(A))), Flamingo's gated block.

    Alayrac et al. 2022, the attention part. Own Q, K, V, O; alpha starts at 0, so O does not:
    with both at zero no gradient would pass.
    """

    def __init__(self, spec, decoder):
        super().__init__(spec, decoder)
        inner = 3 * spec.rank // 4  # 4 * D * inner here = 3 * D * R in additive
        self.heads = math.gcd(inner, max(1, inner // 64))
        self.block, self.gate = nn.ModuleDict(), nn.ParameterDict()
        self.null = nn.ParameterDict()
        for layer in map(str, spec.layers):
            self.block[layer] = nn.ModuleDict({
                "norm": nn.LayerNorm(spec.width),
                "q": nn.Linear(spec.width, inner, bias=False),
                "kv": nn.Linear(spec.width, 2 * inner, bias=False),
                "o": nn.Linear(inner, spec.width, bias=False)})
            self.gate[layer] = nn.Parameter(torch.tensor(0.0))
            if spec.null_slot:
                self.null[layer] = nn.Parameter(torch.zeros(inner))

    def prepare(self, tokens):
        prepared = {}
        for layer in self.spec.layers:                                   # K, V: (B, H, N, inner/H)
            key, value = self.block[str(layer)]["kv"](tokens).chunk(2, -1)
            prepared[layer] = [split_heads(x, self.heads) for x in (key, value)]
        return prepared

    def change(self, layer, h, prepared, slots):
        block, (key, value) = self.block[str(layer)], prepared
        query = split_heads(block["q"](block["norm"](h.to(key.dtype))), self.heads)
        read = block["o"](attend(query, key, value, self.null.get(str(layer))))
        return h.float() + torch.tanh(self.gate[str(layer)]) * read.float()

    def gates(self):
        return {layer: self.gate[str(layer)].tanh().item() for layer in self.spec.layers}


class Unfreeze(CrossAttention):
    """cross_attention, and copies of the top decoder blocks are trained in their place."""
    replaces_blocks = True

    def __init__(self, spec, decoder):
        super().__init__(spec, decoder)
        self.top = nn.ModuleDict()
        for i in range(len(decoder.layers) - UNFREEZE_BLOCKS, len(decoder.layers)):
            # float32, as all that is trained: bfloat16 would lose small steps
            self.top[str(i)] = copy.deepcopy(decoder.layers[i]).float().requires_grad_(True)

    def swap_in(self, decoder):
        own = {int(i): decoder.layers[int(i)] for i in self.top}
        for i, block in self.top.items():
            decoder.layers[int(i)] = block
        return own


class Concat(Fusion):
    """The prompt's N placeholders are overwritten with the modality tokens at each layer.

    Layer 0 is the usual prefix, as LLaVA has it for images (Liu et al. 2023), and SLAM-AAC or
    Pengi for audio. `size` lets the tokens find the scale of the hidden states around them.
    """
    attends, overwrites_prompt = False, True

    def __init__(self, spec, decoder):
        super().__init__(spec, decoder)
        rank = 3 * spec.rank // 2  # 2 * D * rank here = 3 * D * R in additive
        self.adapter, self.size = nn.ModuleDict(), nn.ParameterDict()
        self.gate = nn.ParameterDict()  # none
        for layer in map(str, spec.layers):
            self.adapter[layer] = Residual(spec.width, rank, parts=1)
            self.size[layer] = nn.Parameter(torch.tensor(1.0))

    def prepare(self, tokens):
        return {layer: self.adapter[str(layer)](tokens) for layer in self.spec.layers}

    def change(self, layer, h, prepared, slots):
        if h.shape[1] == 1:
            return h                                                     # the prompt is cached
        (tokens,) = prepared
        if slots is None or slots.shape != tokens.shape[:2]:
            given = None if slots is None else tuple(slots.shape)
            raise FusionError(f"concat needs slots= of shape {tuple(tokens.shape[:2])}: the "
                              f"positions of the prompt's placeholders; got {given}")
        index = slots[..., None].expand_as(tokens)                       # (B, N, D)
        # scaled as the position before them; the placeholders' states may be nearly zero
        before = (slots[:, :1] - 1).clamp(min=0)[..., None]              # (B, 1, 1)
        before = h.gather(1, before.expand(-1, -1, h.shape[-1]))         # (B, 1, D)
        tokens = self.size[str(layer)] * scale(before) * tokens
        return h.scatter(1, index, tokens.to(h.dtype))


SYSTEMS = {"additive": Additive, "cross_attention": CrossAttention, "concat": Concat,
           "unfreeze": Unfreeze, "data_only": DataOnly}


# ---------------------------------------------------------------- build, load, split

def build(system, decoder, *, encoder_width, layers, tokens=16, hidden=768, gate_init=0.05,
          modality="audio", null_slot=False):
    """A new fusion of a system in SYSTEMS, initialised from torch's global generator.

    The adapters' rank follows the decoder's width (256 at 4096), so that the systems' numbers
    of parameters match at any width. Raises FusionError, naming the flag that does not fit.
    """
    if system not in SYSTEMS:
        raise FusionError(f"no system called {system!r}: one of {', '.join(SYSTEMS)}")
    backbone = describe_backbone(decoder)
    layers, depth = sorted(set(layers)), backbone["depth"]
    if not layers or layers[0] < 0 or layers[-1] >= depth:
        raise FusionError(f"--layers {' '.join(map(str, layers))}: this decoder has layers 0 to "
                          f"{depth - 1}")
    if SYSTEMS[system].replaces_blocks and depth <= UNFREEZE_BLOCKS:
        raise FusionError(f"unfreeze trains the top {UNFREEZE_BLOCKS} blocks, this decoder has "
                          f"{depth}")
    if null_slot and not SYSTEMS[system].attends:
        raise FusionError(f"--null-slot: {system} has no attention that could read nothing")
    rank = max(64, backbone["width"] // 16)
    spec = Spec(system, layers, tokens, hidden, encoder_width, gate_init, rank, modality, backbone,
                null_slot)
    return SYSTEMS[system](spec, decoder)


def load(folder, decoder):
    """The fusion saved in a folder, for its decoder. Raises FusionError, naming what differs."""
    folder = Path(folder)
    weights = folder / "fusion.safetensors"
    try:
        fields = json.loads((folder / "fusion.json").read_text(encoding="utf-8"))
        if "kind" in fields:  # as older versions called it
            fields["system"] = fields.pop("kind")
        spec = Spec(**fields)
        check_backbone(spec.backbone, describe_backbone(decoder))
        fusion = SYSTEMS[spec.system](spec, decoder)
        with safe_open(weights, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}
            written = (file.metadata() or {}).get("sha256")
        if written not in (None, digest(tensors)):  # one flipped bit is another model
            raise FusionError(f"{weights}: damaged, its tensors are not those that were saved")
        fusion.load_state_dict(tensors)
    except FileNotFoundError as e:
        raise FusionError(f"{e.filename}: no such file; a checkpoint is fusion.safetensors "
                          "beside fusion.json") from e
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError,
            RuntimeError) as e:
        reason = " ".join(str(e).split())[:200]
        raise FusionError(f"{folder}: not a fusion checkpoint ({reason})") from e
    return fusion


def digest(tensors):
    """sha256 over the names and bytes of {name: tensor}."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.cpu().contiguous().reshape(-1)
        sha.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def check_backbone(wanted, given):
    for key in wanted:
        if wanted[key] != given.get(key):
            raise FusionError(
                f"this fusion belongs to another backbone: {key} is "
                f"{str(wanted[key])[:60]} there, {given.get(key)} here")


# ---------------------------------------------------------------- several at once

@dataclass(eq=False)
class Branch:
    """A fusion and the clips it is given: frames[i] is (S_i, E). None: no clip."""
    fusion: Fusion
    frames: Sequence | None = None
    name: str = ""  # tells branches of one modality apart, such as the folder of its run


@contextmanager
def attach_branches(decoder, branches, clips, slots=None):
    """Attach several fusions for the clips with these indices.

    clips: indices into each branch's frames. slots (B, N): for concat.
    Two branches at one layer act in the order of their modalities, then of their names: they
    are one model, in whatever order they are given.
    """
    device = next(decoder.parameters()).device
    if sum(branch.fusion.replaces_blocks for branch in branches) > 1:
        raise FusionError("two unfreeze runs cannot be attached together: both replace the same blocks")
    with ExitStack() as stack:
        # unfreeze first: it replaces blocks, and what acts on the old ones would be lost
        for branch in sorted(branches, key=lambda b: (
                not b.fusion.replaces_blocks, b.fusion.spec.modality, b.name)):
            frames = mask = None
            if branch.frames is not None:
                padded = pad_frames([branch.frames[i] for i in clips])
                frames, mask = (x.to(device, non_blocking=True) for x in padded)
            stack.enter_context(branch.fusion.attach(decoder, frames, mask, slots))
        yield


def pad_frames(frames):
    """[(S_i, E)] -> zero-padded (B, S, E), and mask (B, S), True at a frame."""
    lengths = torch.tensor([[len(f)] for f in frames])
    mask = torch.arange(int(lengths.max())) < lengths
    return pad_sequence(list(frames), batch_first=True), mask


def split(decoder, k):
    """Two views of a decoder that share its weights: (trunk, head).

    trunk: embeddings and blocks below k, no final norm. head: blocks from k and the norm, fed
    by `inputs_embeds`. head(inputs_embeds=trunk(ids)) is the whole decoder, so frozen layers
    below the first fusion need to run once. An `attach` on the decoder is active in the views
    too; layers keep their numbers. Use them with use_cache=False: the blocks' cache positions
    are those of the whole.
    """
    names = ("norm", "final_layer_norm", "final_layernorm")
    norm = next((name for name in names if name in decoder._modules), None)
    if norm is None:
        raise FusionError(f"{type(decoder).__name__}: has no final norm to split before")

    def view(blocks):
        part = copy.copy(decoder)
        part._modules = dict(decoder._modules)
        part.layers = nn.ModuleList(decoder.layers[i] for i in blocks)
        part.config = copy.deepcopy(decoder.config)
        part.config.num_hidden_layers = len(blocks)
        types = getattr(decoder.config, "layer_types", None)             # sliding or full
        if types:
            part.config.layer_types = [types[i] for i in blocks]
        return part

    trunk, head = view(range(k)), view(range(k, len(decoder.layers)))
    trunk._modules[norm] = nn.Identity()
    return trunk, head


def count_parameters(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def demo():
    try:
        import torchaudio  # noqa: F401  transformers imports it where it is installed...
    except (OSError, RuntimeError):  # ...and its wheel wants its own CUDA: use its Python half
        sys.modules["torchaudio._extension.utils"]._load_lib = lambda _: False
    except ImportError:
        pass
    from transformers import LlamaConfig, LlamaModel
    torch.manual_seed(0)
    decoder = LlamaModel(LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=4)).eval().requires_grad_(False)
    ids, frames = torch.randint(100, (3, 20)), torch.randn(3, 12, 32)
    slots = torch.arange(2, 10).expand(3, -1)
    print("largest change of the decoder's output")
    print(f"{'system':16s} {'trainable':>9s} {'gates closed':>13s} {'at the start':>13s} "
          f"{'after the block':>16s}")

    def change():
        return f"{(decoder(ids).last_hidden_state - before).abs().max().item():.2g}"

    with torch.no_grad():
        before = decoder(ids).last_hidden_state
        for system in SYSTEMS:
            audio = build(system, decoder, encoder_width=32, layers=[3, 6], tokens=8, hidden=64)
            with audio.attach(decoder, frames, slots=slots):
                start, closed = change(), "no gate"
                if audio.has_gate:
                    audio.set_gates(0.0)
                    closed = change()
            hooks = sum(len(m._forward_pre_hooks) for m in decoder.modules())
            print(f"{system:16s} {count_parameters(audio):9,d} {closed:>13s} {start:>13s} "
                  f"{f'{change()}, {hooks} hooks':>16s}")
    print("note: cross_attention and unfreeze start with closed gates, concat has none")


if __name__ == "__main__":
    demo()
