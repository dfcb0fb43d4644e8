"Equal keys are equal outcomes: every field, data set and stage that matters changes the key of what comes after it, and nothing else does."

import dataclasses
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import pytest
from few import FEW, OWN, PAIR, few

from mlan.backbones import weights_digest
from mlan.counting import CountingLab
from mlan.fields import declared
from mlan.lab import Fresh, Lab, training, warm_up
from mlan.methods import METHODS, make_setup, own_values
from mlan.multi_level import MLAN
from mlan.objective import Supervised
from mlan.pairs import open_pair
from mlan.settings import Settings
from mlan.streets import Streets
from mlan.trainer import Training
from mlan.views import Kept


class Names(Lab):
    "A lab that only says what its stages would be kept under."

    def _once(self, stage, kept, work):
        self.made[stage] = kept
        return kept


@cache
def opened(*settings):
    return open_pair(make_setup(*PAIR, "source_only", **dict(settings)).settings)


OF_DATA = ("size", "target_size", "n_source", "n_target", "n_val", "n_test", "data_seed")


def keys(method, tmp_path, data=None, **changes) -> dict:  # {stage: key}, in their order
    "The stages of a method of METHODS, or of a recipe."
    given = few(method, **changes) if isinstance(method, str) else {**FEW, **changes}
    setup = make_setup(*PAIR, method, **given)
    values = dataclasses.asdict(setup.settings)
    lab = Names(setup.settings, data or opened(*((name, values[name]) for name in OF_DATA)), tmp_path)
    setup.recipe(lab)
    return {stage: kept.key for stage, kept in lab.made.items()}


