// Products of packed spikes with weights: only the weights of neurons that fired are touched.
//
//   bits [P, N, C, H, W]   bit t % 8 of plane t / 8: the spike at step t
//   z[q] = b + sum of W[k, c, :]   over the spikes (pixel q + k, channel c) under the taps k
//   dW[k, c, :] += s[q - k, :]     for every spike (pixel q, channel c) and every tap k
//   input reward = sum over k of s[q - k, :] . W[k, c, :]
//
// Forward, each output pixel has the list of the weight rows that it adds up, in registers.
// Backward, each channel has the list of its spikes, and its weights and their feedback stay in
// registers while the list is walked; s lies in tiles with room for every tap of every pixel (a
// "full" convolution), so that no tap is tested. A linear layer is a 1 x 1 convolution over an
// image of samples.
#pragma once

#include "scratch.h"

namespace lfp::cpu {

constexpr int64_t kSteps = 8;       // time steps in a byte of packed spikes
constexpr int64_t kMostSlots = 13;  // weight vectors of a channel, and as many sums, in registers
constexpr int64_t kMostSums = 8;    // sums of an output pixel in registers

template <class A>
constexpr int64_t kSpikeLanes = 64 / sizeof(A);  // output channels of a vector

// Memory that grows without keeping or clearing what it holds.
template <class A>
class Growing {
 public:
  void reserve_for(int64_t elements) {
    if (elements <= size_) return;
    memory_.reset();
    memory_ = scratch<A>(size_ = elements);
  }
  A* data() const { return memory_.get(); }

 private:
  int64_t size_ = 0;
  Scratch<A> memory_;
};

// The layer, how its images are cut into blocks of rows, and how its output channels are cut.
struct SpikeLayer {
  int64_t steps, samples, channels, height, width;
  int64_t outputs, kh, kw, ph, pw;
  const uint8_t* bits;
  int64_t plane_stride, sample_stride, channel_stride, row_stride, pixel_stride;  // of bits

  int64_t lanes = 0;    // of a vector
  int64_t vectors = 0;  // of a block of output channels
  int64_t blocks = 0;   // of output channels

  int64_t taps() const { return kh * kw; }
  int64_t slots() const { return taps() * vectors; }
  int64_t out_height() const { return height + 2 * ph - kh + 1; }
  int64_t out_width() const { return width + 2 * pw - kw + 1; }

  // Rows of a block: an image, or where rows do not overlap a part that leaves the tile small.
  int64_t rows() const {
    constexpr int64_t kPixels = 128;
    const int64_t most = std::max<int64_t>(1, kPixels / std::max<int64_t>(1, width));
    return kh > 1 ? height : std::clamp<int64_t>(height, 1, most);
  }
  int64_t row_blocks() const { return (height + rows() - 1) / rows(); }
  int64_t tile_height() const { return rows() + kh - 1; }
  int64_t tile_width() const { return width + kw - 1; }
  int64_t tile_pixels() const { return tile_height() * tile_width(); }
  int64_t block_channels() const { return vectors * lanes; }
  int64_t tile_elements() const { return tile_pixels() * block_channels(); }

  // Blocks of images in time order: (sample, block of rows, step).
  int64_t images() const { return samples * row_blocks() * steps; }

  // Blocks of at most `most` vectors.
  template <class A>
  void cut_outputs(int64_t most) {
    lanes = kSpikeLanes<A>;
    const int64_t all = (outputs + lanes - 1) / lanes;
    most = std::max<int64_t>(1, most);
    blocks = (all + most - 1) / most;
    vectors = (all + blocks - 1) / blocks;
  }

