// Optimizer updates of many tensors in one launch, and the global norm that clips them.
//   w, a, b <- Optimizer(w, a, b, feedback)        in place, each tensor read once and written once
//   norm = sqrt(sum over all elements v * v)       float64 sums of fixed chunks, then their sum
// What a launch must know of its tensors travels in its parameters (at most 4 KB): nothing is
// copied to the device, so a CUDA graph can capture the call. A graph replays the learning rates
// that it has captured, and reads what is on the device anew: the scale, and in the live form the
// learning rate and AdamW's count of steps.
#include "../update_items.h"
#include "common.cuh"

namespace lfp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kUpdatePacks = 2;   // 16-byte accesses of a thread for each operand
constexpr int64_t kNormChunk = 8192;  // elements of a partial sum: fixed, and so are the bits
constexpr size_t kParameterBytes = 4096;

// The last of the segments whose first block is not behind `block`.
template <class Segment>
__device__ const Segment& segment_of(const Segment* segments, int count, int block) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (segments[middle].first_block <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return segments[low];
}

// ---- update

struct UpdateSegment {
  void *param, *a, *b;  // a, b: null where the optimizer has no such state
  const void* feedback;
  const float* step;  // live AdamW: steps taken before this one; else null
  int64_t count;
  int32_t first_block;
  int16_t hyper;  // index of its hyper-parameters
  bool wide;      // every pointer allows 16-byte accesses
};

template <class A>
struct UpdateBatch {
  static constexpr int kSegments = sizeof(A) == 8 ? 56 : 64, kHypers = 8;
  OptimizerParams<A> hyper[kHypers];
  UpdateSegment segments[kSegments];
  int count, hypers;
  // A factor on all feedback that is on the device; at most one of the two.
  const float* scale;
  const double* wide_scale;
  const float* lr;  // a learning rate on the device, of all segments; at most one of the two
  const double* wide_lr;
};
static_assert(sizeof(UpdateBatch<double>) <= kParameterBytes);

// Elements i .. i + V - 1. The gradient rule's weight epilogue is the identity: the feedback comes
// finished.
template <int V, class T, class Optimizer>
__device__ __forceinline__ void update_pack(const UpdateSegment& s, int64_t i,
                                            const OptimizerParams<Acc<T>>& hyper) {
  using A = Acc<T>;
  T *w = static_cast<T*>(s.param), *a = static_cast<T*>(s.a), *b = static_cast<T*>(s.b);
  A weight[V], f[V], first[V] = {}, second[V] = {};
  load<V>(w, i, weight);
  load<V>(static_cast<const T*>(s.feedback), i, f);
  if constexpr (Optimizer::kStates > 0) load<V>(a, i, first);
  if constexpr (Optimizer::kStates > 1) load<V>(b, i, second);
#pragma unroll
  for (int k = 0; k < V; ++k) Optimizer::apply(f[k], weight[k], first[k], second[k], hyper);
  store<V>(w, i, weight);
  if constexpr (Optimizer::kStates > 0) store<V>(a, i, first);
  if constexpr (Optimizer::kStates > 1) store<V>(b, i, second);
}

// 1 - (1 - rest)^n: rest = 1 - beta is what float32 holds of a beta near 1.
template <class A>
__device__ __forceinline__ A correction(A rest, int64_t n) {
  double power = 1.0, factor = 1.0 - double(rest);
  for (; n > 0; n >>= 1, factor *= factor)
    if (n & 1) power *= factor;
  return static_cast<A>(1.0 - power);
}

template <class T>
inline constexpr int64_t kUpdateChunk = kThreads * kWide<T> * kUpdatePacks;

template <class T, class Optimizer>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ UpdateBatch<Acc<T>> batch) {
  constexpr int V = kWide<T>;
  const UpdateSegment& s = segment_of(batch.segments, batch.count, blockIdx.x);
  OptimizerParams<Acc<T>> hyper = batch.hyper[s.hyper];
  if (batch.scale) hyper.scale *= static_cast<Acc<T>>(*batch.scale);
  if (batch.wide_scale) hyper.scale *= static_cast<Acc<T>>(*batch.wide_scale);
  if (batch.lr) hyper.lr = static_cast<Acc<T>>(*batch.lr);
  if (batch.wide_lr) hyper.lr = static_cast<Acc<T>>(*batch.wide_lr);
  if constexpr (Optimizer::kStates > 1)
    if (s.step) {
      const int64_t now = static_cast<int64_t>(*s.step) + 1;
      hyper.correction1 = correction(hyper.rest1, now);
      hyper.correction2 = correction(hyper.rest2, now);
    }
  const int64_t begin = int64_t(blockIdx.x - s.first_block) * kUpdateChunk<T>;
  const int64_t end = min(begin + kUpdateChunk<T>, s.count);
  const int64_t packed = s.wide ? end - (end - begin) % V : begin;
  for (int64_t i = begin + threadIdx.x * V; i < packed; i += kThreads * V)
    update_pack<V, T, Optimizer>(s, i, hyper);
  for (int64_t i = packed + threadIdx.x; i < end; i += kThreads)
    update_pack<1, T, Optimizer>(s, i, hyper);
}

