// A dense block in training on the CPU: layers of one or two BN-ReLU-convolution cells, each reading all channels
// before it from one buffer and writing behind them, by the kernels of bn_relu_conv2d with images innermost.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "checks/bn_relu_conv2d.h"
#include "cpu/bn_relu_conv2d.h"
#include "cpu/host.h"
#include "cpu/tensors.h"

namespace pyext::cpu {
namespace {

using bn_relu_conv2d::Sizes;

constexpr int64_t kCellParameters = 3;  // weight and bias of the normalisation, weight of the convolution
constexpr int64_t kChannelGap = 16;     // channels a power of two apart would share few places of the caches

// Uninitialised (N, channels, H, W) with images innermost, for maps like those of x.
Tensor new_map(const Tensor& x, int64_t channels) {
  const int64_t n = x.size(0), height = x.size(2), width = x.size(3), elements = n * height * width;
  Tensor rows = torch::stable::new_empty(x, {channels, elements + kChannelGap});
  const Tensor made = torch::stable::view(torch::stable::narrow(rows, 1, 0, elements), {channels, height, width, n});
  return torch::stable::transpose(torch::stable::transpose(torch::stable::transpose(made, 0, 3), 1, 3), 2, 3);
}

struct Cell {
  Sizes sizes;
  double eps;
  const Tensor* parameters;
};

// One or two cells; the last one's convolution makes the channels that the layer adds.
struct Layer {
  Cell first, last;
  bool bottleneck;
  int64_t channels, growth;  // read from the buffer, and added
};

class Block {
 public:
  // x: maps of the block's size and dtype. `layers`: cells of each layer.
  Block(const Tensor& x, int64_t channels, const std::vector<Tensor>& parameters, const std::vector<int64_t>& layers,
        const std::vector<double>& eps) {
    const std::optional<DType> dtype = dtype_of(x.scalar_type());
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && (dtype == DType::kFloat || dtype == DType::kDouble) &&
                        x.size(0) > 1 && channels > 0 && x.size(2) * x.size(3) > 0,
                    "bn_relu_conv2d: a block trains on at least two images (N, C, H, W) of float32 or float64 on the "
                    "CPU");
    dtype_ = *dtype;
    // Copied once: pointers into these must stay.
    parameters_.reserve(parameters.size());
    for (const Tensor& parameter : parameters) parameters_.push_back(torch::stable::contiguous(parameter));
    total = channels;
    size_t cell = 0;
    for (const int64_t cells : layers) {
      STD_TORCH_CHECK(
          (cells == 1 || cells == 2) && cell + cells <= eps.size() && parameters.size() == kCellParameters * eps.size(),
          "bn_relu_conv2d: expected layers of one or two cells, an eps and three parameters for each");
      Layer layer{};
      layer.bottleneck = cells == 2;
      layer.channels = total;
      layer.first = cell_at(cell, x, total, eps);
      layer.last = layer.bottleneck ? cell_at(cell + 1, x, layer.first.sizes.out_channels, eps) : layer.first;
      layer.growth = layer.last.sizes.out_channels;
      this->layers.push_back(layer);
      read = total;
      total += layer.growth;
      cell += cells;
    }
    STD_TORCH_CHECK(cell > 0 && cell == eps.size(), "bn_relu_conv2d: ", eps.size(), " cells, the layers have ", cell);
  }

  // Maps and statistics of a call of `cell`, `x` and the moments of its channels given by their first elements.
  BNReLUConv2d call(const Cell& cell, const Map& x, const void* mean, const void* var) const {
    BNReLUConv2d args{};
    args.sizes = cell.sizes;
    args.dtype = args.parameter_dtype = dtype_;
    args.training = args.rows = true;
    args.eps = cell.eps;
    args.x = x;
    args.norm_weight = cell.parameters[0].data_ptr();
    args.norm_bias = cell.parameters[1].data_ptr();
    args.conv_weight = cell.parameters[2].data_ptr();
    args.mean = const_cast<void*>(mean);
    args.var = const_cast<void*>(var);
    return args;
  }

