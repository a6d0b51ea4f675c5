"""Updates per second of the main job, beside its peers and beside the machine's limit.

    python benchmarks/update_speed.py [--presets upstream "upstream small"] [--device cpu] [--threads 1]
    python benchmarks/update_speed.py --segments 4 16 --threads 1       windows beside segments, and nothing else

Peers, in the same agent: (a) the state-space layer as a loop over time, its definition; (b) the Mamba-2 block of
`transformers` (PyTorch path), for each chunk size asked for. The limit: the matrix products of one update, counted,
over the rate of a large matrix product, measured in turns with the updates. Figures are medians; an update is the mean
of `policy_freq` updates, as the actor joins only one of them.
"""

import argparse
import statistics
from dataclasses import replace

import torch
from harness import VARIANTS, median_seconds, write
from torch.utils.flop_counter import FlopCounterMode

import model
from agent import Bamba
from common import device as devices
from common.interface import EnvSpec
from common.windows import Segment, Window
from config import parse
from networks import mamba

WARMUP = 4  # turns; in them things are compiled, allocated, captured
SPEC = EnvSpec(state=11, action=3, low=(-1.0,) * 3, high=(1.0,) * 3)  # hopper


def batch(cfg, device: str) -> Window | Segment:
    """Noise for one update of `batch_size` transitions."""
    b, k = cfg.batch_size, cfg.context_length
    r = lambda *shape: torch.randn(*shape, device=device)  # noqa: E731
    if cfg.train_on == "segments":
        b, one = b // k, torch.ones(b // k, k, device=device)
        states, action, reward, next_action = (
            r(b, k + 1, SPEC.state),
            r(b, k, SPEC.action),
            r(b, k),
            r(b, k, SPEC.action),
        )
        return Segment(states, action.tanh(), reward, one, next_action.tanh(), one, r(b, k), one)
    return Window(
        r(b, k, SPEC.state), r(b, SPEC.action).tanh(), r(b), r(b, k, SPEC.state), torch.ones(b, device=device)
    )


def matrix_flops(cfg) -> float:
    """FLOP of all matrix products in one update, averaged over a turn of the actor."""
    agent, data = Bamba(cfg, SPEC).train(), batch(cfg, "cpu")
    with FlopCounterMode(display=False) as counter:
        for _ in range(cfg.policy_freq):
            agent.update(data)
    return counter.get_total_flops() / cfg.policy_freq


def measure(cfg, device: str, repeats: int) -> tuple[float, float, float]:
    """Seconds of an update, median and least; FLOP/s of a large square product, median. In turns, as clocks wander."""
    agent, data = Bamba(cfg, SPEC, device).train(), batch(cfg, device)
    n, dtype = (2048 if device == "cpu" else 8192), torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    updates, products = [], []
    for i in range(WARMUP + repeats):
        seconds = [median_seconds(lambda: agent.update(data), 0, cfg.policy_freq, device, statistics.mean)]
        seconds += [median_seconds(lambda: a @ b, 0, 1, device)]
        if i >= WARMUP:
            updates.append(seconds[0])
            products.append(seconds[1])
    return statistics.median(updates), min(updates), 2 * n**3 / statistics.median(products)


