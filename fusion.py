"""Gated ways of letting a second modality (sound, video) into a frozen decoder, without editing the decoder.

    python fusion.py                       # the demonstration: every system on a tiny Llama, no files, no network

    audio = fusion.build("additive", decoder, encoder_width=768, layers=[12, 24])
    with audio.attach(decoder, frames, mask):      # frames (B, S, E), mask (B, S)
        llava.generate(**inputs)                   # beams, samples and the KV cache included
    audio.save("run"); audio = fusion.load("run", decoder)

Copy this file alone: it needs torch and safetensors, and a Hugging Face decoder that has a `.layers` ModuleList.

Legend of the shape comments: B clips, T text positions, S encoder frames, N modality tokens, D decoder width,
E encoder width, H heads, R adapter rank. "Layer l" is the input of decoder block l, counted from 0.
"""
import copy
import hashlib
import json
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
    """A fusion that does not fit: its flags, its files, its features or its backbone. One line, says which."""


@dataclass
class Spec:
    """Everything needed to rebuild a fusion, and the backbone it belongs to. Saved as fusion.json."""
    kind: str
    layers: list        # decoder blocks whose input is changed, ascending
    tokens: int         # N
    hidden: int         # the projector's inner width
    encoder_width: int  # E
    gate_init: float    # alpha at the start; ignored by concat, and 0 by convention for cross_attention
    rank: int           # R, the inner width that the parameter budget is counted in
    modality: str       # "audio" or "video": which encoder's frames it was trained on
    backbone: dict      # class, depth, width and heads of the decoder

    width = property(lambda self: self.backbone["width"])  # D
    heads = property(lambda self: self.backbone["heads"])  # H


def describe_backbone(decoder):
    """What a fusion depends on in a decoder: {class, depth, width, heads}."""
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise FusionError(f"{type(decoder).__name__} has no `.layers` ModuleList: pass the decoder itself, "
                          "for LLaVA that is `llava.model.language_model`")
    config = decoder.config
    return {"class": type(decoder).__name__, "depth": len(decoder.layers), "width": config.hidden_size,
            "heads": config.num_attention_heads}


# ---------------------------------------------------------------- parts

