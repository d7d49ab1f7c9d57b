"""How many captions of a run name the right one of the ten sounds of ESC-10? Chance is 10%.

    python tests/own_sounds.py experiments/own/core/additive_s0
"""
import json
import re
import sys
from pathlib import Path

SOUNDS = {  # what a caption must hold to name the sound; no two share a word
    "dog": r"dogs?|barks?|barking|puppy", "rain": r"rain\w*", "sea": r"waves?|sea|surf|ocean",
    "baby": r"bab(y|ies)|infant|crying|cries", "clock": r"clocks?|tick\w*", "sneeze": r"sneez\w*",
    "helicopter": r"helicopters?|rotor", "chainsaw": r"chainsaws?|saw", "rooster": r"roosters?|cockerel|crow\w*",
    "fire": r"fire|fireplace|flames?|crackl\w*|burn\w*"}


def named(caption):
    return {sound for sound, words in SOUNDS.items() if re.search(rf"\b({words})\b", caption.lower())}


def main():
    for run in sys.argv[1:]:
        items = json.loads((Path(run) / "predictions.json").read_text(encoding="utf-8"))
        right = 0
        for item in items:
            counts = [s for r in item["references"] for s in named(r)]
            if not counts:
                sys.exit(f"error: {run}: none of {item['references']} names one of {', '.join(SOUNDS)}: this is for ESC-10")
            truth = max(set(counts), key=counts.count)  # some references name no sound: the majority decides
            right += named(item["prediction"]) == {truth}
        print(f"{run}: {right} of {len(items)} captions name the right sound alone ({right / len(items):.0%})")


if __name__ == "__main__":
    main()
