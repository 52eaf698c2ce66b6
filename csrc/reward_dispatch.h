// From a reward code to its functor: shared by the CPU and the GPU code.
#pragma once

#include "common.h"
#include "rewards.h"

namespace lfp {

// f(Reward<A>{}) for the rewards that have a one-hot target.
template <class A, class F>
void dispatch_row_reward(int64_t kind, F&& f) {
  switch (kind) {
    case kSoftmax: return f(SoftmaxReward<A>{});
    case kSigmoid: return f(SigmoidReward<A>{});
    case kMaximize: return f(MaximizeReward<A>{});
    case kMinimize: return f(MinimizeReward<A>{});
    case kBoundedSoftmax: return f(BoundedSoftmaxReward<A>{});
    case kCorrectClassification: return f(CorrectClassificationReward<A>{});
    case kMisclassification: return f(MisclassificationReward<A>{});
    default: LFP_CHECK(false, "reward", "unknown reward code ", kind);
  }
}

}  // namespace lfp
