#include <array>

#include "spike_events.h"

namespace lfp::cpu {
namespace {

// Byte r, bit c of the result is byte c, bit r of x.
LFP_HD uint64_t transpose_bits(uint64_t x) {
  uint64_t t = (x ^ (x >> 7)) & 0x00AA00AA00AA00AAull;
  x ^= t ^ (t << 7);
  t = (x ^ (x >> 14)) & 0x0000CCCC0000CCCCull;
  x ^= t ^ (t << 14);
  t = (x ^ (x >> 28)) & 0x00000000F0F0F0F0ull;
  return x ^ t ^ (t << 28);
}

// The places of the ones in each byte, and how many.
struct Ones {
  uint8_t places[256][8] = {}, count[256] = {};
  constexpr Ones() {
    for (int byte = 0; byte < 256; ++byte)
      for (uint8_t bit = 0; bit < 8; ++bit)
        if (byte >> bit & 1) places[byte][count[byte]++] = bit;
  }
};
constexpr Ones kOnes;

constexpr int64_t kGroup = 8;  // channels that one look-up lists
constexpr int64_t kMostCopied = 64;

// masks[image t - first][pixel][group] of the steps first .. last - 1 of a plane.
LFP_CLONES void read_plane(const uint8_t* from, const int64_t* bytes, int64_t pixels,
                           int64_t channels, int64_t channel_stride, int64_t first, int64_t last,
                           uint8_t* masks) {
  const int64_t groups = (channels + kGroup - 1) / kGroup;
  for (int64_t p = 0; p < pixels; ++p)
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* at = from + bytes[p] + g * kGroup * channel_stride;
      const int64_t count = std::min(kGroup, channels - g * kGroup);
      uint64_t x = 0;
      if (count == kGroup)
#pragma GCC unroll 8
        for (int64_t j = 0; j < kGroup; ++j) x |= uint64_t(at[j * channel_stride]) << (8 * j);
      else
        for (int64_t j = 0; j < count; ++j) x |= uint64_t(at[j * channel_stride]) << (8 * j);
      x = transpose_bits(x) >> (8 * (first % kSteps));
      uint8_t* to = masks + p * groups + g;
      for (int64_t t = first; t < last; ++t, x >>= 8, to += pixels * groups)
        *to = static_cast<uint8_t>(x);
    }
}

// Lists the channels of the ones of a block's masks; returns the number after the last.
LFP_CLONES int32_t list_ones(const uint8_t* masks, int64_t pixels, int64_t groups, int32_t n,
                             int32_t* starts, int32_t* channels) {
  for (int64_t p = 0; p < pixels; ++p) {
    starts[p] = n;
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t mask = *masks++;
      const int32_t first = static_cast<int32_t>(g * kGroup);
      for (int64_t j = 0; j < kGroup; ++j) channels[n + j] = first + kOnes.places[mask][j];
      n += kOnes.count[mask];
    }
  }
  return n;
}

// Copies a list, each entry plus `offset`: kCopied entries at a time, needed or not, and the first
// without a test, so that the processor mispredicts the lists longer than that and no others.
template <int64_t kCopied>
LFP_HD int32_t* append(const int32_t* from, int64_t count, int32_t offset, int32_t* to) {
  for (int64_t j = 0; j < kCopied; ++j) to[j] = from[j] + offset;
  for (int64_t i = kCopied; i < count; i += kCopied)
    for (int64_t j = 0; j < kCopied; ++j) to[i + j] = from[i + j] + offset;
  return to + count;
}

// The lists of one output row. starts, channels: of the pixels of the block.
template <int64_t kCopied>
LFP_CLONES int32_t* gather_row(const SpikeLayer& layer, const int32_t* starts,
                               const int32_t* channels, int64_t y, int64_t rows,
                               int32_t* list_starts, int32_t* lists, int32_t* to) {
  const int64_t width = layer.width;
  const int32_t C = static_cast<int32_t>(layer.channels);
  const int32_t zeros = static_cast<int32_t>(layer.taps()) * C;
  const int64_t top = std::max<int64_t>(0, layer.ph - y);
  const int64_t bottom = std::min(layer.kh, rows + layer.ph - y);
  for (int64_t x = 0; x < layer.out_width(); ++x) {
    list_starts[x] = static_cast<int32_t>(to - lists);
    const int64_t left = std::max<int64_t>(0, layer.pw - x);
    const int64_t right = std::min(layer.kw, width + layer.pw - x);
    for (int64_t i = top; i < bottom; ++i) {
      const int32_t* at = starts + (y + i - layer.ph) * width + x - layer.pw;
      for (int64_t j = left; j < right; ++j)
        to = append<kCopied>(channels + at[j], at[j + 1] - at[j],
                             static_cast<int32_t>(i * layer.kw + j) * C, to);
    }
    for (int64_t j = 0; j < kRowUnroll; ++j) to[j] = zeros;
    to += (lists - to) & (kRowUnroll - 1);
  }
  return to;
}

