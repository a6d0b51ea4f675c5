"""The means of what was measured."""

import torch
from torch import Tensor


class Meter:
    """Means of metrics over an interval. Every update's values are kept on the device, a row each, which takes one
    launch; the host reads them in `means`, or once a block is full."""

    BLOCK = 1024  # rows of a block

    def __init__(self):
        self.blocks: dict[tuple, tuple[Tensor, list[int]]] = {}  # names -> rows (BLOCK, names), whose updates
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.bad: tuple[int, list[str]] | None = None  # the first update that was not finite, and in what

    @torch.no_grad()
    def add(self, metrics: dict[str, Tensor], update: int) -> None:
        names = tuple(metrics)
        if names not in self.blocks:
            like = metrics[names[0]]
            self.blocks[names] = like.new_empty(self.BLOCK, len(names), dtype=torch.float32), []
        rows, updates = self.blocks[names]
        values = [v if v.dtype == rows.dtype else v.float() for v in metrics.values()]
        torch.stack(values, out=rows[len(updates)])
        updates.append(update)
        if len(updates) == self.BLOCK:
            self.fold()

    def fold(self) -> None:
        """Bring the rows into the sums. The host waits for the device here."""
        for names, (rows, updates) in self.blocks.items():
            if updates:
                self.add_rows(names, rows[: len(updates)].double().cpu(), updates)
                updates.clear()

    def add_rows(self, names: tuple[str, ...], rows: Tensor, updates: list[int]) -> None:
        """Metrics of several updates: (updates, names), on the CPU."""
        for name, total in zip(names, rows.sum(0).tolist()):
            self.sums[name] = self.sums.get(name, 0.0) + total
            self.counts[name] = self.counts.get(name, 0) + len(updates)
        wrong = ~rows.isfinite()
        if wrong.any():
            first = wrong.any(1).nonzero()[0].item()
            found = updates[first], [name for name, w in zip(names, wrong[first].tolist()) if w]
            self.bad = min(self.bad or found, found)

    def means(self) -> dict[str, float]:
        """The averages since the last call, each over the updates in which it appeared. Raises what `check` does."""
        self.check()
        means = {k: v / self.counts[k] for k, v in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def check(self) -> None:
        """FloatingPointError, with the update and the metrics, if one was not finite since the last `means`."""
        self.fold()
        if self.bad:
            raise FloatingPointError(f"update {self.bad[0]}: {', '.join(self.bad[1])} is not finite")

    def state_dict(self) -> dict:
        self.fold()
        return {"sums": dict(self.sums), "counts": dict(self.counts), "bad": self.bad}

    def load_state_dict(self, state: dict) -> None:
        """Earlier checkpoints hold tensors: sums, and the update that was not finite or -1."""
        self.sums, self.counts = {k: float(v) for k, v in state["sums"].items()}, dict(state["counts"])
        bad = state["bad"]
        if torch.is_tensor(bad):
            bad = (bad.item(), [k for k, v in state["sums"].items() if not v.isfinite()]) if bad >= 0 else None
        self.bad = bad


class SeedMeter(Meter):
    """The means of several seeds that learn together: of metrics (S,), by one launch an update for all of them."""

    def __init__(self, meters: list[Meter]):
        """meters: of each seed; they are given what is measured."""
        super().__init__()
        self.meters = meters

    @torch.no_grad()
    def add(self, metrics: dict[str, Tensor], update: int) -> None:
        names = tuple(metrics)
        if names not in self.blocks:
            like = metrics[names[0]]
            self.blocks[names] = like.new_empty(self.BLOCK, len(names), len(self.meters), dtype=torch.float32), []
        rows, updates = self.blocks[names]
        torch.stack([v.float().expand(len(self.meters)) for v in metrics.values()], out=rows[len(updates)])
        updates.append(update)
        if len(updates) == self.BLOCK:
            self.fold()

    def add_rows(self, names: tuple[str, ...], rows: Tensor, updates: list[int]) -> None:
        for meter, own in zip(self.meters, rows.unbind(2)):
            meter.add_rows(names, own, updates)
