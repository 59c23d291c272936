"""StreamingCache: its op against the definition, chunk by chunk; its pass against pairs rotated one by one."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from raise_cases import trace

import tilewright
from tilewright.frontend.capture import copy_module
from tilewright.passes import LMInfinite, StreamingCache
from tilewright.passes.base import Exactness, Pass
from tilewright.passes.manager import SiteRewrite, run_pass
from tilewright.passes.parse import parse_passes
from tilewright.runtime import errors
from tilewright.runtime.ops import streaming_attention

op = torch.ops.tilewright
# Both sides are float64: a few hundred operations of rounding 2^-53 on values of order one.
F64 = {"rtol": 1e-11, "atol": 1e-11}


def sample(length: int, far: bool, dtype: torch.dtype = torch.float64, dim: int = 8) -> list[Any]:
    """q, k, v, q_far, k_far of grouped heads, batch 2."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, 4, length, dim), (2, 2, length, dim), (2, 2, length, 6), (2, 4, length, dim), (2, 2, length, dim)]
    found = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return found if far else [*found[:3], None, None]


def empty_store(far: bool, dtype: torch.dtype, window: int, sinks: int, dim: int = 8) -> list[torch.Tensor]:
    shapes = streaming_attention.layout(2, 2, dim, 6, "", window=window, sinks=sinks, far=far)
    return [torch.zeros(shape, dtype=dtype) for shape, _ in shapes.values()]


def run_chunks(
    given: list[Any], store: list[torch.Tensor], first: torch.Tensor, chunks: list[int], start: int = 0, **options: Any
) -> torch.Tensor:
    outs = []
    for count in chunks:
        q, k, v, q_far, k_far = (None if x is None else x[:, :, start : start + count] for x in given)
        length = torch.full((2,), start, dtype=torch.int32)
        outs.append(op.streaming_attention_step(q, k, v, q_far, k_far, store, length, first, **options))
        start += count
    return torch.cat(outs, 2)


CHUNKS = ([1] * 60, [5, 1, 30, 17, 1, 18, 3], [100, 1, 1, 50, 2])


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("chunks", CHUNKS, ids=["one by one", "mixed", "longer than the store"])
@pytest.mark.parametrize(("window", "sinks", "limit"), [(7, 3, 7), (7, 0, 7), (20, 4, 25), (1, 1, 1), (3, 8, 30)])
def test_every_chunking_is_the_definition(far: bool, chunks: list[int], window: int, sinks: int, limit: int) -> None:
    """Over several windows, one sequence padded on the left; as one call, and through the store."""
    length = sum(chunks)
    given = sample(length, far)
    first = torch.tensor([0, 5], dtype=torch.int32)
    bias = (torch.arange(length) >= first[:, None])[:, None, None]
    options = {"scale": 0.4, "window": window, "sinks": sinks, "limit": limit}
    expected = streaming_attention.reference(*given[:3], bias, *given[3:], **options)
    torch.testing.assert_close(op.streaming_attention(*given[:3], bias, *given[3:], **options), expected, **F64)
    store = empty_store(far, torch.float64, window, sinks)
    torch.testing.assert_close(run_chunks(given, store, first, chunks, **options), expected, **F64)


def test_the_definition_without_rotations_is_a_mask() -> None:
    q, k, v, _, _ = sample(40, False)
    found = streaming_attention.reference(q, k, v, scale=0.4, window=7, sinks=3, limit=7)
    mask = "(k_idx <= q_idx) & ((k_idx > q_idx - 7) | (k_idx < 3))"
    torch.testing.assert_close(found, op.attention(q, k, v, scale=0.4, mask=mask), **F64)


def test_tokens_can_be_taken_back() -> None:
    """As many as are spare: what overwrote them is written again, and no query misses what it saw."""
    given = sample(50, True)
    first = torch.zeros(2, dtype=torch.int32)
    options = {"scale": 0.4, "window": 9, "sinks": 2, "limit": 9}
    expected = streaming_attention.reference(*given[:3], None, *given[3:], **options)
    store = empty_store(True, torch.float64, 9, 2)
    back = streaming_attention.SPARE + 1
    run_chunks(given, store, first, [30], **options)
    run_chunks([-x for x in given], store, first, [back], start=30, **options)
    found = run_chunks(given, store, first, [1, 19], start=30, **options)
    torch.testing.assert_close(found, expected[:, :, 30:], **F64)