// For lists of `mean` entries: few are longer than what is copied at once.
auto gather_row_for(double mean) {
  return mean < 2.5  ? gather_row<8>
         : mean < 9  ? gather_row<16>
         : mean < 20 ? gather_row<32>
                     : gather_row<kMostCopied>;
}

}  // namespace

SpikeReader::SpikeReader(const SpikeLayer& layer)
    : layer_(layer), groups_((layer.channels + kGroup - 1) / kGroup) {
  for (int64_t y = 0; y < layer.rows(); ++y)
    for (int64_t x = 0; x < layer.width; ++x)
      bytes_.push_back(y * layer.row_stride + x * layer.pixel_stride);
}

void SpikeReader::read(const SpikeImages& images) {
  images_ = images.count;
  pixels_ = images.rows * layer_.width;
  masks_.resize(images_ * pixels_ * groups_);
  const int64_t end = images.step + images.count;
  for (int64_t plane = images.step / kSteps; plane * kSteps < end; ++plane) {
    const int64_t first = std::max(images.step, plane * kSteps);
    read_plane(layer_.bits + plane * layer_.plane_stride + images.sample * layer_.sample_stride +
                   images.row * layer_.row_stride,
               bytes_.data(), pixels_, layer_.channels, layer_.channel_stride, first,
               std::min(end, (plane + 1) * kSteps),
               masks_.data() + (first - images.step) * pixels_ * groups_);
  }
}

void SpikeReader::list(int64_t first, int64_t count) {
  listed_ = count;
  starts_.resize(count * pixels_ + 1);
  channels_.reserve_for(count * pixels_ * groups_ * kGroup + kMostCopied);
  starts_.back() = list_ones(masks_.data() + first * pixels_ * groups_, count * pixels_, groups_, 0,
                             starts_.data(), channels_.data());
}

void ChannelLists::sort(const SpikeReader& spikes) {
  const int64_t total = spikes.total();
  const int32_t *channels = spikes.channels(), *starts = spikes.starts();
  starts_.assign(layer_.channels + 1, 0);
  for (int64_t e = 0; e < total; ++e) ++starts_[channels[e] + 1];
  for (int64_t c = 0; c < layer_.channels; ++c) starts_[c + 1] += starts_[c];
  next_ = starts_;
  places_.reserve_for(total);
  numbers_.reserve_for(total);
  int32_t *next = next_.data(), *places = places_.data(), *numbers = numbers_.data();
  const int32_t pixel = static_cast<int32_t>(layer_.block_channels());
  const int32_t skip = static_cast<int32_t>(layer_.tile_width() - layer_.width) * pixel;
  for (int64_t i = 0; i < spikes.listed(); ++i) {
    int32_t place = static_cast<int32_t>(i * layer_.tile_elements());
    for (int64_t p = 0; p < spikes.pixels(); place += skip)
      for (int64_t x = 0; x < layer_.width; ++x, ++p, place += pixel, ++starts)
        for (int32_t e = starts[0]; e < starts[1]; ++e) {
          const int32_t number = next[channels[e]]++;
          places[number] = place;
          numbers[e] = number;
        }
  }
}

void OutputLists::gather(const SpikeReader& spikes, int64_t row, int64_t rows, int64_t begin,
                         int64_t end) {
  const int64_t across = layer_.out_width(), lines = end - begin;
  starts_.resize(spikes.listed() * lines * across + 1);
  // Every spike lies under each tap at most once.
  rows_.reserve_for(spikes.total() * layer_.taps() +
                    static_cast<int64_t>(starts_.size()) * kRowUnroll + kMostCopied);
  const int64_t lists = std::max<int64_t>(1, spikes.listed() * spikes.pixels());
  const auto gather = gather_row_for(double(spikes.total()) / double(lists));
  int32_t* to = rows_.data();
  for (int64_t i = 0; i < spikes.listed(); ++i)
    for (int64_t y = 0; y < lines; ++y)
      to = gather(layer_, spikes.starts() + i * spikes.pixels(), spikes.channels(), begin + y - row,
                  rows, starts_.data() + (i * lines + y) * across, rows_.data(), to);
  starts_.back() = static_cast<int32_t>(to - rows_.data());
}

}  // namespace lfp::cpu
