"""Beyond one process, one sitting and one memory: the same scores, whatever did them and when."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from pico_checkpoint import dense
from pico_families import CONFIGS, family_model
from transformers import AutoConfig

import prune_edit
from prune_edit import verbs
from prune_edit.cli import main
from prune_edit.decoder import Decoder
from prune_edit.errors import ModelError, PlanError
from prune_edit.loading import REFERENCE_MODEL, load_decoder
from prune_edit.scoring import METHODS, Options, Scores, additive
from prune_edit.scoring import cache as cache_room
from prune_edit.scoring import shards as shards_room
from prune_edit.scoring.cache import Entry, entry_of
from prune_edit.scoring.offload import _plan, score_streamed
from prune_edit.scoring.parallel import run_shards
from prune_edit.scoring.projection import project, top_units
from prune_edit.scoring.shards import Sums, shards_of
from prune_edit.scoring.statistics import Moments
from prune_edit.streamed import StreamedDecoder, load_streamed, parse_memory, weight_bytes
from prune_edit.tasks.prompts import Encoded
from prune_edit.tasks.task import Example

INSTALLED = Path(prune_edit.__file__).parents[1]  # where the tested package lies
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHARD = 4  # examples, where the real size would make every test one shard


def prompts_of(count: int, seed: int = 0, vocabulary: int = 40) -> list[Encoded]:
    """Prompts of different lengths with one or two answer tokens."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        ids = tuple(chance.randrange(3, vocabulary) for _ in range(chance.randrange(4, 9)))
        rows.append(Encoded(ids, len(ids) - chance.choice((1, 2)), Example(str(number), "x")))
    return rows


def pico(folder: Path, name: str, **settings: Any) -> Decoder:
    """A pico model from a folder, with the bundled tokenizer beside it."""
    if not folder.exists():
        dense(name).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(REFERENCE_MODEL / file, folder)
    return load_decoder(folder, **settings)


def equal(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> bool:
    return all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(got, want, strict=True))


def how(method: str, options: Options) -> Any:
    return additive(method, options) or METHODS[method]


# Shards


def test_shards_do_not_depend_on_order_and_stay_few() -> None:
    rows = prompts_of(150)
    cut = shards_of(rows, Options())
    assert [len(shard.prompts) for shard in cut] == [32, 32, 32, 32, 22]
    assert sorted(row.example.prompt for shard in cut for row in shard.prompts) == sorted(
        row.example.prompt for row in rows
    )
    assert len(shards_of(rows, Options(), hidden=16 * 75)) == 2
    pairs = Options(contrast=tuple(reversed(rows)))
    for shard in shards_of(rows, pairs):
        assert [rows.index(row) for row in shard.prompts] == [
            149 - rows.index(row) for row in shard.contrast
        ]
    shuffled = random.Random(1).sample(rows, len(rows))
    assert shards_of(shuffled, Options()) == cut
    many = [replace(rows[0], example=Example(str(i), "x")) for i in range(5000)]
    assert len(shards_of(many, Options())) <= shards_room.MOST_SHARDS


@pytest.mark.parametrize("method", sorted(METHODS))
def test_shards_add_up_to_the_whole_whatever_the_order(method: str, tmp_path: Path) -> None:
    decoder, rows = pico(tmp_path / "m", "llama-gqa"), prompts_of(11)
    options = Options(seed=3)
    whole = METHODS[method](decoder, rows, options)
    found = run_shards(decoder, rows, how(method, options), options, size=SHARD)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=0, equal_nan=True)
    again = run_shards(decoder, rows[::-1], how(method, options), options, size=SHARD)
    assert equal(found, again)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("intervention", Options(measure="accuracy", neurons=False)),
        ("intervention", Options(ablation="mean", neurons=False)),
        ("taylor", Options(integrated_steps=3)),
        ("importance", Options(norm="true")),
        ("cna", Options(contrast=tuple(prompts_of(11, seed=5)))),
    ],
)
def test_other_settings_add_up_too(method: str, options: Options, tmp_path: Path) -> None:
    decoder, rows = pico(tmp_path / "m", "llama-gqa"), prompts_of(11)
    whole = METHODS[method](decoder, rows, options)
    found = run_shards(decoder, rows, how(method, options), options, size=SHARD)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=0, equal_nan=True)
    turned = replace(options, contrast=options.contrast[::-1])
    again = run_shards(decoder, rows[::-1], how(method, turned), turned, size=SHARD)
    assert equal(found, again)


