"""Masks built in the graph: their text, what stays a tensor, and rows that see no key."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import assert_close, in_float64, qkv, raise_function

softmax = F.softmax
L = 9
LOWEST = torch.finfo(torch.float32).min
CAUSAL = "k_idx <= q_idx"


def positions():
    return torch.arange(L)[:, None], torch.arange(L)[None, :]


def additive(mask, fill=-math.inf):
    def function(q, k, v):
        bias = mask(fill)
        return softmax(q @ k.mT * 0.25 + bias, -1) @ v

    return function


def filled(visible, fill=-math.inf):
    return lambda q, k, v: softmax((q @ k.mT * 0.25).masked_fill(~visible(), fill), -1) @ v


def fused(visible):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=visible())


def tril_ones():
    return torch.tril(torch.ones(L, L)).view(1, 1, L, L) != 0


def compared():
    q, k = positions()
    return k <= q


def window():
    q, k = positions()
    return (k <= q) & (q - k < 4)


def minus_inf_triu(fill):
    return torch.full((L, L), fill).triu(1)


def one_minus(fill):
    return (1.0 - torch.ones(L, L).tril()) * LOWEST


def written_where(fill):
    return torch.where(compared(), 0.0, fill)


def set_in_place(fill):
    mask = torch.zeros(L, L)
    mask.masked_fill_(~compared(), fill)
    return mask


def band():
    q, k = positions()
    return (q - k).abs() <= 2


def prefix():
    q, k = positions()
    return (k <= q) | (k < 3)


def chunks():
    q, k = positions()
    return (torch.div(q, 3, rounding_mode="floor") == torch.div(k, 3, rounding_mode="floor")) & (k <= q)


def strided():
    q, k = positions()
    return (k <= q) & ((q - k) % 2 == 0)


def packed_positions():
    """transformers detects packed sequences from position ids; here they are one sequence, provably."""
    ids = torch.arange(L)[None].expand(2, -1)
    sequence = (torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(2)[:, None, None, None]
    q, k = torch.arange(L)[None, None, :, None], torch.arange(L)[None, None, None, :]
    return (sequence[batch, q] == sequence[batch, k]) & (ids[batch, k] <= ids[batch, q])


POSITIONAL = {
    "tril": (filled(tril_ones), CAUSAL),
    "tril finfo.min": (filled(tril_ones, LOWEST), CAUSAL),
    "compared": (filled(compared), CAUSAL),
    "compared -1e9": (filled(compared, -1e9), CAUSAL),
    "sdpa bool": (fused(compared), CAUSAL),
    "triu of -inf": (additive(minus_inf_triu), CAUSAL),
    "triu of finfo.min": (additive(minus_inf_triu, LOWEST), CAUSAL),
    "(1 - mask) * min": (additive(one_minus), CAUSAL),
    "where": (additive(written_where), CAUSAL),
    "where -1e9": (additive(written_where, -1e9), CAUSAL),
    "in place": (additive(set_in_place), CAUSAL),
    "window": (filled(window), "(k_idx <= q_idx) & (k_idx > q_idx - 4)"),
    "window finfo.min": (filled(window, LOWEST), "(k_idx <= q_idx) & (k_idx > q_idx - 4)"),
    "packed positions": (fused(packed_positions), CAUSAL),
    "prefix": (filled(prefix), None),
    "band": (filled(band), None),
    "chunks": (fused(chunks), None),
    "strided": (fused(strided), None),
    "two masks": (
        lambda q, k, v: (
            softmax((q @ k.mT * 0.25).masked_fill(~compared(), -math.inf) + torch.full((L, L), -math.inf).tril(-4), -1)
            @ v
        ),
        "(k_idx <= q_idx) & (k_idx > q_idx - 4)",
    ),
}


@pytest.mark.parametrize("name", POSITIONAL)
def test_positional_masks_become_text(name):
    function, text = POSITIONAL[name]
    args = qkv(queries=L)
    raised = raise_function(function, *args)
    assert raised.argument("bias") is None, raised.notes
    if text is not None:
        assert raised.argument("mask") == text
    assert raised.argument("mask") != ""
    assert_close(raised.after, in_float64(function, args), torch.float32)


def test_a_mask_that_hides_nothing_vanishes():
    raised = raise_function(filled(lambda: torch.ones(L, L, dtype=torch.bool)), *qkv(queries=L))
    assert raised.argument("mask") == "" and raised.argument("bias") is None


def test_a_window_as_long_as_the_sequence_is_causal():
    def visible():
        q, k = positions()
        return (k <= q) & (k > q - L)

    raised = raise_function(filled(visible), *qkv(queries=L))
    assert raised.argument("mask") == CAUSAL


def test_offset_of_a_cache():
    """Three new queries after six keys: the first sees seven keys."""

    def function(q, k, v):
        visible = torch.arange(9)[None, :] <= (torch.arange(3) + 6)[:, None]
        return softmax((q @ k.mT * 0.25).masked_fill(~visible, LOWEST), -1) @ v

    args = qkv(queries=3, keys=9)
    raised = raise_function(function, *args)
    assert raised.argument("mask") == "k_idx <= q_idx + 6"
    assert_close(raised.after, in_float64(function, args), torch.float32)


def test_one_query_after_a_cache_sees_all():
    def function(q, k, v):
        visible = torch.arange(9)[None, :] <= (torch.arange(1) + 8)[:, None]
        return softmax((q @ k.mT * 0.25).masked_fill(~visible, LOWEST), -1) @ v

    raised = raise_function(function, *qkv(queries=1, keys=9))
    assert raised.argument("mask") == "" and raised.argument("bias") is None


def test_symbolic_lengths_and_cache():
    """Keys are the cache and the new ones: the offset is k_len - q_len, whatever both are."""
    batch, new, past = (torch.export.Dim(name, min=2, max=64) for name in ("b", "new", "past"))

    def function(q, k, v, cache):
        k, v = torch.cat([cache, k], 2), torch.cat([cache, v], 2)
        at = torch.arange(q.shape[2]) + cache.shape[2]
        visible = torch.arange(k.shape[2])[None, :] <= at[:, None]
        return softmax((q @ k.mT * 0.25).masked_fill(~visible, LOWEST), -1) @ v

    args = (*qkv(queries=3), torch.randn(2, 4, 5, 16))
    shapes = [tuple({0: batch, 2: length} for length in (new, new, new, past))]
    raised = raise_function(function, *args, dynamic_shapes=shapes)
    assert raised.argument("mask") == "k_idx <= q_idx + k_len - q_len"
    assert raised.argument("bias") is None
    others = (*qkv(batch=3, queries=4, seed=1), torch.randn(3, 4, 7, 16))
    with torch.no_grad():
        assert_close(raised.module(*others), in_float64(function, others), torch.float32)


def padding(left: bool = False) -> torch.Tensor:
    mask = torch.ones(2, L, dtype=torch.int64)
    mask[0, :4] = 0
    return mask if left else mask.flip(1)


def keys_bool(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())


def keys_expanded(q, k, v, mask):
    visible = mask[:, None, None, :].bool().expand(-1, -1, L, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)


def keys_and_causal(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool() & compared())


def keys_and_causal_written(q, k, v, mask):
    scores = (q @ k.mT * 0.25).masked_fill(~compared(), -math.inf)
    return softmax(scores.masked_fill(mask[:, None, None, :] == 0, -math.inf), -1) @ v


def keys_indexed(q, k, v, mask):
    """As transformers' masking_utils: mask[batch, k] by advanced indexing."""
    batch = torch.arange(2)[:, None, None, None]
    keys = torch.arange(L)[None, None, None, :]
    visible = torch.ones((), dtype=torch.bool) & mask.bool()[batch, keys]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible.expand(2, 1, L, L))


