"""Datasets in their usual layouts, decoding of sound, video and images, and the cache of encoder features.

    python -c "import data; print(data.read_split('audiocaps', 'tiny/data/audiocaps', 'test').clips[0])"
    python data.py unpack FOLDER_FROM_THE_HUB data/audiocaps
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
import ast
import bisect
import collections
import contextlib
import csv
import errno
import fcntl
import filecmp
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
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
import scipy.io.wavfile
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
KEPT_QUESTIONS = 1000  # of train.py's --keep-qa
MAX_CAPTION = 2000  # characters
MAX_CHARACTERS = 20_000  # of a question or an answer
IMAGE = "<image>"  # the image's place in the files of LLaVA-Instruct
CACHE_FORMAT = {"audio": 1, "video": 2, "clap": 1}  # raise it when decoding, windows or pooling change


class InputError(ValueError):
    """A person's mistake: one line that says what is wrong, where, and what to do."""


@contextlib.contextmanager
def _replacing(path):
    """A temporary path that replaces `path` at the end of the block, so nobody reads half a file."""
    tmp = Path(f"{path}.tmp.{os.getpid()}")
    try:
        tmp.touch()
        mode = tmp.stat().st_mode
        yield tmp
        os.chmod(tmp, mode)  # safetensors lets the owner alone read, whatever the umask says
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


def read_json(path, hint=""):
    """What a .json or .jsonl file holds. Raises InputError, which ends in the hint."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            # not splitlines(), which also ends a line inside a text, at U+2028
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}){hint}") from None


def one_line(error):
    """A library's message as the part of a line."""
    return " ".join(str(error).split())[:300]


def print_escaped(text):
    """Print a line that may hold any file's name; what the console cannot show is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


# a note on a file, which may be met several times
print_once = functools.lru_cache(maxsize=None)(print_escaped)


# ---------------------------------------------------------------- scripts

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES)


def guarded(main, *mistakes):
    """Run a script's main: a person's mistake is one line and exit status 2, Ctrl-C is 130.

    mistakes: further classes of exceptions, beside InputError, that are a person's."""
    # what is imported is never garbage; looking through it again and again, and at the end once more, takes a second
    gc.freeze()
    try:
        # a console that cannot show a name shows its escapes
        sys.stdout.reconfigure(errors="backslashreplace")
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # `| head` has ended: exit status as by SIGPIPE, and no second error when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, *mistakes) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (OSError, SafetensorError) as error:
        # safetensors has the reason in its text alone
        if not any(os.strerror(number) in str(error) for number in UNWRITABLE):
            raise
        print(f"error: {error}; what was saved before is whole, start the same command again when "
              "there is room and permission", file=sys.stderr)
        # a full disk behind standard output would be a second error when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        gc.freeze()  # transformers has come


def versions():
    import transformers
    return {"python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__}


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

    A folder of tables alone, as aac-datasets' csv_files_v2, has its sounds beside it. Clips without a file are
    listed in `missing`. Raises InputError for an error in the table, for a clip that could be either of two
    files, and when no clip has a file."""
    if dataset not in READERS or split not in CLOTHO:
        *others, last = READERS
        raise InputError(f"{dataset} {split}: choose {', '.join(others)} or {last} and train, val or test")
    root = Path(root)
    table = root / _table_name(dataset, split)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give the one that holds {table.name}")
    words = FOLDERS | DCASE if dataset == "clotho" else FOLDERS
    files = _walk(root, words)
    tables = [path for path in files if path.name.lower() == table.name]
    if not tables:
        raise InputError(f"{table}: cannot be read (it is not there or in a folder below); is this {dataset}?")
    if table not in tables:
        table, *others = tables
        for other in others:
            if not filecmp.cmp(table, other, shallow=False):
                raise InputError(f"{root}: holds two tables, {table} and {other}; give the folder of one of "
                                 "them (--data FOLDER/csv_files_v2 finds the sounds beside it), or move one away")
    folder = Path(os.path.abspath(root))
    # only beside a folder with such a name: any other may lie in a home with everything else
    if "csv" in folder.name.lower() and not any(map(_is_media, files)):
        root = folder.parent
        files |= _walk(root, words)
    clips, wanted = READERS[dataset](table, files, split)
    missing = [clip.id for clip in clips if not clip.path]
    # fewer are what YouTube has lost; more are a folder that is not as expected
    if 10 * len(missing) > len(clips):
        unused = set(files) - {clip.path for clip in clips}
        names = sorted({path.name for path in unused if _is_media(path)})
        # names that begin alike are neighbours in the alphabet
        first = max(0, min(bisect.bisect(names, missing[0]) - 1, len(names) - 3))
        there = ", ".join(map(repr, names[first:first + 3])) or "no further sounds or videos"
        hint = f"looked for {', '.join(map(repr, wanted[missing[0]]))}; there: {there}"
        if len(missing) == len(clips):
            raise InputError(f"{table}: none of its {len(clips)} clips, such as {missing[0]}, has a file in "
                             f"{root} or a folder below; {hint}")
        print_once(f"{table}: {len(missing)} of {len(clips)} clips, such as {missing[0]}, have no file; {hint}")
    return Split(split, [clip for clip in clips if clip.path], missing)


def _table_name(dataset, split):
    return f"clotho_captions_{CLOTHO[split]}.csv" if dataset == "clotho" else f"{split}.csv"


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
            # macOS keeps notes in files that begin with ._
            if os.path.isfile(path) and not name.startswith("._"):
                files[path] = split
            elif os.path.isdir(path) and name[0] != "." and name not in ("__MACOSX", "@eaDir"):
                splits = {words[word] for word in re.findall("[a-z]+", name.lower()) if word in words}
                queue.append((path, splits.pop() if len(splits) == 1 else split, (*above, key)))
    return files


def _is_media(path):
    return bool(_stem(path.name)[1])


def _match(table, wanted, files, rank):
    """{name: path} from {name: [key, best first]} and {path: [key]}: the first key that is there wins.

    A file that two names want with their n-th keys is neither's. Of several files for one key a name takes that
    of lowest rank(path). Raises InputError if another one has that rank and other bytes."""
    index, matches, taken = {}, {}, set()
    for path, keys in files.items():
        for key in keys:
            index.setdefault(key, []).append(path)
    # place by place, so that a file goes to the name that wants it most
    for keys in itertools.zip_longest(*wanted.values()):
        claims = {}
        for name, key in zip(wanted, keys):
            for path in index.get(key, ()) if name not in matches else ():
                claims.setdefault(path, []).append(name)
        for path, names in claims.items():
            if path not in taken and len(names) == 1:
                matches.setdefault(names[0], []).append(path)
        taken.update(claims)
    paths = {}
    for name, candidates in matches.items():
        first, *others = sorted(candidates, key=lambda path: (rank(path), path))
        for other in others:
            # equal copies are common, and harmless
            if rank(other) == rank(first) and not filecmp.cmp(first, other, shallow=False):
                raise InputError(f"{table}: {name} could be {first} or {other}; move one of them away")
        paths[name] = first
    return paths


def _audiocaps(table, files, split):
    """(Clips of an AudioCaps table, {id: names that its file may have}).

    These are youtube_id_start and youtube_id_start_end in seconds or milliseconds; youtube_id, if the table
    has it once; the same with a Y before it; and audiocap_id."""
    clips, numbers, starts = {}, set(), {}
    columns = {"audiocap_id", "youtube_id", "start_time", "caption"}
    for location, number, video, start, caption in _rows(table, _audiocaps_row, columns):
        if number in numbers:
            raise InputError(f"{location}: audiocap_id {number!r} appears a second time")
        numbers.add(number)
        starts.setdefault(video, set()).add(start)
        *_, references, ids = clips.setdefault(f"{video}_{start:g}", (video, start, [], []))
        references.append(caption)
        ids.append(number.removesuffix(".0"))
    wanted = {}
    for id, (video, start, _, ids) in clips.items():
        stems = [_timed(video, start), _timed(f"Y{video}", start)]
        # after seconds: 1000 is more often the start of another clip
        stems += [_timed(video, 1000 * start), _timed(f"Y{video}", 1000 * start)]
        if len(starts[video]) == 1:
            stems += [f"{video}.*", f"Y{video}.*"]
        wanted[id] = stems + [f"{number}.*" for number in ids]
    # in another split's folder a name without a start may be another piece of that video
    keys = {path: _clip_keys(path.name, files[path] in (split, None)) for path in files}
    # one in a folder named after the split is preferred, then sound
    paths = _match(table, wanted, keys, lambda path: (files[path] != split, MEDIA.index(_stem(path.name)[1])))
    return [Clip(id, paths.get(id), references) for id, (*_, references, _) in clips.items()], wanted


def _audiocaps_row(location, row):
    video, time, caption = _inside(location, row["youtube_id"]), row["start_time"], _clean(location, row["caption"])
    if not re.fullmatch(r"\d{1,5}(\.\d{1,3})?", time):
        raise InputError(f"{location}: start_time {time[:40]!r} is not a number of seconds")
    if not caption:
        raise InputError(f"{location}: clip {video} has no caption")
    return location, row["audiocap_id"], video, float(time), caption


def _timed(video, start):
    """Key of the files that begin with a video and a start, however that is written."""
    return f"{video}_{float(start):.10g}*"


def _clip_keys(name, bare):
    """Keys of a file of AudioCaps; bare: also the whole name, without a start."""
    stem, suffix = _stem(name)
    if not suffix:
        return []
    keys, number = [f"{stem}.*"] if bare else [], r"[_-](\d+(?:\.\d+)?)"
    if match := re.fullmatch(f"(.+){number}", stem):
        keys.append(_timed(match[1], match[2]))
    if match := re.fullmatch(f"(.+){number}{number}", stem):
        length = float(match[3]) - float(match[2])
        # start and end of a clip of ten seconds or less, in seconds or milliseconds
        if 0 < length <= 10 or 1000 < length <= 10_000:
            keys.append(_timed(match[1], match[2]))
    return keys


def _named_files(table, files, split):
    """(Clips of a table with file_name and captions, or question and answer, {name: names its file may have})."""
    clips, questions = [], {}
    columns = {"file_name", "caption_1"}, {"file_name", "question", "answer"}
    for location, name, references, question in _rows(table, _named_row, *columns):
        earlier = questions.setdefault(name, [])
        if question in earlier:
            raise InputError(f"{location}: file_name {name!r} appears a second time")
        earlier.append(question)
        # several questions about one clip
        number = f"#{len(earlier)}" if len(earlier) > 1 else ""
        clips.append((name, name + number, references, question))
    wanted = {name: _accepted(name, split) for name in questions}
    # a name in the table may have folders of its own
    depths = {0, *(len(_parts(name)) - 1 for name in questions)}
    keys = {}
    for path in files:
        # those of DCASE are other recordings with the same names
        if files[path] != "DCASE":
            keys[path] = _file_keys(path, table.parent, depths, files[path] in (split, None))
    paths = _match(table, wanted, keys, lambda path: files[path] != split)
    return [Clip(id, paths.get(name), *rest) for name, id, *rest in clips], wanted


def _named_row(location, row):
    name, question = _inside(location, row["file_name"]), None
    columns = [column for column in row if re.fullmatch(r"caption_\d+", column)]
    if {"question", "answer"} <= row.keys():
        columns, question = ["answer"], _clean(location, row["question"])
    references = list(filter(None, [_clean(location, row[column]) for column in columns]))
    if not references or question == "":
        raise InputError(f"{location}: clip {name} has no caption, or no question or answer")
    return location, name, references, question


def _parts(name):
    """[folder, ..., file] of a name in a table, which Windows may have written."""
    return re.split(r"[/\\]+", name)


def _accepted(name, split):
    """Keys of the files that a name in a table may mean, best first."""
    *folders, base = _parts(name)
    stem = _stem(base)[0]
    # what programs write where a character is not allowed: _, which _normal writes too, or -, or nothing
    stems = [stem, re.sub(UNSAFE, "-", stem), re.sub(UNSAFE, "", stem)]
    loose = [base, *(f"{_normal(stem)}.*" for stem in stems)]
    # first where files usually lie, seen from the table
    exact = [f"./{folder}/{name}" for folder in ("videos", CLOTHO[split], split)] + [f"./{name}"]
    inside = ["/".join([*folders, key]) for key in loose]
    return list(dict.fromkeys(exact + inside + loose))


def _file_keys(path, root, depths, loose):
    """Keys of a file: where it lies in `root`; loose: also its name and its stem, with the folders above it."""
    keys, name = [], path.name
    if path.is_relative_to(root):
        keys.append(f"./{path.relative_to(root)}")
    with contextlib.suppress(UnicodeError):
        # names are UTF-8 on disk, whatever the locale reads them as
        name = os.fsencode(name).decode()
    for depth in depths if loose else ():
        folders = path.parts[-1 - depth:-1]
        keys += ["/".join([*folders, name]), "/".join([*folders, f"{_normal(_stem(name)[0])}.*"])]
    return keys


def _stem(name):
    """(stem, suffix) of a file name without white space at its ends; suffix "" if it is none of MEDIA."""
    name = re.sub("[\u200b-\u200f\ufeff]", "", unicodedata.normalize("NFC", name)).strip().rstrip(". ")
    stem, suffix = map(str.strip, os.path.splitext(name))
    return (stem, suffix.lower()) if suffix.lower() in MEDIA else (name, "")


def _normal(stem):
    """A stem in one Unicode form and case, with _ for white space and what file systems replace."""
    text = unicodedata.normalize("NFKC", urllib.parse.unquote(stem)).casefold()
    return re.sub(rf"({UNSAFE}|[\s_])+", "_", text)


# dataset: reader(table, {path: split that its folder's name says, or None}, split)
READERS = {"audiocaps": _audiocaps, "clotho": _named_files, "av": _named_files}


def _rows(table, parse, *alternatives):
    """[parse("file:line", {column: text})] of a CSV that has all the columns of one of the alternatives.

    A row that cannot be read is left out, with a note. Raises InputError beyond a thousandth of the rows, where
    three may always be bad, but not half of them."""
    text = _text(table)
    if not re.match("[^\r\n]*\r(?!\n)", text):
        # the header ends in \n: AudioCaps 2.0 has lone \r inside captions
        text = re.sub("\r(?!\n)", " ", text)
    # some spreadsheets write ; or tabs
    delimiter = max(",;\t", key=re.split("[\r\n]", text)[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    header = _header(table, reader, alternatives)
    rows, faults = [], []
    while True:
        line = reader.line_num + 1
        location = f"{table}:{line}"
        try:
            cells = next(reader, None)
            if cells is None:
                break
            cells = [cell.replace("\xa0", " ").strip() for cell in cells]
            if not any(cells):
                continue
            if len(cells) < len(header) or any(cells[len(header):]):
                raise InputError(f"{location}: has {len(cells)} fields and the header {len(header)}; "
                                 "a text with a comma needs quotes")
            rows.append(parse(location, dict(zip(header, cells))))
        except InputError as error:
            faults.append(str(error))
        except csv.Error as error:
            # a quote that nothing closes takes further lines with it
            faults += [f"{location}: is not CSV ({error})"] * (reader.line_num - line + 1)
    total = len(rows) + len(faults)
    if not total:
        raise InputError(f"{table}: has no rows")
    if faults:
        note = f"{faults[0]}; {len(faults)} of {total} rows cannot be read"
        if len(faults) > max(3, math.ceil(total / 1000)) or 2 * len(faults) >= total:
            raise InputError(note)
        print_once(f"{note} and are left out")
    return rows


def _header(table, reader, alternatives):
    """Names of a table's columns."""
    try:
        header = [column.strip().lower() for column in next(reader, [])]
    except csv.Error as error:
        raise InputError(f"{table}:1: is not CSV ({error})") from None
    # spreadsheets write empty columns
    while header and not header[-1]:
        header.pop()
    if not any(columns <= set(header) for columns in alternatives) or len(set(header)) < len(header):
        wanted = " or ".join(", ".join(sorted(columns)) for columns in alternatives)
        raise InputError(f"{table}:1: needs the columns {wanted}, each once; found {ascii(header)[:200]}")
    return header


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


def _clean(location, text, max_characters=MAX_CAPTION):
    """One line of printable text: white space collapsed, terminal escapes and control characters removed."""
    if len(text) > max_characters:
        raise InputError(f"{location}: has a text of {len(text):,} characters; the limit is {max_characters:,}")
    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?)?", "", text)
    text = "".join(c for c in text if c.isprintable() or c.isspace())
    return " ".join(text.split())