def test_what_does_not_add_up_over_prompts_is_not_cut() -> None:
    for method in ("cna", "importance", "intervention", "taylor", "wanda", "flap", "activation"):
        assert additive(method, Options()), method
    for method in ("query", "magnitude", "random"):
        assert not additive(method, Options()), method
    by_mean = Options(ablation="mean")
    assert not additive("intervention", by_mean)
    assert additive("intervention", replace(by_mean, means=Moments()))

    def median(decoder: Decoder, rows: Sequence[Encoded], options: Options) -> Any:
        return torch.tensor([[float(len(rows))]]), torch.zeros(1, 1)

    found = run_shards(None, prompts_of(9), median, Options(), size=SHARD)  # type: ignore[arg-type]
    assert found[0].item() == 9


def test_progress_counts_all_prompts(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = Options(progress=lambda what, done, total: seen.append((done, total)))
    rows = prompts_of(10)
    decoder = pico(tmp_path / "m", "gpt2")
    run_shards(decoder, rows, how("cna", options), options, size=SHARD)
    assert {total for _, total in seen} == {10}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (10, 10)


# Several processes


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("cna", Options(top_heads=2)),
        ("importance", Options()),
        ("intervention", Options()),
        ("intervention", Options(ablation="mean", measure="accuracy", neurons=False)),
        ("taylor", Options()),
    ],
)
def test_processes_share_the_units_of_a_few_prompts(
    method: str, options: Options, name: str, tmp_path: Path
) -> None:
    rows, count = prompts_of(3), 3
    own = [pico(tmp_path / "m", name) for _ in range(count)]  # hooks are a model's own
    want = METHODS[method](own[0], rows, options)
    barrier = threading.Barrier(count, timeout=60)
    given: list[torch.Tensor | None] = [None] * count
    exchanges = [0] * count

    def member(rank: int) -> Any:
        def gather(found: torch.Tensor) -> torch.Tensor:
            exchanges[rank] += 1
            given[rank] = found
            barrier.wait()
            total = torch.stack([each for each in given if each is not None]).sum(0)
            barrier.wait()
            return total

        shared = replace(options, share=(rank, count), gather=gather)
        return METHODS[method](own[rank], rows, shared)

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(member, range(count)))
    for got in found:
        torch.testing.assert_close(got, want, atol=2e-6, rtol=0, equal_nan=True)
    assert len(set(exchanges)) == 1
    assert (exchanges[0] > 0) == (method != "taylor")


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    threads = str(torch.get_num_threads())  # a sum's order depends on them
    return {**clean, "PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": threads, **more}


def free_port() -> str:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return str(opened.getsockname()[1])


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu",
        "--main_process_port", free_port(), "-m", "prune_edit", *words,
    ]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), check=False, timeout=300
    )


@pytest.fixture(scope="module")
def mathgpt_folder(shared: Path) -> str:
    return str(shared / "models" / "mathgpt-4l4h")


def test_two_processes_give_the_bytes_of_one(mathgpt_folder: str, tmp_path: Path) -> None:
    words = ("score", "--model", mathgpt_folder, "--task", "arithmetic/padded", "--limit", "100",
             "--no-cache", "--show", "2")  # fmt: skip
    two = launch(*words, "--out", str(tmp_path / "two"), "--json")
    assert two.returncode == 0, two.stderr
    shown = json.loads(two.stdout)  # one process spoke
    assert len(shown["top"]["heads"]) == 2
    verbs.score(mathgpt_folder, "arithmetic/padded", limit=100).save(tmp_path / "one")
    one = (tmp_path / "one" / "scores.safetensors").read_bytes()
    assert (tmp_path / "two" / "scores.safetensors").read_bytes() == one
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["scores.safetensors"]


