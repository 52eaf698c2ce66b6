// Forward product and redistribution of linear and convolution layers whose input is packed spikes
// (spike_events.h).
#include "spike_weights.h"

namespace lfp::cpu {
namespace {

constexpr int64_t kTileBytes = 32768;    // of the tiles that a walk works in: the nearest cache
constexpr int64_t kPanelBytes = 163840;  // of the weights of a block: pages that the TLB holds
constexpr int64_t kMostImages = 8;       // read at a time
constexpr int64_t kMostRows = 1 << 24;   // listed at a time, if everything fires

// Strides of z and s [T, N, O, H', W'].
struct OutputStrides {
  int64_t step, sample, output, row, pixel;
};
template <class A>
Scratch<A> zeros(int64_t elements) {
  auto memory = scratch<A>(elements);
  std::fill_n(memory.get(), elements, A(0));
  return memory;
}

// Images whose lists are made at a time.
int64_t images_per_list(const SpikeLayer& layer) {
  const int64_t rows = layer.rows() * layer.width * layer.channels * layer.taps();
  STD_TORCH_CHECK(rows <= INT32_MAX && layer.tile_elements() <= INT32_MAX,
                  "lfp_kernels::spike_events: an image with ", rows,
                  " products is too large for 32-bit lists");
  return std::clamp<int64_t>(kMostRows / std::max<int64_t>(rows, 1), 1, kMostImages);
}

int64_t images_per_tile(const SpikeLayer& layer, int64_t bytes) {
  return std::clamp<int64_t>(kTileBytes / (layer.tile_elements() * bytes), 1, kMostImages);
}

// f(part, first image, last image), in parallel; the parts depend on the number of threads only.
int64_t parts_of(const SpikeLayer& layer) {
  if (layer.images() == 0) return 0;
  const int64_t work =
      layer.images() * layer.rows() * layer.width * layer.channels * layer.taps() * layer.outputs;
  return work < kProductGrain ? 1
                              : std::min<int64_t>(torch::stable::get_num_threads(), layer.images());
}

template <class F>
void for_each_part(const SpikeLayer& layer, F f) {
  const int64_t images = layer.images(), parts = parts_of(layer);
  const auto run = [&](int64_t a, int64_t b) {
    for (int64_t p = a; p < b; ++p) f(p, images * p / parts, images * (p + 1) / parts);
  };
  if (parts <= 1) return run(0, parts);
  torch::stable::parallel_for(0, parts, 1, run);
}

// The output rows that a block of rows decides about: its own, and where nothing else reaches.
struct OutputRows {
  int64_t begin, end, shift;  // output row y lies in row y + shift of the tile

