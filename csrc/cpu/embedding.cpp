// Rows of a table (docs/math.md, section 7): the feedback of a row is |w| / stab(w) times the sum
// of the rewards of its uses; stored for the whole table, or applied to the rows in use.
//
// The uses are sorted by row, so that one thread adds up a row, in the order of its uses: the same
// bits for any number of threads. A row with many uses is added up in pieces.
#include <array>
#include <cstring>

#include "update.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kPiece = 256;  // uses that one thread adds up at a time
constexpr int kDigit = 11;       // bits of a pass of the sort

struct Use {
  int64_t row, at;
};

// Uses of rows other than the padding's, by row and within a row by position. Least significant
// digit first, which keeps equal rows in their order.
std::vector<Use> sorted_uses(const int64_t* tokens, int64_t count, int64_t rows, int64_t padding,
                             const char* op) {
  std::vector<Use> uses, other;
  uses.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = tokens[i];
    STD_TORCH_CHECK(token >= 0 && token < rows, "lfp_kernels::", op,
                    ": tokens: expected rows of the table, in [0, ", rows, "), got ", token);
    if (token != padding) uses.push_back({token, i});
  }
  other.resize(uses.size());
  for (int shift = 0; (rows - 1) >> shift > 0; shift += kDigit) {
    constexpr int64_t kMask = (int64_t(1) << kDigit) - 1;
    std::array<int64_t, kMask + 2> first{};
    for (const Use& use : uses) ++first[(use.row >> shift & kMask) + 1];
    for (int64_t k = 0; k < kMask; ++k) first[k + 1] += first[k];
    for (const Use& use : uses) other[first[use.row >> shift & kMask]++] = use;
    uses.swap(other);
  }
  return uses;
}

// Uses [first, last) of one row; `sums` is where the sum of a piece of a row goes that has more
// pieces, -1 where this is all of it.
struct Piece {
  int64_t first, last, sums;
};

struct Pieces {
  std::vector<Piece> pieces;
  std::vector<size_t> split;  // the first pieces of the rows that have more than one
  int64_t sums = 0;
};

Pieces pieces_of(const std::vector<Use>& uses) {
  Pieces found;
  const int64_t count = static_cast<int64_t>(uses.size());
  for (int64_t first = 0, last; first < count; first = last) {
    for (last = first; last < count && uses[last].row == uses[first].row;) ++last;
    const bool split = last - first > kPiece;
    if (split) found.split.push_back(found.pieces.size());
    for (int64_t at = first; at < last; at += kPiece)
      found.pieces.push_back({at, std::min(last, at + kPiece), split ? found.sums++ : -1});
  }
  return found;
}

template <class T>
LFP_CLONES void add_rows(const T* rewards, const Use* uses, int64_t count, int64_t width,
                         Acc<T>* __restrict sum) {
  const T* first = rewards + uses[0].at * width;
  for (int64_t j = 0; j < width; ++j) sum[j] = load(first, j);
  for (int64_t k = 1; k < count; ++k) {
    const T* row = rewards + uses[k].at * width;
    for (int64_t j = 0; j < width; ++j) sum[j] += load(row, j);
  }
}

template <class A>
LFP_CLONES void add_sums(const A* parts, int64_t count, int64_t width, A* __restrict sum) {
  std::memcpy(sum, parts, static_cast<size_t>(width) * sizeof(A));
  for (int64_t k = 1; k < count; ++k)
    for (int64_t j = 0; j < width; ++j) sum[j] += parts[k * width + j];
}

