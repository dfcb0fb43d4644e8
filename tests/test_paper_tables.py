"The paper's tables: every row is whole, missing stays missing, and the audits find what is planted, no more."
from dataclasses import replace
from fractions import Fraction

import pytest

from mlan.label_spaces import DataError
from mlan.methods import METHODS
from mlan.study import audit, paper_tables
from mlan.study.audit import audit_means, audit_text, claims_table, lead, recomputed_mean
from mlan.study.paper_tables import (
    FIGURE_5, FIGURE_6, PAPER_BACKBONES, PAPER_MIOU, STEPS, TABLE_1, TABLE_2, TABLE_3, TABLE_4, ComparisonTable, gain, parse_ablations,
    parse_rows)

TABLES = {"3": TABLE_3, "4": TABLE_4}
each_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def small_table(lines, classes=("road", "wall", "sky")):
    "Three classes; the starred mean leaves out wall."
    averages = {"mIoU": classes, "mIoU*": tuple(c for c in classes if c != "wall")}
    return ComparisonTable("nowhere", averages, parse_rows(lines, len(classes), 2))


def row_of(table, label):
    return next(row for row in table.rows if row.label == label)


def with_row(table, label, **changes):
    rows = tuple(replace(row, **changes) if row.label == label else row for row in table.rows)
    return replace(table, rows=rows)


def cells(table):
    "The cells of a table's markdown, by row."
    return [[c.strip() for c in line.split("|")[1:-1]] for line in table._repr_markdown_().splitlines()]


@each_table
def test_rows_are_whole(table):
    for row in table.rows:
        assert len(row.per_class) == len(table.classes) and len(row.means) == len(table.averages)
        assert all(0 <= v <= 100 for v in row.per_class + row.means if v is not None)
        assert (row.reference is None) == (row.method == "Ours")


def test_sizes():
    assert [len(TABLE_3.classes), len(TABLE_4.classes), len(TABLE_4.averages["mIoU*"])] == [19, 16, 13]
    assert [sum(row.backbone == b for row in t.rows) for t in TABLES.values() for b in PAPER_BACKBONES] == [9, 14, 8, 14]
    assert [len(TABLE_1.rows), len(TABLE_2.rows)] == [7, 6]


@each_table
def test_a_method_has_one_reference_and_one_row_in_each_block(table):
    assert len({row.label for row in table.rows}) == len(table.rows)
    references = {(row.method, row.reference) for t in TABLES.values() for row in t.rows}
    assert len(references) == len({method for method, _ in references}) == len({number for _, number in references})


def test_keys_are_methods_of_ours():
    assert set(PAPER_MIOU) <= set(METHODS)
    assert {m for step in STEPS for m in step} == set(PAPER_MIOU)
    assert {*FIGURE_5.miou, *FIGURE_6.miou} <= set(PAPER_MIOU)


@pytest.mark.parametrize("table, label, total", [
    ("3", "Ours R", "1011.0"), ("3", "AdaptSeg [26] V", "664.8"), ("4", "Ours V", "685.4"), ("4", "CAG [34] R", "711.8")])
def test_sums_made_by_hand(table, label, total):
    table = TABLES[table]
    assert recomputed_mean(table, row_of(table, label), "mIoU") == Fraction(total) / len(table.classes)


@each_table
def test_the_exact_mean_is_the_floating_point_one(table):
    for row in table.rows:
        if None not in row.per_class:
            assert float(recomputed_mean(table, row, "mIoU")) == pytest.approx(sum(row.per_class) / len(row.per_class), abs=1e-9)


def test_missing_stays_missing():
    row = row_of(TABLE_4, "AdaptSeg [26] V")
    assert row.means == (None, 37.6)
    assert recomputed_mean(TABLE_4, row, "mIoU") is None
    assert recomputed_mean(TABLE_4, row, "mIoU*") == Fraction(4891, 130)
    assert TABLE_4.block("V")["AdaptSeg"]["wall"] is None
    checked = [c.mean for c in audit_means(TABLE_4) if c.row == row.label]
    assert checked == ["mIoU*"]
    shown = next(line for line in cells(TABLE_4) if line[0].startswith("AdaptSeg"))
    assert shown.count("-") == 4


def test_a_mean_without_its_classes_is_not_checked():
    table = small_table("a [1] V 50.0 - 60.0 57.0 55.0")
    assert [(c.mean, c.agrees) for c in audit_means(table)] == [("mIoU*", True)]


@each_table
def test_a_mean_is_missing_where_a_class_of_it_is(table):
    for row in table.rows:
        value = dict(zip(table.classes, row.per_class))
        assert [m is None for m in row.means] == [any(value[c] is None for c in some) for some in table.averages.values()]


def test_means_that_disagree():
    wrong = [(c.row, c.mean, round(float(c.gap), 2)) for t in TABLES.values() for c in audit_means(t) if not c.agrees]
    assert wrong == [("IDA [21] R", "mIoU", 0.52), ("CAG [34] R", "mIoU", 0.11), ("CAG [34] R", "mIoU*", 1.15)]


@pytest.mark.parametrize("planted, disagrees", [(0.1, False), (0.5, False), (2.5, True), (-2.5, True), (30.0, True)])
def test_a_planted_error_is_found_and_a_rounding_is_not(planted, disagrees):
    road, *others = row_of(TABLE_3, "Ours R").per_class
    table = with_row(TABLE_3, "Ours R", per_class=(round(road - planted, 1), *others))
    check = next(c for c in audit_means(table) if c.row == "Ours R")
    assert check.agrees is not disagrees


