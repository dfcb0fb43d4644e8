"What all benchmarks write down: which processor, which commit, a JSON object a line. Nothing here needs torch."

import json
import subprocess
from pathlib import Path


def cpu_name() -> str:
    "The processor's."
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "cpu")


def commit() -> str:
    "The source tree's."
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return told.stdout.strip()


def append_records(records: list, path: Path | None):
    "Append to a file; nowhere if there is no path."
    if path:
        with path.open("a", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in records)
