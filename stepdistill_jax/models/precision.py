"""How exactly the products of each type of number are computed."""

import jax
import jax.numpy as jnp


def precision_of(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """Returns the precision of a product whose factors are of `dtype`.

    By default a TPU multiplies float32 numbers rounded to bfloat16, and a GPU rounds them to TF32.
    float32 means float32 here; bfloat16 factors are exact by default.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
