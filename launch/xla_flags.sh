# shellcheck shell=bash
# XLA flags per platform, each with its source. The launchers source this file; you and your images can, too:
#
#   . launch/xla_flags.sh && add_xla_flags gpu
#
# Flags that you set yourself are kept. We have not measured the effect of any of these flags. jaxlib 0.10.2
# knows all names (a test starts it with them), and so does libtpu 0.0.42.1 (looked up in the library, 2026-11-24).

gpu_flags=(
  # collectives overlap with computation. https://docs.nvidia.com/jax-toolbox/environment-variables
  --xla_gpu_enable_latency_hiding_scheduler=true
  # cuBLAS instead of Triton for matrix products. T5X, the recipe for T5 on GPUs:
  # https://github.com/google-research/t5x t5x/contrib/gpu/scripts_gpu/multiprocess_ft_frompile.sh
  # (JAX's own page proposes --xla_gpu_triton_gemm_any=true instead: measure both)
  --xla_gpu_enable_triton_gemm=false
  # few large collectives instead of one per parameter. The sizes are from MaxText's Llama 2 7B on H100s:
  # https://github.com/AI-Hypercomputer/maxtext src/maxtext/configs/gpu/a3/llama_2_7b/16vm.sh
  # The flags are explained in https://docs.jax.dev/en/latest/gpu_performance_tips.html
  --xla_gpu_all_reduce_combine_threshold_bytes=1073741824
  --xla_gpu_all_gather_combine_threshold_bytes=134217728
  --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
)
# Not set, but worth measuring:
#   --xla_gpu_enable_pipelined_all_gather=true (and _reduce_scatter, _all_reduce) with
#   --xla_gpu_enable_while_loop_double_buffering=true, for fsdp with scanned layers; they take more memory.
#     https://github.com/NVIDIA/JAX-Toolbox rosetta/docs/GPU_performance.md
#   --xla_gpu_deterministic_ops=true, for runs that repeat bit for bit on a GPU; it is slower.
#     https://github.com/openxla/xla/pull/12520, https://github.com/jax-ml/jax/discussions/10674

tpu_flags=(
  # gradients are all-reduced in the background. MaxText, DATA_PARALLEL_OVERLAP in
  # https://github.com/AI-Hypercomputer/maxtext benchmarks/xla_flags_library.py
  --xla_tpu_enable_data_parallel_all_reduce_opt=true
  --xla_tpu_data_parallel_opt_different_sized_ops=true
  # all-gathers and all-reduces are fused with computation. CF_FOR_ALL_REDUCE_AND_ALL_GATHER in the same file
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  --xla_enable_async_all_gather=true
  --xla_enable_async_all_reduce=true
)

# add_flags VARIABLE FLAG...: appends to the variable each flag whose name it does not contain yet
add_flags() {
  local variable=$1 value=${!1:-} flag
  shift
  for flag in "$@"; do
    case " ${value//$'\n'/ } " in
      *" ${flag%%=*}="* | *" ${flag%%=*} "*) ;;
      *) value="${value:+$value }$flag" ;;
    esac
  done
  export "$variable=$value"
}

# add_xla_flags gpu|tpu: TPU flags go to libtpu; in XLA_FLAGS they would end the process ("Unknown flag")
add_xla_flags() {
  case $1 in
    gpu) add_flags XLA_FLAGS "${gpu_flags[@]}" ;;
    tpu) add_flags LIBTPU_INIT_ARGS "${tpu_flags[@]}" ;;
    *) echo "add_xla_flags: expected gpu or tpu, got '$1'" >&2; return 2 ;;
  esac
}

# cpu_devices N: N CPU devices in this process. The last such flag counts, so it is always appended.
# https://docs.jax.dev/en/latest/sharded-computation.html
cpu_devices() {
  export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$1"
}
