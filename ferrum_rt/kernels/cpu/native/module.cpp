// What Python calls. Addresses travel as integers: they are those of tensors that the caller holds.
#include <tvm/ffi/tvm_ffi.h>

#include "linear.h"
#include "pool.h"
#include "simd.h"
#include "tile.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ferrum {
namespace {

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

int64_t open_pool(int64_t num_threads) { return reinterpret_cast<int64_t>(new Pool(static_cast<int>(num_threads))); }

void close_pool(int64_t pool) { delete at<Pool>(pool); }

// Large pages for memory that nobody has written to yet: weights are read from end to end, a page table entry for each 4 KiB.
void want_large_pages([[maybe_unused]] int64_t address, [[maybe_unused]] int64_t size) {
#if defined(__linux__)
  constexpr int64_t kPage = 2 << 20;
  const int64_t begin = ceil_div(address, kPage) * kPage, end = (address + size) / kPage * kPage;
  if (begin < end) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);  // where it is refused, small ones do
#endif
}

void run(int64_t pool, int64_t program, int64_t length, int64_t tokens, int64_t sampled, int64_t spans) {
  at<Pool>(pool)->run(at<const Instruction>(program), length, {tokens, sampled, spans});
}

void pack_weight(int64_t type, int64_t weight, int64_t rows, int64_t width, int64_t kind, int64_t out, int64_t scales,
                 int64_t offsets) {
  pack(static_cast<Type>(type), at<void>(weight), rows, width, static_cast<Kind>(kind), at<uint32_t>(out), at<float>(scales),
       at<int32_t>(offsets));
}

int64_t lanes() { return kLanes; }

tvm::ffi::String instruction_set() {
#if defined(FERRUM_AMX)
  if (amx_is_allowed()) return "amx, and avx512 with bf16 and vnni";
#endif
#if defined(FERRUM_AVX512) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  return "avx512 with bf16 and vnni";
#elif defined(FERRUM_AVX512)
  return "avx512";
#elif defined(FERRUM_AVX2) && defined(__AVXVNNI__)
  return "avx2 with vnni";
#elif defined(FERRUM_AVX2)
  return "avx2";
#else
  return "portable";
#endif
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(open_pool, open_pool);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(close_pool, close_pool);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(want_large_pages, want_large_pages);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_weight, pack_weight);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(lanes, lanes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(instruction_set, instruction_set);

}  // namespace
}  // namespace ferrum
