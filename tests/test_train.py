"""Training: losses, order, resume to the last bit, two processes as one, and what a person can get wrong."""
import contextlib
import io
import json
import math
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import statistics
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import data
import evaluate
import fusion as fusions
import scst
import train


def flags(world, out, *more):
    return ["--data", world / "data/audiocaps", "--llava", world / "models/llava", "--encoder", world / "models/clap",
            "--layers", "3", "6", "--tokens", "8", "--hidden", "32", "--batch-size", "8", "--micro-batch", "4",
            "--steps", "8", "--eval-every", "4", "--patience", "9", "--lr", "3e-3", "--lr-adapter", "3e-3",
            "--contrastive", "0.1", "--cache", world / "cache", "--out", out, *more]


def run(world, out, *more, check=True):
    """train.py, in this process, which has torch imported already: what a subprocess.run would give."""
    said, status = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)], 0
    with contextlib.redirect_stdout(said[0]), contextlib.redirect_stderr(said[1]):
        try:
            data.guarded(lambda: train.main([*map(str, flags(world, out, *more))]), fusions.FusionError)
        except SystemExit as e:
            status = e.code
    out, err = (s.buffer.getvalue().decode() for s in said)
    assert not (check and status), err
    return subprocess.CompletedProcess((), status, out, err)


SCST = ["--scst", "auto", "--scst-steps", "4", "--scst-lr", "1e-6"]


def forked(world, out, *more, room=None, last=None):
    """train.py in a fork of this process, which has torch imported already; OUT.txt gets what it prints.

    room: how large a file may become, in bytes. last: it is killed when a line with this has been logged."""
    write = train.write_log

    def written(*args, **values):
        write(*args, **values)
        if last in (out / "log.jsonl").read_text():
            os.kill(os.getpid(), signal.SIGKILL)

    def target():
        if last:
            train.write_log = written
        if room:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        # two files, as a shell gives it: what is done to one descriptor leaves the other alone
        with open(f"{out}.txt", "a") as file, open(f"{out}.txt", "a") as errors, \
                contextlib.redirect_stdout(file), contextlib.redirect_stderr(errors):
            data.guarded(lambda: train.main([*map(str, flags(world, out, *more))]), fusions.FusionError)

    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    return process


