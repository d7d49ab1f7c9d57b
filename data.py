"""Datasets in their usual layouts, decoding of sound, video and images, and the cache of encoder features.

    python -c "import data; print(data.read_split('audiocaps', 'tiny/data/audiocaps', 'test').clips[0])"
    python -c "import data; print(data.decode_audio('tiny/data/av/videos/test_0000.mp4', 16000).shape)"

A person's mistake raises InputError: one line with the file, its line and what to do. Nothing is unpickled,
and no code that comes with a model is run.
B: clips. S: encoder frames. E: encoder width. P: width of the space that sound and text share. F: pictures.
"""
try:
    import torchaudio
except (OSError, RuntimeError):
    # torchaudio's wheel links CUDA. Beside a torch without CUDA (OSError) or with another version of it
    # (RuntimeError) its compiled half cannot be loaded, and then neither can transformers' LLaVA. Its
    # Python half is all that we need.
    import sys
    sys.modules["torchaudio._extension.utils"]._load_lib = lambda lib: False
    import torchaudio

import argparse
import collections
import contextlib
import csv
import difflib
import fcntl
import filecmp
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import tempfile
import unicodedata
import urllib.parse
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import av.sidedata.sidedata
import jinja2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

MAX_SECONDS = 600  # of a clip's sound; the rest is ignored
MEDIA = (".wav .flac .mp3 .ogg .oga .opus .m4a .aac .wma .aif .aiff .au "
            ".mp4 .m4v .mkv .mka .webm .mov .avi .wmv .flv .mpg .mpeg .3gp").split()
CLOTHO = {"train": "development", "val": "validation", "test": "evaluation"}
FOLDERS = {"train": "train", "development": "train", "dev": "train", "val": "val", "validation": "val",
           "test": "test", "evaluation": "test", "eval": "test"}  # words in the names of a split's folders
DCASE = {"test": "DCASE", "analysis": "DCASE"}  # with Clotho these hold other recordings
UNSAFE = r"""[<>:"/\\|?*'‘’“”\u29f8\uf000-\uf0ff\x00-\x1f]"""  # what file systems and unpackers replace
CHUNK = 16  # clips that an encoder takes at once
THREADS = min(16, os.cpu_count())  # more would wait for Python's lock, held for a fifth of decoding or more
KEPT = 1000  # answers to keep: of questions, and as many captions
CACHE_FORMAT = {"audio": 1, "video": 2}  # raise it when decoding, windows or pooling change


class InputError(ValueError):
    """A person's mistake: one line that says what is wrong, where, and what to do."""


