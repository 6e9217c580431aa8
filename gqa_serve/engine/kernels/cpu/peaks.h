// What this machine can do at most: the limits that benchmarks/cpu.py measures the engine against.
//
// Owns loops that do nothing but read memory, or multiply-add float32, int8 or bfloat16 by the instructions the
// kernels use. Knows nothing of models. Not used when serving.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "team.h"

namespace gqa {

// Compiled once per instruction set (peak_loops.cpp). Each returns something that depends on all it computed.
struct PeakLoops {
  int64_t flops_per_round, int8_ops_per_round, bf16_ops_per_round; // a multiply-add is two; 0: it has none
  uint32_t (*read)(const void* data, size_t bytes); // bytes: a multiple of 512
  float (*fma)(int64_t rounds);
  int32_t (*int8)(int64_t rounds);
  int32_t (*bf16)(int64_t rounds);
};

const PeakLoops& peak_loops_avx2();
const PeakLoops& peak_loops_avx512();
const PeakLoops& peak_loops_amx();
const PeakLoops& peak_loops_neon();

struct Peaks {
  double read_bytes; // per second, by all threads together; so are the others
  double flops;      // float32
  double int8_ops;
  double bf16_ops;   // by tiles of bfloat16; 0 where there are none
};

// The best of some passes, about two seconds in all. Takes `buffer_bytes` of memory, which should be several
// times the last cache. Throws std::invalid_argument for an unknown instruction set, std::bad_alloc.
Peaks measure_peaks(const std::string& isa, Team& team, size_t buffer_bytes);

}  // namespace gqa
