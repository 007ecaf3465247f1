"""Write an in-memory model as a checkpoint folder, or build one without a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prune_edit import modeling
from prune_edit.checkpoint.masked import masked_config, masked_tensors
from prune_edit.checkpoint.safety import inside
from prune_edit.checkpoint.slim import slim_config, slim_tensors
from prune_edit.checkpoint.store import write_tensors
from prune_edit.checkpoint.uniform import uniform_config, uniform_tensors
from prune_edit.errors import ModelError
from prune_edit.families import Family
from prune_edit.layout import Layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

COMPANIONS = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""What goes along from the source folder."""


def write_checkpoint(
    folder: str | Path,
    fmt: str,
    family: Family,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    layout: Layout,
    *,
    source_folder: str | Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    kv: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model, ragged or stock, that holds `layout`, as `fmt`: `masked`, `uniform`, `ragged`.

    `folder` exists, as `replacing` yields it. Tokenizer and generation files come from
    `source_folder`. With `kv` "duplicate" the file repeats keys and values where the layout has
    pads (masked has neither). Raises PlanError where `fmt` cannot hold the model, OSError.
    """
    folder = Path(folder)
    fields, stream = described(fmt, family, config, tensors, layout, provenance or {}, kv)

    def stored() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in stream:
            if name == f"{family.final_norm}.weight":
                fields["dtype"] = str(tensor.dtype).removeprefix("torch.")
            yield name, tensor

    write_tensors(folder, stored(), max_shard_bytes)
    write_companions(folder, fmt, family, fields, source_folder)


def described(
    fmt: str,
    family: Family,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    layout: Layout,
    provenance: Mapping[str, Any],
    kv: str | None = None,
) -> tuple[dict[str, Any], Iterator[tuple[str, torch.Tensor]]]:
    """The configuration of `write_checkpoint`'s folder, and its tensors, one at a time.

    Raises PlanError where `fmt` cannot hold the model.
    """
    want = replace(layout, kv=kv) if kv is not None else layout
    if fmt == "masked":
        fields = masked_config(config, family, layout, provenance=provenance)
        stream = masked_tensors(family, config, tensors, layout)
    elif fmt == "uniform":
        fields = uniform_config(config, family, want, provenance=provenance)
        stream = uniform_tensors(family, config, tensors, want, layout)
    elif fmt == "ragged":
        fields = slim_config(config, family, layout, want, output_bias=False, provenance=provenance)
        stream = slim_tensors(family, tensors, layout, want)
    else:
        raise ValueError(f"format {fmt!r} is none of masked, uniform, ragged")
    for key in ("_name_or_path", "torch_dtype"):
        fields.pop(key, None)
    unembedding = f"{family.unembedding}.weight"
    tied = config_of(fields).tie_word_embeddings
    # A tied unembedding is stored once, as the embedding.
    return fields, (each for each in stream if not (tied and each[0] == unembedding))


def write_companions(
    folder: Path,
    fmt: str,
    family: Family,
    fields: Mapping[str, Any],
    source_folder: str | Path | None,
) -> None:
    """What stands beside the weights: config.json, modelling code, tokenizer and generation files.

    Raises UnsafeCheckpointError where a source file is a link that leads out of its folder.
    """
    if fmt == "ragged":
        for name in modeling.SHIPPED[family.base_type]:
            shutil.copyfile(Path(modeling.__file__).parent / name, folder / name)
    (folder / "config.json").write_text(
        json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    if source_folder is not None:
        source = Path(source_folder)
        for name in sorted({path.name for kind in COMPANIONS for path in source.glob(kind)}):
            if (source / name).is_file():
                shutil.copyfile(inside(source, name), folder / name)


def expected_shapes(config: Mapping[str, Any], family: Family) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's tensors, stock or pruned; nothing of it is in memory.

    A tied unembedding is none of them. Raises ModelError.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    own = config_of(config)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(own)]
    try:
        with quiet(), torch.device("meta"):
            model = model_class(own)
    except Exception as error:  # whatever a size that makes no sense makes the modules raise
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"the configuration describes no model: {said}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if own.tie_word_embeddings:
        shapes.pop(f"{family.unembedding}.weight", None)
    return dict(sorted(shapes.items()))


def build_model(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A stock or ragged model in memory, in the tensors' dtype, in evaluation mode.

    The tensors are copied, so tuning the model leaves their owner alone.

    Raises ModelError where tensors are missing, unexpected or of another shape.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    own = config_of(config)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(own)]
    state = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                None, config=own, state_dict=state, dtype=dtype, output_loading_info=True
            )
    except (OSError, RuntimeError) as error:
        raise ModelError(f"the tensors do not fit the configuration: {error}") from error
    for kind in ("missing_keys", "unexpected_keys"):
        if names := sorted(info[kind]):
            raise ModelError(
                f"the tensors do not fit the configuration: {kind.replace('_', ' ')} "
                f"{', '.join(map(str, names[:3]))}"
            )
    result: PreTrainedModel = model.eval()
    return result


def config_of(fields: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration object of a config.json's fields, stock or pruned. Raises ModelError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    modeling.register()
    try:
        config: PretrainedConfig = type(AutoConfig.for_model(fields["model_type"])).from_dict(
            dict(fields)
        )
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"the configuration is not valid: {said}") from None
    return config


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' load reports and progress bars off the terminal; we raise instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
