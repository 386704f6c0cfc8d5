// What Python calls. Addresses travel as integers: they are those of tensors that the caller holds.
#include <tvm/ffi/tvm_ffi.h>

#include "linear.h"
#include "pool.h"
#include "simd.h"

namespace ferrum {
namespace {

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

int64_t open_pool(int64_t num_threads) { return reinterpret_cast<int64_t>(new Pool(static_cast<int>(num_threads))); }

void close_pool(int64_t pool) { delete at<Pool>(pool); }

void run(int64_t pool, int64_t program, int64_t length, int64_t tokens, int64_t sampled, int64_t spans) {
  at<Pool>(pool)->run(at<const Instruction>(program), length, {tokens, sampled, spans});
}

void pack_weight(int64_t type, int64_t weight, int64_t rows, int64_t width, int64_t kind, int64_t out, int64_t scales,
                 int64_t offsets) {
  pack(static_cast<Type>(type), at<void>(weight), rows, width, static_cast<Kind>(kind), at<uint32_t>(out), at<float>(scales),
       at<int32_t>(offsets));
}

int64_t lanes() { return kLanes; }

TVM_FFI_DLL_EXPORT_TYPED_FUNC(open_pool, open_pool);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(close_pool, close_pool);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(run, run);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_weight, pack_weight);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(lanes, lanes);

}  // namespace
}  // namespace ferrum
