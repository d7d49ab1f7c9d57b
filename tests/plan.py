"""GPU-hours and disk of `SCALE=full bash run_all.sh`, phase by phase, before anything is spent.

    DRY=1 SCALE=full bash run_all.sh                                     # pipes its commands through this
    DRY=1 SCALE=full bash run_all.sh | python tests/plan.py --rate 120   # TFLOP/s reached; default 40% of 989

Repeats the commands of a dry run. Costs are operations of LLaVA-1.5-7B's matrix products, counted once by
`python tests/bench.py time7b`, times what each command does at most: all steps, no early stop. A first layer that
was not counted costs what 12 does. Left out: loading, the encoders, Java, the answers that --keep keeps. Decoding is
limited by memory more than by operations, and takes longer than this.
"""
import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
import train  # noqa: E402

PROMPT = 16             # positions of the prompt
CAPTION = 14            # tokens of a caption, with the end token
QUESTION = 576 + 40     # positions of a question about an image, 576 of them the image's
ANSWER = 24             # tokens of an answer at most
WIDTH, FRAMES, ENCODER_WIDTH = 4096, 32, 768

# TFLOP, from `python tests/bench.py time7b`
TERAFLOP = {
    # system and its first layer: an XE step, SCST's pass through the tree of 5 samples; a clip
    "training": {
        ("additive", 12): (0.494, 1.430), ("additive", 24): (0.202, 0.595),
        ("cross_attention", 12): (0.494, 1.432), ("cross_attention", 24): (0.202, 0.595),
        ("concat", 12): (0.753, 1.689), ("unfreeze", 12): (0.543, 1.571)},
    "drawing": 1.066,       # 5 samples of a clip
    "caption": 3.081,       # a clip, beam 5, scored once more
    "question": 17.315,     # about an image: an answer, and the likelihood of the right one
    "trunk": 0.000405,      # a position through one block
}
# clips of the released splits; of the audio-visual set, which people bring themselves, a guess
CLIPS = {"audiocaps": {"train": 49838, "val": 495, "test": 975},
         "clotho": {"train": 3839, "val": 1045, "test": 1045},
         "av": {"train": 10000, "val": 1000, "test": 1000}}
REFERENCES = {"audiocaps": 1, "clotho": 5, "av": 1}   # of a training clip
CONDITIONS = 4          # that the retention probe asks all questions: unrelated clip, silence, noise, conflict
EXACT = 3               # that it asks one batch: gates closed, no clip, nothing attached


def clips_of(dataset, limit):
    """{split: clips}; limit: the first clips of each alone, 0 is all."""
    return {split: min(limit, n) or n for split, n in CLIPS[dataset].items()}


def training_cost(args):
    """TFLOP of a train.py command at most."""
    clips = clips_of(args.dataset, args.limit_clips)
    system = "additive" if args.fusion == "data_only" else args.fusion  # the same products
    counted = TERAFLOP["training"]
    xe, tree = counted.get((system, min(args.layers)), counted[system, 12])
    captions = clips["train"] * REFERENCES[args.dataset]
    total = captions * (PROMPT + CAPTION) * min(args.layers) * TERAFLOP["trunk"]
    total += args.steps * args.batch_size * xe
    steps = args.steps
    if args.scst != "off":
        total += args.scst_steps * args.batch_size * (TERAFLOP["drawing"] + tree)
        steps += args.scst_steps
    if args.keep:  # a micro-batch of questions a step
        questions = steps // args.keep_every * args.micro_batch
        total += questions * xe * QUESTION / (PROMPT + CAPTION)
    every = args.eval_every or max(1, clips["train"] // args.batch_size)
    return total + steps // every * clips["val"] * greedy()


def greedy():
    """TFLOP of a greedy caption: one beam of five."""
    return TERAFLOP["caption"] / 5


def evaluation_cost(args, dataset):
    """TFLOP of an evaluate.py command, for its runs on this dataset. Branches of --with cost next to nothing."""
    clips = clips_of(dataset, getattr(args, "limit_clips", 0))  # decide and check have no clips
    if args.command == "caption":
        decoded = clips[args.split] * len(args.hear)
        if args.rerank:  # five samples too; the weights are fitted on validation
            decoded = 2 * (decoded + clips["val"])
        cost = decoded * TERAFLOP["caption"]
    elif args.command == "retention":
        asked = CONDITIONS * args.limit_questions + EXACT * min(args.batch_size, args.limit_questions)
        # the runs of a process share the answers of the backbone alone
        return (args.limit_questions + asked * len(args.runs)) * TERAFLOP["question"]
    elif args.command == "robustness":
        cost = (1 + len(args.snr) * len(args.noise)) * clips["test"] * greedy()
    else:
        return 0.0
    return cost * len(args.runs)


def cost(line):
    """TFLOP of one line of a dry run; 0 for what needs no model."""
    # only what follows the script: bash quotes other commands in ways that shlex does not know
    _, script, flags = line.partition(" train.py ")
    if script:
        return training_cost(train.parse_args(shlex.split(flags, comments=True)))
    _, script, flags = line.partition(" evaluate.py ")
    if script:
        args = evaluate.parse_args(shlex.split(flags, comments=True))
        names = " ".join(getattr(args, "runs", []))
        own = "clotho" if "/clotho/" in names else "av" if "/video/" in names else "audiocaps"
        return evaluation_cost(args, getattr(args, "dataset", None) or own)
    return 0.0


def disk():
    """{what: GB}: caches of the full scale."""
    clips = sum(CLIPS["audiocaps"].values())
    captions = CLIPS["audiocaps"]["train"]
    return {
        "AudioCaps' features, once": clips * FRAMES * ENCODER_WIDTH * 2 / 1e9,
        "AudioCaps' trunk states, while a run trains": captions * CAPTION * WIDTH * 2 / 1e9}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rate", type=float, default=0.4 * 989, help="TFLOP/s that are reached; default: 40%% of 989")
    args = p.parse_args(argv)
    phase, phases = "", {}
    for line in sys.stdin:
        if not line.startswith(("# all: ", "# disk: ")) and " GPU-hours " not in line:  # of a pipe before this
            print(line, end="")
        if line.startswith("# phase "):
            phase = line.split(":")[0].removeprefix("# ")
        phases[phase] = phases.get(phase, 0.0) + cost(line)
    phases["all"] = sum(phases.values())
    for name, value in phases.items():
        if value:
            print(f"# {name}: {value / args.rate / 3600:.1f} GPU-hours at {args.rate:.0f} TFLOP/s, at most")
    for what, gigabytes in disk().items():
        print(f"# disk: {gigabytes:.1f} GB for {what}")


if __name__ == "__main__":
    main()
