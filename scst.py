"""Self-critical sequence training with CIDEr-D as the reward: reward, baseline, loss, samples.

    python scst.py      # a toy policy learns two captions by reward alone, in seconds

    reward = CiderD(reference_corpus)  # references of the training clips
    r = reward.score_many(samples, references)  # (B * K,); references: a list for each sample
    loss = scst_loss(logprobs, mask, leave_one_out(r.view(B, K)))  # logprobs, mask: (B, K, T)

Copy this file alone: it needs torch, and `sample_tree` a decoder of transformers. Captions are
tokenised strings, words separated by spaces. B clips, K samples of each, T tokens of a sample,
P of the prompt, D decoder width, V words of the vocabulary.
"""
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F

END = "<end>"  # the end token in a reward's captions: a sentence must stop to earn it
LOW = (1 << 32) - 1  # the second of two numbers that are packed into one integer


class CiderD:
    """CIDEr-D with n = 1..4 and sigma 6 (Vedantam et al. 2015, as coco-caption clips and
    penalises length).

    corpus: for each clip its tokenised references. Document frequencies are counted there, in
    clips; with the references of a test set the scores are pycocoevalcap's on that set. `end`:
    the end of a sentence counts as a word. SCST needs it: else dropping the last words pays.
    """

    def __init__(self, corpus, end=False):
        if not corpus or not all(corpus):
            raise ValueError("CIDEr-D needs at least one clip, and a reference for each")
        self.corpus, self._end = corpus, f" {END}" if end else ""
        self._unseen = math.log(len(corpus))  # idf of an n-gram that is not in the corpus
        self._words, self._known, self._idf = {}, [], []  # the last two for n = 1..4
        count = torch.tensor([len(references) for references in corpus])
        clip = torch.arange(len(corpus)).repeat_interleave(count)
        captions = [r + self._end for references in corpus for r in references]
        for rows, _ in self._ngrams(captions):
            grams = torch.unique(clip[rows >> 32] << 32 | rows & LOW) & LOW    # once a clip
            self._idf.append(self._unseen - torch.bincount(grams).double().log())

    def _ngrams(self, captions):
        """For n = 1..4: the distinct n-grams of each caption, and their counts, both (R,).

        An n-gram is caption << 32 | number, sorted. Its number is its index in the corpus;
        those that are not there follow, in these captions' order.
        """
        # captions that are scored must not change the corpus's numbers
        table = dict(self._words) if self._known else self._words
        ids = [[table.setdefault(w, len(table)) for w in c.split()] for c in captions]
        length = torch.tensor([len(row) for row in ids], dtype=torch.long)
        caption = torch.arange(len(ids)).repeat_interleave(length)
        ids = torch.tensor([i for row in ids for i in row] + [0] * 4, dtype=torch.long)
        caption_or_end = torch.cat([caption, caption.new_full((4,), -1)])
        start = torch.arange(len(caption))  # of each n-gram
        number = torch.zeros_like(start)  # of its first n - 1 words
        for n in range(4):
            inside = caption_or_end[start + n] == caption[start]
            start, number = start[inside], number[inside]
            key = number << 31 | ids[start + n]
            if n == len(self._known):  # this is the corpus
                sentinel = key.new_tensor([1 << 62])
                self._known.append(torch.unique(torch.cat([key, sentinel])))
            known = self._known[n]
            number = torch.searchsorted(known, key)
            new = known[number] != key
            number[new] = len(known) - 1 + torch.unique(key[new], return_inverse=True)[1]
            yield torch.unique(caption[start] << 32 | number, return_counts=True)

    def score_many(self, hypotheses, references, ended=None):
        """Scores in [0, 10], float64, (n,); references[i] belongs to hypotheses[i].

        ended: which hypotheses stop with an end token; None: all.
        """
        ended = [True] * len(hypotheses) if ended is None else ended
        captions = [h + (self._end if e else "") for h, e in zip(hypotheses, ended, strict=True)]
        row = {}  # of each distinct reference
        for reference in (r for some in references for r in some):
            row.setdefault(reference, len(captions) + len(row))
        captions += [reference + self._end for reference in row]
        count = torch.tensor([len(some) for some in references])
        left = torch.arange(len(hypotheses)).repeat_interleave(count)   # pairs of hypothesis
        right = [row[r] for some in references for r in some]  # and reference
        right = torch.tensor(right, dtype=torch.long)
        total = torch.zeros(len(left), dtype=torch.float64)
        for n, (rows, counts) in enumerate(self._ngrams(captions)):
            caption, gram = rows >> 32, rows & LOW
            unseen = self._idf[n].new_full((len(rows),), self._unseen)
            weight = counts * torch.cat([self._idf[n], unseen])[gram]   # tf-idf
            norm = torch.bincount(caption, weight ** 2, len(captions)).sqrt()
            if n == 1:  # lengths in bigrams
                length = torch.bincount(caption, counts.double(), len(captions))
            dot = self._dot_products(rows, weight, left, right, len(captions))
            norms = norm[left] * norm[right]
            total += dot / torch.where(norms > 0, norms, 1.0)
        total *= torch.exp(-(length[left] - length[right]) ** 2 / 72)   # 2 sigma^2
        return 10 / 4 * torch.bincount(left, total, len(hypotheses)) / count

    @staticmethod
    def _dot_products(rows, weight, left, right, captions):
        """Clipped dot products of the tf-idf vectors of each pair of captions, (pairs,)."""
        caption, gram = rows >> 32, rows & LOW
        size = torch.bincount(caption, minlength=captions)  # n-grams of a caption
        # every n-gram of a pair's hypothesis...
        pair = torch.arange(len(left)).repeat_interleave(size[left])
        before = size[left].cumsum(0) - size[left]
        mine = torch.arange(len(pair)) - before[pair] + (size.cumsum(0) - size)[left][pair]
        # ...and its position among the reference's, if it is there
        wanted = right[pair] << 32 | gram[mine]
        other = torch.searchsorted(rows, wanted).clamp(max=len(rows) - 1)
        both = rows[other] == wanted
        pair, mine, other = pair[both], mine[both], other[both]
        product = torch.minimum(weight[mine], weight[other]) * weight[other]
        return torch.bincount(pair, product, len(left))


