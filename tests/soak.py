"""The long tests: what a study that runs for days must survive. Minutes each; `pytest` does not run them.

    python tests/soak.py kill --times 10       # run_all.sh ended at random moments: with all its children, by HUP, alone
    unshare -rm python tests/soak.py disk      # training onto disks that are too small, then with room
    python tests/soak.py fuzz --times 2000     # damaged tables, checkpoints and media: read right or refused

At smoke scale, in a temporary folder. `unshare -rn python tests/soak.py kill` cuts the network.
"""
import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import copy_of_repository, python

import data
import evaluate
import fusion

VARYING = {"seconds", "clips_per_second", "seconds_a_step", "val_seconds", "clips_a_second", "peak_memory",
           "train_hours", "hardware", "seconds_to_90_percent", "train_seconds", "cache", "out", "init", "with", "git",
           "folder"}  # from run to run


def timeless(value):
    """JSON without what a clock, a path or another machine put there."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in VARYING}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def results(folder):
    """{path: content} of what a finished study leaves and that must not depend on how it went."""
    contents = {}
    for path in sorted((folder / "experiments").rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and "/cache/" not in name and path.name not in ("cmd.txt", "run.log", "lock"):
            contents[name] = "exists"  # enough for figures and the report, which show minutes
            if path.suffix in (".json", ".jsonl"):
                lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
                contents[name] = [timeless(json.loads(line)) for line in lines]
            elif path.suffix == ".safetensors":
                contents[name] = path.read_bytes()
    return contents


def start(folder, args):
    env = {**os.environ, "SMOKE": "1", "SEEDS": "0", "PHASES": args.phases, "VENV": str(Path(sys.executable).parent.parent)}
    return subprocess.Popen(["bash", "run_all.sh"], cwd=folder, env=env, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def trained_again(folder, trained):
    """Runs whose training.json is not the one in `trained`, {path: time}, which is brought up to date."""
    times = {p: p.stat().st_mtime_ns for p in folder.glob("experiments/smoke/*/*/training.json")}
    again = [str(p) for p, t in trained.items() if times.get(p) != t]
    trained.update(times)
    return again


def living(session):
    """Processes of a session that run, as ps writes them; those that ended and were not waited for are none."""
    lines = subprocess.run(["ps", "-o", "pid=,stat=,args=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in lines.splitlines() if line.split()[1][0] != "Z"]


def end(process, how, killed, args):
    """End run_all.sh in one of ENDS. Faults: a job that outlives it and does not keep the folder from a second start."""
    if how == "all at once":
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)])  # with all jobs: they share its session
        process.wait()
        return []
    os.kill(process.pid, signal.SIGHUP if how == "SIGHUP" else signal.SIGKILL)
    process.wait()
    jobs = living(process.pid)
    if how == "SIGHUP":
        return [f"SIGHUP: left {line}" for line in jobs]
    if not jobs:
        return []
    # stopped, so that they do not end before the second start has looked
    subprocess.run(["pkill", "-STOP", "-s", str(process.pid)])
    stopped = living(process.pid)
    status = start(killed, args).wait() if stopped else 2
    subprocess.run(["pkill", "-CONT", "-s", str(process.pid)])
    while living(process.pid):  # they go on to their end, and what they leave counts
        time.sleep(0.2)
    return [] if status == 2 else [f"a second start beside {line} ended with status {status}" for line in stopped]


ENDS = ["all at once", "SIGHUP", "SIGKILL"]  # of run_all.sh and all jobs; of run_all.sh alone


def kill(args, folder, world):
    """Faults of a study that is ended again and again, against one that is not."""
    whole, killed = copy_of_repository(folder / "whole", world), copy_of_repository(folder / "killed", world)
    rng, began = random.Random(args.seed), time.time()
    assert start(whole, args).wait() == 0
    length = time.time() - began
    trained, twice, outlived = {}, [], []
    for kills in range(args.times):
        how = ENDS[kills % len(ENDS)]
        process = start(killed, args)
        try:
            assert process.wait(rng.uniform(3, max(8, 1.5 * length / args.times))) == 0
            break
        except subprocess.TimeoutExpired:
            outlived += end(process, how, killed, args)
        twice += trained_again(killed, trained)
        print(f"kill {kills + 1}, {how}: {len(trained)} runs trained", flush=True)
    assert start(killed, args).wait() == 0
    twice += trained_again(killed, trained)
    one, two = results(whole), results(killed)
    faults = [f"{name}: differs" for name in one.keys() | two.keys() if one.get(name) != two.get(name)]
    faults += [f"{name}: left over" for name in two if ".tmp" in name or "/state/" in name]
    faults += [f"{name}: trained twice" for name in twice]
    return faults + outlived


def disk(args, folder, world):
    """Training on disks of 0.1 to 8 MB: refused in one line, what was saved loads, and with room it ends as ever."""
    decoder, rng = data.load_backbone(str(world / "models/llava"), "cpu").decoder, random.Random(args.seed)

    def train(out):
        return python("train.py", "--data", world / "data/audiocaps", "--llava", world / "models/llava", "--encoder",
                      world / "models/clap", "--layers", "3", "6", "--batch-size", "16", "--steps", "6", "--eval-every",
                      "3", "--scst", "auto", "--scst-steps", "2", "--out", out / "run", check=False)

    def saved(out):
        return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors")}
    room, faults = folder / "room", []
    room.mkdir()
    assert train(room).returncode == 0
    for number in range(args.times):
        out, size = folder / f"disk{number}", int(100 * 80 ** rng.random())
        out.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", out], check=True)
        done = train(out)
        if done.returncode:
            errors = re.findall("error: .*|Traceback", done.stderr)
            if done.returncode != 2 or len(errors) != 1 or "No space left" not in errors[0]:
                faults.append(f"{size} kB: status {done.returncode}: {errors or done.stderr[-200:]}")
            for checkpoint in out.rglob("fusion.json"):
                fusion.load(checkpoint.parent, decoder)
        subprocess.run(["mount", "-o", "remount,size=64m", out], check=True)
        done, left = train(out), [*out.rglob("*.tmp*")]
        if done.returncode or saved(out / "run") != saved(room / "run") or left:
            faults.append(f"{size} kB, then room: status {done.returncode}, left over: {left}")
        subprocess.run(["umount", out], check=True)
    return faults


SPLICES = [b"", b"\0", b"\n", b'"', b",", b"../", b"/etc/passwd", b"\x1b[31m", b"\xff\xfe", b"NaN", b"1e999", b"-1", b"null",
           b"[]", b"{}", b"[" * 3000, b"9" * 400, b"\xef\xbb\xbf", "\u202e\u2028".encode(), b"w " * 3000]


def damaged(rng, content):
    """content with one to three faults: cut off, a bit flipped, a stretch lost, doubled or replaced."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        end = min(end, start + rng.choice([1, 8, 64, 4096]))
        fault = rng.randrange(5)
        if fault == 0:
            del content[max(1, start):]
        elif fault == 1 and start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        elif fault == 2:
            del content[start:end]
        elif fault == 3:
            content[start:start] = content[start:end]
        else:
            content[start:end] = rng.choice(SPLICES)
    return bytes(content)


