// The arguments of optimizer_update, taken apart and checked: shared by the CPU and the GPU code.
#pragma once

#include "common.h"

namespace lfp {

constexpr size_t kHyper = 12;  // values per tensor, see optimizer_params

// States per parameter of an optimizer code.
inline int64_t states_of(int64_t code) { return code == kSgd ? 0 : code == kSgdMomentum ? 1 : 2; }

// One parameter's part in the call.
struct UpdateItem {
  Tensor param, feedback;
  std::vector<Tensor> states;
  int64_t code;
  Params hyper;
};

// Everything that can fail fails here, before the first element changes.
inline std::vector<UpdateItem> update_items(const std::vector<Tensor>& params,
                                            const std::vector<Tensor>& feedback,
                                            const std::vector<Tensor>& states, const Ints& codes,
                                            const Params& hyper) {
  const char* op = "optimizer_update";
  const size_t count = params.size();
  LFP_CHECK(feedback.size() == count && codes.size() == count && hyper.size() == count * kHyper,
            "optimizer_update", "expected one feedback, code and row of hyper per parameter");
  std::vector<UpdateItem> items;
  items.reserve(count);
  size_t next_state = 0;
  for (size_t k = 0; k < count; ++k) {
    UpdateItem item{params[k],
                    dense(feedback[k]),
                    {},
                    codes[k],
                    Params(hyper.begin() + k * kHyper, hyper.begin() + (k + 1) * kHyper)};
    for (int64_t i = 0; i < states_of(codes[k]); ++i)
      item.states.push_back(states.at(next_state++));
    dispatch_dtype(item.param.scalar_type(), op, [](auto) {});
    dispatch_optimizer<float>(codes[k], op, [](auto) {});
    LFP_CHECK(item.param.is_contiguous(), "optimizer_update", "parameters must be contiguous");
    LFP_CHECK(item.feedback.numel() == item.param.numel(), "optimizer_update",
              "feedback must have the size of its parameter");
    for (const Tensor& s : item.states)
      LFP_CHECK(s.is_contiguous() && s.numel() == item.param.numel(), "optimizer_update",
                "states must be contiguous, of the size of their parameter");
    items.push_back(std::move(item));
  }
  return items;
}

}  // namespace lfp