def _inside(location, name):
    """`name`, if it is a file name that does not lead out of its folder."""
    valid = isinstance(name, str) and name.isprintable() and re.match(r"[^/\\]", name)
    if not valid or ".." in _parts(name):
        raise InputError(f"{location}: {ascii(name)[:200]} is not a file name, or leads out of its folder")
    return name


def _sha(obj):
    return hashlib.sha256(json.dumps(obj, sort_keys=True, default=str).encode()).hexdigest()


def read_qa(path, images=None, limit_questions=1000, seed=0, keep=False):
    """([Question], sha256): a seeded subset of a file of questions about images, and its hash.

    Reads JSONL or a JSON list of {image, question, answer}, and talks {id, image, conversations}, of which the
    first exchange is taken: LLaVA-Instruct's {from, value} or ShareGPT's {role, content}.
    Images are in the folder `images`, else in images/ beside the file, else beside it. keep: also questions
    without an image or without an answer. Raises InputError for a record that cannot be read, and for a chosen
    image that does not exist."""
    path, questions, counts = Path(path), [], {}
    for location, record in _records(path):
        pictured = not isinstance(record, dict) or record.get("image") is not None
        # LLaVA's mixtures have talks without an image
        if not pictured and not keep and "conversations" in record:
            continue
        id, *rest = _question(location, record, len(questions), pictured or not keep, not keep)
        # LLaVA-Instruct has several talks with one id
        counts[id] = counts.get(id, 0) + 1
        questions.append((f"{id}#{counts[id]}" if counts[id] > 1 else id, *rest))
    if not questions:
        raise InputError(f"{path}: has no questions about images")
    # by a hash of the contents: the order of the file does not matter
    chosen = sorted(questions, key=lambda q: _sha([seed, *q[1:], q[0]]))[:limit_questions]
    beside = path.parent / "images"
    folder = Path(images) if images else beside if beside.is_dir() else path.parent
    absent = [row[1] for row in chosen if row[1] and not os.path.isfile(folder / row[1])]
    if absent:
        raise InputError(f"{path}: {len(absent)} of {len(chosen)} chosen images, such as {absent[0][:80]}, "
                         f"are not in {folder}")
    questions = [Question(id, name and folder / name, *rest) for id, name, *rest in chosen]
    return questions, _sha(chosen)


def read_kept(path):
    """[Question]: a seeded subset of the questions of train.py's --keep-qa; no answer is learned."""
    return read_qa(path, limit_questions=KEPT_QUESTIONS, keep=True)[0]


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


def _exchange(turns):
    """(first question, its answer or None) of a talk, which may begin with a system's turn."""
    question = None
    for turn in turns:
        # LLaVA's words and ShareGPT's
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if role in ("human", "user") and question is None:
            question = text
        elif role in ("gpt", "assistant") and question is not None:
            return question, text
    return question, None


def _question(location, record, number, pictured, answered):
    """(id, image, question, answer, kind) of a record; image is None unless it is pictured.

    answered: raises InputError where the answer is missing, which otherwise is empty."""
    try:
        if "conversations" in record:
            question, answer = _exchange(record["conversations"])
        else:
            question, answer = record.get("question", record.get("text")), record.get("answer")
        if answer is None and not answered:
            answer = ""
        # null would be the text "None"
        if not isinstance(answer, str | int | float):
            raise TypeError
        if pictured:
            # the prompt of a question about an image has it in any case
            question = question.replace(IMAGE, "")
        question = "\n".join(_clean(location, line, MAX_CHARACTERS) for line in question.strip().split("\n"))
        answer = _clean(location, str(answer), MAX_CHARACTERS)
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{location}: lacks a question or its answer; the probe needs both") from None
    if not question or answered and not answer:
        raise InputError(f"{location}: has an empty question or answer")
    if IMAGE in question + answer:
        raise InputError(f"{location}: has {IMAGE} in its answer, or in a question without an image; take it out")
    id = _clean(location, str(record.get("id", record.get("question_id", number))))
    kind = _clean(location, str(record.get("kind", record.get("category", ""))))
    image = _inside(location, record.get("image")) if pictured else None
    return id, image, question, answer, kind


