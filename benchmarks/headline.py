"""The README's first command, timed as a whole: `python benchmarks/headline.py`.

Runs the installed `prune-edit` in an empty folder and keeps what it printed, what it wrote to
`evaluation.json` and the seconds it took, the interpreter's start included.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from recovery import RESULTS, commit

COMMAND = ["prune-edit", "prune", "--task", "arithmetic", "--keep-heads", "5%"]


def main() -> None:
    program = shutil.which(COMMAND[0])
    if program is None:
        raise SystemExit("prune-edit is not installed; run pip install . first")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        run = subprocess.run(
            [program, *COMMAND[1:]], cwd=folder, capture_output=True, text=True, check=True
        )
        seconds = time.perf_counter() - started
        evaluation = json.loads((Path(folder) / "pruned" / "evaluation.json").read_text())
    result = {
        "command": " ".join(COMMAND),
        "seconds": round(seconds, 1),
        "commit": commit(),
        "evaluation": evaluation,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "headline.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [*run.stderr.splitlines(), *run.stdout.splitlines()]
    text = "\n".join(line.rstrip() for line in lines)
    (RESULTS / "headline.txt").write_text(f"$ {result['command']}\n{text}\n")
    print(f"{text}\n{seconds:.0f} s")


if __name__ == "__main__":
    main()