def readers(folder, world):
    """{name: (content of a good file, its path, a function that reads it and returns what is wrong in the result)}."""
    import torch
    from transformers import LlamaConfig, LlamaModel
    names = [f"id{i:02d}abcdefg" for i in range(6)]
    for name in ("audiocaps", "qa/images", "run"):
        (folder / name).mkdir(parents=True)
    for name in names:
        (folder / f"audiocaps/{name}.wav").touch()
        (folder / f"qa/images/{name}.png").touch()

    def read_table(path):
        clips = data.read_split("audiocaps", path.parent, "test").clips
        faults = [c.id for c in clips if not c.references or folder not in c.path.resolve().parents]
        return faults or len({c.id for c in clips}) < len(clips)

    def read_questions(path):
        questions, _ = data.read_qa(path)
        return [q.id for q in questions if not q.question or not q.answer or folder not in q.image.resolve().parents]

    def read_predictions(path):
        return [a for a, b in zip(evaluate.read_predictions(path), json.loads(path.read_bytes()), strict=True) if a != b]

    def read_media(path):
        frames = data.decode_video(path, 8) if path.suffix == ".mp4" else data.decode_audio(path, 48_000)
        return len(frames) == 0 or not abs(frames).max() < float("inf")

    torch.manual_seed(0)
    decoder = LlamaModel(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=4,
                                     num_attention_heads=2, num_key_value_heads=2))
    audio = fusion.build("additive", decoder, encoder_width=8, layers=[1, 2], tokens=2, hidden=4)
    audio.save(folder / "run")
    good = {name: (folder / "run" / name).read_bytes() for name in ("fusion.json", "fusion.safetensors")}

    def read_checkpoint(path):
        for name, content in good.items():
            if name != path.name:
                (path.parent / name).write_bytes(content)
        loaded = fusion.load(path.parent, decoder).state_dict()
        return [k for k, v in audio.state_dict().items() if not torch.equal(v, loaded[k])]

    items = json.dumps([{"id": name, "prediction": "a dog barks", "references": ["a dog", "it barks"],
                         "scores": {"cider_d": i / 7}} for i, name in enumerate(names)])
    questions = [json.dumps({"id": str(i), "image": f"{name}.png", "question": "How many?", "answer": str(i)})
                 for i, name in enumerate(names)]
    rows = [f'{i},{name},{10 * i},"a dog barks {i} times, ""loudly"""' for i, name in enumerate(names)]
    table = "\n".join(["audiocap_id,youtube_id,start_time,caption", *rows])
    sound, video = (next((world / "data").rglob(pattern)) for pattern in ("*.wav", "*.mp4"))
    return {"wav": (sound.read_bytes(), "run/clip.wav", read_media), "mp4": (video.read_bytes(), "run/clip.mp4", read_media),
            "AudioCaps CSV": (table.encode(), "audiocaps/test.csv", read_table),
            "questions JSONL": ("\n".join(questions).encode(), "qa/test.jsonl", read_questions),
            "predictions.json": (items.encode(), "run/predictions.json", read_predictions),
            "fusion.json": (good["fusion.json"], "run/fusion.json", read_checkpoint),
            "safetensors": (good["fusion.safetensors"], "run/fusion.safetensors", read_checkpoint)}


