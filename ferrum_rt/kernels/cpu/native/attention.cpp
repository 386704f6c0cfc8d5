#include "attention.h"

#include <algorithm>
#include <memory>
#include <new>

#include "tile.h"

namespace ferrum {
namespace {

// -- writing to the pages --------------------------------------------------------------------------------------------------

constexpr int64_t kRowsPerAppend = 4;

template <class T, class Page>
void append_head(Page* to, float*, const T* x, int64_t dim) {
  if constexpr (std::is_same_v<T, Page>)
    std::memcpy(to, x, dim * sizeof(T));
  else
    for_vectors(dim, [&](int64_t at, int count) { store(to + at, load(x + at, count), count); });
}

// A head that holds no number keeps none: its scale is NaN.
template <class T>
void append_head(int8_t* to, float* scale, const T* x, int64_t dim) {
  F32 most{}, wrong{};
  for_vectors(dim, [&](int64_t at, int count) {
    F32 value = load(x + at, count);
    most = max(most, bits<F32>(bits<U32>(value) & 0x7FFFFFFFu));
    wrong += value - value;
  });
  *scale = (std::max(highest(most), 1e-12f) / 127.0f) + sum(wrong);
  const F32 divisor = splat<F32>(*scale);
  for_vectors(dim, [&](int64_t at, int count) { store(to + at, load(x + at, count) / divisor, count); });
}

template <class T, class Page>
void append_rows(const AppendArguments& a, int64_t first, int64_t end) {
  for (int64_t row = first; row < end; ++row)
    for (int64_t part = 0; part < 2; ++part)
      for (int64_t head = 0; head < a.heads; ++head) {
        const int64_t at = (a.slots[row] * 2 + part) * a.heads + head;
        const T* x = static_cast<const T*>(a.kv) + row * a.strides[0] + part * a.strides[1] + head * a.strides[2];
        append_head(static_cast<Page*>(a.pages) + at * a.dim, a.scales + at, x, a.dim);
      }
}

template <class T>
void append_of(const AppendArguments& a, int64_t first, int64_t end) {
  switch (a.type) {
    case Type::kFloat32: return append_rows<T, float>(a, first, end);
    case Type::kBfloat16: return append_rows<T, Bf16>(a, first, end);
    case Type::kFloat16: return append_rows<T, F16>(a, first, end);
    case Type::kFp8: return append_rows<T, Fp8>(a, first, end);
    case Type::kInt8: return append_rows<T, int8_t>(a, first, end);
  }
}

int64_t append_count(const Instruction& i, const Sizes& sizes) { return ceil_div(sizes(i.rows), kRowsPerAppend); }

void append_run(const Instruction& i, const Sizes& sizes, int64_t chunk) {
  const auto& a = i.as<AppendArguments>();
  const int64_t first = chunk * kRowsPerAppend, end = std::min(first + kRowsPerAppend, sizes(i.rows));
  switch (i.type) {
    case Type::kFloat32: return append_of<float>(a, first, end);
    case Type::kBfloat16: return append_of<Bf16>(a, first, end);
    default: return append_of<F16>(a, first, end);
  }
}

// -- what there is to do in a step -----------------------------------------------------------------------------------------

int64_t plan_count(const Instruction&, const Sizes&) { return 1; }

void plan_run(const Instruction& i, const Sizes& sizes, int64_t) {
  const auto& a = i.as<PlanArguments>();
  WorkItem* end = a.table->items;
  for (int64_t span = 0; span < sizes(i.rows); ++span)
    for (int64_t token = 0; token < a.spans[span].num_tokens; token += a.tokens)
      *end++ = {span, token, std::min(a.tokens, a.spans[span].num_tokens - token)};
  a.table->size = end - a.table->items;
  const auto keys = [&](const WorkItem& item) { return a.spans[item.span].start + item.token + item.count; };
  std::sort(a.table->items, end, [&](const WorkItem& left, const WorkItem& right) {
    return left.count * keys(left) > right.count * keys(right);
  });
}

// -- keys and values as granules -------------------------------------------------------------------------------------------

template <int kStep, int... kAt>
void exchange(U32& a, U32& b, std::integer_sequence<int, kAt...>) {
  const U32 low = __builtin_shufflevector(a, b, (kAt & kStep ? kLanes + kAt - kStep : kAt)...);
  b = __builtin_shufflevector(a, b, (kAt & kStep ? kLanes + kAt : kAt + kStep)...);
  a = low;
}

// Transposes a square.
template <int kStep = kLanes / 2>
void transpose(U32 (&square)[kLanes]) {
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row)
    if ((row & kStep) == 0) exchange<kStep>(square[row], square[row + kStep], std::make_integer_sequence<int, kLanes>{});
  if constexpr (kStep > 1) transpose<kStep / 2>(square);
}

template <class T>
U32 bf16_of(const T* from, int count) {
  return round_to_bf16(load(from, count));
}

U32 bf16_of(const Bf16* from, int count) {
  U16 raw = count == kLanes ? load_raw<U16>(from) : load_raw<U16>(from, count);
  return __builtin_convertvector(raw, U32);
}

U32 bf16_of(const int8_t* from, int count) { return bits<U32>(load(from, count)) >> 16; }  // exact
U32 bf16_of(const Fp8* from, int count) { return bits<U32>(load(from, count)) >> 16; }     // too

// Granules of one number.
struct Floats {
  using Dot = DotFloat32;
  using Element = float;
  static constexpr int kEach = 1;

