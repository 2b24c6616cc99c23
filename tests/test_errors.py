"""Bad input is refused before compilation, in one sentence; good input is not."""

from dataclasses import replace
from functools import partial

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from jax.experimental import sparse

import jaxgd
from jaxgd._rows.order import as_key

N = 8
X = np.linspace(-1, 1, 3 * N, dtype=np.float32).reshape(N, 3)
Y = X @ np.array([1.0, -2.0, 0.5], np.float32)
START = np.zeros(3, np.float32)
NEW_KEYS = jax.random.split(jax.random.key(0), 3)
OLD_KEYS = np.zeros((3, 2), np.uint32)

compilations = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: (
        compilations.append(name)
        if name == "/jax/core/compile/backend_compile_duration"
        else None
    )
)


def loss(params, batch):
    x, y = batch
    return jnp.mean((x @ params - y) ** 2)


def bowl(x):
    return jnp.sum(jnp.abs(jnp.asarray(x)) ** 2)


def with_aux(params, batch):
    return loss(params, batch), {"rows": batch[0].shape[0]}


def run(fun=loss, params=START, data=(X, Y), **settings):
    if not {"learning_rate", "optimizer"} & set(settings):
        settings["learning_rate"] = 0.1
    return jaxgd.minimize(fun, params, data, **settings)


def regression(**settings):
    return partial(run, **settings)


def plain(fun=bowl, params=START, **settings):
    """Without data."""
    return partial(run, fun, params, None, **settings)


def traced(setting, value, **settings):
    """``setting`` as a traced value: the call inside jit."""
    call = jax.jit(lambda value: run(**{setting: value}, **settings).params)
    return partial(call, value)


class Duck:
    """An array of a foreign library."""

    shape, ndim, dtype = (3,), 1, "torch.float32"


class Callable:
    """An objective that is an object, and not hashable."""

    __hash__ = None

    def __init__(self, scale=1.0):
        self.scale = scale

    def __eq__(self, other):
        return self is other

    def __call__(self, params, batch):
        return self.scale * loss(params, batch)

    def method(self, params, batch):
        return self(params, batch)


def needs_two(learning_rate, decay):
    return optax.add_decayed_weights(learning_rate * decay)


def needs_the_number(learning_rate):
    return optax.sgd(learning_rate) if learning_rate > 0 else optax.identity()


def own_rule(update, state=()):
    """A rule of a user's own."""
    return optax.GradientTransformationExtraArgs(lambda params: state, update)


BATCH = run(max_steps=2).state
MINI = run(batch_size=4, max_steps=2).state
ADAM = run(optimizer=optax.adam(0.1), max_steps=2).state
WIDER = run(bowl, np.zeros(5, np.float32), None, max_steps=2).state
FEWER = run(max_steps=2, history_rows=10).state
RESULT = run(max_steps=2)
LANES = jax.vmap(lambda start: run(params=start, max_steps=2))(
    np.stack([START] * 2)
).state
MANUAL = jaxgd.init_state(START, optax.sgd(0.1))
SGD = optax.sgd(0.1)
FREE = optax.contrib.schedule_free_sgd(0.1)
SEARCH = optax.scale_by_backtracking_linesearch(5)
PAIR = {"w": START, "b": np.zeros(2, np.float32)}
ONES = jnp.ones(3)
WIDE = np.arange(N) + np.array([0] * (N - 1) + [2**32])


