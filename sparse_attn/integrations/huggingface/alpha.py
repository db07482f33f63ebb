"""A learnt α per head on the attention modules of a transformers model, and its way through a checkpoint."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_attn.integrations.huggingface.attention import learns_alpha, require_transformers
from sparse_attn.nn.alpha import HeadAlpha, check_alpha_range, head_alpha

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Where config.json keeps the range, which is no weight.
_RANGE = "sparse_attn_alpha_range"
_SUFFIX = ".sparse_alpha.raw_alpha"


def add_alpha(
    model: PreTrainedModel,
    *,
    alpha_init: float | Sequence[float] | Tensor = 1.5,
    alpha_range: tuple[float, float] = (1.0, 2.0),
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> dict[str, HeadAlpha]:
    """Give every attention module of a transformers model a learnt α per head.

    Call it after loading and before the optimizer is made; give the new parameters no weight decay, which would pull
    them to their lower bound. They are float32 whatever the model's dtype, and on the device of their module.
    ``save_pretrained`` saves them; :func:`load_alpha` brings them back.

    Args:
        model: Built or loaded with ``attn_implementation="entmax"``.
        alpha_init: The initial α: a number, or one per head. 1 keeps a dense model's function.
        alpha_range: The closed interval that α stays in.
        filter_fn: Called with each attention module's name and module; only where it returns True is α learnt.

    Returns:
        ``{name of the attention module: its α}``, in the order of ``model.named_modules()``; a module that has α already
        keeps it.

    Raises:
        ImportError: transformers is not installed.
        TypeError: ``model`` is no ``PreTrainedModel``.
        ValueError: The model does not attend with ``"entmax"``, or not through transformers' attention interface,
            ``filter_fn`` accepts nothing, ``alpha_init`` lies outside ``alpha_range``, or that is not the one that the
            model has already. Nothing has been changed then.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> from sparse_attn.integrations.huggingface import register
        >>> register()
        >>> config = GPT2Config(vocab_size=31, n_embd=12, n_layer=2, n_head=3, attn_implementation="entmax")
        >>> add_alpha(GPT2Model(config), filter_fn=lambda name, module: "h.1" in name)
        {'h.1.attn': HeadAlpha(alpha=[1.5, 1.5, 1.5], alpha_range=(1.0, 2.0))}

    Reference:
        Correia, Niculae & Martins 2019 (EMNLP), "Adaptively Sparse Transformers".
    """
    alpha_range = check_alpha_range(alpha_range)
    modules = _attention_modules(model)
    chosen = {name: module for name, module in modules.items() if filter_fn is None or filter_fn(name, module)}
    if not chosen:
        raise ValueError(f"filter_fn must accept at least one attention module, got none of {', '.join(modules)}")
    return _attach(model, {name: (module, alpha_init) for name, module in chosen.items()}, alpha_range)


def load_alpha(model: PreTrainedModel, path: str | Path) -> dict[str, HeadAlpha]:
    """Give a model the learnt α of a checkpoint that ``save_pretrained`` has written.

    ``from_pretrained`` builds the model as transformers knows it and leaves α out, with a note on unexpected keys.
    This is the second half; heads may have been put on the model or taken off it in between.

    Args:
        model: Loaded with ``attn_implementation="entmax"``.
        path: The folder, or the name of a repository on the Hub, that the model was loaded from.

    Returns:
        ``{name of the attention module: its α}`` for the modules that had one.

    Raises:
        ImportError: transformers is not installed.
        OSError: There is no checkpoint in safetensors files at ``path``.
        TypeError: ``model`` is no ``PreTrainedModel``.
        ValueError: The model does not attend with ``"entmax"``; the checkpoint has no α (it is a dense one), or one
            that does not fit the model. Nothing has been changed then.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import GPT2Config, GPT2Model
        >>> from sparse_attn.integrations.huggingface import register
        >>> register()
        >>> model = GPT2Model(GPT2Config(vocab_size=31, n_embd=12, n_layer=1, n_head=3, attn_implementation="entmax"))
        >>> _ = add_alpha(model, alpha_init=[1.0, 1.25, 1.75])
        >>> with TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     loaded = GPT2Model.from_pretrained(folder, attn_implementation="entmax")
        ...     load_alpha(loaded, folder)
        {'h.0.attn': HeadAlpha(alpha=[1.0, 1.25, 1.75], alpha_range=(1.0, 2.0))}
    """
    modules = _attention_modules(model)
    saved, alpha_range = _read(path)
    values = _by_module(model, saved, modules)
    low, high = alpha_range
    # The parameter itself may be past a bound.
    wanted = {name: (modules[name], value.clamp(low, high)) for name, value in values.items()}
    loaded = _attach(model, wanted, alpha_range)
    for name, alpha in loaded.items():
        with torch.no_grad():
            alpha.raw_alpha.copy_(values[name])
    return loaded


def remove_alpha(model: PreTrainedModel) -> None:
    """Take the learnt α off a model, which then attends with what its ``attn_implementation`` says.

    Raises:
        ImportError: transformers is not installed.
        TypeError: ``model`` is no ``PreTrainedModel``.
        ValueError: There is none.
    """
    _check_model(model)
    owners = [module for module in model.modules() if head_alpha(module) is not None]
    if not owners:
        raise ValueError(f"model must have learnt α from add_alpha, got {type(model).__name__} without")
    for module in owners:
        del module.sparse_alpha
    if hasattr(model.config, _RANGE):
        delattr(model.config, _RANGE)


def _attach(
    model: PreTrainedModel, wanted: Mapping[str, tuple[nn.Module, Any]], alpha_range: tuple[float, float]
) -> dict[str, HeadAlpha]:
    """The α of each module, old or new; all are built and checked before one is put in."""
    ranges = {alpha.alpha_range for alpha in map(head_alpha, model.modules()) if alpha is not None}
    if ranges - {alpha_range}:
        raise ValueError(f"alpha_range must be the one that the model has, {ranges.pop()}, got {alpha_range}")
    alphas = {}
    for name, (module, init) in wanted.items():
        new = HeadAlpha(
            _num_heads(name, module), alpha_init=init, alpha_range=alpha_range, device=_device(name, module)
        )
        present = head_alpha(module)
        alphas[name] = new if present is None else present
    for name, alpha in alphas.items():
        wanted[name][0].sparse_alpha = alpha
    setattr(model.config, _RANGE, list(alpha_range))
    return alphas


def _check_model(model: object) -> None:
    require_transformers()
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers.PreTrainedModel, got {type(model).__name__}; of a wrapper, give what it wraps"
        )


def _attention_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The attention modules that would use a learnt α, by name."""
    _check_model(model)
    modules = {name: module for name, module in model.named_modules() if _calls_interface(module)}
    if not modules:
        raise ValueError(
            "model must attend through transformers' attention interface, got none of that in "
            f"{type(model).__name__}, which does the same whatever its attn_implementation is"
        )
    chosen = {name: module for name, module in modules.items() if learns_alpha(module.config._attn_implementation)}
    if not chosen:
        found = sorted({str(module.config._attn_implementation) for module in modules.values()})
        raise ValueError(
            f"model must have attn_implementation 'entmax', got {', '.join(map(repr, found))}; call register() and "
            "model.set_attn_implementation(\"entmax\") first"
        )
    return chosen