  // Of a row's dimensions.
  template <class T>
  static U32 along(const T* from, int count) {
    return bits<U32>(load(from, count));
  }

  // Of one dimension each, from kEach rows.
  template <class T>
  static U32 across(const T* const* rows, int, int64_t at, int count) {
    return bits<U32>(load(rows[0] + at, count));
  }
};

// Granules of two.
struct Pairs {
  using Dot = DotBfloat16;
  using Element = Bf16;
  static constexpr int kEach = 2;

  template <class T>
  static U32 along(const T* from, int count) {
    if constexpr (std::is_same_v<T, Bf16>)
      if (count == 2 * kLanes) return load_raw<U32>(from);
    const U16 parts[2] = {__builtin_convertvector(bf16_of(from, std::min(count, kLanes)), U16),
                          __builtin_convertvector(bf16_of(from + kLanes, std::max(count - kLanes, 0)), U16)};
    return load_raw<U32>(parts);
  }

  template <class T>
  static U32 across(const T* const* rows, int present, int64_t at, int count) {
    const U32 low = bf16_of(rows[0] + at, count);
    return present > 1 ? low | bf16_of(rows[1] + at, count) << 16 : low;
  }
};

// Where the keys of a block lie, for one head; each key's value is `to_value` elements behind it.
template <class T>
struct Block {
  const T* keys[kKeys];
  int64_t size;
};

// Keys `first` to `first` + kPanel as a panel [granules of dim][keys]. Those that there are none of are zero, and not read.
template <class G, class T>
void pack_keys(const Block<T>& block, int64_t first, int64_t dim, uint32_t* panel) {
  const int64_t granules = ceil_div(dim, G::kEach);
  for (int part = 0; part < kPanel; part += kLanes)
    for (int64_t at = 0; at < granules; at += kLanes) {
      const auto count = static_cast<int>(std::min<int64_t>(G::kEach * kLanes, dim - at * G::kEach));
      const auto present = std::min<int64_t>(kLanes, block.size - first - part);
      U32 square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        square[i] = i < present ? G::along(block.keys[first + part + i] + at * G::kEach, count) : U32{};
      transpose(square);
      const auto lines = std::min<int64_t>(kLanes, granules - at);
      for (int i = 0; i < lines; ++i) std::memcpy(panel + (at + i) * kPanel + part, &square[i], sizeof(U32));
    }
}

// Dimensions `first` to `first` + kPanel of a block's values as a panel [granules of keys][dimensions].
template <class G, class T>
void pack_values(const Block<T>& block, int64_t to_value, int64_t first, int64_t dim, uint32_t* panel) {
  for (int64_t key = 0; key < block.size; key += G::kEach) {
    const T* rows[G::kEach];
    const auto present = static_cast<int>(std::min<int64_t>(G::kEach, block.size - key));
    for (int i = 0; i < present; ++i) rows[i] = block.keys[key + i] + to_value;
    for (int part = 0; part < kPanel; part += kLanes) {
      const auto count = static_cast<int>(std::min<int64_t>(kLanes, dim - first - part));
      const U32 line = count > 0 ? G::across(rows, present, first + part, count) : U32{};
      std::memcpy(panel + key / G::kEach * kPanel + part, &line, sizeof(line));
    }
  }
}

// -- one work item ---------------------------------------------------------------------------------------------------------

constexpr float kNothing = -3e38f;  // below every score, so that a row can begin with it

// A thread's memory for an item, in lines of a cache.
class Scratch {
 public:
  template <class T>
  T* take(int64_t count) {
    const int64_t at = used_;
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kLine);
    return reinterpret_cast<T*>(lines_.get() + at * kLine);
  }