  OutputRows(const SpikeLayer& layer, const SpikeImages& images)
      : begin(images.row == 0 ? 0 : images.row + layer.ph),
        end(images.row + images.rows == layer.height ? layer.out_height()
                                                     : images.row + images.rows + layer.ph),
        shift(layer.kh - 1 - layer.ph - images.row) {}
};

template <class A>
void forward(const SpikeLayer& layer, const A* packed, const A* bias, const OutputStrides& stride,
             A* z) {
  const auto walks = spike_walks_of_this_processor<A>();
  const int64_t width = layer.block_channels();
  const int64_t block_size = (layer.taps() * layer.channels + 1) * width,
                most = images_per_list(layer);
  std::vector<A> start(layer.blocks * width);
  if (bias) std::copy_n(bias, layer.outputs, start.begin());
  for_each_part(layer, [&](int64_t, int64_t begin, int64_t end) {
    SpikeReader spikes(layer);
    OutputLists lists(layer);
    for_each_images(layer, begin, end, most, [&](const SpikeImages& images) {
      spikes.read(images);
      spikes.list(0, images.count);
      const OutputRows rows(layer, images);
      lists.gather(spikes, images.row, images.rows, rows.begin, rows.end);
      const int64_t pixels = (rows.end - rows.begin) * layer.out_width();
      for (int64_t b = 0; b < layer.blocks; ++b)
        for (int64_t i = 0; i < images.count; ++i)
          walks.add(lists.starts() + i * pixels, lists.rows(), pixels, layer.vectors,
                    packed + b * block_size, start.data() + b * width,
                    std::min(width, layer.outputs - b * width), stride.pixel,
                    z + (images.step + i) * stride.step + images.sample * stride.sample +
                        rows.begin * stride.row + b * width);
    });
  });
}

// What a redistribution computes, and where it goes.
template <class A>
struct Feedback {
  const A *packed, *signal;
  OutputStrides stride;
  A* input = nullptr;                          // [T, N, H, W, C]
  std::vector<Scratch<A>> weight_sums;         // per part, packed
  std::vector<std::vector<double>> bias_sums;  // per part
};

// from[0 .. L - 1] to `to` and added to sums; with count < L, zeros behind count.
template <int64_t L, class A>
LFP_HD void read_lanes(const A* from, int64_t stride, int64_t count, A* to, A* sums) {
  if (stride == 1 && count >= L) {
    for (int64_t o = 0; o < L; ++o) to[o] = from[o];
    for (int64_t o = 0; o < L; ++o) sums[o] += to[o];
    return;
  }
  for (int64_t o = 0; o < L; ++o) to[o] = o < count ? from[o * stride] : A(0);
  for (int64_t o = 0; o < L; ++o) sums[o] += to[o];
}

// The signals of an image, read once, in its tiles: `tile` of the first block of outputs, `between`
// elements before the next block's. The borders of the tiles stay as they are. Adds the signals up.
template <class A>
LFP_CLONES void read_signals(const SpikeLayer& layer, const OutputRows& rows, const A* s,
                             const OutputStrides& stride, int64_t between, A* tile, A* total,
                             A* outside, double* sums) {
  constexpr int64_t L = kSpikeLanes<A>;
  const int64_t width = layer.block_channels(), shift = layer.kw - 1 - layer.pw;
  const int64_t left = -shift, right = layer.tile_width() - shift;
  std::fill_n(total, layer.blocks * width, A(0));
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    const int64_t line = y + rows.shift;
    const bool inside = line >= 0 && line < layer.tile_height();
    for (int64_t x = 0; x < layer.out_width(); ++x) {
      const A* from = s + y * stride.row + x * stride.pixel;
      const bool here = inside && x >= left && x < right;
      A* to = here ? tile + (line * layer.tile_width() + x + shift) * width : outside;
      int64_t o = 0;
      for (int64_t b = 0; b < layer.blocks; ++b, to += here ? between : 0)
        for (int64_t v = 0; v < width; v += L, o += L)
          read_lanes<L>(from + o * stride.output, stride.output, layer.outputs - o, to + v,
                        total + o);
    }
  }
  for (int64_t o = 0; o < layer.outputs; ++o) sums[o] += total[o];
}

// [T, N, H, W, C]: 0 but at the spikes.
template <class A>
void write_input_rewards(const SpikeLayer& layer, const SpikeReader& spikes, const int32_t* numbers,
                         const A* dots, int64_t stride, A* to) {
  const int32_t *starts = spikes.starts(), *channels = spikes.channels();
  for (int64_t i = 0; i < spikes.listed(); ++i, to += stride, starts += spikes.pixels()) {
    std::fill_n(to, spikes.pixels() * layer.channels, A(0));
    for (int64_t p = 0; p < spikes.pixels(); ++p)
      for (int32_t e = starts[p]; e < starts[p + 1]; ++e)
        to[p * layer.channels + channels[e]] = dots[numbers[e]];
  }
}

template <class A>
void redistribute(const SpikeLayer& layer, Feedback<A>& f) {
  const auto walks = spike_walks_of_this_processor<A>();
  const auto offsets = layer.slot_offsets();
  const int64_t listed = images_per_list(layer);
  const int64_t most = std::min(images_per_tile(layer, sizeof(A)), listed);
  const int64_t width = layer.block_channels();
  const int64_t row = layer.slots() * layer.lanes, block_size = layer.channels * row;
  const int64_t image = layer.height * layer.width * layer.channels;
  f.weight_sums.resize(parts_of(layer));
  f.bias_sums.resize(parts_of(layer));
  for_each_part(layer, [&](int64_t part, int64_t begin, int64_t end) {
    auto& sums = f.weight_sums[part];
    sums = zeros<A>(layer.blocks * block_size);
    auto& bias = f.bias_sums[part];
    bias.assign(layer.blocks * width, 0.0);
    const int64_t between = most * layer.tile_elements();
    const auto tiles = zeros<A>(layer.blocks * between);
    std::vector<A> total(layer.blocks * width), outside(width), dots;
    SpikeReader spikes(layer);
    ChannelLists lists(layer);
    for_each_images(layer, begin, end, listed, [&](const SpikeImages& images) {
      spikes.read(images);
      const OutputRows rows(layer, images);
      for (int64_t first = 0; first < images.count; first += most) {
        const int64_t count = std::min(most, images.count - first);
        const int64_t step = images.step + first;
        spikes.list(first, count);
        lists.sort(spikes);
        dots.assign(spikes.total() + 3, A(0));
        for (int64_t i = 0; i < count; ++i)
          read_signals(layer, rows,
                       f.signal + (step + i) * f.stride.step + images.sample * f.stride.sample,
                       f.stride, between, tiles.get() + i * layer.tile_elements(), total.data(),
                       outside.data(), bias.data());
        int64_t at = 0;
        for (int64_t b = 0; b < layer.blocks; ++b)
          for (int64_t c = 0; c < layer.channels; ++c, at += row)
            walks.collect(lists.places(c), lists.count(c), offsets.data(), layer.slots(),
                          f.packed + at, tiles.get() + b * between, sums.get() + at,
                          dots.data() + lists.number(c));
        if (f.input)
          write_input_rewards(layer, spikes, lists.numbers(), dots.data(), layer.samples * image,
                              f.input + (step * layer.samples + images.sample) * image +
                                  images.row * layer.width * layer.channels);
      }
    });
  });
}

template <class F>
void dispatch_float(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    default: STD_TORCH_CHECK(false, "lfp_kernels::", op, ": expected float32 or float64");
  }
}

