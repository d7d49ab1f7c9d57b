"""LLaVA checkpoints of four families, tiny and random, through from_pretrained: chat formats, and the identities."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import fusion as fusions
import scst
from fusion import Branch

TEXT = "a dog barks loudly twice while rain falls on the roof, what is heard in the picture? Describe the sound."
PARTS = "{% for c in m.content %}{{ '<image>\n' if c.type == 'image' else c.text }}{% endfor %}"
PROMPT = "{% endfor %}{% if add_generation_prompt %}"
TEMPLATES = {  # LLaVA-1.5's, ChatML, LLaVA-Interleave's (an answer begins otherwise than its prompt), Mistral's
    "vicuna": "{% for m in messages %}{{ m.role.upper() }}: " + PARTS + " " + PROMPT + "ASSISTANT:{% endif %}",
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n" + PARTS + "<|im_end|>\n" + PROMPT
              + "<|im_start|>assistant\n{% endif %}",
    "interleave": "{% for m in messages %}<|im_start|>{{ m.role }} \n" + PARTS + "<|im_end|>" + PROMPT
                  + "<|im_start|>assistant\n{% endif %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] " + PARTS
               + " [/INST]{% else %} " + PARTS + "{{ eos_token }}{% endif %}{% endfor %}",
}
# prompt of "Hi", the same with an image, what follows it with the answer "Yo", the end token
EXPECTED = {
    "vicuna": ("USER: Hi ASSISTANT:", "USER: <image>\nHi ASSISTANT:", " Yo</s>"),
    "chatml": ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
               "<|im_start|>user\n<image>\nHi<|im_end|>\n<|im_start|>assistant\n", "Yo<|im_end|>"),
    "interleave": ("<|im_start|>user \nHi<|im_end|><|im_start|>assistant\n",
                   "<|im_start|>user \n<image>\nHi<|im_end|><|im_start|>assistant\n", "Yo<|im_end|>"),
    "mistral": ("[INST] Hi [/INST]", "[INST] <image>\nHi [/INST]", " Yo</s>"),
}
TIED = ("chatml", "interleave")  # output embeddings are the input's
SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            initializer_range=0.3)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)


def sentencepiece():
    """As Llama 2's: words begin with ▁, also the first; <s> in front; <image> and <pad> are added afterwards."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    t.train_from_iterator([TEXT], trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    trained = json.loads(t.to_str())["model"]
    vocab = trained["vocab"] | {f"<0x{i:02X}>": len(trained["vocab"]) + i for i in range(256)}
    t.model = models.BPE(vocab, [tuple(pair) for pair in trained["merges"]], unk_token="<unk>", byte_fallback=True)
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                   decoders.Strip(" ", 1, 0)])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   pad_token="<pad>", additional_special_tokens=["<image>"])


