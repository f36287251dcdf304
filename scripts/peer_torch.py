#!/usr/bin/env python3
"""The PyTorch side of benches/train_step.rs: one AttentionTuner step at the paper's LTMB size.

Trajectories are padded to the longest of the batch and attention is materialised where it is
supervised, as the paper's authors do. Needs PyTorch; prints one JSON line.
"""
import argparse
import json
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

STEPS = [145, 20, 96, 40, 64, 33, 88, 26]  # as PAPER_STEPS of the bench


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
        if supervised:
            attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask).softmax(-1)
            y = attention @ v
        else:
            attention = None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.norm1(x + self.out(y.transpose(1, 2).reshape(batch, tokens, width)))
        y = F.dropout(self.down(F.relu(self.up(x))), self.dropout, self.training)
        return self.norm2(x + y), attention


class AttentionTuner(nn.Module):
    def __init__(self, width=512, layers=4, heads=2, wide=2048, dropout=0.1, actions=7, steps=145):
        super().__init__()
        self.dropout = dropout
        self.conv1, self.conv2 = nn.Conv2d(20, 40, 3, padding=1), nn.Conv2d(40, 80, 3, padding=1)
        self.observation, self.action = nn.Linear(3920, width), nn.Linear(actions, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, wide, dropout) for _ in range(layers))
        self.head = nn.Linear(width, actions)
        angle = torch.arange(steps)[:, None] * torch.exp(
            torch.arange(0, width, 2) * (-math.log(1e4) / width))
        self.register_buffer("positions", torch.stack((angle.sin(), angle.cos()), 2).flatten(1))

    def forward(self, cells, actions):
        batch, steps = actions.shape
        x = F.relu(self.conv2(F.relu(self.conv1(cells))))
        x = torch.tanh(self.observation(x.flatten(1))).view(batch, steps, -1)
        a = torch.tanh(self.action(F.one_hot(actions, 7).float()))
        position = self.positions[:steps]
        x = torch.stack((x + position, a + position), 2).flatten(1, 2)
        x = F.dropout(self.norm(x), self.dropout, self.training)
        mask = torch.full((2 * steps, 2 * steps), -math.inf).triu(1)
        first = None
        for index, block in enumerate(self.blocks):
            x, attention = block(x, mask, index == 0)
            first = attention if index == 0 else first
        return self.head(x[:, ::2]), first[:, 0]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--iterations", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    model = AttentionTuner()
    optimiser = torch.optim.Adam(model.parameters(), 1e-4)
    batch, longest = len(STEPS), max(STEPS)
    valid = torch.arange(longest)[None] < torch.tensor(STEPS)[:, None]
    codes = torch.stack([torch.randint(0, n, (batch * longest, 7, 7)) for n in (11, 6, 3)], 1)
    codes += torch.tensor([0, 11, 17]).view(1, 3, 1, 1)
    actions = torch.randint(0, 7, (batch, longest))
    target = torch.zeros(batch, 2 * longest, 2 * longest)
    for step in range(longest):
        target[:, 2 * step, 2 * step] = 1
        if step > 2 and step % 4 == 0:
            target[:, 2 * step, 2] = 1
    tokens = valid.repeat_interleave(2, 1)
    square = (tokens[:, :, None] & tokens[:, None]).float()

    def step():
        cells = torch.zeros(batch * longest, 20, 7, 7).scatter_(1, codes, 1.0)
        logits, attention = model(cells, actions)
        action_loss = F.cross_entropy(logits[valid], actions[valid])
        bce = F.binary_cross_entropy(attention, target, reduction="none")
        loss = action_loss + 10 * (bce * square).sum() / square.sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss.item()

    step()
    seconds = []
    for _ in range(arguments.iterations):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    median = seconds[len(seconds) // 2]
    print(json.dumps({
        "torch": torch.__version__,
        "threads": arguments.threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "real_tokens": 2 * sum(STEPS),
        "median_s": round(median, 4),
        "fastest_s": round(seconds[0], 4),
        "real_tokens_per_s": round(2 * sum(STEPS) / median, 1),
    }))


if __name__ == "__main__":
    main()
