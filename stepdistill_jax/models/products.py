"""Precision of matmuls, and the matmul of activations with a kernel."""

import functools

import jax
import jax.numpy as jnp


def precision_of(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """Returns the precision for a matmul whose factors have this type.

    It is `HIGHEST` for float32, which a TPU would otherwise round to bfloat16, and a GPU to TF32.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def kernel_product(x: jax.Array, kernel: jax.Array, float32_sums: bool = False) -> jax.Array:
    """Returns x [..., in] times kernel [in, out], computed in the dtype of x.

    Args:
        kernel: of any dtype. Its gradient has the dtype of the kernel.
        float32_sums: whether the output is float32. Otherwise it has the dtype of x.
    """
    # Batch and length become one axis, since XLA's CPU backend would transpose an array with more axes. The kernel
    # is cast before devices gather it. Its gradient has its dtype, so devices add up no parts rounded to bfloat16.
    dtype = jnp.float32 if float32_sums else x.dtype
    rows = x.reshape(-1, x.shape[-1])
    y = _matmul(rows, kernel.astype(x.dtype), ((1,), (0,)), dtype)
    return y.reshape(*x.shape[:-1], *kernel.shape[1:])


def _forward(x, kernel, float32_sums):
    # calls the undecorated function, since a policy of `jax.checkpoint` can only save matmuls that it sees
    y = kernel_product.fun(x.value, kernel.value, float32_sums)  # type: ignore[union-attr]  # custom_vjp has it
    # An argument that needs no gradient, such as a frozen kernel, costs no matmul in the backward pass. The
    # keys of a dict record which arguments need a gradient, since a bool would become an array.
    wanted = {name: () for name, of in (("x", x), ("kernel", kernel)) if of.perturbed}
    return y, (x.value, kernel.value, wanted)


def _backward(float32_sums, kept, slope):
    x, kernel, wanted = kept
    x_grad = kernel_grad = None
    if isinstance(slope, jax.custom_derivatives.SymbolicZero):
        return x_grad, kernel_grad
    # `slope` is dy, the gradient of the output. y = x W:  dx = dy W^T and dW = x^T dy, here over
    # rows = batch x length
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
