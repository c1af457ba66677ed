"""Cross-entropy over a large vocabulary, with the logits of only one chunk of tokens at a time.

The forward pass also computes the gradient, as in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989).
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stepdistill_jax.models.attention import softcapped
from stepdistill_jax.models.products import precision_of
from stepdistill_jax.models.sharding import BATCH_AXES, traced_platform

# Tokens of a chunk on one device. With fewer, the matmuls are small. With more, the logits do not fit into
# a CPU's cache, or into a TPU's vector memory (where libtpu keeps the logits of 512 tokens).
CHUNK_TOKENS, GPU_CHUNK_TOKENS = 512, 2048


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    states: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    scale: jax.Array,
    softcap: float | None = None,
    tied: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the scaled loss of all tokens, and the loss and correctness of each token.

    Let logits = states @ kernel. A token adds scale x (-log softmax(logits)[target]) to the scaled loss.

    Args:
        states: the decoder's states, [batch, length, embed]. Matmuls are computed in their dtype.
        kernel: weights of the output layer, [embed, vocab], or [vocab, embed] if `tied`.
        targets: target ids, [batch, length] int32.
        scale: factor of each token, [batch, length] float32, without a gradient.
        softcap: a logit x becomes softcap x tanh(x / softcap); None leaves logits unchanged.
        tied: whether `kernel` is the embedding itself.

    Returns:
        The scaled loss, a float32 scalar; only this output has a gradient.
        The negative log probabilities of the targets in nats, [batch, length] float32.
        1 where no id is likelier than the target, otherwise 0, [batch, length] float32.
    """
    nll, correct, _, _ = _on_own_rows(states, kernel, targets, scale, softcap, tied, False, False)
    return _total(scale, nll), nll, correct


def _forward(states, kernel, targets, scale, softcap, tied):
    nll, correct, of_states, of_kernel = _on_own_rows(
        states.value,
        kernel.value,
        targets.value,
        scale.value,
        softcap,
        tied,
        states.perturbed,
        kernel.perturbed,
    )
    if of_kernel is not None:
        of_kernel = of_kernel.astype(kernel.value.dtype)
    return (_total(scale.value, nll), nll, correct), (of_states, of_kernel)


def _total(scale: jax.Array, nll: jax.Array) -> jax.Array:
    return jnp.vdot(scale, nll, precision=precision_of(nll.dtype))


