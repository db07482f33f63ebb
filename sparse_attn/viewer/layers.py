"""The layers of a record, checked and converted for a view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparse_attn.analysis.pieces import own_word_weight, word_groups
from sparse_attn.analysis.roles import entropy, mean_per_head, monotonicity, name_roles, offset_weight
from sparse_attn.analysis.statistics import AttentionRecord

Kind = Literal["encoder", "decoder", "cross", "self"]
Texts = Sequence[Sequence[str]] | None

_CROSS = ("cross", "multihead_attn", "encoder_attn", "encdecattention")
_OFFSETS = {"previous": -1, "self": 0, "next": 1}
# `add_bias_kv` and `add_zero_attn` append these keys to those of the input.
_MOST_ADDED = 2


@dataclass(frozen=True, eq=False)
class Map:
    """The map of one layer and one example: weights (H, L, S), visible pairs (L, S), and tokens of queries and keys."""

    weights: Tensor
    visible: Tensor | None
    queries: tuple[str, ...]
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Names:
    """The tokens of one example, and the length of the longest example in its batch, to which all were padded."""

    tokens: Sequence[str]
    longest: int

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]], place: int) -> Names:
        """The tokens of one text of a batch."""
        return cls(texts[place], max(map(len, texts)))


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: statistics of its heads, and a map for each example that is shown.

    Attributes:
        name: the name in the record.
        kind: the kind of attention, determined from the layer's name and shape.
        numbers: name of a statistic -> one value per head.
        roles: one role per head.
        maps: one map for each example.
    """

    name: str
    kind: Kind
    numbers: dict[str, list[float]]
    roles: list[str]
    maps: list[Map]


def read_layers(record: AttentionRecord, tokens: Texts, memory_tokens: Texts, examples: Sequence[int]) -> list[Layer]:
    """The layers of a record.

    Args:
        record: a record with weights.
        tokens: the tokens of each example, in the order of ``examples``; None: positions are numbered.
        memory_tokens: the tokens of the keys of cross-attention, in the same form.
        examples: numbers of the examples in the batch.

    Raises:
        ValueError: if weights are not finite, or the number of tokens does not match.
    """
    weights = batch_of_weights(record)
    kinds = _kinds(weights, tokens, memory_tokens)
    if memory_tokens is not None and not {"cross", "encoder"} & set(kinds.values()):
        raise ValueError("memory_tokens name the keys of cross-attention, but the record has no such layer")
    layers = []
    for name, heads in record.items():
        batch = weights[name]
        if not bool(batch.isfinite().all()):
            raise ValueError(f"weights must be finite, got NaN or infinity in layer {name!r}")
        visible = heads.visible
        if visible is not None:
            visible = visible.cpu()
            visible = (visible if visible.dim() == 4 else visible[None]).expand(batch.shape)
        maps = []
        for place, example in enumerate(examples):
            memory = None if memory_tokens is None else Names.of(memory_tokens, place)
            # Encoder layers read ``memory_tokens`` if they are given or there is cross-attention, else ``tokens``.
            reads_memory = kinds[name] == "encoder" and (memory is not None or "cross" in kinds.values())
            own = memory if reads_memory else (None if tokens is None else Names.of(tokens, place))
            seen = None if visible is None else visible[example].any(0)
            maps.append(_map(name, kinds[name], batch[example], seen, own, memory))
        numbers = {
            "alpha": [] if heads.alpha is None else heads.alpha.tolist(),
            "density": heads.density.tolist(),
            "entropy": heads.entropy.tolist(),
            "support": heads.support_size.tolist(),
            "largest": heads.max_weight.tolist(),
        }
        numbers["weight on own word"] = _own_word_weights(maps)
        shown = {key: values for key, values in numbers.items() if values}
        layers.append(Layer(name, kinds[name], shown, _roles(kinds[name], batch, visible), maps))
    return layers


def batch_of_weights(record: AttentionRecord) -> dict[str, Tensor]:
    """Layer name -> weights (N, H, L, S) on the CPU.

    Raises:
        TypeError: if ``record`` is not an AttentionRecord.
        ValueError: if the record has no layer or no weights, or the layers had batches of different sizes.
    """
    if not isinstance(record, AttentionRecord):
        raise TypeError(f"record must be an AttentionRecord from record_attention, got {type(record).__name__}")
    if not len(record):
        raise ValueError("record must hold at least one call of an attention layer, got none")
    weights = {}
    for name, heads in record.items():
        if heads.weights is None:
            raise ValueError("record must hold weights, got none: make it with record_attention(model, weights=True)")
        kept = heads.weights.detach().cpu()
        weights[name] = kept if kept.dim() == 4 else kept[None]
    sizes = Counter(len(kept) for kept in weights.values())
    if len(sizes) > 1:
        raise ValueError(f"all layers must have seen the same number of examples, got {sorted(sizes)}")
    return weights


