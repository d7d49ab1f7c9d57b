"""Datasets in their released layouts, sound and video decoding, and the cache of frozen-encoder features.

    python -c "import data; print(data.read_split('audiocaps', 'tiny/data/audiocaps', 'test').clips[0])"
    python -c "import data; print(data.decode_audio('tiny/data/av/videos/test_0000.mp4', 16000).shape)"

What a person can get wrong raises InputError: one line with the file, its line and what to do. Nothing is
unpickled and no code that comes with a model is run. Letters: B clips, S encoder frames, E encoder width,
P width of the shared space of sound and text, F pictures of a video.
"""
try:  # torchaudio's wheel links CUDA: beside a CPU-only torch its compiled half cannot load and the import
    import torchaudio  # fails, and with it that of transformers' LLaVA. Its Python half is all we need.
except OSError:
    import sys
    sys.modules["torchaudio._extension.utils"]._load_lib = lambda lib: False
    import torchaudio

import contextlib
import csv
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import jinja2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

MAX_SECONDS = 600  # of one clip; whatever a header claims, no more than this is held
MEDIA = set(".wav .flac .mp3 .ogg .opus .m4a .aac .mp4 .mkv .mka .webm .mov .avi .wma .aif .aiff .au".split())
CLOTHO = {"train": "development", "val": "validation", "test": "evaluation"}  # its names for the splits
CACHE_FORMAT = 1  # raise it when decoding, windows or pooling change, so that older features are not read


class InputError(ValueError):
    """A person's mistake: one line that says what is wrong, where, and what to do."""