@pytest.mark.parametrize("mean", range(0, 1000, 37))
def test_a_tenth_is_too_much_wherever_floating_point_puts_it(mean):
    near, far = (small_table(f"a V {mean / 10} {mean / 10} {mean / 10} {mean / 10} {(mean + d) / 10}") for d in (0, 1))
    assert [c.agrees for c in audit_means(near)] == [True, True]
    assert [c.agrees for c in audit_means(far)] == [True, False]


def test_every_rounding_of_a_true_row_agrees():
    for offset in range(-5, 5):  # hundredths: what rounding to one decimal can take away
        exact = [Fraction(6000 + 137 * k + offset, 100) for k in range(3)]
        printed = [round(float(v) + 1e-9, 1) for v in (*exact, sum(exact) / 3, (exact[0] + exact[2]) / 2)]
        assert all(c.agrees for c in audit_means(small_table("a V " + " ".join(map(str, printed)))))


def test_bold_is_the_best_of_a_backbone_with_ties_and_without_the_missing():
    lines = ("a [1] V 50.0 - 60.0 - 55.0", "b V 50.0 10.0 40.0 33.3 45.0", "e V 49.9 10.0 9.0 23.0 29.5", "c R 90.0 5.0 1.0 32.0 45.5",
             "d R 80.0 7.0 - - -")
    a, b, e, c, d = cells(small_table("\n".join(lines)))[2:]
    assert a == ["a&nbsp;[1]", "V", "**50.0**", "-", "**60.0**", "-", "**55.0**"]
    assert b == ["b", "V", "**50.0**", "10.0", "40.0", "**33.3**", "45.0"]  # wall: nothing differs among those that have it
    assert e == ["e", "V", "49.9", "10.0", "9.0", "23.0", "29.5"]
    assert c == ["c", "R", "**90.0**", "5.0", "1.0", "32.0", "45.5"]  # alone in the last three: no best
    assert d == ["d", "R", "80.0", "**7.0**", "-", "-", "-"]


@each_table
def test_each_class_has_a_bold_cell_in_each_backbone(table):
    head, _, *body = cells(table)
    for b in PAPER_BACKBONES:
        block = [line for line in body if line[1] == b]
        for k in range(2, len(head)):
            values = [float(line[k].strip("*")) for line in block if line[k] != "-"]
            assert {float(line[k].strip("*")) for line in block if line[k].startswith("**")} == {max(values)}


def test_ablations_show_their_marks():
    head, _, *body = cells(TABLE_1)
    assert head[3] == "L<sub>ent</sub>" and head[4] == "L<sub>ent</sub><sup>r</sup>"
    assert [line.count("×") for line in body] == [len(row.terms) for row in TABLE_1.rows]
    assert [line[-1] for line in body if line[-1].startswith("**")] == ["**49.1**"]


def test_lead_counts_rivals_of_the_same_backbone_that_have_a_value():
    table = small_table("x V 50.0 - 60.0 - 55.0\nOurs V 52.0 10.0 60.0 40.7 56.0\ny R 99.0 99.0 99.0 99.0 99.0")
    assert [lead(table, "V", c) for c in ("road", "wall", "sky", "mIoU*")] == [2.0, None, 0.0, 1.0]
    assert lead(table, "V", "wall", method="x") is None
    assert lead(table, "V", "sky", method="x") == 0.0


def test_gains():
    assert gain("rll", "source_only") == 2.7
    assert gain("mlan", "cr_al") == 4.5


def test_a_wrong_mark_is_refused():
    with pytest.raises(DataError, match=r"The row \+IT is marked with \['L_ST'\]"):
        parse_ablations("+IT | cr_al+it | L_ST | 50.2", "L_IT L_IT^r")


def test_a_row_with_a_value_too_few_is_refused():
    with pytest.raises(DataError, match=r"The row BDL \[17\] R has 4 values"):
        parse_rows("BDL [17] R 91.0 44.7 84.2 34.6", 3, 2)


def failing():
    return {(c.place, c.printed, c.tabled) for c in audit_text() if c.holds is False}


def test_the_text_and_its_tables():
    assert {("4.3", "3.3", "2.7"), ("Tables 2, 3", "53.6", "53.2"), ("4.5", "40.0 to 43.1", "43.7")} <= failing()
    assert len(failing()) == 6


def test_a_mended_table_clears_its_claims(monkeypatch):
    before = failing()
    for module in (paper_tables, audit):
        monkeypatch.setattr(module, "PAPER_MIOU", PAPER_MIOU | {"rll": 39.9, "rl_al": 43.1, "mlan": 53.2})
    assert len(before) - len(failing()) == 3


def test_a_spoilt_table_fails_its_claims(monkeypatch):
    before = failing()
    for module in (paper_tables, audit):
        monkeypatch.setattr(module, "PAPER_MIOU", PAPER_MIOU | {"cr_al+rst": 50.0})
    monkeypatch.setattr(audit, "TABLE_4", with_row(TABLE_4, "SVMin [9] R", means=(49.3, 58.2)))
    new = failing() - before
    assert {place for place, *_ in new} == {"4.3", "Abstract, 4.4"}


def test_claims_that_fail_come_first():
    verdicts = [line.split("|")[-2].strip() for line in claims_table(audit_text()).splitlines()[2:]]
    assert verdicts == sorted(verdicts, key=["**fails**", "open", "holds"].index)
