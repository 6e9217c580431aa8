// The threads that compute: those of torch's OpenMP runtime, for one parallel region at a time.
//
//     run(fn)  ->  thread 0:  fn -- loop --|-- loop --|-- ... end
//                  thread 1:  fn -- loop --|-- loop --|-- ... end      | is a barrier
//
// A whole step is one region; the loops inside it are cut by barriers, since entering a region costs more than
// a layer's norm. A loop gives each thread the same range each time (what it wrote is in its cache) and lets
// those that are done help the others. Waiting threads spin for some microseconds and then sleep, so that a
// busy machine gets its cores back.
//
// The runtime is looked up in the process, never linked, so that there is one pool of threads and not two.
// Invariant: every thread of a region passes the same barriers; if one throws, all leave and run() throws.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <type_traits>

namespace gqa {

// Entry points of the OpenMP runtime in this process, by libgomp's names; null where there is none.
struct Runtime {
  void (*parallel)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();

  static Runtime find();
  bool complete() const { return parallel && thread_num && num_threads; }
};

// Why there can be no threads in this process; empty if there can.
std::string team_error();

// What a thread's barrier throws when another thread has failed; run() throws that one's exception instead.
struct RegionAbandoned {};

class Team {
 public:
  // Throws std::invalid_argument if threads < 1, std::runtime_error if there are no threads to be had.
  explicit Team(int threads);
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Threads asked for; the runtime may give fewer.
  int threads() const { return threads_; }

  // fn(data, thread) on each thread, 0 <= thread < threads(); returns when all have. The first exception of a
  // thread is thrown from here. Not to be called by two threads at once or from inside a region (logic_error).
  void run(void (*fn)(void*, int), void* data);

  // fn(thread), the same.
  template <class F>
  void run(F&& fn) {
    using Function = std::remove_reference_t<F>;
    run([](void* data, int thread) { (*static_cast<Function*>(data))(thread); }, &fn);
  }

  // Inside a region: until all threads are here.
  void barrier(int thread);

  // Inside a region, called by all its threads: fn(i) once for each 0 <= i < n, in no particular order, then a
  // barrier.
  template <class F>
  void parallel_for(int thread, int n, F&& fn) {
    const int active = active_.load(std::memory_order_relaxed);
    if (active == 1) {
      for (int i = 0; i < n; i++) fn(i);
      return;
    }
    for (int offset = 0; offset < active; offset++) {
      const int range = thread + offset < active ? thread + offset : thread + offset - active;
      const int begin = int(int64_t(n) * range / active), size = int(int64_t(n) * (range + 1) / active) - begin;
      std::atomic<int>& taken = lanes_[range].taken;
      while (taken.load(std::memory_order_relaxed) < size) {
        const int i = taken.fetch_add(1, std::memory_order_relaxed);
        if (i < size) fn(begin + i);
      }
    }
    barrier(thread);
  }

 private:
  // One per thread, each in its own pair of cache lines (pairs are fetched together).
  struct alignas(128) Lane {
    std::atomic<int> taken{0}; // items of this thread's range that someone has begun
    int spin = 0;              // nanoseconds this thread spins at a barrier; its own
  };
  struct Region;

  static void enter(void* region);
  void work(void (*fn)(void*, int), void* data, int thread) noexcept;
  void abandon(std::exception_ptr error);
  void reset_lanes(int active);
  void wait_for_phase_after(int phase, int& spin);

  const int threads_;
  const Runtime runtime_;
  std::unique_ptr<Lane[]> lanes_;
  std::atomic<bool> busy_{false};
  std::exception_ptr error_; // written by the thread that set failed_, read after the region
  alignas(128) std::atomic<int> active_{1}; // threads in this region
  std::atomic<bool> failed_{false};
  alignas(128) std::atomic<int> arrived_{0};
  alignas(128) std::atomic<int> phase_{0}; // barriers passed; what sleepers wait on
};

}  // namespace gqa
