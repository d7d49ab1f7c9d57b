"""The reward, the baseline and the policy gradient."""
import csv
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, python
from hypothesis import given, settings
from hypothesis import strategies as st

import scst
from data import InputError

CAPTIONS = st.lists(st.sampled_from("a dog cat barks meows loudly twice then".split()), max_size=9).map(" ".join)


def pycoco(hypotheses, references):
    from pycocoevalcap.cider.cider import Cider
    ids = range(len(hypotheses))
    return Cider().compute_score({i: references[i] for i in ids}, {i: [hypotheses[i]] for i in ids})[1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CAPTIONS, st.lists(CAPTIONS.filter(bool), min_size=1, max_size=4)), min_size=2, max_size=6))
def test_equals_pycocoevalcap(items):
    hypotheses, references = [h for h, _ in items], [r for _, r in items]
    assert np.allclose(scst.cider_d(hypotheses, references), pycoco(hypotheses, references), atol=1e-9)


def released(shared):
    """The captions of AudioCaps' test clips, as the reward reads them."""
    clips = {}
    for row in csv.DictReader(open(shared / "audiocaps/test.csv", encoding="utf-8")):
        clips.setdefault(row["youtube_id"], []).append(scst.words(row["caption"]))
    return list(clips.values())


def test_equals_pycocoevalcap_on_released_captions(shared):
    clips = released(shared)
    hypotheses, references = [c[0] for c in clips], [c[1:] for c in clips]
    assert np.abs(np.array(scst.cider_d(hypotheses, references)) - pycoco(hypotheses, references)).max() < 1e-9


def test_the_end_counts():
    references = [["a dog barks"], ["a cat meows"]]
    reward = scst.CiderD(references, end=True)
    assert reward.score_many(["a dog barks"], references[:1]) > reward.score_many(["a dog barks"], references[:1], [False])
    assert reward.score_many(["a dog barks"], references[:1]) > reward.score_many(["a dog"], references[:1])


@pytest.mark.parametrize("text, wanted", [
    ("A dog, barking!\n\tTwice", "a dog barking twice"), ("a man's \"voice\" \U0001f600", "a man's voice"), ("", ""),
    ("Émile sings 3 times_over", "émile sings 3 times over")])
def test_words(text, wanted):
    assert scst.words(text) == wanted


@pytest.mark.parametrize("hypothesis", ["", "dog", "zebra"])
def test_short_hypotheses_score_and_do_not_crash(hypothesis):
    value = scst.CiderD([["a dog barks"], ["a cat"]]).score_many([hypothesis], [["a dog barks"]]).item()
    assert np.isfinite(value) and value >= 0


def test_what_was_asked_before_changes_no_bit():
    reward, odd = scst.CiderD([["a dog barks"], ["a cat"]]), "zebra yak zebra yak yak"
    first = reward.score_many([odd], [["a dog barks"]])
    reward.score_many(["yak yak gnu zebra", "gnu"], [["a cat"], [odd]])
    assert torch.equal(reward.score_many([odd], [["a dog barks"]]), first)
    assert reward.score_many([odd], [[odd]]).item() > 0  # also where no n-gram is of the corpus


def test_no_references_are_refused():
    with pytest.raises(ValueError, match="a reference for each"):
        scst.CiderD([["a dog"], []])


def test_leave_one_out_is_the_mean_of_the_others():
    rewards = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    advantage = scst.leave_one_out(rewards)
    for b in range(4):
        for k in range(5):
            others = [rewards[b, j] for j in range(5) if j != k]
            assert torch.isclose(advantage[b, k], rewards[b, k] - sum(others) / 4, atol=1e-6)
    with pytest.raises(ValueError, match="at least 2 samples"):
        scst.leave_one_out(rewards[:, :1])


