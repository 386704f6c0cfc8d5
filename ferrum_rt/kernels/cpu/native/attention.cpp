#include "attention.h"

#include <algorithm>
#include <memory>
#include <new>

#include "factors.h"

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

// -- one work item ---------------------------------------------------------------------------------------------------------

constexpr float kNothing = -3e38f;  // below every score, so that a row can begin with it
constexpr double kLog2e = 1.4426950408889634;

// Which keys of a block a row sees: all of them, or those from `first` to `end`.
struct SeesAll {
  static constexpr int32_t first = 0, end = kKeys;
  static F32 choose(int, F32 yes, F32) { return yes; }
};

struct SeesSome {
  int32_t first, end;

  F32 choose(int vector, F32 yes, F32 no) const {
    I32 key;
    for (int i = 0; i < kLanes; ++i) key[i] = i;
    key += vector * kLanes;
    return ferrum::choose((key >= first) & (key < end), yes, no);
  }
};

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

// Attention of one item's queries to one key/value head. G says what granules are, Page what the pages hold.
template <class G, class Page>
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
        q_words_(granules_ * G::Dot::kXWords),
        width_(ceil_div(a.dim, kPanel) * kPanel),
        scale_(static_cast<float>(a.soft_cap > 0 ? a.scale / a.soft_cap : a.scale * kLog2e)),
        cap_(static_cast<float>(a.soft_cap * kLog2e)) {
    const int64_t panel = std::max(granules_, kKeys) * kPanel;
    scratch.reset(4 * (rows_ * (q_words_ + width_ + 2 * kKeys + kLanes + 2) + panel) + 64 * 8);
    q_ = scratch.take<uint32_t>(rows_ * q_words_);
    panel_ = scratch.take<uint32_t>(panel);
    scores_ = scratch.take<float>(rows_ * kKeys);
    weights_ = scratch.take<typename G::Element>(rows_ * kKeys);
    sums_ = scratch.take<float>(rows_ * width_);
    most_ = scratch.take<float>(rows_);
    total_ = scratch.take<float>(rows_ * kLanes);
    factor_ = scratch.take<float>(rows_);
  }

  // T is of the activations.
  template <class T>
  void run() {
    load_queries<T>();
    attend();
    write_out<T>();
  }

 private:
  void attend() {
    std::fill_n(most_, rows_, kNothing);
    std::fill_n(total_, rows_ * kLanes, 0.0f);
    std::fill_n(sums_, rows_ * width_, 0.0f);
    int64_t base = std::max<int64_t>(0, position_ - a_.window + 1) / kKeys * kKeys;
    locate(next_, base);
    keys_ahead(*next_, 0, 1).step();
    for (; base < position_ + count_; base += kKeys) {
      std::swap(block_, next_);
      locate(next_, base + kKeys);
      if constexpr (kIsScaled) load_scales();
      score(base);
      const Range rows = seen_by(base, base + block_->size);
      for (int64_t row = rows.first; row < rows.end; ++row) weigh(base, row);
      add_values(rows);
    }
  }

  static constexpr bool kIsScaled = std::is_same_v<Page, int8_t>;
  static constexpr int kVectors = kKeys / kLanes;
  static constexpr int64_t kWeightWords = kKeys * sizeof(typename G::Element) / sizeof(uint32_t);

  int64_t position_of(int64_t row) const { return position_ + row / a_.shared; }

  // The rows that see any of the keys from `first` to `end`.
  Range seen_by(int64_t first, int64_t end) const {
    return {std::max<int64_t>(0, first - position_) * a_.shared,
            std::min(count_, end - position_ + a_.window - 1) * a_.shared};
  }

  template <class T>
  void load_queries() {
    for (int64_t row = 0; row < rows_; ++row) {
      const T* from = static_cast<const T*>(a_.q) + (first_row_ + row / a_.shared) * a_.q_stride +
                      (head_ * a_.shared + row % a_.shared) * a_.head_stride;
      uint32_t* to = q_ + row * q_words_;
      to[q_words_ - 1] = 0;
      if constexpr (std::is_same_v<T, typename G::Element>)
        std::memcpy(to, from, a_.dim * sizeof(T));
      else
        for_vectors(a_.dim, [&](int64_t at, int count) {
          store(reinterpret_cast<float*>(to) + at, load(from + at, count), count);
        });
    }
  }

  void locate(Block<Page>* block, int64_t base) const {
    const int64_t* table = a_.block_tables + span_.slot * a_.table_stride;
    block->size = std::clamp<int64_t>(position_ + count_ - base, 0, kKeys);
    int64_t page = base / a_.block_size, within = base % a_.block_size;
    for (int64_t key = 0; key < block->size; ++page, within = 0) {
      int64_t row = (table[page] * a_.block_size + within) * 2 * a_.heads + head_;
      for (; within < a_.block_size && key < block->size; ++within, ++key, row += 2 * a_.heads) {
        block->keys[key] = static_cast<const Page*>(a_.pages) + row * a_.dim;
        if constexpr (kIsScaled) {
          block->scales[key] = a_.scales + row;
          __builtin_prefetch(a_.scales + row);
          __builtin_prefetch(a_.scales + row + a_.heads);
        }
      }
    }
    if (block->size > 0) std::fill(block->keys + block->size, block->keys + kKeys, block->keys[block->size - 1]);
  }

  void load_scales() {
    for (int64_t key = 0; key < block_->size; ++key) {
      key_scales_[key] = block_->scales[key][0];
      value_scales_[key] = block_->scales[key][a_.heads];
    }
  }

  void score(int64_t base) {
    const int64_t steps = kPanel / kLanes * ceil_div(a_.dim * sizeof(Page), sizeof(U32));
    for (int64_t first = 0; first < block_->size; first += kPanel) {
      const int64_t end = std::min(first + kPanel, block_->size);
      const Range rows = seen_by(base + first, base + end);
      if (rows.first >= rows.end) continue;
      const auto ahead = end == block_->size ? values_ahead(0, steps) : keys_ahead(*block_, end, steps);
      multiply<typename G::Dot>(
          q_, q_words_, rows, Keys<G, Page>{*block_, first, a_.dim, ahead}, granules_, panel_,
          [&](int64_t row, int column, F32 value) { store(scores_ + row * kKeys + first + column, value); });
    }
  }

  Fetch<Page> keys_ahead(const Block<Page>& block, int64_t first, int64_t steps) const {
    return {block, first, kPanel, 0, a_.dim, steps};
  }

  Fetch<Page> values_ahead(int64_t first, int64_t steps) const {
    return {*block_, 0, kKeys, a_.heads * a_.dim + first, std::min<int64_t>(kPanel, a_.dim - first), steps};
  }

  // Scores of a row become weights, relative to the largest so far; `factor_` is what the sums so far are to be
  // multiplied by.
  void weigh(int64_t base, int64_t row) {
    const int64_t last = position_of(row) - base;
    const int64_t first = std::max<int64_t>(0, last - a_.window + 1), end = std::min(last + 1, block_->size);
    if (first == 0 && end == kKeys)
      weigh(row, SeesAll{});
    else
      weigh(row, SeesSome{static_cast<int32_t>(first), static_cast<int32_t>(end)});
  }

  template <class Sees>
  void weigh(int64_t row, Sees sees) {
    const int from = sees.first / kLanes, to = static_cast<int>(ceil_div(sees.end, kLanes));
    F32 scores[kVectors];
    F32 most = splat<F32>(most_[row]);
#pragma GCC unroll 8
    for (int v = from; v < to; ++v) {
      F32 value = load(scores_ + row * kKeys + v * kLanes) * scale_;
      if constexpr (kIsScaled) value *= load(key_scales_ + v * kLanes);
      if (a_.soft_cap > 0) value = tanh(value) * cap_;
      scores[v] = value;
      most = max(most, sees.choose(v, value, most));
    }
    const F32 highest_so_far = splat<F32>(highest(most));
    factor_[row] = exp2(splat<F32>(most_[row]) - highest_so_far)[0];
    most_[row] = highest_so_far[0];
    auto* weights = weights_ + row * kKeys;
    F32 total = load(total_ + row * kLanes) * factor_[row];
    for (int v = 0; v < from; ++v) store(weights + v * kLanes, F32{});
#pragma GCC unroll 8
    for (int v = from; v < to; ++v) {
      F32 weight = sees.choose(v, exp2(scores[v] - highest_so_far), F32{});
      total += weight;
      if constexpr (kIsScaled) weight = sees.choose(v, weight * load(value_scales_ + v * kLanes), F32{});
      store(weights + v * kLanes, weight);
    }
    for (int v = to; v < kVectors; ++v) store(weights + v * kLanes, F32{});
    store(total_ + row * kLanes, total);
  }

  void add_values(Range rows) {
    const auto* weights = reinterpret_cast<const uint32_t*>(weights_);
    const int64_t granules = ceil_div(block_->size, G::kEach);
    for (int64_t first = 0; first < a_.dim; first += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, a_.dim - first), end = first + width;
      const auto ahead = end == a_.dim ? keys_ahead(*next_, 0, granules) : values_ahead(end, granules);
      multiply<typename G::Dot>(weights, kWeightWords, rows,
                                Values<G, Page>{*block_, a_.heads * a_.dim + first, width, ahead}, granules, panel_,
                                [&](int64_t row, int column, F32 value) {
                                  float* sum = sums_ + row * width_ + first + column;
                                  store(sum, load(sum) * factor_[row] + value);
                                });
    }
  }

  template <class T>
  void write_out() {
    for (int64_t row = 0; row < rows_; ++row) {
      T* out = static_cast<T*>(a_.out) + (first_row_ + row / a_.shared) * a_.stride +
               (head_ * a_.shared + row % a_.shared) * a_.dim;
      const float total = sum(load(total_ + row * kLanes));
      for_vectors(a_.dim, [&](int64_t at, int count) {
        store(out + at, load(sums_ + row * width_ + at, count) / total, count);
      });
    }
  }

  const AttentionArguments& a_;
  const Span& span_;
  const int64_t first_row_, position_, count_, head_, rows_, granules_, q_words_, width_;
  const float scale_, cap_;  // scores become powers of two
  float key_scales_[kKeys], value_scales_[kKeys];
  Block<Page> blocks_[2], *block_ = &blocks_[0], *next_ = &blocks_[1];
  uint32_t *q_, *panel_;
  float *scores_, *sums_, *most_, *total_, *factor_;
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
    case Type::kFloat32: return Attention<G, float>(a, item, head).template run<T>();
    case Type::kBfloat16: return Attention<G, Bf16>(a, item, head).template run<T>();
    case Type::kFloat16: return Attention<G, F16>(a, item, head).template run<T>();
    case Type::kFp8: return Attention<G, Fp8>(a, item, head).template run<T>();
    case Type::kInt8: return Attention<G, int8_t>(a, item, head).template run<T>();
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
