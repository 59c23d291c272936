"""BlockSparseAttention: which form a mask gets, what it computes, what is declined, and what the report tells."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from sigmoid_cases import F64, MASKS, graph_of, grid, qkv
from torch import Tensor

import tilewright
from tilewright.passes import BlockSparseAttention, SigmoidAttention
from tilewright.passes.manager import PassRun, run_pass, validate
from tilewright.passes.parse import parse_passes
from tilewright.runtime import errors
from tilewright.runtime.ops import OPS
from tilewright.runtime.ops.attention import attend

BLOCKS = OPS["block_attention"].overload
LOOPS = OPS["attention"].overload


# No kernels to build: what kernels compute, the kernels' own tests say.
PLAIN: dict[str, Any] = {"rest": "eager", "target": "reference"}


def rewritten(module: torch.fx.GraphModule, one: BlockSparseAttention) -> PassRun:
    return run_pass(module, one, copy.deepcopy)


def targets(module: torch.fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def expected(example: dict[str, Tensor], visible: Tensor, normalizer: str = "softmax") -> Tensor:
    return attend(example["q"], example["k"], example["v"], None, None, visible, 0.5, normalizer)[0]


def call(mask: str = "", **more: Any) -> dict[str, Any]:
    return {"q": "q", "k": "k", "v": "v", "mask": mask, **more}


@pytest.mark.parametrize("own", ["", "k_idx <= q_idx", "k_idx <= q_idx + k_len - q_len"])
@pytest.mark.parametrize(
    ("wanted", "form"),
    [
        ("causal & (window(5) | sinks(3))", LOOPS),
        ("window(4, 2)", LOOPS),
        ("blocks(8)", LOOPS),
        ("causal & dilated(3)", BLOCKS),
        ("causal & (k_idx % 5 != 2)", BLOCKS),
    ],
)
def test_static_masks(own: str, wanted: str, form: Any) -> None:
    lengths = (40, 57) if "k_len" in own else (40, 40)
    example = qkv(key_heads=2, q_len=lengths[0], k_len=lengths[1])
    module = graph_of([call(own)], example)
    done = rewritten(module, BlockSparseAttention(mask=wanted, block_size=16))
    assert (
        len(done.rewrites) == 1
        and form in targets(module)
        and (LOOPS if form is BLOCKS else BLOCKS) not in targets(module)
    )
    mask = tilewright.mask.Mask.parse(wanted)
    mask = mask.end_aligned() if "k_len" in own else mask
    visible = MASKS[own](*grid(*lengths), *lengths) & mask.visible(*lengths)
    torch.testing.assert_close(module(*example.values())[0], expected(example, visible), **F64)
    validate(done, list(example.values()))
    own_blocks = tilewright.mask.Mask.parse(own).states(*lengths, 16) > 0
    read = (mask & tilewright.mask.Mask.parse(own)).states(*lengths, 16) > 0
    assert done.rewrites[0].details["density"] == pytest.approx(float(read.sum() / own_blocks.sum()), abs=1e-4)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_a_bias_stays(normalizer: str) -> None:
    example = qkv(q_len=33, k_len=33) | {"bias": torch.rand(2, 1, 33, 33) > 0.3}
    module = graph_of([call("k_idx <= q_idx", bias="bias", normalizer=normalizer)], example)
    rewritten(module, BlockSparseAttention(mask="dilated(3) | window(3)", block_size=16))
    q, k = grid(33, 33)
    visible = (k <= q) & (((q - k) % 3 == 0) | ((q - k >= 0) & (q - k < 3))) & example["bias"]
    torch.testing.assert_close(module(*example.values())[0], expected(example, visible, normalizer), **F64)


def test_layers_share_states_lists_and_table() -> None:
    example = qkv(q_len=40, k_len=40)
    module = graph_of([call("k_idx <= q_idx"), call("k_idx <= q_idx"), call("")], example)
    mask = tilewright.mask.documents([7] * 11 + [8] * 20 + [3] * 9)
    done = rewritten(module, BlockSparseAttention(mask=mask, block_size=16))
    found = targets(module)
    # The first two sites have one mask between them; the third has another.
    assert [found.count(op) for op in (BLOCKS, torch.ops.tilewright.block_states.default)] == [3, 2]
    assert len([node for node in module.graph.nodes if node.op == "get_attr"]) == 1
    ids = torch.tensor([7] * 11 + [8] * 20 + [3] * 9)
    same = ids[:, None] == ids[None, :]
    q, k = grid(40, 40)
    outputs = module(*example.values())
    for out, visible in zip(outputs, (same & (k <= q), same & (k <= q), same), strict=True):
        torch.testing.assert_close(out, expected(example, visible), **F64)
    validate(done, list(example.values()))
    assert all(0 < rewrite.details["density"] < 1 for rewrite in done.rewrites)


def test_a_mask_the_site_implies_is_reassociated() -> None:
    example = qkv(q_len=40, k_len=40)
    module = graph_of([call("(k_idx <= q_idx) & (k_idx > q_idx - 6)"), call("k_idx <= q_idx")], example)
    done = rewritten(module, BlockSparseAttention(mask="causal & window(8)"))
    assert [rewrite.details.get("exactness") for rewrite in done.rewrites] == ["reassociated", None]
    validate(done, list(example.values()))
    assert done.rewrites[0].error["rel_l2"] < 1e-12 < done.rewrites[1].error["rel_l2"]


@pytest.mark.parametrize(
    ("own", "wanted", "lengths", "reason"),
    [
        ("k_idx <= q_idx", "k_idx > q_idx", (40, 40), "contradicts the model's own"),
        ("", "causal & window(4)", (40, 57), "how their positions are related"),
        ("k_idx <= q_idx", tilewright.mask.documents([1, 2, 3]), (40, 40), "40"),
    ],
)
def test_declined_with_the_reason(own: str, wanted: Any, lengths: tuple[int, int], reason: str) -> None:
    module = graph_of([call(own)], qkv(q_len=lengths[0], k_len=lengths[1]))
    done = rewritten(module, BlockSparseAttention(mask=wanted))
    assert not done.rewrites and reason in done.declined[0][1]


def test_alignment_can_be_said() -> None:
    example = qkv(q_len=9, k_len=57)
    module = graph_of([call("")], example)
    rewritten(module, BlockSparseAttention(mask="causal & window(4)", align="end"))
    q, k = grid(9, 57)
    visible = (k <= q + 48) & (k > q + 48 - 4)
    torch.testing.assert_close(module(*example.values())[0], expected(example, visible), **F64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "restricts nothing"),
        ({"mask": "causal & windw(3)"}, "column 10"),
        ({"mask": "k_idx + 1"}, "column"),
        ({"mask": "causal & (j < 3)"}, "unknown symbol 'j'"),
        ({"mask": "(k_idx <= q_idx) & (k_idx > q_idx)"}, "hides every pair"),
        ({"mask": "causal", "block_size": 100}, "one of 16, 32"),
        ({"mask": "causal", "block_size": (128, 24)}, "one of 16, 32"),
        ({"mask": "causal", "align": "middle"}, "auto, start or end"),
        ({"select": "xatention"}, "xattention"),
        ({"select": "xattention(stripe=3)"}, "stride"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.BadPassOption, match=words.replace("(", r"\(")):
        BlockSparseAttention(**options)


def test_options_as_text() -> None:
    options = "mask=causal & (window(256) | sinks(4)),select=xattention(stride=8,threshold=0.8),block_size=64"
    (one,) = parse_passes(f"block-sparse-attention{{{options}}}")
    assert one.options()["mask"] == "causal & (window(256) | sinks(4))"
    assert "stride=8" in one.options()["select"] and one.block_size == 64
    assert parse_passes("sigmoid-attention,block-sparse-attention{mask=causal}")[1].name == "block-sparse-attention"


def test_goes_after_sigmoid_attention() -> None:
    example = qkv(q_len=40, k_len=40)
    module = graph_of([call("k_idx <= q_idx")], example)
    run_pass(module, SigmoidAttention(bias=-1.0), copy.deepcopy)
    rewritten(module, BlockSparseAttention(mask="dilated(3)", block_size=16))
    node = next(node for node in module.graph.nodes if node.target is BLOCKS)
    assert node.kwargs["normalizer"] == "sigmoid"


# ------------------------------------------------------------------------------------------------------ whole models


def test_through_compile_with_a_selector(tmp_path: Any) -> None:
    model = tiny.llama(layers=2)
    tokens = tiny.tokens(2, 100)
    dense = BlockSparseAttention(select="xattention(stride=4, threshold=1.0)", block_size=16)
    with torch.no_grad():
        compiled = tilewright.compile(model, [dense], (tokens,), **PLAIN)
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, atol=2e-4, rtol=2e-4)
        sparse = BlockSparseAttention(select="xattention(stride=4, threshold=0.5)", block_size=16)
        compiled = tilewright.compile(model, [sparse], (tokens,), strict=True, **PLAIN)
        # The lengths stay free: another one runs through the same graph.
        assert compiled(tiny.tokens(1, 77)).logits.shape == (1, 77, 96)
    sites = compiled.report.to_dict()["passes"][0]["matched"]
    assert len(sites) == 2
    for site in sites:
        details = site["details"]
        assert 0.1 < details["density"] < 1 and details["selection_ms"] > 0 and site["error"]["rel_l2"] > 0
        assert details["form"] == "block lists" and details["select"].startswith("xattention(")
        without = tilewright.compile(model, [sparse], (tokens,), {"use_cache": False}, **PLAIN)
    tilewright.save(without, tmp_path / "sparse.tw")
    again = tilewright.load(tmp_path / "sparse.tw")
    torch.testing.assert_close(again(tokens, use_cache=False).logits, without(tokens, use_cache=False).logits)


def test_mistral_runs_its_own_window() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 1, "sliding_window": 8}
    model = MistralForCausalLM(MistralConfig(**sizes, attn_implementation="sdpa")).eval()
    tokens = tiny.tokens(1, 40)
    wanted = BlockSparseAttention(mask="causal & window(8)", block_size=16)
    with torch.no_grad():
        compiled = tilewright.compile(model, [wanted], (tokens,), strict=True, **PLAIN)
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-4)
    (site,) = compiled.report.to_dict()["passes"][0]["matched"]
    assert site["details"]["exactness"] == "reassociated" and site["details"]["form"] == "loop bounds"


def test_through_dynamo_with_a_growing_cache(fresh_dynamo: None) -> None:
    model = tiny.llama(layers=1)
    tokens = tiny.tokens(1, 30)
    compiled = tilewright.compile(model, [BlockSparseAttention(mask="causal & (window(64) | sinks(4))")], **PLAIN)
    with torch.no_grad():
        # The window is longer than the sequence: the same tokens.
        found = compiled.generate(tokens, max_new_tokens=6, do_sample=False)
        torch.testing.assert_close(found, model.generate(tokens, max_new_tokens=6, do_sample=False))