# ---------------------------------------------------------------- sound and video

def _decoded(path, modality):
    """Decoded frames of the first stream of "audio" or "video"; damaged packets are skipped."""
    good = damaged = 0
    options = {"protocol_whitelist": "file"}  # a playlist named .wav must not open network addresses
    try:
        with av.open(f"file:{path}", metadata_errors="ignore", options=options) as file:
            # a cover is no film
            streams = [stream for stream in file.streams if stream.type == modality
                       and not stream.disposition & av.stream.Disposition.attached_pic]
            if not streams:
                raise InputError(f"{path}: has no {modality} stream")
            for packet in file.demux(streams[0]):
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    damaged += 1
                    continue
                good += bool(frames)
                yield from frames
    except (av.FFmpegError, OSError) as error:
        reason = f"decoded as {modality} ({error.strerror or error})"
        if not good:
            raise InputError(f"{path}: cannot be {reason}") from None
        print_once(f"{path}: only a first part can be {reason}")
    # a few bad packets are tolerated, as every player does
    if damaged >= good:
        raise InputError(f"{path}: cannot be decoded as {modality} (empty or damaged)")


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
    wave, max_samples = torch.cat(waves), int(max_seconds * rate)
    if not len(wave) or not wave.isfinite().all():
        raise InputError(f"{path}: has no samples, or some that are not finite")
    if len(wave) > max_samples:
        print_once(f"{path}: is longer than {max_seconds:g} seconds; the rest of its sound is ignored")
    return wave[:max_samples].numpy()


def _layout(frame):
    return frame.sample_rate, frame.layout.name, frame.format.name  # may change midway


def _mono(path, frames, max_samples):
    """Mean of the channels of frames of one format, (samples,); stops soon after `max_samples`."""
    # interleaved on purpose: PyAV reads past the end of 8 and more separate channels
    packer, mono, count = av.AudioResampler("flt", frame_size=8192), [np.zeros(0, np.float32)], 0
    for frame in itertools.chain(frames, [None]):  # None: what the packer still holds
        last = frame is None or count > max_samples
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
        raise InputError(f"{path}: cannot be read as an image ({one_line(error)})") from None


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

# what a model that does not fit its code raises
UNFIT = (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError)


def _pretrained(path, model_class, processor_class, dtype=torch.float32, unused=(), **options):
    """A frozen model, its preprocessor, and the sha256 of the settings behind its output.

    unused: as in Encoder. options: further arguments of the preprocessor's from_pretrained."""
    local = Path(path).is_dir()
    if (Path(path) / "adapter_config.json").exists():
        # without the package peft, transformers would load the model and leave them out
        raise InputError(f"{path}: holds LoRA adapters; merge them into the model first (peft's merge_and_unload)")
    kind, wanted = _model_type(str(path)), model_class.config_class.model_type
    # a LLaVA-NeXT would load as a LLaVA, and fail at its first image
    if kind not in (None, wanted):
        raise InputError(f"{path}: is a {kind}; {model_class.__name__} needs a {wanted}")
    try:
        # safetensors only: a pickle in a downloaded folder could run anything
        model, report = model_class.from_pretrained(
            path, use_safetensors=True, local_files_only=local, dtype=dtype, output_loading_info=True)
        processor = processor_class.from_pretrained(path, local_files_only=local, **options)
    # ImportError: a quantised checkpoint wants a package of its own
    except (*UNFIT, OSError, ImportError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be loaded as {model_class.__name__} ({one_line(error)}); give a "
                         "checkpoint's folder or a hub name") from None
    lacking = []
    # transformers has drawn them at random
    for name in sorted(report["missing_keys"]):
        if name.startswith(unused):
            model.state_dict()[name].zero_()  # the same in each process, for the model's hash
        else:
            lacking.append(name)
    if lacking:
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


class Encoder:
    """A frozen model that turns clips into frames; its checkpoint is a folder or a hub name.

    ENCODERS names a class for each `model_type` of a checkpoint's config.json. The rest of the repository uses
    no more of an encoder than this contract:

    modality   "audio" or "video"
    rate       samples a second of the waves that it takes; None for video
    frames     F, pictures of the videos that it takes; None for audio
    width      E
    unused     beginnings of the names of weights that no frame depends on, such as those for training alone:
               a checkpoint may lack them
    hash       sha256 of all that its frames depend on: weights, settings, and the window and the pooling where
               a class chooses them. It names the cache's files
    prepare(clip)
               what `encode_prepared` takes, of one clip: mono float32 (samples,) or uint8 (F, H, W, 3). Threads
               call it at once, ahead of the model. A clip of sound that is longer than the model's window becomes
               several windows
    encode_prepared(prepared, batch_size)
               [(S_i, E)] of several prepared clips, on the CPU, in time order, at most about ten frames a second,
               of the clip and not of what fills its window. A clip's frames do not depend on its neighbours
    silence()  a clip with nothing to hear or see
    noise(rng, n)
               n clips that mean nothing, from a numpy generator. What the backbone says beside both is measured

    Raises InputError when it cannot be loaded."""
    modality = rate = frames = None
    unused = ()

    def __init__(self, path, device, model, width, hash):
        self.path, self.device, self.width, self.hash = str(path), device, width, hash
        self.model = model.to(device)

    def encode(self, clips, **options):
        """Frames [(S_i, E)] of clips, mono float32 (samples,) or uint8 (F, H, W, 3)."""
        return self.encode_prepared([self.prepare(clip) for clip in clips], **options)


def _cut(wave, size, rate):
    """(windows, spans) of a wave: consecutive windows of `size` samples, the last one right-aligned.

    spans: the samples (first, end) of each window that no earlier one holds; a wave shorter than `size` is
    a window as it is."""
    starts = range(0, max(len(wave) - size, 0) + 1, size)
    windows = [wave[start:start + size] for start in starts]
    spans = [(0, min(size, len(wave)))] * len(windows)
    tail = len(wave) % size if len(wave) > size else 0
    if tail >= rate:  # a tail below one second is dropped
        windows.append(wave[-size:])
        spans.append((size - tail, size))
    return windows, spans


def _each_window(prepared, model, device, batch_size):
    """Yield (number of its clip, its span, `model` of it) for each window; a pass takes windows of several clips."""
    windows = []
    for i, (inputs, spans) in enumerate(prepared):
        windows += [(i, span, window) for window, span in zip(inputs, spans)]
    for start in range(0, len(windows), batch_size):
        numbers, spans, inputs = zip(*windows[start:start + batch_size])
        with torch.no_grad():
            outputs = model(torch.stack(inputs).to(device, non_blocking=True)).cpu()
        yield from zip(numbers, spans, outputs)


class AudioEncoder(Encoder):
    """What encoders of sound share: windows of .size samples, joined in time order.

    A subclass sets .rate and .size (samples of a window), makes (windows, ...) float32 of a list of windows in
    `inputs`, where shorter ones are filled up to .size, and (B, S, E) of a batch in `hear`, without gradient, pooled
    to at most ten frames a second: `_mean_of`. What it chooses itself, such as .size, goes into its hash."""
    modality = "audio"

    def prepare(self, wave):
        """(inputs, spans) of the windows of a mono float32 wave."""
        windows, spans = _cut(wave, self.size, self.rate)
        return self.inputs(windows), spans

    def encode_prepared(self, prepared, batch_size=32):
        """Frames [(S_i, E)] of what `prepare` returned for each clip; batch_size: windows at once."""
        frames = [[] for _ in prepared]
        for i, (first, end), hidden in _each_window(prepared, self.hear, self.device, batch_size):
            count = math.ceil((end - first) / self.size * len(hidden))
            # a later window is right-aligned; a short one is filled behind its sound
            frames[i].append(hidden[-count:] if first else hidden[:count])
        return [torch.cat(parts) for parts in frames]

    def silence(self):
        return np.zeros(self.size, np.float32)

    def noise(self, rng, n):
        """White noise, 20 dB below full scale."""
        return list(rng.normal(scale=0.1, size=(n, self.size)).astype(np.float32))


def _mean_of(frames, by):
    """Means of `by` frames (B, S, E) that follow each other, (B, S / by, E); the last may be of fewer."""
    return torch.nn.functional.avg_pool1d(frames.transpose(1, 2), by, ceil_mode=True).transpose(1, 2)


class Clap:
    """The space that sound and text share: a frozen CLAP, `.hash`, `.rate` in Hz, `.embed_dim` (P).

    It stands behind train.py's contrastive term and the reranker, whoever listens; ClapEncoder are its ears.
    Raises InputError when it cannot be loaded."""

    def __init__(self, path, device="cpu"):
        from transformers import ClapModel, ClapProcessor  # here, because it is slow to import
        self.path, self.device = str(path), device
        self.model, processor, settings = _pretrained(path, ClapModel, ClapProcessor)
        self.hash = _hash_model(settings, self.model)
        self.model.to(device)
        self.tokenizer, self.extractor = processor.tokenizer, processor.feature_extractor
        self.rate, self.size = self.extractor.sampling_rate, int(self.extractor.nb_max_samples)
        self.embed_dim = self.model.config.projection_dim

    def prepare(self, wave):
        """(mels, spans) of the windows of a mono float32 wave; mels: (windows, channels, time, mel) float32."""
        windows, spans = _cut(wave, self.size, self.rate)
        mels = self.extractor(windows, sampling_rate=self.rate, return_tensors="pt")["input_features"]
        # the extractor fills a short window by repetition: all of it is sound
        return mels.float(), [(first, self.size) for first, _ in spans]

    def listen(self, mels):
        """What CLAP makes of the mels of B windows."""
        # for the fused model the extractor marks a random clip as longer than the window; none is
        longer = torch.zeros(len(mels), 1, dtype=torch.bool, device=self.device)
        return self.model.get_audio_features(mels, is_longer=longer)

    def embed(self, mels):
        return self.listen(mels).pooler_output

    def embed_prepared(self, prepared, batch_size=32):
        """As `embed_sounds`, of what `prepare` returned for each clip; batch_size: windows at once."""
        embeds = torch.zeros(len(prepared), self.embed_dim)
        for i, _, part in _each_window(prepared, self.embed, self.device, batch_size):
            embeds[i] += part
        return torch.nn.functional.normalize(embeds, dim=-1)

    def embed_sounds(self, waves):
        """L2-normalised embeddings (n, P) of mono float32 waves: of several windows the mean."""
        return self.embed_prepared([self.prepare(wave) for wave in waves])

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


