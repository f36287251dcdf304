#!/usr/bin/env python3
"""Low-rank adapters in PyTorch as PEFT writes them: a frozen projection, then two small ones, each a
call of its own, on three projections of one input. Needs PyTorch; prints one JSON line per case.
"""
import torch
import torch.nn.functional as F

from timer import Peers, backward

RANK, SCALING, PROJECTIONS = 8, 2.0, 3


def adapted(x, weights, downs, ups):
    return tuple(F.linear(x, weight) + SCALING * F.linear(F.linear(x, down), up)
                 for weight, down, up in zip(weights, downs, ups))


def main():
    peers = Peers(__doc__, ["quick", "paper", "dt-mem"])
    for scale in peers.scales:
        width = scale.width
        for dtype in peers.types:
            def inputs():
                def of(*shape, grad):
                    return [peers.draw(*shape, dtype=dtype, grad=grad, factor=0.05)
                            for _ in range(PROJECTIONS)]
                x = peers.draw(scale.tokens, width, dtype=dtype, grad=True)
                return (x, of(width, width, grad=False), of(RANK, width, grad=True),
                        of(width, RANK, grad=True))

            copies = peers.copies((4 * scale.tokens + 3 * width) * width * dtype.itemsize)
            for how, run in [("peft", adapted), ("peft compiled", peers.compiled(adapted))]:
                def forward():
                    held = inputs()
                    def once():
                        with torch.no_grad():
                            run(*held)
                    return once

                def gradients():
                    x, weights, downs, ups = inputs()
                    return backward(run(x, weights, downs, ups), [x, *downs, *ups])
                peers.case("lora_linear", scale, how, dtype, forward, copies)
                peers.case("lora_linear_backward", scale, how, dtype, gradients, copies)


if __name__ == "__main__":
    main()
