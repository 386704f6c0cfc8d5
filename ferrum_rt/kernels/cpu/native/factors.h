// Keys and values as factors of products: read from the pages, converted, and brought into granules, as tile.h wants its
// second factor; while that is done, what the next product is made of is fetched.
#pragma once

#include <algorithm>

#include "attention.h"
#include "tile.h"

namespace ferrum {

// -- keys and values as granules -------------------------------------------------------------------------------------------

template <int kStep, int... kAt>
inline void exchange(U32& a, U32& b, std::integer_sequence<int, kAt...>) {
  const U32 low = __builtin_shufflevector(a, b, (kAt & kStep ? kLanes + kAt - kStep : kAt)...);
  b = __builtin_shufflevector(a, b, (kAt & kStep ? kLanes + kAt : kAt + kStep)...);
  a = low;
}

// Transposes a square.
template <int kStep = kLanes / 2>
[[gnu::always_inline]] inline void transpose(U32 (&square)[kLanes]) {
#pragma GCC unroll 16
  for (int row = 0; row < kLanes; ++row)
    if ((row & kStep) == 0) exchange<kStep>(square[row], square[row + kStep], std::make_integer_sequence<int, kLanes>{});
  if constexpr (kStep > 1) transpose<kStep / 2>(square);
}

// a[0], b[0], a[1], b[1] and so on, from element `kFirst` of each.
template <int kFirst, int... kAt>
inline U32 zip(U32 a, U32 b, std::integer_sequence<int, kAt...>) {
  using Halves = uint16_t __attribute__((vector_size(kLanes * 4)));
  return bits<U32>(__builtin_shufflevector(bits<Halves>(a), bits<Halves>(b), (kFirst + kAt / 2 + kAt % 2 * 2 * kLanes)...));
}

template <class T>
constexpr bool kIsByte = sizeof(T) == 1;

// Element `at` of the rows whose words, of four bytes, these are: words[i] has word i of each.
template <class T>
inline F32 element(const U32* words, int at) {
  constexpr int kPerWord = 4 / sizeof(T), kBits = 32 / kPerWord;
  if constexpr (kPerWord == 1)
    return bits<F32>(words[at]);
  else
    return to_f32((words[at / kPerWord] >> (at % kPerWord * kBits)) & ((1u << kBits) - 1), T{});
}

struct TwoLines {
  U32 lines[2];
};

// Granules of one number.
struct Floats {
  using Dot = DotFloat32;
  using Element = float;
  static constexpr int kEach = 1;

  // Granule `at` of each row.
  template <class T>
  static U32 granule(const U32* words, int at) {
    return bits<U32>(element<T>(words, at));
  }

  // 2 * kLanes columns of kEach rows.
  template <class T>
  static TwoLines columns(const T* const* rows) {
    return {{bits<U32>(load(rows[0], kLanes)), bits<U32>(load(rows[0] + kLanes, kLanes))}};
  }
};

// Granules of two.
struct Pairs {
  using Dot = DotBfloat16;
  using Element = std::conditional_t<Dot::kXWords == 1, Bf16, float>;
  static constexpr int kEach = 2;

  template <class T>
  static U32 granule(const U32* words, int at) {
    if constexpr (std::is_same_v<T, Bf16>)
      return words[at];
    else if constexpr (kIsByte<T>)
      return at % 2 ? words_to_bf16(words[at / 2], T{}).second : words_to_bf16(words[at / 2], T{}).first;
    else
      return round_to_bf16(element<T>(words, 2 * at)) | round_to_bf16(element<T>(words, 2 * at + 1)) << 16;
  }

  template <class T>
  static TwoLines columns(const T* const* rows) {
    if constexpr (std::is_same_v<T, Bf16>) {
      const auto all = std::make_integer_sequence<int, 2 * kLanes>{};
      const U32 a = load_raw<U32>(rows[0]), b = load_raw<U32>(rows[1]);
      return {{zip<0>(a, b, all), zip<kLanes>(a, b, all)}};
    } else if constexpr (kIsByte<T>) {
      const Bf16Pairs pairs = rows_to_bf16(rows[0], rows[1]);
      return {{pairs.first, pairs.second}};
    } else {
      const auto line = [&](int at) {
        return round_to_bf16(load(rows[0] + at, kLanes)) | round_to_bf16(load(rows[1] + at, kLanes)) << 16;
      };
      return {{line(0), line(kLanes)}};
    }
  }
};

// `count` elements, and zeros behind them.
template <class T>
inline U32 load_words(const T* from, int64_t count) {
  U32 words{};
  std::memcpy(&words, from, count * sizeof(T));
  return words;
}

// Where the keys of a block lie, for one head; behind the last that there is it stands again. Each key's value is `to_value`
// elements behind it.
template <class T>
struct Block {
  int64_t size;
  const T* keys[kKeys];
  const float* scales[kKeys];  // of int8: a key's, its value's `heads` behind it
};

// What the next panel is made of comes into the second-level cache while this one is: `width` elements of some keys, from
// element `offset`. Not sooner: rows lie a power of two apart and push each other out.
template <class T>
class Fetch {
 public:
  Fetch(const Block<T>& block, int64_t first, int64_t count, int64_t offset, int64_t width, int64_t steps)
      : key_(block.keys + first),
        end_(block.keys + std::min(first + count, block.size)),
        offset_(offset),
        lines_(ceil_div(width, kLine)),
        keys_a_step_(ceil_div(end_ - key_, steps)) {}

