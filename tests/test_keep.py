"""Gate regularisation: the divergence from answers that training should not change."""
import json

import pytest
import torch
from test_train import flags, log_of, run

import data
import evaluate
import fusion as fusions
import train


def keep(world, *more):
    return ["--keep", "1", "--keep-qa", world / "data/qa/train.json", "--probe", world / "data/qa/test.json", *more]


@pytest.fixture
def built(world, tmp_path):
    """built(kind, file): (model, its KeptAnswers, flags) with open gates and half of the questions without images."""
    def build(kind):
        records = json.loads((world / "data/qa/train.json").read_text())
        for record in records[::2]:
            del record["image"]
            first = record["conversations"][0]
            first["value"] = first["value"].replace("<image>\n", "")
        for record in records[1::2]:
            record["image"] = str(world / "data/qa/images" / record["image"])[1:]
        path = tmp_path / "half.json"
        path.write_text(json.dumps(records))
        (tmp_path / "images").symlink_to("/")
        args = train.parse_args([*map(str, flags(
            world, tmp_path / "run", "--fusion", kind, "--keep", "2", "--keep-qa", path))])
        split = data.read_split("audiocaps", args.data, "train")
        inputs = evaluate.load_inputs(vars(args), split, "cpu")
        model, _ = train.build_model(inputs, split.clips, None, args)
        if model.fusion.has_gate:
            model.fusion.set_gates(0.3)
        (kept,) = train.answers_to_keep(model, inputs, None, args)
        return model, kept, args
    return build


@pytest.mark.parametrize("kind", fusions.SYSTEMS)
def test_the_divergence_is_that_of_the_whole_model(built, kind):
    """Against LLaVA run question by question, from the pixels on, with the same clip attached."""
    model, kept, args = built(kind)
    backbone, questions = model.backbone, data.read_kept(args.keep_qa)
    assert len(kept.examples) == len(questions) == 40 and sum(q.image is None for q in questions) == 20
    (batch,) = kept.batches(0, args)
    loss, terms = train.keep_loss(model, batch, args)
    answers = evaluate.own_answers(backbone, questions, args.cache)
    picks = torch.from_numpy(train.np.random.default_rng([0, 0, 0]).integers(40, size=4)).tolist()
    expected, count = 0.0, 0
    for row, k in enumerate(picks):
        question, answer = questions[k], backbone.caption_ids(questions[k].question, answers[k])
        images = [data.open_image(question.image)] if question.image else None
        inputs = backbone.processor(text=[backbone.chat(question.question, image=bool(images))], images=images,
                                    return_tensors="pt")
        prompt, slots, pixels = inputs["input_ids"][0].tolist(), None, {}
        if images:
            pixels = {"pixel_values": inputs["pixel_values"]}
        with_slots = prompt
        if kind == "concat":
            first = prompt.index(backbone.llava.config.image_token_id) if images else \
                backbone.prompt(question.question, 1)[1][0]
            with_slots = prompt[:first] + [backbone.placeholder] * args.tokens + prompt[first:]
            slots = torch.arange(first, first + args.tokens)[None]
        n, rows = len(answer), []
        with torch.no_grad():
            rows.append(backbone.llava(input_ids=torch.tensor([prompt + answer]), **pixels).logits)
            frames = batch.branches[0].frames[row][None]
            with model.fusion.attach(backbone.decoder, frames, slots=slots):
                rows.append(backbone.llava(input_ids=torch.tensor([with_slots + answer]), **pixels).logits)
        before, now = (r[0, -n - 1:-1].log_softmax(-1) for r in rows)
        expected += (before.exp() * (before - now)).sum().item()
        count += n
    assert batch.tokens == count and terms["keep"].item() == pytest.approx(expected / count, rel=2e-3, abs=1e-5)
    assert loss.item() == pytest.approx(2 * terms["keep"].item()) and expected > 1e-3
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.fusion.parameters())
    if model.fusion.has_gate:
        model.fusion.set_gates(0.0)
        (batch,) = kept.batches(0, args)
        assert train.keep_loss(model, batch, args)[1]["keep"].abs() < 1e-6  # it is the backbone


