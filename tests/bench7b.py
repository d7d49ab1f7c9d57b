"""LLaVA-1.5-7B with random weights: timed on a GPU, and without one counted by fake tensors. For bench.py.

Fake tensors have shapes and types but no data, so the project's own training steps, decoding and retention probe run
at their true size on any machine, and each of their allocations and matrix products is counted. Where the code asks
for data, the answer is the expensive case: samples share nothing, no caption ends early. Only tensors are counted. A
GPU also needs memory for CUDA's context, for workspaces of kernels and for what its allocator cannot reuse. Attention
is that of a fused kernel, which keeps no matrix of scores.
"""
import contextlib
import weakref
from unittest import mock

import data  # first of the repository: it makes torchaudio importable
import evaluate
import plan
import scst
import train
from random_llava import (
    SIZE_7B, KeepStep, RandomBackbone, ScstStep, Step, branches, clip_of, make_model, prompt_of)
from timing import peak, share_of_matmul

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
SYSTEMS = ("additive", "cross_attention", "concat", "unfreeze", "data_only")
LAYERS = [12, 24]
ENCODER_WIDTH, HIDDEN = 768, 768        # CLAP's, and train.py's default
PROMPT = plan.PROMPT                    # positions of a caption's prompt
QUESTION = plan.QUESTION                # positions of a question about an image, 576 of them the image's
BEAMS, SAMPLES = 5, 5
LONGEST = evaluate.MAX_NEW_TOKENS       # of a caption, before bench.py changes it


# ---------------------------------------------------------------- on a GPU

