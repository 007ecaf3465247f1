"""The tables and figures of the paper (arXiv 2409.14144): `python benchmarks/paper/paper.py 5`.

One command each, for any model and size; `all` for all of them. The paper's numbers stand beside,
and are judged where the model is the paper's (huggyllama/llama-7b, EleutherAI/gpt-j-6b): which
differ by more than its tolerance is said. With --out, JSON a table, pictures, and one page.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import applied
import heads
import stages
import torch
import tuned
from cases import Setting
from found import Found, file_of, label
from recovery import RESULTS, commit

from prune_edit.errors import PruneEditError
from prune_edit.loading import load_decoder
from prune_edit.verbs.common import base_name

Work = Callable[[Setting, str, Path | None], Found]
TABLES: dict[str, Work] = {
    "1": heads.by_operation,
    "2": heads.tops_by_digits,
    "3": heads.by_carry,
    "section-4.2": stages.one_case,
    "4": stages.neurons_of_case,
    "5": stages.kept_and_masked,
    "6": stages.lowest_neuron,
    "8": stages.hidden_sets,
    "9": tuned.one_case,
    "10": tuned.amplification,
    "11": applied.pruning,
    "13": applied.editing,
    "18": heads.by_operation,
    "19": stages.kept_and_masked,
    "20": stages.lowest_neuron,
    "21": stages.hidden_sets,
    "24": heads.by_digits,
    "25": heads.by_digits,
    "26": heads.by_digits,
    "27": heads.by_digits,
    "figure-1": stages.four_stages,
    "figure-2": tuned.accuracy_by_layer,
}
LONG = ("9", "10", "11", "figure-2")
"""What tunes models."""
HEAD = "# The paper's tables on {model}"
READING = "reading.md"


def run(setting: Setting, names: Sequence[str], folder: Path | None) -> int:
    """Measure, print and write; the number of tables that could not be."""
    failed, code = 0, commit()
    for name in names:
        started = time.perf_counter()
        try:
            found = TABLES[name](setting, name, folder)
        except PruneEditError as error:
            print(f"{label(name)}: {error}", file=sys.stderr)
            failed += 1
            continue
        print(found.markdown(setting.name), flush=True)
        if folder is not None:
            fields = {
                **found.to_dict(setting.name),
                **setting.describe(),
                "seconds": round(time.perf_counter() - started, 1),
                "commit": code,
            }
            path = folder / f"{file_of(name)}.json"
            path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    if folder is not None:
        (folder / "README.md").write_text(page(folder), encoding="utf-8")
    return failed


def page(folder: Path) -> str:
    """All tables of a folder, in the paper's order, and how to read them where that is there."""
    found = {}
    for path in folder.glob("*.json"):
        fields = json.loads(path.read_text(encoding="utf-8"))
        found[fields["table"]] = fields
    order = [name for name in TABLES if name in found]
    models = sorted({found[name]["model"] for name in order})
    lines = [HEAD.format(model=", ".join(models)), ""]
    reading = folder / READING
    if reading.exists():
        lines += [reading.read_text(encoding="utf-8").rstrip(), ""]
    for name in order:
        fields = found[name]
        lines.append(Found.from_dict(fields).markdown(fields["model"]).rstrip())
        picture = folder / f"{file_of(name)}.png"
        if picture.exists():
            lines += ["", f"![{fields['title']}]({picture.name})"]
        lines += [
            "",
            f"`python benchmarks/paper/paper.py {name}`, {fields['cases_an_operation']} cases an "
            f"operation at most, {fields['seconds']:.0f} s, commit {fields['commit'][:12]}",
            "",
        ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="+", choices=[*TABLES, "quick", "all"],
                        help="quick: all that tune nothing")  # fmt: skip
    parser.add_argument("--model", help="folder or hub id; default: the bundled reference model")
    parser.add_argument("--cases", type=int, default=400, help="of an operation, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=3, help="random choices beside each")
    parser.add_argument("--steps", type=int, default=60, help="of LoRA in tables 9, 10, figure 2")
    parser.add_argument("--recipe-steps", type=int, default=600, help="of LoRA in table 11")
    parser.add_argument("--recipe", type=Path, default=None, help="table 11's rows, kept and used")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="folder for JSON, pictures and README.md")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        decoder = load_decoder(given.model, device=given.device, dtype=given.dtype)
    except PruneEditError as error:
        sys.exit(f"error: {error}")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
    recipe = given.recipe or (
        (given.out or RESULTS) / "recipe.json" if given.model
        else RESULTS / "quality-paper-recipe.json"
    )  # fmt: skip
    setting = Setting(
        decoder, base_name(decoder), given.cases, given.seed, given.draws, given.steps,
        recipe, given.recipe_steps,
    )  # fmt: skip
    names: list[str] = []
    for name in given.table:
        some = {"all": list(TABLES), "quick": [each for each in TABLES if each not in LONG]}
        names += some.get(name, [name])
    return 1 if run(setting, list(dict.fromkeys(names)), given.out) else 0


if __name__ == "__main__":
    sys.exit(main())