@pytest.mark.grid
def test_the_kernels_of_the_cpu() -> None:
    given = sample(70, True, torch.float32, dim=16)
    first = torch.tensor([0, 5], dtype=torch.int32)
    options = {"scale": 0.25, "window": 20, "sinks": 4, "limit": 30}
    bias = (torch.arange(70) >= first[:, None])[:, None, None]
    exact = [None if x is None else x.double() for x in given]
    expected = streaming_attention.reference(*exact[:3], bias, *exact[3:], **options).float()
    tolerance = streaming_attention.STREAMING_ATTENTION.tolerance[torch.float32]
    close = {"rtol": tolerance.rtol, "atol": tolerance.atol}
    found = op.streaming_attention(*given[:3], bias, *given[3:], **options, target="cpp")
    torch.testing.assert_close(found, expected, **close)
    store = empty_store(True, torch.float32, 20, 4, dim=16)
    found = run_chunks(given, store, first, [40, 1, 29], **options, target="cpp")
    torch.testing.assert_close(found, expected, **close)


def test_the_op_for_compilers() -> None:
    given = sample(9, True)
    options = {"scale": 0.4, "window": 3, "sinks": 2, "limit": 4}
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(op.streaming_attention.default, (*given[:3], None, *given[3:]), options, test_utils=checks)
    zero = torch.zeros(2, dtype=torch.int32)
    step, inputs = op.streaming_attention_step.default, (*given, empty_store(True, torch.float64, 3, 2), zero, zero)
    torch.library.opcheck(step, inputs, options, test_utils=checks)


def test_bad_calls() -> None:
    q, k, v, q_far, k_far = sample(4, True)
    zero = torch.zeros(2, dtype=torch.int32)
    options = {"scale": 0.4, "window": 3, "sinks": 2, "limit": 4}
    with pytest.raises(errors.BadArgument, match="limit on distance"):
        op.streaming_attention(q, k, v, **options | {"limit": 2})
    with pytest.raises(errors.BadArgument, match="go together"):
        op.streaming_attention(q, k, v, None, q_far, None, **options)
    with pytest.raises(errors.BadArgument, match="not of one call"):
        op.streaming_attention(q[:, :, :1], k, v, **options)
    with pytest.raises(errors.BadArgument, match="not this site's store"):
        op.streaming_attention_step(q, k, v, q_far, k_far, [k, v], zero, zero, **options)


# ------------------------------------------------------------------------------------------------------- the pass


def partial(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position_ids: torch.Tensor, mask: str = "k_idx <= q_idx"
) -> torch.Tensor:
    """Attention of which the first 4 channels are rotated, pairs side by side, after a transpose."""
    angles = position_ids[:, None, :, None] * torch.tensor([1.0, 0.1], dtype=torch.float64).repeat_interleave(2)
    cos, sin = angles.cos(), angles.sin()

    def turn(x: torch.Tensor) -> torch.Tensor:
        first = op.rope(x[..., :4], cos, sin, layout="interleaved")
        return torch.cat((first, x[..., 4:]), -1).to(torch.float64)

    return op.attention(turn(q), turn(k), v, scale=0.4, mask=mask)


def pairwise(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, sinks: int, limit: int) -> torch.Tensor:
    """Each pair rotated on its own: the key stays, the query is turned by the distance."""
    p, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    angle = (p - j).clamp(max=limit)[..., None] * torch.tensor([1.0, 0.1], dtype=torch.float64).repeat_interleave(2)
    pairs = q.unsqueeze(3).expand(-1, -1, -1, len(p), -1)
    turned = op.rope(pairs[..., :4], angle.cos(), angle.sin(), layout="interleaved")
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = (torch.cat((turned, pairs[..., 4:]), -1) * keys.unsqueeze(2)).sum(-1) * 0.4
    seen = (j <= p) & ((p - j < window) | (j < sinks))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values


