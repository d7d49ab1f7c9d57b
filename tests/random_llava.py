"""A LLaVA of random weights with made-up clips and captions, and training steps on it: for bench.py and bench7b.py.

Costs depend on shapes alone, so random weights do. Everything that trains or decodes is the project's own code.
Shapes: B clips, P prompt positions, T caption positions, D decoder width, N modality tokens, S encoder frames.
"""
import re
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
        self.special = re.compile("<pad>|<s>|</s>|<image>")
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


def make_model(backbone, system, layers, split_layer=None, tokens=N, encoder_width=E, hidden=HIDDEN):
    """A train.Model of a system. split_layer: the lowest trained layer, if not given."""
    decoder = backbone.decoder
    torch.manual_seed(0)
    with backbone.device:
        fusion = fusions.build(system, decoder, encoder_width=encoder_width, layers=layers, tokens=tokens, hidden=hidden)
        contrast = train.ContrastiveHead(decoder.config.hidden_size, encoder_width)
    if split_layer is None:
        split_layer = layers[0]
    with fusion.attach(decoder):
        trunk, head = fusions.split(decoder, split_layer)
    return train.Model(backbone, fusion, contrast, trunk, head, split_layer)


def branches(model):
    """The model's fusion with the made-up clips, for decoding."""
    return [fusions.Branch(model.fusion, model.backbone.features)]


def prompt_of(model):
    """(token ids, slots) of the prompt of every clip."""
    ids, _, slots = model.backbone.encode("", placeholders=model.placeholders)
    return ids, slots


def clip_of(model, clips):
    """What Fusion.attach takes for so many of the made-up clips, each beside the prompt."""
    device, (_, slots) = model.backbone.device, prompt_of(model)
    frames, mask = fusions.pad_frames(model.backbone.features[:clips])
    return frames.to(device), mask.to(device), slots and torch.tensor([slots] * clips, device=device)


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
        self.model, self.clips, self.differentiated = model, range(clips), differentiated
        captions = captions or backbone.captions[:clips]
        ids = [backbone.caption_ids("", caption) for caption in captions]
        self.answers = train.Answers(model, [("", None)] * clips, ids)
        self.tokens = sum(map(len, ids))
        self.args = training_args(backbone.device)
        self.optimizer = train.make_optimizer(model, self.args, "xe")

    def batch(self):
        frames = self.model.backbone.features[:len(self.clips)]
        batch = self.answers.batch(self.clips, frames, answer_tokens=self.tokens)
        batch.states.requires_grad_(self.differentiated)
        return batch

    def batches(self, step, args):
        yield self.batch()

    def learn(self):
        """As train.what_to_learn: pairs of a loss and the function step -> Batches that it learns from."""
        return [(train.xe_loss, self.batches)]

    def loss(self):
        return train.xe_loss(self.model, self.batch(), self.args)[0]

    def __call__(self):
        train.optimizer_step(self.model, self.learn(), 0, self.optimizer, 1.0, self.args)

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
        n = questions or clips
        positions += model.placeholders
        states = torch.randn(n, positions, backbone.decoder.config.hidden_size, generator=draw)
        rows = torch.arange(n).repeat_interleave(answer)
        last = torch.arange(positions - answer - 1, positions - 1).repeat(n)
        self.kept = train.Batch(
            clip_of(model, n), states.to(backbone.device, backbone.llava.dtype), rows.to(backbone.device),
            last.to(backbone.device), states[rows, last].to(backbone.device, backbone.llava.dtype), len(rows))
        self.args.keep = 1.0

    def keep_batches(self, step, args):
        yield self.kept

    def learn(self):
        return [*super().learn(), (train.keep_loss, self.keep_batches)]


class ScstStep:
    """train.py's optimizer_step with its scst_loss, on the same clips each time, with a new seed each time."""

    def __init__(self, model, clips, samples=5, max_tokens=MAX_WORDS + 1, reward=None):
        backbone = model.backbone
        self.model, self.clips, self.max_tokens, self.seed = model, range(clips), max_tokens, 0
        self.clip, self.prompt = clip_of(model, clips), torch.tensor([prompt_of(model)[0]] * clips, device=backbone.device)
        self.args = training_args(backbone.device, "--scst-samples", str(samples))
        self.optimizer = train.make_optimizer(model, self.args, "scst")
        references = [[scst.words(caption)] for caption in backbone.captions[:clips]]
        self.reward = reward or scst.CiderD(references, end=True)

    def batch(self):
        self.seed += 1
        return train.Batch(self.clip, clips=tuple(self.clips), prompt=self.prompt, seed=self.seed,
                           max_tokens=self.max_tokens)

    def batches(self, step, args):
        yield self.batch()

    def loss(self, model, batch, args):
        return train.scst_loss(model, batch, self.reward, args)

    def backward(self):
        self.loss(self.model, self.batch(), self.args)[0].backward()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self):
        train.optimizer_step(self.model, [(self.loss, self.batches)], 0, self.optimizer, 1.0, self.args)
