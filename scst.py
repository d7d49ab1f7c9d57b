"""Self-critical sequence training with CIDEr-D as the reward: the reward, the baseline and the loss.

    python scst.py                         # a toy policy learns two captions by reward alone, in seconds

    reward = CiderD(reference_corpus)                         # tokenised references of the training clips
    r = reward.score_many(samples, references)                # (B * K,)
    loss = scst_loss(logprobs, mask, leave_one_out(r.view(B, K)))

Copy this file alone: it needs torch, and `sample_tree` a decoder of transformers. Captions are tokenised strings,
words apart by spaces; B clips, K samples of each, T tokens of a sample, P of the prompt, D decoder width, V words.
"""
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

END = "<end>"  # stands for the end token in a reward's captions: a sentence that stops must say so to earn it
LOW = (1 << 32) - 1  # the second of two numbers that are packed into one integer


class CiderD:
    """CIDEr-D (Vedantam et al. 2015, with the clipping and length penalty of coco-caption), n = 1..4, sigma 6.

    corpus: for each clip its list of tokenised references; the document frequencies come from there, counted in
    clips. Given the references of a test set it scores as pycocoevalcap does on that set. With `end` the end of a
    sentence counts as a word, which SCST needs: without it, dropping the last words pays.
    """

    def __init__(self, corpus, end=False):
        if not corpus or not all(corpus):
            raise ValueError("CIDEr-D needs at least one clip, and a reference for each")
        self.corpus = corpus
        self._end, self._unseen = f" {END}" if end else "", math.log(len(corpus))
        self._words, self._known, self._rarity = {}, [], []  # numbers of words; of n = 1..4 the n-grams, and their idf
        clip = torch.arange(len(corpus)).repeat_interleave(torch.tensor([len(r) for r in corpus]))
        for rows, _ in self._ngrams([r + self._end for references in corpus for r in references]):
            grams = torch.unique(clip[rows >> 32] << 32 | rows & LOW) & LOW     # once a clip
            self._rarity.append(self._unseen - torch.bincount(grams).double().log())

    def _ngrams(self, captions):
        """For n = 1..4 the distinct n-grams of each caption, (R,) as caption << 32 | number, sorted, and their counts.

        An n-gram's number is its place among the corpus's; those that are not there follow, in these captions' order.
        """
        table = dict(self._words) if self._known else self._words    # what was asked before changes no number
        words = [[table.setdefault(w, len(table)) for w in c.split()] for c in captions]
        caption = torch.arange(len(words)).repeat_interleave(torch.tensor([len(w) for w in words], dtype=torch.long))
        words = torch.tensor([w for row in words for w in row] + [0] * 4, dtype=torch.long)
        inside = torch.cat([caption, caption.new_full((4,), -1)])
        at = torch.arange(len(caption))                                         # where an n-gram begins
        number = torch.zeros_like(at)                                           # of the (n - 1)-gram that begins there
        for n in range(4):
            whole = inside[at + n] == caption[at]
            at, number = at[whole], number[whole]
            key = number << 31 | words[at + n]
            if n == len(self._known):                                           # the corpus itself, and an end of all
                self._known.append(torch.unique(torch.cat([key, key.new_tensor([1 << 62])])))
            known = self._known[n]
            number = torch.searchsorted(known, key)
            new = known[number] != key
            number[new] = len(known) - 1 + torch.unique(key[new], return_inverse=True)[1]
            yield torch.unique(caption[at] << 32 | number, return_counts=True)

    def score_many(self, hypotheses, references, ended=None):
        """Scores in [0, 10], one a hypothesis, float64; references[i] belongs to hypotheses[i].

        ended: which of them stop by their own end token; all, if it is not given.
        """
        ended = [True] * len(hypotheses) if ended is None else ended
        said = [h + (self._end if e else "") for h, e in zip(hypotheses, ended, strict=True)]
        place = {r: len(said) + i for i, r in enumerate(dict.fromkeys(r for some in references for r in some))}
        captions, many = said + [r + self._end for r in place], torch.tensor([len(r) for r in references])
        left = torch.arange(len(said)).repeat_interleave(many)                  # pairs of a hypothesis and a reference
        right = torch.tensor([place[r] for some in references for r in some], dtype=torch.long)
        similarity = torch.zeros(len(left), dtype=torch.float64)
        for n, (rows, count) in enumerate(self._ngrams(captions)):
            caption, gram = rows >> 32, rows & LOW
            unseen = self._rarity[n].new_full((len(rows),), self._unseen)           # at most so many are new
            weight = count * torch.cat([self._rarity[n], unseen])[gram]
            norm = torch.bincount(caption, weight ** 2, len(captions)).sqrt()
            if n == 1:
                length = torch.bincount(caption, count.double(), len(captions))  # in bigrams, as coco-caption has it
            # every n-gram of a pair's hypothesis, and its place among the reference's, if it is there
            size = torch.bincount(caption, minlength=len(captions))
            pair = torch.arange(len(left)).repeat_interleave(size[left])
            before = size[left].cumsum(0) - size[left]
            mine = torch.arange(len(pair)) - before[pair] + (size.cumsum(0) - size)[left][pair]
            wanted = right[pair] << 32 | gram[mine]
            other = torch.searchsorted(rows, wanted).clamp(max=len(rows) - 1)
            both = rows[other] == wanted
            pair, mine, other = pair[both], mine[both], other[both]
            dot = torch.bincount(pair, torch.minimum(weight[mine], weight[other]) * weight[other], len(left))
            norms = norm[left] * norm[right]
            similarity += dot / torch.where(norms > 0, norms, 1.0)
        similarity *= torch.exp(-(length[left] - length[right]) ** 2 / 72)      # 2 sigma^2
        return 10 / 4 * torch.bincount(left, similarity, len(said)) / many


