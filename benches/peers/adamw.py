#!/usr/bin/env python3
"""AdamW in PyTorch over the parameters of a model's blocks: for each, fused into few launches, and
fused on one flat parameter. Needs PyTorch; prints one JSON line per case.
"""
import torch

from timer import Peers


def main():
    peers = Peers(__doc__, ["quick", "paper"])
    for scale in peers.scales:
        width, wide = scale.width, scale.wide
        shapes = scale.layers * [(3 * width, width), (width, width), (wide, width), (width, wide)]
        flat = [(sum(rows * columns for rows, columns in shapes),)]
        for how, shapes_, options in [
            ("foreach", shapes, dict(foreach=True)),
            ("fused", shapes, dict(fused=True)),
            ("fused flat", flat, dict(fused=True)),
        ]:
            def make():
                parameters = [peers.draw(*shape, grad=True, factor=0.05) for shape in shapes_]
                for parameter in parameters:
                    parameter.grad = peers.draw(*parameter.shape, factor=1e-3)
                return torch.optim.AdamW(parameters, 1e-4, weight_decay=1e-4, **options).step
            peers.case("adamw", scale, how, torch.float32, make)


if __name__ == "__main__":
    main()
