"""Timing of two things in turn, and the table of their ratios: for bench.py and bench7b.py."""
import statistics
import time

import torch


class Table:
    """Rows and checks of all benches: printed as they come, written as JSON at the end."""

    def __init__(self, args):
        self.args, self.rows, self.checks, self.bench = args, [], [], None
        print(f"{'':10s}{'':54s}{'ours':>10s} {'other':>10s}  {'ratio':>7s} {'min to max':>19s} {'target':>8s}")

    def row(self, what, ours, other=None, unit="s", ratio=None, target=None, at_most=False, note=""):
        """ratio: a number, or (median, min, max). target: the least ratio to reach, or the largest with at_most."""
        median, low, high = ratio if isinstance(ratio, tuple) else (ratio, None, None)
        reached = None
        if target is not None:
            reached = bool(median <= target if at_most else median >= target)
        self.rows.append({
            "bench": self.bench, "what": what, "ours": ours, "other": other, "unit": unit, "ratio": median,
            "min": low, "max": high, "target": target, "at_most": at_most, "reached": reached, "note": note})
        numbers = ["" if x is None else f"{x:.4g}" for x in (ours, other)]
        line = f"{self.bench:10s}{what:54s}{numbers[0]:>10s} {numbers[1]:>10s} {unit:<3s}"
        line += "" if median is None else f"{median:6.2f} "
        line += " " * 20 if low is None else f"{f'{low:.2f} to {high:.2f}':>19s} "
        if target is not None:
            line += f"{'<=' if at_most else '>='}{target:5.3g}{' ' if reached else '*'}"
        print(f"{line}  {note}" if note else line, flush=True)

    def equal(self, what, difference, within):
        holds = bool(difference <= within)
        self.checks.append({"bench": self.bench, "what": what, "difference": float(difference),
                            "within": within, "holds": holds})
        print(f"{self.bench:10s}{'equal' if holds else 'FAIL '}  {what}: {difference:.2g}, within {within:g}",
              flush=True)

    def compare(self, what, ours, other, scale=1.0, unit="s", repeats=None, **more):
        """Time two functions in turn and add the row. scale: to the unit, e.g. 1000 for ms."""
        a, b = self.in_turn(ours, other, repeats=repeats)
        self.row(what, statistics.median(a) * scale, statistics.median(b) * scale, unit, ratio(a, b), **more)

    def now(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, function):
        start = self.now()
        function()
        return self.now() - start

    def in_turn(self, *functions, repeats=None, warm=True):
        """Seconds of each function in each round; every other round goes backwards."""
        times = [[] for _ in functions]
        if warm:
            for function in functions:
                function()
        for k in range(repeats or self.args.repeats):
            order = list(range(len(functions)))
            for i in reversed(order) if k % 2 else order:
                times[i].append(self.seconds(functions[i]))
        return times


class Metered:
    """A function that sums up the seconds spent in it."""

    def __init__(self, function, table):
        self.function, self.table, self.spent = function, table, 0.0

    def __call__(self, *args, **kwargs):
        start = self.table.now()
        result = self.function(*args, **kwargs)
        self.spent += self.table.now() - start
        return result


def ratio(ours, other):
    """(median, min, max) over the rounds of other / ours: what slows both in a round drops out."""
    each = sorted(b / a for a, b in zip(ours, other))
    return statistics.median(each), each[0], each[-1]


def peak(function):
    """Bytes on the GPU above what was there before, at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def matmul(device, dtype):
    """A product of square matrices, and its operations."""
    size = 8192 if device.type == "cuda" else 1536
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    return lambda: a @ b, 2 * size ** 3


def share_of_matmul(table, what, step, **more):
    """A row: operations a second of a step's products, over those of one large product here and now."""
    device, dtype = step.model.backbone.device, step.model.backbone.llava.dtype
    product, operations = matmul(device, dtype)
    flops = step.flops()
    a, b = table.in_turn(step, product)
    share = ratio([t / flops for t in a], [t / operations for t in b])
    table.row(what, flops / statistics.median(a) / 1e12, operations / statistics.median(b) / 1e12, "T/s", share, **more)
