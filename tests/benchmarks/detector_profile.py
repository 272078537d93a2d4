"""Where a training step's time goes, forward and backward, in the detector and in the frame-by-frame version of it.

    .venv/bin/python tests/benchmarks/detector_profile.py [--size tiny] [--frames 10] [--threads 1]

The parts are wrapped: forward is what passes inside of a part and outside of the parts within it. Backward is taken node by node:
every node of the graph belongs to the innermost part that made it, and gets what passed since the node before was done. The
rest is what belongs to no part: between stages, gathering of labelled frames, gradients that are added up.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median

import evspan.pipeline.model.loss
import torch
from detector_sides import Batch, Clock, Ours, Theirs, batch
from torch import Tensor

PARTS = ("backbone, spatial", "scan", "neck", "head", "assignment", "loss", "rest")


class Profile:
    """Seconds by part. Off a CPU, what is measured is when the host got there: wait for the device first."""

    def __init__(self, device: torch.device) -> None:
        self.forward: dict[str, float] = defaultdict(float)
        self.backward: dict[str, float] = defaultdict(float)
        self.owner: dict[
            object, str
        ] = {}  # of nodes; holds them, or their hooks' identities could come again
        self.within, self.last, self.device = ["rest"], 0.0, device

    def passed(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, Clock.now()
        return self.last - before

    def part(self, name: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            self.forward[self.within[-1]] += self.passed()
            self.within.append(name)
            marker = (
                torch.zeros((), requires_grad=True).view(()).grad_fn
            )  # numbers of later nodes are higher
            out = function(*args, **kwargs)
            self.own(name, out, marker._sequence_nr())
            self.forward[name] += self.passed()
            self.within.pop()
            return out

        return timed

    def own(self, name: str, out: object, since: int) -> None:
        """Every node between `out` and what went in that no inner part owns."""
        stack, seen = [t.grad_fn for t in tensors(out) if t.grad_fn is not None], set()
        while stack:
            node = stack.pop()
            if node in seen or node._sequence_nr() < since:
                continue
            seen.add(node)
            if node not in self.owner:
                self.owner[node] = name
                node.register_hook(lambda *_, name=name: self.after_node(name))
            stack += [n for n, _ in node.next_functions if n is not None]

    def after_node(self, name: str) -> None:
        self.backward[name] += self.passed()

    def step(self, side: Ours | Theirs, b: Batch) -> None:
        side.model.zero_grad(set_to_none=True)
        self.passed()
        loss = side.loss(b)
        self.forward["rest"] += self.passed()
        self.own("rest", loss, 0)
        self.passed()
        loss.backward()
        self.backward["rest"] += self.passed()
        self.owner.clear()


def tensors(out: object) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        return tensors(list(out.values()))
    return [t for item in out for t in tensors(item)] if isinstance(out, (list, tuple)) else []


def wrap_ours(profile: Profile, side: Ours) -> None:
    model = side.model
    for stage in model.backbone.stages:
        stage.spatial = profile.part("backbone, spatial", stage.spatial)
    model.exchange.scan = profile.part("scan", model.exchange.scan)
    model.fpn.forward = profile.part("neck", model.fpn.forward)
    model.yolox_head.forward = profile.part("head", model.yolox_head.forward)
    evspan.pipeline.model.loss.assign = profile.part(  # type: ignore[attr-defined]
        "assignment",
        evspan.pipeline.model.loss.assign,  # type: ignore[attr-defined]
    )
    side.detection_loss = profile.part("loss", side.detection_loss)


def wrap_theirs(profile: Profile, side: Theirs) -> None:
    model = side.model
    model.padded = profile.part("backbone, spatial", model.padded)
    for stage in model.backbone.stages:
        stage.lstm.forward = profile.part("scan", stage.lstm.forward)
        stage.forward = profile.part("backbone, spatial", stage.forward)
    model.fpn.forward = profile.part("neck", model.fpn.forward)
    model.yolox_head.assign = profile.part("assignment", model.yolox_head.assign)
    model.yolox_head.losses = profile.part("loss", model.yolox_head.losses)
    model.yolox_head.forward = profile.part("head", model.yolox_head.forward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=["tiny", "small", "base"], default="tiny")
    parser.add_argument("--frames", type=int, default=10, help="T")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--cpu-time", action="store_true", help="as in detector_speed.py")
    given = parser.parse_args()
    if given.cpu_time:
        Clock.now = staticmethod(time.process_time)
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    b = batch(given.frames, device)
    sides = {"frame by frame": Theirs(given.size, device), "ours": Ours(given.size, device)}
    profiles = {name: Profile(device) for name in sides}
    wrap_theirs(profiles["frame by frame"], sides["frame by frame"])
    wrap_ours(profiles["ours"], sides["ours"])
    took: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for i in range(-1, given.repeats):
        for name, profile in profiles.items():
            profile.forward.clear()
            profile.backward.clear()
            profile.step(sides[name], b)
            for way, parts in (("forward", profile.forward), ("backward", profile.backward)):
                for part in PARTS if i >= 0 else ():
                    took[name, way, part].append(parts[part] / given.frames * 1e3)
    print(
        f"Device: {device.type}, {given.size}, T = {given.frames}, {given.threads} threads, {given.repeats} rounds; "
        "ms a frame\n"
    )
    ways = [(name, way) for name in sides for way in ("forward", "backward")]
    print(
        "| part |",
        " | ".join(f"{name}, {way}" for name, way in ways),
        "| all, frame by frame | all, ours |\n|" + "---|" * 7,
    )
    for part in (*PARTS, "whole"):
        cells = [
            sum(median(took[name, way, p]) for p in (PARTS if part == "whole" else (part,)))
            for name, way in ways
        ]
        print(
            f"| {part} |",
            " | ".join(f"{x:.1f}" for x in (*cells, cells[0] + cells[1], cells[2] + cells[3])),
            "|",
        )


if __name__ == "__main__":
    main()
