"""Does a branch open for the meaning of a question, or for its words? The share of attention that reads the clip.

    python tests/senses.py AUDIO_RUN --with VIDEO_RUN --out senses.json
    python tests/senses.py AUDIO_s0,AUDIO_s1 --with VIDEO_s0,VIDEO_s1 --limit-clips 20 --out senses.json

A branch with a null slot can read nothing. Its share is 1 minus the weight of the null slot, a mean over heads, layers
and clips. `open` is the share where the answer is written: at the last position of the prompt and at the tokens of the
model's own greedy answer. `open_last` is that of the last position of the prompt alone, `open_prompt` that of all its
positions; a prompt's first few ("USER:") come before the question and read the same whatever it is.

The audio branch and the video branch are attached together, each beside a clip of its own test split that has nothing
to do with the other's. Questions about sound and video are asked without a picture, questions about images with one;
`open_swapped` is `open_last` the other way round.

Shapes: B clips of a batch, N clips in all, P positions of a prompt, T tokens of an answer.
"""
import argparse
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402  first of the repository: it makes torchaudio importable
import evaluate  # noqa: E402
import fusion as fusions  # noqa: E402

import torch  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from tqdm import tqdm  # noqa: E402

TRAINED = {"audio": data.SOUND_PROMPT, "video": data.VIDEO_PROMPT}
WORD = {"audio": "sound", "video": "video"}  # of the trained prompt: half of the paraphrases have it, half do not
PARAPHRASES = {
    "audio": [
        "Describe this sound.", "Please describe the sound.", "Describe the sound in a sentence.", "What is the sound?",
        "What sound is this?", "What makes the sound?", "Caption the sound.", "Write a caption for the sound.",
        "Tell me about the sound.", "What is happening in the sound?",
        "What do you hear?", "What can be heard?", "What is heard?", "Describe what you hear.", "Describe the audio.",
        "Describe the noise.", "What is the noise?", "Write a caption for the audio.",
        "Listen and tell me what is happening.", "What are you listening to?"],
    "video": [
        "Describe this video.", "Please describe the video.", "Describe the video in a sentence.",
        "What is in the video?", "What does the video show?", "What happens in the video?", "Caption the video.",
        "Write a caption for the video.", "Tell me about the video.", "What is shown in the video?",
        "What are you watching?", "What is moving?", "What happens on the screen?", "Describe what is moving.",
        "Describe the film.", "Describe the clip.", "Describe the movie.", "Write a caption for the film.",
        "Watch and tell me what is happening.", "What do you see in the footage?"]}
YES_OR_NO = {
    "audio": ["Is there a dog barking?", "Is it raining?", "Does a bell ring?", "Can you hear a siren?",
              "Is somebody talking?", "Is the sound loud?"],
    "video": ["Is the shape moving?", "Does the shape move to the left?", "Does something move in the video?",
              "Is the video in color?"]}
ABOUT_IMAGES = [
    "What color is the shape?", "What shape is shown?", "How many shapes are there?", "Where is the shape?",
    "Is the shape red?", "Is there more than one shape?",
    "Describe the image.", "Describe the picture.", "Describe this image.", "What is in the image?",
    "What is in the picture?", "What does the picture show?", "Write a caption for the image.", "What do you see?",
    "Which color is it?", "Is the shape blue?", "Is there a circle?", "How many squares are there?",
    "What is on the left?", "Is the picture dark?"]
CAPTIONS = ("trained", "paraphrase")  # kinds of questions whose answers are scored; yes and no are no captions
SHARES = ("open", "open_last", "open_prompt", "open_swapped", "open_layers")


def questions():
    """[{"text", "sense", "trained", "kind"}]; kind: trained, paraphrase, yes/no, image."""
    rows = []
    for sense, trained in TRAINED.items():
        for kind, texts in (("trained", [trained]), ("paraphrase", PARAPHRASES[sense]), ("yes/no", YES_OR_NO[sense])):
            for text in texts:
                rows.append({"text": text, "sense": sense, "trained": kind == "trained", "kind": kind})
    for text in ABOUT_IMAGES:
        rows.append({"text": text, "sense": "image", "trained": False, "kind": "image"})
    return rows


