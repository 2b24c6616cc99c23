"""A run as a picture: ``Result.plot``.

This room owns how a run looks. It reads a ``Result`` on the host and draws; Matplotlib
is imported at the first call only, and nothing that runs inside ``jit`` imports it.
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


def _new_axes():
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Result.plot needs Matplotlib: pip install 'jaxgd[plot]'."
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
