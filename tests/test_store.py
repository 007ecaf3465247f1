"""Writes that are killed, that find the disk full or read-only, or that meet another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prune_edit.checkpoint.locking import lock_path, locked
from prune_edit.checkpoint.manifest import differences, read_manifest
from prune_edit.checkpoint.store import replacing
from prune_edit.errors import OutputExistsError, OutputWriteError

KILLS = int(os.environ.get("PRUNE_EDIT_KILLS", "30"))
"""How often a writer is killed; 200 take a minute or so."""

_KILLER = """
import os, random, signal, sys, time, torch
from pathlib import Path
from prune_edit.checkpoint.manifest import differences, read_manifest
from prune_edit.checkpoint.store import replacing, write_tensors
torch.set_num_threads(1)
out, source, seen = Path(sys.argv[1]), random.Random(0), 0
def write(number):
    with replacing(out, overwrite=True) as folder:
        (folder / "config.json").write_text('{"number": %d}' % number)
        tensors = [(f"t{i}", torch.full((3000,), float(number))) for i in range(8)]
        write_tensors(folder, tensors, 30_000)
def there():
    return (out / "config.json").read_text()
write(0)
began = time.perf_counter()
write(0)
usual = time.perf_counter() - began
for kill in range(int(sys.argv[2])):
    before = there()
    read, tell = os.pipe()
    child = os.fork()
    if not child:
        number = 1000 * (kill + 1)
        while True:
            number += 1
            write(number)
            os.write(tell, b".")
    if kill % 2:  # every other kill comes after a whole write, however slow the machine is
        os.read(read, 1)
    time.sleep(source.uniform(0, 1.5 * usual))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(read)
    os.close(tell)
    assert out.exists(), "the folder is gone"
    wrong = list(differences(out, read_manifest(out)))
    assert not wrong, wrong
    seen += there() != before
print(seen)
"""


def whole(out: Path) -> bool:
    """Whether the folder is what its manifest says, of one write."""
    return not list(differences(out, read_manifest(out)))


def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path: Path) -> None:
    """SIGKILL at random moments of writing over and over: the old folder or the new one is there.

    Once something was written, there is never a moment without it.
    """
    out = tmp_path / "out"
    ran = subprocess.run(
        [sys.executable, "-c", _KILLER, str(out), str(KILLS)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert KILLS // 2 <= int(ran.stdout) <= KILLS  # those that waited for a whole write, at least
    with replacing(out, overwrite=True) as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert whole(out)


_LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from prune_edit.checkpoint.store import replacing, write_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
with replacing(Path(sys.argv[1]), overwrite=True) as folder:
    (folder / "config.json").write_text("{}")
    write_tensors(folder, [("t", torch.ones(10_000))])
"""


def test_a_file_that_may_not_grow_leaves_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replacing(out) as folder:
        (folder / "config.json").write_text("{}")
    ran = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(out)], capture_output=True, text=True, check=False
    )
    assert "OutputWriteError" in ran.stderr and "could not be written" in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and whole(out)


def _mounted(folder: Path, *options: str) -> bool:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def test_a_full_and_a_read_only_disk_leave_the_old_folder(tmp_path: Path) -> None:
    import torch

    from prune_edit.checkpoint.store import write_tensors

    disk = tmp_path / "disk"
    if not _mounted(disk, "-o", "size=200k"):
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        with replacing(disk / "out") as folder:
            (folder / "config.json").write_text("{}")
        with (
            pytest.raises(OutputWriteError, match="free some space"),
            replacing(disk / "out", overwrite=True) as folder,
        ):
            (folder / "config.json").write_text("{}")
            write_tensors(folder, [("t", torch.ones(100_000))])
        assert [path.name for path in disk.iterdir()] == ["out"] and whole(disk / "out")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(OutputWriteError, match="read-only"), replacing(disk / "out", True):
            raise AssertionError("the block ran")
        assert [path.name for path in disk.iterdir()] == ["out"] and whole(disk / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


_HOLDER = """
import sys
from pathlib import Path
from prune_edit.checkpoint.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_and_a_dead_ones_lock_is_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    said = f"being written by another run \\(process {holder.pid}\\)"
    with pytest.raises(OutputExistsError, match=said), replacing(out):
        raise AssertionError("the block ran")
    holder.kill()
    holder.communicate()
    assert lock_path(out).exists()
    with replacing(out) as folder:
        (folder / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_process_may_hold_it_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out) as alone, replacing(out) as folder:
        assert alone
        (folder / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("years")
    lock_path(tmp_path / "out").symlink_to(precious)
    with pytest.raises(OutputWriteError), replacing(tmp_path / "out"):
        raise AssertionError("the block ran")
    assert precious.read_text() == "years"


def test_without_exchange_the_old_one_waits_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prune_edit.checkpoint.store._exchange", lambda one, other: False)
    out = tmp_path / "out"
    for text in ('{"a": 1}', '{"a": 2}'):
        with replacing(out, overwrite=True) as folder:
            (folder / "config.json").write_text(text)
    assert (out / "config.json").read_text() == '{"a": 2}'
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