class ClapEncoder(AudioEncoder):
    """CLAP's ears: windows of 10 s as released, 32 frames each."""

    def __init__(self, path, device="cpu"):
        # the same object as the judge, where a run has one CLAP for both
        clap = load_clap(str(path), device)
        super().__init__(path, device, clap.model, clap.model.config.audio_config.hidden_size, clap.hash)
        self.prepare, self.listen = clap.prepare, clap.listen
        self.rate, self.size = clap.rate, clap.size

    def hear(self, mels):
        hidden = self.listen(mels).last_hidden_state  # (B, E, frequencies, S)
        return hidden.mean(2).transpose(1, 2)


class WhisperEncoder(AudioEncoder):
    """Whisper's encoder at its first positions: windows of 10 s, 6.25 frames a second.

    It was trained on windows of 30 s, filled with silence. Of tiny.en such a window costs .47 s on one thread and
    ten seconds alone .14 s, and they hear as well: a linear probe of a clip's mean and deviation names 90.3%
    and 90.6% of ESC-10's recordings."""
    SECONDS, POOL = 10, 8
    unused = ("decoder.",)

    def __init__(self, path, device="cpu"):
        from transformers import WhisperFeatureExtractor, WhisperModel
        whole, self.extractor, settings = _pretrained(
            path, WhisperModel, WhisperFeatureExtractor, unused=self.unused)
        model, self.rate = whole.encoder, self.extractor.sampling_rate
        self.samples = self.extractor.hop_length * model.conv1.stride[0] * model.conv2.stride[0]  # of a position
        positions = min(self.SECONDS * self.rate // self.samples, model.config.max_source_positions)
        self.size = positions * self.samples
        hash = _hash_model(f"{settings} {positions} {self.POOL}", model)
        model.config.max_source_positions = model.embed_positions.num_embeddings = positions
        model.embed_positions.weight = torch.nn.Parameter(model.embed_positions.weight[:positions], False)
        super().__init__(path, device, model, model.config.d_model, hash)

    def inputs(self, windows):
        # to the window's end; by itself the extractor fills up to 30 s, which costs as much as the encoder
        return self.extractor(windows, sampling_rate=self.rate, max_length=self.size,
                              return_tensors="pt")["input_features"]

    def hear(self, mels):
        return _mean_of(self.model(mels).last_hidden_state, self.POOL)


class ASTEncoder(AudioEncoder):
    """The Audio Spectrogram Transformer: windows of 10.24 s as released, 34 frames each."""
    POOL = 3

    def __init__(self, path, device="cpu"):
        from transformers import ASTFeatureExtractor, ASTModel
        model, self.extractor, settings = _pretrained(path, ASTModel, ASTFeatureExtractor)
        hash = _hash_model(f"{settings} {self.POOL}", model)
        super().__init__(path, device, model, model.config.hidden_size, hash)
        self.rate = self.extractor.sampling_rate
        self.size = self.extractor.max_length * self.rate // 100  # a column of the spectrogram every 10 ms

    def inputs(self, windows):
        shortest = self.rate // 20  # a column takes 25 ms of sound, and there has to be one
        windows = [np.pad(wave, (0, max(0, shortest - len(wave)))) for wave in windows]
        return self.extractor(windows, sampling_rate=self.rate, return_tensors="pt")["input_values"]

    def hear(self, spectrograms):
        hidden = self.model(spectrograms).last_hidden_state[:, 2:]  # without the class and distillation tokens
        frequencies, S = self.model.embeddings.get_shape(self.model.config)
        return _mean_of(hidden.reshape(len(hidden), frequencies, S, self.width).mean(1), self.POOL)


class PEAudioEncoder(AudioEncoder):
    """The audio side of Perception Encoder Audiovisual: windows of 10 s, 16 frames each, as many as modality tokens.

    Its frames are 1,792 wide: more of them would make more than 3 GB of AudioCaps."""
    SECONDS, POOL = 10, 16
    unused = ("audio_head.", "text_")

    def __init__(self, path, device="cpu"):
        from transformers import PeAudioFeatureExtractor, PeAudioModel
        whole, self.extractor, settings = _pretrained(
            path, PeAudioModel, PeAudioFeatureExtractor, unused=self.unused)
        model, self.rate = whole.audio_encoder, self.extractor.sampling_rate
        hop = self.extractor.hop_length
        self.size = self.SECONDS * self.rate // hop * hop
        hash = _hash_model(f"{settings} {self.size} {self.POOL}", model)
        super().__init__(path, device, model, model.config.hidden_size, hash)

    def inputs(self, windows):
        """Samples, and 1 where they are sound: (windows, 2, size)."""
        made = self.extractor(windows, sampling_rate=self.rate, padding="max_length", max_length=self.size,
                              return_tensors="pt")
        return torch.stack([made["input_values"].reshape(-1, self.size), made["padding_mask"]], 1)

    def hear(self, inputs):
        hidden = self.model(inputs[:, :1], padding_mask=inputs[:, 1].bool()).last_hidden_state
        return _mean_of(hidden, self.POOL)


class VideoEncoder(Encoder):
    """What encoders of video share: .frames pictures a clip, .side pixels high and wide for the model.

    A subclass makes (B, S, E) of a batch of pixels (B, F, 3, height, width) in `see`; or (B, moments * patches, E)
    in `look`, with a moment for every `tubelet_size` pictures."""
    modality = "video"

    def prepare(self, video):
        """Pixels (F, 3, height, width) of a video uint8 (F, H, W, 3)."""
        return self.processor([list(video)], return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def encode_prepared(self, prepared, batch_size=8):
        """Frames [(S, E)] of what `prepare` returned for each video."""
        frames = []
        for start in range(0, len(prepared), batch_size):
            pixels = torch.stack(prepared[start:start + batch_size])
            frames += self.see(pixels.to(self.device, non_blocking=True))
        return frames

    def see(self, pixels):
        moments = self.frames // self.model.config.tubelet_size
        return self.look(pixels).cpu().reshape(len(pixels), moments, -1, self.width).mean(2)

    def silence(self):
        """Black pictures."""
        return np.zeros((self.frames, self.side, self.side, 3), np.uint8)

    def noise(self, rng, n):
        """Coloured dots."""
        return list(rng.integers(0, 256, (n, self.frames, self.side, self.side, 3), np.uint8))


class TimesformerEncoder(VideoEncoder):
    """TimeSformer: a frame for each of its pictures, 8 as released."""

    def __init__(self, path, device="cpu"):
        from transformers import AutoImageProcessor, TimesformerModel
        model, self.processor, settings = _pretrained(path, TimesformerModel, AutoImageProcessor)
        super().__init__(path, device, model, model.config.hidden_size, _hash_model(settings, model))
        self.frames, self.side = model.config.num_frames, model.config.image_size

    def see(self, pixels):
        B, F = pixels.shape[:2]
        hidden = self.model(pixels).last_hidden_state[:, 1:].cpu()  # (B, patches * F, E), no class token
        return hidden.reshape(B, -1, F, self.width).mean(1)  # the F moments of a patch are neighbours


class VideoMAEEncoder(VideoEncoder):
    """VideoMAE: a frame for every two of its pictures, 16 as released."""

    def __init__(self, path, device="cpu"):
        from transformers import AutoImageProcessor, VideoMAEModel
        model, self.processor, settings = _pretrained(path, VideoMAEModel, AutoImageProcessor)
        super().__init__(path, device, model, model.config.hidden_size, _hash_model(settings, model))
        self.frames, self.side = model.config.num_frames, model.config.image_size

    def look(self, pixels):
        return self.model(pixels).last_hidden_state


class VJEPA2Encoder(VideoEncoder):
    """V-JEPA 2: a frame for every two of its pictures, 64 as released."""
    unused = ("predictor.",)

    def __init__(self, path, device="cpu"):
        from transformers import VideoMAEImageProcessorPil, VJEPA2Model
        # its own processor does the same with torchvision, which nothing else here needs
        model, self.processor, settings = _pretrained(
            path, VJEPA2Model, VideoMAEImageProcessorPil, unused=self.unused,
            image_processor_filename="video_preprocessor_config.json")
        super().__init__(path, device, model, model.config.hidden_size, _hash_model(settings, model))
        self.frames, self.side = model.config.frames_per_clip, model.config.crop_size

    def prepare(self, video):
        return super().prepare(video).half()  # 64 pictures of 256 pixels are 50 MB in float32, and many clips wait

    def look(self, pixels):
        return self.model.get_vision_features(pixels.float())


# the `model_type` of a checkpoint's config.json: what it becomes here
ENCODERS = {"clap": ClapEncoder, "whisper": WhisperEncoder, "audio-spectrogram-transformer": ASTEncoder,
            "pe_audio": PEAudioEncoder,
            "timesformer": TimesformerEncoder, "videomae": VideoMAEEncoder, "vjepa2": VJEPA2Encoder}


@functools.lru_cache(maxsize=None)  # a hub name is looked up over the network, and each validation asks
def _model_type(path):
    """The `model_type` of a checkpoint, a folder or a hub name. Raises InputError."""
    from transformers import PreTrainedConfig
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, local_files_only=Path(path).is_dir())
        return config.get("model_type")
    except (*UNFIT, OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be loaded ({one_line(error)}); give a checkpoint's folder or a hub "
                         "name") from None


@functools.lru_cache(maxsize=2)  # several runs in one process share their models
def load_encoder(path, modality, device):
    """The Encoder of a checkpoint. Raises InputError for a type that is not known, or of another modality."""
    kind, known = _model_type(path), []
    for name, encoder in ENCODERS.items():
        if encoder.modality == modality:
            known.append(name)
    if kind not in known:
        raise InputError(f"{path}: its config.json says {kind}; encoders of {modality} are {', '.join(known)}")
    return ENCODERS[kind](path, device)


@functools.lru_cache(maxsize=2)
def load_clap(path, device):
    return Clap(path, device)


def clap_path(config):
    """The CLAP of a run's config: its --clap, else its encoder where that is one, else None."""
    if config.get("clap"):
        return config["clap"]
    return config["encoder"] if _model_type(config["encoder"]) == "clap" else None


def clap_of(config, device, purpose):
    """The Clap of a run's config. Raises InputError, which names the purpose, where there is none."""
    path = clap_path(config)
    if path is None:
        raise InputError(f"{config['encoder']}: is no CLAP, and {purpose} needs one beside it: --clap FOLDER_OR_HUB_NAME")
    return load_clap(path, device)


# ---------------------------------------------------------------- cache of features

@dataclass
class Features:
    """Encoder frames of clips: `features[i]` is (S_i, E) float32, read from disk when asked for."""
    frames: torch.Tensor  # (sum of S_i, E) float16, memory-mapped
    spans: list[tuple]  # (first, end) of each clip in `frames`
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
        return Features(self.frames, spans, ids)


def lock_or_wait(file, message):
    """Lock an open file or descriptor until it is closed. Prints `message` if it has to wait.

    False where the file system has no locks, as on some network drives: then a note says so."""
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_once(message)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        print_once(f"this file system has no locks ({error.strerror}); do not start a job twice at a time")
        return False
    return True


@contextlib.contextmanager
def _one_builder(path):
    """Only one job at a time is in the block of a path; the lock goes with the process, however that ends.

    Yields False where there are no locks."""
    lock = path.with_suffix(".lock")
    with open(lock, "w") as file:
        yield lock_or_wait(file, f"waiting for another job that builds {path.name}")
        # jobs that wait for it find the finished file
        lock.unlink(missing_ok=True)


def cached_json(folder, name, parts, make):
    """make(), kept as JSON in `folder` under a hash of `parts`. Of several jobs one makes it, the others wait."""
    path = Path(folder) / f"{name}_{_sha(parts)[:32]}.json"
    # before the lock: a full cache may be read-only
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_builder(path):
            if not path.exists():
                write_json(path, make())
    return read_json(path)


def load_features(split, encoder, cache_dir):
    """Features of the clips of `split`, from the cache or computed and stored there.

    The file is named by a hash of the encoder and of every clip's id, size and time of change. Afterwards
    `split.bad` lists the clips that cannot be decoded, `split.clips` has the others, and `features[i]` is of
    `split.clips[i]`; with two encoders look up `features.index[clip.id]`. Of several jobs one computes and the
    others wait. Raises InputError when no clip can be decoded or the cache cannot be written."""
    modality = encoder.modality
    key = [CACHE_FORMAT[modality], modality, encoder.hash]
    features, bad = _cached(split, cache_dir, modality, key, encoder, encoder.encode_prepared, torch.float16)
    split.bad += [id for id in bad if id not in split.bad]
    split.clips = [clip for clip in split.clips if clip.id in features.index]
    return features


def load_embeddings(split, clap, cache_dir):
    """CLAP's embeddings (n, P) of the sounds of `split.clips`, from a file beside their features, or into it.

    Raises InputError as load_features does, and for a clip that CLAP cannot take."""
    key = [CACHE_FORMAT["clap"], "clap", clap.hash]
    embeds, bad = _cached(split, cache_dir, "clap", key, clap, clap.embed_prepared, torch.float32)
    if bad:
        raise InputError(f"{next(iter(bad.values()))}; CLAP cannot judge it, take it out of the table")
    return embeds.frames


def judge_of(config, split, device, purpose="the reranker"):
    """(embeddings of the sounds of a split (n, P), Clap) by the CLAP of a run's config; the first come from the cache.

    Raises InputError, which names the purpose, where the run has no CLAP."""
    clap = clap_of(config, device, purpose)
    return load_embeddings(split, clap, config["cache"]), clap


def _cached(split, cache_dir, kind, key, listener, encode, dtype):
    """(Features of `encode`, {id of a bad clip: reason}) of the clips of a split.

    listener: what prepares a clip, an Encoder or a Clap. encode: what comes of a list of prepared clips."""
    folder = Path(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(THREADS) as pool:
            stamps = [_stamp(clip) for clip in split.clips]
            path = folder / f"{kind}_{split.name}_{_sha([*key, stamps])[:32]}.safetensors"
            cached = _read_features(path, split)
            if cached is None:
                cached = _build_features(path, split, _prepare_ahead(split.clips, listener, pool), encode, dtype)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read or written ({error.strerror})") from None
    return cached


def _build_features(path, split, jobs, encode, dtype):
    """As _read_features, after writing the file; if another job is writing it, waits for that."""
    with _one_builder(path) as locked:
        cached = _read_features(path, split)
        if cached is None:
            # of a job that was killed; without a lock they may be of one that runs
            for tmp in path.parent.glob(f"{path.name}.tmp.*") if locked else ():
                tmp.unlink()
            _write_features(path, split, jobs, encode, dtype)
            cached = _read_features(path, split)
    return cached


def _prepare(clip, listener):
    """The clip, decoded and prepared for a model."""
    if listener.rate is None:
        return listener.prepare(decode_video(clip.path, listener.frames))
    return listener.prepare(decode_audio(clip.path, listener.rate))


def _prepare_ahead(clips, listener, pool):
    """Yield (clip, job that prepares it); threads are at most 4 * CHUNK clips ahead of the caller."""
    jobs = collections.deque()
    for clip in clips:
        jobs.append((clip, pool.submit(_prepare, clip, listener)))
        if len(jobs) > 4 * CHUNK:
            yield jobs.popleft()
    while jobs:
        yield jobs.popleft()


def _write_features(path, split, jobs, encode, dtype):
    """Encode a split into a cache file. While the model runs, threads prepare the next clips.

    jobs: as _prepare_ahead yields them. Frames go to an unnamed file as they come, so that memory does not grow
    with the split."""
    lengths, ids, bad = [0], [], {}
    with tempfile.TemporaryFile(dir=path.parent) as file:
        with tqdm(total=len(split.clips), desc=path.name.rpartition("_")[0], disable=None) as bar:
            while chunk := list(itertools.islice(jobs, CHUNK)):
                clips, inputs = [], []
                for clip, job in chunk:
                    try:
                        inputs.append(job.result())
                        clips.append(clip)
                    except InputError as error:
                        bad[clip.id] = str(error)
                for clip, frames in zip(clips, encode(inputs)):
                    frames = frames.reshape(-1, frames.shape[-1]).to(dtype).contiguous()
                    if not frames.isfinite().all():
                        bad[clip.id] = f"{clip.path}: its features are not finite"
                        continue
                    width = frames.shape[1]
                    file.write(frames.numpy())
                    lengths.append(len(frames))
                    ids.append(clip.id)
                bar.update(len(chunk))
        reasons = list(bad.values())
        if not ids:
            raise InputError(f"none of {len(split.clips)} clips can be decoded; first {reasons[0]}")
        if bad:
            print_escaped("\n".join([*reasons[:10], f"{len(bad)} of {len(split.clips)} clips are left out"]))
        mapped = torch.from_numpy(np.memmap(file, np.uint8, "c")).view(dtype).reshape(-1, width)
        tensors = {"frames": mapped, "offsets": torch.tensor(lengths).cumsum(0)}
        with _replacing(path) as tmp:
            save_file(tensors, tmp, {"ids": json.dumps(ids), "bad": json.dumps(bad)})


def _read_features(path, split):
    """(Features, {id of a bad clip: reason}) of a cache file; None if it is absent or damaged."""
    try:
        with safe_open(path, "pt") as file:
            ids, bad = (json.loads(file.metadata()[key]) for key in ("ids", "bad"))
            bad = dict(bad)  # fails for a list of an older version, which could not decode some of these clips
            spans = list(itertools.pairwise(file.get_tensor("offsets").tolist()))
            features = Features(file.get_tensor("frames"), spans, ids)
        if ids == [clip.id for clip in split.clips if clip.id not in bad]:
            return features, bad
    except FileNotFoundError:
        return None
    except (SafetensorError, ValueError, KeyError, TypeError):
        pass
    print_once(f"{path}: is damaged or of an older version, and is built again")


def _stamp(clip):
    """[id, size, time of change] of a clip: to read all bytes of a data set takes longer than to encode some."""
    try:
        stat = os.stat(clip.path)
        return [clip.id, stat.st_size, stat.st_mtime_ns]
    except OSError:
        # decoding will report it
        return [clip.id, 0, 0]


# ---------------------------------------------------------------- the frozen backbone

SOUND_PROMPT = "Describe the sound."
VIDEO_PROMPT = "Describe the video."


class Backbone:
    """A frozen LLaVA: .llava, .decoder (what a fusion attaches to), .tokenizer, .device.

    Prompts and answers are written as the checkpoint's own chat template writes them. When it is made it answers
    a question about an image: that is when a wrong checkpoint should fail, and not after hours of training.
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
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special.add(self.processor.image_token)
        self.special = re.compile("|".join(re.escape(token) for token in special if len(token) > 2))
        self._check_images()
        self.before_answer, self.eos = self._answer_format()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self.eos)
        self.pad = self.tokenizer.pad_token_id
        # for concat; a word repeated sixteen times derails a small decoder
        self.placeholder = self.pad
        self._answer_about_image()

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
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            ids, reason = [], one_line(error)
        if ids.count(image) != 1:
            raise InputError(f"{self.path}: a question about an image must hold one token {image}, "
                             f"{processor.image_token} ({reason}); the folder needs the model's "
                             "own tokenizer and chat_template.jinja")

    def _answer_about_image(self):
        """Compute one token of an answer about a made-up image; raises InputError where that fails."""
        from PIL import Image
        file = io.BytesIO()
        Image.new("RGB", (64, 48)).save(file, "PNG")
        try:
            ids, pixels, _ = self.encode("question", file)
            pixels = pixels[None].to(self.device, self.llava.dtype)
            with torch.inference_mode(), self.autocast():
                self.llava(input_ids=torch.tensor([ids], device=self.device), pixel_values=pixels, logits_to_keep=1)
        except UNFIT as error:
            raise InputError(f"{self.path}: cannot answer a question about an image ({one_line(error)}); its parts "
                             "do not fit together, or the device has too little memory") from None

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
        """A user's turn in the model's own chat format, up to the answer, or with it.

        Raises InputError where the text holds a special token."""
        self._refuse_special(text)
        question = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        turns = [{"role": "user", "content": question}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        chat = self.processor.apply_chat_template(turns, add_generation_prompt=answer is None)
        return chat.removeprefix(self.bos)

    def _refuse_special(self, text):
        """In a person's text <image> would be an image and </s> an end; neither can be meant."""
        if token := self.special.search(text):
            raise InputError(f"{text[:80]!r} holds {token[0]}, a special token of {self.path}; take it out of "
                             "the data")

    def encode(self, text, image=None, placeholders=0):
        """(ids, pixels, slots) of a question's prompt; image: a path, or an open file.

        ids: token ids, an image's tokens among them. pixels: (3, height, width), None without an image.
        slots: positions of the placeholders, which are before the image or where one would be; None for 0."""
        image_token, pixels, slots = self.llava.config.image_token_id, None, None
        if image is not None:
            inputs = self.processor(text=self.chat(text, image=True), images=open_image(image), return_tensors="pt")
            ids, pixels = inputs["input_ids"][0].tolist(), inputs["pixel_values"][0]
        else:
            ids = self.tokenizer(self.chat(text, image=placeholders > 0)).input_ids
        if placeholders:
            first = ids.index(image_token)
            # the token alone stands for an image that is not there
            ids[first:first + (image is None)] = [self.placeholder] * placeholders
            slots = list(range(first, first + placeholders))
        return ids, pixels, slots

    def caption_ids(self, text, caption):
        """Token ids of a caption as the answer to a prompt, with the end token.

        Raises InputError where the caption holds a special token."""
        self._refuse_special(caption)
        prompt = self.tokenizer(self.chat(text)).input_ids
        answer = self.before_answer + caption
        whole = self.tokenizer(self.chat(text) + answer).input_ids
        if whole[:len(prompt)] == prompt:
            ids = whole[len(prompt):]
        else:
            # the tokenizer joins the prompt's end and the caption's beginning
            ids = self.tokenizer(answer, add_special_tokens=False).input_ids
        return ids + [self.eos]

    def text(self, ids):
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())


@functools.lru_cache(maxsize=2)  # several runs in one process share their models
def load_backbone(path, device, dtype="auto"):
    return Backbone(path, device, dtype)


@dataclass
class Inputs:
    """The clips of a split, and what the encoder of each run that is attached makes of them."""
    split: Split
    prompts: list   # texts, one a clip
    encoders: list  # of the run itself, then of those attached beside it
    frames: list    # Features in the same order, each with one element a clip


def load_inputs(configs, split, device, limit_clips=0):
    """Inputs of the clips that all encoders can read.

    configs: of the run, then of those attached beside it. split: a Split, or a name; then it is read where the
    first config says. limit_clips: the split keeps its first clips alone, and only they are encoded; 0 is all.
    Their features are a file of their own in the cache, which is named by its clips."""
    own = configs[0]
    if isinstance(split, str):
        split = read_split(own["dataset"], own["data"], split)
    if limit_clips:
        split.clips = split.clips[:limit_clips]
    encoders, features = [], []
    for config in configs:
        encoder = load_encoder(config["encoder"], config["modality"], device)
        encoders.append(encoder)
        features.append(load_features(split, encoder, config["cache"]))
    # only now does the split hold the clips that every encoder can read
    frames = [f.of(split.clips) for f in features]
    prompts = [clip.question or own["prompt"] for clip in split.clips]
    return Inputs(split, prompts, encoders, frames)


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


# ---------------------------------------------------------------- unpack: data sets from the hub

PLAIN_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                "test": "test", "testing": "test"}  # beside these, dev and eval have other meanings than Clotho's
SPLIT_WORDS = FOLDERS | PLAIN_SPLITS
COLUMNS = {  # what a column is for: its name, in lower case and without _ and the like
    "youtube": "youtubeid|ytid|ytvideoid|youtubevideoid",
    "video": "videoid",  # YouTube's beside a start time
    "start": "start|starts|startsec|startseconds?|starttime|starttimes|starttimeseconds?|(start|starttime)ms",
    "name": "audioname|audiofilename|audiofile|audioid|filename|fname|soundname|wavname|clipname|clipid",
    "path": "(audio|sound|wav|flac|file|audiofile)?(file)?path|file",
    "counter": "index|idx|id|uid|key",
    "number": "audiocapid|audiocapsid",
    "split": "split|subset",
    "language": "language|lang|locale|languagecode|langcode",
    "rate": "samplingrate|samplerate|sr",
}
REFERENCES = ("captions?[0-9]*|rawtexts?|rawcaptions?", "captions?(en|eng|english)|(en|eng|english)captions?",
              "en|eng|english", "target", "references?|groundtruths?", "answers?", "descriptions?|sentences?",
              "raw", "txt|texts?|json")  # a file's captions are all columns of the first kind that it has
