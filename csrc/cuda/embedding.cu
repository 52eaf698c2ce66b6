// Rows of a table (docs/math.md, section 7): the feedback of a row is |w| / stab(w) times the sum
// of the rewards of its uses; stored for the whole table, or applied to the rows in use.
//
// The uses are sorted by row and cut into windows. A block stands at every use; the one at the
// first use of a row adds up the row's uses to the end of the window and then, window by window,
// what another kernel has summed of the rest: no atomics, the same bits every time, and a row that
// is used often is added up by many blocks. The host never waits to learn how many rows there are.
#include <array>

#include "common.cuh"

namespace lfp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWindow = 64;  // uses

template <class T>
struct Uses {
  const int64_t *tokens, *places;  // [count], sorted; where in `reward` each use is
  const T *reward, *weight;        // [count, width], [rows, width]
  int64_t count, rows, width, padding;
  Acc<T> eps;
  Acc<T>* carried;  // [windows, width]: of a row that began before the window, its uses in it
};

// How many of the sorted tokens first, first + stride, ... before `end` are `token`, up to the
// first that is not. For whole warps.
__device__ __forceinline__ int64_t run_length(const int64_t* tokens, int64_t token, int64_t first,
                                              int64_t end, int64_t stride) {
  for (int64_t found = 0;; found += 32) {
    const int64_t i = first + (found + threadIdx.x % 32) * stride;
    const unsigned same = __ballot_sync(0xffffffffu, i < end && tokens[i] == token);
    if (same != 0xffffffffu) return found + __popc(same);
  }
}

template <int V, class T>
__device__ __forceinline__ void add_uses(const Uses<T>& u, int64_t first, int64_t count,
                                         int64_t column, Acc<T> (&sum)[V]) {
#pragma unroll 4
  for (int64_t i = first; i < first + count; ++i) {
    Acc<T> r[V];
    load<V>(u.reward, u.places[i] * u.width + column, r);
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += r[k];
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) carried_rows_kernel(const Uses<T> u) {
  const int64_t window = int64_t(blockIdx.x) + 1, first = window * kWindow;
  const int64_t token = u.tokens[first];
  if (token == u.padding || u.tokens[first - 1] != token) return;
  const int64_t count = run_length(u.tokens, token, first, min(first + kWindow, u.count), 1);
  for (int64_t c = threadIdx.x * V; c < u.width; c += blockDim.x * V) {
    Acc<T> sum[V] = {};
    add_uses(u, first, count, c, sum);
    store<V>(u.carried, window * u.width + c, sum);
  }
}

// take(offset, w, feedback) for every row in use.
template <class T, int V, class Take>
__global__ void __launch_bounds__(kThreads, 3) rows_kernel(const Uses<T> u, const Take take) {
  using A = Acc<T>;
  const int64_t at = blockIdx.x, token = u.tokens[at];
  if (token == u.padding || (at > 0 && u.tokens[at - 1] == token)) return;
  if (token < 0 || token >= u.rows) __trap();
  const int64_t next = (at / kWindow + 1) * kWindow;
  const int64_t count = run_length(u.tokens, token, at, min(next, u.count), 1);
  const int64_t windows = run_length(u.tokens, token, next, u.count, kWindow);
  for (int64_t c = threadIdx.x * V; c < u.width; c += blockDim.x * V) {
    A sum[V] = {}, w[V];
    add_uses(u, at, count, c, sum);
#pragma unroll 4
    for (int64_t k = 0; k < windows; ++k) {
      A more[V];
      load<V>(u.carried, (next / kWindow + k) * u.width + c, more);
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += more[j];
    }
    load<V>(u.weight, token * u.width + c, w);
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] *= magnitude(w[k]) / stabilize(w[k], u.eps);
    take(token * u.width + c, w, sum);
  }
}

template <class T>
struct Store {
  T* out;
  template <int V>
  __device__ __forceinline__ void operator()(int64_t offset, const Acc<T> (&)[V],
                                             const Acc<T> (&f)[V]) const {
    store<V>(out, offset, f);
  }
};

template <class T, class Optimizer>
struct Step {
  T *weight, *a, *b;
  OptimizerParams<Acc<T>> hyper;
  template <int V>
  __device__ __forceinline__ void operator()(int64_t offset, Acc<T> (&w)[V],
                                             const Acc<T> (&f)[V]) const {
    Acc<T> first[V] = {}, second[V] = {};
    if constexpr (Optimizer::kStates > 0) load<V>(a, offset, first);
    if constexpr (Optimizer::kStates > 1) load<V>(b, offset, second);
#pragma unroll
    for (int k = 0; k < V; ++k) Optimizer::apply(f[k], w[k], first[k], second[k], hyper);
    store<V>(weight, offset, w);
    if constexpr (Optimizer::kStates > 0) store<V>(a, offset, first);
    if constexpr (Optimizer::kStates > 1) store<V>(b, offset, second);
  }
};

