"""Profiles a training step, forward and backward, in the detector and the frame-by-frame version.

    .venv/bin/python tests/benchmarks/detector_profile.py [--size tiny] [--frames 10] [--threads 1]

The parts are wrapped: forward is the time inside a part and outside the parts within it. Backward
is measured node by node: a node of the graph belongs to the innermost part that created it, and
gets the time since the previous node ended. `rest` belongs to no part: between stages, gathering of
labelled frames, accumulation of gradients.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median

import evspan.pipeline.model.loss as loss_module
import torch
from detector_sides import Batch, Clock, Ours, Theirs, make_batch, synchronize
from torch import Tensor

PARTS = ("backbone, spatial", "scan", "neck", "head", "assignment", "loss", "rest")
WAYS = ("forward", "backward")


class Profile:
    """Seconds by part.

    Attributes:
        owner: the part of each node. It keeps the nodes alive, so that no identity is reused.
    """

    def __init__(self, device: torch.device) -> None:
        self.forward: dict[str, float] = defaultdict(float)
        self.backward: dict[str, float] = defaultdict(float)
        self.owner: dict[object, str] = {}
        self.within = ["rest"]
        self.last = 0.0
        self.device = device

    def elapsed(self) -> float:
        """Seconds since the last call, with the work of the device."""
        synchronize(self.device)
        previous = self.last
        self.last = Clock.now()
        return self.last - previous

    def part(self, name: str, function: Callable) -> Callable:
        """Wraps a function as a part."""

        def timed(*args, **kwargs):
            self.forward[self.within[-1]] += self.elapsed()
            self.within.append(name)
            # Later nodes have higher sequence numbers.
            marker = torch.zeros((), requires_grad=True).view(()).grad_fn
            out = function(*args, **kwargs)
            self.own(name, out, marker._sequence_nr())
            self.forward[name] += self.elapsed()
            self.within.pop()
            return out

        return timed

    def own(self, name: str, out: object, since: int) -> None:
        """Assigns the nodes from a part's inputs to `out` to it, unless inner parts own them."""
        stack = [tensor.grad_fn for tensor in tensors(out) if tensor.grad_fn is not None]
        seen = set()
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
        """Adds the time of a node in backward."""
        self.backward[name] += self.elapsed()

    def step(self, side: Ours | Theirs, batch: Batch) -> None:
        """Profiles a training step."""
        side.model.zero_grad(set_to_none=True)
        self.elapsed()
        loss = side.loss(batch)
        self.forward["rest"] += self.elapsed()
        self.own("rest", loss, 0)
        self.elapsed()
        loss.backward()
        self.backward["rest"] += self.elapsed()
        self.owner.clear()


def tensors(out: object) -> list[Tensor]:
    """All tensors of nested dicts, lists and tuples."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        out = list(out.values())
    result = []
    if isinstance(out, (list, tuple)):
        for item in out:
            result += tensors(item)
    return result


def wrap_ours(profile: Profile, side: Ours) -> None:
    """Wraps the detector's parts."""
    model = side.model
    for stage in model.backbone.stages:
        stage.spatial = profile.part("backbone, spatial", stage.spatial)
    model.exchange.scan = profile.part("scan", model.exchange.scan)
    model.fpn.forward = profile.part("neck", model.fpn.forward)
    model.yolox_head.forward = profile.part("head", model.yolox_head.forward)
    # The loss imports it by name: it is no public attribute of that module.
    assign = loss_module.assign  # type: ignore[attr-defined]
    loss_module.assign = profile.part("assignment", assign)  # type: ignore[attr-defined]
    side.detection_loss = profile.part("loss", side.detection_loss)


def wrap_theirs(profile: Profile, side: Theirs) -> None:
    """Wraps the parts of the frame-by-frame version."""
    model = side.model
    model.padded = profile.part("backbone, spatial", model.padded)
    for stage in model.backbone.stages:
        stage.lstm.forward = profile.part("scan", stage.lstm.forward)
        stage.forward = profile.part("backbone, spatial", stage.forward)
    model.fpn.forward = profile.part("neck", model.fpn.forward)
    model.yolox_head.assign = profile.part("assignment", model.yolox_head.assign)
    model.yolox_head.losses = profile.part("loss", model.yolox_head.losses)
    model.yolox_head.forward = profile.part("head", model.yolox_head.forward)


Times = dict[tuple[str, str, str], list[float]]  # (side, way, part) -> ms per frame, by round


def measure(args: argparse.Namespace, device: torch.device) -> Times:
    """Profiles steps of both sides, which take turns, after a round of warm-up."""
    batch = make_batch(args.frames, device)
    sides = {"frame by frame": Theirs(args.size, device), "ours": Ours(args.size, device)}
    profiles = {name: Profile(device) for name in sides}
    wrap_theirs(profiles["frame by frame"], sides["frame by frame"])
    wrap_ours(profiles["ours"], sides["ours"])
    times: Times = defaultdict(list)
    for i in range(-1, args.repeats):
        for name, profile in profiles.items():
            profile.forward.clear()
            profile.backward.clear()
            profile.step(sides[name], batch)
            if i < 0:
                continue
            for part in PARTS:
                times[name, "forward", part].append(profile.forward[part] / args.frames * 1e3)
                times[name, "backward", part].append(profile.backward[part] / args.frames * 1e3)
    return times


def print_table(times: Times) -> None:
    """Prints the medians by part."""
    columns = [(name, way) for name in ("frame by frame", "ours") for way in WAYS]
    heads = [f"{name}, {way}" for name, way in columns]
    print(f"| part | {' | '.join(heads)} | all, frame by frame | all, ours |\n|{'---|' * 7}")
    totals = [0.0] * len(columns)
    for part in PARTS:
        cells = [median(times[name, way, part]) for name, way in columns]
        totals = [total + cell for total, cell in zip(totals, cells, strict=True)]
        print_row(part, cells)
    print_row("whole", totals)


def print_row(part: str, cells: list[float]) -> None:
    """Prints a row and the sums of both sides."""
    theirs = cells[0] + cells[1]
    ours = cells[2] + cells[3]
    values = " | ".join(f"{value:.1f}" for value in (*cells, theirs, ours))
    print(f"| {part} | {values} |")


def main() -> None:
    """Prints the profile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=["tiny", "small", "base"], default="tiny")
    parser.add_argument("--frames", type=int, default=10, help="T")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--cpu-time", action="store_true", help="as in detector_speed.py")
    args = parser.parse_args()
    if args.cpu_time:
        Clock.now = staticmethod(time.process_time)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    times = measure(args, device)
    print(
        f"Device: {device.type}, {args.size}, T = {args.frames}, {args.threads} threads, "
        f"{args.repeats} rounds; ms a frame\n"
    )
    print_table(times)


if __name__ == "__main__":
    main()
