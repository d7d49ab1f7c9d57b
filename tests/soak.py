"""The long tests: what a study that runs for days must survive. Minutes each; `pytest` does not run them.

    python tests/soak.py kill --times 10       # SIGKILL to run_all.sh and all its children, at random moments
    python tests/soak.py jobs                  # JOBS=2 against JOBS=1: the same files, and how much faster
    python tests/soak.py disk --times 10       # training onto disks that are too small, then with room
    python tests/soak.py fuzz --times 2000     # spoilt tables, JSON, checkpoints and command lines: read right or refused
    python tests/soak.py media --times 500     # spoilt sounds and videos: decoded, or named

The first three use the smoke scale; kill and jobs run SMOKE=1 in a temporary copy, --phases says which phases.
`unshare -rn python tests/soak.py ...` cuts the network.
"""
import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ("train.py", "fusion.py", "data.py", "scst.py", "evaluate.py", "bootstrap.py", "plots.py", "run_all.sh", "tests",
           "requirements.txt")
TIMES = {"seconds", "clips_per_second", "val_seconds", "reward_seconds", "clips_a_second", "train_hours", "hardware",
         "seconds_to_90_percent", "train_seconds", "cache", "out", "init", "beside", "git"}  # differ from run to run
CLOCKED = {"minutes", "minutes to 90%", "minutes of training", "clips/s", "hardware"}     # columns of REPORT.md


def copy(folder, world):
    """A copy of the repository that shares one stand-in world."""
    folder.mkdir()
    for name in SCRIPTS:
        (folder / name).symlink_to(ROOT / name)
    (folder / "smoke").symlink_to(world)
    return folder


def start(folder, **env):
    return subprocess.Popen(["bash", "run_all.sh"], cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL,
                            env={**os.environ, "SMOKE": "1", "VENV": str(Path(sys.executable).parent.parent), **env})


