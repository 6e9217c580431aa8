#include "memory.h"

#include <new>

#include <sys/mman.h>

namespace gqa {

namespace {
constexpr size_t kChunk = 32 << 20;
size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
}  // namespace

Mapping::Mapping(size_t bytes, bool huge_pages) : size_(round_up(bytes + 64, huge_pages ? kHugePage : 4096)) {
  void* p = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(p);
#ifdef MADV_HUGEPAGE
  if (huge_pages) madvise(data_, size_, MADV_HUGEPAGE);  // advice: small pages serve as well, more slowly
#endif
}

Mapping::~Mapping() { munmap(data_, size_); }

Memory Arena::allocate(size_t bytes) {
  size_t size = round_up(bytes, 64);
  if (size > kChunk / 2) {
    auto own = std::make_shared<Mapping>(size, true);
    return {own, own->data(), bytes};
  }
  if (!current_ || used_ + size > kChunk) {
    current_ = std::make_shared<Mapping>(kChunk, true);
    used_ = 0;
  }
  uint8_t* data = current_->data() + used_;
  used_ += size;
  return {current_, data, bytes};
}

}  // namespace gqa
