"""data.py unpack: data sets as the hub has them become folders that read_split reads, with the sounds' own bytes."""
import io
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import data  # first: it makes torchaudio importable beside a CPU-only torch
import numpy as np
import pytest
from conftest import ROOT, python
from data import InputError, decode_audio, read_split, unpack
from scipy.io import wavfile

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SHARED = ROOT.parent / "shared/parquet"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/parquet beside the repository")
SOUND = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def wav(n, seconds=0.05, rate=16000):
    """The n-th tone, as the bytes of a WAV file."""
    wave = 0.3 * np.sin(2 * np.pi * (200 + n) * np.arange(int(seconds * rate)) / rate)
    file = io.BytesIO()
    wavfile.write(file, rate, (32767 * wave).astype(np.int16))
    return file.getvalue()


def sound(n, path=None):
    return {"bytes": wav(n), "path": path}


def write(path, rows, types=None, **kwargs):
    """A parquet file of a list of dicts; types: {column: Arrow type} where Arrow would guess another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {}
    for name in rows[0]:
        column = [row[name] for row in rows]
        columns[name] = pa.array(column, (types or {}).get(name))
    pq.write_table(pa.table(columns), path, **kwargs)
    return path


def contents(folder):
    """{relative path: bytes} of all files in a folder."""
    files = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path.read_bytes()
    return files


def clips(dataset, folder, split="test"):
    """[(captions, bytes of the sound)] of a split, as read_split reads it."""
    read = read_split(dataset, folder, split)
    assert not read.missing
    return [(clip.references, clip.path.read_bytes()) for clip in read.clips]


# ------------------------------------- the data sets in use

@needs_shared
def test_opensound(tmp_path):
    unpack([SHARED / "opensound"], tmp_path / "out")
    for split, file in (("train", "train"), ("val", "validation"), ("test", "test")):
        expected = {}
        for row in pq.read_table(SHARED / f"opensound/data/{file}-00000-of-00001.parquet").to_pylist():
            key = f"{row['youtube_id']}_{row['start_time']}"
            expected.setdefault(key, ([], row["audio"]["bytes"]))[0].append(row["caption"])
        read = read_split("audiocaps", tmp_path / "out", split)
        found = {clip.id: (clip.references, clip.path.read_bytes()) for clip in read.clips}
        assert found == expected and not read.missing
        assert {"aaaaaaaaaaX_30", "aaaaaaaaaaX_60"} <= found.keys()  # one id with two start times
        for clip in read.clips:
            assert len(decode_audio(clip.path, 16000)) == 6400


@needs_shared
def test_clapv2_clotho(tmp_path):
    unpack([SHARED / "clapv2_clotho"], tmp_path / "out")
    for split, file in (("train", "train"), ("val", "validation"), ("test", "test")):
        rows = pq.read_table(SHARED / f"clapv2_clotho/data/{file}-00000-of-00001.parquet").to_pylist()
        expected = [(row["raw_text"], row["audio"]["bytes"]) for row in rows]
        assert clips("clotho", tmp_path / "out", split) == expected


def test_audiocap_ids_are_kept_and_missing_ones_numbered(tmp_path):
    # as jp1924/AudioCaps: path is a name; two rows without a number of their own
    rows = []
    for n, number in enumerate([7, 8, None, 8]):
        rows.append({"audiocap_id": number, "youtube_id": f"aaaaaaaaaa{n}", "start_time": 30,
                     "audio": sound(n, f"{n}.wav"), "caption": f"caption {n}"})
    write(tmp_path / "in/data/test-00000-of-00001.parquet", rows)
    unpack([tmp_path / "in"], tmp_path / "out")
    assert clips("audiocaps", tmp_path / "out") == [([f"caption {n}"], wav(n)) for n in range(4)]
    table = (tmp_path / "out/test.csv").read_text().splitlines()
    assert table[0] == "audiocap_id,youtube_id,start_time,caption"
    assert [line.split(",")[0] for line in table[1:]] == ["7", "8", "1", "2"]


def test_audiocaps_with_a_path_beside(tmp_path):
    # as TwinkStart/AudioCaps
    rows = [{"audiocap_id": n, "youtube_id": "aaaaaaaaaaa", "start_time": 5.5, "caption": f"caption {n}",
             "WavPath": f"/home/someone/{n}.wav", "audio": sound(0)} for n in range(3)]
    write(tmp_path / "in/data/test-00000-of-00001.parquet", rows)
    unpack([tmp_path / "in"], tmp_path / "out")
    assert clips("audiocaps", tmp_path / "out") == [(["caption 0", "caption 1", "caption 2"], wav(0))]
    assert (tmp_path / "out/test/aaaaaaaaaaa_5.5.wav").is_file()


def test_context_and_answer(tmp_path):
    # as AudioLLMs/audiocaps_test: no id, so the bytes tell which rows are of one clip
    rows = []
    for n in range(10):
        rows.append({"context": sound(n // 5), "instruction": "Describe the sound.", "answer": f"caption {n}"})
    write(tmp_path / "in/data/test-00000-of-00001.parquet", rows)
    unpack([tmp_path / "in"], tmp_path / "out")
    assert clips("clotho", tmp_path / "out") == [([f"caption {n}" for n in range(5)], wav(0)),
                                                 ([f"caption {n}" for n in range(5, 10)], wav(1))]


def test_audio_name(tmp_path):
    # as piyushsinghpasi/clotho-multilingual; captions of a clip lie in two files, and one clip has fewer
    rows = []
    for n in range(5):
        rows.append({"audio_name": f"Rain, heavy {n % 2}.mp3", "caption": f"caption {n}", "audio": sound(n % 2)})
    write(tmp_path / "in/data/validation-00000-of-00002.parquet", rows[:2])
    write(tmp_path / "in/data/validation-00001-of-00002.parquet", rows[2:])
    unpack([tmp_path / "in"], tmp_path / "out")
    assert clips("clotho", tmp_path / "out", "val") == [(["caption 0", "caption 2", "caption 4"], wav(0)),
                                                        (["caption 1", "caption 3"], wav(1))]
    assert sorted(os.listdir(tmp_path / "out/validation")) == ["Rain, heavy 0.wav", "Rain, heavy 1.wav"]
    header = (tmp_path / "out/clotho_captions_validation.csv").read_text().splitlines()[0]
    assert header == "file_name,caption_1,caption_2,caption_3"


def test_captions_without_sound_are_one_line(tmp_path):
    # as d0rj/audiocaps
    rows = [{"audiocap_id": 1, "youtube_id": "aaaaaaaaaaa", "start_time": 30, "caption": "a caption"}]
    write(tmp_path / "in/data/train-00000-of-00001.parquet", rows)
    done = python("data.py", "unpack", tmp_path / "in", tmp_path / "out", check=False)
    assert done.returncode == 2 and "there is no sound in it" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ------------------------------------- what else the hub has

CAPTIONS = {
    "a list": ({"captions": ["one", "two"]}, {}),
    "numbered": ({"caption_1": "one", "caption_2": "two", "caption_3": None}, {}),
    "numbered beyond nine": ({"caption_10": "two", "caption_9": "one"}, {}),
    "large strings": ({"caption": "one", "captions": ["two", "one"]}, {
        "caption": pa.large_string(), "captions": pa.large_list(pa.large_string())}),
    "records": ({"captions": [{"text": "one", "id": 1}, {"text": "two", "id": 2}]}, {}),
    "records with a language": ({"captions": [
        {"language": "fr", "caption": "un"}, {"language": "en", "caption": "one"},
        {"language": "en-US", "caption": "two"}]}, {}),
    "by language": ({"captions": {"fr": ["un", "deux"], "en": ["one", "two"]}}, {}),
    "a column a language": ({"caption_fr": "un", "caption_en": ["one", "two"]}, {}),
    "a list as text": ({"caption": "['one', \"two\"]"}, {}),
    "raw_text beside text": ({"raw_text": ["one", "two"], "text": "one. two"}, {}),
    "text alone": ({"text": ["one", "two"]}, {}),
    "webdataset": ({"json": {"text": ["one", "two"], "path": "a/b"}, "__key__": "shard/clip"}, {}),
    "sentences": ({"sentences": [{"raw": "one", "tokens": ["one"]}, {"raw": "two", "tokens": ["two"]}]}, {}),
    "repeats": ({"captions": ["one", "two", " one "]}, {}),
    "line breaks": ({"captions": ["\tone\n", "two\x1b[0m"]}, {}),
}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_captions(tmp_path, kind):
    columns, types = CAPTIONS[kind]
    write(tmp_path / "in/test.parquet", [{**columns, "audio": sound(0)}], types)
    unpack([tmp_path / "in"], tmp_path / "out")
    assert clips("clotho", tmp_path / "out") == [(["one", "two"], wav(0))]


SOUNDS = {
    "bytes": ({"audio": wav(0)}, {"audio": pa.binary()}),
    "large binary": ({"wav": wav(0)}, {"wav": pa.large_binary()}),
    "sound beside a picture": ({"image": {"bytes": b"\x89PNG", "path": "a.png"}, "sound": sound(0)}, {}),
    "sound beside a video": ({"video": {"bytes": b"\0\0\0\x18ftypmp42", "path": None}, "audio": sound(0)}, {}),
    "flac in webdataset": ({"__key__": "a", "flac": sound(0)}, {}),
    "a list of bytes": ({"audio": list(wav(0))}, {"audio": pa.list_(pa.uint8())}),
    "path alone": ({"audio": {"bytes": None, "path": "sounds/0.wav"}}, {"audio": SOUND}),
    "path elsewhere": ({"audio": {"bytes": None, "path": "/home/someone/0.wav"}}, {"audio": SOUND}),
    "path as text": ({"file_name": "sounds/0.wav"}, {}),
    "path of another column": ({"audio_path": "sounds/0.wav", "file_name": "x"}, {}),
}


@pytest.mark.parametrize("kind", SOUNDS)
def test_sounds(tmp_path, kind):
    columns, types = SOUNDS[kind]
    path = write(tmp_path / "in/test.parquet", [{**columns, "caption": "one"}], types)
    for name in ("sounds/0.wav", "0.wav"):
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_bytes(wav(0))
    unpack([tmp_path / "in"], tmp_path / "out")
    assert clips("clotho", tmp_path / "out") == [(["one"], wav(0))]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "int64"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("flat", [False, True])
def test_samples(tmp_path, dtype, channels, flat):
    wave = np.random.default_rng(0).uniform(-1, 1, (channels, 800)) * (30000 if "int" in dtype else 1)
    wave = wave.astype(dtype)
    samples = (wave[0] if channels == 1 else wave).tolist()
    kind = pa.list_(pa.from_numpy_dtype(dtype))
    kind = kind if channels == 1 else pa.list_(kind)
    if flat:
        row, types = {"audio": samples, "sampling_rate": 8000, "caption": "one"}, {"audio": kind}
    else:
        types = {"audio": pa.struct([("path", pa.string()), ("array", kind), ("sampling_rate", pa.int64())])}
        row = {"audio": {"path": None, "array": samples, "sampling_rate": 8000}, "caption": "one"}
    write(tmp_path / "in/test.parquet", [row], types)
    unpack([tmp_path / "in"], tmp_path / "out")
    [path] = (tmp_path / "out/evaluation").iterdir()
    rate, written = wavfile.read(path)
    assert path.suffix == ".wav" and rate == 8000
    assert np.array_equal(written.T.reshape(channels, -1), wave.astype(np.float32 if "float" in dtype else np.int16))


HEADS = {
    ".wav": [wav(0), b"RF64\xff\xff\xff\xffWAVE"], ".flac": [b"fLaC\0\0", b"ID3\4\0\0\0\0\0\2xxfLaC"],
    ".ogg": [b"OggS" + bytes(24) + b"\x01vorbis"], ".opus": [b"OggS" + bytes(24) + b"OpusHead"],
    ".mp3": [b"ID3\4\0\0\0\0\0\2xx\xff\xfb", b"\xff\xfb\x90\x64", b"\0\0\xff\xf3\x84\x64"],
    ".aac": [b"\xff\xf1\x50\x80"], ".m4a": [b"\0\0\0\x20ftypM4A \0"], ".mp4": [b"\0\0\0\x18ftypisom"],
    ".webm": [b"\x1aE\xdf\xa3\x9fB\x86\x81\1B\x82\x84webm"],
    ".mkv": [b"\x1aE\xdf\xa3\xa3B\x82\x88matroska"], ".aif": [b"FORM\0\0\0\x10AIFF", b"FORM\0\0\0\x10AIFC"],
    ".au": [b".snd\0\0"], "": [b"", b"<html>", b"\xff\xfeh\0t\0", b"RIFF\0\0\0\0WEBP", b"\x89PNG\r\n"],
}


@pytest.mark.parametrize("suffix", HEADS)
def test_extension_by_content(tmp_path, suffix):
    for head in HEADS[suffix]:
        assert data._suffix(head) == suffix
        (tmp_path / "sound.xyz").write_bytes(head)
        assert data._suffix(tmp_path / "sound.xyz") == suffix


def test_extension_is_the_contents_not_the_names(tmp_path):
    flac = b"fLaC" + bytes(60)
    write(tmp_path / "in/test.parquet", [{"audio": {"bytes": flac, "path": "rain.wav"}, "caption": "one"}])
    unpack([tmp_path / "in"], tmp_path / "out")
    assert (tmp_path / "out/evaluation/rain.flac").read_bytes() == flac


@pytest.mark.parametrize("names, expected", [
    (["train-00000-of-00001", "validation-00000-of-00001", "test-00000-of-00001"], "train val test"),
    (["Training", "valid", "testing"], "train val test"),
    (["development", "validation", "evaluation"], "train val test"),
    (["dev", "val", "eval"], "train val test"),
    (["train", "dev", "test"], "train val test"),
    (["train", "dev", "eval"], "train val test"),
    (["train", "eval", "test"], "train val test"),
    (["development-training", "development-validation", "development-testing"], "train val test"),
    (["default/partial-train/0000", "default/partial-validation/0000", "default/test/0000"], "train val test"),
    (["data/train/part-0", "data/valid/part-0", "data/test/part-0"], "train val test"),
    (["clotho_dev", "clotho_val", "clotho_eval"], "train val test"),
    (["0000", "latest", "x/contest"], "train train train"),  # no split: as the hub names it
])
def test_splits(tmp_path, names, expected):
    for n, name in enumerate(names):
        write(tmp_path / f"in/{name}.parquet", [{"caption": name, "audio": sound(n)}])
    unpack([tmp_path / "in"], tmp_path / "out")
    for n, (name, split) in enumerate(zip(names, expected.split())):
        assert ([name], wav(n)) in clips("clotho", tmp_path / "out", split)


def test_the_folder_given_is_a_split_if_that_is_its_name(tmp_path):
    write(tmp_path / "test_of_mine/data.parquet", [{"caption": "one", "audio": sound(0)}])
    write(tmp_path / "test/0000.parquet", [{"caption": "one", "audio": sound(0)}])
    unpack([tmp_path / "test_of_mine"], tmp_path / "a")
    unpack([tmp_path / "test/0000.parquet"], tmp_path / "b")
    assert clips("clotho", tmp_path / "a", "train") == clips("clotho", tmp_path / "b", "test") == [(["one"], wav(0))]


def test_a_column_with_the_split(tmp_path):
    words = ["development", "validation", "evaluation"]
    write(tmp_path / "in/train-00000-of-00001.parquet",
          [{"split": word, "caption": word, "audio": sound(n)} for n, word in enumerate(words)])
    unpack([tmp_path / "in"], tmp_path / "out")
    for n, split in enumerate(("train", "val", "test")):
        assert clips("clotho", tmp_path / "out", split) == [([words[n]], wav(n))]


def test_names_and_bytes_tell_clips_apart(tmp_path):
    """Every row's file may have one name; an index may count rows, or start again in each file."""
    for case, rows, expected in (
            ("path", [("x/audio.wav", None, 0), ("x/audio.wav", None, 1), ("y/audio.wav", None, 0)], [[0, 2], [1]]),
            ("paths", [("a.wav", None, 0), ("b.wav", None, 0)], [[0], [1]]),
            ("index", [(None, 0, 0), (None, 1, 0), (None, 0, 1)], [[0, 1], [2]])):
        table = [{"index": index, "caption": f"caption {n}", "audio": sound(tone, path)}
                 for n, (path, index, tone) in enumerate(rows)]
        write(tmp_path / case / "test.parquet", table, {"audio": SOUND, "index": pa.int64()})
        unpack([tmp_path / case], tmp_path / f"out_{case}")
        found = clips("clotho", tmp_path / f"out_{case}")
        assert [captions for captions, _ in found] == [[f"caption {n}" for n in group] for group in expected]
        assert [content for _, content in found] == [wav(rows[group[0]][2]) for group in expected]


