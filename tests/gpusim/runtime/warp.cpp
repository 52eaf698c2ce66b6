// Values exchanged between the lanes of a warp.
#include <algorithm>
#include <bit>
#include <cmath>

#include "engine.h"

namespace sim {

namespace {

template <class Visit>
void for_lanes(uint32_t mask, Visit visit) {
  for (; mask; mask &= mask - 1) visit(std::countr_zero(mask));
}

struct ShuffleLane {
  uint32_t value, result;
  int source;
};

void shuffle_lanes(void** arguments, uint32_t mask) {
  auto lanes = (ShuffleLane**)arguments;
  for_lanes(mask, [&](int i) {
    int source = lanes[i]->source;
    // The value of a lane outside the mask is undefined: make that visible.
    lanes[i]->result = mask >> source & 1 ? lanes[source]->value : 0xdeadbeef;
  });
}

struct VoteLane {
  bool predicate;
  uint32_t result, participants;
};

void vote_lanes(void** arguments, uint32_t mask) {
  auto lanes = (VoteLane**)arguments;
  uint32_t votes = 0;
  for_lanes(mask, [&](int i) { votes |= (uint32_t)lanes[i]->predicate << i; });
  for_lanes(mask, [&](int i) {
    lanes[i]->result = votes;
    lanes[i]->participants = mask;
  });
}

struct ReduceLane {
  int64_t value;
  Reduce op;
};

int64_t combine(int64_t a, int64_t b, Reduce op) {
  switch (op) {
    case Reduce::Add: return a + b;
    case Reduce::Min: return std::min(a, b);
    case Reduce::Max: return std::max(a, b);
    case Reduce::And: return a & b;
    case Reduce::Or: return a | b;
    default: return a ^ b;
  }
}

void reduce_lanes(void** arguments, uint32_t mask) {
  auto lanes = (ReduceLane**)arguments;
  int first = std::countr_zero(mask);
  int64_t total = lanes[first]->value;
  for_lanes(mask & (mask - 1),
            [&](int i) { total = combine(total, lanes[i]->value, lanes[i]->op); });
  for_lanes(mask, [&](int i) { lanes[i]->value = total; });
}

struct ReduceFloatLane {
  float value;
  bool maximum, nan;
};

void reduce_float_lanes(void** arguments, uint32_t mask) {
  auto lanes = (ReduceFloatLane**)arguments;
  float total = NAN;
  bool poisoned = false;
  for_lanes(mask, [&](int i) {
    float x = lanes[i]->value;
    poisoned |= std::isnan(x) && lanes[i]->nan;
    // fmax and fmin prefer the number over the NaN that the total starts with.
    total = lanes[i]->maximum ? std::fmax(total, x) : std::fmin(total, x);
  });
  for_lanes(mask, [&](int i) { lanes[i]->value = poisoned ? NAN : total; });
}

struct MatchLane {
  uint64_t value;
  bool all;
  uint32_t result;
};

void match_lanes(void** arguments, uint32_t mask) {
  auto lanes = (MatchLane**)arguments;
  for_lanes(mask, [&](int i) {
    uint32_t same = 0;
    for_lanes(mask, [&](int j) { same |= (uint32_t)(lanes[i]->value == lanes[j]->value) << j; });
    lanes[i]->result = lanes[i]->all && same != mask ? 0 : same;
  });
}

void no_exchange(void**, uint32_t) {}

}  // namespace

uint32_t shuffle(Shuffle mode, uint32_t value, uint32_t distance, uint32_t clamp, uint32_t mask,
                 bool& in_range, unsigned line) {
  int self = lane();
  uint32_t segment = clamp >> 8 & 31, bound = clamp & 31;
  int last = (self & segment) | (bound & ~segment), first = self & segment;
  int source = self;
  switch (mode) {
    case Shuffle::Butterfly:
      source = self ^ (distance & 31);
      in_range = source <= last;
      break;
    case Shuffle::Up:
      source = self - (int)(distance & 31);
      in_range = source >= last;
      break;
    case Shuffle::Down:
      source = self + (distance & 31);
      in_range = source <= last;
      break;
    case Shuffle::Index:
      source = first | (distance & ~segment & 31);
      in_range = source <= last;
      break;
  }
  ShuffleLane argument{value, 0, in_range ? source : self};
  collective(mask, &argument, shuffle_lanes, line);
  return argument.result;
}

uint32_t ballot(uint32_t mask, bool predicate, uint32_t& participants, unsigned line) {
  VoteLane argument{predicate, 0, 0};
  collective(mask, &argument, vote_lanes, line);
  participants = argument.participants;
  return argument.result;
}

uint32_t elect(uint32_t mask, unsigned line) {
  collective(mask, nullptr, no_exchange, line);
  return std::countr_zero(mask & engine.current->warp->lanes);
}

int64_t reduce(int64_t value, uint32_t mask, Reduce op, unsigned line) {
  ReduceLane argument{value, op};
  collective(mask, &argument, reduce_lanes, line);
  return argument.value;
}

float reduce_float(float value, uint32_t mask, bool maximum, bool absolute, bool nan,
                   unsigned line) {
  ReduceFloatLane argument{absolute ? std::fabs(value) : value, maximum, nan};
  collective(mask, &argument, reduce_float_lanes, line);
  return argument.value;
}

uint32_t match(uint64_t value, uint32_t mask, bool all, unsigned line) {
  MatchLane argument{value, all, 0};
  collective(mask, &argument, match_lanes, line);
  return argument.result;
}

}  // namespace sim
