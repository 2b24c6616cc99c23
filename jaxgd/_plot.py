"""Pictures: ``Result.plot`` and ``LearningRateSearch.plot``.

This room owns how a run looks, and a race of learning rates. It reads a result on the
host and draws; Matplotlib is imported at the first call only, and nothing that runs
inside ``jit`` imports it.
"""

import numpy as np

_VALUE, _FULL, _GRAD = "#1f77b4", "#d62728", "#8a8a8a"


def plot_result(result, ax=None):
    """Draws objective and gradient norm of one run over its steps.

    Args:
      result: a ``Result`` of a single run.
      ax: Matplotlib axes to draw into; new ones if None.

    Returns:
      The axes of the objective; the gradient norm has a twin axis on the right.
    """
    ax = _new_axes() if ax is None else ax
    n, batch_size = result.setting[:2]
    history, checks = result.history, result.checks
    end, value = int(result.steps), float(result.value)
    noise = []
    if batch_size:
        x, y = _finite(history.step, history.value)
        mean = _running_mean(y)
        noise = ax.plot(x, y, color=_VALUE, lw=0.7, alpha=0.35, label=_rows(batch_size))
        lines = ax.plot(x, mean, color=_VALUE, lw=1.8, label="their running mean")
        full = _finite(checks.step, checks.value)
        lines += ax.plot(*full, "o-", color=_FULL, ms=4, label="full objective")
        final, norms, of = "full objective at the end", _running_mean, ", running mean"
    else:
        # The last iterate has no row of history: nothing left it.
        x, y = _finite([*history.step, end], [*history.value, value])
        lines = ax.plot(x, y, color=_VALUE, lw=1.8, label="objective")
        final, norms, of = "at the end", np.asarray, ""
    x, y = _finite([end], [value])
    final = f"{final}: {value:.5g}"
    lines += ax.plot(x, y, "D", color=_FULL, ms=7, mec="white", label=final)
    ax.update_datalim([(0, at) for at in y])  # from step 0, also without a history
    _log_where_it_helps(ax, lines)

    x, y = _finite(history.step, history.grad_norm)
    grad_norm = []
    if x.size:
        twin = ax.twinx()
        style = {"color": _GRAD, "lw": 1.2, "ls": "--", "label": "gradient norm" + of}
        grad_norm = twin.plot(x, norms(y), **style)
        _log_where_it_helps(twin, grad_norm)
        twin.set_ylabel("gradient norm", color=_GRAD)
        twin.tick_params(axis="y", which="both", colors=_GRAD)
        ax.set_zorder(twin.get_zorder() + 1)  # the objective in front
        ax.patch.set_visible(False)

    ax.set_ylabel("objective")
    ax.set_xlabel("steps" if n is None or batch_size else "steps (one epoch each)")
    if n is not None and batch_size:
        _epochs_on_top(ax, n / batch_size)
    ax.set_title(result.message, fontsize="medium", wrap=True)
    shown = [line for line in noise + lines + grad_norm if np.size(line.get_xdata())]
    if not np.isfinite(value):
        shown += [line for line in lines[-1:] if line not in shown]
    ax.legend(handles=shown, fontsize="small", framealpha=0.9)
    return ax


