// Every operator of the library, declared once. Kernels register themselves under a dispatch key in
// csrc/cpu/<op>.cpp and csrc/cuda/<op>_bind.cpp; shape functions and gradients are added in pyext/ops/<op>.py.
// `parameters` and `running` follow the order of pyext/ops/gated_excitation.py (PARAMETERS, RUNNING) and
// csrc/math/gated_excitation.h. Variants have names, not overloads: at exit torch removes schemas one by one and stops
// at a sibling overload whose schema is gone while a kernel registered from Python still holds it.
#include <torch/csrc/stable/library.h>

#define BN_RELU_CONV2D_INPUTS                                                                                    \
  "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor conv_weight, Tensor mean, Tensor var, bool training, " \
  "float eps, int stride, int groups"
#define BN_RELU_CONV2D "(" BN_RELU_CONV2D_INPUTS ") -> Tensor"
#define BN_RELU_CONV2D_STATISTICS "(Tensor x) -> (Tensor mean, Tensor var)"
// The result with its own batch statistics, NCHW.
#define BN_RELU_CONV2D_MOMENTS "(" BN_RELU_CONV2D_INPUTS ") -> (Tensor out, Tensor out_mean, Tensor out_var)"
#define BN_RELU_CONV2D_BACKWARD              \
  "(Tensor grad_out, " BN_RELU_CONV2D_INPUTS \
  ") -> (Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias, Tensor grad_conv_weight)"
// The gradient of x added to grad_x, without what flows through mean and variance: it is added to `corrections`,
// float64 (C, 2), for bn_relu_conv2d_correct to take from grad_x once for all the layers that read x.
#define BN_RELU_CONV2D_BACKWARD_ADD                          \
  "(Tensor grad_out, " BN_RELU_CONV2D_INPUTS                 \
  ", Tensor(a!) grad_x, Tensor(b!) corrections) -> (Tensor " \
  "grad_norm_weight, Tensor grad_norm_bias, Tensor grad_conv_weight)"
#define BN_RELU_CONV2D_CORRECT "(Tensor(a!) grad_x, Tensor x, Tensor mean, Tensor corrections) -> ()"

// With an average pool of 2x2, or a max-pool of 3x3 at a stride of two, in place of the convolution.
#define BN_RELU_CONV2D_POOL_INPUTS \
  "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor mean, Tensor var, bool training, float eps"
#define BN_RELU_CONV2D_POOL "(" BN_RELU_CONV2D_POOL_INPUTS ") -> Tensor"
#define BN_RELU_CONV2D_POOL_BACKWARD                      \
  "(Tensor grad_out, " BN_RELU_CONV2D_POOL_INPUTS         \
  ") -> (Tensor grad_x, Tensor grad_norm_weight, Tensor " \
  "grad_norm_bias)"
// A dense block's cells: `layers` says how many each layer has, one or two; three parameters and an eps for each.
// `kept` are map and moments between the convolutions of each layer of two, or none.
#define BN_RELU_CONV2D_CELLS "Tensor[] parameters, int[] layers, float[] eps"
#define BN_RELU_CONV2D_BLOCK "(Tensor x, " BN_RELU_CONV2D_CELLS ") -> (Tensor buffer, Tensor moments, Tensor[] kept)"
#define BN_RELU_CONV2D_BLOCK_BACKWARD                                                     \
  "(Tensor grad_out, Tensor buffer, Tensor moments, Tensor[] kept, " BN_RELU_CONV2D_CELLS \
  ") -> (Tensor grad_buffer, Tensor[] grad_parameters)"

#define GATED_EXCITATION_INPUTS "Tensor u, Tensor[] parameters, Tensor[] running, bool training, float eps"
#define GATED_EXCITATION_BACKWARD                                                                       \
  "(Tensor grad_out, Tensor u, Tensor[] parameters, Tensor[] running, Tensor position, Tensor pooled, " \
  "Tensor hidden, Tensor map_statistics, Tensor hidden_statistics, bool training, float eps)"           \
  " -> (Tensor grad_u, Tensor grad_parameters)"
#define GATED_EXCITATION_SAVED \
  "Tensor position, Tensor pooled, Tensor hidden, Tensor map_statistics, Tensor hidden_statistics"

#define HYBRID_BLOCK "(Tensor x, Tensor[] tensors, int[] extents, float eps) -> Tensor"

// The numbers are those of pyext/ops/masked_conv2d_parts.py (Geometry) and csrc/math/masked_conv2d.h.
#define MASKED_CONV2D_INPUTS                                                                                \
  "Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor inputs, Tensor outputs, Tensor? subnets, " \
  "Tensor? gate, int[] numbers"
#define MASKED_CONV2D "(" MASKED_CONV2D_INPUTS ", Tensor? packed=None, int pool=1) -> Tensor"
#define MASKED_CONV2D_BACKWARD                                                                           \
  "(Tensor grad_out, Tensor out, " MASKED_CONV2D_INPUTS                                                  \
  ", bool for_x, bool for_parameters) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_scale, Tensor " \
  "grad_shift, Tensor grad_gate)"

#define MEMORY_CONTRAST                                                                                   \
  "(Tensor embeddings, Tensor[] banks, Tensor indices, float temperature, bool? tiled) -> (Tensor loss, " \
  "Tensor rows, Tensor weights)"