def test_index_beside_several_captions_counts_clips(tmp_path):
    write(tmp_path / "in/test.parquet",
          [{"index": n, "raw_text": [f"{n} one", f"{n} two"], "audio": sound(0)} for n in range(2)])
    unpack([tmp_path / "in"], tmp_path / "out")
    assert [captions for captions, _ in clips("clotho", tmp_path / "out")] == [["0 one", "0 two"], ["1 one", "1 two"]]


def test_what_is_left_out_is_counted(tmp_path, capsys):
    rows = [
        {"youtube_id": "aaaaaaaaaaa", "start_time": "30", "language": "en", "caption": "one", "audio": None},
        {"youtube_id": "aaaaaaaaaaa", "start_time": "30", "language": "en", "caption": "two", "audio": sound(0)},
        {"youtube_id": "aaaaaaaaaaa", "start_time": "30", "language": "fr", "caption": "deux", "audio": sound(0)},
        {"youtube_id": "aaaaaaaaaaa", "start_time": "30", "language": None, "caption": "three", "audio": sound(1)},
        {"youtube_id": "bbbbbbbbbbb", "start_time": "30", "language": "en", "caption": None, "audio": sound(2)},
        {"youtube_id": "ccccccccccc", "start_time": "30", "language": "en", "caption": "one", "audio": None},
        {"youtube_id": "ddddddddddd", "start_time": "0:30", "language": "en", "caption": "one", "audio": sound(3)},
        {"youtube_id": "eeeeeeeeeee", "start_time": "30", "language": "en", "caption": "x" * 2001, "audio": sound(3)},
        {"youtube_id": "fffffffffff", "start_time": "30", "language": "en", "caption": "x",
         "audio": {"bytes": b"<html>"}},
    ]
    write(tmp_path / "in/test.parquet", rows, {"audio": SOUND})
    unpack([tmp_path / "in"], tmp_path / "out")
    # the first row's caption is its clip's, whose sound another row has
    assert clips("audiocaps", tmp_path / "out") == [(["one", "two", "three"], wav(0))]
    assert os.listdir(tmp_path / "out/test") == ["aaaaaaaaaaa_30.wav"]
    printed = capsys.readouterr().out
    for line in ("test.csv: 1 clips, 3 captions", "2 rows have no sound; first", "2 rows have no caption; first",
                 "1 rows are not in English; first", "1 rows have no start time", "1 captions have more than 2,000",
                 "1 rows have a sound in no known format; first", "1 rows have another sound than"):
        assert line in printed, line


