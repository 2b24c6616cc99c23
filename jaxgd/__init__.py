"""Gradient descent in JAX: one compiled, honest, resumable run.

``minimize`` is the one call, ``iterate`` the same in a Python loop, ``sweep`` many of
them at once; ``save`` and ``load`` keep a state in a file, ``Stream`` reads rows from
one, ``shard_rows`` spreads rows over devices; ``find_learning_rate`` and ``sharpness``
tell which rate to give; ``make_step`` and ``init_state`` are the manual loop;
``benchmark`` times a call.

The rooms, each importing only those after it: ``_benchmark`` (times), ``_sweep`` (many
runs as lanes), ``_iterate`` (the host's loop), ``_search`` (a race of rates),
``_sharpness`` (the largest curvature), ``_minimize`` (the front door), ``_checkpoint``
(states in files), ``_resume`` (taking up a run), ``_fed`` (a run whose rows come from
outside), ``_program`` (what is compiled), ``_step`` (the scan body), ``_shard_rows``
(rows on the way to their devices), ``_check`` (arguments), ``_stream`` (rows from
outside), ``_spec`` (what a program is keyed by), ``_source`` and ``_rows`` (which
rows), ``_stop`` (when to stop), ``_lanes`` and ``_loop`` (the order of events),
``_native`` (small loops on a CPU), ``_means`` (whether an objective may be split),
``_rules`` (reading optax), ``_spectral`` and ``_parameter_free`` (steps without a
rate), ``_gradient``, ``_processes`` and ``_shards`` (several devices), ``_diagnosis``
(what was wrong with a rate), ``_result``, ``_history``, ``_tree``.
``_plot`` draws, on the host alone: Matplotlib is imported when a picture is asked for.
``problems`` stands alone.
"""

from jaxgd import problems as problems
from jaxgd._benchmark import Benchmark as Benchmark
from jaxgd._benchmark import benchmark as benchmark
from jaxgd._checkpoint import load as load
from jaxgd._checkpoint import save as save
from jaxgd._diagnosis import Diagnosis as Diagnosis
from jaxgd._history import History as History
from jaxgd._iterate import iterate as iterate
from jaxgd._loop import Check as Check
from jaxgd._minimize import minimize as minimize
from jaxgd._parameter_free import ParabolicRMSState as ParabolicRMSState
from jaxgd._parameter_free import parabolic_rms as parabolic_rms
from jaxgd._plot import plot_paths as plot_paths
from jaxgd._result import Criterion as Criterion
from jaxgd._result import Result as Result
from jaxgd._result import Status as Status
from jaxgd._rows import batch_rows as batch_rows
from jaxgd._rows import shuffled_rows as shuffled_rows
from jaxgd._search import Heat as Heat
from jaxgd._search import LearningRateSearch as LearningRateSearch
from jaxgd._search import find_learning_rate as find_learning_rate
from jaxgd._shard_rows import shard_rows as shard_rows
from jaxgd._sharpness import sharpness as sharpness
from jaxgd._spectral import BarzilaiBorweinState as BarzilaiBorweinState
from jaxgd._spectral import barzilai_borwein as barzilai_borwein
from jaxgd._step import Info as Info
from jaxgd._step import State as State
from jaxgd._step import init_state as init_state
from jaxgd._step import make_step as make_step
from jaxgd._stop import StopRule as StopRule
from jaxgd._stop import all_of as all_of
from jaxgd._stop import any_of as any_of
from jaxgd._stop import gradient_norm as gradient_norm
from jaxgd._stop import params_change as params_change
from jaxgd._stop import target_value as target_value
from jaxgd._stop import value_change as value_change
from jaxgd._stream import Stream as Stream
from jaxgd._stream import StreamError as StreamError
from jaxgd._sweep import Sweep as Sweep
from jaxgd._sweep import sweep as sweep

__version__ = "0.1.0"