class ByTransformers(torch.nn.Module):
    """`transformers`' Mamba-2 mixer with our sizes. (B, L, D) -> (B, L, D)"""

    def __init__(self, cfg, chunk_size: int):
        super().__init__()
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        settings = Mamba2Config(
            hidden_size=cfg.d_model,
            state_size=cfg.d_state,
            conv_kernel=cfg.d_conv,
            expand=cfg.expand,
            head_dim=cfg.headdim,
            num_heads=cfg.expand * cfg.d_model // cfg.headdim,
            n_groups=1,
            chunk_size=chunk_size,
            use_bias=False,
            use_conv_bias=True,
        )
        self.mixer = Mamba2Mixer(settings, layer_idx=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixer(x)


class patched:
    """Swap an attribute for the length of a block."""

    def __init__(self, owner, **changes):
        self.owner, self.changes = owner, changes

    def __enter__(self):
        self.before = {k: getattr(self.owner, k) for k in self.changes}
        for k, v in self.changes.items():
            setattr(self.owner, k, v)

    def __exit__(self, *_):
        for k, v in self.before.items():
            setattr(self.owner, k, v)


def segments_beside_windows(args, device: str) -> None:
    """Trained transitions a second: segments of T steps beside windows, both 256 transitions an update."""
    rows, windows = [], {}
    for preset in ("upstream", "upstream small"):
        plain = replace(parse(VARIANTS[preset]), device=device, cuda_graphs=False)
        kinds = {f"windows, K {plain.context_length}": plain}
        for t in args.segments:
            kinds[f"segments, T {t}"] = replace(plain, train_on="segments", context_length=t, drop_p=0.0)
        kinds |= {f"{what}, compiled": replace(cfg, compile=True) for what, cfg in kinds.items()}
        kinds |= {f"{what}, bf16": replace(cfg, precision="bf16") for what, cfg in kinds.items()}
        for what, cfg in kinds.items():
            torch._dynamo.reset()
            seconds, least, matmul = measure(cfg, device, args.repeats)
            rate = cfg.batch_size / seconds
            base = windows.setdefault((preset, cfg.compile, cfg.precision), rate)  # windows come first
            eager = windows[preset, False, plain.precision]
            rows.append(
                {"preset": preset, "what": what, "ms": round(seconds * 1e3, 2), "least_ms": round(least * 1e3, 2)}
            )
            rows[-1] |= {"transitions_per_s": round(rate), "times_windows": round(rate / base, 2)}
            rows[-1]["times_eager_windows"] = round(rate / eager, 2)
            limit = matrix_flops(replace(cfg, device="cpu", compile=False, precision="fp32")) / matmul
            rows[-1]["share_of_limit"] = round(limit / seconds, 3)
            line = "{preset:14} {what:32} {ms:>8} ms {transitions_per_s:>7}/s {times_eager_windows}"
            print(line.format(**rows[-1]), flush=True)
    print(write(f"segments_speed_{device}" + (f"_{args.threads}_thread" if args.threads else ""), {"rows": rows}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["upstream", "upstream small"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunk_sizes", nargs="+", type=int, default=[5, 8], help="of transformers' block")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice); in the file's name")
    parser.add_argument("--segments", nargs="+", type=int, help="lengths T of segments to time beside windows")
    args = parser.parse_args()
    device, rows, limits = args.device, [], {}
    devices.keep_freed_memory()  # as the trainer does
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.segments:
        return segments_beside_windows(args, device)

    def row(preset: str, what: str, precision: str, cfg, repeats: int = args.repeats) -> None:
        torch._dynamo.reset()
        seconds, least, rate = measure(replace(cfg, precision=precision), device, repeats)
        limit = limits[preset] / rate
        rows.append({"preset": preset, "what": what, "precision": precision, "ms": round(seconds * 1e3, 2)})
        rows[-1]["least_ms"] = round(least * 1e3, 2)
        rows[-1] |= {"updates_per_s": round(1 / seconds, 1), "limit_ms": round(limit * 1e3, 2)}
        rows[-1]["matmul_gflops"] = round(rate / 1e9)
        rows[-1]["share_of_limit"] = round(limit / seconds, 3)
        print(
            "{preset:14} {precision} {what:30} {ms:>9} ms (least {least_ms}) {share_of_limit:>6.0%} of limit".format(
                **rows[-1]
            ),
            flush=True,
        )

    for preset in args.presets:
        cfg = replace(parse(VARIANTS[preset]), device=device, cuda_graphs=False)
        limits[preset] = matrix_flops(replace(cfg, device="cpu"))
        for precision in ("fp32", "bf16"):
            row(preset, "eager", precision, cfg)
            row(preset, "compiled", precision, replace(cfg, compile=True))
            if device == "cuda":
                row(preset, "CUDA graph", precision, replace(cfg, cuda_graphs=True))
                row(preset, "compiled, CUDA graph", precision, replace(cfg, compile=True, cuda_graphs=True))
            with patched(mamba, **{"ssd_dual": lambda *a: mamba.ssd_recurrent(*a)}):
                row(preset, "(a) loop over time, eager", precision, cfg, repeats=3)
            for chunk in args.chunk_sizes if preset == "upstream" else ():
                with patched(model, MIXERS={"mamba2": lambda c, chunk=chunk: ByTransformers(c, chunk)}):
                    row(preset, f"(b) transformers, chunk {chunk}", precision, cfg, repeats=3)

    def best(precision: str, *words: str) -> float:
        fits = lambda r: r["preset"] == "upstream" and r["precision"] == precision and r["what"].startswith(words)  # noqa: E731
        return min(r["ms"] for r in rows if fits(r))

    summary = {}
    for precision in ("fp32", "bf16") if "upstream" in args.presets else ():
        ours, peer = best(precision, "eager", "compiled", "CUDA"), best(precision, "(b)")
        summary[precision] = {"best_ms": ours, "times_faster_than_transformers": round(peer / ours, 1)}
    print(summary)
    print(
        write(
            f"update_speed_{device}" + (f"_{args.threads}_thread" if args.threads else ""),
            {
                "gflop_per_update": {k: round(v / 1e9, 3) for k, v in limits.items()},
                "rows": rows,
                "summary": summary,
            },
        )
    )


if __name__ == "__main__":
    main()