def words(caption):
    """A caption as the reward reads it: lower case, words and numbers, without Java."""
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)?", caption.lower()))


def cider_d(hypotheses, references):
    """Scores of a whole set, a list; document frequencies from its own references."""
    return CiderD(references).score_many(hypotheses, references).tolist()


def leave_one_out(rewards):
    """Advantage of each sample over the mean of the clip's other samples; (B, K) -> (B, K).

    K/(K-1) * (reward - mean). Unbiased: no sample is in its own baseline (Kool et al. 2019).
    """
    K = rewards.shape[1]
    if K < 2:
        raise ValueError("a leave-one-out baseline needs at least 2 samples a clip")
    return (rewards - rewards.mean(1, keepdim=True)) * (K / (K - 1))


def scst_loss(logprobs, mask, advantage):
    """Policy gradient of the expected reward: - sum(advantage * log p(token)) / tokens.

    logprobs (B, K, T) of the sampled tokens, with gradient; mask (B, K, T), True up to and with
    the end token; advantage (B, K). Rennie et al. 2017, with a leave-one-out baseline.
    """
    if logprobs.shape != mask.shape or logprobs.shape[:2] != advantage.shape:
        shapes = [tuple(x.shape) for x in (logprobs, mask, advantage)]
        raise ValueError(f"shapes {shapes} do not belong together: (B, K, T) twice, (B, K)")
    mask = mask.to(logprobs.dtype)
    return -(advantage.detach()[..., None] * logprobs * mask).sum() / mask.sum().clamp(min=1)


