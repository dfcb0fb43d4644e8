"Small trees of files that several tests write."

import zlib

import numpy as np
from PIL import Image

from mlan.folders import PairedFolder
from mlan.label_spaces import CITYSCAPES, CITYSCAPES_CLASSES, CITYSCAPES_IDS, IGNORE, SYNTHIA, label_table


def write_tree(root, n, labelled=True, suffix=".png", size=(12, 20)):
    "n pairs of noise whose pair i has the label i % 19 everywhere but in one corner."
    rng = np.random.default_rng(0)
    for part in ("images", "labels")[: 1 + labelled]:
        (root / part).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "images" / f"{i:03d}{suffix}")
        if labelled:
            ids = np.full(size, i % 19, np.uint8)
            ids[0, 0] = IGNORE
            Image.fromarray(ids).save(root / "labels" / f"{i:03d}.png")
    return root


def pairs_of(root):
    return PairedFolder(root / "images", root / "labels", CITYSCAPES)


# Published layouts


def png_chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def paeth(a, b, c):
    "PNG's predictor, element by element, from the left, the upper and the upper left byte."
    p = a + b - c
    pa, pb, pc = abs(p - a), abs(p - b), abs(p - c)
    return np.where((pa <= pb) & (pa <= pc), a, np.where(pb <= pc, b, c))


def write_deep_png(path, channels):
    "An RGB PNG with 16 bits a channel (H, W, 3), its rows with PNG's five filters in turn."
    height, width, _ = channels.shape
    x = np.frombuffer(channels.astype(">u2").tobytes(), np.uint8).reshape(height, -1).astype(int)
    left = np.pad(x, ((0, 0), (6, 0)))[:, :-6]
    up = np.pad(x, ((1, 0), (0, 0)))[:-1]
    both = np.pad(left, ((1, 0), (0, 0)))[:-1]
    guesses = [0 * x, left, up, (left + up) // 2, paeth(left, up, both)]
    rows = b"".join(bytes([y % 5]) + ((x[y] - guesses[y % 5][y]) % 256).astype(np.uint8).tobytes() for y in range(height))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    data = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def raw_ids(train_ids, space):
    "A map of train ids (255: void) in the ids of another space; what that lacks becomes its first void."
    table = np.full(256, space.ignore[0], np.uint8)
    for name, raw in zip(space.classes, space.ids):
        table[CITYSCAPES_CLASSES.index(name)] = raw
    return table[train_ids]


def train_ids(labels, space):
    "Raw ids as train ids."
    table = label_table(space, tuple((name,) for name in space.classes))
    back = np.full(256, IGNORE, np.uint8)
    back[: len(space.classes)] = [CITYSCAPES_CLASSES.index(name) for name in space.classes]
    return back[table[labels]]


def a_map(size, seed=0):
    "Train ids with some void, in blocks."
    blocks = np.random.default_rng(seed).choice([*range(19), IGNORE], (8, 8)).astype(np.uint8)
    return np.array(Image.fromarray(blocks).resize(size[::-1], Image.Resampling.NEAREST))


def save(path, array, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if palette is not None:
        picture.putpalette(palette)
    picture.save(path)


def write_gta5(root, numbers=(1, 2, 3), size=(53, 96), palette=True):
    colors = np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes() if palette else None
    for number in numbers:
        save(root / "images" / f"{number:05d}.png", np.full((*size, 3), number % 256, np.uint8))
        save(root / "labels" / f"{number:05d}.png", raw_ids(a_map(size, number), CITYSCAPES_IDS), colors)
    return root


def write_synthia(root, n=2, size=(76, 128)):
    rng = np.random.default_rng(0)
    for i in range(n):
        save(root / "RGB" / f"{i:07d}.png", np.full((*size, 3), i, np.uint8))
        ids = raw_ids(a_map(size, i), SYNTHIA)
        (root / "GT" / "LABELS").mkdir(parents=True, exist_ok=True)
        channels = np.stack([ids, rng.integers(0, 5000, size), 0 * ids], -1)
        write_deep_png(root / "GT" / "LABELS" / f"{i:07d}.png", channels)
    return root


def write_cityscapes(root, cities, size=(64, 128), kinds=("labelIds",)):
    "cities: {split/city: number of frames}. Beside the labels lie the other files that the set has."
    for seed, (place, n) in enumerate(cities.items()):
        for i in range(n):
            stem = f"{place}/{place.split('/')[1]}_{i:06d}_000019"
            save(root / "leftImg8bit" / f"{stem}_leftImg8bit.png", np.full((*size, 3), i, np.uint8))
            ids = a_map(size, seed * 100 + i)
            for kind in kinds:
                stored = ids if kind == "labelTrainIds" else raw_ids(ids, CITYSCAPES_IDS)
                save(root / "gtFine" / f"{stem}_gtFine_{kind}.png", stored)
            save(root / "gtFine" / f"{stem}_gtFine_color.png", np.zeros((*size, 4), np.uint8))
            (root / "gtFine" / f"{stem}_gtFine_polygons.json").write_text("{}")
    return root
