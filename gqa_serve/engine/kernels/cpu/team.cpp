#include "team.h"

#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace gqa {
namespace {

template <class F>
void find_symbol(const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
}

inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb"); // `yield` does nothing on most cores
#endif
}

// Nanoseconds a thread spins before it sleeps. The most is about what it costs to put a thread to sleep and to
// wake it up, which is the most that spinning can save. Each spin in vain halves it, since another process
// then seems to have the core of the thread that is missing, and each spin that paid doubles it. In time and
// not in pauses, of which one takes from 10 to 150 cycles.
constexpr int kSpinMost = 40000, kSpinLeast = 625;
constexpr int kPausesPerLook = 16;

// True if `value` leaves `old` within `spin` nanoseconds.
bool spin_until_changed(const std::atomic<int>& value, int old, int spin) {
  const auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < kPausesPerLook; i++) {
      if (value.load(std::memory_order_acquire) != old) return true;
      pause_core();
    }
  } while (std::chrono::steady_clock::now() - start < std::chrono::nanoseconds(spin));
  return false;
}

}  // namespace

struct Team::Region {
  Team* team;
  void (*fn)(void*, int);
  void* data;
};

Runtime Runtime::find() {
  Runtime found{};
  find_symbol("GOMP_parallel", found.parallel);
  find_symbol("omp_get_thread_num", found.thread_num);
  find_symbol("omp_get_num_threads", found.num_threads);
  return found;
}

std::string team_error() {
  if (Runtime::find().complete()) return {};
  return "no OpenMP runtime is loaded in this process (torch brings one: libgomp, or libomp with its GOMP "
         "interface; import torch first)";
}

Team::Team(int threads) : threads_(threads), runtime_(Runtime::find()) {
  if (threads < 1) throw std::invalid_argument("a team needs at least 1 thread");
  if (threads > 1 && !runtime_.complete()) throw std::runtime_error(team_error());
  lanes_ = std::make_unique<Lane[]>(threads);
  for (int i = 0; i < threads; i++) lanes_[i].spin = kSpinMost;
}

void Team::run(void (*fn)(void*, int), void* data) {
  if (busy_.exchange(true, std::memory_order_acquire)) throw std::logic_error("this team is running already");
  if (threads_ == 1) {
    active_.store(1, std::memory_order_relaxed);
    work(fn, data, 0);
  } else {
    Region region{this, fn, data};
    runtime_.parallel(enter, &region, unsigned(threads_), 0);
  }
  std::exception_ptr error;
  if (failed_.load(std::memory_order_acquire)) { // threads may have left in the middle of a loop or barrier
    error = std::move(error_);
    error_ = nullptr;
    arrived_.store(0, std::memory_order_relaxed);
    reset_lanes(threads_);
    failed_.store(false, std::memory_order_relaxed);
  }
  busy_.store(false, std::memory_order_release);
  if (error) std::rethrow_exception(error);
}

void Team::enter(void* region) {
  const Region& r = *static_cast<Region*>(region);
  // Every thread stores the same number, so that none has to wait for it.
  r.team->active_.store(r.team->runtime_.num_threads(), std::memory_order_relaxed);
  r.team->work(r.fn, r.data, r.team->runtime_.thread_num());
}

void Team::work(void (*fn)(void*, int), void* data, int thread) noexcept {
  try {
    fn(data, thread);
  } catch (const RegionAbandoned&) {
  } catch (...) {
    abandon(std::current_exception());
  }
}

// Wakes all who wait at a barrier, which this thread will not reach.
void Team::abandon(std::exception_ptr error) {
  if (failed_.exchange(true, std::memory_order_acq_rel)) return;
  error_ = std::move(error);
  phase_.fetch_add(1, std::memory_order_release);
  phase_.notify_all();
}

void Team::reset_lanes(int active) {
  for (int i = 0; i < active; i++) lanes_[i].taken.store(0, std::memory_order_relaxed);
}

void Team::barrier(int thread) {
  const int active = active_.load(std::memory_order_relaxed);
  if (active == 1) return;
  const int phase = phase_.load(std::memory_order_acquire);
  if (failed_.load(std::memory_order_acquire)) throw RegionAbandoned{};
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == active) {
    reset_lanes(active);
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_for_phase_after(phase, lanes_[thread].spin);
  }
  if (failed_.load(std::memory_order_acquire)) throw RegionAbandoned{};
}

void Team::wait_for_phase_after(int phase, int& spin) {
  if (spin_until_changed(phase_, phase, spin)) {
    spin = std::min(2 * spin, kSpinMost);
  } else {
    spin = std::max(spin / 2, kSpinLeast);
    phase_.wait(phase, std::memory_order_acquire);
  }
}

}  // namespace gqa
