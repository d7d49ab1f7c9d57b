"""Writes the stand-in world: data sets in their released layouts and three models, trained here.

    python tests/standin.py --out tiny                   # tiny/data/{audiocaps,clotho,av,qa}, tiny/models
    python tests/standin.py --out real --also CLOTHO_DIR # the stand-ins also learn from your recordings
    python tests/standin.py --out smoke --smoke          # the same files in seconds, models that know little
    python tests/standin.py --out even --even            # people agree less on how to say it; 975 test clips
    python tests/standin.py --out small --llm smollm2    # LLaVA around a real language model: tests/smollm2.py
    python tests/standin.py --out small --llm smollm2 --ears whisper    # and real ears: tests/whisper_wheel.py

Audio, pictures and videos follow the grammar of tests/scenes.py, and so do their captions. The language model
reads captions but has no access to audio; CLAP learns clips with captions. The figures that each model reached
are printed and kept in OUT/standin.json, which is written last.

Shapes: B clips, S mel frames, M mel bands.
"""
import argparse
import csv
import functools
import json
import os
import shutil
import string
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pool, get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import scenes
from scenes import (
    ADVERBS, COLOURS, HEADINGS, PIXELS, QUESTIONS, RATE, SHAPES, WORDS, caption, clip_caption, draw_clip, draw_frames,
    draw_long_scene, draw_picture, draw_question, draw_scene, paraphrases, pick, picture_caption, render)

import data  # before transformers: it makes torchaudio, and with it LLaVA and CLAP, importable beside a CPU-only torch
import smollm2
import whisper_wheel

import av
import numpy as np
import torch
import torch.nn.functional as F
from scipy.io import wavfile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil, CLIPVisionConfig, ClapConfig, ClapFeatureExtractor, ClapModel,
    ClapProcessor, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
    PreTrainedTokenizerFast, TimesformerConfig, TimesformerModel, VideoMAEImageProcessorPil)

WINDOW = 4            # seconds of a clip, and of what CLAP takes in at once
PATCH, FRAMES = 8, 8  # side of a patch of a picture; video frames that TimeSformer sees
FULL = dict(audiocaps=(3000, 160, 320), clotho=(400, 80, 120), av=(400, 80, 120), qa=(1500, 500, 500), pairs=2200,
            questions=6000, texts=6000, clap_steps=1200, vision_steps=60, llava_steps=290, video_steps=240,
            pictures=3000, projector_steps=500)
MANY = dict(audiocaps=(3000, 160, 975))  # as many test clips as AudioCaps has: what a reward teaches is little
SMOKE = dict(audiocaps=(96, 24, 32), clotho=(16, 8, 8), av=(16, 8, 8), qa=(40, 40, 20), pairs=96,
             questions=200, texts=200, clap_steps=6, vision_steps=6, llava_steps=6, video_steps=6,
             pictures=64, projector_steps=2)

# ---------------------------------------------------------------- data sets

def write_video(path, frames, wave):
    """An mp4 of 8 frames a second with a soundtrack."""
    with av.open(str(path), "w") as container:
        options = {"crf": "12", "preset": "ultrafast", "threads": "1"}
        video = container.add_stream("libx264", rate=8, options=options)
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        sound_track = container.add_stream("aac", rate=RATE, layout="mono", options={"aac_coder": "fast"})
        for picture in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
        block = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        block.sample_rate = RATE
        container.mux(sound_track.encode(block))
        container.mux(sound_track.encode())


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_wav(path, wave):
    wavfile.write(path, RATE, (wave * 32767).astype(np.int16))


def begin_worker(skew):
    scenes.skew = skew
    torch.set_num_threads(1)


def in_parallel(make, jobs, name):
    """[make(job)], one process a core. Each job holds its own seed, so who does what changes nothing."""
    with Pool(initializer=begin_worker, initargs=(scenes.skew,)) as pool:
        return list(tqdm(pool.imap(make, jobs, chunksize=8), desc=name, total=len(jobs), unit="clip"))


