"""Contract: what belongs to parameters goes where they are, all else to all devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgd._devices.layout import Places, pinned


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((4,), P("rows")),
        ((3, 4), P(None, "rows")),  # pairs of L-BFGS
        ((3, 2, 4), P(None, None, "rows")),  # those of complex parameters
        ((4, 3), P()),
        ((4, 1, 3, 4), P()),
        ((), P()),
    ],
)
def test_the_memory_of_a_rule_is_where_its_parameters_are(shape, spec):
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))
    places = Places(mesh, (NamedSharding(mesh, P("rows")),), ((4,),))
    params = jnp.zeros(4)
    jaxpr = jax.make_jaxpr(lambda x: pinned(places, x, params))(jnp.zeros(shape))
    assert jaxpr.eqns[-1].params["sharding"].spec == spec
