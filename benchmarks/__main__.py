"""python -m benchmarks: see the package."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch

from alignlab.registry import did_you_mean
from benchmarks import report, results
from benchmarks.cases import BY_NAME
from benchmarks.floor import DTYPES, Machine, measure
from benchmarks.runner import PEERLESS, Setting, WorkerFailed, compare, opponent
from benchmarks.scaling import AXES, series

EPILOG = f"""\
cases: {", ".join(BY_NAME)}
scaling: {", ".join(AXES)}; "scaling" is all of them
page: only write docs/performance.md anew from the results beside the code
"""
ROUNDS, SCALING_ROUNDS = 7, 5


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.what == ["page"]:
        report.write_page()
        return
    named_cases, axes = chosen(options.what)
    if options.peer_defaults:
        named_cases = [name for name in named_cases if BY_NAME[name].method not in PEERLESS]
    require(named_cases, options)
    folder = options.folder.resolve()
    file = results.path(results.title(options.device, options.precision), None if options.write else folder)
    torch.set_num_threads(options.threads)
    machine = measure(torch.device(options.device), options.precision)
    failed = []
    for name in named_cases:
        setting = setting_of(options, folder, ROUNDS)
        try:
            record = compare(BY_NAME[name], machine, setting, defaults=options.peer_defaults)
        except WorkerFailed as error:
            failed.append(str(error))
            print(f"benchmarks: {error}", file=sys.stderr, flush=True)
            continue
        kind: results.Kind = "defaults" if options.peer_defaults else "cases"
        keep(options, file, kind, name, {**record, "conditions": conditions(machine, setting)})
        print(report.steps_table({name: record}) + "\n\n" + report.parts_table({name: record}) + "\n", flush=True)
    for name in axes:
        setting = setting_of(options, folder, SCALING_ROUNDS)
        for side in ("ours", "trl") if options.peer else ("ours",):
            label = name if side == "ours" else f"{name} trl"
            try:
                record = series(name, setting, side)
            except WorkerFailed as error:
                failed.append(str(error))
                print(f"benchmarks: {error}", file=sys.stderr, flush=True)
                continue
            keep(options, file, "scaling", label, {**record, "conditions": conditions(machine, setting)})
            print(report.scaling_table({label: record}) + "\n", flush=True)
    print(f"results: {file}", flush=True)
    if failed:
        raise SystemExit(1)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="alignlab beside trl, and what its steps cost as things grow",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("what", nargs="*", help="cases, axes, scaling or page; all cases when nothing is named")
    parser.add_argument("--rounds", type=int, help=f"measured steps a side ({ROUNDS}; {SCALING_ROUNDS} in scaling)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", choices=DTYPES, help="of both sides: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--peer-defaults", action="store_true", help="trl as it comes, instead of tuned; kept apart")
    parser.add_argument("--peer", action="store_true", help="scaling of trl too, where its logits are small")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="for models, data, logs and results")
    parser.add_argument("--write", action="store_true", help="results beside the code, and the page from them")
    options = parser.parse_args(arguments)
    if options.precision is None:
        options.precision = results.usual_precision(options.device)
    return options


def chosen(what: Sequence[str]) -> tuple[list[str], list[str]]:
    """The cases and the axes that were named."""
    known = [*BY_NAME, *AXES, "scaling", "page"]
    for name in what:
        if name not in known or name == "page":
            why = "page goes alone" if name == "page" else f"no case {name!r}"
            refuse("; ".join(filter(None, (why, did_you_mean(name, known), f"choose from {', '.join(known)}"))))
    axes = list(AXES) if "scaling" in what else [name for name in AXES if name in what]
    return [name for name in BY_NAME if name in what or not what], axes


def require(named_cases: Sequence[str], options: argparse.Namespace) -> None:
    """Refuses what cannot be measured here, before anything is."""
    for name in ("rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            refuse(f"--{name} has to be at least 1")
    if options.warmup < 0:
        refuse("--warmup has to be at least 0")
    kind = results.device_kind(options.device)
    if kind not in results.DEVICES:
        refuse(f"no device {options.device!r}; there are {' and '.join(results.DEVICES)}")
    if kind == "cuda" and not torch.cuda.is_available():
        refuse("this machine has no CUDA device that torch can use; leave out --device")
    if kind == "cpu" and options.precision == "tf32":
        refuse("tf32 is for GPUs; on a CPU take float32 or bfloat16")
    peer = options.peer or any(opponent(BY_NAME[name])[1] == "trl" for name in named_cases)
    if peer and importlib.util.find_spec("trl") is None:
        refuse("trl is not installed: pip install -e '.[conformance]', or `make bench`, which does it")


def refuse(why: str) -> NoReturn:
    print(f"benchmarks: {why}", file=sys.stderr)
    raise SystemExit(2)


def setting_of(options: argparse.Namespace, folder: Path, rounds: int) -> Setting:
    return Setting(
        folder=folder, rounds=options.rounds or rounds, warmup=options.warmup, threads=options.threads,
        device=options.device, precision=options.precision,
    )  # fmt: skip


def keep(options: argparse.Namespace, file: Path, kind: results.Kind, name: str, record: dict[str, Any]) -> None:
    """Into the file at once, and into the page with `--write`."""
    results.save(file, kind, name, record)
    if options.write:
        report.write_page()


def conditions(machine: Machine, setting: Setting) -> dict[str, Any]:
    """What else the numbers depend on."""
    wanted = ("torch", "transformers", "trl", "peft")
    installed = [name for name in wanted if importlib.util.find_spec(name) is not None]
    return {
        "machine": machine_name(setting.device),
        "threads": setting.threads,
        "precision": setting.precision,
        "rounds": setting.rounds,
        "gflops": machine.flops / 1e9,
        "gbytes": machine.bandwidth / 1e9,
        "versions": {name: metadata.version(name) for name in installed},
    }


def machine_name(device: str) -> str:
    """The accelerator's name, or the processor's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