@contextlib.contextmanager
def _replacing(path):
    """A temporary path that replaces `path` at the end of the block, so nobody reads half a file."""
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
    """Write a text file atomically. Raises InputError if that fails."""
    with _replacing(path) as tmp:  # half a surrogate pair, which UTF-8 lacks, is written as JSON's \\udc80
        tmp.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path, obj):
    """Write JSON atomically. Raises InputError as write_text does, and ValueError for NaN or infinity."""
    write_text(path, json.dumps(obj, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- data sets

@dataclass(frozen=True)
class Clip:
    id: str            # another one for each clip, or for each question about it
    path: Path | None  # None: no file has one of its names; read_split counts it as missing
    references: list[str]
    question: str | None = None  # in an audio-visual set with questions; the references are answers


@dataclass
class Split:
    name: str
    clips: list[Clip]
    missing: list[str]  # ids of clips without a file
    bad: list[str] = field(default_factory=list)  # ids of clips that cannot be decoded

    @property
    def hash(self):
        """sha256 of the ids, questions and references of the clips in use, in any order."""
        return _sha(sorted([c.id, c.question or "", *c.references] for c in self.clips))


@dataclass(frozen=True)
class Question:
    id: str
    image: Path | None  # None: a question without an image
    question: str
    answer: str
    kind: str


def read_split(dataset, root, split):
    """Read "train", "val" or "test" of "audiocaps", "clotho" or "av" in the folder `root` and those below.

    Clips without a file are listed in `missing`. Raises InputError for an error in the table, for a clip that
    could be either of two files, and when no clip has a file."""
    if dataset not in READERS or split not in CLOTHO:
        *others, last = READERS
        raise InputError(f"{dataset} {split}: choose {', '.join(others)} or {last} and train, val or test")
    root = Path(root)
    table = root / (f"clotho_captions_{CLOTHO[split]}.csv" if dataset == "clotho" else f"{split}.csv")
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the one that holds {table.name}")
    files = _walk(root, FOLDERS | DCASE if dataset == "clotho" else FOLDERS)
    tables = [path for path in files if path.name.lower() == table.name]
    if not tables:
        raise InputError(f"{table}: cannot be read (it is not there or in a folder below); is this {dataset}?")
    if table not in tables:
        table, *others = tables
        for other in others:
            if not filecmp.cmp(table, other, shallow=False):
                raise InputError(f"{root}: holds two tables, {table} and {other}; give a folder with one of "
                                 "them, or move one away")
    clips = READERS[dataset](table, files, split)
    missing = [clip.id for clip in clips if not clip.path]
    if 10 * len(missing) > len(clips):
        media = [path for path in files if _stem(path.name)[1]]
        unused = {path.name for path in set(media) - {clip.path for clip in clips}}
        names = sorted(unused or {path.name for path in media[:1000]})
        nearest = ", ".join(map(ascii, difflib.get_close_matches(missing[0], names, 3, 0))) or "none"
        if len(missing) == len(clips):
            raise InputError(f"{table}: none of its {len(clips)} clips, such as {missing[0]}, has a file in "
                             f"{root} or a folder below; nearest names there: {nearest}")
        print(f"{table}: {len(missing)} of {len(clips)} clips, such as {missing[0]}, have no file; "
              f"nearest names there: {nearest}")
    return Split(split, [clip for clip in clips if clip.path], missing)


def _walk(root, words):
    """{path: split or None} of the files in `root` and below, as the name of the deepest folder says.

    words: {word in a folder's name: split}. Links to folders are followed. Loops are not: no folder is read
    inside itself, or more than three times."""
    files, visits, queue = {}, {}, [(root, None, ())]
    for folder, split, above in queue:
        stat = os.stat(folder)
        key = stat.st_dev, stat.st_ino
        visits[key] = visits.get(key, 0) + 1
        if key in above or visits[key] > 3 or not os.access(folder, os.R_OK | os.X_OK):
            continue
        for name in sorted(os.listdir(folder)):
            path = folder / name
            if os.path.isfile(path) and not name.startswith("._"):  # macOS keeps notes in such files
                files[path] = split
            elif os.path.isdir(path) and name[0] != "." and name not in ("__MACOSX", "@eaDir"):
                splits = {words[word] for word in re.findall("[a-z]+", name.lower()) if word in words}
                queue.append((path, splits.pop() if len(splits) == 1 else split, (*above, key)))
    return files


def _match(table, wanted, files, rank):
    """{name: path} from {name: [keys, strictest first]} and {path: keys}.

    A file goes to the name that wants it with the strictest keys; if two names do, to neither. A name takes its
    file of lowest rank(name, path). Raises InputError if another one has that rank and other bytes."""
    index, matches, taken = {}, {}, set()
    for path, keys in files.items():
        for key in keys:
            index.setdefault(key, []).append(path)
    for level in range(max(map(len, wanted.values()))):
        claims = {}
        for name in wanted.keys() - matches.keys():
            for key in wanted[name][level]:
                for path in index.get(key, ()):
                    claims.setdefault(path, set()).add(name)
        for path in claims.keys() - taken:
            if len(claims[path]) == 1:
                matches.setdefault(*claims[path], []).append(path)
        taken |= claims.keys()
    paths = {}
    for name in filter(matches.get, wanted):
        first, *others = sorted(matches[name], key=lambda path: (rank(name, path), path))
        for other in others:
            if rank(name, other) == rank(name, first) and not filecmp.cmp(first, other, shallow=False):
                raise InputError(f"{table}: {name} could be {first} or {other}; move one of them away")
        paths[name] = first
    return paths


def _audiocaps(table, files, split):
    """Clips of an AudioCaps table; path is None if no file has one of the usual names.

    These are youtube_id_start and youtube_id_start_end in seconds or milliseconds; youtube_id, if the table
    has it once; the same with a Y before it; and audiocap_id."""
    clips, numbers, starts = {}, set(), {}
    for location, row in _rows(table, {"audiocap_id", "youtube_id", "start_time", "caption"}):
        number, video, time = row["audiocap_id"], _inside(location, row["youtube_id"]), row["start_time"]
        if number in numbers:
            raise InputError(f"{location}: audiocap_id {number!r} appears a second time")
        if not re.fullmatch(r"\d{1,5}(\.\d{1,3})?", time):
            raise InputError(f"{location}: start_time {time[:40]!r} is not a number of seconds")
        numbers.add(number)
        start = float(time)
        starts.setdefault(video, set()).add(start)
        *_, references, ids = clips.setdefault(f"{video}_{start:g}", (location, video, start, [], []))
        references += filter(None, [_clean(location, row["caption"])])
        ids.append((number.removesuffix(".0"), None))
    wanted = {}
    for id, (location, video, start, references, ids) in clips.items():
        if not references:
            raise InputError(f"{location}: clip {video} has no caption")
        other = f"Y{video}"
        bare = [(video, None), (other, None)] if len(starts[video]) == 1 else []
        milliseconds = [(video, 1000 * start), (other, 1000 * start)]
        wanted[id] = [[(video, start)], [(other, start)], milliseconds, bare, ids]
    keys = {path: _clip_keys(path.name, files[path] in (split, None)) for path in files}
    # one in a folder named after the split is preferred, then sound
    paths = _match(table, wanted, keys, lambda id, path: (files[path] != split, MEDIA.index(_stem(path.name)[1])))
    return [Clip(id, paths.get(id), references) for id, (*_, references, _) in clips.items()]


def _clip_keys(name, bare):
    """Keys of a file of AudioCaps: (id, start) and, if `bare`, (whole name, None)."""
    stem, suffix = _stem(name)
    keys, number = [(stem, None)] if bare else [], r"[_-](\d+(?:\.\d+)?)"
    if match := re.fullmatch(f"(.+){number}", stem):
        keys.append((match[1], float(match[2])))
    if match := re.fullmatch(f"(.+){number}{number}", stem):
        length = float(match[3]) - float(match[2])
        if 0 < length <= 10 or 1000 < length <= 10_000:
            keys.append((match[1], float(match[2])))
    return keys if suffix else []


def _named_files(table, files, split):
    """Clips of a table with file_name and either caption_1, caption_2, … or question and answer."""
    clips, questions = [], {}
    for location, row in _rows(table, {"file_name", "caption_1"}, {"file_name", "question", "answer"}):
        name, question = _inside(location, row["file_name"]), None
        columns = [c for c in row if re.fullmatch(r"caption_\d+", c)]
        if {"question", "answer"} <= row.keys():
            columns, question = ["answer"], _clean(location, row["question"])
        references = list(filter(None, [_clean(location, row[c]) for c in columns]))
        if not references or question == "":
            raise InputError(f"{location}: clip {name} has no caption, or no question or answer")
        earlier = questions.setdefault(name, [])
        if question in earlier:
            raise InputError(f"{location}: file_name {name!r} appears a second time")
        earlier.append(question)
        number = f"#{len(earlier)}" if len(earlier) > 1 else ""  # several questions about one clip
        clips.append((name, name + number, references, question))
    paths = _locate(questions, table, files, split)
    return [Clip(id, paths.get(name), *rest) for name, id, *rest in clips]


def _locate(names, table, files, split):
    """{name: path} for the names in a table: the file as named, else the nearest spelling."""
    wanted, keys, depths = {}, {}, {0}
    for name in names:
        *parents, base = re.split(r"[/\\]+", name)
        depths.add(len(parents))
        loose = _name_keys(base)
        if not re.search(UNSAFE, base):
            loose[3] = None
        exact = [table.parent / folder / name for folder in ("videos", CLOTHO[split], split, "")]
        wanted[name] = [exact] + [[(*parents, key)] for key in loose] + [[(key,)] for key in loose]
    for path in files:
        keys[path] = [path] if files[path] != "DCASE" else []
        if files[path] in (split, None):
            loose = {key for spelling in _spellings(path.name) for key in _name_keys(spelling)}
            keys[path] += [(*path.parts[-1 - depth:-1], key) for depth in depths for key in loose]
    return _match(table, wanted, keys, lambda name, path: (  # in the order of the exact names, then the rest
        [*wanted[name][0], path].index(path), files[path] != split, path.name != name))


# dataset: reader(table, {path: split that its folder's name says, or None}, split) -> [Clip]
READERS = {"audiocaps": _audiocaps, "clotho": _named_files, "av": _named_files}


def _stem(name):
    """(stem, suffix) of a file name without white space at its ends; suffix "" if it is none of MEDIA."""
    name = re.sub("[\u200b-\u200f\ufeff]", "", unicodedata.normalize("NFC", name)).strip().rstrip(". ")
    stem, suffix = map(str.strip, os.path.splitext(name))
    return (stem, suffix.lower()) if suffix.lower() in MEDIA else (name, "")


def _name_keys(name):
    """Keys of a file name: itself, its stem, and that with unsafe characters replaced by _ or left out."""
    stem, suffix = _stem(name)
    text = unicodedata.normalize("NFKC", urllib.parse.unquote(stem)).casefold()
    replaced, without = re.sub(rf"({UNSAFE}|[\s_])+", "_", text), re.sub(rf"{UNSAFE}|[\s_-]", "", text)
    return [(0, stem + suffix), (1, stem), (2, replaced), (3, without)]


def _spellings(name):
    """A name on disk, and what it was before it was unpacked with a wrong encoding."""
    names = {name, re.sub("#U([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), name)}
    for encoding in ("cp437", "cp1252", "latin-1"):
        with contextlib.suppress(UnicodeError):
            names.add(os.fsencode(name).decode(encoding))
        with contextlib.suppress(UnicodeError):
            names.add(name.encode(encoding).decode())
    return names


def _rows(table, *alternatives):
    """[("file:line", {column: text})] of a CSV that has all the columns of one of the alternatives."""
    text = _text(table)
    delimiter = max(",;\t", key=re.split("[\r\n]", text)[0].count)  # some spreadsheets write ; or tabs
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    rows, line = [], 1
    try:
        header = [column.strip().lower() for column in next(reader, [])]
        while header and not header[-1]:  # spreadsheets write empty columns
            header.pop()
        if not any(columns <= set(header) for columns in alternatives) or len(set(header)) < len(header):
            wanted = " or ".join(", ".join(sorted(columns)) for columns in alternatives)
            raise InputError(f"{table}:1: needs the columns {wanted}, each once; found {ascii(header)[:200]}")
        line = reader.line_num + 1
        for cells in reader:
            cells = [cell.replace("\xa0", " ").strip() for cell in cells]
            if any(cells):
                if len(cells) < len(header) or any(cells[len(header):]):
                    raise InputError(f"{table}:{line}: has {len(cells)} fields and the header {len(header)}; "
                                     "a text with a comma needs quotes")
                rows.append((f"{table}:{line}", dict(zip(header, cells))))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{table}:{line}: is not CSV ({error})") from None
    if not rows:
        raise InputError(f"{table}: has no rows")
    return rows


def _text(path):
    content = b""
    try:
        content = Path(path).read_bytes()
        if b"\0" in content[:4]:
            raise InputError(f"{path}: is UTF-16 or no text; save the file as UTF-8")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: is not UTF-8; save the file as UTF-8") from None


def _clean(location, text, limit=2000):
    """One line of printable text: white space collapsed, terminal escapes and control characters removed."""
    if len(text) > limit:
        raise InputError(f"{location}: has a text of {len(text):,} characters; the limit is {limit:,}")
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?)?", "", text)
    text = "".join(c for c in text if c.isprintable() or c.isspace())
    return " ".join(text.split())


def _inside(location, name):
    """`name`, if it is a file name that does not lead out of its folder."""
    valid = isinstance(name, str) and name.isprintable() and re.match(r"[^/\\]", name)
    if not valid or ".." in re.split(r"[/\\]", name):
        raise InputError(f"{location}: {ascii(name)[:200]} is not a file name, or leads out of its folder")
    return name


def _sha(obj):
    return hashlib.sha256(json.dumps(obj, sort_keys=True, default=str).encode()).hexdigest()


def read_qa(path, images=None, limit=1000, seed=0, text_only=False):
    """([Question], sha256): a seeded subset of a file of questions about images, and its hash.

    Reads LLaVA-Instruct JSON, a list of {id, image, conversations} (the first exchange of each), and JSONL or
    a JSON list of {image, question, answer}. Images are in the folder `images`, else in images/ beside the
    file, else beside it. text_only: also the questions without an image. Raises InputError for a record
    without question or answer, and for a chosen image that does not exist."""
    path, questions, counts = Path(path), [], {}
    for location, record in _records(path):
        pictured = not isinstance(record, dict) or "image" in record
        if not pictured and not text_only and "conversations" in record:
            continue  # LLaVA's mixtures have talks without an image
        id, *rest = _question(location, record, len(questions), pictured or not text_only)
        counts[id] = counts.get(id, 0) + 1  # LLaVA-Instruct has several talks with one id
        questions.append((f"{id}#{counts[id]}" if counts[id] > 1 else id, *rest))
    if not questions:
        raise InputError(f"{path}: has no questions about images")
    chosen = sorted(questions, key=lambda q: _sha([seed, *q[1:], q[0]]))[:limit]
    beside = path.parent / "images"
    folder = Path(images) if images else beside if beside.is_dir() else path.parent
    absent = [row[1] for row in chosen if row[1] and not os.path.isfile(folder / row[1])]
    if absent:
        raise InputError(f"{path}: {len(absent)} of {len(chosen)} chosen images, such as {absent[0][:80]}, "
                         f"are not in {folder}")
    questions = [Question(id, name and folder / name, *rest) for id, name, *rest in chosen]
    return questions, _sha(chosen)


def read_kept(path):
    """[Question]: a seeded subset of the questions of train.py's --keep-qa."""
    return read_qa(path, limit=KEPT, text_only=True)[0]


def check_apart(path, probe):
    """Raises InputError if questions to keep share an image with the probe."""
    seen = set(map(content, probe))
    shared = [q.id for q in read_kept(path) if content(q) in seen]
    if shared:
        raise InputError(f"{path}: {len(shared)} of its questions, such as {shared[0]}, are in the probe; "
                         "give --keep-qa a file of questions about other images")


@functools.lru_cache(maxsize=None)  # checked against the probe, and part of the answers' key
def content(question):
    """What a question is about: sha256 of its image's bytes, or the question where it has none."""
    if question.image is None:
        return question.question
    try:
        return hashlib.sha256(question.image.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{question.image}: cannot be read ({error.strerror})") from None


def _records(path):
    """[("file:line", object)] of a JSONL file or a JSON list."""
    text, line = _text(path), 1
    try:
        if text.lstrip().startswith("["):
            return [(f"{path}: record {n}", record) for n, record in enumerate(json.loads(text), 1)]
        records = []
        for line, row in enumerate(text.split("\n"), 1):
            if row.strip():
                records.append((f"{path}:{line}", json.loads(row)))
        return records
    except (ValueError, RecursionError) as error:
        line, reason = line + getattr(error, "lineno", 1) - 1, getattr(error, "msg", "too deep or large")
        raise InputError(f"{path}:{line}: is not JSON ({reason})") from None


def _question(location, record, number, pictured):
    """(id, image, question, answer, kind) of a record; image is None unless it is pictured."""
    try:
        if "conversations" in record:
            turns = {turn["from"]: turn["value"] for turn in record["conversations"][:2]}
            question, answer = turns["human"].replace("<image>", ""), turns["gpt"]
        else:
            question, answer = record.get("question", record.get("text")), record["answer"]
        if not isinstance(answer, str | int | float):  # null would be the text "None"
            raise TypeError
        question = "\n".join(_clean(location, line, 20_000) for line in question.strip().split("\n"))
        answer = _clean(location, str(answer), 20_000)
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{location}: lacks a question or its answer; the probe needs both") from None
    if not question or not answer:
        raise InputError(f"{location}: has an empty question or answer")
    id = _clean(location, str(record.get("id", record.get("question_id", number))))
    kind = _clean(location, str(record.get("kind", record.get("category", ""))))
    image = _inside(location, record.get("image")) if pictured else None
    return id, image, question, answer, kind


# ---------------------------------------------------------------- sound and video

def _decoded(path, kind):
    """Decoded frames of the first stream of `kind` ("audio" or "video"); damaged packets are skipped."""
    good = damaged = 0
    options = {"protocol_whitelist": "file"}  # a playlist named .wav must not open network addresses
    try:
        with av.open(f"file:{path}", metadata_errors="ignore", options=options) as file:
            streams = [stream for stream in file.streams if stream.type == kind
                       and not stream.disposition & av.stream.Disposition.attached_pic]  # a cover is no film
            if not streams:
                raise InputError(f"{path}: has no {kind} stream")
            for packet in file.demux(streams[0]):
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    damaged += 1
                    continue
                good += bool(frames)
                yield from frames
    except (av.FFmpegError, OSError) as error:
        reason = f"decoded as {kind} ({error.strerror or error})"
        if not good:
            raise InputError(f"{path}: cannot be {reason}") from None
        _print_once(f"{path}: only a first part can be {reason}")
    if damaged >= good:  # a few bad packets are tolerated, as every player does
        raise InputError(f"{path}: cannot be decoded as {kind} (empty or damaged)")


@functools.lru_cache(maxsize=None)
def _print_once(text):
    """Print a note on a file, which may be decoded several times and have any bytes in its name."""
    print(text.encode(errors="backslashreplace").decode(), flush=True)


def decode_audio(path, rate, max_seconds=MAX_SECONDS):
    """Sound of any audio or video file as mono float32 (samples,) at `rate` Hz, at most `max_seconds` of it.

    Channels are averaged. Raises InputError when there is no sound in the file or it is not finite."""
    waves, seconds = [torch.zeros(0)], 0
    for (source, *_), frames in itertools.groupby(_decoded(path, "audio"), _layout):
        if not 1000 <= source <= 1_000_000:
            raise InputError(f"{path}: has a sample rate of {source}, which is impossible")
        wave = _mono(path, frames, (max_seconds - seconds) * source)
        seconds += len(wave) / source
        # odd rates (44,101 Hz) would need a filter bank of gigabytes: a ratio within 1e-6 will do
        ratio = Fraction(source, rate).limit_denominator(1000)
        waves.append(torchaudio.functional.resample(wave, ratio.numerator, ratio.denominator))
        if seconds > max_seconds:
            break
    wave, limit = torch.cat(waves), int(max_seconds * rate)
    if not len(wave) or not wave.isfinite().all():
        raise InputError(f"{path}: has no samples, or some that are not finite")
    if len(wave) > limit:
        _print_once(f"{path}: is longer than {max_seconds:g} seconds; the rest of its sound is ignored")
    return wave[:limit].numpy()


def _layout(frame):
    return frame.sample_rate, frame.layout.name, frame.format.name  # may change midway


def _mono(path, frames, limit):
    """Mean of the channels of frames of one format, (samples,); stops soon after `limit` samples."""
    # interleaved on purpose: PyAV reads past the end of 8 and more separate channels
    packer, mono, count = av.AudioResampler("flt", frame_size=8192), [np.zeros(0, np.float32)], 0
    for frame in itertools.chain(frames, [None]):  # None: what the packer still holds
        last = frame is None or count > limit
        try:
            blocks = packer.resample(None if last else frame)
        except (ValueError, av.FFmpegError):
            raise InputError(f"{path}: its channels or sample format cannot be converted") from None
        mono += [block.to_ndarray().reshape(-1, block.layout.nb_channels).mean(1) for block in blocks]
        if last:
            return torch.from_numpy(np.concatenate(mono))
        count += frame.samples


def decode_video(path, frames):
    """`frames` pictures of a video, evenly spaced over those that decode: uint8 (frames, H, W, 3), upright.

    A shorter video repeats pictures. Raises InputError when it has no picture."""
    # two passes: all pictures of a minute of video would fill gigabytes
    count = sum(1 for _ in _decoded(path, "video"))
    numbers = np.linspace(0, count - 1, frames).round().astype(int)
    pictures, first = {}, None
    for i, frame in enumerate(itertools.islice(_decoded(path, "video"), max(numbers) + 1)):
        if frame.width * frame.height > 2 ** 25:
            raise InputError(f"{path}: pictures of {frame.width} x {frame.height} are too large")
        if first is None:  # every picture gets its size and its orientation
            first = frame
        if i in numbers:
            picture = frame.to_ndarray(format="rgb24", width=first.width, height=first.height)
            pictures[i] = _upright(picture, first)
    return np.stack([pictures[i] for i in numbers])


def _upright(picture, frame):
    """A picture (H, W, 3) turned and flipped as the display matrix of `frame` says."""
    matrix = frame.side_data.get(av.sidedata.sidedata.Type.DISPLAYMATRIX)
    if matrix is None:
        return picture
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]  # shown at x' = ax + cy, y' = bx + dy
    if abs(b) > abs(a):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


def open_image(path):
    """An image as an upright RGB PIL image. Raises InputError for a file that is broken or far too large."""
    from PIL import Image, ImageOps
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I;16"):  # convert() would cut off all above 255
                    image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
                return image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS // 10 ** 6
        raise InputError(f"{path}: has more than {limit} million pixels; make it smaller") from None
    except Exception as error:  # PIL's readers raise whatever their parsers meet
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read as an image ({reason})") from None


def noisy(wave, snr_db, generator, noise=None):
    """`wave` (samples,) with white noise, or the recording `noise` looped, `snr_db` decibels below it.

    `generator` is a torch.Generator. A silent clip has no level to compare with and is returned as it is."""
    if noise is None:
        noise = torch.randn(len(wave), generator=generator)
    else:
        start = int(torch.randint(len(noise), (), generator=generator))
        noise = torch.from_numpy(np.resize(np.roll(noise, -start), len(wave)).astype(np.float32))
    if not noise.any():
        raise InputError("the noise is silent; choose another recording")
    if not wave.any():
        return wave
    snr = torch.tensor(float(snr_db))
    return torchaudio.functional.add_noise(torch.from_numpy(wave), noise, snr).numpy()


# ---------------------------------------------------------------- frozen encoders

def _pretrained(path, model_class, processor_class, dtype=torch.float32):
    """A frozen model, its preprocessor, and the sha256 of the settings behind its output."""
    local = Path(path).is_dir()
    try:  # safetensors only: a pickle in a downloaded folder could run anything
        model, report = model_class.from_pretrained(
            path, use_safetensors=True, local_files_only=local, dtype=dtype, output_loading_info=True)
        processor = processor_class.from_pretrained(path, local_files_only=local)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: cannot be loaded as {model_class.__name__} ({reason}); give a "
                         "checkpoint's folder or a hub name") from None
    lacking = sorted(report["missing_keys"])
    if lacking:  # transformers would draw them at random and go on
        raise InputError(f"{path}: no {model_class.__name__}; {len(lacking)} weights lack: {lacking[0]}")
    settings = [model.config.to_dict(), getattr(processor, "feature_extractor", processor).to_dict()]
    for key in ("_name_or_path", "transformers_version", "processor_class"):  # no effect on the output
        for part in settings:
            part.pop(key, None)
    return model.requires_grad_(False), processor, _sha(settings)


def _hash_model(settings, model):
    """sha256 of a text and of a model's weights, by name."""
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.cpu().contiguous().reshape(-1)
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return digest.hexdigest()


class AudioEncoder:
    """A frozen CLAP from a folder or hub name: `.hash`, `.rate` in Hz, `.width` (E), `.embed_dim` (P).

    Raises InputError when it cannot be loaded."""

    def __init__(self, path, device="cpu"):
        from transformers import ClapModel, ClapProcessor  # here, because it is slow to import
        self.path, self.device = str(path), device
        self.model, processor, settings = _pretrained(path, ClapModel, ClapProcessor)
        self.hash = _hash_model(settings, self.model)
        self.model.to(device)
        self.tokenizer, self.extractor = processor.tokenizer, processor.feature_extractor
        self.rate, self.size = self.extractor.sampling_rate, int(self.extractor.nb_max_samples)
        self.width = self.model.config.audio_config.hidden_size
        self.embed_dim = self.model.config.projection_dim

    def prepare(self, wave):
        """(mels, shares) of a mono float32 wave, for `encode_prepared`; threads may call this at once.

        mels: (windows, channels, time, mel) float32 of consecutive windows, the last one right-aligned.
        shares: the part of each window that no earlier one holds."""
        size, tail = self.size, len(wave) % self.size if len(wave) > self.size else 0
        windows = [wave[i:i + size] for i in range(0, max(len(wave) - size, 0) + 1, size)]
        shares = [1.0] * len(windows)
        if tail >= self.rate:  # a tail below one second is dropped
            windows.append(wave[-size:])
            shares.append(tail / size)
        mels = self.extractor(windows, sampling_rate=self.rate, return_tensors="pt")["input_features"]
        return mels.float(), shares

    @torch.no_grad()
    def encode_prepared(self, prepared, batch_size=32):
        """As `encode`, of what `prepare` returned for each clip; batch_size: windows at once."""
        windows = []
        for i, (mels, shares) in enumerate(prepared):
            windows += [(i, mel, share) for mel, share in zip(mels, shares)]
        frames = [[] for _ in prepared]
        embeds = torch.zeros(len(prepared), self.embed_dim)
        for start in range(0, len(windows), batch_size):
            batch = windows[start:start + batch_size]
            mels = torch.stack([mel for _, mel, _ in batch]).to(self.device, non_blocking=True)
            # for the fused model the extractor marks a random clip as longer than the window; none is
            longer = torch.zeros(len(batch), 1, dtype=torch.bool, device=self.device)
            out = self.model.get_audio_features(mels, is_longer=longer)
            hidden = out.last_hidden_state.mean(2).transpose(1, 2).cpu()  # (B, E, freq, S) → (B, S, E)
            for (i, _, share), h, embed in zip(batch, hidden, out.pooler_output.cpu()):
                frames[i].append(h[-math.ceil(share * len(h)):])
                embeds[i] += embed
        frames = [torch.cat(parts) for parts in frames]
        return frames, torch.nn.functional.normalize(embeds, dim=-1)

    def encode(self, waves, batch_size=32):
        """Frames [(S_i, E)] in time order and L2-normalised embeddings (n, P) of mono float32 waves.

        A clip longer than the window is encoded in several: the frames follow each other without overlap, and
        the embedding is the normalised mean."""
        return self.encode_prepared([self.prepare(wave) for wave in waves], batch_size)

    @torch.no_grad()
    def embed_text(self, texts, batch_size=64):
        """L2-normalised embeddings (n, P) of texts, in the space of the clips' embeddings."""
        config = self.model.config.text_config
        max_length = config.max_position_embeddings - config.pad_token_id - 1  # positions start after its id
        embeds = [torch.zeros(0, self.embed_dim)]
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start:start + batch_size])
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=max_length,
                                    return_tensors="pt").to(self.device)
            out = self.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
            embeds.append(out.pooler_output.cpu())
        return torch.nn.functional.normalize(torch.cat(embeds), dim=-1)


