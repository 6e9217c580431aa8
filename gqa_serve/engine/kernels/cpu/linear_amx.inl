// Quantized linear layers on AMX tiles: 16 rows x 16 outputs x 64 inputs per instruction.
//
//     activations of a tile of r rows            weights of a panel (I4: unpacked first)
//     chunk of 64 inputs: r rows of 64 bytes     chunk of 64 inputs: 16 quads of 32 outputs
//     = one A tile                               = two B tiles, outputs 0..15 and 16..31, rows 128 bytes apart
//
// Owns the arrangement of activations for tiles, and the loop over a panel. The integer sums are exact and go
// through the same float operations as in linear.inl, so that the bits are the same.
// Invariant: a chunk does not cross groups; a group's last chunk has 64 or 32 inputs. Each call configures the
// tiles and releases them, since other libraries use them too.
#pragma once

namespace gqa {
namespace {

constexpr int kAmxInputs = 64;

// Tiles of fewer than kAmxLeast rows are left to VNNI, which is faster there, in its own arrangement.
bool on_amx(const Activations& x) { return x.quantized && x.tile >= kAmxLeast; }

// As prepare_quantized() in linear.inl, but chunks of rows instead of runs of quads.
void prepare_amx(const float* x, size_t ld, int rows, const Activations& out, int row) {
  int8_t* q = const_cast<int8_t*>(out.q) + size_t(row) * out.k_padded;
  float* scale = const_cast<float*>(out.scale) + size_t(row) * out.groups;
  int32_t* sums = const_cast<int32_t*>(out.sum) + size_t(row) * out.groups;
  int8_t* bytes = static_cast<int8_t*>(__builtin_alloca(size_t(out.group) + 64));
  for (int m = 0; m < rows; m++) {
    OutlierList outliers = outliers_of(out, row + m);
    for (int g = 0; g < out.groups; g++) {
      const int begin = g * out.group;
      const int padded = out.k_padded - begin < out.group ? out.k_padded - begin : out.group;
      const int count = out.k - begin < padded ? out.k - begin : padded;
      quantize_group(x + m * ld + begin, count, padded, g, bytes, 4, scale + size_t(g) * rows + m,
                     sums + size_t(g) * rows + m, outliers);
      for (int i = 0; i < padded; i += kAmxInputs) {
        const int width = padded - i < kAmxInputs ? padded - i : kAmxInputs;
        memcpy(q + size_t(begin + i) * rows + size_t(m) * width, bytes + i, size_t(width));
      }
    }
    const_cast<int32_t*>(out.outlier_count)[row + m] = outliers.count;
  }
}

// Tiles: 0, 1 sums; 2 activations, 3 and 4 weights of 64 inputs; 5, 6 and 7 the same of 32.
void configure(int rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 32, 64, 64};
    uint8_t rows[16] = {};
  } config;
  const uint8_t r = uint8_t(rows);
  const uint8_t tile_rows[8] = {r, r, r, 16, 16, r, 8, 8};
  memcpy(config.rows, tile_rows, 8);
  asm volatile("" : : : "memory");  // the intrinsics do not say what they read
  _tile_loadconfig(&config);
}

// totals [rows][32] = the integer sums of `inputs` inputs, a whole group.
GQA_INLINE void multiply_tiles(const uint8_t* w, const int8_t* q, int inputs, int rows, int32_t* totals) {
  _tile_zero(0);
  _tile_zero(1);
  int i = 0;
  for (; i + kAmxInputs <= inputs; i += kAmxInputs) {
    _tile_loadd(2, q, kAmxInputs);
    _tile_loadd(3, w, 128);
    _tile_loadd(4, w + 64, 128);
    _tile_dpbsud(0, 2, 3);
    _tile_dpbsud(1, 2, 4);
    q += size_t(rows) * kAmxInputs;
    w += 32 * kAmxInputs;
  }
  if (i < inputs) {
    _tile_loadd(5, q, 32);
    _tile_loadd(6, w, 128);
    _tile_loadd(7, w + 64, 128);
    _tile_dpbsud(0, 5, 6);
    _tile_dpbsud(1, 5, 7);
  }
  _tile_stored(0, totals, 128);
  _tile_stored(1, totals + 16, 128);
}

