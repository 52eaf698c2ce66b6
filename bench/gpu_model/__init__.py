"""``python -m bench gpu-model``: what the CUDA kernels move and need, computed, not timed.

devices      data-sheet figures and limits of the GPUs
traffic      what a launch is; the launches of one operator call, by its arguments
products     the tiled and the one-pass products; linear layers
convolution  implicit products of convolutions
memory_bound, pools, norms, spiking   the operators that are bound by memory
occupancy    blocks per processor from registers and shared memory (resources.json, by ptxas)
roofline     least time that bytes and FLOPs allow
steps        launches and bytes of whole training steps, ours and the reference's
output       table, CSV, page

The byte counts are formulas read off the tiling of csrc/cuda. tests/gpusim_ops/test_cuda_model.py
executes the kernels' PTX and asserts that the formulas give the counted bytes.
"""

LABEL = "model, not measured"