class VideoEncoder:
    """A frozen TimeSformer from a folder or hub name: `.hash`, `.frames` a clip (F), `.width` (E)."""

    def __init__(self, path, device="cpu"):
        from transformers import AutoImageProcessor, TimesformerModel
        self.path, self.device = str(path), device
        self.model, self.processor, settings = _pretrained(path, TimesformerModel, AutoImageProcessor)
        self.hash = _hash_model(settings, self.model)
        self.model.to(device)
        self.frames, self.width = self.model.config.num_frames, self.model.config.hidden_size
        self.embed_dim = self.width

    def prepare(self, video):
        """Pixels (F, 3, height, width) of a video uint8 (F, H, W, 3), for `encode_prepared`; for threads."""
        return self.processor([list(video)], return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def encode_prepared(self, prepared, batch_size=8):
        """As `encode`, of what `prepare` returned for each video."""
        frames = []
        for start in range(0, len(prepared), batch_size):
            pixels = torch.stack(prepared[start:start + batch_size])
            B, F = pixels.shape[:2]  # (B, F, 3, height, width)
            pixels = pixels.to(self.device, non_blocking=True)
            hidden = self.model(pixels).last_hidden_state[:, 1:].cpu()  # (B, patches * F, E), no class token
            frames += hidden.reshape(B, -1, F, self.width).mean(1)  # the F moments of a patch are neighbours
        means = [f.mean(0) for f in frames]
        return frames, torch.stack(means) if frames else torch.zeros(0, self.width)

    def encode(self, videos, batch_size=8):
        """Frames [(F, E)] in time order and their means (n, E), of videos uint8 (F, H, W, 3)."""
        return self.encode_prepared([self.prepare(video) for video in videos], batch_size)


# ---------------------------------------------------------------- cache of features

@dataclass
class Features:
    """Encoder frames of clips: `features[i]` is (S_i, E) float32, read from disk when asked for."""
    frames: torch.Tensor  # (sum of S_i, E) float16, memory-mapped
    spans: list[tuple]  # (first, end) of each clip in `frames`
    embeds: torch.Tensor  # (n, P) float32
    ids: list[str]

    def __post_init__(self):
        self.index = {id: i for i, id in enumerate(self.ids)}

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        first, end = self.spans[i]
        return self.frames[first:end].float()

    def of(self, clips):
        """The features of these clips, in their order."""
        return self.take([self.index[clip.id] for clip in clips])

    def take(self, order):
        """The features in another order, by index."""
        spans, ids = [self.spans[i] for i in order], [self.ids[i] for i in order]
        return Features(self.frames, spans, self.embeds[list(order)], ids)


def lock_or_wait(file, message):
    """Lock an open file or descriptor until it is closed. Prints `message` if it has to wait."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(message, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)


@contextlib.contextmanager
def _one_builder(path):
    """Only one job at a time is in the block of a path; the lock goes with the process, however that ends."""
    lock = path.with_suffix(".lock")
    with open(lock, "w") as file:
        lock_or_wait(file, f"waiting for another job that builds {path.name}")
        yield
        lock.unlink(missing_ok=True)  # jobs that wait for it find the finished file


def cached_json(folder, name, parts, make):
    """make(), kept as JSON in `folder` under a hash of `parts`. Of several jobs one makes it, the others wait."""
    path = Path(folder) / f"{name}_{_sha(parts)[:32]}.json"
    if not path.exists():  # a full cache may be read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_builder(path):
            if not path.exists():
                write_json(path, make())
    return json.loads(_text(path))


def load_features(split, encoder, cache_dir, modality="audio"):
    """Features of the clips of `split`, from the cache or computed and stored there.

    The file is named by a hash of the encoder and of the bytes of every clip. Afterwards `split.bad` lists
    the clips that cannot be decoded, `split.clips` has the others, and `features[i]` is of `split.clips[i]`;
    with two modalities look up `features.index[clip.id]`. Of several jobs one computes and the others wait.
    Raises InputError when no clip can be decoded or the cache cannot be written."""
    folder = Path(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(THREADS) as pool:
            hashes = _file_hashes(split, folder, pool)
            key = _sha([CACHE_FORMAT[modality], modality, encoder.hash, hashes])
            path = folder / f"{modality}_{split.name}_{key[:32]}.safetensors"
            cached = _read_features(path, split)
            if cached is None:
                cached = _build_features(path, split, encoder, modality, pool)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read or written ({error.strerror})") from None
    features, bad = cached
    split.bad += [id for id in bad if id not in split.bad]
    split.clips = [clip for clip in split.clips if clip.id in features.index]
    return features


def _build_features(path, split, encoder, modality, pool):
    """As _read_features, after writing the file; if another job is writing it, waits for that."""
    with _one_builder(path):
        cached = _read_features(path, split)
        if cached is None:
            for tmp in path.parent.glob(f"{path.name}.tmp.*"):  # of a job that was killed
                tmp.unlink()
            _write_features(path, split, encoder, modality, pool)
            cached = _read_features(path, split)
    return cached


def _prepare(clip, encoder, modality):
    """The clip, decoded and prepared for the encoder's model."""
    if modality == "video":
        return encoder.prepare(decode_video(clip.path, encoder.frames))
    return encoder.prepare(decode_audio(clip.path, encoder.rate))


def _prepare_ahead(clips, encoder, modality, pool):
    """Yield (clip, job that prepares it); threads are at most 4 * CHUNK clips ahead of the caller."""
    jobs = collections.deque()
    for clip in clips:
        jobs.append((clip, pool.submit(_prepare, clip, encoder, modality)))
        if len(jobs) > 4 * CHUNK:
            yield jobs.popleft()
    while jobs:
        yield jobs.popleft()


def _write_features(path, split, encoder, modality, pool):
    """Encode a split into a cache file. While the model runs, threads prepare the next clips.

    Frames go to an unnamed file as they come, so that memory does not grow with the split."""
    jobs = _prepare_ahead(split.clips, encoder, modality, pool)
    lengths, ids, bad = [0], [], {}
    with tempfile.TemporaryFile(dir=path.parent) as file:
        with tqdm(total=len(split.clips), desc=f"{modality} features, {split.name}", disable=None) as bar:
            while chunk := list(itertools.islice(jobs, CHUNK)):
                clips, inputs = [], []
                for clip, job in chunk:
                    try:
                        inputs.append(job.result())
                        clips.append(clip)
                    except InputError as error:
                        bad[clip.id] = str(error)
                for clip, frames, embed in zip(clips, *encoder.encode_prepared(inputs)):
                    frames = frames.half().contiguous()
                    if not (frames.isfinite().all() and embed.isfinite().all()):
                        bad[clip.id] = f"{clip.path}: its features are not finite"
                        continue
                    if not ids:  # many small tensors between the large ones would fragment the heap
                        width, embeds = frames.shape[1], torch.empty(len(split.clips), len(embed))
                    file.write(frames.numpy())
                    embeds[len(ids)] = embed
                    lengths.append(len(frames))
                    ids.append(clip.id)
                bar.update(len(chunk))
        reasons = [text.encode(errors="backslashreplace").decode() for text in bad.values()]
        if not ids:
            raise InputError(f"none of {len(split.clips)} clips can be decoded; first {reasons[0]}")
        if bad:
            print(*reasons[:10], f"{len(bad)} of {len(split.clips)} clips are left out", sep="\n")
        mapped = np.memmap(file, np.float16, "c").reshape(-1, width)
        tensors = {"frames": torch.from_numpy(mapped), "offsets": torch.tensor(lengths).cumsum(0),
                   "embeds": embeds[:len(ids)]}
        with _replacing(path) as tmp:
            save_file(tensors, tmp, {"ids": json.dumps(ids), "bad": json.dumps(bad)})


def _read_features(path, split):
    """(Features, {id of a bad clip: reason}) of a cache file; None if it is absent or damaged."""
    try:
        with safe_open(path, "pt") as file:
            ids, bad = (json.loads(file.metadata()[key]) for key in ("ids", "bad"))
            spans = list(itertools.pairwise(file.get_tensor("offsets").tolist()))
            features = Features(file.get_tensor("frames"), spans, file.get_tensor("embeds"), ids)
        older = bad and isinstance(bad, list)  # a version that could not decode some of these clips
        if not older and ids == [clip.id for clip in split.clips if clip.id not in bad]:
            return features, bad
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, KeyError, TypeError):
        pass
    _print_once(f"{path}: is damaged or of an older version, and is built again")


