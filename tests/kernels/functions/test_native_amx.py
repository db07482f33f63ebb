"""Attention with AMX equals attention with AVX512-BF16 and in float64. An emulator replaces AMX if it is missing."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import amx
import pytest
import torch
from native_attention import SPECIAL_NUMBERS, compare, compare_special_numbers, force, run, tensors

from sparse_attn import entmax_attention, entmax_attention_varlen
from sparse_attn.kernels.cpu import build, rows

REASON = amx.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def emulator_path(tmp_path_factory):
    return amx.compile_emulator(tmp_path_factory.mktemp("amx"))


@pytest.fixture
def emulator(emulator_path):
    """Executes AMX instructions that the processor refuses. Checks that tiles are released as often as configured."""
    is_known = amx.VARIANT in rows.variants()
    emulator = amx.load_emulator(emulator_path)
    emulator.amx_emulate(1)
    yield emulator
    emulator.amx_emulate(0)
    if not is_known:
        del rows.library().variants[amx.VARIANT]
    assert emulator.amx_configurations() == emulator.amx_releases()


def compare_variants(attend, inputs, emulator, monkeypatch):
    """Compare the results of the variant with AMX to those in float64, and to those of avx512_bf16."""
    before = emulator.amx_products()
    with monkeypatch.context() as patch:
        force(amx.VARIANT, patch)
        with_tiles = compare(attend, inputs, patch)
    assert amx_is_native() or emulator.amx_products() > before
    with monkeypatch.context() as patch:
        force("avx512_bf16", patch)
        paired = run(attend, [x.detach().requires_grad_() for x in inputs])
    assert_same(with_tiles, paired)


def amx_is_native() -> bool:
    return "amx_bf16" in Path("/proc/cpuinfo").read_text()


def assert_same(with_tiles, paired):
    for one, other in zip(with_tiles, paired, strict=True):
        # Sums in another order may differ in the last digit of bfloat16.
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-3 * max(1, float(other.detach().abs().max())))
        assert one.dtype != torch.bfloat16 or (one == other).double().mean() > 0.97


@pytest.mark.parametrize("size", [1, 2, 15, 31, 32, 33, 61, 64, 65, 127, 128, 129, 251, 255, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_several_head_sizes(size, is_causal, emulator, monkeypatch):
    inputs = tensors(torch.bfloat16, 37, 41, heads=2, kv_heads=1, sizes=(size, 7))
    compare_variants(
        lambda q, k, v: entmax_attention(q, k, v, enable_gqa=True, is_causal=is_causal), inputs, emulator, monkeypatch
    )


# Tiles have at most 16 rows. For some of these numbers of queries, two tiles overlap and compute some rows twice.
@pytest.mark.parametrize("queries", [5, 15, 16, 17, 31, 32, 33, 47, 48, 49, 97])
@pytest.mark.parametrize("keys", [1, 16, 31, 33, 131, 257])
def test_several_lengths(queries, keys, emulator, monkeypatch):
    inputs = tensors(torch.bfloat16, queries, keys, heads=1, kv_heads=1, sizes=(61, 8))
    compare_variants(lambda q, k, v: entmax_attention(q, k, v, 1.7, scale=0.3), inputs, emulator, monkeypatch)


@pytest.mark.parametrize("queries", [1, 4])
def test_few_queries_need_no_tiles_in_the_forward(queries, emulator, monkeypatch):
    force(amx.VARIANT, monkeypatch)
    before = emulator.amx_products()
    entmax_attention(*tensors(torch.bfloat16, queries, 67, sizes=(32, 8)))
    assert emulator.amx_products() == before


@pytest.mark.parametrize("keys", [37, 401])
@pytest.mark.parametrize("kind", ["boolean", "float", "padding", "window"])
def test_masks(kind, keys, emulator, monkeypatch):
    inputs = tensors(torch.bfloat16, 53, keys, heads=2, kv_heads=2, sizes=(64, 8))
    mask = torch.rand(1, 2, 53, keys) < 0.7
    if kind == "padding":
        mask = torch.arange(keys).expand(2, 1, 1, keys) < torch.tensor([keys // 2, keys - 3]).view(2, 1, 1, 1)
    if kind == "window":
        distance = torch.arange(keys) - torch.arange(53).view(-1, 1)
        mask = (distance <= 2) & (distance >= -9)
    if kind == "float":
        inputs.append(torch.randn(1, 2, 53, keys).masked_fill(~mask, -math.inf).bfloat16())
        compare_variants(lambda q, k, v, m: entmax_attention(q, k, v, attn_mask=m), inputs, emulator, monkeypatch)
    else:
        compare_variants(lambda q, k, v: entmax_attention(q, k, v, attn_mask=mask), inputs, emulator, monkeypatch)


def test_alpha_per_head_with_gradient(emulator, monkeypatch):
    alpha = torch.tensor([1.0, 1.1, 1.5, 2.0], dtype=torch.float64)
    inputs = [*tensors(torch.bfloat16, 61, 67, heads=4, kv_heads=2, sizes=(33, 8)), alpha]
    compare_variants(
        lambda q, k, v, a: entmax_attention(q, k, v, a, enable_gqa=True, is_causal=True), inputs, emulator, monkeypatch
    )


def test_packed_sequences(emulator, monkeypatch):
    starts = torch.tensor([0, 17, 17, 66, 97])
    inputs = [torch.randn(97, 2, size).bfloat16() for size in (61, 61, 8)]
    results = []
    for variant in (amx.VARIANT, "avx512_bf16"):
        with monkeypatch.context() as patch:
            force(variant, patch)
            wanted = [x.requires_grad_() for x in inputs]
            results.append(run(lambda *qkv: entmax_attention_varlen(*qkv, starts, starts, is_causal=True), wanted))
    assert_same(*results)
    assert amx_is_native() or emulator.amx_products() > 0


@pytest.mark.parametrize("place", ["whole", "odd start", "odd rows", "every second", "expanded", "transposed"])
def test_placements_in_memory(place, emulator, monkeypatch):
    def placed(n):
        wide = torch.randn(2, 3, n, 129).bfloat16()
        if place == "expanded":
            return wide[:1, :, :, :64].expand(2, 3, n, 64)
        if place == "transposed":
            return torch.randn(n, 2, 3, 64).bfloat16().permute(1, 2, 0, 3)
        return {
            "whole": wide[..., :64].contiguous(),
            "odd start": wide[..., 1:65],
            "odd rows": wide[..., :64],
            "every second": wide[..., :128:2],
        }[place]

    inputs = [placed(n) for n in (37, 67, 67)]
    force(amx.VARIANT, monkeypatch)
    with_tiles = entmax_attention(*inputs)
    monkeypatch.undo()
    force("avx512_bf16", monkeypatch)
    assert_same([with_tiles], [entmax_attention(*inputs)])


@pytest.mark.parametrize("keys", [37, 401])
@pytest.mark.parametrize("place", ["query", "key", "both"])
@pytest.mark.parametrize("number", SPECIAL_NUMBERS)
def test_special_numbers(number, place, keys, emulator, monkeypatch):
    before = emulator.amx_products()
    compare_special_numbers(number, place, keys, (amx.VARIANT, "avx512_bf16"), monkeypatch)
    assert amx_is_native() or emulator.amx_products() > before


def test_threads_do_not_change_results(emulator, monkeypatch):
    inputs = [x.requires_grad_() for x in tensors(torch.bfloat16, 130, 131, heads=4, kv_heads=4, sizes=(64, 8))]
    force(amx.VARIANT, monkeypatch)
    alone = run(entmax_attention, inputs)
    try:
        torch.set_num_threads(3)
        together = run(entmax_attention, inputs)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_the_check_at_loading_finds_wrong_products(emulator):
    assert amx.library().amx_product_is_exact() == 1
    emulator.amx_set_fault(1)
    assert amx_is_native() or amx.library().amx_product_is_exact() == 0
    emulator.amx_set_fault(0)


def test_attention_with_tiles_works_after_a_fork(emulator_path):
    script = f"""
        import os, sys, torch
        from pathlib import Path
        sys.path[:0] = [{str(Path(amx.__file__).parent)!r}]
        import amx
        from sparse_attn.kernels.cpu import attention
        from sparse_attn import entmax_attention
        emulator = amx.load_emulator(Path({str(emulator_path)!r}))
        emulator.amx_emulate(1)
        forward = attention.forward
        attention.forward = lambda *args: forward(*args, variant=amx.VARIANT)
        inputs = torch.randn(3, 1, 2, 67, 64).bfloat16().unbind()
        output = entmax_attention(*inputs)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(entmax_attention(*inputs), output) else 1)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=120, env=environment)


def test_only_a_processor_with_amx_offers_the_variant():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert amx.VARIANT not in rows.variants() or {"amx_tile", "amx_bf16", "avx512_bf16"} <= flags


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_instructions_for_tiles_are_in_functions_of_the_variant_only():
    library = str(Path(rows.__file__).with_name(build.LIBRARY))
    listing = subprocess.run(["objdump", "-d", library], check=True, capture_output=True, text=True).stdout
    found: dict[str, list[str]] = {}
    for line in listing.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = start[1]
        elif instruction := re.search(r"\t(tdp\w+|tile\w+|ldtilecfg|sttilecfg)\b", line):
            found.setdefault(function, []).append(instruction[1])
    allowed = re.compile(
        r"(amx_product_is_exact|score_product|tile_panel_product|attention_(for|back)ward_float_avx512_amx)\b"
    )
    assert found and all(allowed.match(function) for function in found), list(found)
    for instructions in found.values():
        assert instructions.count("ldtilecfg") == instructions.count("tilerelease") == 1
        assert {"tilezero", "tileloadd", "tdpbf16ps", "tilestored"} < set(instructions)
