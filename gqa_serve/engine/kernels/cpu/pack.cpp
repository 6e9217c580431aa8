// Packing and quantizing of weights; see pack.h. Portable vectors of four floats, no instruction set assumed.
#include "pack.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace gqa {
namespace {

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));

// --- 16-bit floats ---

float from_bf16(uint16_t h) { return std::bit_cast<float>(uint32_t(h) << 16); }

// Subnormal halves are renormalised by a subtraction, so that no float32 subnormal appears on the way.
float from_f16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu, sign = uint32_t(h & 0x8000u) << 16;
  uint32_t bits = (magnitude << 13) + (112u << 23);
  if (magnitude >= 0x7c00u) bits += 112u << 23;
  if (magnitude < 0x0400u) {
    bits = std::bit_cast<uint32_t>(std::bit_cast<float>(bits + (1u << 23)) - std::bit_cast<float>(113u << 23));
  }
  return std::bit_cast<float>(bits | sign);
}

// Nearest, ties to even; magnitudes from 65520 on become infinite.
uint16_t to_f16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (magnitude < 0x38800000u) { // below 2^-14: the sum's last bit is worth 2^-24
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (std::bit_cast<uint32_t>(sum) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}

uint16_t to_bf16(float x) { // of a finite value
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

bool finite_f16(uint16_t h) { return (h & 0x7c00u) != 0x7c00u; }

uint16_t read16(const uint8_t* p) {
  uint16_t h;
  memcpy(&h, p, 2);
  return h;
}

// --- reading a row ---

const uint8_t* source_row(const void* source, SourceType type, size_t row_stride, int row) {
  const size_t size = type == SourceType::F32 ? 4 : 2;
  return static_cast<const uint8_t*>(source) + size_t(row) * row_stride * size;
}

// `count` elements as float32; false if one is not finite.
bool read_row(const uint8_t* row, SourceType type, int begin, int count, float* out) {
  if (type == SourceType::F32) {
    memcpy(out, row + size_t(begin) * 4, size_t(count) * 4);
  } else {
    const uint8_t* p = row + size_t(begin) * 2;
    if (type == SourceType::BF16) {
      for (int i = 0; i < count; i++) out[i] = from_bf16(read16(p + 2 * i));
    } else {
      for (int i = 0; i < count; i++) out[i] = from_f16(read16(p + 2 * i));
    }
  }
  uint32_t bad = 0;
  for (int i = 0; i < count; i++) {
    bad |= uint32_t((std::bit_cast<uint32_t>(out[i]) & 0x7f800000u) == 0x7f800000u);
  }
  return !bad;
}

// --- float panels ---

constexpr int kColumns = 64; // inputs transposed at a time

f32x4 read4(const float* x) {
  f32x4 v;
  memcpy(&v, x, 16);
  return v;
}

// from [kPanel][kColumns] -> to [kColumns][kPanel]
void transpose(const float (*from)[kColumns], float (*to)[kPanel]) {
  for (int j = 0; j < kPanel; j += 4) {
    for (int i = 0; i < kColumns; i += 4) {
      const f32x4 a = read4(&from[j][i]), b = read4(&from[j + 1][i]);
      const f32x4 c = read4(&from[j + 2][i]), d = read4(&from[j + 3][i]);
      const f32x4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
      const f32x4 ef = __builtin_shufflevector(a, b, 2, 6, 3, 7), gh = __builtin_shufflevector(c, d, 2, 6, 3, 7);
      const f32x4 rows[4] = {__builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
                             __builtin_shufflevector(ef, gh, 0, 1, 4, 5), __builtin_shufflevector(ef, gh, 2, 3, 6, 7)};
      for (int l = 0; l < 4; l++) memcpy(&to[i + l][j], &rows[l], 16);
    }
  }
}

// Two inputs of all outputs -> one row of a BF16 panel; false if a value overflows.
bool store_pair(const float (*inputs)[kPanel], uint8_t* out) {
  uint32_t words[kPanel], bad = 0;
  for (int j = 0; j < kPanel; j++) {
    const uint16_t low = to_bf16(inputs[0][j]), high = to_bf16(inputs[1][j]);
    bad |= uint32_t((low & 0x7f80u) == 0x7f80u) | uint32_t((high & 0x7f80u) == 0x7f80u);
    words[j] = low | uint32_t(high) << 16;
  }
  memcpy(out, words, sizeof words);
  return !bad;
}

// One input of all outputs -> one row of an F16 panel.
bool store_halves(const float (&input)[kPanel], uint8_t* out) {
  uint16_t halves[kPanel];
  uint32_t bad = 0;
  for (int j = 0; j < kPanel; j++) {
    halves[j] = to_f16(input[j]);
    bad |= uint32_t(!finite_f16(halves[j]));
  }
  memcpy(out, halves, sizeof halves);
  return !bad;
}

// `count` inputs of all outputs -> rows of the panel; false if a value overflows the format. BF16: count is even.
bool store_inputs(WeightFormat format, const float (*inputs)[kPanel], int count, uint8_t* out) {
  bool good = true;
  if (format == WeightFormat::F32) {
    memcpy(out, inputs, size_t(count) * kPanel * 4);
  } else if (format == WeightFormat::BF16) {
    for (int i = 0; i < count; i += 2) good &= store_pair(inputs + i, out + size_t(i) * kPanel * 2);
  } else {
    for (int i = 0; i < count; i++) good &= store_halves(inputs[i], out + size_t(i) * kPanel * 2);
  }
  return good;
}

size_t float_size(WeightFormat format) { return format == WeightFormat::F32 ? 4 : 2; }

bool pack_float_panel(const PackedWeight& w, uint8_t* out, const void* source, SourceType type, size_t row_stride,
                      int panel) {
  alignas(16) float rows[kPanel][kColumns], inputs[kColumns][kPanel];
  memset(rows, 0, sizeof rows);
  const int outputs = std::min(kPanel, w.n - panel * kPanel);
  for (int i = 0; i < w.k; i += kColumns) {
    const int count = std::min(kColumns, w.k - i), padded = std::min(kColumns, w.k_padded - i);
    for (int j = 0; j < outputs; j++) {
      if (!read_row(source_row(source, type, row_stride, panel * kPanel + j), type, i, count, rows[j])) return false;
      std::fill(rows[j] + count, rows[j] + padded, 0.0f);
    }
    transpose(rows, inputs);
    if (!store_inputs(w.format, inputs, padded, out + size_t(i) * kPanel * float_size(w.format))) return false;
  }
  return true;
}

// --- quantizing one group ---

// Scale and minimum as they are stored; the weight is scale * (code - offset) + minimum.
struct Group {
  uint16_t scale = 0, minimum = 0;
};

// The codes of a format before `offset` is added.
struct Codes {
  float low, high, offset;
};
constexpr Codes kCodesI8 = {-127.0f, 127.0f, 128.0f}, kCodesI4 = {-8.0f, 7.0f, 8.0f}, kCodesI4Min = {0.0f, 15.0f, 0.0f};

f32x4 splat(float x) { return f32x4{x, x, x, x}; }

float total(f32x4 v) { return (v[0] + v[1]) + (v[2] + v[3]); }

// The nearest integer, ties to even, between the lowest and the highest code.
f32x4 round_code(f32x4 v, const Codes& codes) {
  const f32x4 low = splat(codes.low), high = splat(codes.high), magic = splat(12582912.0f);
#if defined(__SSE2__) // what compilers make of the comparisons is four times as long
  v = (f32x4)_mm_min_ps(_mm_max_ps((__m128)v, (__m128)low), (__m128)high);
#else
  v = v < low ? low : v;
  v = v > high ? high : v;
#endif
  return (v + magic) - magic;
}

// Codes for the scale and minimum as stored. The reciprocal of the smallest half is finite.
void write_codes(const float* x, int count, const Group& group, const Codes& codes, uint8_t* out) {
  const float scale = from_f16(group.scale);
  const f32x4 inverse = splat(scale == 0.0f ? 0.0f : 1.0f / scale), minimum = splat(from_f16(group.minimum));
  for (int i = 0; i < count; i += 4) {
    const f32x4 q = round_code((read4(x + i) - minimum) * inverse, codes) + splat(codes.offset);
    const i32x4 whole = __builtin_convertvector(q, i32x4);
    for (int l = 0; l < 4; l++) out[i + l] = uint8_t(whole[l]);
  }
}

struct Range {
  float low, high;
  float peak() const { return high >= -low ? high : low; } // the value of largest magnitude
};

Range range(const float* x, int count) {
  f32x4 low = read4(x), high = low;
  for (int i = 4; i < count; i += 4) {
    const f32x4 v = read4(x + i);
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  return {std::min(std::min(low[0], low[1]), std::min(low[2], low[3])),
          std::max(std::max(high[0], high[1]), std::max(high[2], high[3]))};
}

// The nearest half; the next one up where a subnormal half would be so much too small that it clips the weights.
bool scale_i8(const float* x, int count, Group* out) {
  const float amax = std::fabs(range(x, count).peak());
  out->scale = to_f16(amax / 127.0f);
  if (from_f16(out->scale) * 127.4f < amax) out->scale++;
  return finite_f16(out->scale);
}

// What least squares needs of weights and their codes. Two sums each: one addition need not wait for the last.
struct Moments {
  f32x4 q[2] = {}, qq[2] = {}, xq[2] = {};
};

Moments moments(const float* x, int count, float minimum, float inverse, const Codes& codes) {
  Moments sums;
  for (int i = 0; i < count; i += 8) {
    for (int l = 0; l < 2; l++) {
      const f32x4 v = read4(x + i + 4 * l), q = round_code((v - splat(minimum)) * splat(inverse), codes);
      sums.q[l] += q;
      sums.qq[l] += q * q;
      sums.xq[l] += v * q;
    }
  }
  return sums;
}

float total(const f32x4 (&v)[2]) { return total(v[0] + v[1]); }

// The largest weight, of either sign, goes to -reach for some reaches around 8; each gives codes, and they a scale by
// least squares. Squares are of weights divided by the largest, so that they neither overflow nor vanish.
bool scale_i4(const float* x, int count, float* work, Group* out) {
  const float peak = range(x, count).peak();
  if (std::fabs(peak) < 1e-30f) return true; // far below the smallest half
  const float unit = 1.0f / peak;
  for (int i = 0; i < count; i++) work[i] = x[i] * unit;
  float best_gain = 0.0f, best = 0.0f;
  for (int c = 0; c < 9; c++) {
    const Moments sums = moments(work, count, 0.0f, -7.0f - 0.35f * float(c), kCodesI4);
    const float xq = total(sums.xq), qq = total(sums.qq), gain = xq * xq / qq; // error: sum x^2 - gain
    if (gain > best_gain) best_gain = gain, best = xq / qq;
  }
  out->scale = to_f16(best * peak);
  return finite_f16(out->scale);
}

// Spread over 0 .. reach for some reaches around 15; each gives codes, and they a scale and a minimum by least squares.
bool scale_i4_min(const float* x, int count, float* work, Group* out) {
  const Range of = range(x, count);
  const float peak = std::fabs(of.peak());
  if (peak < 1e-30f) return true;
  const float unit = 1.0f / peak, low = of.low * unit, high = of.high * unit;
  float sum_x = 0.0f, best_gain = -INFINITY, scale = 0.0f, minimum = low;
  for (int i = 0; i < count; i++) work[i] = x[i] * unit, sum_x += work[i];
  for (int c = 0; c < 9 && high > low; c++) {
    const float n = float(count), inverse = (14.1f + 0.3f * float(c)) / (high - low);
    const Moments sums = moments(work, count, low, inverse, kCodesI4Min);
    const float q = total(sums.q), qq = total(sums.qq), xq = total(sums.xq), determinant = n * qq - q * q;
    if (determinant <= 0.0f) continue;
    const float s = (n * xq - sum_x * q) / determinant, m = (sum_x - s * q) / n;
    const float gain = s * xq + m * sum_x; // error: sum x^2 - gain
    if (gain > best_gain) best_gain = gain, scale = s, minimum = m;
  }
  *out = {to_f16(scale * peak), to_f16(minimum * peak)};
  return finite_f16(out->scale) && finite_f16(out->minimum);
}

// --- quantized panels ---

size_t head_bytes(bool has_min) { return has_min ? 128 : 64; }

// Output `column` of one group: `padded` codes at their places.
void store_group(WeightFormat format, bool has_min, uint8_t* run, int column, const Group& group,
                 const uint8_t* codes, int padded) {
  memcpy(run + 2 * column, &group.scale, 2);
  if (has_min) memcpy(run + 64 + 2 * column, &group.minimum, 2);
  uint8_t* out = run + head_bytes(has_min) + 4 * column;
  if (format == WeightFormat::I8) {
    for (int i = 0; i < padded; i += 4) memcpy(out + 32 * i, codes + i, 4);
    return;
  }
  for (int i = 0; i < padded; i += 8) {
    uint32_t low, high;
    memcpy(&low, codes + i, 4);
    memcpy(&high, codes + i + 4, 4);
    low |= high << 4;
    memcpy(out + 16 * i, &low, 4);
  }
}

const Codes& codes_of(const PackedWeight& w) {
  return w.format == WeightFormat::I8 ? kCodesI8 : w.has_min ? kCodesI4Min : kCodesI4;
}

size_t group_bytes(const PackedWeight& w, int inputs) {
  return head_bytes(w.has_min) + size_t(inputs) * (w.format == WeightFormat::I8 ? 32 : 16);
}

// Codes and scale of the `count` weights of one group at x, which has room for a multiple of 8.
bool quantize_group(const PackedWeight& w, float* x, int count, float* work, Group* group, uint8_t* codes) {
  const int whole = (count + 7) & ~7;
  for (int i = count; i < whole; i++) x[i] = x[count - 1];
  const bool good = w.format == WeightFormat::I8 ? scale_i8(x, whole, group)
                    : w.has_min                  ? scale_i4_min(x, whole, work, group)
                                                 : scale_i4(x, whole, work, group);
  if (good) write_codes(x, whole, *group, codes_of(w), codes);
  return good;
}

bool pack_quantized_panel(const PackedWeight& w, uint8_t* out, const void* source, SourceType type,
                          size_t row_stride, int panel) {
  const int outputs = std::min(kPanel, w.n - panel * kPanel);
  std::vector<float> values(size_t(w.group) * 2);
  std::vector<uint8_t> codes(static_cast<size_t>(w.group));
  for (int begin = 0; begin < w.k_padded; begin += w.group) {
    const int padded = std::min(w.group, w.k_padded - begin), count = std::min(padded, w.k - begin);
    for (int j = 0; j < kPanel; j++) {
      Group group;
      int written = 0;
      if (j < outputs) {
        const uint8_t* row = source_row(source, type, row_stride, panel * kPanel + j);
        if (!read_row(row, type, begin, count, values.data())) return false;
        if (!quantize_group(w, values.data(), count, values.data() + w.group, &group, codes.data())) return false;
        written = count;
      }
      memset(codes.data() + written, int(codes_of(w).offset), size_t(padded - written));
      store_group(w.format, w.has_min, out, j, group, codes.data(), padded);
    }
    out += group_bytes(w, padded);
  }
  return true;
}

// --- GGUF blocks of 32 weights: f16 scale, f16 minimum (Q4_1), codes ---
// Q8_0: signed bytes. Q4_0, Q4_1: 16 bytes, byte j holds weight j in its low half and weight j + 16 in its high half.

size_t gguf_block_bytes(GgufType type) { return type == GgufType::Q8_0 ? 34 : type == GgufType::Q4_0 ? 18 : 20; }

bool read_block(const uint8_t* block, GgufType type, Group* group, uint8_t* codes) {
  group->scale = read16(block);
  if (type == GgufType::Q4_1) group->minimum = read16(block + 2);
  const uint8_t* q = block + (type == GgufType::Q4_1 ? 4 : 2);
  if (type == GgufType::Q8_0) {
    for (int i = 0; i < kQuantBlock; i++) codes[i] = q[i] ^ 0x80;
  } else {
    for (int i = 0; i < 16; i++) codes[i] = q[i] & 15, codes[i + 16] = q[i] >> 4;
  }
  return finite_f16(group->scale) && finite_f16(group->minimum);
}

// --- one row back ---

float float_at(const PackedWeight& w, const uint8_t* panel, int column, int i) {
  if (w.format == WeightFormat::F32) return reinterpret_cast<const float*>(panel)[size_t(i) * kPanel + column];
  if (w.format == WeightFormat::F16) return from_f16(read16(panel + size_t(i) * kPanel * 2 + 2 * column));
  return from_bf16(read16(panel + size_t(i / 2) * kPanel * 4 + 4 * column + 2 * (i % 2)));
}

// Code of input i of a group, at the group's quads.
int code_at(const PackedWeight& w, const uint8_t* quads, int column, int i) {
  if (w.format == WeightFormat::I8) return quads[size_t(i / 4) * 128 + 4 * column + i % 4];
  const uint8_t both = quads[size_t(i / 8) * 128 + 4 * column + i % 4];
  return i % 8 < 4 ? both & 15 : both >> 4;
}

}  // namespace

int padded_inputs(WeightFormat format, int k) {
  if (format == WeightFormat::F32 || format == WeightFormat::F16) return k;
  return (k + kInputPad - 1) / kInputPad * kInputPad;
}

size_t panel_bytes(WeightFormat format, int k, int group, bool has_min) {
  const size_t padded = size_t(padded_inputs(format, k));
  switch (format) {
    case WeightFormat::F32: return padded * kPanel * 4;
    case WeightFormat::BF16:
    case WeightFormat::F16: return padded * kPanel * 2;
    case WeightFormat::I8:
    case WeightFormat::I4: break;
  }
  const size_t groups = (padded + size_t(group) - 1) / size_t(group);
  return groups * head_bytes(has_min) + padded * kPanel / (format == WeightFormat::I8 ? 1 : 2);
}

bool pack_float(const PackedWeight& w, uint8_t* data, const void* source, SourceType type, size_t row_stride,
                int panel_begin, int panel_end) {
  for (int panel = panel_begin; panel < panel_end; panel++) {
    uint8_t* out = data + size_t(panel) * w.panel_bytes;
    const bool good = w.quantized() ? pack_quantized_panel(w, out, source, type, row_stride, panel)
                                    : pack_float_panel(w, out, source, type, row_stride, panel);
    if (!good) return false;
  }
  return true;
}

bool pack_gguf(const PackedWeight& w, uint8_t* data, const uint8_t* rows, GgufType type, size_t row_bytes,
               int panel_begin, int panel_end) {
  const int blocks = w.k_padded / kQuantBlock;
  uint8_t codes[kQuantBlock];
  for (int panel = panel_begin; panel < panel_end; panel++) {
    uint8_t* panel_data = data + size_t(panel) * w.panel_bytes;
    for (int j = 0; j < kPanel; j++) {
      const int output = panel * kPanel + j;
      const uint8_t* row = rows + size_t(output) * row_bytes;
      for (int b = 0; b < blocks; b++) {
        Group group;
        if (output >= w.n) memset(codes, int(codes_of(w).offset), sizeof codes);
        else if (!read_block(row + size_t(b) * gguf_block_bytes(type), type, &group, codes)) return false;
        store_group(w.format, w.has_min, panel_data + size_t(b) * group_bytes(w, kQuantBlock), j, group, codes,
                    kQuantBlock);
      }
    }
  }
  return true;
}

void unpack_row(const PackedWeight& w, int row, float* out) {
  const uint8_t* run = w.data + size_t(row / kPanel) * w.panel_bytes;
  const int column = row % kPanel;
  if (!w.quantized()) {
    for (int i = 0; i < w.k; i++) out[i] = float_at(w, run, column, i);
    return;
  }
  const int offset = int(codes_of(w).offset);
  for (int begin = 0; begin < w.k; begin += w.group) {
    const int padded = std::min(w.group, w.k_padded - begin), count = std::min(padded, w.k - begin);
    const float scale = from_f16(read16(run + 2 * column));
    const float minimum = w.has_min ? from_f16(read16(run + 64 + 2 * column)) : 0.0f;
    const uint8_t* quads = run + head_bytes(w.has_min);
    for (int i = 0; i < count; i++) {
      const float value = scale * float(code_at(w, quads, column, i) - offset);
      out[begin + i] = w.has_min ? value + minimum : value;
    }
    run += group_bytes(w, padded);
  }
}

}  // namespace gqa