// take(row, sums) for every row in use, with the sums [width] of its rewards, which it may change.
template <class T, class Take>
void each_row(const Tensor& tokens, const Tensor& reward, int64_t rows, int64_t padding,
              const char* op, Take take) {
  using A = Acc<T>;
  const int64_t width = reward.size(1);
  const std::vector<Use> uses =
      sorted_uses(data<int64_t>(tokens), tokens.numel(), rows, padding, op);
  const Pieces plan = pieces_of(uses);
  const int64_t count = static_cast<int64_t>(plan.pieces.size());
  if (count == 0 || width == 0) return;
  std::vector<A> sums(static_cast<size_t>(plan.sums * width));
  const T* rewards = data<T>(reward);
  const int64_t elements = static_cast<int64_t>(uses.size()) * width / count;
  parallel_items(count, elements, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(static_cast<size_t>(width));
    for (int64_t k = begin; k < end; ++k) {
      const Piece& piece = plan.pieces[k];
      A* sum = piece.sums < 0 ? scratch.data() : sums.data() + piece.sums * width;
      add_rows(rewards, &uses[piece.first], piece.last - piece.first, width, sum);
      if (piece.sums < 0) take(uses[piece.first].row, sum);
    }
  });
  const int64_t split = static_cast<int64_t>(plan.split.size());
  parallel_items(split, split ? plan.sums * width / split : 0, [&](int64_t begin, int64_t end) {
    std::vector<A> scratch(static_cast<size_t>(width));
    for (int64_t k = begin; k < end; ++k) {
      const size_t first = plan.split[k];
      const int64_t row = uses[plan.pieces[first].first].row;
      size_t last = first;
      while (last < plan.pieces.size() && uses[plan.pieces[last].first].row == row) ++last;
      add_sums(sums.data() + plan.pieces[first].sums * width, static_cast<int64_t>(last - first),
               width, scratch.data());
      take(row, scratch.data());
    }
  });
}

// The feedback of a row from the sum of its rewards.
template <class T>
LFP_HD Acc<T> share(const T* w, int64_t i, Acc<T> sum, Acc<T> eps) {
  const Acc<T> v = load(w, i);
  return magnitude(v) / stabilize(v, eps) * sum;
}

void check_call(const Tensor& weight, const Tensor& tokens, const Tensor& reward) {
  LFP_CHECK(weight.dim() == 2 && reward.dim() == 2 && reward.size(1) == weight.size(1) &&
                reward.size(0) == tokens.numel(),
            "embedding_redistribute", "expected a reward [N, E] of N tokens, weight [V, E]");
}

Tensor embedding_redistribute(Tensor weight, Tensor tokens, Tensor reward, int64_t padding,
                              double eps) {
  weight = dense(weight), tokens = dense(tokens), reward = dense(reward);
  check_call(weight, tokens, reward);
  const int64_t width = weight.size(1);
  Tensor found = empty_like(weight, {weight.size(0), width});
  torch::stable::zero_(found);
  dispatch_dtype(weight.scalar_type(), "embedding_redistribute", [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    const T* table = data<T>(weight);
    T* out = data<T>(found);
    each_row<T>(tokens, reward, weight.size(0), padding, "embedding_redistribute",
                [=](int64_t row, A* sums) {
                  const T* w = table + row * width;
                  T* to = out + row * width;
                  serial_loop(0, width,
                              [=](int64_t i) { store(to, i, share(w, i, sums[i], A(eps))); });
                });
  });
  return found;
}

void embedding_redistribute_update(Tensor weight, Tensor tokens, Tensor reward,
                                   std::vector<Tensor> states, int64_t padding, double eps,
                                   int64_t optimizer, Params hyper) {
  const char* op = "embedding_redistribute_update";
  tokens = dense(tokens), reward = dense(reward);
  check_call(weight, tokens, reward);
  LFP_CHECK(weight.is_contiguous(), "embedding_redistribute_update", "weight must be contiguous");
  const int64_t width = weight.size(1);
  const StepCall step{optimizer, hyper, states};
  dispatch_dtype(weight.scalar_type(), op, [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    T* table = data<T>(weight);
    each_row<T>(tokens, reward, weight.size(0), padding, op, [=, &step](int64_t row, A* sums) {
      const T* w = table + row * width;
      serial_loop(0, width, [=](int64_t i) { sums[i] = share(w, i, sums[i], A(eps)); });
      step_range<T>(step, table, row * width, width, sums, op);
    });
  });
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("embedding_redistribute", TORCH_BOX(&lfp::cpu::embedding_redistribute));
  m.impl("embedding_redistribute_update", TORCH_BOX(&lfp::cpu::embedding_redistribute_update));
}
