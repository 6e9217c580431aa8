#include "peaks.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>

#include "isa.h"

namespace gqa {
namespace {

constexpr int kPasses = 7;
constexpr int64_t kRounds = 4'000'000; // some 20 to 50 ms
constexpr size_t kPageBytes = size_t(2) << 20;

const PeakLoops& loops_for(const std::string& isa) {
  kernels_for(isa); // throws if this processor lacks it
#if defined(__x86_64__)
  if (isa == "amx") return peak_loops_amx();
  return isa == "avx512" ? peak_loops_avx512() : peak_loops_avx2();
#else
  return peak_loops_neon();
#endif
}

// Memory in large pages where the system has them, so that reading it is not bound by address translation.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  ~Buffer() { munmap(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() { return static_cast<char*>(data_); }

 private:
  void* data_;
  size_t bytes_;
};

// Seconds of the fastest of some passes of work(thread) on all threads; they begin together.
template <class Work>
double fastest(Team& team, Work&& work) {
  using Clock = std::chrono::steady_clock;
  double best = 1e30;
  for (int pass = 0; pass < kPasses; pass++) {
    Clock::time_point start, end;
    team.run([&](int thread) {
      team.barrier(thread);
      if (thread == 0) start = Clock::now();
      work(thread);
      team.barrier(thread);
      if (thread == 0) end = Clock::now();
    });
    best = std::min(best, std::chrono::duration<double>(end - start).count());
  }
  return best;
}

}  // namespace

Peaks measure_peaks(const std::string& isa, Team& team, size_t buffer_bytes) {
  const PeakLoops& loops = loops_for(isa);
  std::atomic<int> threads{0}; // that the runtime gives us
  team.run([&](int) { threads++; });
  const size_t share = std::max(buffer_bytes / threads / kPageBytes, size_t(1)) * kPageBytes;
  Buffer buffer(share * threads);
  // Written first, by the thread that reads it: untouched pages are all the same one, which stays in the cache.
  team.run([&](int thread) { std::fill_n(buffer.data() + share * thread, share, char(thread + 1)); });
  std::atomic<uint32_t> sink; // what the loops return must go somewhere
  const double read = fastest(team, [&](int t) { sink = loops.read(buffer.data() + share * t, share); });
  const double fma = fastest(team, [&](int) { sink = uint32_t(loops.fma(kRounds)); });
  const double int8 = fastest(team, [&](int) { sink = uint32_t(loops.int8(kRounds)); });
  const double bf16 = loops.bf16 ? fastest(team, [&](int) { sink = uint32_t(loops.bf16(kRounds)); }) : 1.0;
  const double rounds = double(kRounds) * threads;
  return {double(share) * threads / read, rounds * double(loops.flops_per_round) / fma,
          rounds * double(loops.int8_ops_per_round) / int8, rounds * double(loops.bf16_ops_per_round) / bf16};
}

}  // namespace gqa