def test_a_launched_error_is_said_once(mathgpt_folder: str, tmp_path: Path) -> None:
    done = launch("score", "--model", mathgpt_folder, "--task", "nothing", "--out", str(tmp_path))
    assert done.returncode != 0
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "nothing" in said[0], done.stderr


FAILING = """
import os, sys
from prune_edit import scoring
from prune_edit.errors import TaskError
from prune_edit.scoring import shards
shards.SHARD_EXAMPLES, shards.SHARD_SHARE = 4, 10**9
real = scoring.METHODS["cna"]
def fails(decoder, prompts, options):
    if os.environ["RANK"] == "1":
        raise TaskError("this shard cannot be done; mend it")
    return real(decoder, prompts, options)
scoring.METHODS["cna"] = fails
from prune_edit.cli import main
main(prog_name="prune-edit")
"""


def test_one_process_failing_ends_all_with_one_line_and_its_code(
    mathgpt_folder: str, tmp_path: Path
) -> None:
    port = free_port()
    words = ("score", "--model", mathgpt_folder, "--task", "arithmetic/padded", "--limit", "16",
             "--no-cache", "--out", str(tmp_path / "s"))  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(
                RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
        )
        for rank in (0, 1)
    ]
    ends = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [6, 6], ends
    assert ends[0] == ("", "error: this shard cannot be done; mend it\n")
    assert ends[1] == ("", "")
    assert not (tmp_path / "s").exists()


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    done = CliRunner().invoke(main, ["prune"], prog_name="prune-edit")
    assert done.exit_code == 2
    assert "prune runs in one process; start it without a launcher" in done.stderr
    monkeypatch.setenv("RANK", "1")
    assert CliRunner().invoke(main, ["prune"], prog_name="prune-edit").output == ""


# Resume and cache