# ---------------------------------------------------------------- reading the weights

@contextmanager
def recorded(branches):
    """In this block: {modality: {layer: (B, T)}}, the share of attention that reads the clip in the latest pass.

    A mean over heads. Attention computes what it would compute without this block.
    """
    attend, owners, shares = fusions.attend, {}, {}
    for branch in branches:
        modality = branch.fusion.spec.modality
        shares[modality] = {}
        for layer, null in branch.fusion.null.items():
            owners[id(null)] = modality, int(layer)

    def recording(query, key, value, null=None):
        modality, layer = owners[id(null)]
        # where every value is one and the null slot's is zero, what is read is the share
        share = attend(query, key, torch.ones_like(value), null)                 # (B, T, H * d)
        shares[modality][layer] = share.float().mean(-1).cpu()
        return attend(query, key, value, null)

    with mock.patch.object(fusions, "attend", recording):
        yield shares


def ask(backbone, branches, text, pictures):
    """A question asked beside each clip: (greedy answers (N,), shares, as `shares_of` has them).

    pictures: a path for each clip, or None for none.
    """
    asked = [data.Question("", picture, text, "", "") for picture in pictures]
    rows = evaluate.Probe(backbone, asked, 64).run(branches, likelihood=False, max_new_tokens=evaluate.MAX_NEW_TOKENS)
    answers = [row["answer"] for row in rows]
    return answers, shares_of(backbone, branches, text, pictures, answers)


@torch.inference_mode()
def shares_of(backbone, branches, text, pictures, answers, batch_size=32):
    """{modality: {layer: {"answer", "last", "prompt": (N,)}}}: the share of attention that reads the clip.

    answer: at the positions that predict the answer and its end. last: at the first of them, which ends the prompt.
    prompt: at all of the prompt's positions.
    """
    found = {}
    for first in range(0, len(answers), batch_size):
        clips = range(first, min(first + batch_size, len(answers)))
        encoded = [backbone.encode(text, pictures[i])[:2] for i in clips]
        prompt = torch.tensor([ids for ids, _ in encoded])                       # (B, P): one text, one length
        tokens = [torch.tensor(backbone.caption_ids(text, answers[i])) for i in clips]
        # nothing looks ahead: padding on the right changes no position before it
        whole = torch.cat([prompt, pad_sequence(tokens, True, backbone.pad)], 1)  # (B, P + T)
        inputs = {"input_ids": whole.to(backbone.device)}
        if pictures[first] is not None:
            pixels = torch.stack([picture for _, picture in encoded])
            inputs["pixel_values"] = pixels.to(backbone.device, backbone.llava.dtype)
        with recorded(branches) as shares, backbone.autocast():
            with fusions.attach_branches(backbone.decoder, branches, clips):
                backbone.llava.model(**inputs, use_cache=False)
        last = prompt.shape[1] - 1
        for modality, layers in shares.items():
            for layer, share in layers.items():
                parts = found.setdefault(modality, {}).setdefault(layer, {"answer": [], "last": [], "prompt": []})
                # the state before a token predicts it
                parts["answer"] += [row[last:last + len(t)].mean() for row, t in zip(share, tokens)]
                parts["last"] += share[:, last]
                parts["prompt"] += share[:, :last + 1].mean(1)
    for layers in found.values():
        for parts in layers.values():
            parts |= {name: torch.stack(values) for name, values in parts.items()}
    return found


def over_layers(shares, name):
    """{modality: a mean over clips and layers}."""
    return {modality: mean(parts[name].mean().item() for parts in layers.values())
            for modality, layers in shares.items()}


# ---------------------------------------------------------------- one pair of runs

