"""Writes the stand-in world: data sets in their released layouts and three models, trained here.

    python tests/standin.py --out tiny                   # tiny/data/{audiocaps,clotho,av,qa}, tiny/models
    python tests/standin.py --out real --also CLOTHO_DIR # the stand-ins also learn from your recordings
    python tests/standin.py --out smoke --smoke          # the same files in seconds, models that know little
    python tests/standin.py --out even --even            # people agree less on how to say it; 975 test clips

Sounds, pictures and videos are synthesised from a small grammar of events, the captions are written from the
same events. The language model reads captions but never hears a clip; CLAP learns clips with captions.
The figures that each model reached are printed and kept in OUT/standin.json, which is written last.

Shapes: B clips, S mel frames, M mel bands.
"""
import argparse
import csv
import json
import os
import shutil
import string
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pool, get_context
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's; clips are made by one process a core
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # first: it makes torchaudio, and with it LLaVA and CLAP, importable beside a CPU-only torch

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import signal
from scipy.io import wavfile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil, CLIPVisionConfig, ClapConfig, ClapFeatureExtractor, ClapModel,
    ClapProcessor, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
    PreTrainedTokenizerFast, TimesformerConfig, TimesformerModel, VideoMAEImageProcessorPil)

RATE, WINDOW = 16000, 4  # samples a second; seconds that CLAP hears at once
PIXELS, PATCH, FRAMES = 32, 8, 8  # side of an image and of a patch; video frames that TimeSformer sees
FULL = dict(audiocaps=(3000, 160, 320), clotho=(400, 80, 120), av=(400, 80, 120), qa=(1500, 500), pairs=2200,
            questions=6000, texts=6000, clap_steps=400, vision_steps=60, llava_steps=290, video_steps=240)
MANY = dict(audiocaps=(3000, 160, 975))  # as many test clips as AudioCaps has: what a reward teaches is little
SMOKE = dict(audiocaps=(96, 24, 32), clotho=(16, 8, 8), av=(16, 8, 8), qa=(40, 40), pairs=96,
             questions=200, texts=200, clap_steps=6, vision_steps=6, llava_steps=6, video_steps=6)

# ---------------------------------------------------------------- sounds

# kind: subjects, (present, gerund) pairs, nouns; every form reads well before "loudly" or "far away"
WORDS = {
    "dog": (["a dog", "a puppy"], [("barks", "barking"), ("yaps", "yapping")], ["bark", "yap"]),
    "bell": (["a bell", "a church bell"], [("rings", "ringing"), ("tolls", "tolling")], ["ring", "chime"]),
    "bird": (["a bird", "a songbird"], [("chirps", "chirping"), ("sings", "singing")], ["chirp", "song"]),
    "clock": (["a clock", "a watch"], [("ticks", "ticking"), ("ticks away", "ticking away")],
              ["tick", "ticking"]),
    "steps": (["a person", "someone"], [("walks", "walking"), ("steps along", "stepping along")],
              ["footsteps", "steps"]),
    "drip": (["water", "a tap"], [("drips", "dripping"), ("drops", "dropping")], ["drip", "drops"]),
    "drum": (["a drum", "a bass drum"], [("beats", "beating"), ("thumps", "thumping")], ["beat", "thump"]),
    "horn": (["a horn", "a car horn"], [("honks", "honking"), ("beeps", "beeping")], ["honk", "beep"]),
    "rain": (["rain", "heavy rain"], [("falls", "falling"), ("pours", "pouring")], ["patter", "splash"]),
    "engine": (["an engine", "a motor"], [("hums", "humming"), ("runs", "running")], ["hum", "rumble"]),
    "siren": (["a siren", "an alarm"], [("wails", "wailing"), ("sounds", "sounding")], ["wail", "howl"]),
    "bees": (["a bee", "an insect"], [("buzzes", "buzzing"), ("flies", "flying")], ["buzz", "buzzing"]),
    "wind": (["wind", "a breeze"], [("blows", "blowing"), ("whooshes", "whooshing")], ["whoosh", "gust"]),
    "whistle": (["a whistle", "a kettle"], [("whistles", "whistling"), ("shrills", "shrilling")],
                ["whistling", "shrill"]),
}
ADVERBS = {"loud": ["loudly", "very loudly"], "soft": ["softly", "quietly"], "near": ["nearby", "up close"],
           "far": ["far away", "far off"], "fast": ["quickly", "rapidly"],
           "slow": ["slowly", "at a slow pace"]}