// Segments of one dtype and one optimizer, launched when full.
template <class T, class Optimizer>
class Updates {
 public:
  Updates(cudaStream_t stream, const std::optional<Tensor>& scale) : stream_(stream) {
    if (scale.has_value()) point(batch_.scale, batch_.wide_scale, *scale);
  }

  // lr, step: on the device, or null.
  void add(const UpdateItem& item, const Tensor* lr, const Tensor* step) {
    const int64_t count = item.param.numel(), blocks = ceil_div(count, kUpdateChunk<T>);
    if (count == 0) return;
    LFP_CHECK(blocks < (int64_t(1) << 30), "optimizer_update", "parameter too large");
    if (batch_.count == batch_.kSegments || blocks_ + blocks >= (int64_t(1) << 31)) launch();
    if (find(item.hyper) < 0 && batch_.hypers == batch_.kHypers) launch();
    const void* rate = lr ? lr->const_data_ptr() : nullptr;
    if (rate != rate_) launch();
    rate_ = rate;
    batch_.lr = nullptr, batch_.wide_lr = nullptr;
    if (lr) point(batch_.lr, batch_.wide_lr, *lr);
    UpdateSegment& s = batch_.segments[batch_.count++];
    s.param = data<T>(item.param), s.feedback = data<T>(item.feedback);
    s.a = state<T>(item.states, 0), s.b = state<T>(item.states, 1);
    s.step = step ? data<float>(*step) : nullptr;
    s.count = count, s.first_block = static_cast<int32_t>(blocks_);
    s.wide = aligned16(static_cast<T*>(s.param), static_cast<const T*>(s.feedback),
                       static_cast<T*>(s.a), static_cast<T*>(s.b));
    int hyper = find(item.hyper);
    if (hyper < 0) {
      hyper = batch_.hypers++;
      batch_.hyper[hyper] = optimizer_params<Acc<T>>(item.hyper);
      hypers_.push_back(item.hyper);
    }
    s.hyper = static_cast<int16_t>(hyper);
    blocks_ += blocks;
  }

  void launch() {
    if (batch_.count == 0) return;
    update_kernel<T, Optimizer><<<static_cast<unsigned>(blocks_), kThreads, 0, stream_>>>(batch_);
    check_launch();
    batch_.count = batch_.hypers = 0;
    hypers_.clear();
    blocks_ = 0;
  }

 private:
  int find(const Params& hyper) const {
    const auto at = std::find(hypers_.begin(), hypers_.end(), hyper);
    return at == hypers_.end() ? -1 : static_cast<int>(at - hypers_.begin());
  }
  static void point(const float*& narrow, const double*& wide, const Tensor& value) {
    if (value.scalar_type() == ScalarType::Double)
      wide = data<double>(value);
    else
      narrow = data<float>(value);
  }
  UpdateBatch<Acc<T>> batch_{};
  std::vector<Params> hypers_;
  const void* rate_ = nullptr;
  int64_t blocks_ = 0;
  cudaStream_t stream_;
};

constexpr ScalarType kDtypes[] = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16,
                                  ScalarType::Half};

// lr, steps: one per parameter, or none at all.
void update_all(const std::vector<Tensor>& params, const std::vector<Tensor>& feedback,
                const std::vector<Tensor>& states, const Ints& codes, const Params& hyper,
                const std::optional<Tensor>& scale, const std::vector<Tensor>& lr,
                const std::vector<Tensor>& steps) {
  const char* op = "optimizer_update";
  const std::vector<UpdateItem> items = update_items(params, feedback, states, codes, hyper);
  for (const auto* live : {&lr, &steps})
    LFP_CHECK(live->empty() || live->size() == items.size(), "optimizer_update",
              "expected one learning rate and one count of steps per parameter");
  if (items.empty()) return;
  const Device device(params[0]);
  for (const ScalarType dtype : kDtypes)
    for (const int64_t code : {kSgd, kSgdMomentum, kAdamW})
      dispatch_dtype(dtype, op, [&](auto element) {
        using T = decltype(element);
        dispatch_optimizer<Acc<T>>(code, op, [&](auto step) {
          Updates<T, decltype(step)> updates(device.stream, scale);
          for (size_t k = 0; k < items.size(); ++k)
            if (items[k].param.scalar_type() == dtype && items[k].code == code)
              updates.add(items[k], lr.empty() ? nullptr : &lr[k],
                          steps.empty() ? nullptr : &steps[k]);
          updates.launch();
        });
      });
}

void optimizer_update(std::vector<Tensor> params, std::vector<Tensor> feedback,
                      std::vector<Tensor> states, Ints codes, Params hyper,
                      std::optional<Tensor> scale) {
  update_all(params, feedback, states, codes, hyper, scale, {}, {});
}