def timeless(value):
    """JSON without what a clock, a path or another machine put there."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def timeless_report(text):
    """REPORT.md without the columns and the line that a clock or the machine wrote."""
    lines, columns = [], None
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [c.strip() for c in line.strip("|").split("|")]
            columns = columns or [i for i, c in enumerate(cells) if c not in CLOCKED]
            line = " | ".join(cells[i] for i in columns)
        else:
            columns = None
        if "hours of training" not in line:
            lines.append(line)
    return lines


def results(folder):
    """{path: content} of everything that a finished study leaves and that must not depend on how it went."""
    experiments, found = folder / "experiments", {}
    for path in sorted(experiments.rglob("*")):
        if path.is_file() and "cache" not in path.parts:
            name = str(path.relative_to(experiments))
            if path.suffix == ".json":
                found[name] = timeless(json.loads(path.read_text()))
            elif path.suffix == ".jsonl":
                found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
            elif path.name == "REPORT.md":
                found[name] = timeless_report(path.read_text())
            elif path.suffix == ".safetensors":
                found[name] = path.read_bytes()
            elif path.suffix in (".png", ".pdf"):
                found[name] = path.stat().st_size > 1000  # some show minutes
            elif path.name not in ("cmd.txt", "run.log", "lock"):
                found[name] = "there"
    return found


def descendants(pid):
    """Process ids below a process: jobs lead groups of their own, so that a signal to one group would miss them."""
    found, listing = [pid], subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listing.splitlines()]
    for parent in found:
        found += [child for child, its in pairs if its == parent]
    return found


def check(name, whole, again):
    differ = sorted(k for k in whole.keys() | again.keys() if whole.get(k) != again.get(k))
    left = [k for k in again if ".tmp" in k or "/state/" in k]
    print(f"{name}: {len(whole)} files, {len(differ)} differ, {len(left)} left over", *differ[:8], *left[:8], sep="\n  ")
    return not differ and not left


def kill(args, place, world):
    """An uninterrupted study against one that is killed again and again, then a third as often while it reports."""
    whole, killed, rng = copy(place / "whole", world), copy(place / "killed", world), random.Random(args.seed)
    began = time.time()
    assert start(whole, PHASES=args.phases, SEEDS="0").wait() == 0
    length = time.time() - began
    print(f"uninterrupted: {length:.0f} s", flush=True)
    finished, twice, kills = {}, [], 0

    def slain(first, last):
        """Start the study and kill it after so many seconds; False if it ended by itself before that."""
        nonlocal finished, twice, kills
        process = start(killed, PHASES=args.phases, SEEDS="0")
        try:
            assert process.wait(rng.uniform(first, last)) == 0
            return False
        except subprocess.TimeoutExpired:
            pass
        for pid in descendants(process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()
        marks = {p: p.stat().st_mtime_ns for p in killed.glob("experiments/smoke/*/*/training.json")}
        twice += [str(p) for p, t in finished.items() if marks.get(p) != t]
        finished, kills = marks, kills + 1
        print(f"kill {kills}: {len(marks)} runs trained", flush=True)
        return True

    while kills < args.times and slain(3, max(8, 1.5 * length / args.times)):
        pass
    assert start(killed, PHASES=args.phases, SEEDS="0").wait() == 0
    began, during = time.time(), kills
    assert start(killed, PHASES=args.phases, SEEDS="0").wait() == 0  # what a finished study does again: the report
    again = time.time() - began
    while kills < during + max(1, args.times // 3):
        slain(0.1, again)
    assert start(killed, PHASES=args.phases, SEEDS="0").wait() == 0
    print(f"{during} kills, and {kills - during} while the report was written; trained twice: {twice or 'none'}")
    return check("kill", results(whole), results(killed)) and not twice


def jobs(args, place, world):
    """Two jobs side by side against one after the other, a thread each."""
    seconds, found = {}, {}
    for n in ("1", "2"):
        folder, began = copy(place / f"jobs{n}", world), time.time()
        assert start(folder, PHASES=args.phases, SEEDS="0", JOBS=n, THREADS="1").wait() == 0
        seconds[n], found[n] = time.time() - began, results(folder)
    print(f"JOBS=2 is {seconds['1'] / seconds['2']:.2f} times as fast as JOBS=1 ({seconds['2']:.0f} s, {seconds['1']:.0f} s)")
    return check("jobs", found["1"], found["2"])


def disk(args, place, world):
    """Training on disks of 0.1 to 8 MB: refused in one line, what was saved loads, and with room it ends as ever."""
    if "SOAK_MOUNTS" not in os.environ:  # mounts need a namespace, and nobody else should see them
        again = ["unshare", "-rm", sys.executable, __file__, "disk", "--times", str(args.times), "--seed", str(args.seed),
                 "--world", str(world)]
        return subprocess.run(again, env={**os.environ, "SOAK_MOUNTS": "1"}).returncode == 0
    import evaluate
    import fusion
    decoder, rng = evaluate.load_backbone(world / "models/llava", "cpu").decoder, random.Random(args.seed)
    faults, refused, loaded = [], 0, 0

    def train(folder):
        return subprocess.run([sys.executable, ROOT / "train.py", "--data", world / "data/audiocaps", "--llava",
                               world / "models/llava", "--encoder", world / "models/clap", "--layers", "3", "6",
                               "--batch-size", "16", "--steps", "6", "--eval-every", "3", "--scst", "auto",
                               "--scst-steps", "2", "--out", folder / "run"], capture_output=True, text=True)

    def saved(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}

    (place / "room").mkdir()
    assert train(place / "room").returncode == 0
    whole = saved(place / "room/run")
    for k in range(args.times):
        folder, size = place / f"disk{k}", int(100 * 80 ** rng.random())
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=True)
        done, left = train(folder), folder / "run"
        if done.returncode:
            refused += 1
            said = re.findall("error: .*|Traceback", done.stderr)
            if done.returncode != 2 or len(said) != 1 or "No space left" not in said[0]:
                faults.append(f"{size} kB: status {done.returncode}: {said or done.stderr[-200:]}")
        for checkpoint in (left, left / "scst"):
            if done.returncode and (checkpoint / "fusion.json").exists():
                fusion.load(checkpoint, decoder)
                loaded += 1
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        done = train(folder)
        if done.returncode or saved(left) != whole or [*folder.rglob("*.tmp")]:
            faults.append(f"{size} kB, then room: status {done.returncode}, {sorted(saved(left))}, {[*folder.rglob('*.tmp')]}")
        subprocess.run(["umount", folder], check=True)
    print(f"disk: {args.times} sizes, {refused} too small, {loaded} checkpoints loaded there, {len(faults)} faults", *faults,
          sep="\n  ")
    return not faults


# ---------------------------------------------------------------- spoilt files

SPLICES = [b"", b"\0", b"\n", b'"', b",", b"../", b"/etc/passwd", b"\x1b[31m", b"\xff\xfe", b"NaN", b"1e999", b"-1", b"null",
           b"[]", b"{}", b"[" * 3000, b"9" * 400, b"\xef\xbb\xbf", "\u202e\u2028".encode(), b"w " * 3000]


def spoilt(rng, content):
    """content with one to three things wrong: cut off, bits turned, a stretch lost, doubled, moved or replaced."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        b = min(b, a + rng.choice([1, 8, 64, 4096]))
        how = rng.randrange(6)
        if how == 0:
            del content[max(1, a):]
        elif how == 1 and a < len(content):
            content[a] ^= 1 << rng.randrange(8)
        elif how == 2:
            del content[a:b]
        elif how == 3:
            content[a:a] = content[a:b]
        elif how == 4:
            content[a:b] = rng.choice(SPLICES)
        else:
            part = content[a:b]
            del content[a:b]
            at = rng.randrange(len(content) + 1)
            content[at:at] = part
    return bytes(content)