def documents(q, k, v, mask):
    """Tokens see their own document only."""
    same = mask[:, None, :, None] == mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same & compared())


BOOL_DATA = {
    "keys": (keys_bool, "", (2, 1, 1, L)),
    "keys, expanded": (keys_expanded, "", (2, 1, 1, L)),
    "keys, indexed": (keys_indexed, "", (2, 1, 1, L)),
    "keys and causal": (keys_and_causal, CAUSAL, (2, 1, 1, L)),
    "documents": (documents, CAUSAL, (2, 1, L, L)),
}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", BOOL_DATA)
def test_boolean_data_is_split_from_positions(name, left):
    """Every row is compared, those that see no key included: SDPA gives zeros there, and so does the canonical op."""
    function, text, shape = BOOL_DATA[name]
    args = (*qkv(queries=L), padding(left))
    raised = raise_function(function, *args)
    assert raised.argument("mask") == text
    assert raised.shape("bias") == shape
    assert raised.argument("bias").meta["val"].dtype == torch.bool
    assert_close(raised.after, raised.before, torch.float32)


def test_hidden_rows_of_a_written_softmax_give_zeros():
    """A row of -inf is NaN in torch.softmax; the canonical op follows SDPA. All other rows are the same."""
    args = (*qkv(queries=L), padding(left=True))
    raised = raise_function(keys_and_causal_written, *args)
    assert raised.argument("mask") == CAUSAL and raised.shape("bias") == (2, 1, 1, L)
    hidden = raised.before.isnan()
    assert hidden[0, :, :4].all() and not hidden[1].any()
    assert (raised.after[hidden] == 0).all()
    assert_close(raised.after[~hidden], raised.before[~hidden], torch.float32)