Tensor run_forward(SpikeLayer layer, const Tensor& weight, const WeightStrides& weight_stride,
                   std::optional<Tensor> bias, const Ints& size, const char* op) {
  Tensor z = empty_like(weight, size);
  if (bias) bias = dense(*bias);
  dispatch_float(weight.scalar_type(), op, [&](auto element) {
    using A = decltype(element);
    if (z.numel() == 0) return;
    const int64_t panel = (layer.taps() * layer.channels + 1) * kSpikeLanes<A> * sizeof(A);
    layer.cut_outputs<A>(std::clamp<int64_t>(kPanelBytes / panel, 2, kMostSums));
    const auto packed = pack_weights(layer, Packing(layer, true), data<A>(weight), weight_stride);
    const int64_t pixel = layer.outputs, row = layer.out_width() * pixel;
    const int64_t sample = layer.out_height() * row;
    forward<A>(layer, packed.get(), bias ? data<A>(*bias) : nullptr,
               {layer.samples * sample, sample, 1, row, pixel}, data<A>(z));
  });
  return z;
}

struct Wanted {
  bool magnitude, input, weight, bias;
};

using Tensors = std::tuple<Tensor, Tensor, Tensor>;

Tensors run_redistribute(SpikeLayer layer, const Tensor& weight, const WeightStrides& weight_stride,
                         std::optional<Tensor> bias, const Tensor& signal,
                         const OutputStrides& stride, const Wanted& want, const Ints& input_size,
                         const char* op) {
  Tensor input = want.input ? empty_like(weight, input_size) : none_like(weight);
  Tensor dw = want.weight ? empty_like(weight, Ints(weight.sizes().begin(), weight.sizes().end()))
                          : none_like(weight);
  Tensor db = want.bias ? empty_like(weight, {layer.outputs}) : none_like(weight);
  if (bias) bias = dense(*bias);
  dispatch_float(weight.scalar_type(), op, [&](auto element) {
    using A = decltype(element);
    if (layer.outputs == 0) return void(std::fill_n(data<A>(input), input.numel(), A(0)));
    layer.cut_outputs<A>(kMostSlots / layer.taps());
    const Packing packing(layer, false);
    const auto packed = pack_weights(layer, packing, data<A>(weight), weight_stride);
    Feedback<A> f{packed.get(), data<A>(signal), stride};
    f.input = want.input ? data<A>(input) : nullptr;
    redistribute(layer, f);
    if (want.weight)
      finish_weights(layer, packing, packed.get(), f.weight_sums, want.magnitude, data<A>(dw));
    for (int64_t o = 0; want.bias && o < layer.outputs; ++o) {
      double sum = 0;
      for (const auto& part : f.bias_sums) sum += part[o];
      data<A>(db)[o] = A(want.magnitude ? sum * std::abs(data<A>(*bias)[o]) : sum);
    }
  });
  return {input, dw, db};
}

