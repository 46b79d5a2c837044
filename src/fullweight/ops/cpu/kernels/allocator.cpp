// torch's CPU allocator for large blocks.
//
// A training step frees and asks again for hundreds of large blocks. From glibc that costs fresh zeroed pages each
// time, or, when glibc is told to keep what is freed, a heap in whose holes small lasting objects settle, so that
// it grows to half as much again as is ever in use. Here large blocks have an address range of their own: best
// fit, free neighbours merged, pages kept for reuse and never given back. Small blocks stay with torch's default.
//
// Blocks start 64-byte aligned and are longer than asked by a few cache lines, so that the rows of several
// power-of-two tensors do not all fall on the same lines of the cache.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t SMALLEST = size_t(128) << 10, HUGE_PAGE = size_t(2) << 20, LINE = 64, SHIFT = 5 * LINE;

class Range {
 public:
  bool reserve(size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) return false;
    begin_ = top_ = (char*)(((uintptr_t)at + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    end_ = (char*)at + bytes;
    madvise(begin_, end_ - begin_, MADV_HUGEPAGE);
    return true;
  }
  bool holds(const void* p) const { return p >= begin_ && p < end_; }

  // The smallest free block that fits, else new pages; null when the range is used up.
  void* take(size_t bytes) {
    std::lock_guard<std::mutex> guard(mutex);
    const size_t size = (bytes + LINE - 1) / LINE * LINE + SHIFT;
    char* block = top_;
    auto fit = by_size_.lower_bound({size, nullptr});
    if (fit != by_size_.end()) {
      const auto [free, at] = *fit;
      forget(at, free);
      if (free > size) remember(at + size, free - size);
      block = at;
    } else {
      if (size > size_t(end_ - top_)) return nullptr;
      top_ += size;
      highest_ = std::max(highest_, top_);
    }
    taken_[block] = size;
    in_use_ += size;
    return block;
  }

  void give(void* p) {
    std::lock_guard<std::mutex> guard(mutex);
    auto entry = taken_.find((char*)p);
    char* block = entry->first;
    size_t size = entry->second;
    taken_.erase(entry);
    in_use_ -= size;
    auto next = by_address_.lower_bound(block);
    if (next != by_address_.end() && block + size == next->first) {
      size += next->second;
      forget(next->first, next->second);
    }
    auto after = by_address_.lower_bound(block);
    if (after != by_address_.begin()) {
      auto [before, length] = *std::prev(after);
      if (before + length == block) {
        forget(before, length);
        block = before;
        size += length;
      }
    }
    if (block + size == top_) top_ = block; else remember(block, size);
  }

  size_t in_use() const { return in_use_; }
  size_t most() const { return highest_ > begin_ ? highest_ - begin_ : 0; }

  std::mutex mutex;

 private:
  void remember(char* at, size_t size) { by_address_[at] = size; by_size_.insert({size, at}); }
  void forget(char* at, size_t size) { by_address_.erase(at); by_size_.erase({size, at}); }

  char *begin_ = nullptr, *top_ = nullptr, *highest_ = nullptr, *end_ = nullptr;
  std::map<char*, size_t> by_address_;             // free blocks
  std::set<std::pair<size_t, char*>> by_size_;     // the same
  std::unordered_map<char*, size_t> taken_;
  size_t in_use_ = 0;
};

Range& range() {
  static Range* one = new Range;  // never destroyed: tensors may outlive every static
  return *one;
}

struct LargeBlocks final : c10::Allocator {
  c10::Allocator* small = c10::GetDefaultCPUAllocator();

  static void release(void* p);
  c10::DataPtr allocate(size_t bytes) override {
    void* p = bytes >= SMALLEST ? range().take(bytes) : nullptr;
    if (!p) return small->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(p, bytes);
    return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

LargeBlocks& allocator() {
  static LargeBlocks* one = new LargeBlocks;
  return *one;
}

void LargeBlocks::release(void* p) {
  if (!range().holds(p)) return allocator().small->raw_deleter()(p);
  c10::profiledCPUMemoryReporter().Delete(p);
  range().give(p);
}

}  // namespace

// 1 when installed, 0 where the address space cannot be reserved (strict overcommit, ulimit -v).
extern "C" int install() {
  const size_t memory = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGE_SIZE));
  if (!range().reserve(4 * memory)) return 0;
  pthread_atfork([] { range().mutex.lock(); }, [] { range().mutex.unlock(); }, [] { range().mutex.unlock(); });
  c10::SetAllocator(c10::DeviceType::CPU, &allocator(), 255);
  return 1;
}

// Bytes of large blocks in use, and the most that the range ever spanned.
extern "C" void usage(uint64_t* in_use, uint64_t* most) {
  std::lock_guard<std::mutex> guard(range().mutex);
  *in_use = range().in_use();
  *most = range().most();
}