  void step() {
    for (int64_t i = 0; i < keys_a_step_ && key_ < end_; ++i, ++key_)
      for (int64_t line = 0; line < lines_; ++line) __builtin_prefetch(*key_ + offset_ + line * kLine, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);

  const T *const *key_, *const *end_;
  int64_t offset_, lines_, keys_a_step_;
};

// Keys `first` to `first` + kPanel, as a factor: granules of dim by keys.
template <class G, class T>
struct Keys {
  static constexpr int kVectors = 1;

  const Block<T>& block;
  int64_t first, dim;
  Fetch<T> ahead;

  // Calls `use` with each granule of kLanes keys, from key `part` on.
  template <class Use>
  [[gnu::always_inline]] void each(int64_t part, Use use) {
    constexpr int kPerSquare = kLanes * 4 / sizeof(T), kGranules = kPerSquare / G::kEach;
    const T* const* keys = block.keys + first + part;
    for (int64_t at = 0; at < dim; at += kPerSquare) {
      ahead.step();
      U32 square[kLanes];
      if (const int64_t rest = dim - at; rest >= kPerSquare) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load_raw<U32>(keys[i] + at);
        transpose(square);
#pragma GCC unroll 64
        for (int i = 0; i < kGranules; ++i) use(at / G::kEach + i, {G::template granule<T>(square, i)});
      } else {
        for (int i = 0; i < kLanes; ++i) square[i] = load_words(keys[i] + at, rest);
        transpose(square);
        for (int i = 0; i < ceil_div(rest, G::kEach); ++i) use(at / G::kEach + i, {G::template granule<T>(square, i)});
      }
    }
  }
};

// What lies `offset` behind the keys, `width` numbers of it (up to kPanel), as a factor: granules of keys by numbers.
template <class G, class T>
struct Values {
  static constexpr int kVectors = 2;

  const Block<T>& block;
  int64_t offset, width;
  Fetch<T> ahead;

  // Calls `use` with each granule of 2 * kLanes numbers, from number `part` on.
  template <class Use>
  [[gnu::always_inline]] void each(int64_t part, Use use) {
    constexpr int kPart = 2 * kLanes;
    const int64_t rest = width - part;
    if (rest <= 0) return;
    for (int64_t key = 0, size = block.size; key < size; key += G::kEach) {
      ahead.step();
      const T* rows[G::kEach];
      for (int i = 0; i < G::kEach; ++i) rows[i] = block.keys[key + i] + offset + part;
      if (rest >= kPart) {
        use(key / G::kEach, G::columns(rows).lines);
      } else {
        T padded[G::kEach][kPart]{};
        for (int i = 0; i < G::kEach; ++i) {
          std::memcpy(padded[i], rows[i], rest * sizeof(T));
          rows[i] = padded[i];
        }
        use(key / G::kEach, G::columns(rows).lines);
      }
    }
  }
};

// -- products --------------------------------------------------------------------------------------------------------------

struct Range {
  int64_t first, end;
};

// Up to kRows rows of x by what `factor` has, as write(row, column, vector).
template <class Dot, int kRows, class Factor, class Write>
void multiply_few(const uint32_t* x, int64_t stride, Range rows, Factor factor, Write write) {
  constexpr int kVectors = Factor::kVectors;
  const uint32_t* from[kRows];
  for (int r = 0; r < kRows; ++r) from[r] = x + std::min(rows.first + r, rows.end - 1) * stride;
  for (int part = 0; part < kPanel; part += kVectors * kLanes) {
    typename Dot::Accumulator sums[kRows][kVectors]{};
    factor.each(part, [&](int64_t granule, const U32(&lines)[kVectors]) __attribute__((always_inline)) {
      add_granules<Dot>(sums, [&](int r) { return from[r] + granule * Dot::kXWords; }, lines);
    });
    for (int r = 0; r < rows.end - rows.first; ++r)
      for (int v = 0; v < kVectors; ++v) write(rows.first + r, part + v * kLanes, sums[r][v]);
  }
}

// The same for any number of rows, by way of a panel of `granules`. An output is summed up in the same order.
template <class Dot, class Factor, class Write>
void multiply(const uint32_t* x, int64_t stride, Range rows, Factor factor, int64_t granules, uint32_t* panel, Write write) {
  constexpr int kPart = Factor::kVectors * kLanes;
  int64_t row = rows.first;
  switch (rows.end - rows.first) {
    case 1:
    case 2: return multiply_few<Dot, 2>(x, stride, rows, factor, write);
    case 3:
    case 4: return multiply_few<Dot, 4>(x, stride, rows, factor, write);
  }
  for (int64_t part = 0; part < kPanel; part += kPart)
    factor.each(part, [&](int64_t granule, const U32(&lines)[Factor::kVectors]) __attribute__((always_inline)) {
      std::memcpy(panel + granule * kPanel + part, lines, sizeof(lines));
    });
  for (int64_t tiles = ceil_div(rows.end - rows.first, kMaxRows<Dot>); tiles > 0; --tiles) {
    const int height = static_cast<int>(ceil_div(rows.end - row, tiles));
    const auto compute = tile_of<Dot>(height);
    for (int part = 0; part < kPanel; part += kColumns) {
      typename Dot::Accumulator sums[kMaxRows<Dot>][kVectors];
      compute(x + row * stride, stride, panel + part, granules, {nullptr, 0}, sums);
      for (int r = 0; r < height; ++r)
        for (int v = 0; v < kVectors; ++v) write(row + r, part + v * kLanes, sums[r][v]);
    }
    row += height;
  }
}

}  // namespace ferrum
