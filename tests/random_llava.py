"""A LLaVA of random weights with made-up clips and captions, and training steps on it: for bench.py and bench7b.py.

Costs depend on shapes alone, so random weights do. Everything that trains or decodes is the project's own code.
Shapes: B clips, P prompt positions, T caption positions, D decoder width, N modality tokens, S encoder frames.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402  first: it makes torchaudio importable
import fusion as fusions  # noqa: E402
import scst  # noqa: E402
import train  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

E, N, S = 64, 16, 32                # encoder width, modality tokens, encoder frames a clip
HIDDEN = 512                        # inner width of the projector
PROMPT_WORDS = 10
WORDS = range(7, 15)                # words of a caption; AudioCaps has 10.5 in the mean too
MEAN_WORDS, MAX_WORDS = 10.5, 14
SMALL_VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                    image_size=32, patch_size=16)
SIZE_7B = dict(layers=32, width=4096, inner=11008, heads=32, vocabulary=32064, vision=dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
    patch_size=14, projection_dim=768))


def word_tokenizer(vocabulary):
    """One token a word: w4, w5, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "</s>", "<image>"]
    words += [f"w{i}" for i in range(len(words), vocabulary)]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   additional_special_tokens=["<image>"])


class RandomBackbone(data.Backbone):
    """data.Backbone with random weights, a tokenizer of one word a token, 64 captions and their clips' frames."""

    def __init__(self, layers, width, inner, heads, vocabulary, device, vision=None, dtype=None,
                 prompt_words=PROMPT_WORDS):
        from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
        self.tokenizer = word_tokenizer(vocabulary)
        self.path, self.device = "random", torch.device(device)
        self.eos, self.pad, self.placeholder, self.before_answer = 2, 0, 0, " "
        self.prompt_words = prompt_words
        text = LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, initializer_range=0.7 / width ** 0.5)
        vision = {"model_type": "clip_vision_model", **(vision or SMALL_VISION)}
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)
        dtype_before = torch.get_default_dtype()
        cuda = self.device.type == "cuda"
        torch.set_default_dtype(dtype or (torch.bfloat16 if cuda else torch.float32))
        try:
            with self.device:
                torch.manual_seed(0)
                llava = LlavaForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(dtype_before)
        self.llava = llava.eval().requires_grad_(False)
        # clear winners among the next words, and an end now and then, so that captions differ in length
        self.llava.lm_head.weight.mul_(4.0)
        self.llava.lm_head.weight[self.eos].mul_(3.0)
        self.decoder = self.llava.model.language_model
        draw = np.random.default_rng(0)
        self.captions, self.features = [], []
        for _ in range(64):
            words = draw.integers(4, vocabulary, draw.choice(WORDS))
            self.captions.append(" ".join(f"w{i}" for i in words))
        for _ in range(64):
            self.features.append(torch.from_numpy(draw.standard_normal((S, E), dtype=np.float32)))

    def chat(self, text, image=False, answer=None):
        words = [f"w{i}" for i in range(4, 4 + self.prompt_words)]
        return " ".join(["<s>"] + ["<image>"] * image + words)


def make_model(backbone, kind, layers, split_layer=None, tokens=N, encoder_width=E, hidden=HIDDEN):
    """A train.Model of a system. split_layer: the lowest trained layer, if not given."""
    decoder = backbone.decoder
    torch.manual_seed(0)
    with backbone.device:
        fusion = fusions.build(kind, decoder, encoder_width=encoder_width, layers=layers, tokens=tokens, hidden=hidden)
        contrast = train.ContrastiveHead(decoder.config.hidden_size, encoder_width)
    if split_layer is None:
        split_layer = layers[0]
    with fusions.attach_branches(decoder, [fusions.Branch(fusion)], []):
        trunk, head = fusions.split(decoder, split_layer)
    prompt, slots = backbone.prompt("", tokens if kind == "concat" else 0)
    branches = [fusions.Branch(fusion, backbone.features)]
    return train.Model(backbone, fusion, contrast, branches, trunk, head, split_layer, prompt, slots)


def training_args(device, *more):
    """The flags of train.py, with rates so small that the weights stay as they are."""
    rates = ["--lr", "1e-9", "--lr-adapter", "1e-9", "--scst-lr", "1e-9"]
    return train.parse_args(["--data", "", "--out", "", "--device", str(device), *rates, *more])


