"""The benchmark's command line.

python -m moe_rewrite.benchmark experts --tiny            # a trial on a CPU
python -m moe_rewrite.benchmark experts --output results  # the experts module alone, in the shapes of five models
python -m moe_rewrite.benchmark model --output results    # a whole model
python -m moe_rewrite.benchmark compile --output results  # how long the first call takes
python -m moe_rewrite.benchmark summary results           # the tables again, out of one or several runs
python -m moe_rewrite.benchmark plot results              # pictures
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch

from moe_rewrite.benchmark import compile_time, experts, model, output, plots, points, summary
from moe_rewrite.benchmark.floor import H200, Ceilings, measured_ceilings
from moe_rewrite.benchmark.measure import Budget
from moe_rewrite.benchmark.points import make_stages
from moe_rewrite.benchmark.settings import Settings
from moe_rewrite.benchmark.shapes import MIN_BACKWARD_TOKENS, REAL, SHAPES, TINY, TOKENS
from moe_rewrite.benchmark.variants import DEFAULT, PLAIN, TUNED

MODES = (PLAIN, DEFAULT, "reduce-overhead", "max-autotune", TUNED)
TINY_TOKENS = (4, 64)


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(
        prog="python -m moe_rewrite.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = own.add_subparsers(dest="command", required=True, metavar="experts|model|compile|summary|plot")
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--tiny", action="store_true", help="small sizes and few repeats, for a trial on a CPU")
    add("--variants", nargs="+", metavar="PATTERN", help="like 'transformers/*' or 'moe_rewrite/auto/default'")
    add("--modes", nargs="+", choices=MODES, help="plain: not compiled; the others are modes of torch.compile")
    add("--repeats", type=_positive, metavar="N", help="timed calls of each variant (20; with --tiny 5)")
    add("--inner", default="inductor", help="what compiles the graphs, of peers and ours: 'eager' is quick to try")
    add("--device", type=torch.device, help="default: cuda, where there is any")
    add("--output", type=Path, metavar="DIR", help="append JSON lines to DIR/PART.jsonl")
    add("--time-budget", type=float, default=float("inf"), metavar="S", help="begin nothing new after so many seconds")
    compile_only = argparse.ArgumentParser(add_help=False)
    add = compile_only.add_argument
    add("--workers", type=int, default=0, metavar="N", help="compile in N processes beforehand, side by side")
    add("--ahead-seconds", type=float, default=300, metavar="S", help="how long these may take")
    add("--compile-only", action="store_true", help=argparse.SUPPRESS)

    one = commands.add_parser("experts", parents=[common, compile_only], help="the experts module alone")
    one.add_argument("--shapes", nargs="+", choices=list(SHAPES), metavar="NAME", help=f"of {', '.join(SHAPES)}")
    one.add_argument("--tokens", nargs="+", type=_positive, metavar="N", help=f"unless given: {TOKENS}")
    passes = ["forward", "backward"]
    one.add_argument("--passes", nargs="+", choices=passes, default=passes[:1], help="backward: forward and backward")
    one.add_argument("--bandwidth", type=float, metavar="TB/s", help="for the floor; of an H200 unless given")
    one.add_argument("--flops", type=float, metavar="TFLOP/s", help="likewise; on a CPU both are measured")

    one = commands.add_parser("model", parents=[common, compile_only], help="a whole model, prefill and decode")
    one.add_argument("--shapes", nargs="+", type=_case, metavar="CASE", help=f"like {' '.join(model.CASES)}")
    one.add_argument("--layers", type=_positive, metavar="N", help="24 unless given")

    one = commands.add_parser("compile", parents=[common], help="how long the first call takes")
    numbers = f"unless given: {compile_time.NUM_EXPERTS}"
    one.add_argument("--experts", nargs="+", type=_positive, metavar="N", help=numbers)
    one.add_argument("--forms", nargs="+", choices=compile_time.FORMS, default=compile_time.FORMS)
    one.add_argument("--layers", type=_positive, metavar="N", help="4 unless given")
    one.add_argument("--hidden", type=_positive, metavar="N", help="2048 unless given")
    one.add_argument("--intermediate", type=_positive, metavar="N", help="1408 unless given")

    one = commands.add_parser("summary", help="the tables out of JSON lines")
    one.add_argument("results", nargs="+", type=_existing, metavar="DIR")
    one = commands.add_parser("plot", help="pictures out of the JSON lines of the part experts")
    one.add_argument("results", nargs="+", type=_existing, metavar="DIR")
    one.add_argument("--output", type=Path, metavar="DIR", help="folder for the pictures; else the first DIR")
    return own


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _existing(text: str) -> Path:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"there is no {text!r}")
    return Path(text)


def _case(text: str) -> str:
    batch, cross, length = text.removeprefix("decode-").partition("x")
    if not cross or not batch.isdecimal() or not length.isdecimal() or not int(batch) or not int(length):
        raise argparse.ArgumentTypeError(f"{text!r} is no case: give BATCHxTOKENS or decode-BATCHxTOKENS")
    return text


def settings(args: argparse.Namespace, modes: list[str]) -> Settings:
    """What all parts are told. ``modes`` are the part's own, unless the user gave some; on a CPU it has but one."""
    device = args.device or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        modes = [mode for mode in modes if mode in (PLAIN, DEFAULT)]
    if args.inner != "inductor":
        modes = [mode for mode in modes if mode in (PLAIN, DEFAULT)]
    return Settings(
        device=device,
        modes=args.modes or modes,
        variants=args.variants,
        repeats=args.repeats or (5 if args.tiny else 20),
        inner=args.inner,
        budget=Budget(args.time_budget),
        output=args.output,
        tiny=args.tiny,
        workers=getattr(args, "workers", 0),
        ahead_seconds=getattr(args, "ahead_seconds", 0.0),
    )


