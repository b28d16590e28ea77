// bn_relu_conv2d on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
//
// The normalised and rectified map is never a tensor: both passes make it from x, image by image, strip by strip or in
// padded planes, in cache.
#include "cpu/bn_relu_conv2d/backward_1x1.h"
#include "cpu/bn_relu_conv2d/backward_3x3.h"
#include "cpu/bn_relu_conv2d/forward.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

void run_statistics(const BNReLUConv2d& args, const Host& host) {
  with_element_type(args.dtype, [&](auto element) { run_batch_statistics<decltype(element)>(args, host); });
}

void run_forward(const BNReLUConv2d& args, const Host& host) {
  with_element_type(args.dtype, [&](auto element) { ForwardPass<decltype(element)>(args, host).run(); });
}

void run_backward(const BNReLUConv2d& args, const Host& host) {
  with_element_type(args.dtype, [&](auto element) {
    if (args.sizes.kernel == 1) {
      PointwiseBackward<decltype(element)>(args, host).run();
    } else {
      SpatialBackward<decltype(element)>(args, host).run();
    }
  });
}

}  // namespace

const BNReLUConv2dKernels bn_relu_conv2d_kernels = {run_statistics, run_forward, run_backward};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