def same_weights(one, two):
    for name in ("fusion.safetensors", "scst/fusion.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def log_of(out, event):
    log = out / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [x for x in lines if x["event"] == event]


# ---------------------------------------------------------------- parts

def test_info_nce_by_hand():
    torch.manual_seed(0)
    a, t = torch.randn(4, 6), torch.randn(4, 6)
    logits = torch.nn.functional.cosine_similarity(a[:, None], t[None], dim=-1) / 0.07
    by_hand = 0.0
    for i in range(4):
        by_hand += (logits[i].logsumexp(0) - logits[i, i] + logits[:, i].logsumexp(0) - logits[i, i]) / 8
    assert train.info_nce(a, t, torch.tensor(math.log(0.07)), torch.arange(4)).item() == pytest.approx(by_hand.item(),
                                                                                                      rel=1e-5)


def test_another_caption_of_the_same_clip_is_no_negative():
    torch.manual_seed(0)
    a, t, temperature = torch.randn(3, 6), torch.randn(3, 6), torch.tensor(0.0)
    a[2], t[2] = a[0], t[0]                                   # the same clip twice, with the same caption
    twice = train.info_nce(a, t, temperature, torch.tensor([7, 8, 7]))
    assert twice < train.info_nce(a, t, temperature, torch.tensor([7, 8, 9]))
    assert train.info_nce(a[:1], t[:1], temperature, torch.tensor([7])).item() == pytest.approx(0, abs=1e-6)


def test_order_is_a_function_of_seed_and_step():
    first = train.data_order([1] * 10, 5, 4, seed=0)         # 20 clips: two epochs
    clips = [c for step in first for c, _ in step]
    assert sorted(clips[:10]) == sorted(clips[10:]) == list(range(10)) and clips[:10] != clips[10:]
    assert train.data_order([1] * 10, 4, 4, seed=0) == first[:4]
    assert train.data_order([1] * 10, 4, 4, seed=1)[3] != first[3]
    drawn = [r for rows in train.data_order([5] * 4, 40, 4, seed=0) for _, r in rows]
    assert set(drawn) == set(range(5))


def model_of(prompted, system):
    """A train.Model around the stand-in LLaVA."""
    backbone, fusion, *_ = prompted(system, 1)
    with fusion.attach(backbone.decoder):
        trunk, head = fusions.split(backbone.decoder, 3)
    return train.Model(backbone, fusion, None, trunk, head, 3)


@pytest.mark.parametrize("system", ["additive", "concat"])
def test_answers_in_memory_in_a_file_and_of_one_alone(prompted, system, tmp_path, monkeypatch):
    model, batches = model_of(prompted, system), []
    backbone, trunk = model.backbone, model.trunk
    prompts = [(data.SOUND_PROMPT, None), ("Describe what is heard.", None), (data.SOUND_PROMPT, None)]
    captions, frames = [[5, 6, 7], [8, 9], [10, 11, 12, 13]], [torch.randn(4, 8), torch.randn(6, 8)]
    for limit in (1 << 30, 0):
        monkeypatch.setattr(train, "TRUNK_IN_MEMORY", limit)
        answers = train.Answers(model, prompts, captions, folder=tmp_path)
        batches.append(answers.batch([1, 0], frames))
        assert (tmp_path / "trunk0.bin").exists() is (limit == 0)
    assert torch.equal(batches[0].states, batches[1].states)
    batch = batches[0]
    # one after the other: the tokens of the rows, and the states that predict them
    assert batch.targets.tolist() == [8, 9, 5, 6, 7] and batch.rows.tolist() == [0, 0, 1, 1, 1]
    ids = [backbone.encode(*prompt, model.placeholders)[0] for prompt in prompts]
    assert len(answers.prompt) > 3 and answers.prompt == ids[0][:len(answers.prompt)] == ids[1][:len(answers.prompt)]
    assert ids[0] != ids[1] and [answers.positions(i) for i in range(3)] == [len(p + c) for p, c in zip(ids, captions)]
    for row, i in enumerate((1, 0)):
        alone = trunk(input_ids=torch.tensor([ids[i] + captions[i]]), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(batch.states[row, :len(alone)], alone, atol=1e-4, rtol=1e-5)
        first = len(ids[i]) - 1
        assert batch.positions[batch.rows == row].tolist() == [*range(first, first + len(captions[i]))]
    padded, mask, slots = batch.clip
    assert padded.shape == (2, 6, 8) and mask.sum(1).tolist() == [4, 6] and torch.equal(padded[0, :4], frames[0])
    if system == "concat":
        assert all(ids[i][k] == backbone.placeholder for row, i in zip(slots.tolist(), (1, 0)) for k in row)
    else:
        assert slots is None
    lengths = []
    trunk.register_forward_hook(lambda module, given, out: lengths.append(len(out.last_hidden_state)))
    monkeypatch.undo()
    some = train.Answers(model, prompts, captions, used=[0], folder=tmp_path)  # the only one in use
    assert lengths == [1]
    whole = batch.states[1:, :some.positions(0)]
    torch.testing.assert_close(some.batch([0], frames[:1]).states, whole, atol=1e-4, rtol=1e-5)


def test_a_step_of_captions_is_shared_by_passes_and_processes(prompted, monkeypatch):
    """Every process together has each row once; the longest are in one pass; CLAP's captions are those of all."""
    model = model_of(prompted, "additive")
    captions = [[5] * n for n in (3, 1, 4, 1, 5, 2)]
    answers = train.Answers(model, [(data.SOUND_PROMPT, None)] * 6, captions)
    frames, embeds = [torch.full((2, 8), float(clip)) for clip in range(4)], torch.arange(6.0)[:, None]
    order = [[], [(0, 0), (3, 5), (1, 2), (2, 3)]]
    args = Namespace(micro_batch=2, scst_micro_batch=0, seed=0)
    monkeypatch.setattr(train, "WORLD", 2)
    taken, asked = [], []
    for rank in range(2):
        monkeypatch.setattr(train, "RANK", rank)
        for batch in train.xe_batches(answers, order, frames, embeds, step=1, args=args):
            taken.append((rank, batch.clips, len(batch.targets), batch.text.flatten().tolist()))
            assert batch.answer_tokens == 3 + 2 + 4 + 1 and batch.parts == 4
            assert batch.clip[0][0, 0, 0] == batch.clips[0]
        for batch in train.scst_batches(answers, order, frames, step=1, args=args):
            asked.append((batch.clips[0], batch.prompt.tolist(), batch.max_tokens, batch.parts))
            assert 0 <= batch.seed < 2 ** 63
    # of captions 3, 5 and 0, 2, sorted by length
    assert taken == [(0, (2,), 1, [3, 5]), (0, (0,), 3, [0, 2]), (1, (3,), 2, [3, 5]), (1, (1,), 4, [0, 2])]
    assert [clip for clip, *_ in asked] == [0, 1, 3, 2]
    assert all(rest == [[answers.prompt], 5, 4] for _, *rest in asked)


@pytest.mark.parametrize("system", fusions.SYSTEMS)
def test_samples_of_a_tree_are_samples_behind_their_own_prompt(prompted, system):
    """Trunk states, log-probabilities and gradients: two clips of five samples, and each sample in a row of its own."""
    backbone, fusion, ids, slots = prompted(system, 2)
    decoder, lm_head, P, K = backbone.decoder, backbone.llava.lm_head, ids.shape[1], 5
    with fusion.attach(decoder):
        trunk, head = fusions.split(decoder, 3)
    frames, found = torch.randn(2, 5, 8), []
    torch.manual_seed(3)
    with fusion.attach(decoder, frames, slots=slots):
        tree = scst.sample_tree(decoder, lm_head, ids, K, layer=3, eos=backbone.eos, max_tokens=7, temperature=0.2,
                                rows=fusion.rows)
        decoder(input_ids=ids)  # again a row for each clip
    assert fusion._clip_of_row is None and tree.states.requires_grad is False
    samples = tree.samples()
    assert tree.mask.sum() == sum(map(len, samples)) > len(tree.token) > len(set(map(tuple, samples)))  # some is shared
    rows = torch.tensor([[*ids[i // K].tolist(), *s, *[backbone.pad] * (7 - len(s))] for i, s in enumerate(samples)])
    new, real = rows[:, P:][:, :tree.mask.shape[1]], tree.mask

    def separately():
        states = trunk(input_ids=rows, use_cache=False).last_hidden_state
        hidden = head(inputs_embeds=states, use_cache=False).last_hidden_state[:, P - 1:-1][:, :new.shape[1]]
        return (lm_head(hidden) / 0.2).log_softmax(-1).gather(-1, new[..., None])[..., 0]

    def together():
        hidden = head(inputs_embeds=tree.states, position_ids=tree.position_ids, attention_mask=tree.attention_mask,
                      use_cache=False).last_hidden_state
        return tree.logprobs(hidden, lm_head, 0.2)

    for logprobs in (separately, together):
        fusion.zero_grad()
        with fusion.attach(decoder, frames, slots=slots):
            logprobs = logprobs() * real
        logprobs[::2].sum().backward()
        found.append((logprobs.detach(), torch.cat([p.grad.flatten() for p in fusion.parameters()
                                                    if p.grad is not None])))
    torch.testing.assert_close(*(f[0] for f in found), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(*(f[1] for f in found), atol=1e-3, rtol=1e-3)
    assert found[0][1].abs().max() > 0.1


def test_a_tree_draws_independently(prompted):
    """Each clip's samples against the exact chances of its first two tokens, and two samples against each other."""
    backbone, fusion, ids, _ = prompted("additive", 2)
    decoder, lm_head, K = backbone.decoder, backbone.llava.lm_head, 4000
    with torch.inference_mode(), fusion.attach(decoder, torch.randn(2, 5, 8)):
        tree = scst.sample_tree(decoder, lm_head, ids, K, layer=3, eos=backbone.eos, max_tokens=2, temperature=0.5,
                                rows=fusion.rows)
        assert tree.path.shape == tree.mask.shape == (2 * K, 2)  # no sample is longer than the limit
        for clip, logits in enumerate(lm_head(decoder(input_ids=ids).last_hidden_state[:, -1])):
            first = torch.tensor([s[0] for s in tree.samples()[clip * K:(clip + 1) * K]])
            chances = (logits / 0.5).softmax(-1)
            counts = torch.bincount(first, minlength=len(chances))
            often = chances * K > 20
            error = (counts - K * chances)[often] / (K * chances * (1 - chances))[often].sqrt()
            assert often.sum() > 5 and error.abs().max() < 4.5 and 0.5 < error.square().mean() < 2
            again = (first[::2] == first[1::2]).float().mean()                 # neighbours agree by chance alone
            assert abs(again - chances.square().sum()) < 5 * (chances.square().sum() / (K / 2)) ** 0.5
            # what follows the likeliest first token, by its mean log-probability
            top = int(chances.argmax())
            after = torch.tensor([s[1] for s in tree.samples()[clip * K:(clip + 1) * K] if s[0] == top])
            with_top = torch.cat([ids, torch.full((2, 1), top)], 1)
            second = (lm_head(decoder(input_ids=with_top).last_hidden_state[clip, -1]) / 0.5).log_softmax(-1)
            mean = (second.exp() * second).sum()
            spread = ((second.exp() * (second - mean).square()).sum() / len(after)).sqrt()
            assert len(after) > 50 and (second[after].mean() - mean).abs() < 4.5 * spread


def test_schedule():
    rates = [train.cosine(s, 100, 0.1) for s in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[10] == 1 and rates[-1] < 0.001
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


@pytest.mark.parametrize("change, word", [
    (dict(val_words=30.0), "words"), (dict(val_words=2.0), "words"), (dict(val_repetition=0.4), "repeat"),
    (dict(val_not_ended=0.5), "not end"), (dict(val_spider_lite=0.1, val_spider=0.1), "after XE")])
def test_collapse_is_named(change, word):
    xe = dict(val_words=9.0, val_repetition=0.0, val_not_ended=0.0, val_spider_lite=0.6, val_spider=0.6)
    for metric in ("val_spider_lite", "val_spider"):
        assert train.collapse(xe, xe, metric) is None
        assert word in train.collapse({**xe, **change}, xe, metric)


def test_the_commit_of_a_copy(tmp_path, monkeypatch):
    """Of these scripts, or none: not that of a repository that they have been copied into."""
    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *command], cwd=outer, capture_output=True, text=True, check=True).stdout.strip()

    outer = tmp_path / "outer"
    (outer / "copy").mkdir(parents=True)
    monkeypatch.setattr(train, "__file__", str(outer / "copy/train.py"))
    assert train.git_commit() is None                         # no repository at all
    (outer / "copy/train.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert train.git_commit() is None
    monkeypatch.setattr(train, "__file__", str(outer / "train.py"))
    assert train.git_commit() == git("rev-parse", "--short=12", "HEAD")
    (outer / "copy/train.py").write_text("changed")
    assert train.git_commit().endswith("-dirty")
    monkeypatch.setenv("PATH", str(tmp_path))                 # git is not installed
    assert train.git_commit() is None


@pytest.mark.parametrize("left_over", [
    {"RANK": "", "WORLD_SIZE": ""}, {"WORLD_SIZE": "4"}, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}])
def test_what_another_job_left_in_the_environment_is_one_process(left_over, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, **left_over})
    again = runpy.run_path(train.__file__)
    assert [again[name] for name in ("RANK", "WORLD", "LOCAL_RANK", "LOCAL_WORLD")] == [0, 1, 0, 1]
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here"}
    monkeypatch.setattr(os, "environ", {**os.environ, **torchrun})
    again = runpy.run_path(train.__file__)
    assert [again[name] for name in ("RANK", "WORLD", "LOCAL_RANK", "LOCAL_WORLD")] == [3, 4, 1, 2]


# ---------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(world, out, *SCST)
    return out


def test_a_run_leaves_what_is_promised(finished):
    names = {p.name for p in finished.iterdir()}
    assert names == {"config.json", "log.jsonl", "fusion.safetensors", "fusion.json", "stable.json", "training.json",
                     "scst"}
    assert {p.name for p in (finished / "scst").iterdir()} == {"fusion.safetensors", "fusion.json"}
    steps, validations = log_of(finished, "step"), log_of(finished, "validation")
    assert {"xe", "contrastive", "gate_3", "gate_6", "lr", "clips_per_second"} <= steps[0].keys()
    assert [(v["stage"], v["step"]) for v in validations] == [("xe", 4), ("xe", 8), ("scst", 4)]
    summary = json.loads((finished / "training.json").read_text())
    best = max(log_of(finished, "validation")[:2], key=lambda v: v["val_spider_lite"])
    assert summary["stages"]["xe"]["best"] == best["val_spider_lite"]
    assert summary["stages"]["xe"]["best_step"] in (4, 8)
    assert summary["seconds_a_step"].keys() == {"xe", "scst"} and summary["peak_memory"] > 1e8
    timed = [8 / line["clips_per_second"] for line in steps if line["stage"] == "scst"]  # which logs every step
    assert summary["seconds_a_step"]["scst"] == pytest.approx(statistics.median(timed)) and len(timed) == 4
    assert 0 < summary["seconds_a_step"]["xe"] < summary["stages"]["xe"]["seconds"]
    assert json.loads((finished / "config.json").read_text())["metric"] == "spider_lite"


def test_the_first_clips_of_each_split(world, tmp_path, monkeypatch):
    """--limit-clips: no other clip is trained on, validated on, captioned, attached to a question or even encoded."""
    encoder, heard = data.load_encoder(str(world / "models/clap"), "audio", "cpu"), []
    prepare = encoder.prepare
    monkeypatch.setattr(encoder, "prepare", lambda wave: (heard.append(len(wave)), prepare(wave))[1])
    out, few = tmp_path / "run", ["--limit-clips", "8"]
    done = run(world, out, "--cache", tmp_path / "cache", "--steps", "2", "--eval-every", "2", *few)
    assert "train: 8 clips, 0 missing" in done.stdout and "val: 8 clips, 0 missing" in done.stdout and len(heard) == 16
    (validation,) = log_of(out, "validation")
    assert validation["val_n"] == 8
    clips = data.read_split("audiocaps", world / "data/audiocaps", "test").clips
    first = [clip.id for clip in clips[:8]]
    assert len(clips) > 8
    evaluate.main(["caption", str(out), "--beams", "1", *few])
    result, items = (json.loads((out / f"{name}.json").read_text()) for name in ("result", "predictions"))
    assert result["n"] == 8 and [i["id"] for i in items] == first and len(heard) == 24
    evaluate.main(["retention", str(out), "--qa", str(world / "data/qa/test.json"), "--limit-questions", "20", *few])
    attached = {i["clip"] for i in json.loads((out / "retention_items.json").read_text())}
    assert 1 < len(attached) and attached <= {*first} and len(heard) == 24 + 17  # silence, and the probe's noises
    evaluate.main(["robustness", str(out), "--snr", "0", "--noise", "white", *few])
    assert json.loads((out / "robustness.json").read_text())["n"] == 8


def test_questions_and_answers(world, tmp_path):
    """Each clip's own question is its prompt, only the answer is learned, and the score is accuracy."""
    root, asked = tmp_path / "qa", ["Which way does it move?", "What is heard?", "Is the shape red?"]
    root.mkdir()
    (root / "videos").symlink_to(world / "data/av/videos")
    for split, n in (("train", 16), ("val", 8), ("test", 8)):
        rows = [f"{split}_{i:04d}.mp4,{asked[i % 3]},{['left', 'a dog', 'yes', 'no'][i % 4]}" for i in range(n)]
        (root / f"{split}.csv").write_text("\n".join(["file_name,question,answer", *rows]) + "\n")
    out = tmp_path / "run"
    av = ["--dataset", "av", "--data", root, "--modality", "video", "--encoder", world / "models/timesformer",
          "--contrastive", "0", "--gate-init", "0", "--steps", "2", "--eval-every", "2"]
    run(world, out, *av)
    assert 0 <= log_of(out, "validation")[0]["val_accuracy"] <= 1
    # with gates that are closed at the start, the first loss is the backbone's own
    clips, backbone = data.read_split("av", root, "train").clips, data.load_backbone(str(world / "models/llava"), "cpu")
    nll = tokens = 0
    assert json.loads((out / "config.json").read_text())["metric"] == "accuracy"
    for c, _ in train.data_order([1] * 16, 1, 8, seed=0)[0]:
        prompt, *_ = backbone.encode(clips[c].question)
        answer = backbone.caption_ids(clips[c].question, clips[c].references[0])
        with torch.no_grad():
            logits = backbone.llava(input_ids=torch.tensor([prompt + answer])).logits[:, len(prompt) - 1:-1]
        nll -= logits[0].log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum().item()
        tokens += len(answer)
    assert log_of(out, "step")[0]["xe"] == pytest.approx(nll / tokens, rel=1e-4)
    evaluate.main(["caption", str(out), "--beams", "1"])
    items, result = (json.loads((out / f"{name}.json").read_text()) for name in ("predictions", "result"))
    assert result["accuracy"] == pytest.approx(sum(i["prediction"] in i["references"] for i in items) / 8)
    assert [i["question"] for i in items] == [asked[i % 3] for i in range(8)]
    done = run(world, tmp_path / "other", *av, "--scst", "auto", check=False)
    assert done.returncode == 2 and "has questions" in done.stderr


def test_an_older_run_that_does_not_fit_is_refused(world, finished, tmp_path):
    done = run(world, tmp_path / "run", "--init", finished, "--layers", "6", check=False)
    assert done.returncode == 2 and f"--init {finished}: its system, layers or sizes" in done.stderr
    done = run(world, tmp_path / "run", "--init", tmp_path / "nowhere", check=False)
    assert done.returncode == 2 and "no such file" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_killed_run_ends_in_the_same_bytes(world, tmp_path):
    """SIGKILL in XE before and after the first saved state, and in SCST; then started again. With keep and a null slot."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    more = [*SCST, "--null-slot", "--keep", "1", "--keep-qa", world / "data/qa/train.json"]
    run(world, whole, *more)
    for last in ('"step": 0', '"step": 4', '"stage": "scst", "step": 1'):
        process = forked(world, out, *more, last=last)
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
    run(world, out, *more)
    same_weights(out, whole)
    timing = {"seconds", "clips_per_second", "val_seconds"}
    one, two = [[{k: v for k, v in json.loads(line).items() if k not in timing}
                 for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (whole, out)]
    assert one == two and {line["stage"] for line in one} == {"xe", "scst"}
    assert all(line["keep"] >= 0 for line in one if line["event"] == "step")
    assert not (out / "state").exists() and not list(out.rglob("*.tmp*"))


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(world, finished, tmp_path):
    """The checkpoint still fits, the state for going on does not: files are not allowed to grow so large."""
    out = tmp_path / "full"
    process = forked(world, out, *SCST, room=(finished / "fusion.safetensors").stat().st_size + 1000)
    process.join(300)
    printed = (tmp_path / "full.txt").read_text()
    assert process.exitcode == 2 and "Traceback" not in printed and "start the same command again" in printed
    backbone = data.load_backbone(str(world / "models/llava"), "cpu")
    fusions.load(out, backbone.decoder)  # the last good one
    run(world, out, *SCST)
    same_weights(out, finished)
    assert not list(out.rglob("*.tmp*"))


@pytest.mark.parametrize("name, content", [
    ("state/state.safetensors", b"\0" * 100), ("state/state.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
    ("state/state.safetensors", b"\xff" * 100), ("config.json", b"[1, 2"), ("config.json", b"[1, 2]"),
    ("training.json", b"")])
def test_a_damaged_folder_is_one_line(world, tmp_path, name, content):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    done = run(world, tmp_path / "run", check=False)
    assert done.returncode == 2 and path.name in done.stderr and "remove" in done.stderr


def test_one_clip_to_validate_on(world, tmp_path):
    """Every document frequency is that of the only clip, so that CIDEr-D is 0: a run still ends, with a checkpoint."""
    root = tmp_path / "audiocaps"
    root.mkdir()
    (root / "audio").symlink_to(world / "data/audiocaps/audio")
    for name, rows in (("train", 17), ("val", 2)):
        lines = (world / f"data/audiocaps/{name}.csv").read_text().splitlines(keepends=True)
        first = [line for line in lines[1:] if line.split(",")[1] == lines[1].split(",")[1]]
        (root / f"{name}.csv").write_text("".join([lines[0], *(lines[1:rows] if name == "train" else first)]))
    run(world, tmp_path / "run", "--data", root, "--scst", "auto", "--scst-steps", "2", "--scst-lr", "1e-6")
    validations = log_of(tmp_path / "run", "validation")
    assert {v["val_n"] for v in validations} == {1} and {v["val_cider_d"] for v in validations} == {0}
    assert (tmp_path / "run/fusion.safetensors").exists() and (tmp_path / "run/training.json").exists()


def test_unfrozen_blocks_below_the_fusion_are_trained_too(world, tmp_path):
    out = tmp_path / "run"
    run(world, out, "--fusion", "unfreeze", "--layers", "6", "--scst", "auto", "--scst-steps", "2", "--scst-lr", "1e-6")
    before = safetensors.torch.load_file(world / "models/llava/model.safetensors")
    found = [safetensors.torch.load_file(folder / "fusion.safetensors") for folder in (out, out / "scst")]
    for block in "4567":
        name = f"{block}.mlp.up_proj.weight"
        frozen = next(v for k, v in before.items() if k.endswith(f"layers.{name}") and "vision" not in k)
        assert not torch.equal(frozen, found[0][f"top.{name}"])
        assert not torch.equal(found[0][f"top.{name}"], found[1][f"top.{name}"])


def test_two_at_once_train_once(world, finished, tmp_path):
    both = [forked(world, tmp_path / "both", *SCST) for _ in range(2)]
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0]
    assert (tmp_path / "both.txt").read_text().count("finished already") == 1
    assert len(log_of(tmp_path / "both", "validation")) == 3
    same_weights(tmp_path / "both", finished)


def test_a_run_that_is_older_than_a_flag_is_known(world, finished, tmp_path):
    out = tmp_path / "older"
    shutil.copytree(finished, out)
    config = json.loads((out / "config.json").read_text())
    for key in ("null_slot", "keep", "keep_qa", "keep_every", "probe"):
        del config[key]
    (out / "config.json").write_text(json.dumps(config))
    done = run(world, out, *SCST)
    assert "finished already" in done.stdout


def test_a_finished_run_is_skipped_and_a_changed_flag_is_named(world, finished):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert "finished already" in run(world, finished, *SCST).stdout
    done = run(world, finished, *SCST, "--seed", "5", check=False)
    assert done.returncode == 2 and "holds a run with --seed 0, not 5" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


def test_reranked_validations_after_stable_and_scst_alone(world, finished, tmp_path):
    """--init RUN --steps 0 --scst auto: SCST of an older run's checkpoint, which is there as it was."""
    xe, out = tmp_path / "xe", tmp_path / "run"
    run(world, xe, "--patience", "1", "--steps", "12")
    with pytest.raises(data.InputError, match="has not finished"):
        evaluate.open_run(xe / "scst", "cpu")
    before = {p: p.read_bytes() for p in xe.rglob("*") if p.is_file()}
    refused = run(world, xe, "--patience", "1", "--steps", "12", "--scst", "auto", check=False)
    assert refused.returncode == 2 and "--scst off, not auto" in refused.stderr
    alone = ["--init", xe, "--steps", "0", *SCST]
    done = run(world, out, *alone[2:], check=False)
    assert done.returncode == 2 and "--steps 0 needs --init RUN" in done.stderr and not out.exists()
    assert done.stderr.count("error") == 1 and "Traceback" not in done.stderr
    run(world, out, *alone)
    for name in ("fusion.safetensors", "fusion.json"):
        assert (out / name).read_bytes() == before[xe / name], name
    assert (out / "scst/fusion.safetensors").read_bytes() != before[xe / "fusion.safetensors"]
    assert before == {p: p.read_bytes() for p in xe.rglob("*") if p.is_file()}
    assert {line["stage"] for line in log_of(out, "step")} == {"scst"}
    stages = json.loads((out / "training.json").read_text())["stages"]
    assert set(stages) == {"xe", "scst"} and stages["xe"]["steps"] == 0
    best = json.loads((xe / "training.json").read_text())["best"]  # of this checkpoint, validated once more
    for name in ("val_spider_lite", "val_cider_d", "val_words", "example"):
        assert stages["xe"]["scores"][name] == best[name]
    assert "finished already" in run(world, out, *alone).stdout
    done = run(world, out, *alone, "--scst-lr", "1e-5", check=False)
    assert done.returncode == 2 and "--scst-lr 1e-06, not 1e-05" in done.stderr
    for v in log_of(out, "validation") + log_of(finished, "validation") + log_of(xe, "validation"):
        assert ("val_reranked" in v) is (v["stage"] == "scst"), v    # in these short runs XE ends where it is stable
        if v["stage"] == "scst":
            assert v["val_oracle"] >= max(v["val_reranked"], v["val_spider_lite"])


def test_the_metric_is_chosen_once(world, finished, tmp_path, monkeypatch):
    """A SPICE that is installed while a run waits to go on changes nothing in it."""
    process = forked(world, tmp_path / "run", *SCST, last='"step": 4')
    process.join(300)
    monkeypatch.setattr(evaluate, "spice_installed", lambda: True)
    monkeypatch.setattr(evaluate, "spice", lambda *given: pytest.fail("this run is not selected by SPIDEr"))
    run(world, tmp_path / "run", *SCST)
    same_weights(tmp_path / "run", finished)
    assert json.loads((tmp_path / "run/config.json").read_text())["metric"] == "spider_lite"
    assert not any("val_spider" in line for line in log_of(tmp_path / "run", "validation"))
    monkeypatch.setattr(evaluate, "spice", lambda hypotheses, references: [0.5] * len(hypotheses))
    run(world, tmp_path / "new", "--steps", "2", "--eval-every", "2")    # a run that begins now
    (line,) = log_of(tmp_path / "new", "validation")
    assert line["val_spider"] == pytest.approx((line["val_cider_d"] + 0.5) / 2)
    summary = json.loads((tmp_path / "new/training.json").read_text())
    assert summary["stages"]["xe"]["best"] == line["val_spider"]
    assert json.loads((tmp_path / "new/config.json").read_text())["metric"] == "spider"


def test_a_run_that_spider_selects_needs_spice(world, finished, tmp_path):
    """One line when it goes on, and when its candidates are compared."""
    begun, done = tmp_path / "begun", tmp_path / "done"
    begun.mkdir()
    shutil.copytree(finished, done)
    config = json.loads((finished / "config.json").read_text()) | {"metric": "spider"}
    (done / "config.json").write_text(json.dumps(config))
    (begun / "config.json").write_text(json.dumps(config | {"scst": "off", "scst_steps": 500, "scst_lr": 1e-5}))
    if evaluate.spice_installed():
        pytest.skip("SPICE is installed")
    told = run(world, begun, check=False)
    assert told.returncode == 2 and "SPICE is not installed" in told.stderr and "Traceback" not in told.stderr
    assert told.stderr.count("error: ") == 1 and not (begun / "fusion.safetensors").exists()
    assert not log_of(begun, "step")  # before any step is paid for
    with pytest.raises(data.InputError, match="SPICE is not installed"):
        evaluate.main(["robustness", str(done), "--snr", "0", "--noise", "white"])


@pytest.mark.parametrize("name", ["scst", "val", "rerank"])
def test_a_folders_name_decides_nothing(world, tmp_path, name):
    """Runs that are called as the folders in a run are trained and captioned, with a seed as `date +%s` gives them."""
    out, more = tmp_path / "core" / name, ["--seed", "1753833600", "--steps", "2", "--eval-every", "2"]
    if name == "scst":
        more += ["--scst", "auto", "--scst-steps", "2", "--scst-lr", "1e-6", "--keep", "1",
                 "--keep-qa", world / "data/qa/train.json"]
    run(world, out, *more)
    assert "finished already" in run(world, out, *more).stdout
    runs = [out, out / "scst"] if name == "scst" else [out]
    evaluate.main(["caption", *map(str, runs), "--beams", "1"])
    for folder in runs:
        opened = evaluate.open_run(folder, "cpu")
        assert opened.folder == folder and opened.home == out and opened.stage == ("xe" if folder == out else "scst")
        result = json.loads((folder / "result.json").read_text())
        assert result["name"] == name and result["n"] == 32 and result["seed"] == 1753833600
    evaluate.main(["caption", str(out), "--beams", "1", "--split", "val"])
    assert json.loads((out / "val/result.json").read_text())["split"] == "val"


def test_an_absurd_rate_trips_the_guard_and_leaves_xe_alone(world, finished, tmp_path):
    out = tmp_path / "run"
    run(world, out, "--scst", "auto", "--scst-steps", "12", "--scst-lr", "10")
    assert (out / "fusion.safetensors").read_bytes() == (finished / "fusion.safetensors").read_bytes()
    scst_stage = json.loads((out / "training.json").read_text())["stages"]["scst"]
    assert scst_stage["reason"].startswith("collapse") and scst_stage["best"] is None is scst_stage["scores"]
    assert not (out / "scst").exists()


def test_what_is_not_finite_is_named(world, tmp_path, monkeypatch):
    original = data.Features.__getitem__

    def poisoned(self, i):
        frames = original(self, i)
        return frames * float("nan") if self.ids[i] == culprit else frames

    split = data.read_split("audiocaps", world / "data/audiocaps", "train")
    culprit = split.clips[train.data_order([1] * len(split.clips), 6, 8, seed=0)[5][0][0]].id
    monkeypatch.setattr(data.Features, "__getitem__", poisoned)
    with pytest.raises(train.NotFinite) as e:
        train.main([str(f) for f in flags(world, tmp_path / "nan")])
    assert culprit in str(e.value) and "xe step 5" in str(e.value)
    saved = safetensors.torch.load_file(tmp_path / "nan/fusion.safetensors")
    assert all(v.isfinite().all() for v in saved.values())


def test_a_run_is_used_from_another_folder(world, tmp_path, monkeypatch):
    """Trained with relative paths; what is not there from here is looked for from where it was trained."""
    monkeypatch.chdir(world)
    run(Path("."), tmp_path / "run", "--cache", tmp_path / "cache", "--steps", "2", "--eval-every", "2")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["data"] == "data/audiocaps" and config["folder"] == str(world)
    monkeypatch.chdir(tmp_path)
    evaluate.main(["caption", "run", "--beams", "1"])
    assert json.loads((tmp_path / "run/result.json").read_text())["n"] == 32
    (tmp_path / "data").mkdir()
    (tmp_path / "data/audiocaps").mkdir()                         # here, and empty: it is the one that is meant
    with pytest.raises(data.InputError, match="data/audiocaps"):
        evaluate.main(["caption", "run", "--beams", "2"])


def test_logits_in_slices(world, tmp_path, monkeypatch):
    """The same losses as with all logits at once."""
    run(world, tmp_path / "whole")
    monkeypatch.setattr(evaluate, "LOGITS_IN_MEMORY", 1 << 14)
    run(world, tmp_path / "sliced")
    for a, b in zip(*(log_of(tmp_path / name, "step") for name in ("whole", "sliced")), strict=True):
        assert a["xe"] == pytest.approx(b["xe"], rel=1e-5) and a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("more, message", [
    (["--layers", "9"], "--layers 9: this decoder has layers 0 to 7"),
    (["--data", "nowhere"], "nowhere"), (["--llava", "nowhere"], "nowhere"), (["--encoder", "nowhere"], "nowhere"),
    (["--scst", "auto", "--scst-samples", "1"], "at least 2"), (["--batch-size", "9"], "multiple of --micro-batch"),
    (["--fusion", "magic"], "invalid choice"), (["--device", "gpu"], "'gpu' cannot be used here"),
    (["--device", "cuda:7"], "'cuda:7' cannot be used here"), (["--scst-micro-batch", "3"], "--scst-micro-batch 3"),
    (["--out", __file__], "is a file"), (["--steps", "0", "--scst", "auto"], "--steps 0 needs --init RUN"),
    (["--seed", "-1"], "--seed must be at least 0"), (["--seed", str(2 ** 31)], f"--seed {2 ** 31} must be below"),
    (["--steps", "-1"], "--steps must be at least 0"),
    # before anything is read
    (["--fusion", "concat", "--null-slot", "--data", "nowhere"], "--null-slot: concat has no attention")])
def test_mistakes_are_one_line(world, tmp_path, more, message):
    done = run(world, tmp_path / "run", *more, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run/training.json").exists()


@pytest.mark.parametrize("flag, message", [(["--layers", "12", "24"], "this decoder has layers 0 to 7"),
                                           (["--llava", "nowhere/at/all"], "nowhere/at/all: cannot be loaded"),
                                           (["--fusion", "concat", "--init", "nowhere"], "nowhere")])
def test_a_wrong_flag_does_not_wait_for_the_clips(world, tmp_path, monkeypatch, flag, message):
    """Encoding them can take hours."""
    monkeypatch.setattr(data, "load_inputs", lambda *_: pytest.fail("clips are encoded"))
    failed = run(world, tmp_path / "run", *flag, check=False)
    assert failed.returncode == 2 and message in failed.stderr and failed.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