# id, call, exception, fragments of its message
REFUSED = [
    # fun
    ("fun_none", regression(fun=None), TypeError, "fun None function pass"),
    ("fun_string", regression(fun="loss"), TypeError, "fun 'loss' function pass"),
    ("fun_value", regression(fun=3.0), TypeError, "fun 3.0 function pass"),
    (
        "fun_takes_no_batch",
        regression(fun=lambda params: bowl(params)),
        TypeError,
        "fun (params,~batch) (params) too~many~positional args",
    ),
    (
        "fun_wants_batch",
        plain(loss),
        TypeError,
        "fun (params) (params,~batch) 'batch' data",
    ),
    (
        "fun_wants_args",
        plain(lambda x, target: bowl(x - target)),
        TypeError,
        "fun (x,~target) 'target' args",
    ),
    (
        "fun_wants_no_args",
        plain(args=(1.0,)),
        TypeError,
        "fun (params,~args[0]) (x) args",
    ),
    (
        "fun_wants_key",
        plain(lambda x, *, key: bowl(x)),
        TypeError,
        "fun 'key' (x,~*,~key) with_key=True",
    ),
    ("fun_no_key", plain(with_key=True), TypeError, "fun key=key (x) 'key' with_key"),
    ("fun_tuple", plain(lambda x: (bowl(x), x)), TypeError, "fun scalar has_aux=True"),
    (
        "fun_list",
        plain(lambda x: [bowl(x)]),
        TypeError,
        "fun scalar [float32[]] return",
    ),
    ("fun_returns_none", plain(lambda x: None), TypeError, "fun scalar None return"),
    ("fun_returns_str", plain(lambda x: "low"), TypeError, "fun scalar 'low' return"),
    ("fun_function", plain(lambda x: bowl), TypeError, "fun scalar bowl return"),
    ("fun_vector", plain(lambda x: x**2), ValueError, "fun scalar (3,) jnp.mean"),
    ("fun_row", plain(lambda x: x[:1]), ValueError, "fun scalar (1,) reduce"),
    (
        "fun_int",
        plain(lambda x: jnp.sum(x > 0)),
        TypeError,
        "fun floating int32 convert",
    ),
    ("fun_python_int", plain(lambda x: 1), TypeError, "fun floating int convert"),
    ("fun_bool", plain(lambda x: x[0] > 0), TypeError, "fun floating bool convert"),
    (
        "fun_complex",
        plain(lambda x: 1j * bowl(x)),
        TypeError,
        "fun floating complex64 jnp.real",
    ),
    ("aux_no_pair", regression(has_aux=True), TypeError, "fun pair has_aux float32[]"),
    (
        "aux_triple",
        plain(lambda x: (bowl(x), x, x), has_aux=True),
        TypeError,
        "fun pair has_aux leave",
    ),
    (
        "aux_value_vector",
        plain(lambda x: (x, x), has_aux=True),
        ValueError,
        "fun scalar (3,) reduce",
    ),
    (
        "aux_string",
        plain(lambda x: (bowl(x), {"note": "hi"}), has_aux=True),
        TypeError,
        "aux['note'] 'hi' array leave",
    ),
    # params
    ("params_none", plain(params=None), ValueError, "params None at~least~one pass"),
    ("params_empty", plain(params={}), ValueError, "params {} at~least~one pass"),
    (
        "params_size_0",
        plain(params=np.zeros(0)),
        ValueError,
        "params at~least~one [] pass",
    ),
    (
        "params_int",
        plain(params=np.arange(3)),
        TypeError,
        "params floating int64 convert",
    ),
    (
        "params_int_leaf",
        plain(params={"w": ONES, "n": 3}),
        TypeError,
        "params['n'] floating int convert",
    ),
    ("params_bool", plain(params=True), TypeError, "params floating bool convert"),
    ("params_str", plain(params="zeros"), TypeError, "params array 'zeros' pass"),
    (
        "params_object",
        plain(params=np.array([1.0, None])),
        TypeError,
        "params numbers object jnp.asarray",
    ),
    ("params_duck", plain(params=Duck()), TypeError, "params array Duck jnp.asarray"),
    (
        "params_key",
        plain(params=NEW_KEYS[0]),
        TypeError,
        "params floating key<fry> args",
    ),
    ("params_function", plain(params=bowl), TypeError, "params array bowl pass"),
    (
        "params_struct",
        plain(params=np.zeros(2, [("a", "f4")])),
        TypeError,
        "params numbers 'a' jnp.asarray",
    ),
    # data
    ("data_scalar", regression(data=3.0), TypeError, "data rows 3.0 np.asarray"),
    (
        "data_0d",
        regression(data=(X, np.float32(3))),
        ValueError,
        "data[1] rows scalar args",
    ),
    (
        "data_lists",
        regression(data=([1.0, 2.0], [3.0, 4.0])),
        TypeError,
        "data[0][0] rows 1.0 np.asarray",
    ),
    ("data_str", regression(data="rows.csv"), TypeError, "data 'rows.csv' array pass"),
    (
        "data_object",
        regression(data=(X, Y.astype(object))),
        TypeError,
        "data[1] numbers object encode",
    ),
    (
        "data_text",
        regression(data=(X, np.array(["a"] * N))),
        TypeError,
        "data[1] numbers <U1 encode",
    ),
    (
        "data_dates",
        regression(data=(X, np.zeros(N, "datetime64[s]"))),
        TypeError,
        "data[1] numbers datetime64 encode",
    ),
    (
        "data_iterator",
        regression(data=(row for row in X)),
        TypeError,
        "data arrays generator collect",
    ),
    (
        "data_lengths",
        regression(data={"x": X, "y": Y[:5]}),
        ValueError,
        "data['x'] data['y'] 8 5 cut",
    ),
    (
        "data_ragged",
        regression(data=[X[0], X[1, :2]]),
        ValueError,
        "data[0] data[1] 3 2 cut",
    ),
    ("data_empty", regression(data={}), ValueError, "data {} at~least~one leave"),
    ("data_0_rows", regression(data=(X[:0], Y[:0])), ValueError, "data rows 0 leave"),
    (
        "data_too_long",
        regression(data=(np.broadcast_to(Y[:1], 2**31),) * 2),
        ValueError,
        "data rows 2147483648 fewer",
    ),
    (
        "data_bcoo",
        regression(data=(sparse.BCOO.fromdense(X), Y)),
        TypeError,
        "data[0] dense sparse BCOO (8,~3) todense() args Stream",
    ),
    (
        "data_bcsr",
        regression(data={"x": sparse.BCSR.fromdense(X)}),
        TypeError,
        "data['x'] dense sparse BCSR (8,~3) todense() args Stream",
    ),
    (
        "data_scipy_matrix",
        regression(data=(scipy.sparse.csr_matrix(X), Y)),
        TypeError,
        "data[0] dense sparse csr_matrix (8,~3) todense() args Stream",
    ),
    (
        "data_scipy_array",
        regression(data=scipy.sparse.coo_array(X)),
        TypeError,
        "data dense sparse coo_array (8,~3) todense() args Stream",
    ),
    (
        "data_ids",
        regression(data=(X, WIDE)),
        ValueError,
        "data[1] int32 4294967303 [7] jax.enable_x64 renumber",
    ),
    (
        "data_ids_negative",
        regression(data=(X, -WIDE)),
        ValueError,
        "data[1] int32 -4294967303 [7] jax.enable_x64 renumber",
    ),
    (
        "data_ids_unsigned",
        regression(data=(X, WIDE.astype(np.uint64))),
        ValueError,
        "data[1] uint32 4294967303 [7] jax.enable_x64 renumber",
    ),
    (
        "data_ids_other_order",
        regression(data=(X, WIDE.astype(">i8").reshape(N, 1))),
        ValueError,
        "data[1] int32 4294967303 [7,~0] jax.enable_x64 renumber",
    ),
    (
        "shard_rows_ids",
        lambda: jaxgd.shard_rows({"ids": WIDE}),
        ValueError,
        "data['ids'] int32 4294967303 [7] jax.enable_x64 renumber",
    ),
    # args
    (
        "args_array",
        plain(args=np.ones(3)),
        TypeError,
        "args tuple array([1.,~1.,~1.]) args=(x,)",
    ),
    ("args_number", plain(args=0.1), TypeError, "args tuple 0.1 args=(x,)"),
    ("args_dict", plain(args={"a": 1.0}), TypeError, "args tuple dict args=(x,)"),
    ("args_str", plain(args=("l2",)), TypeError, "args[0] 'l2' array fun"),
    ("args_function", plain(args=(bowl,)), TypeError, "args[0] bowl array fun"),
    ("args_big", plain(args=(2**40,)), ValueError, "args[0] 1099511627776 int32 array"),
    (
        "args_ids",
        plain(args=({"ids": WIDE},)),
        ValueError,
        "args[0]['ids'] int32 4294967303 [7] jax.enable_x64 renumber",
    ),
    (
        "fun_ids",
        plain(jax.tree_util.Partial(lambda ids, x: bowl(x), WIDE)),
        ValueError,
        "fun int32 4294967303 [7] jax.enable_x64 renumber",
    ),
    (
        "hyperparams_ids",
        regression(
            optimizer=lambda rate, ids: optax.sgd(rate),
            learning_rate=0.1,
            hyperparams={"ids": WIDE},
        ),
        ValueError,
        "hyperparams['ids'] int32 4294967303 [7] jax.enable_x64 renumber",
    ),
    (
        "sweep_ids",
        lambda: jaxgd.sweep(lambda x, i: bowl(x - i), START, over={"args": (WIDE,)}),
        ValueError,
        "over['args'][0] int32 4294967303 [7] jax.enable_x64 renumber",
    ),
    # batch_size, microbatch_size, strata, history_rows
    ("batch_0", regression(batch_size=0), ValueError, "batch_size at~least~1 0 pass"),
    (
        "batch_negative",
        regression(batch_size=-1),
        ValueError,
        "batch_size at~least~1 -1 pass",
    ),
    (
        "batch_fraction",
        regression(batch_size=2.5),
        TypeError,
        "batch_size whole 2.5 int",
    ),
    ("batch_float", regression(batch_size=4.0), TypeError, "batch_size whole 4.0 int"),
    (
        "batch_0d_float",
        regression(batch_size=np.array(2.5)),
        TypeError,
        "batch_size whole array(2.5) int",
    ),
    ("batch_true", regression(batch_size=True), TypeError, "batch_size whole True int"),
    ("batch_str", regression(batch_size="4"), TypeError, "batch_size whole '4' int"),
    (
        "batch_vector",
        regression(batch_size=np.array([4])),
        TypeError,
        "batch_size whole array([4]) int",
    ),
    (
        "batch_above_n",
        regression(batch_size=9),
        ValueError,
        "batch_size at~most~8 rows 9 smaller",
    ),
    (
        "batch_no_data",
        plain(batch_size=4),
        ValueError,
        "batch_size needs~data 4 leave",
    ),
    (
        "batch_traced",
        traced("batch_size", 4),
        TypeError,
        "batch_size Python~int traced static",
    ),
    (
        "micro_0",
        regression(microbatch_size=0),
        ValueError,
        "microbatch_size at~least~1 0 pass",
    ),
    (
        "micro_fraction",
        regression(microbatch_size=2.5),
        TypeError,
        "microbatch_size whole 2.5 int",
    ),
    (
        "micro_no_data",
        plain(microbatch_size=2),
        ValueError,
        "microbatch_size needs~data 2 leave",
    ),
    (
        "strata_not_of_n",
        regression(batch_size=6, strata=3),
        ValueError,
        "strata divide rows 8 3 divisor~of~2",
    ),
    (
        "strata_not_of_batch",
        regression(batch_size=6, strata=4),
        ValueError,
        "strata divide batch_size 6 4 divisor~of~2",
    ),
    (
        "strata_0",
        regression(batch_size=4, strata=0),
        ValueError,
        "strata at~least~1 0 pass",
    ),
    (
        "strata_true",
        regression(batch_size=4, strata=True),
        TypeError,
        "strata whole True int",
    ),
    (
        "strata_no_batch",
        regression(strata=2),
        ValueError,
        "strata needs~batch_size 2 leave",
    ),
    (
        "strata_no_data",
        plain(strata=2),
        ValueError,
        "strata needs~batch_size 2 leave",
    ),
    (
        "history_negative",
        regression(history_rows=-1),
        ValueError,
        "history_rows at~least~0 -1 pass",
    ),
    (
        "history_fraction",
        regression(history_rows=1.5),
        TypeError,
        "history_rows whole 1.5 int",
    ),
    (
        "history_none",
        regression(history_rows=None),
        TypeError,
        "history_rows whole None int",
    ),
    (
        "history_huge",
        regression(history_rows=2**40),
        ValueError,
        "history_rows at~most 1099511627776 smaller",
    ),
    # learning_rate
    (
        "rate_negative",
        regression(learning_rate=-0.1),
        ValueError,
        "learning_rate >=~0 -0.1 pass",
    ),
    (
        "rate_nan",
        regression(learning_rate=np.nan),
        ValueError,
        "learning_rate finite nan pass",
    ),
    (
        "rate_inf",
        regression(learning_rate=np.inf),
        ValueError,
        "learning_rate finite inf pass",
    ),
    (
        "rate_true",
        regression(learning_rate=True),
        TypeError,
        "learning_rate number True pass",
    ),
    (
        "rate_str",
        regression(learning_rate="0.1"),
        TypeError,
        "learning_rate number '0.1' pass",
    ),
    (
        "rate_complex",
        regression(learning_rate=0.1j),
        TypeError,
        "learning_rate real 0.1j pass",
    ),
    (
        "rate_complex_array",
        regression(learning_rate=np.complex64(0.1j)),
        TypeError,
        "learning_rate real complex64 pass",
    ),
    (
        "rate_list",
        regression(learning_rate=[0.1]),
        TypeError,
        "learning_rate number [0.1] pass",
    ),
    (
        "rate_vector",
        regression(learning_rate=np.array([0.1, 0.2])),
        ValueError,
        "learning_rate scalar (2,) vmap",
    ),
    (
        "rate_object",
        regression(learning_rate=np.array(None)),
        TypeError,
        "learning_rate number object pass",
    ),
    (
        "rate_bool_array",
        regression(learning_rate=np.bool_(True)),
        TypeError,
        "learning_rate number True pass",
    ),
    (
        "schedule_no_step",
        regression(learning_rate=lambda: 0.1),
        TypeError,
        "learning_rate step lambda () step~->~rate",
    ),
    (
        "schedule_two",
        regression(learning_rate=lambda step, scale: 0.1),
        TypeError,
        "learning_rate step (step,~scale) step~->~rate",
    ),
    (
        "schedule_uncalled",
        regression(learning_rate=optax.cosine_decay_schedule),
        TypeError,
        "learning_rate step cosine_decay_schedule step~->~rate",
    ),
    (
        "schedule_vector",
        regression(learning_rate=lambda step: jnp.ones(2) * step),
        ValueError,
        "learning_rate scalar lambda float32[2] step~->~rate",
    ),
    (
        "schedule_none",
        regression(learning_rate=lambda step: None),
        TypeError,
        "learning_rate real~scalar lambda None step~->~rate",
    ),
    (
        "schedule_str",
        regression(learning_rate=lambda step: "small"),
        TypeError,
        "learning_rate real~scalar lambda 'small' step~->~rate",
    ),
    (
        "schedule_complex",
        regression(learning_rate=lambda step: 0.1j * step),
        TypeError,
        "learning_rate real~scalar lambda complex64 step~->~rate",
    ),
    # optimizer
    (
        "optimizer_str",
        regression(optimizer="adam"),
        TypeError,
        "optimizer rule 'adam' optax.adam pass",
    ),
    (
        "optimizer_int",
        regression(optimizer=3),
        TypeError,
        "optimizer rule 3 optax.adam pass",
    ),
    (
        "optimizer_tuple",
        regression(optimizer=(SGD, SGD)),
        TypeError,
        "optimizer rule tuple optax.chain",
    ),
    (
        "optimizer_class",
        regression(optimizer=optax.GradientTransformation, learning_rate=0.1),
        TypeError,
        "optimizer GradientTransformation instance",
    ),
    (
        "rule_with_rate",
        regression(optimizer=optax.adam(1e-3), learning_rate=0.25),
        ValueError,
        "learning_rate 0.25 ready~rule optimizer=optax.adam leave",
    ),
    (
        "rule_with_hyperparams",
        regression(optimizer=optax.adam(1e-3), hyperparams={"b1": 0.9}),
        ValueError,
        "hyperparams {'b1':~0.9} ready~rule optimizer=optax.adam leave",
    ),
    (
        "factory_without_rate",
        regression(optimizer=optax.adam),
        ValueError,
        "learning_rate missing adam 'learning_rate' pass",
    ),
    (
        "factory_unknown",
        regression(
            optimizer=optax.adam, learning_rate=0.1, hyperparams={"beta1": 0.95}
        ),
        ValueError,
        "hyperparams 'beta1' adam takes b1",
    ),
    (
        "factory_misses_one",
        regression(optimizer=needs_two, learning_rate=0.1),
        ValueError,
        "hyperparams needs_two 'decay' pass",
    ),
    (
        "factory_takes_none",
        regression(optimizer=lambda: SGD, learning_rate=0.1),
        ValueError,
        "learning_rate lambda no~argument leave",
    ),
    (
        "factory_returns_none",
        regression(optimizer=lambda rate: None, learning_rate=0.1),
        TypeError,
        "optimizer rule lambda None return~what~an~optax~factory~returns",
    ),
    (
        "factory_returns_factory",
        regression(optimizer=lambda rate: optax.adam, learning_rate=0.1),
        TypeError,
        "optimizer rule lambda adam return~what~an~optax~factory~returns",
    ),
    (
        "factory_branches_on_rate",
        regression(optimizer=needs_the_number, learning_rate=0.1),
        TypeError,
        "optimizer factory needs_the_number value data TracerBool ready~rule",
    ),
    (
        "factory_without_schedules",
        regression(optimizer=optax.sm3, learning_rate=optax.linear_schedule(0.1, 0, 9)),
        TypeError,
        "optimizer sm3 TypeError 'function' learning_rate number schedule",
    ),
    (
        "rule_without_schedules",
        regression(
            optimizer=optax.polyak_sgd, learning_rate=optax.linear_schedule(0.1, 0, 9)
        ),
        TypeError,
        "optimizer update polyak_sgd TypeError 'function' learning_rate number",
    ),
    # rules that do not fit the loop
    (
        "rule_lookahead",
        regression(optimizer=optax.lookahead(SGD, 5, 0.5)),
        TypeError,
        "optimizer optax.lookahead two~sets pass fast",
    ),
    (
        "rule_lookahead_params",
        plain(
            lambda p: bowl(p.fast),
            optax.LookaheadParams.init_synced(START),
            optimizer=optax.lookahead(SGD, 5, 0.5),
        ),
        TypeError,
        "optimizer optax.lookahead two~sets pass fast",
    ),
    (
        "rule_per_row_gradients",
        regression(
            optimizer=optax.contrib.differentially_private_aggregate(1.0, 0.1, key=0),
            batch_size=4,
        ),
        TypeError,
        "optimizer gradient~of~each~row mean noisy_sgd",
    ),
    (
        "rule_wants_more",
        regression(optimizer=own_rule(lambda u, s, p=None, *, hvp: (u, s))),
        TypeError,
        "optimizer update TypeError 'hvp' value,~grad~and~value_fn let",
    ),
    (
        "rule_takes_less",
        regression(
            optimizer=optax.chain(
                optax.clip(1.0), optax.contrib.sam(SGD, optax.sgd(0.05))
            )
        ),
        TypeError,
        "optimizer update chain TypeError 'value' value,~grad~and~value_fn let",
    ),
    (
        "rule_wants_a_matrix",
        plain(lambda x: x**2, np.float32(1), optimizer=optax.sm3(0.1)),
        ValueError,
        "optimizer update chain IndexError range shapes",
    ),
    (
        "rule_searches_in_a_part",
        plain(
            lambda p: bowl(p["w"]) + bowl(p["b"]),
            PAIR,
            optimizer=optax.masked(
                optax.chain(SGD, SEARCH), mask={"w": True, "b": False}
            ),
        ),
        ValueError,
        "optimizer update masked ValueError pytree value_fn shapes",
    ),
    (
        "rule_updates_shape",
        regression(optimizer=own_rule(lambda u, s, p=None, **_: (u[:1], s))),
        ValueError,
        "optimizer updates [1] [3] keep",
    ),
    (
        "rule_updates_tree",
        regression(optimizer=own_rule(lambda u, s, p=None, **_: ([u], s))),
        ValueError,
        "optimizer updates [[3]] [3] keep",
    ),
    (
        "rule_state_grows",
        regression(
            optimizer=optax.chain(optax.monitor({"norm": optax.tree.norm}), SGD)
        ),
        ValueError,
        "optimizer state MonitorState measurements={norm:~[]} measurements={} keep",
    ),
    (
        "rule_state_of_text",
        regression(optimizer=own_rule(lambda u, s, p=None, **_: (u, s), ("name",))),
        TypeError,
        "optimizer state[0] 'name' str arrays leave",
    ),
    (
        "two_averages",
        regression(optimizer=optax.chain(FREE, FREE)),
        ValueError,
        "optimizer evaluation ScheduleFreeState~and~ScheduleFreeState keep partition",
    ),
    (
        "average_scaled",
        regression(optimizer=optax.contrib.mechanize(FREE)),
        ValueError,
        "optimizer evaluation mechanize ScheduleFreeState use",
    ),
    (
        "average_flattened",
        plain(
            lambda p: bowl(p["w"]) + bowl(p["b"]), PAIR, optimizer=optax.flatten(FREE)
        ),
        ValueError,
        "optimizer ScheduleFreeState form~of~the~parameters wrapper put",
    ),
    (
        "average_split",
        plain(
            params=START + 0j,
            optimizer=optax.contrib.split_real_and_imaginary(FREE),
        ),
        ValueError,
        "optimizer ScheduleFreeState form~of~the~parameters wrapper put",
    ),
    # hyperparams
    (
        "hyper_list",
        regression(optimizer=optax.adam, learning_rate=0.1, hyperparams=[0.9]),
        TypeError,
        "hyperparams dict [0.9] pass",
    ),
    (
        "hyper_number_key",
        regression(optimizer=optax.adam, learning_rate=0.1, hyperparams={1: 0.9}),
        TypeError,
        "hyperparams names 1 str",
    ),
    (
        "hyper_rate",
        regression(optimizer=optax.adam, hyperparams={"learning_rate": 0.9}),
        ValueError,
        "hyperparams 'learning_rate' 0.9 learning_rate=",
    ),
    (
        "hyper_nan",
        regression(optimizer=optax.adam, learning_rate=0.1, hyperparams={"b1": np.nan}),
        ValueError,
        "hyperparams['b1'] NaN nan pass",
    ),
    (
        "hyper_object",
        regression(
            optimizer=optax.adam, learning_rate=0.1, hyperparams={"b1": np.array(None)}
        ),
        TypeError,
        "hyperparams['b1'] numbers object encode",
    ),
    (
        "hyper_no_factory",
        regression(learning_rate=0.1, hyperparams={"b1": 0.9}),
        ValueError,
        "hyperparams 'b1' factory optimizer=optax.adam",
    ),
    # limits
    (
        "both_limits",
        regression(max_steps=10, epochs=3),
        ValueError,
        "max_steps epochs 10 3 one",
    ),
    (
        "steps_negative",
        regression(max_steps=-1),
        ValueError,
        "max_steps at~least~0 -1 pass",
    ),
    ("steps_fraction", regression(max_steps=2.5), TypeError, "max_steps whole 2.5 int"),
    ("steps_float", regression(max_steps=1e3), TypeError, "max_steps whole 1000.0 int"),
    ("steps_true", regression(max_steps=True), TypeError, "max_steps whole True int"),
    ("steps_str", regression(max_steps="10"), TypeError, "max_steps whole '10' int"),
    (
        "steps_huge",
        regression(max_steps=2**31),
        ValueError,
        "max_steps at~most 2147483648 smaller",
    ),
    (
        "steps_traced_exactly",
        traced("max_steps", 10, stop=None),
        TypeError,
        "max_steps stop=None traced static",
    ),
    (
        "steps_traced_float",
        traced("max_steps", 10.0),
        TypeError,
        "max_steps whole float32 int",
    ),
    (
        "steps_traced_vector",
        traced("max_steps", np.array([1, 2])),
        ValueError,
        "max_steps scalar (2,) vmap",
    ),
    ("epochs_negative", regression(epochs=-1), ValueError, "epochs >=~0 -1 pass"),
    ("epochs_nan", regression(epochs=np.nan), ValueError, "epochs finite nan pass"),
    ("epochs_inf", regression(epochs=np.inf), ValueError, "epochs finite inf pass"),
    ("epochs_true", regression(epochs=True), TypeError, "epochs number True pass"),
    ("epochs_str", regression(epochs="10"), TypeError, "epochs number '10' pass"),
    (
        "epochs_list",
        regression(epochs=[[1], [1, 2]]),
        TypeError,
        "epochs number [[1],~[1,~2]] pass",
    ),
    (
        "epochs_vector",
        regression(epochs=np.ones(2)),
        ValueError,
        "epochs scalar (2,) vmap",
    ),
    (
        "epochs_too_many",
        regression(epochs=1e9, batch_size=1),
        ValueError,
        "epochs 1000000000.0 8000000000 fewer",
    ),
    ("epochs_no_data", plain(epochs=3), ValueError, "epochs needs~data 3 max_steps"),
    (
        "epochs_traced_exactly",
        traced("epochs", 2.0, stop=None),
        TypeError,
        "epochs stop=None traced static",
    ),
    (
        "epochs_traced_vector",
        traced("epochs", np.ones(2)),
        ValueError,
        "epochs scalar (2,) vmap",
    ),
    # stop
    (
        "stop_unknown",
        regression(stop="never"),
        ValueError,
        "stop 'never' auto None gradient_norm",
    ),
    ("stop_number", regression(stop=1e-6), TypeError, "stop 1e-06 gradient_norm(atol"),
    ("stop_true", regression(stop=True), TypeError, "stop True gradient_norm(atol"),
    (
        "stop_function",
        regression(stop=lambda check: True),
        TypeError,
        "stop lambda jaxgd.StopRule",
    ),
    (
        "stop_class",
        regression(stop=jaxgd.StopRule),
        TypeError,
        "stop StopRule call gradient_norm(atol",
    ),
    (
        "stop_uncalled",
        regression(stop=jaxgd.gradient_norm),
        TypeError,
        "stop gradient_norm call gradient_norm(atol",
    ),
    (
        "stop_list",
        regression(stop=[jaxgd.gradient_norm(1e-6)]),
        TypeError,
        "stop list gradient_norm(atol jaxgd.any_of",
    ),
    (
        "own_init",
        regression(stop=jaxgd.StopRule(None, lambda m, c: (m, True), 1)),
        TypeError,
        "stop init None function pass",
    ),
    (
        "own_update",
        regression(stop=jaxgd.StopRule(lambda c: (), 3, 1)),
        TypeError,
        "stop update 3 function pass",
    ),
    (
        "own_status",
        regression(stop=jaxgd.StopRule(lambda c: (), lambda m, c: (m, True), "done")),
        TypeError,
        "stop status 'done' jaxgd.Status pass",
    ),
    (
        "own_no_pair",
        regression(
            stop=jaxgd.StopRule(lambda c: (), lambda m, c: c.grad_norm < 1, 1),
        ),
        TypeError,
        "stop update (memory,~holds) bool[] return",
    ),
    (
        "own_verdict",
        regression(
            stop=jaxgd.StopRule(lambda c: (), lambda m, c: (m, jnp.ones(3) > 0), 1),
        ),
        ValueError,
        "stop update bool~scalar bool[3] return",
    ),
    (
        "own_memory",
        regression(
            stop=jaxgd.StopRule(lambda c: (), lambda m, c: ((1, 2), True), 1),
        ),
        ValueError,
        "stop update memory init return",
    ),
    (
        "own_within_any_of",
        regression(
            stop=jaxgd.any_of(
                jaxgd.gradient_norm(1e-6),
                jaxgd.StopRule(lambda c: (), lambda m, c: (m, c.grad_norm), 1),
            )
        ),
        TypeError,
        "stop update bool~scalar float32[] return",
    ),
    (
        "own_running",
        regression(stop=jaxgd.StopRule(tuple, max, jaxgd.Status.RUNNING)),
        TypeError,
        "stop status RUNNING jaxgd.Status pass",
    ),
    # key, state, flags
    ("key_float", regression(key=0.5), TypeError, "key seed 0.5 jax.random.key"),
    ("key_str", regression(key="0"), TypeError, "key seed '0' jax.random.key"),
    ("key_true", regression(key=True), TypeError, "key seed True jax.random.key"),
    (
        "key_negative",
        regression(key=-1),
        ValueError,
        "key seed -1 0~<=~seed~<~2**32 pass",
    ),
    ("key_huge", regression(key=2**40), ValueError, "key seed 1099511627776 pass"),
    ("keys", regression(key=NEW_KEYS), ValueError, "key single (3,) vmap"),
    ("keys_legacy", regression(key=OLD_KEYS), ValueError, "key single (3,~2) vmap"),
    (
        "key_with_state",
        regression(key=7, state=BATCH),
        ValueError,
        "key state 7 leave",
    ),
    ("state_str", regression(state="run.npz"), TypeError, "state Result.state str"),
    (
        "state_before_the_start",
        regression(state=replace(BATCH, step=np.int32(-3))),
        ValueError,
        "state.step at~least~0 -3 pass",
    ),
    (
        "state_result",
        regression(state=RESULT),
        TypeError,
        "state Result.state Result pass",
    ),
    (
        "state_params",
        regression(state=START),
        TypeError,
        "state Result.state ndarray pass",
    ),
    (
        "state_manual",
        regression(state=MANUAL),
        TypeError,
        "state Result.state make_step pass",
    ),
    (
        "state_of_other_params",
        regression(state=WIDER),
        ValueError,
        "state.params float32[5] float32[3] go~on",
    ),
    (
        "state_of_other_tree",
        regression(
            fun=lambda p, batch: loss(p["w"], batch), params={"w": START}, state=BATCH
        ),
        ValueError,
        "state.params 'w' go~on",
    ),
    (
        "state_of_other_rule",
        regression(state=ADAM),
        ValueError,
        "state.opt_state ScaleByAdamState go~on",
    ),
    (
        "state_of_batch_run",
        regression(state=BATCH, batch_size=4),
        ValueError,
        "state.run.checks 0 1000 batch_size",
    ),
    (
        "state_of_minibatch_run",
        regression(state=MINI),
        ValueError,
        "state.run.checks 1000 0 batch_size",
    ),
    (
        "state_of_other_history",
        regression(state=FEWER),
        ValueError,
        "state.run.history 10 1000 history_rows",
    ),
    (
        "state_of_lanes",
        regression(state=LANES),
        ValueError,
        "state one~run (2,) result[i].state",
    ),
    ("has_aux_1", regression(has_aux=1), TypeError, "has_aux True~or~False 1 bool"),
    (
        "with_key_str",
        regression(with_key="yes"),
        TypeError,
        "with_key True~or~False 'yes' bool",
    ),
    (
        "final_none",
        regression(final_evaluation=None),
        TypeError,
        "final_evaluation True~or~False None bool",
    ),
    # stop rules
    (
        "no_tolerance",
        jaxgd.gradient_norm,
        ValueError,
        "gradient_norm atol rtol pass",
    ),
    (
        "tolerance_negative",
        partial(jaxgd.gradient_norm, -1e-6),
        ValueError,
        "gradient_norm atol >=~0 -1e-06 pass",
    ),
    (
        "tolerance_nan",
        partial(jaxgd.gradient_norm, rtol=np.nan),
        ValueError,
        "gradient_norm rtol nan pass",
    ),
    (
        "tolerance_str",
        partial(jaxgd.value_change, "small"),
        TypeError,
        "value_change rtol 'small' pass",
    ),
    (
        "tolerance_true",
        partial(jaxgd.value_change, True),
        TypeError,
        "value_change rtol True pass",
    ),
    (
        "tolerance_vector",
        partial(jaxgd.params_change, np.ones(2)),
        ValueError,
        "params_change rtol scalar (2,) pass",
    ),
    (
        "tolerance_ragged",
        partial(jaxgd.params_change, [[1], [1, 2]]),
        TypeError,
        "params_change rtol [[1],~[1,~2]] pass",
    ),
    (
        "patience_0",
        partial(jaxgd.value_change, 1e-3, patience=0),
        ValueError,
        "value_change patience at~least~1 0 pass",
    ),
    (
        "patience_fraction",
        partial(jaxgd.params_change, 1e-3, patience=1.5),
        TypeError,
        "params_change patience whole 1.5 pass",
    ),
    (
        "patience_0d_float",
        partial(jaxgd.params_change, 1e-3, patience=np.array(1.5)),
        TypeError,
        "params_change patience whole 1.5 pass",
    ),
    (
        "target_none",
        partial(jaxgd.target_value, None),
        TypeError,
        "target_value value None pass",
    ),
    (
        "target_nan",
        partial(jaxgd.target_value, np.nan),
        ValueError,
        "target_value value nan pass",
    ),
    ("any_of_none", jaxgd.any_of, ValueError, "any_of at~least~one none pass"),
    (
        "all_of_number",
        partial(jaxgd.all_of, jaxgd.gradient_norm(1e-6), 1e-3),
        TypeError,
        "all_of 0.001 argument~1 pass",
    ),
    (
        "any_of_list",
        partial(jaxgd.any_of, [jaxgd.gradient_norm(1e-6)]),
        TypeError,
        "any_of list argument~0 pass",
    ),
    # the rows of a step
    (
        "rows_n_0",
        partial(jaxgd.shuffled_rows, 0, 0, 0, 0),
        ValueError,
        "n at~least~1 0 pass",
    ),
    (
        "rows_n_float",
        partial(jaxgd.shuffled_rows, 0, 5.0, 0, 0),
        TypeError,
        "n int 5.0 pass",
    ),
    (
        "rows_epoch",
        partial(jaxgd.shuffled_rows, 0, 5, 0.5, 0),
        TypeError,
        "epoch integers 0.5 int",
    ),
    (
        "rows_index",
        partial(jaxgd.shuffled_rows, 0, 5, 0, np.ones(2)),
        TypeError,
        "index integers array([1.,~1.]) int",
    ),
    (
        "rows_index_str",
        partial(jaxgd.shuffled_rows, 0, 5, 0, "all"),
        TypeError,
        "index integers 'all' int",
    ),
    (
        "rows_index_past_n",
        partial(jaxgd.shuffled_rows, 0, 5, 0, np.array([0, 5])),
        ValueError,
        "index n~=~5 5 pass",
    ),
    (
        "rows_shapes",
        partial(jaxgd.shuffled_rows, 0, 5, np.arange(2), np.arange(3)),
        ValueError,
        "epoch index (2,) (3,) broadcast",
    ),
    (
        "rows_key",
        partial(jaxgd.shuffled_rows, 0.5, 5, 0, 0),
        TypeError,
        "key seed 0.5 jax.random.key",
    ),
    (
        "rows_batch_above_n",
        partial(jaxgd.batch_rows, 0, 5, 6, 0),
        ValueError,
        "batch_size at~most n~=~5 6 smaller",
    ),
    (
        "rows_batch_true",
        partial(jaxgd.batch_rows, 0, 5, True, 0),
        TypeError,
        "batch_size int True pass",
    ),
    (
        "rows_step",
        partial(jaxgd.batch_rows, 0, 5, 2, 1.5),
        TypeError,
        "step integers 1.5 int",
    ),
    (
        "rows_strata",
        partial(jaxgd.batch_rows, 0, 6, 4, 0, 3),
        ValueError,
        "strata divide batch_size 3 divisor~of~2",
    ),
    # the manual loop
    (
        "init_int",
        partial(jaxgd.init_state, np.arange(3), SGD),
        TypeError,
        "params floating int64 convert",
    ),
    (
        "init_none",
        partial(jaxgd.init_state, None, SGD),
        ValueError,
        "params None at~least~one pass",
    ),
    (
        "init_factory",
        partial(jaxgd.init_state, START, optax.adam),
        TypeError,
        "optimizer rule adam call",
    ),
    (
        "step_fun",
        partial(jaxgd.make_step, "loss", SGD),
        TypeError,
        "fun 'loss' function pass",
    ),
    (
        "step_swapped",
        partial(jaxgd.make_step, SGD, loss),
        TypeError,
        "fun GradientTransformation function pass",
    ),
    (
        "step_factory",
        partial(jaxgd.make_step, loss, optax.sgd),
        TypeError,
        "optimizer rule sgd call",
    ),
    (
        "step_args",
        partial(jaxgd.make_step, loss, SGD, args=np.ones(2)),
        TypeError,
        "args tuple array([1.,~1.]) args=(x,)",
    ),
    (
        "step_aux",
        partial(jaxgd.make_step, loss, SGD, has_aux=1),
        TypeError,
        "has_aux True~or~False 1 bool",
    ),
    (
        "step_micro",
        partial(jaxgd.make_step, loss, SGD, microbatch_size=0),
        ValueError,
        "microbatch_size at~least~1 0 pass",
    ),
]