def bert(fill):
    return lambda q, k, v, mask: softmax(q @ k.mT * 0.25 + (1.0 - mask[:, None, None, :].to(q.dtype)) * fill, -1) @ v


def bert_expanded(q, k, v, mask):
    visible = mask[:, None, None, :].bool().expand(-1, -1, L, -1)
    return softmax(q @ k.mT * 0.25 + torch.where(visible, 0.0, LOWEST).to(q.dtype), -1) @ v


def llama(q, k, v, mask):
    visible = mask[:, None, None, :].bool() & compared()
    return softmax(q @ k.mT * 0.25 + torch.where(visible, 0.0, LOWEST).to(q.dtype), -1) @ v


def annotated(q, k, v, mask):
    """masked_fill with -1e9, as in the annotated transformer: a padded row weighs all keys alike."""
    return softmax((q @ k.mT * 0.25).masked_fill(mask[:, None, None, :] == 0, -1e9), -1) @ v


FINITE = {
    "-10000": (bert(-10000.0), (2, 1, 1, L)),
    "finfo.min": (bert(LOWEST), (2, 1, 1, L)),
    "expanded": (bert_expanded, (2, 1, 1, L)),
    "with causal": (llama, (2, 1, L, L)),
    "filled": (annotated, (2, 1, 1, L)),
}


@pytest.mark.parametrize("rows", ["right", "left", "all"])
@pytest.mark.parametrize("name", FINITE)
def test_finite_fills_on_data_stay_what_they_are(name, rows):
    """Rows that see no key still attend: the fill is a bias, not a mask."""
    function, shape = FINITE[name]
    mask = torch.zeros(2, L, dtype=torch.int64) if rows == "all" else padding(rows == "left")
    args = (*qkv(queries=L), mask)
    raised = raise_function(function, *args)
    assert raised.argument("mask") == ""
    assert raised.shape("bias") == shape
    assert raised.argument("bias").meta["val"].dtype == torch.float32
    assert_close(raised.after, raised.before, torch.float32)
    assert ("finite" in raised.notes) == (name in ("expanded", "with causal", "filled"))


def test_a_finite_fill_on_a_row_without_keys_stays_a_bias():
    """k < q leaves query 0 without a key: with a finite fill it attends to all keys."""

    def visible():
        q, k = positions()
        return k < q

    def function(q, k, v):
        return softmax(q @ k.mT * 0.25 + torch.where(visible(), 0.0, LOWEST).to(q.dtype), -1) @ v

    raised = raise_function(function, *qkv(queries=L))
    assert raised.argument("mask") == "" and raised.shape("bias") is not None
    assert_close(raised.after, raised.before, torch.float32)


def test_masks_that_hide_every_key_together_stay_a_bias():
    """Each of the two leaves a key to every row, both together leave none."""

    def function(q, k, v):
        q_idx, k_idx = positions()
        first = torch.where(k_idx < 4, 0.0, -1e9)
        second = torch.where(k_idx >= 4, 0.0, -1e9)
        return softmax(q @ k.mT * 0.25 + first + second, -1) @ v

    raised = raise_function(function, *qkv(queries=L))
    assert raised.argument("mask") == ""
    assert_close(raised.after, raised.before, torch.float32)


def test_a_bias_from_outside_may_hide_keys():
    """A float mask that is an input may be -inf where the causal mask is not: the finite fill then shows through."""

    def function(q, k, v, bias):
        return softmax(q @ k.mT * 0.25 + bias + torch.where(compared(), 0.0, -1e9), -1) @ v

    bias = torch.zeros(2, 1, 1, L)
    bias[0, ..., :3] = -math.inf
    args = (*qkv(queries=L), bias)
    raised = raise_function(function, *args)
    assert raised.argument("mask") == ""
    assert_close(raised.after, raised.before, torch.float32)


