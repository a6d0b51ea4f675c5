"""Tables with intervals, curves and one HTML page out of many runs:

    python report.py outputs/study --out report            index.html, tables as .md, .tex and .csv, figures as .svg
    python report.py outputs/before outputs/after --compare
    python report.py outputs/study --keep results         a small file for each finished run, which report.py reads, too
    python report.py results --into docs/page.md          tables and curves, between the page's lines
                                                          <!-- COMMAND writes from here --> and <!-- to here -->
    python report.py outputs/study --live                  the page on http://127.0.0.1:8000, while a sweep runs

Give folders that hold runs, however deep. The headline is the last checkpoint: by the file that `utils.py --json` wrote
into the run's folder, if there is one, else by the last evaluation of the training. What cannot be compared (another
budget, other versions, unfinished) is shown apart, with the reason; scores of different kinds have tables of their own.
Statistics as Agarwal et al. (2021): interquartile means, bootstrap intervals stratified by data set, profiles.

Needs packages that training does not: pip install "scipy>=1.11" "vl-convert-python>=1.7" "jinja2>=3.1"
"""

import argparse
import base64
import http.server
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import utils
from common import logger, statistics
from common.packages import optional
from reporting import charts, records, tables
from reporting.runs import ASIDE, Run, read_runs

TEMPLATE = Path(__file__).resolve().parent / "reporting" / "page.html.jinja"
LARGEST_VIDEO = 1_000_000  # bytes of one that goes into the page
REFRESH = 20  # seconds, of the live page


def page(runs: list[Run], title: str, columns: Sequence[str] = (), refresh: int = 0) -> str:
    """The whole page, with everything it needs in it. ValueError if a package is missing."""
    results = tables.Results(runs)
    specs = []

    def keep(spec: dict) -> int:
        specs.append(spec)
        return len(specs) - 1

    summaries, summary_charts = [], []
    for kind in results.kinds:
        summaries += filter(None, [tables.aggregates(results, kind), tables.improvements(results, kind)])
        found = filter(None, [charts.intervals(results, kind), charts.profile(results, kind)])
        summary_charts += [keep(spec) for spec in found]
    usual = common_settings(runs)
    return (
        environment()
        .get_template(TEMPLATE.name)
        .render(
            title=title,
            lead=lead(results),
            refresh=refresh,
            labels=results.labels,
            columns=results.columns,
            scores=[tables.overview(results, kind) for kind in results.kinds],
            summaries=summaries,
            summary_charts=summary_charts,
            curve_charts=[(column, keep(chart)) for column, _, chart in charts.all_curves(results)],
            detail=tables.details(results, columns),
            apart=tables.apart(results),
            runs=[facts(run, usual) for run in runs],
            specs=script(specs),
            metrics=script([charts.metrics(run) for run in runs]),
            bundle=safe(charts.bundle().replace("</script", "<\\/script")),
        )
    )


def environment():
    jinja2 = optional("jinja2", '"jinja2>=3.1"', "the page")
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def safe(text: str):
    """Text that the template takes as it is."""
    from markupsafe import Markup

    return Markup(text)


def script(what):
    """JSON for a script element, which ends at the first `</`."""
    return safe(json.dumps(what, separators=(",", ":")).replace("<", "\\u003c"))


def lead(results: tables.Results) -> str:
    versions = Counter(f"{k} {v}" for run in results.runs for k, v in run.versions.items())
    seeds = sorted({run.seed for run in results.runs})
    text = f"{len(results.runs)} runs of {len(results.labels)} agents on {len(results.columns)} data sets, "
    text += f"seeds {', '.join(map(str, seeds))}" + (f"; {len(results.apart)} shown apart" if results.apart else "")
    return f"{text}. {', '.join(name for name, _ in versions.most_common(5))}. {time.strftime('%Y-%m-%d %H:%M')}"


def common_settings(runs: list[Run]) -> dict:
    """The value that most runs have, of every setting."""
    names = {name for run in runs for name in run.config}
    return {name: Counter(json.dumps(run.config.get(name)) for run in runs).most_common(1)[0][0] for name in names}


def facts(run: Run, usual: dict) -> dict:
    """What the page tells of one run."""
    own = [(k, v) for k, v in run.config.items() if k not in ASIDE and json.dumps(v) != usual[k]]
    found = {
        "folder": run.folder.name,
        "data": f"{run.data['name']} ({run.data['source']})",
        "SHA-256": run.data.get("sha256") or "",
        "transitions": f"{run.data['transitions']:,}" if "transitions" in run.data else "",
        "training": f"{run.step:,} {run.unit.replace('_', ' ')}s in {run.seconds / 60:.1f} min",
        "versions": ", ".join(f"{k} {v}" for k, v in run.versions.items()),
        "commit": run.commit,
        "machine": ", ".join(f"{k} {v}" for k, v in run.machine.items() if v),
        "evaluations": ", ".join(f"{score:.1f}" for _, score in run.curve[-10:]),
    }
    if run.curve:
        found["last"] = f"{run.last:.2f} ({run.episodes} episodes)"
    return {
        "label": run.label,
        "column": run.column,
        "seed": run.seed,
        "score": run.last if run.curve else None,
        "apart": run.apart,
        "settings": " ".join(f"{k}={v}" for k, v in run.config.items()),
        "own": own,
        "facts": [(k, v) for k, v in found.items() if v],
        "commands": run.commands,
        "video": video_of(run),
    }


def video_of(run: Run) -> str:
    """A recorded episode as an address that holds it, if it is small enough."""
    for path in sorted(run.folder.glob("*.mp4")):
        if path.stat().st_size <= LARGEST_VIDEO:
            return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return ""