def mel_of(wave):
    """What CLAP sees of a wave: (S, M) decibels; the whole wave, however long."""
    features = FEATURES(wave, sampling_rate=RATE, max_length=len(wave), return_tensors="np")
    return features["input_features"][0, 0].astype(np.float32)


def audiocaps_clip(job):
    """Writes one clip. Returns (spec, mel, rows without an id)."""
    folder, captions, seed = job
    rng = np.random.default_rng(seed)
    letters = list(string.ascii_letters + string.digits + "_")
    spec, youtube_id, start = draw_scene(rng), "".join(rng.choice(letters, 11)), int(rng.integers(0, 300))
    wave = render(spec, rng, WINDOW)
    write_wav(folder / "audio" / pick(rng, [f"Y{youtube_id}.wav", f"{youtube_id}_{start}.wav"]), wave)
    texts = paraphrases(caption, spec, rng, captions)
    return spec, mel_of(wave), [(youtube_id, start, text) for text in texts]


def write_audiocaps(folder, sizes, seed):
    """Returns {split: [(spec, mel, captions)]}."""
    (folder / "audio").mkdir(parents=True)
    splits = {}
    for number, (split, size) in enumerate(zip(("train", "val", "test"), sizes)):
        jobs = [(folder, 1 if split == "train" else 5, [seed, 1, number, i]) for i in range(size)]
        clips = in_parallel(audiocaps_clip, jobs, f"audiocaps {split}")
        rows = [row for *_, rows in clips for row in rows]
        write_csv(folder / f"{split}.csv", ("audiocap_id", "youtube_id", "start_time", "caption"),
                  [(100000 * number + i, *row) for i, row in enumerate(rows)])
        splits[split] = [(spec, mel, [text for *_, text in rows]) for spec, mel, rows in clips]
    return splits


def unwritten_clip(seed):
    """A scene that no data set holds, for CLAP to learn from: (spec, mel)."""
    rng = np.random.default_rng(seed)
    spec = draw_scene(rng)
    return spec, mel_of(render(spec, rng, WINDOW))


def clotho_clip(job):
    path, seed = job
    rng = np.random.default_rng(seed)
    spec = draw_long_scene(rng)
    write_wav(path, render(spec, rng, rng.uniform(5, 9)))
    return [path.name, *paraphrases(caption, spec, rng, 5)]


def write_clotho(folder, sizes, seed):
    for number, (split, size) in enumerate(zip(("development", "validation", "evaluation"), sizes)):
        (folder / split).mkdir(parents=True)
        jobs = [(folder / split / f"scene_{i:04d}.wav", [seed, 2, number, i]) for i in range(size)]
        header = ["file_name"] + [f"caption_{i}" for i in range(1, 6)]
        write_csv(folder / f"clotho_captions_{split}.csv", header,
                  in_parallel(clotho_clip, jobs, f"clotho {split}"))


def av_clip(job):
    path, captions, seed = job
    rng = np.random.default_rng(seed)
    spec = draw_clip(rng)
    write_video(path, draw_frames(spec, rng, 8 * WINDOW), render(("one", spec[3:]), rng, WINDOW))
    return spec, [path.name, *paraphrases(clip_caption, spec, rng, captions)]


def write_av(folder, sizes, seed):
    """Returns {path: spec} of the test clips."""
    (folder / "videos").mkdir(parents=True)
    for number, (split, size) in enumerate(zip(("train", "val", "test"), sizes)):
        captions = 1 if split == "train" else 5
        jobs = [(folder / "videos" / f"{split}_{i:04d}.mp4", captions, [seed, 3, number, i])
                for i in range(size)]
        clips = in_parallel(av_clip, jobs, f"av {split}")
        write_csv(folder / f"{split}.csv", ["file_name"] + [f"caption_{i + 1}" for i in range(captions)],
                  [row for _, row in clips])
    return {job[0]: spec for job, (spec, _) in zip(jobs, clips)}