  // Where each slot (tap, vector) lies in the tile, from the tile's pixel of the spike.
  std::vector<int64_t> slot_offsets() const {
    std::vector<int64_t> offsets;
    for (int64_t i = kh - 1; i >= 0; --i)
      for (int64_t j = kw - 1; j >= 0; --j)
        for (int64_t v = 0; v < vectors; ++v)
          offsets.push_back((i * tile_width() + j) * block_channels() + v * lanes);
    return offsets;
  }
};

// Consecutive time steps of one block of rows of one sample.
struct SpikeImages {
  int64_t sample, row, rows, step, count;
};

// f(images) over the images first .. last - 1, at most `most` at a time.
template <class F>
void for_each_images(const SpikeLayer& layer, int64_t first, int64_t last, int64_t most, F f) {
  while (first < last) {
    const int64_t step = first % layer.steps, block = first / layer.steps % layer.row_blocks();
    const int64_t count = std::min({most, last - first, layer.steps - step});
    const int64_t row = block * layer.rows();
    f(SpikeImages{first / layer.steps / layer.row_blocks(), row,
                  std::min(layer.rows(), layer.height - row), step, count});
    first += count;
  }
}

// The spikes of some images, and for some of these the channels that fired, pixel by pixel.
class SpikeReader {
 public:
  explicit SpikeReader(const SpikeLayer& layer);
  void read(const SpikeImages& images);
  // Lists the images first .. first + count - 1 of those that were read.
  void list(int64_t first, int64_t count);

  int64_t listed() const { return listed_; }
  int64_t pixels() const { return pixels_; }  // of a block of rows
  int64_t total() const { return starts_[listed_ * pixels_]; }
  // Spikes of a pixel: numbers starts()[image * pixels() + pixel] up to the next.
  const int32_t* starts() const { return starts_.data(); }
  const int32_t* channels() const { return channels_.data(); }

 private:
  const SpikeLayer& layer_;
  int64_t images_ = 0, listed_ = 0, pixels_ = 0, groups_;
  std::vector<int64_t> bytes_;   // where each pixel of the block lies, from its first
  std::vector<uint8_t> masks_;   // [image][pixel][group of 8 channels]
  std::vector<int32_t> starts_;  // [listed image][pixel] and the end
  Growing<int32_t> channels_;
};

// The spikes that a reader lists, by channel, with their places in the tiles of the images.
class ChannelLists {
 public:
  explicit ChannelLists(const SpikeLayer& layer) : layer_(layer) {}
  void sort(const SpikeReader& spikes);

  // Number of a channel's first spike, how many follow, and their places in elements.
  int64_t number(int64_t channel) const { return starts_[channel]; }
  int64_t count(int64_t channel) const { return starts_[channel + 1] - starts_[channel]; }
  const int32_t* places(int64_t channel) const { return places_.data() + starts_[channel]; }
  // Number here of each spike of the reader.
  const int32_t* numbers() const { return numbers_.data(); }

 private:
  const SpikeLayer& layer_;
  std::vector<int32_t> starts_, next_;
  Growing<int32_t> places_, numbers_;
};

// The rows of the packed weights that an output pixel adds up: row tap * C + channel for each spike
// under its taps, filled up with the row of zeros behind the others to a multiple of kRowUnroll.
constexpr int64_t kRowUnroll = 4;

class OutputLists {
 public:
  explicit OutputLists(const SpikeLayer& layer) : layer_(layer) {}
  // Of the output rows begin .. end - 1 of the reader's images; `row` is the first of the block.
  void gather(const SpikeReader& spikes, int64_t row, int64_t rows, int64_t begin, int64_t end);

  // [image][output row][output column] and the end
  const int32_t* starts() const { return starts_.data(); }
  const int32_t* rows() const { return rows_.data(); }

 private:
  const SpikeLayer& layer_;
  std::vector<int32_t> starts_;
  Growing<int32_t> rows_;
};

// The two walks along lists of spikes.
template <class A>
struct SpikeWalks {
  // z[p, :count] = start + the rows starts[p] .. starts[p + 1] - 1 of w, for `pixels` pixels.
  void (*add)(const int32_t* starts, const int32_t* rows, int64_t pixels, int64_t vectors,
              const A* w, const A* start, int64_t count, int64_t stride, A* z);
  // dw += s, dots[spike] += s . w, for `slots` vectors w, dw of a channel
  void (*collect)(const int32_t* places, int64_t count, const int64_t* offsets, int64_t slots,
                  const A* w, const A* s, A* dw, A* dots);
};

template <class A>
SpikeWalks<A> spike_walks_of_this_processor();

}  // namespace lfp::cpu
