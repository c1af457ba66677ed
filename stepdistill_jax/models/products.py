"""Precision of products, and the product of activations and a kernel."""

import functools

import jax
import jax.numpy as jnp


def precision_of(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """Returns the precision of a product whose factors are of `dtype`.

    By default a TPU multiplies float32 numbers rounded to bfloat16, and a GPU rounds them to TF32.
    Here float32 means float32; bfloat16 factors are exact by default.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def kernel_product(x: jax.Array, kernel: jax.Array, float32_sums: bool = False) -> jax.Array:
    """Returns x [..., in] times kernel [in, out], a product of two matrices in the dtype of x.

    Batch and length become one axis: with more dimensions, XLA's CPU backend transposes before it
    multiplies, and the kernel's gradient takes 1.7 times as long.

    JAX's own gradient of a float32 kernel that is cast to bfloat16 is a bfloat16 product, so devices
    would sum rounded values. Here the product itself gives float32, so one device and eight agree to
    float32 precision.

    Args:
        x: activations.
        kernel: in any dtype; cast to the dtype of x before devices gather it.
        float32_sums: whether the output is float32; else it has the dtype of x.
    """
    dtype = jnp.float32 if float32_sums else x.dtype
    rows = x.reshape(-1, x.shape[-1])
    y = _matmul(rows, kernel.astype(x.dtype), ((1,), (0,)), dtype)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


def _forward(x, kernel, float32_sums):
    # the plain function, since a policy of `jax.checkpoint` keeps the products that it sees
    y = kernel_product.fun(x.value, kernel.value, float32_sums)
    # an argument without a gradient, such as a frozen kernel, costs no product. A dict's keys say which
    # ones have it, since a flag would become an array
    wanted = {name: () for name, of in (("x", x), ("kernel", kernel)) if of.perturbed}
    return y, (x.value, kernel.value, wanted)


def _backward(float32_sums, kept, slope):
    x, kernel, wanted = kept
    x_grad = kernel_grad = None
    if isinstance(slope, jax.custom_derivatives.SymbolicZero):
        return x_grad, kernel_grad
    slopes = slope.reshape(-1, slope.shape[-1]).astype(x.dtype)
    if "x" in wanted:
        x_grad = _matmul(slopes, kernel.astype(x.dtype), ((1,), (1,)), x.dtype)
        x_grad = x_grad.reshape(x.shape)
    if "kernel" in wanted:
        rows = x.reshape(-1, x.shape[-1])
        kernel_grad = _matmul(rows, slopes, ((0,), (0,)), kernel.dtype)
    return x_grad, kernel_grad


kernel_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _matmul(x, y, contracting, dtype):
    return jax.lax.dot_general(
        x, y, (contracting, ((), ())), precision_of(x.dtype), preferred_element_type=dtype
    )
