"Tables, pictures, and the report as a file."
import html.parser
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mlan.evaluation import Scores
from mlan.report import PictureRow, Report, changes, colorize, report_html, write_report
from mlan.score_tables import comparison_table

IGNORE = 255
NAMES = ("road", "sidewalk", "building", "wall", "sky")
COLORS = np.array([(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (70, 130, 180)], np.uint8)


def example_scores(seed):
    return Scores(torch.randint(1, 50, (5, 5), generator=torch.Generator().manual_seed(seed)), NAMES)


def example_picture(name, truth=True):
    labels = np.kron(np.random.default_rng(0).integers(0, 5, (4, 8)), np.ones((8, 8))).astype(np.uint8)
    maps = {"M_region": torch.rand(4, 8), "M_image": torch.rand(3, 3) + 1, "M_multi": torch.rand(4, 8)}
    predictions = {"source_only": labels * 0, "mlan": torch.tensor(labels)}
    return PictureRow(name, np.repeat(labels[..., None] * 50, 3, axis=2), labels if truth else None, predictions, maps)


CURVES = {m: [{"step": s, "loss/seg": 1 / (s + 1), **({"miou_val": 30. + s} if s % 10 == 0 else {})} for s in range(40)]
          for m in ("source_only", "mlan")}


class Page(html.parser.HTMLParser):
    "Collects tags, addresses and text."
    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_report_is_one_file_with_pictures_beside_it(tmp_path):
    scores = {m: example_scores(i) for i, m in enumerate(("source_only", "cr_al", "mlan", "oracle"))}
    settings = {"size": (64, 128), "note": "<&>"}
    pictures = [example_picture("example 1"), example_picture("../example/2")]
    path = write_report(tmp_path / "run/report.html", "example <run>", settings, scores, CURVES, pictures,
                        ["5 < 6 & more"], NAMES, COLORS)
    page = Page(path.read_text(encoding="utf-8"))
    assert {p.name for p in (path.parent / "pictures").iterdir()} == {"curves.png", "example_1.png", "example_2.png"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert len(page.links) == 3 and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "run"} & set(page.tags)
    assert all(text in page.text for text in ("example <run>", "<&>", "5 < 6 & more", "(64, 128)"))
    for m in scores.values():
        assert all(f"{v:.1f}" in page.text for v in (m.miou, *m.per_class.values()))
    assert Image.open(path.parent / "pictures/example_1.png").size[0] > 800


def test_report_from_records_equals_report_from_scores():
    scores = {m: example_scores(i) for i, m in enumerate(("source_only", "mlan"))}
    records = json.loads(json.dumps({m: s.record() for m, s in scores.items()}))
    assert report_html(Report("example", scores=scores)) == report_html(Report("example", scores=records))


def test_report_of_one_method_and_of_a_target_without_labels(tmp_path):
    one = write_report(tmp_path / "one.html", title="example", scores={"MLAN": example_scores(0)}).read_text("utf-8")
    assert "MLAN reaches" in one and "source only" not in one and "class=best" not in one and "Pictures" not in one
    pictures = [example_picture("example", truth=False)]
    bare = write_report(tmp_path / "bare.html", "example", pictures=pictures).read_text("utf-8")
    assert "has no labels" in bare and "<h2>Scores" not in bare and bare.count("<img") == 1
    with pytest.raises(TypeError, match="picture"):
        write_report(tmp_path / "no.html", "example", picture=[])


def test_report_is_the_same_twice(tmp_path):
    row = example_picture("example")
    one, two = (write_report(tmp_path / n / "r.html", "example", curves=CURVES, pictures=[row]) for n in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_table_marks_the_best_and_fits():
    names = [f"class number {i}" for i in range(19)]
    mious = {"source only": 10., "regularized RL-AL": 12., "MLAN": 11.96, "oracle": 60.}
    per_class = {m: {c: v if i else None for i, c in enumerate(names)} for m, v in mious.items()}
    seen = {"source only": "source", "oracle": "truth"}
    table = comparison_table({m: {"miou": v, "per_class": per_class[m], "seen": seen.get(m, "target")} for m, v in mious.items()})
    blocks = table.split("\n\n")
    assert len(blocks) == 2 and all(len(line) <= 120 for line in table.splitlines())
    rows = {line[:18].strip(): line for line in blocks[0].splitlines()}
    assert "12.0*" in rows["regularized RL-AL"] and "12.0*" in rows["MLAN"]
    assert "*" not in rows["oracle"] + rows["source only"]
    heads = " ".join(line for block in blocks for line in block.splitlines()[:1]).split()
    assert len(heads) == len(set(heads)) == 20


def test_table_of_a_model_without_a_score():
    bare = Scores(torch.zeros(5, 5, dtype=torch.int64), NAMES)
    table = comparison_table({"MLAN": bare})
    assert "MLAN" in table and "0.0" not in table


def test_colors():
    labels = np.array([[0, 4], [IGNORE, 1]], np.uint8)
    assert colorize(labels, COLORS).tolist() == [[[128, 64, 128], [70, 130, 180]], [[0, 0, 0], [244, 35, 232]]]
    same = changes(labels, labels, labels)
    assert same[0].min() == 255 and same[1, 0].max() == 0