def comparable(runs: list[Run]) -> tables.Results:
    """ValueError if none of them is."""
    results = tables.Results(runs)
    if not results.runs:
        reasons = "; ".join(f"{run.folder.name}: {run.apart}" for run in results.apart[:3])
        raise ValueError(f"none of the {len(runs)} runs can stand in a table ({reasons})")
    return results


def write_report(runs: list[Run], out: Path, title: str, columns: Sequence[str] = ()) -> list[Path]:
    """The page, tables and figures as files in `out`; returns them. columns: as of `tables.details`"""
    results, made = comparable(runs), {}
    for kind in results.kinds:
        name = kind.replace(" ", "_").lower()
        found = {f"{name}s": tables.overview(results, kind), f"{name}s_over_data": tables.aggregates(results, kind)}
        found[f"{name}s_improvement"] = tables.improvements(results, kind)
        for stem, table in found.items():
            if table:
                made |= {f"{stem}.md": table.markdown(), f"{stem}.tex": table.latex(), f"{stem}.csv": table.csv()}
        for stem, spec in (("iqm", charts.intervals(results, kind)), ("profile", charts.profile(results, kind))):
            if spec:
                made[f"{name}_{stem}.svg"] = charts.svg(spec)
    detail = tables.details(results, columns)
    made |= {"details.md": detail.markdown(), "details.csv": detail.csv()}
    made |= {f"{stem}.svg": text for stem, text in figures(results).items()}
    made["index.html"] = page(runs, title, columns)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        with logger.atomic_write(out / name) as part:
            part.write_text(text, encoding="utf-8")
    return [out / name for name in made]


def figures(results: tables.Results) -> dict[str, str]:
    """Curves as SVG, by a name that can be a file's."""
    found = {}
    for _, name, chart in charts.all_curves(results):
        found["".join(c if c.isalnum() or c in "-+." else "_" for c in name)] = charts.svg(chart)
    return found


def write_into(page: Path, runs: list[Run], name: str, columns: Sequence[str], command: str) -> None:
    """Tables and curves between the command's markers in a Markdown page; the figures lie beside it, in figures/NAME_*.

    ValueError if the page has no such markers.
    """
    results, folder = comparable(runs), page.parent / "figures"
    several = [kind for kind in results.kinds if len(results.complete(kind)[0]) > 1]
    found = [make(results, kind) for kind in several for make in (tables.overview, tables.aggregates)]
    found = list(filter(None, [*found, tables.details(results, columns), tables.apart(results)]))
    parts, drawn = [table.markdown() for table in found], figures(results)
    parts += [f"![{stem.replace('_', ' ')}](figures/{name}_{stem}.svg)" for stem in drawn]
    logger.put_into_page(command, "\n".join(parts), page)
    folder.mkdir(exist_ok=True)
    for stem, text in drawn.items():
        with logger.atomic_write(folder / f"{name}_{stem}.svg") as part:
            part.write_text(text, encoding="utf-8")


def serve(places: list[str], title: str, host: str, port: int) -> None:
    """The page, made anew when it is older than `REFRESH` seconds; nothing can be changed through it."""
    made: dict[str, tuple[float, bytes]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in ("/", "/index.html"):
                self.send_error(404)
                return
            when, body = made.get("page", (0.0, b""))
            if time.monotonic() - when > REFRESH / 2 or not body:
                body = page(read_runs(places), title, refresh=REFRESH).encode()
                made["page"] = time.monotonic(), body
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args) -> None:
            """Requests are not worth a line."""

    page(read_runs(places), title)  # what is wrong is said before anybody asks
    with http.server.HTTPServer((host, port), Handler) as server:
        print(f"http://{host}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("places", nargs="+", metavar="FOLDER", help="folders that hold runs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for the page, tables and figures")
    parser.add_argument("--title", default="", help="of the page (default: the folders' names)")
    parser.add_argument("--compare", action="store_true", help="two folders: did the change help?")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write into a Markdown page, between its markers")
    parser.add_argument("--columns", nargs="+", default=[], help="of the detailed table; an unknown name lists them")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write each finished run as a small file, and end")
    parser.add_argument("--live", action="store_true", help="serve the page on this machine, and refresh it")
    parser.add_argument("--host", default="127.0.0.1", help="another than this lets other machines see the page")
    parser.add_argument("--port", type=int, default=8000)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    with utils.errors_as_sentences():
        statistics.check_scipy()
        title = args.title or ", ".join(Path(place).name for place in args.places)
        if args.compare:
            if len(args.places) != 2:
                raise ValueError(f"--compare wants two folders, before and after: {len(args.places)} are given")
            table, words = tables.compare(*(read_runs([place]) for place in args.places))
            print(f"{table.markdown()}\n{words}")
        elif args.keep:
            kept = records.keep(read_runs(args.places), args.keep)
            print(f"{len(kept)} finished runs kept in {args.keep}")
        elif args.into:
            if not args.into.is_file():
                raise ValueError(f"--into {args.into}: there is no such page")
            name = Path(args.places[0]).name
            write_into(args.into, read_runs(args.places), name, args.columns, f"python report.py {shlex.join(argv)}")
        elif args.live:
            serve(args.places, title, args.host, args.port)
        else:
            runs = read_runs(args.places)
            made, results = write_report(runs, args.out, title, args.columns), tables.Results(runs)
            print("\n".join(tables.overview(results, kind).markdown() for kind in results.kinds))
            print(f"{len(results.runs)} runs, {len(results.apart)} shown apart: {made[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