ADJECTIVES = {"loud": "loud", "soft": "soft", "near": "close", "far": "distant",
              "fast": "rapid", "slow": "slow"}
GAIN = {"loud": 3.0, "soft": .2, "near": 1.6, "far": .4}
SPEED = {"fast": 2.2, "slow": .5}
PERIOD = {"dog": .6, "bell": 1., "bird": .45, "clock": .5, "steps": .55, "drip": .7, "drum": .5, "horn": .9}


def seconds_of(duration):
    return np.arange(int(duration * RATE)) / RATE


def noise_band(rng, samples, low, high):
    spectrum = np.fft.rfft(rng.normal(size=samples))
    frequency = np.fft.rfftfreq(samples, 1 / RATE)
    return np.fft.irfft(spectrum * (frequency > low) * (frequency < high), samples)


def saw(cycles):
    return 2 * (cycles % 1) - 1


def strike(kind, rng):
    """One hit of a repeating kind: a bark, a tick, a step."""
    detune = rng.uniform(.9, 1.1)
    if kind == "dog":
        t = seconds_of(.2)
        voice = saw(detune * (650 * t - 900 * t ** 2)) + .5 * noise_band(rng, len(t), 400, 2500)
        return voice * np.sin(np.pi * t / .2) ** .7
    if kind == "bell":
        t = seconds_of(.95)
        partials = ((880, 1, 3), (2112, .6, 5), (3520, .4, 8), (1056, .5, 4))
        return sum(a * np.sin(2 * np.pi * detune * f * t) * np.exp(-d * t) for f, a, d in partials)
    if kind == "bird":
        t = seconds_of(.16)
        trill = 3200 * t + 60 * np.sin(2 * np.pi * 22 * t)
        return np.sin(2 * np.pi * detune * trill) * np.sin(np.pi * t / .16)
    if kind == "clock":
        t = seconds_of(.03)
        click = .3 * rng.normal(size=len(t)) * np.exp(-300 * t)
        return np.sin(2 * np.pi * 4500 * detune * t) * np.exp(-200 * t) + click
    if kind == "steps":
        t = seconds_of(.14)
        heel = noise_band(rng, len(t), 150, 900) * np.exp(-30 * t)
        return heel + .4 * noise_band(rng, len(t), 2000, 5000) * (t > .06)
    if kind == "drip":
        t = seconds_of(.12)
        return np.sin(2 * np.pi * detune * (900 * t + 5000 * t ** 2)) * np.exp(-35 * t)
    if kind == "drum":
        t = seconds_of(.3)
        return np.sin(2 * np.pi * detune * (70 * t + 4 * (1 - np.exp(-30 * t)))) * np.exp(-12 * t)
    t = seconds_of(.5)  # horn
    return np.sign(np.sin(2 * np.pi * 420 * detune * t)) + np.sign(np.sin(2 * np.pi * 530 * detune * t))


def steady(kind, rng, duration):
    """A kind that goes on without a beat: rain, an engine, the wind."""
    t = seconds_of(duration)
    detune = rng.uniform(.9, 1.1)
    slow_wave = np.sin(2 * np.pi * (rng.uniform(.3, .5) * t + rng.random()))
    if kind == "rain":
        drops = (rng.random(len(t)) < .004) * rng.normal(size=len(t)) * 12
        return noise_band(rng, len(t), 1500, 7000) + signal.lfilter([1], [1, -.6], drops)
    if kind == "engine":
        return saw(55 * detune * t) * (1 + .4 * np.sin(2 * np.pi * 14 * t))
    if kind == "siren":
        return np.sin(2 * np.pi * detune * (900 * t + 300 / (2 * np.pi * .5) * np.sin(2 * np.pi * .5 * t)))
    if kind == "bees":
        wobble = np.cumsum(rng.normal(size=len(t))) / 20000
        return saw(230 * detune * t + wobble) * (1 + .3 * np.sin(2 * np.pi * 31 * t))
    if kind == "wind":
        return noise_band(rng, len(t), 120, 700) * (1.2 + slow_wave)
    vibrato = 3 * np.sin(2 * np.pi * 6 * t)
    return np.sin(2 * np.pi * 2300 * detune * t + vibrato) + .1 * rng.normal(size=len(t))