  // Everything that was taken is free; `size` is that of all that will be.
  void reset(int64_t size) {
    used_ = 0;
    if (size <= size_) return;
    lines_.reset(static_cast<std::byte*>(::operator new[](size, std::align_val_t{kLine})));
    size_ = size;
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Free {
    void operator()(std::byte* lines) const { ::operator delete[](lines, std::align_val_t{kLine}); }
  };

  std::unique_ptr<std::byte[], Free> lines_;
  int64_t size_ = 0, used_ = 0;
};

thread_local Scratch scratch;

struct Range {
  int64_t first, end;
};

// The products of `rows` of x with a panel, as write(row, column, vector).
template <class Dot, class Write>
void multiply(const uint32_t* x, int64_t stride, Range rows, const uint32_t* panel, int64_t granules, Write write) {
  int64_t row = rows.first;
  for (int64_t tiles = ceil_div(rows.end - rows.first, kMaxRows); tiles > 0; --tiles) {
    const int height = static_cast<int>(ceil_div(rows.end - row, tiles));
    const auto compute = tile_of<Dot>(height);
    for (int part = 0; part < kPanel; part += kColumns) {
      typename Dot::Accumulator sums[kMaxRows][kVectors];
      compute(x + row * stride, stride, panel + part, granules, {nullptr, 0}, sums);
      for (int r = 0; r < height; ++r)
        for (int v = 0; v < kVectors; ++v) write(row + r, part + v * kLanes, sums[r][v]);
    }
    row += height;
  }
}

// Attention of one item's queries to one key/value head. G says what granules are, T is of the activations, Page of the pages.
template <class G, class T, class Page>
class Attention {
 public:
  Attention(const AttentionArguments& a, const WorkItem& item, int64_t head)
      : a_(a),
        span_(a.spans[item.span]),
        first_row_(span_.row + item.token),
        position_(span_.start + item.token),
        count_(item.count),
        head_(head),
        rows_(item.count * a.shared),
        granules_(ceil_div(a.dim, G::kEach)),
        width_(ceil_div(a.dim, kPanel) * kPanel) {
    const int64_t panel = std::max(granules_, kKeys) * kPanel;
    scratch.reset(4 * (rows_ * (granules_ + width_ + 2 * kKeys + 3) + panel + 2 * kKeys) + 64 * 9);
    q_ = scratch.take<uint32_t>(rows_ * granules_);
    panel_ = scratch.take<uint32_t>(panel);
    scores_ = scratch.take<float>(rows_ * kKeys);
    weights_ = scratch.take<typename G::Element>(rows_ * kKeys);
    sums_ = scratch.take<float>(rows_ * width_);
    most_ = scratch.take<float>(rows_);
    total_ = scratch.take<float>(rows_);
    factor_ = scratch.take<float>(rows_);
    key_scales_ = scratch.take<float>(kKeys);
    value_scales_ = scratch.take<float>(kKeys);
  }