// The end of quant_group() in linear.inl, from sums in memory.
template <bool kMin, bool kWide>
GQA_INLINE void add_group(const uint8_t* run, const int32_t* totals, int rows, int offset, const float* x_scale,
                          const int32_t* x_sum, float* sums) {
  f32x16 scale[2], minimum[2];
  for (int v = 0; v < 2; v++) {
    scale[v] = load_f16(reinterpret_cast<const uint16_t*>(run) + 16 * v);
    if constexpr (kMin) minimum[v] = load_f16(reinterpret_cast<const uint16_t*>(run) + 32 + 16 * v);
  }
  for (int m = 0; m < rows; m++) {
    const i32x16 start = iset1((kWide ? 0 : kMagicBits) - offset * x_sum[m]);
    const f32x16 by = set1(x_scale[m]), magic = set1(-kMagic * x_scale[m]);
    const f32x16 x_total = set1(float(x_sum[m]) * x_scale[m]);
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      const i32x16 total = iadd(iload(totals + 32 * m + 16 * v), start);
      const f32x16 product = kWide ? to_float(total) * by : fma(as_float(total), by, magic);
      float* to = sums + 32 * m + 16 * v;
      f32x16 result = fma(product, scale[v], load(to));
      if constexpr (kMin) result = fma(x_total, minimum[v], result);
      store(to, result);
    }
  }
}

// `inputs` inputs of 4-bit weights as bytes, in I8's arrangement.
GQA_INLINE void unpack_i4(const uint8_t* w, int inputs, uint8_t* out) {
  const i32x16 low = iset1(0x0f0f0f0f);
  for (int i = 0; i < inputs; i += 8) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) {
      const i32x16 packed = iload(w + 64 * v);
      istore(out + 64 * v, iand(packed, low));
      istore(out + 128 + 64 * v, iand(shift_right<4>(packed), low));
    }
    w += 128;
    out += 256;
  }
}

// sums [rows of the tiles][32] += one panel. Groups are in the outer loop, so that each is read (and unpacked) once.
template <WeightFormat F, bool kMin, bool kWide>
void amx_panel(const uint8_t* w, const Activations& x, int tile_begin, int tile_end, float* sums) {
  alignas(64) int32_t totals[kAmxRows * kPanel];
  constexpr int offset = F == WeightFormat::I8 ? 128 : kMin ? 0 : 8;
  uint8_t* bytes = nullptr;
  if (F == WeightFormat::I4) bytes = static_cast<uint8_t*>(__builtin_alloca(size_t(x.group) * kPanel));
  int configured = 0;
  for (int g = 0; g < x.groups; g++) {
    const int begin = g * x.group, left = x.k_padded - begin;
    const int inputs = left < x.group ? left : x.group;
    const uint8_t* weights = w + kHeadBytes<kMin>;
    const size_t size = size_t(inputs) / kQuantBlock * kBlockBytes<F>;
    for (size_t ahead = 0; ahead < size; ahead += 64) __builtin_prefetch(weights + size + ahead, 0, 2);
    if constexpr (F == WeightFormat::I4) {
      unpack_i4(weights, inputs, bytes);
      weights = bytes;
      asm volatile("" : : : "memory");
    }
    float* to = sums;
    for (int t = tile_begin; t < tile_end; t++) {
      const int rows = x.tile_rows(t);
      const size_t row = size_t(t) * x.tile, first = row * x.groups + size_t(g) * rows;
      if (rows != configured) configure(configured = rows);
      multiply_tiles(weights, x.q + row * x.k_padded + size_t(begin) * rows, inputs, rows, totals);
      add_group<kMin, kWide>(w, totals, rows, offset, x.scale + first, x.sum + first, to);
      to += 32 * rows;
    }
    w += kHeadBytes<kMin> + size;
  }
  _tile_release();
}

void multiply_panel_amx(const PackedWeight& w, const uint8_t* data, const Activations& x, int tile_begin, int tile_end,
                        float* sums) {
  constexpr auto I8 = WeightFormat::I8, I4 = WeightFormat::I4;
  const bool wide = int64_t(x.group) * 127 * (w.format == I8 ? 128 : 15) > kMagicSum;
  using Panel = void (*)(const uint8_t*, const Activations&, int, int, float*);
  Panel panel;
  if (w.format == I8) panel = wide ? &amx_panel<I8, false, true> : &amx_panel<I8, false, false>;
  else if (w.has_min) panel = wide ? &amx_panel<I4, true, true> : &amx_panel<I4, true, false>;
  else panel = wide ? &amx_panel<I4, false, true> : &amx_panel<I4, false, false>;
  panel(data, x, tile_begin, tile_end, sums);
}

}  // namespace
}  // namespace gqa