class Pair:
    """An audio run and a video run, attached together, with N clips for each."""

    def __init__(self, audio, video, args):
        first = evaluate.open_run(audio, args.device, args.dtype)
        self.runs = [first, *evaluate.open_others(first, [video], args.device, args.dtype)]
        inputs = []
        for run, modality in zip(self.runs, TRAINED):
            if run.config["modality"] != modality:
                raise data.InputError(f"{run.folder}: is a run with {run.config['modality']}, not with {modality}")
            if not getattr(run.fusion, "null", None):
                raise data.InputError(f"{run.folder}: has no null slot, its attention cannot read nothing; "
                                      "train.py --null-slot makes one")
            inputs.append(data.load_inputs([run.config], "test", args.device))
        self.n = min(args.limit_clips, *(len(i.split.clips) for i in inputs))
        # the two splits are of different data: clip i of one has nothing to do with clip i of the other
        frames = [i.frames[0].take(range(self.n)) for i in inputs]
        self.clips = dict(zip(TRAINED, (i.split.clips[:self.n] for i in inputs)))
        self.branches = evaluate.attached(self.runs, frames)
        self.pictures = pictures(args.qa or first.config.get("probe"), first.config, self.n)

    def measure(self, row):
        """({each of SHARES: {modality: value}}, answers) of one question."""
        natural, swapped = [None] * self.n, self.pictures
        if row["sense"] == "image":
            natural, swapped = swapped, natural
        backbone = self.runs[0].backbone
        answers, shares = ask(backbone, self.branches, row["text"], natural)
        # not answered, to save time
        others = shares_of(backbone, self.branches, row["text"], swapped, [""] * self.n)
        layers = {}
        for modality, found in shares.items():
            layers[modality] = {layer: parts["answer"].mean().item() for layer, parts in sorted(found.items())}
        return {"open": over_layers(shares, "answer"), "open_last": over_layers(shares, "last"),
                "open_prompt": over_layers(shares, "prompt"), "open_swapped": over_layers(others, "last"),
                "open_layers": layers}, answers

    def cider_d(self, sense, answers):
        """Of answers to a question, one a clip, against the captions of that sense's clips."""
        items = evaluate.make_items(self.clips[sense], [{"text": answer} for answer in answers])
        return evaluate.score(items, select="cider_d")["corpus"]["cider_d"]


def pictures(qa, config, n):
    """Paths of n pictures of a file of questions about images, each one once until all have been taken."""
    if not qa:
        raise data.InputError("--qa FILE: questions about images need pictures, and the run names no file of them")
    asked, _ = data.read_qa(data.from_folder(qa, config.get("folder", ".")))
    paths = sorted({q.image for q in asked})
    return [paths[i % len(paths)] for i in range(n)]


# ---------------------------------------------------------------- all runs

def measure(audio, video, args):
    """What --out holds, after each pair of runs: every question, with a number for each seed."""
    rows = questions()
    for row in rows:
        row |= {name: {"audio": [], "video": []} for name in SHARES}
        if row["kind"] in CAPTIONS:
            row["cider_d"] = {row["sense"]: []}
    for k in range(max(len(audio), len(video))):
        # where there are fewer runs of one sense they are attached again, and counted once
        new = {"audio": k < len(audio), "video": k < len(video)}
        pair = Pair(audio[k % len(audio)], video[k % len(video)], args)
        answers = []
        for row in tqdm(rows, f"{pair.runs[0].name} with {pair.runs[1].name}", leave=False):
            found, texts = pair.measure(row)
            answers.append(texts)
            row.setdefault("examples", texts[:2])
            for name in SHARES:
                for modality, value in found[name].items():
                    if new[modality]:
                        row[name][modality].append(value)
        # one call of Java for all of them, which every score then finds done
        evaluate.tokenise([text for texts in answers for text in texts])
        for row, texts in zip(rows, answers):
            if row["kind"] in CAPTIONS and new[row["sense"]]:
                row["cider_d"][row["sense"]].append(pair.cider_d(row["sense"], texts))
        yield {"runs": {"audio": audio[:k + 1], "video": video[:k + 1]}, "n": pair.n, "prompts": rows,
               "summary": {name: summarise(rows, name) for name in ("open", "open_last")}}


