// A mixture of experts, as instructions whose sizes follow from the data, none from the host: the router's choice (kRoute),
// which rows each expert gets (kGroup), linear layers of all experts at once on rows that lie in the order of the experts
// (kExpertsLinear), and the weighted sum of each token's results (kCombine). In between rows are gathered and activated as
// elsewhere; there are top_k of them for each token.
#pragma once

#include "linear.h"

namespace ferrum {

struct RouteArguments {
  int64_t* chosen;  // [tokens][top_k], best first; of equal ones the lowest first
  float* weights;   // [tokens][top_k]: their shares of the softmax
  const void* logits;
  int64_t stride;  // of logits, in elements
  int64_t num_experts;
  int64_t top_k;
  int64_t renormalize;  // so that a token's weights add up to 1
};

struct GroupArguments {
  int64_t* starts;  // [experts + 1]: an expert's first row, and after all the number of rows
  int64_t* tokens;  // [rows]: whose row it is; ascending for each expert
  int64_t* places;  // [tokens][top_k]: which row it is
  const int64_t* chosen;
  int64_t num_experts;
  int64_t top_k;
};

struct Expert {
  const uint32_t* weight;
  const float* bias;
  const float* scales;
  const int32_t* offsets;
};

struct ExpertsLinearArguments {
  LinearArguments linear;  // all but what an Expert says
  int64_t num_experts;
  const Expert* experts;
  const int64_t* starts;
};

struct CombineArguments {
  void* out;
  int64_t stride;  // in elements
  int64_t width;
  const void* results;
  int64_t results_stride;
  const int64_t* places;
  const float* weights;
  int64_t top_k;
};

}  // namespace ferrum
