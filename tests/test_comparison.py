"Runs against each other: intervals by hand and against scipy's own tests, order, verdicts, tables and figures with rows that are missing."
import html.parser
import io
import math

import numpy as np
import pytest
from scipy import stats

from mlan.study.comparison import Table, ablation_figure, ablation_table, class_table, parameter_figure, spread_of_curve
from mlan.study.statistics import (
    Difference, holm, paired_difference, rank_agreement, rank_agreement_interval, scores_of, shown, summary, verdict)

PAPER = {"source_only": 36.6, "rll": 39.3, "rl_al": 43.7, "cr_al": 49.1}
SCORES = {"source_only": {(0, 0): 36., (0, 1): 38., (0, 2): 34.}, "rll": {(0, 0): 37., (0, 1): 39.5, (0, 2): 35.},
          "rl_al": {}, "cr_al": {(0, 1): 43.}, "fda": {(0, 0): 35., (0, 1): 37., (0, 2): 32.}}


def runs(*values, data_seed=0):
    return {(data_seed, seed): value for seed, value in enumerate(values)}


def record(method, seed=0, data_seed=0, miou=40., per_class=None):
    return {"method": method, "seed": seed, "data_seed": data_seed, "miou": miou, "per_class": per_class or {}}


# rows


def test_records_are_grouped_by_key_and_seeds():
    records = [record("mlan", 1), record("rll", 0, 1, 36.), record("demo"), record("mlan", 0, 0, 41.)]
    result = scores_of(records, lambda r: {"mlan": "MLAN", "rll": "RLL"}.get(r["method"]))
    assert result == {"MLAN": {(0, 1): 40., (0, 0): 41.}, "RLL": {(1, 0): 36.}} and list(result) == ["MLAN", "RLL"]


@pytest.mark.parametrize("records, message", [
    ([record("mlan", 2, 1), record("mlan", 2, 1, 44.)], "two records for row 'MLAN', data seed 1, seed 2"),
    ([record("mlan", 2, 1, None)], "'MLAN', data seed 1, seed 2 has no mIoU"),
    ([record("mlan", 2, 1, math.nan)], "'MLAN', data seed 1, seed 2 has no mIoU")])
def test_twice_or_without_score_is_refused(records, message):
    with pytest.raises(ValueError, match=message) as caught:
        scores_of(records, lambda r: r["method"].upper())
    assert "\n" not in str(caught.value)


def test_summary():
    result = summary(iter([40., 42., 44., 46.]))  # squares 9, 1, 1, 9: 20 / 3
    assert (result.mean, result.n) == (43., 4) and result.sd == pytest.approx(math.sqrt(20 / 3))
    assert (result.text, summary([41.25]).sd, summary([41.16]).text, summary([])) == ("43.0 ± 2.6", None, "41.2", None)


# pairs


def test_t_interval_by_hand():
    "Differences 1, 2, 3: mean 2, standard deviation 1; t of two degrees of freedom at 97.5 % is 4.302653."
    result = paired_difference({"a": runs(11., 22., 33.), "b": runs(10., 20., 30.)}, "a", "b")
    assert (result.mean, result.sd, result.n) == (2., 1., 3)
    assert (result.low, result.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5)
    assert result.text == "+2.0 [-0.5, +4.5]" and not result.clear
    assert paired_difference({"a": runs(11., 22., 33.), "b": runs(10., 20., 30.)}, "b", "a").text == "-2.0 [-4.5, +0.5]"


@pytest.mark.parametrize("n", [2, 3, 6, 20])
@pytest.mark.parametrize("level", [.9, .95, .99])
def test_interval_and_p_value_are_those_of_the_paired_t_test(n, level):
    a, b = np.random.default_rng(n).normal(40, 1, (2, n))
    result = paired_difference({"a": runs(*a), "b": runs(*b)}, "a", "b", level)
    oracle = stats.ttest_rel(a, b)
    assert (result.low, result.high) == pytest.approx(tuple(oracle.confidence_interval(level)), rel=1e-9)
    assert result.p == pytest.approx(oracle.pvalue, rel=1e-9)
    assert result.clear == (result.p < 1 - level)