SOUNDS = ("audio", "(audio|sound|wav|flac|mp3|ogg|opus|m4a|context|speech|wave|waveform)(s|file|bytes|data)?",
          "bytes|data|content|array|samples", ".*(audio|sound|wav).*", "(?!.*(image|img|picture|photo|video|mp4)).*",
          ".*(video|mp4)")  # the first that is there; a picture is none
PATHS = ("audio|sound|wav|flac|mp3|source", COLUMNS["path"], COLUMNS["name"])  # text in them is the path of a sound
FORMATS = {  # extension: what a sound or video begins with, the first that fits; some encoders write zeros first
    ".wav": rb"(RIFF|RF64|BW64)....WAVE", ".avi": rb"(RIFF|RF64|BW64)....AVI ",
    ".m4a": rb"....ftypM4[AB] ", ".mov": rb"....ftypqt  ", ".mp4": rb"....ftyp",
    ".webm": rb"\x1aE\xdf\xa3.{0,120}webm", ".mkv": rb"\x1aE\xdf\xa3",
    ".opus": rb"OggS.{0,116}OpusHead", ".ogg": rb"OggS", ".flac": rb"fLaC", ".aif": rb"FORM....AIF[FC]",
    ".au": rb"\.snd", ".flv": rb"FLV\x01", ".wma": rb"0&\xb2u\x8ef\xcf\x11", ".mpg": rb"\0\0\x01\xba",
    ".aac": rb"\0*\xff[\xf0\xf1\xf8\xf9]",
    ".mp3": rb"\0*\xff[\xe2-\xe5\xea-\xed\xf2-\xf5\xfa-\xfd][\x10-\xef].",
}
LANGUAGES = ("english french german spanish italian portuguese dutch chinese mandarin japanese korean arabic hindi "
             "russian turkish polish swedish finnish greek czech vietnamese indonesian bengali urdu thai persian "
             "en fr de es it pt nl zh ja ko ar hi ru tr pl sv fi el cs vi id bn ur th fa").split()
