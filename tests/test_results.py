"""The README's numbers are those of the records."""
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_tables_are_made_from_the_records(page):
    make_tables = runpy.run_path(str(ROOT / "results" / "make_tables.py"))
    text = (ROOT / page).read_text(encoding="utf-8")
    assert make_tables["with_tables"](text, make_tables["MADE"][page]) == text, "run `python results/make_tables.py --write`"


def test_records_say_what_made_them():
    records = runpy.run_path(str(ROOT / "results" / "make_tables.py"))["records"]()
    assert records
    for record in records:
        assert {"settings", "seed", "commit", "versions", "device", "seconds", "peak_mib", "per_class", "matrix"} <= set(record)
