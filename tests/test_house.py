"The house rules: one notebook, one module; numbers give the order; notebooks clean; the package in step with them."

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
NUMBERED = [p for p in NOTEBOOKS if re.fullmatch(r"\d\d_[a-z_]+", p.stem)]
MODULES = sorted(p for p in (ROOT / "mlan").rglob("*.py") if p.stem not in ("__init__", "__main__", "_modidx"))
NUMBER = {p.stem[3:]: int(p.stem[:2]) for p in NUMBERED}  # module, without its package -> number of its notebook
PACKAGES = ("", "study.")  # a notebook exports to mlan.MODULE, or to mlan.study.MODULE
each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)


def code_cells(notebook: Path) -> list[str]:
    "Sources of a notebook's code cells."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def directives(notebook: Path, name: str) -> list[str]:
    "What follows `#| name` in each cell that has it."
    found = (re.search(rf"^#\s*\|\s*{name}\b(.*)$", cell, re.MULTILINE) for cell in code_cells(notebook))
    return [match[1].strip() for match in found if match]


def imported_modules(source: str) -> set[str]:
    "Modules of mlan that a cell imports, without their package."
    found = set()
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(source))):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[-1] for a in node.names if a.name.startswith("mlan.")}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "mlan"):
            package = (node.module or "mlan") in ("mlan", "mlan.study")
            found |= {a.name for a in node.names} if package else {node.module.split(".")[-1]}
    return found - {"__version__"}