// Tokens in ascending order, equal ones as they came, and where each was.
std::array<Tensor, 2> sorted(const Tensor& tokens) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(tokens), from(std::optional<bool>(true)), from(int64_t(0)),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

template <class T, int V, class Take>
void launch(const Uses<T>& u, const Take& take, cudaStream_t stream) {
  const int64_t packs = ceil_div<int64_t>(u.width, V);
  const auto threads =
      static_cast<unsigned>(std::clamp<int64_t>(ceil_div<int64_t>(packs, 32) * 32, 32, kThreads));
  const int64_t windows = ceil_div(u.count, kWindow);
  if (windows > 1) {
    carried_rows_kernel<T, V><<<static_cast<unsigned>(windows - 1), threads, 0, stream>>>(u);
    check_launch();
  }
  rows_kernel<T, V><<<static_cast<unsigned>(u.count), threads, 0, stream>>>(u, take);
  check_launch();
}

// take for the rows in use; `pointers`: what else it accesses.
template <class T, class Take, class... P>
void each_row(const Tensor& weight, const Tensor& tokens, const Tensor& reward, int64_t padding,
              double eps, const Take& take, cudaStream_t stream, const P*... pointers) {
  const int64_t count = tokens.numel(), width = weight.size(1);
  LFP_CHECK(
      weight.dim() == 2 && reward.dim() == 2 && reward.size(0) == count && reward.size(1) == width,
      "embedding_redistribute", "expected a reward [N, E] of N tokens, weight [V, E]");
  if (count == 0 || width == 0) return;
  LFP_CHECK(count <= INT_MAX, "embedding_redistribute", "too many tokens: ", count);
  const auto [ascending, places] = sorted(tokens);
  const auto type = std::is_same_v<Acc<T>, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor carried = torch::stable::new_empty(
      weight, {count > kWindow ? ceil_div(count, kWindow) : 0, width}, type);
  const Uses<T> u{data<int64_t>(ascending),
                  data<int64_t>(places),
                  data<T>(reward),
                  data<T>(weight),
                  count,
                  weight.size(0),
                  width,
                  padding,
                  Acc<T>(eps),
                  data<Acc<T>>(carried)};
  if (width % kWide<T> == 0 && aligned16(u.reward, u.weight, pointers...))
    launch<T, kWide<T>>(u, take, stream);
  else
    launch<T, 1>(u, take, stream);
}

Tensor embedding_redistribute(Tensor weight, Tensor tokens, Tensor reward, int64_t padding,
                              double eps) {
  const Device device(weight);
  weight = dense(weight), tokens = dense(tokens), reward = dense(reward);
  Tensor found = empty_like(weight, {weight.size(0), weight.size(1)});
  if (found.numel() == 0) return found;
  LFP_CUDA_CHECK(
      cudaMemsetAsync(found.data_ptr(), 0, found.numel() * found.element_size(), device.stream));
  dispatch_dtype(weight.scalar_type(), "embedding_redistribute", [&](auto element) {
    using T = decltype(element);
    const Store<T> take{data<T>(found)};
    each_row<T>(weight, tokens, reward, padding, eps, take, device.stream, take.out);
  });
  return found;
}

void embedding_redistribute_update(Tensor weight, Tensor tokens, Tensor reward,
                                   std::vector<Tensor> states, int64_t padding, double eps,
                                   int64_t optimizer, Params hyper) {
  const char* op = "embedding_redistribute_update";
  const Device device(weight);
  LFP_CHECK(weight.is_contiguous(), "embedding_redistribute_update", "weight must be contiguous");
  tokens = dense(tokens), reward = dense(reward);
  dispatch_dtype(weight.scalar_type(), op, [&](auto element) {
    using T = decltype(element);
    dispatch_optimizer<Acc<T>>(optimizer, op, [&](auto step) {
      const Step<T, decltype(step)> take{data<T>(weight), state<T>(states, 0), state<T>(states, 1),
                                         optimizer_params<Acc<T>>(hyper)};
      each_row<T>(weight, tokens, reward, padding, eps, take, device.stream, take.a, take.b);
    });
  });
}

}  // namespace
}  // namespace lfp::cuda

LFP_REGISTER(m) {
  m.impl("embedding_redistribute", TORCH_BOX(&lfp::cuda::embedding_redistribute));
  m.impl("embedding_redistribute_update", TORCH_BOX(&lfp::cuda::embedding_redistribute_update));
}
