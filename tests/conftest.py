"What every test shares: threads, fixed seeds, and three markers that say what a test needs."

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "2"))  # before torch is imported, and for the processes that tests start

MARKERS = {
    "slow": "takes over a minute: skipped unless --slow is given",
    "gpu": "needs a CUDA device: skipped where there is none",
    "data": "needs real data sets: skipped unless MLAN_DATA names their folder",
}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take over a minute, too")


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def missing(marker: str, config) -> str | None:
    "Why a test with this marker can't run here, or None."
    if marker == "slow" and not config.getoption("--slow"):
        return "slow: give --slow to run it"
    if marker == "data" and not os.environ.get("MLAN_DATA"):
        return "MLAN_DATA is not set: let it name the folder that holds the data sets"
    if marker == "gpu":
        import torch
        return None if torch.cuda.is_available() else "no CUDA device"
    return None


def pytest_runtest_setup(item):
    for marker in MARKERS:
        if item.get_closest_marker(marker) and (reason := missing(marker, item.config)):
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def same_every_time():
    "Fix seeds and threads before each test. Torch is not imported for a test that does without."
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(THREADS)


@pytest.fixture
def mlan_data() -> Path:
    "The folder of real data sets, one sub-folder each."
    if not os.environ.get("MLAN_DATA"):
        pytest.skip("MLAN_DATA is not set: let it name the folder that holds the data sets")
    folder = Path(os.environ["MLAN_DATA"])
    assert folder.is_dir(), f"MLAN_DATA names {folder}, which is no folder: mend the variable"
    return folder


@pytest.fixture
def no_report(monkeypatch):
    "Reports are not drawn: drawing takes longer than the smallest run."
    import mlan.run_folder

    def blank(path, *parts):
        Path(path).write_text("")
        return Path(path)

    monkeypatch.setattr(mlan.run_folder, "write_report", blank)
