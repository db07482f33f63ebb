"""Records of models, hostile tokens, and a reader of pages that shares no code with the program in a page."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sparse_attn import record_attention, replace_attention
from sparse_attn.analysis import AttentionRecord

HEADS, QUERIES, KEYS = 3, 5, 7


def make_encoder_record(
    length: int, batch: int = 1, *, heads: int = HEADS, layers: int = 2, **call: Any
) -> AttentionRecord:
    """The record of an encoder at α = 1.5."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4 * heads, heads, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    replace_attention(model, alpha_init=1.5)
    with torch.no_grad(), record_attention(model, weights=True) as record:
        model(4 * torch.randn(batch, length, 4 * heads), **call)
    return record


@pytest.fixture(name="encoder_record", scope="session")
def encoder_record_fixture() -> Callable[..., AttentionRecord]:
    return make_encoder_record


@pytest.fixture(name="read_page", scope="session")
def read_page_fixture() -> Callable[[str], ReadPage]:
    return page_contents


@pytest.fixture(scope="session")
def hostile() -> list[str]:
    """Tokens that would break a page which does not escape them."""
    return [
        "</script><img src=x onerror=alert(1)>",
        "<!--<script>",
        "\0",
        "\u202eabc\u200f",
        "\ud800",
        "a\udfffb",
        "]]>&amp;&lt;\"'`",
        "\n\t \u2028\u2029",
        "𝔘𝔫𝔦",
        "",
    ]


@pytest.fixture
def translation() -> AttentionRecord:
    """The record of torch's encoder and decoder at α = 1.7: 5 tokens attend to 7, in a batch of two."""
    torch.manual_seed(0)
    width = 4 * HEADS
    layer = nn.TransformerEncoderLayer(width, HEADS, 8, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    model = nn.Transformer(width, HEADS, 1, 2, 8, batch_first=True, custom_encoder=encoder).eval()
    replace_attention(model, alpha_init=1.7)
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    with torch.no_grad(), record_attention(model, weights=True) as record:
        model(torch.randn(2, KEYS, width), torch.randn(2, QUERIES, width), tgt_mask=mask, tgt_is_causal=True)
    return record


class ReadPage(NamedTuple):
    data: dict[str, Any]
    blobs: dict[str, str]

    def weights(self, layer: int, place: int = 0) -> Tensor:
        """The weights (H, L, S) in the page."""
        described = self.data["layers"][layer]["maps"][place]
        raw = zlib.decompress(base64.b64decode(self.blobs[described["id"]]))
        first, second = described["sizes"]
        entries = described["entries"]
        counts, distances = _numbers(raw[:first]), _numbers(raw[first : first + second])
        high, low = raw[first + second :][:entries], raw[first + second :][entries:]
        texts = self.data["texts"]
        queries, keys = (len(texts[described[side]]["tokens"]) for side in ("queries", "keys"))
        heads = len(self.data["layers"][layer]["roles"])
        weights = torch.zeros(heads * queries, keys)
        place = 0
        for row, count in enumerate(counts):
            column = -1
            for _ in range(count):
                column += distances[place] + 1
                weights[row, column] = struct.unpack("<e", bytes([low[place], high[place]]))[0]
                place += 1
        return weights.view(heads, queries, keys)

    def visible(self, layer: int, place: int = 0) -> Tensor | None:
        """The pairs that are visible according to the page."""
        described = self.data["layers"][layer]["maps"][place]
        if described["mask"] is None:
            return None
        shape = [len(self.data["texts"][described[side]]["tokens"]) for side in ("queries", "keys")]
        runs = _numbers(zlib.decompress(base64.b64decode(self.data["masks"][described["mask"]])))
        return torch.tensor([index % 2 == 1 for index, run in enumerate(runs) for _ in range(run)]).view(shape)


def page_contents(html: str) -> ReadPage:
    """The content of a page."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    blobs = re.findall(r'<script type="text/plain" id="([^"]*)">([^<]*)</script>', html)
    return ReadPage(json.loads(data[1]), dict(blobs))


def _numbers(raw: bytes) -> list[int]:
    numbers, number = [], 0
    for byte in raw:
        number += byte
        if byte < 255:
            numbers.append(number)
            number = 0
    return numbers