  void check_map(const Tensor& map, const Tensor& like, int64_t channels, const char* name) const {
    const Shape shape{4, {like.size(0), channels, like.size(2), like.size(3)}};
    STD_TORCH_CHECK(map.is_cpu() && dtype_of(map.scalar_type()) == dtype_ && has_shape(map, shape) &&
                        images_innermost(map_of(map), like.size(0), like.size(2), like.size(3)),
                    "bn_relu_conv2d: ", name, " is not one that the block's forward pass gives");
  }

  void check_moments(const Tensor& moments, int64_t channels) const {
    STD_TORCH_CHECK(moments.is_cpu() && moments.is_contiguous() && dtype_of(moments.scalar_type()) == dtype_ &&
                        has_shape(moments, Shape{2, {2, channels}}),
                    "bn_relu_conv2d: moments are not those that the block's forward pass gives");
  }

  // Element `index` of what begins at `data`.
  void* at(const void* data, int64_t index) const {
    const int64_t size = dtype_ == DType::kDouble ? sizeof(double) : sizeof(float);
    return static_cast<char*>(const_cast<void*>(data)) + index * size;
  }

  Map from_channel(const Map& map, int64_t channel) const {
    Map moved = map;
    moved.data = at(map.data, channel * map.stride[1]);
    return moved;
  }

  std::vector<Layer> layers;
  int64_t total, read = 0;  // channels, and those that layers read

 private:
  Cell cell_at(size_t index, const Tensor& x, int64_t channels, const std::vector<double>& eps) const {
    const Tensor* parameters = parameters_.data() + kCellParameters * index;
    const Tensor& weight = parameters[2];
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0, "bn_relu_conv2d: a convolution's weight is empty");
    const Sizes s{x.size(0), channels, x.size(2), x.size(3), weight.size(0), 1, weight.size(2), 1};
    STD_TORCH_CHECK(s.kernel == 1 || s.kernel == 3, "bn_relu_conv2d: the kernels have 1x1 and 3x3 convolutions");
    bn_relu_conv2d::check_eps(eps[index]);
    for (int64_t i = 0; i < kCellParameters; ++i) {
      const Shape shape = i < 2 ? bn_relu_conv2d::vector_shape(s) : bn_relu_conv2d::weight_shape(s);
      STD_TORCH_CHECK(
          parameters[i].is_cpu() && dtype_of(parameters[i].scalar_type()) == dtype_ && has_shape(parameters[i], shape),
          "bn_relu_conv2d: parameters[", kCellParameters * index + i,
          "] does not fit its cell in shape, dtype or device");
    }
    return {s, eps[index], parameters};
  }

  DType dtype_;
  std::vector<Tensor> parameters_;
};

void run(void (*kernel)(const BNReLUConv2d&, const Host&), const BNReLUConv2d& args) {
  CallMemory memory;
  kernel(args, memory.host());
}

void take_statistics(const Block& block, const Cell& like, const Map& map, int64_t channels, void* mean, void* var) {
  BNReLUConv2d args = block.call(like, map, mean, var);
  args.sizes.in_channels = channels;
  run(selected_bn_relu_conv2d().statistics, args);
}

