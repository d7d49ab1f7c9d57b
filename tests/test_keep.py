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
    """built(system): (model, its Answers, their distractors, flags) with open gates, half of the questions without
    images."""
    def build(system):
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
            world, tmp_path / "run", "--fusion", system, "--keep", "2", "--keep-qa", path))])
        split = data.read_split("audiocaps", args.data, "train")
        inputs = data.load_inputs([vars(args)], split, "cpu")
        model = train.build_model(data.clap_of(vars(args), "cpu", "the test"), args)
        if model.fusion.has_gate:
            model.fusion.set_gates(0.3)
        distractors = (inputs.frames[0], *evaluate.silence_and_noise(inputs.encoders[0], [args.seed, 1]))
        return model, train.answers_to_keep(model, args), distractors, args
    return build


@pytest.mark.parametrize("system", fusions.SYSTEMS)
def test_the_divergence_is_that_of_the_whole_model(built, system):
    """Against LLaVA run question by question, from the pixels on, with the same clip attached."""
    model, kept, distractors, args = built(system)
    backbone, questions = model.backbone, data.read_kept(args.keep_qa)
    assert len(kept.answers) == len(questions) == 40 and sum(q.image is None for q in questions) == 20
    (batch,) = train.keep_batches(kept, distractors, 0, args)
    loss, terms = train.keep_loss(model, batch, args)
    own = evaluate.own_answers(backbone, questions, args.cache)
    answers = [text if q.image else q.answer for q, text in zip(questions, own)]
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
        if system == "concat":  # before the image, or in the place where one would be
            pictured, image = prompt, backbone.llava.config.image_token_id
            if not images:
                pictured = backbone.tokenizer(backbone.chat(question.question, image=True)).input_ids
            first = pictured.index(image)
            rest = pictured[first + (not images):]
            with_slots = pictured[:first] + [backbone.placeholder] * args.tokens + rest
            slots = torch.arange(first, first + args.tokens)[None]
        n, rows = len(answer), []
        with torch.no_grad():
            rows.append(backbone.llava(input_ids=torch.tensor([prompt + answer]), **pixels).logits)
            frames, mask, _ = batch.clip
            with model.fusion.attach(backbone.decoder, frames[row][None], mask[row][None], slots):
                rows.append(backbone.llava(input_ids=torch.tensor([with_slots + answer]), **pixels).logits)
        before, now = (r[0, -n - 1:-1].log_softmax(-1) for r in rows)
        expected += (before.exp() * (before - now)).sum().item()
        count += n
    assert batch.answer_tokens == count and terms["keep"].item() == pytest.approx(expected / count, rel=2e-3, abs=1e-5)
    assert loss.item() == pytest.approx(2 * terms["keep"].item()) and expected > 1e-3
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.fusion.parameters())
    if model.fusion.has_gate:
        model.fusion.set_gates(0.0)
        (batch,) = train.keep_batches(kept, distractors, 0, args)
        assert train.keep_loss(model, batch, args)[1]["keep"].abs() < 1e-6  # it is the backbone


