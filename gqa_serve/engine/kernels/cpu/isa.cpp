#include "isa.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace gqa {
namespace {

struct Level {
  const char* name;
  bool (*supported)();
  const Kernels& (*kernels)();
};

#if defined(__x86_64__)

// Registers the operating system saves when it switches threads (XCR0): bit 1 xmm, 2 ymm, 5-7 AVX-512's.
uint32_t saved_registers() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return 0; // no OSXSAVE
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool has(uint32_t value, uint32_t bits) { return (value & bits) == bits; }

bool avx2() {
  uint32_t a, b, c, d;
  if (!has(saved_registers(), 0x6)) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, 1u << 12 | 1u << 28 | 1u << 29)) return false; // FMA AVX F16C
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && has(b, 1u << 5);
}

bool avx512() {
  uint32_t a, b, c, d;
  if (!avx2() || !has(saved_registers(), 0xe6)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return has(b, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31) && has(c, 1u << 11); // F DQ BW VL, VNNI
}

// Linux hands the tile registers to processes that ask for them.
bool amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  uint32_t a, b, c, d;
  if (!avx512() || !has(saved_registers(), 3u << 17)) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!has(d, 1u << 22 | 1u << 24 | 1u << 25)) return false;  // BF16, TILE, INT8
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

const Level kLevels[] = {
    {"avx2", avx2, kernels_avx2}, {"avx512", avx512, kernels_avx512}, {"amx", amx, kernels_amx}};

#elif defined(__aarch64__)

bool neon() {
#if defined(__linux__)
  const unsigned long half = 1ul << 10, dot_product = 1ul << 20; // HWCAP_ASIMDHP, HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & (half | dot_product)) == (half | dot_product);
#else
  return true; // every Apple processor of this kind has both
#endif
}

const Level kLevels[] = {{"neon", neon, kernels_neon}};

#else
#error "no kernels for this processor; CMakeLists.txt builds no extension for it"
#endif

}  // namespace

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels)
    if (level.supported()) names.emplace_back(level.name);
  return names;
}

const Kernels& kernels_for(const std::string& isa) {
  std::string supported;
  for (const Level& level : kLevels) {
    if (!level.supported()) continue;
    if (isa == level.name) return level.kernels();
    supported += supported.empty() ? level.name : std::string(", ") + level.name;
  }
  throw std::invalid_argument("instruction set '" + isa + "' is not available on this processor (available: " +
                              (supported.empty() ? "none" : supported) + ")");
}

}  // namespace gqa
