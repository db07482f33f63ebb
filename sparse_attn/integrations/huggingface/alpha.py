"""A learnt α per head on the attention modules of a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_attn.checks import check_filter
from sparse_attn.integrations.huggingface.attention import calls_interface, learns_alpha, require_transformers
from sparse_attn.nn.alpha import HeadAlpha, head_alpha, value_for
from sparse_attn.nn.alpha_range import check_alpha_range

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AlphaInit = float | Sequence[float] | Tensor

# Key of alpha_range in config.json: the range is not a weight, so the weight files cannot hold it.
RANGE_KEY = "sparse_attn_alpha_range"


def add_alpha(
    model: PreTrainedModel,
    *,
    alpha_init: AlphaInit | Mapping[str, AlphaInit] = 1.5,
    alpha_range: tuple[float, float] = (1.0, 2.0),
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
) -> dict[str, HeadAlpha]:
    """Add a learnt α per head to every attention module of a transformers model.

    Call this function after loading the model and before building the optimizer. Give the new parameters no weight
    decay, which would pull them towards their lower bound. The parameters are float32 for every dtype of the model, and
    on the device of their module. ``save_pretrained`` saves them; :func:`load_alpha` loads them. After
    ``model.set_attn_implementation("sdpa")`` the model is dense: the α modules remain, without effect, and
    :func:`sparse_attn.alpha_per_head` still lists them.

    Args:
        model: Built or loaded with ``attn_implementation="entmax"``.
        alpha_init: The initial α: a number, or one per head. 1 keeps the function of a dense model. A dict
            ``{module name: α}``, such as the result of :func:`sparse_attn.calibrate`, gives each module its own α.
        alpha_range: The closed interval that α stays in.
        filter_fn: Called with the name and module of each attention module; α is added only if the result is True.

    Returns:
        ``{name of the attention module: its α}``, in the order of ``model.named_modules()``. A module that has an α
        already keeps it.

    Raises:
        ImportError: transformers is not installed.
        TypeError: ``model`` is not a ``PreTrainedModel``, or ``filter_fn`` not a function.
        ValueError: The model's ``attn_implementation`` is not ``"entmax"``, or the model does not use transformers'
            attention interface; ``filter_fn`` accepts no module; ``alpha_init`` is outside ``alpha_range``; or
            ``alpha_range`` differs from that of an α in the model. The model is unchanged in this case.

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
    check_filter(filter_fn)
    modules = attention_modules(model)
    chosen = {name: module for name, module in modules.items() if filter_fn is None or filter_fn(name, module)}
    if not chosen:
        raise ValueError(f"filter_fn must accept at least one attention module, got none of {', '.join(modules)}")
    return attach(model, chosen, alpha_init, alpha_range)


def remove_alpha(model: PreTrainedModel) -> None:
    """Remove the learnt α from a model, which then uses the α of its ``attn_implementation``.

    Raises:
        ImportError: transformers is not installed.
        TypeError: ``model`` is not a ``PreTrainedModel``.
        ValueError: The model has no learnt α.
    """
    _check_model(model)
    owners = [module for module in model.modules() if head_alpha(module) is not None]
    if not owners:
        raise ValueError(f"model must have a learnt α from add_alpha, got {type(model).__name__} without α")
    for module in owners:
        del module.sparse_alpha
    if hasattr(model.config, RANGE_KEY):
        delattr(model.config, RANGE_KEY)


def attach(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    alpha_init: AlphaInit | Mapping[str, AlphaInit],
    alpha_range: tuple[float, float],
) -> dict[str, HeadAlpha]:
    """The α of each module, new if the module has none. All α are built and checked before the model is changed."""
    ranges = {alpha.alpha_range for alpha in map(head_alpha, model.modules()) if alpha is not None}
    if ranges - {alpha_range}:
        raise ValueError(f"alpha_range must be the one that the model has, {ranges.pop()}, got {alpha_range}")
    alphas = {}
    for name, module in modules.items():
        init = value_for(name, alpha_init, "alpha_init")
        new = HeadAlpha(num_heads(name, module), alpha_init=init, alpha_range=alpha_range, device=_device(name, module))
        present = head_alpha(module)
        alphas[name] = new if present is None else present
    for name, alpha in alphas.items():
        modules[name].sparse_alpha = alpha
    setattr(model.config, RANGE_KEY, list(alpha_range))
    return alphas


def _check_model(model: object) -> None:
    require_transformers()
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers.PreTrainedModel, got {type(model).__name__}; if this is a wrapper, pass the "
            "model inside"
        )


def modules_by_interface(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that attend through transformers' attention interface, by name."""
    _check_model(model)
    modules = {name: module for name, module in model.named_modules() if calls_interface(module)}
    if not modules:
        raise ValueError(
            "model must attend through transformers' attention interface, got no such module in "
            f"{type(model).__name__}, which ignores its attn_implementation"
        )
    return modules


def attention_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The attention modules that would use a learnt α, by name."""
    modules: dict[str, Any] = modules_by_interface(model)
    chosen = {name: module for name, module in modules.items() if learns_alpha(module.config._attn_implementation)}
    if not chosen:
        found = sorted({str(module.config._attn_implementation) for module in modules.values()})
        raise ValueError(
            f"model must have attn_implementation 'entmax', got {', '.join(map(repr, found))}; call register() and "
            'model.set_attn_implementation("entmax") first'
        )
    return chosen


def num_heads(name: str, module: nn.Module) -> int:
    """The number of query heads of an attention module."""
    for owner in (module, module.config):
        for attribute in ("num_heads", "num_attention_heads", "n_heads"):
            heads = getattr(owner, attribute, None)
            if isinstance(heads, int):
                return heads
    raise ValueError(
        f"model must have attention modules with a known number of heads, got {name!r} of {type(module).__name__} "
        "without one; add_alpha can exclude it by filter_fn"
    )


def _device(name: str, module: nn.Module) -> torch.device:
    """The device on which a module computes; from accelerate's hooks if its weights are offloaded."""
    weight = next(module.parameters(), None)
    if weight is None:
        raise ValueError(
            f"model must have its weights in parameters, got {name!r} of {type(module).__name__} without parameters; "
            "quantise after add_alpha, or exclude it by filter_fn"
        )
    if not weight.is_meta:
        return weight.device
    for child in module.modules():
        device = getattr(getattr(child, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise ValueError(f"model must have its weights, got {name!r} on the meta device")