RESUMING = """
import os, signal, sys
from prune_edit import scoring
from prune_edit.scoring import shards
shards.SHARD_EXAMPLES, shards.SHARD_SHARE = 4, 10**9
real, calls = scoring.METHODS["cna"], []
def counted(decoder, prompts, options):
    if len(calls) == int(os.environ["DIES_AT"]):
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(1)
    return real(decoder, prompts, options)
scoring.METHODS["cna"] = counted
from prune_edit.cli import main
try:
    main(prog_name="prune-edit")
finally:
    print("shards", len(calls), file=sys.stderr)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    mathgpt_folder: str, tmp_path: Path
) -> None:
    def score(out: str, home: str, dies_at: int) -> subprocess.CompletedProcess[str]:
        words = ("score", "--model", mathgpt_folder, "--task", "arithmetic/padded",
                 "--limit", "22", "--out", str(tmp_path / out))  # fmt: skip
        return subprocess.run(
            [sys.executable, "-c", RESUMING, *words],
            capture_output=True,
            text=True,
            env=environment(XDG_CACHE_HOME=str(tmp_path / home), DIES_AT=str(dies_at)),
            check=False,
        )

    whole = score("whole", "a", 99)
    assert whole.returncode == 0 and whole.stderr.endswith("shards 6\n"), whole.stderr
    assert score("again", "b", 4).returncode == -signal.SIGKILL
    assert not (tmp_path / "again").exists()
    (kept,) = (tmp_path / "b" / "prune-edit" / "scores").iterdir()
    assert kept.name.endswith(".part.safetensors")
    again = score("again", "b", 99)
    assert "going on from 4 of 6 finished shards of an earlier run" in again.stderr
    assert again.stderr.endswith("shards 2\n"), again.stderr
    files = [tmp_path / name / "scores.safetensors" for name in ("whole", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    (kept,) = (tmp_path / "b" / "prune-edit" / "scores").iterdir()
    assert kept.name.endswith(".scores.safetensors")


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["score", *words], prog_name="prune-edit")


def test_a_finished_run_is_found_and_said(
    mathgpt_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls: list[int] = []
    real = METHODS["cna"]

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setitem(METHODS, "cna", counted)
    words = ("--model", mathgpt_folder, "--task", "arithmetic/padded", "--limit", "4")
    for number, (more, made, said) in enumerate(
        [
            ((), True, False),
            ((), False, True),
            (("--no-cache",), True, False),
            (("--top-heads", "2"), True, False),
            (("--seed", "1"), False, True),  # cna draws nothing
            (("--batch-tokens", "64"), False, True),
            (("--split", "test"), True, False),
        ]
    ):
        calls.clear()
        done = run(*words, *more, "--out", str(tmp_path / str(number)))
        assert done.exit_code == 0, done.output
        assert bool(calls) == made, more
        assert ("found finished scores in the cache" in done.stderr) == said, more
    first, second = (Scores.load(tmp_path / name) for name in ("0", "1"))
    assert first.digest == second.digest
    assert (tmp_path / "0/scores.safetensors").read_bytes() == (
        tmp_path / "1/scores.safetensors"
    ).read_bytes()
    calls.clear()
    verbs.score(mathgpt_folder, "arithmetic/padded", limit=4)
    assert calls, "the library caches only when asked"


def test_the_key_is_of_everything_that_decides_the_scores(tmp_path: Path) -> None:
    decoder, rows = pico(tmp_path / "m", "gpt2"), prompts_of(3)
    changed = Decoder(decoder.model, decoder.tokenizer, decoder.source, "another")

    def key(decoder: Decoder, rows: list[Encoded], method: str, options: Options) -> str:
        entry = entry_of(decoder, rows, method, options)
        assert entry is not None
        return entry.key

    keys = [
        key(decoder, rows, "cna", Options()),
        key(changed, rows, "cna", Options()),
        key(decoder, rows[:2], "cna", Options()),
        key(decoder, rows, "importance", Options()),
        key(decoder, rows, "cna", Options(neurons=False)),
    ]
    assert len(set(keys)) == len(keys)
    for same in (Options(progress=print), Options(seed=1), Options(batch_tokens=2)):
        assert key(decoder, rows, "cna", same) == keys[0]
    drawn = [key(decoder, rows, "random", Options(seed=seed)) for seed in (0, 1)]
    assert len({*drawn, *keys}) == len(keys) + 2
    others: dict[str, Any] = {
        "top_heads": 2, "top_neurons": 3, "neurons": False, "ablation": "mean",
        "measure": "accuracy", "norm": "true", "contrast": tuple(rows), "adapted": changed,
        "query_neurons": 2, "integrated_steps": 2,
    }  # fmt: skip
    inert = {"progress", "seed", "batch_tokens", "share", "gather", "means"}
    assert {*others, *inert} == {field.name for field in fields(Options)}
    options = [Options(**{name: value}) for name, value in others.items()]
    options.append(Options(contrast=tuple(prompts_of(3, seed=2))))
    options.append(Options(adapted=replace(changed, digest="a third")))
    found = [keys[0], *(key(decoder, rows, "cna", each) for each in options)]
    assert len(set(found)) == len(found)
    for unknown in (decoder, replace(decoder, digest="")):  # tuned, and nobody knows how
        assert entry_of(decoder, rows, "cna", Options(adapted=unknown)) is None
    nameless = Decoder(decoder.model, decoder.tokenizer)
    assert entry_of(nameless, rows, "cna", Options()) is None


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    entry = Entry(tmp_path, "k")
    assert entry.load_scores() is None
    entry.save_scores((torch.ones(2, 2), torch.ones(2, 3)))
    assert entry.load_scores() is not None
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b"", b"\0" * 64, good[:20]):
        path.write_bytes(bad)
        assert entry.load_scores() is None
    path.rename(tmp_path / "other.scores.safetensors")  # the right content of another run
    path.with_name("other.scores.safetensors").write_bytes(good)
    assert Entry(tmp_path, "other").load_scores() is None
    sums = Sums(size=4)
    sums.add({"heads": torch.ones(1, 2), "weight": torch.tensor(3)})
    sums.add({"heads": torch.full((1, 2), 0.1), "weight": torch.tensor(2)})
    entry.save_sums(sums)
    found = entry.load_sums()
    assert found is not None
    assert found.counts() == sums.counts()
    assert found.counts() == {"done": 2, "size": 4}
    assert equal(tuple(found.tensors.values()), tuple(sums.tensors.values()))
    assert int(found.tensors["weight"]) == 5


def test_the_cache_stays_small_and_never_fails_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = (torch.ones(2, 2), torch.ones(2, 3))
    monkeypatch.setattr(cache_room, "MOST_FILES", 3)
    for number in range(6):
        Entry(tmp_path, str(number)).save_scores(part)
        os.utime(tmp_path / f"{number}.scores.safetensors", (number, number))
    names = {path.name.partition(".")[0] for path in tmp_path.iterdir()}
    assert names == {"3", "4", "5"}
    monkeypatch.setattr(cache_room, "MOST_BYTES", 1)
    Entry(tmp_path, "6").save_scores(part)
    assert [path.name for path in tmp_path.iterdir()] == ["6.scores.safetensors"]
    (tmp_path / "file").write_text("")
    Entry(tmp_path / "file", "7").save_scores(part)  # a folder that cannot be made
    assert Entry(tmp_path / "file", "7").load_scores() is None


# Layers on disk


def streamed(folder: Path, name: str, share: float) -> StreamedDecoder:
    pico(folder, name)
    size = int(weight_bytes(folder, torch.float32) * share)
    decoder = pico(folder, name, device_map="auto", max_memory=str(size))
    assert isinstance(decoder, StreamedDecoder)
    return decoder


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "falcon-eager"])
def test_every_familys_streamed_scores_are_the_plain_ones(name: str, tmp_path: Path) -> None:
    model = family_model(name)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    rows, whole = prompts_of(6), Decoder(model, None, "whole", "digest")  # type: ignore[arg-type]
    disk = load_streamed(tmp_path, None, config, "cpu", torch.float32, "digest", "disk", 10**7)
    want = METHODS["cna"](whole, rows, Options())
    assert float(want[1].nan_to_num().abs().max()) > 1e-3
    got = score_streamed(disk, rows, "cna", Options())
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6, equal_nan=True)
    for method in ("wanda", "flap", "activation", "magnitude"):
        disk.store.loads[:] = [0] * disk.n_layers
        want = METHODS[method](whole, rows, Options())
        got = score_streamed(disk, rows, method, Options())
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6, equal_nan=True)
        once = {"activation": 1, "magnitude": 1}.get(method, 2)  # the statistics, the weights
        assert disk.store.loads == [once] * disk.n_layers, method
        shards = run_shards(disk, rows, how(method, Options()), Options(), size=4)
        torch.testing.assert_close(shards, want, atol=1e-6, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["llama", "llama-gqa", "llama-biased", "mistral", "gpt2"])
@pytest.mark.parametrize("method", ["cna", "importance"])
def test_streamed_scores_are_the_plain_ones_and_a_pass_reads_each_layer_once(
    name: str, method: str, tmp_path: Path
) -> None:
    rows, options = prompts_of(6), Options(top_heads=2)
    want = METHODS[method](pico(tmp_path / "m", name), rows, options)
    decoder = streamed(tmp_path / "m", name, 1.2)
    most: list[int] = []
    for layer in decoder.layers:
        layer.register_forward_hook(
            lambda *_: most.append(sum(not next(m.parameters()).is_meta for m in decoder.layers))
        )
    object.__setattr__(decoder, "max_memory", decoder.max_memory - decoder.room + 10**7)
    assert _plan(decoder, rows).heads == sum(map(len, decoder.layout.heads))
    got = score_streamed(decoder, rows, method, options)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    assert decoder.store.loads == [2] * decoder.n_layers, "one pass for heads, one for neurons"
    assert max(most) == 1
    assert decoder.store.residents == []


def test_little_memory_takes_more_passes_for_the_same_scores(tmp_path: Path) -> None:
    rows = prompts_of(5)
    want = METHODS["cna"](pico(tmp_path / "m", "llama"), rows, Options())
    decoder = streamed(tmp_path / "m", "llama", 1.2)
    state = 9 * decoder.unembedding.shape[1] * 4
    passes = []
    for states in (140, 14, 6, 4):
        object.__setattr__(
            decoder, "max_memory", decoder.max_memory - decoder.room + states * state
        )
        decoder.store.loads[:] = [0] * decoder.n_layers
        got = score_streamed(decoder, rows, "cna", Options(batch_tokens=16))
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
        assert len(set(decoder.store.loads)) == 1, "every pass reads each layer once"
        passes.append(decoder.store.loads[0])
    assert passes == sorted(passes) and passes[0] == 2 and passes[-1] > passes[0]
    object.__setattr__(decoder, "max_memory", decoder.max_memory - decoder.room + 2)
    with pytest.raises(ModelError, match=r"leave no room for one example of .*; give at least"):
        score_streamed(decoder, rows, "cna", Options())


def test_a_streamed_model_answers_as_the_whole_one(tmp_path: Path) -> None:
    whole, decoder = pico(tmp_path / "m", "gpt2"), streamed(tmp_path / "m", "gpt2", 1.2)
    ids = torch.arange(3, 13).view(2, 5)
    with torch.no_grad():
        assert torch.equal(decoder.model(ids).logits, whole.model(ids).logits)
    with pytest.raises(PlanError, match=r"--score taylor needs the whole model in memory"):
        score_streamed(decoder, prompts_of(2), "taylor", Options())
    roomy = pico(tmp_path / "m", "gpt2", device_map="auto", max_memory="1GB")
    assert not isinstance(roomy, StreamedDecoder)
    with pytest.raises(ModelError, match="do not hold the embedding and one layer"):
        pico(tmp_path / "m", "gpt2", device_map="auto", max_memory="1kB")
    with pytest.raises(ModelError, match="--max-memory 1GB needs --device-map auto"):
        pico(tmp_path / "m", "gpt2", max_memory="1GB")


def test_streaming_through_the_command(mathgpt_folder: str, tmp_path: Path) -> None:
    size = weight_bytes(Path(mathgpt_folder), torch.float32)
    words = ("--model", mathgpt_folder, "--task", "arithmetic/padded", "--limit", "6")
    done = run(*words, "--device-map", "auto", "--max-memory", str(size), "--out",
               str(tmp_path / "s"), "--show", "1")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "its layers are read from disk" in done.stderr
    found, want = Scores.load(tmp_path / "s"), verbs.score(
        mathgpt_folder, "arithmetic/padded", limit=6
    )  # fmt: skip
    torch.testing.assert_close(found.heads, want.heads, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.neurons, want.neurons, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 << 30), ("500MB", 5 * 10**8), ("1.5k", 1500), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "much", "0", "-1", "8 GiBs", "8i"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ModelError, match="is no size; give one such as 8GiB"):
        parse_memory(text)


# What the top units say


def test_projections_are_the_softmax_of_the_values(tmp_path: Path) -> None:
    decoder, rows = pico(tmp_path / "m", "gpt2"), prompts_of(5)
    heads, neurons = METHODS["importance"](decoder, rows, Options())
    heads[0, 1] = torch.nan
    found = top_units(decoder, Scores(heads, neurons), rows, Options(), 1000)
    n_heads = heads.numel() - 1  # all but the absent one
    assert (len(found.heads), len(found.neurons)) == (n_heads, neurons.numel())
    for unit in found.neurons:
        assert unit.name == f"{unit.layer}_{unit.unit}"
        assert unit.score == float(neurons[unit.layer, unit.unit])
    signs = set()
    for layer in range(decoder.n_layers):
        block: Any = decoder.model.transformer.h[layer]
        seen: list[torch.Tensor] = []
        with block.mlp.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0])):  # noqa: B023
            for row in rows:
                decoder.model(torch.tensor([row.ids[:-1]]))
        answers = torch.cat([s[0, r.start - 1 :] for s, r in zip(seen, rows, strict=True)])
        for unit in found.neurons:
            if unit.layer != layer:
                continue
            assert unit.coefficient == pytest.approx(
                float(answers[:, unit.unit].detach().mean()), abs=1e-6
            )
            signs.add(unit.coefficient < 0)
            value = block.mlp.c_proj.weight[unit.unit].detach()
            logits = decoder.model.lm_head.weight.detach() @ value  # E_u v
            if unit.coefficient < 0:
                logits = -logits
            chances = torch.softmax(logits, 0)
            best = int(chances.argmax())
            assert unit.tokens[0][0] == decoder.tokenizer.decode([best])
            assert unit.tokens[0][1] == pytest.approx(float(chances[best]))
    assert signs == {True, False}, "both a positive and a negative coefficient were tried"
    assert sum(chance for _, chance in project(decoder, torch.zeros(32), 40)) == pytest.approx(1)


def test_heads_are_named_as_the_paper_does(tmp_path: Path) -> None:
    decoder, rows = pico(tmp_path / "m", "llama"), prompts_of(3)
    heads, neurons = torch.zeros(decoder.head_shape), torch.zeros(decoder.neuron_shape)
    heads[1, 2] = 0.5
    (unit,) = top_units(decoder, Scores(heads, neurons), rows, Options(), 1).heads
    assert (unit.name, unit.score, unit.coefficient) == ("1^2", 0.5, None)


def test_show_prints_tables_and_json(mathgpt_folder: str, tmp_path: Path) -> None:
    words = ("--model", mathgpt_folder, "--task", "arithmetic/padded", "--limit", "4")
    text = run(*words, "--show", "2", "--out", str(tmp_path / "a")).stdout
    assert "top heads" in text and "top neurons" in text and "promotes" in text
    done = run(*words, "--out", str(tmp_path / "b"), "--show", "--json")
    found = json.loads(done.stdout)["top"]
    assert len(found["heads"]) == len(found["neurons"]) == 10
    best = found["heads"][0]
    assert best["name"] == f"{best['layer']}^{best['unit']}"
    assert best["score"] == Scores.load(tmp_path / "b").heads.max().item()
    assert best["name"] in text
    assert "top" not in json.loads(run(*words, "--out", str(tmp_path / "c"), "--json").stdout)


# Outputs


def test_a_folder_of_other_things_is_not_written_into(mathgpt_folder: str, tmp_path: Path) -> None:
    words = ("--model", mathgpt_folder, "--task", "arithmetic/padded", "--limit", "4")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    done = run(*words, "--out", str(other))
    assert done.exit_code == 8
    assert "is no scores folder" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    assert run(*words, "--out", str(other), "--overwrite").exit_code == 0
    assert (other / "notes.txt").read_text() == "mine"
    assert Scores.load(other).heads.shape == (4, 4)
    assert run(*words, "--out", str(other)).exit_code == 8, "scores are there"
    assert run(*words, "--out", str(other), "--overwrite").exit_code == 0
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run(*words, "--out", str(empty)).exit_code == 0


def test_what_holds_no_scores_is_never_replaced(mathgpt_folder: str, tmp_path: Path) -> None:
    words = ("--model", mathgpt_folder, "--task", "arithmetic/padded", "--limit", "4")
    weights = tmp_path / "model.safetensors"
    shutil.copy(Path(mathgpt_folder) / "model.safetensors", weights)
    before = weights.read_bytes()
    done = run(*words, "--out", str(weights), "--overwrite")
    assert (done.exit_code, weights.read_bytes() == before) == (8, True)
    assert "holds no scores, so --overwrite does not replace it" in done.stderr
    file = tmp_path / "file"
    file.write_text("mine")
    done = run(*words, "--out", str(file), "--overwrite")
    assert (done.exit_code, file.read_text()) == (8, "mine")


def test_the_70b_estimate_prints_its_formula() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "scoring" / "seventy_b.py"),
         "--tflops", "400", "--gexps", "3000", "--bandwidth", "25", "--exchange", "10"],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("heads", "neurons", "given", "assumed", "total"):
        assert text in done.stdout