def test_files_of_other_languages(tmp_path, capsys):
    for n, name in enumerate(("english/test-00000-of-00001", "french/test-00000-of-00001", "de/test-00000-of-00001")):
        write(tmp_path / f"in/{name}.parquet", [{"audio_name": "a.wav", "caption": f"caption {n}", "audio": sound(0)}])
    unpack([tmp_path / "in"], tmp_path / "out")
    assert clips("clotho", tmp_path / "out") == [(["caption 0"], wav(0))]
    assert "2 files" in capsys.readouterr().out


def test_files_that_are_no_part_of_it(tmp_path, capsys):
    write(tmp_path / "in/data/test-00000-of-00002.parquet", [{"caption": "one", "audio": sound(0)}])
    write(tmp_path / "in/metadata.parquet", [{"key": "a", "license": "CC0"}])
    (tmp_path / "in/.cache").mkdir()
    (tmp_path / "in/.cache/x.parquet").write_bytes(b"begun")
    (tmp_path / "in/metadata.jsonl").write_text("{}")
    unpack([tmp_path / "in"], tmp_path / "out")
    assert clips("clotho", tmp_path / "out") == [(["one"], wav(0))]
    printed = capsys.readouterr().out
    assert "1 of 2 files are there" in printed and "metadata.parquet: there is no sound in it" in printed