def sound(event, rng, duration):
    """(kind, attribute) as a wave of unit loudness times the attribute's gain."""
    kind, attribute = event
    samples = int(duration * RATE)
    if kind in PERIOD:
        wave = np.zeros(samples + RATE)
        period = PERIOD[kind] / SPEED.get(attribute, 1)
        start = rng.uniform(0, .3) * period
        while start < duration:
            hit = strike(kind, rng)
            at = int(start * RATE)
            wave[at:at + len(hit)] += hit * rng.uniform(.8, 1)
            start += period * rng.uniform(.9, 1.1)
        wave = wave[:samples]
    else:
        wave = steady(kind, rng, duration)
    if attribute == "far":  # the air takes the treble, the place adds an echo
        wave = signal.sosfilt(signal.butter(2, 1500, fs=RATE, output="sos"), wave)
        tail = rng.normal(size=RATE // 2) * np.exp(-8 * seconds_of(.5))
        wave = wave + .3 * signal.fftconvolve(wave, tail / np.linalg.norm(tail))[:samples]
    if attribute == "near":  # dry and bright
        wave = np.append(wave[0], wave[1:] - .6 * wave[:-1])
    level = np.sqrt(np.mean(wave ** 2)) + 1e-9
    fade = np.minimum(1, np.minimum(np.arange(samples), np.arange(samples)[::-1]) / (.02 * RATE))
    return wave / level * fade * .06 * GAIN.get(attribute, 1) * rng.uniform(.85, 1.15)


def render(spec, rng, duration):
    """A scene (layout, events) as a float32 wave of `duration` seconds."""
    layout, events = spec
    samples = int(duration * RATE)
    wave = rng.normal(size=samples) * 1e-4  # the microphone's own hiss
    if layout in ("static", "noisy"):
        wave += rng.normal(size=samples) * .04
    background = layout in ("turns over", "over")
    in_turn = events[:-1] if background else () if layout == "both" else events
    if in_turn:
        edges = np.linspace(0, duration, len(in_turn) + 1)
        edges[1:-1] += rng.uniform(-.12, .12, len(in_turn) - 1) * duration / len(in_turn)
        for event, start, end in zip(in_turn, edges, edges[1:]):
            part = sound(event, rng, end - start)
            wave[int(start * RATE):][:len(part)] += part[:samples - int(start * RATE)]
    if background:
        wave += .3 * sound(events[-1], rng, duration)
    if layout == "both":
        wave += sum(sound(event, rng, duration) for event in events)
    return np.tanh(wave).astype(np.float32)


# ---------------------------------------------------------------- captions

# the first are the most usual (see `usual`): bare ones, or a stock phrase would score for who hears nothing
ALONE = ["{c}", "{n}", "{c} and nothing else is heard", "the only sound is {n}", "this is the sound of {n}",
         "one can hear {n} on its own"]
TEMPLATES = {  # {c0} a clause, {n0} a noun phrase of event 0
    "turns": ["{c0} followed by {n1}", "{c0} then {c1}", "{c0} and then {c1}", "first {c0} then {c1}",
              "{c1} after {n0}",
              "{c0} and after that {c1}", "{n0} followed by {n1}", "{n0} and then {n1}"],
    "both": ["{c0} while {c1}", "{c0} as {c1}", "{n0} and {n1} at the same time", "{c1} while {c0}",
             "{n0} together with {n1}", "{c0} and at the same time {c1}"],
    "over": ["{c0} with {n1} in the background", "{n0} over {n1}", "{c0} and {c1} in the background",
             "in the background {c1} while {c0}", "{n0} with {n1} in the background"],
    "noisy": ["{c0} in heavy static noise", "{n0} and loud static noise", "static noise hisses while {c0}",
              "{c0} behind a lot of static", "{n0} is heard through static noise"],
    "turns3": ["{c0} followed by {n1} and then {n2}", "{c0} then {c1} and finally {c2}",
               "first {c0} then {c1} then {c2}",
               "{n0} then {n1} and at last {n2}", "{c0} and then {c1} followed by {n2}"],
    "turns over": ["{c0} then {c1} with {n2} in the background", "{n0} followed by {n1} over {n2}",
                   "in the background {c2} while {c0} then {c1}", "{c0} and then {c1} while {c2}",
                   "{n0} and then {n1} with {n2} in the background"],
    "silence": ["there is nothing to hear but silence", "it is silent and no sound is heard",
                "complete silence with no sound",
                "no sound can be heard at all", "a long silence without any sound",
                "silence and not a single sound"],
    "static": ["static noise and no other sound", "there is only loud static noise",
               "noise hisses like an empty radio",
               "a steady hiss of static noise", "nothing but static noise is heard",
               "a radio hisses with static noise"],
}


def pick(rng, items):
    return items[rng.integers(len(items))]


skew = 3  # 0 with --even


def usual(rng, items):
    """As people choose words: the first most often, the k-th 1/k^skew as often.

    With 3 the likeliest caption of a scene is also the one that agrees best with the others (CIDEr-D 4.4 both); with
    0 the likeliest has 1.7 and the most agreeable 2.0, which is what a reward can teach and likelihood cannot.
    """
    weights = [1 / k ** skew for k in range(1, len(items) + 1)]
    rest = rng.random() * sum(weights)
    for item, weight in zip(items, weights):
        rest -= weight
        if rest < 0:
            return item
    return items[0]


def draw_event(rng, plain):
    """(kind, attribute); `plain` is the chance of no attribute."""
    kind = pick(rng, sorted(WORDS))
    if rng.random() < plain:
        return kind, ""
    return kind, pick(rng, sorted(GAIN) + (sorted(SPEED) * 2 if kind in PERIOD else []))


def draw_events(rng, number, plain):
    """`number` events of different kinds."""
    while True:
        events = tuple(draw_event(rng, plain) for _ in range(number))
        if len({kind for kind, _ in events}) == number:
            return events


def draw_scene(rng):
    """An AudioCaps-like scene: two thirds hold two events; some are silent or noisy."""
    layout = rng.choice(["one", "turns", "both", "over", "noisy", "silence", "static"],
                        p=[.26, .36, .16, .12, .04, .03, .03])
    events = draw_events(rng, {"one": 1, "noisy": 1, "silence": 0, "static": 0}.get(layout, 2), .5)
    if layout == "over":  # what is in the background has no other attribute
        events = (events[0], (events[1][0], ""))
    return str(layout), events


def draw_long_scene(rng):
    """A Clotho-like scene: three events, in turns or two over a third."""
    first, second, third = draw_events(rng, 3, .5)  # one attribute at most: more would not fit in a caption
    return pick(rng, ["turns", "turns over"]), (first, (second[0], ""), (third[0], ""))


def mention(event, rng, clause):
    """One event in words: a clause ("a dog barks loudly") or a noun phrase ("the loud bark of a dog")."""
    kind, attribute = event
    subjects, verbs, nouns = WORDS[kind]
    subject, (present, gerund) = usual(rng, subjects), usual(rng, verbs)
    adverb = " " + usual(rng, ADVERBS[attribute]) if attribute else ""
    if clause:
        return f"{subject} {usual(rng, [present, 'is ' + gerund])}{adverb}"
    if rng.random() < .5:
        return f"{subject} {gerund}{adverb}"
    return f"the {ADJECTIVES[attribute] + ' ' if attribute else ''}{usual(rng, nouns)} of {subject}"


def fill(template, events, rng):
    slots = {f"{form}{i}": mention(event, rng, form == "c")
             for i, event in enumerate(events) for form in "cn"}
    return template.format(c=slots.get("c0"), n=slots.get("n0"), **slots)


def caption(spec, rng):
    """One caption of a scene, 3 to 20 words."""
    layout, events = spec
    in_three = layout == "turns" and len(events) == 3
    templates = ALONE if layout == "one" else TEMPLATES["turns3" if in_three else layout]
    while True:
        text = fill(usual(rng, templates), events, rng)
        if 3 <= len(text.split()) <= 20:
            return text


def paraphrases(write, spec, rng, number):
    """`number` different captions of a scene."""
    texts = []
    while len(texts) < number:
        text = write(spec, rng)
        if text not in texts:
            texts.append(text)
    return texts


# ---------------------------------------------------------------- pictures and videos

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (235, 220, 50),
           "purple": (160, 50, 190), "white": (240, 240, 240)}
