// Attention over the pages of each sequence, causal, for any mixture of prefill chunks and decodes; and writing to the pages.
//
// A work item is a block of one sequence's queries with the heads that share a key/value head: its rows are tokens times
// heads. Keys are taken in blocks that begin at multiples of kKeys, whatever the queries are, with an online softmax
// (arXiv:2205.14135), and a block that a row sees nothing of leaves the row alone. So a row's result depends on its own
// sequence and position only, to the bit.
#pragma once

#include "program.h"

namespace ferrum {

constexpr int64_t kKeys = 128;  // in a block

// Rows of the batch from `row` on, at positions `start` and following.
struct Span {
  int64_t slot, row, num_tokens, start;
};

// `count` of a span's tokens from `token` on.
struct WorkItem {
  int64_t span, token, count;
};

// What a step's attention consists of, the costliest first, for each key/value head alike.
struct WorkTable {
  int64_t size;
  WorkItem items[1];  // there are more
};

// The number of rows is that of spans.
struct PlanArguments {
  const Span* spans;
  WorkTable* table;
  int64_t tokens;  // of an item, at most
};

// A layer's pages are rows [2, heads, dim] of keys and values, and of scales [2, heads] for int8.
struct AppendArguments {
  void* pages;
  float* scales;
  Type type;  // of the pages
  int64_t heads, dim;
  const void* kv;
  int64_t strides[3];    // of kv, in elements: row, keys or values, head
  const int64_t* slots;  // the row of the pages for each row of kv
};

struct AttentionArguments {
  void* out;
  int64_t stride;  // of out, in elements
  const void* q;
  int64_t q_stride, head_stride;  // of q, in elements
  const void* pages;
  const float* scales;
  Type type;              // of the pages
  int64_t heads, shared;  // key/value heads, and how many heads share one
  int64_t dim;
  const Span* spans;
  const WorkTable* table;
  const int64_t* block_tables;
  int64_t table_stride;  // from one slot's table to the next's
  int64_t block_size;
  int64_t window;  // beyond any position if there is none
  double scale;
  double soft_cap;  // 0 if there is none
};

}  // namespace ferrum
