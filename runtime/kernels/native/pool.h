// A team of threads that runs one function at a time, phase by phase; the caller is one of the team.
// It knows nothing of what it runs.
// Read first: threads meet where all items of a phase are done. There they spin, since phases last microseconds, and give
// the core away when one takes longer; between calls they spin for a moment and then sleep. A thread whose core somebody
// else takes in the middle of a phase holds up all others until it has it back. So a phase is over when its items are done,
// whoever did them, and work of others can be handed to the team, which does it between phases.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
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
    set_running(true);
    work_ = &work;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    work(0);
    barrier();
    set_running(false);
  }

  // Do piece(0) to piece(count - 1) for a thread that is not of the team; returns when all are done. While the team runs,
  // each of its threads does one whenever it has come to the end of a phase; else the caller does them, and always where
  // there are cores that the team does not use.
  void aside(int64_t count, const std::function<void(int64_t)>& piece) {
    if (spare_cores_ || count == 0) {
      for (int64_t i = 0; i < count; ++i) piece(i);
      return;
    }
    Errand errand{piece, count};
    std::unique_lock<std::mutex> lock(mutex_of_errands_);
    errands_.push_back(&errand);
    open_.store(int(errands_.size()), std::memory_order_relaxed);
    while (errand.done < count) {
      if (!running_ && errand.next < count) do_one(lock, errand);
      else changed_.wait(lock);
    }
  }

  // Wait until all items of a phase are done, whoever did them.
  template <class Share>
  void meet(const Share& share) {
    if (open_.load(std::memory_order_relaxed)) help();
    for (int spins = 0; !share.over(); ++spins) pause(spins);
  }

 private:
  struct Errand {
    const std::function<void(int64_t)>& piece;
    int64_t count, next = 0, done = 0;
  };

  // Wait for all threads of the team.
  void barrier() {
    if (size_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) pause(spins);
  }

  static int num_cores() {
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof cores, &cores) ? int(std::thread::hardware_concurrency()) : CPU_COUNT(&cores);
  }

  static void pause(int spins) {
    if (spins < 4000) _mm_pause();
    else sched_yield();
  }

  void set_running(bool running) {
    if (spare_cores_) return;
    std::lock_guard<std::mutex> lock(mutex_of_errands_);
    running_ = running;
    if (!running) changed_.notify_all();  // who waits with an errand goes on with it alone
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_of_errands_);
    if (!errands_.empty()) do_one(lock, *errands_.front());
  }

  void do_one(std::unique_lock<std::mutex>& lock, Errand& errand) {
    const int64_t index = errand.next++;
    if (errand.next == errand.count) {
      errands_.erase(std::find(errands_.begin(), errands_.end(), &errand));
      open_.store(int(errands_.size()), std::memory_order_relaxed);
    }
    lock.unlock();
    errand.piece(index);
    lock.lock();
    if (++errand.done == errand.count) changed_.notify_all();
  }

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
  const bool spare_cores_ = size_ < num_cores();
  // What those who are not of the team want of it; the mutex guards what is no atomic.
  std::mutex mutex_of_errands_;
  std::condition_variable changed_;
  std::vector<Errand*> errands_;  // that have pieces left
  std::atomic<int> open_{0};  // how many these are
  bool running_ = false;
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
    end_->done.store(0, std::memory_order_relaxed);
    end_->count.store(-1, std::memory_order_relaxed);
  }

  // Whether all items are done; asked by a thread that has come through `each`.
  bool over() const { return end_->done.load(std::memory_order_acquire) == end_->count.load(std::memory_order_relaxed); }

  // What is whose before anybody takes over.
  static int64_t begin(int64_t count, int rank, int size) { return count * rank / size; }

  // Calls work(item) for the items of one thread, and before the first of them before(): a thread that has none may come
  // when other threads are phases further, so that without an item it must not look at what phases write.
  template <class Begin, class Work>
  void each(int64_t count, int rank, Begin&& before, Work&& work) {
    const int size = int(next_.size());
    int64_t mine = 0;
    bool begun = false;
    end_->count.store(count, std::memory_order_relaxed);
    for (int turn = 0; turn < size; ++turn) {
      const int whose = (rank + turn) % size;
      const int64_t first = begin(count, whose, size), end = begin(count, whose + 1, size);
      for (;;) {
        const int64_t item = first + next_[whose].value.fetch_add(1, std::memory_order_relaxed);
        if (item >= end) break;
        if (!begun) before();
        begun = true;
        work(item);
        ++mine;
      }
    }
    if (mine) end_->done.fetch_add(mine, std::memory_order_release);
  }

  template <class Work>
  void each(int64_t count, int rank, Work&& work) {
    each(count, rank, [] {}, work);
  }

 private:
  struct alignas(64) Next {
    std::atomic<int64_t> value{0};
  };
  std::vector<Next> next_;
  struct alignas(64) End {
    std::atomic<int64_t> done{0}, count{-1};
  };
  std::unique_ptr<End> end_ = std::make_unique<End>();
};