def test_channels_that_are_not_rotated() -> None:
    """Each pair of tokens rotated on its own, in float64; every limit from the window to the whole text."""
    q, k, v, _, _ = sample(30, False)
    given = (q, k, v, torch.arange(30, dtype=torch.float64).expand(2, 30))
    for limit in (6, 11, 30):
        module = trace(lambda q, k, v, position_ids: partial(q, k, v, position_ids), *given)
        _name_positions(module)
        assert run_pass(module, StreamingCache(6, 3, limit), copy_module).rewrites
        torch.testing.assert_close(module(*given), pairwise(q, k, v, 6, 3, limit), **F64)


def test_without_rotations_it_is_a_mask() -> None:
    q, k, v, _, _ = sample(30, False)
    module = trace(lambda q, k, v: op.attention(q, k, v, scale=0.4, mask="k_idx <= q_idx"), q, k, v)
    (one,) = parse_passes("streaming-cache{window=7,sinks=2}")
    done = run_pass(module, one, copy_module)
    assert "nothing is rotated" in done.rewrites[0].details["limit"]
    mask = "(k_idx <= q_idx) & ((k_idx > q_idx - 7) | (k_idx < 2))"
    torch.testing.assert_close(module(q, k, v), op.attention(q, k, v, scale=0.4, mask=mask), **F64)


def test_a_sliding_window_of_the_models_own() -> None:
    """A narrower one stays what it is; a wider one is narrowed."""
    q, k, v, _, _ = sample(30, False)
    given = (q, k, v, torch.arange(30, dtype=torch.float64).expand(2, 30))
    own = "(k_idx <= q_idx) & (k_idx > q_idx - 6)"

    def run(window: int) -> tuple[SiteRewrite, torch.Tensor]:
        module = trace(lambda q, k, v, position_ids: partial(q, k, v, position_ids, own), *given)
        _name_positions(module)
        done = run_pass(module, StreamingCache(window, 2), copy_module)
        return done.rewrites[0], module(*given)

    kept, found = run(8)
    assert kept.exactness is Exactness.REASSOCIATED and kept.details["sinks"] == 0
    torch.testing.assert_close(found, partial(*given, own), **F64)
    narrowed, found = run(4)
    assert narrowed.exactness is Exactness.APPROXIMATE and "own window of 6" in narrowed.details["form"]
    torch.testing.assert_close(found, pairwise(q, k, v, 4, 2, 4), **F64)


def _name_positions(module: torch.fx.GraphModule) -> None:
    *_, last = module.graph.find_nodes(op="placeholder")
    last._rename("position_ids")
    module.recompile()


def test_where_it_declines() -> None:
    def reason(function: Any, *inputs: torch.Tensor, named: bool = True) -> str:
        module = trace(function, *inputs)
        if named:
            _name_positions(module)
        done = run_pass(module, StreamingCache(4, 2), copy_module)
        assert not done.rewrites
        return done.declined[0][1]

    q, k, v, _, _ = sample(9, False)
    positions = torch.arange(9, dtype=torch.float64).expand(2, 9)
    rotated = reason(lambda q, k, v, p: partial(q, k, v, p), q, k, v, positions, named=False)
    assert "not computed from position_ids" in rotated
    assert "length of the text" in reason(
        lambda q, k, v, p: partial(q, k, v, p * (1 + p.amax() / 100)), q, k, v, positions
    )
    assert "not causal" in reason(lambda q, k, v: op.attention(q, k, v, scale=0.4), q, k, v, named=False)
    odd = "(k_idx <= q_idx) & (k_idx % 2 == 0)"
    assert "neither causal" in reason(lambda q, k, v, p: partial(q, k, v, p, odd), q, k, v, positions)
    sigmoid = {"scale": 0.4, "mask": "k_idx <= q_idx", "normalizer": "sigmoid"}
    assert "sigmoid" in reason(lambda q, k, v: op.attention(q, k, v, **sigmoid), q, k, v, named=False)


