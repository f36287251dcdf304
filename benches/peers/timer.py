"""What all peers share: options, shapes, random inputs, timing, one JSON line per case."""
import argparse
import contextlib
import json
import statistics
import time

import torch

# As src/bench/mod.rs: time steps of the trajectories, how often, tokens per step, width, heads.
PAPER_STEPS = [145, 20, 96, 40, 64, 33, 88, 26]
SCALES = {
    "quick": dict(lengths=[10, 14], repeats=16, per_step=2, width=128, heads=2, wide=1024, layers=1,
                  slots=16, segment_steps=4),
    "paper": dict(lengths=PAPER_STEPS, repeats=8, per_step=2, width=512, heads=2, wide=2048,
                  layers=4, slots=64, segment_steps=28),
    "dt-mem": dict(lengths=[28], repeats=8, per_step=3, width=512, heads=8, wide=2048, layers=4,
                   slots=1290, segment_steps=13),
    "long": dict(lengths=[2048], repeats=4, per_step=2, width=512, heads=8, wide=2048, layers=4,
                 slots=256, segment_steps=28),
    "tiny": dict(lengths=[5, 3], repeats=1, per_step=2, width=32, heads=2, wide=64, layers=1,
                 slots=4, segment_steps=2),
}
L2_BYTES = 200e6  # sets of inputs of a case exceed this together, on a GPU


class Scale:
    def __init__(self, name):
        self.name = name
        self.__dict__.update(SCALES[name])
        self.steps = self.lengths * self.repeats
        self.sequences = len(self.steps)
        self.tokens = self.per_step * sum(self.steps)
        self.longest = self.per_step * max(self.steps)
        self.head_width = self.width // self.heads


class Peers:
    """Options and device of one script."""

    def __init__(self, description, scales):
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--tiny", action="store_true", help="a size that shows that it works")
        parser.add_argument("--quick", action="store_true", help="fewer samples, no `long` scale")
        parser.add_argument("--json", help="file to append the lines to")
        parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        self.options = parser.parse_args()
        self.device = torch.device(self.options.device)
        self.on_gpu = self.device.type == "cuda"
        if self.options.tiny:
            scales = ["tiny"]
        elif self.options.quick:
            scales = [name for name in scales if name != "long"]
        self.scales = [Scale(name) for name in scales]
        torch.manual_seed(0)

    @property
    def types(self):
        return [torch.bfloat16, torch.float32] if self.on_gpu else [torch.float32]

    def draw(self, *shape, dtype=torch.float32, grad=False, factor=1.0):
        x = factor * torch.randn(*shape, device=self.device)
        return x.to(dtype).requires_grad_(grad)

    def copies(self, bytes_):
        return max(1, min(16, round(L2_BYTES / bytes_))) if self.on_gpu else 1

    def seconds(self, run, runs):
        if not self.on_gpu:
            start = time.perf_counter()
            for _ in range(runs):
                run()
            return (time.perf_counter() - start) / runs
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(runs):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / runs

    def case(self, operation, scale, how, dtype, make, copies=1, tokens=None):
        """Times what `make()` returns; several of them in turn. What does not work is a line, too."""
        line = dict(operation=operation, scale=scale.name, peer=how, torch=torch.__version__,
                    device=torch.cuda.get_device_name() if self.on_gpu else "cpu",
                    precision=str(dtype).removeprefix("torch."), tokens=tokens or scale.tokens)
        try:
            works, turn = [make() for _ in range(copies)], 0

            def run():
                nonlocal turn
                works[turn % copies]()
                turn += 1

            for _ in range(max(3, copies)):
                run()
            one = self.seconds(run, 1)
            budget = 0.1 if self.options.quick or self.options.tiny else 0.5
            samples = 5 if budget < 0.2 else 9
            runs = max(1, min(1000, int(budget / samples / one)))
            median = statistics.median(self.seconds(run, runs) for _ in range(samples))
            line.update(seconds=median, tokens_per_s=line["tokens"] / median)
        except Exception as error:  # a device that lacks something must not end the others
            line["skipped"] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"[:300]
        text = json.dumps(line)
        print(text, flush=True)
        if self.options.json:
            with open(self.options.json, "a") as file:
                file.write(text + "\n")

    def compiled(self, function):
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    def autocast(self, dtype):
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)


def backward(out, inputs):
    """A function that computes the gradients of what `out` holds, again and again."""
    grads = [torch.randn_like(x) for x in out]
    return lambda: torch.autograd.grad(out, inputs, grads, retain_graph=True)