def plot_search(search, ax=None):
    """Draws the objective that each learning rate reached.

    Args:
      search: a ``LearningRateSearch``.
      ax: Matplotlib axes to draw into; new ones if None.

    Returns:
      The axes, the rates on a logarithmic scale. Crosses at the top are rates that
      diverged.
    """
    ax = _new_axes() if ax is None else ax
    ax.set_xscale("log")
    last, shorter = search.heats[-1], search.heats[:-1]
    shown = []
    for heat, shade in zip(shorter, (0.35, 0.7), strict=False):
        x, y = _finite(heat.learning_rates, heat.values)
        style = {"color": _GRAD, "alpha": shade, "lw": 1.2, "ms": 3}
        shown += ax.plot(x, y, "o-", label=f"after {heat.steps} steps", **style)
    x, y = _finite(last.learning_rates, last.values)
    label = f"after {last.steps} steps"
    shown += ax.plot(x, y, "o-", color=_VALUE, lw=1.8, ms=4, label=label)
    if np.isfinite(search.start):
        style = {
            "color": _GRAD,
            "lw": 0.8,
            "ls": ":",
            "label": "objective at the start",
        }
        shown.append(ax.axhline(search.start, **style))
    _cut_above_the_start(ax, shown, search.start)

    lost = [heat.learning_rates[~np.isfinite(heat.values)] for heat in search.heats]
    lost = np.unique(np.concatenate(lost))
    if lost.size:
        top = np.full(lost.size, 0.97)
        style = {"color": "black", "ms": 5, "transform": ax.get_xaxis_transform()}
        shown += ax.plot(lost, top, "x", label="diverged", **style)
    if np.isfinite(search.stable_limit):
        label = f"stable limit at the start: {search.stable_limit:.3g}"
        style = {"color": "black", "lw": 1, "ls": "--", "label": label}
        shown.append(ax.axvline(search.stable_limit, **style))
    if np.isfinite(search.suggestion):
        label = f"suggestion: {search.suggestion:.3g}"
        style = {"color": _FULL, "lw": 1, "zorder": 1}
        ax.axvline(search.suggestion, **style)
        style = {"color": _FULL, "ms": 7, "mec": "white", "label": label}
        shown += ax.plot([search.suggestion], [search.reached], "D", **style)
    ax.set_xlabel("learning rate")
    ax.set_ylabel("full objective")
    ax.set_title(str(search).splitlines()[0], fontsize="medium", wrap=True)
    ax.legend(handles=shown, fontsize="small", framealpha=0.9)
    return ax


def _cut_above_the_start(ax, lines, start):
    """A log scale where it helps, up to a little above the start.

    Rates beyond the stable limit may reach 1e30 without diverging.
    """
    y = np.concatenate([np.asarray(line.get_ydata(), float) for line in lines])
    y = y[y <= start] if np.isfinite(start) else y
    if y.size == 0:
        return
    low, high = y.min(), y.max()
    if low > 0 and high > 10 * low:
        ax.set_yscale("log")
        ax.set_ylim(low * (low / high) ** 0.08, high * (high / low) ** 0.3)
    elif high > low:
        ax.set_ylim(low - 0.08 * (high - low), high + 0.3 * (high - low))


def _new_axes():
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Pictures need Matplotlib: pip install 'jaxgd[plot]'."
        ) from error
    ax = plt.subplots(layout="constrained")[1]
    ax.locator_params(axis="x", integer=True)
    return ax


def _rows(batch_size: int) -> str:
    of = "single rows" if batch_size == 1 else f"mini-batches of {batch_size}"
    return f"objective of {of}"


def _finite(x, y):
    """Both as float64 (axis margins overflow float32), where ``y`` is finite."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    return x[np.isfinite(y)], y[np.isfinite(y)]


def _running_mean(y):
    """Centered means over a 25th of the run, over fewer rows at its ends."""
    window = np.ones(y.size // 25 // 2 * 2 + 1)
    if window.size == 1:
        return y
    return np.convolve(y, window, "same") / np.convolve(np.ones(y.size), window, "same")


def _log_where_it_helps(ax, lines):
    """A log scale for positive values that span more than a decade.

    Noise is not in ``lines``: single rows reach 1e-10 and would squeeze the rest.
    """
    y = np.concatenate([line.get_ydata() for line in lines])
    if y.size and y.min() > 0 and y.max() > 10 * y.min():
        ax.set_yscale("log")
        if ax.get_ylim()[0] < y.min() / 10:
            ax.set_ylim(bottom=y.min() / 10)


def _epochs_on_top(ax, steps_per_epoch):
    top = ax.secondary_xaxis(
        "top", functions=(lambda x: x / steps_per_epoch, lambda x: x * steps_per_epoch)
    )
    top.set_xlabel("epochs")