def readers(folder):
    """{name: (content of a good file, where it goes, what reads it and returns what was wrong with what it took)}."""
    import csv
    import io

    import bootstrap
    import data
    import evaluate
    import fusion
    import torch
    from transformers import LlamaConfig, LlamaModel
    sounds = [f"id{i:02d}abcdefg" for i in range(6)]
    for name in ("audiocaps", "clotho/evaluation", "av/videos", "qa/images", "run"):
        (folder / name).mkdir(parents=True)
    for i, name in enumerate(sounds):
        for place in (f"audiocaps/{name}.wav", f"clotho/evaluation/{name}.wav", f"av/videos/{name}.mp4",
                      f"qa/images/{name}.png"):
            (folder / place).write_bytes(b"")

    def rows(head, row):
        out = io.StringIO()
        csv.writer(out).writerows([head, *(row(i, name) for i, name in enumerate(sounds))])
        return out.getvalue().encode()

    captions = [f'a dog barks {i} times, "loudly"' for i in range(6)]

    def table(dataset):
        def read(path):
            split = data.read_split(dataset, path.parent, "test")
            content = " ".join(csv_text(path).replace('"', "").split())
            faults = [c.id for c in split.clips if not c.references or c.path.parent.resolve() == Path("/")
                      or folder not in c.path.resolve().parents]
            for c in split.clips:  # every text stands in the file, control characters aside
                faults += [r for r in c.references if not all(w in content for w in r.replace('"', "").split())]
            return faults or (len({c.id for c in split.clips}) < len(split.clips) and "an id twice")
        return read

    def csv_text(path):
        return data._clean("", path.read_bytes().decode("utf-8-sig"), 10 ** 9)

    def questions(path):
        found, _ = data.read_qa(path)
        return [q.id for q in found if not q.question or not q.answer or folder not in q.image.resolve().parents]

    def predictions(path):
        found, whole = evaluate.read_predictions(path), json.loads(path.read_bytes())
        return [a for a, b in zip(found, whole, strict=True) if a != b]

    def compared(path):
        result = bootstrap.compare([bootstrap.load(path)], [bootstrap.load(folder / "good.json")], resamples=50)
        return [m for m, r in result["metrics"].items() if not (0 < r["p"] <= 1 and abs(r["difference"]) < 1e9)]

    torch.manual_seed(0)
    decoder = LlamaModel(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=4,
                                     num_attention_heads=2, num_key_value_heads=2))
    audio = fusion.build("additive", decoder, encoder_width=8, layers=[1, 2], tokens=2, hidden=4)
    audio.save(folder / "run")
    good = {name: (folder / "run" / name).read_bytes() for name in ("fusion.json", "fusion.safetensors")}

    def checkpoint(path):
        for name, content in good.items():
            if name != path.name:
                (path.parent / name).write_bytes(content)
        loaded = fusion.load(path.parent, decoder).state_dict()
        return [k for k, v in audio.state_dict().items() if not torch.equal(v, loaded[k])]

    items = [{"id": s, "prediction": c, "references": captions, "scores": {"cider_d": i / 7, "spice_lite": 0.5}}
             for i, (s, c) in enumerate(zip(sounds, captions))]
    (folder / "good.json").write_text(json.dumps(items))
    qa = [{"id": str(i), "image": f"{s}.png", "question": "How many?", "answer": str(i)} for i, s in enumerate(sounds)]
    talks = [{"id": str(i), "image": f"{s}.png", "conversations": [
        {"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": str(i)}]} for i, s in enumerate(sounds)]
    return {
        "AudioCaps CSV": (rows(["audiocap_id", "youtube_id", "start_time", "caption"],
                               lambda i, s: [i, s, 10 * i, captions[i]]), "audiocaps/test.csv", table("audiocaps")),
        "Clotho CSV": (rows(["file_name", *(f"caption_{k}" for k in range(1, 6))], lambda i, s: [f"{s}.wav", *captions[:5]]),
                       "clotho/clotho_captions_evaluation.csv", table("clotho")),
        "video CSV": (rows(["file_name", "question", "answer"], lambda i, s: [f"{s}.mp4", "How many?", captions[i]]),
                      "av/test.csv", table("av")),
        "questions JSONL": ("\n".join(map(json.dumps, qa)).encode(), "qa/test.jsonl", questions),
        "LLaVA JSON": (json.dumps(talks).encode(), "qa/test.json", questions),
        "predictions.json": (json.dumps(items).encode(), "run/predictions.json", predictions),
        "compared": (json.dumps(items).encode(), "run/scores.json", compared),
        "fusion.json": (good["fusion.json"], "run/fusion.json", checkpoint),
        "safetensors": (good["fusion.safetensors"], "run/fusion.safetensors", checkpoint)}


