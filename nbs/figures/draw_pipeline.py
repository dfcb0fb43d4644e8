"""Draws the method on one page: pipeline.svg, and a pipeline_NAME.svg for each notebook, with its blocks lit.

Run it in any folder: the pictures are written beside this file, and they are the same every time.
`python draw_pipeline.py FOLDER` writes PNGs there as well, to look at. Coordinates are pixels, y grows downwards.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path as Outline

WIDTH, TOP, HEIGHT = 900, -60, 588
SOURCE, TARGET, ALIGN = "#2563c9", "#e08e0b", "#7b8494"
LIT, LIT_EDGE, PALE, PALE_EDGE, INK, SOFT = "#0c8a68", "#043d2e", "#f6f8fa", "#c3cbd5", "#1f2733", "#5d6775"
SKY, HOUSE, GREEN, ROAD, CAR, WALK = "#4682b4", "#5a5a5a", "#6b8e23", "#804080", "#00008e", "#e053c4"
SETTINGS = {"svg.fonttype": "path", "svg.hashsalt": "mlan", "font.family": "DejaVu Sans",
            "mathtext.fontset": "dejavusans", "path.simplify": False}


@dataclass(frozen=True)
class Block:
    "A box with its notebooks' numbers, a title and smaller lines under it."
    numbers: tuple
    box: tuple  # x, y, width, height
    title: str
    lines: tuple = ()
    badge: bool = True
    top: float = 17  # from the box's upper edge to the title's centre


BLOCKS = (
    Block((1, 2, 3, 4, 5), (30, 108, 116, 112), "Source", (), top=14),
    Block((1, 2, 3, 4, 5), (30, 262, 116, 112), "Target", (), badge=False, top=14),
    Block((10, 12, 13, 14, 15, 32, 0), (180, 108, 82, 266), "Data sets",
          ("label spaces", "files, folders", "layouts", "checks", "samples", "augmentation"), top=90),
    Block((20,), (300, 78, 206, 46), "Region labels", ("HOG, DBSCAN: $N$ relations",), top=16),
    Block((21,), (406, 146, 100, 90), r"$C_\mathrm{region}$", ("3 region levels",), badge=False, top=37),
    Block((21,), (406, 258, 100, 80), r"$C_\mathrm{image}$", (r"domain, 3$\times$3",), badge=False, top=30),
    Block((21,), (406, 360, 100, 66), r"$C_\mathrm{seg}$", ("classes",), badge=False, top=24),
    Block((22,), (554, 360, 146, 66), "Objective", (r"$L_\mathrm{seg}$: source labels",), top=24),
    Block((23,), (554, 146, 146, 90), "RL-AL",
          (r"$L_\mathrm{region}$: learn relations", r"$L_\mathrm{ent}$: max-min entropy,", "gradient reversed"), top=21),
    Block((24,), (554, 258, 146, 80), "IL-AL", (r"$L_\mathrm{image}$: $E$ makes the", "target pass for source"), top=23),
    Block((25,), (762, 108, 112, 216), "CR-AL", ("each map weighs", "the other's loss"), top=17),
    Block((26,), (762, 346, 112, 102), "MLCM", (), top=15),
    Block((27,), (30, 462, 232, 72), "Regularized translation",
          ("$G$, $D$: source images in", "the target's style"), top=18),
    Block((28,), (300, 462, 250, 72), "Regularized self-training",
          (r"pseudo labels $\hat{Y}_t$ where the map", "asks for them"), top=18),
    Block((30,), (606, 462, 268, 72), "Evaluation", ("one confusion matrix, IoU per class,", "mIoU"), top=18),
)
FRAMES = (  # what is around what: numbers, inset, y, fill and its head's, title, the gap to a text, the text
    ((*range(70, 100),), 2, -54, ("#dde4eb", "#d1d9e3"), "Command line and study", 204,
     "flags, experiments, statistics; the paper's tables beside ours"),
    ((*range(60, 70),), 6, -24, ("#e6ebf0", "#dae1e9"), "adapt", 62, "runs, folders, reports, costs; your own method"),
    ((*range(40, 60),), 10, 6, ("#eff2f6", "#e3e8ee"), "Methods", 82, "what is trained, from where, on what: MLAN below is one of many"),
    ((31, *range(33, 40), 11), 14, 36, ("#ffffff", "#eef1f5"), "Lab and trainer", 128,
     "settings, one loop, stages that are kept under keys"),
)


def mix(color: str | tuple, amount: float) -> tuple:
    "A colour bleached towards white: amount 1 keeps it, 0 is white."
    return tuple(1 - amount * (1 - c) for c in to_rgb(color))


def write(ax: Axes, x: float, y: float, text: str, size: float = 10.5, **style) -> None:
    "Text centred at (x, y); size in pixels."
    ax.text(x, y, text, fontsize=size * 0.75, **{"ha": "center", "va": "center", "color": INK, "zorder": 6} | style)


def rounded(ax: Axes, box: tuple, lit: bool, fill: str | None = None, zorder: float = 3, radius: float = 7) -> None:
    "A rounded box: saturated with a bold outline if lit, pale if not."
    x, y, w, h = box
    style = f"round,pad=0,rounding_size={radius}"
    face, edge = (LIT, LIT_EDGE) if lit else (fill or PALE, PALE_EDGE)
    ax.add_patch(FancyBboxPatch((x, y), w, h, style, fc=face, ec=edge, lw=2.2 if lit else 1.0, zorder=zorder))


def badge(ax: Axes, x: float, y: float, numbers: tuple, lit: int | None) -> None:
    "A notebook's number in a disc, or the first and last of several."
    numbers, lit = ((lit,), True) if lit in numbers else (numbers, False)
    ax.add_patch(Circle((x, y), 11, fc="white" if lit else mix(SOFT, 0.9), ec=LIT_EDGE if lit else "white",
                        lw=1.8 if lit else 1.2, zorder=8))
    several = f"{numbers[0]}-{numbers[-1]}" if numbers[0] < 10 else f"{numbers[0]}+"
    text, size = (f"{numbers[0]:02d}", 10) if len(numbers) == 1 else (several, 8)
    write(ax, x, y + 0.3, text, size, weight="bold", color=LIT_EDGE if lit else "white", zorder=9)


def draw_block(ax: Axes, block: Block, lit: int | None) -> None:
    (x, y, w, _), on = block.box, lit in block.numbers
    rounded(ax, block.box, on)
    write(ax, x + w / 2, y + block.top, block.title, 13, weight="bold", color="white" if on else INK)
    for i, line in enumerate(block.lines):
        write(ax, x + w / 2, y + block.top + 18 + 15 * i, line, 10.5, color="white" if on else SOFT)
    if block.badge:
        badge(ax, x, y, block.numbers, lit)


def route(ax: Axes, points: list, color: str, dashed: bool = False, wide: float = 1.9) -> None:
    "An arrow along a polyline with rounded corners."
    p = np.array(points, float)
    unit = [(b - a) / np.linalg.norm(b - a) for a, b in zip(p[:-1], p[1:], strict=True)]
    verts, codes = [p[0]], [Outline.MOVETO]
    for i in range(1, len(p) - 1):
        verts += [p[i] - 8 * unit[i - 1], p[i], p[i] + 8 * unit[i]]
        codes += [Outline.LINETO, Outline.CURVE3, Outline.CURVE3]
    tip, along = p[-1], unit[-1]
    verts.append(tip - 6 * along)
    codes.append(Outline.LINETO)
    ax.add_patch(PathPatch(Outline(verts, codes), fc="none", ec=color, lw=wide, zorder=2, capstyle="butt",
                           ls=(0, (3.2, 1.8)) if dashed else "-"))
    across = np.array([-along[1], along[0]])
    corners = [tip, tip - 8.5 * along + 4.4 * across, tip - 8.5 * along - 4.4 * across]
    ax.add_patch(Polygon(corners, fc=color, ec="none", zorder=4))


def street(ax: Axes, box: tuple, colors: tuple, pale: float) -> None:
    "A street in a few strokes, in the colours of a photograph or of its labels."
    x, y, w, h = box
    sky, house, green, road, walk, car = (mix(c, pale) for c in colors)

    def shape(points, color, zorder):
        ax.add_patch(Polygon([(x + w * u, y + h * v) for u, v in points], fc=color, ec="none", zorder=zorder))

    shape([(0, 0), (1, 0), (1, 1), (0, 1)], sky, 6)
    shape([(0, 0.05), (0.2, 0.22), (0.2, 0.3), (0.38, 0.42), (0.38, 0.58), (0, 0.75)], house, 6.1)
    shape([(1, 0.16), (0.76, 0.3), (0.62, 0.44), (0.62, 0.58), (1, 0.75)], green, 6.1)
    shape([(0, 0.7), (0.4, 0.52), (0.6, 0.52), (1, 0.7), (1, 1), (0, 1)], walk, 6.2)
    shape([(0.43, 0.52), (0.57, 0.52), (0.9, 1), (0.1, 1)], road, 6.3)
    shape([(0.5, 0.7), (0.52, 0.6), (0.63, 0.6), (0.66, 0.7), (0.66, 0.84), (0.5, 0.84)], car, 6.4)
    ax.add_patch(Rectangle((x, y), w, h, fc="none", ec=mix(INK, 0.55), lw=0.6, zorder=6.5))


def heat_map(ax: Axes, box: tuple, values: np.ndarray, pale: float) -> None:
    "A consistency map as coloured cells."
    x, y, w, h = box
    dx, dy = w / values.shape[1], h / values.shape[0]
    for (i, j), value in np.ndenumerate(values):
        color = mix(matplotlib.colormaps["YlOrRd"](0.1 + 0.75 * value)[:3], pale)
        ax.add_patch(Rectangle((x + j * dx, y + i * dy), dx, dy, fc=color, ec="white", lw=0.5, zorder=6))
    ax.add_patch(Rectangle((x, y), w, h, fc="none", ec=mix(INK, 0.55), lw=0.6, zorder=6.5))


def consistency_maps() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "M_region on a fine grid, M_image on 3 x 3, and their product: made up, the same every time."
    rows, columns = np.mgrid[0:4, 0:8] / np.array([3, 7])[:, None, None]
    near, far = (columns - 0.3) ** 2, (columns - 0.9) ** 2
    region = np.exp(-9 * near - 3 * (rows - 0.5) ** 2) + 0.7 * np.exp(-30 * far - 6 * (rows - 0.8) ** 2)
    region = (region + 0.3 * np.random.RandomState(1).rand(4, 8)) / 1.3
    image = np.array([[0.1, 0.3, 0.2], [0.4, 0.9, 0.55], [0.7, 1.0, 0.3]])
    i, j = (np.arange(4) * 3 // 4)[:, None], np.arange(8) * 3 // 8  # where each region lies on the 3 x 3 map
    multi = region * image[i, j]
    return region.clip(0, 1), image, multi / multi.max()


def draw_frames(ax: Axes, lit: int | None) -> None:
    "The command line around `adapt`, that around the methods, and these around lab and trainer, in which the parts of MLAN stand."
    for order, (numbers, inset, y, fills, title, gap, text) in enumerate(FRAMES):
        w, h, on, depth = WIDTH - 2 * inset, HEIGHT - y - inset, lit in numbers, 0.1 * order
        rounded(ax, (inset, y, w, h), False, fills[0], depth, radius=9)
        rounded(ax, (inset, y, w, 25), on, fills[1], depth + 0.01, radius=9)
        if on:
            around = FancyBboxPatch((inset, y), w, h, "round,pad=0,rounding_size=9", fc="none", ec=LIT_EDGE, lw=2.2)
            ax.add_patch(around)
        write(ax, inset + 38, y + 12.5, title, 13, ha="left", weight="bold", color="white" if on else INK)
        write(ax, inset + 38 + gap, y + 13, text, 10.5, ha="left", color="white" if on else SOFT)
        badge(ax, inset + 18, y + 12.5, numbers, lit)


def draw_flows(ax: Axes, lit: int | None) -> None:
    "Arrows: source in blue, target in amber, what the maps weigh in dashed grey."
    s, t, a = SOURCE, TARGET, LIT if lit == 25 else ALIGN
    b = LIT if lit == 26 else ALIGN
    for points, color in (
            ([(146, 164), (180, 164)], s), ([(146, 318), (180, 318)], t),                            # data
            ([(221, 108), (221, 101), (300, 101)], s), ([(506, 101), (627, 101), (627, 146)], s),      # region labels
            ([(262, 226), (300, 226)], s), ([(262, 258), (300, 258)], t),                            # into E
            ([(364, 180), (406, 180)], s), ([(364, 204), (406, 204)], t),                            # E to C_region
            ([(364, 286), (406, 286)], s), ([(364, 310), (406, 310)], t),
            ([(364, 381), (406, 381)], s), ([(364, 405), (406, 405)], t),
            ([(506, 180), (554, 180)], s), ([(506, 204), (554, 204)], t),                            # heads to losses
            ([(506, 286), (554, 286)], s), ([(506, 310), (554, 310)], t),
            ([(506, 381), (554, 381)], s), ([(456, 426), (456, 462)], t),
            ([(332, 462), (332, 417)], t), ([(550, 498), (606, 498)], t),                            # self-training
            ([(88, 462), (88, 442), (22, 442), (22, 164), (30, 164)], s)):                           # translation
        route(ax, points, color)
    route(ax, [(700, 170), (762, 170)], t)
    route(ax, [(700, 304), (762, 304)], t)
    route(ax, [(762, 190), (700, 282)], a, True, 2.4 if lit == 25 else 1.6)
    route(ax, [(762, 278), (700, 200)], a, True, 2.4 if lit == 25 else 1.6)
    route(ax, [(818, 324), (818, 346)], b, True)
    route(ax, [(762, 400), (728, 400), (728, 442), (225, 442), (225, 462)], b, True)
    route(ax, [(500, 442), (500, 462)], b, True)


def draw_extractor(ax: Axes, lit: int | None) -> None:
    "E as a funnel."
    on = lit in (21, 29)
    ax.add_patch(Polygon([(300, 146), (364, 172), (364, 402), (300, 428)], fc=LIT if on else PALE, joinstyle="round",
                         ec=LIT_EDGE if on else PALE_EDGE, lw=2.2 if on else 1.0, zorder=3))
    write(ax, 332, 276, "$E$", 20, weight="bold", color="white" if on else INK)
    write(ax, 332, 300, "features", 10.5, color="white" if on else SOFT)
    badge(ax, 302, 148, (21,) if lit != 29 else (29,), lit)


def draw_pictures(ax: Axes, lit: int | None) -> None:
    "Small pictures inside the blocks: streets, labels and maps."
    pale = {n: 1.0 if lit in (n, None) or (n == 1 and lit in range(2, 6)) else 0.6 for n in (1, 25, 26)}
    photo, other = (("#9fc5ea", "#a4866b", "#5f9a55", "#6d7078", "#b6b1ab", "#c43c35"),
                    ("#c9c6bd", "#6d6157", "#4c5f46", "#47464a", "#7f7a74", "#5d6f8f"))
    street(ax, (36, 134, 50, 42), photo, pale[1])
    street(ax, (90, 134, 50, 42), (SKY, HOUSE, GREEN, ROAD, WALK, CAR), pale[1])
    street(ax, (36, 288, 50, 42), other, pale[1])
    ax.add_patch(Rectangle((90, 288), 50, 42, fc="white", ec=mix(INK, 0.55), lw=0.6, ls=(0, (3, 2)), zorder=6))
    write(ax, 115, 309, "?", 20, weight="bold", color=TARGET)
    for y, left, right in ((187, "images", "labels"), (341, "images", "no labels")):
        for x, text in ((61, left), (115, right)):
            write(ax, x, y, text, 10, color="white" if lit in range(1, 6) else SOFT)
    write(ax, 88, 205, "$X_s,\\ Y_s$", 11.5, color="white" if lit in range(1, 6) else SOURCE)
    write(ax, 88, 359, "$X_t$", 11.5, color="white" if lit in range(1, 6) else TARGET)
    region, image, multi = consistency_maps()
    heat_map(ax, (778, 172, 80, 40), region, pale[25])
    heat_map(ax, (797, 240, 42, 42), image, pale[25])
    heat_map(ax, (778, 372, 80, 38), multi, pale[26])


def draw_words(ax: Axes, lit: int | None) -> None:
    "Names of the maps and of some arrows, and what the colours mean."
    write(ax, 818, 223, r"$M_\mathrm{region}$", 11.5, color="white" if lit == 25 else INK)
    write(ax, 818, 296, r"$M_\mathrm{image}$", 11.5, color="white" if lit == 25 else INK)
    for y, text in ((420, r"$M_\mathrm{multi} =$"), (436, r"$M_\mathrm{region} \times M_\mathrm{image}$")):
        write(ax, 818, y, text, 11, color="white" if lit == 26 else INK)
    for x, color, dashed, text in ((250, SOURCE, False, "source flow"), (390, TARGET, False, "target flow"),
                                   (530, ALIGN, True, "a map weighs a loss")):
        route(ax, [(x, 558), (x + 32, 558)], color, dashed)
        write(ax, x + 40, 558, text, 10.5, ha="left", color=SOFT)


def draw(lit: int | None) -> Figure:
    "The whole picture, with the blocks of notebook `lit` lit."
    figure = Figure(figsize=(WIDTH / 96, (HEIGHT - TOP) / 96))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, TOP))
    ax.axis("off")
    draw_frames(ax, lit)
    draw_flows(ax, lit)
    for shift in (8, 4):                                        # the plates behind C_region are its other two levels
        rounded(ax, (406 + shift, 146 - shift, 100, 90), lit == 21, zorder=2.8)
    for block in BLOCKS:
        draw_block(ax, block, lit)
    draw_extractor(ax, lit)
    draw_pictures(ax, lit)
    draw_words(ax, lit)
    return figure


SHORTER = (  # what changes nothing in an SVG: its type, clipping at the picture's edge, comments, long names, needless decimals
    (r"<!DOCTYPE[^>]*>\s*", ""),
    (r' clip-path="[^"]*"|<!--.*?-->|; stroke-linejoin: miter', ""),
    (r'<g id="patch_\d+">\s*(<path[^>]*>)\s*</g>', r"\1"),
    (r"([1-9]\d*\.\d\d)\d+", r"\1"),
    (r"DejaVuSans-(Bold-|Oblique-|BoldOblique-)?", lambda match: (match[1] or "r").strip("-").lower()),
    (r'transform="translate\(([-\d.]+) 0\)"/>', r'x="\1"/>'),
    (r"(?<=[\d\s\"])([MLQCz])\s", r"\1"), (r"\s+(?=[MLQCz\"])", ""),
    (r"\s+", " "), (r"> <", ">\n<"),
)


def shrink(path: Path) -> None:
    "Write an SVG shorter; it looks the same."
    text = path.read_text(encoding="utf-8")
    for pattern, new in SHORTER:
        text = re.sub(pattern, new, text)
    path.write_text(text.strip() + "\n", encoding="utf-8")


def main(folder: str | None = None) -> None:
    here = Path(__file__).resolve().parent
    notebooks = (path.stem.partition("_") for path in here.parent.glob("[0-9]*.ipynb"))
    pictures = {"pipeline": None} | {f"pipeline_{name}": int(number) for number, _, name in notebooks}
    for old in here.glob("pipeline*.svg"):
        if old.stem not in pictures:
            old.unlink()
    with matplotlib.rc_context(SETTINGS):
        for name, lit in pictures.items():
            figure = draw(lit)
            figure.savefig(here / f"{name}.svg", facecolor="white", metadata={"Date": None, "Creator": None})
            shrink(here / f"{name}.svg")
            if folder:
                figure.savefig(Path(folder) / f"{name}.png", facecolor="white", dpi=144)


if __name__ == "__main__":
    main(*sys.argv[1:])