def words(caption):
    """A caption as the reward reads it: lower case, words and numbers. No Java, which a training step cannot wait for."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)?", caption.lower()))


def cider_d(hypotheses, references, end=False):
    """Scores of a whole set, document frequencies from its own references, as a list of floats."""
    return CiderD(references, end).score_many(hypotheses, references).tolist()


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


# ---------------------------------------------------------------- samples that share their beginnings

@dataclass
class Tree:
    """K samples of each of B clips: every distinct beginning of a clip's samples stands there once.

    One row a clip holds the prompt and then the places (L in all) from which the next token was drawn.
    """
    states: torch.Tensor          # (B, L, D): what the trunk makes of them
    position_ids: torch.Tensor    # (B, L): as if each sample followed the prompt alone
    attention_mask: torch.Tensor  # (B, 1, L, L), True: a place sees the prompt and what it goes on from
    position: torch.Tensor        # (draws,): where each distinct token was drawn, counted over B * L
    token: torch.Tensor           # (draws,)
    path: torch.Tensor            # (B * K, T): which draws a sample is made of
    mask: torch.Tensor            # (B * K, T), True up to and with the end token

    def samples(self):
        """Token ids of each sample, a list of B * K lists."""
        return [self.token[draws[real]].tolist() for draws, real in zip(self.path, self.mask)]

    def logprobs(self, hidden, lm_head, temperature=1.0):
        """log p of every sampled token, (B * K, T), from the decoder's states (B, L, D) of this tree."""
        logits = lm_head(hidden.flatten(0, 1)[self.position]) / temperature                        # (draws, V)
        return -F.cross_entropy(logits.float(), self.token, reduction="none")[self.path]


