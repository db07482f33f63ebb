"""Temporary replacement of the mappings in a transformers model's attention; afterwards the model is as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sparse_attn.integrations.huggingface.alpha import modules_by_interface, num_heads
from sparse_attn.integrations.huggingface.attention import attention_function, mask_function

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "sparse_attn_probe"

#: Maps scores (N, H, L, S) to weights. If the second argument is 1, the first score of each query is that of a sink.
Probe = Callable[[Tensor, int], Tensor]


def probed_heads(model: PreTrainedModel) -> dict[str, int]:
    """The attention modules of a model by name, with their numbers of heads."""
    return {name: num_heads(name, module) for name, module in modules_by_interface(model).items()}


@contextmanager
def probed(model: PreTrainedModel, probes: Mapping[str, Probe]) -> Iterator[None]:
    """Within the context, each named attention module maps its scores with its probe."""
    from transformers import AttentionInterface, AttentionMaskInterface

    of_module = {model.get_submodule(name): probe for name, probe in probes.items()}

    def mapping_of(module: nn.Module, heads: int, sinks: Tensor | None) -> Callable[[Tensor], Tensor]:
        probe = of_module[module]
        return lambda scores: probe(scores, int(sinks is not None))

    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    before = [(config, config._attn_implementation_internal) for config in configs]
    AttentionInterface.register(_NAME, attention_function(mapping_of))
    AttentionMaskInterface.register(_NAME, mask_function)
    try:
        for config in configs:
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(_NAME, None)