  void run() {
    load_queries();
    std::fill_n(most_, rows_, kNothing);
    std::fill_n(total_, rows_, 0.0f);
    std::fill_n(sums_, rows_ * width_, 0.0f);
    const int64_t end = position_ + count_;
    for (int64_t base = std::max<int64_t>(0, position_ - a_.window + 1) / kKeys * kKeys; base < end; base += kKeys) {
      locate(base, std::min(kKeys, end - base));
      score(base);
      const Range rows = seen_by(base, base + block_.size);
      for (int64_t row = rows.first; row < rows.end; ++row) weigh(base, row);
      add_values(rows);
    }
    write();
  }

 private:
  static constexpr bool kIsScaled = std::is_same_v<Page, int8_t>;

  int64_t position_of(int64_t row) const { return position_ + row / a_.shared; }

  // The rows that see any of the keys from `first` to `end`.
  Range seen_by(int64_t first, int64_t end) const {
    return {std::max<int64_t>(0, first - position_) * a_.shared,
            std::min(count_, end - position_ + a_.window - 1) * a_.shared};
  }

  void load_queries() {
    for (int64_t row = 0; row < rows_; ++row) {
      const T* from = static_cast<const T*>(a_.q) + (first_row_ + row / a_.shared) * a_.q_stride +
                      (head_ * a_.shared + row % a_.shared) * a_.head_stride;
      uint32_t* to = q_ + row * granules_;
      to[granules_ - 1] = 0;
      if constexpr (std::is_same_v<T, typename G::Element>)
        std::memcpy(to, from, a_.dim * sizeof(T));
      else
        for_vectors(a_.dim, [&](int64_t at, int count) {
          store(reinterpret_cast<float*>(to) + at, load(from + at, count), count);
        });
    }
  }

  void locate(int64_t base, int64_t size) {
    const int64_t* table = a_.block_tables + span_.slot * a_.table_stride;
    block_.size = size;
    for (int64_t key = 0; key < size; ++key) {
      const int64_t position = base + key;
      const int64_t row = table[position / a_.block_size] * a_.block_size + position % a_.block_size;
      block_.keys[key] = static_cast<const Page*>(a_.pages) + (row * 2 * a_.heads + head_) * a_.dim;
      if constexpr (kIsScaled) {
        key_scales_[key] = a_.scales[row * 2 * a_.heads + head_];
        value_scales_[key] = a_.scales[(row * 2 + 1) * a_.heads + head_];
      }
    }
  }

  void score(int64_t base) {
    for (int64_t first = 0; first < block_.size; first += kPanel) {
      const Range rows = seen_by(base + first, base + std::min(first + kPanel, block_.size));
      if (rows.first >= rows.end) continue;
      pack_keys<G>(block_, first, a_.dim, panel_);
      multiply<typename G::Dot>(q_, granules_, rows, panel_, granules_, [&](int64_t row, int column, F32 value) {
        store(scores_ + row * kKeys + first + column, value);
      });
    }
  }

