// From tensors as checkpoints store them to the packed panels of formats.h, once at load, and back row by row.
//
// Owns packing, quantizing at load, and repacking of GGUF blocks. Does not know who allocates the panels, threads,
// or instruction sets: portable code, whose results are the same on every machine.
//
// Invariant: a panel is written whole, padding included. A source that is not finite, or does not fit the target's
// range, is an error (false) and never a silent infinity.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace gqa {

enum class SourceType : uint8_t { F32, BF16, F16 };

// Q8_0 -> I8, Q4_0 -> I4, Q4_1 -> I4 with minimum; all in groups of 32.
enum class GgufType : uint8_t { Q8_0, Q4_0, Q4_1 };

// Inputs as they are packed: PackedWeight::k_padded.
int padded_inputs(WeightFormat format, int k);

// Bytes of one panel: PackedWeight::panel_bytes. `group` and `has_min` matter for I8 and I4 only; a minimum exists
// for I4 only.
size_t panel_bytes(WeightFormat format, int k, int group, bool has_min);

// Pack panels [panel_begin, panel_end) of a matrix [n, k] whose rows are `row_stride` elements apart. I8 and I4
// quantize. `data` is w.data, writable. False if a weight is not finite or too large for the format.
bool pack_float(const PackedWeight& w, uint8_t* data, const void* source, SourceType type, size_t row_stride,
                int panel_begin, int panel_end);

// The same from GGUF rows of `row_bytes`, without loss. False if a scale is not finite.
bool pack_gguf(const PackedWeight& w, uint8_t* data, const uint8_t* rows, GgufType type, size_t row_bytes,
               int panel_begin, int panel_end);

// The float32 values of row `row` [k]: scale * q, rounded once more where there is a minimum.
void unpack_row(const PackedWeight& w, int row, float* out);

}  // namespace gqa
