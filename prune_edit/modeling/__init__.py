"""The modelling code of ragged checkpoints, and how transformers learns of it.

`register_on_import` makes `import prune_edit` enough to load a ragged folder without
`trust_remote_code`, and imports neither torch nor transformers to do so.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

_STEMS = {
    "llama": "Llama",
    "mistral": "Mistral",
    "gpt2": "GPT2",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "gptj": "GPTJ",
    "gpt_neox": "GPTNeoX",
    "falcon": "Falcon",
    "opt": "OPT",
}
SHIPPED: dict[str, tuple[str, ...]] = {name: (f"pruned_{name}.py", "ragged.py") for name in _STEMS}
"""Base `model_type` -> the files of this folder that a ragged checkpoint carries."""

AUTO_MAP: dict[str, tuple[str, str, str]] = {
    name: (
        f"pruned_{name}.Pruned{stem}Config",
        f"pruned_{name}.Pruned{stem}Model",
        f"pruned_{name}.Pruned{stem}{'LMHeadModel' if name == 'gpt2' else 'ForCausalLM'}",
    )
    for name, stem in _STEMS.items()
}
"""Base `model_type` -> `auto_map` values in the order of AUTO_CLASSES."""

AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")


def register() -> None:
    """Make transformers' Auto classes know the pruned architectures; repeating it is harmless."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for name, references in AUTO_MAP.items():
        module = import_module(f"{__name__}.pruned_{name}")
        config, base, causal = (getattr(module, ref.split(".")[1]) for ref in references)
        AutoConfig.register(f"pruned_{name}", config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        # So that save_pretrained of a loaded model ships the code along, too.
        config.register_for_auto_class()
        base.register_for_auto_class("AutoModel")
        causal.register_for_auto_class("AutoModelForCausalLM")


def register_on_import() -> None:
    """Register now if transformers' Auto classes are in use, else as soon as they are imported."""
    if "transformers.models.auto.configuration_auto" in sys.modules:
        register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport:
    """Finder that registers once the Auto classes are imported, then removes itself.

    transformers imports its Auto modules from the middle of others (`modeling_layers`, say), where
    our modules could not be imported yet. So every transformers import is counted, and the
    registration waits for the outermost to end.
    """

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a transformers module as the other finders do, with its execution counted."""
        if name.partition(".")[0] != "transformers" or self not in sys.meta_path:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)):
                if spec.loader is not None:
                    self._count(spec.loader)
                return spec
        return None

    def _count(self, loader: object) -> None:
        execute = loader.exec_module  # type: ignore[attr-defined]

        def exec_module(module: ModuleType) -> None:
            self.depth += 1
            try:
                execute(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and "transformers.models.auto.configuration_auto" in sys.modules:
                self._finish()

        loader.exec_module = exec_module  # type: ignore[attr-defined]

    def _finish(self) -> None:
        if self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        try:
            register()
        except ImportError as error:  # never keep someone from importing transformers
            warnings.warn(f"prune-edit: pruned models are not registered: {error}", stacklevel=2)