ROWS = 16  # that are in memory at once; a sound may have 10 MB


def _plain(name):
    return re.sub("[^a-z0-9]", "", str(name).lower())


def _is_english(language):
    return re.match("en(g|glish)?([^a-z]|$)", language.strip().lower())


def unpack(sources, out):
    """Parquet or JSONL files, or folders of them, become a data set in the folder `out` that read_split reads.

    It is in AudioCaps's layout where they have YouTube ids, else in Clotho's. Each sound is written once, with
    its own bytes; the tables come last. Started again it goes on, and ends in the same files. Raises InputError
    for files without sound or captions, and for a folder that holds anything else."""
    out = Path(out)
    state = out / "unpack.json"
    try:
        files = _english_files(_find_sources(sources))
        _note_missing_shards([path for path, _ in files])
        fingerprints = [_fingerprint(path, root) for path, root in files]
        done = _read_state(state, fingerprints)
        if done:
            print(f"{out}: is unpacked already", *done, sep="\n")
            return
        # a mistake in them leaves no folder
        files, columns, count = _plan(files)
        out.mkdir(parents=True, exist_ok=True)
        with _one_builder(state):
            write_json(state, {"sources": fingerprints})
            for tmp in [*out.glob("*.tmp.*"), *out.glob("*/*.tmp.*")]:  # of a process that was killed
                tmp.unlink()
            writer = _Writer(out, any(columns[path]["youtube"] for path, _ in files))
            _write_sounds(files, columns, count, writer)
            printed = writer.finish()
            write_json(state, {"sources": fingerprints, "printed": printed, "files": _count_files(out)})
        print(*printed, sep="\n")
    except OSError as error:
        raise InputError(f"{error.filename or out}: cannot be read or written ({error.strerror})") from None


def _find_sources(sources):
    """[(file, the folder it was found in)] of the parquet files in `sources`, else of the JSONL files."""
    found = {".parquet": [], ".jsonl": []}
    for source in map(Path, sources):
        if not source.exists():
            raise InputError(f"{source}: no such file or folder")
        root = source if source.is_dir() else source.parent
        for path in sorted(_walk(source, {}) if source.is_dir() else [source]):
            suffix = path.suffix.lower()
            if suffix not in found and path == source:
                suffix = ".jsonl"  # a file that was asked for, whatever its name
            if suffix in found:
                found[suffix].append((path, root))
    files = found[".parquet"] or found[".jsonl"]  # a repository of parquet may have metadata.jsonl beside it
    if not files:
        raise InputError(f"{', '.join(map(str, sources))}: holds neither .parquet nor .jsonl; give the folder "
                         "that `hf download` wrote, or a file in it")
    return files


def _english_files(files):
    """The files without those whose names say another language, where other names say English."""
    english, other = [], set()
    for path, root in files:
        words = re.split(r"[-_. /\\]", str(path.relative_to(root)).lower())
        languages = [word for word in words if word in LANGUAGES]
        if languages and _is_english(languages[-1]):
            english.append(path)
        elif languages:
            other.add(path)
    if not english or not other:
        return files
    print(f"{len(other)} files, such as {min(other)}, are left out: {english[0]} is the English one")
    return [(path, root) for path, root in files if path not in other]


