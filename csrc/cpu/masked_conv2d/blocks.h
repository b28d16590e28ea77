// Kept outputs in blocks that a tile computes together, and the panel of weights of each.
#pragma once

#include <algorithm>

#include "cpu/hybrid_block/squeeze.h"
#include "cpu/masked_conv2d.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

using MaskedSizes = masked_conv2d::Sizes;

// Some kept outputs of one group of the convolution, and that group's kept inputs: indices into the lists. Its panel is
// (inputs, taps, count).
struct Block {
  int64_t output, count;
  int64_t input, inputs;
  int64_t panel;
};

// Kept channels at the front of a list.
inline int64_t list_length(const int64_t* list, int64_t longest) {
  return std::find(list, list + longest, int64_t(-1)) - list;
}

// Calls visit(subnet, block) in the order of panels; returns the elements of all panels.
template <typename Visit>
int64_t for_each_block(const MaskedConv2d& args, Visit visit) {
  const MaskedSizes& s = args.sizes;
  int64_t panel = 0;
  for (int64_t subnet = 0; subnet < s.subnets; ++subnet) {
    const int64_t *inputs = args.inputs + subnet * s.inputs, *outputs = args.outputs + subnet * s.outputs;
    const int64_t *inputs_end = inputs + list_length(inputs, s.inputs),
                  *outputs_end = outputs + list_length(outputs, s.outputs);
    for (const int64_t* first = outputs; first < outputs_end;) {
      const int64_t group = *first / s.group_outputs();
      const int64_t* last = std::lower_bound(first, outputs_end, (group + 1) * s.group_outputs());
      const int64_t* from = std::lower_bound(inputs, inputs_end, group * s.group_inputs);
      const int64_t* to = std::lower_bound(from, inputs_end, (group + 1) * s.group_inputs);
      const int64_t blocks = (last - first + kTileOutputs - 1) / kTileOutputs;
      for (int64_t i = 0; i < blocks; ++i) {
        const Range range = part_of(last - first, blocks, i);
        const Block block{first - outputs + range.begin, range.end - range.begin, from - inputs, to - from, panel};
        visit(subnet, block);
        panel += block.count * block.inputs * s.taps();
      }
      first = last;
    }
  }
  return panel;
}

// Every block of a call; those of subnet i are [first[i], first[i + 1]).
struct Blocks {
  Block* all;
  int64_t* first;
  int64_t panels;  // elements

  Blocks(const MaskedConv2d& args, const Host& host) {
    const int64_t subnets = args.sizes.subnets;
    all = shared<Block>(host, subnets * args.sizes.outputs);
    first = shared<int64_t>(host, subnets + 1);
    int64_t count = 0, started = 0;
    panels = for_each_block(args, [&](int64_t subnet, const Block& block) {
      while (started <= subnet) first[started++] = count;
      all[count++] = block;
    });
    while (started <= subnets) first[started++] = count;
  }

  int64_t count(int64_t subnets) const { return first[subnets]; }
};

// The weights of a block, from where they are.
template <typename S, typename T>
inline void pack_block(const MaskedConv2d& args, int64_t subnet, const Block& block, T* panel) {
  const MaskedSizes& s = args.sizes;
  const int64_t *inputs = args.inputs + subnet * s.inputs + block.input,
                *outputs = args.outputs + subnet * s.outputs + block.output;
  const int64_t taps = s.taps(), row = s.group_inputs * taps;
  const S* weight = static_cast<const S*>(args.weight);
  const int64_t begin = block.inputs > 0 ? inputs[0] / s.group_inputs * s.group_inputs : 0;  // of the group
  for (int64_t i = 0; i < block.inputs; ++i) {
    const S* from = weight + (inputs[i] - begin) * taps;
    for (int64_t o = 0; o < block.count; ++o) {
      const S* kernel = from + outputs[o] * row;
      for (int64_t k = 0; k < taps; ++k) panel[k * block.count + o] = to_accumulate(kernel[k]);
    }
    panel += taps * block.count;
  }
}

template <typename T>
void pack_panels(const MaskedConv2d& args, const Blocks& blocks, T* panels, const Host& host) {
  const int64_t subnets = args.sizes.subnets, count = blocks.count(subnets), tasks = task_count(host, count);
  with_element_type(args.parameter_dtype, [&](auto element) {
    using S = decltype(element);
    if constexpr (std::is_same_v<Accumulate<S>, T>) {
      parallel(host, tasks, [&](int64_t task) {
        const Range range = part_of(count, tasks, task);
        for (int64_t b = range.begin; b < range.end; ++b) {
          const int64_t subnet = std::upper_bound(blocks.first, blocks.first + subnets + 1, b) - blocks.first - 1;
          pack_block<S>(args, subnet, blocks.all[b], panels + blocks.all[b].panel);
        }
      });
    }
  });
}

}  // namespace
}  // namespace pyext::cpu::PYEXT_CAPABILITY
