"""`prune-edit verify`: a folder is what it claims, or the command says what is not so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from pico_checkpoint import dense, hard_layout
from safetensors.torch import load_file, save_file

from prune_edit.checkpoint.manifest import read_manifest, sha256
from prune_edit.cli import main
from prune_edit.errors import ModelError, PruneEditError
from prune_edit.loading import REFERENCE_MODEL
from prune_edit.planning import Plan
from prune_edit.verbs import apply, verify


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "model"
    dense("llama").save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((REFERENCE_MODEL / name).read_bytes())
    return path


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A pruned folder, written anew for each test to spoil."""
    from prune_edit.checkpoint.reading import model_digest

    layout = hard_layout("llama", dense("llama"))
    plan = Plan(
        layout.heads, layout.neurons, layout.n_heads, layout.n_neurons,
        model_digest=model_digest(base),
    )  # fmt: skip
    return apply(base, plan, tmp_path / "out", recover="none")


def failed(folder: Path, base: Path | None = None) -> list[str]:
    return [check["name"] for check in verify(folder, against=base)["checks"] if not check["ok"]]


def test_the_manifest_lists_every_file(folder: Path) -> None:
    manifest = read_manifest(folder)
    names = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    for name in names:
        size, digest = sha256(folder / name)
        assert manifest["files"][name] == {"bytes": size, "sha256": digest}
    assert manifest["provenance"]["base_model"] == "model"


def test_a_whole_folder_passes(folder: Path, base: Path) -> None:
    found = verify(folder, against=base)
    assert found["ok"]
    names = [check["name"] for check in found["checks"]]
    assert names == ["digests", "provenance", "shapes", "plan", "base", "slices"]


def rewrite_config(folder: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))


def renew(folder: Path) -> None:
    """A manifest that fits what is there: what a forger would do."""
    from prune_edit.checkpoint.manifest import write_manifest

    write_manifest(folder)


def test_what_was_changed_is_told(folder: Path, base: Path) -> None:
    assert failed(folder, base) == []
    (folder / "extra.py").write_text("1")
    assert failed(folder) == ["digests"]
    (folder / "extra.py").unlink()
    card = (folder / "README.md").read_bytes()
    (folder / "README.md").write_bytes(card[:-1] + b"!")  # of the same size
    assert failed(folder) == ["digests"]
    (folder / "README.md").unlink()
    assert failed(folder) == ["digests"]
    (folder / "README.md").symlink_to("/etc/hostname")
    assert failed(folder) == ["digests"]


def test_a_forged_manifest_does_not_hide_other_weights(folder: Path, base: Path) -> None:
    weights = folder / "model.safetensors"
    state = load_file(weights)
    state["model.layers.2.mlp.down_proj.weight"][3, 3] += 1
    save_file(state, weights, metadata={"format": "pt"})
    renew(folder)
    assert failed(folder) == []  # nothing inside contradicts
    assert failed(folder, base) == ["slices"]
    state["model.layers.2.mlp.down_proj.weight"] = torch.ones(3, 3)
    save_file(state, weights, metadata={"format": "pt"})
    renew(folder)
    assert failed(folder) == ["shapes"]


def test_plan_configuration_and_base_must_agree(folder: Path, base: Path, tmp_path: Path) -> None:
    plan = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(plan.replace('"seed": 0', '"seed": 1'))
    renew(folder)
    assert failed(folder) == ["plan"]
    (folder / "plan.json").unlink()
    renew(folder)
    assert failed(folder) == ["plan"]
    (folder / "plan.json").write_text(plan)
    other = tmp_path / "other"
    other.mkdir()
    for path in base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    rewrite_config(other, lambda fields: fields.update(rms_norm_eps=1e-5))
    renew(folder)
    assert failed(folder, other) == ["base"]
    rewrite_config(folder, lambda fields: fields["prune_edit"].update(base_digest="0" * 64))
    assert failed(folder) == ["digests", "provenance", "plan"]


def test_what_claims_nothing_is_an_error(folder: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no manifest\.json"):
        verify(base)
    for text, said in (
        ("{}", "no manifest"),
        ('{"schema": 9, "algorithm": "sha256"}', "schema 9"),
        ('{"schema": 1, "algorithm": "sha256", "files": {"a": 1}}', "no manifest"),
    ):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ModelError, match=said):
            verify(folder)
    with pytest.raises(ModelError, match="does not exist"):
        verify(tmp_path / "nowhere")


def test_the_exit_code_and_the_json_say_it(folder: Path, base: Path) -> None:
    run = CliRunner().invoke(main, ["verify", str(folder), "--against", str(base), "--json"])
    assert run.exit_code == 0 and json.loads(run.stdout)["ok"] is True
    (folder / "model.safetensors").write_bytes(b"")
    run = CliRunner().invoke(main, ["verify", str(folder), "--json"])
    assert run.exit_code == 10 and "not what it claims" in run.stderr
    found = {check["name"]: check["ok"] for check in json.loads(run.stdout)["checks"]}
    assert found == {"digests": False, "provenance": True, "shapes": False, "plan": True}
    shown = CliRunner().invoke(main, ["verify", str(folder)])
    assert "FAILED digests: model.safetensors has 0 bytes" in shown.stdout


def test_signatures_hold_for_these_files_and_this_key(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="model-signing is not installed: the extra `sign`")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        (tmp_path / f"{name}.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        (tmp_path / f"{name}.pub").write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
    ours, theirs = tmp_path / "ours.pub", tmp_path / "theirs.pub"
    assert not verify(folder, public_key=ours)["ok"]  # not signed
    assert verify(folder, sign_with=tmp_path / "ours.pem")["ok"]
    assert verify(folder, public_key=ours)["ok"]
    assert not verify(folder, public_key=theirs)["ok"]
    with pytest.raises(ModelError, match="is no file"):
        verify(folder, sign_with=tmp_path / "none.pem")
    with pytest.raises(ModelError, match="cannot be signed"):
        verify(folder, sign_with=ours)
    (folder / "README.md").write_text("other")
    renew(folder)
    found = {check["name"]: check["ok"] for check in verify(folder, public_key=ours)["checks"]}
    assert found["digests"] and not found["signature"]


def test_without_the_extra_signing_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "model_signing", None)
    (tmp_path / "key").write_text("")
    with pytest.raises(PruneEditError, match=r"prune-edit\[sign\]"):
        verify(folder, sign_with=tmp_path / "key")
