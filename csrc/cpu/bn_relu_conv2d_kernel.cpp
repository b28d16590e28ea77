// bn_relu_conv2d on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
//
// The normalised and rectified map is never a tensor: both passes make it from x, image by image, strip by strip or in
// padded planes, in cache.
#include "cpu/bn_relu_conv2d/backward_1x1.h"
#include "cpu/bn_relu_conv2d/backward_3x3.h"
#include "cpu/bn_relu_conv2d/forward.h"
#include "cpu/bn_relu_conv2d/rows_1x1.h"
#include "cpu/bn_relu_conv2d/rows_3x3.h"
#include "cpu/bn_relu_conv2d/rows_pool.h"
#include "cpu/bn_relu_conv2d/rows_winograd.h"
#include "cpu/bn_relu_conv2d/strided_backward.h"
#include "cpu/bn_relu_conv2d/strided_forward.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

template <typename Work>
void with_row_type(const BNReLUConv2d& args, Work work) {
  if (args.dtype == DType::kDouble) return work(double{});
  work(float{});
}

void run_statistics(const BNReLUConv2d& args, const Host& host) {
  if (args.rows) return with_row_type(args, [&](auto element) { run_row_statistics<decltype(element)>(args, host); });
  with_element_type(args.dtype, [&](auto element) { run_batch_statistics<decltype(element)>(args, host); });
}

void run_forward(const BNReLUConv2d& args, const Host& host) {
  if (args.rows) {
    return with_row_type(args, [&](auto element) {
      using T = decltype(element);
      if (args.sizes.kernel == 1) {
        RowsForward1x1<T>(args, host).run();
      } else if (!suits_winograd<T>(args.sizes) || !RowsWinogradForward<T>(args, host).run()) {
        RowsForward3x3<T>(args, host).run();
      }
    });
  }
  with_element_type(args.dtype, [&](auto element) {
    using S = decltype(element);
    if constexpr (has_strided_winograd<S>) {
      if (suits_strided_winograd(args, args.out) && StridedForward<S>(args, host).run()) return;
    }
    ForwardPass<S>(args, host).run();
  });
}

template <typename T>
void run_row_backward_3x3(const BNReLUConv2d& args, const Host& host) {
  const int64_t channels = args.sizes.in_channels;
  if (!suits_winograd<T>(args.sizes)) return RowsBackward3x3<T>(args, host).run({0, channels});
  const bool* finite = RowsWinogradBackward<T>(args, host).run();
  for (int64_t begin = 0, end = 0; begin < channels; begin = end) {
    while (end < channels && finite[end] == finite[begin]) ++end;
    if (!finite[begin]) RowsBackward3x3<T>(args, host).run({begin, end});
  }
}

void run_backward(const BNReLUConv2d& args, const Host& host) {
  if (args.rows) {
    return with_row_type(args, [&](auto element) {
      using T = decltype(element);
      if (args.sizes.kernel == 1) {
        RowsBackward1x1<T>(args, host).run();
      } else {
        run_row_backward_3x3<T>(args, host);
      }
    });
  }
  with_element_type(args.dtype, [&](auto element) {
    using S = decltype(element);
    if (args.sizes.kernel == 1) return PointwiseBackward<S>(args, host).run();
    if constexpr (has_strided_winograd<S>) {
      if (suits_strided_winograd(args, args.grad_out) && StridedBackward<S>(args, host).run()) return;
    }
    SpatialBackward<S>(args, host).run();
  });
}

void run_correct(const BNReLUConv2d& args, const Host& host) {
  if (args.rows) return with_row_type(args, [&](auto element) { run_row_corrections<decltype(element)>(args, host); });
  with_element_type(args.dtype, [&](auto element) { run_corrections<decltype(element)>(args, host); });
}

void run_pool(const BNReLUConv2d& args, const Host& host) {
  if (args.rows) return with_row_type(args, [&](auto element) { RowsPool<decltype(element)>(args, host).forward(); });
  with_element_type(args.dtype, [&](auto element) { PoolForward<decltype(element)>(args, host).run(); });
}

void run_pool_backward(const BNReLUConv2d& args, const Host& host) {
  if (args.rows) return with_row_type(args, [&](auto element) { RowsPool<decltype(element)>(args, host).backward(); });
  with_element_type(args.dtype, [&](auto element) { PoolBackward<decltype(element)>(args, host).run(); });
}

void run_max_pool(const BNReLUConv2d& args, const Host& host) {
  with_row_type(args, [&](auto element) { RowsMaxPool<decltype(element)>(args, host).forward(); });
}

void run_max_pool_backward(const BNReLUConv2d& args, const Host& host) {
  with_row_type(args, [&](auto element) { RowsMaxPool<decltype(element)>(args, host).backward(); });
}

}  // namespace

const BNReLUConv2dKernels bn_relu_conv2d_kernels = {
    run_statistics, run_forward,       run_backward, run_correct,
    run_pool,       run_pool_backward, run_max_pool, run_max_pool_backward};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