@pytest.mark.parametrize("name", [
    "../../x", "/etc/x", "..", "C:\\x", "a/b/x.wav", "x\0y.wav", " x .wav", "", "CON", ".hidden", "._x", "x" * 400,
    "é" * 200, "-rf", "x\n.wav", "\u202ex.wav", "a\u200bb", "Rain: heavy?.wav", "~root", "$(x)", "x.csv"])
@pytest.mark.parametrize("column", ["youtube_id", "audio_name", "path"])
def test_names_stay_in_the_folder(tmp_path, name, column):
    rows = []
    for n in range(2):
        row = {"caption": f"caption {n}", "audio": sound(n, [name, "x"][n] if column == "path" else None)}
        if column != "path":
            row[column] = [name, "x"][n]
        rows.append(row)
    write(tmp_path / "in/test.parquet", rows, {"audio": SOUND})
    before = set(tmp_path.rglob("*"))
    unpack([tmp_path / "in"], tmp_path / "out")
    for path in set(tmp_path.rglob("*")) - before:
        assert tmp_path / "out" in (path, *path.parents)
    dataset = "audiocaps" if column == "youtube_id" else "clotho"
    assert clips(dataset, tmp_path / "out") == [(["caption 0"], wav(0)), (["caption 1"], wav(1))]
    assert len(os.listdir(tmp_path / "out" / ("test" if dataset == "audiocaps" else "evaluation"))) == 2


