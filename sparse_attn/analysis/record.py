"""Read the attention weights of any model that is made of `nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["record_attention"]

# Places of the two arguments in nn.MultiheadAttention.forward, for callers that pass them by position.
NEED_WEIGHTS, AVERAGE_ATTN_WEIGHTS = 4, 6


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the weights of every attention layer in `model` while the context is open.

    Every `nn.MultiheadAttention` in the model, subclasses included, is asked for the weights of each head;
    the model itself still gets what it asked for. Weights are as the layer returns them (in training mode
    after dropout), detached. A layer that is called several times leaves its last call; a layer found under
    several names is recorded under the first. When the context closes, also by an exception, nothing is left
    on the model; the recorded tensors stay in the dict.

    While the context is open, torch's fused inference path for transformer encoders is switched off in the
    whole process (`torch.backends.mha.set_fastpath_enabled`): it never calls the attention layer.

    Args:
        model: any module; it may itself be an attention layer, recorded under the name "".

    Yields:
        A dict from module name to weights, (N, H, L, S) whatever `batch_first` is, or (H, L, S) for unbatched
        input; filled by the forward passes made inside the context.

    Raises:
        ValueError: if there is no `nn.MultiheadAttention` in the model.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(8, nhead=2, batch_first=True).eval()
        >>> with record_attention(layer) as weights:
        ...     _ = layer(torch.zeros(3, 5, 8))
        >>> {name: tuple(w.shape) for name, w in weights.items()}
        {'self_attn': (3, 2, 5, 5)}
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    if not layers:
        raise ValueError(
            f"record_attention needs a model with nn.MultiheadAttention layers, got {type(model).__name__}"
        )
    recorded: dict[str, Tensor] = {}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        # Hooks alone make the encoder layer take the slow path, but nn.TransformerEncoder would still hand it
        # nested tensors, for which no weights can be given.
        torch.backends.mha.set_fastpath_enabled(False)
        for name, layer in layers.items():
            _record_layer(name, layer, recorded, stack)
        yield recorded


def _record_layer(name: str, layer: nn.MultiheadAttention, recorded: dict[str, Tensor], stack: ExitStack) -> None:
    """Hook one layer; `stack` takes the hooks away again."""
    asked = {"weights": True, "average": True}

    def ask_for_weights(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional, named = list(args), dict(kwargs)
        for key, index, argument, wanted in (
            ("weights", NEED_WEIGHTS, "need_weights", True),
            ("average", AVERAGE_ATTN_WEIGHTS, "average_attn_weights", False),
        ):
            if index < len(positional):
                asked[key], positional[index] = positional[index], wanted
            else:
                asked[key], named[argument] = named.get(argument, True), wanted
        return tuple(positional), named

    def take_weights(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        output, weights = result
        recorded[name] = weights.detach()
        if not asked["weights"]:
            return output, None
        return output, weights.mean(dim=-3) if asked["average"] else weights

    # Last to change the arguments, first to see the result: the user's own hooks see what was asked for.
    before = layer.register_forward_pre_hook(ask_for_weights, with_kwargs=True)
    stack.callback(before.remove)
    after = layer.register_forward_hook(take_weights, with_kwargs=True, prepend=True)
    stack.callback(after.remove)
