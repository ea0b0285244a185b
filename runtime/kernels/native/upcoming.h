// Memory that a thread will need soon, asked for a few lines at a time while it computes something else.
// It knows nothing of what lies there.
// Read first: many requests at once stall the thread that makes them; a few between multiplications cost nothing.
#pragma once
#include <cstdint>
#include <vector>

#include <immintrin.h>

class Upcoming {
 public:
  void clear() { parts_.clear(), lines_ = 0, at_ = 0, pace_ = 0; }

  void add(const void* data, size_t bytes) {
    if (bytes == 0) return;
    parts_.push_back({static_cast<const char*>(data), int64_t(bytes + 63) / 64});
    lines_ += parts_.back().lines;
  }

  // Ask for what is left in so many calls of `ask`.
  void spread(int64_t calls) { pace_ = calls > 0 ? (lines_ + calls - 1) / calls : lines_; }

  void ask() {
    if (at_ < parts_.size()) go();
  }

 private:
  __attribute__((noinline)) void go() {
    for (int64_t wanted = pace_; wanted > 0 && at_ < parts_.size();) {
      Part& part = parts_[at_];
      const int64_t now = wanted < part.lines ? wanted : part.lines;
      for (int64_t i = 0; i < now; ++i) _mm_prefetch(part.data + i * 64, _MM_HINT_T1);
      part.data += now * 64, part.lines -= now, wanted -= now, lines_ -= now;
      if (part.lines == 0) ++at_;
    }
  }

  struct Part {
    const char* data;
    int64_t lines;
  };
  std::vector<Part> parts_;
  int64_t lines_ = 0, pace_ = 0;
  size_t at_ = 0;
};