def byte_level():
    """As GPT-2's and Qwen's: no <s>, no padding token, and an eos that ends texts and not turns."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator([TEXT], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|endoftext|>",
                                   additional_special_tokens=["<|im_start|>", "<|im_end|>", "<image>"])


def write_checkpoint(folder, family):
    from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                              LlavaForConditionalGeneration, LlavaProcessor, MistralConfig, Qwen2Config, SiglipVisionConfig)
    config = {"vicuna": LlamaConfig, "chatml": LlamaConfig, "interleave": Qwen2Config, "mistral": MistralConfig}[family]
    tokenizer = sentencepiece() if family in ("vicuna", "mistral") else byte_level()
    more = {"sliding_window": 4} if family == "mistral" else {}
    siglip, tied = family == "interleave", family in TIED
    text = config(**SIZE, **more, vocab_size=len(tokenizer) + 3, tie_word_embeddings=tied,
                  pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(LlavaConfig(
        text_config=text, vision_config=(SiglipVisionConfig if siglip else CLIPVisionConfig)(**VISION),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=4, tie_word_embeddings=tied,
        vision_feature_select_strategy="full" if siglip else "default")).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    # without patch_size, as old checkpoints are
    LlavaProcessor(images, tokenizer, chat_template=TEMPLATES[family]).save_pretrained(folder)


@pytest.fixture(scope="module", params=TEMPLATES)
def family(request, tmp_path_factory):
    """(name, folder, backbone)"""
    folder = tmp_path_factory.mktemp("llava") / request.param
    write_checkpoint(folder, request.param)
    backbone = data.Backbone(folder, "cpu")
    tied = backbone.llava.lm_head.weight is backbone.llava.get_input_embeddings().weight
    assert tied == (request.param in TIED)
    return request.param, folder, backbone


def prompted(backbone, kind, rows=2):
    torch.manual_seed(1)
    fusion = fusions.build(kind, backbone.decoder, encoder_width=8, layers=[3, 5], tokens=4, hidden=16)
    if fusion.has_gate:
        fusion.set_gates(0.5)
    ids, slots = backbone.prompt(data.SOUND_PROMPT, 4 * (kind == "concat"))
    return fusion, torch.tensor([ids] * rows), slots and torch.tensor([slots] * rows), torch.randn(rows, 5, 8)


# ---------------------------------------------------------------- chat formats

def test_prompts_and_answers_are_the_templates_to_the_byte(family):
    name, _, backbone = family
    plain, pictured, answer = EXPECTED[name]
    assert (backbone.chat("Hi"), backbone.chat("Hi", image=True)) == (plain, pictured)
    bos = [1] if name in ("vicuna", "mistral") else []
    ids, none = backbone.prompt("Hi")
    assert none is None and ids[:len(bos)] == bos and backbone.tokenizer.decode(ids[len(bos):]) == plain
    whole = ids + backbone.caption_ids("Hi", "Yo")
    assert backbone.tokenizer.decode(whole[len(bos):]) == plain + answer
    assert whole == backbone.tokenizer(plain + answer).input_ids              # as if it were one text
    end, caption = answer.removeprefix(" ")[2:], "a dog barks, \"twice\" \U0001f600"
    assert [backbone.eos] == backbone.tokenizer(end, add_special_tokens=False).input_ids
    assert backbone.text(backbone.caption_ids("Hi", caption)) == caption
    slotted, slots = backbone.prompt("Hi", 4)
    pictured = backbone.tokenizer(pictured).input_ids
    assert [slotted[k] for k in slots] == [backbone.pad] * 4 and len(pictured) > len(ids)
    assert [t for k, t in enumerate(slotted) if k not in slots] == [
        t for t in pictured if t != backbone.llava.config.image_token_id]


def changed(folder, out, template):
    """A copy of a checkpoint with another chat template; None: without one."""
    shutil.copytree(folder, out)
    (out / "chat_template.jinja").unlink()
    if template is not None:
        (out / "chat_template.jinja").write_text(template)
    return out


def test_a_prompt_that_ends_in_a_space_is_followed_by_the_answers_own_tokens(family, tmp_path):
    """Read together, the space would belong to the answer's first word."""
    template = TEMPLATES["vicuna"].replace("ASSISTANT:", "ASSISTANT: ")
    backbone = data.Backbone(changed(family[1], tmp_path / "spaced", template), "cpu")
    ids = backbone.caption_ids("Hi", "dog")
    assert ids == backbone.tokenizer("dog", add_special_tokens=False).input_ids + [backbone.eos]
    assert backbone.text(backbone.prompt("Hi")[0] + ids).endswith("ASSISTANT: dog")


@pytest.mark.parametrize("ending, between", [(">", " "), (">\n", "")])
def test_a_template_that_renders_no_answers(family, tmp_path, ending, between):
    users_only = "{% if m.role != 'user' %}{{ raise_exception('no answers') }}{% endif %}"
    template = "{% for m in messages %}" + users_only + PARTS + "{% endfor %}{{ '" + ending + "' }}"
    backbone = data.Backbone(changed(family[1], tmp_path / "users", template), "cpu")
    assert backbone.chat("Hi") == "Hi" + ending and backbone.before_answer == between
    assert backbone.eos == backbone.tokenizer.eos_token_id


@pytest.mark.parametrize("template, image, message", [
    (None, None, "does not have a chat template"),
    ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", None, "can only concatenate str"),
    ("{% for m in messages %}{{ m.role }}{% endfor %}", None, "it does not"),
    (TEMPLATES["vicuna"], 7, "one token 7, <image>")])
def test_a_checkpoint_that_cannot_be_asked_about_images_is_one_line(family, tmp_path, template, image, message):
    broken = changed(family[1], tmp_path / "broken", template)
    if image:
        path = broken / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_index": image, "image_token_id": image}))
    with pytest.raises(data.InputError, match=message) as error:
        data.Backbone(broken, "cpu")
    text = str(error.value)
    assert text.startswith(str(broken)) and "chat_template.jinja" in text and "\n" not in text


# ---------------------------------------------------------------- identities

