// memory_contrast on the CPU. Compiled once per instruction set (PYEXT_CAPABILITY is its namespace).
//
// A gathered row meets the embeddings of all other peers while it is in registers, in the forward pass (scores) and in
// the backward pass (gradients, which need the normaliser and hence all scores first). Scores become weights in place,
// so the backward pass is one weighted sum of rows; keeping them costs 4 bytes per pair, image and entry and saves the
// backward pass half of its arithmetic, which is what bounds it where rows come from cache.
#include "cpu/memory_contrast.h"

#include "cpu/memory_contrast/loss.h"
#include "cpu/memory_contrast/order.h"
#include "cpu/memory_contrast/rows.h"

namespace pyext::cpu::PYEXT_CAPABILITY {
namespace {

// Rows of one block: the length of a partial sum in T.
constexpr int64_t kBlock = 64;

template <typename S>
class Contrast {
  using T = Accumulate<S>;

 public:
  Contrast(const MemoryContrast& args, const Host& host)
      : args_(args), s_(args.sizes), tiles_(tiles_of(args, sizeof(S))), host_(host), pitch_(round_up<T>(s_.features)) {}

  bool forward() {
    if (!order_rows(args_, tiles_, host_)) return false;
    const T* embeddings = padded_embeddings();
    double* sums = shared_zeros<double>(host_, s_.pairs() * s_.batch);
    visit_all(args_, tiles_, host_, [&](int64_t bank, int64_t b, int64_t first, int64_t count) {
      in_blocks(bank, first, count, b, [&](auto peers, int64_t other, const S* const* row, int64_t k, int64_t n) {
        score_block<decltype(peers)::value>(embeddings, sums, bank, other, b, row, k, n);
      });
    });
    *static_cast<T*>(args_.loss) = static_cast<T>(weigh(sums));
    return true;
  }

  bool backward() {
    if (!rows_are_valid(args_)) return false;
    T* gradients = shared_zeros<T>(host_, s_.peers * s_.batch * pitch_);
    visit_all(args_, tiles_, host_, [&](int64_t bank, int64_t b, int64_t first, int64_t count) {
      in_blocks(bank, first, count, b, [&](auto peers, int64_t other, const S* const* row, int64_t k, int64_t n) {
        add_block<decltype(peers)::value>(gradients, bank, other, b, row, k, n);
      });
    });
    write_gradients(gradients);
    return true;
  }

 private:
  // Embedding of peer j and image b at (j * batch + b) * pitch, with zeros up to whole vectors.
  const T* padded_embeddings() {
    T* padded = shared_zeros<T>(host_, s_.peers * s_.batch * pitch_);
    const T* from = static_cast<const T*>(args_.embeddings);
    for (int64_t v = 0; v < s_.peers * s_.batch; ++v) {
      std::memcpy(padded + v * pitch_, from + v * s_.features, s_.features * sizeof(T));
    }
    return padded;
  }

  T* weights(int64_t bank, int64_t other, int64_t b) const {
    return static_cast<T*>(args_.weights) + ((bank * s_.others() + other) * s_.batch + b) * s_.entries;
  }

  template <typename E>
  E* of_peer(E* data, int64_t bank, int64_t other, int64_t b) const {
    return data + (memory_contrast::peer_of(bank, other) * s_.batch + b) * pitch_;
  }

  // Calls work(number of peers, first of them, addresses of rows, first entry, entries) for blocks of entries, and for
  // the other peers in groups.
  template <typename Work>
  void in_blocks(int64_t bank, int64_t first, int64_t count, int64_t b, Work work) const {
    constexpr int64_t kAhead = 2 * kLanes<T> + kPrefetchRows;  // multiplied to whole vectors, or prefetched
    const S* row[kBlock + kAhead];
    const int32_t* rows = args_.rows + b * s_.entries;
    const S* data = static_cast<const S*>(args_.banks[bank]);
    for (int64_t begin = 0; begin < count; begin += kBlock) {
      const int64_t size = count - begin < kBlock ? count - begin : kBlock;
      const int64_t known = count - begin < size + kAhead ? count - begin : size + kAhead;
      for (int64_t k = 0; k < known; ++k) row[k] = data + rows[first + begin + k] * args_.pitch[bank];
      for (int64_t k = known; k < size + kAhead; ++k) row[k] = row[known - 1];
      for (int64_t other = 0; other < s_.others(); other += kMaxPeers) {
        const int64_t left = s_.others() - other;
        if (left == 1) {
          work(std::integral_constant<int, 1>(), other, row, first + begin, size);
        } else if (left == 2) {
          work(std::integral_constant<int, 2>(), other, row, first + begin, size);
        } else {
          work(std::integral_constant<int, 3>(), other, row, first + begin, size);
        }
      }
    }
  }

