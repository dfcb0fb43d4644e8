"The command starts at once, and says the same by each of its names."
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlan import __version__
from mlan.command_line import _parser
from mlan.methods import METHODS

HEAVY = ("torch", "torchvision", "numpy", "sklearn", "matplotlib", "accelerate", "timm")


def asked(*argv):
    "What `python -m mlan` says, its exit status, and the seconds that it computed."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "mlan", *argv], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout + done.stderr, done.returncode, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("argv, words, code", [
    (["--version"], f"mlan {__version__}", 0),
    (["--help"], "Domain adaptive", 0),
    (["run", "--help"], "--lambda-ent", 0),
    (["run", "--method", "dacs", "--help"], "--sure", 0),
    (["run", "--stpes", "5"], "did you mean --steps", 2),
    (["run", "--source", "a", "--target", "b", "--stpes", "5"], "did you mean --steps", 2),
    (["run", "--sorce", "a", "--target", "b"], "did you mean --source", 2),
    (["run", "--target", "b"], "required: --source", 2),
    (["run", "--method", "dacs", "--lambda-ent", "1"], "there is no --lambda-ent", 2),
    (["run", "--method", "mlna"], "mlan", 2)])
def test_it_answers_at_once(argv, words, code):
    said, status, seconds = asked(*argv)
    assert words in said and status == code, said
    assert seconds < 0.7 or min(asked(*argv)[2] for _ in range(4)) < 0.9     # 0.3 on an idle machine; 5 where torch is imported


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["run", "--method", "dacs", "--help"], ["run", "--stpes", "5"]])
def test_nothing_heavy_is_imported_to_answer(argv):
    code = ("import contextlib, io, sys\nfrom mlan.command_line import main\n"
            f"with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main({argv})\n"
            f"print([name for name in {HEAVY} if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


ROOT = Path(__file__).parents[1]
COMMANDS = [line.split("  #")[0] for page in ("README.md", "CONTRIBUTING.md", "results/README.md")
            for block in re.findall(r"```\w*\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
            for line in block.replace("\\\n", " ").splitlines() if line.startswith("mlan ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_pages_are_understood(command):
    argv = shlex.split(command)[1:]
    args, unknown = _parser(argv).parse_known_args(argv)
    assert not unknown and callable(args.function)


def test_methods_of_the_readme_are_there():
    row = re.compile(r"^\| ((?:`\w[\w+]*`,? ?(?:\.\.\., )?)+) \| \[", re.M)
    names = [name for cell in row.findall((ROOT / "README.md").read_text(encoding="utf-8")) for name in re.findall(r"`([^`]+)`", cell)]
    assert len(names) > 12 and not {*names} - {*METHODS}
    assert {"minent", "advent", "fda_mbt", "dacs", "mlan", "oracle"} <= {*names}
