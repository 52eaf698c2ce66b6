// Optimizer updates of many tensors in one call, and the global norm that clips them.
// All elements of all tensors form one index range, split evenly over the threads.
#include "update.h"

#include "../update_items.h"
#include "loops.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kNormChunk = 8192;  // fixed, so that the sum does not depend on the threads
constexpr int64_t kLanes = 16;        // partial sums of a chunk

// An item that covers [begin, begin + numel) of the common index range.
struct Item : UpdateItem {
  int64_t begin;
};

// Elements [from, from + count) of one tensor.
void update_item(const Item& item, int64_t from, int64_t count) {
  const char* op = "optimizer_update";
  dispatch_dtype(item.param.scalar_type(), op, [&](auto element) {
    using T = decltype(element);
    using A = Acc<T>;
    dispatch_optimizer<A>(item.code, op, [&](auto step) {
      using Optimizer = decltype(step);
      // The gradient rule's weight epilogue is the identity: the feedback comes finished.
      update_range<T, Gradient<A>, Optimizer>(
          data<T>(item.feedback) + from, data<T>(item.param) + from, state<T>(item.states, 0, from),
          state<T>(item.states, 1, from), count, RuleParams<A>{}, optimizer_params<A>(item.hyper));
    });
  });
}

// The value of a 0-dim float32 or float64 tensor; 1 where there is none.
double value_of(const std::optional<Tensor>& scale) {
  if (!scale.has_value()) return 1.0;
  if (scale->scalar_type() == ScalarType::Double) return *data<double>(*scale);
  return *data<float>(*scale);
}

void optimizer_update(std::vector<Tensor> params, std::vector<Tensor> feedback,
                      std::vector<Tensor> states, Ints codes, Params hyper,
                      std::optional<Tensor> scale) {
  const double factor = value_of(scale);
  std::vector<Item> items;
  int64_t total = 0;
  for (UpdateItem& item : update_items(params, feedback, states, codes, hyper)) {
    item.hyper[2] *= factor;
    const int64_t count = item.param.numel();
    items.push_back({std::move(item), total});
    total += count;
  }
  torch::stable::parallel_for(0, total, kGrain, [&](int64_t first, int64_t last) {
    auto item = std::upper_bound(items.begin(), items.end(), first,
                                 [](int64_t i, const Item& it) { return i < it.begin; }) -
                1;
    for (; item != items.end() && item->begin < last; ++item) {
      const int64_t from = std::max(first, item->begin) - item->begin;
      const int64_t to = std::min(last - item->begin, item->param.numel());
      if (from < to) update_item(*item, from, to - from);
    }
  });
}

// sum of squares of x[count], in float64
template <class T>
LFP_CLONES double sum_of_squares(const T* x, int64_t count) {
  double lanes[kLanes] = {};
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) {
      const double v = load(x, i + k);
      lanes[k] += v * v;
    }
  double sum = 0;
  for (int64_t i = whole; i < count; ++i) sum += double(load(x, i)) * double(load(x, i));
  for (int64_t k = 0; k < kLanes; ++k) sum += lanes[k];
  return sum;
}

Tensor global_norm(std::vector<Tensor> tensors) {
  LFP_CHECK(!tensors.empty(), "global_norm", "expected at least one tensor");
  struct Chunk {
    size_t tensor;
    int64_t begin, count;
  };
  std::vector<Tensor> sources;
  std::vector<Chunk> chunks;
  ScalarType result_type = ScalarType::Float;
  for (const Tensor& t : tensors) {
    if (t.scalar_type() == ScalarType::Double) result_type = ScalarType::Double;
    for (int64_t at = 0; at < t.numel(); at += kNormChunk)
      chunks.push_back({sources.size(), at, std::min(kNormChunk, t.numel() - at)});
    sources.push_back(dense(t));
  }
  std::vector<double> sums(chunks.size());
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), kGrain / kNormChunk,
                              [&](int64_t first, int64_t last) {
                                for (int64_t k = first; k < last; ++k) {
                                  const Tensor& t = sources[chunks[k].tensor];
                                  dispatch_dtype(t.scalar_type(), "global_norm", [&](auto element) {
                                    using T = decltype(element);
                                    sums[k] = sum_of_squares(data<T>(t) + chunks[k].begin,
                                                             chunks[k].count);
                                  });
                                }
                              });
  double total = 0;
  for (const double s : sums) total += s;
  Tensor result = torch::stable::new_empty(tensors[0], {}, result_type);
  if (result_type == ScalarType::Double)
    *data<double>(result) = std::sqrt(total);
  else
    *data<float>(result) = static_cast<float>(std::sqrt(total));
  return result;
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("optimizer_update", TORCH_BOX(&lfp::cpu::optimizer_update));
  m.impl("global_norm", TORCH_BOX(&lfp::cpu::global_norm));
}
