"""Gradient descent in JAX: one compiled, honest, resumable run.

``minimize`` is the one call, ``iterate`` the same in a Python loop, ``sweep`` many of
them at once; ``save`` and ``load`` keep a state in a file, ``Stream`` reads rows from
one, ``shard_rows`` spreads rows over devices; ``find_learning_rate`` and ``sharpness``
tell which rate to give; ``make_step`` and ``init_state`` are the manual loop;
``benchmark`` times a call.

Folders are floors, each importing only those below it: ``_tools`` (made of runs),
``_api`` (what you call), ``_files`` (runs that outlive their process), ``_call`` (from
words to a plan), ``_loop`` (the one loop), ``_result`` (what comes back), ``_rows``,
``_stop``, ``_problem`` and ``_rules`` (the parts of a run), ``_devices``, and at the
bottom ``_tree``. ``problems`` stands alone.
``docs/architecture.md`` has the picture.
"""

from jaxgd import problems as problems
from jaxgd._api.iterate import iterate as iterate
from jaxgd._api.manual import init_state as init_state
from jaxgd._api.manual import make_step as make_step
from jaxgd._api.minimize import minimize as minimize
from jaxgd._api.shard_rows import shard_rows as shard_rows
from jaxgd._api.sweep import sweep as sweep
from jaxgd._files.checkpoint import load as load
from jaxgd._files.checkpoint import save as save
from jaxgd._loop.step import Info as Info
from jaxgd._loop.step import State as State
from jaxgd._result.diagnosis import Diagnosis as Diagnosis
from jaxgd._result.grid import Sweep as Sweep
from jaxgd._result.history import History as History
from jaxgd._result.paths import plot_paths as plot_paths
from jaxgd._result.result import Result as Result
from jaxgd._result.search import Heat as Heat
from jaxgd._result.search import LearningRateSearch as LearningRateSearch
from jaxgd._rows.order import batch_rows as batch_rows
from jaxgd._rows.order import shuffled_rows as shuffled_rows
from jaxgd._rows.source import StreamError as StreamError
from jaxgd._rows.stream import Stream as Stream
from jaxgd._rules.barzilai_borwein import BarzilaiBorweinState as BarzilaiBorweinState
from jaxgd._rules.barzilai_borwein import barzilai_borwein as barzilai_borwein
from jaxgd._rules.parabolic_rms import ParabolicRMSState as ParabolicRMSState
from jaxgd._rules.parabolic_rms import parabolic_rms as parabolic_rms
from jaxgd._rules.scaled_lbfgs import ScaledLBFGSState as ScaledLBFGSState
from jaxgd._rules.scaled_lbfgs import scaled_lbfgs as scaled_lbfgs
from jaxgd._stop.rules import StopRule as StopRule
from jaxgd._stop.rules import all_of as all_of
from jaxgd._stop.rules import any_of as any_of
from jaxgd._stop.rules import gradient_norm as gradient_norm
from jaxgd._stop.rules import params_change as params_change
from jaxgd._stop.rules import target_value as target_value
from jaxgd._stop.rules import value_change as value_change
from jaxgd._stop.status import Check as Check
from jaxgd._stop.status import Criterion as Criterion
from jaxgd._stop.status import Status as Status
from jaxgd._tools.benchmark import Benchmark as Benchmark
from jaxgd._tools.benchmark import benchmark as benchmark
from jaxgd._tools.learning_rate import find_learning_rate as find_learning_rate
from jaxgd._tools.sharpness import sharpness as sharpness

__version__ = "0.1.0"