def _file_hashes(split, folder, pool):
    """{clip id: sha256 of its file}, kept in `folder` while size and time stay: reading all takes long."""
    memo = folder / f"files_{split.hash[:32]}.json"
    try:
        known = json.loads(_text(memo))
    except ValueError:  # InputError when it is absent
        known = {}
    jobs = {clip.id: pool.submit(_hash_file, clip.path, known.get(clip.id)) for clip in split.clips}
    entries = {id: job.result() for id, job in jobs.items()}
    if entries != known:
        write_json(memo, entries)
    return {id: entry[3] for id, entry in entries.items()}


def _hash_file(path, known):
    """[real path, size, time of change, sha256] of a file: `known` if the first three are the same."""
    try:
        stat = os.stat(path)
        stamp = [os.path.realpath(path), stat.st_size, stat.st_mtime_ns]
        if known and known[:3] == stamp:
            return known
        with open(path, "rb") as file:
            return [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError as error:  # decoding will report it
        return [str(path), 0, 0, error.strerror]


# ---------------------------------------------------------------- the frozen backbone

SOUND_PROMPT = "Describe the sound."
VIDEO_PROMPT = "Describe the video."


class Backbone:
    """A frozen LLaVA: .llava, .decoder (what a fusion attaches to), .tokenizer, .device.

    Prompts and answers are written as the checkpoint's own chat template writes them.
    Raises InputError when it cannot be loaded or its parts do not fit together."""

    def __init__(self, path, device, dtype="auto"):
        from transformers import AutoProcessor, GenerationConfig, LlavaForConditionalGeneration, logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.path, self.device = str(path), torch.device(device)
        if dtype == "auto":
            dtype = "bfloat16" if self.device.type == "cuda" else "float32"
        self.llava, self.processor, _ = _pretrained(
            self.path, LlavaForConditionalGeneration, AutoProcessor, getattr(torch, dtype))
        self.llava.to(self.device)
        # what generate() is not told is its default: many checkpoints bring settings for chats
        self.llava.generation_config = GenerationConfig()
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
        self.placeholder = self.pad  # for concat; a word repeated sixteen times derails a small decoder

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
        follows the answer: the tokenizer's eos."""
        prompt, answer = self.chat("question"), "@answer@"
        try:
            whole = self.chat("question", answer=answer)
        except (jinja2.TemplateError, TypeError, ValueError):
            whole = ""
        before, _, after = whole.partition(answer)
        between = "" if prompt[-1:].isspace() else " "
        if answer in whole and before.startswith(prompt):
            between = before[len(prompt):]
        eos = self.tokenizer.eos_token_id
        for id, token in self.tokenizer.added_tokens_decoder.items():
            if token.special and after.startswith(token.content):
                eos = id
        return between, eos

    @functools.cached_property
    def hash(self):
        """sha256 of the weights and of the chat format: what its answers depend on."""
        return _hash_model(self.chat("question", image=True), self.llava)

    def autocast(self):
        if self.llava.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    @functools.lru_cache(maxsize=1024)  # noqa: B019  filling the template takes .2 ms
    def chat(self, text, image=False, answer=None):
        """A user's turn in the model's own chat format, up to the answer, or with it."""
        question = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        turns = [{"role": "user", "content": question}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        chat = self.processor.apply_chat_template(turns, add_generation_prompt=answer is None)
        return chat.removeprefix(self.bos)

    def prompt(self, text, placeholders=0):
        """Token ids of a prompt without an image, and the positions of its placeholders.

        The placeholders are where an image would be; None where there are none."""
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
def load_backbone(path, device, dtype="auto"):
    return Backbone(path, device, dtype)


@functools.lru_cache(maxsize=2)
def load_encoder(path, modality, device):
    return (VideoEncoder if modality == "video" else AudioEncoder)(path, device)


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name):
    """The name, if torch can use such a device here; as a flag's type it makes one line of an error."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here ({reason})") from None
    return name


def add_device_flags(parser):
    parser.add_argument("--device", type=usable_device, default=default_device(), help="cpu, cuda or cuda:1")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float32"],
                        help="of the backbone; auto: bfloat16 on a GPU, float32 on the CPU")


def from_folder(path, folder):
    """A path that was given in `folder`: as it is if it exists here or is absolute, else from there."""
    there = os.path.join(folder, path)
    return path if os.path.exists(path) or not os.path.exists(there) else there
