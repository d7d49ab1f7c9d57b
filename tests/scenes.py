"""The grammar of the stand-in world: scenes as events, and each as audio, captions, pictures or frames.

Everything is drawn from a NumPy generator, so that a seed fixes it. tests/standin.py writes the data sets.
"""
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's; clips are made by one process a core
import numpy as np
from PIL import Image, ImageDraw
from scipy import signal

RATE = 16000  # samples a second
PIXELS = 32   # side of a picture

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