def command_line(rng):
    """A script's parser, and words of its own flags with values that fit or do not."""
    import bootstrap
    import evaluate
    import train
    words = ["train.py", "caption", "rerank", "retention", "compare", "seeds", "vs", "--layers", "--tokens", "--steps",
             "--scst", "auto", "--batch-size", "--micro-batch", "--data", "--out", "--json", "--snr", "--weights", "--hear",
             "--lr", "--fusion", "additive", "-1", "0", "3", "1e400", "nan", "", "é", "--", "x" * 200, "--seed"]
    parse = rng.choice([train.parse_args, evaluate.parse_args, bootstrap.parse_args])
    start = {train.parse_args: [["--data", "x", "--out", "y"], []], evaluate.parse_args: [["caption", "x"], ["decide"], []],
             bootstrap.parse_args: [["compare", "x", "y"], []]}[parse]
    return parse, [*rng.choice(start), *rng.choices(words, k=rng.randint(0, 6))]


@contextlib.contextmanager
def case(faults, name, seconds):
    """What no reader may do, hang or raise what is not ours, becomes a fault with the case's name."""
    def late(*_):
        raise TimeoutError
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    except TimeoutError:
        faults.append(f"{name}: hung for {seconds} s")
    except Exception as error:
        faults.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        signal.alarm(0)