def test_pairs_matter():
    "The same numbers against a shuffled column: same mean, another answer."
    base, gain = np.array([30., 35., 40., 45.]), np.array([.9, 1.1, 1., 1.2])
    paired = paired_difference({"a": runs(*(base + gain)), "b": runs(*base)}, "a", "b")
    crossed = paired_difference({"a": runs(*(base + gain)[::-1]), "b": runs(*base)}, "a", "b")
    assert paired.mean == pytest.approx(crossed.mean)
    assert paired.clear and not crossed.clear and crossed.high - crossed.low > 20 * (paired.high - paired.low)
    assert not stats.ttest_ind(base + gain, base).pvalue < .5


def test_pairs_are_found_by_both_seeds_whatever_their_order():
    a = {(1, 0): 50., (0, 1): 41., (0, 0): 44.}
    b = {(0, 0): 40., (2, 0): 99., (1, 0): 40., (1, 1): 0.}
    result = paired_difference({"a": a, "b": b}, "a", "b")
    assert (result.mean, result.n) == (7., 2)  # 10 and 4


def test_missing_seeds():
    assert paired_difference(SCORES, "rl_al", "rll") is None and paired_difference(SCORES, "rll", "nowhere") is None
    assert paired_difference({"a": runs(1.), "b": runs(2., data_seed=1)}, "a", "b") is None and shown(None) == "not run"
    one = paired_difference(SCORES, "cr_al", "rll")
    assert one == Difference(3.5, None, None, 1, None) and one.text == "+3.5 (1 seed)"
    assert not one.clear and one.p is None


def test_runs_that_agree_to_the_digit():
    same = paired_difference({"a": runs(40., 41.), "b": runs(40., 41.)}, "a", "b")
    assert (same.text, same.clear, same.p) == ("0.0 [0.0, 0.0]", False, 1.)
    moved = paired_difference({"a": runs(41., 42.), "b": runs(40., 41.)}, "a", "b")
    assert (moved.low, moved.high, moved.clear, moved.p) == (1., 1., True, 0.)
    assert Difference(-.04, -.3, .004, 3, .1).text == "0.0 [-0.3, 0.0]"  # no minus before a zero


def test_a_bound_near_zero_says_on_which_side_it_lies():
    for low, bound in ((-.011, "-0.01"), (.04, "+0.04"), (-.049, "-0.05"), (.06, "+0.1"), (-.96, "-1.0")):
        assert Difference(.5, low, 1., 3, .3).text == f"+0.5 [{bound}, +1.0]"


# many comparisons


def with_p(p, n=4):
    "A difference of standard deviation 1 whose test has this p value."
    return Difference(stats.t.isf(p / 2, n - 1) / math.sqrt(n), -1., 1., n, 1.)


@pytest.mark.parametrize("p, clear", [
    ((.01, .04, .03, .005), (1, 0, 0, 1)),  # bounds .0125, .0167, .025, .05: .03 fails, .04 is not asked
    ((.04, .04), (0, 0)),  # .04 > .025 stops before .04 < .05
    ((.02, .04), (1, 1)),
    ((.049,), (1,)), ((.051,), (0,)),
    ((None, .03, .001, None), (0, 1, 1, 0))])  # what was not run is no comparison
def test_holm_by_hand(p, clear):
    assert holm([None if v is None else with_p(v) for v in p]) == [bool(c) for c in clear]


def test_holm_leaves_out_what_no_verdict_is_given_on():
    two = with_p(.001, n=2)
    assert holm([two, with_p(.04)]) == [False, True] and verdict(1., two) == "open"      # nor does it make the others' bound harder


def test_holm_leaves_single_seeds_out():
    one = Difference(9., None, None, 1, None)
    assert holm([one, with_p(.04), one]) == [False, True, False] and holm([one]) == [False] and holm([]) == []
    assert holm([with_p(.04)], level=.99) == [False]


# order


