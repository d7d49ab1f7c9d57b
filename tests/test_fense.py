"""FENSE and SPIDEr-FL against aac-metrics' values, installation from every kind of folder, and vocabulary."""
import json
import os
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, python

import evaluate
from data import InputError

SHARED = ROOT.parent / "shared/fense"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/fense beside the repository")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def installed(cache):
    evaluate.main(["install-fense", "--from", str(SHARED)])
    return cache / "hear-llava/fense"


@pytest.fixture
def source(tmp_path):
    """A copy of ../shared/fense that a test may spoil."""
    folder = tmp_path / "source"
    shutil.copytree(SHARED, folder, copy_function=shutil.copyfile)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    return folder


def shared_items():
    return json.loads((SHARED / "predictions.json").read_text())


def expected():
    return json.loads((SHARED / "expected.json").read_text())


def fails(*args):
    """The one line that a person sees; nothing is installed by it."""
    with pytest.raises(InputError) as failure:
        evaluate.main([*map(str, args)])
    assert "\n" not in str(failure.value)
    assert evaluate.fense_installed() is None
    parent = evaluate.fense_folder().parent
    assert not parent.exists() or not list(parent.iterdir())
    return str(failure.value)


# ---------------------------------------------------------------- values

def test_values_are_those_of_aac_metrics(installed, tmp_path, capsys):
    evaluate.main(["score", str(SHARED / "predictions.json"), "--out", str(tmp_path / "scores.json")])
    scored, right = json.loads((tmp_path / "scores.json").read_text()), expected()
    printed = capsys.readouterr().out
    for metric in "sbert_sim", "fer", "fense":
        values = np.array([i["scores"][metric] for i in scored["items"]])
        assert np.abs(values - right["items"][metric]).max() < 1e-6, metric
        assert abs(scored["corpus"][metric] - right["corpus"][metric]) < 1e-6, metric
    assert 0 < scored["corpus"]["fer"] < 1  # both kinds are among them
    assert "sbert_sim    0.7714" in printed and "vocabulary   64\n" in printed


def test_probabilities_of_every_kind_of_error(installed):
    encoder, detector = evaluate.fense_models(installed, "cpu")
    texts = [i["prediction"] for i in shared_items()]
    names = [name for name in expected()["items"] if name.endswith("_prob")]
    right = np.array([expected()["items"][name] for name in names]).T
    plain = ["".join(c for c in text if c.isalnum() or c.isspace() or c == "_").lower() for text in texts]
    assert np.abs(detector(plain).numpy() - right).max() < 1e-6
    assert encoder.tokenizer.model_max_length == 128 and detector.tokenizer.model_max_length == 64
    assert max(len(encoder.tokenizer(text)["input_ids"]) for text in plain) > 64  # one is cut


def test_spider_fl_is_spider_where_there_is_no_error(installed, monkeypatch):
    items = shared_items()
    without = evaluate.score(items)
    assert without["corpus"]["spider_fl"] is None or evaluate.spice_installed()
    semantic = np.linspace(0, 1, len(items)).tolist()
    monkeypatch.setattr(evaluate, "spice_installed", lambda: True)
    monkeypatch.setattr(evaluate, "spice", lambda hypotheses, references: semantic)
    scored = evaluate.score(items)
    spider = np.array([i["scores"]["spider"] for i in scored["items"]])
    wanted = np.where(expected()["items"]["fer"], 0.1 * spider, spider)
    assert np.abs(wanted - [i["scores"]["spider_fl"] for i in scored["items"]]).max() < 1e-9
    assert scored["corpus"]["spider_fl"] == pytest.approx(wanted.mean()) != pytest.approx(spider.mean())


def test_one_is_batched_is_padded(installed):
    texts = [i["prediction"] for i in shared_items()] + ["", " ", "dog", "dog", "rain falls " * 300]
    for model in evaluate.fense_models(installed, "cpu"):
        together, small = model(texts), model(texts, batch_size=3)
        alone = torch.cat([model([text]) for text in texts])
        backwards = model(texts[::-1]).flip(0)
        for other in small, alone, backwards:
            assert (together - other).abs().max() < 2e-6
        assert torch.equal(together, model(texts)) and together.isfinite().all()
        assert together.std(0).max() > 0.01 and not model.training  # texts differ


def test_the_same_values_whatever_was_scored_before(installed):
    items = shared_items()
    evaluate.fense_references.cache_clear()
    first = evaluate.score(items)["items"]
    evaluate.score(items[:5])
    assert evaluate.score(items)["items"] == first