class Step:
    """train.py's optimizer_step with its xe_loss, on the same clips each time.

    differentiated: the input asks for a gradient too, so that the backward pass goes through all blocks of the
    head, trained or not, as it does where there is no trunk.
    """

    def __init__(self, model, clips, captions=None, differentiated=False):
        backbone = model.backbone
        self.model, self.clips, self.differentiated = model, list(range(clips)), differentiated
        captions = captions or backbone.captions[:clips]
        ids = [backbone.caption_ids("", caption) for caption in captions]
        self.states = train.TrunkStates(backbone, model.trunk, model.prompt, ids, [0] * clips, range(clips), Path("."))
        self.tokens = sum(map(len, ids))
        self.args = training_args(backbone.device)
        self.optimizer = train.make_optimizer(model, self.args, "xe")

    def batch(self):
        states, targets = self.states.batch(self.clips)
        states.requires_grad_(self.differentiated)
        return train.Batch(self.clips, 1, states, targets, self.tokens)

    def loss(self):
        return train.xe_loss(self.model, self.batch(), self.args)[0]

    def __call__(self):
        train.optimizer_step(self.model, [(train.xe_loss, self.batch())], self.optimizer, 1.0, self.args)

    def backward(self):
        self.loss().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def flops(self):
        """Floating-point operations of the matrix products, forward and backward."""
        with FlopCounterMode(display=False) as counter:
            self.backward()
        return counter.get_total_flops()

    def saved(self):
        """Bytes that the forward pass keeps for the backward pass, without the weights; each storage once."""
        weights = [*self.model.backbone.llava.parameters(), *self.model.fusion.parameters()]
        weights = {p.untyped_storage()._cdata for p in weights}
        kept = {}

        def pack(x):
            storage = x.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = self.loss()  # alive until all are counted: a freed storage's address would be used again
        del loss
        return sum(kept.values())


class KeepStep(Step):
    """A Step that also keeps the answers to questions, as many as clips unless given, in one pass.

    positions: of a question, image and answer.
    """

    def __init__(self, model, clips, positions, answer=4, questions=None):
        super().__init__(model, clips)
        backbone, draw = model.backbone, torch.Generator().manual_seed(0)
        n, slots = questions or clips, None
        if model.slots:
            positions += len(model.slots)
            slots = torch.tensor([model.slots] * n, device=backbone.device)
        states = torch.randn(n, positions, backbone.decoder.config.hidden_size, generator=draw)
        rows = torch.arange(n).repeat_interleave(answer)
        last = torch.arange(positions - answer - 1, positions - 1).repeat(n)
        branches = [fusions.Branch(model.fusion, backbone.features)]
        self.kept = train.KeptBatch(
            branches, states.to(backbone.device, backbone.llava.dtype), slots, rows.to(backbone.device),
            last.to(backbone.device), states[rows, last].to(backbone.device, backbone.llava.dtype), len(rows), "keep")
        self.args.keep = 1.0

    def __call__(self):
        batches = [(train.xe_loss, self.batch()), (train.keep_loss, self.kept)]
        train.optimizer_step(self.model, batches, self.optimizer, 1.0, self.args)


class ScstStep:
    """train.py's optimizer_step with its scst_loss, on the same clips each time, with a new seed each time."""

    def __init__(self, model, clips, samples=5, limit=MAX_WORDS + 1, reward=None):
        backbone = model.backbone
        self.model, self.clips, self.limit, self.seed = model, list(range(clips)), limit, 0
        self.args = training_args(backbone.device, "--scst-samples", str(samples))
        self.optimizer = train.make_optimizer(model, self.args, "scst")
        references = [[scst.words(caption)] for caption in backbone.captions[:clips]]
        self.reward = reward or scst.CiderD(references, end=True)

    def batch(self):
        self.seed += 1
        return train.Batch(self.clips, 1, seed=self.seed, limit=self.limit)

    def loss(self, model, batch, args):
        return train.scst_loss(model, batch, self.reward, args)

    def backward(self):
        self.loss(self.model, self.batch(), self.args)[0].backward()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self):
        train.optimizer_step(self.model, [(self.loss, self.batch())], self.optimizer, 1.0, self.args)