@torch.no_grad()
def sample_tree(decoder, lm_head, prompt, K, *, layer, eos, limit, temperature=1.0, fusion=None):
    """K samples of each row of a prompt (B, P), at most `limit` tokens long, as a Tree.

    The samples are independent: each draws its own next token. What samples of a clip have
    in common is computed once, and nothing is computed for those that have ended. The states
    are the input of decoder block `layer`. fusion: what is attached, if anything; before each
    pass its `row_to_clip` is set to the clip of each row, (rows,), and to None at the end.
    """
    from transformers import DynamicCache
    (B, P), device = prompt.shape, prompt.device
    cache, states = DynamicCache(config=decoder.config), []

    def keep_input(module, args, kwargs):
        states.append(args[0] if args else kwargs["hidden_states"])

    # the first hook of its block: it sees the states before a fusion changes them
    handle = decoder.layers[layer].register_forward_pre_hook(
        keep_input, with_kwargs=True, prepend=True)
    tokens = prompt                                            # (rows, 1) from the second pass on
    clip = torch.arange(B, device=device)                      # (rows,)
    position = torch.full((B,), P - 1, device=device)          # a row's position in its clip's Tree
    ancestors = torch.empty(B, 0, dtype=torch.long, device=device)   # and those it continues
    row = clip.repeat_interleave(K)                            # (active,): the row of each sample
    active = torch.arange(B * K, device=device)                # samples that have not ended
    used = torch.full((B,), P, device=device)                  # positions taken in each clip's Tree
    draws, grown, paths, drawn = [], [], [], 0
    try:
        for t in range(limit):
            if fusion is not None:
                fusion.row_to_clip = clip
            out = decoder(input_ids=tokens, past_key_values=cache, use_cache=True)
            logits = lm_head(out.last_hidden_state[:, -1]).float() / temperature
            pairs, pair = torch.unique(_draw(logits.softmax(-1), row), return_inverse=True)
            parent, token = pairs // logits.shape[1], pairs % logits.shape[1]
            path = torch.full((B * K,), -1, device=device)
            path[active] = drawn + pair
            paths.append(path)
            drawn += len(pairs)
            draws.append((clip[parent], position[parent], token))
            alive = token != eos
            if t + 1 == limit or not alive.any():
                break
            survives = alive[pair]
            active = active[survives]
            row = (alive.cumsum(0) - 1)[pair][survives]
            parent, tokens = parent[alive], token[alive][:, None]
            cache.batch_select_indices(parent)
            clip = clip[parent]                                # ascending, as the rows are
            rank = torch.arange(len(clip), device=device) - torch.searchsorted(clip, clip)
            position = used[clip] + rank
            used = used + torch.bincount(clip, minlength=B)
            ancestors = torch.cat([ancestors[parent], position[:, None]], 1)
            grown.append((clip, position, ancestors))
    finally:
        handle.remove()
        if fusion is not None:
            fusion.row_to_clip = None
    return _pack(states, draws, grown, paths, int(used.max()))


def _draw(probabilities, row):
    """row * V + token: one token for each sample from the distribution of its row.

    probabilities (rows, V), row (active,) -> (active,). By inversion of the cumulative
    distribution in float64; torch.multinomial is slower.
    """
    V = probabilities.shape[1]
    cumulative = probabilities.double().cumsum(-1)[row]                        # (active, V)
    uniform = torch.rand(len(row), 1, dtype=torch.float64, device=row.device)
    token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return row * V + token.clamp(max=V - 1)[:, 0]


def _pack(states, draws, grown, paths, L):
    """The Tree of what sample_tree has drawn, padded to L positions a clip."""
    (B, P, D), device = states[0].shape, states[0].device
    packed = states[0].new_zeros(B, L, D)
    packed[:, :P] = states[0]
    position_ids = torch.arange(L, device=device).expand(B, L).clone()
    mask = torch.zeros(B, L, L, dtype=torch.bool, device=device)
    mask[:, :, :P] = torch.ones(L, P, dtype=torch.bool, device=device).tril()
    for depth, ((clip, position, ancestors), new) in enumerate(zip(grown, states[1:])):
        packed[clip, position] = new[:, 0]
        position_ids[clip, position] = P + depth
        mask[clip[:, None], position[:, None], ancestors] = True
    clip, position, token = (torch.cat(part) for part in zip(*draws))
    path = torch.stack(paths, 1)
    return Tree(packed, position_ids, mask[:, None], clip * L + position, token,
                path.clamp(min=0), path >= 0)


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