def test_long_questions_go_in_parts(built, monkeypatch):
    """At 7B a pass has fewer questions than captions: the parts' losses and gradients are the whole's."""
    model, kept, distractors, args = built("concat")
    weight = model.fusion.size["3"]
    (whole,) = train.keep_batches(kept, distractors, 0, args)
    total, _ = train.keep_loss(model, whole, args)
    (expected,) = torch.autograd.grad(total, weight)
    monkeypatch.setattr(train, "KEPT_POSITIONS", max(map(kept.positions, range(40))) // 2)
    parts = list(train.keep_batches(kept, distractors, 0, args))
    losses = [train.keep_loss(model, part, args)[0] for part in parts]
    assert sum(len(part.states) for part in parts) == 4 and 2 <= len(parts) <= 4
    assert sum(losses).item() == pytest.approx(total.item(), rel=1e-5)
    assert torch.autograd.grad(sum(losses), weight)[0].item() == pytest.approx(expected.item(), rel=1e-4)


def test_what_is_attached_and_how_often(built):
    """Clips, silence and noise, anew in each step, the same when a step is done again; every k-th step alone."""
    _, kept, distractors, args = built("additive")
    clips, silences, noises = distractors
    drawn = train.distract(*distractors, train.np.random.default_rng(0), 400)
    silence = sum(torch.equal(f, silences[0]) for f in drawn)
    noise = sum(any(torch.equal(f, n) for n in noises) for f in drawn)
    assert len(drawn) == 400 and 40 < silence < 80 and 40 < noise < 80
    own = sum(any(torch.equal(f, clips[i]) for i in range(len(clips))) for f in drawn[:40])
    assert 20 < own < 38
    probes = evaluate.silence_and_noise(data.load_encoder(args.encoder, "audio", "cpu"), args.seed)[1]
    assert not any(torch.equal(a, b) for a in noises for b in probes)  # retention's noise is another
    (a,), (again,), (b,) = (train.keep_batches(kept, distractors, step, args) for step in (3, 3, 4))
    assert torch.equal(a.states, again.states) and torch.equal(a.clip[0], again.clip[0])
    assert a.states.shape != b.states.shape or not torch.equal(a.states, b.states)
    args.keep_every = 4
    counts = [len(list(train.keep_batches(kept, distractors, step, args))) for step in range(6)]
    assert counts == [1, 0, 0, 0, 1, 0]


def test_the_questions_of_a_step_are_shared_by_processes(built, monkeypatch):
    """Together they take what one process would, with the same clips beside them; the losses add up."""
    model, kept, distractors, args = built("additive")
    (whole,) = train.keep_batches(kept, distractors, 2, args)
    total, _ = train.keep_loss(model, whole, args)
    monkeypatch.setattr(train, "WORLD", 2)
    losses, rows = [], []
    for rank in range(2):
        monkeypatch.setattr(train, "RANK", rank)
        (batch,) = train.keep_batches(kept, distractors, 2, args)
        assert batch.answer_tokens == whole.answer_tokens and len(batch.states) == 2
        losses.append(train.keep_loss(model, batch, args)[0])
        rows += batch.clip[0].sum((1, 2)).tolist()
    assert sum(losses).item() == pytest.approx(total.item(), rel=1e-5)
    assert sorted(rows) == pytest.approx(sorted(whole.clip[0].sum((1, 2)).tolist()))


def test_the_questions_of_other_senses_are_kept_and_the_runs_own_is_not(world, tmp_path):
    """Prompts without an image: another sense's is answered as before, one's own is one line before anything is paid."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "run"

    def asked(*questions):
        records = [{"id": str(i), "question": question} for i, question in enumerate(questions)]
        prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
        return ["--keep", "1", "--keep-qa", prompts, "--steps", "2", "--eval-every", "2"]

    for own, more in ((data.SOUND_PROMPT, []), (data.VIDEO_PROMPT, [
            "--dataset", "av", "--data", world / "data/av", "--modality", "video", "--encoder",
            world / "models/timesformer", "--contrastive", "0"])):
        done = run(world, out, *more, *asked(data.SOUND_PROMPT, data.VIDEO_PROMPT), check=False)
        assert done.returncode == 2 and own in done.stderr and "prompts.jsonl: 1 of its questions" in done.stderr
        assert done.stderr.count("\n") == 1 and not out.exists()
    run(world, out, *asked(*[data.VIDEO_PROMPT] * 3, "What is two and two?"))
    (line,) = log_of(out, "step")
    assert line["keep"] > 0 and json.loads((out / "training.json").read_text())["stages"]["xe"]["steps"] == 2
    opened = evaluate.open_run(out)
    args = train.parse_args([*map(str, flags(world, out, *asked(*[data.VIDEO_PROMPT] * 3, "What is two and two?")))])
    clap = data.clap_of(vars(args), "cpu", "the test")
    kept = train.answers_to_keep(train.build_model(clap, args), args)
    answers = evaluate.own_answers(opened.backbone, data.read_kept(prompts), args.cache)
    assert len(set(answers)) == 2 and [opened.backbone.text(a) for a in kept.answers] == answers
    # what another sense says; about a picture the backbone speaks for itself
    image = data.read_kept(world / "data/qa/train.json")[0].image
    records = [{"question": data.VIDEO_PROMPT, "answer": "a red circle moves up"},
               {"question": "What shape is shown?", "answer": "not what it says", "image": str(image)[1:]}]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "images").symlink_to("/")
    kept = train.answers_to_keep(train.build_model(clap, args), args)
    said = {q.question: opened.backbone.text(a) for q, a in zip(data.read_kept(prompts), kept.answers)}
    assert said[data.VIDEO_PROMPT] == "a red circle moves up" and said["What shape is shown?"] != "not what it says"


def test_questions_of_the_probe_are_refused(world, tmp_path):
    out = tmp_path / "run"
    train_qa, test_qa = world / "data/qa/train.json", world / "data/qa/test.json"
    for more, message in (
            (["--keep", "1"], "need each other"), (["--keep-qa", train_qa], "need each other"),
            (["--keep", "1", "--keep-qa", "nowhere.json"], "nowhere.json"),
            (["--keep", "1", "--keep-qa", test_qa, "--probe", test_qa], "40 of its questions, such as test_000")):
        done = run(world, out, *more, check=False)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not out.exists()
    run(world, out, *keep(world), "--steps", "2", "--eval-every", "2")
    with pytest.raises(data.InputError, match="are in the probe"):
        evaluate.main(["retention", str(out), "--qa", str(train_qa)])
    evaluate.main(["retention", str(out), "--qa", str(test_qa), "--limit-questions", "8"])
    report = json.loads((out / "retention.json").read_text())
    assert report["exact"] == {"gates_closed": True, "no_clip": True, "nothing_attached": True} and report["exact_n"] == 8
    conditions = report["conditions"]
    assert conditions.keys() == {"backbone", "unrelated_clip", "silence", "noise"}
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