SpikeLayer linear_layer(const Tensor& bits, int64_t steps, const Tensor& weight) {
  const int64_t samples = bits.size(1);
  return {steps,
          1,
          weight.size(1),
          samples,
          1,
          weight.size(0),
          1,
          1,
          0,
          0,
          data<uint8_t>(bits),
          bits.stride(0),
          0,
          bits.stride(2),
          bits.stride(1),
          0};
}

SpikeLayer conv_layer(const Tensor& bits, int64_t steps, const Tensor& weight,
                      const Ints& padding) {
  return {steps,          bits.size(1),   bits.size(2),        bits.size(3),
          bits.size(4),   weight.size(0), weight.size(2),      weight.size(3),
          padding[0],     padding[1],     data<uint8_t>(bits), bits.stride(0),
          bits.stride(1), bits.stride(2), bits.stride(3),      bits.stride(4)};
}

WeightStrides strides_of(const Tensor& w) {
  const bool flat = w.dim() == 2;
  return {w.stride(0), w.stride(1), flat ? 0 : w.stride(2), flat ? 0 : w.stride(3)};
}

Tensor spike_linear_forward(Tensor bits, int64_t steps, Tensor weight, std::optional<Tensor> bias) {
  return run_forward(linear_layer(bits, steps, weight), weight, strides_of(weight), bias,
                     {steps, bits.size(1), weight.size(0)}, "spike_linear_forward");
}

Tensors spike_linear_redistribute(Tensor bits, int64_t steps, Tensor weight,
                                  std::optional<Tensor> bias, Tensor signal, bool magnitude,
                                  bool need_input, bool need_weight, bool need_bias) {
  return run_redistribute(linear_layer(bits, steps, weight), weight, strides_of(weight), bias,
                          signal, {signal.stride(0), 0, signal.stride(2), signal.stride(1), 0},
                          {magnitude, need_input, need_weight, need_bias},
                          {steps, bits.size(1), bits.size(2)}, "spike_linear_redistribute");
}

Tensor spike_conv2d_forward(Tensor bits, int64_t steps, Tensor weight, std::optional<Tensor> bias,
                            Ints padding) {
  const SpikeLayer layer = conv_layer(bits, steps, weight, padding);
  return run_forward(layer, weight, strides_of(weight), bias,
                     {steps, layer.samples, layer.out_height(), layer.out_width(), layer.outputs},
                     "spike_conv2d_forward");
}

Tensors spike_conv2d_redistribute(Tensor bits, int64_t steps, Tensor weight,
                                  std::optional<Tensor> bias, Tensor signal, Ints padding,
                                  bool magnitude, bool need_input, bool need_weight,
                                  bool need_bias) {
  const SpikeLayer layer = conv_layer(bits, steps, weight, padding);
  return run_redistribute(
      layer, weight, strides_of(weight), bias, signal,
      {signal.stride(0), signal.stride(1), signal.stride(2), signal.stride(3), signal.stride(4)},
      {magnitude, need_input, need_weight, need_bias},
      {steps, layer.samples, layer.height, layer.width, layer.channels},
      "spike_conv2d_redistribute");
}

}  // namespace
}  // namespace lfp::cpu

STABLE_TORCH_LIBRARY_IMPL(lfp_kernels, CPU, m) {
  m.impl("spike_linear_forward", TORCH_BOX(&lfp::cpu::spike_linear_forward));
  m.impl("spike_linear_redistribute", TORCH_BOX(&lfp::cpu::spike_linear_redistribute));
  m.impl("spike_conv2d_forward", TORCH_BOX(&lfp::cpu::spike_conv2d_forward));
  m.impl("spike_conv2d_redistribute", TORCH_BOX(&lfp::cpu::spike_conv2d_redistribute));
}
