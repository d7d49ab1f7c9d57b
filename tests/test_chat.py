"""LLaVA checkpoints of four families, tiny and random, through from_pretrained: chat formats, and the identities."""
import functools
import json
import shutil

import data  # first: it makes torchaudio importable, which transformers needs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import fused
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import evaluate
import fusion as fusions
import test_train
from fusion import Branch

WORDS = "a dog barks loudly twice while rain falls on the roof, what is heard in the picture? Describe the sound."
PARTS = "{% for c in m.content %}{{ '<image>\n' if c.type == 'image' else c.text }}{% endfor %}"
ASSISTANT = "<|im_start|>assistant\n{% endif %}"
PROMPT = "{% endfor %}{% if add_generation_prompt %}"
TEMPLATES = {  # LLaVA-1.5's, ChatML, LLaVA-Interleave's (an answer begins otherwise than its prompt), Mistral's
    "vicuna": "{% for m in messages %}{{ m.role.upper() }}: " + PARTS + " " + PROMPT + "ASSISTANT:{% endif %}",
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n" + PARTS + "<|im_end|>\n" + PROMPT + ASSISTANT,
    "interleave": "{% for m in messages %}<|im_start|>{{ m.role }} \n" + PARTS + "<|im_end|>" + PROMPT + ASSISTANT,
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] " + PARTS
               + " [/INST]{% else %} " + PARTS + "{{ eos_token }}{% endif %}{% endfor %}",
}
EXPECTED = {  # the prompt of "Hi", what follows it with the answer "Yo", the end token
    "vicuna": ("USER: Hi ASSISTANT:", " Yo", "</s>"),
    "chatml": ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yo", "<|im_end|>"),
    "interleave": ("<|im_start|>user \nHi<|im_end|><|im_start|>assistant\n", "Yo", "<|im_end|>"),
    "mistral": ("[INST] Hi [/INST]", " Yo", "</s>"),
}
TIED = ("chatml", "interleave")  # output embeddings are the input's
SIZE = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4)
VISION = dict(SIZE, num_hidden_layers=2, image_size=16, patch_size=8)
TEXT = dict(SIZE, num_hidden_layers=8, num_key_value_heads=2, initializer_range=0.2)  # wide: no near-ties


def sentencepiece():
    """As Llama 2's: words begin with ▁, also the first; <s> in front; <image> and <pad> are added afterwards."""
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    t.train_from_iterator([WORDS], trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    trained = json.loads(t.to_str())["model"]
    vocab = trained["vocab"] | {f"<0x{i:02X}>": len(trained["vocab"]) + i for i in range(256)}
    t.model = models.BPE(vocab, [tuple(pair) for pair in trained["merges"]], unk_token="<unk>", byte_fallback=True)
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, **names, extra_special_tokens=["<image>"])


def byte_level():
    """As GPT-2's and Qwen's: no <s>, no padding token, and an eos that ends texts and not turns."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator([WORDS], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|endoftext|>",
                                                extra_special_tokens=["<|im_start|>", "<|im_end|>", "<image>"])


@pytest.fixture(scope="module", params=TEMPLATES)
def backbone(request, tmp_path_factory):
    """Written without patch_size, as old checkpoints are, and loaded; the folder has the family's name."""
    family, folder = request.param, tmp_path_factory.mktemp("llava") / request.param
    tokenizer = sentencepiece() if family in ("vicuna", "mistral") else byte_level()
    image = tokenizer.convert_tokens_to_ids("<image>")
    text, vision, strategy = transformers.LlamaConfig, transformers.CLIPVisionConfig, "default"
    if family == "interleave":  # SigLIP has no CLS token to leave out
        text, vision, strategy = transformers.Qwen2Config, transformers.SiglipVisionConfig, "full"
    if family == "mistral":
        text = functools.partial(transformers.MistralConfig, sliding_window=8)
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        text_config=text(**TEXT, vocab_size=len(tokenizer) + 3), vision_config=vision(**VISION),
        vision_feature_select_strategy=strategy, image_seq_length=4, image_token_index=image,
        tie_word_embeddings=family in TIED)).save_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    transformers.LlavaProcessor(images, tokenizer, chat_template=TEMPLATES[family]).save_pretrained(folder)
    loaded = data.Backbone(folder, "cpu")
    assert len(loaded.encode(data.SOUND_PROMPT)[0]) > 8  # the sliding window
    assert (loaded.llava.lm_head.weight is loaded.llava.get_input_embeddings().weight) == (family in TIED)
    return loaded