# ---------------------------------------------------------------- samples as a tree

@dataclass
class Tree:
    """K samples of each of B clips; what samples of a clip begin with is there once.

    A clip's row holds the prompt and then the positions from which tokens were drawn, L in all.
    """
    states: torch.Tensor  # (B, L, D): the trunk's output
    position_ids: torch.Tensor    # (B, L): as if each sample followed the prompt alone
    attention_mask: torch.Tensor  # (B, 1, L, L): True for the prompt and what is continued
    position: torch.Tensor        # (draws,): where a distinct token was drawn, of B * L
    # on the CPU, as the bookkeeping of the draws:
    token: torch.Tensor           # (draws,)
    path: torch.Tensor            # (B * K, T): the draws of each sample
    mask: torch.Tensor            # (B * K, T), True up to and with the end token

    def samples(self):
        """Token ids of each sample, a list of B * K lists."""
        return [self.token[draws[real]].tolist() for draws, real in zip(self.path, self.mask)]

    def logprobs(self, hidden, lm_head, temperature=1.0):
        """log p of every sampled token, (B * K, T), from the decoder's states (B, L, D)."""
        logits = policy_logits(hidden.flatten(0, 1)[self.position], lm_head, temperature)
        device = hidden.device
        token = self.token.to(device, non_blocking=True)
        path = self.path.to(device, non_blocking=True)
        return -F.cross_entropy(logits, token, reduction="none")[path]


def policy_logits(hidden, lm_head, temperature):
    """Logits of the policy, (..., D) -> (..., V), in float32: at a low temperature bfloat16
    would make the sampled policy and the learned one differ."""
    return lm_head(hidden).float() / temperature


@torch.no_grad()
def sample_tree(decoder, lm_head, prompt, K, *, layer, eos, max_tokens, temperature=1.0,
                rows=nullcontext):
    """K samples of each row of a prompt (B, P), at most `max_tokens` long, as a Tree.

    The samples are independent: each draws its own next token. What samples of a clip have
    in common is computed once, and nothing is computed for those that have ended. The states
    are the input of decoder block `layer`. rows: a context for each pass, called with the clip
    of each row, (rows,): with something attached, `Fusion.rows`. The host waits for the decoder
    once a token, to read the draws, which are kept on the CPU. A copy to the GPU that blocks
    would wait for it too.
    """
    from transformers import DynamicCache
    (B, P), device = prompt.shape, prompt.device
    cache, states = DynamicCache(config=decoder.config), []

    # the first hook of its block: it sees the states before a fusion changes them
    keep_input = decoder.layers[layer].register_forward_pre_hook(
        lambda block, args: states.append(args[0]), prepend=True)
    tokens = prompt  # (rows, 1) from the second pass on
    clip = torch.arange(B)                  # of each row
    position = torch.full((B,), P - 1)      # of each row in its clip's Tree
    ancestors = torch.empty(B, 0, dtype=torch.long)   # what each row continues
    active = torch.arange(B * K)            # samples that have not ended
    row = clip.repeat_interleave(K)         # of each active sample
    used = torch.full((B,), P)              # positions taken in each clip's Tree
    draws, grown, paths, drawn = [], [], [], 0
    with keep_input:
        for t in range(max_tokens):
            with rows(clip.to(device, non_blocking=True)):
                out = decoder(input_ids=tokens, past_key_values=cache, use_cache=True)
            logits = policy_logits(out.last_hidden_state[:, -1], lm_head, temperature)
            row = row.to(device, non_blocking=True)
            drawn_now = _draw(logits.softmax(-1), row).cpu()
            pairs, pair = torch.unique(drawn_now, return_inverse=True)
            parent, token = pairs // logits.shape[1], pairs % logits.shape[1]
            path = torch.full((B * K,), -1)
            path[active] = drawn + pair
            paths.append(path)
            drawn += len(pairs)
            draws.append((clip[parent], position[parent], token))
            alive = token != eos
            if t + 1 == max_tokens or not alive.any():
                break
            survives = alive[pair]
            active = active[survives]
            row = (alive.cumsum(0) - 1)[pair][survives]
            parent, tokens = parent[alive], token[alive][:, None].to(device, non_blocking=True)
            cache.batch_select_indices(parent.to(device, non_blocking=True))
            clip = clip[parent]  # ascending, as the rows are
            rank = torch.arange(len(clip)) - torch.searchsorted(clip, clip)
            position = used[clip] + rank
            used = used + torch.bincount(clip, minlength=B)
            ancestors = torch.cat([ancestors[parent], position[:, None]], 1)
            grown.append((clip, position, ancestors))
    tree = _pack(states, draws, grown, paths, int(used.max()))
    tree.attention_mask = _windowed(tree, decoder.config)
    return tree