@pytest.mark.parametrize("first", ["-inf", "finite", "outside"])
def test_a_fill_beside_another_that_hides_is_refused(first):
    """Scores replaced by -1e9 win against -inf below them and tie with -1e9 added: no single bias says so."""

    def function(q, k, v, mask, bias):
        hidden = mask[:, None, None, :] == 0
        scores = q @ k.mT * 0.25
        if first == "-inf":
            scores = scores.masked_fill(hidden, -math.inf)
        elif first == "finite":
            scores = scores + hidden * -1e9
        else:
            scores = scores + bias
        return softmax(scores.masked_fill(compared(), -1e9), -1) @ v

    args = (*qkv(queries=L), padding(left=True), torch.randn(L, L) * 1e9)
    raised = raise_function(function, *args)
    assert raised.calls == [] and len(raised.result.near_misses) == 1
    assert "which may show" in raised.result.near_misses[0][2]
    torch.testing.assert_close(raised.after, raised.before, rtol=0, atol=0)


def test_two_fills_by_the_same_number():
    def function(q, k, v, mask):
        scores = (q @ k.mT * 0.25).masked_fill(mask[:, None, None, :] == 0, -1e9)
        return softmax(scores.masked_fill(~compared(), -1e9), -1) @ v

    for left in (False, True):
        raised = raise_function(function, *qkv(queries=L), padding(left))
        assert raised.argument("mask") == ""
        assert_close(raised.after, raised.before, torch.float32)


def test_a_small_penalty_is_a_bias():
    def function(q, k, v):
        return softmax(q @ k.mT * 0.25 + torch.where(compared(), 0.0, -5.0), -1) @ v

    args = qkv(queries=L)
    raised = raise_function(function, *args)
    assert raised.argument("mask") == "" and raised.shape("bias") is not None
    assert_close(raised.after, in_float64(function, args), torch.float32)


class T5(torch.nn.Module):
    """A learned position bias plus a mask, added as one tensor."""

    def __init__(self, selected: bool):
        super().__init__()
        self.table = torch.nn.Embedding(2 * L, 4)
        self.selected = selected

    def forward(self, q, k, v):
        q_idx, k_idx = positions()
        bias = self.table(q_idx - k_idx + L).permute(2, 0, 1)[None]
        if self.selected:
            bias = torch.where(compared(), bias, LOWEST)
        else:
            bias = bias + torch.where(compared(), 0.0, LOWEST)
        return softmax(q @ k.mT + bias, -1) @ v


@pytest.mark.parametrize("selected", [False, True])
def test_learned_bias_and_mask_come_apart(selected):
    torch.manual_seed(0)
    raised = raise_function(T5(selected), *qkv(queries=L))
    assert raised.argument("mask") == CAUSAL
    assert raised.shape("bias") == (1, 4, L, L)
    assert_close(raised.after, raised.before, torch.float32)


def test_half_masks_stay_in_range():
    """In float16 the fill is -65504: with positions alone it is a mask all the same."""

    def function(q, k, v):
        mask = torch.where(compared(), 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        return softmax(q @ k.mT * 0.25 + mask, -1) @ v

    args = qkv(torch.float16, queries=L)
    raised = raise_function(function, *args)
    assert raised.argument("mask") == CAUSAL
    assert_close(raised.after, raised.before, torch.float16)


def test_a_mask_changed_in_place_later_is_not_followed():
    def function(q, k, v):
        mask = torch.ones(L, L, dtype=torch.bool).tril()
        first = softmax((q @ k.mT * 0.25).masked_fill(~mask, -math.inf), -1) @ v
        mask[:, 0] = True
        second = softmax((q @ k.mT * 0.25).masked_fill(~mask, -math.inf), -1) @ v
        return first + second

    args = qkv(queries=L)
    raised = raise_function(function, *args)
    assert_close(raised.after, in_float64(function, args) / 1, torch.float32)


def test_sites_share_the_mask():
    class Layers(torch.nn.Module):
        def forward(self, q, k, v, mask):
            visible = mask[:, None, None, :].bool() & compared()
            for _ in range(3):
                q = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
            return q

    args = (*qkv(queries=L), padding())
    raised = raise_function(Layers(), *args)
    assert len(raised.calls) == 3
    assert len({call.args[3] for call in raised.calls}) == 1
    assert_close(raised.after, raised.before, torch.float32)
