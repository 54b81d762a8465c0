"""Networks on text: a character-level GPT with tied embeddings, and a bag of sparse word embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import CHARACTERS, SOURCES, WORDS


class Block(nn.Module):
    """A pre-LN transformer block whose attention and activation are function calls."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to the past, then transform each position (B, T, C)."""
        batch, time, width = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(seen.transpose(1, 2).reshape(batch, time, width))
        branch: Tensor = self.down(F.gelu(self.up(self.ln_2(x))))
        return x + branch


class GPT(nn.Module):
    """A small GPT-2 over characters; the output layer is the embedding itself."""

    def __init__(self, depth: int = 3, width: int = 48, heads: int = 4, length: int = 32) -> None:
        super().__init__()
        self.wte = nn.Embedding(CHARACTERS, width)
        self.wpe = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, CHARACTERS, bias=False)
        # GPT-2's 0.02 at width 768, for this width.
        std = 0.02 * (768 / width) ** 0.5
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            # GPT-2 shrinks what is added to the residual stream, so that its variance does not grow with depth.
            for name in ("proj", "down"):
                nn.init.normal_(block.get_parameter(f"{name}.weight"), std=std / (2 * depth) ** 0.5)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, characters) of the next character."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        output: Tensor = self.head(self.ln_f(x))
        return output


class WordBag(nn.Module):
    """The mean of sparse word embeddings through one hidden layer; most rows of the table get no gradient."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width, padding_idx=0, sparse=True)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, len(SOURCES))

    def forward(self, words: Tensor) -> Tensor:
        """Logits of the class for word numbers (B, 24), where 0 is padding."""
        mean = self.embed(words).sum(1) / (words > 0).sum(1, keepdim=True)
        output: Tensor = self.head(torch.relu(self.hidden(mean)))
        return output