def _backward(softcap, tied, grads, cotangents):
    # the gradients are computed already; the chain rule is one multiplication by the sum's cotangent
    along = cotangents[0]
    if isinstance(along, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    return *(None if g is None else (along * g).astype(g.dtype) for g in grads), None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_own_rows(
    states, kernel, targets, scale, softcap, tied: bool, states_grad: bool, kernel_grad: bool
):
    """Runs `_chunked` on each device, with this device's rows.

    The kernel is gathered once. Without `shard_map`, GSPMD would gather it again for each chunk.
    """
    # leaves out axes of size 1, over which XLA cannot reduce (RET_CHECK in its partitioner)
    sizes = jax.sharding.get_abstract_mesh().shape
    mesh_axes = tuple(axis for axis in BATCH_AXES if sizes.get(axis, 1) > 1)
    chunked = functools.partial(
        _chunked, softcap=softcap, tied=tied, states_grad=states_grad, kernel_grad=kernel_grad
    )
    # casts the kernel before the devices gather it: bfloat16 has half the bytes
    kernel = kernel.astype(states.dtype)
    if not mesh_axes:
        return chunked(states, kernel, targets, scale)
    added = tuple(axis for axis in mesh_axes if axis != "fsdp")

    def local(states, kernel, targets, scale):
        nll, correct, states_sum, kernel_sum = chunked(states, kernel, targets, scale)
        # Each device keeps the sum for its part of the kernel's width over `fsdp`, and sends only this part
        # over `data`, which may be a slow network.
        if kernel_sum is not None and "fsdp" in mesh_axes:
            kernel_sum = jax.lax.psum_scatter(
                kernel_sum, "fsdp", scatter_dimension=int(tied), tiled=True
            )
        if kernel_sum is not None and added:
            kernel_sum = jax.lax.psum(kernel_sum, added)
        return nll, correct, states_sum, kernel_sum

    rows, fsdp = P(mesh_axes), "fsdp" if "fsdp" in mesh_axes else None
    embed = P(None, fsdp) if tied else P(fsdp)
    return jax.shard_map(
        local,
        in_specs=(rows, P(), rows, rows),
        out_specs=(rows, rows, rows if states_grad else None, embed if kernel_grad else None),
        axis_names=set(mesh_axes),
        check_vma=False,
    )(states, kernel, targets, scale)


def _chunked(
    states, weights, targets, scale, *, softcap, tied: bool, states_grad: bool, kernel_grad: bool
):
    """Returns each token's loss and correctness, and the requested gradients, for the rows of one device."""
    rows, length, _ = states.shape
    tokens = rows * length
    most = GPU_CHUNK_TOKENS if traced_platform() == "gpu" else CHUNK_TOKENS
    # chunks of equal size: 1,100 tokens, at most 512 -> 3 chunks of 367, with one token of padding
    chunks = -(-tokens // most)
    size = -(-tokens // chunks)
    embed, vocab = (1, 0) if tied else (0, 1)  # axes of the weights

    def product(x: jax.Array, y: jax.Array, axes: tuple[int, int], dtype=None) -> jax.Array:
        over = (axes[:1], axes[1:])
        return jax.lax.dot_general(x, y, (over, ((), ())), precision_of(states.dtype), dtype)

    # [batch, length, ...] -> [chunks, size, ...]; tokens that fill up the last chunk have scale 0
    def cut(x: jax.Array) -> jax.Array:
        x = x.reshape(tokens, *x.shape[2:])
        x = jnp.pad(x, ((0, chunks * size - tokens),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(chunks, size, *x.shape[1:])

    def joined(x: jax.Array) -> jax.Array:
        return x.reshape(chunks * size, *x.shape[2:])[:tokens].reshape(rows, length, *x.shape[2:])

    def add_chunk(kernel_sum, chunk):
        x, target, share = chunk
        # [size, vocab] float32 from bfloat16 factors, since rounding to bfloat16 could make two logits equal
        logits = softcapped(product(x, weights, (1, embed), jnp.float32), softcap)
        highest = logits.max(-1, keepdims=True)
        exp = jnp.exp(logits - highest)
        total = exp.sum(-1, keepdims=True)
        # a comparison and a sum: with the vocabulary sharded over `tensor`, each device sums over its own ids
        is_target = jnp.arange(logits.shape[-1])[None, :] == target[:, None]
        of_target = jnp.where(is_target, logits, 0.0).sum(-1, keepdims=True)
        nll, correct = jnp.log(total) + highest - of_target, of_target >= highest
        x_grad = None
        if states_grad or kernel_grad:
            # gradient with respect to the logits: scale x (softmax - one-hot target)
            slope = exp * (share[:, None] / total) - jnp.where(is_target, share[:, None], 0.0)
            if softcap is not None:  # d softcap tanh(x / softcap) / dx = 1 - tanh^2
                slope *= 1 - jnp.square(logits / softcap)
            slope = slope.astype(weights.dtype)
        if states_grad:
            x_grad = product(slope, weights, (1, vocab))
        if kernel_grad:
            # float32, since bfloat16 sums over chunks and devices would lose digits
            factors = (slope, x) if tied else (x, slope)
            kernel_sum += product(*factors, (0, 0), jnp.float32)
        return kernel_sum, (nll[:, 0], correct[:, 0].astype(jnp.float32), x_grad)

    empty = jnp.zeros(weights.shape, jnp.float32) if kernel_grad else None
    parts = (cut(states), cut(targets), cut(scale))
    grad_of_kernel, (nll, correct, grad_of_states) = jax.lax.scan(add_chunk, empty, parts)
    if grad_of_states is not None:
        grad_of_states = joined(grad_of_states)
    return joined(nll), joined(correct), grad_of_states, grad_of_kernel
