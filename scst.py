"""Self-critical sequence training with CIDEr-D as the reward: the reward, the baseline and the loss.

    python scst.py                         # a toy policy learns two captions by reward alone, in seconds

    reward = CiderD(reference_corpus)                         # tokenised references of the training clips
    r = reward.score_many(samples, references)                # (B * K,)
    loss = scst_loss(logprobs, mask, leave_one_out(r.view(B, K)))

Copy this file alone: it needs torch. Captions are tokenised strings, words apart by spaces; B clips, K samples of
each, T tokens of a sample.
"""
import math
import re
from collections import Counter

import torch

END = "<end>"  # stands for the end token in a reward's captions: a sentence that stops must say so to earn it


class CiderD:
    """CIDEr-D (Vedantam et al. 2015, with the clipping and length penalty of coco-caption), n = 1..4, sigma 6.

    corpus: for each clip its list of tokenised references; the document frequencies come from there, counted in
    clips. Given the references of a test set it scores as pycocoevalcap does on that set. With `end` the end of a
    sentence counts as a word, which SCST needs: without it, dropping the last words pays.
    """

    def __init__(self, corpus, end=False):
        if not corpus or not all(corpus):
            raise ValueError("CIDEr-D needs at least one clip, and a reference for each")
        self.end = f" {END}" if end else ""
        frequency = Counter()
        for references in corpus:
            frequency.update({g for r in references for grams in _ngrams(r + self.end) for g in grams})
        self.unseen = math.log(len(corpus))
        self.rarity = {g: self.unseen - math.log(n) for g, n in frequency.items()}
        self._vectors = {}  # of references: each is met at every epoch, and by every sample of its clip

    def _vector(self, caption):
        """For each n the tf-idf weights by n-gram and their norm; the number of bigrams (the length of the penalty)."""
        parts, grams = [], _ngrams(caption)
        for some in grams:
            weights = {}
            for gram in some:
                weights[gram] = weights.get(gram, 0.0) + self.rarity.get(gram, self.unseen)
            parts.append((weights, math.hypot(*weights.values())))
        return parts, len(grams[1])

    def score(self, hypothesis, references, ended=True):
        """CIDEr-D of one caption against its references, in [0, 10]. `ended`: did it stop by its own end token?"""
        parts, length = self._vector(hypothesis + (self.end if ended else ""))
        total = 0.0
        for reference in references:
            if reference not in self._vectors:
                self._vectors[reference] = self._vector(reference + self.end)
            ref_parts, ref_length = self._vectors[reference]
            similarity = 0.0
            for (weights, norm), (ref_weights, ref_norm) in zip(parts, ref_parts):
                both = weights.keys() & ref_weights.keys()
                if not both:
                    break  # then no longer n-gram is shared either
                # fsum: a set has another order in every process, an exact sum does not
                dot = math.fsum(min(weights[g], ref_weights[g]) * ref_weights[g] for g in both)
                similarity += dot / (norm * ref_norm) if norm * ref_norm else dot
            total += similarity * math.exp(-((length - ref_length) ** 2) / 72.0)   # 2 sigma^2
        return 10.0 * total / 4 / len(references)

    def score_many(self, hypotheses, references, ended=None):
        """One score a hypothesis, as a float32 tensor; references[i] belongs to hypotheses[i]."""
        ended = [True] * len(hypotheses) if ended is None else ended
        return torch.tensor([self.score(h, r, e) for h, r, e in zip(hypotheses, references, ended, strict=True)])


def words(caption):
    """A caption as the reward reads it: lower case, words and numbers. No Java, which a training step cannot wait for."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)?", caption.lower()))


def _ngrams(caption):
    """A caption's n-grams for n = 1 to 4, single words as they are: no tuple, which would only cost time."""
    words = caption.split()
    return words, *(list(zip(*(words[i:] for i in range(n)))) for n in (2, 3, 4))


def cider_d(hypotheses, references, end=False):
    """Scores of a whole set, document frequencies from its own references, as a list of floats."""
    scorer = CiderD(references, end)
    return [scorer.score(h, r) for h, r in zip(hypotheses, references, strict=True)]


def leave_one_out(rewards):
    """Advantage of each sample over the mean of the clip's other samples; (B, K) -> (B, K).

    Equal to K/(K-1) * (reward - mean): unbiased, since a sample is not in its own baseline (Kool et al. 2019).
    """
    K = rewards.shape[1]
    if K < 2:
        raise ValueError("a leave-one-out baseline needs at least 2 samples a clip")
    return (rewards - rewards.mean(1, keepdim=True)) * (K / (K - 1))


def scst_loss(logprobs, mask, advantage):
    """Policy gradient of the expected reward: - sum(advantage * log p(token)) / number of tokens.

    logprobs (B, K, T) of the sampled tokens, with gradient; mask (B, K, T) True up to and with the end token;
    advantage (B, K). Rennie et al. 2017, with the leave-one-out baseline in place of the greedy caption.
    """
    if logprobs.shape != mask.shape or logprobs.shape[:2] != advantage.shape:
        raise ValueError(f"shapes {tuple(logprobs.shape)}, {tuple(mask.shape)} and {tuple(advantage.shape)} "
                         "do not belong together: (B, K, T), (B, K, T), (B, K)")
    mask = mask.to(logprobs.dtype)
    return -(advantage.detach()[..., None] * logprobs * mask).sum() / mask.sum().clamp(min=1)


def demo():
    torch.manual_seed(0)
    words = "a dog cat barks meows loudly twice".split()
    references = [["a dog barks loudly", "a dog barks twice"], ["a cat meows", "a cat meows twice"]]
    reward, B, K, T = CiderD(references), 2, 16, 4
    policy = torch.zeros(B, T, len(words), requires_grad=True)      # a table of logits, one row a position
    optimizer = torch.optim.Adam([policy], lr=0.1)
    for step in range(201):
        choice = torch.distributions.Categorical(logits=policy[:, None].expand(B, K, T, len(words)))
        samples = choice.sample()                                   # (B, K, T)
        captions = [" ".join(words[i] for i in s) for s in samples.view(-1, T).tolist()]
        r = reward.score_many(captions, [references[i // K] for i in range(B * K)]).view(B, K)
        logprobs = choice.log_prob(samples)
        loss = scst_loss(logprobs, torch.ones_like(logprobs), leave_one_out(r))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            greedy = [" ".join(words[i] for i in row) for row in policy.argmax(-1).tolist()]
            print(f"step {step:3d}  sampled reward {r.mean():5.2f}  greedy: {' | '.join(greedy)}")


if __name__ == "__main__":
    demo()