@pytest.mark.parametrize("kind", fusions.SYSTEMS)
def test_closed_absent_split_and_greedy(family, kind):
    _, _, backbone = family
    fusion, ids, slots, frames = prompted(backbone, kind)
    llava, decoder = backbone.llava, backbone.decoder

    def texts(*branches):
        return [c[0]["text"] for c in evaluate.decode(backbone, branches, [data.SOUND_PROMPT] * 2, beams=2)]

    with torch.inference_mode():
        before, untouched = llava(input_ids=ids).logits, texts()
        with fusion.attach(decoder, frames, slots=slots):
            opened = llava(input_ids=ids).logits
            rows = evaluate.generate(backbone, ids, 1, False)
            best = llava(input_ids=rows).logits[:, ids.shape[1] - 1:-1].argmax(-1)
            new = rows[:, ids.shape[1]:]
            trunk, head = fusions.split(decoder, 3)
            states = trunk(input_ids=ids, use_cache=False).last_hidden_state
            states = head(inputs_embeds=states, use_cache=False).last_hidden_state
            assert torch.equal(llava.lm_head(states), opened)
        length, _ = evaluate.lengths(new, backbone.eos)
        for a, b, n in zip(new, best, length):
            assert n > 3 and torch.equal(a[:n], b[:n])
        assert (opened - before).abs().max() > 1e-2
        with fusion.attach(decoder):
            assert torch.equal(llava(input_ids=ids).logits, before)
        if fusion.has_gate:
            fusion.set_gates(0.0)
            with fusion.attach(decoder, frames, slots=slots):
                assert torch.equal(llava(input_ids=ids).logits, before)
            assert texts(Branch(fusion, list(frames))) == untouched
        assert texts(Branch(fusion)) == untouched or kind == "concat"
        assert torch.equal(llava(input_ids=ids).logits, before)


@pytest.mark.parametrize("kind", fusions.SYSTEMS)
def test_samples_of_a_tree_are_rows_of_their_own(family, kind, request):
    name, _, backbone = family
    if name == "mistral":  # the tree's mask does not know of a sliding window
        request.applymarker(pytest.mark.xfail(strict=True))
    fusion, ids, slots, frames = prompted(backbone, kind)
    decoder, lm_head, P = backbone.decoder, backbone.llava.lm_head, ids.shape[1]
    with fusion.attach(decoder):
        trunk, head = fusions.split(decoder, 3)
    with torch.no_grad(), fusion.attach(decoder, frames, slots=slots):
        tree = scst.sample_tree(decoder, lm_head, ids, 5, layer=3, eos=backbone.eos, limit=7, temperature=0.5, fusion=fusion)
        hidden = head(inputs_embeds=tree.states, position_ids=tree.position_ids, attention_mask=tree.attention_mask,
                      use_cache=False).last_hidden_state
        together = tree.logprobs(hidden, lm_head, 0.5) * tree.mask
        new = torch.tensor([s + [backbone.pad] * (tree.mask.shape[1] - len(s)) for s in tree.samples()])
        rows = torch.cat([ids.repeat_interleave(5, 0), new], 1)
        hidden = decoder(input_ids=rows, use_cache=False).last_hidden_state[:, P - 1:-1]
        separately = evaluate.token_logprobs(lm_head(hidden) / 0.5, new) * tree.mask
    assert tree.mask.shape[1] > 3
    torch.testing.assert_close(together, separately, atol=1e-3, rtol=1e-4)


def test_answers_about_images(family, tmp_path):
    """With an image: closed, absent, and likelihoods; the answer ends with the template's end token."""
    _, _, backbone = family
    rng, questions = np.random.default_rng(0), []
    for i, text in enumerate(["What is it?", "Is it a dog, or rain on the roof?", "Hi"]):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"{i}.png")
        questions.append(data.Question(str(i), tmp_path / f"{i}.png", text, "a dog", ""))
    probe = evaluate.Probe(backbone, questions, 2)
    untouched = probe.run()
    for q, answer in zip(questions, untouched):
        batch = backbone.processor(text=backbone.chat(q.question, image=True), images=Image.open(q.image), return_tensors="pt")
        end = torch.tensor([backbone.caption_ids(q.question, "a dog")])
        n, whole = end.shape[1], torch.cat([batch.input_ids, end], 1)
        with torch.inference_mode():
            logits = backbone.llava(input_ids=whole, pixel_values=batch.pixel_values).logits[:, -n - 1:-1]
        assert answer["nll"] == pytest.approx(-evaluate.token_logprobs(logits, end).mean().item(), rel=1e-4)
    fusion, _, _, frames = prompted(backbone, "additive", 3)
    assert probe.run([Branch(fusion)]) == untouched != probe.run([Branch(fusion, list(frames))])
    fusion.set_gates(0.0)
    assert probe.run([Branch(fusion, list(frames))]) == untouched
    concat = Branch(prompted(backbone, "concat", 3)[0], list(frames))
    assert len(probe.run([concat])) == 3 and probe.run([concat]) != untouched


def test_an_answer_stops_at_the_templates_end(family, tmp_path, monkeypatch):
    """Whatever the generation config holds."""
    _, _, backbone = family
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    probe = evaluate.Probe(backbone, [data.Question("0", tmp_path / "a.png", "Hi", "yes", "")], 1)
    batch, _ = probe.batches[0]
    new = backbone.llava.generate(**batch, max_new_tokens=9, do_sample=False)[0, batch["input_ids"].shape[1]:].tolist()
    end = next(k for k in range(1, 9) if new[k] not in new[:k])
    monkeypatch.setattr(backbone, "eos", new[end])
    assert probe.run()[0]["answer"] == backbone.text(new[:end + 1]) != backbone.text(new)