def test_long_questions_go_in_parts(built, monkeypatch):
    """At 7B a pass has fewer questions than captions: the parts' losses and gradients are the whole's."""
    model, kept, args = built("concat")
    weight = model.fusion.size["3"]
    (whole,) = kept.batches(0, args)
    total, _ = train.keep_loss(model, whole, args)
    (expected,) = torch.autograd.grad(total, weight)
    monkeypatch.setattr(train, "KEPT_POSITIONS", max(len(states) for states, *_ in kept.examples) // 2)
    parts = list(kept.batches(0, args))
    losses = [train.keep_loss(model, part, args)[0] for part in parts]
    assert sum(len(part.states) for part in parts) == 4 and 2 <= len(parts) <= 4
    assert sum(losses).item() == pytest.approx(total.item(), rel=1e-5)
    assert torch.autograd.grad(sum(losses), weight)[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_what_is_attached_and_how_often(built):
    """Clips, silence and noise, anew in each step, the same when a step is done again; every k-th step alone."""
    _, kept, args = built("additive")
    pool = kept.distractors["audio"]
    drawn = pool.draw(train.np.random.default_rng(0), 400)
    silence = sum(torch.equal(f, pool.silence[0]) for f in drawn)
    noise = sum(any(torch.equal(f, n) for n in pool.noises) for f in drawn)
    assert 40 < silence < 80 and 40 < noise < 80
    probes = evaluate.silence_and_noise(data.load_encoder(args.encoder, "audio", "cpu"), args.seed)[1]
    assert not any(torch.equal(a, b) for a in pool.noises for b in probes)  # retention's noise is another
    (a,), (again,), (b,) = (kept.batches(step, args) for step in (3, 3, 4))
    assert torch.equal(a.states, again.states) and not torch.equal(a.states, b.states)
    args.keep_every = 4
    assert [len(list(kept.batches(step, args))) for step in range(6)] == [1, 0, 0, 0, 1, 0]


def test_video_beside_audio_keeps_its_captions_too(world, tmp_path):
    """The kept captions are the older run's own, of its own clips; without the new branch nothing diverges."""
    older, out = tmp_path / "older", tmp_path / "video"
    run(world, older, "--steps", "4")
    more = ["--dataset", "av", "--data", world / "data/av", "--modality", "video", "--encoder",
            world / "models/timesformer", "--contrastive", "0", "--beside", older, "--gate-init", "0", *keep(world)]
    run(world, out, *more)
    (line,) = log_of(out, "step")  # before the first step: the older branch alone, beside questions and captions
    assert line["keep"] > 1e-4 and abs(line["keep_captions"]) < 1e-6
    args = train.parse_args([*map(str, flags(world, out, *more))])
    beside = evaluate.open_beside(vars(args), "cpu")
    split = data.read_split("av", args.data, "train")
    inputs = evaluate.load_inputs(vars(args), split, "cpu", beside)
    model, _ = train.build_model(inputs, split.clips, beside, args)
    _, kept = train.answers_to_keep(model, inputs, beside, args)
    model.fusion.set_gates(0.3)
    (batch,) = kept.batches(0, args)
    assert train.keep_loss(model, batch, args)[1]["keep_captions"] > 1e-3
    own = evaluate.load_inputs(beside.config, "train", "cpu")
    greedy = evaluate.decode(beside.backbone, own.branches([beside.fusion]), own.prompts)
    cached = [json.loads(path.read_text()) for path in (world / "cache").glob("captions_*.json")]
    assert [clip[0]["text"] for clip in greedy] in cached


def test_questions_of_the_probe_are_refused(world, tmp_path):
    out = tmp_path / "run"
    train_qa, test_qa = world / "data/qa/train.json", world / "data/qa/test.json"
    for more, message in (
            (["--keep", "1"], "need each other"), (["--keep-qa", train_qa], "need each other"),
            (["--keep", "1", "--keep-qa", "nowhere.json"], "nowhere.json"),
            (["--keep", "1", "--keep-qa", test_qa, "--probe", test_qa], "40 of its questions, such as test_000"),
            (["--fusion", "concat", "--null-slot"], "--null-slot")):
        done = run(world, out, *more, check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not out.exists()
    run(world, out, *keep(world), "--steps", "2", "--eval-every", "2")
    with pytest.raises(data.InputError, match="are in the probe"):
        evaluate.main(["retention", str(out), "--qa", str(train_qa)])
    evaluate.main(["retention", str(out), "--qa", str(test_qa), "--limit", "8"])
    conditions = json.loads((out / "retention.json").read_text())["conditions"]
    for c in conditions.values():
        assert c["loss"] == pytest.approx(conditions["backbone"]["accuracy"] - c["accuracy"])
        assert c["loss_ci95"][0] <= c["loss"] <= c["loss_ci95"][1]
    renamed = tmp_path / "renamed.json"  # other ids, another question, the same image
    records = json.loads(test_qa.read_text())[:1]
    records[0].update(id="other", image=str(world / "data/qa/images" / records[0]["image"])[1:])
    records[0]["conversations"][0]["value"] = "<image>\nIs this another question?"
    renamed.write_text(json.dumps(records))
    (tmp_path / "images").symlink_to("/")
    with pytest.raises(data.InputError, match="1 of its questions, such as other, are in the probe"):
        data.check_apart(renamed, data.read_qa(test_qa)[0])