// The map between a bottleneck's convolutions, and its moments (2, channels).
std::tuple<Tensor, Tensor> squeeze(const Block& block, const Layer& layer, const Tensor& like, const Map& buffer,
                                   const Tensor& moments) {
  const int64_t channels = layer.last.sizes.in_channels;
  const Tensor map = new_map(like, channels), own = torch::stable::new_empty(like, {2, channels});
  BNReLUConv2d args = block.call(layer.first, buffer, moments.data_ptr(), block.at(moments.data_ptr(), block.read));
  args.out = map_of(map);
  run(selected_bn_relu_conv2d().forward, args);
  take_statistics(block, layer.last, args.out, channels, own.data_ptr(), block.at(own.data_ptr(), channels));
  return {map, own};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> forward(const Tensor& x, const std::vector<Tensor>& parameters,
                                                        const std::vector<int64_t>& layers,
                                                        const std::vector<double>& eps) {
  STD_TORCH_CHECK(x.dim() == 4, "bn_relu_conv2d: x has ", x.dim(), " dimensions, expected (N, C, H, W)");
  const Block block(x, x.size(1), parameters, layers, eps);
  Tensor buffer = new_map(x, block.total);
  const Tensor moments = torch::stable::new_empty(x, {2, block.read});
  Tensor given = torch::stable::narrow(buffer, 1, 0, x.size(1));
  torch::stable::copy_(given, x);
  const Map maps = map_of(buffer);
  void *means = moments.data_ptr(), *vars = block.at(means, block.read);
  std::vector<Tensor> kept;
  int64_t known = 0;  // channels whose moments are
  for (const Layer& layer : block.layers) {
    take_statistics(block, layer.first, block.from_channel(maps, known), layer.channels - known, block.at(means, known),
                    block.at(vars, known));
    known = layer.channels;
    BNReLUConv2d args = block.call(layer.first, maps, means, vars);
    if (layer.bottleneck) {
      const auto [map, own] = squeeze(block, layer, x, maps, moments);
      args = block.call(layer.last, map_of(map), own.data_ptr(), block.at(own.data_ptr(), map.size(1)));
      kept.push_back(map);
      kept.push_back(own);
    }
    args.out = block.from_channel(maps, layer.channels);
    run(selected_bn_relu_conv2d().forward, args);
  }
  return {buffer, moments, kept};
}

// Gradients of one cell's parameters, which `args` gets.
void add_gradients(const Tensor& like, const Cell& cell, BNReLUConv2d& args, Tensor* grads) {
  const Sizes& s = cell.sizes;
  grads[0] = torch::stable::new_empty(like, {s.in_channels});
  grads[1] = torch::stable::new_empty(like, {s.in_channels});
  grads[2] = torch::stable::new_empty(like, {s.out_channels, s.in_channels, s.kernel, s.kernel});
  args.grad_norm_weight = grads[0].data_ptr();
  args.grad_norm_bias = grads[1].data_ptr();
  args.grad_conv_weight = grads[2].data_ptr();
}

// `kept`: as the forward pass gives it, or nothing, for what is in it to be computed again.
std::tuple<Tensor, std::vector<Tensor>> backward(const Tensor& grad_out, const Tensor& buffer, const Tensor& moments,
                                                 const std::vector<Tensor>& kept, const std::vector<Tensor>& parameters,
                                                 const std::vector<int64_t>& layers, const std::vector<double>& eps) {
  STD_TORCH_CHECK(buffer.dim() == 4, "bn_relu_conv2d: buffer has ", buffer.dim(), " dimensions, expected 4");
  int64_t added = 0;
  size_t cell = 0, bottlenecks = 0;
  for (const int64_t cells : layers) {
    cell += cells;
    bottlenecks += cells == 2;
    const bool there = cells > 0 && kCellParameters * cell <= parameters.size();
    STD_TORCH_CHECK(there && parameters[kCellParameters * cell - 1].dim() == 4,
                    "bn_relu_conv2d: too few parameters for the layers");
    added += parameters[kCellParameters * cell - 1].size(0);
  }
  const Block block(buffer, buffer.size(1) - added, parameters, layers, eps);
  block.check_map(buffer, buffer, block.total, "buffer");
  block.check_moments(moments, block.read);
  STD_TORCH_CHECK(kept.empty() || kept.size() == 2 * bottlenecks, "bn_relu_conv2d: ", kept.size(),
                  " kept tensors, expected two for each bottleneck, or none");
  STD_TORCH_CHECK(grad_out.is_cpu() && grad_out.scalar_type() == buffer.scalar_type() &&
                      has_shape(grad_out, Shape{4, {buffer.size(0), buffer.size(1), buffer.size(2), buffer.size(3)}}),
                  "bn_relu_conv2d: grad_out differs from the buffer in shape or dtype");
  Tensor grad = new_map(buffer, block.total);
  torch::stable::copy_(grad, grad_out);
  const Map maps = map_of(buffer), grad_maps = map_of(grad);
  const void *means = moments.data_ptr(), *vars = block.at(means, block.read);
  std::vector<double> corrections(2 * block.read, 0.0);
  const auto correct = [&](const Layer& like, int64_t begin, int64_t end) {
    BNReLUConv2d args =
        block.call(like.first, block.from_channel(maps, begin), block.at(means, begin), block.at(vars, begin));
    args.sizes.in_channels = end - begin;
    args.grad_x = block.from_channel(grad_maps, begin);
    args.corrections = corrections.data() + 2 * begin;
    run(selected_bn_relu_conv2d().correct, args);
  };
  std::vector<Tensor> grads(parameters.size());
  Tensor between;
  for (size_t i = block.layers.size(); i-- > 0;) {
    const Layer& layer = block.layers[i];
    if (layer.channels < block.read) correct(layer, layer.channels, layer.channels + layer.growth);
    Map above = block.from_channel(grad_maps, layer.channels);
    if (layer.bottleneck) {
      cell -= 1;
      bottlenecks -= 1;
      const int64_t channels = layer.last.sizes.in_channels;
      const auto [map, own] = kept.empty() ? squeeze(block, layer, buffer, maps, moments)
                                           : std::tuple(kept[2 * bottlenecks], kept[2 * bottlenecks + 1]);
      block.check_map(map, buffer, channels, "a kept map");
      block.check_moments(own, channels);
      if (!between.defined() || between.size(1) != channels) between = new_map(buffer, channels);
      BNReLUConv2d args = block.call(layer.last, map_of(map), own.data_ptr(), block.at(own.data_ptr(), channels));
      args.grad_out = above;
      args.grad_x = above = map_of(between);
      add_gradients(buffer, layer.last, args, grads.data() + kCellParameters * cell);
      run(selected_bn_relu_conv2d().backward, args);
    }
    cell -= 1;
    BNReLUConv2d args = block.call(layer.first, maps, means, vars);
    args.grad_out = above;
    args.grad_x = grad_maps;
    args.add = true;
    args.corrections = corrections.data();
    add_gradients(buffer, layer.first, args, grads.data() + kCellParameters * cell);
    run(selected_bn_relu_conv2d().backward, args);
  }
  correct(block.layers[0], 0, block.layers[0].channels);
  return {grad, grads};
}

template <typename T>
void move_one(const Tensor& running, const Tensor& moments, int64_t row, T factor, T momentum) {
  T* to = static_cast<T*>(running.data_ptr());
  const T* batch = static_cast<const T*>(moments.data_ptr()) + row * moments.size(1);
  for (int64_t c = 0; c < running.size(0); ++c) to[c] += momentum * (factor * batch[c] - to[c]);
}

// Means and variances in turn, towards the moments over `count` values of their channels, each the first of those
// given, (2, channels); as torch's batch normalisation does.
void move_running(const std::vector<Tensor>& running, const std::vector<Tensor>& moments, int64_t count,
                  double momentum) {
  STD_TORCH_CHECK(running.size() == 2 * moments.size() && count > 1, "bn_relu_conv2d: ", running.size(),
                  " running statistics for ", moments.size(), " moments over ", count, " values");
  for (size_t i = 0; i < running.size(); ++i) {
    const Tensor &to = running[i], &from = moments[i / 2];
    const std::optional<DType> dtype = dtype_of(from.scalar_type());
    STD_TORCH_CHECK((dtype == DType::kFloat || dtype == DType::kDouble) && dtype_of(to.scalar_type()) == dtype &&
                        to.is_cpu() && to.is_contiguous() && to.dim() == 1 && from.is_cpu() && from.is_contiguous() &&
                        from.dim() == 2 && from.size(0) == 2 && from.size(1) >= to.size(0),
                    "bn_relu_conv2d: running[", i, "] does not fit its moments in shape, strides, dtype or device");
  }
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  for (size_t i = 0; i < running.size(); ++i) {
    const int64_t row = i % 2;
    const double factor = row ? unbiased : 1;
    if (running[i].scalar_type() == ScalarType::Double) {
      move_one<double>(running[i], moments[i / 2], row, factor, momentum);
    } else {
      move_one<float>(running[i], moments[i / 2], row, static_cast<float>(factor), static_cast<float>(momentum));
    }
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("bn_relu_conv2d_block", TORCH_BOX(&forward));
  m.impl("bn_relu_conv2d_block_backward", TORCH_BOX(&backward));
  m.impl("bn_relu_conv2d_running", TORCH_BOX(&move_running));
}

}  // namespace pyext::cpu