def _note_missing_shards(paths):
    """Print which of train-00000-of-00003 and the like are not there: the data set is then a part of it."""
    shards = {}
    for path in paths:
        if match := re.match(r"(.*)-(\d+)-of-(\d+)", path.name):
            shards.setdefault((path.parent / match[1], int(match[3])), set()).add(int(match[2]))
    for (prefix, total), there in shards.items():
        if len(there) < total:
            print(f"{prefix}: {len(there)} of {total} files are there; the others may have to be downloaded")


def _fingerprint(path, root):
    """[name, size, sha256] of a file, in parquet of its end, where the statistics are: it may have 500 MB."""
    with open(path, "rb") as file:
        if file.read(19) == b"version https://git":
            raise InputError(f"{path}: is Git LFS's pointer to the file; get the file itself with `hf download`")
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 65536) if _is_parquet(path) else 0)
        return [path.relative_to(root).as_posix(), size, hashlib.sha256(file.read()).hexdigest()]


def _read_state(state, sources):
    """What was printed when these sources were unpacked beside `state`, None if that is still to be done.

    Raises InputError if the folder is of something else."""
    out, others = state.parent, []
    if out.is_dir():
        others = [name for name in os.listdir(out) if not name.startswith("unpack.")]
    elif out.exists():
        raise InputError(f"{out}: is a file; give a new folder")
    if not others:
        return None
    if not state.exists():
        raise InputError(f"{out}: holds something else, such as {ascii(min(others))}; give a new folder")
    done = read_json(state, "; give a new folder")
    if done.get("sources") != sources:
        raise InputError(f"{out}: was unpacked from other files than these; give a new folder")
    # a table or a sound may have been taken away since
    return done["printed"] if _count_files(out) >= done.get("files", math.inf) else None


def _count_files(out):
    """Of the tables and sounds in an unpacked data set."""
    return len([*out.glob("*.csv"), *out.glob("*/*")])


def _is_parquet(path):
    return path.suffix.lower() == ".parquet"


def _plan(files):
    """(files, {path: its columns}, number of rows of all), without the files that lack sounds or captions.

    Raises InputError if that leaves none, and if some have YouTube ids and others have not."""
    columns, count, useless = {}, 0, []
    for path, _ in files:
        chosen, rows = _parquet_columns(path) if _is_parquet(path) else _json_columns(path)
        if isinstance(chosen, str):
            useless.append(chosen)
        else:
            columns[path] = chosen
            count += rows
    if not columns:
        raise InputError(useless[0])
    if useless:
        print(f"{useless[0]}; {len(useless)} of {len(files)} files are left out")
    examples = {}  # of files with YouTube ids, and of files without
    for path in columns:
        examples.setdefault(bool(columns[path]["youtube"]), path)
    if len(examples) == 2:
        raise InputError(f"{examples[True]} has YouTube ids and {examples[False]} has none, so they are two data "
                         "sets; unpack one at a time")
    if True in examples and not columns[examples[True]]["start"]:
        print(f"{examples[True]}: has no start times; the tables have 0 in their place")
    return [file for file in files if file[0] in columns], columns, count


def _write_sounds(files, columns, count, writer):
    """Read all rows; the writer keeps their captions and writes their sounds."""
    splits = _file_splits(files)
    with tqdm(total=count, desc="unpacking", unit=" rows", disable=None) as bar:
        for path, root in files:
            rows = _parquet_rows(path, columns[path]) if _is_parquet(path) else _records(path)
            for location, cells in rows:
                # a file may hold all three splits, and name them in a column
                word = str(cells.get(columns[path]["split"])).strip().lower()
                split = SPLIT_WORDS.get(word) or splits[path] or "train"
                row, sound = _read_row(location, cells, columns[path], (path.parent, root), writer.left_out)
                if row:
                    writer.add(split, row, sound, location)
                bar.update()


def _split_word(text):
    """The word in a name that says which split it is: a plain one before Clotho's own, or None."""
    words = re.findall("[a-z]+", text.lower())
    for known in (PLAIN_SPLITS, FOLDERS):
        for word in words:
            if word in known:
                return word
    return None


def _file_splits(files):
    """{path: split, or None} by the file's name, else by the deepest folder whose name says it."""
    words = {}
    for path, root in files:
        names = [path.name, *(parent.name for parent in path.parents if parent != root and root in parent.parents)]
        if root.resolve().name.lower() in SPLIT_WORDS:  # only then is it more than a name
            names.append(root.resolve().name)
        words[path] = next(filter(None, map(_split_word, names)), None)
    seen, meaning = set(words.values()), SPLIT_WORDS
    has = {PLAIN_SPLITS.get(word) for word in seen}
    if "val" not in has:
        # Clotho trains on dev and tests on eval; beside a train or a test these are for validation
        if "train" in has:
            meaning = meaning | {"dev": "val", "development": "val"}
        if "test" in has and not seen & {"dev", "development"}:
            meaning = meaning | {"eval": "val", "evaluation": "val"}
    return {path: word and meaning[word] for path, word in words.items()}


# ------------------------------------- which column is what

def _matching(names, patterns):
    """Those of the names that match the first pattern that any of them matches."""
    for pattern in patterns:
        matching = [name for name in names if re.fullmatch(pattern, _plain(name))]
        if matching:
            return matching
    return []


def _reference_columns(names):
    """The names of the first kind in REFERENCES that is among them; caption_2 before caption_10."""
    return sorted(_matching(names, REFERENCES), key=lambda name: int("0" + re.sub("[^0-9]", "", name)))


def _choose_columns(path, kinds):
    """{role: column or None} and "references": columns, from {column: "sound", "numbers", "text" or None}.

    Where there are no sounds or no captions: a text that says so."""
    of_kind = {"sound": [], "numbers": [], "text": [], None: []}
    for column, kind in kinds.items():
        of_kind[kind].append(column)
    columns = {}
    for role, names in COLUMNS.items():
        columns[role] = next(iter(_matching(kinds, [names])), None)
    if not columns["youtube"] and columns["start"]:
        columns["youtube"] = columns["video"]
    columns["references"] = _reference_columns(of_kind["text"])
    # sounds themselves, else samples, else the paths of sounds
    sounds = _matching(of_kind["sound"], SOUNDS) or _matching(of_kind["numbers"], SOUNDS[:3])
    columns["sound"] = next(iter(sounds or _matching(of_kind["text"], PATHS)), None)
    for role, missing in (("sound", "is no sound"), ("references", "are no captions")):
        if not columns[role]:
            return f"{path}: there {missing} in it (its columns: {', '.join(map(ascii, kinds))[:300]})"
    return columns


def _json_columns(path):
    """(columns, number of rows) of a JSONL file."""
    kinds, records = {}, _records(path)
    for location, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{location}: is no object with a sound and its caption, such as key, source, target")
        for name, value in record.items():
            kinds[name] = "text" if isinstance(value, str | list | dict) else kinds.get(name)
    return _choose_columns(path, kinds), len(records)


@contextlib.contextmanager
def _parquet(path):
    """A pyarrow ParquetFile; what goes wrong with it in the block is an InputError."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError("parquet needs pyarrow, which is not installed: pip install pyarrow") from None
    try:
        # page by page, not a row group at once. The hub's files have a row group's sounds in one page, of which
        # pyarrow needs two copies
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as parquet ({one_line(error)})") from None


def _parquet_columns(path):
    """(columns, number of rows) of a parquet file."""
    kinds = {}
    with _parquet(path) as file:
        for column in file.schema_arrow:
            kinds[column.name] = _arrow_kind(column.type)
        return _choose_columns(path, kinds), file.metadata.num_rows


def _arrow_kind(type):
    """What a column may hold: "sound", samples as "numbers", "text", or None for what we do not read."""
    name = str(type)
    if name.startswith("struct"):
        fields = {field.name for field in type}
        return "sound" if fields & {"bytes", "array"} or fields <= {"path", "sampling_rate"} else "text"
    if "list" in name.split("<")[0]:
        inner = _arrow_kind(type.value_type)
        return None if inner == "sound" else inner or "numbers"
    return "sound" if "binary" in name else "text" if "string" in name else None


def _parquet_rows(path, columns):
    """Yield ("file: row n", {column: value}) for each row; only the columns in use are read, ROWS at a time."""
    names = {columns[role] for role in (*COLUMNS, "sound")} | {*columns["references"]}
    number = 0
    with _parquet(path) as file:
        # asked for all groups pyarrow would read the next one while it holds the last
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(ROWS, [group], sorted(names - {None}), use_threads=False):
                for n in range(batch.num_rows):
                    number += 1
                    # one at a time: as Python's numbers samples take ten times the memory
                    yield f"{path}: row {number}", batch.slice(n, 1).to_pylist()[0]


# ------------------------------------- a row

@dataclass
class _Unpacked:
    """A clip on its way into a folder; a row is one too, until the clip that it belongs to has its captions."""
    owner: tuple  # of the name, which clips of one video share
    name: str  # AudioCaps's youtube_id; else the file's name without its extension
    start: str | None  # of AudioCaps, as in the table
    captions: dict  # {caption: audiocap_id or None}, in order
    suffix: str  # "": no row had its sound so far
    mark: str  # of the sound: sha256 of its bytes, or its path

    @property
    def file_name(self):
        return f"{self.name}{'' if self.start is None else '_' + self.start}{self.suffix}"


def _read_row(location, cells, columns, folders, left_out):
    """(_Unpacked, its sound: bytes, a path or None), or (None, None) where it has no place.

    What it lacks is counted in left_out."""
    values = {}
    for role in COLUMNS:
        values[role] = _name_in(cells.get(columns[role]))
    language = values["language"] or ""
    if re.search("[a-z]", language.lower()) and not _is_english(language):  # a number names none
        left_out.count("rows are not in English", location)
        return None, None
    start = "0" if columns["youtube"] else None
    if values["youtube"] and columns["start"]:
        start = _seconds(values["start"], columns["start"])
        if start is None:
            left_out.count("rows have no start time, or one that is no number of seconds", location)
            return None, None
    captions = {}
    for column in columns["references"]:
        for text in _texts(cells.get(column)):
            if len(text) > MAX_CAPTION:
                left_out.count(f"captions have more than {MAX_CAPTION:,} characters", location)
            elif text := _clean(location, text):
                captions.setdefault(text, None if captions else values["number"])
    if not captions:
        left_out.count("rows have no caption", location)
        return None, None
    sound, path = _sound(cells.get(columns["sound"]), values["rate"], folders)
    suffix, mark = "", ""
    if sound is None:
        left_out.count("rows have no sound", f"{location}, {ascii(path)} is not there" if path else location)
    elif suffix := _suffix(sound):
        mark = hashlib.sha256(sound).hexdigest() if isinstance(sound, bytes) else os.path.realpath(sound)
    else:
        left_out.count("rows have a sound in no known format", location)
        sound = None
    base = _parts(path or values["path"] or "")[-1]
    name = values["youtube"] or _stem(_parts(values["name"] or base or values["counter"] or "")[-1])[0] or mark[:16]
    if values["youtube"] or values["name"]:
        owner = "name", values["youtube"] or values["name"]
    elif sound is None:
        return None, None  # nothing says which clip it is
    elif base:
        owner = "path", base, mark  # the bytes too: every row's file may be called audio.wav
    else:
        # beside a single caption an index may count captions, not clips; the bytes tell them apart
        owner = "bytes", values["counter"] if len(captions) > 1 else None, mark
    return _Unpacked(owner, name, start, captions, suffix, mark), sound


def _name_in(value):
    """A name or number in a cell as text; None where it is empty."""
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else value
    if not isinstance(value, str | int | float):
        return None
    return str(value).strip() or None


def _seconds(value, column):
    """A start time as AudioCaps's tables have it, such as "30" or "0.5", else None."""
    try:
        seconds = round(float(value), 3) / (1000 if _plain(column).endswith("ms") else 1)
    except (TypeError, ValueError):
        return None
    return f"{seconds:.3f}".rstrip("0").rstrip(".") if 0 <= seconds < 100_000 else None