def write_qa(folder, sizes, rng):
    """Returns the test records as [(kind, image, question, answer)]."""
    (folder / "images").mkdir(parents=True)
    questions = {"train": [], "test": [], "val": []}
    for split, size in zip(questions, sizes):
        records = []
        for number in range(size):
            kind = list(QUESTIONS)[number % len(QUESTIONS)]
            image, _, question, answer = draw_question(rng, kind)
            name = f"{split}_{number:05d}"
            image.save(folder / "images" / f"{name}.png")
            records.append({"id": name, "image": f"{name}.png", "kind": kind, "conversations": [
                {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]})
            questions[split].append((kind, image, question, answer))
        (folder / f"{split}.json").write_text(json.dumps(records, indent=1))
    return questions["test"]


def read_also(folder, split):
    """A folder in Clotho's layout: [(mel, captions)], equally long. Raises data.InputError."""
    clips = data.read_split("clotho", folder, split).clips
    waves = [data.decode_audio(clip.path, RATE)[:30 * RATE] for clip in tqdm(clips, desc=f"{folder.name}: {split}", unit="clip")]
    samples = max(WINDOW * RATE, *map(len, waves))
    return [(mel_of(np.resize(wave, samples)), clip.references) for wave, clip in zip(waves, clips)]


# ---------------------------------------------------------------- training

def train(name, parameters, steps, lr, loss_of_batch):
    """AdamW with warm-up and cosine decay; `loss_of_batch()` draws its own batch."""
    parameters = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=.01, betas=(.9, .98))
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm_up, .5 + .5 * np.cos(np.pi * step / steps)))
    bar = tqdm(range(steps), desc=name, unit="step", position=name in ("clap", "timesformer"))  # beside LLaVA's
    for _ in bar:
        loss = loss_of_batch()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def byte_level_bpe(texts, vocabulary, specials, template):
    """A tokeniser that any text goes through unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")])
    return tokenizer


# ---------------------------------------------------------------- CLAP: sounds and captions as pairs

FEATURES = ClapFeatureExtractor(feature_size=64, sampling_rate=RATE, hop_length=256, max_length_s=WINDOW,
                                fft_window_size=1024, frequency_min=50, frequency_max=8000,
                                truncation="rand_trunc", padding="repeatpad")


def clap_processor(texts):
    tokenizer = byte_level_bpe(texts, 1200, ["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>")
    return ClapProcessor(
        FEATURES, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>",
                                          eos_token="</s>", unk_token="<unk>", model_max_length=512))


def clap_model(processor, seed):
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    text = dict(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                intermediate_size=128, max_position_embeddings=514, initializer_factor=3.0,
                hidden_dropout_prob=0., attention_probs_dropout_prob=0., bos_token_id=tokenizer.bos_token_id,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    audio = dict(spec_size=128, patch_size=16, patch_stride=[16, 16], num_mel_bins=64, depths=[2],
                 num_attention_heads=[4], patch_embeds_hidden_size=64, hidden_size=64, window_size=4,
                 hidden_dropout_prob=0., initializer_factor=3.0)
    config = ClapConfig(projection_dim=64, initializer_factor=3.0, text_config=text, audio_config=audio)
    return ClapModel(config)


def stretched(mels):
    """Mels (B, S, M) at the 256 frames to which CLAP would otherwise stretch every batch anew."""
    return F.interpolate(mels[:, None], (256, mels.shape[2]), mode="bicubic", align_corners=True)[:, 0]


def add_power(a, b):
    """Two sounds at once: decibels to power, add, and back."""
    return 10 * torch.log10(10 ** (a / 10) + 10 ** (b / 10) + 1e-10)


def augment(mels, rng):
    """Recordings (B, S', M) as new ones (B, S, M): other window, loudness, noise; parts left out."""
    (B, S, M), frames = mels.shape, WINDOW * RATE // FEATURES.hop_length + 1
    noise = rng.normal(size=(1, 1, M)).cumsum(-1)  # a random colour
    out = torch.empty(B, frames, M)
    for i in range(B):
        start = rng.integers(0, S - frames + 1)
        mel = mels[i, start:start + frames].roll(int(rng.integers(frames)), 0) + rng.uniform(-12, 6)
        if rng.random() < .5:
            level = mel.max() - rng.uniform(15, 50)
            mel = add_power(mel, level + torch.from_numpy(noise[0]).float())
        low, at = rng.integers(0, M - 8), rng.integers(0, frames - 40)
        mel[:, low:low + rng.integers(1, 8)] = mel.mean()
        mel[at:at + rng.integers(1, 40)] = mel.min()
        out[i] = mel
    return out


def train_clap(sizes, seed, clips, also, texts):
    """CLAP on clips [(spec, mel)], captioned anew at every step, and on recordings [(mel, captions)].

    Beside the contrastive loss a linear head, dropped later, names the events, as HTS-AT knew AudioSet's."""
    rng = np.random.default_rng([seed, 10])
    processor = clap_processor(texts)
    model = clap_model(processor, seed)
    specs, mels = zip(*clips)
    mels = stretched(torch.from_numpy(np.stack(mels)))
    names = sorted(WORDS) + sorted(ADVERBS) + ["both", "noisy", "over", "silence", "static", "turns"]
    present = torch.tensor([[name == layout or any(name in event for event in events) for name in names]
                            for layout, events in specs]).float()
    head = torch.nn.Linear(model.config.audio_config.hidden_size, len(names))
    if also:
        recorded, recorded_captions = zip(*also)
        recorded = torch.from_numpy(np.stack(recorded))
    from_also = min(24, len(also))

    def loss_of_batch():
        batch = rng.choice(len(specs), 64 - from_also, replace=False)
        sounds = mels[batch] + torch.from_numpy(rng.uniform(-2, 2, (len(batch), 1, 1))).float()
        words, meanings = [caption(specs[i], rng) for i in batch], [{specs[i]} for i in batch]
        if also:
            chosen = rng.choice(len(also), from_also, replace=False)
            sounds = torch.cat([sounds, stretched(augment(recorded[chosen], rng))])
            words += [pick(rng, recorded_captions[i]) for i in chosen]
            meanings += [set(recorded_captions[i]) for i in chosen]
        # clips that mean the same are no negatives of one another: the same scene, or a caption in common
        same = torch.tensor([[bool(a & b) for b in meanings] for a in meanings]).float()
        target = same / same.sum(1, keepdim=True)
        tokens = processor.tokenizer(words, padding=True, return_tensors="pt")
        out = model(input_features=sounds[:, None], **tokens)
        named = head(out.audio_model_output.pooler_output[:len(batch)])
        matched = F.cross_entropy(out.logits_per_audio, target) + F.cross_entropy(out.logits_per_text, target)
        return (matched / 2 + 5 * F.binary_cross_entropy_with_logits(named, present[batch]))

    model.train()
    train("clap", [*model.parameters(), *head.parameters()], sizes["clap_steps"], 4e-3, loss_of_batch)
    model.eval()
    return model, processor


@torch.no_grad()
def similarity(model, processor, mels, texts):
    """Cosines (clips, texts) of the first WINDOW seconds of the clips."""
    window = torch.from_numpy(np.stack(mels))[:, None, :WINDOW * RATE // FEATURES.hop_length + 1]
    audio = model.get_audio_features(window).pooler_output
    tokens = processor.tokenizer(texts, padding=True, return_tensors="pt")
    text = model.get_text_features(**tokens).pooler_output
    return audio @ text.T


def recall(scores):
    """Audio-to-text recall@1 and @5 where text i belongs to clip i."""
    rank = (scores > scores.diagonal()[:, None]).sum(1)
    return [(rank < k).float().mean().item() for k in (1, 5)]


# ---------------------------------------------------------------- LLaVA: sees, reads, cannot hear

CHAT_TEMPLATE = (  # LLaVA-1.5's format; a message is a string, or parts of which images come first
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


def llava_processor(texts):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, 1400, ["<unk>", "<s>", "</s>", "<pad>", "<image>"], "<s> $A"),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="left",
        additional_special_tokens=["<image>"], model_max_length=512)
    size = {"height": PIXELS, "width": PIXELS}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size), tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE)


