"""Small randomly initialised models of real architectures, for tests."""

from __future__ import annotations

import torch
from torch import nn


def llama(attn: str = "sdpa", layers: int = 2, **config: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    # Weights large enough that attention decides which token comes next.
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": layers, "max_position_embeddings": 128}
    sizes |= {"initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**(sizes | config), attn_implementation=attn)).eval()


def bert(attn: str = "sdpa", layers: int = 2, **config: object) -> nn.Module:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": layers, "max_position_embeddings": 64, "initializer_range": 0.3}
    return BertModel(BertConfig(**(sizes | config), attn_implementation=attn)).eval()


def tokens(batch: int = 2, length: int = 7, vocabulary: int = 96, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


class Mlp(nn.Module):
    """Linear, GELU, linear, dropout, batch norm: state, randomness and a mode."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"y": self.norm(self.drop(self.down(torch.nn.functional.gelu(self.up(x))))) * scale}


class Breaks(nn.Module):
    """A branch on data: export cannot capture it, Dynamo breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if y.sum() > 0:
            y = y + 1
        return self.linear(y)