@pytest.mark.parametrize(
    ("call", "kind", "fragments"),
    [pytest.param(*row[1:], id=row[0]) for row in REFUSED],
)
def test_refused(call, kind, fragments, request):
    jax.clear_caches()  # so that even jax.random.key(0) would be compiled anew
    if "state_of_other" in request.node.name:  # is compared when the key is there
        as_key(0)
    before = len(compilations)
    with pytest.raises(kind) as caught:
        call()
    assert len(compilations) == before, "compiled before it was refused"
    assert type(caught.value) is kind
    message = str(caught.value)
    missing = [f for f in fragments.split() if f.replace("~", " ") not in message]
    assert not missing, f"{missing} not in: {message}"
    assert len(message) < 400
    assert "\n" not in message
    assert message.endswith(".")


class OwnError(TypeError):
    pass


def broken(*_, **__):
    raise OwnError("mine")


@pytest.mark.parametrize(
    "call",
    [
        plain(broken),
        plain(with_key=True, fun=broken),
        regression(learning_rate=broken),
        regression(optimizer=broken, learning_rate=0.1),
        regression(optimizer=optax.GradientTransformation(broken, broken)),
        regression(stop=jaxgd.StopRule(broken, broken, 1)),
        regression(stop=jaxgd.StopRule(lambda check: (), broken, 1)),
    ],
    ids=["fun", "keyed_fun", "schedule", "factory", "rule", "stop_init", "stop_update"],
)
def test_users_own_errors_come_through(call):
    with pytest.raises(OwnError) as caught:
        call()
    assert caught.value.args == ("mine",)


