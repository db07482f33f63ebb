"""Loading of a learnt α from a checkpoint into a transformers model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_attn.integrations.huggingface.alpha import RANGE_KEY, attach, attention_modules, num_heads
from sparse_attn.nn.alpha import HeadAlpha
from sparse_attn.nn.alpha_range import check_alpha_range

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODULE = ".sparse_alpha."
_SUFFIX = f"{_MODULE}raw_alpha"


def load_alpha(model: PreTrainedModel, path: str | Path) -> dict[str, HeadAlpha]:
    """Load the learnt α of a checkpoint written by ``save_pretrained`` into a model.

    ``from_pretrained`` does not know α: it loads the other weights and reports the keys of α as unexpected. Call this
    function afterwards. The model may have another task head than the saved one, or none.

    Args:
        model: Loaded with ``attn_implementation="entmax"``.
        path: The folder, or the name of the Hub repository, from which the model was loaded.

    Returns:
        ``{name of the attention module: its α}`` for the modules with an α in the checkpoint.

    Raises:
        ImportError: transformers is not installed.
        OSError: There is no checkpoint in safetensors files at ``path``.
        TypeError: ``model`` is not a ``PreTrainedModel``.
        ValueError: The model's ``attn_implementation`` is not ``"entmax"``; the checkpoint has no α (a dense model), no
            range of α, tensors of an unknown name, or an α that does not fit the model. The model is unchanged in this
            case.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import GPT2Config, GPT2Model
        >>> from sparse_attn.integrations.huggingface import add_alpha, register
        >>> register()
        >>> model = GPT2Model(GPT2Config(vocab_size=31, n_embd=12, n_layer=1, n_head=3, attn_implementation="entmax"))
        >>> _ = add_alpha(model, alpha_init=[1.0, 1.25, 1.75])
        >>> with TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     loaded = GPT2Model.from_pretrained(folder, attn_implementation="entmax")
        ...     load_alpha(loaded, folder)
        {'h.0.attn': HeadAlpha(alpha=[1.0, 1.25, 1.75], alpha_range=(1.0, 2.0))}
    """
    modules = attention_modules(model)
    saved, alpha_range = _read(path)
    values = _by_module(model, saved, modules)
    loaded = attach(model, {name: modules[name] for name in values}, alpha_range[0], alpha_range)
    with torch.no_grad():
        for name, value in values.items():
            loaded[name].raw_alpha.copy_(value)
    return loaded


def _read(path: str | Path) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """The α tensors of a checkpoint by their keys in the files, and the range of α."""
    from safetensors import safe_open
    from transformers import PreTrainedConfig
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file

    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        files = {SAFE_WEIGHTS_NAME}
    else:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        files = {file for key, file in weight_map.items() if _MODULE in key}
    saved = {}
    for file in sorted(files):
        with safe_open(cached_file(path, file), framework="pt") as tensors:
            saved.update({key: tensors.get_tensor(key) for key in tensors.offset_keys() if _MODULE in key})
    if not saved:
        raise ValueError(
            f"path must be a checkpoint with learnt α, got {str(path)!r} without α; add_alpha adds a new one"
        )
    unknown = next((key for key in saved if not key.endswith(_SUFFIX)), None)
    if unknown is not None:
        raise ValueError(
            f"path must be a checkpoint of this version of sparse-attn, got {unknown!r} in {str(path)!r}, "
            "which this version does not know"
        )
    alpha_range: Any = PreTrainedConfig.get_config_dict(path)[0].get(RANGE_KEY)
    try:
        return saved, check_alpha_range(alpha_range)
    except (TypeError, ValueError):
        raise ValueError(
            f"path must be a checkpoint whose config.json has {RANGE_KEY!r}, two numbers (low, high) with "
            f"0 < low < high < inf, got {alpha_range} in {str(path)!r}"
        ) from None


def _by_module(model: PreTrainedModel, saved: dict[str, Tensor], modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The saved α by module name, found with the renaming rules of transformers' checkpoint loader."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    name_of = {module: name for name, module in modules.items()}
    # A module that occurs in two places is saved under only one of its names.
    keys = {
        name + _SUFFIX: name_of[module]
        for name, module in model.named_modules(remove_duplicate=False)
        if module in name_of
    }
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    values = {}
    for saved_key, value in saved.items():
        key, _ = rename_source_key(saved_key, renamings, [], model.base_model_prefix, keys)
        if key not in keys:
            raise ValueError(
                f"path must be a checkpoint of this model, got α at {saved_key!r}, where {type(model).__name__} has no "
                "attention with 'entmax'"
            )
        name = keys[key]
        heads = num_heads(name, modules[name])
        if tuple(value.shape) != (heads,):
            raise ValueError(
                f"path must be a checkpoint of this model, got α of shape {tuple(value.shape)} for {name!r} with "
                f"{heads} heads"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"path must be a checkpoint with finite α, got {value.tolist()} for {name!r}")
        values[name] = value
    return {name: values[name] for name in modules if name in values}
