"""Pictures: all ratios of times on one log scale, and the profile of the solvers."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np


def pictures(rows: list[dict], folder: Path) -> Iterator[Path]:
    """Writes ``ratios.png`` and ``classical.png``, if there are rows for them."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if row.get("ratio")]
    if timed:
        yield ratios_picture(timed, folder / "ratios.png")
    solved = [row for row in rows if "solver" in row]
    if solved:
        from benchmarks.classical import ratios

        yield profile_picture(ratios(solved), folder / "classical.png")


def ratios_picture(rows: list[dict], path: Path) -> Path:
    """How many times faster than each peer."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(9, 1.2 + 0.24 * len(rows)))
    labels = []
    for row in rows:
        where = "" if row["device"] == rows[0]["device"] else f", {row['device']}"
        labels.append(f"{row['name']} ({row['size']}{where})  vs  {row['peer']}")
    for place, row in enumerate(rows):
        color = "tab:blue" if row["ratio"] >= 1 else "tab:red"
        ax.plot([1, row["ratio"]], [place, place], color=color, lw=3, alpha=0.5)
        ax.plot(row["spread"], [place, place], color=color, lw=1)
        ax.plot(row["ratio"], place, "o", color=color, ms=5)
        left = row["ratio"] < 1
        ax.annotate(
            f"{row['ratio']:.0f}" if row["ratio"] >= 100 else f"{row['ratio']:.2g}",
            (min(row["spread"]) if left else max(row["spread"]), place),
            xytext=(-6 if left else 6, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=8,
        )
    ax.axvline(1, color="black", lw=0.8)
    ax.set_xscale("log")
    ax.set_yticks(range(len(rows)), labels, fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.12, y=0.02)
    ax.set_xlabel("time of the peer / time of jaxgd (right of 1: jaxgd is faster)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(rows[0]["device"], fontsize=9)
    fig.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(fig)
    return path


def profile_picture(ratios: dict[str, np.ndarray], path: Path) -> Path:
    """The share of problems solved within a multiple of the best solver's evaluations.

    ``ratios``: of each solver, (problems,), infinite where it does not solve.
    """
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7.5, 4.8))
    finite = np.concatenate([ratio[np.isfinite(ratio)] for ratio in ratios.values()])
    end = finite.max(initial=2.0) * 1.2
    ranked = sorted(ratios, key=lambda solver: -np.isfinite(ratios[solver]).mean())
    for solver in ranked:
        ratio = ratios[solver]
        within = np.sort(ratio[np.isfinite(ratio)])
        share = np.arange(1, within.size + 1) / ratio.size
        ax.step(
            np.concatenate([[1.0], within, [end]]),
            np.concatenate([[0.0], share, share[-1:] if share.size else [0.0]]),
            where="post",
            lw=2.4 if solver.startswith("jaxgd") else 1.3,
            ls="-" if solver.startswith("jaxgd") else "--",
            label=f"{solver} ({share[-1] if share.size else 0:.0%})",
        )
    problems = len(next(iter(ratios.values())))
    ax.set_xscale("log")
    ax.set_xlim(1, end)
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("evaluations, as a multiple of the best solver's on the problem")
    ax.set_ylabel("share of problems solved")
    ax.set_title(f"{problems} classical problems, default settings, no tuning")
    ax.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="lower right", title="solver (solved)")
    fig.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(fig)
    return path