# ---------------------------------------------------------------- chat formats

def test_prompts_and_answers_are_the_templates_to_the_byte(backbone):
    name, tokenizer = backbone.path.split("/")[-1], backbone.tokenizer
    plain, answer, end = EXPECTED[name]
    pictured = plain.replace("Hi", "<image>\nHi")
    assert (backbone.chat("Hi"), backbone.chat("Hi", image=True)) == (plain, pictured)
    bos = [1] if name in ("vicuna", "mistral") else []
    ids, *none = backbone.encode("Hi")
    assert none == [None, None] and ids[:len(bos)] == bos and tokenizer.decode(ids[len(bos):]) == plain
    whole = ids + backbone.caption_ids("Hi", "Yo")
    assert whole == tokenizer(plain + answer + end).input_ids                 # as if it were one text
    assert tokenizer.decode(whole[len(bos):]) == plain + answer + end and tokenizer.decode([backbone.eos]) == end
    caption = "a dog barks, \"twice\" \U0001f600"
    assert backbone.text(backbone.caption_ids("Hi", caption)) == caption
    slotted, _, slots = backbone.encode("Hi", placeholders=4)
    assert [slotted[k] for k in slots] == [backbone.pad] * 4
    rest = [token for k, token in enumerate(slotted) if k not in slots]
    assert rest == [t for t in tokenizer(pictured).input_ids if t != backbone.llava.config.image_token_id]


def test_a_question_about_an_image_is_encoded_as_the_processor_does(backbone, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.png"
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    ids, pixels, slots = backbone.encode("Hi", path)
    whole = backbone.processor(text=backbone.chat("Hi", image=True), images=Image.open(path), return_tensors="pt")
    assert ids == whole.input_ids[0].tolist() and torch.equal(pixels, whole.pixel_values[0]) and slots is None
    image = backbone.llava.config.image_token_id
    assert ids.count(image) == 4                                            # as many as the image takes
    slotted, again, slots = backbone.encode("Hi", path, 3)
    assert torch.equal(again, pixels) and [slotted[k] for k in slots] == [backbone.pad] * 3
    assert slots[-1] + 1 == slotted.index(image)                            # before the image
    assert [token for k, token in enumerate(slotted) if k not in slots] == ids
    without, none, same = backbone.encode("Hi", placeholders=3)             # and where it would be
    assert none is None and same == slots and without == [token for token in slotted if token != image]


@pytest.mark.parametrize("write", [
    lambda backbone, text: backbone.encode(text), lambda backbone, text: backbone.caption_ids("Hi", text),
    lambda backbone, text: backbone.encode(text, placeholders=2), lambda backbone, text: backbone.caption_ids(text, "Yo")])
@pytest.mark.parametrize("token", ["<image>", "end"])
def test_a_special_token_in_a_persons_text_is_one_line(backbone, write, token):
    token = backbone.tokenizer.decode([backbone.eos]) if token == "end" else token
    with pytest.raises(data.InputError, match="a special token of") as error:
        write(backbone, f"a dog{token} barks")
    assert "a dog" in str(error.value) and token in str(error.value) and "\n" not in str(error.value)
    write(backbone, "a dog <barks> [loudly] </a> twice & \"so\" <|on|>")


def changed(backbone, out, template):
    """A copy of the checkpoint with another chat template; None: without one."""
    shutil.copytree(backbone.path, out)
    (out / "chat_template.jinja").unlink()
    if template is not None:
        (out / "chat_template.jinja").write_text(template)
    return out


def test_a_prompt_that_ends_in_a_space_is_followed_by_the_answers_own_tokens(backbone, tmp_path):
    """Read together, the space would belong to the answer's first word."""
    template = TEMPLATES["vicuna"].replace("ASSISTANT:", "ASSISTANT: ")
    backbone = data.Backbone(changed(backbone, tmp_path / "spaced", template), "cpu")
    ids = backbone.caption_ids("Hi", "dog")
    assert ids == backbone.tokenizer("dog", add_special_tokens=False).input_ids + [backbone.eos]
    assert backbone.text(backbone.encode("Hi")[0] + ids).endswith("ASSISTANT: dog")


@pytest.mark.parametrize("ending, between", [(">", " "), (">\n", "")])
def test_a_template_that_renders_no_answers(backbone, tmp_path, ending, between):
    users_only = "{% if m.role != 'user' %}{{ raise_exception('no answers') }}{% endif %}"
    template = "{% for m in messages %}" + users_only + PARTS + "{% endfor %}{{ '" + ending + "' }}"
    backbone = data.Backbone(changed(backbone, tmp_path / "users", template), "cpu")
    assert backbone.chat("Hi") == "Hi" + ending and backbone.before_answer == between
    assert backbone.eos == backbone.tokenizer.eos_token_id


@pytest.mark.parametrize("template, image, message", [
    ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", {}, "can only concatenate str"),
    (None, {}, "does not have a chat template"), ("{% for m in messages %}{{ m.role }}{% endfor %}", {}, "it does not"),
    (TEMPLATES["vicuna"], {"image_token_index": 7, "image_token_id": 7}, "one token 7, <image>")])
def test_a_checkpoint_that_cannot_be_asked_about_images_is_one_line(backbone, tmp_path, template, image, message):
    broken = changed(backbone, tmp_path / "broken", template)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, **image}))
    with pytest.raises(data.InputError, match=message) as error:
        data.Backbone(broken, "cpu")
    text = str(error.value)
    assert text.startswith(str(broken)) and "chat_template.jinja" in text and "\n" not in text