def _calls_interface(module: nn.Module) -> bool:
    # The name is what all of transformers' attention modules have in common, and what it looks for itself (in
    # `PreTrainedModel._can_set_attn_implementation`). Of the class: accelerate puts another forward on the module.
    forward = inspect.unwrap(type(module).forward)
    return hasattr(forward, "__code__") and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _num_heads(name: str, module: nn.Module) -> int:
    for owner in (module, module.config):
        for attribute in ("num_heads", "num_attention_heads", "n_heads"):
            heads = getattr(owner, attribute, None)
            if isinstance(heads, int):
                return heads
    raise ValueError(f"model must say how many heads its attention has, got {name!r} of {type(module).__name__} without")


def _device(name: str, module: nn.Module) -> torch.device:
    """Where a module computes, which accelerate's hooks say where the weights are kept elsewhere."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for child in module.modules():
        device = getattr(getattr(child, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise ValueError(f"model must have its weights, got {name!r} on the meta device")


def _read(path: str | Path) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """The α of a checkpoint by the names it gives them, and their range."""
    from safetensors import safe_open
    from transformers import PreTrainedConfig
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        files = {SAFE_WEIGHTS_NAME}
    else:
        weight_map = json.loads(Path(index).read_text())["weight_map"]
        files = {file for key, file in weight_map.items() if key.endswith(_SUFFIX)}
    saved = {}
    for file in sorted(files):
        with safe_open(cached_file(path, file), framework="pt") as tensors:
            saved.update({key: tensors.get_tensor(key) for key in tensors.keys() if key.endswith(_SUFFIX)})  # noqa: SIM118
    alpha_range = PreTrainedConfig.get_config_dict(path)[0].get(_RANGE)
    if not saved or alpha_range is None:
        raise ValueError(f"path must be a checkpoint with learnt α, got {str(path)!r} without; add_alpha gives a new one")
    return saved, check_alpha_range(alpha_range)


def _by_module(model: PreTrainedModel, saved: dict[str, Tensor], modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The saved α by module: their names go the way that transformers' loader takes all names of a checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    name_of = {id(module): name for name, module in modules.items()}
    # A module that is at two places is saved under one of their names.
    keys = {
        name + _SUFFIX: name_of[id(module)]
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in name_of
    }
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    values = {}
    for saved_key, value in saved.items():
        key, _ = rename_source_key(saved_key, renamings, [], model.base_model_prefix, keys)
        key = saved_key if key not in keys else key
        if key not in keys:
            raise ValueError(
                f"path must be a checkpoint of this model, got α at {saved_key!r}, where {type(model).__name__} has no "
                "attention with 'entmax'"
            )
        name = keys[key]
        heads = _num_heads(name, modules[name])
        if tuple(value.shape) != (heads,):
            raise ValueError(
                f"path must be a checkpoint of this model, got α of shape {tuple(value.shape)} for {name!r} with {heads} heads"
            )
        values[name] = value
    return {name: values[name] for name in modules if name in values}