@contextlib.contextmanager
def _replacing(path):
    """A temporary path that becomes `path` at the end of the block, so that no reader meets half a file."""
    tmp = Path(f"{path}.tmp.{os.getpid()}")
    try:
        yield tmp
        os.replace(tmp, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', error)})") from None
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink()


def write_text(path, text):
    """Write a text file atomically. Raises InputError where that is not possible."""
    with _replacing(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path, obj):
    """Write JSON atomically. Raises as write_text does, and ValueError for a number that is not finite."""
    write_text(path, json.dumps(obj, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- data sets

@dataclass(frozen=True)
class Clip:
    id: str
    path: Path
    references: list[str]
    question: str | None = None  # in an audio-visual set with questions; the references are its answers


@dataclass
class Split:
    name: str
    clips: list[Clip]
    missing: list[str]  # ids whose file is not there
    bad: list[str] = field(default_factory=list)  # ids whose file cannot be decoded: see load_features

    @property
    def hash(self):
        """sha256 over ids, questions and references of the clips in use, whatever their order."""
        return _sha(sorted([c.id, c.question or "", *c.references] for c in self.clips))


@dataclass(frozen=True)
class Question:
    id: str
    image: Path
    question: str
    answer: str
    kind: str


def read_split(dataset, root, split):
    """Read "train", "val" or "test" of "audiocaps", "clotho" or "av" in the folder `root`.

    Clips without a file are listed in `missing`. Raises InputError for whatever is wrong in the table, and
    when not one file is there."""
    if dataset not in ("audiocaps", "clotho", "av") or split not in CLOTHO:
        raise InputError(f"{dataset} {split}: choose audiocaps, clotho or av and train, val or test")
    root, name = Path(root), CLOTHO[split] if dataset == "clotho" else split
    table = root / (f"clotho_captions_{name}.csv" if dataset == "clotho" else f"{name}.csv")
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the one that holds {table.name}")
    if dataset == "audiocaps":
        clips, folders = _audiocaps(table, split), [f"{root} and all folders below"]
    else:
        folders = [root / name] if dataset == "clotho" else [root / "videos", root / name, root]
        clips = _named_files(table, folders)
    found = [clip for clip in clips if clip.path]
    if not found:
        raise InputError(f"{table}: none of its {len(clips)} clips, such as {clips[0].id}, has a file in "
                         + " or ".join(map(str, folders)))
    return Split(split, found, [clip.id for clip in clips if not clip.path])


def _audiocaps(table, split):
    """Clips of an AudioCaps table, path None where no file has one of the names that people use."""
    rows, numbers, starts = {}, set(), {}
    for where, row in _rows(table, {"audiocap_id", "youtube_id", "start_time", "caption"}):
        number, video, time = row["audiocap_id"], _inside(where, row["youtube_id"]), row["start_time"]
        if number in numbers:
            raise InputError(f"{where}: audiocap_id {number!r} appears a second time")
        if not re.fullmatch(r"\d{1,5}(\.\d{1,3})?", time):
            raise InputError(f"{where}: start_time {time[:40]!r} is not a number of seconds")
        numbers.add(number)
        starts.setdefault(video, set()).add(float(time))
        _, same, references = rows.setdefault((video, float(time)), (where, [], []))
        same.append(number)
        references += filter(None, [_clean(where, row["caption"])])
    files, clips = {}, []
    # links to folders are followed at the top only: links can make loops
    tops = list(table.parent.iterdir())
    for path in itertools.chain(tops, *(top.rglob("*") for top in tops)):
        if path.suffix.lower() in MEDIA:
            files.setdefault(path.stem, set()).add(path)
    for (video, start), (where, numbers, references) in rows.items():
        if not references:
            raise InputError(f"{where}: clip {video} has no caption")
        begin, end = ([f"{t:g}", f"{1000 * t:.0f}", f"{t:.3f}", f"{t:06g}"] for t in (start, start + 10))
        stems = [f"{video}_{time}" for time in begin + list(map("_".join, zip(begin, end)))]
        stems += [video] * (len(starts[video]) == 1)  # with two times, the bare name could mean either
        stem = next((s for s in [*stems, *(f"Y{s}" for s in stems), *numbers] if s in files), None)
        copies = sorted(files.get(stem, ()))  # the one in a folder named after the split is taken
        copies.sort(key=lambda path: split not in path.relative_to(table.parent).parts)
        clips.append(Clip(f"{video}_{start:g}", copies[0] if copies else None, references))
    return clips


def _named_files(table, folders):
    """Clips of a table with file_name and either caption_1, caption_2, … or question and answer."""
    clips, seen = [], {}
    for where, row in _rows(table, {"file_name", "caption_1"}, {"file_name", "question", "answer"}):
        name = _inside(where, row["file_name"])
        question = _clean(where, row["question"]) if "question" in row else None
        columns = ["answer"] if "question" in row else [c for c in row if re.fullmatch(r"caption_\d+", c)]
        references = [text for text in (_clean(where, row[c]) for c in columns) if text]
        if not references or question == "":
            raise InputError(f"{where}: clip {name} has no caption, or no question or answer")
        if question in seen.setdefault(name, []):
            raise InputError(f"{where}: file_name {name!r} appears a second time")
        seen[name].append(question)
        path = next((folder / name for folder in folders if os.path.isfile(folder / name)), None)
        again = f"#{len(seen[name])}" if len(seen[name]) > 1 else ""  # a clip may be asked several things
        clips.append(Clip(name + again, path, references, question))
    return clips


def _rows(table, *alternatives):
    """[("file:line", {column: text})] of a CSV that has all the columns of one of the alternatives."""
    reader = csv.reader(io.StringIO(_text(table), newline=""), strict=True)  # an open quote is an error
    rows, line = [], 1
    try:
        header = [column.strip() for column in next(reader, [])]
        if not any(columns <= set(header) for columns in alternatives) or len(set(header)) < len(header):
            wanted = " or ".join(", ".join(sorted(columns)) for columns in alternatives)
            raise InputError(f"{table}:1: needs the columns {wanted}, each once; found {ascii(header)[:200]}")
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise InputError(f"{table}:{line}: has {len(cells)} fields and the header {len(header)}; "
                                 "a text with a comma needs quotes")
            if cells:
                rows.append((f"{table}:{line}", dict(zip(header, map(str.strip, cells)))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{table}:{line}: is not CSV ({error})") from None
    if not rows:
        raise InputError(f"{table}: has no rows")
    return rows


def _text(path):
    try:
        data = Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: is not UTF-8; save the file as UTF-8") from None


def _clean(where, text, limit=2000):
    """One line of printable text: white space folded, terminal escapes and control characters left out."""
    if len(text) > limit:
        raise InputError(f"{where}: has a text of {len(text):,} characters; the limit is {limit:,}")
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?)?", "", text)
    return " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())


def _inside(where, name):
    """`name` if it is that of a file and does not lead out of its folder."""
    if not isinstance(name, str) or not name.isprintable() or not re.match(r"[^/\\]", name) \
            or ".." in re.split(r"[/\\]", name):
        raise InputError(f"{where}: {ascii(name)[:200]} is not a file name, or leads out of its folder")
    return name


def _sha(obj):
    return hashlib.sha256(json.dumps(obj, sort_keys=True, default=str).encode()).hexdigest()


def read_qa(path, images=None, limit=1000, seed=0):
    """([Question], sha256): a seeded subset of a visual question-answering file and the hash that fixes it.

    Reads LLaVA-Instruct JSON, a list of {id, image, conversations} (of a talk, the first exchange), and JSONL
    or a JSON list of {image, question, answer}. Images lie in `images`, else in images/ beside the file, else
    beside it. Raises InputError for a record without question or answer and for a chosen image not there."""
    text, path, line = _text(path), Path(path), 1
    try:
        if text.lstrip().startswith("["):
            records = [(f"{path}: record {n}", record) for n, record in enumerate(json.loads(text), 1)]
        else:
            records = []
            for line, row in enumerate(text.split("\n"), 1):
                records += [(f"{path}:{line}", json.loads(row))] if row.strip() else []
    except (ValueError, RecursionError) as error:
        line, reason = line + getattr(error, "lineno", 1) - 1, getattr(error, "msg", "too deep or large")
        raise InputError(f"{path}:{line}: is not JSON ({reason})") from None
    questions, ids = [], {}
    for where, record in records:
        try:
            if "conversations" in record:
                if "image" not in record:
                    continue  # LLaVA's mixtures hold talks without a picture
                said = {turn["from"]: turn["value"] for turn in record["conversations"][:2]}
                question, answer = said["human"].replace("<image>", ""), said["gpt"]
            else:
                question, answer = record.get("question", record.get("text")), record["answer"]
            question = "\n".join(_clean(where, row, 20_000) for row in question.strip().split("\n"))
            answer = _clean(where, str(answer), 20_000)
        except (TypeError, KeyError, AttributeError):
            raise InputError(f"{where}: lacks a question or its answer; the probe needs both") from None
        if not question or not answer:
            raise InputError(f"{where}: has an empty question or answer")
        id, kind = (_clean(where, str(next((record[k] for k in keys if k in record), other)))
                    for keys, other in ((("id", "question_id"), len(questions)), (("kind", "category"), "")))
        ids[id] = ids.get(id, 0) + 1  # LLaVA-Instruct gives one id to several talks about an image
        id = f"{id}#{ids[id]}" if ids[id] > 1 else id
        questions.append((id, _inside(where, record.get("image")), question, answer, kind))
    if not questions:
        raise InputError(f"{path}: has no questions about images")
    chosen = sorted(questions, key=lambda q: _sha([seed, *q[1:], q[0]]))[:limit]
    beside = path.parent / "images"
    folder = Path(images) if images else beside if beside.is_dir() else path.parent
    absent = [name for _, name, *_ in chosen if not os.path.isfile(folder / name)]
    if absent:
        raise InputError(f"{path}: {len(absent)} of {len(chosen)} chosen images, such as {absent[0][:80]}, "
                         f"are not in {folder}")
    return [Question(id, folder / name, *rest) for id, name, *rest in chosen], _sha(chosen)


# ---------------------------------------------------------------- sound and video

def _decoded(path, kind):
    """Decoded frames of the first stream of `kind` ("audio" or "video"), damaged packets left out."""
    good = damaged = 0
    options = {"protocol_whitelist": "file"}  # a playlist posing as a clip must not open network addresses
    try:
        with av.open(f"file:{path}", metadata_errors="ignore", options=options) as file:
            stream = next((stream for stream in file.streams if stream.type == kind), None)
            if stream is None:
                raise InputError(f"{path}: has no {kind} stream")
            for packet in file.demux(stream):
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    damaged += 1
                    continue
                good += bool(frames)
                yield from frames
    except (av.FFmpegError, OSError) as error:
        if not good:
            raise InputError(f"{path}: cannot be decoded as {kind} ({error.strerror or error})") from None
    if damaged >= good:  # a bad packet or two are lived with, as every player does
        raise InputError(f"{path}: cannot be decoded as {kind} (empty or damaged)")


def decode_audio(path, rate, max_seconds=MAX_SECONDS):
    """Sound of any audio or video file as mono float32 (samples,) at `rate` Hz, at most `max_seconds` of it.

    Channels are averaged. Raises InputError when there is no sound in the file or it is not finite."""
    # interleaved on purpose: PyAV reads past the end of 8 and more separate channels
    packer, mono, seconds, source = av.AudioResampler("flt", frame_size=8192), [], 0, None
    for frame in itertools.chain(_decoded(path, "audio"), [None]):  # None: what the packer still holds
        last = frame is None or seconds >= max_seconds
        if frame is not None:
            source = source or frame.sample_rate
            if not 1000 <= source <= 1_000_000 or frame.sample_rate != source:
                raise InputError(f"{path}: has a sample rate that is impossible or changes")
            seconds += frame.samples / source
        try:
            packed = packer.resample(None if last else frame)
        except (ValueError, av.FFmpegError):
            raise InputError(f"{path}: changes its channels or sample format midway") from None
        mono += [p.to_ndarray().reshape(-1, p.layout.nb_channels).mean(1) for p in packed]
        if last:
            break
    wave = torch.from_numpy(np.concatenate(mono or [np.zeros(0, np.float32)]))
    if len(wave):
        # odd rates (44,101 Hz) would need a filter bank of gigabytes: a ratio within 1e-6 of theirs will do
        ratio = Fraction(source, rate).limit_denominator(1000)
        wave = torchaudio.functional.resample(wave, ratio.numerator, ratio.denominator)
    if not len(wave) or not wave.isfinite().all():
        raise InputError(f"{path}: has no samples, or some that are not finite")
    return wave[:int(max_seconds * rate)].numpy()


def decode_video(path, frames):
    """`frames` pictures of a video, evenly spaced over those that decode: uint8 (frames, H, W, 3).

    A shorter video repeats pictures. Raises InputError when there is no picture in it."""
    # twice through the file, for every picture of a minute of video would fill gigabytes
    count = sum(1 for _ in itertools.islice(_decoded(path, "video"), 60 * MAX_SECONDS))
    wanted, pictures, size = np.linspace(0, count - 1, frames).round().astype(int), {}, {}
    for i, frame in enumerate(itertools.islice(_decoded(path, "video"), count)):
        if frame.width * frame.height > 2 ** 25:
            raise InputError(f"{path}: pictures of {frame.width} x {frame.height} are too large")
        size = size or {"width": frame.width, "height": frame.height}  # every picture takes that of the first
        if i in wanted:
            pictures[i] = frame.to_ndarray(format="rgb24", **size)
    return np.stack([pictures[i] for i in wanted])


def noisy(wave, snr_db, generator, noise=None):
    """`wave` (samples,) with white noise, or the recording `noise` looped, `snr_db` decibels below it.

    `generator` is a torch.Generator. A silent clip has nothing to be compared with and stays as it is."""
    if noise is None:
        noise = torch.randn(len(wave), generator=generator)
    else:
        start = int(torch.randint(len(noise), (), generator=generator))
        noise = torch.from_numpy(np.resize(np.roll(noise, -start), len(wave)).astype(np.float32))
    if not noise.any():
        raise InputError("the noise is silent; choose another recording")
    if not wave.any():
        return wave
    return torchaudio.functional.add_noise(torch.from_numpy(wave), noise, torch.tensor(float(snr_db))).numpy()


# ---------------------------------------------------------------- frozen encoders

def _pretrained(path, model_class, processor_class):
    """A frozen model, its preprocessor, and the sha256 of the weights and settings that shape its output."""
    try:  # safetensors only: a pickle in a downloaded folder could run anything
        local = Path(path).is_dir()
        model, report = model_class.from_pretrained(path, use_safetensors=True, local_files_only=local,
                                                    dtype=torch.float32, output_loading_info=True)
        processor = processor_class.from_pretrained(path, local_files_only=local)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: cannot be loaded as {model_class.__name__} ({reason})") from None
    lacking = [*report["missing_keys"], *map(str, report["mismatched_keys"])]
    if lacking:  # transformers would fill them with random numbers and go on
        raise InputError(f"{path}: no {model_class.__name__}; {len(lacking)} weights lack: {lacking[0]}")
    settings = [model.config.to_dict(), getattr(processor, "feature_extractor", processor).to_dict()]
    for key in ("_name_or_path", "transformers_version", "processor_class"):  # where from, not what it is
        settings[0].pop(key, None), settings[1].pop(key, None)
    digest = hashlib.sha256(_sha(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return model.eval().requires_grad_(False), processor, digest.hexdigest()


class AudioEncoder:
    """A frozen CLAP from a folder or hub name: `.hash`, `.rate` in Hz, `.width` (E), `.embed_dim` (P).

    Raises InputError when it cannot be loaded."""

    def __init__(self, path, device="cpu"):
        from transformers import ClapModel, ClapProcessor  # here, so that reading tables starts quickly
        self.path, self.device = str(path), device
        self.model, processor, self.hash = _pretrained(path, ClapModel, ClapProcessor)
        self.model.to(device)
        self.tokenizer, self.extractor = processor.tokenizer, processor.feature_extractor
        self.rate, self.size = self.extractor.sampling_rate, int(self.extractor.nb_max_samples)
        self.width = self.model.config.audio_config.hidden_size
        self.embed_dim = self.model.config.projection_dim

    def _windows(self, wave):
        """[(samples, the share of them that is new)]: consecutive, the last one right-aligned."""
        size, tail = self.size, len(wave) % self.size if len(wave) > self.size else 0
        windows = [(wave[start:start + size], 1.0) for start in range(0, max(len(wave) - size, 0) + 1, size)]
        return windows + [(wave[-size:], tail / size)] * (tail >= self.rate)  # below a second it is dropped

    @torch.no_grad()
    def encode(self, waves, batch_size=32):
        """Frames [(S_i, E)] in time order and L2-normalised embeddings (n, P) of mono float32 waves.

        A clip longer than the window is heard in several: frames follow each other without overlap, the
        embedding is the normalised mean."""
        cut = [(i, *window) for i, wave in enumerate(waves) for window in self._windows(wave)]
        frames, embeds = [[] for _ in waves], torch.zeros(len(waves), self.embed_dim)
        for start in range(0, len(cut), batch_size):
            batch = cut[start:start + batch_size]
            mels = self.extractor([samples for _, samples, _ in batch], sampling_rate=self.rate,
                                  return_tensors="pt")["input_features"].float().to(self.device)
            # for the fused model the extractor calls a random clip longer than the window; here none is
            longer = torch.zeros(len(batch), 1, dtype=torch.bool, device=self.device)
            out = self.model.get_audio_features(mels, is_longer=longer)
            hidden = out.last_hidden_state.mean(2).transpose(1, 2).cpu()  # (B, E, freq, S) → (B, S, E)
            for (i, _, new), h, embed in zip(batch, hidden, out.pooler_output.cpu()):
                frames[i].append(h[-math.ceil(new * len(h)):])
                embeds[i] += embed
        return [torch.cat(parts) for parts in frames], torch.nn.functional.normalize(embeds, dim=-1)

    @torch.no_grad()
    def embed_text(self, texts, batch_size=64):
        """L2-normalised embeddings (n, P) of texts, in the space of the clips' embeddings."""
        config, embeds = self.model.config.text_config, [torch.zeros(0, self.embed_dim)]
        longest = config.max_position_embeddings - config.pad_token_id - 1  # positions start after its id
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(list(texts[start:start + batch_size]), padding=True, truncation=True,
                                    max_length=longest, return_tensors="pt").to(self.device)
            out = self.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
            embeds.append(out.pooler_output.cpu())
        return torch.nn.functional.normalize(torch.cat(embeds), dim=-1)


class VideoEncoder:
    """A frozen TimeSformer from a folder or hub name: `.hash`, `.frames` a clip (F), `.width` (E)."""

    def __init__(self, path, device="cpu"):
        from transformers import AutoImageProcessor, TimesformerModel
        self.path, self.device = str(path), device
        self.model, self.processor, self.hash = _pretrained(path, TimesformerModel, AutoImageProcessor)
        self.model.to(device)
        self.frames, self.width = self.model.config.num_frames, self.model.config.hidden_size
        self.embed_dim = self.width

    @torch.no_grad()
    def encode(self, videos, batch_size=8):
        """Frames [(F, E)] in time order and their means (n, E), of videos uint8 (F, H, W, 3)."""
        frames = []
        for start in range(0, len(videos), batch_size):
            batch = [list(video) for video in videos[start:start + batch_size]]
            pixels = self.processor(batch, return_tensors="pt")["pixel_values"].to(self.device)
            B, F = pixels.shape[:2]
            hidden = self.model(pixels).last_hidden_state[:, 1:].cpu()  # no class token: (B, patches * F, E)
            frames += hidden.reshape(B, -1, F, self.width).mean(1)  # the moments of one patch are neighbours
        return frames, torch.stack([f.mean(0) for f in frames]) if frames else torch.zeros(0, self.width)


# ---------------------------------------------------------------- cache of features

@dataclass
class Features:
    """Encoder frames of many clips: `features[i]` is (S_i, E) float32, read from disk when asked for."""
    frames: torch.Tensor  # (sum of S_i, E) float16, memory-mapped
    offsets: torch.Tensor  # (n + 1,) int64
    embeds: torch.Tensor  # (n, P) float32
    ids: list[str]

    def __post_init__(self):
        self.index = {id: i for i, id in enumerate(self.ids)}

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        i = range(len(self))[i]  # negative and out of range as in a list
        return self.frames[self.offsets[i]:self.offsets[i + 1]].float()

    def of(self, clips):
        """The frames of these clips, in their order."""
        return ClipFrames(self, [self.index[clip.id] for clip in clips])


class ClipFrames:
    """Frames (S_i, E) of a list of clips, read from disk when asked for."""

    def __init__(self, features, rows):
        self.features, self.rows = features, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.features[self.rows[i]]

    def take(self, order):
        """The same frames in another order, by index."""
        return ClipFrames(self.features, [self.rows[i] for i in order])


def lock_or_wait(held, message):
    """Lock an open file until it is closed by all who inherited it; `message` is said if another has to be waited for."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(message, flush=True)
        fcntl.flock(held, fcntl.LOCK_EX)


def load_features(split, encoder, cache_dir, modality="audio"):
    """Features of the clips of `split` from the cache, where they are computed first if they are not there.

    The file is named by a hash of the encoder and of the bytes of every clip. Afterwards `split.bad` lists
    the clips that cannot be decoded, `split.clips` holds the others and `features[i]` is of `split.clips[i]`;
    with two modalities look up `features.index[clip.id]`. Of jobs started together one builds, others wait.
    Raises InputError when no clip can be decoded or the cache cannot be written."""
    folder = Path(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            key = _sha([CACHE_FORMAT, modality, encoder.hash, _file_hashes(split, folder, pool)])
            path = folder / f"{modality}_{split.name}_{key[:32]}.safetensors"
            found = _read_features(path, split) or _build_features(path, split, encoder, modality, pool)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read or written ({error.strerror})") from None
    features, bad = found
    split.bad += [id for id in bad if id not in split.bad]
    split.clips = [clip for clip in split.clips if clip.id in features.index]
    return features


def _build_features(path, split, encoder, modality, pool):
    """As _read_features, after writing the file; a job that finds another at it waits for that one's."""
    lock = path.with_suffix(".lock")
    with open(lock, "w") as held:  # it is released with the process, however that ends
        lock_or_wait(held, f"waiting for another job that builds {path.name}")
        found = _read_features(path, split)
        if found is None:
            for left in path.parent.glob(f"{path.name}.tmp.*"):  # by a job that was killed
                left.unlink()
            tensors, notes = _compute(split, encoder, modality, pool)
            with _replacing(path) as tmp:
                save_file(tensors, tmp, notes)
            found = _read_features(path, split)
        lock.unlink(missing_ok=True)  # those who still wait on it find the finished file
        return found


def _compute(split, encoder, modality, pool):
    """Tensors and notes of a cache file; threads decode one chunk ahead of the encoder."""
    def decode(clip):
        try:
            if modality == "video":
                return decode_video(clip.path, encoder.frames)
            return decode_audio(clip.path, encoder.rate)
        except InputError as error:
            return error

    chunks = [split.clips[i:i + 16] for i in range(0, len(split.clips), 16)]
    frames, embeds, ids, bad, ahead = [], [], [], {}, pool.map(decode, chunks[0])
    with tqdm(total=len(split.clips), desc=f"{modality} features, {split.name}", disable=None) as bar:
        for chunk, following in itertools.zip_longest(chunks, chunks[1:], fillvalue=()):
            decoded, ahead = list(zip(chunk, ahead)), pool.map(decode, following)
            bad |= {clip.id: str(got) for clip, got in decoded if isinstance(got, InputError)}
            decoded = [(clip, got) for clip, got in decoded if clip.id not in bad]
            for (clip, _), f, embed in zip(decoded, *encoder.encode([got for _, got in decoded])):
                if not (f.half().isfinite().all() and embed.isfinite().all()):
                    bad[clip.id] = f"{clip.path}: its features are not finite"
                    continue
                frames.append(f.half()), embeds.append(embed), ids.append(clip.id)
            bar.update(len(chunk))
    if not ids:
        raise InputError(f"none of {len(split.clips)} clips can be decoded; first {next(iter(bad.values()))}")
    if bad:
        print(*list(bad.values())[:10], f"{len(bad)} of {len(split.clips)} clips are left out", sep="\n")
    offsets = torch.tensor([0] + [len(f) for f in frames]).cumsum(0)
    return ({"frames": torch.cat(frames), "offsets": offsets, "embeds": torch.stack(embeds)},
            {"ids": json.dumps(ids), "bad": json.dumps(list(bad))})


def _read_features(path, split):
    """(Features, ids of bad clips) of a cache file; None where there is none or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            ids, bad = (json.loads(file.metadata()[key]) for key in ("ids", "bad"))
            features = Features(*(file.get_tensor(key) for key in ("frames", "offsets", "embeds")), ids)
        whole = features.offsets[-1] == len(features.frames) and len(ids) == len(features.embeds)
        if whole and ids == [clip.id for clip in split.clips if clip.id not in set(bad)]:
            return features, bad
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, KeyError, TypeError):
        pass
    print(f"{path}: is damaged and is built again", flush=True)


def _file_hashes(split, folder, pool):
    """{id: sha256 of its file}, remembered while its size and time of change stay: reading all takes long."""
    memo = folder / f"files_{split.hash[:32]}.json"
    try:
        known = json.loads(_text(memo))
    except ValueError:  # InputError when there is none
        known = {}

    def stamped(clip):
        try:
            stat = os.stat(clip.path)
            stamp = [os.path.realpath(clip.path), stat.st_size, stat.st_mtime_ns]
            if clip.id in known and known[clip.id][:3] == stamp:
                return known[clip.id]
            digest = hashlib.sha256()
            with open(clip.path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            return [*stamp, digest.hexdigest()]
        except OSError as error:  # decoding will name it
            return [str(clip.path), 0, 0, error.strerror]

    entries = dict(zip([clip.id for clip in split.clips], pool.map(stamped, split.clips)))
    if entries != known:
        write_json(memo, entries)
    return {id: entry[3] for id, entry in entries.items()}


# ---------------------------------------------------------------- the frozen backbone

SOUND_PROMPT = "Describe the sound."
VIDEO_PROMPT = "Describe the video."


class Backbone:
    """A frozen LLaVA: .llava, .decoder (what a fusion attaches to), .tokenizer, .device.

    Prompts and answers are written as the checkpoint's own chat template writes them.
    Raises InputError when it cannot be loaded or its parts do not fit together.
    """

    def __init__(self, path, device):
        from transformers import AutoProcessor, LlavaForConditionalGeneration, logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.path, self.device = str(path), torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            self.llava = LlavaForConditionalGeneration.from_pretrained(
                self.path, dtype=dtype, use_safetensors=True)
            self.processor = AutoProcessor.from_pretrained(self.path)
        except (OSError, ValueError, KeyError) as e:
            reason = " ".join(str(e).split())[:160]
            raise InputError(f"{path}: cannot be loaded as LLaVA ({reason}); "
                             "--llava takes a checkpoint folder or a hub name") from e
        self.llava = self.llava.to(self.device).eval().requires_grad_(False)
        self.tokenizer = self.processor.tokenizer
        self.decoder = self.llava.model.language_model
        # a template may write <s>; a tokenizer that adds one itself must not see it
        first = self.tokenizer("question").input_ids[:1]
        adds_bos = first == [self.tokenizer.bos_token_id]
        self.bos = self.tokenizer.bos_token if adds_bos else ""
        self._check_images()
        self.before_answer, self.eos = self._answer_format()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self.eos)
        self.pad = self.tokenizer.pad_token_id
        # concat's placeholders carry no content of their own; a word repeated
        # sixteen times would derail a small decoder
        self.placeholder = self.pad

    def _check_images(self):
        """Tell the processor what old checkpoints leave out: how many tokens an image takes."""
        config, processor = self.llava.config, self.processor
        names = [name for name, _ in self.llava.model.vision_tower.named_parameters()]
        has_cls = any(n.endswith(("class_embedding", "cls_token")) for n in names)
        processor.patch_size = config.vision_config.patch_size
        processor.num_additional_image_tokens = int(has_cls)
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        image, reason = config.image_token_id, "it does not"
        try:
            ids = self.tokenizer(self.chat("question", image=True)).input_ids
        except (jinja2.TemplateError, TypeError, ValueError) as e:
            ids, reason = [], " ".join(str(e).split())[:160]
        if ids.count(image) != 1:
            raise InputError(f"{self.path}: a question about an image must hold one token {image}, "
                             f"{processor.image_token} ({reason}); the folder needs the model's "
                             "own tokenizer and chat_template.jinja")

    def _answer_format(self):
        """(text between a prompt and its answer, id of the token that ends an answer).

        As the chat template renders them. Where it renders no answer, or begins it otherwise
        than it ends the prompt: a space, or nothing after white space. Where no special token
        follows the answer: the tokenizer's eos.
        """
        prompt, answer = self.chat("question"), "@answer@"
        try:
            whole = self.chat("question", answer=answer)
        except (jinja2.TemplateError, TypeError, ValueError):
            whole = ""
        before, _, after = whole.partition(answer)
        if answer in whole and before.startswith(prompt):
            between = before[len(prompt):]
        else:
            between = "" if prompt[-1:].isspace() else " "
        eos = self.tokenizer.eos_token_id
        for id, token in self.tokenizer.added_tokens_decoder.items():
            if token.special and after.startswith(token.content):
                eos = id
        return between, eos

    def autocast(self):
        if self.device.type == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    @functools.lru_cache(maxsize=1024)  # noqa: B019  filling the template takes .2 ms
    def chat(self, text, image=False, answer=None):
        """A user's turn in the model's own chat format, up to the answer, or with it."""
        content = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        turns = [{"role": "user", "content": content}]
        if answer is not None:
            content = [{"type": "text", "text": answer}]
            turns.append({"role": "assistant", "content": content})
        chat = self.processor.apply_chat_template(turns, add_generation_prompt=answer is None)
        return chat.removeprefix(self.bos)

    def prompt(self, text, placeholders=0):
        """Token ids of a prompt without an image, and the positions of its placeholders.

        The placeholders are where an image would be; None where there are none.
        """
        if not placeholders:
            return self.tokenizer(self.chat(text)).input_ids, None
        ids = self.tokenizer(self.chat(text, image=True)).input_ids
        first = ids.index(self.llava.config.image_token_id)
        ids[first:first + 1] = [self.placeholder] * placeholders
        return ids, list(range(first, first + placeholders))

    def caption_ids(self, text, caption):
        """Token ids of a caption as the answer to a prompt, with the end token."""
        prompt = self.tokenizer(self.chat(text)).input_ids
        answer = self.before_answer + caption
        whole = self.tokenizer(self.chat(text) + answer).input_ids
        if whole[:len(prompt)] == prompt:
            ids = whole[len(prompt):]
        else:  # the tokenizer joins the prompt's end and the caption's beginning
            ids = self.tokenizer(answer, add_special_tokens=False).input_ids
        return ids + [self.eos]

    def text(self, ids):
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())


@functools.lru_cache(maxsize=2)  # several runs in one process share their models
def load_backbone(path, device):
    return Backbone(path, device)


@functools.lru_cache(maxsize=2)
def load_encoder(path, modality, device):
    return (VideoEncoder if modality == "video" else AudioEncoder)(path, device)


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"
