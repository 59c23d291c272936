"""The evaluation text that every Python has, and perplexity on it.

``pydoc_data.topics`` holds the language reference as about 465,000 characters of English and code. Its wording
differs between Python versions, so perplexities are comparable within one Python only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..runtime.errors import BadArgument

TOKENS_PER_BLOCK = 1024


def evaluation_text() -> str:
    """The topics, sorted by name and joined by newlines."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def token_blocks(tokenizer: Any, count: int, length: int = TOKENS_PER_BLOCK, *, start: int = 0) -> list[torch.Tensor]:
    """``count`` consecutive blocks of token ids, int64 of shape (1, length), from block ``start`` on.

    Calibrate on other blocks than the ones that are evaluated. No special tokens are added.
    Raises :class:`BadArgument` when the text has fewer tokens.
    """
    if count < 1 or length < 2 or start < 0:
        raise BadArgument(
            f"{count} blocks of {length} tokens from block {start}: need at least one block of two tokens"
        )
    text = evaluation_text()
    # Tokenizing all of it takes a second; at 12 characters a token the prefix is long enough for any tokenizer's
    # English, and the whole is the fallback.
    wanted = (start + count) * length
    for piece in (text[: 12 * wanted], text):
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        # The last tokens of a cut prefix may be cut too: only tokens well before the end are the whole text's.
        if len(ids) >= wanted + 16 or (piece is text and len(ids) >= wanted):
            tokens = torch.tensor(ids[start * length : wanted], dtype=torch.long)
            return list(tokens.reshape(count, 1, length))
    raise BadArgument(
        f"the evaluation text has {len(ids)} tokens, {wanted} are asked for: take fewer or shorter blocks"
    )


def token_losses(model: Callable[..., Any], blocks: list[torch.Tensor], **kwargs: Any) -> Iterator[torch.Tensor]:
    """Per block the next-token losses in nats, float32 of shape (length - 1,).

    model: called as ``model(input_ids=block, **kwargs)``; returns logits (1, length, vocabulary), as a tensor, in
    ``.logits`` or first in a tuple.
    """
    for block in blocks:
        with torch.no_grad():
            out = model(input_ids=block, **kwargs)
        logits = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
        logits = out[0] if logits is None else logits
        yield torch.nn.functional.cross_entropy(logits[0, :-1].float(), block[0, 1:], reduction="none")


def perplexity(model: Callable[..., Any], tokenizer: Any, count: int = 8, *, start: int = 0, **kwargs: Any) -> float:
    """``exp`` of the mean next-token loss over ``count`` blocks of 1024 tokens, each predicted on its own."""
    losses = torch.cat(list(token_losses(model, token_blocks(tokenizer, count, start=start), **kwargs)))
    return math.exp(losses.double().mean().item())