def test_loading_changes_no_seed(installed):
    evaluate.fense_models.cache_clear()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    evaluate.fense(["a dog"], [["dog", "rain"]])
    assert torch.equal(before, torch.random.get_rng_state())


def test_absent_like_spice(cache, tmp_path, capsys):
    evaluate.main(["score", str(SHARED / "predictions.json"), "--out", str(tmp_path / "scores.json")])
    scores, printed = json.loads((tmp_path / "scores.json").read_text()), capsys.readouterr().out
    for metric in "sbert_sim", "fer", "fense", "spider_fl":
        assert scores["corpus"][metric] is None and scores["items"][0]["scores"][metric] is None
        assert f"{metric:12s} absent\n" in printed


def test_selection_opens_no_model(installed, monkeypatch):
    monkeypatch.setattr(evaluate, "fense_models", None)
    assert "fense" not in evaluate.score(shared_items(), select="spider_lite")["corpus"]


# ---------------------------------------------------------------- installation

def test_what_is_kept(installed):
    names = sorted(str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file())
    model = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    folders = "error_detector", "sentence_encoder"
    assert names == sorted(["fense.json"] + [f"{folder}/{name}" for folder in folders for name in model])
    assert [path.name for path in installed.parent.iterdir()] == ["fense"]
    about = evaluate.fense_installed()
    assert about["released"] is False and len(about["sentence_encoder"]) == len(about["error_detector"]) == 64
    released = torch.load(SHARED / "echecker.ckpt", weights_only=True)["state_dict"]
    kept = safetensors.torch.load_file(installed / "error_detector/model.safetensors")
    assert released.keys() - kept.keys() == {"encoder.embeddings.position_ids"}
    assert kept.keys() <= released.keys() and all(torch.equal(kept[name], released[name]) for name in kept)


def test_again_over_an_older_one(installed, source, capsys):
    before = evaluate.fense_installed()
    checkpoint = torch.load(source / "echecker.ckpt", weights_only=True)
    checkpoint["state_dict"]["clf.bias"] += 1
    torch.save(checkpoint, source / "echecker.ckpt")
    evaluate.main(["install-fense", "--from", str(source)])
    after = evaluate.fense_installed()
    assert after["error_detector"] != before["error_detector"]
    assert after["sentence_encoder"] == before["sentence_encoder"]
    assert [path.name for path in installed.parent.iterdir()] == ["fense"]
    (source / "echecker.ckpt").unlink()
    with pytest.raises(InputError):
        evaluate.main(["install-fense", "--from", str(source)])
    assert evaluate.fense_installed() == after  # a failure leaves it as it was


