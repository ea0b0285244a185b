// A team of threads that runs one function at a time, with barriers inside it; the caller is one of the team.
// It knows nothing of what it runs.
// Read first: threads spin at a barrier, since phases last microseconds, and give the core away when one takes longer;
// between calls they spin for a moment and then sleep.
#pragma once
#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <immintrin.h>
#include <sched.h>

class Team {
 public:
  explicit Team(int size) : size_(size) {
    for (int rank = 1; rank < size; ++rank) threads_.emplace_back([this, rank] { serve(rank); });
  }

  ~Team() {
    work_ = nullptr;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return size_; }

  // Run work(rank) on every thread of the team; returns when all have returned.
  void run(const std::function<void(int)>& work) {
    std::lock_guard<std::mutex> alone(mutex_);
    work_ = &work;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    work(0);
    barrier();
  }

  // Wait for all threads of the team.
  void barrier() {
    if (size_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < 4000) _mm_pause();
      else sched_yield();
    }
  }

 private:
  void serve(int rank) {
    for (uint32_t seen = 0;;) {
      for (int spins = 0; round_.load(std::memory_order_acquire) == seen && spins < 2000; ++spins) _mm_pause();
      round_.wait(seen, std::memory_order_acquire);
      seen = round_.load(std::memory_order_acquire);
      if (work_ == nullptr) return;
      (*work_)(rank);
      barrier();
    }
  }

  const int size_;
  std::mutex mutex_;
  const std::function<void(int)>* work_ = nullptr;
  std::atomic<uint32_t> round_{0}, phase_{0};
  std::atomic<int> arrived_{0};
  std::vector<std::thread> threads_;
};

// Items 0..count-1, a range for each of the team, in order; who has finished takes over from the others. One object per
// phase, reset by one thread before it.
class Share {
 public:
  explicit Share(int size) : next_(size) {}

  void reset() {
    for (auto& each : next_) each.value.store(0, std::memory_order_relaxed);
  }

  // What is whose before anybody takes over.
  static int64_t begin(int64_t count, int rank, int size) { return count * rank / size; }

  template <class F>
  void each(int64_t count, int rank, F&& work) {
    const int size = int(next_.size());
    for (int turn = 0; turn < size; ++turn) {
      const int whose = (rank + turn) % size;
      const int64_t first = begin(count, whose, size), end = begin(count, whose + 1, size);
      for (;;) {
        const int64_t item = first + next_[whose].value.fetch_add(1, std::memory_order_relaxed);
        if (item >= end) break;
        work(item);
      }
    }
  }

 private:
  struct alignas(64) Next {
    std::atomic<int64_t> value{0};
  };
  std::vector<Next> next_;
};