def another(value, choices=()):
    "A value that a field may have beside this one."
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, tuple):
        return (*value[:-1], another(value[-1])) if isinstance(value[-1], float) else tuple(v // 2 for v in value)
    if isinstance(value, bool):
        return not value
    return {int: lambda: value + 2, float: lambda: value / 2 or 0.5, str: lambda: value + "x"}[type(value)]()


def changed(before, after):
    "The stages whose keys are others, or that are new."
    return {stage for stage in after if before.get(stage) != after[stage]}


UNUSED = {  # fields that a method has and does not use, by what it leaves out
    "mlan": {"fourier_beta"},
    "cr_al+fda": {"translation_steps", "translation_lr", "translation_batch", "translation_width", "rst_reading", "portions",
                  "self_training_steps", "self_training_lr"},
    "cr_al+continued": {"translation_steps", "translation_lr", "translation_batch", "translation_width", "fourier_beta", "translated_share",
                        "rst_reading", "portions"},
    "cr_al+st": {"translation_steps", "translation_lr", "translation_batch", "translation_width", "fourier_beta", "translated_share",
                 "rst_reading"},
}
CHOICES = {"image": ("plain", "regularized"), "entropy": ("plain", "regularized"), "continued": (False,), "region": (True,)}
ALONE = {"cr_al+continued": {"self_train"}}                       # switches that exclude each other


@pytest.mark.parametrize("method", ["mlan", "cr_al+fda", "cr_al+continued", "cr_al+st", "fda", "fda_mbt", "minent", "adaptseg", "advent",
                                    "dacs"])
def test_every_field_of_a_method_changes_its_last_key(method, tmp_path):
    before, own = keys(method, tmp_path), own_values(make_setup(*PAIR, method, **few(method)).recipe)
    choices = {f.name: f.choices for f in declared("mlan.methods", type(METHODS[method].recipe).__name__)}
    without = set()
    for name, value in own.items():
        if CHOICES.get(name, ()) in ((True,), (False,)) or name in ALONE.get(method, ()):
            continue                                              # switches of other methods: see the test of all switches
        value = another(value, CHOICES.get(name) or choices[name])
        after = keys(method, tmp_path, **{name: value})
        if list(before.items())[-1] == list(after.items())[-1]:
            without.add(name)
    assert without == UNUSED.get(method, set())


def test_all_switches_give_a_plan_of_their_own_or_one_sentence(tmp_path):
    "Two methods that share a last key would share a network."
    last, refused = {}, []
    choices = {f.name: f.choices for f in declared("mlan.multi_level", "MLAN")}
    switches = {name: choices[name] for name in ("entropy", "image", "translate", "self_train")}
    for region, continued, *words in itertools.product((True, False), (True, False), *switches.values()):
        chosen = dict(region=region, continued=continued, **dict(zip(switches, words)))
        try:
            method = MLAN(**chosen, patches=(8, 16, 32), self_training_steps=4, portions=(.4, .5))
        except ValueError as error:
            refused.append(str(error))
            continue
        last.setdefault(list(keys(method, tmp_path).values())[-1], []).append(chosen)
    alike = [plans for plans in last.values() if len(plans) > 1]
    assert not alike and len(last) > 100 and all("\n" not in words and 20 < len(words) < 200 for words in refused)


def test_continued_after_translation_is_not_continued_without(tmp_path):
    "Once they shared a key, and the second silently got the first one's network."
    plain = keys("cr_al+continued", tmp_path)
    translated = keys(dataclasses.replace(METHODS["cr_al+continued"].recipe, translate="regularized", patches=(8, 16, 32)), tmp_path)
    assert plain["continued"] != translated["continued"]


def test_methods_differ_in_their_last_key(tmp_path):
    last = {method: list(keys(method, tmp_path).values())[-1] for method in METHODS}
    assert len({*last.values()}) == len(METHODS)


def test_every_field_of_training_changes_the_key(tmp_path):
    lab = Names(make_setup(*PAIR, "source_only", **few("source_only")).settings, data_with(), tmp_path)
    one = lab.train("x", Supervised, lab.fresh, lab.source).key
    how = training(lab.s)
    for field in dataclasses.fields(Training):
        choices = {"optimiser": ("sgd", "adamw", "adam"), "shape": ("poly", "linear"), "precision": ("fp32", "bf16")}.get(field.name, ())
        old = getattr(how, field.name)
        if dataclasses.is_dataclass(old):                    # each of its fields
            values = [dataclasses.replace(old, **{f.name: 0.5}) for f in dataclasses.fields(old)]
        else:
            values = [another(old, choices)]
        for value in values:
            assert lab.train("x", Supervised, lab.fresh, lab.source, **{field.name: value}).key != one, field.name


NEUTRAL = {"source", "target", "method", "profile",                # names: what they name is in the keys
           "n_val", "n_test", "val_every",                         # validation looks on
           "device", "workers", "checkpointing", "compile", "log_every", "checkpoint_every"}


def test_every_setting_changes_a_key_or_is_known_to_change_nothing(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"1")
    before, choices, neutral = keys("mlan", tmp_path), {f.name: f.choices for f in declared("mlan.settings", "Settings")}, set()
    given = {"steps": 5, "schedule_steps": 8, "seed": 1, "data_seed": 1, "backbone": "resnet50", "weights": str(tmp_path / "weights.pth"),
             "size": (64, 96), "target_size": (64, 96), "device": "auto"}
    values = make_setup(*PAIR, "mlan", **few("mlan")).settings
    for field in dataclasses.fields(Settings):
        if field.name in ("source", "target", "method", "profile"):
            neutral.add(field.name)
            continue
        value = given.get(field.name, another(getattr(values, field.name), choices[field.name]))
        if keys("mlan", tmp_path, **{field.name: value}) == before:
            neutral.add(field.name)
    assert neutral == NEUTRAL


STAGES = ("regions", "warm_up", "align", "maps", "translation_pair", "translation", "align_translated", "pseudo_labels_0",
          "self_training_0", "pseudo_labels_1", "self_training_1")


@pytest.mark.parametrize("field, first, untouched", [
    ("n_relations", "regions", {"warm_up"}), ("warmup_lr", "warm_up", {"regions"}), ("lambda_ent", "align", set()),
    ("map_weights", "align", set()), ("map_placement", "align", set()), ("translation_lr", "translation_pair", set()),
    ("translated_share", "align_translated", set()), ("self_training_lr", "self_training_0", set()),
    ("rst_reading", "pseudo_labels_0", set())])
def test_a_stage_changes_all_that_come_after_it_and_none_before(field, first, untouched, tmp_path):
    before, choices = keys("mlan", tmp_path), {f.name: f.choices for f in declared("mlan.multi_level", "MLAN")}
    own = own_values(make_setup(*PAIR, "mlan", **few("mlan")).recipe)
    value = another(own[field], choices[field]) if field in own else 0.0123
    assert tuple(before) == STAGES
    assert changed(before, keys("mlan", tmp_path, **{field: value})) == {*STAGES[STAGES.index(first):]} - untouched


def data_with(**other):
    "The pair's data, with one of its data sets in another edition of the same size."
    settings, base = make_setup(*PAIR, "source_only", **few("source_only")).settings, dict(size=(32, 64))

    def of(domain, split, n, what):
        return Streets(domain, split, **base, n=n, seed=int(what in other))

    target = {split: of("camera", split, n, split) for split, n in (("train", 16), ("val", 4), ("test", 4))}
    return open_pair(settings, {"train": of("engine", "train", 40, "source")}, target)


@pytest.mark.parametrize("method", METHODS)
def test_upstream_data_changes_the_key_where_a_method_looks_at_it(method, tmp_path):
    before, seen = list(keys(method, tmp_path, data_with()).values())[-1], set()
    for what in ("source", "train", "val", "test"):
        if list(keys(method, tmp_path, data_with(**{what: 1})).values())[-1] != before:
            seen.add(what)
    expected = {"source_only": {"source"}, "rll": {"source"}, "oracle": {"train"}}.get(method, {"source", "train"})
    assert seen == expected


def test_what_is_kept_beside_one_domain_changes_no_other(tmp_path):
    "The alignment's key holds the target; region labels come from the source alone."
    before, after = keys("cr_al", tmp_path, data_with()), keys("cr_al", tmp_path, data_with(train=1))
    assert changed(before, after) == {"align"}


def test_weights_are_known_by_their_content(tmp_path):
    for name, content in (("a.pth", b"1"), ("b.pth", b"1"), ("c.pth", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (weights_digest(str(tmp_path / f"{k}.pth")) for k in "abc")
    assert a == b != c and weights_digest(f"caffe:{tmp_path / 'a.pth'}") != a and weights_digest("imagenet") == "imagenet"
    with pytest.raises(FileNotFoundError, match="give 'none', 'imagenet', an existing file, or STYLE:FILE with a style of"):
        weights_digest(str(tmp_path / "d.pth"))


def test_where_training_starts_is_in_the_key(tmp_path):
    setup = make_setup(*PAIR, "source_only", **few("source_only"))
    lab = Names(setup.settings, data_with(), tmp_path)
    first = lab.train("x", partial(Supervised), warm_up(lab), lab.source)
    starts = {lab.train("y", Supervised, start, lab.source).key for start in (None, lab.fresh, warm_up(lab), first)}
    assert len(starts) == 4


# ------------------------------------------------------------------------------------------------ what follows what

STARTS = {  # stage: the stage whose network it trains on from; "fresh"; None: there is no network
    "source_only": {"warm_up": "fresh", "align": "warm_up"},
    "oracle": {"warm_up": "fresh", "align": "warm_up"},
    "cr_al": {"warm_up": "fresh", "align": "warm_up"},
    "cr_al+continued": {"warm_up": "fresh", "align": "warm_up", "continued": "align"},
    "cr_al+st": {"warm_up": "fresh", "align": "warm_up", "self_training_0": "align", "self_training_1": "self_training_0"},
    "mlan": {"warm_up": "fresh", "align": "warm_up", "translation_pair": None, "align_translated": "warm_up",
             "self_training_0": "align_translated", "self_training_1": "self_training_0"},
    "fda": {"warm_up": "fresh", "align_translated": "warm_up"},
    "advent": {"warm_up": "fresh", "output_game": "warm_up"},
    "minent": {"warm_up": "fresh", "minent": "warm_up"},
    "dacs": {"warm_up": "fresh", "dacs": "warm_up"},
    "fda_mbt": {"warm_up": "fresh", "fda_0": "warm_up", "fda_1": "warm_up"},
}


@pytest.mark.parametrize("method", STARTS)
def test_each_training_goes_on_from_the_stage_that_it_should(method):
    setup = make_setup(*PAIR, method, **few(method))
    lab = CountingLab(setup.settings)
    setup.recipe(lab)
    of_key = {planned.kept.key: planned.stage for planned in lab.planned}
    starts = {planned.stage: planned.start and of_key.get(planned.start.key if isinstance(planned.start, Kept) else "", "fresh")
              for planned in lab.planned if planned.how}
    assert starts == STARTS[method]


@pytest.mark.parametrize("band", [0, 1])
def test_fdas_pseudo_labels_come_from_every_band(band, tmp_path):
    betas = [*OWN["betas"]]
    before = keys("fda_mbt", tmp_path)
    betas[band] += 0.1
    assert {"fda_labels_0", "fda_1"} <= changed(before, keys("fda_mbt", tmp_path, betas=tuple(betas)))


def test_the_parts_of_an_outcome_have_keys_of_their_own(tmp_path):
    whole = Kept("k", tmp_path / "k.pt")
    assert len({whole.key, whole["unit"].key, whole["turned"].key, whole["unit"]["turned"].key}) == 4


def test_a_fresh_network_has_the_key_of_all_that_makes_it(tmp_path):
    def fresh(**changes):
        setup = make_setup(*PAIR, "source_only", **{**FEW, **changes})
        return str(Lab(setup.settings, opened(), tmp_path).fresh.key)

    keys_of = [fresh(), fresh(seed=1), fresh(backbone="vgg16"), fresh(backbone="few:few")]
    assert len({*keys_of}) == 4 and fresh(lr=0.5) == fresh(steps=77, schedule_steps=77) == fresh()


def test_each_reading_of_rst_chooses_other_pixels(tmp_path):
    readings = [keys("mlan", tmp_path, rst_reading=reading)["pseudo_labels_0"] for reading in ("portion", "threshold", "turned")]
    assert len({*readings}) == 3 and readings[2] != keys("mlan", tmp_path, self_train="plain")["pseudo_labels_0"]


def test_a_lab_that_counts_gives_the_keys_of_one_that_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(Lab, "fresh", Fresh(["fresh"]))                # the counting lab's has no weights' digest
    setup = make_setup(*PAIR, "cr_al+st", **few("cr_al+st"))
    lab = CountingLab(setup.settings, opened(*((name, getattr(setup.settings, name)) for name in OF_DATA)))
    setup.recipe(lab)
    assert {planned.stage: planned.kept.key for planned in lab.planned} == keys("cr_al+st", tmp_path)


def slowly(bench, told: str) -> dict:
    with open(told, "a") as file:
        file.write("made\n")
    time.sleep(1)
    return {"made": True}


def test_of_two_that_want_a_stage_at_once_one_makes_it(tmp_path):
    "The other waits, and finds it made; without the lock both would make it."
    settings, told = make_setup(*PAIR, "source_only", **few("source_only")).settings, tmp_path / "told"
    labs = [Lab(settings, data_with(), tmp_path) for _ in range(2)]
    with ThreadPoolExecutor(2) as team:
        kept = [*team.map(lambda lab: lab.keep("slow", slowly, str(told)), labs)]
    assert told.read_text() == "made\n" and kept[0].key == kept[1].key and kept[1].value == {"made": True}