def noisy(x, *, key):
    return bowl(x - 0.01 * jax.random.normal(key, x.shape))


def own_update(memory, check):
    return memory + 1, memory >= 3


# id, call: easy to refuse by mistake
ACCEPTED = [
    ("batch_np_int64", regression(batch_size=np.int64(4))),
    ("batch_np_0d", regression(batch_size=np.array(4))),
    ("batch_jnp_0d", regression(batch_size=jnp.int32(4))),
    ("batch_n", regression(batch_size=N)),
    ("batch_straddles", regression(batch_size=5)),
    ("micro_above_batch", regression(batch_size=4, microbatch_size=100)),
    ("strata_np", regression(batch_size=np.int32(4), strata=np.int64(2))),
    ("rate_np_float32", regression(learning_rate=np.float32(0.1))),
    ("rate_np_float64", regression(learning_rate=np.float64(0.1))),
    ("rate_np_0d", regression(learning_rate=np.array(0.1))),
    ("rate_jnp_0d", regression(learning_rate=jnp.asarray(0.1))),
    ("rate_bfloat16", regression(learning_rate=jnp.bfloat16(0.1))),
    ("rate_int", regression(learning_rate=1, max_steps=3)),
    ("rate_jnp_int", regression(learning_rate=jnp.asarray(1), max_steps=3)),
    ("rate_0", regression(learning_rate=0, max_steps=3)),
    ("rate_traced", traced("learning_rate", np.float32(0.1))),
    ("schedule", regression(learning_rate=optax.cosine_decay_schedule(0.1, 10))),
    ("schedule_constant", regression(learning_rate=lambda step: 0.1)),
    ("schedule_int", regression(learning_rate=lambda step: 1 // (step + 1))),
    (
        "schedule_partial",
        regression(
            learning_rate=jax.tree_util.Partial(
                lambda r, step: r / (step + 1.0), jnp.float32(0.1)
            )
        ),
    ),
    ("params_float", plain(params=3.0)),
    ("params_0d", plain(params=np.float32(3))),
    ("params_lists", plain(lambda p: sum(map(bowl, p)), [ONES, np.ones(2), 1.0])),
    (
        "params_with_none",
        plain(lambda p: bowl(p["w"]), {"w": ONES, "b": None}),
    ),
    (
        "params_with_empty",
        plain(lambda p: bowl(p["w"]), {"w": ONES, "b": np.zeros(0, np.float32)}),
    ),
    ("params_complex", plain(params=np.ones(2, np.complex64))),
    ("params_float64", plain(params=np.ones(2))),
    ("params_bfloat16", plain(params=jnp.ones(2, jnp.bfloat16))),
    ("params_float16", plain(params=np.ones(2, np.float16))),
    ("params_fortran", plain(params=np.asfortranarray(np.ones((2, 3), np.float32)))),
    (
        "params_read_only",
        plain(params=np.broadcast_to(np.float32(1), (3,))),
    ),
    (
        "data_bool",
        regression(
            fun=lambda p, mask: jnp.mean(jnp.where(mask, bowl(p), 0)), data=X[:, 0] > 0
        ),
    ),
    (
        "data_int_and_none",
        regression(
            fun=lambda p, b: jnp.mean((b["i"] - p[0]) ** 2),
            data={"i": np.arange(N, dtype=np.int64) % 3, "weights": None},
            batch_size=2,
        ),
    ),
    (
        "data_of_one_row",
        regression(data=(X[:1], Y[:1]), batch_size=1, epochs=3),
    ),
    (
        "data_of_keys",
        regression(
            fun=lambda p, keys: jnp.mean(jax.vmap(jax.random.normal)(keys) * bowl(p)),
            data=NEW_KEYS,
            max_steps=3,
        ),
    ),
    ("args_list", plain(lambda x, a: a * bowl(x), args=[0.5])),
    (
        "args_mixed",
        plain(
            lambda x, a, b: bowl(x - a["t"]) + b[0],
            args=({"t": np.ones(3), "none": None}, (3, True)),
        ),
    ),
    (
        "args_of_key",
        plain(lambda x, k: bowl(x - jax.random.normal(k)), args=(NEW_KEYS[0],)),
    ),
    ("steps_np_int32", regression(max_steps=np.int32(5))),
    ("steps_jnp", regression(max_steps=jnp.asarray(5))),
    ("steps_0", regression(max_steps=0)),
    ("steps_all_an_int_holds", regression(max_steps=2**31 - 1)),
    ("steps_traced", traced("max_steps", 5)),
    ("steps_exactly", regression(max_steps=np.int64(5), stop=None)),
    ("epochs_half", regression(epochs=0.5, batch_size=2)),
    ("epochs_np_float64", regression(epochs=np.float64(1.5), batch_size=2)),
    ("epochs_jnp", regression(epochs=jnp.asarray(2), batch_size=2)),
    ("epochs_0", regression(epochs=0, batch_size=2)),
    ("epochs_traced", traced("epochs", np.float32(1.5), batch_size=2)),
    ("key_new", regression(key=NEW_KEYS[1], batch_size=2)),
    ("key_legacy", regression(key=OLD_KEYS[1], batch_size=2)),
    ("key_np_seed", regression(key=np.uint32(2**32 - 1), batch_size=2)),
    ("key_jnp_seed", regression(key=jnp.asarray(3), batch_size=2)),
    ("key_traced_seed", traced("key", 3, batch_size=2)),
    ("flags_np", regression(final_evaluation=np.bool_(False), batch_size=2)),
    ("history_0", regression(history_rows=np.int64(0))),
    ("factory_default_rate", regression(optimizer=optax.lbfgs, max_steps=3)),
    ("factory_no_argument", regression(optimizer=lambda: SGD)),
    ("factory_of_any", regression(optimizer=lambda *a, **k: SGD, learning_rate=0.1)),
    (
        "factory_partial",
        regression(optimizer=partial(optax.adam, b1=0.8), learning_rate=0.1),
    ),
    (
        "hyperparams_np_jnp",
        regression(
            optimizer=optax.adam,
            learning_rate=0.1,
            hyperparams={"b1": np.float32(0.8), "b2": jnp.asarray(0.99), "eps": 1e-6},
        ),
    ),
    (
        "hyperparams_structure",
        regression(
            optimizer=optax.adam,
            learning_rate=0.1,
            hyperparams={"nesterov": np.bool_(True), "mu_dtype": "float32"},
        ),
    ),
    (
        "hyperparams_empty",
        regression(optimizer=optax.adam(0.1), hyperparams={}),
    ),
    (
        "hyperparams_mask",
        regression(
            optimizer=optax.adamw,
            learning_rate=0.1,
            hyperparams={"mask": lambda p: jax.tree.map(lambda x: x.ndim > 0, p)},
        ),
    ),
    (
        "hyperparams_needed",
        regression(
            optimizer=needs_two,
            learning_rate=0.1,
            hyperparams={"decay": 0.1},
            max_steps=3,
        ),
    ),
    ("chain", regression(optimizer=optax.chain(optax.clip(1.0), SGD))),
    ("optimizer_int_rate", regression(optimizer=optax.sgd, learning_rate=0)),
    ("stop_own", regression(stop=jaxgd.StopRule(lambda c: 0, own_update, 1))),
    (
        "stop_own_within_all_of",
        regression(
            stop=jaxgd.all_of(
                jaxgd.StopRule(lambda c: jnp.int32(0), own_update, 1),
                jaxgd.any_of(jaxgd.target_value(-1), jaxgd.value_change(np.float32(1))),
            )
        ),
    ),
    (
        "stop_patience_np",
        regression(stop=jaxgd.value_change(1e-3, patience=np.int64(2))),
    ),
    ("stop_tolerance_jnp", regression(stop=jaxgd.gradient_norm(jnp.asarray(1e-3)))),
    ("stop_target_inf", regression(stop=jaxgd.target_value(-np.inf), max_steps=3)),
    ("fun_partial", regression(fun=partial(lambda s, p, b: s * loss(p, b), 0.5))),
    (
        "fun_pytree",
        regression(
            fun=jax.tree_util.Partial(lambda s, p, b: s * loss(p, b), jnp.float32(0.5))
        ),
    ),
    ("fun_jitted", regression(fun=jax.jit(loss))),
    ("fun_method", regression(fun=Callable(0.5).method)),
    ("fun_unhashable", regression(fun=Callable(0.5))),
    ("fun_of_any", plain(lambda *args: bowl(args[0]))),
    (
        "fun_defaults",
        plain(lambda x, weight=0.5, *, power=2: weight * bowl(x) ** power),
    ),
    ("fun_constant", plain(lambda x: 1.0, max_steps=3)),
    ("fun_keyed", plain(noisy, with_key=True, max_steps=5)),
    ("fun_aux", regression(fun=with_aux, has_aux=True)),
    ("fun_aux_none", plain(lambda x: (bowl(x), None), has_aux=True)),
    ("state", regression(state=BATCH, max_steps=3)),
    ("state_other_stop", regression(state=BATCH, stop=jaxgd.target_value(0.1))),
]


@pytest.fixture
def quick_compiler():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.thin(8)
@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("call", [pytest.param(row[1], id=row[0]) for row in ACCEPTED])
def test_accepted(call):
    result = call()
    params = getattr(result, "params", result)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    if params is not result:
        assert isinstance(result, jaxgd.Result)
        assert result.status != jaxgd.Status.NON_FINITE


def test_at_least_45_kinds():
    names = [row[0] for row in REFUSED]
    assert len(set(names)) == len(names) >= 45
