// Which instruction sets this program was compiled for, and which of them this processor has.
//
// Owns the choice of a table of kernels; knows nothing of what is in it.
// Invariant: code compiled for an instruction set is never entered where isa_levels() does not list it.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace gqa {

// Worst first: some of {"avx2", "avx512"}, or of {"neon"}; empty if none will do.
//   avx2     AVX2, FMA, F16C
//   avx512   also AVX-512 F, BW, VL, DQ and VNNI
//   amx      also AMX tiles of int8 and bfloat16
//   neon     ARMv8.2 dot product and half precision
std::vector<std::string> isa_levels();

// The kernels of one of isa_levels(). Throws std::invalid_argument, naming those, if it is none.
const Kernels& kernels_for(const std::string& isa);

}  // namespace gqa
