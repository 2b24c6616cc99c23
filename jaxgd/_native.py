"""A loop of small steps as one native function, where that is possible: on a CPU.

This room owns one trick of speed and the conditions under which it is safe. XLA:CPU
runs a loop by dispatching its kernels one by one, 50 to 100 ns each, unless the loop
touches less than 1024 bytes a turn: then it compiles the loop into one function (its
pass ``small-while-loop-hoisting``), by outlining it into a call that carries an
attribute. ``one_function`` makes such a call itself. One-row descent on 20 features
takes about 100 ns a step instead of 700, and compiles faster. The computation is the
same; where the attribute means nothing, it is an ordinary call.
"""

import math
import os
from functools import partial
from typing import Any

import jax
import jax.custom_batching
import jaxlib.version
from jax import lax
from jax.experimental.scheduling_groups import xla_metadata_call
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, jaxprs_in_params

# The attribute is no public interface of XLA: it is used where tests have seen it work,
# and JAXGD_NATIVE_LOOPS=0 in the environment does without.
_TESTED = (
    jaxlib.version.__version__ == "0.10.2"
    and os.environ.get("JAXGD_NATIVE_LOOPS", "1") != "0"
)

# What the emitter behind the attribute can compile. It has neither scatter, sort, FFT,
# custom calls, callbacks nor collectives, and XLA hands products of matrices, and long
# reductions, to a library it cannot call: a loop with any of them stays as it is.
_NAMES = """
abs acos acosh add add_any and argmax argmin asin asinh atan atan2 atanh
bitcast_convert_type broadcast_in_dim cbrt ceil clamp clz complex concatenate cond
conj convert_element_type copy cos cosh custom_jvp_call custom_vjp_call
digamma div dot_general dynamic_slice dynamic_update_slice empty eq
erf erf_inv erfc exp exp2 expm1 floor gather ge gt imag integer_pow iota is_finite jit
le lgamma log log1p logistic lt max min mul name ne neg nextafter not or pad
platform_index population_count pow random_bits random_fold_in random_seed
random_split random_unwrap random_wrap real reduce_and reduce_max reduce_min reduce_or
reduce_precision reduce_prod reduce_sum rem remat2 reshape rev round rsqrt scan
select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh slice
split sqrt square squeeze stack stop_gradient sub tan tanh tile transpose
unstack while xor
"""
_CAN = frozenset(_NAMES.split())

# Numbers in a sum up to which XLA leaves it alone (4096 go to the library).
_LONGEST_SUM = 2048


def on_cpu(fun, *args):
    """``fun(*args)``, as one function on a CPU."""
    return lax.platform_dependent(*args, cpu=partial(one_function, fun), default=fun)


def one_function(fun, *args):
    """``fun(*args)``, as one function if that can be; under vmap and jvp as it is.

    What a transformation makes of ``fun`` may be beyond the emitter: a product with a
    vector becomes one with a matrix.
    """
    if not available():
        return fun(*args)
    closed, out = jax.make_jaxpr(fun, return_shape=True)(*args)
    leaves, treedef = jax.tree.leaves(args), jax.tree.structure(out)

    def plain(consts, args):
        return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts))(*args)

    @jax.custom_batching.custom_vmap
    def marked(consts, args):
        def with_inputs(consts, args):
            # XLA ends the process if an input is used nowhere, be it that it found a
            # way without, and it fails if the last operation is none that makes a
            # tuple. So all inputs are handed back, which copies nothing large.
            return [*plain(consts, args), *consts, *args]

        call: Any = xla_metadata_call
        mark = {"inlineable": "false", "xla_cpu_small_call": "true"}
        results = call(with_inputs, **mark)(consts, args)
        return results[: treedef.num_leaves]

    @marked.def_vmap
    def _(_, batched, *args):
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
        out = jax.vmap(plain, in_axes=tuple(axes))(*args)
        return out, [True] * len(out)

    run = jax.custom_jvp(marked)
    run.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    possible = can_be_one_function(closed.jaxpr)
    results = (run if possible else plain)(closed.consts, leaves)
    return jax.tree.unflatten(treedef, results)


def available() -> bool:
    """Whether this process has a place for it: one CPU, a jaxlib that was tested."""
    return _TESTED and one_cpu()


def one_cpu() -> bool:
    """Whether programs run on a single device, which is a CPU."""
    return jax.default_backend() == "cpu" and len(jax.devices()) == 1


def can_be_one_function(jaxpr) -> bool:
    """Whether every operation within is one that the emitter has."""
    return all(_can(eqn) for eqn in jaxpr.eqns)


def _can(eqn) -> bool:
    name = eqn.primitive.name
    if name not in _CAN:
        return False
    sums = name.startswith(("reduce_", "arg", "dot_"))
    if sums and max(x.aval.size for x in eqn.invars) > _LONGEST_SUM:
        return False
    if name == "dot_general" and _is_matrix_product(eqn):
        return False
    return all(can_be_one_function(sub) for sub in jaxprs_in_params(eqn.params))


def _is_matrix_product(eqn) -> bool:
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    rows, columns = (
        x.aval.size / max(1, math.prod(x.aval.shape[dim] for dim in taken))
        for x, taken in zip(eqn.invars, (left, right), strict=True)
    )
    return bool(batch) or min(rows, columns) > 1
