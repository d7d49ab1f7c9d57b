"""Which questions open a branch: shares are those of the softmax, nothing else changes, and the file is well formed."""
import json
import shutil

import pytest
import senses
import torch
import torch.nn.functional as F
from conftest import python
from safetensors.torch import load_file, save_file

import data
import evaluate
import fusion as fusions

TINY = ["--steps", "2", "--eval-every", "2", "--hidden", "32", "--tokens", "8", "--batch-size", "4"]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """A folder of runs: hears and sees, with null slots; plain: hears without its null slots."""
    folder = tmp_path_factory.mktemp("senses")

    def train(name, *flags):
        python("train.py", "--data", world / "data/audiocaps", "--llava", world / "models/llava", "--encoder",
               world / "models/clap", "--cache", folder / "cache", "--probe", world / "data/qa/test.json",
               "--layers", "3", "6", *TINY, "--out", folder / name, *flags)

    train("hears", "--null-slot")
    train("sees", "--null-slot", "--dataset", "av", "--data", world / "data/av", "--modality", "video", "--encoder",
          world / "models/timesformer", "--contrastive", "0")
    shutil.copytree(folder / "hears", folder / "plain")
    spec = json.loads((folder / "hears/fusion.json").read_text())
    (folder / "plain/fusion.json").write_text(json.dumps({**spec, "null_slot": False}))
    state = load_file(folder / "hears/fusion.safetensors")
    save_file({name: value for name, value in state.items() if not name.startswith("null.")},
              folder / "plain/fusion.safetensors")
    return folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Two steps of training do not teach when to end."""
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 6)


def branches_of(*folders, clips=3):
    first = evaluate.open_run(folders[0], "cpu")
    opened = [first, *evaluate.open_others(first, folders[1:], "cpu")]
    frames = [data.load_inputs([run.config], "test", "cpu").frames[0].take(range(clips)) for run in opened]
    return first.backbone, evaluate.attached(opened, frames)


@pytest.mark.parametrize("system", ["additive", "cross_attention"])
def test_shares_are_those_of_the_softmax(prompted, system):
    backbone, _, ids, _ = prompted(system, 2)
    fusion = fusions.build(system, backbone.decoder, encoder_width=8, layers=[3], tokens=4, hidden=16, null_slot=True)
    with torch.no_grad():
        fusion.set_gates(0.3)
        fusion.null["3"].normal_(std=0.05)
    branch = fusions.Branch(fusion, torch.randn(2, 5, 8))
    seen = []
    backbone.decoder.layers[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def states():
        with fusions.attach_branches(backbone.decoder, [branch], range(2)):
            return backbone.decoder(ids).last_hidden_state

    with torch.no_grad():
        plain = states()
        with senses.recorded([branch]) as shares:
            assert states().equal(plain)
        assert states().equal(plain)
        h = seen[0]
        # by hand, with the weight of each key
        key = fusion.prepare(fusion.tokens(branch.frames))[3][0]
        if system == "additive":
            query = F.rms_norm(h, h.shape[-1:])
        else:
            query = fusion.block["3"]["q"](fusion.block["3"]["norm"](h))
        heads = key.shape[1]
        nothing = query @ (fusions.NULL_SCALE * fusion.null["3"])
        by_head = []
        for q, k in zip(query.chunk(heads, -1), key.unbind(1)):
            logits = torch.cat([q @ k.mT, nothing[..., None]], -1) / k.shape[-1] ** 0.5
            by_head.append(1 - logits.softmax(-1)[..., -1])
    assert [*shares] == ["audio"] and [*shares["audio"]] == [3]
    share = shares["audio"][3]
    assert share.shape == ids.shape and share.std() > 0.01
    torch.testing.assert_close(share, sum(by_head) / heads)


def test_shares_are_read_where_the_answer_is_written(runs):
    backbone, branches = branches_of(runs / "hears", runs / "sees")
    text, answers = "What do you hear?", ["a dog barks", "a dog", "a dog barks while a bell rings"]
    together = senses.shares_of(backbone, branches, text, [None] * 3, answers)
    assert {modality: [*layers] for modality, layers in together.items()} == {"audio": [3, 6], "video": [3, 6]}
    # one clip at a time needs no padding
    alone = senses.shares_of(backbone, branches, text, [None] * 3, answers, batch_size=1)
    ids = backbone.encode(text)[0]
    for i, answer in enumerate(answers):
        tokens = backbone.caption_ids(text, answer)
        whole = torch.tensor([ids + tokens])
        with torch.no_grad(), senses.recorded(branches) as shares:
            with fusions.attach_branches(backbone.decoder, branches, [i]):
                backbone.decoder(whole)
        for modality in together:
            for layer, parts in together[modality].items():
                row = shares[modality][layer][0]
                expected = {"answer": row[len(ids) - 1:-1].mean(), "last": row[len(ids) - 1],
                            "prompt": row[:len(ids)].mean()}
                for name, value in expected.items():
                    torch.testing.assert_close(parts[name][i], value, atol=1e-5, rtol=0)
                    torch.testing.assert_close(alone[modality][layer][name][i], value, atol=1e-5, rtol=0)


def test_answers_are_greedy_captions(runs):
    backbone, branches = branches_of(runs / "hears", runs / "sees")
    answers, _ = senses.ask(backbone, branches, data.SOUND_PROMPT, [None] * 3)
    assert answers == [c[0]["text"] for c in evaluate.decode(backbone, branches, [data.SOUND_PROMPT] * 3)]


def test_lists_of_questions():
    rows = senses.questions()
    texts = [row["text"] for row in rows]
    assert len({*texts}) == len(texts)
    assert [row["text"] for row in rows if row["trained"]] == [data.SOUND_PROMPT, data.VIDEO_PROMPT]
    for sense in "audio", "video":
        titles = dict(senses.groups(rows))
        assert len(titles[f"{sense}: paraphrases"]) == 20
    half = [len(some) for title, some in senses.groups(rows) if title.startswith("  ")]
    assert half == [10, 10, 10, 10]
    assert sum(row["sense"] == "image" for row in rows) == 20


def test_the_summary_counts_from_half_of_the_trained_share():
    rows = senses.questions()
    for row in rows:
        share = {"audio": 0.9, "video": 0.1, "image": 0.1}[row["sense"]]
        row["open"] = {"audio": [share, share], "video": [1 - share]}
    rows[1]["open"]["audio"] = [0.5, 0.3]  # a paraphrase with the word "sound": 0.40 is below 0.45
    summary = senses.summarise(rows, "open")
    assert summary["audio"] == {
        "trained": 0.9, "paraphrases_with_word": {"right": 9, "of": 10},
        "paraphrases_without_word": {"right": 10, "of": 10}, "yes_or_no": {"right": 6, "of": 6},
        "others": {"right": 45, "of": 45}}
    # a video branch that is as open for images as for videos
    assert summary["video"]["others"] == {"right": 27, "of": 47}


def test_the_file_and_the_table(runs, monkeypatch, tmp_path, capsys):
    few = [row for row in senses.questions() if row["text"] in (
        data.SOUND_PROMPT, "What do you hear?", "Is it raining?", data.VIDEO_PROMPT, "What is moving?",
        "Describe the image.")]
    monkeypatch.setattr(senses, "questions", lambda: [dict(row) for row in few])
    audio, out = [str(runs / "hears")] * 2, tmp_path / "new/senses.json"
    before = sorted(p for p in runs.rglob("*") if "cache" not in str(p))
    senses.main([",".join(audio), "--with", str(runs / "sees"), "--limit-clips", "3", "--out", str(out)])
    assert sorted(p for p in runs.rglob("*") if "cache" not in str(p)) == before
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert result["runs"] == {"audio": audio, "video": [str(runs / "sees")]} and result["n"] == 3
    assert [row["text"] for row in result["prompts"]] == [row["text"] for row in few]
    for row in result["prompts"]:
        # the video run is attached beside both and counted once
        for name in senses.SHARES[:-1]:
            assert [len(row[name][modality]) for modality in ("audio", "video")] == [2, 1]
            assert all(0 < share < 1 for shares in row[name].values() for share in shares)
        assert row["open"]["audio"][0] == row["open"]["audio"][1]  # the same run twice
        for modality, seeds in row["open_layers"].items():
            assert [sum(seed.values()) / 2 for seed in seeds] == pytest.approx(row["open"][modality])
        # an answer of at most six tokens does not hide how its first one reads
        assert row["open"]["audio"] != row["open_last"]["audio"] != row["open_swapped"]["audio"]
        assert len(row["examples"]) == 2 and row["text"] in printed
        if row["kind"] in senses.CAPTIONS:
            assert {sense: len(values) for sense, values in row["cider_d"].items()} == {
                row["sense"]: {"audio": 2, "video": 1}[row["sense"]]}
        else:
            assert "cider_d" not in row
    assert "audio: paraphrases" in printed and "audio branch: trained" in printed


def test_a_persons_mistakes(runs, tmp_path, capsys):
    hears, sees, out = runs / "hears", runs / "sees", tmp_path / "senses.json"
    for audio, video, message in ((runs / "plain", sees, "has no null slot"),
                                  (sees, hears, "is a run with video, not with audio"),
                                  (runs / "nothing", sees, "not a run folder")):
        with pytest.raises(data.InputError, match=message):
            senses.main([str(audio), "--with", str(video), "--out", str(out)])
    with pytest.raises(SystemExit, match="2"):
        senses.main([str(hears), "--with", str(sees), "--out", str(out), "--limit-clips", "0"])
    assert "--limit-clips must be at least 1" in capsys.readouterr().err and not out.exists()