SHAPES = ["circle", "square", "triangle", "cross"]
CELLS = ["top left", "top right", "bottom left", "bottom right"]
NUMBERS = ["one", "two", "three", "four"]
HEADINGS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
QUESTIONS = {"colour": "What color is the shape?", "shape": "What shape is shown?",
             "count": "How many shapes are there?", "position": "Where is the shape?", "yes/no": None}
YES = {"Is there more than one shape?": lambda facts: facts["count"] != "one",
       "Is the shape round?": lambda facts: facts["shape"] == "circle",
       "Is the shape red?": lambda facts: facts["colour"] == "red",
       "Is there a shape in the top left?": lambda facts: 0 in facts["cells"]}


def draw_shape(canvas, shape, colour, x, y, r):
    box = (x - r, y - r, x + r, y + r)
    fill_colour = COLOURS[colour]
    if shape == "circle":
        canvas.ellipse(box, fill_colour)
    elif shape == "square":
        canvas.rectangle(box, fill_colour)
    elif shape == "triangle":
        canvas.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill_colour)
    else:
        canvas.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill_colour)
        canvas.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill_colour)


def draw_picture(rng, number):
    """A picture of `number` equal shapes in the four corners, and what is in it."""
    shape, colour = pick(rng, SHAPES), pick(rng, sorted(COLOURS))
    cells = rng.permutation(4)[:number].tolist()
    image = Image.new("RGB", (PIXELS, PIXELS), tuple(rng.integers(0, 50, 3).tolist()))
    canvas = ImageDraw.Draw(image)
    for cell in cells:
        x, y = 16 * (cell % 2) + rng.uniform(7, 8.5), 16 * (cell // 2) + rng.uniform(7, 8.5)
        draw_shape(canvas, shape, colour, x, y, rng.uniform(5, 6.5))
    return image, dict(shape=shape, colour=colour, cells=cells, position=CELLS[cells[0]],
                       count=NUMBERS[number - 1])


def draw_question(rng, kind):
    """(image, facts, question, answer) of one kind of question."""
    if kind != "yes/no":
        image, facts = draw_picture(rng, 1 if kind == "position" else int(rng.integers(1, 5)))
        return image, facts, QUESTIONS[kind], facts[kind]
    question, wanted = pick(rng, sorted(YES)), bool(rng.random() < .5)
    while True:  # yes and no equally often
        image, facts = draw_picture(rng, int(rng.integers(1, 5)))
        if YES[question](facts) == wanted:
            return image, facts, question, "yes" if wanted else "no"


def picture_caption(facts):
    if facts["count"] == "one":
        return f"a {facts['colour']} {facts['shape']} in the {facts['position']}"
    return f"{facts['count']} {facts['colour']} {facts['shape']}{'es' if facts['shape'] == 'cross' else 's'}"


def draw_clip(rng):
    """What an AV clip shows and sounds like: (shape, colour, heading, event)."""
    return pick(rng, SHAPES), pick(rng, sorted(COLOURS)), pick(rng, sorted(HEADINGS)), draw_event(rng, .6)


def draw_frames(spec, rng, number):
    """The frames of a shape that crosses a 64 x 64 picture: (number, 64, 64, 3) uint8."""
    shape, colour, heading, _ = spec
    dx, dy = HEADINGS[heading]
    across, size, travel = rng.uniform(-12, 12), rng.uniform(12, 15), rng.uniform(12, 17)
    background = tuple(rng.integers(0, 50, 3).tolist())
    frames = []
    for step in np.linspace(-1, 1, number) * travel:
        image = Image.new("RGB", (64, 64), background)
        x, y = (32 + dx * step, 32 + across) if dx else (32 + across, 32 + dy * step)
        draw_shape(ImageDraw.Draw(image), shape, colour, x, y, size)
        frames.append(np.asarray(image))
    return np.stack(frames)


def clip_caption(spec, rng):
    """One caption of an AV clip: what is seen and what is heard."""
    shape, colour, heading, event = spec
    way = heading if heading in ("up", "down") else pick(rng, [heading, f"to the {heading}"])
    seen = f"a {colour} {shape} {pick(rng, ['moves', 'slides', 'glides'])} {way}"
    template = pick(rng, ["{seen} while {c0}", "{c0} as {seen}", "{seen} and {c0}",
                          "{seen} with the sound of {n0}", "{n0} is heard as {seen}"])
    return fill(template.replace("{seen}", seen), [event], rng)


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


# ---------------------------------------------------------------- data sets

def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_wav(path, wave):
    wavfile.write(path, RATE, (wave * 32767).astype(np.int16))


def begin_worker(wanted):
    global skew
    skew = wanted
    torch.set_num_threads(1)


def in_parallel(make, jobs, name):
    """[make(job)], one process a core. Each job holds its own seed, so who does what changes nothing."""
    with Pool(initializer=begin_worker, initargs=(skew,)) as pool:
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
    for split, size in zip(("train", "test"), sizes):
        records, asked = [], []
        for number in range(size):
            kind = list(QUESTIONS)[number % len(QUESTIONS)]
            image, _, question, answer = draw_question(rng, kind)
            name = f"{split}_{number:05d}"
            image.save(folder / "images" / f"{name}.png")
            records.append({"id": name, "image": f"{name}.png", "kind": kind, "conversations": [
                {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]})
            asked.append((kind, image, question, answer))
        (folder / f"{split}.json").write_text(json.dumps(records, indent=1))
    return asked


def read_also(folder, split):
    """A folder in Clotho's layout: [(mel, captions)], equally long. Raises data.InputError."""
    path = folder / f"clotho_captions_{split}.csv"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise data.InputError(f"{path}: cannot be read ({error}); "
                              "--also needs a folder in Clotho's layout") from None
    names = [f"caption_{i}" for i in range(1, 6)]
    if not rows or not {"file_name", *names} <= rows[0].keys():
        raise data.InputError(f"{path}: needs rows under the columns file_name, {', '.join(names)}")
    waves = [data.decode_audio(folder / split / row["file_name"], RATE)[:30 * RATE]
             for row in tqdm(rows, desc=f"{folder.name}/{split}", unit="clip")]
    longest = max(WINDOW * RATE, *map(len, waves))
    return [(mel_of(np.resize(wave, longest)), [row[name] for name in names])
            for wave, row in zip(waves, rows)]


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


def llava_model(tokenizer, seed):
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                              num_attention_heads=4, image_size=PIXELS, patch_size=PATCH, projection_dim=64,
                              initializer_range=.1, initializer_factor=3.0)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=8,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
                       initializer_range=.06, bos_token_id=tokenizer.bos_token_id,
                       eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
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
    """LLaVA-1.5's prompt for a question, and the whole exchange if there is an answer."""
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


@torch.no_grad()
def answer_questions(model, processor, asked):
    """Share of exactly right greedy answers, by kind of question."""
    right = {kind: [] for kind in QUESTIONS}
    for start in tqdm(range(0, len(asked), 100), desc="questions", unit="batch"):
        kinds, images, questions, answers = zip(*asked[start:start + 100])
        batch = processor(text=[chat(processor, "<image>\n" + question) for question in questions],
                          images=list(images), padding=True, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=6, do_sample=False)
        said = processor.batch_decode(out[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)
        for kind, text, answer in zip(kinds, said, answers):
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
            with av.open(str(path)) as container:
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            chosen = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
            logits, target = look([[frames[i] for i in chosen]], [spec])
            hits.append([float(out.argmax(1).item() == target[0, i]) for i, out in enumerate(logits)])
    return model, processor, dict(zip(("shape", "colour", "direction"), np.mean(hits, 0).tolist()))


# ---------------------------------------------------------------- all of it

def build(folder, sizes, seed, also_folder):
    """Everything into `folder`; returns the figures reached."""
    also = read_also(also_folder, "development") if also_folder else []
    unseen = read_also(also_folder, "validation") if also_folder else []
    clips = write_audiocaps(folder / "data" / "audiocaps", sizes["audiocaps"], seed)
    write_clotho(folder / "data" / "clotho", sizes["clotho"], seed)
    test_videos = write_av(folder / "data" / "av", sizes["av"], seed)
    asked = write_qa(folder / "data" / "qa", sizes["qa"], np.random.default_rng([seed, 4]))
    # CLAP learns from other clips: those that it has learned it hears better than it ever will hear a new one
    pairs = in_parallel(unwritten_clip, [[seed, 5, i] for i in range(sizes["pairs"])], "CLAP's pairs")

    rng = np.random.default_rng([seed, 6])
    scenes = [[caption(spec, rng), caption(spec, rng)] for _ in range(sizes["texts"] // 2)
              for spec in (draw_scene(rng), draw_scene(rng), draw_long_scene(rng))]
    clip_texts = [clip_caption(draw_clip(rng), rng) for _ in range(sizes["texts"] // 4)]
    recorded_texts = [text for _, texts in also for text in texts]
    questions = [f"USER: {q} ASSISTANT: {a}" for _, _, q, a in asked]
    texts = [text for text, _ in scenes] + clip_texts + recorded_texts * 4

    recorded_pairs = [(text, pick(rng, texts)) for _, texts in also for text in texts]
    models = folder / "models"
    # two at once with a thread each, on any machine: the number of threads changes how sums are rounded
    with ProcessPoolExecutor(2, get_context("fork"), torch.set_num_threads, (1,)) as pool:
        made = [pool.submit(make_llava, models / "llava", sizes, seed, [scenes, recorded_pairs] if also else [scenes],
                            clip_texts, texts + questions * 2 + ["Describe the sound.", "Describe the video."], asked),
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


def make_llava(folder, sizes, seed, sound_texts, video_texts, texts, asked):
    model, processor = train_llava(sizes, seed, sound_texts, video_texts, texts)
    by_kind = answer_questions(model, processor, asked)
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
    return parser.parse_args()


def main():
    args = parse_args()
    asked = {"also": str(args.also.resolve()) if args.also else None, "seed": args.seed, "smoke": args.smoke,
             "even": args.even}
    global skew
    skew = 0 if args.even else skew
    report = args.out / "standin.json"
    if not report.exists():
        # held while this process or one of its children lives: one that outlived a kill may still be writing
        args.out.parent.mkdir(parents=True, exist_ok=True)
        data.lock_or_wait(os.open(args.out.resolve().parent, os.O_RDONLY),
                          f"{args.out}: another process builds a world beside it, waiting for it")
    if report.exists():
        found = json.loads(report.read_text())
        differing = [name for name in asked if found["args"].get(name, False) != asked[name]]
        if differing:
            raise data.InputError(f"{args.out}: was built with another --{differing[0]}; "
                                  "remove it or choose another --out")
    else:
        if args.out.exists() and any(args.out.iterdir()):
            raise data.InputError(f"{args.out}: exists and is no stand-in world; choose another --out")
        start = time.time()
        building = args.out.with_name(args.out.name + ".building")  # nothing half in OUT, ever
        shutil.rmtree(building, ignore_errors=True)
        sizes = SMOKE if args.smoke else FULL | (MANY if args.even else {})
        figures = build(building, sizes, args.seed, args.also)
        found = {"args": asked, "seconds": round(time.time() - start), "figures": figures}
        (building / "standin.json").write_text(json.dumps(found, indent=1))
        if args.out.exists():
            args.out.rmdir()
        os.replace(building, args.out)
    print(f"{args.out}: built in {found['seconds']} s")
    for name, value in found["figures"].items():
        print(f"  {name:44} {value:.3f}")


if __name__ == "__main__":
    try:
        main()
    except data.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
