#!/usr/bin/env python3
"""One AttentionTuner training step in PyTorch at the paper's LTMB size: f32 eager, as the paper's
authors compute it, and bf16 compiled.

Trajectories are padded to the longest of the batch, and attention is materialised where it is
supervised. Real tokens count, padding does not. Needs PyTorch; prints one JSON line per case.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from timer import Peers

CARDINALITIES = (11, 6, 3)
CHANNELS, CELLS, ACTIONS = sum(CARDINALITIES), 7, 7


class Block(nn.Module):
    def __init__(self, width, heads, wide, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)

    def forward(self, x, mask, supervised):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attention = None
        if supervised:
            attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask).float().softmax(-1)
            y = attention.to(v.dtype) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.norm1(x + self.out(y.transpose(1, 2).reshape(batch, tokens, width)))
        y = F.dropout(self.down(F.relu(self.up(x))), self.dropout, self.training)
        return self.norm2(x + y), attention


class AttentionTuner(nn.Module):
    def __init__(self, scale, dropout=0.1):
        super().__init__()
        width, self.dropout = scale.width, dropout
        self.conv1 = nn.Conv2d(CHANNELS, 40, 3, padding=1)
        self.conv2 = nn.Conv2d(40, 80, 3, padding=1)
        self.observation, self.action = nn.Linear(80 * CELLS**2, width), nn.Linear(ACTIONS, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, ACTIONS)
        self.blocks = nn.ModuleList(
            Block(width, scale.heads, scale.wide, dropout) for _ in range(scale.layers))
        steps = torch.arange(max(scale.steps))[:, None]
        angle = steps * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        self.register_buffer("positions", torch.stack((angle.sin(), angle.cos()), 2).flatten(1))

    def forward(self, cells, actions, mask):
        batch, steps = actions.shape
        x = F.relu(self.conv2(F.relu(self.conv1(cells))))
        x = torch.tanh(self.observation(x.flatten(1))).view(batch, steps, -1)
        a = torch.tanh(self.action(F.one_hot(actions, ACTIONS).to(cells.dtype)))
        position = self.positions[:steps]
        x = F.dropout(self.norm(torch.stack((x + position, a + position), 2).flatten(1, 2)),
                      self.dropout, self.training)
        first = None
        for index, block in enumerate(self.blocks):
            x, attention = block(x, mask, index == 0)
            first = attention if index == 0 else first
        return self.head(x[:, ::2]), first[:, 0]


def main():
    peers = Peers(__doc__, ["paper"])
    device = peers.device
    for scale in peers.scales:
        steps = torch.tensor(scale.steps, device=device)
        batch, longest = scale.sequences, max(scale.steps)
        valid = torch.arange(longest, device=device)[None] < steps[:, None]
        codes = torch.stack(
            [torch.randint(0, n, (batch * longest, CELLS, CELLS), device=device)
             for n in CARDINALITIES], 1)
        codes += torch.tensor([0, 11, 17], device=device).view(1, 3, 1, 1)
        actions = torch.randint(0, ACTIONS, (batch, longest), device=device)
        labels = actions.masked_fill(~valid, -100)
        mask = torch.full((2 * longest, 2 * longest), -math.inf, device=device).triu(1)
        target = torch.zeros(batch, 2 * longest, 2 * longest, device=device)
        for step in range(longest):
            target[:, 2 * step, 2 * step] = 1
            if step > 2 and step % 4 == 0:
                target[:, 2 * step, 2] = 1
        tokens = valid.repeat_interleave(2, 1)
        square = (tokens[:, :, None] & tokens[:, None]).float()

        def make(dtype, compiled):
            model = AttentionTuner(scale).to(device)
            optimiser = torch.optim.Adam(model.parameters(), 1e-4, fused=peers.on_gpu)

            def loss():
                with peers.autocast(dtype):
                    cells = torch.zeros(batch * longest, CHANNELS, CELLS, CELLS, device=device)
                    logits, attention = model(cells.scatter_(1, codes, 1.0), actions, mask)
                action_loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
                with torch.autocast(device.type, enabled=False):
                    bce = F.binary_cross_entropy(attention.float(), target, reduction="none")
                return action_loss + 10 * (bce * square).sum() / square.sum()
            compute = peers.compiled(loss) if compiled else loss

            def step():
                optimiser.zero_grad(set_to_none=True)
                compute().backward()
                optimiser.step()
            return step

        peers.case("step", scale, "eager", torch.float32, lambda: make(torch.float32, False))
        peers.case("step", scale, "compiled", torch.bfloat16, lambda: make(torch.bfloat16, True))


if __name__ == "__main__":
    main()
