#!/usr/bin/env python3
"""A content-addressed memory in PyTorch, op by op and compiled: cosine addresses, sigmoid strength,
erasing where it writes, reading before writing, over the segments of each trajectory.

All trajectories are as long as their mean, so that nothing is padded. Needs PyTorch; prints one JSON
line per case.
"""
import math

import torch
import torch.nn.functional as F

from timer import Peers, backward


def segment(memory, address_key, strength_key, value, key_strength, bias):
    """One segment: memory [B, N, D], keys and value [B, T, D], key_strength [B, T]."""
    width = memory.shape[-1]
    cosine = F.normalize(address_key, dim=-1) @ F.normalize(memory, dim=-1).transpose(1, 2)
    address = (key_strength[..., None] * cosine).softmax(-1)
    read = address @ memory
    strength = torch.sigmoid(strength_key @ memory.transpose(1, 2) / math.sqrt(width) + bias)
    write = address * strength
    kept = torch.log1p(-write.clamp(max=1 - 1e-6)).sum(1).exp()
    return read, kept[..., None] * memory + write.transpose(1, 2) @ value


def chain(initial, address_key, strength_key, value, key_strength, bias, tokens):
    memory = initial.expand(value.shape[0], -1, -1)
    reads = []
    for parts in zip(*(x.split(tokens, 1) for x in (address_key, strength_key, value, key_strength))):
        read, memory = segment(memory, *parts, bias)
        reads.append(read)
    return torch.cat(reads, 1)


def main():
    peers = Peers(__doc__, ["quick", "paper", "dt-mem"])
    for scale in peers.scales:
        tokens = scale.tokens // scale.sequences
        of_segment = scale.per_step * scale.segment_steps
        rows = (scale.sequences, tokens, scale.width)
        memories = scale.sequences * math.ceil(tokens / of_segment) * scale.slots
        for dtype in peers.types:
            copies = peers.copies((4 * math.prod(rows) + memories * scale.width) * dtype.itemsize)

            def inputs():
                keys = [peers.draw(*rows, dtype=dtype, grad=True) for _ in range(3)]
                strength = (1 + peers.draw(*rows[:2]).abs()).to(dtype).requires_grad_()
                initial = peers.draw(scale.slots, scale.width, dtype=dtype, grad=True)
                bias = torch.zeros(1, device=peers.device, dtype=dtype, requires_grad=True)
                return [initial, *keys, strength, bias]

            for how, run in [("op by op", chain), ("compiled", peers.compiled(chain))]:
                def forward():
                    held = inputs()
                    def once():
                        with torch.no_grad():
                            run(*held, of_segment)
                    return once

                def gradients():
                    held = inputs()
                    return backward([run(*held, of_segment)], held)
                peers.case("content_memory", scale, how, dtype, forward, copies)
                peers.case("content_memory_backward", scale, how, dtype, gradients, copies)


if __name__ == "__main__":
    main()