def test_tau_against_a_count_by_hand():
    paper, ours = dict(a=1., b=2., c=3., d=4., e=5.), dict(e=9., a=2., b=1., d=3., c=5.)
    result = rank_agreement(paper, ours)  # b-a and d-c turned: 8 alike, 2 otherwise
    assert result.tau == pytest.approx(.6) and result.n == 5 and set(result.swapped) == {("b", "a"), ("d", "c")}
    assert result.p == pytest.approx(stats.kendalltau([1, 2, 3, 4, 5], [2, 1, 5, 3, 9], method="exact").pvalue)


def test_tau_with_ties_by_hand():
    "a = b in the paper, c = d in ours: of 6 pairs 4 alike, none otherwise; tau-b divides by sqrt(5 x 5)."
    result = rank_agreement(dict(a=1., b=1., c=3., d=4.), dict(a=1., b=2., c=3., d=3.))
    assert result.tau == pytest.approx(4 / 5) and result.swapped == []
    assert rank_agreement(dict(a=1., b=1., c=2.), dict(a=3., b=2., c=1.)).swapped == [("c", "a"), ("c", "b")]


def test_tau_takes_shared_rows_only():
    result = rank_agreement(PAPER, {"source_only": 30., "cr_al": 40., "fda": 99.})
    assert (result.tau, result.n) == (1., 2)
    assert rank_agreement(PAPER, {"fda": 99.}).tau is None and rank_agreement(PAPER, {"rll": 1., "cr_al": 1.}).tau is None
    assert "no order" in rank_agreement({}, {}).text


def test_exact_p_value_counts_orders():
    "Of the 24 orders of four rows, one is the paper's and one its reverse."
    assert rank_agreement(PAPER, {row: i for i, row in enumerate(PAPER)}).p == pytest.approx(2 / 24)


def test_tau_seed_by_seed():
    scores = {"source_only": runs(2., 1., 3., 2.), "rll": runs(1., 2., 2., 1.), "rl_al": {}, "cr_al": runs(3., 3., 1., 3., 9.),
              "fda": runs(0., 0.)}
    assert rank_agreement_interval(PAPER, scores) == pytest.approx((-1., 1.))
    mean_only = rank_agreement(PAPER, {row: summary(v.values()).mean for row, v in scores.items() if v})
    assert -1 < mean_only.tau < 1
    assert rank_agreement_interval(PAPER, {"rll": runs(1.), "cr_al": runs(2., data_seed=1)}) is None
    assert rank_agreement_interval(PAPER, {}) is None


# tables


@pytest.mark.parametrize("paper, ours, words", [
    (2., (3., 1., 5.), "reproduced"), (2., (3., -1., 7.), "open"), (2., (-3., -5., -1.), "contradicted"), (2., (-3., -7., 1.), "open"),
    (-2., (-3., -5., -1.), "reproduced"), (-2., (3., 1., 5.), "contradicted"), (2., (3., None, None), "open"),
    (2., None, "not run"), (None, None, "not run"), (None, (3., 1., 5.), "above"), (None, (-3., -5., -1.), "below"),
    (2., (0., -1., 1.), "open")])
def test_verdicts(paper, ours, words):
    assert verdict(paper, ours and Difference(*ours, 3, 1.)) == words


def test_two_runs_settle_nothing():
    assert verdict(2., Difference(3., 2.9, 3.1, 2, .01)) == "open"


def example_tables():
    claims = [("rll", "source_only"), ("rl_al", "rll"), ("cr_al", "rll"), ("fda", "source_only")]
    return ablation_table(SCORES, PAPER, "source_only", claims, {"source_only": "Baseline"})


def test_rows_that_were_not_run_stay_in_the_tables():
    methods, comparisons = example_tables()
    assert [row[0] for row in methods.rows] == ["Baseline", "RLL", "RL-AL", "CR-AL", "FDA, images only"]
    assert methods.rows[2] == ("RL-AL", "43.7", "+7.1", "not run", "0", "not run")
    assert comparisons.rows[1] == ("RL-AL against RLL", "+4.4", "not run", "not run", "")
    bare = ablation_table({}, PAPER, "source_only", [("cr_al", "rll")], {})
    assert [row[3] for row in bare.methods.rows] == ["not run"] * 4 and bare.comparisons.rows[0][3] == "not run"