def fuzz(times, place, seed=0, seconds=20):
    """{what: [cases, taken, refused]}, and a list of faults: another exception than ours, a wrong answer, a hang."""
    import io

    import bootstrap
    import data
    import fusion
    rng, counts, faults = random.Random(seed), {}, []
    reading = readers(place)
    refusals = (data.InputError, bootstrap.InputError, fusion.FusionError)

    for k in range(times):
        name = rng.choice([*reading, "command line"])
        count = counts.setdefault(name, [0, 0, 0])
        count[0] += 1
        with case(faults, f"{name}, case {k}", seconds):
            try:
                if name == "command line":
                    parse, words = command_line(rng)
                    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                        parse(words)
                    wrong = None
                else:
                    content, path, read = reading[name]
                    (place / path).write_bytes(spoilt(rng, content))
                    wrong = read(place / path)
                count[1] += 1
                if wrong:
                    faults.append(f"{name}, case {k}: taken, but wrong: {str(wrong)[:200]}")
            except refusals as error:
                count[2] += 1
                if "\n" in str(error) or "\x1b" in str(error) or len(str(error)) > 1000:
                    faults.append(f"{name}, case {k}: not one readable line: {str(error)[:200]!r}")
            except SystemExit as error:
                count[2] += 1
                if name != "command line" or error.code not in (0, 2):
                    faults.append(f"{name}, case {k}: exit status {error.code}")
    return counts, faults


def media(times, place, clips, seed=0, seconds=30):
    """({"sound" or "video": [cases, decoded, refused]}, faults, growth of the largest memory in MB)."""
    import resource

    import data
    rng, counts, faults = random.Random(seed), {}, []
    files = sorted(p for p in clips.rglob("*") if p.suffix in (".wav", ".mp4", ".flac", ".ogg"))
    videos = [p for p in files if p.suffix == ".mp4"]
    pick = {"sound": rng.sample(files, min(60, len(files))), "video": rng.sample(videos, min(60, len(videos)))}

    data.decode_audio(pick["sound"][0], 48_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(times):
        kind = rng.choice(["sound", "video"])
        source, other = rng.choice(pick[kind]), rng.choice(pick[kind])
        content = source.read_bytes()
        if rng.random() < 0.2:  # the beginning of one file and the end of another
            content = content[:rng.randrange(len(content))] + other.read_bytes()[rng.randrange(len(content)):]
        path = place / f"spoilt{source.suffix}"
        path.write_bytes(spoilt(rng, content))
        count = counts.setdefault(kind, [0, 0, 0])
        count[0] += 1
        with case(faults, f"{source.name}, case {k}", seconds):
            try:
                found = data.decode_video(path, 8) if kind == "video" else data.decode_audio(path, 48_000)
                count[1] += 1
                if not len(found) or kind == "sound" and not abs(found).max() < float("inf"):
                    faults.append(f"{source.name}, case {k}: {found.shape}")
            except data.InputError as error:
                count[2] += 1
                if path.name not in str(error) or "\n" in str(error):
                    faults.append(f"{source.name}, case {k}: does not name the file in one line: {error}")
    return counts, faults, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def told(counts, faults):
    for name, (cases, taken, refused) in sorted(counts.items()):
        print(f"{name}: {cases} cases, {taken} read, {refused} refused")
    print(f"{sum(c[0] for c in counts.values())} cases, {len(faults)} faults", *faults[:20], sep="\n  ")
    return not faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=["kill", "jobs", "disk", "fuzz", "media"])
    parser.add_argument("--times", type=int, default=10, help="kills, disks or cases")
    parser.add_argument("--phases", default="0 1 2", help="of run_all.sh")
    parser.add_argument("--seed", type=int, default=0, help="of moments and damage")
    parser.add_argument("--world", type=Path, help="a finished smoke world; without it one is built")
    args = parser.parse_args()
    place, ok = Path(tempfile.mkdtemp(prefix="soak_")), True
    world = args.world.resolve() if args.world else place / "smoke"
    if not args.world and args.what != ["fuzz"]:
        subprocess.run([sys.executable, ROOT / "tests/standin.py", "--smoke", "--out", world], check=True)
    try:
        for what in args.what:
            if what == "fuzz":
                ok &= told(*fuzz(args.times, place, args.seed))
            elif what == "media":
                counts, faults, grown = media(args.times, place, world / "data", args.seed)
                ok &= told(counts, faults)
                print(f"largest memory grew by {grown:.0f} MB")
            else:
                ok &= {"kill": kill, "jobs": jobs, "disk": disk}[what](args, place, world)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