class Projector(nn.Module):
    """Encoder frames to N tokens in time order, at the decoder's width.

    frames (B, S, E), mask (B, S), True where a frame is real -> (B, N, D), unit scale (LayerNorm).
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
    """Average pooling over time into `tokens` equal shares of each clip's own length.

    frames (B, S, E), mask (B, S) -> (B, N, E). Share n of a clip of L frames covers frames floor(nL/N) to
    ceil((n+1)L/N), as torch's adaptive_avg_pool1d does; unlike there, each clip has a length of its own.
    """
    B, S, E = frames.shape
    length = mask.sum(1, keepdim=True)                                   # (B, 1)
    n = torch.arange(tokens, device=frames.device)
    first = (n * length) // tokens                                       # (B, N)
    last = -((-(n + 1) * length) // tokens)                              # (B, N), exclusive: a ceiling division
    s = torch.arange(S, device=frames.device)
    share = (s >= first[..., None]) & (s < last[..., None])              # (B, N, S)
    weight = share.to(frames.dtype) / (last - first).clamp(min=1)[..., None].to(frames.dtype)
    return weight @ frames                                               # (B, N, S) @ (B, S, E)


class Residual(nn.Module):
    """Low-rank residual, D -> R -> parts * D, zero at the start so that the tokens first pass unchanged.

    (B, N, D) -> `parts` tensors (B, N, D)
    """

    def __init__(self, width, rank, parts):
        super().__init__()
        self.parts = parts
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, parts * width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, tokens):
        return [tokens + delta for delta in self.up(self.down(tokens)).chunk(self.parts, dim=-1)]


def split_heads(x, heads):
    B, N, D = x.shape
    return x.view(B, N, heads, D // heads).transpose(1, 2)               # (B, H, N, D/H)


def merge_heads(x):
    B, H, T, d = x.shape
    return x.transpose(1, 2).reshape(B, T, H * d)                        # (B, T, D)


def loudness(h):
    """Mean absolute value of each position, (B, T, D) -> (B, T, 1): the unit that gates are measured in.

    Not the root mean square: Llama's first position carries a few activations a thousand times the others
    ("massive activations", Sun et al. 2024); in the RMS they would set the unit, in this mean they hardly count.
    """
    return h.abs().mean(-1, keepdim=True)


# ---------------------------------------------------------------- the systems

class Fusion(nn.Module):
    """What all systems share: a projector, one adapter a layer, and hooks that live for one `with` block."""
    has_gate = True

    def __init__(self, spec):
        super().__init__()
        self.spec = spec
        self.projector = Projector(spec)
        # While attached: the clip of each row of the batch, (rows,). None: each
        # clip has equally many rows, in order.
        self.row_to_clip = None

    # -- what a system defines: prepare() once a clip, change() at each layer

    def prepare(self, tokens):
        """(B, N, D) -> {layer: tuple of tensors whose first axis is B}, computed once and not per decoding step."""
        raise NotImplementedError

    def change(self, layer, h, prepared, slots):
        """The layer's new hidden states (B, T, D) from the old."""
        raise NotImplementedError

    def gates(self):
        """{layer: effective gate}; empty where a system has none."""
        return {}

    def set_gates(self, value):
        """Set every gate's parameter: 0 closes the fusion exactly."""
        if not self.has_gate:
            raise FusionError(f"{self.spec.kind} has no gate")
        with torch.no_grad():
            for gate in self.gate.values():
                gate.fill_(value)

    def gate_penalty(self):
        """Sum of squared gate parameters, for L2 regularisation."""
        return sum(g.square() for g in self.gate.values()) if self.has_gate else torch.zeros(())

    # -- the same for all

    def tokens(self, frames, mask=None):
        """Modality tokens (B, N, D) of clips: frames (B, S, E), mask (B, S) or None where all frames are real."""
        if frames.dim() != 3 or frames.shape[-1] != self.spec.encoder_width:
            raise FusionError(f"features have shape {tuple(frames.shape)}, expected (clips, frames, "
                              f"{self.spec.encoder_width}): another encoder than the one trained with?")
        if mask is None:
            mask = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
        return self.projector(frames.to(self.projector.position.dtype), mask)

    @contextmanager
    def attach(self, decoder, frames=None, mask=None, slots=None):
        """Fuse the clips into the decoder for the length of the block.

        Afterwards the decoder is what it was, also after an exception.
        frames (B, S, E) and mask (B, S) of the clips, or None for no clip.
        slots (B, N), for concat only: positions of the prompt's placeholders.
        Yields the modality tokens (B, N, D), or None.

        When generation expands the batch (beams, samples), each clip serves its
        expanded rows, in order. A decoding loop that gives clips different
        numbers of rows sets `row_to_clip` before each pass.
        Call `split` inside an attach: unfreeze puts its own blocks in place, and
        they belong in the head.
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
            self.row_to_clip = None
            for handle in handles:
                handle.remove()
            for index, block in swapped.items():
                decoder.layers[index] = block

    def swap_in(self, decoder):
        """Replace decoder blocks by own ones; {index: the decoder's block}."""
        return {}

    def _hook(self, block, layer, prepared, slots):
        expanded = {}  # rows -> prepared tensors; decoding calls this each step

        def rows_of(x, rows):
            if x is None:
                return None
            if self.row_to_clip is not None:
                return x[self.row_to_clip]
            return x.repeat_interleave(rows // len(x), 0)

        def hook(module, args, kwargs):
            # some decoders pass the hidden states by name
            h = args[0] if args else kwargs["hidden_states"]
            rows, clips = h.shape[0], prepared[0].shape[0]
            if self.row_to_clip is None:
                fits = rows % clips == 0
            else:
                fits = rows == len(self.row_to_clip)
            if not fits:
                raise FusionError(
                    f"{rows} sequences for {clips} clips: the batch is no multiple of the features")
            if self.row_to_clip is not None:
                inputs = [rows_of(x, rows) for x in prepared]
            else:
                if rows not in expanded:
                    expanded[rows] = [rows_of(x, rows) for x in prepared]
                inputs = expanded[rows]
            new = self.change(layer, h, inputs, rows_of(slots, rows))
            new = new.to(h.dtype)
            if args:
                return (new, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": new}

        return block.register_forward_pre_hook(hook, with_kwargs=True)

    def save(self, folder):
        """Write fusion.safetensors (trainable tensors only) and fusion.json into a folder, atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().contiguous() for k, v in self.state_dict().items()}
        save_file(tensors, folder / "fusion.safetensors.tmp", metadata={"sha256": digest(tensors)})
        (folder / "fusion.json.tmp").write_text(json.dumps(asdict(self.spec), indent=1) + "\n")
        os.replace(folder / "fusion.safetensors.tmp", folder / "fusion.safetensors")
        os.replace(folder / "fusion.json.tmp", folder / "fusion.json")


class Additive(Fusion):
    """h <- h + alpha_l * loudness(h) * softmax(rms_norm(h) K^T / sqrt(d)) V: the gated additive read-out.

    Nothing on the text side is trained: the query is the hidden state itself, RMS-normalised. K and V come from
    the modality tokens through a low-rank residual a layer. alpha_l is one scalar.
    """

    def __init__(self, spec):
        super().__init__(spec)
        self.adapter = nn.ModuleDict({str(l): Residual(spec.width, spec.rank, parts=2) for l in spec.layers})
        self.gate = nn.ParameterDict({str(l): nn.Parameter(torch.tensor(spec.gate_init)) for l in spec.layers})

    def prepare(self, tokens):
        return {l: tuple(split_heads(x, self.spec.heads) for x in self.adapter[str(l)](tokens))
                for l in self.spec.layers}                               # K, V: (B, H, N, D/H)

    def change(self, layer, h, prepared, slots):
        key, value = prepared
        query = split_heads(F.rms_norm(h.to(key.dtype), h.shape[-1:]), self.spec.heads)   # (B, H, T, D/H)
        read = merge_heads(F.scaled_dot_product_attention(query, key, value))             # (B, T, D)
        return h + self.gate[str(layer)] * READ_SCALE * loudness(h) * read

    def gates(self):
        return {l: self.gate[str(l)].item() for l in self.spec.layers}


# One unit of alpha moves the hidden state by about this many times its own mean size. It only sets the unit that
# alpha is learned and reported in: with 1, Adam's small steps would need thousands of updates to open a gate.
READ_SCALE = 10.0


class DataOnly(Additive):
    """Additive, deaf: learned constant frames stand where the clip's would. Same parameters, same training."""

    def __init__(self, spec):
        super().__init__(spec)
        self.constant = nn.Parameter(torch.randn(spec.tokens, spec.encoder_width))

    def tokens(self, frames, mask=None):
        return super().tokens(self.constant.expand(len(frames), -1, -1))


class CrossAttention(Fusion):
    """h <- h + tanh(alpha_l) * O(attention(Q(norm h), K(A), V(A))): Flamingo's gated block, attention part.

    Alayrac et al. 2022. Own Q, K, V, O; alpha starts at 0, so O must not (both at zero would pass no gradient).
    """

    def __init__(self, spec):
        super().__init__(spec)
        inner = 3 * spec.rank // 4  # 4 * D * inner here = 3 * D * R in additive
        self.heads = max(1, inner // 64)
        self.block = nn.ModuleDict({str(l): nn.ModuleDict({
            "norm": nn.LayerNorm(spec.width), "q": nn.Linear(spec.width, inner, bias=False),
            "kv": nn.Linear(spec.width, 2 * inner, bias=False), "o": nn.Linear(inner, spec.width, bias=False),
        }) for l in spec.layers})
        self.gate = nn.ParameterDict({str(l): nn.Parameter(torch.tensor(0.0)) for l in spec.layers})

    def prepare(self, tokens):
        return {l: tuple(split_heads(x, self.heads) for x in self.block[str(l)]["kv"](tokens).chunk(2, -1))
                for l in self.spec.layers}                               # K, V: (B, H, N, inner/H)

    def change(self, layer, h, prepared, slots):
        block, (key, value) = self.block[str(layer)], prepared
        query = split_heads(block["q"](block["norm"](h.to(key.dtype))), self.heads)
        read = block["o"](merge_heads(F.scaled_dot_product_attention(query, key, value)))
        return h + torch.tanh(self.gate[str(layer)]) * read

    def gates(self):
        return {l: self.gate[str(l)].tanh().item() for l in self.spec.layers}


class Unfreeze(CrossAttention):
    """cross_attention plus the top decoder blocks trained. The blocks are copies, put in for the `with` block."""

    def __init__(self, spec):
        super().__init__(spec)
        self.top = None  # made by adopt(), which needs the decoder

    def adopt(self, decoder):
        first = len(decoder.layers) - UNFREEZE_BLOCKS
        # in float32, as all that is trained: small steps would be lost in bfloat16. Autocast computes as before
        self.top = nn.ModuleDict({str(i): copy.deepcopy(decoder.layers[i]).float().requires_grad_(True)
                                  for i in range(first, len(decoder.layers))})
        return self

    def swap_in(self, decoder):
        own = {int(i): decoder.layers[int(i)] for i in self.top}
        for i, block in self.top.items():
            decoder.layers[int(i)] = block
        return own


class Concat(Fusion):
    """N placeholder positions of the prompt are overwritten with the modality tokens at each layer.

    Layer 0 is the usual prefix, as LLaVA does with images (Liu et al. 2023), and SLAM-AAC or Pengi with sound.
    `size` lets the tokens find the scale of the hidden states around them.
    """
    has_gate = False

    def __init__(self, spec):
        super().__init__(spec)
        rank = 3 * spec.rank // 2  # 2 * D * rank here = 3 * D * R in additive
        self.adapter = nn.ModuleDict({str(l): Residual(spec.width, rank, parts=1) for l in spec.layers})
        self.size = nn.ParameterDict({str(l): nn.Parameter(torch.tensor(1.0)) for l in spec.layers})

    def prepare(self, tokens):
        return {l: tuple(self.adapter[str(l)](tokens)) for l in self.spec.layers}

    def change(self, layer, h, prepared, slots):
        if h.shape[1] == 1:
            return h                                                     # a decoding step: the prompt is in the cache
        (tokens,) = prepared
        if slots is None or slots.shape != tokens.shape[:2]:
            raise FusionError(f"concat needs slots= of shape {tuple(tokens.shape[:2])}: the positions of the "
                              f"prompt's placeholders; got {None if slots is None else tuple(slots.shape)}")
        index = slots[..., None].expand_as(tokens)                       # (B, N, D)
        # as large as the position before them, not as the placeholders, whose own states may be nearly zero
        before = (slots[:, :1] - 1).clamp(min=0)[..., None].expand(-1, -1, h.shape[-1])   # (B, 1, D)
        tokens = self.size[str(layer)] * loudness(h.gather(1, before)) * tokens
        return h.scatter(1, index, tokens.to(h.dtype))


SYSTEMS = {"additive": Additive, "cross_attention": CrossAttention, "concat": Concat, "unfreeze": Unfreeze,
           "data_only": DataOnly}


# ---------------------------------------------------------------- build, load, split

def build(kind, decoder, *, encoder_width, layers, tokens=16, hidden=768, gate_init=0.05, modality="audio"):
    """A new fusion of a kind in SYSTEMS for a decoder, freshly initialised from torch's global generator.

    The adapters' rank follows the decoder's width (256 at 4096) so that the systems' budgets match at any width.
    """
    if kind not in SYSTEMS:
        raise FusionError(f"no system called {kind!r}: one of {', '.join(SYSTEMS)}")
    backbone = describe_backbone(decoder)
    layers = sorted(set(layers))
    if not layers or layers[0] < 0 or layers[-1] >= backbone["depth"]:
        raise FusionError(f"--layers {' '.join(map(str, layers))}: this decoder has layers 0 to {backbone['depth'] - 1}")
    if kind == "unfreeze" and backbone["depth"] <= UNFREEZE_BLOCKS:
        raise FusionError(f"unfreeze trains the top {UNFREEZE_BLOCKS} blocks, this decoder has {backbone['depth']}")
    rank = max(64, backbone["width"] // 16)
    return _make(Spec(kind, layers, tokens, hidden, encoder_width, gate_init, rank, modality, backbone), decoder)


def _make(spec, decoder):
    fusion = SYSTEMS[spec.kind](spec)
    if isinstance(fusion, Unfreeze):
        fusion.adopt(decoder)
    return fusion


def load(folder, decoder):
    """The fusion saved in a folder, for the decoder it belongs to. Raises FusionError, naming what differs."""
    folder = Path(folder)
    try:
        spec = Spec(**json.loads((folder / "fusion.json").read_text()))
        check_backbone(spec.backbone, describe_backbone(decoder))
        fusion = _make(spec, decoder)
        with safe_open(folder / "fusion.safetensors", "pt") as file:
            tensors, written = {k: file.get_tensor(k) for k in file.keys()}, (file.metadata() or {}).get("sha256")
        if written not in (None, digest(tensors)):  # one turned bit would be a slightly other model
            raise FusionError(f"{folder / 'fusion.safetensors'}: damaged, its tensors are not those that were saved")
        fusion.load_state_dict(tensors)
    except FileNotFoundError as e:
        raise FusionError(f"{e.filename}: no such file; a checkpoint is fusion.safetensors beside fusion.json") from e
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, RuntimeError) as e:
        raise FusionError(f"{folder}: not a fusion checkpoint ({' '.join(str(e).split())[:200]})") from e
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


@contextmanager
def attach_branches(decoder, branches, clips, slots=None):
    """Attach several fusions for the clips with these indices.

    clips: indices into each branch's frames. slots (B, N): for concat.
    Yields {modality: tokens (B, N, D), or None without a clip}.
    Two branches at one layer act in the order of their modalities' names, so
    that a pair is one model, in whatever order it is given.
    """
    device = next(decoder.parameters()).device
    tokens = {}
    with ExitStack() as stack:
        for branch in sorted(branches, key=lambda b: b.fusion.spec.modality):
            frames = mask = None
            if branch.frames is not None:
                frames, mask = pad_frames([branch.frames[i] for i in clips])
                frames = frames.to(device, non_blocking=True)
                mask = mask.to(device, non_blocking=True)
            attached = branch.fusion.attach(decoder, frames, mask, slots)
            tokens[branch.fusion.spec.modality] = stack.enter_context(attached)
        yield tokens


def pad_frames(frames):
    """[(S_i, E)] -> zero-padded (B, S, E), and mask (B, S), True at a frame."""
    lengths = torch.tensor([[len(f)] for f in frames])
    mask = torch.arange(int(lengths.max())) < lengths
    return pad_sequence(list(frames), batch_first=True), mask


def split(decoder, k):
    """Two views of a decoder that share its weights: (trunk, head).

    trunk: embeddings and blocks below k, no final norm. head: blocks from k and the norm, fed by `inputs_embeds`.
    head(inputs_embeds=trunk(ids)) is the whole decoder, so frozen layers below the first fusion need to run once.
    The views share the block objects, so an `attach` on the decoder is active in the head too; layers of a fusion
    keep their numbers. Use them with use_cache=False: the blocks' cache positions are those of the whole.
    """
    depth = len(decoder.layers)
    norm = next((n for n in ("norm", "final_layer_norm", "final_layernorm") if n in decoder._modules), None)
    if norm is None:
        raise FusionError(f"{type(decoder).__name__}: no final norm found to split before")

    def view(blocks):
        part = copy.copy(decoder)
        part._modules = dict(decoder._modules)
        part.layers = nn.ModuleList(decoder.layers[i] for i in blocks)
        part.config = copy.deepcopy(decoder.config)
        part.config.num_hidden_layers = len(blocks)
        if getattr(decoder.config, "layer_types", None):                 # sliding or full attention, by block
            part.config.layer_types = [decoder.config.layer_types[i] for i in blocks]
        return part

    trunk, head = view(range(k)), view(range(k, depth))
    trunk._modules[norm] = nn.Identity()
    return trunk, head


def count_parameters(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def demo():
    try:
        import torchaudio  # noqa: F401  transformers imports it where it is installed...
    except OSError:        # ...and its PyPI wheel wants CUDA's libraries: go without its compiled half
        sys.modules["torchaudio._extension.utils"]._load_lib = lambda _: False
    except ImportError:
        pass
    from transformers import LlamaConfig, LlamaModel
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=8,
                         num_attention_heads=4, num_key_value_heads=4)
    decoder = LlamaModel(config).eval().requires_grad_(False)
    ids, frames = torch.randint(100, (3, 20)), torch.randn(3, 12, 32)
    slots = torch.arange(2, 10).expand(3, -1)
    print(f"{'system':16s} {'trainable':>10s} {'gates closed':>13s} {'at the start':>13s} {'after the block':>16s}")
    with torch.no_grad():
        before = decoder(ids).last_hidden_state
        for kind in SYSTEMS:
            audio = build(kind, decoder, encoder_width=32, layers=[3, 6], tokens=8, hidden=64)

            def difference():
                with audio.attach(decoder, frames, slots=slots):
                    return f"{(decoder(ids).last_hidden_state - before).abs().max().item():.2g}"

            start, closed = difference(), "no gate"
            if audio.has_gate:
                audio.set_gates(0.0)
                closed = difference()
            hooks = sum(len(m._forward_pre_hooks) for m in decoder.modules())
            after = (decoder(ids).last_hidden_state - before).abs().max().item()
            print(f"{kind:16s} {count_parameters(audio):10,d} {closed:>13s} {start:>13s} "
                  f"{f'{after:.2g}, {hooks} hooks':>16s}")
    print("\nLargest change of the decoder's output. cross_attention starts with closed gates, concat has none.")


if __name__ == "__main__":
    demo()