def fuzz(times, folder, world, seed=0, seconds=20):
    """{name: [cases, read, refused]} and a list of faults: an exception that is not ours, a wrong result, a hang."""
    def late(*_):
        raise TimeoutError(f"hung for {seconds} s")
    rng, faults, reading = random.Random(seed), [], readers(folder, world)
    counts = {name: [0, 0, 0] for name in reading}
    signal.signal(signal.SIGALRM, late)
    for number in range(times):
        name = rng.choice([*reading])
        content, path, read = reading[name]
        (folder / path).write_bytes(damaged(rng, content))
        counts[name][0] += 1
        signal.alarm(seconds)
        try:
            wrong = read(folder / path)
            counts[name][1] += 1
            if wrong:
                faults.append(f"{name}, case {number}: read, but wrong: {str(wrong)[:200]}")
        except (data.InputError, fusion.FusionError) as error:
            counts[name][2] += 1
            if "\n" in str(error) or "\x1b" in str(error) or len(str(error)) > 1000:
                faults.append(f"{name}, case {number}: not one readable line: {str(error)[:200]!r}")
        except Exception as error:
            faults.append(f"{name}, case {number}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            signal.alarm(0)
    return counts, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["kill", "disk", "fuzz"])
    parser.add_argument("--times", type=int, default=10, help="kills, disks or files")
    parser.add_argument("--phases", default="0 1 2", help="of run_all.sh, for kill")
    parser.add_argument("--seed", type=int, default=0, help="of moments and damage")
    parser.add_argument("--world", type=Path, help="a finished smoke world; without it one is built")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        folder = Path(name)
        world = args.world.resolve() if args.world else folder / "smoke"
        python("tests/standin.py", "--smoke", "--out", world)
        if args.what == "fuzz":
            counts, faults = fuzz(args.times, folder, world, args.seed)
            print(counts)
        else:
            faults = (kill if args.what == "kill" else disk)(args, folder, world)
    print(f"{len(faults)} faults", *faults[:20], sep="\n  ")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