// The learning rates (0-dim, float32 or float64) and counts of steps (0-dim float32) are read when
// the kernel runs, by a replayed graph, too.
void optimizer_update_live(std::vector<Tensor> params, std::vector<Tensor> feedback,
                           std::vector<Tensor> states, Ints codes, Params hyper,
                           std::optional<Tensor> scale, std::vector<Tensor> lr,
                           std::vector<Tensor> steps) {
  update_all(params, feedback, states, codes, hyper, scale, lr, steps);
}

// ---- global norm

struct NormSegment {
  const void* values;
  int64_t count;
  int32_t first_block;
  bool wide;
};

struct NormBatch {
  static constexpr int kSegments = 160;
  NormSegment segments[kSegments];
  double* sums;  // [blocks of this launch]
  int count;
};
static_assert(sizeof(NormBatch) <= kParameterBytes);

template <int V, class T>
__device__ __forceinline__ double pack_squares(const T* values, int64_t i) {
  Acc<T> v[V];
  load<V>(values, i, v);
  double sum = 0;
#pragma unroll
  for (int k = 0; k < V; ++k) sum += double(v[k]) * double(v[k]);
  return sum;
}

// sums[block] = sum of squares of its chunk
template <class T>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ NormBatch batch) {
  constexpr int V = kWide<T>;
  __shared__ double scratch[kThreads / 32];
  const NormSegment& s = segment_of(batch.segments, batch.count, blockIdx.x);
  const T* values = static_cast<const T*>(s.values);
  const int64_t begin = int64_t(blockIdx.x - s.first_block) * kNormChunk;
  const int64_t end = min(begin + kNormChunk, s.count);
  const int64_t packed = s.wide ? end - (end - begin) % V : begin;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x * V; i < packed; i += kThreads * V)
    sum += pack_squares<V>(values, i);
  for (int64_t i = packed + threadIdx.x; i < end; i += kThreads) sum += pack_squares<1>(values, i);
  sum = block_sum<kThreads>(sum, scratch);
  if (threadIdx.x == 0) batch.sums[blockIdx.x] = sum;
}

template <class R>
__global__ void __launch_bounds__(kThreads)
    root_kernel(const double* sums, int64_t count, R* result) {
  __shared__ double scratch[kThreads / 32];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += sums[i];
  sum = block_sum<kThreads>(sum, scratch);
  if (threadIdx.x == 0) *result = static_cast<R>(square_root(sum));
}

Tensor global_norm(std::vector<Tensor> tensors) {
  LFP_CHECK(!tensors.empty(), "global_norm", "expected at least one tensor");
  const Device device(tensors[0]);
  std::vector<Tensor> sources;
  int64_t chunks = 0;
  ScalarType result_type = ScalarType::Float;
  for (const Tensor& t : tensors) {
    if (t.scalar_type() == ScalarType::Double) result_type = ScalarType::Double;
    dispatch_dtype(t.scalar_type(), "global_norm", [](auto) {});
    chunks += ceil_div(t.numel(), kNormChunk);
    sources.push_back(dense(t));
  }
  const Tensor sums = torch::stable::new_empty(tensors[0], {chunks}, ScalarType::Double);
  const Tensor result = torch::stable::new_empty(tensors[0], {}, result_type);
  double* next = data<double>(sums);
  for (const ScalarType dtype : kDtypes)
    dispatch_dtype(dtype, "global_norm", [&](auto element) {
      using T = decltype(element);
      NormBatch batch{};
      int64_t blocks = 0;
      const auto launch = [&] {
        if (batch.count == 0) return;
        batch.sums = next;
        squares_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, device.stream>>>(batch);
        check_launch();
        next += blocks;
        batch.count = 0;
        blocks = 0;
      };
      for (const Tensor& t : sources) {
        if (t.scalar_type() != dtype || t.numel() == 0) continue;
        const int64_t more = ceil_div(t.numel(), kNormChunk);
        LFP_CHECK(more < (int64_t(1) << 30), "global_norm", "tensor too large");
        if (batch.count == batch.kSegments || blocks + more >= (int64_t(1) << 31)) launch();
        batch.segments[batch.count++] = {data<T>(t), t.numel(), static_cast<int32_t>(blocks),
                                         aligned16(data<T>(t))};
        blocks += more;
      }
      launch();
    });
  const auto finish = [&](auto* to) {
    root_kernel<<<1, kThreads, 0, device.stream>>>(data<double>(sums), chunks, to);
    check_launch();
  };
  if (result_type == ScalarType::Double)
    finish(data<double>(result));
  else
    finish(data<float>(result));
  return result;
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) {
  m.impl("optimizer_update", TORCH_BOX(&lfp::cuda::optimizer_update));
  m.impl("optimizer_update_live", TORCH_BOX(&lfp::cuda::optimizer_update_live));
  m.impl("global_norm", TORCH_BOX(&lfp::cuda::global_norm));
}