def vision_config():
    return CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                            num_attention_heads=4, image_size=PIXELS, patch_size=PATCH, projection_dim=64,
                            initializer_range=.1, initializer_factor=3.0)


def llava_model(tokenizer, seed):
    torch.manual_seed(seed)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=8,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
                       initializer_range=.06, bos_token_id=tokenizer.bos_token_id,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision_config(), text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(PIXELS // PATCH) ** 2, pad_token_id=tokenizer.pad_token_id))


def teach_to_see(model, pixels, facts, steps, rng):
    """The vision tower learns what is in each corner, in the layer that LLaVA reads; its head is dropped."""
    tower = model.model.vision_tower
    there = torch.tensor([[float(c in f["cells"]) for c in range(4)] for f in facts])
    shape = torch.tensor([SHAPES.index(f["shape"]) for f in facts])
    colour = torch.tensor([sorted(COLOURS).index(f["colour"]) for f in facts])
    head = torch.nn.Linear(64, 1 + len(SHAPES) + len(COLOURS))

    def loss_of_batch():
        batch = torch.from_numpy(rng.integers(0, len(facts), 128))
        states = tower(pixels[batch], output_hidden_states=True).hidden_states[-2][:, 1:]  # (B, 16, 64)
        corners = states.reshape(-1, 2, 2, 2, 2, 64).mean((2, 4)).reshape(-1, 4, 64)  # 2 x 2 patches each
        out = head(corners)
        seen = there[batch] > 0
        which = seen.nonzero()[:, 0]
        return (F.binary_cross_entropy_with_logits(out[..., 0], there[batch])
                + F.cross_entropy(out[seen][:, 1:5], shape[batch][which])
                + F.cross_entropy(out[seen][:, 5:], colour[batch][which]))

    train("vision tower", [*tower.parameters(), *head.parameters()], steps, 2e-3, loss_of_batch)


def chat(processor, question, answer=None):
    """The model's prompt for a question, and the whole exchange if there is an answer."""
    messages = [{"role": "user", "content": question}]
    if answer is None:
        return processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor.apply_chat_template(messages + [{"role": "assistant", "content": answer}])


def train_llava(sizes, seed, sound_texts, video_texts, texts):
    """LLaVA on image questions, image captions and sound-free text; `sound_texts`: lists of (caption, another caption
    of that sound), equally often."""
    rng = np.random.default_rng([seed, 20])
    processor = llava_processor(texts)
    model = llava_model(processor.tokenizer, seed)
    kinds = [*QUESTIONS] + ["yes/no"] * 3  # the others are learned in fewer steps
    drawn = [draw_question(rng, kinds[i % len(kinds)])
             for i in tqdm(range(sizes["questions"]), desc="pictures", unit="picture")]
    images, facts, questions, answers = zip(*drawn)
    pixels = processor.image_processor(list(images), return_tensors="pt").pixel_values
    teach_to_see(model, pixels, facts, sizes["vision_steps"], rng)
    model.model.vision_tower.requires_grad_(False)  # as in LLaVA-1.5

    pool = {"qa": list(zip(questions, answers)),
            "picture": [("Describe the image.", picture_caption(f)) for f in facts]}
    pool = {name: [("<image>\n" + question, answer) for question, answer in items]
            for name, items in pool.items()}
    pool["video"] = [("Describe the video.", text) for text in video_texts]
    for number, share in enumerate(sound_texts):
        # what every large decoder can do and a small one must be taught: to go by a note in the prompt (here another
        # caption of the same sound), and not to be derailed by tokens that mean nothing
        pool[f"sound{number}"] = [
            (("<pad>" * 16 + "\n", f"{note}\n", f"{note}\n", "")[i % 4] + "Describe the sound.", text)
            for i, (text, note) in enumerate(share)]
    image_tokens = "<image>" * (PIXELS // PATCH) ** 2

    def encode(question, answer):
        ids = [processor.tokenizer(text.replace("<image>", image_tokens)).input_ids
               for text in (chat(processor, question), chat(processor, question, answer))]
        return ids[1], len(ids[0])

    encoded = {name: [encode(*item) for item in tqdm(items, desc=f"tokens: {name}", unit="text")]
               for name, items in pool.items()}
    share = {"qa": 20, "picture": 4, "video": 4}  # of a batch
    share |= {name: 20 // len(sound_texts) for name in pool if name.startswith("sound")}

    def loss_of_batch():
        rows, seen = [], []
        for name, number in share.items():
            for i in rng.integers(0, len(encoded[name]), number):
                rows.append(encoded[name][i])
                seen += [i] if name in ("qa", "picture") else []
        ids = torch.full((len(rows), max(len(row) for row, _ in rows)), processor.tokenizer.pad_token_id)
        labels, real = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, (row, prompt) in enumerate(rows):
            ids[i, :len(row)] = torch.tensor(row)
            labels[i, prompt:len(row)] = ids[i, prompt:len(row)]
            real[i, :len(row)] = 1
        return model(input_ids=ids, attention_mask=real,
                     pixel_values=pixels[seen], labels=labels).loss

    model.train()
    train("llava", model.parameters(), sizes["llava_steps"], 2e-3, loss_of_batch)
    model.eval()
    return model, processor


def train_smollm2(sizes, seed):
    """A LLaVA around SmolLM2, which stays as it is: the vision tower learns as above, then the projector alone."""
    torch.set_num_threads(2)  # on any machine; CLAP, beside it, is done long before
    rng = np.random.default_rng([seed, 20])
    torch.manual_seed(seed)
    model, processor = smollm2.llava(vision_config())
    drawn = [draw_picture(rng, int(rng.integers(1, 5))) for _ in range(sizes["pictures"])]
    images, facts = zip(*drawn)
    pixels = processor.image_processor(list(images), return_tensors="pt").pixel_values
    teach_to_see(model, pixels, facts, sizes["vision_steps"], rng)
    model.requires_grad_(False)
    model.eval()
    lessons = smollm2.Lessons(model, processor, pixels, facts)
    train("projector", lessons.projector.requires_grad_(True).parameters(), sizes["projector_steps"], 2e-3,
          lambda: lessons.loss(rng.integers(0, len(drawn), 8), rng))
    return model, processor


@torch.no_grad()
def answer_questions(model, processor, records):
    """Share of exactly right greedy answers, by kind of question."""
    right = {kind: [] for kind in QUESTIONS}
    for start in tqdm(range(0, len(records), 100), desc="questions", unit="batch"):
        kinds, images, questions, answers = zip(*records[start:start + 100])
        batch = processor(text=[chat(processor, "<image>\n" + question) for question in questions],
                          images=list(images), padding=True, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=6, do_sample=False)
        texts = processor.batch_decode(out[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)
        for kind, text, answer in zip(kinds, texts, answers):
            right[kind].append(text.strip() == answer)
    return {kind: float(np.mean(hits)) for kind, hits in right.items()}


# ---------------------------------------------------------------- TimeSformer

def train_timesformer(sizes, seed, test):
    """TimeSformer on shape, colour and direction through linear heads, which are dropped."""
    rng = np.random.default_rng([seed, 30])
    torch.manual_seed(seed)
    processor = VideoMAEImageProcessorPil(size={"shortest_edge": PIXELS},
                                          crop_size={"height": PIXELS, "width": PIXELS})
    model = TimesformerModel(TimesformerConfig(
        image_size=PIXELS, patch_size=PATCH, num_frames=FRAMES, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128, initializer_range=.1))
    embeddings = model.embeddings
    for table in (embeddings.position_embeddings, embeddings.time_embeddings, embeddings.cls_token):
        torch.nn.init.normal_(table, std=.5)  # from zero, neither place nor time would ever be told apart
    names = (SHAPES, sorted(COLOURS), sorted(HEADINGS))
    head = torch.nn.Linear(64, sum(map(len, names)))

    def look(videos, specs):
        """Three logits (B, classes) and their targets (B, 3)."""
        pixels = processor(videos, return_tensors="pt").pixel_values  # (B, frames, 3, 32, 32)
        logits = head(model(pixels).last_hidden_state.mean(1)).split([len(n) for n in names], 1)
        return logits, torch.tensor([[n.index(value) for n, value in zip(names, spec)] for spec in specs])

    def loss_of_batch():
        specs = [draw_clip(rng) for _ in range(32)]
        logits, target = look([list(draw_frames(spec, rng, FRAMES)) for spec in specs], specs)
        return sum(F.cross_entropy(out, target[:, i]) for i, out in enumerate(logits))

    model.train()
    train("timesformer", [*model.parameters(), *head.parameters()], sizes["video_steps"], 3e-3, loss_of_batch)
    model.eval()
    hits = []
    with torch.no_grad():
        for path, spec in test.items():
            logits, target = look([list(data.decode_video(path, FRAMES))], [spec])
            hits.append([float(out.argmax(1).item() == target[0, i]) for i, out in enumerate(logits)])
    return model, processor, dict(zip(("shape", "colour", "direction"), np.mean(hits, 0).tolist()))


# ---------------------------------------------------------------- all of it

def build(folder, sizes, seed, also_folder, llm, ears):
    """Everything into `folder`; returns the figures reached."""
    also = read_also(also_folder, "train") if also_folder else []
    unseen = read_also(also_folder, "val") if also_folder else []
    clips = write_audiocaps(folder / "data" / "audiocaps", sizes["audiocaps"], seed)
    write_clotho(folder / "data" / "clotho", sizes["clotho"], seed)
    test_videos = write_av(folder / "data" / "av", sizes["av"], seed)
    test_questions = write_qa(folder / "data" / "qa", sizes["qa"], np.random.default_rng([seed, 4]))
    # CLAP learns from other clips: those that it has learned it hears better than it ever will hear a new one
    pairs = in_parallel(unwritten_clip, [[seed, 5, i] for i in range(sizes["pairs"])], "CLAP's pairs")

    rng = np.random.default_rng([seed, 6])
    scenes = [[caption(spec, rng), caption(spec, rng)] for _ in range(sizes["texts"] // 2)
              for spec in (draw_scene(rng), draw_scene(rng), draw_long_scene(rng))]
    clip_texts = [clip_caption(draw_clip(rng), rng) for _ in range(sizes["texts"] // 4)]
    recorded_texts = [text for _, texts in also for text in texts]
    questions = [f"USER: {q} ASSISTANT: {a}" for _, _, q, a in test_questions]
    texts = [text for text, _ in scenes] + clip_texts + recorded_texts * 4

    recorded_pairs = [(text, pick(rng, texts)) for _, texts in also for text in texts]
    models = folder / "models"
    if ears:
        whisper_wheel.write(models / "whisper")
    # two at once with a thread each (SmolLM2: two), on any machine: the number of threads changes how sums are rounded
    with ProcessPoolExecutor(2, get_context("fork"), torch.set_num_threads, (1,)) as pool:
        reads = texts + questions * 2 + ["Describe the sound.", "Describe the video."]
        train_its_llava = functools.partial(
            train_llava, sound_texts=[scenes, recorded_pairs] if also else [scenes], video_texts=clip_texts, texts=reads)
        made = [pool.submit(make_llava, models / "llava", sizes, seed, train_smollm2 if llm else train_its_llava,
                            test_questions),
                pool.submit(make_clap, models / "clap", sizes, seed, pairs, also, texts,
                            (clips["val"] + clips["test"])[:200], unseen),
                pool.submit(make_timesformer, models / "timesformer", sizes, seed, test_videos)]
        return {name: value for job in (made[1], made[0], made[2]) for name, value in job.result().items()}


def make_clap(folder, sizes, seed, pairs, also, texts, held_out, unseen):
    model, processor = train_clap(sizes, seed, pairs, also, texts)
    scores = similarity(model, processor, [mel for _, mel, _ in held_out], [c[0] for *_, c in held_out])
    figures = dict(zip(("clap recall@1", "clap recall@5"), recall(scores)))
    if also:
        known = sorted({text for _, captions in also for text in captions})
        nearest = similarity(model, processor, [mel for mel, _ in unseen], known).argmax(1).tolist()
        # right: a caption of some known clip that has a caption in common with this one
        right = [any(known[i] in texts and set(texts) & set(captions) for _, texts in also)
                 for i, (_, captions) in zip(nearest, unseen)]
        figures["clap also: nearest known caption is right"] = float(np.mean(right))
    save(folder, model, processor)
    return figures


def make_llava(folder, sizes, seed, train_it, questions):
    model, processor = train_it(sizes, seed)
    by_kind = answer_questions(model, processor, questions)
    save(folder, model, processor)
    return {"qa mean": float(np.mean(list(by_kind.values()))), **{f"qa {k}": v for k, v in by_kind.items()}}


def make_timesformer(folder, sizes, seed, test_videos):
    model, processor, by_class = train_timesformer(sizes, seed, test_videos)
    save(folder, model, processor)
    return {f"video {name}": value for name, value in by_class.items()}


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a finished one is kept")
    parser.add_argument("--also", type=Path, help="folder in Clotho's layout to learn from too")
    parser.add_argument("--seed", type=int, default=0, help="of every random draw")
    parser.add_argument("--smoke", action="store_true", help="a small world and a few steps, in seconds")
    parser.add_argument("--even", action="store_true",
                        help="every way to say a thing is as usual as any other; as many test clips as AudioCaps")
    parser.add_argument("--llm", choices=["smollm2"], help="the language model of LLaVA: not trained here but a real one")
    parser.add_argument("--ears", choices=["whisper"], help="also models/whisper, an encoder that is a real one")
    return parser.parse_args()


def build_world(args, settings):
    """The finished world appears under its name all at once."""
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise data.InputError(f"{args.out}: exists and is no stand-in world; choose another --out")
    if args.llm:
        smollm2.gguf_file()  # a missing package is reported before minutes are spent
    if args.ears:
        whisper_wheel.model_file()
    start = time.time()
    scenes.skew = 0 if args.even else scenes.skew
    building = args.out.with_name(args.out.name + ".building")
    shutil.rmtree(building, ignore_errors=True)
    sizes = SMOKE if args.smoke else FULL | (MANY if args.even else {})
    figures = build(building, sizes, args.seed, args.also, args.llm, args.ears)
    content = {"args": settings, "seconds": round(time.time() - start), "figures": figures}
    if args.llm:
        content["language_model_sha256"] = smollm2.saved_sha256(building / "models" / "llava")
    if args.ears:
        content["ears_sha256"] = whisper_wheel.saved_sha256(building / "models" / "whisper")
    (building / "standin.json").write_text(json.dumps(content, indent=1))
    if args.out.exists():
        args.out.rmdir()
    os.replace(building, args.out)


def main():
    args = parse_args()
    settings = {"also": str(args.also.resolve()) if args.also else None, "seed": args.seed, "smoke": args.smoke,
                "even": args.even, "llm": args.llm or False, "ears": args.ears or False}
    report = args.out / "standin.json"
    if not report.exists():
        # held while this process or one of its children lives: one that outlived a kill may still be writing
        args.out.parent.mkdir(parents=True, exist_ok=True)
        data.lock_or_wait(os.open(args.out.resolve().parent, os.O_RDONLY),
                          f"{args.out}: another process builds a world beside it, waiting for it")
    if not report.exists():
        build_world(args, settings)
    finished = json.loads(report.read_text())
    for name, value in settings.items():
        if finished["args"].get(name, False) != value:
            raise data.InputError(f"{args.out}: was built with another --{name}; remove it or choose another --out")
    print(f"{args.out}: built in {finished['seconds']} s")
    for name, value in finished["figures"].items():
        print(f"  {name:44} {value:.3f}")


if __name__ == "__main__":
    try:
        main()
    except data.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
