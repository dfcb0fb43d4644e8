"""Stopped at any moment, by a kill, a torn file, NaN or a second run beside it, a run ends as the undisturbed one, to the last bit."""
import json
import time

import numpy as np
import pytest
import torch
from few import PAIR, few
from forks import Script

from mlan.files import is_whole
from mlan.lab import Lab
from mlan.loop import Checkpoints, TrainingError
from mlan.methods import make_setup
from mlan.objective import Supervised
from mlan.pairs import open_pair
from mlan.trainer import Step
from mlan.train import run_mlan

pytestmark = pytest.mark.usefixtures("no_report")           # drawing takes longer than the smallest run


def walked(method, folder, **changes):
    "A lab in which a method has been walked, and the network that came out."
    setup = make_setup(*PAIR, method, **few(method, **changes))
    lab = Lab(setup.settings, open_pair(setup.settings), folder)
    return lab, lab.bench.net(setup.recipe(lab))


def alike(a, b):
    "Are two networks or states equal to the bit?"
    a, b = (net if isinstance(net, dict) else net.state_dict() for net in (a, b))
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def start(method, out, stages=None, **changes) -> Script:
    "A run in a process of its own, which says when it begins."
    settings = few(method, **changes)
    code = (f"import torch; torch.set_num_threads({torch.get_num_threads()}); from mlan.train import run_mlan; print('go', flush=True); "
            f"run_mlan(*{PAIR}, {method!r}, out={str(out)!r}, stages={stages and str(stages)!r}, progress=False, **{settings})")
    return Script(code, told=out.with_suffix(".told"))


