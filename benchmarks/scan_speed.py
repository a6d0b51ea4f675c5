"""Forward and backward of Mamba-1's scan and layer, beside their peers and beside the machine's limit.

    python benchmarks/scan_speed.py [--shapes 64,60,256,16 ...] [--device cpu] [--threads 1 --clock cpu]

The scan alone: ours, and its definition, a loop over tokens. The layer: ours, and `transformers`' MambaMixer (PyTorch
path) with the same weights. A peer that would take minutes runs on fewer rows, and its time is scaled up (`rows`). The
limit is what must move at least, inputs, outputs and their gradients once each, over the measured bandwidth of a copy.
Times are the least of the repeats, taken in turns: others may be using the machine.
"""

import torch
from harness import CLOCKS, median_seconds, timing_parser, write

from networks import mamba, selective_scan

PEER_NUMBERS = 2**21  # rows * tokens * channels * states from which a peer gets fewer rows


def both_ways(fn, inputs, pull):
    """One forward and one backward of fn, with gradients of all inputs."""

    def run():
        torch.autograd.grad((fn(*inputs) * pull).sum(), inputs)

    return run


def mixer(d_model: int, d_state: int, device: str):
    """`transformers`' Mamba-1 layer."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=d_model, state_size=d_state, expand=2, conv_kernel=4, use_mambapy=False)
    return MambaMixer(config, 0).to(device).train()


def main() -> None:
    parser = timing_parser(__doc__, repeats=5)
    parser.add_argument(
        "--shapes", nargs="+", default=["64,60,256,16", "64,60,512,16", "64,300,256,16", "64,300,512,16"]
    )
    args = parser.parse_args()
    device, rows, clock = args.device, [], CLOCKS[args.clock]
    if args.threads:
        torch.set_num_threads(args.threads)

    big = torch.randn(2**26, device=device)
    copy = torch.empty_like(big)
    bandwidth = 2 * big.nbytes / median_seconds(lambda: copy.copy_(big), 2, 5, device, min, clock)
    print(f"a copy moves {bandwidth / 1e9:.1f} GB/s")

    for shape in args.shapes:
        B, L, E, N = map(int, shape.split(","))
        fewer = min(B, max(1, PEER_NUMBERS // (L * E * N)))
        times = {}

        def inputs(rows: int, L=L, E=E, N=N):
            r = lambda *s: torch.randn(*s, device=device)  # noqa: E731
            given = r(rows, L, E), r(rows, L, E).exp() * 0.01, -torch.rand(E, N, device=device) * N, r(rows, L, N)
            return [x.requires_grad_() for x in (*given, r(rows, L, N))], r(rows, L, E)

        ours, theirs = mamba.Mamba1(E // 2, N).to(device), mixer(E // 2, N, device)
        theirs.load_state_dict(ours.state_dict())
        for name, fn, b in (
            ("scan, ours", selective_scan.selective_scan, B),
            ("scan, loop over tokens", selective_scan.selective_scan_loop, fewer),
        ):
            times[name] = both_ways(fn, *inputs(b)), b
        for name, layer, b in (("layer, ours", ours, B), ("layer, transformers", theirs, fewer)):
            u = torch.randn(b, L, E // 2, device=device, requires_grad=True)
            times[name] = (
                both_ways(lambda u, *_, layer=layer: layer(u), [u, *layer.parameters()], torch.randn_like(u)),
                b,
            )

        least = dict.fromkeys(times, float("inf"))
        for turn in range(args.repeats):
            for name, (run, b) in times.items():
                if turn < 2 or "ours" in name:  # peers are slow and need no fine ruler
                    least[name] = min(least[name], median_seconds(run, int(turn == 0), 1, device, clock=clock) * B / b)
        moved = 4 * (B * L * E * 8 + B * L * N * 6 + 3 * E * N)  # x, dt, y | gy, x, dt, gx, gdt; B, C twice, gB, gC; A
        limit = moved / bandwidth
        for name, (_, b) in times.items():
            rows.append({"shape": [B, L, E, N], "what": name, "ms": round(least[name] * 1e3, 2), "rows": b})
            if name == "scan, ours":
                rows[-1] |= {"limit_ms": round(limit * 1e3, 2), "share_of_limit": round(limit / least[name], 3)}
            print(f"{shape:16} {name:24} {least[name] * 1e3:>10.1f} ms", flush=True)
        ratios = {
            "scan_over_loop": round(least["scan, loop over tokens"] / least["scan, ours"], 1),
            "layer_over_transformers": round(least["layer, transformers"] / least["layer, ours"], 1),
        }
        rows.append({"shape": [B, L, E, N], "times_faster": ratios})
        print(f"{shape:16} times faster: {ratios}; limit {limit * 1e3:.1f} ms")
    print(write(f"scan_speed_{device}", {"clock": args.clock, "gb_per_s": round(bandwidth / 1e9, 1), "rows": rows}))


if __name__ == "__main__":
    main()