def test_released_layouts_without_tokenizer_json(cache, source):
    """Old models have a vocab.txt alone, and a config.json without model_type."""
    vocabulary = json.loads((source / "bert/tokenizer.json").read_text())["model"]["vocab"]
    for name in "tokenizer.json", "tokenizer_config.json", "model.safetensors":
        (source / "bert" / name).unlink()
    (source / "bert/vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)) + "\n")
    config = json.loads((source / "bert/config.json").read_text())
    config.pop("model_type")
    (source / "bert/config.json").write_text(json.dumps(config))
    state = safetensors.torch.load_file(source / "sbert/model.safetensors")
    state["embeddings.position_ids"] = torch.arange(130)[None]  # the released one has it too
    safetensors.torch.save_file(state, source / "sbert/model.safetensors")
    evaluate.main(["install-fense", "--from", str(source)])
    items = shared_items()
    values = evaluate.fense([i["prediction"] for i in items], [i["references"] for i in items])
    for metric, value in values.items():
        assert np.abs(np.array(value) - expected()["items"][metric]).max() < 1e-6, metric


@pytest.fixture
def release(monkeypatch):
    """The hub and the release, without a network: ../shared/fense under the released names."""
    def snapshot_download(name, local_dir, allow_patterns):
        folder = {evaluate.SENTENCE_ENCODER: "sbert", "bert": "bert"}[name]
        local_dir.mkdir()
        for path in (SHARED / folder).iterdir():
            if path.name in allow_patterns:
                shutil.copyfile(path, local_dir / path.name)
        assert (local_dir / "model.safetensors").exists() == (folder == "sbert")  # 440 MB that nobody needs

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(evaluate, "ERROR_DETECTOR", (SHARED / "echecker.ckpt").as_uri())


def test_download(cache, release, monkeypatch):
    about = "68454806642d7e40a372f8f828f7dab28710957b543c36539785e9204c7bed23"
    monkeypatch.setattr(evaluate, "ERROR_DETECTOR_SHA256", about)
    evaluate.main(["install-fense"])
    assert evaluate.fense_installed()["released"] is True
    assert evaluate.fense_installed()["error_detector"] == about
    found = evaluate.score(shared_items())["corpus"]
    assert found["fense"] == pytest.approx(expected()["corpus"]["fense"], abs=1e-6)


def test_another_file_than_the_released_one(cache, release, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a file of another hash was opened"))
    assert "has SHA-256 68454806" in fails("install-fense")


def test_no_network(cache):
    env = {**os.environ, "https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = python("evaluate.py", "install-fense", env=env, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: https://github.com/blmoistawinde/fense/") and "--from FOLDER" in done.stderr
    assert not list((cache / "hear-llava").iterdir())


def test_no_hub(cache, release, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("cannot reach\nthe hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr(evaluate, "ERROR_DETECTOR_SHA256",
                        "68454806642d7e40a372f8f828f7dab28710957b543c36539785e9204c7bed23")
    message = f"{evaluate.SENTENCE_ENCODER} could not be downloaded (OSError: cannot reach the hub)"
    assert fails("install-fense").startswith(message)


@pytest.mark.parametrize("name", ["echecker.ckpt", "sbert/model.safetensors", "sbert/config.json",
                                  "sbert/sentence_bert_config.json", "sbert/tokenizer.json", "bert/config.json",
                                  "bert/tokenizer.json"])
def test_a_folder_lacks_a_file(cache, source, name):
    (source / name).unlink()
    message = fails("install-fense", "--from", source)
    assert f"lacks {name}" in message and str(source) in message


def test_no_folder(cache, tmp_path):
    assert "lacks echecker.ckpt, sbert/config.json" in fails("install-fense", "--from", tmp_path / "nowhere")


class Trap:
    """What a pickle may do to those who open it as one."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_something_is_refused(cache, source, tmp_path):
    checkpoint = torch.load(source / "echecker.ckpt", weights_only=True)
    torch.save({**checkpoint, "trap": Trap(tmp_path / "sprung")}, source / "echecker.ckpt")
    assert "not a checkpoint of tensors alone" in fails("install-fense", "--from", source)
    assert not (tmp_path / "sprung").exists()
    torch.load(source / "echecker.ckpt", weights_only=False)
    assert (tmp_path / "sprung").exists()  # it would have


def spoil(change):
    def spoiled(source):
        checkpoint = torch.load(source / "echecker.ckpt", weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, source / "echecker.ckpt")
    return spoiled


SPOILED = {
    "no pickle": (lambda source: (source / "echecker.ckpt").write_text("<html>404"), "not a checkpoint"),
    "cut": (lambda source: os.truncate(source / "echecker.ckpt", 60_000), "not a checkpoint"),
    "a tensor": (lambda source: torch.save(torch.zeros(2), source / "echecker.ckpt"), "not a checkpoint"),
    "no weights": (spoil(lambda c: c.pop("state_dict")), "has no model_type and state_dict"),
    "a name more": (spoil(lambda c: c["state_dict"].update(extra=torch.zeros(1))), "cannot be loaded"),
    "a name less": (spoil(lambda c: c["state_dict"].pop("clf.bias")), "cannot be loaded"),
    "five classes": (spoil(lambda c: c["state_dict"].update({"clf.bias": torch.zeros(5)})), "cannot be loaded"),
    "cut safetensors": (lambda source: os.truncate(source / "sbert/model.safetensors", 5_000), "cannot be loaded"),
    "no settings": (lambda source: (source / "bert/config.json").write_text("{"), "cannot be loaded"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_spoiled_files(cache, source, case):
    change, message = SPOILED[case]
    change(source)
    assert message in fails("install-fense", "--from", source)


def test_an_installation_that_was_damaged(installed):
    evaluate.fense_models.cache_clear()
    os.truncate(installed / "error_detector/model.safetensors", 5_000)
    with pytest.raises(InputError, match="install-fense` again"):
        evaluate.score(shared_items())


# ---------------------------------------------------------------- vocabulary

def test_vocabulary_counts_the_words_of_all_captions(cache):
    captions = ["A dog barks, loudly.", "a Dog; and rain", "..."]
    items = [{"id": str(k), "prediction": text, "references": ["a cat"]} for k, text in enumerate(captions)]
    scored = evaluate.score(items)
    assert scored["corpus"]["vocabulary"] == len({"a", "dog", "barks", "loudly", "and", "rain"})
    assert "vocabulary" not in scored["items"][0]["scores"]
    assert "vocabulary 6" in evaluate.in_a_line(scored["corpus"])
    assert evaluate.score(items[2:])["corpus"]["vocabulary"] == 0