@pytest.mark.parametrize("method, kills", [("mlan", 2), pytest.param("mlan", 20, marks=pytest.mark.slow),
                                           pytest.param("dacs", 10, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_times_ends_as_the_undisturbed_one(method, kills, tmp_path):
    longer = dict(warmup_steps=12, steps=12, schedule_steps=12, map_weights="shuffled")
    began = time.time()
    whole = run_mlan(*PAIR, method, out=tmp_path / "whole", progress=False, **few(method, **longer))
    usual, done, random = time.time() - began, [], np.random.default_rng()
    for _ in range(kills):
        process = start(method, tmp_path / "killed", **longer)
        while not process.output:                                 # the run begins
            time.sleep(.01)
        time.sleep(random.uniform(0, 1.5 * usual / kills))       # each kill leaves a little more behind, on average
        process.kill()
        done.append(len([p for p in (tmp_path / "killed").rglob("*") if p.suffix in (".pt", ".npz")]))
    last = start(method, tmp_path / "killed", **longer)
    assert last.ends() == 0, last.errors
    record = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert record["matrix"] == whole.record["matrix"], done
    assert alike(*(torch.load(tmp_path / k / "checkpoint.pt", weights_only=True)["segmenter"] for k in ("killed", "whole"))), done
    assert not list((tmp_path / "killed").rglob("*.part"))


class Stops:
    "Interrupts the step of a stage's objective once, and notes the steps that were made."

    def __init__(self, monkeypatch, at):
        self.steps, self.at, self.stopped, step = [], at, False, Step.__call__

        def stops(one, i):
            if isinstance(one.objective, Supervised):             # of the warm-up
                return step(one, i)
            self.steps.append(i)
            if i == self.at and not self.stopped:
                self.stopped = True
                raise KeyboardInterrupt
            return step(one, i)

        monkeypatch.setattr(Step, "__call__", stops)


EIGHT = dict(steps=8, schedule_steps=8, map_weights="shuffled")


@pytest.mark.parametrize("method, stage", [("cr_al", "align"), ("advent", "output_game"), ("dacs", "dacs")])
def test_interrupted_inside_a_stage_goes_on_from_its_checkpoint(method, stage, tmp_path, monkeypatch):
    "A teacher, critics and random numbers go on with it."
    _, whole = walked(method, tmp_path / "a", **EIGHT)
    stops = Stops(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        walked(method, tmp_path / "b", **EIGHT)
    assert list((tmp_path / "b").glob(f"{stage}-*.partial.pt"))
    stops.steps.clear()
    torch.manual_seed(12345)                                      # another random state: the checkpoint's must win
    lab, again = walked(method, tmp_path / "b", **EIGHT)
    assert stops.steps == [4, 5, 6, 7] and alike(whole, again)
    assert [r["step"] for r in lab.logs if r["stage"] == stage] == [2, 4, 6, 8]


@pytest.mark.parametrize("tear", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b[:4000] + bytes([b[4000] ^ 1]) + b[4001:],
                                  lambda b: b"not a checkpoint"])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(tear, tmp_path, monkeypatch):
    _, whole = walked("cr_al", tmp_path / "a", **EIGHT)
    stops = Stops(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        walked("cr_al", tmp_path / "b", **EIGHT)
    newer, = (tmp_path / "b").glob("align-*.partial.pt")
    newer.write_bytes(tear(newer.read_bytes()))
    stops.steps.clear()
    with pytest.warns(UserWarning, match=f"{newer.name} cannot be used"):
        _, again = walked("cr_al", tmp_path / "b", **EIGHT)
    assert stops.steps == [4, 5, 6, 7]                            # from step 4's checkpoint, not from step 6's
    assert alike(whole, again)


def test_no_damage_to_a_file_is_an_error_of_its_own(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.npz"
    np.savez_compressed(path, **{f"a{i}": rng.integers(0, 5, 300, dtype=np.uint8) for i in range(4)})
    torch.save({"w": torch.rand(50)}, tmp_path / "b.pt")
    for file in (path, tmp_path / "b.pt"):
        whole = file.read_bytes()
        assert is_whole(file)
        for place in rng.integers(0, len(whole), 300):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << int(rng.integers(8)))]) + whole[place + 1:])
            assert is_whole(file) in (True, False)               # a bit that nobody reads may pass; nothing may raise
    torch.save(torch.rand(3), tmp_path / "foreign.partial.pt")
    with pytest.warns(UserWarning, match="foreign.partial.pt cannot be used"):
        assert Checkpoints(tmp_path / "foreign").restore({"net": torch.nn.Linear(1, 1)}) == 0


def test_a_kill_while_a_checkpoint_is_written_leaves_a_good_one(tmp_path, monkeypatch):
    import mlan.loop
    parts, kept = {"net": torch.nn.Linear(1, 1)}, Checkpoints(tmp_path / "a")
    for step in (5, 10):
        kept.keep(parts, step)
    kept.last.write_bytes(kept.last.read_bytes()[:300])           # the newer one is torn
    with pytest.warns(UserWarning):
        assert kept.restore(parts) == 5

    def dies(value, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(mlan.loop, "save_whole", dies)
    with pytest.raises(KeyboardInterrupt):
        kept.keep(parts, 15)
    assert kept.restore(parts) == 5


def test_what_a_kill_leaves_beside_a_stage_does_no_harm(tmp_path):
    first, whole = walked("cr_al+it", tmp_path)
    aligned, images, warm = (first.made[stage].path for stage in ("align_translated", "translation", "warm_up"))
    for name in (f"{aligned.name}.7.part", f"{aligned.stem}.partial.pt.7.part", f"{aligned.stem}.jsonl.7.part"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / f"{warm.name}.note").write_text("")
    images.write_bytes(b"half")
    aligned.unlink()
    second, again = walked("cr_al+it", tmp_path)
    assert alike(whole, again) and not list(tmp_path.glob("*part"))
    assert second.notes["warm_up"]["seconds"] is None and second.notes["align_translated"]["seconds"] > 0


def test_a_stage_in_which_a_byte_changed_is_made_again(tmp_path):
    first, whole = walked("adabn", tmp_path)
    warm = first.made["warm_up"].path
    torn = bytearray(warm.read_bytes())
    torn[len(torn) // 2] ^= 1
    warm.write_bytes(bytes(torn))
    with pytest.warns(UserWarning, match=f"{warm.name} is torn; it is kept as"):
        _, again = walked("adabn", tmp_path)
    assert alike(whole, again) and is_whole(warm)


def test_nan_stops_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    import mlan.objective
    seen, loss, warm_up = [], mlan.objective.segmentation_loss, few("source_only")["warmup_steps"]

    def breaks(*args):
        seen.append(1)
        return loss(*args) * (float("nan") if len(seen) == warm_up + 5 else 1)

    monkeypatch.setattr(mlan.objective, "segmentation_loss", breaks)
    with pytest.raises(TrainingError, match=r"loss/seg is not finite at step 5; the checkpoint before it is"):
        walked("source_only", tmp_path)
    kept, = tmp_path.glob("align-*.partial.pt")
    state = torch.load(kept, weights_only=True)
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["parts"]["net"].values())
    assert not list(tmp_path.glob("align-????????????.pt"))


def test_weights_that_break_after_a_finite_loss_are_not_kept(tmp_path, monkeypatch):
    import mlan.trainer
    descend = mlan.trainer.descend

    def breaks(optimiser, *args):
        descend(optimiser, *args)
        with torch.no_grad():
            optimiser.param_groups[0]["params"][0].fill_(float("inf"))

    monkeypatch.setattr(mlan.trainer, "descend", breaks)
    with pytest.raises(TrainingError, match="the weights of net are not finite after step 1"):
        walked("source_only", tmp_path, checkpoint_every=1, log_every=1)
    assert not list(tmp_path.glob("*.pt"))


def test_two_processes_share_a_stage_that_neither_has_made(tmp_path):
    methods = ("rl_al", "il_al")
    both = [start(m, tmp_path / m, tmp_path / "stages") for m in methods]
    assert [p.ends() for p in both] == [0, 0]
    log, = (tmp_path / "stages").glob("warm_up-*.jsonl")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [2, 4, 6]
    _, alone = walked("il_al", tmp_path / "alone")
    assert alike(alone, torch.load(tmp_path / "il_al" / "checkpoint.pt", weights_only=True)["segmenter"])
