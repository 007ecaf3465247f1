"""LoRA adapters: which projections they are put on, and the last one as peft's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prune_edit.decoder import Decoder
from prune_edit.errors import PlanError
from prune_edit.families import Family
from prune_edit.hooks import head_factors
from prune_edit.scoring.scores import in_order
from prune_edit.units import Units

FOLDER = "adapter"
_README = """\
# LoRA adapter of the last tuning

`../` holds the tuned model: this adapter is **already merged** into its weights. The base it
belongs to is the pruned model before that tuning, which is not kept; the SHA-256 of its tensors is
`{base}`. Subtracting the adapter gives that base
back, to rounding:

```python
import prune_edit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

tuned = AutoModelForCausalLM.from_pretrained("..")
model = PeftModel.from_pretrained(tuned, ".")
for module in model.modules():
    if isinstance(module, LoraLayer):
        module.scaling["default"] *= -1
base = model.merge_and_unload()
```

`PeftModel.from_pretrained(base, ".")` is then the tuned model with its adapter apart: to switch it
off, to scale it, or to tune it on.
"""


def with_adapters(
    decoder: Decoder, rank: int, layers: Sequence[int] | None, modules: str, seed: int
) -> Any:
    """The peft model with a fresh adapter on the projections; the decoder's model is changed.

    Raises PlanError where pruning has left none of them.
    """
    from peft import LoraConfig, get_peft_model

    targets = projections(decoder, layers, modules)
    if not targets:
        where = "" if layers is None else f" of layers {', '.join(map(str, layers))}"
        raise PlanError(
            f"no {'' if modules == 'all' else modules + ' '}projection{where} is left to put LoRA "
            "on; give other --lora-layers or --lora-modules"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=targets,
            fan_in_fan_out=decoder.family.transposed,
        )
        return get_peft_model(decoder.model, config)


def projections(
    decoder: Decoder, layers: Sequence[int] | None = None, modules: str = "all"
) -> list[str]:
    """Full names of the projections that pruning touches and the model still has.

    Those of some layers (None: all), of the `attention`, of the `ffn`, or `all`.
    """
    family: Family = decoder.family
    names = []
    for layer in range(decoder.n_layers) if layers is None else layers:
        paths: set[str] = set()
        if decoder.attention_output(layer) is not None and modules != "ffn":
            paths |= {family.queries, family.keys, family.values, family.attention_output}
        if decoder.ffn_output(layer) is not None and modules != "attention":
            paths |= {*family.ffn_inputs, family.ffn_output}
        names += [f"{family.layers}.{layer}.{path}" for path in sorted(paths)]
    return names


@torch.no_grad()
def clear_adapters_pads(decoder: Decoder) -> None:
    """Zero what adapters add for pads, so that merging leaves those as they are."""
    ones = Units(heads=torch.ones(decoder.head_shape))
    for layer in range(decoder.n_layers):
        projection: Any = decoder.attention_output(layer)
        factors = head_factors(decoder, ones, layer)
        for down in getattr(projection, "lora_A", {}).values():
            if factors is not None:
                down.weight.mul_(factors.to(down.weight))  # (rank, slots * E)


def weights_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and numbers."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        hasher.update(tensor.view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


@dataclass(frozen=True)
class Adapter:
    """A trained adapter: its tensors and configuration as peft names them, and whose it is.

    `base` and `merged` are digests of the model before and after it was merged.
    """

    tensors: Mapping[str, torch.Tensor]
    config: str
    base: str
    merged: str = ""

    @classmethod
    def of(cls, adapted: Any, base: str) -> Adapter:
        """What a peft model has learnt, before it is merged."""
        from peft import get_peft_model_state_dict

        fields = adapted.peft_config["default"].to_dict()
        fields |= {"inference_mode": True, "base_model_name_or_path": None, "task_type": None}
        # Whole names: peft itself shortens them, in whatever order its sets have.
        fields["target_modules"] = sorted(adapted.targeted_module_names)
        plain = {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}
        found = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        tensors = {name: value.detach().cpu().clone() for name, value in found.items()}
        return cls(tensors, json.dumps(plain, indent=2, sort_keys=True) + "\n", base)

    def write(self, folder: Path) -> None:
        """Peft's two files and a README that says which base they belong to."""
        from safetensors.torch import save

        folder.mkdir()
        (folder / "adapter_config.json").write_text(self.config, encoding="utf-8")
        whole = {name: value.contiguous() for name, value in self.tensors.items()}
        data = in_order(save(whole, metadata={"format": "pt"}))
        (folder / "adapter_model.safetensors").write_bytes(data)
        (folder / "README.md").write_text(_README.format(base=self.base), encoding="utf-8")
