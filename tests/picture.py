"""Draw tests/additive.png, the additive layer for README.md: python tests/picture.py (needs matplotlib)."""
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

FROZEN = {"fc": "#E5E7EB", "ec": "#6B7280", "lw": 1.2}
TRAINED = {"fc": "#FFD89B", "ec": "#B45309", "lw": 2.4}  # a thicker line tells them apart in grey too
INK, AUDIO = "#1F2937", "#0072B2"
TOKEN = {"fc": "#BFDFF5", "ec": AUDIO, "lw": 1.2}

figure = Figure((9, 5.4))
ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 90), ylim=(0, 54), frame_on=False, xticks=(), yticks=())


def label(x, y, text, size=12, ha="center"):
    ax.text(x, y, text, ha=ha, va="center", fontsize=size, color=INK, linespacing=1.3, zorder=4)


def box(x, y, width, height, text, look):
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.8", zorder=3, **look))
    label(x + width / 2, y + height / 2, text)


def arrow(*points, color=INK):
    for start, end in zip(points, points[1:]):
        style = "-|>" if end == points[-1] else "-"
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=14, lw=1.7, color=color,
                                     shrinkA=0, shrinkB=0, capstyle="projecting", zorder=2))


# from the clip to its tokens
label(13, 51.5, "audio clip")
arrow((13, 50), (13, 46.5), color=AUDIO)
box(3, 40, 20, 6.5, "CLAP encoder", FROZEN)
arrow((13, 40), (13, 36), color=AUDIO)
box(3, 29.5, 20, 6.5, "projector", TRAINED)
arrow((13, 29.5), (13, 25.5), color=AUDIO)
for k in range(6):
    box(3.4 + 3.3 * k, 21.5, 2.6, 4, "", TOKEN)
label(13, 19, "N audio tokens A")

# the decoder, and what is added to the input of two layers
for y, layers in ((5, "layers 0–11"), (24.5, "layers 12–23"), (44, "layers 24–31")):
    box(69, y, 18, 5.2, layers, FROZEN)
for y, text, start, end in ((1.4, "image and text", 2.6, 5), (52.8, "caption", 49.2, 51.7)):
    label(78, y, text)
    arrow((78, start), (78, end))
label(67.5, 46.6, "frozen LLaVA\ndecoder", ha="right")
for y, layer in ((10.2, 12), (29.7, 24)):
    arrow((78, y), (78, y + 14.3))
    arrow((22.5, 23.5), (27.5, 23.5), (27.5, y + 9.5), (32, y + 9.5), color=AUDIO)
    box(32, y + 6.5, 13, 6, "low-rank\nadapter", TRAINED)
    arrow((45, y + 9.5), (49.5, y + 9.5), color=AUDIO)
    label(47.1, y + 11, "K, V", 10)
    box(49.5, y + 6.5, 11.5, 6, "attention", {"fc": "white", "ec": INK})
    arrow((78, y + 2.6), (55.2, y + 2.6), (55.2, y + 6.5))
    label(65.6, y + 4, "query: h itself", 11)
    label(79.3, y + 2.6, "h", 13, ha="left")
    arrow((61, y + 9.5), (64.5, y + 9.5), color=AUDIO)
    box(64.5, y + 7.2, 5, 4.6, "α", TRAINED)
    arrow((69.5, y + 9.5), (76.7, y + 9.5), color=AUDIO)
    ax.plot(78, y + 9.5, "o", ms=17, mfc="white", mec=INK, mew=1.5, zorder=3)
    label(78, y + 9.5, "+", 15)
    label(38.5, y + 4.6, f"before layer {layer}", 11)
label(31, 6.5, r"$h \leftarrow h + \alpha_\ell \cdot \mathrm{scale}(h) \cdot \mathrm{read}(h, A)$", 17, ha="left")
for x, text, look in ((3, "frozen", FROZEN), (15, "trained", TRAINED)):
    box(x, 5.2, 3, 2.6, "", look)
    label(x + 3.8, 6.5, text, ha="left")
figure.savefig(Path(__file__).with_name("additive.png"), dpi=150)