def _windowed(tree, config):
    """The Tree's attention mask within the decoder's sliding window, if it has one.

    For a decoder whose layers differ: {"full_attention": mask, "sliding_attention": mask}.
    """
    mask, window = tree.attention_mask, getattr(config, "sliding_window", None)
    if window is None:
        return mask
    position = tree.position_ids[:, None]                            # (B, 1, L)
    sliding = mask & (position[..., None] - position[..., None, :] < window)
    if getattr(config, "layer_types", None):
        return {"full_attention": mask, "sliding_attention": sliding}
    return sliding


def _draw(probabilities, row):
    """row * V + token: one token for each sample from the distribution of its row.

    probabilities (rows, V), row (active,) -> (active,). By inversion of the cumulative
    distribution in float64; torch.multinomial is slower.
    """
    V = probabilities.shape[1]
    cumulative = probabilities.double().cumsum(-1)[row]      # (active, V)
    uniform = torch.rand(len(row), 1, dtype=torch.float64, device=row.device)
    token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return row * V + token.clamp(max=V - 1)[:, 0]


def _pack(states, draws, grown, paths, L):
    """The Tree of what sample_tree has drawn, padded to L positions a clip."""
    (B, P, D), device = states[0].shape, states[0].device
    packed = states[0].new_zeros(B, L, D)
    packed[:, :P] = states[0]
    position_ids = torch.arange(L).expand(B, L).clone()
    mask = torch.zeros(B, L, L, dtype=torch.bool)
    mask[:, :, :P] = torch.ones(L, P, dtype=torch.bool).tril()
    if grown:
        index = torch.cat([clip * L + position for clip, position, _ in grown])
        index = index.to(device, non_blocking=True)
        packed.view(B * L, D)[index] = torch.cat([new[:, 0] for new in states[1:]])
    for depth, (clip, position, ancestors) in enumerate(grown):
        position_ids[clip, position] = P + depth
        mask[clip[:, None], position[:, None], ancestors] = True
    clip, position, token = (torch.cat(part) for part in zip(*draws))
    path = torch.stack(paths, 1)
    position_ids, mask = (x.to(device, non_blocking=True) for x in (position_ids, mask[:, None]))
    position = (clip * L + position).to(device, non_blocking=True)
    return Tree(packed, position_ids, mask, position, token, path.clamp(min=0), path >= 0)


def demo():
    torch.manual_seed(0)
    words = "a dog cat barks meows loudly twice".split()
    references = [["a dog barks loudly", "a dog barks twice"],
                  ["a cat meows", "a cat meows twice"]]
    reward, B, K, T = CiderD(references), 2, 16, 4
    policy = torch.zeros(B, T, len(words), requires_grad=True)  # logits, one row a position
    optimizer = torch.optim.Adam([policy], lr=0.1)
    for step in range(201):
        choice = torch.distributions.Categorical(logits=policy[:, None].expand(B, K, T, len(words)))
        samples = choice.sample()  # (B, K, T)
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