  // Scores of a row become weights, relative to the largest so far; `factor_` is what the sums so far are to be multiplied by.
  void weigh(int64_t base, int64_t row) {
    const int64_t last = position_of(row) - base;
    const auto first = static_cast<int32_t>(std::max<int64_t>(0, last - a_.window + 1));
    const auto end = static_cast<int32_t>(std::min(last + 1, block_.size));
    const int from = first / kLanes, to = static_cast<int>(ceil_div(end, kLanes));
    I32 lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const auto is_seen = [&](int vector) {
      const I32 key = lane + vector * kLanes;
      return (key >= first) & (key < end);
    };
    F32 scores[kKeys / kLanes];
    F32 most = splat<F32>(most_[row]);
    for (int v = from; v < to; ++v) {
      F32 value = load(scores_ + row * kKeys + v * kLanes) * static_cast<float>(a_.scale);
      if constexpr (kIsScaled) value *= load(key_scales_ + v * kLanes);
      if (a_.soft_cap > 0) {
        const auto cap = static_cast<float>(a_.soft_cap);
        value = tanh(value / cap) * cap;
      }
      scores[v] = value;
      most = max(most, choose(is_seen(v), value, most));
    }
    const F32 highest_so_far = splat<F32>(highest(most));
    factor_[row] = exp(splat<F32>(most_[row]) - highest_so_far)[0];
    most_[row] = highest_so_far[0];
    auto* weights = weights_ + row * kKeys;
    F32 total{};
    for (int v = 0; v < static_cast<int>(kKeys / kLanes); ++v) {
      F32 weight{};
      if (v >= from && v < to) {
        weight = choose(is_seen(v), exp(scores[v] - highest_so_far), F32{});
        total += weight;
        if constexpr (kIsScaled) weight = choose(is_seen(v), weight * load(value_scales_ + v * kLanes), F32{});
      }
      store(weights + v * kLanes, weight);
    }
    total_[row] = total_[row] * factor_[row] + sum(total);
  }

  void add_values(Range rows) {
    const auto* weights = reinterpret_cast<const uint32_t*>(weights_);
    for (int64_t first = 0; first < a_.dim; first += kPanel) {
      pack_values<G>(block_, a_.heads * a_.dim, first, a_.dim, panel_);
      multiply<typename G::Dot>(weights, kKeys / G::kEach, rows, panel_, ceil_div(block_.size, G::kEach),
                                [&](int64_t row, int column, F32 value) {
                                  float* sum = sums_ + row * width_ + first + column;
                                  store(sum, load(sum) * factor_[row] + value);
                                });
    }
  }

  void write() {
    for (int64_t row = 0; row < rows_; ++row) {
      T* out = static_cast<T*>(a_.out) + (first_row_ + row / a_.shared) * a_.stride +
               (head_ * a_.shared + row % a_.shared) * a_.dim;
      for_vectors(a_.dim, [&](int64_t at, int count) {
        store(out + at, load(sums_ + row * width_ + at, count) / total_[row], count);
      });
    }
  }

  const AttentionArguments& a_;
  const Span& span_;
  const int64_t first_row_, position_, count_, head_, rows_, granules_, width_;
  Block<Page> block_;
  uint32_t *q_, *panel_;
  float *scores_, *sums_, *most_, *total_, *factor_, *key_scales_, *value_scales_;
  typename G::Element* weights_;
};

int64_t attention_count(const Instruction& i, const Sizes&) {
  const auto& a = i.as<AttentionArguments>();
  return a.table->size * a.heads;
}

template <class G, class T>
void attention_of(const AttentionArguments& a, int64_t chunk) {
  const WorkItem& item = a.table->items[chunk / a.heads];
  const int64_t head = chunk % a.heads;
  switch (a.type) {
    case Type::kFloat32: return Attention<G, T, float>(a, item, head).run();
    case Type::kBfloat16: return Attention<G, T, Bf16>(a, item, head).run();
    case Type::kFloat16: return Attention<G, T, F16>(a, item, head).run();
    case Type::kFp8: return Attention<G, T, Fp8>(a, item, head).run();
    case Type::kInt8: return Attention<G, T, int8_t>(a, item, head).run();
  }
}

void attention_run(const Instruction& i, const Sizes&, int64_t chunk) {
  const auto& a = i.as<AttentionArguments>();
  switch (i.type) {
    case Type::kFloat32: return attention_of<Floats, float>(a, chunk);
    case Type::kBfloat16: return attention_of<Pairs, Bf16>(a, chunk);
    default: return attention_of<Floats, F16>(a, chunk);
  }
}

}  // namespace

const Kernel kAppendKernel{append_count, append_run};
const Kernel kPlanKernel{plan_count, plan_run};
const Kernel kAttentionKernel{attention_count, attention_run};

}  // namespace ferrum
