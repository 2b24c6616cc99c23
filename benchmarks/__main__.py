"""All benchmarks, or those that are named: ``python -m benchmarks --help``."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

NAMES = (
    "one_row",
    "mini_batch",
    "stream",
    "full_batch",
    "row_order",
    "calls",
    "own_timing",
    "lanes",
    "host_loop",
    "rate_search",
    "classical",
    "verdicts",
    "ahead_of_time",
    "devices",
    "parameter_free",
    "house",
)


def parsed(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="jaxgd against its peers."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats")
    parser.add_argument("--scale", type=float, default=1.0, help="rows by this factor")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), default=None)
    parser.add_argument("--cores", type=int, help="use so many cores of the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows here")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write pictures")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: {', '.join(NAMES)}")
    return options


def main(arguments=None) -> list[dict]:
    chosen = parsed(arguments)
    if chosen.cores is not None:  # before any library counts them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: chosen.cores])
    # What is measured in processes of their own needs room on the device, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    if chosen.device is not None:
        jax.config.update(
            "jax_platforms", {"gpu": "cuda"}.get(chosen.device, chosen.device)
        )
    from benchmarks._measure import HEAD, Options, where

    if (
        jax.default_backend() != "cpu"
    ):  # or some peers would take fewer bits than others
        jax.config.update("jax_default_matmul_precision", "float32")
    options = Options(chosen.quick, chosen.scale, jax.default_backend(), chosen.cores)
    about = where()
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    print(f"{about['device']}; {versions}\n\n{HEAD}")
    rows = []
    for name in chosen.names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"{name}: {(module.__doc__ or '').splitlines()[0]}", flush=True)
        rows += [row | {"benchmark": name} for row in module.run(options)]
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(rows, indent=1) + "\n")
    if chosen.plot is not None:
        from benchmarks._picture import pictures

        for path in pictures(rows, chosen.plot):
            print(f"wrote {path}")
    return rows


if __name__ == "__main__":
    found = main(sys.argv[1:])
    apart = [row for row in found if row.get("disagrees")]
    for row in apart:
        print(f"{row['name']}: {row['peer']} ends {row['disagrees']:.1e} from jaxgd")
    sys.exit(1 if apart else 0)