  template <int Peers>
  void score_block(const T* embeddings, double* sums, int64_t bank, int64_t other, int64_t b, const S* const* row,
                   int64_t k, int64_t n) const {
    const T* embedding[Peers];
    T* out[Peers];
    Vec<T> sum[Peers] = {};
    for (int p = 0; p < Peers; ++p) {
      embedding[p] = of_peer(embeddings, bank, other + p, b);
      out[p] = weights(bank, other + p, b) + k;
    }
    const T scale = static_cast<T>(1 / args_.temperature);
    for (int64_t r = 0; r < n; r += kLanes<T>) {
      for (int64_t ahead = 0; ahead < kLanes<T>; ++ahead) prefetch_row(row[r + kPrefetchRows + ahead], s_.features);
      Vec<T> scores[Peers];
      score_rows<Peers>(row + r, n - r, embedding, s_.features, scores);
      for (int p = 0; p < Peers; ++p) {
        const Vec<T> exponential = exp(scores[p] * scale);
        if (n - r >= kLanes<T>) {
          store<T>(out[p] + r, exponential);
          sum[p] += exponential;
        } else {
          T lanes[kLanes<T>];
          store<T>(lanes, exponential);
          std::memcpy(out[p] + r, lanes, (n - r) * sizeof(T));
          for (int64_t i = 0; i < n - r; ++i) sum[p][i] += lanes[i];
        }
      }
    }
    for (int p = 0; p < Peers; ++p) {
      sums[(bank * s_.others() + other + p) * s_.batch + b] += sum_wide<T>(widen<T>(sum[p]));
    }
  }

  // Exponentials to weights; returns the loss.
  double weigh(const double* sums) {
    const int64_t tasks = s_.pairs() * s_.batch;
    double* losses = shared_zeros<double>(host_, tasks);
    parallel(host_, tasks, [&](int64_t task) {
      const double* of_pair = sums + task / s_.batch * s_.batch;
      double total = 0;
      for (int64_t b = 0; b < s_.batch; ++b) total += of_pair[b];
      // Z: the number of rows times the mean exponential of the batch.
      const double normaliser = total * static_cast<double>(s_.rows) / static_cast<double>(s_.batch * s_.entries);
      losses[task] = to_weights(static_cast<T*>(args_.weights) + task * s_.entries, s_.entries, normaliser,
                                memory_contrast::noise(s_));
    });
    double loss = 0;
    for (int64_t task = 0; task < tasks; ++task) loss += losses[task];
    return loss / static_cast<double>(s_.batch);
  }

  template <int Peers>
  void add_block(T* gradients, int64_t bank, int64_t other, int64_t b, const S* const* row, int64_t k,
                 int64_t n) const {
    const T* weight[Peers];
    T* gradient[Peers];
    for (int p = 0; p < Peers; ++p) {
      weight[p] = weights(bank, other + p, b) + k;
      gradient[p] = of_peer(gradients, bank, other + p, b);
    }
    add_weighted_rows<Peers>(row, n, s_.features, weight, gradient);
  }

  void write_gradients(const T* gradients) const {
    const double factor = 1 / (args_.temperature * static_cast<double>(s_.batch));
    const T scale = static_cast<T>(static_cast<double>(*static_cast<const T*>(args_.grad_loss)) * factor);
    T* out = static_cast<T*>(args_.grad_embeddings);
    for (int64_t v = 0; v < s_.peers * s_.batch; ++v) {
      for (int64_t c = 0; c < s_.features; ++c) out[v * s_.features + c] = gradients[v * pitch_ + c] * scale;
    }
  }

  const MemoryContrast& args_;
  const memory_contrast::Sizes& s_;
  const Tiles tiles_;
  const Host& host_;
  const int64_t pitch_;
};

bool run_forward(const MemoryContrast& args, const Host& host) {
  return with_element_type(args.dtype, [&](auto zero) { return Contrast<decltype(zero)>(args, host).forward(); });
}

bool run_backward(const MemoryContrast& args, const Host& host) {
  return with_element_type(args.dtype, [&](auto zero) { return Contrast<decltype(zero)>(args, host).backward(); });
}

}  // namespace

const MemoryContrastKernels memory_contrast_kernels = {run_forward, run_backward};

}  // namespace pyext::cpu::PYEXT_CAPABILITY
