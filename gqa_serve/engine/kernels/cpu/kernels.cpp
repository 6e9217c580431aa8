// The kernels of one instruction set. Compiled once per set, with its flags and GQA_KERNELS naming the table.
#include "kernels.h"

#include "simd.h"

#include "math.inl"

#include "attention.inl"
#include "rows.inl"

#include "linear.inl"  // after rows.inl, for gated()
#if defined(__AMX_INT8__)
#include "linear_amx.inl"
#include "linear_amx_float.inl"
#endif

#define GQA_STRING_(x) #x
#define GQA_STRING(x) GQA_STRING_(x)

namespace gqa {

const Kernels& GQA_KERNELS() {
  static constexpr Kernels table = {
      GQA_STRING(GQA_KERNELS) + sizeof("kernels_") - 1,
      kSplits,
      tile_rows,
      prepare,
      linear,
      gated_linear,
      rms_norm,
      add,
      gated,
      scale,
      scale_and_cap,
      rotate_and_write,
      argmax,
      row_max,
      exponentials,
      attend,
      merge,
  };
  return table;
}

}  // namespace gqa
