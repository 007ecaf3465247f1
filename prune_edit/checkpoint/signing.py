"""Signatures of checkpoint folders with `model-signing` (`pip install 'prune-edit[sign]'`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prune_edit.checkpoint.manifest import SIGNATURE
from prune_edit.errors import ModelError, OutputWriteError, PruneEditError, VerificationError


def sign(folder: Path, private_key: Path) -> Path:
    """Sign all files of a folder with an elliptic-curve key (PEM), into its model.sig.

    Raises PruneEditError without the extra, ModelError for a key that cannot be used,
    OutputWriteError.
    """
    _check_key(private_key)
    signing, _, hashing = _client()
    target = folder / SIGNATURE
    partial = folder / f".{SIGNATURE}.tmp"
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=private_key)
        config.set_hashing_config(_hashed(hashing, [target, partial])).sign(folder, partial)
        partial.replace(target)
    except OSError as error:
        raise OutputWriteError(f"{target} could not be written: {error.strerror}") from None
    except Exception as error:  # whatever the key's reader says
        said = " ".join(str(error).split())[:200]
        raise ModelError(f"{folder} cannot be signed with {private_key}: {said}") from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def check_signature(folder: Path, public_key: Path) -> None:
    """Raise VerificationError unless the folder's model.sig is of these files and this key."""
    _check_key(public_key)
    _, verifying, hashing = _client()
    signature = folder / SIGNATURE
    if not signature.is_file():
        raise VerificationError(f"{folder} has no {SIGNATURE}")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        config.set_hashing_config(_hashed(hashing, [signature])).verify(folder, signature)
    except Exception as error:  # a wrong key, other files, no signature: it does not hold
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise VerificationError(f"the signature does not hold: {said}") from None


def _hashed(hashing: Any, ignored: list[Path]) -> Any:
    return hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False)


def _check_key(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"key {path} is no file; give one in PEM form")


def _client() -> tuple[Any, Any, Any]:
    try:
        from model_signing import hashing, signing, verifying
    except ImportError:
        raise PruneEditError(
            "signatures need model-signing: pip install 'prune-edit[sign]'"
        ) from None
    return signing, verifying, hashing
