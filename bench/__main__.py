"""Command line: ``python -m bench run | compare | plot | gpu-model | tune`` (each with --help)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import compare as comparison
from . import environment, floor, memory, ops, plot, report, rules, specs, steps, timing, tune
from .gpu_model import command as gpu_model
from .report import Row


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 for a regression or a variant that failed; 2 for a bad argument."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks.")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure training steps and operators")
    run.set_defaults(command=_run)
    run.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for results")
    run.add_argument("--workload", action="append", metavar="TEXT", help="steps whose name has it")
    run.add_argument("--op", action="append", metavar="TEXT", help="operators whose name has it")
    run.add_argument("--no-steps", action="store_true")
    run.add_argument("--no-ops", action="store_true")
    run.add_argument("--no-memory", action="store_true", help="skip the peak-memory processes")
    run.add_argument("--compile", action="store_true", help="also against torch.compile (slow)")
    run.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all")
    run.add_argument("--repeats", type=int, help="interleaved rounds (15)")
    run.add_argument("--threads", type=int, help="threads of every variant (torch's default)")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    compare = commands.add_parser("compare", help="ratios of two results, row by row")
    compare.set_defaults(command=_compare)
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument("--fail-above", default="5%", metavar="PERCENT")
    pictures = commands.add_parser("plot", help="PNGs and one HTML page")
    pictures.set_defaults(command=_plot)
    pictures.add_argument("results", type=Path)
    pictures.add_argument("--out", type=Path, help="folder (that of the results)")
    every = commands.add_parser("rules", help="every learning rule and composite, by registry")
    rules.add_arguments(every)
    modelled = commands.add_parser("gpu-model", help="bytes, FLOPs, occupancy of the CUDA kernels")
    gpu_model.add_arguments(modelled)
    measured = commands.add_parser("tune", help="tiles of Triton's products, measured on this GPU")
    tune.add_arguments(measured)
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device in this machine; nothing was measured")
    for name in ("repeats", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected an int >= 1, got {value}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    plan = timing.Plan.quick() if options.quick else timing.Plan()
    if options.repeats is not None:
        plan = timing.Plan(options.repeats, plan.min_sample, plan.warmup)
    workloads = [] if options.no_steps else list(specs.WORKLOADS)
    if options.quick and workloads:
        workloads = list(specs.QUICK_WORKLOADS)
    chosen_ops = [] if options.no_ops else list(ops.specs(options.quick))
    workloads = _chosen(workloads, options.workload, lambda w: w.name)
    chosen_ops = _chosen(chosen_ops, options.op, lambda o: o.label)
    # A filter of one kind alone means: only that kind.
    if options.workload and not options.op:
        chosen_ops = []
    if options.op and not options.workload:
        workloads = []
    if not workloads and not chosen_ops:
        raise ValueError("nothing to measure: no workload or operator has that name")
    where = environment.environment(options.device)
    print(f"{where.machine}, {where.cores} cores, {where.threads} threads, torch {where.torch}")
    print(f"{floor.DEFINITION}\n{memory.DEFINITION}")
    print("ratios: medians over rounds of times of the same round\n")
    measurement = _Measurement(options, plan, where, len(workloads) + len(chosen_ops))
    for workload in workloads:
        measurement.step(workload)
    for spec in chosen_ops:
        measurement.op(spec)
    return measurement.finish()


def _chosen(things: list[Any], texts: list[str] | None, name: Callable[[Any], str]) -> list[Any]:
    return [t for t in things if not texts or any(text in name(t) for text in texts)]


class _Measurement:
    """Rows so far; written to the files after every workload, so that a stopped run keeps them."""

    def __init__(
        self,
        options: argparse.Namespace,
        plan: timing.Plan,
        where: environment.Environment,
        total: int,
    ) -> None:
        self.options, self.plan, self.where = options, plan, where
        self.rows: list[Row] = []
        self.figures: list[str] = []
        self.failures: list[str] = []
        self.bar = _progress_bar(total)

    def step(self, workload: specs.Workload) -> None:
        names = list(workload.variants)
        if self.options.compile and "dropin" in names:
            names += specs.COMPILED_VARIANTS
        built: dict[str, steps.Step] = {}
        for name in names:
            self.bar.set_postfix_str(f"{workload.name}: {name}")
            try:
                step = steps.build(workload, name, self.options.device)
                step.run()
            except Exception as error:  # a variant that cannot run is reported, the others go on
                self._fail(f"{workload.name} {name}", error, name in specs.COMPILED_VARIANTS)
                continue
            built[name] = step
        times = timing.interleave(
            {name: step.run for name, step in built.items()},
            self.plan,
            self.options.device,
            lambda text: self.bar.set_postfix_str(f"{workload.name}: {text}"),
        )
        work = steps.work(workload)
        for step in built.values():
            step.close()
        sizes = {}
        if not self.options.no_memory:
            names = [n for n in built if not n.startswith("floor")]
            del built
            sizes = self._memory(workload, names)
        dtype = str(workload.dtype).removeprefix("torch.")
        if workload.feedback_dtype is not None:
            dtype += "/" + str(workload.feedback_dtype).removeprefix("torch.")
        rows = report.rows_of(
            "step", workload.name, dtype, self.options.device, workload.batch, times, work,
            self.where, sizes,
        )  # fmt: skip
        self.figures += report.figures(rows, workload.targets)
        self._add(rows)

    def _memory(self, workload: specs.Workload, names: list[str]) -> dict[str, dict[str, int]]:
        sizes = {}
        for name in names:
            self.bar.set_postfix_str(f"{workload.name}: memory of {name}")
            try:
                sizes[name] = memory.measure(
                    workload.name, name, self.where.threads, self.options.device
                )
            except RuntimeError as error:
                self._fail(f"{workload.name} {name} (memory)", error, False)
        return sizes

    def op(self, spec: ops.Spec) -> None:
        self.bar.set_postfix_str(spec.label)
        try:
            case = spec.case(self.options.device)
            runs = ops.variants(case)
            if self.options.device != "cpu":
                runs.pop("native")
            times = timing.interleave(runs, self.plan, self.options.device)
        except Exception as error:
            self._fail(f"op {spec.label}", error, False)
            self.bar.update()
            return
        batch = spec.shape[0]
        rows = report.rows_of(
            "op", spec.label, "float32", self.options.device, batch, times,
            (case.flops, case.bytes), self.where,
        )  # fmt: skip
        self._add(rows)

    def _fail(self, what: str, error: Exception, expected: bool) -> None:
        first = str(error).strip().splitlines() or [""]
        line = f"{what} did not run: {type(error).__name__}: {first[0][:300]}"
        self.bar.write(line)
        if not expected:
            self.failures.append(line)

    def _add(self, rows: list[Row]) -> None:
        self.rows += rows
        if rows:
            self.bar.write(report.table(rows) + "\n")
            report.write(self.rows, self.options.out)
        self.bar.update()

    def finish(self) -> int:
        self.bar.close()
        if self.figures and not self.options.quick:
            print("figures to reach\n  " + "\n  ".join(self.figures))
        for path in report.write(self.rows, self.options.out):
            print(path)
        for line in self.failures:
            print(f"failed: {line}", file=sys.stderr)
        return 1 if self.failures else 0


class _NoBar:
    def set_postfix_str(self, text: str) -> None: ...

    def update(self) -> None: ...

    def close(self) -> None: ...

    def write(self, text: str) -> None:
        print(text, flush=True)


def _progress_bar(total: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(total=total, disable=None, unit="row", dynamic_ncols=True)


def _compare(options: argparse.Namespace) -> int:
    limit = comparison.fraction(options.fail_above)
    lines, regressions = comparison.compare(
        report.read(options.before), report.read(options.after), limit
    )
    print("\n".join(lines))
    print(f"{regressions} regression(s) above {limit:.1%}")
    return 1 if regressions else 0


def _plot(options: argparse.Namespace) -> int:
    folder = options.out or (
        options.results if options.results.is_dir() else options.results.parent
    )
    for path in plot.write(report.read(options.results), folder):
        print(path)
    return 0


if __name__ == "__main__":
    timing.settle_allocator()  # for every variant; bench.memory runs in processes of its own
    sys.exit(main())