@pytest.mark.parametrize("change, message", [
    ({"model_type": "llava_next"}, "is a llava_next; LlavaForConditionalGeneration needs a llava"),
    ({"model_type": "clap"}, "is a clap"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot be loaded"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "cannot be loaded")])
def test_a_checkpoint_of_another_kind_is_one_line(backbone, tmp_path, change, message):
    broken = tmp_path / "broken"
    shutil.copytree(backbone.path, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(data.InputError, match=message) as error:
        data.Backbone(broken, "cpu")
    assert str(error.value).startswith(str(broken)) and "\n" not in str(error.value)


def test_a_backbone_answers_a_question_about_an_image_when_it_is_made(backbone, tmp_path):
    """Its processor cuts images to a size that its vision tower does not take, which nothing else would notice."""
    broken = tmp_path / "broken"
    shutil.copytree(backbone.path, broken)
    settings = broken / "processor_config.json"
    text = settings.read_text()
    settings.write_text(text.replace('"height": 16', '"height": 24').replace('"width": 16', '"width": 24'))
    assert settings.read_text() != text
    with pytest.raises(data.InputError, match="cannot answer a question about an image") as error:
        data.Backbone(broken, "cpu")
    assert str(error.value).startswith(str(broken)) and "\n" not in str(error.value)
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(data.InputError, match="holds LoRA adapters"):
        data.Backbone(broken, "cpu")


def test_a_checkpoints_settings_for_chats_do_not_reach_decoding(backbone, tmp_path):
    chatty = tmp_path / "chatty"
    shutil.copytree(backbone.path, chatty)
    (chatty / "generation_config.json").write_text(json.dumps(
        {"do_sample": True, "temperature": 0.3, "top_p": 0.6, "repetition_penalty": 1.5}))
    questions = [data.SOUND_PROMPT, "Is it a dog, or rain on the roof?"]
    found = [evaluate.decode(b, [], questions, beams=3, samples=4) for b in (backbone, data.Backbone(chatty, "cpu"))]
    assert found[0] == found[1]


# ---------------------------------------------------------------- identities

@pytest.mark.parametrize("kind", fusions.SYSTEMS)
def test_closed_absent_split_and_greedy(backbone, kind):
    _, fusion, ids, slots = fused(backbone, kind, 2)
    llava, decoder, frames = backbone.llava, backbone.decoder, torch.randn(2, 5, 8)

    def texts(*branches):
        return [c[0]["text"] for c in evaluate.decode(backbone, branches, [data.SOUND_PROMPT] * 2, beams=2)]

    with torch.inference_mode():
        before, untouched = llava(input_ids=ids).logits, texts()
        with fusion.attach(decoder, frames, slots=slots):
            opened = llava(input_ids=ids).logits
            rows = evaluate.generate(backbone, ids, 1, False)
            best = llava(input_ids=rows).logits[:, ids.shape[1] - 1:-1].argmax(-1)
            trunk, head = fusions.split(decoder, 3)
            states = trunk(input_ids=ids, use_cache=False).last_hidden_state
            states = head(inputs_embeds=states, use_cache=False).last_hidden_state
            assert torch.equal(llava.lm_head(states), opened) and (opened - before).abs().max() > 1e-2
        length, _ = evaluate.lengths(rows[:, ids.shape[1]:], backbone.eos)
        for new, wanted, n in zip(rows[:, ids.shape[1]:], best, length):
            assert n > 3 and torch.equal(new[:n], wanted[:n])
        if fusion.has_gate:
            fusion.set_gates(0.0)
            assert texts(Branch(fusion, list(frames))) == untouched
            with fusion.attach(decoder, frames):
                assert torch.equal(llava(input_ids=ids).logits, before)
        with fusion.attach(decoder):
            assert torch.equal(llava(input_ids=ids).logits, before)
        assert torch.equal(llava(input_ids=ids).logits, before)


@pytest.mark.parametrize("kind", fusions.SYSTEMS)
def test_samples_of_a_tree_are_samples_behind_their_own_prompt(backbone, kind):
    test = test_train.test_samples_of_a_tree_are_samples_behind_their_own_prompt
    test(lambda kind, rows: fused(backbone, kind, rows), kind)


def test_answers_about_images(backbone, tmp_path, monkeypatch):
    """Likelihoods; closed gates and no clip change nothing; an answer ends with the template's end token."""
    rng, questions = np.random.default_rng(0), []
    for i, text in enumerate(["What is it?", "Is it a dog, or rain on the roof?", "Hi"]):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"{i}.png")
        questions.append(data.Question(str(i), tmp_path / f"{i}.png", text, "a dog", ""))
    probe = evaluate.Probe(backbone, questions, 2)
    untouched = probe.run()
    for q, result in zip(questions, untouched):
        text = backbone.chat(q.question, image=True)
        batch = backbone.processor(text=text, images=Image.open(q.image), return_tensors="pt")
        answer = torch.tensor([backbone.caption_ids(q.question, "a dog")])
        ids, n = torch.cat([batch.input_ids, answer], 1), answer.shape[1]
        with torch.inference_mode():
            logits = backbone.llava(input_ids=ids, pixel_values=batch.pixel_values).logits[:, -n - 1:-1]
            new = backbone.llava.generate(**batch, max_new_tokens=9)[0, -9:].tolist()
        assert result["nll"] == pytest.approx(F.cross_entropy(logits[0].float(), answer[0]).item(), rel=1e-4)
    frames = list(torch.randn(3, 5, 8))
    fusion, concat = (fused(backbone, kind, 2)[1] for kind in ("additive", "concat"))
    assert probe.run([Branch(fusion)]) == untouched
    assert all(probe.run([Branch(opened, frames)]) != untouched for opened in (fusion, concat))
    fusion.set_gates(0.0)
    assert probe.run([Branch(fusion, frames)]) == untouched
    end = next(k for k in range(1, 9) if new[k] not in new[:k])
    monkeypatch.setattr(backbone, "eos", new[end])  # whatever the generation config holds
    assert probe.run()[2]["answer"] == backbone.text(new[:end + 1]) != backbone.text(new)