def _texts(value):
    """The captions in a cell: a text, a list, a list as text, records with a caption (and perhaps a language)."""
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval) if value.strip()[:1] in ("[", "{") else ():
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                if texts := _texts(parse(value.strip())):
                    return texts
        return [value]
    texts = []
    if isinstance(value, list):
        for item in value:
            texts += _texts(item)
    elif isinstance(value, dict):
        for name in value:
            if re.fullmatch(COLUMNS["language"], _plain(name)) and not _is_english(str(value[name] or "en")):
                return []
        for name in _reference_columns(value):
            texts += _texts(value[name])
    return texts


def _sound(value, rate, folders):
    """(bytes, the path of a file, or None; the path in the cell or None) of a sound's cell."""
    path = None
    if isinstance(value, dict):
        path, rate = value.get("path"), value.get("sampling_rate", rate)
        value = value.get("bytes") or value.get("array") or path
    if isinstance(value, list):
        value = _from_numbers(value, rate)
    if isinstance(value, str) and value:
        for folder in folders:
            for name in (value, _parts(value)[-1]):
                if os.path.isfile(folder / name):
                    return folder / name, value
        return None, value
    return value if isinstance(value, bytes) and value else None, path


def _from_numbers(numbers, rate):
    """The bytes of a sound file from a list of its bytes, else from samples or channels of them; None if neither."""
    try:
        samples = np.array(numbers)
    except ValueError:  # channels of different lengths
        return None
    if not samples.size or samples.ndim > 2 or samples.dtype.kind not in "fiu":
        return None
    least, most = samples.min(), samples.max()
    if samples.dtype.kind == "f":
        samples = samples.astype(np.float32)
    elif samples.ndim == 1 and least >= 0 and most < 256 and _suffix(samples.astype(np.uint8).tobytes()):
        return samples.astype(np.uint8).tobytes()
    else:
        samples = samples.astype(np.int16 if least >= -32768 and most < 32768 else np.int32)
    if not re.fullmatch(r"[1-9]\d*(\.0*)?", str(rate)):
        return None
    if samples.ndim == 2 and samples.shape[0] < samples.shape[1]:
        samples = samples.T
    file = io.BytesIO()
    scipy.io.wavfile.write(file, int(float(rate)), samples)
    return file.getvalue()


def _suffix(sound):
    """The extension that fits a sound's first bytes, or a file's; "" if no known format begins like that."""
    with io.BytesIO(sound) if isinstance(sound, bytes) else open(sound, "rb") as file:
        head, tag = file.read(10), 0
        tagged = head.startswith(b"ID3") and len(head) == 10
        if tagged:
            for byte in head[6:]:
                tag = tag << 7 | byte & 127
        file.seek(10 + tag if tagged else 0)
        head = file.read(1 << 16)
    for suffix, beginning in FORMATS.items():
        if re.match(beginning, head, re.DOTALL) and (not tagged or suffix in (".flac", ".aac")):
            return suffix
    return ".mp3" if tagged else ""


# ------------------------------------- the folder

class _LeftOut(dict):
    """{what rows lack: [how many, where the first is]}"""

    def count(self, reason, location):
        self.setdefault(reason, [0, location])[0] += 1

    def lines(self):
        return [f"{count:,} {reason}; first {location}" for reason, (count, location) in sorted(self.items())]


class _Writer:
    """A data set on its way into a folder: its clips, the names in use, and what was left out."""

    def __init__(self, out, audiocaps):
        self.out, self.audiocaps = out, audiocaps
        self.clips = {"train": {}, "val": {}, "test": {}}
        self.owners = {}  # (split, name): what has it
        self.left_out = _LeftOut()

    def folder(self, split):
        return self.out / (split if self.audiocaps else CLOTHO[split])

    def add(self, split, row, sound, location):
        """Take a row's captions, and its sound unless an earlier row of the clip had it."""
        clip = self.clips[split].setdefault((row.owner, row.start), row)
        if clip is row:
            clip.name = self.free_name(split, row.name, row.owner)
        for caption, number in row.captions.items():
            clip.captions.setdefault(caption, number)
        if sound is not None and (clip is row or not clip.suffix):
            clip.suffix, clip.mark = row.suffix, row.mark
            self.write(self.folder(split) / clip.file_name, sound)
        elif sound is not None and clip.mark != row.mark:
            self.left_out.count("rows have another sound than their clip's first row, whose sound is taken", location)

    def free_name(self, split, name, owner):
        """A file name near `name` that leads nowhere, works on every system, and is nothing else's."""
        name = unicodedata.normalize("NFC", _parts(name)[-1])
        name = re.sub("[\u200b-\u200f\ufeff]", "", re.sub(r"\s+", " ", name))
        name = "".join(c if c.isprintable() and c not in '<>:"|?*' else "_" for c in name)
        name = name.encode()[:160].decode(errors="ignore").strip(" .")
        if not name or re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name.lower()):
            name = f"clip_{name}".rstrip("_")
        free, n = name, 1
        # YouTube's ids differ in case; names in Clotho's layout may lie on a disk that knows none
        while self.owners.setdefault((split, free if self.audiocaps else free.lower()), owner) != owner:
            n += 1
            free = f"{name}_{n}"
        return free

    def write(self, path, sound):
        """Write a sound; one that is there was written whole by an earlier start."""
        if path.exists():
            return
        path.parent.mkdir(exist_ok=True)
        with _replacing(path) as tmp:
            if isinstance(sound, bytes):
                tmp.write_bytes(sound)
                return
            try:
                os.link(os.path.realpath(sound), tmp)  # AudioCaps takes 43 GB
            except OSError:  # another disk, or one without links
                shutil.copyfile(sound, tmp)

    def finish(self):
        """Write the tables of the clips that have a sound. Returns lines that say what there is."""
        tables, given = {}, set()
        for split, clips in self.clips.items():
            for clip in clips.values():
                if clip.suffix:
                    tables.setdefault(split, []).append(clip)
                    given.update(clip.captions.values())
        if not tables:
            raise InputError(f"{self.out}: no clip has both a sound and a caption "
                             f"({'; '.join(self.left_out.lines()) or 'there are no rows'})")
        dataset, printed = "audiocaps" if self.audiocaps else "clotho", []
        free_numbers = (str(n) for n in itertools.count(1) if str(n) not in given)
        for split, clips in tables.items():
            rows = self.audiocaps_rows(clips, free_numbers) if self.audiocaps else self.clotho_rows(clips)
            table, text = _table_name(dataset, split), io.StringIO()
            csv.writer(text, lineterminator="\n").writerows(rows)
            write_text(self.out / table, text.getvalue())
            captions = sum(len(clip.captions) for clip in clips)
            printed.append(f"{table}: {len(clips):,} clips, {captions:,} captions")
        return [*printed, f"for --dataset {dataset}", *self.left_out.lines()]

    def audiocaps_rows(self, clips, free_numbers):
        """Rows of a table; a caption without an audiocap_id of its own gets a free number."""
        rows, taken = [["audiocap_id", "youtube_id", "start_time", "caption"]], {None}
        for clip in clips:
            for caption, number in clip.captions.items():
                if number in taken:
                    number = next(free_numbers)
                taken.add(number)
                rows.append([number, clip.name, clip.start, caption])
        return rows

    def clotho_rows(self, clips):
        """Rows of a table with as many columns as the clip with the most captions needs."""
        most = max(len(clip.captions) for clip in clips)
        rows = [["file_name", *(f"caption_{n}" for n in range(1, most + 1))]]
        for clip in clips:
            rows.append([clip.file_name, *clip.captions, *[""] * (most - len(clip.captions))])
        return rows


def parse_args():
    parser = argparse.ArgumentParser(description="Data sets from the hub, for the other scripts.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("unpack", help="parquet or JSONL to AudioCaps's or Clotho's layout",
                                  description=unpack.__doc__)
    command.add_argument("source", nargs="+", help="folder of .parquet or .jsonl files, or such files")
    command.add_argument("out", help="new folder; or one that an earlier start has begun")
    return parser.parse_args()


def main():
    args = parse_args()
    unpack(args.source, args.out)


if __name__ == "__main__":
    guarded(main)
