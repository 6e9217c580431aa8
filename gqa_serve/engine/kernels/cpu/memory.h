// Memory for weights, caches and buffers: zeroed, page-aligned, in huge pages where the system gives them.
//
// Owns the mapping. Pages cost memory once they are written. Many small weights share one mapping (Arena), so
// that huge pages do not round each of them up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace gqa {

constexpr size_t kHugePage = 2 << 20;

// One anonymous mapping. Throws std::bad_alloc.
class Mapping {
 public:
  Mapping(size_t bytes, bool huge_pages);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_;
  size_t size_;
};

// A piece of a mapping, which lives as long as any of its pieces.
struct Memory {
  std::shared_ptr<Mapping> mapping;
  uint8_t* data = nullptr;
  size_t size = 0;
};

// Hands out pieces of large mappings, aligned to 64 bytes. Not thread safe.
class Arena {
 public:
  Memory allocate(size_t bytes);

 private:
  std::shared_ptr<Mapping> current_;
  size_t used_ = 0;
};

}  // namespace gqa
