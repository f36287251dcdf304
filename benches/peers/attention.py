#!/usr/bin/env python3
"""Causal attention in PyTorch: SDPA with each backend, FlexAttention, and eager with the memory loss.

Trajectories are padded to the longest of the batch, as PyTorch's attention takes them; FlexAttention
takes them packed, with a block mask. The eager attention materialises its matrix, which the BCE on
the annotated pairs needs: so do the paper's authors. Needs PyTorch; prints one JSON line per case.
"""
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from timer import Peers, backward

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def eager(q, k, v, mask, target, valid):
    """Output, and the BCE of head 0."""
    attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask).float().softmax(-1)
    bce = F.binary_cross_entropy(attention[:, 0], target, reduction="none")
    return attention.to(v.dtype) @ v, (bce * valid).sum() / valid.sum()


def main():
    peers = Peers(__doc__, ["quick", "paper", "dt-mem", "long"])
    device = peers.device
    for scale in peers.scales:
        longest, lengths = scale.longest, [scale.per_step * steps for steps in scale.steps]
        padded = (scale.sequences, scale.heads, longest, scale.head_width)
        for dtype in peers.types:
            size = 3 * math.prod(padded) * dtype.itemsize
            copies = peers.copies(size)

            def inputs(shape=padded):
                return [peers.draw(*shape, dtype=dtype, grad=True) for _ in range(3)]

            def both(how, attend, *arguments, copies=copies):
                """Times attend(q, k, v, *arguments), a tuple, forward and backward."""
                def forward():
                    q, k, v = inputs()
                    def run():
                        with torch.no_grad():
                            attend(q, k, v, *arguments)
                    return run

                def gradients():
                    qkv = inputs()
                    return backward(attend(*qkv, *arguments), qkv)
                bce = "_bce" if "bce" in how else ""
                peers.case(f"attention{bce}", scale, how, dtype, forward, copies)
                peers.case(f"attention{bce}_backward", scale, how, dtype, gradients, copies)

            for name, choice in BACKENDS.items():
                def sdpa(q, k, v):
                    with sdpa_kernel([choice]):
                        return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)
                both(f"sdpa {name}", sdpa)

            # The matrix of `long` does not fit beside its gradients.
            if scale.name != "long":
                mask = torch.full((longest, longest), -math.inf, device=device).triu(1)
                square = torch.zeros(scale.sequences, longest, longest, device=device)
                target = torch.eye(longest, device=device).repeat(scale.sequences, 1, 1)
                for index, length in enumerate(lengths):
                    square[index, :length, :length] = 1
                    target[index, 8:length:8, 2] = 1
                both("eager bce", eager, mask, target, square, copies=1)
                both("compiled eager bce", peers.compiled(eager), mask, target, square, copies=1)

            try:
                from torch.nn.attention.flex_attention import create_block_mask, flex_attention
                document = torch.repeat_interleave(
                    torch.arange(scale.sequences, device=device),
                    torch.tensor(lengths, device=device))

                def visible(b, h, query, key):
                    return (query >= key) & (document[query] == document[key])

                # Blocks divide the packed length; the last one's rest is cut off.
                tokens = max(128, scale.tokens // 128 * 128)
                if tokens > scale.tokens:
                    document = F.pad(document, (0, tokens - scale.tokens), value=-1)
                blocks = create_block_mask(visible, None, None, tokens, tokens, device=device)
                attend = peers.compiled(flex_attention)

                def packed():
                    return [peers.draw(1, scale.heads, tokens, scale.head_width, dtype=dtype,
                                       grad=peers.on_gpu) for _ in range(3)]

                def forward():
                    q, k, v = packed()
                    def run():
                        with torch.no_grad():
                            attend(q, k, v, block_mask=blocks)
                    return run

                def gradients():
                    qkv = packed()
                    return backward([attend(*qkv, block_mask=blocks)], qkv)
                peers.case("attention", scale, "flex", dtype, forward, copies, tokens)
                if peers.on_gpu:  # it has no gradients on a CPU
                    peers.case("attention_backward", scale, "flex", dtype, gradients, copies, tokens)
            except ImportError as error:
                print(f"no FlexAttention: {error}")


if __name__ == "__main__":
    main()