#define MEMORY_CONTRAST_BACKWARD                                                                          \
  "(Tensor grad_loss, Tensor embeddings, Tensor[] banks, Tensor rows, Tensor weights, float temperature)" \
  " -> Tensor grad_embeddings"
#define MEMORY_UPDATE "(Tensor(a!)[] banks, Tensor embeddings, Tensor index, float momentum) -> ()"
#define PEER_CONTRAST                                                                                     \
  "(Tensor embeddings, Tensor labels, float temperature, float soft_temperature, int start, int stop) ->" \
  " (Tensor terms, Tensor normalisers)"
#define PEER_CONTRAST_BACKWARD                                                                               \
  "(Tensor grad_terms, Tensor embeddings, Tensor labels, Tensor normalisers, float temperature, float soft_" \
  "temperature, int start, int stop) -> Tensor grad_embeddings"

STABLE_TORCH_LIBRARY(pyext, m) {
  m.def("bn_relu_conv2d" BN_RELU_CONV2D);
  m.def("bn_relu_conv2d_triton" BN_RELU_CONV2D);
  m.def("bn_relu_conv2d_statistics" BN_RELU_CONV2D_STATISTICS);
  m.def("bn_relu_conv2d_statistics_triton" BN_RELU_CONV2D_STATISTICS);
  m.def("bn_relu_conv2d_moments" BN_RELU_CONV2D_MOMENTS);
  m.def("bn_relu_conv2d_backward" BN_RELU_CONV2D_BACKWARD);
  m.def("bn_relu_conv2d_backward_triton" BN_RELU_CONV2D_BACKWARD);
  m.def("bn_relu_conv2d_block" BN_RELU_CONV2D_BLOCK);
  m.def("bn_relu_conv2d_block_backward" BN_RELU_CONV2D_BLOCK_BACKWARD);
  m.def("bn_relu_conv2d_running(Tensor(a!)[] running, Tensor[] moments, int count, float momentum) -> ()");
  m.def("bn_relu_conv2d_pool" BN_RELU_CONV2D_POOL);
  m.def("bn_relu_conv2d_pool_backward" BN_RELU_CONV2D_POOL_BACKWARD);
  m.def("bn_relu_conv2d_max_pool" BN_RELU_CONV2D_POOL);
  m.def("bn_relu_conv2d_max_pool_backward" BN_RELU_CONV2D_POOL_BACKWARD);
  m.def("bn_relu_conv2d_backward_add" BN_RELU_CONV2D_BACKWARD_ADD);
  m.def("bn_relu_conv2d_correct" BN_RELU_CONV2D_CORRECT);
  m.def("convolution_stem(Tensor x, Tensor[] tensors, int stride, float eps) -> Tensor");
  m.def("dense_block(Tensor x, Tensor packed, int[] extents) -> Tensor");
  m.def("dense_block_pack(Tensor[] tensors, int[] extents, float eps) -> Tensor");
  m.def("gated_excitation(" GATED_EXCITATION_INPUTS ", bool save) -> (Tensor out, " GATED_EXCITATION_SAVED ")");
  m.def("gated_excitation_triton(" GATED_EXCITATION_INPUTS ", bool save) -> (Tensor out, " GATED_EXCITATION_SAVED ")");
  m.def("gated_excitation_out(" GATED_EXCITATION_INPUTS
        ", *, Tensor(a!) out) -> (Tensor map_statistics, Tensor hidden_statistics)");
  m.def("gated_excitation_triton_out(" GATED_EXCITATION_INPUTS
        ", *, Tensor(a!) out) -> (Tensor map_statistics, Tensor hidden_statistics)");
  // As gated_excitation with `save`, its result written into `out`.
  m.def("gated_excitation_into(" GATED_EXCITATION_INPUTS ", *, Tensor(a!) out) -> (" GATED_EXCITATION_SAVED ")");
  m.def("gated_excitation_backward" GATED_EXCITATION_BACKWARD);
  m.def("gated_excitation_backward_triton" GATED_EXCITATION_BACKWARD);
  m.def("hybrid_block" HYBRID_BLOCK);
  m.def("hybrid_block_triton" HYBRID_BLOCK);
  m.def("masked_conv2d" MASKED_CONV2D);
  m.def("masked_conv2d_triton" MASKED_CONV2D);
  m.def("masked_conv2d_chain(Tensor x, Tensor[] tensors, int[] numbers, Tensor? subnets=None) -> Tensor");
  m.def("masked_conv2d_pack(Tensor weight, Tensor inputs, Tensor outputs, int groups) -> Tensor");
  m.def("masked_conv2d_backward" MASKED_CONV2D_BACKWARD);
  m.def("masked_conv2d_backward_triton" MASKED_CONV2D_BACKWARD);
  m.def("memory_contrast" MEMORY_CONTRAST);
  m.def("memory_contrast_triton" MEMORY_CONTRAST);
  m.def("memory_contrast_backward" MEMORY_CONTRAST_BACKWARD);
  m.def("memory_contrast_backward_triton" MEMORY_CONTRAST_BACKWARD);
  m.def("memory_update" MEMORY_UPDATE);
  m.def("memory_update_triton" MEMORY_UPDATE);
  m.def("peer_contrast" PEER_CONTRAST);
  m.def("peer_contrast_triton" PEER_CONTRAST);
  m.def("peer_contrast_backward" PEER_CONTRAST_BACKWARD);
  m.def("peer_contrast_backward_triton" PEER_CONTRAST_BACKWARD);
}
