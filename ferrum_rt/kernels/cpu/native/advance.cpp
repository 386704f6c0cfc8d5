// After a round of decodes: what was found is put aside, and each sequence stands one token further.
#include <algorithm>

#include "program.h"

namespace ferrum {
namespace {

struct AdvanceArguments {
  int64_t* tokens;
  int64_t* positions;
  int64_t* kv_slots;
  int64_t* spans;  // [rows][4]: slot, row, number of tokens, start
  const int64_t* block_tables;
  int64_t pages_per_slot;
  int64_t block_size;
  const int64_t* ids;  // the tokens that were found, by row
  const float* highest;
  int64_t* all_ids;  // [rounds][stride]
  float* all_highest;
  int64_t stride;
  int64_t* round;
};

int64_t advance_count(const Instruction&, const Sizes&) { return 1; }

void advance_run(const Instruction& i, const Sizes& sizes, int64_t) {
  const auto& a = i.as<AdvanceArguments>();
  const int64_t rows = sizes(i.rows), round = (*a.round)++;
  std::copy_n(a.ids, rows, a.all_ids + round * a.stride);
  std::copy_n(a.highest, rows, a.all_highest + round * a.stride);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t* span = a.spans + row * 4;
    const int64_t position = ++a.positions[row];
    // After a last round there may be no page for a next.
    const int64_t index = std::min(position / a.block_size, a.pages_per_slot - 1);
    a.tokens[row] = a.ids[row];
    a.kv_slots[row] = a.block_tables[span[0] * a.pages_per_slot + index] * a.block_size + position % a.block_size;
    span[3] = position;
  }
}

}  // namespace

const Kernel kAdvanceKernel{advance_count, advance_run};

}  // namespace ferrum