def test_ablation_table_tells_what_was_measured():
    methods, comparisons = example_tables()
    assert methods.rows[0] == ("Baseline", "36.6", "", "36.0 ± 2.0", "3", "")
    assert methods.rows[1] == ("RLL", "39.3", "+2.7", "37.2 ± 2.3", "3", "+1.2 [+0.4, +1.9]")
    assert methods.rows[3] == ("CR-AL", "49.1", "+12.5", "43.0", "1", "+5.0 (1 seed)")
    assert methods.rows[4] == ("FDA, images only", "", "", "34.7 ± 2.5", "3", "-1.3 [-2.8, +0.1]")
    assert [row[3:] for row in comparisons.rows] == [
        ("reproduced", "clear"), ("not run", ""), ("open", ""), ("open", "not clear")]
    assert comparisons.heads[-1] == "among all 2 (Holm)"
    assert methods.bold == {(3, 1), (3, 3)}


def test_no_shared_seed_is_said():
    tables = ablation_table({"a": runs(1.), "b": runs(2., data_seed=1)}, {"a": 1., "b": 2.}, "a", [("b", "a")])
    assert tables.methods.rows[1][-1] == tables.comparisons.rows[0][2] == "no shared seed"
    assert tables.comparisons.rows[0][3] == "not run"


@pytest.mark.parametrize("base, comparisons", [("baseline", []), ("source_only", [("cr-al", "rll")])])
def test_a_row_that_nobody_knows_is_an_error(base, comparisons):
    with pytest.raises(ValueError, match="no row.*(baseline|cr-al).*mend the name"):
        ablation_table(SCORES, PAPER, base, comparisons)


def test_markdown_and_html_hold_the_same_cells():
    class Cells(html.parser.HTMLParser):
        texts, inside = (), False

        def handle_starttag(self, tag, attrs):
            if tag in ("td", "th"): self.texts, self.inside = (*self.texts, ""), True

        def handle_endtag(self, tag):
            if tag in ("td", "th"): self.inside = False

        def handle_data(self, data):
            if self.inside: self.texts = (*self.texts[:-1], self.texts[-1] + data)

    table = Table(("method", "a < b"), [("x & y", "1.0"), ("<script>", "not run")], frozenset({(0, 1)}))
    page = Cells()
    page.feed(table._repr_html_())
    assert page.texts == ("method", "a < b", "x & y", "1.0", "<script>", "not run") and "<script>" not in table._repr_html_()
    assert table.markdown().splitlines()[1:] == ["| --- | ---: |", "| x & y | **1.0** |", "| <script> | not run |"]
    both = example_tables()
    assert both.markdown() == both.methods.markdown() + "\n\n" + both.comparisons.markdown()
    assert len({line.count("|") for line in both.methods.markdown().splitlines()}) == 1


def test_class_table_means_over_seeds():
    records = {"source_only": [record("", 0, miou=60., per_class={"road": 80., "sky": 40.}),
                               record("", 1, miou=90., per_class={"road": 90., "sky": None})],
               "rll": [], "mlan": [record("", miou=70., per_class={"road": 84., "sky": 56.})],
               "oracle": [record("", miou=99., per_class={"road": 99., "sky": 99.})]}
    table = class_table(records, {"source_only": "Baseline"})
    assert table.heads == ("method", "road", "sky", "mIoU")
    assert table.rows == [("Baseline", "85.0", "40.0", "75.0"), ("RLL", "", "", "not run"), ("MLAN", "84.0", "56.0", "70.0"),
                          ("oracle", "99.0", "99.0", "99.0")]
    assert table.bold == {(0, 1), (2, 2), (0, 3)}
    assert class_table({"rll": []}).rows == [("RLL", "not run")]


# figures