# ------------------------------------- JSONL

def test_jsonl_of_slam_llm(tmp_path):
    folder = tmp_path / "in"
    (folder / "waves").mkdir(parents=True)
    for n in range(2):
        (folder / f"waves/Y{n}.wav").write_bytes(wav(n))
    sources = ["waves/Y0.wav", str(folder / "waves/Y1.wav"), "/elsewhere/waves/none.wav"]
    lines = [{"key": f"Y{n % 3}_{n}", "source": sources[n % 3], "target": f"caption, {n}"} for n in range(6)]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "train.jsonl").write_text(json.dumps(lines[0]) + "\n\n")
    unpack([folder], tmp_path / "out")
    assert clips("clotho", tmp_path / "out") == [(["caption, 0", "caption, 3"], wav(0)),
                                                 (["caption, 1", "caption, 4"], wav(1))]
    assert clips("clotho", tmp_path / "out", "train") == [(["caption, 0"], wav(0))]
    unpack([folder / "test.jsonl"], tmp_path / "one")
    assert clips("clotho", tmp_path / "one") == clips("clotho", tmp_path / "out")


# ------------------------------------- started again

def many(folder, files=3, rows=400):
    for file in range(files):
        table = []
        for n in range(file * rows, (file + 1) * rows):
            table.append({"youtube_id": f"{n // 2:011d}", "start_time": n // 4, "caption": f"caption {n}",
                          "audio": sound(n // 2)})
        write(folder / f"data/train-{file:05d}-of-{files:05d}.parquet", table, row_group_size=100)
    return folder


def unpack_slowly(source, out):
    """So that it has not ended when it is to be killed."""
    write_sound = data._Writer.write
    data._Writer.write = lambda *args: (time.sleep(0.002), write_sound(*args))
    unpack([source], out)


def test_killed_and_started_again(tmp_path):
    source, out = many(tmp_path / "in"), tmp_path / "out"
    unpack([source], tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert len(whole) == 600 + 2
    for enough in (20, 100, 200, 350):  # a process is killed when it has written so many sounds
        process = multiprocessing.get_context("fork").Process(target=unpack_slowly, args=(source, out))
        process.start()
        deadline = time.monotonic() + 120
        while not (out / "train").is_dir() or len(os.listdir(out / "train")) < enough:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(.002)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        begun = contents(out)
        assert not any(name.endswith(".csv") for name in begun)  # tables come last
        for name, content in begun.items():
            assert ".tmp." in name or not name.endswith(".wav") or content == whole[name]
    (out / "train/x.wav.tmp.1").write_bytes(b"half")
    stamps = {path: path.stat().st_mtime_ns for path in (out / "train").glob("*.wav")}
    unpack([source], out)
    assert contents(out) == whole
    for path, stamp in stamps.items():
        assert path.stat().st_mtime_ns == stamp  # not written again


def test_a_finished_folder_is_left_alone(tmp_path, capsys, monkeypatch):
    source = many(tmp_path / "in", files=1, rows=20)
    unpack([source], tmp_path / "out")
    first = capsys.readouterr().out
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(data, "_parquet_rows", None)  # no row is read
        unpack([source], tmp_path / "out")
    assert first.splitlines() == capsys.readouterr().out.splitlines()[1:]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == stamps
    whole = contents(tmp_path / "out")
    for name in ("train.csv", "train/00000000003_1.wav"):
        (tmp_path / "out" / name).unlink()
        unpack([source], tmp_path / "out")
        assert contents(tmp_path / "out") == whole


def test_a_folder_that_holds_something_else(tmp_path):
    source = many(tmp_path / "in", files=1, rows=4)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/thesis.tex").write_text("text")
    (tmp_path / "file").write_text("text")
    for name in ("own", "file", "in"):
        before = contents(tmp_path)
        with pytest.raises(InputError, match="give a new folder"):
            unpack([source], tmp_path / name)
        assert contents(tmp_path) == before
    unpack([source], tmp_path / "out")
    other = many(tmp_path / "other", files=1, rows=6)
    with pytest.raises(InputError, match="was unpacked from other files"):
        unpack([other], tmp_path / "out")


def test_nothing_to_write_does_not_take_the_folder(tmp_path):
    empty = write(tmp_path / "empty.parquet", [{"caption": None, "audio": sound(0)}], {"caption": pa.string()})
    with pytest.raises(InputError, match="no clip has both a sound and a caption .1 rows have no caption"):
        unpack([empty], tmp_path / "out")
    unpack([many(tmp_path / "in", files=1, rows=4)], tmp_path / "out")
    assert len(clips("audiocaps", tmp_path / "out", "train")) == 2


# ------------------------------------- a person's mistakes

def broken(tmp_path, kind):
    """SOURCE with a mistake of this kind."""
    source = tmp_path / "in"
    good = write(source / "train.parquet", [{"youtube_id": "aaaaaaaaaaa", "caption": "one", "audio": sound(0)}])
    if kind == "nowhere":
        return source / "none"
    if kind == "no parquet":
        good.unlink()
    elif kind == "pointer":
        good.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "cut off":
        good.write_bytes(good.read_bytes()[:-20])
    elif kind == "overwritten":
        content = good.read_bytes()
        good.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2:])
    elif kind == "two data sets":
        write(source / "test.parquet", [{"audio_name": "a", "caption": "one", "audio": sound(0)}])
    elif kind == "no captions":
        write(good, [{"audio": sound(0), "label": 3}])
    elif kind == "JSON":
        good.unlink()
        (source / "train.jsonl").write_text('{"key": 1}\nnot JSON\n')
    elif kind == "JSON without sounds":
        good.unlink()
        (source / "train.jsonl").write_text('{"key": "a", "source": "none.wav", "target": "one"}\n')
    return source


@pytest.mark.parametrize("kind, message", [
    ("nowhere", "no such file or folder"), ("no parquet", "holds neither .parquet nor .jsonl"),
    ("pointer", "hf download"), ("cut off", "train.parquet: cannot be read as parquet"),
    ("overwritten", "train.parquet: cannot be read as parquet"), ("two data sets", "unpack one at a time"),
    ("no captions", "there are no captions in it"), ("JSON", "train.jsonl:2: is not JSON"),
    ("JSON without sounds", "'none.wav' is not there")])
def test_mistakes(tmp_path, kind, message):
    with pytest.raises(InputError) as error:
        unpack([broken(tmp_path, kind)], tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_command_line(tmp_path, monkeypatch):
    files = sorted((many(tmp_path / "in", files=2, rows=4) / "data").iterdir())
    done = python("data.py", "unpack", *files, tmp_path / "out")
    assert "train.csv: 4 clips, 8 captions" in done.stdout
    for args in ((), ("unpack",), ("unpack", "only_one")):
        monkeypatch.setattr(sys, "argv", ["data.py", *args])
        with pytest.raises(SystemExit) as stop:
            data.main()
        assert stop.value.code == 2


def test_without_pyarrow(tmp_path, monkeypatch):
    source = many(tmp_path / "in", files=1, rows=4)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        unpack([source], tmp_path / "out")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    noise, rows = np.random.default_rng(0), []
    for n in range(192):
        content = {"bytes": wav(n) + noise.bytes(1 << 20), "path": None}
        rows.append({"audio_name": f"{n}.wav", "caption": "one", "audio": content})
    source = write(tmp_path / "test.parquet", rows, row_group_size=8)
    script = """
import re, sys, data, pyarrow.parquet
def peak():  # not getrusage's, which begins with the memory of the process that started this one
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
before = peak()
data.unpack(sys.argv[1:2], sys.argv[2])
print((peak() - before) // 1024)
"""
    done = python("-c", script, source, tmp_path / "out")
    assert int(done.stdout.split()[-1]) < 128  # MB; the file has 192