def summarise(rows, name):
    """{modality: counts}: which questions open a branch by more than half of what its trained prompt does?

    name: one of SHARES.
    """
    summary = {}
    for modality, word in WORD.items():
        (trained,) = (row for row in rows if row["trained"] and row["sense"] == modality)
        half = mean(trained[name][modality]) / 2
        groups = {"paraphrases_with_word": [], "paraphrases_without_word": [], "yes_or_no": [], "others": []}
        for row in rows:
            opens = mean(row[name][modality]) > half
            if row["sense"] != modality:
                groups["others"].append(not opens)
            elif row["kind"] == "yes/no":
                groups["yes_or_no"].append(opens)
            elif row["kind"] == "paraphrase":
                has_word = re.search(rf"\b{word}\b", row["text"])
                groups["paraphrases_with_word" if has_word else "paraphrases_without_word"].append(opens)
        # of the others it counts that the branch stays below
        summary[modality] = {"trained": 2 * half}
        for group, hits in groups.items():
            summary[modality][group] = {"right": sum(hits), "of": len(hits)}
    return summary


# ---------------------------------------------------------------- a table for people

def print_tables(result):
    rows = result["prompts"]
    print(f"\nn = {result['n']} clips; mean over questions [lowest, highest]")
    titles = {"open": "share of attention that reads the clip, where the answer is written",
              "open_last": "the same at the last position of the prompt alone",
              "open_swapped": "there, with a picture instead of none and the reverse"}
    for name, title in titles.items():
        last = "   CIDEr-D" if name == "open" else ""
        print(f"\n{title}\n{'questions':26s} {'audio branch':>21s} {'video branch':>21s}{last}")
        for group, some in groups(rows):
            cells = [spread([mean(row[name][modality]) for row in some]) for modality in TRAINED]
            scores = [mean(values) for row in some for values in row.get("cider_d", {}).values() if values]
            scores = spread(scores) if name == "open" else ""
            print(f"{group:26s} {cells[0]:>21s} {cells[1]:>21s}   {scores}".rstrip())
    for name, title in (("open", "where the answer is written"), ("open_last", "at the last position of the prompt")):
        print(f"\nabove half of the trained prompt's share, others below it, {title}")
        for modality, counts in result["summary"][name].items():
            parts = [f"trained {counts['trained']:.3f}"]
            for group, count in counts.items():
                if group != "trained":
                    parts.append(f"{group.replace('_', ' ')} {count['right']} of {count['of']}")
            print(f"{modality} branch: {', '.join(parts)}")
    print("\naudio video  question  →  an answer")
    for row in rows:
        audio, video = (mean(row["open"][modality]) for modality in TRAINED)
        print(f"{audio:.3f} {video:.3f}  {row['text']}  →  {row['examples'][0]}")


def groups(rows):
    """[(title, questions)]: the lines of the table."""
    found = []
    for sense, word in WORD.items():
        own = [row for row in rows if row["sense"] == sense]
        paraphrases = [row for row in own if row["kind"] == "paraphrase"]
        with_word = [row for row in paraphrases if re.search(rf"\b{word}\b", row["text"])]
        without = [row for row in paraphrases if row not in with_word]
        found += [(f"{sense}: trained", [row for row in own if row["trained"]]), (f"{sense}: paraphrases", paraphrases),
                  (f"  with the word “{word}”", with_word), ("  without it", without),
                  (f"{sense}: yes/no", [row for row in own if row["kind"] == "yes/no"])]
    return [*found, ("image", [row for row in rows if row["sense"] == "image"])]


def spread(values):
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("audio", metavar="AUDIO_RUN[,RUN...]", help="folders of runs with audio, one a seed")
    p.add_argument("--with", dest="video", metavar="VIDEO_RUN[,RUN...]", required=True,
                   help="folders of runs with video, attached to those in the same order")
    p.add_argument("--out", metavar="FILE", required=True, help="the file for all numbers, JSON")
    p.add_argument("--limit-clips", type=int, default=60, help="the first so many of the test splits")
    p.add_argument("--qa", metavar="FILE", help="questions about images, for their pictures; default: the audio run's "
                   "--probe")
    data.add_device_flags(p)
    args = p.parse_args(argv)
    if args.limit_clips < 1:
        p.error("--limit-clips must be at least 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    for result in measure(args.audio.split(","), args.video.split(","), args):
        data.write_json(args.out, result)  # also before the last pair: a pair takes minutes
    print_tables(result)
    print(f"\n{args.out}")


if __name__ == "__main__":
    data.guarded(main, fusions.FusionError)
