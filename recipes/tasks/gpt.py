"""A small GPT in one readable file: pre-norm blocks, rotary positions, GELU, no biases.

Every matrix inside the blocks is a plain nn.Linear, so that a precision plugin can swap all of them. The output head is
not tied to the embedding and is called `lm_head`, the name by which the plugin knows what to leave in 16 bits.
Squared ReLU learns faster but not in int8: a few values far above the others of their row take its range (one seed
of experiment=bytes_gpt: 2.7 % above 16 bits; with GELU 0.1 %).

Sources: GPT-2 (layout, initial values),
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf
RoFormer (rotary positions), https://arxiv.org/abs/2104.09864
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GPT2_STD, GPT2_WIDTH = 0.02, 768  # other widths: GPT-2's standard deviation times sqrt(768 / width)
ROTARY_BASE = 10_000.0  # RoFormer, section 3.4.2
MLP_RATIO = 4


class Attention(nn.Module):
    """Causal self-attention; x (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, T, D / heads]
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x (B, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, MLP_RATIO * width, bias=False)
        self.down = nn.Linear(MLP_RATIO * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Tokens (B, T) with T <= context -> logits (B, T, vocabulary)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, *, vocabulary: int, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(
                f"rotary positions turn pairs of values in each head: width must be a multiple of 2 * heads, "
                f"got width {width} and heads {heads}"
            )
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        cos, sin = rotary_table(context, width // heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.initialize()

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.lm_head(self.norm(x))

    def initialize(self) -> None:
        """Draws all matrices; those that write to the residual stream are smaller, since their sum grows with depth."""
        std = GPT2_STD * (GPT2_WIDTH / self.embedding.embedding_dim) ** 0.5
        residual_std = std / (2 * len(self.blocks)) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(parameter, std=residual_std if writes_residual else std)

    @torch.no_grad()
    def generate(self, prompt: Tensor, length: int, temperature: float, generator: torch.Generator) -> Tensor:
        """prompt (T,) -> (T + length,), drawn one token at a time on the generator's device.

        The window has the same shape at every step, so that no kernel is tuned or compiled anew for each length.
        """
        tokens = prompt
        window = prompt.new_zeros(1, self.context)
        for _ in range(length):
            recent = tokens[-self.context :]
            window[0, : len(recent)] = recent
            logits = self(window)[0, len(recent) - 1].float().to(generator.device)
            drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, drawn.to(tokens.device)))
        return tokens


def rotary_table(context: int, head_width: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (context, head_width / 2) float32."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_width, 2) / head_width)
    angles = torch.outer(torch.arange(context), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, head_width) with each pair of values turned by the angle of its position, in the dtype of x."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).type_as(x)