def _kinds(weights: dict[str, Tensor], tokens: Texts, memory_tokens: Texts) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for name, kept in weights.items():
        path = name.lower()
        queries, keys = kept.shape[-2:]
        if any(word in path for word in _CROSS):
            kinds[name] = "cross"
        elif "decoder" in path:
            kinds[name] = "decoder"
        elif "encoder" in path:
            kinds[name] = "encoder"
        else:
            kinds[name] = "self"
        lengths = [len(text) for text in tokens or ()]
        cached = keys > queries and keys in lengths
        if kinds[name] == "self" and not 0 <= keys - queries <= _MOST_ADDED and not cached:
            kinds[name] = "cross"
    if memory_tokens is not None and not {"cross", "encoder"} & set(kinds.values()):
        longest = max((len(text) for text in memory_tokens), default=0)
        return {name: "cross" if weights[name].shape[-1] == longest else kind for name, kind in kinds.items()}
    return kinds


def _map(
    name: str,
    kind: Kind,
    weights: Tensor,
    visible: Tensor | None,
    own: Names | None,
    memory: Names | None,
) -> Map:
    """One map with tokens for its rows and columns; the padding of a text is left out."""
    queries, keys = weights.shape[-2:]
    side, other = ("tokens", own), ("tokens", own)
    if kind == "cross":
        other = ("memory_tokens", memory)
    elif kind == "encoder" and memory is not None:
        side = other = ("memory_tokens", memory)
    cached = kind != "cross" and own is not None and len(own.tokens) == keys > queries
    rows = own.tokens[keys - queries :] if cached and own else _named(name, "queries", queries, *side)
    added = keys - queries if kind != "cross" and not cached and 0 < keys - queries <= _MOST_ADDED else 0
    columns = _named(name, "keys", keys - added, *other)
    weights = weights[:, : len(rows)]
    visible = None if visible is None else visible[: len(rows)]
    if len(columns) < keys - added:
        rest = weights[..., len(columns) : keys - added]
        if bool((rest != 0).any()):
            raise ValueError(
                f"{other[0]} must cover every key with non-zero weight: layer {name!r} has {keys} keys, "
                f"got {len(columns)}"
            )
        kept = [*range(len(columns)), *range(keys - added, keys)]
        weights, visible = weights[..., kept], None if visible is None else visible[..., kept]
    if visible is not None and bool(visible.all()):
        visible = None
    names = (*columns, *(f"[added {number}]" for number in range(1, added + 1)))
    return Map(weights, visible, tuple(rows), names)


def _named(layer: str, what: str, count: int, argument: str, names: Names | None) -> Sequence[str]:
    if names is None:
        return [str(position) for position in range(count)]
    if names.longest != count:
        raise ValueError(
            f"{argument} must have one token for each of the {count} {what} of layer {layer!r}, "
            f"got {names.longest} tokens"
        )
    return names.tokens


def _own_word_weights(maps: Sequence[Map]) -> list[float]:
    """The mean weight on the other subwords of the same word; empty if no text contains subwords."""
    found = []
    for shown in maps:
        groups = word_groups(shown.keys)
        if shown.queries == shown.keys and groups and groups[-1] + 1 < len(groups):
            found.append(own_word_weight(shown.weights.float(), groups))
    return mean_per_head(torch.cat(found, dim=-1)).tolist() if found else []


@torch.no_grad()
def _roles(kind: Kind, weights: Tensor, visible: Tensor | None) -> list[str]:
    shares = {"diffuse": mean_per_head(entropy(weights, visible, relative=True))}
    if kind == "cross":
        shares["monotone"] = mean_per_head(monotonicity(weights, visible))
    else:
        queries, keys = weights.shape[-2:]
        shift = keys - queries if keys - queries > _MOST_ADDED else 0
        for role, offset in _OFFSETS.items():
            shares[role] = mean_per_head(offset_weight(weights, offset + shift, visible))
    return name_roles(shares)