def drawn(figure):
    "The figure's size in bytes once it is drawn; all its texts."
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.tell(), [text.get_text() for ax in figure.axes for text in ax.texts]


def test_ablation_figure_marks_data_seeds():
    scores = {"a": {(0, 0): 40., (0, 1): 41., (1, 0): 30.}, "b": {(1, 0): 31.}}
    right = ablation_figure(scores, {"a": 50.}).axes[1]
    drawn_at = {(line.get_marker(), x, int(y)) for line in right.lines if line.get_marker() in "o^" for x, y in zip(*line.get_data())}
    assert drawn_at == {("o", 40., 0), ("o", 41., 0), ("^", 30., 0)}             # a single run is its bar
    assert [t.get_text() for t in right.get_legend().get_texts()] == ["data seed 0", "data seed 1"]
    assert ablation_figure({"a": {(0, 0): 40., (0, 1): 41.}}, {}).axes[1].get_legend() is None


def test_ablation_figure_with_missing_rows():
    figure = ablation_figure(SCORES, PAPER, {"source_only": "Baseline"})
    size, texts = drawn(figure)
    assert size > 5000 and texts.count("not run") == 1 and texts.count("not in the paper") == 1
    assert texts[:4] == ["36.6", "39.3", "43.7", "49.1"] and "37.2" in texts
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["Baseline", "RLL", "RL-AL", "CR-AL", "FDA, images only"]


def test_ablation_panels_start_alike_and_hide_nothing():
    left, right = ablation_figure(SCORES, PAPER).axes
    assert np.subtract(36.6, left.get_xlim()) == pytest.approx(np.subtract(36., right.get_xlim()))
    for ax in (left, right):
        shown = [x for line in ax.lines for x in line.get_xdata()]
        assert ax.get_xlim()[0] < min(shown) and max(shown) < ax.get_xlim()[1]
    dots = [line for line in right.lines if line.get_marker() == "o"]
    assert sorted(x for line in dots for x in line.get_xdata()) == sorted(v for r in SCORES.values() for v in r.values() if len(r) > 1)


@pytest.mark.parametrize("scores, paper", [({}, {}), ({"rll": {}}, PAPER), (SCORES, {}), ({"rll": runs(40.)}, {})])
def test_ablation_figure_with_little_to_show(scores, paper):
    assert drawn(ablation_figure(scores, paper))[0] > 1000


def test_parameter_figure():
    curves = {"plain": {1.: runs(40., 42.), .2: runs(30.), 1.8: {}}, "regularized": {.2: runs(39.), 1.: runs(40.)}, "later": {}}
    figure = parameter_figure(curves, .03, "weight", {"plain": (40.1, 43.7), "regularized": (45., 46.)})
    size, texts = drawn(figure)
    assert size > 5000 and texts == ["40.1", "43.7", "45.0", "46.0"]
    ax, side = figure.axes
    assert side.get_title() == "paper (Cityscapes)" and "0.03" in ax.get_xlabel()
    assert np.ptp(ax.get_ylim()) == pytest.approx(np.ptp(side.get_ylim()))
    for panel, values in ((ax, (30., 42.)), (side, (40.1, 46.))):
        assert panel.get_ylim()[0] < min(values) and max(values) < panel.get_ylim()[1]
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["plain"].get_xdata()) == [.2, 1.] and list(lines["plain"].get_ydata()) == [30., 41.]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["plain", "regularized", "later (not run)"]


@pytest.mark.parametrize("ranges", [None, {}, {"plain": (40., 43.)}])
def test_parameter_figure_with_nothing_run(ranges):
    figure = parameter_figure({"plain": {}, "regularized": {1.: {}}}, .03, "weight", ranges)
    assert drawn(figure)[0] > 1000 and len(figure.axes) == 1 + bool(ranges)


def test_spread_of_a_curve_is_that_of_its_means():
    assert spread_of_curve({.2: runs(30., 50.), 1.: runs(41., 43.), 1.8: {}}) == (40., 42.)
    assert spread_of_curve({}) is None
