"The smallest run of every method, which the tests share."

from contextlib import contextmanager
from dataclasses import fields

from mlan.methods import METHODS, own_values
from mlan.settings import Settings

PAIR = ("streets:engine", "streets:camera")
FEW = dict(size=(32, 64), target_size=(32, 64), n_source=40, n_target=16, n_val=4, n_test=4, warmup_steps=6, steps=6, schedule_steps=6,
           ramp_steps=2, batch_size=3, log_every=2, val_every=6, checkpoint_every=2, device="cpu")
OWN = dict(min_samples=3, critic_width=4, translation_steps=3, translation_width=4, translation_batch=2, self_training_steps=4,
           portions=(0.4, 0.5), betas=(0.02, 0.09), band_steps=3)


def fitting(method: str, **values) -> dict:
    "Those of some values that a method of METHODS has: settings and its own fields."
    known = {f.name for f in fields(Settings)} | {*own_values(METHODS[method].recipe)}
    return {name: value for name, value in values.items() if name in known}


def few(method: str, **changes) -> dict:
    "The smallest run's settings for a method."
    return fitting(method, **{**FEW, **OWN, **changes})


@contextmanager
def noted(module, name: str, before=None):
    "The arguments of each call of module.name; `before` is called with them first."
    calls, real = [], getattr(module, name)

    def noting(*args, **kwargs):
        calls.append(args)
        if before:
            before(*args)
        return real(*args, **kwargs)

    setattr(module, name, noting)
    try:
        yield calls
    finally:
        setattr(module, name, real)