def copy_of_the_house(folder: Path) -> Path:
    "Settings, notebooks, what is written by hand, and no other module: nbdev works there and the working tree stays as it is."
    ignored = shutil.ignore_patterns(".ipynb_checkpoints", "runs", "figures")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=ignored)
    (folder / "mlan").mkdir()
    for name in ("settings.ini", "mlan/__init__.py", "mlan/__main__.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def nbdev(command: str, folder: Path) -> None:
    "Run an nbdev command in a copy of the house."
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    script = Path(sys.executable).with_name(command)
    done = subprocess.run([sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Failed" not in done.stderr, f"{command} failed:\n{done.stdout}{done.stderr}"


def test_there_are_notebooks():
    assert NUMBERED, "no numbered notebook in nbs/"


@each_notebook
def test_no_picture_of_real_data_is_kept(notebook):
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if "".join(cell["source"]).startswith("#| data"):
            assert not any("image/png" in output.get("data", {}) for output in cell["outputs"]), (
                f"{notebook.name} keeps a picture of a data set whose licence does not allow it: clear that cell's output")


@each_notebook
def test_outputs_name_no_place_on_a_machine(notebook):
    "Warnings and paths of whoever ran it last."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            told = "".join(output.get("text", ())) + json.dumps({k: v for k, v in output.get("data", {}).items() if k.startswith("text/")})
            place = re.search(r"site-packages|/(home|root|work|Users)/|[A-Z]:\\\\", told)
            assert not place, f"{notebook.name} shows {told[max(0, place.start() - 60):place.end() + 60]!r}: run it again without that"


@each_notebook
def test_one_notebook_one_module(notebook):
    name = notebook.relative_to(ROOT)
    assert notebook in NUMBERED or notebook == ROOT / "nbs/index.ipynb", f"{name}: name it NN_module.ipynb, in nbs/"
    modules = directives(notebook, "default_exp")
    exports = notebook in NUMBERED and (modules or directives(notebook, "exporti?"))
    expected = [[package + notebook.stem[3:]] for package in PACKAGES] if exports else [[]]
    assert modules in expected, f"{name} has default_exp {modules}, expected {expected[0]}"


def test_numbers_are_unique():
    numbers = [p.stem[:2] for p in NUMBERED]
    assert len(set(numbers)) == len(numbers), f"two notebooks share a number: {[p.stem for p in NUMBERED]}"


def test_every_module_has_its_notebook():
    exported = {module for notebook in NOTEBOOKS for module in directives(notebook, "default_exp")}
    mend = "run nbdev_export, and delete the module whose notebook is gone"
    there = {".".join(p.relative_to(ROOT / "mlan").with_suffix("").parts) for p in MODULES}
    assert there == exported, f"the modules of mlan and the notebooks' default_exp differ: {mend}"


@pytest.mark.parametrize("notebook", NUMBERED, ids=lambda p: p.stem)
def test_imports_only_from_lower_numbers(notebook):
    used = {module for cell in code_cells(notebook) for module in imported_modules(cell)}
    unknown = used - set(NUMBER)
    assert not unknown, f"{notebook.name} imports from mlan {sorted(unknown)}, which no notebook exports"
    upward = {module for module in used if NUMBER[module] >= int(notebook.stem[:2])}
    assert not upward, f"{notebook.name} imports {sorted(upward)}: only from notebooks with lower numbers"


@pytest.mark.parametrize("picture", sorted((ROOT / "nbs" / "figures").glob("*.svg")), ids=lambda p: p.stem)
def test_a_browser_can_read_the_figures(picture):
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_notebooks_are_clean(tmp_path):
    folder = copy_of_the_house(tmp_path)
    nbdev("nbdev_clean", folder)
    unclean = [p.name for p in NOTEBOOKS if p.read_bytes() != (folder / p.relative_to(ROOT)).read_bytes()]
    assert not unclean, f"nbdev_clean changes {unclean}: run it"


def test_package_is_in_step_with_notebooks(tmp_path):
    folder = copy_of_the_house(tmp_path)
    nbdev("nbdev_export", folder)
    names = {str(p.relative_to(place / "mlan")) for place in (ROOT, folder) for p in (place / "mlan").rglob("*.py")}
    there = {place: {n: (place / "mlan" / n).read_bytes() for n in names if (place / "mlan" / n).exists()}
             for place in (ROOT, folder)}
    differing = sorted(n for n in names if there[ROOT].get(n) != there[folder].get(n))
    assert not differing, f"nbdev_export changes mlan/ {differing}: run it (or nbdev_update, if you edited the module)"


@each_notebook
def test_no_cell_is_long(notebook):
    def length(cell):
        "Lines of code: neither empty ones nor nbdev's directives."
        return sum(bool(line.strip()) and not line.lstrip().startswith("#|") for line in cell.splitlines())

    longest = max(code_cells(notebook), key=length, default="")
    assert length(longest) <= 30, f"{notebook.name}: a cell of over 30 lines begins {longest[:60]!r}"


@each_module
def test_no_function_is_long(module):
    functions = [n for n in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
                 if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [f.name for f in functions if f.end_lineno - f.lineno + 1 > 30]
    assert not long, f"{module.name}: {long} are over 30 lines"


@each_module
def test_no_module_is_long(module):
    lines = len(module.read_text(encoding="utf-8").splitlines())
    assert lines <= 300, f"{module.name} has {lines} lines: a notebook that exports over 300 is two notebooks"


def strings(node: ast.AST) -> set[str]:
    "The string constants that are more than documentation."
    docs = {ast.get_docstring(n, clean=False) for n in ast.walk(node)
            if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)}
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)} - docs


@each_module
def test_only_methods_name_methods(module):
    "Data, trainer, lab and runs serve any method: what they do cannot hang on a method's name."
    from mlan.methods import METHODS
    number, tree = NUMBER[module.stem], ast.parse(module.read_text(encoding="utf-8"))
    if 40 <= number < 60 or module.parent.name == "study":
        return
    named = (strings(tree) & {*METHODS}) - {"mlan"}                # which is the package's name, too
    methods = {name for name, n in NUMBER.items() if 40 <= n < 59}
    used = imported_modules(module.read_text(encoding="utf-8")) & methods
    assert not named and not used, f"{module.name} names {sorted(named | used)}: only methods and the study may"
