"""One picture of all ratios: how many times faster than each peer, on a log scale."""

from pathlib import Path


def picture(rows: list[dict], folder: Path) -> Path:
    """Writes ``ratios.png`` into the folder and returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.get("ratio")]
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
    if rows:
        ax.set_title(rows[0]["device"], fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ratios.png"
    fig.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(fig)
    return path
