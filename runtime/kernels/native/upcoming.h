// Memory that a thread will need soon, asked for a few lines at a time while it computes something else.
// It knows nothing of what lies there.
// Read first: many requests at once stall the thread that makes them; a few between multiplications cost nothing but
// their instructions, of which there must be few per line.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include <immintrin.h>

constexpr int64_t LINE = 64;  // bytes of a cache line

// Long pieces of memory, in the order in which they were added.
class Stretches {
 public:
  void clear() { pieces_.clear(), lines_ = 0, at_ = 0, pace_ = 0; }

  void add(const void* data, int64_t bytes) {
    if (bytes <= 0) return;
    pieces_.push_back({static_cast<const char*>(data), bytes / LINE + 1});
    lines_ += pieces_.back().lines;
  }

  // Ask for what is left in so many calls of `ask`.
  void spread(int64_t calls) { pace_ = calls > 0 ? (lines_ + calls - 1) / calls : lines_; }

  void ask() {
    if (at_ < pieces_.size()) go();
  }

 private:
  __attribute__((noinline)) void go() {
    for (int64_t left = pace_; left > 0 && at_ < pieces_.size();) {
      Piece& piece = pieces_[at_];
      const int64_t now = std::min(left, piece.lines);
      for (int64_t i = 0; i < now; ++i) _mm_prefetch(piece.data + i * LINE, _MM_HINT_T1);
      piece.data += now * LINE, piece.lines -= now, left -= now, lines_ -= now;
      if (piece.lines == 0) ++at_;
    }
  }

  struct Piece {
    const char* data;
    int64_t lines;
  };
  std::vector<Piece> pieces_;
  int64_t lines_ = 0, pace_ = 0;
  size_t at_ = 0;
};

// The same part of each row of some matrices: short pieces, far from one another.
class Strips {
 public:
  void clear() { strips_.clear(), rows_ = 0, row_ = 0, at_ = 0, pace_ = 0; }

  // `rows` pieces of `bytes` each, `apart` bytes from one another. Of a piece that begins or ends within a line only as
  // many lines are asked for as it fills: the first came with the piece before it.
  void add(const void* data, int64_t bytes, int64_t rows, int64_t apart) {
    if (bytes <= 0 || rows <= 0) return;
    strips_.push_back({static_cast<const char*>(data) + bytes - 1, apart, rows, (bytes + LINE - 1) / LINE});
    rows_ += rows;
  }

  // Ask for all of it in so many calls of `ask`.
  void spread(int64_t calls) { pace_ = calls > 0 ? (rows_ + calls - 1) / calls : rows_; }

  void ask() {
    if (at_ < strips_.size()) go();
  }

 private:
  __attribute__((noinline)) void go() {
    for (int64_t left = pace_; left > 0 && at_ < strips_.size();) {
      const Strip& strip = strips_[at_];
      const int64_t now = std::min(left, strip.rows - row_);
      const char* last = strip.last + row_ * strip.apart;
      if (strip.lines == 1) {
        for (int64_t i = 0; i < now; ++i, last += strip.apart) _mm_prefetch(last, _MM_HINT_T0);
      } else if (strip.lines == 2) {
        for (int64_t i = 0; i < now; ++i, last += strip.apart) _mm_prefetch(last - LINE, _MM_HINT_T0), _mm_prefetch(last, _MM_HINT_T0);
      } else {
        for (int64_t i = 0; i < now; ++i, last += strip.apart)
          for (int64_t line = strip.lines - 1; line >= 0; --line) _mm_prefetch(last - line * LINE, _MM_HINT_T0);
      }
      left -= now, row_ += now;
      if (row_ == strip.rows) row_ = 0, ++at_;
    }
  }

  struct Strip {
    const char* last;
    int64_t apart, rows, lines;
  };
  std::vector<Strip> strips_;
  int64_t rows_ = 0, row_ = 0, pace_ = 0;
  size_t at_ = 0;
};

struct Upcoming {
  Stretches phase;  // of the next phase, over the whole of this one
  Strips item;      // of what this item needs after its product

  void ask() {
    item.ask();
    phase.ask();
  }
};