def test_gradient_is_that_of_the_expected_reward():
    """The loss, weighted over all sequences by their probability, against finite differences of the exact value."""
    torch.manual_seed(0)
    V, T = 3, 2
    reward = torch.rand(V, V, dtype=torch.float64)
    logits = torch.randn(T, V, dtype=torch.float64, requires_grad=True)

    def expected(x):
        p = x.log_softmax(-1).exp()
        return (p[0][:, None] * p[1][None] * reward).sum()

    numeric = torch.zeros_like(logits)
    for i in range(T):
        for j in range(V):
            d = torch.zeros(T, V, dtype=torch.float64)
            d[i, j] = 1e-6
            numeric[i, j] = (expected(logits.detach() + d) - expected(logits.detach() - d)) / 2e-6
    # every pair of samples with its probability: then the mean of the loss's gradient is exact, no sampling noise
    sequences = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    logp = logits.log_softmax(-1)
    total = 0.0
    for a in sequences:
        for b in sequences:
            pair = torch.stack([a, b])                                      # (K, T)
            logprobs = torch.stack([logp[0, pair[:, 0]], logp[1, pair[:, 1]]], -1)[None]
            r = reward[pair[:, 0], pair[:, 1]][None]
            chance = logprobs.detach().sum().exp()
            total = total + chance * scst.scst_loss(logprobs, torch.ones_like(logprobs), scst.leave_one_out(r))
    total.backward()
    # the loss averages over the K * T tokens and leave-one-out sums over K samples: -K * gradient / (K * T)
    assert torch.allclose(logits.grad, -numeric / T, atol=1e-7)


def test_masked_tokens_do_not_count():
    logprobs = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[..., 2:] = False
    scst.scst_loss(logprobs, mask, torch.randn(2, 3)).backward()
    assert (logprobs.grad[..., 2:] == 0).all() and (logprobs.grad[..., :2] != 0).all()
    with pytest.raises(ValueError, match="do not belong together"):
        scst.scst_loss(logprobs, mask, torch.randn(3, 2))


@pytest.mark.parametrize("skew, low, high, levels", [(3, 0.97, 1.03, (4.4, 4.4)), (0, 1.15, 1.5, (1.7, 2.0))])
def test_what_a_reward_can_teach_in_the_stand_in_world(skew, low, high, levels, monkeypatch):
    """CIDEr-D of a scene's most agreeable caption over that of its likeliest: nothing, but in the world of --even."""
    import standin
    monkeypatch.setattr(standin.scenes, "skew", skew)
    rng = np.random.default_rng(1)
    scenes = [standin.draw_scene(rng) for _ in range(100)]
    references = [standin.paraphrases(standin.caption, scene, rng, 5) for scene in scenes]
    said = [[standin.caption(scene, rng) for _ in range(300)] for scene in scenes]
    likeliest = [max(some, key=some.count) for some in said]
    reward, agreeable = scst.CiderD(references), []
    for some in said:
        distinct = sorted(set(some[:150]))
        agreeable.append(distinct[reward.score_many(distinct, [some[150:]] * len(distinct)).argmax()])
    found = [reward.score_many(captions, references).mean().item() for captions in (likeliest, agreeable)]
    assert low < found[1] / found[0] < high and found == pytest.approx(levels, abs=0.1)


def agreement(clips):
    """Mean CIDEr-D of each caption against its clip's others."""
    one_out = [(c[i], c[:i] + c[i + 1:]) for c in clips for i in range(len(c))]
    return scst.CiderD(clips).score_many(*zip(*one_out)).mean().item()


@pytest.mark.parametrize("skew, wanted", [(3, 2.6), (0, 1.5)])
def test_how_well_captions_of_the_stand_in_world_agree(skew, wanted, monkeypatch):
    import standin
    monkeypatch.setattr(standin.scenes, "skew", skew)
    rng = np.random.default_rng(1)
    clips = [standin.paraphrases(standin.caption, standin.draw_scene(rng), rng, 5) for _ in range(320)]
    assert abs(agreement(clips) - wanted) < 0.1


def test_how_well_released_captions_agree(shared):
    assert round(agreement([c for c in released(shared) if len(c) == 5]), 2) == 0.92


def test_alone_in_an_empty_folder_the_reward_rises(tmp_path):
    shutil.copy(ROOT / "scst.py", tmp_path)
    out = python("scst.py", cwd=tmp_path).stdout.splitlines()
    rewards = [float(line.split("sampled reward")[1].split()[0]) for line in out]
    assert rewards[-1] > 3 * rewards[0] and out[-1].endswith("a dog barks twice | a cat meows twice")


def test_a_world_that_was_built_otherwise_is_refused(world, monkeypatch):
    import standin
    monkeypatch.setattr("sys.argv", ["standin.py", "--out", str(world), "--smoke", "--even"])
    with pytest.raises(InputError, match="was built with another --even; remove it or choose another --out"):
        standin.main()