def run_experts(args: argparse.Namespace) -> None:
    given = settings(args, [DEFAULT, PLAIN, TUNED])
    shapes = args.shapes or (TINY if args.tiny else REAL)
    tokens = args.tokens or (TINY_TOKENS if args.tiny else TOKENS)
    least = MIN_BACKWARD_TOKENS if args.tokens is None and not args.tiny else 0
    stages = make_stages(shapes, tokens, args.passes, least)
    if args.compile_only:
        experts.compile_only(given, stages)
        return
    ceilings = H200 if given.device.type == "cuda" else measured_ceilings()
    bandwidth = args.bandwidth * 1e12 if args.bandwidth else ceilings.bandwidth
    flops = args.flops * 1e12 if args.flops else ceilings.flops
    experts.run(given, stages, Ceilings(bandwidth, flops))


def run_model(args: argparse.Namespace) -> None:
    given = settings(args, ["reduce-overhead", DEFAULT, PLAIN, TUNED])
    labels = args.shapes or (model.TINY_CASES if args.tiny else model.CASES)
    (model.compile_only if args.compile_only else model.run)(given, labels, args.layers)


def run_compile(args: argparse.Namespace) -> None:
    given = settings(args, [DEFAULT])
    if PLAIN in given.modes:
        raise SystemExit("error: the part compile has no mode 'plain'")
    defaults = (1, 64, 32) if args.tiny else (4, 2048, 1408)
    given_sizes = (args.layers, args.hidden, args.intermediate)
    sizes = [own or default for own, default in zip(given_sizes, defaults, strict=True)]
    numbers = args.experts or (compile_time.NUM_EXPERTS[:2] if args.tiny else compile_time.NUM_EXPERTS)
    compile_time.run(given, numbers, args.forms, compile_time.Sizes(*sizes))


def run_summary(args: argparse.Namespace) -> None:
    parts = {
        points.PART: (experts.COLUMNS, summary.summarise),
        model.PART: (model.COLUMNS, summary.best_of_modes),
        compile_time.PART: (compile_time.COLUMNS, lambda rows: ("", {})),
    }
    for part, (columns, summarise) in parts.items():
        rows = output.read_rows(args.results, part)
        if rows:
            cases = summary.points(rows)
            for of_case in cases.values() if part == points.PART else ():
                experts.compare(of_case)  # anew: they may come from several runs
            lines = [output.line(row, columns) for of_case in cases.values() for row in of_case]
            output.say("\n".join([f"{part}\n", output.header(columns), *lines]))
            output.say(f"\n{summarise(rows)[0]}\n")


def run_plot(args: argparse.Namespace) -> None:
    rows = output.read_rows(args.results, points.PART)
    if not rows:
        raise SystemExit(f"error: no rows of the part {points.PART!r} in {', '.join(map(str, args.results))}")
    try:
        written = plots.plot(rows, args.output or args.results[0])
    except ImportError as error:
        raise SystemExit(f"error: {error}") from error
    for path in written:
        output.say(str(path))


COMMANDS = {
    "experts": run_experts,
    "model": run_model,
    "compile": run_compile,
    "summary": run_summary,
    "plot": run_plot,
}


def main() -> None:
    args = parser().parse_args()
    if args.command not in ("summary", "plot") and importlib.util.find_spec("transformers") is None:
        raise SystemExit("error: the benchmark needs transformers: pip install 'moe_rewrite[benchmark]'")
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