@pytest.mark.parametrize("options", [{"window": 0}, {"sinks": -1}, {"sinks": True}, {"window": 8, "limit": 7}])
def test_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(errors.BadPassOption, match="streaming-cache"):
        StreamingCache(**options)


# --------------------------------------------------------------------------------------------------- whole models


def compiled(model: torch.nn.Module, *passes: Pass) -> Any:
    return tilewright.compile(
        model, passes=passes, example_inputs=(tiny.tokens(2, 12),), target="reference", rest="eager"
    )


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def greedy(module: Any, tokens: torch.Tensor, count: int, *cache: Any) -> torch.Tensor:
    options = dict(zip(("past_key_values",), cache, strict=False))
    return module.generate(tokens, max_new_tokens=count, **options, **GREEDY)


def test_generate_beyond_any_length() -> None:
    """The tokens of a run without a cache, over ten times the window, in memory that does not grow."""
    model = tiny.llama(layers=1, max_position_embeddings=40)
    module = compiled(model, StreamingCache(9, 3, 12))
    cache = module.new_cache()
    prompt = tiny.tokens(2, 30)
    found = greedy(module, prompt, 2, cache)
    before, store = cache.nbytes, cache.state.flat
    found = greedy(module, found, 58, cache)
    assert cache.nbytes == before and all(a is b for a, b in zip(cache.state.flat, store, strict=True))
    assert torch.equal(found, greedy_without_cache(module, prompt, 60, use_cache=False))
    assert not torch.equal(found, greedy(model, prompt, 60)), "tokens were forgotten"
    # What padding there is comes before the first tokens.
    mask = torch.ones(2, 34, dtype=torch.int64)
    mask[:, :4] = 0
    padded = torch.cat((torch.zeros(2, 4, dtype=torch.int64), prompt), 1)
    again = module.generate(padded, attention_mask=mask, max_new_tokens=20, **GREEDY)
    assert torch.equal(again[:, 4:], found[:, :50])
    # Beams are copies of each other's stores.
    options = {"num_beams": 3, "max_new_tokens": 12} | GREEDY
    assert torch.equal(module.generate(prompt, **options), module.generate(prompt, use_cache=False, **options))
    # Going back further than the store remembers is refused, and changes nothing.
    with pytest.raises(errors.CacheMismatch, match="newest 17 tokens"):
        cache.crop(60)
    cache.crop(80)
    assert torch.equal(greedy(module, found[:, :81], 9, cache), found)


@torch.no_grad()
def greedy_without_cache(module: Any, tokens: torch.Tensor, count: int, **options: Any) -> torch.Tensor:
    for _ in range(count):
        tokens = torch.cat((tokens, module(tokens, **options).logits[:, -1:].argmax(-1)), 1)
    return tokens


@pytest.mark.grid
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_models_against_lm_infinite(family: str) -> None:
    """Whole models, token by token, against the pass that rotates without a cache and with the same masks."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
    name = {"llama": "Llama", "mistral": "Mistral", "gpt_neox": "GPTNeoX"}[family]
    if family != "gpt_neox":
        sizes |= {"num_key_value_heads": 2}
    config = getattr(transformers, name + "Config")(**sizes)
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    module = compiled(model, StreamingCache(9, 3, 12))
    whole = compiled(model, LMInfinite(9, 3, 12))
    prompt = tiny.tokens(2, 20)
    found = greedy(module, prompt, 40)
    assert not torch.equal(found, greedy(model, prompt, 40)), "tokens were forgotten"
    if any(run.declined for record in whole.records for run in record.runs):
        assert torch.equal(found, greedy_without_cache(module, prompt, 40, use_cache=False))
    else:
        assert torch.equal(found, greedy_without_cache(whole, prompt, 40))


def test_a_table_of_positions_ends() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 96, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    module = compiled(model, StreamingCache(7, 2))
    cache = module(tiny.tokens(2, 19)).past_key_values
    module(tiny.tokens(2, 1), past_key_values=cache)
    with pytest.raises(errors.CacheFull, match="position 20 is beyond the model's table of 20"):
        module(tiny.tokens(2, 1), past_key_values=cache)
    assert cache.get_seq_length() == 20