def timed(table, world=None):
    """Every system at batch 1, 8 and 32: steps, memory, captions. --layers for fewer layers, on a CPU too."""
    depth, cuda = table.args.layers, torch.cuda.is_available()
    if not cuda and depth == SIZE_7B["layers"]:
        print(f"{table.bench:10s}no GPU: counted, not timed; --layers 8 is timed on a CPU")
        return operations(table)
    backbone = RandomBackbone(**{**SIZE_7B, "layers": depth}, device="cuda" if cuda else "cpu")
    weights = sum(p.numel() for p in backbone.llava.parameters())
    table.row(f"parameters, {depth} layers", weights / 1e9, unit="G", note=backbone.device.type)
    upper, both = [depth * 3 // 4], [depth * 3 // 8, depth * 3 // 4]
    systems = [("additive", upper), *((system, both) for system in SYSTEMS), ("concat", [0])]
    for clips in [table.args.clips] if table.args.clips else (1, 8, 32):
        prefix = Step(make_model(backbone, "concat", [0]), clips)
        for system, layers in systems:
            step = prefix if layers == [0] else Step(make_model(backbone, system, layers), clips)
            name = f"{system} {{{','.join(map(str, layers))}}}, batch {clips}"
            table.compare(f"{name}: a step, the prefix's", step, prefix, 1e3, "ms",
                          target=3 if layers == upper else None)
            share_of_matmul(table, f"{name}: share of the matmul rate", step, target=0.5 if clips == 32 else None)
            if cuda:
                total = peak(step) + torch.cuda.memory_allocated()
                table.row(f"{name}: peak memory", total / 1e9, unit="GB")
            seconds = table.seconds(lambda: evaluate.decode(
                backbone, branches(step.model), [""] * clips, beams=BEAMS, batch_size=clips))
            table.row(f"{name}: beam-{BEAMS} captions", clips / seconds, unit="1/s")
            if clips == 1 and system in ("additive", "cross_attention", "data_only"):
                table.equal(f"{system} with gates closed, and the backbone", closed_gates(step.model), 0)
            del step


def closed_gates(model):
    """Largest change of the decoder's states by a fusion with closed gates."""
    backbone = model.backbone
    model.fusion.set_gates(0.0)
    ids = torch.tensor([prompt_of(model)[0]], device=backbone.device)
    with torch.inference_mode(), backbone.autocast():
        before = backbone.decoder(ids).last_hidden_state
        with model.fusion.attach(backbone.decoder, *clip_of(model, 1)):
            after = backbone.decoder(ids).last_hidden_state
    return (after - before).abs().max().item()


# ---------------------------------------------------------------- fake tensors

class Allocations(TorchDispatchMode):
    """Bytes of the tensors that are alive, `now`, and their `peak`; answers what fake tensors cannot know."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}    # storage -> bytes
        self.integer = 1   # what a tensor that is read as a Python integer is

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # in inference mode composite operations come whole
        if torch.is_inference_mode_enabled() and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            if dtype == torch.bool:
                return True
            return 1.0 if dtype.is_floating_point else self.integer
        if func is aten._unique2.default:      # all are distinct
            values = args[0].flatten()
            order = torch.arange(len(values)).view(args[0].shape)
            return values.clone(), order, torch.ones_like(order)
        if func is aten.bincount.default:
            return torch.empty(args[2], dtype=torch.long)  # minlength
        if func is aten.index.Tensor:          # a mask is True everywhere
            args = args[0], all_true(args[1]), *args[2:]
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def add(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.remove, key)

    def remove(self, key):
        self.now -= self.sizes.pop(key)

    def peak_of(self, function):
        self.peak = self.now
        function()
        return self.peak


def all_true(indices):
    """Indices with as many numbers in place of each mask as it has elements."""
    new = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            new += [torch.zeros(index.numel(), dtype=torch.long)] * index.dim()
        else:
            new.append(index)
    return new


class FakeBackbone(RandomBackbone):
    """LLaVA-1.5-7B in bfloat16; make it under fake_tensors()."""

    def __init__(self):
        super().__init__(**SIZE_7B, device="cpu", dtype=torch.bfloat16, prompt_words=PROMPT - 1)
        self.llava._has_unfinished_sequences = self.more_passes
        self.llava.model.get_placeholder_mask = no_images
        self.features = [torch.zeros(32, ENCODER_WIDTH) for _ in range(64)]
        self.passes = self.done = 0

    def more_passes(self, *args, **kwargs):
        """In place of a test on tokens: generate() ends after `passes` tokens."""
        self.done += 1
        if self.done <= self.passes:
            return True
        self.done = 0
        return False

    def autocast(self):  # as on a GPU
        return torch.autocast("cpu", torch.bfloat16)

    def model(self, system, layers):
        return make_model(self, system, layers, encoder_width=ENCODER_WIDTH, hidden=HIDDEN)

    def answer(self, model, clips, passes):
        """The retention probe's questions about images, with clips attached; `passes` tokens of each answer."""
        self.passes = passes
        N = model.placeholders
        positions = N + QUESTION + plan.ANSWER - passes
        probe = object.__new__(evaluate.Probe)
        inputs = {"input_ids": torch.zeros(clips, positions, dtype=torch.long),
                  "attention_mask": torch.ones(clips, positions, dtype=torch.long),
                  "pixel_values": torch.zeros(clips, 3, 336, 336, dtype=torch.bfloat16)}
        slots = torch.zeros(clips, N, dtype=torch.long) if N else None
        # the right answers, whose likelihood is asked for, have four tokens with the end
        probe.backbone, probe.questions = self, [data.Question("", None, "", "w5 w5 w5", "")] * clips
        probe.encoded = {N: [(inputs, slots)]}
        probe.run(branches(model))

    def caption(self, model, clips, tokens, passes):
        """Beam search for captions of so many tokens. Only the last `passes` tokens are generated; the earlier ones
        are read with the prompt, which keeps as much."""
        self.passes = passes
        generate = evaluate.generate

        def last_tokens(backbone, prompt, k, *args, **kwargs):
            longer = torch.zeros(clips, prompt.shape[1] + tokens - passes, dtype=torch.long)
            generate(backbone, longer, k, *args, **kwargs)
            return torch.zeros(clips * k, prompt.shape[1] + tokens, dtype=torch.long)

        with mock.patch.object(evaluate, "generate", last_tokens), \
                mock.patch.object(evaluate, "MAX_NEW_TOKENS", passes):
            evaluate.decode(self, branches(model), [""] * clips, beams=BEAMS, batch_size=clips)


def no_images(input_ids, inputs_embeds, image_features):
    """LLaVA's mask of the image's positions: where they are changes no shape."""
    return torch.zeros_like(inputs_embeds, dtype=torch.bool)


def to_float(module):
    """Module.float(), which cannot change fake parameters in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(parameter.detach().float())
    return module


def copied(self, memo):
    """Tensor.__deepcopy__, which looks for a fake tensor's data."""
    return torch.nn.Parameter(self.detach().clone(), self.requires_grad)


@contextlib.contextmanager
def fake_tensors():
    """Tensors made inside are fake; yields their Allocations."""
    with FakeTensorMode(allow_non_fake_inputs=True), Allocations() as allocations, \
            mock.patch.object(torch.nn.Module, "float", to_float), \
            mock.patch.object(torch.Tensor, "__deepcopy__", copied):
        yield allocations


def xe_step(model, clips, tokens):
    return Step(model, clips, [" ".join(["w5"] * (tokens - 1))] * clips)


class NoReward:
    """In place of scst.CiderD, which works on the CPU."""
    corpus = [["a caption"]] * 64

    def score_many(self, captions, references, ended):
        return torch.zeros(len(captions))


NO_REWARD = NoReward()


class ShortDrawing:
    """scst.sample_tree for a tree of so many positions, K samples a clip that share nothing, in a few passes.

    Only the last tokens are drawn; the earlier ones are read with the prompt, which keeps as much. The tree that is
    returned has the true shapes.
    """

    def __init__(self, positions, passes=2):
        self.sample_tree, self.positions, self.passes = scst.sample_tree, positions, passes

    def __call__(self, decoder, lm_head, prompt, K, *, max_tokens, **options):
        B, P = prompt.shape
        T = self.positions // K
        longer = torch.zeros(B, P + T - self.passes, dtype=torch.long)
        if self.passes:
            self.sample_tree(decoder, lm_head, longer, K, max_tokens=self.passes, **options)
        L, draws = P + self.positions, B * K * T
        return scst.Tree(
            states=torch.zeros(B, L, decoder.config.hidden_size, dtype=lm_head.weight.dtype),
            position_ids=torch.zeros(B, L, dtype=torch.long),
            attention_mask=torch.ones(B, 1, L, L, dtype=torch.bool),
            position=torch.zeros(draws, dtype=torch.long), token=torch.zeros(draws, dtype=torch.long),
            path=torch.zeros(B * K, T, dtype=torch.long), mask=torch.ones(B * K, T, dtype=torch.bool))


# ---------------------------------------------------------------- memory

def memory(table, world=None):
    """Peak GB of each activity of each system at 7B, the 14.1 GB of the backbone included, as a markdown table."""
    print("| system | clips | XE, 16 tokens | XE, 40 | SCST, tree of 60 | of 200 | keep | captions, beam 5 | retention |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    with fake_tensors() as allocations:
        backbone = FakeBackbone()
        for system in SYSTEMS:
            for clips in [table.args.clips] if table.args.clips else (8, 32):
                peaks = peaks_of(backbone, allocations, system, clips)
                numbers = " | ".join(f"{peak / 1e9:.1f}" for peak in peaks.values())
                print(f"| {system} | {clips} | {numbers} |", flush=True)
                for what, peak in peaks.items():
                    table.rows.append({"bench": table.bench, "what": f"{system}, {clips} clips: {what}",
                                       "ours": peak / 1e9, "unit": "GB"})


def peaks_of(backbone, allocations, system, clips):
    """{activity: bytes}. Gradients and AdamW's moments are there from the first step on."""
    peaks = {}
    model = backbone.model(system, LAYERS)
    first = xe_step(model, clips, 1)
    first()
    optimizer = first.optimizer  # with its moments
    for tokens in (16, 40):
        step = xe_step(model, clips, tokens)
        step.optimizer = optimizer
        peaks[f"XE, {tokens} tokens"] = allocations.peak_of(step)
    for positions in (60, 200):
        step = ScstStep(model, clips, SAMPLES, reward=NO_REWARD)
        step.optimizer = optimizer
        # what sample_tree reads of its own tree, which is much smaller
        allocations.integer = PROMPT + positions
        with mock.patch.object(scst, "sample_tree", ShortDrawing(positions)):
            peaks[f"SCST, tree of {positions}"] = allocations.peak_of(step)
    positions = QUESTION + plan.ANSWER
    keep = KeepStep(model, clips, positions, plan.ANSWER, train.questions_a_pass(clips, positions))
    keep.optimizer = optimizer
    peaks["keep"] = allocations.peak_of(keep)
    del first, step, keep, optimizer
    model.fusion.requires_grad_(False)
    allocations.integer = LONGEST  # tokens of every caption
    peaks["captions"] = allocations.peak_of(lambda: backbone.caption(model, clips, LONGEST, passes=2))
    allocations.integer = 5
    peaks["retention"] = allocations.peak_of(lambda: backbone.answer(model, clips, passes=2))
    return peaks


# ---------------------------------------------------------------- operations

def operations(table, world=None):
    """Operations of the matrix products at 7B, attention's own left out: the numbers of plan.py."""
    print("| system, first layer | XE step, a clip | SCST's pass through the tree, a clip | | TFLOP |")
    print("|---|---:|---:|---|---:|")
    with fake_tensors() as allocations:
        counted = count_operations(FakeBackbone(), allocations)
    for (system, layer), xe, tree in [(key, *values) for key, values in counted["training"].items()]:
        print(f"| {system}, {layer} | {xe:.3f} | {tree:.3f} | | |")
    for what in ("drawing", "caption", "question", "trunk"):
        print(f"| | | | {what} | {counted[what]:.4g} |")
    for (system, layer), values in counted["training"].items():
        for what, value in zip(("XE", "tree"), values):
            table.rows.append({"bench": table.bench, "what": f"{system}, {layer}: {what}", "ours": value, "unit": "T"})


def count_operations(backbone, allocations):
    """TFLOP: plan.TERAFLOP, counted."""
    clips = 2
    allocations.integer = PROMPT + SAMPLES * plan.CAPTION
    result = {"training": {}}
    for system, layer in plan.TERAFLOP["training"]:
        model = backbone.model(system, [layer, 24] if layer < 24 else [24])
        xe = tera(xe_step(model, clips, plan.CAPTION).backward) / clips
        step = ScstStep(model, clips, SAMPLES, reward=NO_REWARD)
        with mock.patch.object(scst, "sample_tree", ShortDrawing(SAMPLES * plan.CAPTION, passes=0)):
            tree = tera(step.backward) / clips
        result["training"][system, layer] = xe, tree
    # these hardly differ between systems: all layers once
    model = backbone.model("additive", LAYERS)
    model.fusion.requires_grad_(False)
    prompt = torch.zeros(clips, PROMPT, dtype=torch.long)
    with model.fusion.attach(backbone.decoder, *clip_of(model, clips)), backbone.autocast():
        result["drawing"] = tera(lambda: scst.sample_tree(
            backbone.decoder, backbone.llava.lm_head, prompt, SAMPLES, layer=12, eos=backbone.eos,
            max_tokens=plan.CAPTION, rows=model.fusion.rows)) / clips
    tokens = allocations.integer = plan.CAPTION
    result["caption"] = tera(lambda: backbone.caption(model, clips, tokens, passes=tokens)) / clips
    allocations.integer = 5
    result["question"] = tera(lambda: backbone.answer(model, clips, passes=4)) / clips
    trunk = tera(lambda: model.trunk(inputs_embeds=torch.zeros(1, 32, 4096, dtype=torch.bfloat16), use_cache=False))
    result["trunk"] = trunk / 32 / 12
    return result


def tera(function):
    """Operations of a call's matrix products, in units of 10^12."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e12
